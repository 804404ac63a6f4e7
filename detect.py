"""
Detect objects in images, and draw them:

    python detect.py photo.jpg another.png folder_of_images

prints each detection's label, score and box in pixels, and saves an annotated copy of each image, animated ones
included. Edit the parameters below first.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageSequence
from tqdm import tqdm

from checkpoints import load_detector
from datasets import transform
from files import UserError, is_image, opened_image, run, to_rgb
from utils import make_color_map

img_path = 'photo.jpg'  # image or folder, if none is given on the command line
checkpoint = 'checkpoint_ssd300.pth'  # the weights, from train.py; None for torchvision's, trained on COCO's 80 classes
output_folder = 'detections'  # where the annotated copies go
min_score = 0.4  # how certain a detection must be to be drawn
max_overlap = 0.45  # of two boxes of a class that overlap by more, only the better is kept
top_k = 200  # draw at most this many detections in an image
batch_size = 16  # frames of an animated image that go through the network together
show = False  # also open a window with each annotated image

load_font = cache(ImageFont.load_default)  # each size once: it takes longer than the drawing


@cache
def kept_detector(checkpoint):
    """
    Load a detector once, and keep it for the images to come.

    :param checkpoint: see `checkpoints.load_detector`; if there is no such file, torchvision's weights are taken
    :return: SSD300 on the GPU, if there is one, and its dict of label -> index
    """
    if checkpoint is not None and not os.path.exists(checkpoint):
        print(f"There is no {checkpoint}: torchvision's weights, trained on COCO, are taken instead. For weights of "
              'your own, set checkpoint in detect.py, or train some with "python train.py".', file=sys.stderr)
        checkpoint = None
    model, label_map = load_detector(checkpoint)
    return model.to('cuda' if torch.cuda.is_available() else 'cpu').eval(), label_map


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # as in eval.py
def find_objects(images, min_score, max_overlap, top_k, model, label_map, suppress=None):
    """
    :param images: list of PIL images in RGB
    :param suppress: labels that are not wanted; the other parameters are those of `detect`
    :return: for each image a list of (label, score, box) by decreasing score; boxes are boundary coordinates in whole
        pixels
    """
    names = {index: label for label, index in label_map.items()}
    unwanted = {'background', *(suppress or ())}
    unknown = torch.empty(0, 4), torch.empty(0), torch.empty(0)  # boxes, labels, difficulties
    inputs = torch.stack([transform(image, *unknown, 'TEST')[0] for image in images])  # (N, 3, 300, 300)
    predictions = model(inputs.to(model.priors_cxcy.device))  # (N, 8732, 4), (N, 8732, n_classes)
    results = []
    for image, boxes, labels, scores in zip(images, *model.detect_objects(*predictions, min_score, max_overlap, top_k)):
        boxes = (boxes.cpu().clamp(0, 1) * torch.tensor([image.width, image.height] * 2)).round().int()  # (n, 4)
        detections = zip((names[label] for label in labels.tolist()), scores.tolist(), boxes.tolist())
        results.append([detection for detection in detections if detection[0] not in unwanted])
    return results


def draw_objects(image, detections, label_map):
    """
    :param image: a PIL image in RGB, which stays as it is
    :param detections: list of (label, score, box), see `find_objects`
    :param label_map: dict of label -> index
    :return: a copy of the image with boxes, labels and scores
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    colors = make_color_map(label_map)
    line_width = max(1, round(min(image.size) / 150))
    for label, score, (x_min, y_min, x_max, y_max) in reversed(detections):  # the best on top
        corners = (x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1))
        draw.rectangle(corners, outline=colors[label], width=line_width)
    for label, score, (x_min, y_min, x_max, y_max) in reversed(detections):
        text = f'{label} {score:.2f}'
        size = max(10, round(min(image.size) / 25))
        while True:  # a smaller font, if the text is wider than the image
            font = load_font(size)
            left, top, right, bottom = font.getbbox(text)
            width, height = right - left + 2 * line_width, bottom - top + 2 * line_width
            if width <= image.width or size <= 4:
                break
            size -= 1
        x = max(0, min(x_min, image.width - width))
        y = y_min - height if y_min >= height else max(0, min(y_min, image.height - height))  # above the box, or inside
        red, green, blue = ImageColor.getrgb(colors[label])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128  # how bright the color looks
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colors[label])
        draw.text((x + line_width - left, y + line_width - top), text, fill='white' if dark else 'black', font=font)
    return image


def detect(original_image, min_score, max_overlap, top_k, suppress=None, detector=None):
    """
    :param original_image: a PIL image of any mode, which stays as it is
    :param min_score: how certain a detection must be
    :param max_overlap: Jaccard overlap above which the lower score of two boxes of a class is suppressed
    :param top_k: find at most this many
    :param suppress: labels that are not wanted
    :param detector: (model, label_map), see `kept_detector`; None for the checkpoint at the top of this file
    :return: a copy of the image, in RGB and upright, with boxes, labels and scores
    """
    model, label_map = detector or kept_detector(checkpoint)
    image = to_rgb(original_image)
    [detections] = find_objects([image], min_score, max_overlap, top_k, model, label_map, suppress)
    return draw_objects(image, detections, label_map)


def list_images(paths):
    """
    :param paths: files and folders
    :return: the files, and in place of each folder the images in it, by name
    :raises UserError: a folder without images
    """
    files = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = [os.path.join(path, name) for name in sorted(os.listdir(path)) if is_image(name)]
        if not inside:
            raise UserError(f'{path} has no images in it: give an image, or a folder with images')
        files += inside
    return files


def read_frames(path):
    """
    :param path: an image file; errors as in `files.opened_image`
    :return: its frames as a list of PIL images in RGB, one unless it is an animated GIF, PNG or WebP; and what
        `Image.save` has to know to write them again
    """
    with opened_image(path) as image:
        if image.format not in ('GIF', 'PNG', 'WEBP') or image.n_frames == 1:
            return [to_rgb(image)], {}
        if image.n_frames * image.width * image.height > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f'{image.n_frames} frames of {image.width}x{image.height} are too many')
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(to_rgb(frame))
            durations.append(frame.info.get('duration', 100))
        loop = {'loop': image.info['loop']} if 'loop' in image.info else {}
    return frames, {'save_all': True, 'duration': durations, **loop}


def output_paths(paths):
    """
    :param paths: images
    :return: for each of them where its annotated copy goes, perhaps with ".png" added: neither is the path of another,
        nor of one of the images, be it on a system that tells A from a or on others
    """
    def both(path):
        """:return: the path, and with ".png" added, in the form in which they are told from others"""
        return {os.path.realpath(path + end).casefold() for end in ('', '.png')}

    taken, found = {os.path.realpath(path).casefold() for path in paths}, []
    for path in paths:
        stem, extension = os.path.splitext(os.path.basename(path))
        output_path, number = os.path.join(output_folder, stem + extension), 2
        while taken & both(output_path):
            output_path, number = os.path.join(output_folder, f'{stem}-{number}{extension}'), number + 1
        taken |= both(output_path)
        found.append(output_path)
    return found


def annotate(path, output_path):
    """
    Read an image, detect objects in it, and save it with these.

    :param path: an image
    :param output_path: where to save it; ".png" is added, if it is of a kind that would not show everything
    :return: where it was saved; and for each frame what `find_objects` found
    :raises UserError: see `files.opened_image`
    """
    frames, options = read_frames(path)
    model, label_map = kept_detector(checkpoint)
    detections = []
    for i in range(0, len(frames), batch_size):
        detections += find_objects(frames[i:i + batch_size], min_score, max_overlap, top_k, model, label_map)
    frames = [draw_objects(frame, found, label_map) for frame, found in zip(frames, detections)]
    kept = ('.gif', '.png', '.webp') if len(frames) > 1 else ('.jpg', '.jpeg', '.png')
    output_path += '' if os.path.splitext(output_path)[1].lower() in kept else '.png'
    os.makedirs(output_folder, exist_ok=True)
    frames[0].save(output_path, quality=95, append_images=frames[1:], **options)
    if show:
        frames[0].show()
    return output_path, detections


def main():
    """Detect in the images on the command line, with the parameters at the top of this file."""
    paths = list_images(sys.argv[1:] or [img_path])
    n_threads = min(8, len(paths), torch.get_num_threads())
    if any(map(os.path.isfile, paths)):
        kept_detector(checkpoint)  # before the threads begin: if it can't be loaded, that is said once
    # While one image is read, drawn or saved, others are in the network. Each thread computes with its share of the
    # processor's cores.
    torch.set_num_threads(torch.get_num_threads() // n_threads)
    torch.backends.cudnn.allow_tf32 = False  # in all threads: `find_objects` could put it back while another computes
    pool, n_failed = ThreadPoolExecutor(n_threads), 0
    try:
        annotated = [pool.submit(annotate, *both) for both in zip(paths, output_paths(paths))]
        for path, result in zip(tqdm(paths, unit='image', disable=True if len(paths) == 1 else None), annotated):
            try:
                output_path, detections = result.result()
            except UserError as error:
                if len(paths) == 1:
                    raise
                tqdm.write(f'Error: {error}', file=sys.stderr)
                n_failed += 1
                continue
            for i, found in enumerate(detections):
                frame = f', frame {i + 1} of {len(detections)}' if len(detections) > 1 else ''
                tqdm.write(f'{path}{frame}: {len(found)} objects, drawn in {output_path}')
                for label, score, box in found:
                    tqdm.write(f'  {label:20}{score:.2f}  x {box[0]}-{box[2]}, y {box[1]}-{box[3]}')
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, none begins anew
    if n_failed:
        raise UserError(f'{n_failed} of {len(paths)} files could not be read')


if __name__ == '__main__':
    run(main)
