"""The data set: pictures and objects from the lists that create_data_lists.py wrote, and how they make a batch."""
import json
import os
import random
import sys
import time
from contextlib import suppress

import torch
from torch.utils.data import Dataset, Sampler

from files import UserError, killed_worker, one_line, open_image
from utils import transform


class PascalVOCDataset(Dataset):
    """
    Pictures with their objects, ready for the network. See "Inputs".

    :param data_folder: the folder with the lists
    :param split: 'TRAIN' for random variations of the training pictures, or 'TEST'
    :param keep_difficult: keep objects that are marked as difficult
    :raises UserError: a list is missing, or is not from the same run as the others
    """

    def __init__(self, data_folder, split, keep_difficult=False):
        self.split = split
        self.keep_difficult = keep_difficult
        self.images = read_list(data_folder, f'{split}_images.json')
        self.objects = read_list(data_folder, f'{split}_objects.json')
        self.label_map = read_list(data_folder, 'label_map.json')
        largest = max((max(objects['labels'], default=0) for objects in self.objects), default=0)
        if len(self.images) != len(self.objects) or largest >= len(self.label_map):
            raise UserError(f'the lists of {split} in {data_folder} do not belong together: '
                            'run "python create_data_lists.py" again')

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        """
        :param i: a picture's index; or (index, seed), then the same seed gives the same variation (see EpochSampler)
        :return: image (3, 300, 300), boxes in fractional boundary coordinates (n_objects, 4), labels (n_objects),
            difficulties (n_objects) byte
        """
        i, rng = (i[0], random.Random(i[1])) if isinstance(i, tuple) else (i, random)
        image = open_image(self.images[i])
        boxes = torch.tensor(self.objects[i]['boxes'], dtype=torch.float32).view(-1, 4)  # (n_objects, 4)
        labels = torch.tensor(self.objects[i]['labels'], dtype=torch.long)  # (n_objects)
        difficulties = torch.tensor(self.objects[i]['difficulties'], dtype=torch.uint8)  # (n_objects)
        if not self.keep_difficult:
            easy = difficulties == 0
            boxes, labels, difficulties = boxes[easy], labels[easy], difficulties[easy]
        return transform(image, boxes, labels, difficulties, self.split, rng)


def read_list(data_folder, name):
    """
    :param data_folder: the folder with the lists
    :param name: the file's name
    :return: its content
    :raises UserError: it is missing, or no JSON
    """
    path = os.path.join(data_folder, name)
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: write the lists with "python create_data_lists.py" first') from None
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}): run "python create_data_lists.py" again') from None


class EpochSampler(Sampler):
    """
    Shuffles the pictures anew in each epoch, and hands out a seed with each. Order and variations depend on nothing but
    `seed` and the epoch: not on the number of workers, nor on whether training was interrupted before. See "Inputs".

    :param n: number of pictures
    :param seed: the seed of the training
    :param process: number of this process; of n_processes, each gets its share of each batch that one would get
    :param n_processes: all get the same number of pictures, so up to n_processes - 1 sit out an epoch
    """

    def __init__(self, n, seed, process=0, n_processes=1):
        self.n, self.seed, self.epoch, self.process, self.n_processes = n, seed, 0, process, n_processes

    def set_epoch(self, epoch):
        """:param epoch: the epoch that comes next"""
        self.epoch = epoch

    def __len__(self):
        return self.n // self.n_processes

    def __iter__(self):
        rng = random.Random(f'{self.seed} {self.epoch}')
        pictures = [(i, rng.getrandbits(32)) for i in rng.sample(range(self.n), self.n)]
        return iter(pictures[self.process::self.n_processes][:len(self)])


def collate_fn(batch):
    """
    Pictures stack into a tensor; objects can't, because each picture has its own number of them.

    :param batch: N items of PascalVOCDataset
    :return: images (N, 3, 300, 300); boxes, labels, difficulties: lists of N tensors
    """
    images, boxes, labels, difficulties = zip(*batch)
    return torch.stack(images), list(boxes), list(labels), list(difficulties)


def load_batches(loader):
    """
    Go through the batches of a data loader. When one of its workers is killed, the news comes as a signal, which
    PyTorch turns into a RuntimeError wherever the main process is at that moment (see `files.run`); or earlier, as
    nearly any error of the connection to the worker, which is caught here.

    :param loader: DataLoader
    :return: its batches, one after the other
    :raises UserError: a worker was killed, or there are too many open files
    """
    batches = iter(loader)  # outside of what follows: that workers can't be started is another error
    try:
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        if loader.num_workers == 0 or str(error).startswith('Caught '):  # an error in the loading of a picture
            raise
        if 'Too many open files' in str(error):
            raise UserError(one_line(error)) from None
        with suppress(RuntimeError):
            time.sleep(0.5)  # the signal comes in this time, and not in the middle of tidying up
        raise UserError(killed_worker) from None


def quiet_worker(_):
    """
    Let a data loader's worker not print that the main process hung up on it, which happens when the user stops
    training. Errors in pictures are not printed here, but handed over to the main process.
    """
    sys.excepthook = lambda *_: None
