"""Turn a checkpoint of the widely used earlier implementation of this tutorial into one of ours:

    python convert_checkpoint.py checkpoint_ssd300.pth.tar converted.pth

It must be for VOC's 20 classes, because it does not say which classes it is for. The new checkpoint has the weights and
the priors: eval.py and detect.py use it as it is, and train.py starts at epoch 0 from its weights.

The old file holds a whole model and its optimizer, pickled. A pickle can call any function, so only a few harmless ones
are allowed here, and the classes of models and optimizers are replaced by one that only holds values. No code in the
file is run. PyTorch's own `weights_only=True` does not read such files in the format before PyTorch 1.6.
"""
import io
import os
import pickle
import sys
import warnings

import torch
from torch import nn

from checkpoints import save_checkpoint
from errors import UserError, one_line, run
from model import SSD300
from utils import label_map

allowed = {'builtins.dict', 'builtins.set', 'collections.OrderedDict', 'collections.defaultdict',
           'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor_v2'}


class StandIn(nn.Module):
    """Takes the place of a pickled object of another class: it only holds the values. (It has the `__setstate__` of a
    module; without one, a pickle could change the class.)"""


class SafeUnpickler(pickle._Unpickler):  # in Python: with a damaged index, the one in C takes gigabytes
    """Unpickles tensors and plain values, replaces modules and optimizers with `StandIn`, and refuses all else."""

    def find_class(self, module, name):
        """:return: what a name in the file stands for"""
        path = f'{module}.{name}'.replace('__builtin__', 'builtins')  # Python 2's name
        if path in allowed:
            return super().find_class(module, name).__call__  # unlike a function's, its attributes can't be set
        if module.startswith(('model', 'torch.nn.', 'torch.optim.')):
            return StandIn
        raise pickle.UnpicklingError(f'it calls {path}, which could be harmful')


class SafePickle:
    """What `torch.load` needs of a pickle module."""

    Unpickler = SafeUnpickler
    load = staticmethod(lambda file, **options: SafeUnpickler(file, **options).load())


def convert(old_path, new_path):
    """Convert a checkpoint of the earlier implementation. Returns the number of the last finished epoch. Raises
    OSError if the old file can't be read, and UserError if it is damaged or for other classes, or the new one exists or
    can't be written."""
    if os.path.exists(new_path):
        raise UserError(f'{new_path} exists: name another file')
    with open(old_path, 'rb') as file:
        content = file.read()
    refusal = f'{old_path} is no checkpoint of the earlier implementation, or is damaged: '
    try:
        # `torch.load` would run a TorchScript program: a zip archive with a file of this name
        if b'constants.pkl' in content:
            raise pickle.UnpicklingError('it is a TorchScript program')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that the source code of the old classes has changed
            saved = torch.load(io.BytesIO(content), map_location='cpu', weights_only=False, pickle_module=SafePickle)
        state_dict = saved['model'].state_dict()
        state_dict['priors_cxcy'] = saved['model'].priors_cxcy.view(-1, 4)
        n_classes, epoch = len(state_dict['pred_convs.cl_conv11_2.bias']) // 4, int(saved['epoch'])
    except MemoryError:
        raise
    except Exception as error:  # nearly anything, if the file is damaged
        raise UserError(f'{refusal}{one_line(error)} ({type(error).__name__})') from error
    if n_classes != len(label_map):
        raise UserError(f'{old_path} is a checkpoint of the earlier implementation for {n_classes - 1} classes, and '
                        f'does not say which: of these, only those for the {len(label_map) - 1} of VOC can be used')
    model = SSD300(n_classes)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise UserError(refusal + one_line(error)) from error
    save_checkpoint(new_path, epoch, model, None, label_map, seed=0)
    return epoch


def main():
    """Convert the checkpoint that the command names."""
    if len(sys.argv) != 3:
        raise UserError('usage: python convert_checkpoint.py OLD NEW')
    epoch = convert(*sys.argv[1:])
    print(f'{sys.argv[2]} has the weights of epoch {epoch}. Set checkpoint to it in eval.py, detect.py or train.py.')


if __name__ == '__main__':
    run(main, takes_arguments=True)
