"""What a detector gets wrong: eval.py counts the mistakes, and draws a sheet of the worst. Their kinds are those of
Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", 2020.
"""
from collections import Counter, namedtuple

import torch
from PIL import ImageDraw

from datasets import draw_window
from images import load_font, open_image, save_tiles
from utils import find_jaccard_overlap, match_detections

# What a detection can be. All but 'true positive' and 'ignored' are mistakes.
kinds = 'true positive', 'classification', 'localization', 'both', 'duplicate', 'background', 'ignored'
n_shown = 5  # false positives, and missed objects, of a class in the sheet
tile = 150  # width and height of an image in the sheet, in pixels

# A false positive, or a missed object: one of `kinds`, or 'missed'; the index of the image; score, label and box of the
# detection; label and box of the object. What does not apply is None. Boxes are tensors (4).
Mistake = namedtuple('Mistake', 'kind image score label box true_label true_box')


def judge(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties):
    """Find the kind of each detection of an image. True positives, duplicates and ignored ones are, like the arguments,
    those of `utils.match_detections`. Of those that belong to no object:
    - localization: overlaps an object of its class by more than 0.1;
    - classification: overlaps an object of another class by more than 0.5;
    - background: overlaps no object by more than 0.1;
    - both: overlaps an object of another class by more than 0.1: class and box are wrong.

    Where two apply, it is the first in this order, as in TIDE's code; but detections are matched as VOC does.

    :return: list of (kind, index of the object that it is about, or None for background), one for each detection"""
    true_positive, ignored, target = match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels,
                                                      true_difficulties)
    overlap = find_jaccard_overlap(det_boxes, true_boxes)  # (n, n_objects)
    same_class = det_labels.unsqueeze(1) == true_labels  # (n, n_objects)
    verdicts = []
    for i, (of_class, of_others) in enumerate(zip(overlap.where(same_class, 0), overlap.where(~same_class, 0))):
        if target[i] >= 0:
            kind = 'ignored' if ignored[i] else 'true positive' if true_positive[i] else 'duplicate'
            verdicts.append((kind, target[i].item()))
        elif (of_class > 0.1).any():
            verdicts.append(('localization', of_class.argmax().item()))
        elif (of_others > 0.5).any():
            verdicts.append(('classification', of_others.argmax().item()))
        elif (of_others > 0.1).any():
            verdicts.append(('both', of_others.argmax().item()))
        else:
            verdicts.append(('background', None))
    return verdicts


def find_mistakes(lists, label_map, min_score):
    """Count and list the mistakes of each class. As in TIDE, an object is missed if it has neither a true positive nor
    a classification or localization error, because correcting such an error would find it.

    :param lists: the first six arguments of `calculate_mAP`, with fractional boxes; and its label_map
    :param min_score: only detections with a score above this count
    :return: dict of label -> a Counter of `kinds` and of 'missed'; and two dicts of label -> list of Mistake: false
        positives by decreasing score, missed objects by decreasing area"""
    labels = list(label_map)
    counts = {label: Counter() for label in labels[1:]}
    false_positives, missed = {label: [] for label in counts}, {label: [] for label in counts}
    for i, tensors in enumerate(zip(*lists)):
        boxes, indices, scores, true_boxes, true_indices, difficulties = (tensor.cpu() for tensor in tensors)
        shown = (scores > min_score) & (indices > 0)  # (n)
        boxes, indices, scores = boxes[shown], indices[shown], scores[shown]
        verdicts = judge(boxes, indices, scores, true_boxes, true_indices, difficulties)
        true_labels = [labels[index] for index in true_indices]
        for (kind, target), box, index, score in zip(verdicts, boxes, indices, scores.tolist()):
            label = labels[index]
            counts[label][kind] += 1
            if kind not in ('true positive', 'ignored'):
                truth = (None, None) if target is None else (true_labels[target], true_boxes[target])
                false_positives[label].append(Mistake(kind, i, score, label, box, *truth))
        found = {target for kind, target in verdicts if kind in ('true positive', 'classification', 'localization')}
        for target, (box, label) in enumerate(zip(true_boxes, true_labels)):
            if target not in found and not difficulties[target]:
                counts[label]['missed'] += 1
                missed[label].append(Mistake('missed', i, None, None, None, label, box))
    for label in counts:
        false_positives[label].sort(key=lambda mistake: -mistake.score)
        missed[label].sort(key=lambda mistake: -(mistake.true_box[2:] - mistake.true_box[:2]).prod().item())
    return counts, false_positives, missed


def print_counts(counts, min_score):
    """Print a table of the counts of `find_mistakes`."""
    columns = [*kinds, 'missed']
    print(f'\nAt scores above {min_score:g}:\n' + ' ' * 20 + ''.join(f'{column:>15}' for column in columns))
    for label, of_label in [*counts.items(), ('all', sum(counts.values(), Counter()))]:
        print(f'{label:20}' + ''.join(f'{of_label[column]:15}' for column in columns))


def save_sheet(path, false_positives, missed, image_paths, font=None):
    """Save a row for each class: false positives with the highest scores, the largest missed. `font`: see eval.py."""
    rows = [[] for _ in missed]
    for row, label in zip(rows, missed):
        for mistake in false_positives[label][:n_shown] + missed[label][:n_shown]:
            image = draw_mistake(open_image(image_paths[mistake.image]), mistake.box, mistake.true_box)
            score = '' if mistake.score is None else f' {mistake.score:.2f}'
            of_object = f': {mistake.true_label}' if mistake.kind in ('classification', 'both') else ''
            row.append((image, f'{label}{score}\n{mistake.kind}{of_object}'))
    save_tiles(path, rows, tile, tile, load_font(font, 10))


def draw_mistake(image, box, true_box):
    """Draw the box of a detection in orange and that of an object in green, on the part of the image around them, a PIL
    image of side `tile`. The boxes are tensors (4) in fractional boundary coordinates; one may be None."""
    size = torch.tensor([image.width, image.height] * 2)  # (4)
    boxes = [(b.cpu().clamp(0, 1) * size, color) for b, color in ((true_box, 'lime'), (box, 'orange')) if b is not None]
    corners = torch.stack([b for b, _ in boxes])  # (n, 4), with n = 1 or 2
    low, high = corners[:, :2].amin(dim=0), corners[:, 2:].amax(dim=0)  # (2), (2)
    side = max(1.6 * (high - low).max().item(), 24)  # of the part of the image that is shown, in pixels
    center = (low + high) / 2  # (2)
    window = torch.cat([center - side / 2, center + side / 2]).tolist()
    drawn, corners = draw_window(image, corners, window, (tile, tile))  # corners in fractions of the tile, (n, 4)
    for b, (_, color) in zip(corners * tile, boxes):
        ImageDraw.Draw(drawn).rectangle(b.tolist(), outline=color, width=2)
    return drawn
