"""The tutorial's figures with photographs in them, and those of the demo's detector at work (see trained.py).

All boxes are drawn in fractional coordinates: `show` stretches an image over the square from 0 to 1, at the image's
own aspect ratio.
"""
import copy
import os
import random
from functools import partial

import examples
import torch
from drawing import (
    dashes,
    faint,
    figure,
    grid,
    ink,
    legend,
    object_color,
    outline,
    outline_all,
    panels,
    paper,
    prediction_color,
    prior_color,
    rendered,
    series,
    show,
    small,
    width,
    write_on_plate,
    wrong_color,
)
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from skimage import data
from trained import detector, images_folder, snapshots, test_set, write_table

from datasets import centers_inside, crop_window, draw_window, expand_window, photometric_distort, transform
from detect import find_objects, min_score
from images import open_image
from model import MultiBoxLoss
from utils import (
    create_prior_boxes,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    feature_maps,
    find_intersection,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    mean,
    non_maximum_suppression,
    std,
    xy_to_cxcy,
)

# The objects of scikit-image's photographs, in boundary coordinates in pixels
objects = {'astronaut': {'person': (20, 12, 364, 512), 'rocket': (355, 0, 472, 290), 'helmet': (277, 344, 512, 512)},
           'coffee': {'cup': (172, 18, 409, 308), 'saucer': (77, 68, 480, 388), 'spoon': (326, 66, 425, 327)},
           'motorcycle': {'motorcycle': (93, 45, 684, 452), 'bench': (41, 106, 283, 310)},
           'chelsea': {}}
bright = ('#56c8ff', '#ffc020', '#ff4f8b')  # a color for each of the demo's classes, on dark images


# ------------------------------------------------------------------------------------------------------------ Tools

def photograph(name):
    """:param name: one of `objects`
    :return: a PIL image in RGB, and the objects' boxes in boundary coordinates in pixels, (n_objects, 4)"""
    pixels = data.stereo_motorcycle()[0] if name == 'motorcycle' else getattr(data, name)()
    return Image.fromarray(pixels), torch.tensor(list(objects[name].values()), dtype=torch.float32).view(-1, 4)


def fractional(boxes, image):
    """:param boxes: boundary coordinates in pixels, (n, 4)
    :param image: a PIL image
    :return: fractional boundary coordinates, (n, 4)"""
    return torch.as_tensor(boxes) / torch.tensor(image.size * 2)


def class_colors():
    """:return: dict of label -> color for the demo's classes"""
    _, label_map = detector()
    return dict(zip([label for label in label_map if label != 'background'], bright))


def vary(image, boxes, rng):
    """:param image: a PIL image
    :param boxes: boundary coordinates in pixels, (n_objects, 4)
    :param rng: the source of random numbers
    :return: what `transform` makes of them for training: a PIL image, 300x300, and fractional boxes, (n, 4)"""
    normalized, boxes, _, _ = transform(image, boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)), 'TRAIN', rng)
    pixels = normalized.permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)  # (300, 300, 3)
    return Image.fromarray((pixels * 255).round().byte().numpy()), boxes


# ------------------------------------------------------------------------------------------------------- Detections

found_in = (49, 57, 2)  # test images with many objects
decoded = 53  # a test image, whose predictions become detections
watched = (2, 3, 6, 7, 10, 11)  # of those that `learn` watched


def beside(box, taken, w, h):
    """Look for a place for a text: above, below or beside a box, where it covers least.

    :param box: fractional boundary coordinates, (4)
    :param taken: what the text should not cover, fractional boundary coordinates, (n, 4)
    :param w: the text's width, as a fraction of the image's
    :param h: its height, likewise
    :return: its place, fractional boundary coordinates, (4)"""
    x_min, y_min, x_max, y_max = box.tolist()
    corners = ((x_min, y_min - h), (x_max - w, y_min - h), (x_min, y_max), (x_max - w, y_max),
               (x_max, y_min), (x_min - w, y_min))
    places = torch.tensor([(x, y, x + w, y + h) for x, y in corners])  # (6, 4)
    covered = find_intersection(places, taken).sum(dim=1)  # (6)
    inside = find_intersection(places, torch.tensor([[0., 0., 1., 1.]])).squeeze(1)  # (6)
    return places[(covered - inside).argmin()]


@figure('detections.png')
def draw_detections():
    """What the demo's detector finds in three of the test images, as detect.py does."""
    colors = class_colors()
    images = [open_image(test_set().images[i]) for i in found_in]
    ratios = [image.width / image.height for image in images]
    height = width / sum(ratios)  # of the images, in inches
    fig, axes = panels(1, len(images), height + 0.36, column_widths=ratios)
    for ax, image, ratio in zip(axes, images, ratios):
        show(ax, image)
        found = find_objects(image, min_score, 0.45, 200, *detector())
        taken = fractional([box for _, _, box in found], image)  # (n, 4), and the scores written so far
        for label, score, box in found:
            outline(ax, fractional(box, image), colors[label], linewidth=1.5)
            place = beside(fractional(box, image), taken, 0.34 / (height * ratio), 0.14 / height)
            taken = torch.cat([taken, place.unsqueeze(0)])
            ax.text(*xy_to_cxcy(place)[:2], f'{score:.2f}', color=paper, fontsize=small, ha='center', va='center',
                    in_layout=False, zorder=5, path_effects=[withStroke(linewidth=2, foreground=ink)])
    legend(fig, colors)
    return rendered(fig)


@figure('learning.gif')
def draw_learning():
    """What the detector finds in six test images after more and more steps: of the best 50 boxes in each image
    those above `min_score` in their class's color, and what else is among the best 5 in white."""
    colors = list(class_colors().values())
    frames = []
    for iteration, (boxes, labels, scores) in snapshots().items():
        fig, axes = panels(2, 3, 5.2)
        fig.set_dpi(110)
        fig.suptitle(f'{iteration} steps', fontsize=22)
        for ax, i in zip(axes, watched):
            show(ax, open_image(test_set().images[i]))
            for rank, (box, label, score) in enumerate(zip(boxes[i].clamp(0, 1), labels[i], scores[i])):
                if score > min_score and rank < 50:
                    outline(ax, box, colors[label - 1])
                elif rank < 5:
                    outline(ax, box, paper, linewidth=0.8, zorder=2)
        legend(fig, class_colors() | {f'best five below {min_score}': paper}, facecolor=ink, framealpha=1,
               labelcolor=paper, frameon=True)
        frames.append((rendered(fig), 1200))
    return [*frames[:-1], (frames[-1][0], 4000)]


# ------------------------------------------------------------------------------------------- Coordinates and priors

@figure('coordinates.png')
def draw_coordinates():
    """A box in boundary and in center-size coordinates, in pixels and in fractions of the image's size."""
    image, boxes = photograph('coffee')
    box = fractional(boxes[0], image)
    (x_min, y_min, x_max, y_max), (c_x, c_y, _, _) = box.tolist(), xy_to_cxcy(box).tolist()
    fig, axes = panels(2, 2, 4.7)
    forms = (('boundary', ('x_min', 'y_min', 'x_max', 'y_max'), boxes[0]),
             ('center-size', ('c_x', 'c_y', 'w', 'h'), xy_to_cxcy(boxes[0])))
    for ax, side, (title, names, in_pixels) in zip(axes[::2], axes[1::2], forms):
        show(ax, image)
        outline(ax, box, object_color, linewidth=2.5)
        side.axis('off')
        side.set(xlim=(0, 1), ylim=(5.3, -0.7))
        cells = [(title, 'pixels', 'fraction')]
        cells += [(name, f'{pixels:g}', f'{fraction:.3f}') for name, pixels, fraction in
                  zip(names, in_pixels.tolist(), fractional(in_pixels, image).tolist())]
        for row, (name, *numbers) in enumerate(cells):
            side.text(0.06, row, name, weight='bold' if row == 0 else 'normal')
            for x, number in zip((0.68, 1), numbers):
                side.text(x, row, number, ha='right', color=ink if row else faint)
    boundary, center_size = axes[::2]
    boundary.plot([x_min, x_max], [y_min, y_max], 'o', color=object_color, markersize=8, zorder=4)
    write_on_plate(boundary, x_min - 0.04, y_min, 'x_min\ny_min', object_color, ha='right')
    write_on_plate(boundary, x_max + 0.04, y_max, 'x_max\ny_max', object_color, va='bottom')
    center_size.plot(c_x, c_y, 'o', color=object_color, markersize=8, zorder=4)
    write_on_plate(center_size, c_x, c_y - 0.06, 'c_x, c_y', object_color, ha='center', va='bottom')
    arrow = {'arrowstyle': '<->', 'color': paper, 'linewidth': 2, 'shrinkA': 0, 'shrinkB': 0}
    center_size.annotate('', (x_min, 0.87), (x_max, 0.87), arrowprops=arrow)
    center_size.annotate('', (0.78, y_min), (0.78, y_max), arrowprops=arrow)
    write_on_plate(center_size, c_x, 0.87, 'w', object_color, ha='center', va='center')
    write_on_plate(center_size, 0.78, c_y, 'h', object_color, ha='center', va='center')
    return rendered(fig)


@figure('feature_maps.png')
def draw_feature_maps():
    """The tiles of the six feature maps over the image that the network sees."""
    image, _ = photograph('astronaut')
    fig, axes = panels(2, 3, 4.8)
    for ax, (name, feature_map) in zip(axes, feature_maps.items()):
        show(ax, image, f'{name}: {feature_map.size} × {feature_map.size}')
        grid(ax, feature_map.size, linewidth=0.6 if feature_map.size > 10 else 1.5)
    return rendered(fig)


@figure('priors.png')
def draw_priors():
    """For each feature map the priors of one of its tiles; they may reach over the image's edge."""
    image, _ = photograph('astronaut')
    image = Image.blend(image, Image.new('RGB', image.size, paper), 0.4)  # pale, so that thin lines stand out
    fig, axes = panels(2, 3, 4.4)
    for ax, (name, priors), color in zip(axes, examples.priors_by_map().items(), series):
        size = len(priors)
        row, column = size // 2, size // 2 if size < 10 else int(0.7 * size)  # large priors in the middle
        show(ax, image, f'{name}: scale {feature_maps[name].scale:g}', (-0.02, -0.02, 1.08, 1.02))
        ax.add_patch(Rectangle((column / size, row / size), 1 / size, 1 / size, facecolor=paper, edgecolor=ink,
                               alpha=0.6))
        outline_all(ax, cxcy_to_xy(priors[row, column]), color, linewidth=1 if size > 10 else 1.5)
    return rendered(fig)


@figure('offsets.png')
def draw_offsets():
    """An object and a prior, and the object's four offsets from it. The grid has a tenth of the prior's size."""
    prior, thing = examples.offset_prior, examples.offset_object
    (p_x, p_y, p_w, p_h), (x, y, w, h) = prior.tolist(), thing.tolist()
    g_cx, g_cy, g_w, g_h = cxcy_to_gcxgcy(thing, prior).tolist()
    prior_xy, object_xy = cxcy_to_xy(prior).tolist(), cxcy_to_xy(thing).tolist()
    fig, [ax] = panels(1, 1, 3.7)
    ax.set(xlim=(0.34, 1), ylim=(0.71, 0.34), aspect='equal')
    ax.axis('off')
    for tenth in range(1, 10):
        line_x, line_y = (low + tenth / 10 * size for low, size in zip(prior_xy, (p_w, p_h)))
        ax.plot([line_x, line_x], prior_xy[1::2], color=prior_color, alpha=0.3, linewidth=0.8)
        ax.plot(prior_xy[::2], [line_y, line_y], color=prior_color, alpha=0.3, linewidth=0.8)
    outline(ax, prior_xy, prior_color, 'prior', 'bottom right', linewidth=2.5)
    outline(ax, object_xy, object_color, 'object', 'top left', linewidth=2.5)
    for (start, end) in (((p_x, p_y), (x, p_y)), ((x, p_y), (x, y))):
        ax.annotate('', end, start, zorder=4, arrowprops={
            'arrowstyle': '-|>', 'color': ink, 'linewidth': 2, 'shrinkA': 0, 'shrinkB': 0})
    ax.plot(p_x, p_y, 'o', color=prior_color, markersize=8, zorder=5)
    ax.plot(x, y, 'o', color=object_color, markersize=8, zorder=5)
    write_on_plate(ax, (p_x + x) / 2, p_y + 0.012, f'${g_cx:.1f}$', ink, ha='center')
    write_on_plate(ax, x + 0.012, (p_y + y) / 2, f'${g_cy:.1f}$', ink, va='center')
    for line, (center, size, color) in enumerate(((p_x, p_w, prior_color), (x, w, object_color))):
        at = 0.64 + 0.045 * line
        ax.plot([center - size / 2, center + size / 2], [at, at], '|-', color=color, markersize=12, markeredgewidth=2)
        write_on_plate(ax, center, at, f'{size:.2f}', color, ha='center', va='center')
    lines = (rf'$g_{{cx}} = \frac{{{x:.2f} - {p_x:.2f}}}{{{p_w:.2f} \,/\, 10}} = {g_cx:.1f}$',
             rf'$g_{{cy}} = \frac{{{y:.2f} - {p_y:.2f}}}{{{p_h:.2f} \,/\, 10}} = {g_cy:.1f}$',
             rf'$g_w = 5\,\ln\,\frac{{{w:.2f}}}{{{p_w:.2f}}} = {g_w:.2f}$',
             rf'$g_h = 5\,\ln\,\frac{{{h:.2f}}}{{{p_h:.2f}}} = {g_h:.0f}$')
    for row, line in enumerate(lines):
        ax.text(0.71, 0.39 + 0.09 * row, line, fontsize=17, va='center')
    return rendered(fig)


# ------------------------------------------------------------------------------- Matching, decoding and suppression

def around(boxes, image, ratio):
    """:param boxes: fractional boundary coordinates, (n, 4)
    :param image: a PIL image
    :param ratio: width to height, in pixels
    :return: the smallest window of this ratio around all of them, and a little more"""
    low, high = boxes[:, :2].min(dim=0).values, boxes[:, 2:].max(dim=0).values  # (2), (2)
    c_x, c_y, w, h = xy_to_cxcy(torch.cat([low, high])).tolist()
    w, h = w * image.width, h * image.height  # in pixels
    w, h = 1.04 * max(w, h * ratio), 1.04 * max(h, w / ratio)
    return cxcy_to_xy(torch.tensor([c_x, c_y, w / image.width, h / image.height])).tolist()


@figure('matching.png')
def draw_matching():
    """The priors that are to find each object of two photographs."""
    criterion = MultiBoxLoss(create_prior_boxes())
    priors_xy = cxcy_to_xy(criterion.priors_cxcy)  # (8732, 4)
    ratios = (1.05, 1.25)  # of the windows in each row, width to height
    fig, axes = panels(2, 3, 4.4, row_heights=[1 / ratio for ratio in ratios])
    for name, row, ratio in zip(('astronaut', 'coffee'), (axes[:3], axes[3:]), ratios):
        image, boxes = photograph(name)
        boxes = fractional(boxes, image)
        _, matched = criterion.match([boxes], [torch.arange(1, 4)])  # (1, 8732)
        for i, (ax, label, box) in enumerate(zip(row, objects[name], boxes), 1):
            positive = priors_xy[matched[0] == i]
            show(ax, image, f'{label}: {len(positive)} priors', around(positive, image, ratio))
            outline_all(ax, positive, prior_color, linewidth=1)
            outline(ax, box, object_color, linewidth=3)
    return rendered(fig)


@figure('decoding.png')
def draw_decoding():
    """From predictions to detections in a test image of the demo."""
    model, label_map = detector()
    image, normalized = open_image(test_set().images[decoded]), test_set()[decoded][0]
    colors = list(class_colors().values())
    with torch.no_grad():
        locs, scores = model(normalized.unsqueeze(0))  # (1, 8732, 4), (1, 8732, n_classes)
    boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy))[0]  # (8732, 4)
    scores = scores.softmax(dim=2)[0, :, 1:]  # (8732, n_classes - 1)
    labels = scores.argmax(dim=1)  # (8732)

    fig, axes = panels(2, 2, 6.2)
    show(axes[0], image, f'every hundredth of {len(boxes)} boxes')
    for box, label in zip(boxes[::100], labels[::100]):
        outline(axes[0], box, colors[label], linewidth=0.8)
    for ax, threshold in zip(axes[1:3], (0.1, min_score)):
        found, labels = (scores > threshold).nonzero(as_tuple=True)  # (n), (n)
        show(ax, image, f'{len(found)} scores above {threshold}')
        for box, label in zip(boxes[found], labels):
            outline(ax, box, colors[label], linewidth=0.8)
    detections = find_objects(image, min_score, 0.45, 200, model, label_map)
    show(axes[3], image, f'{len(detections)} after suppression')
    for label, score, box in detections:
        outline(axes[3], fractional(box, image), class_colors()[label], f'{score:.2f}', 'above left', linewidth=1.5)
    legend(fig, class_colors())
    return rendered(fig)


@figure('nms.png')
def draw_nms():
    """Non-maximum suppression of six detections, step by step."""
    image, _ = photograph('astronaut')
    labels, scores, boxes = examples.nms_labels, examples.nms_scores, examples.nms_boxes
    groups = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    max_overlap = 0.45
    kept = non_maximum_suppression(boxes, scores, groups, max_overlap).tolist()
    names = [f'{label} {score:.2f}' for label, score in zip(labels, scores)]
    of_class = {'person': series[0], 'rocket': series[2], 'helmet': series[4]}
    colors = [of_class[label] for label in labels]
    corners = ('bottom left', 'bottom left', 'bottom left', 'top right', 'below right', 'bottom right')

    fig, axes = panels(2, 2, 6.8)
    for ax, title in zip(axes, (f'{len(boxes)} detections', f'Best: {names[kept[0]]}', f'Next: {names[kept[1]]}',
                                f'{len(kept)} are left')):
        show(ax, image, title)
    for box, color, name, corner in zip(boxes, colors, names, corners):
        outline(axes[0], box, color, name, corner)
    left = set(range(len(boxes)))
    for ax, best in zip(axes[1:3], kept):
        overlaps = find_jaccard_overlap(boxes[best:best + 1], boxes)[0]  # (6)
        suppressed = {i for i in left if groups[i] == groups[best] and overlaps[i] > max_overlap} - {best}
        for i in left - {best}:
            if groups[i] != groups[best]:
                outline(ax, boxes[i], faint, linewidth=1)
            else:
                outline(ax, boxes[i], colors[i], f'overlap {overlaps[i]:.2f}', corners[i],
                        linestyle=dashes if i in suppressed else '-')
        outline(ax, boxes[best], colors[best], names[best], corners[best], linewidth=4)
        left -= suppressed
    for i in kept:
        outline(axes[3], boxes[i], colors[i], names[i], corners[i])
    return rendered(fig)


# ------------------------------------------------------------------------------------------------------- Transforms

class Extreme:
    """A source of random numbers for `photometric_distort` that asks for one distortion, as strong as it can be.

    :param which: of the four distortions
    :param end: 0 for the lowest strength, 1 for the highest"""

    def __init__(self, which, end):
        self.chances, self.end = [1. if i != which else 0. for i in range(4)], end

    def shuffle(self, distortions):
        """Leave the order as it is."""

    def random(self):
        """Decide for the next distortion: 0 to apply it, 1 to leave it out."""
        return self.chances.pop(0)

    def uniform(self, *bounds):
        """Draw the strength, and remember it."""
        self.strength = bounds[self.end]
        return self.strength


@figure('distort.png')
def draw_distort():
    """Brightness, contrast, saturation and hue at both extremes, and random distortions."""
    image, _ = photograph('chelsea')
    fig, axes = panels(3, 4, 3.9)
    for i, (ax, name) in enumerate(zip(axes, ('brightness', 'contrast', 'saturation', 'hue') * 2)):
        extreme = Extreme(i % 4, i // 4)
        distorted = photometric_distort(image, extreme)
        show(ax, distorted, f'{name} {extreme.strength:.2g}')
    for ax, seed in zip(axes[8:], (3, 6, 11, 19)):
        show(ax, photometric_distort(image, random.Random(seed)), 'random')
    return rendered(fig)


@figure('expand.png')
def draw_expand():
    """Three results of `expand_window`."""
    image, boxes = photograph('coffee')
    fig, axes = panels(1, 3, 2.4)
    for ax, seed in zip(axes, (1, 9, 0)):
        window = expand_window((0., 0., float(image.width), float(image.height)), random.Random(seed))
        drawn, found = draw_window(image, boxes, window)
        show(ax, drawn, f'{(window[2] - window[0]) / image.width:.1f} times as wide')
        outline_all(ax, found, object_color, linewidth=1.5)
    return rendered(fig)


def show_crop(ax, image, boxes, window, title=''):
    """Draw an image, pale outside of a window, and the objects' boxes and centers, faint if the crop leaves them out.

    :param boxes: boundary coordinates in pixels, (n_objects, 4)
    :param window: boundary coordinates in pixels, inside the image"""
    corners = [round(edge) for edge in window]
    pale = Image.blend(image, Image.new('RGB', image.size, paper), 0.6)
    pale.paste(image.crop(corners), corners[:2])
    show(ax, pale, title)
    outline(ax, fractional(window, image), ink, linewidth=1.5)
    for box, kept in zip(fractional(boxes, image), centers_inside(boxes, window)):
        color = object_color if kept else wrong_color
        outline(ax, box, color, linestyle='-' if kept else dashes)
        ax.plot(*xy_to_cxcy(box)[:2], 'o', color=color, markersize=6, zorder=4)


@figure('random_crop.png')
def draw_random_crop():
    """Windows that `crop_window` chose, and below what they show. An object stays if its center is inside."""
    image, boxes = photograph('astronaut')
    whole = (0., 0., float(image.width), float(image.height))
    fig, axes = panels(2, 4, 3.3)
    for above, below, seed in zip(axes[:4], axes[4:], (28, 38, 3, 36)):
        window = crop_window(whole, boxes, random.Random(seed))
        kept = boxes[centers_inside(boxes, window)]
        show_crop(above, image, boxes, window)
        drawn, found = draw_window(image, kept, window)
        show(below, drawn)
        outline_all(below, found, object_color)
    return rendered(fig)


@figure('transforms.png')
def draw_transforms():
    """A photograph on its way through the transform for training."""
    image, boxes = photograph('motorcycle')
    seed = 1524  # expands, crops and flips
    final, flipped = vary(image, boxes, random.Random(seed))
    rng = random.Random(seed)  # draws once more what `transform` has drawn
    rng.random()
    expanded = expand_window((0., 0., float(image.width), float(image.height)), rng)
    window = crop_window(expanded, boxes, rng)
    distorted = photometric_distort(image, copy.deepcopy(rng))
    resized, cropped = draw_window(image, boxes[centers_inside(boxes, window)], window,
                                   distort=partial(photometric_distort, rng=rng))

    fig, axes = panels(2, 3, 4.05, row_heights=(1, 1.48))
    for ax, drawn, title in zip(axes, (image, distorted), ('photograph', '1  distort')):
        show(ax, drawn, title)
        outline_all(ax, fractional(boxes, image), object_color)
    dims = 3 * image.width // 4, 3 * image.height // 4
    canvas, on_canvas = draw_window(distorted, boxes, expanded, dims)
    show(axes[2], canvas, '2  expand')
    outline_all(axes[2], on_canvas, object_color)
    scale = dims[0] / (expanded[2] - expanded[0])
    shown = torch.tensor(window) - torch.tensor(expanded[:2] * 2)  # the crop's window, from the canvas's corner
    show_crop(axes[3], canvas, on_canvas * torch.tensor(dims * 2), (shown * scale).tolist(), '3  crop')
    for ax, drawn, found, title in ((axes[4], resized, cropped, '4  resize'),
                                    (axes[5], final, flipped, '5  flip')):
        show(ax, drawn, title)
        outline_all(ax, found, object_color)
    return rendered(fig)


@figure('variations.png')
def draw_variations():
    """Random variations of one photograph."""
    image, boxes = photograph('motorcycle')
    fig, axes = panels(3, 4, 4.9)
    rng = random.Random(8)
    for ax in axes:
        varied, found = vary(image, boxes, rng)
        show(ax, varied)
        outline_all(ax, found, object_color)
    return rendered(fig)


# ------------------------------------------------------------------------------------------------------- Evaluation

# ---------------------------------------------------------------------------------------------------- Receptive fields

looked_at = ('conv4_3', 'conv7', 'conv8_2')  # maps
n_looked_at = 40  # test images
locality_path = os.path.join(images_folder, 'locality.csv')


def sensitivity(name):
    """Ask how much each pixel matters to a prediction of the demo's detector: by how much the largest class score
    changes if the pixel does, the mean over test images.

    :param name: a feature map
    :return: the share of each pixel, (300, 300), and the prior that the prediction is for, center-size coordinates (4):
        the first one of the map's middle tile"""
    model, _ = detector()
    of_map = examples.priors_by_map()[name]  # (size, size, priors per tile, 4)
    prior = of_map[len(of_map) // 2, len(of_map) // 2, 0]  # (4)
    index = (model.priors_cxcy == prior).all(dim=1).nonzero().item()
    shares = torch.zeros(300, 300)
    for i in range(n_looked_at):
        image = test_set()[i][0].unsqueeze(0).requires_grad_()  # (1, 3, 300, 300)
        _, scores = model(image)  # (1, 8732, n_classes)
        gradient, = torch.autograd.grad(scores[0, index, 1:].max(), image)  # (1, 3, 300, 300)
        shares += gradient[0].abs().sum(dim=0)  # (300, 300)
    return shares / shares.sum(), prior


def share_inside(shares, box):
    """:param shares: of each pixel, (300, 300)
    :param box: fractional boundary coordinates (4)
    :return: the share of the pixels inside the box, and the share of the image's area that the box covers"""
    x_min, y_min, x_max, y_max = (300 * box).clamp(0, 300).round().int().tolist()
    inside = shares[y_min:y_max, x_min:x_max]
    return inside.sum().item(), inside.numel() / shares.numel()


@figure('locality.png')
def draw_locality():
    """How much each pixel matters to a prediction for a prior in the middle: the darker, the more. In blue the prior,
    and thin a box twice as wide and high; in black the part of the image that the prediction can see at all."""
    heat = LinearSegmentedColormap.from_list('heat', (paper, prediction_color, ink))
    fig, axes = panels(1, 3, 3)
    rows = []
    for ax, name in zip(axes, looked_at):
        shares, prior = sensitivity(name)
        double, seen = prior.clone(), prior.clone()
        double[2:], seen[2:] = 2 * prior[2:], examples.receptive_fields()[name][1] / 300
        (in_prior, prior_area), (in_double, double_area) = (share_inside(shares, cxcy_to_xy(box))
                                                            for box in (prior, double))
        rows.append((name, *(round(share, 4) for share in (in_prior, prior_area, in_double, double_area))))
        ax.imshow(shares, cmap=heat, extent=(0, 1, 1, 0))
        ax.axis('off')
        ax.set_title(name)
        outline(ax, (0, 0, 1, 1), faint, linewidth=1)
        outline(ax, cxcy_to_xy(seen).clamp(0, 1), ink, linewidth=1)
        outline(ax, cxcy_to_xy(double), prior_color, linewidth=1)
        outline(ax, cxcy_to_xy(prior), prior_color)
        ax.text(0.5, 1.05, f'prior: {in_prior:.0%} on {prior_area:.0%}\ndouble: {in_double:.0%} on {double_area:.0%}',
                ha='center', va='top')
    write_table(locality_path, ('map', 'in_prior', 'prior_area', 'in_double', 'double_area'), rows)
    return rendered(fig)
