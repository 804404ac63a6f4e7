"""The data set and its batches; and the transforms: boxes stay on their objects, the random choices are the paper's."""
import json
import pickle
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import copy_lists, random_boxes
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import datasets
from datasets import EpochSampler, PascalVOCDataset, collate_fn, crop_window, draw_window, to_input, transform
from demo import draw_background, shapes
from errors import UserError
from model import MultiBoxLoss
from utils import create_prior_boxes, find_jaccard_overlap, make_label_map, mean, std

# --------------------------------------------------------------------------------------------------------- The data set

label_map = make_label_map(shapes)


def test_dataset_items(voc_folder):
    for split, n in (('TRAIN', 3), ('TEST', 2)):
        dataset = PascalVOCDataset(voc_folder, split)
        assert len(dataset) == n and dataset.label_map == label_map
        image, boxes, labels, difficulties = dataset[0]
        assert image.shape == (3, 300, 300) and image.dtype == torch.float32
        assert boxes.shape == (len(labels), 4) and boxes.dtype == torch.float32
        assert boxes.min() >= 0 and boxes.max() <= 1
        assert labels.dtype == torch.long and difficulties.dtype == torch.uint8 and len(difficulties) == len(labels)
    for value in 1000, -5:  # as if the image had been larger; a box whose edges are swapped
        dataset.objects[0]['boxes'][0][3] = value
        with pytest.raises(UserError, match='jpg has .* but a box in the lists reaches further, or has no area: run'):
            dataset[0]


def test_images_whose_objects_are_all_difficult_or_that_have_none(voc_folder, tmp_path):
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    objects = json.loads((tmp_path / 'TEST_objects.json').read_text())
    objects[0]['difficulties'] = [1] * len(objects[0]['labels'])
    objects[1] = {'boxes': [], 'labels': [], 'difficulties': []}
    for split in ('TRAIN', 'TEST'):
        (tmp_path / f'{split}_images.json').write_text((tmp_path / 'TEST_images.json').read_text())
        (tmp_path / f'{split}_objects.json').write_text(json.dumps(objects))
        hidden, kept = PascalVOCDataset(tmp_path, split), PascalVOCDataset(tmp_path, split, keep_difficult=True)
        assert hidden[0][1].shape == hidden[1][1].shape == kept[1][1].shape == (0, 4)
        assert kept[0][3].all() and len(kept[0][3]) > 0


@pytest.mark.parametrize('split', ['train', 'Train', 'test'])
def test_a_split_in_any_case(voc_folder, split):
    """On Windows and macOS, the lists of "train" are found: nobody would notice a training without augmentation."""
    given, expected = PascalVOCDataset(voc_folder, split), PascalVOCDataset(voc_folder, split.upper())
    assert given.split == split.upper() and len(given) == len(expected)
    assert all(map(torch.equal, given[0, 5], expected[0, 5]))
    assert torch.equal(given[0, 5][0], given[0, 6][0]) == (split == 'test')  # augmentation differs


@pytest.mark.parametrize('split', ['val', 'trainval', '', 'TRAIN '])
def test_another_split_is_refused(voc_folder, split):
    for refused in (lambda: PascalVOCDataset(voc_folder, split), lambda: transform(*[None] * 4, split)):
        with pytest.raises(UserError, match=f"the split '{split}' is unknown: take 'TRAIN' or 'TEST'"):
            refused()


def test_batches_do_not_depend_on_the_number_of_workers(voc_folder):
    dataset, epochs = PascalVOCDataset(voc_folder, 'TRAIN'), []
    for workers in (0, 2):
        sampler = EpochSampler(len(dataset), seed=3)
        loader = DataLoader(dataset, 2, sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                            persistent_workers=workers > 0)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            epochs.append(torch.cat([images for images, *_ in loader]))
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3]) and len(epochs[0]) == 3
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize('n_objects', [(2, 0, 1), (0, 3), (0, 0), (1,)])
def test_a_batch_is_the_same_after_its_way_from_a_worker(n_objects):
    """Boxes, labels and difficulties are lists of tensors with a tensor for each image, whose lengths differ."""
    items = [(torch.rand(3, 4, 4), torch.rand(n, 4), torch.randint(1, 9, (n,)), torch.randint(2, (n,)).byte())
             for n in n_objects]
    items[0] = (*items[0][:3], torch.tensor([0.] * n_objects[0]))  # not an integer as the others
    expected = [[item[i] for item in items] for i in range(4)]
    batch = collate_fn(items)
    [sent] = DataLoader(items, len(items), collate_fn=collate_fn, num_workers=1, timeout=20)
    for images, *objects in (batch, sent, pickle.loads(pickle.dumps(batch))):
        assert torch.equal(images, torch.stack(expected[0]))
        for values, of_images in zip(objects, expected[1:]):
            assert isinstance(values, list) and len(values) == len(of_images)
            for value, of_image in zip(values, of_images):
                assert value.dtype == of_image.dtype and value.shape == of_image.shape and value.equal(of_image)


def test_a_worker_can_match(n_objects=(3, 0, 1)):
    """Boxes and labels become what the loss makes of them itself; difficulties stay as they are."""
    boxes, labels = [random_boxes(n) for n in n_objects], [torch.arange(n) + 1 for n in n_objects]
    items = [(torch.rand(3, 4, 4), *objects, torch.zeros(len(objects[0]))) for objects in zip(boxes, labels)]
    match = MultiBoxLoss(create_prior_boxes()).match
    for workers in (0, 1):
        [batch] = DataLoader(items, 3, collate_fn=partial(collate_fn, match=match), num_workers=workers)
        assert all(map(torch.equal, batch[1:3], match(boxes, labels))) and batch[1].shape == (3, 8732, 4)
        assert [len(difficulties) for difficulties in batch[3]] == list(n_objects)


def test_other_values_than_tensors_arrive_too(n_images=3):
    """A data set of your own may yield arrays, or lists; an error on the way would leave training waiting forever."""
    items = [(torch.rand(3, 4, 4), np.ones((i, 4)), [1] * i, torch.tensor(i)) for i in range(n_images)]
    [(_, boxes, labels, numbers)] = DataLoader(items, n_images, collate_fn=collate_fn, num_workers=1, timeout=20)
    assert [box.tolist() for box in boxes] == [[[1.] * 4] * i for i in range(n_images)]
    assert [label.tolist() for label in labels] == [[1] * i for i in range(n_images)]
    assert [number.item() for number in numbers] == list(range(n_images))


def test_sampler_visits_each_image_once_in_an_order_and_with_seeds_of_the_epoch():
    sampler, epochs = EpochSampler(50, seed=0), []
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(i for i, _ in epochs[-1]) == list(range(50))
    orders = [[i for i, _ in epoch] for epoch in epochs]
    assert epochs[0] == list(EpochSampler(50, seed=0)) and epochs[1] == epochs[3] != list(EpochSampler(50, seed=1))
    assert orders[0] != orders[1] != orders[2]
    assert len({seed for epoch in epochs[:3] for _, seed in epoch}) == 150


@pytest.mark.parametrize('split, name, change', [
    ('TRAIN', 'TRAIN_images.json', lambda images: images[1:]),
    ('TRAIN', 'TRAIN_images.json', lambda images: images + images[:1]),
    ('TRAIN', 'label_map.json', lambda label_map: dict(list(label_map.items())[:-1])),
    ('TEST', 'label_map.json', lambda label_map: {'background': 0, 'circle': 1}),
    ('TRAIN', 'TRAIN_objects.json', lambda objects: [{'boxes': of_image['boxes'], 'labels': of_image['labels']}
                                                     for of_image in objects]),
    ('TRAIN', 'TRAIN_objects.json', lambda objects: [{**objects[0], 'boxes': []}, *objects[1:]]),
    ('TRAIN', 'TRAIN_objects.json', lambda images: [
        {**images[0], 'labels': [0] * len(images[0]['labels'])}, *images[1:]]),  # 0 is the background
    ('TRAIN', 'TRAIN_objects.json', lambda objects: [[] for _ in objects])],
    ids=['fewer', 'more', 'label', 'labels', 'no difficulties', 'fewer boxes', 'from 0', 'no dict'])
def test_each_list_that_does_not_belong_to_the_others_is_noticed(voc_folder, tmp_path, split, name, change):
    """As if the lists were copied one by one, or replaced while they were read."""
    copy_lists(voc_folder, tmp_path)
    (tmp_path / name).write_text(json.dumps(change(json.loads((tmp_path / name).read_text()))))
    with pytest.raises(UserError, match=f'lists of {split} in .* do not belong together'):
        PascalVOCDataset(tmp_path, split)


@pytest.mark.parametrize('n', [1, 2, 3, 7])
def test_processes_share_the_batches_of_one(n):
    alone, *samplers = [EpochSampler(23, seed=1), *(EpochSampler(23, 1, rank, n) for rank in range(n))]
    for sampler in (alone, *samplers):
        sampler.set_epoch(2)
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers] == [23 // n] * n
    together = [image for images in zip(*samplers) for image in images]
    assert together == list(alone)[:23 // n * n]


# ----------------------------------------------------------------------------------------------------------- Transforms

red, gray = (255, 0, 0), (120, 120, 120)


def image_with_rectangle(rng):
    """A gray image with a red rectangle, and the rectangle's box in pixels."""
    width, height = rng.randint(200, 600), rng.randint(200, 600)
    w, h = rng.randint(30, width // 2), rng.randint(30, height // 2)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    image = Image.new('RGB', (width, height), gray)
    image.paste(red, (x, y, x + w, y + h))
    return image, torch.tensor([[float(x), float(y), float(x + w), float(y + h)]])


def find_rectangle(tensor):
    """Fractional boundary coordinates of what is red in a network input."""
    pixels = tensor * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    rows, columns = ((pixels[0] > .74) & (pixels[1] < .25)).nonzero(as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 300


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_boxes_stay_on_their_objects(monkeypatch, split):
    monkeypatch.setattr(datasets, 'photometric_distort', lambda image, rng: image)  # so that red stays red
    rng, areas = random.Random(1), []
    for _ in range(80 if split == 'TRAIN' else 20):
        image, boxes = image_with_rectangle(rng)
        tensor, boxes, labels, difficulties = transform(image, boxes, torch.tensor([3]), torch.tensor([0]), split, rng)
        assert tensor.shape == (3, 300, 300) and boxes.shape == (1, 4)
        assert labels.tolist() == [3] and difficulties.tolist() == [0]
        assert (find_rectangle(tensor) - boxes[0]).abs().max() < 1.6 / 300
        areas.append((boxes[0, 2:] - boxes[0, :2]).prod().item())
    if split == 'TRAIN':
        assert min(areas) < 0.01 and max(areas) > 0.5  # zoomed out and in


def test_expand_window():
    rng, image = random.Random(0), (10., 20., 110., 70.)
    scales = []
    for _ in range(2000):
        x_min, y_min, x_max, y_max = datasets.expand_window(image, rng)
        assert x_min <= 10 and y_min <= 20 and x_max >= 110 - 1e-9 and y_max >= 70 - 1e-9
        assert (x_max - x_min) / (y_max - y_min) == pytest.approx(2)
        scales.append((x_max - x_min) / 100)
    assert 1 <= min(scales) < 1.01 and 3.99 < max(scales) <= 4 and np.mean(scales) == pytest.approx(2.5, abs=.1)


def test_a_window_is_drawn_in_any_size():
    image = Image.new('RGB', (100, 100))
    image.paste(red, (50, 0, 100, 50))
    drawn, boxes = draw_window(image, torch.tensor([[50., 0., 100., 50.]]), (-100., 0., 100., 100.), dims=(40, 80))
    assert drawn.size == (40, 80) and boxes.tolist() == [[.75, 0., 1., .5]]
    assert drawn.getpixel((39, 0)) == red and drawn.getpixel((0, 79)) == datasets.mean_color
    assert drawn.getpixel((21, 79)) == (0, 0, 0)
    for size, window, inside, outside in (  # a line that is a third of a pixel wide, on each side
            ((100, 1), (0, 0, 100, 1000), (0, 0), (0, 1)), ((1, 100), (0, 0, 1000, 100), (0, 0), (1, 0)),
            ((100, 1), (0, -999, 100, 1), (0, 299), (0, 298)), ((1, 100), (-999, 0, 1, 100), (299, 0), (298, 0))):
        drawn, _ = draw_window(Image.new('RGB', size, red), torch.empty(0, 4), window)
        assert drawn.getpixel(inside) == red and drawn.getpixel(outside) == datasets.mean_color


class RememberChoice(random.Random):
    """Random numbers; what was chosen last, from which options."""

    def choice(self, options):
        self.options, self.chosen = options, super().choice(options)
        return self.chosen


def test_crop_window_keeps_its_promises():
    rng, window, kept_whole, n_tries = RememberChoice(0), (-90., 50., 310., 350.), 0, 500
    boxes = torch.tensor([[-80., 60., 30., 140.], [-70., 60., 300., 340.], [-90., 300., -50., 349.]])
    smallest, met = 1., set()
    for _ in range(n_tries):
        x_min, y_min, x_max, y_max = crop = crop_window(window, boxes, rng)
        assert set(rng.options) == {0., .1, .3, .5, .7, .9, None} and len(rng.options) == 7  # the paper's
        if rng.chosen is None:
            assert crop == window
            kept_whole += 1
            continue
        w, h = x_max - x_min, y_max - y_min
        assert x_min >= -90 and y_min >= 50 and x_max <= 310.01 and y_max <= 350.01
        assert 0.299 < w / 400 <= 1 and 0.299 < h / 300 <= 1 and 0.499 < w / h < 2.001
        assert datasets.centers_inside(boxes, crop).any()
        assert find_jaccard_overlap(torch.tensor([crop]), boxes).max() >= rng.chosen
        smallest = min(smallest, w * h / 120000)
        met.add(rng.chosen)
    assert smallest < 0.15 and met == {0., .1, .3, .5, .7, .9}
    assert kept_whole / n_tries > 1 / 7 - .05  # one of seven choices, and more where no minimum overlap is met


def test_objects_whose_center_is_cut_off_are_left_out(monkeypatch):
    monkeypatch.setattr(datasets, 'crop_window', lambda window, boxes, rng: (0., 0., 50., 50.))
    monkeypatch.setattr(datasets, 'expand_window', lambda window, rng: window)
    boxes = torch.tensor([[10., 10., 60., 60.], [45., 45., 100., 100.], [0., 0., 20., 20.]])
    _, boxes, labels, difficulties = transform(Image.new('RGB', (100, 100)), boxes, torch.tensor([1, 2, 3]),
                                               torch.tensor([0, 1, 1]), 'TRAIN', random.Random(2))
    assert labels.tolist() == [1, 3] and difficulties.tolist() == [0, 1]
    assert boxes[0, [1, 3]].tolist() == pytest.approx([.2, 1.])  # clipped to the crop


def test_flip():
    image = Image.new('RGB', (4, 2))
    image.putpixel((0, 1), red)
    flipped, boxes = datasets.flip(image, torch.tensor([[0., .5, .25, 1.]]))
    assert flipped.getpixel((3, 1)) == red and boxes.tolist() == [[.75, .5, 1., 1.]]
    again, boxes = datasets.flip(flipped, boxes)
    assert again.tobytes() == image.tobytes() and boxes.tolist() == [[0., .5, .25, 1.]]


def test_each_distortion_is_drawn_half_of_the_time_from_its_whole_range(monkeypatch):
    ranges = {'adjust_brightness': (.5, 1.5), 'adjust_contrast': (.5, 1.5), 'adjust_saturation': (.5, 1.5),
              'adjust_hue': (-18 / 255, 18 / 255)}
    drawn, firsts, colors, n = [], set(), [], 1500
    rng, image = random.Random(0), Image.new('RGB', (2, 2), (100, 150, 50))
    for name in ranges:
        real = getattr(datasets.FT, name)

        def draw(image, value, name=name, distort=real):
            drawn.append((name, value))
            return distort(image, value)

        monkeypatch.setattr(datasets.FT, name, draw)
    for _ in range(n):
        n_before = len(drawn)
        colors.append(datasets.photometric_distort(image, rng).getpixel((0, 0)))
        firsts.update(name for name, _ in drawn[n_before:n_before + 1])
    assert firsts == set(ranges)  # in random order
    for name, (low, high) in ranges.items():
        values = [value for other, value in drawn if other == name]
        assert 0.45 < len(values) / n < 0.55
        assert low <= min(values) < low + (high - low) / 50 and high - (high - low) / 50 < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=(high - low) / 20)
    assert 0.02 < colors.count((100, 150, 50)) / n < 0.3  # nothing drawn, or no effect
    brightness = [sum(color) / 300 for color in colors]
    assert 0.2 < min(brightness) < 0.6 and 1.4 < max(brightness) < 2.3
    assert image.getpixel((0, 0)) == (100, 150, 50)


@pytest.mark.parametrize('size', [(50, 80), (1, 1), (1, 700), (3000, 2)])
@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_images_of_any_size_with_an_object_or_without(split, size):
    for seed in range(20):
        n, rng = seed % 2, random.Random(seed)
        objects = torch.tensor([[0., 0., *size]])[:n], torch.ones(n), torch.zeros(n)
        tensor, boxes, labels, difficulties = transform(Image.new('RGB', size), *objects, split, rng)
        assert tensor.shape == (3, 300, 300) and tensor.isfinite().all() and len(labels) == len(difficulties) == n
        assert boxes.shape == (n, 4) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_normalization():
    tensor = to_input(Image.new('RGB', (300, 300), (255, 0, 51)))
    assert tensor[:, 0, 0].tolist() == pytest.approx([(1 - .485) / .229, -.456 / .224, (.2 - .406) / .225], abs=1e-5)
    assert to_input(Image.new('RGB', (300, 300), datasets.mean_color)).abs().max() < 0.02  # beyond the image


def plain_transform(image, boxes, rng):
    """Training's transform, step by step on whole images, as a slow but plain reference."""
    image, boxes = datasets.photometric_distort(image, rng), boxes.numpy()
    if rng.random() < 0.5:  # expand
        scale = rng.uniform(1, 4)
        canvas = Image.new('RGB', (round(scale * image.width), round(scale * image.height)), datasets.mean_color)
        x, y = rng.randint(0, canvas.width - image.width), rng.randint(0, canvas.height - image.height)
        canvas.paste(image, (x, y))
        image, boxes = canvas, boxes + np.array([x, y, x, y])
    crop = None
    while crop is None:
        min_overlap = rng.choice([None, 0, .1, .3, .5, .7, .9])
        if min_overlap is None:
            break
        for _ in range(50):
            w, h = rng.uniform(.3, 1) * image.width, rng.uniform(.3, 1) * image.height
            x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
            centers = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = ((centers > [x, y]) & (centers < [x + w, y + h])).all(axis=1)
            shared = (np.minimum(boxes[:, 2:], [x + w, y + h]) - np.maximum(boxes[:, :2], [x, y])).clip(0).prod(axis=1)
            overlap = shared / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + w * h - shared)
            if .5 <= w / h <= 2 and overlap.max() >= min_overlap and inside.any():
                crop = round(x), round(y), round(x + w), round(y + h)
                image, boxes = image.crop(crop), boxes[inside].clip(crop[:2] * 2, crop[2:] * 2) - np.array(crop[:2] * 2)
                break
    boxes = boxes / (image.size * 2)
    if rng.random() < 0.5:  # flip
        image, boxes = ImageOps.mirror(image), np.abs([1, 0, 1, 0] - boxes[:, [2, 1, 0, 3]])
    return to_input(image.resize((60, 60), Image.Resampling.BILINEAR)), torch.tensor(boxes, dtype=torch.float32)


def test_pixels_and_boxes_are_distributed_as_in_a_plain_reference(monkeypatch):
    monkeypatch.setattr(datasets, 'draw_window', partial(draw_window, dims=(60, 60)))  # instead of 300, for speed
    image = draw_background((160, 120), random.Random(5))
    boxes = torch.tensor([[10., 20., 60., 90.], [80., 10., 150., 50.], [100., 70., 120., 100.]])
    n, rng = 600, random.Random(2)
    samples = [], []
    for _ in range(n):
        ours = transform(image, boxes, torch.ones(3), torch.zeros(3), 'TRAIN', rng)[:2]
        for sample, (pixels, kept) in zip(samples, (ours, plain_transform(image, boxes, rng))):
            box = kept[0]  # of each variation: its colors' mean and spread, how many objects, where the first is
            sample.append(torch.cat([
                pixels.mean(dim=(1, 2)), pixels.std(dim=(1, 2)), torch.tensor([float(len(kept))]),
                (box[:2] + box[2:]) / 2, box[2:] - box[:2], (kept[:, 2:] - kept[:, :2]).prod(dim=1).sum(0, True)]))
    # Kolmogorov and Smirnov's test: the largest difference of the two shares of values below any bound. By chance, it
    # is above this limit once in a thousand times.
    limit = 1.95 * (2 / n) ** 0.5
    for ours, plain in zip(*(torch.stack(sample).T for sample in samples)):  # 12 values, (n) each
        bounds = torch.cat([ours, plain]) + 1e-4
        shares = [torch.searchsorted(values.sort().values, bounds) / n for values in (ours, plain)]
        assert (shares[0] - shares[1]).abs().max() < limit
