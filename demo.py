"""
The whole pipeline, without a GPU or a download:

    python demo.py

draws a small data set in Pascal VOC's layout, lists it, trains SSD300 on it from random weights, measures the mean
average precision on images it did not train on, and saves a sheet of detections.
"""
import math
import os
import random
import time
import xml.etree.ElementTree as ET

import torch
from PIL import Image, ImageColor, ImageDraw
from torch.utils.data import DataLoader

from checkpoints import load_detector
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset, collate_fn
from detect import detect
from eval import evaluate
from files import open_image, run
from model import SSD300
from train import fit, make_optimizer, standardize, weight_decay

folder = 'demo'  # where everything goes
shapes = ('circle', 'square', 'triangle')  # the classes
sides = (28, 200)  # of the smallest and the largest shapes, in pixels
n_train = 300  # images to train on
n_test = 80  # other images, to measure on
thin = 4  # every thin-th channel is kept: a network that two CPU cores train in minutes, see README.md
epochs = 5  # passes over the training images
batch_size = 2  # images in a batch: with few images, many small steps teach more than few large ones
lr = 1e-3  # peak learning rate of AdamW, which needs far fewer steps here than 'sgd'


def random_color(rng, hue=(0, 360), saturation=(0, 50), lightness=(5, 40)):
    """
    :param rng: a random.Random
    :param hue: lower and upper bound, in degrees
    :param saturation: lower and upper bound, from 0 to 100
    :param lightness: lower and upper bound, from 0 to 100
    :return: an RGB color; dark, unless asked otherwise
    """
    return ImageColor.getrgb(f'hsl({rng.randint(*hue) % 360}, {rng.randint(*saturation)}%, {rng.randint(*lightness)}%)')


def draw_background(size, rng):
    """
    :param size: width and height in pixels
    :param rng: a random.Random
    :return: a PIL image: dark patches, grain, and many strokes, which are not objects
    """
    patches = Image.new('RGB', (rng.randint(2, 6), rng.randint(2, 6)))
    patches.putdata([random_color(rng) for _ in range(patches.width * patches.height)])
    image = patches.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(40, 120)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.line((x, y, x + rng.randint(-30, 30), y + rng.randint(-30, 30)), random_color(rng), rng.randint(1, 4))
    grain = Image.frombytes('L', (size[0], size[1]), rng.randbytes(size[0] * size[1])).convert('RGB')
    return Image.blend(image, grain, rng.uniform(0, 0.2))


def draw_shape(image, shape, box, difficult, rng):
    """
    :param image: a PIL image in RGB, which is changed in place
    :param shape: one of `shapes`
    :param box: boundary coordinates in pixels, the last pixels included
    :param difficult: draw it faintly
    :param rng: a random.Random, for the color
    """
    x_min, y_min, x_max, y_max = box
    mask = Image.new('L', image.size)
    fill = 50 if difficult else 255
    if shape == 'circle':
        ImageDraw.Draw(mask).ellipse(box, fill)
    elif shape == 'square':
        ImageDraw.Draw(mask).rectangle(box, fill)
    else:
        ImageDraw.Draw(mask).polygon([((x_min + x_max) // 2, y_min), (x_max, y_max), (x_min, y_max)], fill)
    image.paste(random_color(rng, saturation=(60, 100), lightness=(60, 80)), mask=mask)


def draw_image(rng):
    """
    :param rng: a random.Random
    :return: a PIL image with up to eight shapes, and a list of (shape, box, difficult) for each; boxes are boundary
        coordinates in pixels from 0, the last pixels included
    """
    image = draw_background((rng.randint(280, 360), rng.randint(260, 340)), rng)
    objects = []
    n_objects = rng.randint(3, 8)
    for _ in range(60):  # tries
        width = round(math.exp(rng.uniform(*map(math.log, sides))))  # as many from 28 to 56 as from 56 to 112
        height = round(width * rng.uniform(0.8, 1.25))
        x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        box = (x, y, x + width - 1, y + height - 1)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for _, b, _ in objects):
            continue  # shapes do not cover each other
        shape, difficult = rng.choice(shapes), rng.random() < 0.04
        draw_shape(image, shape, box, difficult, rng)
        objects.append((shape, box, difficult))
        if len(objects) == n_objects:
            break
    return image, objects


def draw_dataset(folder, n_train, n_test, seed=0):
    """
    Draw images, with annotations and splits in Pascal VOC's layout.

    :param folder: where JPEGImages, Annotations and ImageSets/Main go
    :param n_train: number of images in the split trainval
    :param n_test: number of images in the split test
    :param seed: the same seed draws the same images
    """
    for subfolder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        os.makedirs(os.path.join(folder, subfolder), exist_ok=True)
    rng = random.Random(seed)
    for split, n in (('trainval', n_train), ('test', n_test)):
        names = [f'{split}_{i:04}' for i in range(n)]
        with open(os.path.join(folder, 'ImageSets', 'Main', split + '.txt'), 'w') as file:
            file.write('\n'.join(names) + '\n')
        for name in names:
            image, objects = draw_image(rng)
            image.save(os.path.join(folder, 'JPEGImages', name + '.jpg'), quality=90)
            root = ET.Element('annotation')
            ET.SubElement(root, 'filename').text = name + '.jpg'
            size = ET.SubElement(root, 'size')
            ET.SubElement(size, 'width').text, ET.SubElement(size, 'height').text = map(str, image.size)
            for shape, box, difficult in objects:
                node = ET.SubElement(root, 'object')
                ET.SubElement(node, 'name').text = shape
                ET.SubElement(node, 'difficult').text = str(int(difficult))
                bndbox = ET.SubElement(node, 'bndbox')
                for edge, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box):
                    ET.SubElement(bndbox, edge).text = str(value + 1)  # VOC counts pixels from 1
            ET.ElementTree(root).write(os.path.join(folder, 'Annotations', name + '.xml'))


def save_sheet(path, image_paths, detector, columns=4, tile=(360, 300)):
    """
    Save a sheet with the detections in many images.

    :param path: where to save it
    :param image_paths: paths of the images to detect in
    :param detector: see `detect.detect`
    :param columns: images in a row of the sheet
    :param tile: width and height of an image in the sheet, in pixels
    """
    rows = -(-len(image_paths) // columns)
    sheet = Image.new('RGB', (columns * tile[0], rows * tile[1]), 'white')
    for i, image_path in enumerate(image_paths):
        annotated = detect(open_image(image_path), min_score=0.5, max_overlap=0.45, top_k=200, detector=detector)
        annotated.thumbnail((tile[0] - 10, tile[1] - 10))
        sheet.paste(annotated, (i % columns * tile[0] + (tile[0] - annotated.width) // 2,
                                i // columns * tile[1] + (tile[1] - annotated.height) // 2))
    sheet.save(path)


def start(train_set, thin, device, lr):
    """
    :param train_set: PascalVOCDataset
    :param thin: keep every thin-th channel, see `model.SSD300`
    :param device: the torch.device to train on
    :param lr: peak learning rate
    :return: SSD300 with random weights, and its optimizer, as train.py makes them for 'adamw'
    """
    model = SSD300(n_classes=len(train_set.label_map), thin=thin).to(device)
    standardize(model, torch.stack([train_set[i, i][0] for i in range(min(16, len(train_set)))]).to(device))
    return model, make_optimizer(model, 'adamw', lr, weight_decay)


def main():
    """Draw, list, train, evaluate, detect."""
    began = time.time()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    print(f'1. Drawing {n_train + n_test} images of shapes into {folder}')
    draw_dataset(folder, n_train, n_test)

    print('\n2. Listing images and objects, as create_data_lists.py does')
    create_data_lists(folder, None, folder, labels=shapes)

    print(f'\n3. Training a thin network from random weights on {device}, as train.py does')
    torch.manual_seed(0)
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    model, optimizer = start(train_set, thin, device, lr)
    checkpoint_path = os.path.join(folder, 'checkpoint_ssd300.pth')
    fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, rise_and_fall=True, print_freq=10,
        grad_clip=10)

    print(f'\n4. Evaluating on {n_test} other images, as eval.py does')
    model, label_map = load_detector(checkpoint_path)
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    _, mean_average_precision = evaluate(DataLoader(test_set, batch_size, collate_fn=collate_fn), model.to(device))

    print('\n5. Detecting, as detect.py does')
    sheet_path = os.path.join(folder, 'detections.png')
    save_sheet(sheet_path, test_set.images[:12], (model, label_map))
    print(f'''
mAP {mean_average_precision:.3f} after {(time.time() - began) / 60:.1f} minutes. Look at {sheet_path}.

Next: read README.md beside the code, then
  - detect in other images, in the folder of the checkpoint:
        cd {folder} && python {os.path.join('..', 'detect.py')} JPEGImages
  - set download = True in create_data_lists.py, and train on real images:
        python create_data_lists.py && python train.py && python eval.py''')


if __name__ == '__main__':
    run(main)
