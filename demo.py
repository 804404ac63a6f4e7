"""The whole pipeline, without a GPU or a download:

    python demo.py

draws a small data set in Pascal VOC's layout, lists it, trains SSD300 on it from random weights, measures the mean
average precision on images it did not train on, and saves a sheet of detections.
"""
import math
import os
import random
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw
from torch.utils.data import DataLoader

from checkpoints import load_detector
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset, collate_fn
from detect import detect
from errors import run
from eval import evaluate, print_table
from images import open_image, save_tiles
from model import SSD300, MultiBoxLoss, standardize
from train import fit, make_optimizer, make_train_loader, one_cycle, weight_decay

folder = 'demo'  # where everything goes
shapes = ('circle', 'square', 'triangle')  # the classes
sides = (28, 200)  # of the smallest and the largest shapes, in pixels
n_train = 750  # images to train on
n_test = 80  # other images, to measure on
thin = 8  # every thin-th channel is kept: a network that two CPU cores train in two minutes, see README.md
epochs = 4  # passes over the training images
batch_size = 4  # images in a batch
lr = 1.5e-3  # peak learning rate of AdamW, which needs far fewer steps here than 'sgd'
min_score = 0.4  # only detections with higher scores are drawn

size_xml = '<filename>{}.jpg</filename><size><width>{}</width><height>{}</height></size>'
object_xml = ('<object><name>{}</name><difficult>{:d}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>'
              '<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>')


def random_color(rng, saturation=(0, 50), lightness=(5, 40)):
    """An RGB color of any hue; dark, unless asked otherwise. Bounds are from 0 to 100."""
    return ImageColor.getrgb(f'hsl({rng.randint(0, 360)}, {rng.randint(*saturation)}%, {rng.randint(*lightness)}%)')


def draw_background(size, rng):
    """A PIL image of this width and height: dark patches, grain, and many strokes, which are not objects."""
    patches = Image.new('RGB', (rng.randint(2, 6), rng.randint(2, 6)))
    patches.putdata([random_color(rng) for _ in range(patches.width * patches.height)])
    image = patches.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(40, 120)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.line((x, y, x + rng.randint(-30, 30), y + rng.randint(-30, 30)), random_color(rng), rng.randint(1, 4))
    grain = Image.frombytes('L', size, rng.randbytes(size[0] * size[1])).convert('RGB')
    return Image.blend(image, grain, rng.uniform(0, 0.2))


def draw_shape(image, shape, box, difficult, rng):
    """Draw one of `shapes` into the PIL image. The box includes its last pixels; difficult shapes are faint."""
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
    """A PIL image, and a list of (shape, box, difficult). Boxes are in pixels from 0, the last ones included."""
    image = draw_background((rng.randint(280, 360), rng.randint(260, 340)), rng)
    objects, n_objects = [], rng.randint(3, 8)
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
    """Draw images, with annotations and the splits trainval and test in Pascal VOC's layout. A seed gives one set."""
    folder = Path(folder)
    for subfolder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, n in (('trainval', n_train), ('test', n_test)):
        names = [f'{split}_{i:04}' for i in range(n)]
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')
        for name in names:
            image, objects = draw_image(rng)
            image.save(folder / 'JPEGImages' / f'{name}.jpg', quality=90)
            xml = size_xml.format(name, *image.size)
            for shape, box, difficult in objects:
                xml += object_xml.format(shape, difficult, *(value + 1 for value in box))  # VOC counts pixels from 1
            (folder / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{xml}</annotation>')


def start(train_set, thin, device, lr):
    """SSD300 with random weights for this PascalVOCDataset, and its optimizer, as train.py makes them for 'adamw'."""
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
    criterion = MultiBoxLoss(model.priors_cxcy)
    train_loader = make_train_loader(train_set, batch_size, criterion)
    checkpoint_path = os.path.join(folder, 'checkpoint_ssd300.pth')
    fit(model, optimizer, criterion, train_loader, checkpoint_path, epochs=epochs,
        lr_factor=partial(one_cycle, n_steps=epochs * len(train_loader)), print_freq=10, grad_clip=10)

    print(f'\n4. Evaluating on {n_test} other images, as eval.py does')
    model, label_map = load_detector(checkpoint_path)
    test_set = PascalVOCDataset(folder, 'TEST', keep_difficult=True)
    found = evaluate(DataLoader(test_set, batch_size, collate_fn=collate_fn), model.to(device))
    print_table(found, label_map)

    print('\n5. Detecting, as detect.py does')
    sheet_path = os.path.join(folder, 'detections.png')
    tiles = [(detect(open_image(path), min_score, detector=(model, label_map)), os.path.basename(path))
             for path in test_set.images[:12]]
    save_tiles(sheet_path, [tiles[:4], tiles[4:8], tiles[8:]], 350, 290)
    print(f'''
mAP {found.mAP:.3f} after {(time.time() - began) / 60:.1f} minutes. Look at {sheet_path}.
Next: read README.md beside the code; detect in the drawn images, from the folder of the checkpoint:
    cd {folder} && python {os.path.join('..', 'detect.py')} JPEGImages
or set download = True in create_data_lists.py, and train on real images:
    python create_data_lists.py && python train.py && python eval.py''')


if __name__ == '__main__':
    run(main)
