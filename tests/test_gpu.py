"""Everything at once on a GPU; all other tests run on the CPU, because conftest.py hides the GPU from them."""
import csv
import warnings

import pytest
import torch
from conftest import draw_and_list, random_boxes
from torch.utils.data import DataLoader

import train
from checkpoints import load_checkpoint, load_detector, save_checkpoint
from datasets import PascalVOCDataset, collate_fn
from detect import find_objects
from eval import evaluate
from images import open_image
from model import SSD300
from train import fit, make_optimizer, restore
from utils import average_precision, match_detections

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 12 training images and 6 for the test."""
    return draw_and_list(tmp_path_factory.mktemp('gpu'), 12, 6)


def save_without_counting(*args, **more):
    """Save a checkpoint, for which each tensor is waited for, without counting these waits."""
    torch.cuda.set_sync_debug_mode('default')
    save_checkpoint(*args, **more)


def train_two_epochs(folder, path, device, bfloat16):
    """The second epoch goes on from the first one's checkpoint. Returns the losses, and how often its steps waited."""
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    torch.manual_seed(0)
    model, saved = SSD300(n_classes=4, thin=16).to(device), None
    for epoch in (0, 1):
        if saved is not None:
            model = load_detector(path)[0].to(device)
        optimizer = make_optimizer(model, 'sgd', 1e-4, 5e-4)
        if saved is not None:
            restore(optimizer, saved)
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try:
                fit(model, optimizer, train_set, path, epoch + 1, 2, epoch, warm_up=8, print_freq=3, bfloat16=bfloat16)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        saved = load_checkpoint(path)
    with open(path.replace('.pth', '.csv'), newline='') as file:
        losses = torch.tensor([float(row['loss']) for row in csv.DictReader(file)])
    return losses, sum('synchronizing' in str(wait.message) for wait in waits)


@pytest.mark.parametrize('bfloat16, tolerance', [(False, 1e-3), (True, 0.05)])
def test_training_evaluation_and_detection_as_on_a_cpu(folder, tmp_path, monkeypatch, bfloat16, tolerance):
    monkeypatch.setattr(train, 'save_checkpoint', save_without_counting)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, _ = train_two_epochs(folder, str(tmp_path / 'cpu.pth'), 'cpu', False)
        losses, n_waits = train_two_epochs(folder, str(tmp_path / 'gpu.pth'), 'cuda', bfloat16)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert 0 < n_waits <= 6 * 4  # a step asks whether it is finite, and matching in each of its few rounds

    found = {}
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    saved = load_checkpoint(tmp_path / 'gpu.pth')
    images = [open_image(path) for path in test_set.images]
    for device in ('cpu', 'cuda'):
        model = load_detector(tmp_path / 'gpu.pth')[0].to(device).eval()
        _, mAP = evaluate(DataLoader(test_set, 4, collate_fn=collate_fn), model)
        detections = [find_objects(image, 0.05, 0.45, 5, model, saved['label_map']) for image in images]
        found[device] = mAP, [[score for _, score, _ in of_image] for of_image in detections]
    assert found['cuda'][0] == pytest.approx(found['cpu'][0], abs=0.02)
    for on_gpu, on_cpu in zip(found['cuda'][1], found['cpu'][1]):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-3)


def test_average_precision_of_tensors_on_the_gpu():
    true_positives = torch.rand(40) < 0.5
    assert average_precision(true_positives.cuda(), 30) == average_precision(true_positives, 30) > 0
    assert average_precision(true_positives[:0].cuda(), 30) == 0


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
        assert all(map(torch.equal, match_detections(*on_gpu), expected))
