"""The worked examples of the tutorial: the README and the figures show their numbers, and a test computes them."""
import torch

from model import SSD300
from utils import create_prior_boxes, feature_maps

# A fully connected layer as a convolution: a map of one channel, one output, and a larger map to slide over
small_map = torch.tensor([[1., 2.], [3., 4.]])
weights = torch.tensor([[1., 0.], [2., -1.]])
large_map = torch.tensor([[1., 2., 0.], [3., 4., 1.], [0., 1., 2.]])

# Jaccard index: two boxes in boundary coordinates
jaccard_boxes = torch.tensor([[0., 0., 4., 3.], [2., 1., 6., 4.]])

# Offsets: an object and a prior in fractional center-size coordinates
offset_object = torch.tensor([0.52, 0.47, 0.30, 0.20])
offset_prior = torch.tensor([0.50, 0.50, 0.20, 0.20])

# Prediction convolutions: a tile of conv9_2 and the one of its six priors that has to find the person in scikit-image's
# photograph of an astronaut; the offsets lead to the person's box, the scores are made up
tile, tile_prior = 11, 1  # both counted from 0
tile_offsets = torch.tensor([1.19, 0.19, 0.31, 2.18])
tile_classes = ('background', 'person', 'rocket', 'helmet', 'flag')
tile_scores = torch.tensor([0.5, 4.0, -1.0, 1.0, 0.0])

# Average precision: whether each detection of a class, by decreasing score, is a true positive; the number of objects
true_positives = torch.tensor([True, True, False, True, False, False, True, False])
n_objects = 5


def receptive_fields():
    """:return: dict of feature map -> how many pixels wide the part of the image is that one of its tiles has seen, and
        that its prediction convolution sees"""
    model, field, step, fields = SSD300(n_classes=2), 1, 1, {}
    for name, layer in [*model.base.named_children(), *model.aux_convs.named_children()]:
        kernel, stride, dilation = ((value if isinstance(value, int) else value[0])
                                    for value in (layer.kernel_size, layer.stride, layer.dilation))
        field, step = field + (kernel - 1) * dilation * step, step * stride
        if name in feature_maps:
            fields[name] = field, field + 2 * step
    return fields


# Matching: six priors (fractional center-size), and three objects (fractional boundary) of the classes 1, 2, 3
matching_priors = torch.tensor([[x, y, 0.4, 0.4] for y in (0.3, 0.7) for x in (0.2, 0.5, 0.8)])
matching_names = ('cat', 'dog', 'ball')
matching_boxes = torch.tensor([[0.30, 0.12, 0.72, 0.56], [0.38, 0.10, 0.78, 0.48], [0.06, 0.72, 0.22, 0.88]])

# Non-maximum suppression: six of the persons in `decoded` of photographs.py, in fractional boundary coordinates
nms_scores = torch.tensor([0.80, 0.79, 0.72, 0.68, 0.66, 0.62])
nms_boxes = torch.tensor([[0.04, 0.33, 0.22, 0.94], [0.56, 0.31, 0.78, 0.94], [0.57, 0.33, 0.78, 0.89],
                          [0.03, 0.29, 0.23, 0.95], [0.34, 0.30, 0.54, 0.96], [0.61, 0.32, 0.83, 1.01]])


def priors_by_map():
    """The priors: dict of feature map -> (tiles, priors of a tile, 4)."""
    counts = {name: (map.size ** 2, len(map.ratios) + 1) for name, map in feature_maps.items()}
    parts = create_prior_boxes().split([tiles * priors for tiles, priors in counts.values()])
    return {name: part.view(*counts[name], 4) for name, part in zip(counts, parts)}
