"""Several processes compute what one computes."""
import csv
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import draw_and_list, root

from datasets import EpochSampler
from model import SSD300

no_gpu = os.environ | {'CUDA_VISIBLE_DEVICES': ''}
script = os.path.join(root, 'tests', 'together.py')


def command(n, *arguments):
    """The command that starts tests/together.py in n processes."""
    together = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] if n > 1 else []
    return [sys.executable, *together, script, *map(str, arguments)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 40 training pictures."""
    return draw_and_list(tmp_path_factory.mktemp('together'), 40, 1)


def test_two_processes_train_like_one_with_twice_the_batch(folder):
    losses, weights = {}, {}
    for n in (1, 2):
        subprocess.run(command(n, 'train', folder, 8 // n, 1), check=True, env=no_gpu)
        with open(os.path.join(folder, f'{n}.csv')) as file:
            losses[n] = torch.tensor([float(row['loss']) for row in csv.DictReader(file)])
        weights[n] = torch.load(os.path.join(folder, f'{n}.pth'), weights_only=True)['model']
    assert len(losses[1]) == 5 and losses[1][-1] != losses[1][0]
    torch.testing.assert_close(losses[1][0], losses[2][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=2e-3, atol=0)  # rounding grows from step to step
    assert weights[1].keys() == weights[2].keys()
    start = SSD300(n_classes=4).state_dict()
    for key in start:  # what training changed is the same, to the rounding of 32-bit sums
        changed, different = (weights[1][key] - start[key]).norm(), (weights[1][key] - weights[2][key]).norm()
        assert different <= 0.05 * changed + 1e-6 * start[key].norm(), key
        assert changed > 0 or key not in ('base.conv7.weight', 'pred_convs.cl_conv4_3.weight'), key


def test_two_processes_evaluate_like_one(folder):
    for n in (1, 2):
        subprocess.run(command(n, 'evaluate', folder), check=True, env=no_gpu)
    results = {(i, n): json.load(open(os.path.join(folder, f'results {i} of {n}.json')))
               for n in (1, 2) for i in range(n)}
    assert results[0, 1][1] > 0.001
    assert all(result == results[0, 1] for result in results.values())


@pytest.mark.parametrize('n', [1, 2, 3, 7])
def test_processes_share_the_batches_of_one(n):
    alone = EpochSampler(23, seed=1)
    alone.set_epoch(2)
    shares = []
    for process in range(n):
        sampler = EpochSampler(23, 1, process, n)
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == 23 // n
    together = [picture for pictures in zip(*shares) for picture in pictures]
    assert together == list(alone)[:23 // n * n]


def test_when_one_process_is_killed_the_other_ends(folder):
    process = subprocess.Popen(command(2, 'train', folder, 1, 1000), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=no_gpu)
    pids = {}
    for line in process.stdout:
        pids.update((int(number), int(pid)) for number, pid in re.findall(r'process (\d) is (\d+)', line))
        if 'epoch 0  batch 2' in line:
            os.kill(pids[1], signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert 'another process' in rest or 'exitcode  : -9' in rest, rest
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
