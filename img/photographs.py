"""The tutorial's figures with photographs in them, and those of the demo's detector at work, see trained.py."""
import copy
import json
import os
import random
from functools import partial

import examples
import torch
from drawing import arrow, dashes, figure, grid, legend, outline, panels, rendered, series, show, width, write
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patheffects import withStroke
from PIL import Image
from skimage import data
from trained import detector, images_folder, snapshots_path, test_set, write_table

import utils
from datasets import centers_inside, crop_window, draw_window, expand_window, photometric_distort, transform
from detect import find_objects, min_score
from images import open_image
from model import MultiBoxLoss
from utils import cxcy_to_xy, xy_to_cxcy

# The objects of scikit-image's photographs, in boundary coordinates in pixels
objects = {'astronaut': {'person': (20, 12, 364, 512), 'rocket': (355, 0, 472, 290), 'helmet': (277, 344, 512, 512)},
           'coffee': {'cup': (172, 18, 409, 308), 'saucer': (77, 68, 480, 388), 'spoon': (326, 66, 425, 327)},
           'motorcycle': {'motorcycle': (93, 45, 684, 452), 'bench': (41, 106, 283, 310)},
           'chelsea': {}}
bright = ('#56c8ff', '#ffc020', '#ff4f8b')  # a color for each of the demo's classes, on dark images


def photograph(name):
    """One of `objects`: a PIL image in RGB, and boxes in boundary coordinates in pixels, (n_objects, 4)."""
    pixels = data.stereo_motorcycle()[0] if name == 'motorcycle' else getattr(data, name)()
    return Image.fromarray(pixels), torch.tensor(list(objects[name].values()), dtype=torch.float32).view(-1, 4)


def fractional(boxes, image):
    """Turn boundary coordinates in pixels of a PIL image, (n, 4), into fractional ones."""
    return torch.as_tensor(boxes) / torch.tensor(image.size * 2)


def class_colors():
    """:return: dict of label -> color for the demo's classes"""
    _, label_map = detector()
    return dict(zip([label for label in label_map if label != 'background'], bright))


def side_by_side(paths, below=0.):
    """A figure with images in a row, all equally high, and `below` inches for a legend; its axes, and the images."""
    images = [open_image(path) for path in paths]
    ratios = [image.width / image.height for image in images]
    fig, axes = panels(1, len(images), width / sum(ratios) + below, width_ratios=ratios)
    for ax, image in zip(axes, images):
        show(ax, image)
    return fig, axes, images


# ------------------------------------------------------------------------------------------------------- Detections

found_in = (60, 67, 14)  # test images with many objects that are not close together
watched = (2, 3, 6, 7, 10, 11)  # of those that `learn` watched
# What a detector, trained on VOC 2008, found in photographs. `photographs` has for each figure a list of {"file": path
# from this folder, "source": whose photograph it is, "detections": [[label, score, [x_min, y_min, x_max, y_max] in
# pixels], ...]}. `decoded` is of an earlier detector and one photograph, with boxes in fractions: "sample" has every
# hundredth of the decoded boxes, with the label of its best class except background; "candidates", all with a score
# above 0.1.
with open(os.path.join(images_folder, 'photographs.json'), encoding='utf-8') as file:
    photographs, decoded = json.load(file).values()


def draw_photographs(name):
    """A row of photographs with what a detector found in them."""
    found = photographs[name]
    labels = sorted({label for of_image in found for label, _, _ in of_image['detections']})
    fig, axes, images = side_by_side([os.path.join(images_folder, of_image['file']) for of_image in found])
    for ax, image, of_image in zip(axes, images, found):
        for i, (label, score, box) in enumerate(of_image['detections']):
            at = 'bottom right' if i % 2 else 'above left' if box[1] > 40 else 'top left'
            outline(ax, fractional(box, image), series[labels.index(label) % len(series)], f'{label} {score:.2f}', at)
    return rendered(fig)


for name in photographs:
    figure(name)(partial(draw_photographs, name))


@figure('detections.png')
def draw_detections():
    """What the demo's detector finds in three of the test images, as detect.py does."""
    fig, axes, images = side_by_side([test_set().images[i] for i in found_in], below=0.36)
    for ax, image in zip(axes, images):
        for label, score, box_xy in find_objects(image, min_score, 0.45, 200, *detector()):
            box_xy = fractional(box_xy, image)
            outline(ax, box_xy, class_colors()[label], linewidth=1.5)
            c_x, c_y, w, h = xy_to_cxcy(box_xy).tolist()
            write(ax, c_x, c_y if w > 0.2 else c_y + h / 2 + 0.045, f'{score:.2f}', color='white', in_layout=False,
                  zorder=5, path_effects=[withStroke(linewidth=2, foreground='ink')])  # below, if the box is small
    legend(fig, class_colors())
    return rendered(fig)


@figure('learning.gif')
def draw_learning():
    """What the detector finds in six test images after more and more steps: of the best 50 boxes in each image
    those above `min_score` in their class's color, and what else is among the best 5 in white."""
    colors = list(class_colors().values())
    frames = []
    for iteration, (boxes, labels, scores) in torch.load(snapshots_path, weights_only=True).items():
        fig, axes = panels(2, 3, 5.2)
        fig.set_dpi(110)
        fig.suptitle(f'{iteration} steps', fontsize=22)
        for ax, i in zip(axes, watched):
            show(ax, open_image(test_set().images[i]))
            for rank, (box, label, score) in enumerate(zip(boxes[i].clamp(0, 1), labels[i], scores[i])):
                if score > min_score and rank < 50:
                    outline(ax, box, colors[label - 1])
                elif rank < 5:
                    outline(ax, box, 'white', linewidth=0.8, zorder=2)
        legend(fig, class_colors() | {f'best five below {min_score}': 'white'}, facecolor='ink', framealpha=1,
               labelcolor='white', frameon=True)
        frames.append((rendered(fig), 1200))
    return [*frames[:-1], (frames[-1][0], 4000)]


# ------------------------------------------------------------------------------------------- Coordinates and priors

@figure('coordinates.png')
def draw_coordinates():
    """A box in boundary and in center-size coordinates, in pixels and in fractions of the image's size."""
    image, boxes = photograph('coffee')
    box = fractional(boxes[0], image)
    (x_min, y_min, x_max, y_max), (c_x, c_y, _, _) = box.tolist(), xy_to_cxcy(box).tolist()
    fig, (boundary, first, center_size, second) = panels(2, 2, 4.7)
    for ax, side, title, names, in_pixels in (
            (boundary, first, 'boundary', ('x_min', 'y_min', 'x_max', 'y_max'), boxes[0]),
            (center_size, second, 'center-size', ('c_x', 'c_y', 'w', 'h'), xy_to_cxcy(boxes[0]))):
        show(ax, image)
        outline(ax, box, 'object', linewidth=2.5)
        side.axis('off')
        side.set(xlim=(0, 1), ylim=(5.3, -0.7))
        for x, text, weight, color in ((0.06, title, 'bold', 'ink'), (0.68, 'pixels', 'normal', 'faint'),
                                       (1, 'fraction', 'normal', 'faint')):
            side.text(x, 0, text, weight=weight, color=color, ha='left' if x < 0.1 else 'right')
        for row, (name, pixels, fraction) in enumerate(zip(names, in_pixels, fractional(in_pixels, image)), 1):
            side.text(0.06, row, name)
            side.text(0.68, row, f'{pixels:g}', ha='right')
            side.text(1, row, f'{fraction:.3f}', ha='right')
    boundary.plot([x_min, x_max], [y_min, y_max], 'o', color='object', markersize=8, zorder=4)
    write(boundary, x_min - 0.04, y_min, 'x_min\ny_min', 'object', ha='right', va='top')
    write(boundary, x_max + 0.04, y_max, 'x_max\ny_max', 'object', ha='left', va='bottom')
    center_size.plot(c_x, c_y, 'o', color='object', markersize=8, zorder=4)
    write(center_size, c_x, c_y - 0.06, 'c_x, c_y', 'object', va='bottom')
    arrow(center_size, (x_min, 0.87), (x_max, 0.87), 'white', '<->')
    arrow(center_size, (0.78, y_min), (0.78, y_max), 'white', '<->')
    write(center_size, c_x, 0.87, 'w', 'object')
    write(center_size, 0.78, c_y, 'h', 'object')
    return rendered(fig)


@figure('feature_maps.png')
def draw_feature_maps():
    """The tiles of the six feature maps over the image that the network sees."""
    image, _ = photograph('astronaut')
    fig, axes = panels(2, 3, 4.8)
    for ax, (name, feature_map) in zip(axes, utils.feature_maps.items()):
        show(ax, image, f'{name}: {feature_map.size} × {feature_map.size}')
        grid(ax, 0, 0, 1, feature_map.size, 'white', linewidth=0.6 if feature_map.size > 10 else 1.5)
    return rendered(fig)


@figure('priors.png')
def draw_priors():
    """For each feature map the priors of one of its tiles; they may reach over the image's edge."""
    image, _ = photograph('astronaut')
    image = Image.blend(image, Image.new('RGB', image.size, 'white'), 0.4)  # pale, so that thin lines stand out
    fig, axes = panels(2, 3, 4.4)
    for ax, (name, priors), color in zip(axes, examples.priors_by_map().items(), series):
        size = utils.feature_maps[name].size
        row, column = size // 2, size // 2 if size < 10 else int(0.7 * size)  # large priors in the middle
        show(ax, image, f'{name}: scale {utils.feature_maps[name].scale:g}', (-0.02, -0.02, 1.08, 1.02))
        tile = torch.tensor([column, row, column + 1, row + 1]) / size  # (4)
        outline(ax, tile, 'ink', facecolor='white', alpha=0.6, linewidth=1, zorder=1)
        outline(ax, cxcy_to_xy(priors[size * row + column]), color, linewidth=1 if size > 10 else 1.5)
    return rendered(fig)


@figure('offsets.png')
def draw_offsets():
    """An object and a prior, and the object's four offsets from it. The grid has a tenth of the prior's size."""
    prior, thing = examples.offset_prior, examples.offset_object
    (p_x, p_y, p_w, p_h), (x, y, w, h) = prior.tolist(), thing.tolist()
    g_cx, g_cy, g_w, g_h = utils.cxcy_to_gcxgcy(thing, prior).tolist()
    fig, [ax] = panels(1, 1, 3.7)
    ax.set(xlim=(0.34, 1), ylim=(0.71, 0.34), aspect='equal')
    ax.axis('off')
    grid(ax, p_x - p_w / 2, p_y - p_h / 2, p_w, 10, ('prior', 0.3), linewidth=0.8)
    outline(ax, cxcy_to_xy(prior), 'prior', 'prior', 'bottom right', linewidth=2.5)
    outline(ax, cxcy_to_xy(thing), 'object', 'object', 'top left', linewidth=2.5)
    arrow(ax, (p_x, p_y), (x, p_y))
    arrow(ax, (x, p_y), (x, y))
    ax.plot(p_x, p_y, 'o', color='prior', markersize=8, zorder=5)
    ax.plot(x, y, 'o', color='object', markersize=8, zorder=5)
    write(ax, (p_x + x) / 2, p_y + 0.012, f'${g_cx:.1f}$', 'ink', va='top')
    write(ax, x + 0.012, (p_y + y) / 2, f'${g_cy:.1f}$', 'ink', ha='left')
    for at, center, size, color in ((0.64, p_x, p_w, 'prior'), (0.685, x, w, 'object')):
        ax.plot([center - size / 2, center + size / 2], [at, at], '|-', color=color, markersize=12, markeredgewidth=2)
        write(ax, center, at, f'{size:.2f}', color)
    lines = (rf'$g_{{cx}} = \frac{{{x:.2f} - {p_x:.2f}}}{{{p_w:.2f} \,/\, 10}} = {g_cx:.1f}$',
             rf'$g_{{cy}} = \frac{{{y:.2f} - {p_y:.2f}}}{{{p_h:.2f} \,/\, 10}} = {g_cy:.1f}$',
             rf'$g_w = 5\,\ln\,\frac{{{w:.2f}}}{{{p_w:.2f}}} = {g_w:.2f}$',
             rf'$g_h = 5\,\ln\,\frac{{{h:.2f}}}{{{p_h:.2f}}} = {g_h:.0f}$')
    for row, line in enumerate(lines):
        ax.text(0.71, 0.39 + 0.09 * row, line, fontsize=17, va='center')
    return rendered(fig)


# ------------------------------------------------------------------------------- Matching, decoding and suppression

def around(boxes, image, ratio):
    """The smallest window of this ratio, width to height in pixels of the PIL image, around all boxes, (n, 4), and a
    little more. Boxes and window are in fractional boundary coordinates."""
    low, high = boxes[:, :2].min(dim=0).values, boxes[:, 2:].max(dim=0).values  # (2), (2)
    c_x, c_y, w, h = xy_to_cxcy(torch.cat([low, high])).tolist()
    w, h = w * image.width, h * image.height  # in pixels
    w, h = 1.04 * max(w, h * ratio), 1.04 * max(h, w / ratio)
    return cxcy_to_xy(torch.tensor([c_x, c_y, w / image.width, h / image.height])).tolist()


@figure('matching.png')
def draw_matching():
    """The priors that are to find each object of two photographs."""
    criterion = MultiBoxLoss(utils.create_prior_boxes())
    priors_xy = cxcy_to_xy(criterion.priors_cxcy)  # (8732, 4)
    ratios = (1.05, 1.25)  # of the windows in each row, width to height
    fig, axes = panels(2, 3, 4.4, height_ratios=[1 / ratio for ratio in ratios])
    for name, row, ratio in zip(('astronaut', 'coffee'), (axes[:3], axes[3:]), ratios):
        image, boxes = photograph(name)
        boxes = fractional(boxes, image)
        _, matched = criterion.match([boxes], [torch.arange(1, 4)])  # (1, 8732)
        for i, (ax, label, box) in enumerate(zip(row, objects[name], boxes), 1):
            positive = priors_xy[matched[0] == i]
            show(ax, image, f'{label}: {len(positive)} priors', around(positive, image, ratio))
            outline(ax, positive, 'prior', linewidth=1)
            outline(ax, box, 'object', linewidth=3)
    return rendered(fig)


@figure('decoding.png')
def draw_decoding():
    """From predictions to detections in a photograph: persons in color, other classes gray."""
    image = open_image(os.path.join(images_folder, decoded['file']))
    high = [candidate for candidate in decoded['candidates'] if candidate[1] > min_score]
    labels, scores, boxes = zip(*high)
    groups = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    kept = utils.non_maximum_suppression(torch.tensor(boxes), torch.tensor(scores), groups, 0.45).tolist()
    fig, axes = panels(2, 2, 3.5)
    for ax, title, found in ((axes[0], 'every hundredth of 8732 boxes', decoded['sample']),
                             (axes[1], f'{len(decoded["candidates"])} scores above 0.1', decoded['candidates']),
                             (axes[2], f'{len(high)} scores above {min_score}', high)):
        show(ax, image, title)
        for label, _, box in found:
            outline(ax, box, 'prediction' if label == 'person' else 'faint', linewidth=0.8)
    show(axes[3], image, f'{len(kept)} after suppression')
    for i in kept:
        outline(axes[3], boxes[i], 'prediction', f'{scores[i]:.2f}', 'above left', linewidth=1.5)
    return rendered(fig)


@figure('nms.png')
def draw_nms():
    """Non-maximum suppression of six detections, step by step."""
    image, boxes = open_image(os.path.join(images_folder, decoded['file'])), examples.nms_boxes
    names = [f'{score:.2f}' for score in examples.nms_scores]
    kept = utils.non_maximum_suppression(boxes, examples.nms_scores, torch.zeros(len(boxes)), 0.45).tolist()
    corners = ('above left', 'above left', 'bottom left', 'bottom left', 'above left', 'bottom right')
    fig, axes = panels(2, 2, 3.7)
    n_high = sum(score > min_score for _, score, _ in decoded['candidates'])
    for ax, title in zip(axes, (f'{len(boxes)} of the {n_high} boxes', f'Best: {names[kept[0]]}',
                                f'Next: {names[kept[1]]}', f'{len(kept)} are left')):
        show(ax, image, title)
    for ax, drawn in ((axes[0], range(len(boxes))), (axes[3], kept)):
        for i in drawn:
            outline(ax, boxes[i], series[i], names[i], corners[i])
    left = set(range(len(boxes)))
    for ax, best in zip(axes[1:3], kept):
        overlaps = utils.find_jaccard_overlap(boxes[best:best + 1], boxes)[0]  # (6)
        suppressed = {i for i in left if overlaps[i] > 0.45} - {best}
        for i in left - {best}:
            if i in suppressed:
                outline(ax, boxes[i], series[i], f'overlap {overlaps[i]:.2f}', corners[i], linestyle=dashes)
            else:
                outline(ax, boxes[i], 'faint', linewidth=1)
        outline(ax, boxes[best], series[best], names[best], corners[best], linewidth=4)
        left -= suppressed | {best}
    return rendered(fig)


# ------------------------------------------------------------------------------------------------------- Transforms

def show_crop(ax, image, boxes, window, title=''):
    """Draw an image, pale outside of a window inside it, and the objects' boxes, (n_objects, 4), and centers, faint if
    the crop leaves them out. Window and boxes are boundary coordinates in pixels."""
    corners = [round(edge) for edge in window]
    pale = Image.blend(image, Image.new('RGB', image.size, 'white'), 0.6)
    pale.paste(image.crop(corners), corners[:2])
    show(ax, pale, title)
    outline(ax, fractional(window, image), 'ink', linewidth=1.5)
    for box, kept in zip(fractional(boxes, image), centers_inside(boxes, window)):
        color = 'object' if kept else 'wrong'
        outline(ax, box, color, linestyle='-' if kept else dashes)
        ax.plot(*xy_to_cxcy(box)[:2], 'o', color=color, markersize=6, zorder=4)


def vary(image, boxes, rng):
    """What `transform` makes, for training, of a PIL image and boxes in pixels, (n_objects, 4), with this source of
    random numbers: a PIL image, 300x300, and fractional boxes, (n, 4)."""
    normalized, boxes, _, _ = transform(image, boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)), 'TRAIN', rng)
    pixels = normalized.permute(1, 2, 0) * torch.tensor(utils.std) + torch.tensor(utils.mean)  # (300, 300, 3)
    return Image.fromarray((pixels * 255).round().byte().numpy()), boxes


@figure('transforms.png')
def draw_transforms():
    """A photograph on its way through the transform for training."""
    image, boxes = photograph('motorcycle')
    seed = 1524  # expands, crops and flips
    rng = random.Random(seed)  # draws once more what `transform` draws
    rng.random()
    expanded = expand_window((0., 0., *map(float, image.size)), rng)
    window = crop_window(expanded, boxes, rng)
    distorted = photometric_distort(image, copy.deepcopy(rng))
    resized, cropped = draw_window(image, boxes[centers_inside(boxes, window)], window,
                                   distort=partial(photometric_distort, rng=rng))
    dims = 3 * image.width // 4, 3 * image.height // 4
    canvas, on_canvas = draw_window(distorted, boxes, expanded, dims)
    on_image = fractional(boxes, image)

    fig, axes = panels(2, 3, 4.05, height_ratios=(1, 1.48))
    for i, drawn, found, title in ((0, image, on_image, 'photograph'), (1, distorted, on_image, '1  distort colors'),
                                   (2, canvas, on_canvas, '2  zoom out'), (4, resized, cropped, '4  resize'),
                                   (5, *vary(image, boxes, random.Random(seed)), '5  mirror')):
        show(axes[i], drawn, title)
        outline(axes[i], found, 'object')
    scale = dims[0] / (expanded[2] - expanded[0])
    shown = torch.tensor(window) - torch.tensor(expanded[:2] * 2)  # the crop's window, from the canvas's corner
    show_crop(axes[3], canvas, on_canvas * torch.tensor(dims * 2), (shown * scale).tolist(), '3  zoom in')
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
        outline(ax, found, 'object')
    return rendered(fig)


# ---------------------------------------------------------------------------------------------------- Receptive fields

n_looked_at = 40  # test images


def sensitivity(prior):
    """Ask how much each pixel matters to what the demo's detector predicts for a prior, center-size coordinates (4): by
    how much the largest class score changes if the pixel does, the mean over test images.

    :return: the share of each pixel, (300, 300)"""
    model, _ = detector()
    index = (model.priors_cxcy == prior).all(dim=1).nonzero().item()
    shares = torch.zeros(300, 300)
    for i in range(n_looked_at):
        image = test_set()[i][0].unsqueeze(0).requires_grad_()  # (1, 3, 300, 300)
        _, scores = model(image)  # (1, 8732, n_classes)
        gradient, = torch.autograd.grad(scores[0, index, 1:].max(), image)  # (1, 3, 300, 300)
        shares += gradient[0].abs().sum(dim=0)  # (300, 300)
    return shares / shares.sum()


@figure('locality.png')
def draw_locality():
    """How much each pixel matters to a prediction for a prior in the middle: the darker, the more. In blue the prior;
    in black the part of the image that the prediction can see at all."""
    heat = LinearSegmentedColormap.from_list('heat', ('white', 'prediction', 'ink'))
    fig, axes = panels(1, 3, 3)
    rows = []
    for ax, name in zip(axes, ('conv4_3', 'conv7', 'conv8_2')):
        size = utils.feature_maps[name].size
        prior = examples.priors_by_map()[name][size * (size // 2) + size // 2, 0]  # (4), of the middle tile
        seen = torch.cat([prior[:2], torch.tensor([examples.receptive_fields()[name][1] / 300] * 2)])  # (4)
        shares = sensitivity(prior)
        x_min, y_min, x_max, y_max = (300 * cxcy_to_xy(prior)).round().int().tolist()
        inside = shares[y_min:y_max, x_min:x_max]
        in_prior, area = inside.sum().item(), inside.numel() / shares.numel()
        rows.append((name, round(in_prior, 4), round(area, 4)))
        ax.imshow(shares, cmap=heat, extent=(0, 1, 1, 0))
        ax.axis('off')
        ax.set_title(name)
        outline(ax, (0, 0, 1, 1), 'faint', linewidth=1)
        outline(ax, cxcy_to_xy(seen).clamp(0, 1), 'ink', linewidth=1)
        outline(ax, cxcy_to_xy(prior), 'prior')
        write(ax, 0.5, 1.05, f'{in_prior:.0%} of the weight\non {area:.0%} of the image', va='top')
    write_table('locality.csv', ('map', 'in_prior', 'prior_area'), rows)
    return rendered(fig)
