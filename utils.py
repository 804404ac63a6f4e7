"""
What a detector is made of, besides its network: labels, box coordinates and overlaps, priors and their encoding,
non-maximum suppression, mean average precision, and a few helpers for training. Read it beside README.md, from top to
bottom; the sections that are named here are those of README.md.

Boxes come in three forms, and names say which:
    xy      boundary coordinates: (x_min, y_min, x_max, y_max)
    cxcy    center-size coordinates: (c_x, c_y, w, h)
    gcxgcy  a box as an offset from a prior: what the network predicts
They are in fractions of the image's width and height (0 to 1), unless a function says otherwise. See "Boxes".
"""
import math
from collections import Counter, namedtuple
from colorsys import hsv_to_rgb

import torch
from torchvision.ops import batched_nms

from files import UserError


# ------------------------------------------------------------------------------------------------- Labels and colors

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

mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's RGB pixels: what VGG-16 was trained with


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

    Widths and heights are clamped to at most 1, but priors are not cut at the image's edge. See "Which priors".

    :param size: tiles in a row, and rows, of the map
    :param step: distance between the centers of two tiles, as a fraction of the image
    :param scale: square root of the area of the priors, as a fraction of the image's
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
    # left of 0 could then reach into another class, and next to an enormous box, or in 32 bits, rounding would erase
    # small ones. So the boxes are moved and cut to a range that is wide, but not too wide for 64 bits.
    boxes_xy = boxes_xy.double().clamp(-1e5, 1e5) + 1e5
    return batched_nms(boxes_xy, scores.double(), labels, max_overlap)


# ------------------------------------------------------------------------------------------- Mean average precision

def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map):
    """
    Average precision of each class, and their mean, as Pascal VOC 2007 defines them. See "Evaluation".

    The arguments are lists with a tensor for each image. Boxes are in boundary coordinates, all of one kind.

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
    hits = find_hits(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map)
    average_precisions = {label: average_precision(*of_class) for label, of_class in hits.items()}
    if not average_precisions:
        return {}, math.nan
    return average_precisions, sum(average_precisions.values()) / len(average_precisions)


def find_hits(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map):
    """
    Decide for each detection whether it finds an object. Of an object's detections, the one with the highest score is a
    hit, the others are false positives. Detections of difficult objects count as neither.

    :return: dict of label -> whether each detection that counts is a hit, by decreasing score, a bool tensor (n), and
        how many objects there were to find; for classes with objects. The arguments are those of `calculate_mAP`.
    """
    # Image by image: which object does each detection belong to? Objects are numbered through all images.
    targets, n_before = [], 0
    for image in zip(det_boxes, det_labels, true_boxes, true_labels):
        of_image = find_targets(*(tensor.cpu() for tensor in image))  # (n)
        targets.append(of_image.where(of_image < 0, of_image + n_before))  # (n)
        n_before += len(image[3])

    det_labels, det_scores = torch.cat(det_labels).cpu(), torch.cat(det_scores).cpu()  # (n_all), (n_all)
    by_score = det_scores.sort(descending=True, stable=True).indices  # (n_all)
    det_labels, targets = det_labels[by_score], torch.cat(targets)[by_score]  # (n_all), (n_all)
    true_labels, difficult = torch.cat(true_labels).tolist(), torch.cat(true_difficulties).tolist()  # of all objects

    # Class by class: from the highest score down, which detections are the first of an object?
    hits_of_classes = {}
    n_objects = Counter(label for label, is_difficult in zip(true_labels, difficult) if not is_difficult)
    for label, index in label_map.items():
        if n_objects[index] == 0:
            continue
        found, hits = set(), []
        for target in targets[det_labels == index].tolist():
            if target >= 0 and difficult[target]:
                continue
            hits.append(target >= 0 and target not in found)
            found.add(target)
        hits_of_classes[label] = torch.tensor(hits, dtype=torch.bool), n_objects[index]
    return hits_of_classes


def find_targets(det_boxes, det_labels, true_boxes, true_labels):
    """
    :param det_boxes: detections of an image, boundary coordinates, (n, 4)
    :param det_labels: (n)
    :param true_boxes: the image's objects, boundary coordinates, (n_objects, 4)
    :param true_labels: (n_objects)
    :return: for each detection, the object of its class that it overlaps most: its index, of equals the first, or -1
        if they overlap by no more than 0.5, (n)
    """
    if len(true_boxes) == 0:
        return torch.full((len(det_boxes),), -1)
    overlap = find_jaccard_overlap(det_boxes, true_boxes)  # (n, n_objects)
    overlap = overlap.where(det_labels.unsqueeze(1) == true_labels, 0)  # (n, n_objects)
    best, target = overlap.max(dim=1)  # (n), (n)
    return target.where(best > 0.5, -1)


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


# ------------------------------------------------------------------------------------------------- Training helpers

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
