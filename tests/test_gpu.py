"""Everything at once on a GPU; all other tests run on the CPU, because conftest.py hides the GPU from them."""
import warnings
from unittest.mock import patch

import pytest
import torch
from conftest import draw_and_list, random_boxes
from together import train_main

import distributed
import train
from checkpoints import load_detector
from datasets import PascalVOCDataset
from detect import find_objects
from eval import evaluate, make_test_loader
from images import open_image
from model import SSD300
from utils import average_precision, match_detections

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def train_two_epochs(folder, path, device, **parameters):
    """The second epoch goes on from the first one's checkpoint. Returns the losses, and how often its steps waited."""
    plain = train.train

    def train_warning(*args, **options):
        torch.cuda.set_sync_debug_mode('warn')
        plain(*args, **options)
        torch.cuda.set_sync_debug_mode('default')
    for epochs, checkpoint in (1, None), (2, path):
        with patch.object(distributed, 'init_process_group', lambda: torch.device(device)), \
                patch.object(train, 'train', train_warning), warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter('always')
            _, log = train_main(SSD300, data_folder=folder, checkpoint_path=path, checkpoint=checkpoint, thin=16,
                                epochs=epochs, lr=1e-4, warm_up=8, print_freq=3, workers=1, **parameters)
    losses = torch.tensor([float(row['loss']) for row in log])
    return losses, sum('synchronizing' in str(wait.message) for wait in waits)


@pytest.mark.parametrize('bfloat16, tolerance', [(False, 1e-3), (True, 0.05)])
def test_training_evaluation_and_detection_as_on_a_cpu(tmp_path, monkeypatch, bfloat16, tolerance):
    folder, path = draw_and_list(tmp_path, 12, 6), str(tmp_path / 'gpu.pth')
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    expected, _ = train_two_epochs(folder, str(tmp_path / 'cpu.pth'), 'cpu')
    losses, n_waits = train_two_epochs(folder, path, 'cuda', bfloat16=bfloat16)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert 0 < n_waits <= 6 + 2  # each of six steps asks whether it is finite, and two print losses

    mAPs, scores = {}, {}
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    for device in 'cpu', 'cuda':
        model, label_map = load_detector(path)
        model.to(device).eval()
        mAPs[device] = evaluate(make_test_loader(test_set, 4, 1, torch.device(device)), model).mAP
        scores[device] = [score for name in test_set.images for _, score, _ in
                          find_objects(open_image(name), 0.05, 0.45, 5, model, label_map)]
    assert mAPs['cuda'] == pytest.approx(mAPs['cpu'], abs=0.02)
    assert scores['cuda'] == pytest.approx(scores['cpu'], abs=1e-3)


@pytest.mark.parametrize('n, n_objects', [(300, 12), (0, 12), (300, 0)])
def test_matching_of_detections_on_the_gpu(n, n_objects):
    true_boxes = random_boxes(n_objects)
    det_boxes = true_boxes[torch.arange(n) % n_objects] + 0.02 * torch.randn(n, 4) if n_objects else random_boxes(n)
    values = (det_boxes, torch.randint(1, 3, (n,)), torch.rand(n), true_boxes, torch.randint(1, 3, (n_objects,)),
              (torch.rand(n_objects) < 0.3).byte())
    expected = match_detections(*values)
    assert n == 0 or n_objects == 0 or all(0 < kind.sum() < n for kind in expected[:2])
    for device_of_objects in ('cuda', 'cpu'):
        on_gpu = [value.cuda() for value in values[:3]] + [value.to(device_of_objects) for value in values[3:]]
        found = match_detections(*on_gpu)
        assert all(map(torch.equal, found, expected))
    assert average_precision(found[0].cuda(), 30) == average_precision(expected[0], 30)
