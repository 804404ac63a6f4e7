"""Shared by the tests: the project's root on the path, and small data sets."""
import os
import sys

import pytest
import torch

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, root)

from demo import draw_dataset, shapes  # noqa: E402
from utils import create_data_lists  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def voc_folder(tmp_path_factory):
    """A folder in VOC layout with 3 training and 2 test pictures, and the lists in it."""
    return draw_and_list(tmp_path_factory.mktemp('voc'), 3, 2)


def draw_and_list(folder, n_train, n_test):
    """Draw the demo's pictures into a folder, and write their lists there; the folder's path."""
    draw_dataset(str(folder), n_train, n_test)
    create_data_lists(str(folder), None, str(folder), labels=shapes)
    return str(folder)


def random_boxes(*shape):
    """Fractional boundary coordinates of random boxes with sides from 0.05 to 0.5, (*shape, 4)."""
    sides = 0.05 + 0.45 * torch.rand(*shape, 2)
    corners = torch.rand(*shape, 2) * (1 - sides)
    return torch.cat([corners, corners + sides], dim=-1)
