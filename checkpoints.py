"""Checkpoints: what training saves, and how training and detection load it.

A checkpoint is a dict of plain values and tensors. It is read with `weights_only=True`, so no code in a file is run.
Checkpoints of the widely used earlier implementation of this tutorial hold pickled classes instead:
convert_checkpoint.py turns these into ours.
"""
import io
import os
import warnings

import torch

from errors import UserError, is_out_of_memory, one_line, write_whole
from model import SSD300, possible_thin, thin_out
from torchvision_weights import coco_detector, coco_index, download_coco, from_torchvision

checkpoint_version = 2  # raise it when older versions of the project could not read what is written now


def save_checkpoint(path, epoch, model, optimizer, label_map, seed, **more):
    """Write what training needs to go on exactly where it was, and what detection needs. The random numbers of an epoch
    depend on nothing but the seed and the epoch's number.

    :param path: the file to write
    :param epoch: the number of the last finished epoch, from 0
    :param model: SSD300; its state_dict holds the weights and the priors
    :param optimizer: its optimizer; None to save only the model, from whose weights training then starts at epoch 0
    :param label_map: dict of label -> index
    :param seed: the seed of the training
    :param more: numbers to keep with it, such as mAP=0.7
    :raises UserError: the file can't be written; an older file at `path` is unchanged"""
    content = {'version': checkpoint_version, 'epoch': epoch, 'label_map': label_map, 'seed': seed, 'thin': model.thin,
               'model': model.state_dict(), **more}
    if optimizer is not None:
        content |= {'optimizer': optimizer.state_dict(), 'optimizer_kind': type(optimizer).__name__}
    file = io.BytesIO()
    torch.save(content, file)
    write_whole({path: file.getbuffer()})


def load_checkpoint(path):
    """Read a checkpoint to the CPU.

    :return: dict of version, epoch, label_map, seed, thin, model (its state_dict, priors included), and what
        `save_checkpoint` was given in `more`; also of optimizer and optimizer_kind, unless only the model was saved
    :raises UserError: the file is missing, damaged, or not a checkpoint of train.py"""
    if not os.path.isfile(path):
        raise UserError(f'no checkpoint at {path}: train one with "python train.py", or set the right path')
    content = read_saved(path)
    content = content if isinstance(content, dict) else {}
    version = content.get('version', 1)
    if isinstance(version, int) and version > checkpoint_version:
        raise UserError(f'{path} has version {version}, and is from a newer version of this project, which writes '
                        f'version {checkpoint_version}: update the project')
    kinds = {'epoch': int, 'label_map': dict, 'model': dict, 'seed': (int, float, str)}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise UserError(f'{path} is no checkpoint of ours: it lacks {wrong}; see "Other people\'s weights" in GUIDE.md')
    weights, indices = content['model'], list(content['label_map'].values())
    if 'priors_cxcy' in content:  # version 1 has the priors beside the model
        weights['priors_cxcy'] = content.pop('priors_cxcy')
    plain = all(isinstance(key, str) and isinstance(values, torch.Tensor) for key, values in weights.items())
    if 'thin' not in content and plain and 'base.conv1_1.bias' in weights:  # it was not saved before
        content['thin'] = 64 // max(1, weights['base.conv1_1.bias'].numel())  # the whole network has 64 channels there
    if (not plain or 'priors_cxcy' not in weights or not indices or indices != list(range(len(indices)))
            or content.get('thin') not in possible_thin or not isinstance(content.get('optimizer', {}), dict)):
        raise UserError(f'{path} is damaged: take another checkpoint')
    return content


def restore(optimizer, saved):
    """Restore the optimizer's state, such as the momentum, from what `load_checkpoint` returns; raises UserError if it
    is of another kind. The learning rates stay: they follow from train.py's parameters, which may have changed."""
    kind, saved_kind = type(optimizer).__name__, saved.get('optimizer_kind', 'SGD')
    if kind != saved_kind:
        raise UserError(f'the checkpoint was trained with {saved_kind}, whose state does not fit {kind}: set '
                        f"optimizer_kind = '{saved_kind.lower()}' in train.py, or start anew")
    optimizer.load_state_dict({'state': saved['optimizer']['state'],
                               'param_groups': optimizer.state_dict()['param_groups']})


def read_saved(path):
    """Read plain values and tensors that torch.save wrote, to the CPU. Anything else raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of files that are then refused
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # nearly anything, if the file is damaged
        if is_out_of_memory(error):
            raise
        with open(path, 'rb') as file:
            if b'cmodel\nSSD300\n' in file.read(2 ** 20):  # as pickle names the class SSD300 of model.py
                raise UserError(f'{path} is a checkpoint of the earlier implementation: convert it with '
                                f'"python convert_checkpoint.py {path} NEW"') from error
        # PyTorch's own message goes on with advice to run the code in the file.
        raise UserError(f'{path} is damaged, or holds more than plain values and tensors, which could be harmful '
                        f'({type(error).__name__}): take a checkpoint that train.py wrote') from error


def load_detector(checkpoint, labels=None):
    """The model of a checkpoint, as thin as it was saved, with the priors that it was trained with, on the CPU; and its
    dict of label -> index.

    :param checkpoint: path of a checkpoint, or None for torchvision's SSD300, trained on COCO
    :param labels: only for torchvision's SSD300: the classes to detect, see `coco_detector`
    :raises UserError: see `load_checkpoint` and `coco_detector`; or the weights do not fit SSD300 with the checkpoint's
        classes and this project's `feature_maps`"""
    if checkpoint is None:
        return coco_detector(labels)
    saved = load_checkpoint(checkpoint)
    model = SSD300(n_classes=len(saved['label_map']), thin=saved['thin'])
    try:
        model.load_state_dict(saved['model'])
    except RuntimeError as error:
        raise UserError(f'{checkpoint} does not fit SSD300 with its classes {list(saved["label_map"])} and the '
                        f'feature_maps of utils.py: {one_line(error)}') from error
    return model, saved['label_map']


def start_from(pretrained, label_map, thin):
    """SSD300 for the classes of a dict of label -> index, on the CPU, with the weights and priors of another detector:
    'coco' for torchvision's, or the path of a checkpoint. Class scores are kept by name, and random for new classes.

    :param thin: keep every thin-th channel, see `model.thin_out`; a checkpoint must have been as thin
    :return: the model, and a list of the new labels
    :raises UserError: see `load_detector`; or the checkpoint is not as thin"""
    if pretrained == 'coco':
        trained = from_torchvision(download_coco())
        thin_out(trained, thin)
        old_index = {'background': 0} | {label: coco_index(label) for label in label_map if coco_index(label)}
    else:
        trained, old_index = load_detector(pretrained)
        if trained.thin != thin:
            raise UserError(f'{pretrained} has thin = {trained.thin}, but train.py has thin = {thin}: set thin = '
                            f'{trained.thin} there')
    model = SSD300(n_classes=len(label_map), thin=thin)
    weights = model.state_dict()  # not copies, but the model's own tensors
    for key, values in trained.state_dict().items():
        if '.cl_' in key:
            old = values.unflatten(0, (-1, trained.n_classes))  # (n_priors, n_old_classes, ...)
            new = weights[key].unflatten(0, (-1, len(label_map)))  # (n_priors, n_classes, ...)
            new *= 0.1  # random scores start near 0, as in `standardize`, not far above the trained ones
            for label in label_map.keys() & old_index.keys():
                new[:, label_map[label]] = old[:, old_index[label]]
        else:
            weights[key].copy_(values)
    return model, [label for label in label_map if label not in old_index]
