"""
Checkpoints: how training saves what it has learned, and how a detector is loaded again. And weights from elsewhere:
torchvision's SSD300, trained on COCO, and checkpoints of the widely used earlier implementation of this tutorial. On a
first reading, `save_checkpoint`, `load_checkpoint` and `load_detector` are enough.
"""
import os
import pickle
import re
import warnings
from collections import OrderedDict

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from files import UserError, one_line, write_whole
from model import SSD300, thin_out
from processes import download_weights
from utils import feature_maps, label_map, make_label_map, mean, priors_of_map, std


# -------------------------------------------------------------------------------------------------------------- Our own

checkpoint_version = 1  # of the files that we write; to be raised when the project as it is now could not read them


def save_checkpoint(path, epoch, model, optimizer, label_map, seed, **more):
    """
    Write all that training needs to go on exactly where it was, and all that detection needs. The random numbers of an
    epoch depend on nothing but the seed and the epoch's number.

    :param path: the file to write
    :param epoch: the epoch that was finished last
    :param model: SSD300
    :param optimizer: its optimizer
    :param label_map: dict of label -> index
    :param seed: the seed of the training
    :param more: numbers to keep with it, such as the mAP
    """
    content = {'version': checkpoint_version, 'epoch': epoch, 'label_map': label_map, 'seed': seed,
               'model': model.state_dict(), 'priors_cxcy': model.priors_cxcy, 'optimizer': optimizer.state_dict(),
               'optimizer_kind': type(optimizer).__name__, **more}
    with write_whole(path) as [file]:
        torch.save(content, file)


def load_checkpoint(path):
    """
    Read a checkpoint, ours or one of the earlier implementation, to the CPU. Nothing in the file is run: one that holds
    other code is refused.

    :param path: the file
    :return: dict of version, epoch, label_map, seed, model, priors_cxcy, optimizer, see `save_checkpoint`; of the
        earlier implementation's only epoch, label_map, model, priors_cxcy
    :raises UserError: the file is missing, or is no such checkpoint
    """
    if not os.path.isfile(path):
        raise UserError(f'no checkpoint at {path}: train one with "python train.py", or set the right path')
    content = read_saved(path)
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


def load_detector(checkpoint, labels=None):
    """
    The model of any checkpoint, as thin as it was saved.

    :param checkpoint: path of a checkpoint, or None for torchvision's weights trained on COCO
    :param labels: of torchvision's, see `coco_detector`
    :return: SSD300 on the CPU, and its dict of label -> index
    :raises UserError: see `load_checkpoint` and `coco_detector`; or the weights do not fit SSD300 with the checkpoint's
        classes, or with `feature_maps`
    """
    if checkpoint is None:
        return coco_detector(labels)
    saved = load_checkpoint(checkpoint)
    try:
        thin = 64 // len(saved['model']['base.conv1_1.bias'])  # the whole network has 64 channels there
        model = SSD300(n_classes=len(saved['label_map']), thin=thin)
        model.load_state_dict(saved['model'])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f'{checkpoint} does not fit SSD300 with its classes {list(saved["label_map"])}: '
                        f'{one_line(error)}') from None
    if len(saved['priors_cxcy']) != len(model.priors_cxcy):
        raise UserError(f'{checkpoint} has {len(saved["priors_cxcy"])} priors, but feature_maps in utils.py make '
                        f'{len(model.priors_cxcy)}')
    model.priors_cxcy = saved['priors_cxcy'].to(model.priors_cxcy)
    return model, saved['label_map']


# ------------------------------------------------------------------------------------------------- torchvision's SSD300

coco_weights = SSD300_VGG16_Weights.COCO_V1
coco_categories = coco_weights.meta['categories']  # 91, of which some are 'N/A'
coco_names = {'aeroplane': 'airplane', 'motorbike': 'motorcycle', 'diningtable': 'dining table',
              'pottedplant': 'potted plant', 'sofa': 'couch', 'tvmonitor': 'tv'}  # where COCO's names differ from VOC's


def coco_default_boxes():
    """
    :return: the priors of torchvision's SSD300, in the order and form of ours, (8732, 4)
    """
    scales = 0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05
    steps = 8, 16, 32, 64, 100, 300  # pixels between the centers of two tiles
    return torch.cat([priors_of_map(size, step / 300, scale, (scale * next_scale) ** 0.5, ratios)
                      for (_, size, _, ratios), step, scale, next_scale
                      in zip(feature_maps.values(), steps, scales, scales[1:])])


def from_torchvision(state_dict, classes=None, thin=1):
    """
    Build our SSD300 with the weights of torchvision's.

    :param state_dict: of a `torchvision.models.detection.ssd300_vgg16`
    :param classes: the indices of the classes to keep, 0 (background) first; None for all
    :param thin: keep only every thin-th channel, to train on from there: see `model.thin_out`
    :return: SSD300, which predicts what torchvision's model predicts, if thin is 1
    :raises UserError: the weights are not those of such a model
    """
    try:
        state_dict = {key: values.cpu() for key, values in state_dict.items()}
        n_all = len(state_dict['head.classification_head.module_list.5.bias']) // 4
        classes = list(range(n_all)) if classes is None else list(classes)
        model = SSD300(n_classes=len(classes))
        model.load_state_dict(rename_torchvision(state_dict, n_all, classes))
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError("these are not the weights of torchvision's ssd300_vgg16, or feature_maps in utils.py were "
                        f'changed: {one_line(error)}') from None
    model.priors_cxcy = coco_default_boxes()
    thin_out(model, thin)
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


def coco_index(label):
    """
    :param label: name of a class, VOC's or COCO's
    :return: its index in torchvision's model, or None
    """
    name = coco_names.get(label, label)
    return coco_categories.index(name) if name in coco_categories[1:] else None


def start_from_coco(label_map, thin=1):
    """
    A detector for other classes that starts from COCO's: everything but the class scores, and of these the scores of
    the background and of those labels that COCO has.

    :param label_map: dict of label -> index of the classes to learn
    :param thin: see `from_torchvision`
    :return: SSD300; and the labels that start anew, because COCO lacks them
    """
    known = {index: coco_index(label) for label, index in label_map.items() if coco_index(label) is not None}
    coco = from_torchvision(download_coco(), [0, *known.values()], thin)
    model = SSD300(n_classes=len(label_map), thin=thin)
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


# ---------------------------------------------------------------------------- Checkpoints of the earlier implementation

# They hold a whole pickled model and optimizer. To read them, and run nothing, each class that they name is replaced by
# one that only holds values. PyTorch can do that itself (`safe_globals`), but not in its format before version 1.6,
# which has the source of each class beside it: there an unpickler of ours does the same.

class StandIn:
    """Takes the place of whatever a pickled model or optimizer names: it holds its values, and does nothing."""

    dump_patches = False  # torch.load asks the class of a module

    def __setstate__(self, state):
        self.__dict__.update(state)


def make_dict(*_):
    """Takes the place of a defaultdict, because `torch.load` with weights_only=True fills only plain ones."""
    return {}


# What PyTorch began its files with before version 1.6
old_format = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)

# All that a checkpoint may name besides tensors and their parts, and what takes its place
harmless = {
    'builtins.dict': dict, 'builtins.set': set, 'collections.OrderedDict': OrderedDict,
    'collections.defaultdict': make_dict,
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    **dict.fromkeys(('model.SSD300', 'model.VGGBase', 'model.AuxiliaryConvolutions', 'model.PredictionConvolutions',
                     'torch.nn.modules.conv.Conv2d', 'torch.nn.modules.pooling.MaxPool2d', 'torch.optim.sgd.SGD',
                     'torch.optim.adam.Adam', 'torch.nn.backends.thnn._get_thnn_function_backend'), StandIn)}


class SafeUnpickler(pickle._Unpickler):  # the one in C takes gigabytes if a wrong bit makes an index large
    """Unpickles what is harmless, and refuses all else."""

    def find_class(self, module, name):
        """:return: what a name in the file stands for"""
        path = f'{module}.{name}'.replace('__builtin__', 'builtins')  # Python 2's name
        if path not in harmless:
            raise pickle.UnpicklingError(f'GLOBAL {path} is refused')  # as torch.load says it, see `reason`
        return harmless[path]


class SafePickle:
    """What `torch.load` needs of a pickle module."""

    Unpickler = SafeUnpickler

    @staticmethod
    def load(file, **options):
        """:return: what an open file holds"""
        return SafeUnpickler(file, **options).load()


def read_saved(path):
    """
    Read a file that torch.save wrote. Nothing in it is run: a model and its optimizer become stand-ins.

    :param path: the file
    :return: what was saved
    :raises UserError: the file can't be read, or holds anything that could be harmful
    """
    try:
        with open(path, 'rb') as file:
            is_old = file.read(len(old_format)) == old_format
        # With weights_only=True, `torch.load` reads no module of the old format, not even one whose class is safe,
        # because the source of the class stands beside it.
        options = {'weights_only': False, 'pickle_module': SafePickle} if is_old else {'weights_only': True}
        with warnings.catch_warnings(), torch.serialization.safe_globals([(it, name) for name, it in harmless.items()]):
            warnings.simplefilter('ignore')  # that the source differs from the stand-in's
            return torch.load(path, map_location='cpu', **options)
    except Exception as error:  # nearly anything, on a file that is damaged
        raise UserError(f'{path} is damaged or no checkpoint: {reason(error)}; take one that train.py wrote') from None


def reason(error):
    """
    :param error: what `torch.load` raised
    :return: the reason in short, without its advice to run what is in the file
    """
    message = str(error).rpartition('WeightsUnpickler error:')[2].strip()
    called = re.search(r'GLOBAL (\S+)', message)
    if called:
        return f'it calls {called[1]}, which could be harmful'
    first_sentence = re.split(r'\.\s|\n', message)[0].replace('Cannot use ``weights_only=True`` with', 'it is one of')
    return one_line(f'{first_sentence} ({type(error).__name__})')


def from_earlier(content, path):
    """
    :param content: a checkpoint of the earlier implementation: a dict of the epoch, the whole model and the optimizer
    :param path: its file, for the error
    :return: what `load_checkpoint` returns, without an optimizer: training starts anew from these weights
    :raises UserError: the model is another, or for other classes
    """
    try:
        state_dict = dict(named_tensors(content['model']))
        n_classes = len(state_dict['pred_convs.cl_conv11_2.bias']) // 4
        priors = content['model'].priors_cxcy.view(-1, 4)
    except Exception as error:  # nearly anything may stand in the place of a tensor
        raise UserError(f'{path} holds a model that is not the SSD300 of the earlier implementation: {reason(error)}; '
                        'take a checkpoint that train.py wrote') from None
    if n_classes != len(label_map):
        raise UserError(f'{path} is a checkpoint of the earlier implementation for {n_classes - 1} classes, and does '
                        f'not say which: of these, only those for the {len(label_map) - 1} of VOC can be used')
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
