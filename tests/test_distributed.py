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
from conftest import draw_and_list, no_gpu, root
from tiny import TinyDetector
from torch.utils.data import DataLoader

import distributed
import train
from datasets import PascalVOCDataset, collate_fn
from errors import UserError
from eval import evaluate
from model import SSD300

script = os.path.join(root, 'tests', 'together.py')


def command(n, *arguments):
    """The command that starts tests/together.py in n processes."""
    together = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] if n > 1 else []
    return [sys.executable, *together, script, *map(str, arguments)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 40 training images, and 3 for the test."""
    return draw_and_list(tmp_path_factory.mktemp('together'), 40, 3)


def test_two_processes_train_like_one_with_twice_the_batch(folder):
    losses, rates, mean_average_precisions, weights = {}, {}, {}, {}
    for n in (1, 2):
        subprocess.run(command(n, 'train', folder, 8 // n, 1), check=True, env=no_gpu)
        with open(os.path.join(folder, f'{n}.csv')) as file:
            *rows, measured = csv.DictReader(file)
        losses[n], mean_average_precisions[n] = torch.tensor([float(row['loss']) for row in rows]), measured['mAP']
        rates[n] = [float(row['lr']) for row in rows]
        weights[n] = torch.load(os.path.join(folder, f'{n}.pth'), weights_only=True)['model']
    assert float(mean_average_precisions[1]) == pytest.approx(float(mean_average_precisions[2]), rel=0.05)
    assert float(mean_average_precisions[1]) > 0
    assert rates[1] == rates[2] == pytest.approx([1e-5 / 3, 2e-5 / 3, 1e-5, 1e-5, 1e-5])
    assert len(losses[1]) == 5 and losses[1][-1] != losses[1][0]
    torch.testing.assert_close(losses[1][0], losses[2][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=2e-3, atol=0)  # rounding grows from step to step
    assert weights[1].keys() == weights[2].keys()
    start = SSD300(n_classes=4, thin=16).state_dict()
    for key in start:  # what training changed is the same, to the rounding of 32-bit sums
        changed, different = (weights[1][key] - start[key]).norm(), (weights[1][key] - weights[2][key]).norm()
        assert different <= 0.05 * changed + 1e-6 * start[key].norm(), key
        assert changed > 0 or key not in ('base.conv7.weight', 'pred_convs.cl_conv4_3.weight'), key


def test_two_processes_evaluate_like_one(folder):
    for n in (1, 2):
        subprocess.run(command(n, 'evaluate', folder), check=True, env=no_gpu)
    results = {(i, n): json.load(open(os.path.join(folder, f'results {i} of {n}.json')))
               for n in (1, 2) for i in range(n)}
    many, one = results[0, 1]
    assert many[1] > 0.001 and many != one
    assert all(result == [many, one] for result in results.values())


@pytest.mark.parametrize('counts', [[[2, 0, 3], [1, 4], [0, 2]], [[], [], [2]], [[0], [0, 0], [0, 0]]])
def test_values_of_images_come_together_in_order(monkeypatch, counts):
    """Of three processes; each hands over one tensor, not one an image."""
    pieces = [[torch.full((count,), i + 3. * k) for k, count in enumerate(of_process)]
              for i, of_process in enumerate(counts)]
    sent = []

    def all_gather_object(values, value):
        sent.append(value)
        assert len(values) == 3
        values[:] = [(torch.cat(tensors) if tensors else torch.empty(0), count)
                     for tensors, count in zip(pieces, counts)]
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 3)
    monkeypatch.setattr(distributed.dist, 'all_gather_object', all_gather_object)
    expected = [tensor for tensors in pieces for tensor in tensors]
    for tensors in pieces:
        gathered = distributed.all_gather_images(tensors)
        assert len(gathered) == len(expected) and all(map(torch.equal, gathered, expected))
    assert all(isinstance(values, torch.Tensor) and len(values) == sum(count) for values, count in sent)


def test_an_evaluation_exchanges_few_large_tensors(folder, monkeypatch):
    sent = []

    def all_gather_object(values, value):
        sent.append(value)
        values[:] = [value, value]
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(distributed.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(distributed.dist, 'all_gather_object', all_gather_object)
    dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    dataset.split = 'TEST'
    evaluate(DataLoader(dataset, 8, collate_fn=collate_fn), TinyDetector(4))
    assert len(dataset) == 40 and len(tensors_in(sent)) == 6


def tensors_in(value):
    """All tensors in lists and tuples, however deep."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_the_first_process_downloads_while_the_others_wait(tmp_path):
    result = subprocess.run(command(2, 'download', tmp_path), capture_output=True, text=True, env=no_gpu, timeout=120)
    assert result.returncode != 0
    assert (tmp_path / 'log').read_text().startswith('0 downloads\n0 fails\n')
    assert all((tmp_path / f'weights {i}').read_text() == '{"bias": 1}' for i in range(2))
    line = 'Error: the download or reading of weights.pth failed (the line is cut): put that file into '
    assert line in result.stderr


@pytest.mark.parametrize('local_rank, order', [('0', ['download', 'wait']), ('3', ['wait', 'download'])])
def test_the_first_process_of_each_machine_downloads(monkeypatch, local_rank, order):
    """This is process 11 of 16, on two machines or more."""
    steps = []
    monkeypatch.setenv('LOCAL_RANK', local_rank)
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 16)
    monkeypatch.setattr(distributed.dist, 'get_rank', lambda: 11)
    monkeypatch.setattr(distributed.dist, 'barrier', lambda: steps.append('wait'))

    class Weights:
        url = 'weights.pth'

        def get_state_dict(self, progress, check_hash):
            steps.append('download')
            assert check_hash and progress == (local_rank == '0')
            return {'bias': 1}

    assert distributed.download_weights(Weights(), 'do without') == {'bias': 1} and steps == order


@pytest.mark.parametrize('content', [b'', b'<html>Page not found</html>', b'PK\x03\x04 no zip'])
def test_damaged_weights_are_named(tmp_path, monkeypatch, content):
    """A file that is there already is not downloaded again."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'hub/checkpoints/vgg16-397923af.pth').write_bytes(content)
    with pytest.raises(UserError, match='vgg16-397923af.pth.* put that file into') as error:
        SSD300(n_classes=2, pretrained=True)
    assert '\n' not in str(error.value)


def test_processes_wait_for_a_long_download(monkeypatch):
    options = []
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(distributed.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda *_, **given: options.append(given))
    distributed.init_process_group()
    assert options[0]['timeout'].total_seconds() >= 528e6 / 100e3  # at 100 kB/s


@pytest.mark.parametrize('gpu, nccl, backend, device_id', [
    (True, True, 'nccl', torch.device('cuda', 1)), (True, False, 'gloo', None), (False, True, 'gloo', None)])
def test_nccl_is_told_its_gpu(monkeypatch, gpu, nccl, backend, device_id):
    """Without `device_id`, it guesses the GPU, and warns."""
    calls = []
    monkeypatch.setenv('LOCAL_RANK', '1')
    for name, value in {'is_available': gpu, 'device_count': 2, 'set_device': None}.items():
        monkeypatch.setattr(distributed.torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(distributed.dist, 'is_nccl_available', lambda: nccl)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda name, **given: calls.append((name, given)))
    assert distributed.init_process_group() == torch.device('cuda:1' if gpu else 'cpu')
    [(name, options)] = calls
    assert name == backend and options['device_id'] == device_id


def test_processes_exchange_only_gradients(folder, tmp_path, monkeypatch):
    """No priors at each step, and no copies of the gradients."""
    networks, plain = [], distributed.DistributedDataParallel

    def remember(*args, **options):
        networks.append(plain(*args, **options))
        return networks[-1]
    monkeypatch.setattr(distributed, 'DistributedDataParallel', remember)
    monkeypatch.setattr(distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(distributed, 'all_reduce_mean', lambda tensor: tensor)
    distributed.dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meeting', rank=0, world_size=1)
    try:
        model = TinyDetector(4)
        train.fit(model, train.make_optimizer(model, 'sgd', 1e-3, 5e-4), PascalVOCDataset(folder, 'TRAIN', True),
                  str(tmp_path / 'c.pth'), 1, 8)
    finally:
        distributed.destroy_process_group()
    [network] = networks
    assert list(network.buffers()) and not network.will_sync_module_buffers() and network.gradient_as_bucket_view


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


@pytest.mark.parametrize('how', ['nan', 'inf'])
def test_processes_stop_together(folder, how):
    """Of two processes, the second has the image; neither changes its weights after it."""
    result = subprocess.run(command(2, 'spoiled', folder, how), capture_output=True, text=True, env=no_gpu)
    assert result.returncode != 0
    assert result.stderr.count('the loss or the gradient became infinite or NaN in epoch 0, batch 2 (loss ') == 2
    assert result.stderr.count(f'batch 2 (loss {how}). ') == 1
    for process in range(2):
        with open(os.path.join(folder, f'changes {process}.json')) as file:
            assert json.load(file) == [True]  # one step was taken
