"""
Many GPUs: several processes, each with a GPU of its own, that train or evaluate together.

    torchrun --nproc_per_node=8 train.py
    torchrun --nproc_per_node=8 eval.py

Skip this file on a first reading: with plain `python train.py` there is one process, and nothing here does anything.
"""
import os

import torch
import torch.distributed as dist

from files import UserError


def join_processes():
    """
    Join the other processes that torchrun started, if it started this one.

    :return: the device of this process: a GPU of its own, or the CPU
    :raises UserError: there are more processes than GPUs
    """
    gpu = torch.cuda.is_available()
    if 'LOCAL_RANK' not in os.environ:
        return torch.device('cuda' if gpu else 'cpu')
    index = int(os.environ['LOCAL_RANK'])
    if gpu and index >= torch.cuda.device_count():
        raise UserError(f'{os.environ["LOCAL_WORLD_SIZE"]} processes, but {torch.cuda.device_count()} GPUs: start '
                        f'"torchrun --nproc_per_node={torch.cuda.device_count()}"')
    if gpu:
        torch.cuda.set_device(index)
    dist.init_process_group('nccl' if gpu and dist.is_nccl_available() else 'gloo')
    return torch.device('cuda', index) if gpu else torch.device('cpu')


def leave_processes():
    """Say goodbye to the other processes: whoever just ends looks to them as if it had crashed."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def n_processes():
    """:return: how many processes work together"""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number():
    """:return: this process's number, from 0; process 0 writes the checkpoints and the log"""
    return dist.get_rank() if n_processes() > 1 else 0


def mean_over_processes(tensor):
    """
    :param tensor: a tensor of the same shape in each process
    :return: the mean of these tensors
    """
    if n_processes() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= n_processes()
    return tensor


def gather_pictures(lists):
    """
    :param lists: lists with an item for each picture that this process had; of n processes, process i had the pictures
        i, i + n, i + 2n, ...
    :return: lists with the items of all pictures, in order, the same in each process
    """
    n = n_processes()
    if n == 1:
        return lists
    parts = [None] * n
    dist.all_gather_object(parts, lists)
    n_pictures = sum(len(part[0]) for part in parts)
    return [[parts[i % n][k][i // n] for i in range(n_pictures)] for k in range(len(lists))]
