"""
What a detector gets wrong: eval.py counts it, and draws a sheet of the worst.
"""
from collections import Counter

import torch
from PIL import Image, ImageDraw

from files import open_image
from utils import find_jaccard_overlap, find_targets

# What a detection can be. The last is no mistake either: difficult objects need not be found, but may be.
kinds = 'hit', 'nothing there', 'wrong class', 'loose box', 'second box', 'difficult'
n_shown = 5  # mistakes of each kind, false alarms and objects not found, that the sheet shows of a class
tile = 150  # pixels a side of what is cut out
caption_height = 34  # pixels below it


def judge(det_boxes, det_labels, true_boxes, true_labels, true_difficulties):
    """
    Say of each detection of an image what it is:

    - hit: it overlaps an object of its class by more than 0.5, and is the first to do so;
    - second box: it does, but the object has been found;
    - difficult: it does, and the object is marked as difficult;
    - wrong class: it overlaps only an object of another class by more than 0.5;
    - loose box: it overlaps an object of its class, by more than 0.1;
    - nothing there: none of these.

    :param det_boxes: boundary coordinates, by decreasing score, (n, 4)
    :param det_labels: (n)
    :param true_boxes: the image's objects, boundary coordinates, (n_objects, 4)
    :param true_labels: (n_objects)
    :param true_difficulties: (n_objects)
    :return: list of (kind, index of the object that it is about or None); and the set of the objects that were found
    """
    verdicts, found = [], set()
    overlap = find_jaccard_overlap(det_boxes, true_boxes)  # (n, n_objects)
    targets = find_targets(det_boxes, det_labels, true_boxes, true_labels).tolist()
    for label, target, overlaps in zip(det_labels, targets, overlap):
        of_class = overlaps.where(true_labels == label, 0)  # (n_objects)
        if target >= 0 and true_difficulties[target]:
            verdicts.append(('difficult', target))
        elif target >= 0:
            verdicts.append(('second box' if target in found else 'hit', target))
            found.add(target)
        elif (overlaps > 0.5).any():
            verdicts.append(('wrong class', overlaps.argmax().item()))
        elif (of_class > 0.1).any():
            verdicts.append(('loose box', of_class.argmax().item()))
        else:
            verdicts.append(('nothing there', None))
    return verdicts, found


def find_mistakes(lists, label_map, min_score):
    """
    :param lists: the first six arguments of `calculate_mAP`
    :param label_map: dict of label -> index
    :param min_score: detections with a lower score do not count
    :return: dicts of label -> a Counter of `kinds`, and of objects 'not found'; the false alarms from the surest down,
        tuples of (score, image, box, true box or None, caption); the objects that were not found from the largest
        down, tuples of (area, image, None, true box, caption)
    """
    labels = list(label_map)
    counts, alarms, missed = {}, {}, {}
    for label in labels[1:]:
        counts[label], alarms[label], missed[label] = Counter(), [], []
    for image, tensors in enumerate(zip(*lists)):
        det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties = (t.cpu() for t in tensors)
        shown = (det_scores > min_score) & (det_labels > 0)  # (n)
        det_boxes, det_labels, det_scores = det_boxes[shown], det_labels[shown], det_scores[shown]
        verdicts, found = judge(det_boxes, det_labels, true_boxes, true_labels, true_difficulties)
        true_labels = [labels[index] for index in true_labels]
        for (kind, target), box, index, score in zip(verdicts, det_boxes, det_labels, det_scores.tolist()):
            label = labels[index]
            counts[label][kind] += 1
            if kind not in ('hit', 'difficult'):
                true_box = None if target is None else true_boxes[target]
                what = f'{kind}: {true_labels[target]}' if kind == 'wrong class' else kind
                alarms[label].append((score, image, box, true_box, f'{label} {score:.2f}\n{what}'))
        for target, (box, label) in enumerate(zip(true_boxes, true_labels)):
            if target not in found and not true_difficulties[target]:
                counts[label]['not found'] += 1
                missed[label].append(((box[2:] - box[:2]).prod().item(), image, None, box, f'{label}\nnot found'))
    for of_label in (*alarms.values(), *missed.values()):
        of_label.sort(key=lambda mistake: mistake[0], reverse=True)
    return counts, alarms, missed


def print_counts(counts, min_score):
    """Print a table of what `find_mistakes` counted."""
    columns = [*kinds, 'not found']
    print(f'\nAt scores above {min_score:g}:\n' + ' ' * 20 + ''.join(f'{column:>15}' for column in columns))
    for label, of_label in [*counts.items(), ('all', sum(counts.values(), Counter()))]:
        print(f'{label:20}' + ''.join(f'{of_label[column]:15}' for column in columns))


def save_sheet(path, alarms, missed, image_paths):
    """
    Draw a row for each class: its surest false alarms, then the largest of its objects that were not found.

    :param path: where the sheet goes
    :param image_paths: the images' paths; the others are what `find_mistakes` returns
    """
    sheet = Image.new('RGB', (2 * n_shown * (tile + 10), len(alarms) * (tile + caption_height)), 'white')
    for row, label in enumerate(alarms):
        for first_column, of_label in ((0, alarms[label]), (n_shown, missed[label])):
            for column, (_, image, *mistake) in enumerate(of_label[:n_shown], first_column):
                drawn = draw_mistake(open_image(image_paths[image]), *mistake)
                sheet.paste(drawn, (column * (tile + 10), row * (tile + caption_height)))
    sheet.save(path)


def draw_mistake(image, box, true_box, caption):
    """
    :param image: a PIL image in RGB
    :param box: of the detection, fractional boundary coordinates (4), or None; drawn in orange
    :param true_box: of the object, or None; drawn in green
    :param caption: two lines
    :return: a PIL image: the boxes with some surroundings, and the caption below
    """
    size = torch.tensor([image.width, image.height] * 2)  # (4)
    boxes = [(b.cpu().clamp(0, 1) * size, color) for b, color in ((true_box, 'lime'), (box, 'orange')) if b is not None]
    corners = torch.stack([b for b, _ in boxes])  # (1 or 2, 4)
    low, high = corners[:, :2].amin(dim=0), corners[:, 2:].amax(dim=0)  # (2), (2)
    side = max(1.6 * (high - low).max().item(), 24)  # pixels of the image that the tile shows, in each direction
    left, top = ((low + high) / 2 - side / 2).tolist()
    cut = image.crop((round(left), round(top), round(left + side), round(top + side))).resize((tile, tile))
    drawn = Image.new('RGB', (tile, tile + caption_height), 'white')
    drawn.paste(cut)
    draw = ImageDraw.Draw(drawn)
    for b, color in boxes:
        draw.rectangle(((b - torch.tensor([left, top] * 2)) * tile / side).tolist(), outline=color, width=2)
    draw.multiline_text((2, tile + 2), caption, fill='black', spacing=2)
    return drawn
