"""Many GPUs: several processes, each with a GPU of its own, that train or evaluate together.

    torchrun --nproc_per_node=8 train.py
    torchrun --nproc_per_node=8 eval.py

Skip this file on a first reading: with plain `python train.py` there is one process. Then `init_process_group` only
picks the device, and the rest does nothing.
"""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from errors import UserError


def init_process_group():
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
    backend = 'nccl' if gpu and dist.is_nccl_available() else 'gloo'
    # Wait 2 hours, not nccl's 10 minutes or gloo's 30: one process may download 528 MB. nccl warns without its device.
    dist.init_process_group(backend, timeout=timedelta(hours=2), device_id=device if backend == 'nccl' else None)
    return device


def destroy_process_group():
    """Shut down the process group; otherwise the end of this process looks like a crash to the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def get_world_size():
    """:return: the number of processes that work together"""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank():
    """:return: the number of this process, from 0; rank 0 writes the checkpoints and the log"""
    return dist.get_rank() if get_world_size() > 1 else 0


@contextmanager
def local_rank_0_first():
    """Let the first process of each machine run a `with` block before its others, for instance to download a file."""
    waits = get_world_size() > 1
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if waits and not first:
        dist.barrier()
    try:
        yield
    finally:
        if waits and first:
            dist.barrier()


def all_reduce_mean(tensor):
    """:return: the mean of a tensor over all processes; each has one of the same shape"""
    if get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def data_parallel(model):
    """:return: the network to train: with several processes, its gradients are the mean over all of them"""
    if get_world_size() == 1:
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)  # saves copying gradients
    network.broadcast_buffers = False  # the priors never change; newer versions warn if this is an argument
    return network


def all_gather_images(tensors):
    """Turn a list with a tensor (n, ...) for each image of this process (see `eval.make_test_loader`) into a list with
    those of all processes, in order, the same in each."""
    if get_world_size() == 1:
        return tensors
    of_processes = [None] * get_world_size()
    dist.all_gather_object(of_processes, [tensor.numpy() for tensor in tensors])  # much faster than tensors
    return [torch.from_numpy(values) for of_process in of_processes for values in of_process]
