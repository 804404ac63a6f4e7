"""The detector of demo.py, watched while it learns: the tutorial's figures of a detector at work come from it."""
import csv
import os
from functools import cache

import torch
from torch.utils.data import DataLoader

import demo
from checkpoints import load_detector
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset, collate_fn
from train import fit

images_folder = os.path.dirname(os.path.abspath(__file__))
data_folder = os.path.join(os.path.dirname(images_folder), 'demo', 'figures')  # not in the repository, nor these two:
checkpoint_path = os.path.join(data_folder, 'checkpoint_ssd300.pth')
snapshots_path = os.path.join(data_folder, 'snapshots.pth')
learning_path = os.path.join(images_folder, 'learning.csv')  # train.py's log
milestones = (0, 50, 100, 200, 400, 750)  # iterations after which we look what the detector finds
n_watched = 12  # test images that we look at then


def learn():
    """Train as demo.py does, on the CPU, and keep what the detector finds on the way."""
    demo.draw_dataset(data_folder, demo.n_train, demo.n_test)
    create_data_lists(data_folder, None, data_folder, labels=demo.shapes)
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
    watched = torch.stack([test_set[i][0] for i in range(n_watched)])  # (12, 3, 300, 300)

    train_set, model, optimizer = start()
    snapshots, n_steps = {0: find(model, watched)}, 0

    def look(*_):
        nonlocal n_steps
        n_steps += 1
        if n_steps in milestones:
            snapshots[n_steps] = find(model, watched)

    optimizer.register_step_post_hook(look)
    unfinished_path = os.path.join(data_folder, 'unfinished.pth')
    fit(model, optimizer, train_set, unfinished_path, demo.epochs, demo.batch_size, rise_and_fall=True,
        print_freq=10, grad_clip=10)
    torch.save(snapshots, snapshots_path)
    os.replace(os.path.join(data_folder, 'unfinished.csv'), learning_path)
    os.replace(unfinished_path, checkpoint_path)



def start():
    """:return: the demo's training images, SSD300 with the demo's random weights, and its optimizer"""
    torch.manual_seed(0)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult=True)
    return train_set, *demo.start(train_set, demo.thin, 'cpu', demo.lr)


@torch.no_grad()
def find(model, images):
    """:param model: SSD300
    :param images: its input, (N, 3, 300, 300)
    :return: boxes, labels and scores of what it finds at eval.py's settings, see `SSD300.detect_objects`"""
    return model.detect_objects(*model(images), min_score=0.01, max_overlap=0.45, top_k=200)


def find_in_all(model, test_set):
    """:param model: SSD300
    :param test_set: a PascalVOCDataset
    :return: boxes, labels, scores of what it finds in all images, and boxes, labels, difficulties of their objects:
        lists with a tensor for each image, as `calculate_mAP` takes them"""
    lists = [[] for _ in range(6)]
    for images, *objects in DataLoader(test_set, batch_size=8, collate_fn=collate_fn):
        for values, of_batch in zip(lists, (*find(model, images), *objects)):
            values.extend(of_batch)
    return lists


def left_by_learn(path):
    """:param path: a file that `learn` writes
    :return: the path, and the file is there"""
    if not os.path.exists(path):
        learn()
    return path


def test_set():
    """:return: the demo's test images, a PascalVOCDataset"""
    left_by_learn(checkpoint_path)
    return PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)


def snapshots():
    """:return: dict of iteration -> boxes, labels, scores: lists with a tensor for each image that was watched"""
    return torch.load(left_by_learn(snapshots_path), weights_only=True)


@cache
def detector():
    """:return: the trained SSD300, and its dict of label -> index"""
    model, label_map = load_detector(left_by_learn(checkpoint_path))
    return model.eval(), label_map


def read_table(path):
    """:param path: a .csv file that `learn` writes
    :return: list of dicts of column -> number"""
    with open(left_by_learn(path), newline='') as file:
        return [{column: float(value) for column, value in row.items() if value} for row in csv.DictReader(file)]


def write_table(path, columns, rows):
    """:param path: where a .csv file goes
    :param columns: their names
    :param rows: list of tuples"""
    with open(path, 'w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows([columns, *rows])
