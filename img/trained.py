"""The detector of demo.py, watched while it learns: the tutorial's figures of a detector at work come from it. Train it
first, in two minutes on two CPU cores:

    python img/trained.py
"""
import csv
import os
import sys
from functools import cache, partial

import torch

images_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(images_folder))

import demo  # noqa: E402
from checkpoints import load_detector  # noqa: E402
from create_data_lists import create_data_lists  # noqa: E402
from datasets import PascalVOCDataset  # noqa: E402
from model import MultiBoxLoss  # noqa: E402
from train import fit, make_train_loader, one_cycle  # noqa: E402

data_folder = os.path.join(os.path.dirname(images_folder), 'demo', 'figures')  # not in the repository, nor these two:
checkpoint_path = os.path.join(data_folder, 'checkpoint_ssd300.pth')
snapshots_path = os.path.join(data_folder, 'snapshots.pth')
milestones = (0, 50, 100, 200, 400, 750)  # iterations after which we look what the detector finds
n_watched = 12  # test images that we look at then


def learn():
    """Train as demo.py does, on the CPU, and keep what the detector finds on the way."""
    demo.draw_dataset(data_folder, demo.n_train, demo.n_test)
    create_data_lists(data_folder, None, data_folder, labels=demo.shapes)
    watched = torch.stack([test_set()[i][0] for i in range(n_watched)])  # (12, 3, 300, 300)
    train_set, model, optimizer = start()
    criterion = MultiBoxLoss(model.priors_cxcy)
    train_loader = make_train_loader(train_set, demo.batch_size, criterion)
    snapshots, n_steps = {}, -1

    @torch.no_grad()
    def look(*_):
        nonlocal n_steps
        n_steps += 1
        if n_steps in milestones:
            snapshots[n_steps] = model.detect_objects(*model(watched), min_score=0.01)  # as in `evaluate`

    look()
    optimizer.register_step_post_hook(look)
    fit(model, optimizer, criterion, train_loader, checkpoint_path, epochs=demo.epochs,
        lr_factor=partial(one_cycle, n_steps=demo.epochs * len(train_loader)), print_freq=10, grad_clip=10)
    torch.save(snapshots, snapshots_path)
    os.replace(os.path.join(data_folder, 'checkpoint_ssd300.csv'), os.path.join(images_folder, 'learning.csv'))


def start():
    """:return: the demo's training images, SSD300 with the demo's random weights, and its optimizer"""
    torch.manual_seed(0)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult=True)
    return train_set, *demo.start(train_set, demo.thin, 'cpu', demo.lr)


@cache
def detector():
    """:return: the trained SSD300, and its dict of label -> index"""
    if not os.path.exists(snapshots_path):
        sys.exit(f'Error: {snapshots_path} is missing: run "python img/trained.py" first')
    model, label_map = load_detector(checkpoint_path)
    return model.eval(), label_map


def test_set():
    """:return: the demo's test images, a PascalVOCDataset"""
    return PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)


def write_table(name, columns, rows):
    """Write a .csv file in this folder with these names of columns, and rows, a list of tuples."""
    with open(os.path.join(images_folder, name), 'w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows([columns, *rows])


def read_table(name):
    """:return: the rows of a .csv file in this folder, dicts of column -> text"""
    with open(os.path.join(images_folder, name), newline='') as file:
        return list(csv.DictReader(file))


if __name__ == '__main__':
    learn()
