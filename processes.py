"""Many GPUs: several processes, each with a GPU of its own, that train or evaluate together.

    torchrun --nproc_per_node=8 train.py
    torchrun --nproc_per_node=8 eval.py

Skip this file on a first reading: with plain `python train.py` there is one process. Then `join_processes` only picks
the device, `download_weights` only downloads, and the rest does nothing.
"""
import os
from datetime import timedelta
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from files import UserError


def join_processes():
    """Join the other processes, if torchrun started this one. Returns the device of this process: a GPU of its own, or
    the CPU. Raises UserError if there are more processes than GPUs."""
    gpu = torch.cuda.is_available()
    if 'LOCAL_RANK' not in os.environ:
        return torch.device('cuda' if gpu else 'cpu')
    index = int(os.environ['LOCAL_RANK'])
    if gpu and index >= torch.cuda.device_count():
        raise UserError(f'{os.environ["LOCAL_WORLD_SIZE"]} processes, but {torch.cuda.device_count()} GPUs: start '
                        f'"torchrun --nproc_per_node={torch.cuda.device_count()}"')
    if gpu:
        torch.cuda.set_device(index)
    device = torch.device('cuda', index) if gpu else torch.device('cpu')
    # Wait for each other up to two hours, not PyTorch's 10 minutes: one may be downloading 528 MB on a slow line.
    dist.init_process_group('nccl' if gpu and dist.is_nccl_available() else 'gloo', timeout=timedelta(hours=2),
                            device_id=device if gpu and dist.is_nccl_available() else None)  # nccl warns without it
    return device


def leave_processes():
    """Shut down the process group; otherwise the end of this process looks like a crash to the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def n_processes():
    """:return: the number of processes that work together (world size)"""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number():
    """:return: the number of this process, from 0 (rank); process 0 writes the checkpoints and the log"""
    return dist.get_rank() if n_processes() > 1 else 0


def mean_over_processes(tensor):
    """:return: the mean of a tensor over all processes; each has one of the same shape"""
    if n_processes() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= n_processes()
    return tensor


def share_gradients(model):
    """:return: the network to train: with several processes, its gradients are the mean over all of them"""
    if n_processes() == 1:
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)  # averages in place, without copies
    network.broadcast_buffers = False  # the priors never change; newer versions warn if this is an argument
    return network


def gather_images(tensors):
    """Turn a list with a tensor (n, ...) for each image of this process (see `eval.make_test_loader`) into a list with
    those of all processes, in order, the same in each."""
    if n_processes() == 1:
        return tensors
    # One large tensor is much faster to exchange than many small ones. With few images, a process may have none.
    mine = torch.cat(tensors) if tensors else torch.empty(0), [len(tensor) for tensor in tensors]
    of_processes = [None] * n_processes()
    dist.all_gather_object(of_processes, mine)
    return [tensor for values, counts in of_processes for tensor in values.split(counts)]


def download_weights(weights, remedy):
    """The state_dict of weights that torchvision publishes. The first process of each machine downloads them, while the
    others wait. Raises UserError if that fails, with `remedy`: what else to do than to put the file in its place."""
    first, several = os.environ.get('LOCAL_RANK', '0') == '0', n_processes() > 1
    try:
        if several and not first:
            dist.barrier()
        return weights.get_state_dict(progress=first, check_hash=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
        raise UserError(f'the download or reading of {weights.url} failed ({error}): put that file into {folder}, or '
                        f'{remedy}') from None
    finally:
        if several and first:
            dist.barrier()
