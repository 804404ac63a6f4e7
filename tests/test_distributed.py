"""Several processes compute what one computes."""
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import no_gpu, root
from tiny import TinyDetector
from together import download, evaluate_together, read_log, start, train_and_evaluate, train_spoiled
from torchvision.models import VGG16_Weights

import distributed
from errors import UserError
from model import SSD300, download_weights


def finish(folder, processes):
    """Wait until all have ended; the exit code, output and errors of each."""
    for process in processes:
        process.join(timeout=120)
    return [(process.exitcode, *((folder / f'{name} {i}').read_text() for name in ('output', 'errors')))
            for i, process in enumerate(processes)]


def test_two_processes_train_like_one_with_twice_the_batch(folder, tmp_path):
    losses, rates, mAPs, weights = {}, {}, {}, {}
    for n in (1, 2):
        parameters = {'data_folder': folder, 'batch_size': 8 // n, 'lr': 1e-5, 'warm_up': 3,
                      'checkpoint_path': f'{n}.pth'}
        results = finish(tmp_path, start(tmp_path, partial(train_and_evaluate, **parameters), n=n))
        assert all(code == 0 for code, *_ in results), results
        assert [output.count('batch 5/5') for _, output, _ in results] == [1, 0][:n]  # only rank 0 prints
        *rows, measured = read_log(tmp_path / f'{n}.csv')
        losses[n], mAPs[n] = torch.tensor([float(row['loss']) for row in rows]), float(measured['mAP'])
        rates[n] = [float(row['lr']) for row in rows]
        weights[n] = torch.load(tmp_path / f'{n}.pth', weights_only=True)['model']
    assert mAPs[1] == pytest.approx(mAPs[2], rel=0.05) and mAPs[1] > 0
    assert rates[1] == rates[2] == pytest.approx([1e-5 / 3, 2e-5 / 3, 1e-5, 1e-5, 1e-5])
    assert len(losses[1]) == 5 and losses[1][-1] != losses[1][0]
    torch.testing.assert_close(losses[1][0], losses[2][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=2e-3, atol=0)  # rounding grows from step to step
    start_weights = SSD300(n_classes=4, thin=32).state_dict()
    assert weights[1].keys() == weights[2].keys() == start_weights.keys()
    for key, values in start_weights.items():  # what training changed is the same, to the rounding of 32-bit sums
        changed, different = (weights[1][key] - values).norm(), (weights[1][key] - weights[2][key]).norm()
        assert different <= 0.05 * changed + 1e-6 * values.norm(), key
        assert changed > 0 or key not in ('base.conv7.weight', 'pred_convs.cl_conv4_3.weight'), key


def test_two_processes_evaluate_like_one(folder, tmp_path):
    """Each finds the same, image for image in the same order; they exchange six large tensors, not one an image."""
    for n in (1, 2):
        results = finish(tmp_path, start(tmp_path, evaluate_together, folder, n=n))
        assert all(code == 0 for code, *_ in results), results
    expected, *others = (torch.load(tmp_path / f'found {name}.pth') for name in ('0 of 1', '0 of 2', '1 of 2'))
    assert [len(boxes) for _, _, (boxes, *_), *_ in expected] == [9, 1] and expected[0][1] > 0
    for found in others:
        for (*ours, sent), (*theirs, _), n_images in zip(found, expected, (9, 1), strict=True):
            assert sent == 6 and ours[:2] == theirs[:2]  # AP of each class, and mAP
            for values, of_one in zip(ours[2] + ours[3], theirs[2] + theirs[3], strict=True):
                assert len(values) == n_images and all(map(torch.equal, values, of_one))


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_processes_stop_together(folder, tmp_path, what):
    """Of two processes, only the second has a loss, or a gradient, that is infinite; neither takes a step with it."""
    results = finish(tmp_path, start(tmp_path, train_spoiled, folder, what, n=2))
    for code, output, errors in results:
        assert code == 1 and output == '[True]\n'  # one step was taken
        assert 'the loss or the gradient became infinite or NaN in epoch 0, batch 2 (loss ' in errors
    assert [errors.count('(loss inf)') for *_, errors in results] == [0, what == 'loss']


def test_the_first_process_of_each_machine_downloads_while_the_others_wait(tmp_path):
    """Four processes, two of them on each machine."""
    results = finish(tmp_path, start(tmp_path, download, n=4, of_machine=2))
    for (code, output, errors), downloads in zip(results, (True, False, True, False), strict=True):
        assert code == 1 and output == 'downloads\n' * downloads + "{'bias': 1}\nfails\n"
        assert errors.startswith('Error: the download or reading of weights.pth failed (the line is cut): put that')


@pytest.mark.parametrize('content', [b'', b'<html>Page not found</html>', b'PK\x03\x04 no zip'])
def test_damaged_weights_are_named(tmp_path, monkeypatch, content):
    """A file that is there already is not downloaded again."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    (tmp_path / 'hub/checkpoints/vgg16-397923af.pth').write_bytes(content)
    with pytest.raises(UserError, match='vgg16-397923af.pth.* put that file into .*, or do without$') as error:
        download_weights(VGG16_Weights.IMAGENET1K_V1, 'do without')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('gpu, nccl, backend, device', [
    (True, True, 'nccl', 'cuda:1'), (True, False, 'gloo', 'cuda:1'), (False, True, 'gloo', 'cpu')])
def test_each_process_has_a_device_and_waits_for_a_long_download(monkeypatch, gpu, nccl, backend, device):
    """NCCL is told its GPU: without, it guesses, and warns."""
    calls = []
    monkeypatch.setenv('LOCAL_RANK', '1')
    for name, value in {'is_available': gpu, 'device_count': 2, 'set_device': None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(distributed.dist, 'is_nccl_available', lambda: nccl)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda name, **given: calls.append((name, given)))
    assert distributed.init_process_group() == torch.device(device)
    [(name, options)] = calls
    assert name == backend and options['device_id'] == (torch.device(device) if backend == 'nccl' else None)
    assert options['timeout'].total_seconds() >= 528e6 / 100e3  # at 100 kB/s


def test_more_processes_than_gpus_are_named(monkeypatch):
    for name, value in {'LOCAL_RANK': '2', 'LOCAL_WORLD_SIZE': '4'}.items():
        monkeypatch.setenv(name, value)
    for name, value in {'is_available': True, 'device_count': 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(UserError, match='^4 processes, but 2 GPUs: start "torchrun --nproc_per_node=2"$'):
        distributed.init_process_group()


def test_processes_exchange_only_gradients(tmp_path, monkeypatch):
    """No priors at each step, and no copies of the gradients."""
    distributed.dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meeting', rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, 'get_world_size', lambda: 2)
        network = distributed.data_parallel(TinyDetector(4))
    finally:
        distributed.destroy_process_group()
    assert list(network.buffers()) and not network.will_sync_module_buffers() and network.gradient_as_bucket_view


def test_when_one_process_is_killed_torchrun_ends_the_other(folder, tmp_path):
    parameters = json.dumps({'data_folder': folder, 'epochs': 10 ** 6})
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    process = subprocess.Popen([*torchrun, os.path.join(root, 'tests', 'together.py'), parameters], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=no_gpu | {'PYTHONPATH': root})
    pids = {}
    for line in process.stdout:
        pids.update((int(rank), int(pid)) for rank, pid in re.findall(r'process (\d) is (\d+)', line))
        if 'epoch 0  batch 2' in line:
            os.kill(pids[1], signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and len(pids) == 2, rest
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
