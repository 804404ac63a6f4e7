"""Real images, of blood cells: what the detector of "A first training on a laptop" in GUIDE.md finds, and what it gets
wrong. Follow that section first; its folder `cells` is not in the repository.
"""
import os
import sys
from functools import cache

import torch
from drawing import dashes, figure, outline, panels, rendered, series, show
from matplotlib.lines import Line2D
from PIL import Image
from torch.utils.data import DataLoader

import overfit
from checkpoints import load_detector
from datasets import PascalVOCDataset, collate_fn
from eval import evaluate, mistakes_min_score
from images import open_image
from mistakes import find_mistakes, judge, save_sheet
from utils import average_precision, match_detections

folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'cells')
sheet_path = os.path.join(folder, 'sheet.png')  # of mistakes or of overfitting; figures are parts of it
shown = (65, 10)  # test images: together, they have about as many mistakes as others


@cache
def evaluated():
    """:return: the test images, a PascalVOCDataset, and the first six arguments of `calculate_mAP`"""
    checkpoint = os.path.join(folder, 'checkpoint_ssd300.pth')
    if not os.path.exists(checkpoint):
        sys.exit(f'Error: {checkpoint} is missing: train it as "A first training on a laptop" says')
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    found = evaluate(DataLoader(test_set, batch_size=8, collate_fn=collate_fn), load_detector(checkpoint)[0])
    return test_set, [*found.detections, *found.objects]


@figure('cells.png')
def draw_cells():
    """True positives, false positives and missed objects in two test images."""
    test_set, lists = evaluated()
    letters = [{'WBC': 'W', 'Platelets': 'P'}.get(label, '') for label in test_set.label_map]  # red ones: ''
    fig, axes = panels(1, 2, 3.3)
    for ax, i in zip(axes, shown):
        det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties = (values[i] for values in lists)
        drawn = det_scores > mistakes_min_score  # (n)
        det_boxes, det_labels = det_boxes[drawn].clamp(0, 1), det_labels[drawn]  # (n_drawn, 4), (n_drawn)
        verdicts = judge(det_boxes, det_labels, det_scores[drawn], true_boxes, true_labels, true_difficulties)
        found = {target for kind, target in verdicts if kind in ('true positive', 'classification', 'localization')}
        boxes = [(box, label, 'object' if kind == 'true positive' else 'wrong', '-', 'left')
                 for (kind, _), box, label in zip(verdicts, det_boxes, det_labels)]
        boxes += [(box, label, 'prediction', dashes, 'right')
                  for target, (box, label) in enumerate(zip(true_boxes, true_labels)) if target not in found]
        show(ax, open_image(test_set.images[i]))
        for box, label, color, style, side in boxes:
            outline(ax, box, color, letters[label], f'above {side}', linestyle=style,
                    linewidth=3 if color == 'wrong' else 2)
    lines = [Line2D([], [], color='object'), Line2D([], [], color='wrong', linewidth=3),
             Line2D([], [], color='prediction', linestyle=dashes)]
    fig.legend(lines, ('true positive', 'false positive', 'missed'), loc='outside lower center', ncols=3,
               title='W: white cell, P: platelet, without a letter: red cell', title_fontsize=12)
    return rendered(fig)


@figure('mistakes.png')
def draw_mistakes():
    """As the sheet that eval.py draws, with two of each in a row, and larger."""
    test_set, lists = evaluated()
    _, false_positives, missed = find_mistakes(lists, test_set.label_map, mistakes_min_score)
    worst = [{label: of_label[:2] for label, of_label in of_all.items()} for of_all in (false_positives, missed)]
    save_sheet(sheet_path, *worst, test_set.images)
    sheet = Image.open(sheet_path).convert('RGB')
    return sheet.resize((round(1.5 * sheet.width), round(1.5 * sheet.height)), Image.Resampling.LANCZOS)


@figure('overfit.png')
def draw_overfit():
    """Of the sheet that overfit.py draws, the first image: its objects, and what was found after some steps."""
    evaluated()  # or the message that says how to get the images
    torch.manual_seed(0)
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    overfit.overfit(train_set, overfit.n_images, overfit.steps, overfit.thin, overfit.lr, sheet_path,
                    torch.device('cpu'))
    sheet = Image.open(sheet_path)
    width, height = sheet.width // 5, sheet.height // overfit.n_images
    drawn = Image.new('RGB', (2 * width, 2 * height), 'white')
    for i, column in enumerate((0, 1, 2, 4)):
        drawn.paste(sheet.crop((column * width, 0, (column + 1) * width, height)), (i % 2 * width, i // 2 * height))
    return drawn.quantize(256)


@figure('precision_recall.svg')
def draw_precision_recall():
    """Precision over recall for each class."""
    test_set, lists = evaluated()
    matches = [match_detections(*of_image) for of_image in zip(*lists)]
    true_positive, ignored = (torch.cat([match[i] for match in matches]) for i in (0, 1))  # (n_all) each
    det_labels, det_scores, true_labels, difficulties = (torch.cat(lists[i]) for i in (1, 2, 4, 5))
    fig, [ax] = panels(1, 1, 3.6)
    for (label, index), color in zip([*test_set.label_map.items()][1:], series):
        of_class = (det_labels == index) & ~ignored  # (n_all)
        by_score = det_scores[of_class].sort(descending=True, stable=True).indices  # (n)
        true_positives = true_positive[of_class][by_score]  # (n)
        n_objects = ((true_labels == index) & (difficulties == 0)).sum().item()
        found = true_positives.cumsum(0)  # (n)
        ax.plot(found / n_objects, found / torch.arange(1, len(found) + 1), color=color,
                label=f'{label}: AP {average_precision(true_positives, n_objects):.3f}')
    ax.set(xlabel='recall', ylabel='precision', xlim=(0, 1.02), ylim=(0, 1.03))
    ax.legend(loc='lower left')
    return fig
