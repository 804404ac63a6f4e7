"""
What the scripts share. In reading order: labels, annotations and data lists, box coordinates and overlaps, priors and
their encoding, non-maximum suppression, transforms, mean average precision, training helpers and checkpoints.

Boxes come in three forms, and names say which:
    xy      boundary coordinates: (x_min, y_min, x_max, y_max)
    cxcy    center-size coordinates: (c_x, c_y, w, h)
    gcxgcy  a box as an offset from a prior: what the network predicts
They are in pixels before `transform` and in fractions of the picture's width and height (0 to 1) after it. See
"Definitions". The sections that are named here and below are those of README.md.
"""
import json
import math
import os
import random
import sys
from collections import Counter, namedtuple
from colorsys import hsv_to_rgb
from functools import partial
from pickle import UnpicklingError

import numpy as np
import torch
import torchvision.transforms.functional as FT
from PIL import Image, ImageOps
from torchvision.ops import batched_nms

from files import UserError, image_header, is_picture, read_objects, turn_box, write_whole
from processes import first_process_first


# ----------------------------------------------------------------------------------------------------------- Labels

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable',
              'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')


def make_label_map(labels):
    """
    :param labels: names of the classes, without the background
    :return: dict of label -> index; 'background' is 0, the labels follow in their order
    :raises UserError: a label stands twice, or is 'background' itself
    """
    names = ['background', *labels]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not labels:
        raise UserError(f"labels {list(labels)} must name each class once, and not 'background': "
                        + (f'{repeated} stands twice' if repeated else 'there is none'))
    return {name: index for index, name in enumerate(names)}


def make_color_map(label_map):
    """
    :param label_map: dict of label -> index
    :return: dict of label -> color '#rrggbb': hues a golden section apart, so that neighbors in the list differ much
    """
    colors = {label: hsv_to_rgb(index * 0.618 % 1, 1, 1) for label, index in label_map.items()}
    colors['background'] = (1, 1, 1)
    return {label: '#' + ''.join(f'{int(255 * value):02x}' for value in color) for label, color in colors.items()}


label_map = make_label_map(voc_labels)
rev_label_map = {index: label for label, index in label_map.items()}
label_color_map = make_color_map(label_map)


# ---------------------------------------------------------------------------------------- Annotations and data lists

def parse_annotation(annotation_path, label_map=label_map, size=None, orientation=1):
    """
    Read the objects from an XML file in Pascal VOC's format, and drop those that can't be right.

    Pascal VOC counts pixels from 1; we subtract 1. A box may lie a pixel outside the picture, because some tools count
    from 0 or round up: it is clipped. A box that lies further outside, or is narrower or lower than a tenth of a pixel,
    is wrong, and is dropped: to the network it would have no area. Pictures that lie on their side: see `turn_box`.

    :param annotation_path: the XML file
    :param label_map: dict of label -> index; or None, to take all labels, and leave them names
    :param size: the picture's width and height when it is upright, if known
    :param orientation: how it is stored, see `image_header`
    :return: dict of boxes (boundary coordinates in pixels), labels (indices), difficulties (0 or 1), one of each per
        object; and dropped (a reason for each dropped object)
    :raises UserError: see `read_objects`; or the file is for a picture of another size
    """
    stated_size, objects = read_objects(annotation_path)
    known = min(stated_size) > 0  # some tools leave 0 for a size they don't know
    as_stored = known and orientation >= 5 and size == stated_size[::-1] != stated_size
    if known and size not in (None, stated_size) and not as_stored:
        raise UserError(f'{annotation_path} is for a picture of {stated_size[0]:g}x{stated_size[1]:g} pixels, '
                        f'but the picture has {size[0]}x{size[1]}: annotate it anew, or take it out of the split')
    width, height = size or (stated_size if known else (math.inf, math.inf))
    annotation = {'boxes': [], 'labels': [], 'difficulties': [], 'dropped': []}
    for label, difficult, box in objects:
        x_min, y_min, x_max, y_max = (edge - 1 for edge in (turn_box(box, size, orientation) if as_stored else box))
        clipped = [max(x_min, 0), max(y_min, 0), min(x_max, width), min(y_max, height)]
        if label == 'background' or (label_map is not None and label not in label_map):
            annotation['dropped'].append(f"label '{label}' is not one of the labels")
        elif not all(map(math.isfinite, box)):
            annotation['dropped'].append(f'{label} {box} is not finite')
        elif min(x_min, y_min) < -1 or x_max > width or y_max > height:
            annotation['dropped'].append(f'{label} {box} is outside the picture of {width:.0f}x{height:.0f}')
        elif min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < 0.1:
            annotation['dropped'].append(f'{label} {box} has no area')
        else:
            annotation['boxes'].append(clipped)
            annotation['labels'].append(label if label_map is None else label_map[label])
            annotation['difficulties'].append(difficult)
    return annotation


def picture_ids(folder, split, test_fraction):
    """
    :param folder: a folder in Pascal VOC's layout
    :param split: 'trainval' or 'test'
    :param test_fraction: share of the annotated pictures that are for the test, if the folder has no ImageSets; which
        they are is random, but always the same
    :return: the names of the split's pictures, without extension
    :raises UserError: the list of the split is missing
    """
    list_path = os.path.join(folder, 'ImageSets', 'Main', split + '.txt')
    if os.path.isdir(os.path.join(folder, 'Annotations')) and not os.path.isdir(os.path.join(folder, 'ImageSets')):
        ids = sorted(os.path.splitext(name)[0] for name in os.listdir(os.path.join(folder, 'Annotations'))
                     if name.lower().endswith('.xml'))
        random.Random(0).shuffle(ids)
        n_test = round(test_fraction * len(ids))
        return sorted(ids[:n_test] if split == 'test' else ids[n_test:])
    if not os.path.isfile(list_path):
        raise UserError(f'{list_path} is missing: set the paths in create_data_lists.py to folders in VOC layout, '
                        'or download = True to fetch Pascal VOC')
    try:
        with open(list_path, encoding='utf-8-sig') as file:  # some editors begin a file with an invisible mark
            return [line.split()[0] for line in file if line.strip()]
    except ValueError as error:
        raise UserError(f'{list_path} is no list of names: {error}') from None


def find_pictures(folder, ids):
    """
    :param folder: a folder in Pascal VOC's layout, with the pictures in JPEGImages
    :param ids: the names of the pictures, see `picture_ids`
    :return: dict of name -> path of the picture; names without a picture are not in it
    :raises UserError: a name has several pictures, for example cat.jpg and cat.png
    """
    image_folder = os.path.join(os.path.abspath(folder), 'JPEGImages')
    paths = {id: [] for id in ids}
    for name in sorted(os.listdir(image_folder)) if os.path.isdir(image_folder) else []:
        id = os.path.splitext(name)[0]
        if id in paths and is_picture(name):
            paths[id].append(os.path.join(image_folder, name))
    ambiguous = [found for found in paths.values() if len(found) > 1]
    if ambiguous:
        raise UserError(f'{" and ".join(ambiguous[0])} differ only in the extension, so it is not clear which of them '
                        f'the splits or annotations of {folder} mean: keep one, and move the other elsewhere or rename '
                        f'it; there are {len(ambiguous)} such names')
    return {id: found[0] for id, found in paths.items() if found}


def read_split(folder, split, ids, label_map):
    """
    Read some pictures' annotations, from a folder in Pascal VOC's layout: Annotations, JPEGImages. A picture is left
    out if it, or its annotation, is missing or can't be read. More than a few of them mean that something else is
    wrong, with the folder or its download: then the first ten are printed, and an error is raised.

    :param folder: the folder, for example VOCdevkit/VOC2007
    :param split: 'trainval' or 'test'
    :param ids: the names of the split's pictures, see `picture_ids`
    :param label_map: see `parse_annotation`
    :return: list of (path of the picture, its annotation), see `parse_annotation`; and a reason for each picture that
        was left out
    :raises UserError: more than a tenth of the pictures can't be read; or see `find_pictures`
    """
    image_paths = find_pictures(folder, ids)
    pictures, left_out = [], []
    for id in ids:
        try:
            if id not in image_paths:
                raise UserError(f'{os.path.join(folder, "JPEGImages", id)}.* is missing: the splits or annotations of '
                                f'{folder} name this picture')
            annotation_path = os.path.join(folder, 'Annotations', id + '.xml')
            annotation = parse_annotation(annotation_path, label_map, *image_header(image_paths[id]))
            pictures.append((image_paths[id], annotation))
        except (UserError, OSError) as error:
            left_out.append(str(error))
    if 10 * len(left_out) > len(ids):
        print('\n'.join(left_out[:10]), file=sys.stderr)
        raise UserError(f"{len(left_out)} of the {len(ids)} pictures in {folder}'s split {split} can't be read, more "
                        'than a tenth (the first are named above), so no lists were written: check that the folder is '
                        'the right one, and complete, or mend these pictures')
    return pictures, left_out


def number_labels(splits):
    """
    Make a label map of all labels that occur, sorted, and put indices in the place of the names.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of a picture, its annotation, with labels as names)
    :return: dict of label -> index
    """
    annotations = [annotation for pictures in splits.values() for _, annotation in pictures]
    label_map = make_label_map(sorted({label for annotation in annotations for label in annotation['labels']}))
    for annotation in annotations:
        annotation['labels'] = [label_map[label] for label in annotation['labels']]
    return label_map


def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, test_fraction=0.2):
    """
    Index the pictures and objects of Pascal VOC, or of any folder in its layout, and write what training and evaluation
    read: TRAIN_images.json, TRAIN_objects.json, TEST_images.json, TEST_objects.json, label_map.json.

    Training takes the trainval splits, without pictures that have no object. The test takes the first folder's test
    split, also those pictures: a detection on an empty picture is a false positive, and has to count.

    :param voc07_path: folder with the splits trainval and test
    :param voc12_path: folder with another split trainval, or None
    :param output_folder: where the lists go; they are written all together, or not at all
    :param labels: the classes to detect, objects of other classes are dropped; None for all that occur, sorted
    :param test_fraction: see `picture_ids`
    :raises UserError: see `picture_ids` and `read_split`; or no object of these labels was found for training
    """
    label_map = None if labels is None else make_label_map(labels)
    parts = [('TEST', voc07_path, 'test', picture_ids(voc07_path, 'test', test_fraction))]
    for folder in filter(None, (voc07_path, voc12_path)):
        ids = picture_ids(folder, 'trainval', test_fraction if folder == voc07_path else 0)
        parts.append(('TRAIN', folder, 'trainval', ids))
    splits, left_out = {'TRAIN': [], 'TEST': []}, []
    for name, *part in parts:
        pictures, reasons = read_split(*part, label_map)
        splits[name] += pictures
        left_out += reasons
    if not any(annotation['boxes'] for _, annotation in splits['TRAIN']):
        which = 'no object' if labels is None else f'no object with one of the labels {list(labels)}'
        raise UserError(f'{which} in the training pictures of {voc07_path}: set the labels that its annotations use')
    if not splits['TEST']:
        raise UserError(f'no picture for the test in {voc07_path}: list some in ImageSets/Main/test.txt, or, without '
                        'ImageSets, raise test_fraction')
    label_map = label_map or number_labels(splits)

    dropped = [f'{image_path}: {reason}' for pictures in splits.values()
               for image_path, annotation in pictures for reason in annotation['dropped']]
    n_empty = sum(not annotation['boxes'] for _, annotation in splits['TRAIN'])
    splits['TRAIN'] = [picture for picture in splits['TRAIN'] if picture[1]['boxes']]
    write_lists(splits, label_map, output_folder)
    print_summary(splits, label_map, left_out, n_empty, dropped)
    print(f'The lists are in {os.path.abspath(output_folder)}.')


def write_lists(splits, label_map, output_folder):
    """
    Write the five files that `create_data_lists` names, all together, or none.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of a picture, its annotation)
    :param label_map: dict of label -> index
    :param output_folder: where they go
    """
    contents = {'label_map.json': label_map}
    for split, pictures in splits.items():
        contents[f'{split}_images.json'] = [image_path for image_path, _ in pictures]
        contents[f'{split}_objects.json'] = [{key: annotation[key] for key in ('boxes', 'labels', 'difficulties')}
                                             for _, annotation in pictures]
    os.makedirs(output_folder, exist_ok=True)
    with write_whole(*(os.path.join(output_folder, name) for name in contents), mode='w') as files:
        for file, content in zip(files, contents.values()):
            json.dump(content, file)


def print_summary(splits, label_map, left_out, n_empty, dropped):
    """
    Print how many pictures and objects the lists have, and what they lack.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of a picture, its annotation)
    :param label_map: dict of label -> index
    :param left_out: a line for each picture that can't be read
    :param n_empty: how many training pictures without objects were left out
    :param dropped: a line for each dropped box
    """
    counts = {split: Counter(label for _, annotation in pictures for label in annotation['labels'])
              for split, pictures in splits.items()}
    print(f'{"":20}{"train":>10}{"test":>10}')
    for row, count in (('pictures', lambda split: len(splits[split])),
                       ('objects', lambda split: sum(counts[split].values())),
                       ('of them difficult', lambda split: sum(sum(a['difficulties']) for _, a in splits[split]))):
        print(f'{row:20}{count("TRAIN"):10}{count("TEST"):10}')
    for label, index in list(label_map.items())[1:]:
        print(f'  {label:18}{counts["TRAIN"][index]:10}{counts["TEST"][index]:10}')
    print(f'Left out {n_empty} training pictures without objects, and dropped {len(dropped)} boxes:')
    print('\n'.join('  ' + line for line in dropped) or '  none')
    print(f"Left out {len(left_out)} pictures that can't be read, or whose annotation can't:")
    print('\n'.join('  ' + line for line in left_out) or '  none')


# -------------------------------------------------------------------------------------- Box coordinates and overlaps

def xy_to_cxcy(xy):
    """
    :param xy: boxes in boundary coordinates, a tensor (..., 4)
    :return: the boxes in center-size coordinates, (..., 4)
    """
    return torch.cat([(xy[..., 2:] + xy[..., :2]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """
    :param cxcy: boxes in center-size coordinates, a tensor (..., 4)
    :return: the boxes in boundary coordinates, (..., 4)
    """
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def find_intersection(set_1, set_2):
    """
    Areas of the intersections of every box of one set with every box of another.

    :param set_1: boxes in boundary coordinates, a tensor (..., n1, 4)
    :param set_2: boxes in boundary coordinates, a tensor (..., n2, 4)
    :return: areas, (..., n1, n2)
    """
    set_1, set_2 = set_1.unsqueeze(-2), set_2.unsqueeze(-3)  # (..., n1, 1, 4), (..., 1, n2, 4)
    lower = torch.max(set_1[..., :2], set_2[..., :2])  # (..., n1, n2, 2)
    upper = torch.min(set_1[..., 2:], set_2[..., 2:])  # (..., n1, n2, 2)
    return (upper - lower).clamp(min=0).prod(dim=-1)  # (..., n1, n2)


def find_jaccard_overlap(set_1, set_2):
    """
    Jaccard overlaps of every box of one set with every box of another. See "Jaccard index".

    :param set_1: boxes in boundary coordinates, a tensor (..., n1, 4)
    :param set_2: boxes in boundary coordinates, a tensor (..., n2, 4)
    :return: overlaps from 0 to 1, (..., n1, n2)
    """
    intersection = find_intersection(set_1, set_2)  # (..., n1, n2)
    areas_1 = (set_1[..., 2:] - set_1[..., :2]).prod(dim=-1)  # (..., n1)
    areas_2 = (set_2[..., 2:] - set_2[..., :2]).prod(dim=-1)  # (..., n2)
    union = areas_1.unsqueeze(-1) + areas_2.unsqueeze(-2) - intersection  # (..., n1, n2)
    return intersection / union.clamp(min=1e-12)  # two boxes without area overlap by 0, not by 0/0


# ------------------------------------------------------------------------------------------ Priors and their encoding

# The six feature maps that predict, and the priors on each: the paper's section 2.2, and its authors' code. Every tile
# also has an extra prior of ratio 1, so its number of priors is one more than its number of aspect ratios.
FeatureMap = namedtuple('FeatureMap', 'channels size scale ratios')
feature_maps = {'conv4_3': FeatureMap(512, 38, 0.1, (1, 2, 1 / 2)),
                'conv7': FeatureMap(1024, 19, 0.2, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv8_2': FeatureMap(512, 10, 0.375, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv9_2': FeatureMap(256, 5, 0.55, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv10_2': FeatureMap(256, 3, 0.725, (1, 2, 1 / 2)),
                'conv11_2': FeatureMap(256, 1, 0.9, (1, 2, 1 / 2))}


def create_prior_boxes():
    """
    The 8732 priors of SSD300: map by map, row by row, tile by tile, and within a tile ratio 1, the extra prior, then
    the other ratios. The predictions come in the same order. See "Priors".

    :return: priors in fractional center-size coordinates, a tensor (8732, 4)
    """
    maps = list(feature_maps.values())
    extra_scales = [math.sqrt(this.scale * following.scale) for this, following in zip(maps, maps[1:])] + [1.]
    return torch.cat([priors_of_map(size, 1 / size, scale, extra_scale, ratios)
                      for (_, size, scale, ratios), extra_scale in zip(maps, extra_scales)])  # (8732, 4)


def priors_of_map(size, step, scale, extra_scale, ratios):
    """
    The priors of one feature map, row by row, tile by tile: see `create_prior_boxes`.

    Widths and heights are clamped to at most 1, but priors are not cut at the picture's edge. See "Which".

    :param size: tiles in a row, and rows, of the map
    :param step: distance between the centers of two tiles, as a fraction of the picture
    :param scale: square root of the area of the priors, as a fraction of the picture's
    :param extra_scale: the same for the extra prior
    :param ratios: aspect ratios, width to height, the first is 1
    :return: priors in fractional center-size coordinates, a tensor (size * size * (number of ratios + 1), 4)
    """
    shapes = [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
    shapes.insert(1, (extra_scale, extra_scale))
    return torch.tensor([[(column + 0.5) * step, (row + 0.5) * step, min(width, 1.), min(height, 1.)]
                         for row in range(size) for column in range(size) for width, height in shapes])


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """
    Encode boxes as offsets from priors (the paper's equation 2, with the factors 10 and 5 of its authors' code). See
    "Predictions are relative to priors".

    :param cxcy: boxes in center-size coordinates, a tensor (..., 4)
    :param priors_cxcy: a prior for each box, in center-size coordinates, (..., 4)
    :return: offsets, (..., 4)
    """
    return torch.cat([(cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10),
                      torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """
    Decode offsets from priors into boxes: the inverse of `cxcy_to_gcxgcy`.

    :param gcxgcy: offsets, a tensor (..., 4)
    :param priors_cxcy: a prior for each offset, in center-size coordinates, (..., 4)
    :return: boxes in center-size coordinates, (..., 4)
    """
    return torch.cat([gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2],
                      torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def decimate(tensor, m):
    """
    Keep every m-th value along each dimension.

    :param tensor: a tensor
    :param m: a step for each dimension; None keeps the dimension whole
    :return: the smaller tensor
    """
    return tensor[tuple(slice(None, None, step) for step in m)]


# ------------------------------------------------------------------------------------------ Non-maximum suppression

def non_maximum_suppression(boxes_xy, scores, labels, max_overlap):
    """
    Of boxes of a class that overlap too much, keep the best. See "Processing predictions".

    :param boxes_xy: boxes in fractional boundary coordinates, a tensor (n, 4)
    :param scores: (n)
    :param labels: the class of each box, integers, (n); boxes of different classes never strike each other out
    :param max_overlap: a Jaccard overlap from 0 to 1
    :return: indices of the boxes that were kept, by decreasing score
    """
    # batched_nms keeps classes apart by moving each to a place of its own, (largest coordinate + 1) further on. A box
    # left of 0 could then reach into another class, and behind an enormous box, or in 32 bits, the move would round
    # small boxes away. So the boxes are moved and cut to a range that is wide, but not too wide for 64 bits.
    boxes_xy = boxes_xy.double().clamp(-1e5, 1e5) + 1e5
    return batched_nms(boxes_xy, scores.double(), labels, max_overlap)


# ------------------------------------------------------------------------------------------------------- Transforms

mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's RGB pixels: what VGG-16 was trained with
mean_color = tuple(round(255 * value) for value in mean)


def to_input(image):
    """
    :param image: a PIL image in RGB, 300x300
    :return: the network's input: a tensor (3, 300, 300), RGB from 0 to 1, then normalized
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, 300, 300), from 0 to 255
    return FT.normalize(pixels.float().contiguous(), [255 * m for m in mean], [255 * s for s in std], inplace=True)


def photometric_distort(image, rng=random):
    """
    Vary brightness, contrast, saturation and hue, each with a chance of 0.5, in random order.

    :param image: a PIL image in RGB
    :param rng: the source of random numbers
    :return: a PIL image
    """
    distortions = [(FT.adjust_brightness, 0.5, 1.5), (FT.adjust_contrast, 0.5, 1.5), (FT.adjust_saturation, 0.5, 1.5),
                   (FT.adjust_hue, -18 / 255, 18 / 255)]  # hue: a fraction of the color wheel's full turn
    rng.shuffle(distortions)
    for distort, low, high in distortions:
        if rng.random() < 0.5:
            image = distort(image, rng.uniform(low, high))
    return image


# Zooming out and in moves no pixels at first. `expand` and `random_crop` only choose a window: a rectangle
# (x_min, y_min, x_max, y_max) in the picture's pixels that may reach beyond the picture. `resize` then draws what the
# window shows, in one pass over those pixels that are really seen, and only these are distorted.

def expand(window, rng=random):
    """
    Zoom out: a window up to 4 times as wide and high, somewhere around the old one. The network learns small objects.

    :param window: boundary coordinates in pixels
    :param rng: the source of random numbers
    :return: the larger window
    """
    x_min, y_min, x_max, y_max = window
    scale = rng.uniform(1, 4)
    width, height = scale * (x_max - x_min), scale * (y_max - y_min)
    left = x_min - rng.uniform(0, width - (x_max - x_min))
    top = y_min - rng.uniform(0, height - (y_max - y_min))
    return left, top, left + width, top + height


def random_crop(window, boxes, rng=random):
    """
    Zoom in: a random smaller window, in which the center of at least one object lies, and which overlaps some object by
    a minimum drawn anew whenever 50 tries did not meet it. The network learns large and cut objects.

    :param window: boundary coordinates in pixels
    :param boxes: objects, boundary coordinates in pixels, a tensor (n_objects, 4)
    :param rng: the source of random numbers
    :return: the smaller window, or the same where no crop was drawn or there is no object
    """
    x_min, y_min, x_max, y_max = window
    while len(boxes) > 0:
        min_overlap = rng.choice([0., .1, .3, .5, .7, .9, None])  # None: no crop
        if min_overlap is None:
            break
        # All 50 tries at once: sides from 0.3 to 1 of the window's, placed anywhere inside it
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
            return tuple(crops[good.nonzero()[0, 0]].tolist())  # the first that is good
    return window


def centers_inside(boxes, window):
    """
    :param boxes: boundary coordinates, a tensor (n_objects, 4)
    :param window: boundary coordinates of the same kind: 4 numbers; or many windows, a tensor (n_windows, 1, 4)
    :return: whether each box's center is inside the window, a bool tensor (n_objects) or (n_windows, n_objects)
    """
    window = torch.as_tensor(window)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n_objects, 2)
    inside = (centers > window[..., :2]) & (centers < window[..., 2:])  # (n_objects, 2) or (n_windows, n_objects, 2)
    return inside.all(dim=-1)  # (n_objects) or (n_windows, n_objects)


def resize(image, boxes, window, dims=(300, 300), distort=None):
    """
    Draw what a window shows of a picture; beyond the picture it shows the ImageNet mean.

    :param image: a PIL image in RGB
    :param boxes: boundary coordinates in pixels, a tensor (n_objects, 4)
    :param window: boundary coordinates in pixels, it must show some of the picture
    :param dims: width and height to draw
    :param distort: a function from PIL image to PIL image for what is drawn of the picture, the mean beyond excepted
    :return: a PIL image, and the boxes in fractional boundary coordinates, clipped to the window, (n_objects, 4)
    """
    x_min, y_min, x_max, y_max = window
    scale_x, scale_y = dims[0] / (x_max - x_min), dims[1] / (y_max - y_min)
    # The part of the picture that the window shows, and the whole pixels where it is drawn
    part = max(x_min, 0), max(y_min, 0), min(x_max, image.width), min(y_max, image.height)
    left, top = (min(round((part[0] - x_min) * scale_x), dims[0] - 1),
                 min(round((part[1] - y_min) * scale_y), dims[1] - 1))
    right, bottom = (max(round((part[2] - x_min) * scale_x), left + 1),
                     max(round((part[3] - y_min) * scale_y), top + 1))
    drawn = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=part)
    if distort is not None:
        drawn = distort(drawn)
    canvas = Image.new('RGB', dims, mean_color)
    canvas.paste(drawn, (left, top))

    # The boxes follow the pixels, from the part to where it was drawn
    scales = torch.tensor([(right - left) / (part[2] - part[0]), (bottom - top) / (part[3] - part[1])]).repeat(2)  # (4)
    boxes = (boxes - torch.tensor(part[:2] * 2)) * scales + torch.tensor([left, top] * 2)  # (n_objects, 4)
    return canvas, (boxes / torch.tensor(dims * 2)).clamp(0, 1)


def flip(image, boxes):
    """
    Mirror left and right.

    :param image: a PIL image
    :param boxes: fractional boundary coordinates, a tensor (n_objects, 4)
    :return: the mirrored image and boxes
    """
    x_min, y_min, x_max, y_max = boxes.unbind(dim=1)
    return ImageOps.mirror(image), torch.stack([1 - x_max, y_min, 1 - x_min, y_max], dim=1)  # (n_objects, 4)


def transform(image, boxes, labels, difficulties, split, rng=random):
    """
    Prepare a picture for the network; for training, as a random variation of it (the paper's section 2.2). See
    "Transforms".

    :param image: a PIL image in RGB
    :param boxes: boundary coordinates in pixels, a tensor (n_objects, 4)
    :param labels: (n_objects)
    :param difficulties: (n_objects)
    :param split: 'TRAIN', or 'TEST' to only resize and normalize
    :param rng: the source of random numbers
    :return: the input (3, 300, 300), boxes in fractional boundary coordinates (n, 4), labels (n), difficulties (n);
        in training, objects are left out whose center a crop cut off
    """
    window, distort = (0., 0., float(image.width), float(image.height)), None
    if split == 'TRAIN':
        distort = partial(photometric_distort, rng=rng)
        if rng.random() < 0.5:
            window = expand(window, rng)
        window = random_crop(window, boxes, rng)
        kept = centers_inside(boxes, window)
        boxes, labels, difficulties = boxes[kept], labels[kept], difficulties[kept]
    image, boxes = resize(image, boxes, window, distort=distort)
    if split == 'TRAIN' and rng.random() < 0.5:
        image, boxes = flip(image, boxes)  # after resize, because there are fewer pixels to mirror
    return to_input(image), boxes, labels, difficulties


# ------------------------------------------------------------------------------------------- Mean average precision

def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map):
    """
    Average precision of each class, and their mean, as Pascal VOC 2007 defines them. See "Evaluation".

    The arguments are lists with a tensor for each picture. Boxes are in boundary coordinates, all of one kind.

    :param det_boxes: detections, (n, 4) each
    :param det_labels: (n) each; label 0, the placeholder for no detection, does not count
    :param det_scores: (n) each
    :param true_boxes: objects, (n_objects, 4) each
    :param true_labels: (n_objects) each
    :param true_difficulties: (n_objects) each, 1 if the object need not be found
    :param label_map: dict of label -> index
    :return: dict of label -> average precision, and their mean. A class without objects has no average precision
        and is in neither; without any objects the mean is NaN.
    """
    lists = det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties
    parts = [match_detections(*(tensors[i:i + 500] for tensors in lists))  # few pictures at once need little memory
             for i in range(0, len(det_boxes), 500)]
    labels, scores, hits = (torch.cat(values) for values in zip(*parts))
    counted = torch.cat(true_labels)[torch.cat(true_difficulties) == 0].cpu()
    average_precisions = {}
    for label, index in label_map.items():
        n_objects = (counted == index).sum().item()
        if index > 0 and n_objects > 0:
            of_class = (labels == index).nonzero().squeeze(1)
            order = of_class[scores[of_class].sort(descending=True, stable=True).indices]
            average_precisions[label] = average_precision(hits[order], n_objects)
    if not average_precisions:
        return {}, math.nan
    return average_precisions, sum(average_precisions.values()) / len(average_precisions)


def match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties):
    """
    Decide for each detection whether it hits an object, for some pictures and all classes at once.

    A detection belongs to the object of its picture and class that it overlaps most, if by more than 0.5. Of an
    object's detections, the one with the highest score is the hit, the others are false positives. Detections of
    difficult objects do not count at all.

    :return: labels (n_counted), scores (n_counted) and hits (n_counted) bool, by decreasing score, without the
        detections that do not count. The arguments are those of `calculate_mAP`.
    """
    true_boxes, true_labels, difficult, true_pictures = concatenate(true_boxes, true_labels, true_difficulties)
    det_boxes, det_labels, scores, det_pictures = concatenate(det_boxes, det_labels, det_scores)
    n, n_objects = len(det_labels), len(true_labels)

    # A key for each picture and class. With the objects sorted by key, those that a detection may belong to stand
    # together, from `first` on.
    n_classes = 1 + max((int(labels.max()) for labels in (det_labels, true_labels) if len(labels)), default=0)
    det_keys = det_pictures * n_classes + det_labels  # (n)
    true_keys, order = (true_pictures * n_classes + true_labels).sort(stable=True)  # (n_objects)
    true_boxes, difficult = true_boxes[order], difficult[order] > 0
    first = torch.searchsorted(true_keys, det_keys)  # (n)
    counts = torch.searchsorted(true_keys, det_keys, right=True) - first  # (n), objects that each may belong to

    # Every pair of a detection and an object that it may belong to: numbered on, less the number at which the
    # detection's pairs begin, pairs count 0, 1, 2 ... through the detection's objects.
    pair_dets = torch.arange(n).repeat_interleave(counts)  # (n_pairs)
    pair_objects = torch.arange(len(pair_dets)) + (first - counts.cumsum(0) + counts)[pair_dets]  # (n_pairs)
    overlaps = find_jaccard_overlap(det_boxes[pair_dets, None], true_boxes[pair_objects, None]).flatten()  # (n_pairs)

    # The best pair of each detection, if its overlap is above 0.5; of equal overlaps, the first object
    best_overlaps = torch.zeros(n).scatter_reduce(0, pair_dets, overlaps, 'amax')  # (n)
    best = (overlaps == best_overlaps[pair_dets]) & (overlaps > 0.5)  # (n_pairs)
    objects = torch.full((n,), n_objects).scatter_reduce(0, pair_dets[best], pair_objects[best], 'amin')  # (n)

    # By score, without the detections that do not count. The first of each object in this order is the hit; `n_objects`
    # is no object.
    counted = (det_labels > 0) & ~torch.cat([difficult, difficult.new_zeros(1)])[objects]  # (n)
    order = scores.sort(descending=True, stable=True).indices  # (n)
    order = order[counted[order]]  # (n_counted)
    firsts = torch.full((n_objects + 1,), n).scatter_reduce(0, objects[order], torch.arange(len(order)), 'amin')
    firsts = firsts[:n_objects]  # (n_objects)
    hits = torch.zeros(len(order), dtype=torch.bool)  # (n_counted)
    hits[firsts[firsts < n]] = True
    return det_labels[order], scores[order], hits


def concatenate(*lists):
    """
    :param lists: lists with a tensor for each picture, alike in the number of rows
    :return: the concatenation of each list, on the CPU, and for each row the number of its picture
    """
    pictures = torch.arange(len(lists[0])).repeat_interleave(torch.tensor([len(rows) for rows in lists[0]]))
    return *(torch.cat([rows.cpu() for rows in tensors]) for tensors in lists), pictures


def average_precision(hits, n_objects):
    """
    Mean of the best precision at recalls of at least 0, 0.1, ... 1 (the 11-point measure of VOC 2007).

    :param hits: whether each detection of a class is a hit, by decreasing score, a bool tensor (n)
    :param n_objects: how many objects there were to find
    :return: the average precision, from 0 to 1
    """
    true_positives = hits.cumsum(0)  # (n)
    precisions = true_positives.double() / torch.arange(1, len(hits) + 1)  # (n)
    total = 0.
    for tenth in range(11):
        reached = precisions[true_positives * 10 >= tenth * n_objects]  # whole numbers: 0.3 is not quite 3 * 0.1
        total += reached.max().item() if len(reached) else 0.
    return total / 11


# ----------------------------------------------------------------------------------------- Training and checkpoints

class AverageMeter:
    """A value's latest reading, and its average over all readings."""

    def __init__(self):
        self.val = self.sum = self.count = self.avg = 0.

    def update(self, val, n=1):
        """
        :param val: a reading
        :param n: how many items it stands for
        """
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def fast_in_bfloat16(device):
    """
    :param device: a torch.device
    :return: whether it is a GPU that multiplies 16-bit numbers of bfloat16's kind (NVIDIA's Ampere, and later ones)
    """
    return device.type == 'cuda' and torch.cuda.get_device_capability(device)[0] >= 8


def adjust_learning_rate(optimizer, scale):
    """
    :param optimizer: its learning rates are changed in place
    :param scale: what to multiply them with
    """
    for group in optimizer.param_groups:
        group['lr'] *= scale


def clip_gradient(optimizer, max_norm):
    """
    Scale the gradient down to a length of at most `max_norm`, lest a single batch throw the weights off.

    :param optimizer: its parameters' gradients are changed in place
    :param max_norm: the largest length allowed
    :return: the length before, a scalar
    """
    return torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], max_norm)


@first_process_first
def download_weights(weights, remedy):
    """
    :param weights: published weights of torchvision, which are downloaded if they are not on this machine
    :param remedy: what to do if they can't be had, other than to put the file in its place
    :return: their state_dict
    :raises UserError: they can't be downloaded or read
    """
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
        raise UserError(f'the download or reading of {weights.url} failed ({error}): put that file into {folder}, or '
                        f'{remedy}') from None


checkpoint_version = 1  # of the files that we write; to be raised when the project as it is now could not read them


def save_checkpoint(path, epoch, model, optimizer, label_map, seed):
    """
    Write all that training needs to go on exactly where it was, and all that detection needs. The random numbers of an
    epoch depend on nothing but the seed and the epoch's number.

    :param path: the file to write
    :param epoch: the epoch that was finished last
    :param model: SSD300
    :param optimizer: its optimizer
    :param label_map: dict of label -> index
    :param seed: the seed of the training
    """
    content = {'version': checkpoint_version, 'epoch': epoch, 'label_map': label_map, 'seed': seed,
               'model': model.state_dict(), 'priors_cxcy': model.priors_cxcy, 'optimizer': optimizer.state_dict()}
    with write_whole(path) as [file]:
        torch.save(content, file)


def load_checkpoint(path, device='cpu'):
    """
    Read a checkpoint, ours or one of the earlier implementation (see pretrained.py). Nothing in the file is run: one
    that holds other code is refused.

    :param path: the file
    :param device: where its tensors go
    :return: dict of version, epoch, label_map, seed, model, priors_cxcy, optimizer, see `save_checkpoint`; of the
        earlier implementation's only epoch, label_map, model, priors_cxcy
    :raises UserError: the file is missing, or is no such checkpoint
    """
    if not os.path.isfile(path):
        raise UserError(f'no checkpoint at {path}: train one with "python train.py", or set the right path')
    from pretrained import StandIn, from_earlier, read_saved  # here, because pretrained.py builds on this file
    content = read_saved(path, device)
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get('model'), StandIn):
        return from_earlier(content, path)
    version = content.get('version', checkpoint_version)
    if isinstance(version, int) and version > checkpoint_version:
        raise UserError(f'{path} has version {version}, and is from a newer version of this project, which writes '
                        f'version {checkpoint_version}: update the project')
    kinds = {'epoch': int, 'label_map': dict, 'model': dict, 'priors_cxcy': torch.Tensor, 'seed': int,
             'optimizer': dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise UserError(f'{path} is no checkpoint of train.py: it lacks {wrong}')
    indices = list(content['label_map'].values())
    if content['priors_cxcy'].shape[1:] != (4,) or indices != list(range(len(indices))):
        raise UserError(f'{path} is damaged: take another checkpoint')
    return content
