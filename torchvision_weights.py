"""torchvision's SSD300, trained on COCO: its weights in our SSD300, to detect with or to train on from.

torchvision has the same layers as the paper's authors. What differs from ours: the names of the weights, the priors and
their order within a tile, and how an image is resized and normalized. See "Where the sources differ" in GUIDE.md.
"""
import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from errors import UserError, one_line
from model import SSD300, download_weights
from utils import create_prior_boxes, feature_maps, make_label_map, mean, std

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
    try:
        model.load_state_dict(rename_torchvision(state_dict, n_all, classes))
    except RuntimeError as error:
        raise UserError(refusal + one_line(error)) from error
    model.priors_cxcy.copy_(coco_default_boxes())

    # The input of torchvision's first layer is 255 * (pixel - their_mean), of ours (pixel - mean) / std. As
    # 255 * (pixel - their_mean) = 255 * std * ours + 255 * (mean - their_mean), change the first layer's weights.
    their_mean = torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)
    our_mean, our_std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    weight, bias = model.base.conv1_1.weight.data, model.base.conv1_1.bias.data  # (64, 3, 3, 3), (64)
    bias += (weight * 255 * (our_mean - their_mean)).sum(dim=(1, 2, 3))  # (64)
    weight *= 255 * our_std
    return model


def rename_torchvision(state_dict, n_all, classes):
    """Turn a state_dict of torchvision with `n_all` classes into ours with the listed `classes`, but without priors."""
    renamed = {ours: state_dict[theirs] for theirs, ours in names.items()}
    renamed['rescale_factors'] = renamed['rescale_factors'].view(1, -1, 1, 1)  # (1, 512, 1, 1)
    # Within a tile, torchvision has the ratios 1, extra, 2, 1/2, 3, 1/3; ours are 1, extra, 2, 3, 1/2, 1/3.
    for name, feature_map in feature_maps.items():
        order = [0, 1, 2, 3] if len(feature_map.ratios) == 3 else [0, 1, 2, 4, 3, 5]
        for kind in ('weight', 'bias'):
            key = f'pred_convs.loc_{name}.{kind}'
            locs = renamed[key].unflatten(0, (len(order), 4))[order]  # (n_priors, 4, ...)
            renamed[key] = locs.flatten(0, 1)  # (n_priors * 4, ...)
            key = f'pred_convs.cl_{name}.{kind}'
            scores = renamed[key].unflatten(0, (len(order), n_all))[order][:, classes]  # (n_priors, n_classes, ...)
            renamed[key] = scores.flatten(0, 1)  # (n_priors * n_classes, ...)
    return renamed


def coco_default_boxes():
    """:return: the priors of torchvision's SSD300, in center-size coordinates and in the order of ours, (8732, 4)"""
    scales = 0.07, 0.15, 0.33, 0.51, 0.69, 0.87
    ratios = {4: (1, 2, 1 / 2), 6: (1, 2, 3, 1 / 2, 1 / 3)}  # by the number of priors in a tile
    maps = {name: feature_map._replace(scale=scale, ratios=ratios[len(feature_map.ratios) + 1])
            for (name, feature_map), scale in zip(feature_maps.items(), scales, strict=True)}
    priors = create_prior_boxes(maps, last_extra_scale=(0.87 * 1.05) ** 0.5)  # (8732, 4)

    # Our centers are (i + 0.5) / size, torchvision's (i + 0.5) * step / 300, with steps in pixels.
    steps = 8, 16, 32, 64, 100, 300
    n_priors = [feature_map.size ** 2 * (len(feature_map.ratios) + 1) for feature_map in maps.values()]
    for map_priors, feature_map, step in zip(priors.split(n_priors), maps.values(), steps, strict=True):
        map_priors[:, :2] *= feature_map.size * step / 300  # in place, so priors change too
    return priors
