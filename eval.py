"""Evaluate a trained SSD300 on the test images, as Pascal VOC 2007 does:

    python eval.py

prints the average precision (AP) of each class, and their mean (mAP), counts the mistakes, and draws the worst. Edit
the parameters below first. With several GPUs (see distributed.py): torchrun --nproc_per_node=8 eval.py
"""
import time
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import load_detector
from datasets import PascalVOCDataset, collate_fn
from distributed import all_gather_images, destroy_process_group, get_rank, get_world_size, init_process_group
from errors import UserError, check_numbers, run
from images import check_font, check_image_path
from mistakes import find_mistakes, print_counts, save_sheet
from utils import calculate_mAP

data_folder = './'  # where create_data_lists.py wrote the lists
checkpoint = 'checkpoint_ssd300.pth'  # the weights to evaluate, from train.py; None for torchvision's, trained on COCO
batch_size = 32  # images in a batch; lower it if memory runs out
workers = 4  # processes that load images
mistakes_path = 'mistakes.png'  # where to save an image of the worst mistakes; None for none
mistakes_min_score = 0.4  # only detections with higher scores are judged and drawn: see min_score in detect.py
font = None  # a .ttf, .otf or .ttc file for the labels in that image; None for Pillow's own font: see detect.py
bfloat16 = False  # compute in 16 bits: faster on many GPUs, but the result differs a little


class Evaluation(NamedTuple):
    """What `evaluate` found. Lists have a CPU tensor for each image; boxes are in fractional boundary coordinates."""
    average_precisions: dict  # label -> AP, see `utils.calculate_mAP`
    mAP: float  # their mean
    detections: tuple  # three lists: boxes (n, 4), labels (n), scores (n); label 0 is the placeholder for no detection
    objects: tuple  # the ground truth, three lists: boxes (n_objects, 4), labels (n_objects), difficulties (n_objects)
    seconds: float  # to load the images and to detect


@torch.no_grad()
def evaluate(test_loader, model, min_score=0.01, max_overlap=0.45, top_k=200, bfloat16=False):
    """Detect objects in all test images, and compare them with the ground truth.

    :param test_loader: DataLoader of PascalVOCDataset's split TEST, with the difficult objects
    :param model: SSD300
    :param min_score: keep detections with a score above this; low, because AP needs all levels of confidence
    :param max_overlap: with top_k, see `SSD300.detect_objects`
    :param bfloat16: compute in 16 bits, not in 32 as detect.py does
    :return: Evaluation; with several processes, it covers the images of all, and is the same in each"""
    model.eval()
    device = model.priors_cxcy.device
    lists = [[] for _ in range(6)]  # the first six arguments of calculate_mAP
    start = time.perf_counter()
    for images, *objects in tqdm(test_loader, 'Evaluating', unit='batch', disable=get_rank() > 0):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images.to(device, non_blocking=True))
        detections = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
        for values, batch_values in zip(lists, (*detections, *objects)):
            values.extend(tensor.cpu() for tensor in batch_values)
    lists = [all_gather_images(values) for values in lists]
    seconds = time.perf_counter() - start
    average_precisions, mAP = calculate_mAP(*lists, test_loader.dataset.label_map)
    return Evaluation(average_precisions, mAP, tuple(lists[:3]), tuple(lists[3:]), seconds)


def print_table(found, label_map):
    """Print a row for each class, and the mAP, of an Evaluation. `label_map` is a dict of label -> index."""
    _, labels, difficulties = map(torch.cat, found.objects)  # of all objects: (n_all), (n_all)
    print(f'{"class":20}{"objects":>10}{"AP":>10}')
    for label, index in list(label_map.items())[1:]:
        n_objects = ((labels == index) & (difficulties == 0)).sum().item()
        shown = f'{found.average_precisions[label]:.3f}' if label in found.average_precisions else '-'
        print(f'{label:20}{n_objects:10}{shown:>10}')
    print(f'{"mAP":20}{(difficulties == 0).sum().item():10}{found.mAP:10.3f}')


def make_test_loader(test_set, batch_size, workers, device):
    """A DataLoader for `evaluate` on `device`. Process i of n has the i-th of n parts of the images."""
    rank, n = get_rank(), get_world_size()
    return DataLoader(test_set, batch_size, sampler=range(len(test_set) * rank // n, len(test_set) * (rank + 1) // n),
                      collate_fn=collate_fn, num_workers=workers, pin_memory=device.type == 'cuda')


def main():
    """Evaluate with the parameters at the top of this file."""
    check_numbers('eval.py', 1, batch_size=batch_size)
    check_numbers('eval.py', 0, workers=workers)
    if mistakes_path is not None:
        check_numbers('eval.py', 0, float, mistakes_min_score=mistakes_min_score)
        check_image_path('eval.py', 'mistakes_path', mistakes_path)
    torch.backends.cudnn.allow_tf32 = False  # else the mAP would depend on the GPU: TF32's mantissa has 10 bits
    device = init_process_group()
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
    model, label_map = load_detector(checkpoint, list(test_set.label_map)[1:])
    if label_map != test_set.label_map:
        raise UserError(f'{checkpoint} detects {list(label_map)[1:]}, but the lists in {data_folder} have '
                        f'{list(test_set.label_map)[1:]}: set labels in create_data_lists.py to the first, rerun it')
    if mistakes_path is not None and get_rank() == 0:
        check_font('eval.py', font, tuple(label_map))
    found = evaluate(make_test_loader(test_set, batch_size, workers, device), model.to(device), bfloat16=bfloat16)
    if get_rank() == 0:
        print_table(found, label_map)
        print(f'{checkpoint or "COCO"}: {len(test_set)} images, {len(test_set) / found.seconds:.1f}/s on {device}')
        if mistakes_path is not None:
            counts, *worst = find_mistakes([*found.detections, *found.objects], label_map, mistakes_min_score)
            print_counts(counts, mistakes_min_score)
            save_sheet(mistakes_path, *worst, test_set.images, font)
            print(f'The false positives with the highest scores, and the largest missed objects: {mistakes_path}')
    destroy_process_group()


if __name__ == '__main__':
    run(main)
