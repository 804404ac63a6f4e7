"""
Weights from elsewhere, brought into our SSD300: torchvision's SSD300, trained on COCO, and checkpoints of the widely
used earlier implementation of this tutorial. Skip this file on a first reading.
"""
import pickle
import warnings
from collections import OrderedDict, defaultdict

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from files import UserError, one_line
from model import SSD300
from utils import (create_prior_boxes, download_weights, feature_maps, label_map, load_checkpoint, make_label_map, mean,
                   priors_of_map, std)

coco_weights = SSD300_VGG16_Weights.COCO_V1
coco_categories = coco_weights.meta['categories']  # 91, of which some are 'N/A'
coco_names = {'aeroplane': 'airplane', 'motorbike': 'motorcycle', 'diningtable': 'dining table',
              'pottedplant': 'potted plant', 'sofa': 'couch', 'tvmonitor': 'tv'}  # where COCO's names differ from VOC's


# --------------------------------------------------------------------------------------------- torchvision's SSD300

def coco_default_boxes():
    """
    :return: the priors of torchvision's SSD300, in the order and form of ours, (8732, 4)
    """
    scales = 0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05
    steps = 8, 16, 32, 64, 100, 300  # pixels between the centers of two tiles
    return torch.cat([priors_of_map(size, step / 300, scale, (scale * next_scale) ** 0.5, ratios)
                      for (_, size, _, ratios), step, scale, next_scale
                      in zip(feature_maps.values(), steps, scales, scales[1:])])


def from_torchvision(state_dict, classes=None):
    """
    Build our SSD300 with the weights of torchvision's.

    :param state_dict: of a `torchvision.models.detection.ssd300_vgg16`
    :param classes: the indices of the classes to keep, 0 (background) first; None for all
    :return: SSD300, which predicts what torchvision's model predicts
    :raises UserError: the weights are not those of such a model
    """
    try:
        state_dict = {key: values.cpu() for key, values in state_dict.items()}
        n_all = len(state_dict['head.classification_head.module_list.5.bias']) // 4
        classes = list(range(n_all)) if classes is None else list(classes)
        model = SSD300(n_classes=len(classes))
        model.load_state_dict(rename_torchvision(state_dict, n_all, classes))
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"these are not the weights of torchvision's ssd300_vgg16: {one_line(error)}") from None
    model.priors_cxcy = coco_default_boxes()
    return model


def rename_torchvision(state_dict, n_all, classes):
    """
    :param state_dict: of torchvision's ssd300_vgg16
    :param n_all: number of its classes
    :param classes: the indices of those to keep
    :return: the state_dict of our SSD300
    """
    names = {f'backbone.features.{index}': f'base.conv{name}'
             for index, name in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21),
                                    ('1_1', '1_2', '2_1', '2_2', '3_1', '3_2', '3_3', '4_1', '4_2', '4_3'))}
    names |= {f'backbone.extra.0.{index}': f'base.conv{name}'
              for index, name in (('1', '5_1'), ('3', '5_2'), ('5', '5_3'), ('7.1', '6'), ('7.3', '7'))}
    names |= {f'backbone.extra.{block}.{index}': f'aux_convs.conv{block + 7}_{number}'
              for block in (1, 2, 3, 4) for index, number in ((0, 1), (2, 2))}
    ours = {f'{name}.{kind}': state_dict[f'{their_name}.{kind}']
            for their_name, name in names.items() for kind in ('weight', 'bias')}
    ours['rescale_factors'] = state_dict['backbone.scale_weight'].view(1, 512, 1, 1)

    # Within a tile, torchvision has the ratios 1, extra, 2, 1/2, 3, 1/3; ours are 1, extra, 2, 3, 1/2, 1/3.
    for i, (name, feature_map) in enumerate(feature_maps.items()):
        order = [0, 1, 2, 3] if len(feature_map.ratios) == 3 else [0, 1, 2, 4, 3, 5]
        for head, kept, n_outputs, our_head in (('regression', range(4), 4, 'loc'),
                                                ('classification', classes, n_all, 'cl')):
            for kind in ('weight', 'bias'):
                values = state_dict[f'head.{head}_head.module_list.{i}.{kind}']
                values = values.unflatten(0, (len(order), n_outputs))[order][:, list(kept)]  # (n_priors, n_kept, ...)
                ours[f'pred_convs.{our_head}_{name}.{kind}'] = values.flatten(0, 1)

    # Torchvision feeds 255 * (pixel - their mean), we (pixel - mean) / std. The first convolution makes up for it:
    # 255 * (pixel - theirs) = 255 * std * input + 255 * (mean - theirs).
    their_mean = torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)
    our_mean, our_std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    weight = ours['base.conv1_1.weight']  # (64, 3, 3, 3)
    ours['base.conv1_1.bias'] = ours['base.conv1_1.bias'] + (weight * 255 * (our_mean - their_mean)).sum(dim=(1, 2, 3))
    ours['base.conv1_1.weight'] = weight * 255 * our_std
    return ours


def download_coco():
    """
    :return: the state_dict of torchvision's SSD300 trained on COCO (box mAP 25.1 there, published by torchvision)
    :raises UserError: it is not on this machine and can't be downloaded
    """
    return download_weights(coco_weights, 'set checkpoint or pretrained to other weights')


def coco_detector(labels=None):
    """
    :param labels: the classes to detect, by VOC's names or COCO's; None for all 80 of COCO
    :return: SSD300 trained on COCO, and its dict of label -> index
    :raises UserError: the weights can't be had, or COCO does not know a label
    """
    if labels is None:
        labels = [name for name in coco_categories[1:] if name != 'N/A']
    unknown = [label for label in labels if coco_index(label) is None]
    if unknown:
        raise UserError(f'the weights trained on COCO do not know {unknown}: set checkpoint to weights of your own')
    return from_torchvision(download_coco(), [0, *map(coco_index, labels)]), make_label_map(labels)


def load_detector(checkpoint, labels=None):
    """
    :param checkpoint: path of a checkpoint, or None for torchvision's weights trained on COCO
    :param labels: of torchvision's, see `coco_detector`
    :return: SSD300 on the CPU, and its dict of label -> index
    """
    if checkpoint is None:
        return coco_detector(labels)
    saved = load_checkpoint(checkpoint)
    return SSD300.from_checkpoint(saved, checkpoint), saved['label_map']


def coco_index(label):
    """
    :param label: name of a class, VOC's or COCO's
    :return: its index in torchvision's model, or None
    """
    name = coco_names.get(label, label)
    return coco_categories.index(name) if name in coco_categories[1:] else None


def start_from_coco(label_map):
    """
    A detector for other classes that starts from COCO's: everything but the class scores, and of these the scores of
    the background and of those labels that COCO has.

    :param label_map: dict of label -> index of the classes to learn
    :return: SSD300; and the labels that start anew, because COCO lacks them
    """
    known = {index: coco_index(label) for label, index in label_map.items() if coco_index(label) is not None}
    coco = from_torchvision(download_coco(), [0, *known.values()])
    model = SSD300(n_classes=len(label_map))
    model.priors_cxcy = coco.priors_cxcy
    ours, rows = model.state_dict(), [0, *known]
    for key, values in coco.state_dict().items():
        if '.cl_' in key:
            anew = ours[key].unflatten(0, (-1, len(label_map)))  # (n_priors, n_classes, ...)
            anew[:, rows] = values.unflatten(0, (-1, len(rows)))
            values = anew.flatten(0, 1)
        ours[key] = values
    model.load_state_dict(ours)
    return model, [label for label, index in label_map.items() if index not in rows]


# ---------------------------------------------------------------------- Checkpoints of the earlier implementation

class StandIn:
    """Takes the place of a module or an optimizer of a pickled checkpoint: it holds its values, and does nothing."""

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class SafeUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers. Modules and optimizers become stand-ins; anything else is refused."""

    allowed = {('collections', 'OrderedDict'): OrderedDict, ('collections', 'defaultdict'): defaultdict,
               ('builtins', 'dict'): dict, ('__builtin__', 'dict'): dict, ('builtins', 'set'): set,
               ('__builtin__', 'set'): set,
               ('torch._utils', '_rebuild_tensor'): torch._utils._rebuild_tensor,
               ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
               ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
               ('torch', 'Size'): torch.Size}

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == 'torch' and name in ('FloatStorage', 'LongStorage', 'DoubleStorage', 'HalfStorage', 'IntStorage',
                                          'BoolStorage', 'ByteStorage'):
            return getattr(torch, name)
        if module == 'model' or module.startswith(('torch.nn.modules.', 'torch.optim.')):
            return type(name, (StandIn,), {'__module__': module})
        raise pickle.UnpicklingError(f'it calls {module}.{name}, which could be harmful')


class SafePickle:
    """What `torch.load` needs of a pickle module."""

    Unpickler = SafeUnpickler

    @staticmethod
    def load(file, **options):
        return SafeUnpickler(file, **options).load()


def read_earlier_checkpoint(path, device='cpu'):
    """
    Read a checkpoint of the earlier implementation: a pickled dict of the epoch, the whole model and the optimizer, in
    either format of torch.save. Nothing in it is run.

    :param path: the file
    :param device: where its tensors go
    :return: what `utils.load_checkpoint` returns, without an optimizer: training starts anew from these weights
    :raises UserError: it holds anything that could be harmful, or is no such checkpoint
    """
    try:
        with warnings.catch_warnings():
            with open(path, 'rb') as file:
                zipped = file.read(4) == b'PK\x03\x04'
            if zipped and 'constants.pkl' in torch._C.PyTorchFileReader(str(path)).get_all_records():
                # torch.load would run it, and never ask the unpickler
                raise pickle.UnpicklingError('it is a TorchScript program, which could be harmful')
            warnings.simplefilter('ignore')  # that the source code of the pickled classes differs from ours
            content = torch.load(path, map_location=device, weights_only=False, pickle_module=SafePickle)
        state_dict = dict(named_tensors(content['model']))
        priors = vars(content['model']).get('priors_cxcy', create_prior_boxes())
        if len(state_dict['pred_convs.cl_conv11_2.bias']) != 4 * len(label_map):
            raise ValueError('it does not detect the 20 classes of VOC')
    except Exception as error:  # nearly anything, on a file that is no such checkpoint
        raise UserError(f'{path} was not loaded: it is damaged or no checkpoint: {one_line(error)}. '
                        'Take one that train.py wrote') from None
    return {'epoch': content.get('epoch', 0), 'label_map': label_map, 'model': state_dict, 'priors_cxcy': priors}


def named_tensors(module, prefix=''):
    """
    :param module: a stand-in for a module
    :param prefix: its name, and a dot
    :return: pairs of a name, as in a state_dict, and its tensor, of the module and those in it
    """
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor.detach()
    for name, child in module._modules.items():
        yield from named_tensors(child, prefix + name + '.')
