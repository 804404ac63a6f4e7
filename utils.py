"""The parts of a detector besides its network: labels, box coordinates and overlaps, priors and their encoding,
non-maximum suppression, and mean average precision. The sections named here are those of README.md.

The name or the docstring says which form boxes have:
    xy      boundary coordinates: (x_min, y_min, x_max, y_max)
    cxcy    center-size coordinates: (c_x, c_y, w, h)
    gcxgcy  (g_cx, g_cy, g_w, g_h): not a box, but its four offsets from a prior
The first two are in fractions of the image's width and height (0 to 1), unless a function says otherwise. See "Boxes".
"""
import math
from collections import Counter, namedtuple
from colorsys import hsv_to_rgb
from itertools import pairwise

import torch
from torchvision.ops import batched_nms

from errors import UserError

# ------------------------------------------------------------------------------------------------- Labels and colors

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable',
              'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')


def make_label_map(labels):
    """Make a dict of label -> index: 'background' is 0, and `labels`, the names of the classes without the background,
    follow in order. Raises UserError if a label occurs twice, or is 'background' itself."""
    names = ['background', *labels]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not labels:
        raise UserError(f"labels {list(labels)} must name each class once, and not 'background': "
                        + (f'repeated: {repeated}' if repeated else 'the list is empty'))
    return {name: index for index, name in enumerate(names)}


def make_color_map(label_map):
    """:return: dict of label -> color '#rrggbb'; hues are 0.618 of the color wheel apart, so that neighbors differ"""
    colors = {label: hsv_to_rgb(index * 0.618 % 1, 1, 1) for label, index in label_map.items()}
    colors['background'] = (1, 1, 1)
    return {label: '#' + ''.join(f'{int(255 * value):02x}' for value in color) for label, color in colors.items()}


label_map = make_label_map(voc_labels)
rev_label_map = {index: label for label, index in label_map.items()}
label_color_map = make_color_map(label_map)

mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's RGB values, scaled to 0 to 1, as for VGG-16


# -------------------------------------------------------------------------------------- Box coordinates and overlaps

def xy_to_cxcy(xy):
    """Turn boxes, a tensor (..., 4), from boundary into center-size coordinates."""
    return torch.cat([(xy[..., 2:] + xy[..., :2]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """Turn boxes, a tensor (..., 4), from center-size into boundary coordinates."""
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def find_intersection(set_1, set_2):
    """Areas (n1, n2) of the intersections of every box of one set with every box of another. The sets are tensors
    (n1, 4) and (n2, 4) in boundary coordinates."""
    set_1, set_2 = set_1.unsqueeze(1), set_2.unsqueeze(0)  # (n1, 1, 4), (1, n2, 4)
    lower = torch.max(set_1[..., :2], set_2[..., :2])  # (n1, n2, 2)
    upper = torch.min(set_1[..., 2:], set_2[..., 2:])  # (n1, n2, 2)
    return (upper - lower).clamp(min=0).prod(dim=-1)  # (n1, n2)


def find_jaccard_overlap(set_1, set_2):
    """Jaccard overlaps (n1, n2), from 0 to 1, of every box of one set with every box of another. The sets are tensors
    (n1, 4) and (n2, 4) in boundary coordinates. See "Jaccard index"."""
    intersection = find_intersection(set_1, set_2)  # (n1, n2)
    areas_1 = (set_1[:, 2:] - set_1[:, :2]).prod(dim=1)  # (n1)
    areas_2 = (set_2[:, 2:] - set_2[:, :2]).prod(dim=1)  # (n2)
    union = areas_1.unsqueeze(1) + areas_2.unsqueeze(0) - intersection  # (n1, n2)
    return intersection / union.clamp(min=1e-12)  # 0, not 0/0, for two boxes without area


# ---------------------------------------------------------------- Priors and their encoding; suppression and evaluation

# The six feature maps with predictions, and the priors on each (the paper's section 2.2; the numbers as in
# sgrvinod's tutorial, see "Where the sources differ" in GUIDE.md). `size` is the number of tiles in a row, `scale` the
# square root of a prior's area (1: the whole image), `ratios` are width to height. Each tile also has an extra prior of
# ratio 1, with the geometric mean of this map's scale and the next one's.
FeatureMap = namedtuple('FeatureMap', 'channels size scale ratios')
feature_maps = {'conv4_3': FeatureMap(512, 38, 0.1, (1, 2, 1 / 2)),
                'conv7': FeatureMap(1024, 19, 0.2, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv8_2': FeatureMap(512, 10, 0.375, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv9_2': FeatureMap(256, 5, 0.55, (1, 2, 3, 1 / 2, 1 / 3)),
                'conv10_2': FeatureMap(256, 3, 0.725, (1, 2, 1 / 2)),
                'conv11_2': FeatureMap(256, 1, 0.9, (1, 2, 1 / 2))}


def create_prior_boxes():
    """The 8732 priors of SSD300: map by map, row by row, tile by tile, and within a tile ratio 1, the extra prior, then
    the other ratios. The predictions come in the same order. Clamping limits widths and heights to 1, but does not clip
    priors at the image's edge. See "Which priors".

    :return: priors in fractional center-size coordinates, a tensor (8732, 4)"""
    scales = [feature_map.scale for feature_map in feature_maps.values()]
    extra_scales = [math.sqrt(scale * next_scale) for scale, next_scale in pairwise(scales)] + [1.]  # 1 on the last map
    priors = []
    for (_, size, scale, ratios), extra_scale in zip(feature_maps.values(), extra_scales):
        sides = [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
        sides.insert(1, (extra_scale, extra_scale))  # the extra prior is the second
        for row in range(size):
            for column in range(size):
                c_x, c_y = (column + 0.5) / size, (row + 0.5) / size
                priors += [(c_x, c_y, w, h) for w, h in sides]
    return torch.tensor(priors).clamp(0, 1)  # (8732, 4)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Encode boxes as offsets from priors (the paper's equation 2, with the factors 10 and 5 of its authors' code). See
    "Predictions are relative to priors". Boxes and priors are in center-size coordinates, one prior for each box; these
    and the offsets are tensors (..., 4)."""
    return torch.cat([(cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10),
                      torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets from priors into boxes, the inverse of `cxcy_to_gcxgcy`: the same shapes and coordinates."""
    return torch.cat([gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2],
                      torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def decimate(tensor, m):
    """Keep every m-th value of a tensor. `m` has a step for each dimension; None keeps the dimension whole."""
    return tensor[tuple(slice(None, None, step) for step in m)]


def non_maximum_suppression(boxes_xy, scores, labels, max_overlap):
    """From the highest score down, keep each box unless it overlaps a kept box of its class too much: then it is
    suppressed. See "Processing predictions".

    :param boxes_xy: boxes in fractional boundary coordinates, a tensor (n, 4), with their scores (n)
    :param labels: the class of each box, integers, (n); a box never suppresses one of another class
    :param max_overlap: a Jaccard overlap from 0 to 1
    :return: indices of the boxes that are kept, by decreasing score"""
    # To keep classes apart, batched_nms can move the boxes of class k by k * (largest coordinate + 1). Clamping keeps a
    # box out of the class before it, and rounding small. It changes overlaps only of boxes that reach beyond -1 or 2.
    return batched_nms(boxes_xy.clamp(-1, 2), scores, labels, max_overlap)


def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map):
    """Average precision of each class, and their mean, as Pascal VOC 2007 defines them; but the width of a box is
    x_max - x_min, without the last pixel that VOC's own code includes. See "Evaluation". The arguments are lists with
    a tensor for each image. Boxes are in boundary coordinates, fractional or in pixels.

    :param det_boxes: detections, (n, 4) each; with det_labels (n), 0 for no detection, and det_scores (n)
    :param true_boxes: ground truth, (n_objects, 4) each; with true_labels (n_objects) and true_difficulties
        (n_objects), 1 if the object is marked as difficult
    :param label_map: dict of label -> index
    :return: dict of label -> average precision, and their mean. A class without objects, or with difficult
        ones alone, has no average precision and is in neither; if no class has one, the mean is NaN."""
    matches = [match_detections(*image) for image in zip(det_boxes, det_labels, det_scores, true_boxes, true_labels,
                                                         true_difficulties)]
    true_positive, ignored, _ = (torch.cat(values) for values in zip(*matches))  # of all detections, bool (n_all)
    det_labels, det_scores = torch.cat(det_labels).cpu(), torch.cat(det_scores).cpu()  # (n_all), (n_all)
    true_labels, difficult = torch.cat(true_labels).cpu(), torch.cat(true_difficulties).cpu() > 0  # of all objects

    average_precisions = {}
    for label, index in label_map.items():
        n_objects = ((true_labels == index) & ~difficult).sum().item()
        if n_objects == 0:
            continue
        of_class = (det_labels == index) & ~ignored  # (n_all)
        by_score = det_scores[of_class].sort(descending=True, stable=True).indices  # (n)
        average_precisions[label] = average_precision(true_positive[of_class][by_score], n_objects)
    if not average_precisions:
        return {}, math.nan
    return average_precisions, sum(average_precisions.values()) / len(average_precisions)


def match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties):
    """Compare the detections of an image with its ground truth. Each detection belongs to the object of its class that
    it overlaps most (of equals, the first), if by more than 0.5. Of an object's detections, the one with the highest
    score is a true positive. All others are false positives, but those of difficult objects are ignored.

    :param det_boxes: detections in boundary coordinates, (n, 4); with det_labels (n) and det_scores (n)
    :param true_boxes: ground truth in the same coordinates, (n_objects, 4); with true_labels (n_objects) and
        true_difficulties (n_objects), 1 for difficult
    :return: whether each detection is a true positive, bool (n); whether it is ignored, bool (n); and the index of its
        object, or -1 for none, (n). All are on the CPU."""
    n = len(det_boxes)
    true_positive, ignored = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)  # (n), (n)
    target = torch.full((n,), -1)  # (n)
    if n == 0 or len(true_boxes) == 0:
        return true_positive, ignored, target
    overlap = find_jaccard_overlap(det_boxes.cpu(), true_boxes.cpu())  # (n, n_objects)
    overlap = overlap.where(det_labels.cpu().unsqueeze(1) == true_labels.cpu(), 0)  # (n, n_objects)
    largest, target = overlap.max(dim=1)  # (n), (n)
    target = target.where(largest > 0.5, -1)  # (n)

    targets, difficult, found = target.tolist(), true_difficulties.tolist(), set()
    for i in det_scores.sort(descending=True, stable=True).indices.tolist():  # from the highest score down
        if targets[i] == -1:
            continue
        if difficult[targets[i]]:
            ignored[i] = True
        elif targets[i] not in found:
            true_positive[i] = True
            found.add(targets[i])
    return true_positive, ignored, target


def average_precision(true_positives, n_objects):
    """Mean, from 0 to 1, of the best precision at recalls of at least 0, 0.1, ... 1 (VOC 2007's 11-point measure).

    :param true_positives: whether each detection of a class is a true positive, by decreasing score, a bool tensor (n)
    :param n_objects: number of objects of the class that are not difficult"""
    n_found = true_positives.cpu().cumsum(0)  # (n)
    precisions = n_found.double() / torch.arange(1, len(n_found) + 1)  # (n)
    total = 0.
    for tenth in range(11):
        reached = precisions[n_found * 10 >= tenth * n_objects]  # in integers, because 0.3 is not quite 3 * 0.1
        total += reached.max().item() if len(reached) else 0.
    return total / 11
