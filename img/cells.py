"""
Real pictures: what the detector of "A first training on a laptop" in the README gets wrong. Follow that section first;
its folder `cells` is not in the repository.
"""
import os
import sys
import tempfile

from PIL import Image

from checkpoints import load_detector
from datasets import PascalVOCDataset
from eval import evaluate, make_test_loader
from style import figure

folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'cells')


@figure('mistakes.png')
def mistakes():
    checkpoint = os.path.join(folder, 'checkpoint_ssd300.pth')
    if not os.path.exists(checkpoint):
        sys.exit(f'Error: {checkpoint} is missing: train it as "A first training on a laptop" says')
    model, _ = load_detector(checkpoint)
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    test_loader = make_test_loader(test_set, 8, 0, model.priors_cxcy.device)
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, 'mistakes.png')
        evaluate(test_loader, model, mistakes_path=path)
        return Image.open(path).copy()
