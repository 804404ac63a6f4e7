"""Everything at once on a GPU; all other tests run on the CPU."""
import csv
import warnings

import pytest
import torch
from conftest import draw_and_list
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint, load_detector
from datasets import PascalVOCDataset, collate_fn
from detect import find_objects
from eval import evaluate
from files import open_image
from model import SSD300
from train import fit, make_optimizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 12 training images and 6 for the test."""
    return draw_and_list(tmp_path_factory.mktemp('gpu'), 12, 6)


def train_two_epochs(folder, path, device, bfloat16):
    """The second epoch goes on from the first one's checkpoint; the losses, and how often we waited for the GPU."""
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    torch.manual_seed(0)
    model, saved = SSD300(n_classes=4, thin=4).to(device), None
    for epoch in (0, 1):
        if saved is not None:
            model = load_detector(path)[0].to(device)
        optimizer = make_optimizer(model, 1e-4, 0.9, 5e-4)
        if saved is not None:
            optimizer.load_state_dict(saved['optimizer'])
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try:
                fit(model, optimizer, train_set, path, epoch + 1, 2, epoch, print_freq=3, bfloat16=bfloat16)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        saved = load_checkpoint(path)
    with open(path.replace('.pth', '.csv'), newline='') as file:
        losses = torch.tensor([float(row['loss']) for row in csv.DictReader(file)])
    return losses, sum('synchronizing' in str(wait.message) for wait in waits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('bfloat16, tolerance', [(False, 1e-3), (True, 0.05)])
def test_training_evaluation_and_detection_as_on_a_cpu(folder, tmp_path, bfloat16, tolerance):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, _ = train_two_epochs(folder, str(tmp_path / 'cpu.pth'), 'cpu', False)
        losses, n_waits = train_two_epochs(folder, str(tmp_path / 'gpu.pth'), 'cuda', bfloat16)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert n_waits <= 6 * 12  # a step asks whether it is finite, and matching in each of its few rounds

    found = {}
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    saved = load_checkpoint(tmp_path / 'gpu.pth')
    images = [open_image(path) for path in test_set.images]
    for device in ('cpu', 'cuda'):
        model = load_detector(tmp_path / 'gpu.pth')[0].to(device).eval()
        _, mAP = evaluate(DataLoader(test_set, 4, collate_fn=collate_fn), model)
        detections = find_objects(images, 0.05, 0.45, 5, model, saved['label_map'])
        found[device] = mAP, [[score for _, score, _ in of_image] for of_image in detections]
    assert found['cuda'][0] == pytest.approx(found['cpu'][0], abs=0.02)
    for on_gpu, on_cpu in zip(found['cuda'][1], found['cpu'][1]):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-3)
