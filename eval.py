"""
Measure a trained SSD300 on the test images, the way Pascal VOC 2007 does:

    python eval.py

prints the average precision (AP) of each class, and their mean (mAP), counts the mistakes, and draws the worst. Edit
the parameters below first. With several GPUs (see processes.py): torchrun --nproc_per_node=8 eval.py
"""
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import detect
from checkpoints import load_detector
from datasets import PascalVOCDataset, collate_fn, load_batches, quiet_worker
from files import UserError, run
from mistakes import find_mistakes, print_counts, save_sheet
from processes import gather_images, join_processes, leave_processes, n_processes, process_number
from utils import calculate_mAP

data_folder = './'  # where create_data_lists.py wrote the lists
checkpoint = 'checkpoint_ssd300.pth'  # the weights to measure, from train.py; None for torchvision's, trained on COCO
batch_size = 32  # images in a batch; fewer if memory runs out
workers = 4  # processes that load images
mistakes_path = 'mistakes.png'  # where a sheet of the worst mistakes goes, or None; at the scores that detect.py draws
bfloat16 = False  # compute in 16 bits: faster on many GPUs, but not quite what is measured otherwise


# Many GPUs round what they multiply to 10 bits after the point (TF32) unless told otherwise: then a mean average
# precision, or what detect.py finds, would depend on the GPU.
@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def evaluate(test_loader, model, min_score=0.01, max_overlap=0.45, top_k=200, bfloat16=False,
             mistakes_path=None):
    """
    Detect objects in all test images, compare them with the true ones, and print a table.

    :param test_loader: DataLoader of PascalVOCDataset's split TEST, with difficult objects kept: detections of them
        are neither right nor wrong, but the evaluation has to know
    :param model: SSD300
    :param min_score: how certain a detection must be; low, because average precision looks at all levels of certainty
    :param max_overlap: see `SSD300.detect_objects`
    :param top_k: see `SSD300.detect_objects`
    :param bfloat16: compute in 16 bits, instead of in 32 as detect.py does
    :param mistakes_path: also count the mistakes at the scores that detect.py draws, and draw a sheet of the worst here
    :return: dict of label -> AP, and mAP, see `utils.calculate_mAP`
    """
    model.eval()
    device = model.priors_cxcy.device
    # Of each batch: boxes, labels and scores of the detections; boxes, labels and difficulties of the objects. They are
    # kept in one piece, with a count for each image: many small ones would be scattered all over the memory, and take
    # long to exchange between processes.
    batches, counts = [[] for _ in range(6)], [[] for _ in range(6)]
    start = time.time()
    for images, *objects in tqdm(load_batches(test_loader), 'Evaluating', len(test_loader), unit='batch',
                                 disable=process_number() > 0):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images.to(device, non_blocking=True))
        found = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
        for batch, count, values in zip(batches, counts, (*found, *objects)):
            batch.append(torch.cat(values))
            count.extend(map(len, values))
    lists = [gather_images(batch, count) for batch, count in zip(batches, counts)]
    seconds = time.time() - start

    label_map = test_loader.dataset.label_map
    average_precisions, mean_average_precision = calculate_mAP(*lists, label_map)
    if process_number() > 0:
        return average_precisions, mean_average_precision
    labels, difficulties = torch.cat(lists[4]), torch.cat(lists[5])
    print(f'{"class":20}{"objects":>10}{"AP":>10}')
    for label, index in list(label_map.items())[1:]:
        n_objects = ((labels == index) & (difficulties == 0)).sum().item()
        shown = f'{average_precisions[label]:.3f}' if label in average_precisions else '-'
        print(f'{label:20}{n_objects:10}{shown:>10}')
    print(f'{"mAP":20}{(difficulties == 0).sum().item():10}{mean_average_precision:10.3f}')
    print(f'{len(lists[0])} images, {len(lists[0]) / seconds:.1f} images/s on {device}')
    if mistakes_path is not None:
        counts, alarms, missed = find_mistakes(lists, label_map, detect.min_score)
        print_counts(counts, detect.min_score)
        save_sheet(mistakes_path, alarms, missed, test_loader.dataset.images)
        print(f'The surest false alarms and the largest objects that were not found: {mistakes_path}')
    return average_precisions, mean_average_precision


def make_test_loader(test_set, batch_size, workers, device):
    """:return: DataLoader of a PascalVOCDataset for `evaluate`; of several processes, each has a part of it"""
    return DataLoader(test_set, batch_size, sampler=range(process_number(), len(test_set), n_processes()),
                      collate_fn=collate_fn, num_workers=workers, pin_memory=device.type == 'cuda',
                      worker_init_fn=quiet_worker)


def main():
    """Evaluate with the parameters at the top of this file."""
    device = join_processes()
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
    model, label_map = load_detector(checkpoint, list(test_set.label_map)[1:])
    if label_map != test_set.label_map:
        raise UserError(f'{checkpoint} detects {list(label_map)[1:]}, but the lists in {data_folder} have '
                        f'{list(test_set.label_map)[1:]}: write lists with the labels of the checkpoint')
    model = model.to(device)
    evaluate(make_test_loader(test_set, batch_size, workers, device), model, bfloat16=bfloat16,
             mistakes_path=mistakes_path)
    leave_processes()


if __name__ == '__main__':
    run(main)
