"""Overfit a few images, before you train for hours:

    python overfit.py

A detector that can't learn four images won't learn four thousand. If this one misses many of the objects in them, there
is a mistake in the boxes, in the labels, or in a change to the code. Edit the parameters below first.
"""
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from datasets import PascalVOCDataset, collate_fn
from detect import draw_objects
from errors import check_numbers, run
from images import check_image_path, open_image, save_tiles
from mistakes import find_mistakes
from model import SSD300, MultiBoxLoss, standardize
from train import make_optimizer, one_cycle, train

data_folder = './'  # where create_data_lists.py wrote the lists
n_images = 4  # how many of the first training images to learn
steps = 25  # steps of training before each of four looks at what is found; each batch has all of these images
thin = 4  # every thin-th channel is kept; 1 for the paper's network, which takes a dozen times as long
lr = 1e-3  # the highest learning rate of AdamW, from random weights
min_score = 0.4  # only detections with higher scores count and are drawn
sheet_path = 'overfit.png'  # where a sheet goes: the ground truth, and the detections at four steps


def overfit(train_set, n_images, steps, thin, lr, sheet_path, device):
    """Train on the same images in each step, as train.py does, and four times detect objects in them.

    :param train_set: PascalVOCDataset; its split becomes 'TEST': the images as they are, without augmentation
    :param n_images: how many of its first images to learn; all, if it has fewer
    :param steps: how many steps to train before each look, with `lr` as the highest learning rate
    :param thin: every thin-th channel of SSD300 is kept, see `model.SSD300`
    :param sheet_path: where the sheet goes
    :param device: the torch.device to train on
    :return: how many of the objects were found after the last step
    :raises UserError: the loss or the gradient was not finite"""
    train_set.split = 'TEST'
    batch = collate_fn([train_set[i] for i in range(min(n_images, len(train_set)))])
    images, boxes, labels, difficulties = batch
    images = images.to(device)  # (N, 3, 300, 300)
    difficulties = [torch.zeros_like(of_image) for of_image in difficulties]  # all objects are learned, so all count
    originals = [open_image(path) for path in train_set.images[:n_images]]
    for original in originals:
        original.thumbnail((480, 360))  # the size on the sheet
    n_objects = sum(map(len, boxes))

    model = SSD300(len(train_set.label_map), thin=thin).to(device)
    standardize(model, images)
    criterion = MultiBoxLoss(model.priors_cxcy)
    optimizer = make_optimizer(model, 'adamw', lr, weight_decay=0)
    schedule = LambdaLR(optimizer, partial(one_cycle, n_steps=4 * steps))

    columns = [('ground truth', boxes, labels, [torch.ones(len(of_image)) for of_image in labels])]
    for look in range(4):
        train([batch] * steps, model, criterion, optimizer, look, 4, grad_clip=10, schedule=schedule)
        with torch.no_grad():
            found = model.detect_objects(*model(images), min_score)  # boxes, labels, scores
        counts, false_positives, _ = find_mistakes([*found, boxes, labels, difficulties], train_set.label_map,
                                                   min_score)
        n_found = sum(of_class['true positive'] for of_class in counts.values())
        print(f'found {n_found} of {n_objects}  false positives {sum(map(len, false_positives.values()))}', flush=True)
        columns.append((f'step {(look + 1) * steps}', *found))
    save_sheet(sheet_path, originals, columns, train_set.label_map)
    return n_found


def save_sheet(path, images, columns, label_map):
    """Save a row for each PIL image, a column for each heading with what `SSD300.detect_objects` returns."""
    rows, names = [[] for _ in images], list(label_map)
    for heading, *lists in columns:
        for row, image, boxes, labels, scores in zip(rows, images, *lists):
            boxes = boxes.cpu().clamp(0, 1) * torch.tensor([image.width, image.height] * 2)  # (n, 4)
            found = zip(labels.tolist(), scores.tolist(), boxes.round().int().tolist())
            detections = [(names[label], score, box) for label, score, box in found if label > 0]  # no placeholder
            row.append((draw_objects(image, detections, label_map), f'{heading}: {len(detections)} boxes'))
    save_tiles(path, rows, 480, 360)


def main():
    """Overfit with the parameters at the top of this file."""
    check_image_path('overfit.py', 'sheet_path', sheet_path)
    check_numbers('overfit.py', 1, n_images=n_images, steps=steps)
    check_numbers('overfit.py', 0, float, lr=lr)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult=True)
    overfit(train_set, n_images, steps, thin, lr, sheet_path, device)
    print(f'Look at {sheet_path}. If a few objects are missing, try more steps; if many, look for a mistake.')


if __name__ == '__main__':
    run(main)
