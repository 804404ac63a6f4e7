"""Kill training many times, at random moments and while it writes its checkpoint, and resume it each time:

    python tests/long/kill_loop.py

The last and the best checkpoint must be those of an uninterrupted training, bit for bit. This needs Linux, and takes
about 15 minutes.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import torch

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, root)

from checkpoints import load_checkpoint  # noqa: E402
from create_data_lists import create_data_lists  # noqa: E402
from demo import draw_dataset, shapes  # noqa: E402

n_kills = 60
more_epochs = 2  # after the last kill
seed = 0  # for the moments of the kills

# What each process runs: train.py with other parameters
program = '''
import errors, os, sys, train
train.checkpoint_path, epochs = sys.argv[1:]
train.epochs, train.pretrained, train.batch_size, train.workers, train.print_freq = int(epochs), None, 2, 1, 1
train.checkpoint = train.checkpoint_path if os.path.exists(train.checkpoint_path) else None
train.evaluate_every, train.thin = 2, 2  # with half of the channels, a slow machine trains epochs between two kills
if __name__ == '__main__':
    errors.run(train.main)
'''


def start(folder, checkpoint_path, epochs):
    """Start a process that trains in a folder with lists, up to `epochs`, from the checkpoint if there is one."""
    return subprocess.Popen([sys.executable, '-u', '-c', program, checkpoint_path, str(epochs)], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'PYTHONPATH': root, 'CUDA_VISIBLE_DEVICES': ''})


def finish(folder, checkpoint_path, epochs):
    """Train up to `epochs` without a kill."""
    process = start(folder, checkpoint_path, epochs)
    output, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f'Training ended with {process.returncode}:\n{output}')


def workers_of(pid):
    """The ids of the child processes of a process; none if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f'/proc/{pid}/task/{pid}/children') as file:
        return [int(pid) for pid in file.read().split()]
    return []


def runs(pid):
    """Whether a process runs: it exists and is not a zombie."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f'/proc/{pid}/stat') as file:
        return file.read().rpartition(') ')[2][0] != 'Z'
    return False


def written_at(path):
    """When a file was last written; None if it does not exist."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def kill_at_a_random_moment(process, rng, temporary):
    """Kill a process that trains: half of the time at most half a second after it began to write a checkpoint,
    otherwise up to 8 seconds after training started.

    :param process: see `start`
    :param rng: a random.Random
    :param temporary: path of the file that exists while the checkpoint is written
    :return: whether it was writing; and the ids of its workers"""
    before = written_at(temporary)  # an earlier kill may have left one
    for line in process.stdout:
        if line.startswith('Training on'):
            break
    else:
        sys.exit('Training did not start')
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 8))
    else:
        while written_at(temporary) in (None, before) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    return written_at(temporary) not in (None, before), workers


def same(a, b):
    """Whether two checkpoints have the same content, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    """Kill, resume, compare, and print the results."""
    rng, began = random.Random(seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(folder, 2, 1)
        create_data_lists(folder, None, folder, labels=shapes)
        path = os.path.join(folder, 'killed.pth')
        during_write, without_checkpoint, workers = 0, 0, []
        for i in range(n_kills):
            had = os.path.exists(path)
            process = start(folder, path, 10 ** 6)
            writing, of_this = kill_at_a_random_moment(process, rng, f'{path}.tmp')
            workers += of_this
            during_write += writing
            without_checkpoint += not had
            epoch = load_checkpoint(path)['epoch'] if os.path.exists(path) else None  # raises if damaged
            print(f'kill {i + 1}, {"while writing" if writing else "while training"}: the last checkpoint is of '
                  f'epoch {epoch}', flush=True)
        epochs = (-1 if epoch is None else epoch) + 1 + more_epochs
        saved = []
        for name in 'killed', 'uninterrupted':
            finish(folder, os.path.join(folder, f'{name}.pth'), epochs)
            saved.append([load_checkpoint(os.path.join(folder, f'{name}{which}.pth')) for which in ('', '_best')])
        equal = same(*saved)
        leftover = [name for name in os.listdir(folder) if name.endswith('.tmp')]
        alive = sum(map(runs, workers))
    print(f'{n_kills} kills, of which {during_write} while a checkpoint was written, and {without_checkpoint} before '
          f'the first; {epochs} epochs in all; {time.time() - began:.0f} s')
    print(f'Of {len(workers)} workers of killed processes, {alive} still run; temporary files left: {leftover}')
    print(f'The last and the best checkpoint {"equal" if equal else "differ from"} those of an uninterrupted training.')
    sys.exit(0 if equal and not alive and not leftover else 1)


if __name__ == '__main__':
    main()
