"""
What tests/test_distributed.py starts, alone or in several processes under torchrun:

    python tests/together.py train FOLDER BATCH_SIZE EPOCHS
    python tests/together.py evaluate FOLDER
    python tests/together.py spoiled FOLDER nan
    python tests/together.py download FOLDER
"""
import json
import os
import sys
import time
from functools import partial

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tiny import SpoiledImages, TinyDetector  # noqa: E402

import train  # noqa: E402
from datasets import EpochSampler, PascalVOCDataset  # noqa: E402
from distributed import destroy_process_group, get_rank, get_world_size, init_process_group  # noqa: E402
from errors import run  # noqa: E402
from eval import evaluate, make_test_loader  # noqa: E402
from model import SSD300, MultiBoxLoss, download_weights  # noqa: E402
from train import fit, make_optimizer  # noqa: E402


class RandomDetector(nn.Module):
    """Detects at random, but always the same in the same image."""

    def __init__(self):
        super().__init__()
        self.register_buffer('priors_cxcy', torch.zeros(1, 4))

    def forward(self, images):
        return images, images

    def detect_objects(self, images, _, min_score, max_overlap, top_k):
        detections = []
        for image in images:
            rng = torch.Generator().manual_seed(int(image.double().sum().abs() * 1000))
            corners, sides = torch.rand(2000, 2, generator=rng), 0.1 + 0.15 * torch.rand(2000, 2, generator=rng)
            boxes = torch.cat([corners, corners + sides], dim=1)
            detections.append((boxes, torch.randint(1, 4, (2000,), generator=rng), torch.rand(2000, generator=rng)))
        return tuple(map(list, zip(*detections)))


def train_spoiled(folder, how):
    """Train on images of which one, in the second batch of the last process, makes the loss NaN; or make it infinite,
    but not its gradient. Write which steps changed the weights."""
    dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    spoiled = [index for index, _ in EpochSampler(len(dataset), 0, get_world_size() - 1, get_world_size())][5]
    model = TinyDetector(n_classes=4)
    optimizer, weights = make_optimizer(model, 'sgd', 1e-3, 5e-4), [model.head.weight.detach().clone()]
    optimizer.register_step_post_hook(lambda *_: weights.append(model.head.weight.detach().clone()))
    if how == 'nan':
        dataset = SpoiledImages(dataset, spoiled, float('nan'))
    elif get_rank() == get_world_size() - 1:
        plain, infinities = MultiBoxLoss.losses, iter([0., float('inf')])

        def losses(*args):
            loc_loss, conf_loss = plain(*args)
            return loc_loss + next(infinities), conf_loss
        MultiBoxLoss.losses = losses
    try:
        fit(model, optimizer, dataset, os.path.join(folder, 's.pth'), 1, 4)
    finally:
        with open(os.path.join(folder, f'changes {get_rank()}.json'), 'w') as file:
            json.dump([not torch.equal(a, b) for a, b in zip(weights, weights[1:])], file)


class SlowWeights:
    """
    In place of torchvision's: a file is "downloaded" in a second, and a line is left whenever somebody begins to.

    :param folder: of the file
    :param broken: whether the download fails
    """

    url = 'weights.pth'

    def __init__(self, folder, broken):
        self.path, self.log, self.broken = os.path.join(folder, 'weights'), os.path.join(folder, 'log'), broken

    def get_state_dict(self, **_):
        if self.broken or not os.path.exists(self.path):
            with open(self.log, 'a') as log:
                log.write(f'{get_rank()} {"fails" if self.broken else "downloads"}\n')
            time.sleep(1)
            if self.broken:
                raise OSError('the line is cut')
            with open(self.path, 'w') as file:
                file.write('{"bias": 1}')
        with open(self.path) as file:
            return json.load(file)


def download(folder):
    """Get weights that can be had, write them, and then weights that can't."""
    with open(os.path.join(folder, f'weights {get_rank()}'), 'w') as file:
        json.dump(download_weights(SlowWeights(folder, broken=False), 'do without'), file)
    download_weights(SlowWeights(folder, broken=True), 'do without')


def evaluate_first(folder, n_images):
    """:return: what `evaluate` returns for the first images of the training set"""
    test_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    test_set.split = 'TEST'
    del test_set.images[n_images:], test_set.objects[n_images:]
    test_set.objects[1:2] = [{'boxes': [], 'labels': [], 'difficulties': []}]
    return evaluate(make_test_loader(test_set, 4, 0, torch.device('cpu')), RandomDetector())


def main():
    what, folder = sys.argv[1:3]
    device = init_process_group()
    if what == 'train':
        batch_size, epochs = map(int, sys.argv[3:])
        torch.manual_seed(0)
        model = SSD300(n_classes=4, thin=16).to(device)
        print(f'process {get_rank()} is {os.getpid()}', flush=True)
        train.evaluate = partial(evaluate, min_score=0, top_k=5000)  # so that there are some hits
        fit(model, make_optimizer(model, 'sgd', 1e-5, 5e-4), PascalVOCDataset(folder, 'TRAIN', keep_difficult=True),
            os.path.join(folder, f'{get_world_size()}.pth'), epochs, batch_size, warm_up=3,
            print_freq=1, test_set=PascalVOCDataset(folder, 'TEST', keep_difficult=True), evaluate_every=1)
    elif what == 'spoiled':
        train_spoiled(folder, *sys.argv[3:])
    elif what == 'download':
        download(folder)
    else:
        results = [evaluate_first(folder, 39), evaluate_first(folder, 1)]  # numbers that two can't share evenly
        with open(os.path.join(folder, f'results {get_rank()} of {get_world_size()}.json'), 'w') as file:
            json.dump(results, file)
    destroy_process_group()


if __name__ == '__main__':
    run(main)
