"""
Train for 2,000 steps and evaluate 5,000 images, and watch memory and open files:

    python tests/long/soak.py

Neither may grow. Memory is what is in use: what the C library has got back, but keeps for later, is taken from it
first, and shown apart. It needs Linux, and takes some 10 minutes.

What costs time, the network, is replaced by a tiny one (see tests/tiny.py) whose predictions have the same shapes; the
loader and its worker, the loss, the optimizer, the log, the checkpoint, the detection, the evaluation and the mean
average precision are the real ones.
"""
import ctypes
import os
import sys
import tempfile

import torch
from torch.utils.data import DataLoader

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [root, os.path.join(root, 'tests')]

from create_data_lists import create_data_lists  # noqa: E402
from datasets import PascalVOCDataset, collate_fn, quiet_worker  # noqa: E402
from demo import draw_dataset, shapes  # noqa: E402
from eval import evaluate  # noqa: E402
from kill_loop import workers_of  # noqa: E402
from tiny import TinyDetector  # noqa: E402
from train import fit, make_optimizer  # noqa: E402

n_drawn = 40  # images, which are used again and again
batch_size = 4
n_steps = 2_000
steps_per_epoch = 250
n_evaluated = 5_000
slack = 30  # MB by which memory may grow all the same, for it fluctuates


def usage(what):
    """
    Measure this process and those that it has started, and print a line.

    :param what: what was done until now
    :return: memory in use, in MB; and the number of open files
    """
    pids = os.getpid(), *workers_of(os.getpid())
    taken = sum(map(memory_of, pids))
    ctypes.CDLL(None).malloc_trim(0)
    memory, files = sum(map(memory_of, pids)), sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in pids)
    print(f'{what}: {memory:.0f} MB in use and {taken - memory:.0f} MB kept, {files} open files', flush=True)
    return memory, files


def memory_of(pid):
    """The memory of a process in MB, with what it shares with others counted in equal parts."""
    with open(f'/proc/{pid}/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('Pss:')) / 1024


def repeated(folder, split, n):
    """The images of a split, again and again until they are n."""
    dataset = PascalVOCDataset(folder, split, keep_difficult=True)
    times = n // len(dataset)
    dataset.images, dataset.objects = dataset.images * times, dataset.objects * times
    return dataset


def soak_training(folder):
    """:return: what memory and open files grew by, from the first epoch's end to the last step"""
    model, readings, steps = TinyDetector(len(shapes) + 1), [], []
    optimizer = make_optimizer(model, 1e-4, 0.9, 5e-4)

    def after_step(*_):
        steps.append(1)
        if len(steps) % steps_per_epoch == 0:
            readings.append(usage(f'{len(steps)} training steps'))

    optimizer.register_step_post_hook(after_step)
    fit(model, optimizer, repeated(folder, 'TRAIN', steps_per_epoch * batch_size), os.path.join(folder, 'c.pth'),
        n_steps // steps_per_epoch, batch_size, workers=1, print_freq=100, grad_clip=10.)
    return tuple(last - first for first, last in zip(readings[0], readings[-1]))


def soak_evaluation(folder):
    """:return: what memory and open files grew by, from after evaluating 400 images to after 5,000 others"""
    model, readings = TinyDetector(len(shapes) + 1), []
    for n in (400, n_evaluated):
        loader = DataLoader(repeated(folder, 'TEST', n), batch_size, collate_fn=collate_fn, num_workers=1,
                            worker_init_fn=quiet_worker)
        evaluate(loader, model)
        readings.append(usage(f'{n} images evaluated'))
    return tuple(last - first for first, last in zip(*readings))


def main():
    """Train, evaluate, and say whether anything grew."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(folder, n_drawn, n_drawn)
        create_data_lists(folder, None, folder, labels=shapes)
        grown = {'training': soak_training(folder), 'evaluation': soak_evaluation(folder)}
    for what, (memory, files) in grown.items():
        print(f'In {what}, memory in use grew by {memory:.0f} MB, open files by {files}.')
    sys.exit(0 if all(memory < slack and files <= 0 for memory, files in grown.values()) else 1)


if __name__ == '__main__':
    main()
