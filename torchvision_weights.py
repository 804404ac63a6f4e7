"""torchvision's SSD300, trained on COCO: its weights in our SSD300, to detect with or to train on from.

torchvision has the same layers as the paper's authors. What differs from ours: the names of the weights, the priors and
their order within a tile, and how an image is resized and normalized. See "Where the sources differ" in GUIDE.md.
"""
import torch
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from errors import UserError, one_line
from model import SSD300, download_weights
from utils import feature_maps, make_label_map, mean, std, xy_to_cxcy

coco_weights = SSD300_VGG16_Weights.COCO_V1
coco_categories = coco_weights.meta['categories']  # 91 names: the background, COCO's 80 classes, and some 'N/A'
coco_names = {'aeroplane': 'airplane', 'motorbike': 'motorcycle', 'diningtable': 'dining table',
              'pottedplant': 'potted plant', 'sofa': 'couch', 'tvmonitor': 'tv'}  # from VOC's names

# Our layers by the names of torchvision's
layers = {'features.0': 'base.conv1_1', 'features.2': 'base.conv1_2',
          'features.5': 'base.conv2_1', 'features.7': 'base.conv2_2',
          'features.10': 'base.conv3_1', 'features.12': 'base.conv3_2', 'features.14': 'base.conv3_3',
          'features.17': 'base.conv4_1', 'features.19': 'base.conv4_2', 'features.21': 'base.conv4_3',
          'extra.0.1': 'base.conv5_1', 'extra.0.3': 'base.conv5_2', 'extra.0.5': 'base.conv5_3',
          'extra.0.7.1': 'base.conv6', 'extra.0.7.3': 'base.conv7',
          'extra.1.0': 'aux_convs.conv8_1', 'extra.1.2': 'aux_convs.conv8_2',
          'extra.2.0': 'aux_convs.conv9_1', 'extra.2.2': 'aux_convs.conv9_2',
          'extra.3.0': 'aux_convs.conv10_1', 'extra.3.2': 'aux_convs.conv10_2',
          'extra.4.0': 'aux_convs.conv11_1', 'extra.4.2': 'aux_convs.conv11_2'}

# Our weights by the names of torchvision's
names = {f'backbone.{theirs}.{kind}': f'{ours}.{kind}'
         for theirs, ours in layers.items() for kind in ('weight', 'bias')}
names |= {f'head.{head}.module_list.{i}.{kind}': f'pred_convs.{ours}_{feature_map}.{kind}'
          for head, ours in (('regression_head', 'loc'), ('classification_head', 'cl'))
          for i, feature_map in enumerate(feature_maps) for kind in ('weight', 'bias')}
names['backbone.scale_weight'] = 'rescale_factors'

# Within a tile, torchvision has the ratios 1, extra, 2, 1/2, 3, 1/3; ours are 1, extra, 2, 3, 1/2, 1/3.
orders = {4: [0, 1, 2, 3], 6: [0, 1, 2, 4, 3, 5]}  # by the number of priors in a tile


def coco_detector(labels=None):
    """SSD300 trained on COCO, on the CPU, and its dict of label -> index. `labels` are VOC's or COCO's names of the
    classes to detect; None for all 80. Raises UserError if the weights can't be downloaded, or COCO lacks a label."""
    if labels is None:
        labels = [name for name in coco_categories[1:] if name != 'N/A']
    unknown = [label for label in labels if coco_index(label) is None]
    if unknown:
        raise UserError(f'the weights trained on COCO do not know {unknown}: set checkpoint to weights of your own')
    return from_torchvision(download_coco(), [0, *map(coco_index, labels)]), make_label_map(labels)


def coco_index(label):
    """:return: the index in torchvision's model of a class, by VOC's or COCO's name; None if COCO lacks it"""
    name = coco_names.get(label, label)
    return coco_categories.index(name) if name in coco_categories[1:] else None


def download_coco():
    """:return: the state_dict of torchvision's SSD300 trained on COCO (box mAP 25.1 there, as torchvision says)"""
    return download_weights(coco_weights, 'set pretrained = None in train.py, or checkpoint to weights of your own')


def from_torchvision(state_dict, classes=None):
    """Build our SSD300, on the CPU, with the weights and priors of torchvision's. Both predict nearly the same.

    :param state_dict: of a `torchvision.models.detection.ssd300_vgg16`
    :param classes: indices of the classes to keep, 0 (background) first; None for all
    :raises UserError: the weights are not those of such a model"""
    refusal = "these are not the weights of torchvision's ssd300_vgg16, or feature_maps in utils.py were changed: "
    missing = [theirs for theirs in names if theirs not in state_dict]
    if missing:
        raise UserError(f'{refusal}{missing[0]} is missing')
    n_all = len(state_dict['head.classification_head.module_list.0.bias']) // 4
    classes = list(range(n_all)) if classes is None else list(classes)
    model = SSD300(n_classes=len(classes))
    renamed = {ours: state_dict[theirs] for theirs, ours in names.items()}
    renamed['rescale_factors'] = renamed['rescale_factors'].view(1, -1, 1, 1)  # (1, 512, 1, 1)
    renamed['priors_cxcy'] = coco_default_boxes()  # (8732, 4)
    try:
        for name, feature_map in feature_maps.items():
            order = orders[4] if len(feature_map.ratios) == 3 else orders[6]
            for kind in ('weight', 'bias'):
                loc, cl = f'pred_convs.loc_{name}.{kind}', f'pred_convs.cl_{name}.{kind}'
                locs = renamed[loc].unflatten(0, (len(order), 4))[order]  # (n_priors, 4, ...)
                scores = renamed[cl].unflatten(0, (len(order), n_all))[order][:, classes]  # (n_priors, n_classes, ...)
                renamed |= {loc: locs.flatten(0, 1), cl: scores.flatten(0, 1)}  # (n_priors * 4 or n_classes, ...)
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise UserError(refusal + one_line(error)) from error

    # The input of torchvision's first layer is 255 * (pixel - their_mean), of ours (pixel - mean) / std. As
    # 255 * (pixel - their_mean) = 255 * std * ours + 255 * (mean - their_mean), change the first layer's weights.
    their_mean = torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)
    our_mean, our_std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    weight, bias = model.base.conv1_1.weight.data, model.base.conv1_1.bias.data  # (64, 3, 3, 3), (64)
    bias += (weight * 255 * (our_mean - their_mean)).sum(dim=(1, 2, 3))  # (64)
    weight *= 255 * our_std
    return model


def coco_default_boxes():
    """:return: the priors of torchvision's SSD300, in center-size coordinates and in the order of ours, (8732, 4)"""
    generator = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], steps=[8, 16, 32, 64, 100, 300],
                                    scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05])
    maps = [torch.empty(1, 1, size, size) for size in (38, 19, 10, 5, 3, 1)]
    [boxes] = generator(ImageList(torch.empty(1, 3, 300, 300), [(300, 300)]), maps)  # (8732, 4), in pixels
    of_maps = xy_to_cxcy(boxes / 300).split([5776, 2166, 600, 150, 36, 4])  # six of (n_tiles * n_priors, 4)
    return torch.cat([priors.unflatten(0, (-1, n))[:, orders[n]].flatten(0, 1)
                      for priors, n in zip(of_maps, (4, 6, 6, 6, 4, 4))])
