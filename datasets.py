"""The data set: images and objects from the lists, their augmentation for training, and how they become a batch."""
import json
import os
import random
from functools import partial

import numpy as np
import torch
import torchvision.transforms.functional as FT
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler, default_collate

from errors import UserError
from images import open_image
from utils import find_jaccard_overlap, mean, std


class PascalVOCDataset(Dataset):
    """Images with their objects, ready for the network. See "The data set".

    :param data_folder: the folder with the lists
    :param split: 'TRAIN' for the training images, with augmentation, or 'TEST'; upper or lower case
    :param keep_difficult: keep objects that are marked as difficult
    :raises UserError: there is no such split; a list is missing, or does not fit the others"""

    def __init__(self, data_folder, split, keep_difficult=False):
        self.split = standard_split(split)
        self.keep_difficult = keep_difficult
        self.images = read_list(data_folder, f'{self.split}_images.json')
        self.objects = read_list(data_folder, f'{self.split}_objects.json')
        self.label_map = read_list(data_folder, 'label_map.json')
        try:
            valid = all(len(objects['boxes']) == len(objects['labels']) == len(objects['difficulties'])
                        and all(0 < label < len(self.label_map) for label in objects['labels'])  # 0 is the background
                        for objects in self.objects)
        except (KeyError, TypeError):
            valid = False
        if not valid or len(self.images) != len(self.objects):
            raise UserError(f'the lists of {self.split} in {data_folder} do not belong together, or a label is wrong: '
                            'run "python create_data_lists.py" again')

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        """:param i: an image's index; or (index, seed): the same seed gives the same augmentation, see EpochSampler
        :return: image (3, 300, 300), boxes in fractional boundary coordinates (n_objects, 4), labels (n_objects),
            difficulties (n_objects) uint8, 1 for difficult"""
        rng = random
        if isinstance(i, tuple):
            i, seed = i
            rng = random.Random(seed)
        image = open_image(self.images[i], if_missing='the lists name it, so run "python create_data_lists.py" again')
        boxes = torch.tensor(self.objects[i]['boxes'], dtype=torch.float32).view(-1, 4)  # (n_objects, 4)
        if (boxes[:, 2:] > torch.tensor(image.size) + 1).any() or (boxes[:, :2] >= boxes[:, 2:]).any():
            raise UserError(f'{self.images[i]} has {image.width}x{image.height} pixels, but a box in the lists reaches '
                            'further, or has no area: run "python create_data_lists.py" again')
        labels = torch.tensor(self.objects[i]['labels'], dtype=torch.long)  # (n_objects)
        difficulties = torch.tensor(self.objects[i]['difficulties'], dtype=torch.uint8)  # (n_objects)
        if not self.keep_difficult:
            easy = difficulties == 0
            boxes, labels, difficulties = boxes[easy], labels[easy], difficulties[easy]
        return transform(image, boxes, labels, difficulties, self.split, rng)


def standard_split(split):
    """:return: 'TRAIN' or 'TEST'; raises UserError for any other, which would silently turn off the augmentation"""
    if str(split).upper() not in ('TRAIN', 'TEST'):
        raise UserError(f"the split {split!r} is unknown: take 'TRAIN' or 'TEST'")
    return split.upper()


def read_list(data_folder, name):
    """:return: the content of a file in this folder; raises UserError if it is missing, or is not JSON"""
    path = os.path.join(data_folder, name)
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: write the lists with "python create_data_lists.py" first') from None
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}): run "python create_data_lists.py" again') from None


class EpochSampler(Sampler):
    """Yields (index, random seed) of each image, in an order shuffled in each epoch. Order and augmentation depend only
    on `seed` and the epoch: not on the number of workers, nor on whether training was interrupted.

    :param n: number of images
    :param seed: the seed of the whole training
    :param rank: number of this process, from 0, of `world_size`; each takes every world_size-th image. As all get
        equally many images, a few may be left out of an epoch."""

    def __init__(self, n, seed, rank=0, world_size=1):
        self.n, self.seed, self.epoch, self.rank, self.world_size = n, seed, 0, rank, world_size

    def set_epoch(self, epoch):
        """:param epoch: number of the next epoch, from 0"""
        self.epoch = epoch

    def __len__(self):
        return self.n // self.world_size

    def __iter__(self):
        rng = random.Random(f'{self.seed} {self.epoch}')  # a sum would make seed 0, epoch 1 equal seed 1, epoch 0
        items = [(i, rng.getrandbits(32)) for i in rng.sample(range(self.n), self.n)]
        return iter(items[self.rank::self.world_size][:len(self)])


def collate_fn(batch, match=None):
    """Make a batch of N items of PascalVOCDataset: images (N, 3, 300, 300); boxes, labels, difficulties: lists of N
    tensors, because the number of objects differs from image to image. With `match`, a method of MultiBoxLoss, boxes
    and labels are those that it gives to the priors, (N, 8732, 4) and (N, 8732)."""
    images, boxes, labels, difficulties = zip(*batch)
    boxes, labels = (TensorList(boxes), TensorList(labels)) if match is None else match(boxes, labels)
    return default_collate(images), boxes, labels, TensorList(difficulties)


class TensorList(list):
    """A list of tensors that a worker, another process, sends as numpy arrays. On Linux, PyTorch would open a file for
    each tensor, 96 in a batch of 32 images, which takes long; and many systems let a program open only 1,024."""

    def __init__(self, values):
        super().__init__(map(torch.as_tensor, values))

    def __reduce__(self):
        """For pickle: the class and the arguments that make this list again in the other process."""
        return TensorList, ([np.asarray(tensor) for tensor in self],)

    def pin_memory(self):
        """Called by a DataLoader for a GPU. These tensors stay on the CPU."""
        return self


# ----------------------------------------------------------------------------------------------------------- Transforms

mean_color = tuple(round(255 * value) for value in mean)


def to_input(image):
    """Turn a PIL image in RGB, 300x300, into the network's input: float (3, 300, 300), normalized."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, 300, 300), from 0 to 255
    # The same result as dividing by 255 first and then normalizing, but faster.
    return FT.normalize(pixels.float(), [255 * m for m in mean], [255 * s for s in std], inplace=True)


def photometric_distort(image, rng=random):
    """Change brightness, contrast, saturation and hue of a PIL image in RGB, each with a chance of 0.5, in random
    order. Here and in the functions below, `rng` is a random.Random or the module random."""
    distortions = [(FT.adjust_brightness, 0.5, 1.5), (FT.adjust_contrast, 0.5, 1.5), (FT.adjust_saturation, 0.5, 1.5),
                   (FT.adjust_hue, -18 / 255, 18 / 255)]  # hue: as a fraction of the color wheel
    rng.shuffle(distortions)
    for distort, low, high in distortions:
        if rng.random() < 0.5:
            image = distort(image, rng.uniform(low, high))
    return image


# Expanding, cropping and resizing would each compute a whole new image. Instead, the first two only choose a window: a
# rectangle (x_min, y_min, x_max, y_max) in the image's pixels that may extend beyond it. `expand_window` makes it
# larger (zoom out), `crop_window` smaller (zoom in). Then `draw_window` draws its content, once, at 300x300.

def expand_window(window, rng=random):
    """Zoom out: choose a window up to 4 times as wide and high that contains the given one, at a random position. It
    teaches the network to find small objects. Windows are boundary coordinates in pixels."""
    x_min, y_min, x_max, y_max = window
    scale = rng.uniform(1, 4)
    width, height = scale * (x_max - x_min), scale * (y_max - y_min)
    left = x_min - rng.uniform(0, width - (x_max - x_min))
    top = y_min - rng.uniform(0, height - (y_max - y_min))
    return left, top, left + width, top + height


def crop_window(window, boxes, rng=random):
    """Zoom in: choose a random smaller window that contains the center of at least one object, and overlaps some object
    by a random minimum. If 50 tries fail, draw another minimum. The network learns large and truncated objects from it.

    :param window: boundary coordinates in pixels
    :param boxes: ground truth, boundary coordinates in pixels, a tensor (n_objects, 4)
    :return: the smaller window; or the given one, if no crop is drawn or there is no object"""
    x_min, y_min, x_max, y_max = window
    while len(boxes) > 0:
        min_overlap = rng.choice([0., .1, .3, .5, .7, .9, None])  # None: no crop
        if min_overlap is None:
            break
        # All 50 tries at once: sides are 0.3 to 1 of the window's, the position inside it is random.
        draws = torch.tensor([rng.random() for _ in range(50 * 4)]).view(50, 4)
        sizes = torch.tensor([x_max - x_min, y_max - y_min])  # (2)
        sides = (0.3 + 0.7 * draws[:, :2]) * sizes  # (50, 2)
        corners = torch.tensor([x_min, y_min]) + draws[:, 2:] * (sizes - sides)  # (50, 2)
        crops = torch.cat([corners, corners + sides], dim=1)  # (50, 4)

        aspect_ratios = sides[:, 0] / sides[:, 1]  # (50)
        good = (aspect_ratios >= 0.5) & (aspect_ratios <= 2)
        good &= find_jaccard_overlap(crops, boxes).max(dim=1).values >= min_overlap
        good &= centers_inside(boxes, crops.unsqueeze(1)).any(dim=1)
        if good.any():
            return tuple(crops[good][0].tolist())
    return window


def centers_inside(boxes, window):
    """Whether the centers of boxes (n_objects, 4) are inside a window, 4 numbers in the same units: bool (n_objects).
    For several windows, a tensor (n_windows, 1, 4), it is (n_windows, n_objects). All are boundary coordinates."""
    window = torch.as_tensor(window)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n_objects, 2)
    inside = (centers > window[..., :2]) & (centers < window[..., 2:])  # (n_objects, 2) or (n_windows, n_objects, 2)
    return inside.all(dim=-1)  # (n_objects) or (n_windows, n_objects)


def draw_window(image, boxes, window, dims=(300, 300), distort=None):
    """Draw the content of a window: the part of the image inside it, and ImageNet's mean color beyond the image.

    :param image: a PIL image in RGB
    :param boxes: boundary coordinates in pixels, a tensor (n_objects, 4)
    :param window: boundary coordinates in pixels; it must overlap the image
    :param dims: width and height of the result
    :param distort: a function from PIL image to PIL image, applied to the part of the image alone; or None
    :return: a PIL image, and the boxes in fractional boundary coordinates, clipped to the window, (n_objects, 4)"""
    x_min, y_min, x_max, y_max = window
    scale_x, scale_y = dims[0] / (x_max - x_min), dims[1] / (y_max - y_min)
    # The part of the image inside the window, and the pixels of the result in which it is drawn, at least one each way
    part = max(x_min, 0), max(y_min, 0), min(x_max, image.width), min(y_max, image.height)
    left = min(round((part[0] - x_min) * scale_x), dims[0] - 1)
    top = min(round((part[1] - y_min) * scale_y), dims[1] - 1)
    right = max(round((part[2] - x_min) * scale_x), left + 1)
    bottom = max(round((part[3] - y_min) * scale_y), top + 1)
    drawn = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=part)
    if distort is not None:
        drawn = distort(drawn)
    canvas = Image.new('RGB', dims, mean_color)
    canvas.paste(drawn, (left, top))

    # Scale the boxes exactly as the part was drawn, at a size rounded to whole pixels. (* 2 repeats: x, y, x, y.)
    scales = torch.tensor([(right - left) / (part[2] - part[0]), (bottom - top) / (part[3] - part[1])] * 2)  # (4)
    boxes = (boxes - torch.tensor(part[:2] * 2)) * scales + torch.tensor([left, top] * 2)  # (n_objects, 4)
    return canvas, (boxes / torch.tensor(dims * 2)).clamp(0, 1)


def flip(image, boxes):
    """Mirror a PIL image, and boxes in fractional boundary coordinates, a tensor (n_objects, 4), left to right."""
    x_min, y_min, x_max, y_max = boxes.unbind(dim=1)
    return ImageOps.mirror(image), torch.stack([1 - x_max, y_min, 1 - x_min, y_max], dim=1)  # (n_objects, 4)


def transform(image, boxes, labels, difficulties, split, rng=random):
    """Prepare an image for the network, with augmentation for training (the paper's section 2.2). See "Transforms".

    :param image: a PIL image in RGB
    :param boxes: boundary coordinates in pixels, a tensor (n_objects, 4); with labels and difficulties (n_objects)
    :param split: 'TRAIN', or 'TEST' to only resize and normalize; upper or lower case
    :return: the input (3, 300, 300), boxes in fractional boundary coordinates (n, 4), labels (n), difficulties (n);
        in training, without the objects whose center is outside the crop
    :raises UserError: there is no such split"""
    training = standard_split(split) == 'TRAIN'
    window, distort = (0, 0, image.width, image.height), None
    if training:
        distort = partial(photometric_distort, rng=rng)
        if rng.random() < 0.5:
            window = expand_window(window, rng)
        window = crop_window(window, boxes, rng)
        kept = centers_inside(boxes, window)
        boxes, labels, difficulties = boxes[kept], labels[kept], difficulties[kept]
    image, boxes = draw_window(image, boxes, window, distort=distort)
    if training and rng.random() < 0.5:
        image, boxes = flip(image, boxes)
    return to_input(image), boxes, labels, difficulties
