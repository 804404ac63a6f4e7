"""Objects that would do something when a checkpoint with them is loaded."""
import os

import torch


class Malicious:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Program(torch.nn.Module):
    """A TorchScript module: torch.load runs what it does when it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return 0, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        print('harm')
        self.training = state[1]
