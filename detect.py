"""Detect objects in images, and draw them:

    python detect.py photo.jpg another.png folder_of_images

prints each detection's label, score and box in pixels, and saves annotated copies. Edit the parameters below first.
"""
import os
import sys
from functools import lru_cache

import torch
from PIL import Image, ImageColor, ImageDraw

from checkpoints import load_detector
from datasets import to_input
from errors import UserError, check_numbers, run
from images import check_font, list_images, load_font, open_image, output_paths, to_rgb
from utils import make_color_map

img_path = 'photo.jpg'  # image or folder, if none is given on the command line
checkpoint = 'checkpoint_ssd300.pth'  # the weights, from train.py; None for torchvision's, trained on COCO's 80 classes
output_folder = 'detections'  # where the annotated copies go
min_score = 0.4  # a detection's score must be above this
max_overlap = 0.45  # of two boxes of a class with a larger Jaccard overlap, the one with the lower score is suppressed
top_k = 200  # keep at most this many detections in an image
font = None  # a .ttf, .otf or .ttc file for the labels; None for Pillow's own font, which has English letters
show = False  # also open a window with each annotated image


def detect(original_image, min_score, max_overlap=0.45, top_k=200, suppress=None, detector=None, font=None):
    """Detect objects in a PIL image of any mode. Returns a copy, in RGB and upright, with boxes, labels and scores.

    :param min_score: with max_overlap and top_k, see `SSD300.detect_objects`
    :param suppress: a label, or a list of labels, to leave out; one that the detector lacks raises UserError
    :param detector: (model, label_map), see `kept_detector`; None for the checkpoint at the top of this file
    :param font: a font file for the labels, see `images.load_font`; None for Pillow's own"""
    model, label_map = detector or kept_detector(checkpoint)
    image = to_rgb(original_image)
    detections = find_objects(image, min_score, max_overlap, top_k, model, label_map, suppress)
    return draw_objects(image, detections, label_map, font)


@torch.no_grad()
def find_objects(image, min_score, max_overlap, top_k, model, label_map, suppress=None):
    """:param image: a PIL image in RGB
    :param model: SSD300, and its `label_map`; the other parameters are those of `detect`
    :return: list of (label, score, box) by decreasing score; boxes are boundary coordinates in whole pixels"""
    names = list(label_map)
    suppress = [suppress] if suppress and isinstance(suppress, str) else (suppress or ())
    if unknown := sorted(set(suppress) - label_map.keys()):
        raise UserError(f'suppress: {unknown} are not among the labels of the detector: {names[1:]}')
    unwanted = {'background', *suppress}  # 'background' is the label of the placeholder for no detection
    tensor = to_input(image.resize((300, 300), Image.Resampling.BILINEAR))  # (3, 300, 300)
    predictions = model(tensor.unsqueeze(0).to(model.priors_cxcy.device))  # (1, 8732, 4), (1, 8732, n_classes)
    [boxes], [labels], [scores] = model.detect_objects(*predictions, min_score, max_overlap, top_k)
    boxes = (boxes.cpu().clamp(0, 1) * torch.tensor([image.width, image.height] * 2)).round().int()  # (n, 4)
    detections = zip([names[index] for index in labels.tolist()], scores.tolist(), boxes.tolist())
    return [detection for detection in detections if detection[0] not in unwanted]


def draw_objects(image, detections, label_map, font=None):
    """:param image: a PIL image in RGB, which stays as it is
    :param detections: list of (label, score, box) by decreasing score, see `find_objects`
    :param label_map: dict of label -> index, which chooses the colors
    :param font: see `detect`
    :return: a copy of the image with boxes, labels and scores"""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    colors = make_color_map(label_map)
    line_width = max(1, round(min(image.size) / 150))
    font = load_font(font, max(10, round(min(image.size) / 25)))
    for label, score, (x_min, y_min, x_max, y_max) in reversed(detections):  # the best on top
        color, text = colors[label], f'{label} {score:.2f}'
        draw.rectangle((x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)), outline=color, width=line_width)
        left, top, right, bottom = font.getbbox(text)  # where the letters are if drawn at (0, 0): top is not 0
        width, height = right - left + 2 * line_width, bottom - top + 2 * line_width
        x, y = max(0, min(x_min, image.width - width)), max(0, y_min - height)  # above the box, if there is room
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
        text_color = 'white' if ImageColor.getcolor(color, 'L') < 128 else 'black'  # on a dark or a bright color
        draw.text((x + line_width - left, y + line_width - top), text, fill=text_color, font=font)
    return image


def kept_detector(checkpoint):
    """SSD300, on the GPU if there is one, and its dict of label -> index; loaded only once, unless the file changes."""
    exists = checkpoint is not None and os.path.exists(checkpoint)
    return load_once(checkpoint, os.path.getmtime(checkpoint) if exists else None)


@lru_cache(maxsize=3)
def load_once(checkpoint, changed):
    """What `kept_detector` returns, loaded. `changed` is when the file was last changed, or None if it is missing."""
    if checkpoint == 'checkpoint_ssd300.pth' and changed is None:  # any other missing path is an error
        print(f"There is no {checkpoint} here: using torchvision's weights, trained on COCO, instead. For weights of "
              'your own, set checkpoint in detect.py, or train some with "python train.py".', file=sys.stderr)
        checkpoint = None
    model, label_map = load_detector(checkpoint)
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval(), label_map


def main():
    """Detect in the images on the command line, with the parameters at the top of this file."""
    check_numbers('detect.py', 0, float, min_score=min_score, max_overlap=max_overlap)
    check_numbers('detect.py', 0, top_k=top_k)
    torch.backends.cudnn.allow_tf32 = False  # as in eval.py
    arguments = sys.argv[1:] if '__file__' in globals() else []  # in a notebook, they are its own
    paths, n_failed = list_images(arguments or [img_path]), 0
    for path, output_path in zip(paths, output_paths(paths, output_folder)):
        try:
            image = open_image(path, 'check the path' if arguments else 'name an image: python detect.py IMAGE')
        except UserError as error:
            if len(paths) == 1:
                raise
            print(f'Error: {error}', file=sys.stderr)
            n_failed += 1
            continue
        model, label_map = kept_detector(checkpoint)  # now that there is an image for it
        check_font('detect.py', font, tuple(label_map))
        detections = find_objects(image, min_score, max_overlap, top_k, model, label_map)
        annotated = draw_objects(image, detections, label_map, font)
        os.makedirs(output_folder or '.', exist_ok=True)
        annotated.save(output_path, quality=95)  # PNG ignores it
        if show:
            annotated.show()
        print(f'{path}: {len(detections)} objects, drawn in {output_path}')
        for label, score, (x_min, y_min, x_max, y_max) in detections:
            print(f'  {label:20}{score:.2f}  x {x_min}-{x_max}, y {y_min}-{y_max}')
    if n_failed:
        raise UserError(f'{n_failed} of {len(paths)} files could not be read')


if __name__ == '__main__':
    run(main, takes_arguments=True)
