"""What tests run in processes of their own, alone or as torchrun starts several:

    PYTHONPATH=. torchrun --nproc_per_node=2 tests/together.py '{"epochs": 1}'

To start Python and to import torch takes seconds. So `start` lets a server that has done it fork the processes.
"""
import csv
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import torch
from tiny import SpoiledLoss, TinyDetector

import checkpoints
import distributed
import train
from checkpoints import load_checkpoint
from datasets import PascalVOCDataset
from errors import run
from eval import evaluate, make_test_loader
from model import SSD300, download_weights

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['together'])


def start(folder, function, *args, n=1, of_machine=None):
    """Start `function(*args)` in a folder, in n processes that work together, `of_machine` of them on each machine.
    What rank i prints goes to the files "output i" and "errors i" there. Returns the processes."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        variables = {'WORLD_SIZE': n, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': free.getsockname()[1]}
    started = []
    for i in range(n):
        of_rank = variables | {'RANK': i, 'LOCAL_RANK': i % (of_machine or n)} if n > 1 else {}
        started.append(forks.Process(target=run_here, args=(str(folder), i, of_rank, partial(function, *args))))
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the server
            started[-1].start()
    return started


def run_here(folder, i, variables, function):
    """What a process of `start` does, like a script whose main is `function`."""
    os.setsid()  # a group of its own, as if a terminal had started it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method('fork', force=True)  # of a data loader's workers; it would be the server's
    os.chdir(folder)
    os.environ |= {name: str(value) for name, value in variables.items()}
    for name, stream in ('output', sys.stdout), ('errors', sys.stderr):
        os.dup2(os.open(f'{name} {i}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    run(function)


def read_log(path):
    """The rows of a CSV file, each a dict of strings."""
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def train_main(network=TinyDetector, **parameters):
    """train.py's main, fast unless `parameters` say otherwise. Returns the checkpoint and the rows of the log."""
    defaults = {'pretrained': None, 'batch_size': 2, 'epochs': 1, 'workers': 0, 'warm_up': 0, 'print_freq': 1,
                'checkpoint_path': 'c.pth'}
    with patch.multiple(train, SSD300=network, **defaults | parameters), \
            patch.multiple(checkpoints, SSD300=network):
        train.main()
        return load_checkpoint(train.checkpoint_path), read_log(train.checkpoint_path.replace('.pth', '.csv'))


def train_and_evaluate(**parameters):
    """Train the real network, then evaluate it so that it has some hits."""
    with patch.object(train, 'evaluate', partial(evaluate, min_score=0, top_k=5000)):
        train_main(SSD300, thin=32, evaluate_every=1, **parameters)


def train_spoiled(folder, what):
    """Train on a loss that is spoiled in the second batch of the last process. Print whether each step that was taken
    changed the weights."""
    distributed.init_process_group()
    dataset, model = PascalVOCDataset(folder, 'TRAIN'), TinyDetector(4)
    criterion = SpoiledLoss(model.priors_cxcy, what, 2 * distributed.get_rank())  # rank 1 is the last
    optimizer, weights = train.make_optimizer(model, 'sgd', 1e-3, 5e-4), [model.head.weight.detach().clone()]
    optimizer.register_step_post_hook(lambda *_: weights.append(model.head.weight.detach().clone()))
    try:
        train.fit(model, optimizer, criterion, train.make_train_loader(dataset, 4, criterion), 's.pth', epochs=1,
                  lr_factor=lambda _: 1)
    finally:
        print([not torch.equal(a, b) for a, b in pairwise(weights)])


def evaluate_together(folder):
    """Evaluate numbers of images that two processes can't share evenly, one of them without objects. Save what each
    process finds, and how often it sent something."""
    distributed.init_process_group()
    torch.manual_seed(0)
    model, plain, found = TinyDetector(4), distributed.dist.all_gather_object, []
    for n_images in 9, 1:
        test_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
        test_set.split = 'TEST'
        del test_set.images[n_images:], test_set.objects[n_images:]
        test_set.objects[1:2] = [{'boxes': [], 'labels': [], 'difficulties': []}]
        with patch.object(distributed.dist, 'all_gather_object', side_effect=plain) as sending:
            evaluation = evaluate(make_test_loader(test_set, 1, 0, torch.device('cpu')), model, 0, top_k=1000)
        found.append((*evaluation[:4], sending.call_count))
    torch.save(found, f'found {distributed.get_rank()} of {distributed.get_world_size()}.pth')


def download():
    """Get weights that can be had, whose download takes a moment, and then weights that can't. Print what happens."""
    distributed.init_process_group()
    path = f'weights of machine {int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])}'

    def get(**_):
        if not os.path.exists(path):
            print('downloads')
            time.sleep(0.5)
            with open(path, 'w') as file:
                file.write('{"bias": 1}')
        with open(path) as file:
            return json.load(file)

    def fail(**_):
        print('fails')
        raise OSError('the line is cut')
    for function in get, fail:
        weights = SimpleNamespace(url='weights.pth', get_state_dict=function)
        print(download_weights(weights, 'do without'))


if __name__ == '__main__':
    print(f'process {os.environ["RANK"]} is {os.getpid()}', flush=True)
    run(partial(train_main, **json.loads(sys.argv[1])))
