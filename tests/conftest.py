"""Shared by the tests: the project's root on the path, and small data sets."""
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # threads wait for each other, long on a processor that has other work
import torch

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [root, os.path.join(root, 'tests', 'long')]
no_gpu = os.environ | {'CUDA_VISIBLE_DEVICES': ''}
kept_checkpoint = os.path.join(root, 'tests', 'checkpoint_version_1.pth')  # see test_checkpoints.py

from create_data_lists import create_data_lists  # noqa: E402
from demo import draw_dataset, shapes  # noqa: E402


def pytest_xdist_auto_num_workers(config):
    """Two processes share all tests; a file that is asked for starts sooner in the first one."""
    return 0 if config.option.file_or_dir else 2


@pytest.fixture(scope='module', autouse=True)
def no_gpu_is_seen(request):
    """Tests see no GPU, also on a machine that has one, nor do processes that they start; those of test_gpu.py do."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.module.__name__ != 'test_gpu':
            monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
            monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        yield


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    """The same random numbers in every run; and no sheet of mistakes among the project's files."""
    torch.manual_seed(0)
    monkeypatch.setattr('eval.mistakes_path', str(tmp_path / 'mistakes.png'))


@pytest.fixture(scope='session')
def run_forked():
    """A function that runs a command that begins with "python", quickly: see forked.py."""
    forked = [sys.executable, os.path.join(root, 'tests', 'forked.py')]
    with subprocess.Popen(forked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def run(folder, command):
            """:return: the exit code, and what was printed"""
            python, *arguments = shlex.split(command)
            assert python == 'python'
            print(json.dumps([str(folder), arguments, dict(os.environ)]), file=process.stdin, flush=True)
            return int(process.stdout.readline()), (folder / 'output.txt').read_text()
        yield run


@pytest.fixture(scope='session')
def voc_folder(tmp_path_factory):
    """A folder in VOC layout with 3 training and 2 test images, and the lists in it."""
    return draw_and_list(tmp_path_factory.mktemp('voc'), 3, 2)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Lists of 40 training images and 3 for the test."""
    return draw_and_list(tmp_path_factory.mktemp('folder'), 40, 3)


def copy_lists(folder, tmp_path):
    """Copy the lists, not the images."""
    for name in os.listdir(folder):
        if name.endswith('.json'):
            shutil.copy(os.path.join(folder, name), tmp_path)


def draw_and_list(folder, n_train, n_test):
    """Draw the demo's images into a folder, and write their lists there; the folder's path."""
    draw_dataset(str(folder), n_train, n_test)
    create_data_lists(str(folder), None, str(folder), labels=shapes)
    return str(folder)


def random_boxes(*shape):
    """Fractional boundary coordinates of random boxes with sides from 0.05 to 0.5, (*shape, 4)."""
    sides = 0.05 + 0.45 * torch.rand(*shape, 2)
    corners = torch.rand(*shape, 2) * (1 - sides)
    return torch.cat([corners, corners + sides], dim=-1)
