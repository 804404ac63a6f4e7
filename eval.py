"""Evaluate a trained SSD300 on the test images, as Pascal VOC 2007 does:

    python eval.py

prints the average precision (AP) of each class, and their mean (mAP), counts the mistakes, and draws the worst. Edit
the parameters below first. With several GPUs (see distributed.py): torchrun --nproc_per_node=8 eval.py
"""
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import load_detector
from datasets import PascalVOCDataset, collate_fn
from distributed import all_gather_images, destroy_process_group, get_rank, get_world_size, init_process_group
from errors import UserError, check_numbers, run
from images import check_image_path
from mistakes import find_mistakes, print_counts, save_sheet
from utils import calculate_mAP

data_folder = './'  # where create_data_lists.py wrote the lists
checkpoint = 'checkpoint_ssd300.pth'  # the weights to evaluate, from train.py; None for torchvision's, trained on COCO
batch_size = 32  # images in a batch; fewer if memory runs out
workers = 4  # processes that load images
mistakes_path = 'mistakes.png'  # where to save an image of the worst mistakes; None for none
mistakes_min_score = 0.4  # the lowest score of the detections whose mistakes are counted and drawn: see detect.py
bfloat16 = False  # compute in 16 bits: faster on many GPUs, but the result differs a little


# PyTorch lets convolutions on recent GPUs use TF32, with a mantissa of 10 bits. Turn it off, so that neither the mAP
# nor what detect.py finds depends on the GPU.
@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def evaluate(test_loader, model, min_score=0.01, max_overlap=0.45, top_k=200, bfloat16=False, mistakes_path=None,
             mistakes_min_score=0.4):
    """Detect objects in all test images, compare them with the ground truth, and print a table.

    :param test_loader: DataLoader of PascalVOCDataset's split TEST, with the difficult objects: detections of them are
        ignored
    :param model: SSD300
    :param min_score: keep detections with a score above this; low, because AP needs all levels of confidence
    :param max_overlap: and top_k: see `SSD300.detect_objects`
    :param bfloat16: compute in 16 bits, not in 32 as detect.py does
    :param mistakes_path: where to save a sheet of the worst mistakes; None to neither count nor draw them
    :param mistakes_min_score: count mistakes among detections with a score above this
    :return: dict of label -> AP, and mAP, see `utils.calculate_mAP`"""
    model.eval()
    device = model.priors_cxcy.device
    # For each image: boxes, labels, scores of the detections; boxes, labels, difficulties of the ground truth
    lists = [[] for _ in range(6)]
    start = time.time()
    for images, *objects in tqdm(test_loader, 'Evaluating', unit='batch', disable=get_rank() > 0):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images.to(device, non_blocking=True))
        found = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
        for values, of_batch in zip(lists, (*found, *objects)):
            values.extend(of_image.cpu() for of_image in of_batch)
    lists = [all_gather_images(values) for values in lists]
    seconds = time.time() - start
    true_labels, difficulties = torch.cat(lists[4]), torch.cat(lists[5])  # of all objects, (n_all), (n_all)

    label_map = test_loader.dataset.label_map
    average_precisions, mean_average_precision = calculate_mAP(*lists, label_map)
    if get_rank() > 0:
        return average_precisions, mean_average_precision
    print(f'{"class":20}{"objects":>10}{"AP":>10}')
    for label, index in list(label_map.items())[1:]:
        n_objects = ((true_labels == index) & (difficulties == 0)).sum().item()
        shown = f'{average_precisions[label]:.3f}' if label in average_precisions else '-'
        print(f'{label:20}{n_objects:10}{shown:>10}')
    print(f'{"mAP":20}{(difficulties == 0).sum().item():10}{mean_average_precision:10.3f}')
    print(f'{len(lists[0])} images, {len(lists[0]) / seconds:.1f} images/s on {device}')
    if mistakes_path is not None:
        counts, false_positives, missed = find_mistakes(lists, label_map, mistakes_min_score)
        print_counts(counts, mistakes_min_score)
        save_sheet(mistakes_path, false_positives, missed, test_loader.dataset.images)
        print(f'The false positives with the highest scores, and the largest missed objects: {mistakes_path}')
    return average_precisions, mean_average_precision


def make_test_loader(test_set, batch_size, workers, device):
    """A DataLoader for `evaluate` on `device`. Process i of n has the i-th of n parts of the images."""
    first, end = (len(test_set) * i // get_world_size() for i in (get_rank(), get_rank() + 1))
    return DataLoader(test_set, batch_size, sampler=range(first, end), collate_fn=collate_fn, num_workers=workers,
                      pin_memory=device.type == 'cuda')


def main():
    """Evaluate with the parameters at the top of this file."""
    check_numbers('eval.py', 1, batch_size=batch_size)
    check_numbers('eval.py', 0, workers=workers)
    if mistakes_path is not None:
        check_image_path('eval.py', 'mistakes_path', mistakes_path)
    device = init_process_group()
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
    model, label_map = load_detector(checkpoint, list(test_set.label_map)[1:])
    if label_map != test_set.label_map:
        raise UserError(f'{checkpoint} detects {list(label_map)[1:]}, but the lists in {data_folder} have '
                        f'{list(test_set.label_map)[1:]}: write lists with the labels of the checkpoint')
    model = model.to(device)
    evaluate(make_test_loader(test_set, batch_size, workers, device), model, bfloat16=bfloat16,
             mistakes_path=mistakes_path, mistakes_min_score=mistakes_min_score)
    destroy_process_group()


if __name__ == '__main__':
    run(main)
