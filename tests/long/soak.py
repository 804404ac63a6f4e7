"""Train for 2,000 steps and evaluate 5,000 images, and check that memory and the number of open files do not grow:

    python tests/long/soak.py

Only memory in use counts, not what the C library keeps after it was freed. The network is a fast one (see
tests/tiny.py), all else is real. This needs Linux, and takes about 10 minutes.
"""
import ctypes
import os
import sys
import tempfile

import torch
from torch.utils.data import DataLoader

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [root, os.path.join(root, 'tests')]

from kill_loop import workers_of  # noqa: E402
from tiny import TinyDetector  # noqa: E402

from create_data_lists import create_data_lists  # noqa: E402
from datasets import PascalVOCDataset, collate_fn  # noqa: E402
from demo import draw_dataset, shapes  # noqa: E402
from eval import evaluate  # noqa: E402
from model import MultiBoxLoss  # noqa: E402
from train import fit, make_optimizer, make_train_loader  # noqa: E402

n_drawn = 40  # images for each split, which are repeated
batch_size = 4
n_steps = 2_000
steps_per_epoch = 250
n_evaluated = 5_000
slack = 30  # MB by which memory may grow, since it fluctuates


def usage(what):
    """Print `what` was done until now, and what this process and its children use. Returns memory in use, in MB; and
    the number of open files."""
    pids = os.getpid(), *workers_of(os.getpid())
    taken = sum(map(memory_of, pids))
    ctypes.CDLL(None).malloc_trim(0)
    memory, files = sum(map(memory_of, pids)), sum(len(os.listdir(f'/proc/{pid}/fd')) for pid in pids)
    print(f'{what}: {memory:.0f} MB in use and {taken - memory:.0f} MB freed but kept, {files} open files', flush=True)
    return memory, files


def memory_of(pid):
    """The memory of a process in MB; of memory shared with others, its proportional part."""
    with open(f'/proc/{pid}/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('Pss:')) / 1024


def repeated(folder, split, n):
    """A data set of n images: those of a split, repeated."""
    dataset = PascalVOCDataset(folder, split, keep_difficult=True)
    dataset.images, dataset.objects = ([*of_set] * (n // len(of_set)) for of_set in (dataset.images, dataset.objects))
    return dataset


def soak_training(folder):
    """:return: what memory and open files grew by, from the first epoch's end to the last step"""
    model, readings, steps = TinyDetector(len(shapes) + 1), [], []
    optimizer = make_optimizer(model, 'sgd', 1e-4, 5e-4)

    def after_step(*_):
        steps.append(1)
        if len(steps) % steps_per_epoch == 0:
            readings.append(usage(f'{len(steps)} training steps'))

    optimizer.register_step_post_hook(after_step)
    dataset, criterion = repeated(folder, 'TRAIN', steps_per_epoch * batch_size), MultiBoxLoss(model.priors_cxcy)
    loader = make_train_loader(dataset, batch_size, criterion, workers=1)
    fit(model, optimizer, criterion, loader, os.path.join(folder, 'c.pth'), epochs=n_steps // steps_per_epoch,
        lr_factor=lambda _: 1, print_freq=100, grad_clip=10.)
    return tuple(last - first for first, last in zip(readings[0], readings[-1]))


def soak_evaluation(folder):
    """:return: what memory and open files grew by, from after evaluating 400 images to after 5,000 others"""
    model, readings = TinyDetector(len(shapes) + 1), []
    for n in (400, n_evaluated):
        loader = DataLoader(repeated(folder, 'TEST', n), batch_size, collate_fn=collate_fn, num_workers=1)
        evaluate(loader, model)
        readings.append(usage(f'{n} images evaluated'))
    return tuple(last - first for first, last in zip(*readings))


def main():
    """Train, evaluate, and exit with 1 if anything grew."""
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
