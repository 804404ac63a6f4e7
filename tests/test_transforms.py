"""The transforms: boxes stay on their objects, and the random choices are those of the paper."""
import random

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from demo import draw_background
from files import image_header, open_image, to_rgb
from utils import (centers_inside, expand, find_jaccard_overlap, flip, mean, photometric_distort, random_crop, resize,
                   std, to_input, transform)

red, gray = (255, 0, 0), (120, 120, 120)


def picture_with_rectangle(rng):
    """A gray picture with a red rectangle, and the rectangle's box in pixels."""
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
    monkeypatch.setattr(utils, 'photometric_distort', lambda image, rng: image)  # so that red stays red
    rng, areas = random.Random(1), []
    for _ in range(200):
        image, boxes = picture_with_rectangle(rng)
        tensor, boxes, labels, difficulties = transform(image, boxes, torch.tensor([3]), torch.tensor([0]), split, rng)
        assert tensor.shape == (3, 300, 300) and boxes.shape == (1, 4)
        assert labels.tolist() == [3] and difficulties.tolist() == [0]
        assert (find_rectangle(tensor) - boxes[0]).abs().max() < 1.6 / 300
        areas.append((boxes[0, 2:] - boxes[0, :2]).prod().item())
    if split == 'TRAIN':
        assert min(areas) < 0.01 and max(areas) > 0.5  # zoomed out and in


def test_expand():
    rng, picture = random.Random(0), (10., 20., 110., 70.)
    scales = []
    for _ in range(2000):
        x_min, y_min, x_max, y_max = expand(picture, rng)
        assert x_min <= 10 and y_min <= 20 and x_max >= 110 - 1e-9 and y_max >= 70 - 1e-9
        assert (x_max - x_min) / (y_max - y_min) == pytest.approx(2)
        scales.append((x_max - x_min) / 100)
    assert 1 <= min(scales) < 1.01 and 3.99 < max(scales) <= 4 and np.mean(scales) == pytest.approx(2.5, abs=.1)


def test_beyond_the_picture_there_is_the_mean():
    image, boxes = resize(Image.new('RGB', (100, 100), 'white'), torch.empty(0, 4), (-100., -100., 300., 300.))
    pixels = to_input(image)
    assert pixels[:, :70, :].abs().max() < 0.02 and pixels[:, 80:145, 80:145].min() > 2 and boxes.shape == (0, 4)


def test_random_crop_keeps_its_promises():
    rng, window, kept_whole, n_tries = random.Random(0), (0., 0., 400., 300.), 0, 1000
    boxes = torch.tensor([[10., 10., 120., 90.], [200., 100., 390., 290.], [0., 250., 40., 299.]])
    smallest = 1.
    for _ in range(n_tries):
        x_min, y_min, x_max, y_max = crop = random_crop(window, boxes, rng)
        if crop == window:
            kept_whole += 1
            continue
        w, h = x_max - x_min, y_max - y_min
        assert x_min >= 0 and y_min >= 0 and x_max <= 400.01 and y_max <= 300.01
        assert 0.299 < w / 400 <= 1 and 0.299 < h / 300 <= 1 and 0.499 < w / h < 2.001
        assert centers_inside(boxes, crop).any()
        smallest = min(smallest, w * h / 120000)
    assert smallest < 0.15
    assert kept_whole / n_tries > 1 / 7 - .03  # one of seven choices, and more where no minimum overlap is met


@pytest.mark.parametrize('min_overlap', [.1, .5, .9])
def test_random_crop_meets_the_minimum_overlap(min_overlap):
    class Choose(random.Random):
        def choice(self, _):
            return min_overlap

    boxes = torch.tensor([[50., 50., 250., 250.]])
    for seed in range(50):
        crop = random_crop((0., 0., 300., 300.), boxes, Choose(seed))
        assert find_jaccard_overlap(torch.tensor([crop]), boxes).item() >= min_overlap


def test_random_crop_draws_the_minimum_overlaps_of_the_paper():
    offered = []

    class Remember(random.Random):
        def choice(self, options):
            offered.append(options)
            return super().choice(options)

    random_crop((0., 0., 100., 100.), torch.tensor([[10., 10., 90., 90.]]), Remember(0))
    assert all(set(options) == {0., .1, .3, .5, .7, .9, None} and len(options) == 7 for options in offered) and offered


def test_objects_whose_center_is_cut_off_are_left_out(monkeypatch):
    monkeypatch.setattr(utils, 'random_crop', lambda window, boxes, rng: (0., 0., 50., 50.))
    monkeypatch.setattr(utils, 'expand', lambda window, rng: window)
    boxes = torch.tensor([[10., 10., 60., 60.], [45., 45., 100., 100.], [0., 0., 20., 20.]])
    _, boxes, labels, difficulties = transform(Image.new('RGB', (100, 100)), boxes, torch.tensor([1, 2, 3]),
                                               torch.tensor([0, 1, 1]), 'TRAIN', random.Random(2))
    assert labels.tolist() == [1, 3] and difficulties.tolist() == [0, 1]
    assert boxes[0, [1, 3]].tolist() == pytest.approx([.2, 1.])  # clipped to the crop


def test_flip():
    image = Image.new('RGB', (4, 2))
    image.putpixel((0, 1), red)
    flipped, boxes = flip(image, torch.tensor([[0., .5, .25, 1.]]))
    assert flipped.getpixel((3, 1)) == red and boxes.tolist() == [[.75, .5, 1., 1.]]
    again, boxes = flip(flipped, boxes)
    assert again.tobytes() == image.tobytes() and boxes.tolist() == [[0., .5, .25, 1.]]


def test_photometric_distortion_varies_colors_within_bounds():
    image, rng = Image.new('RGB', (8, 8), (100, 150, 50)), random.Random(0)
    results = [photometric_distort(image, rng).getpixel((0, 0)) for _ in range(400)]
    assert 0.02 < sum(result == (100, 150, 50) for result in results) / 400 < 0.3  # nothing drawn, or no effect
    brightness = np.array([sum(result) for result in results]) / 300
    assert 0.2 < brightness.min() < 0.6 and 1.4 < brightness.max() < 2.3
    assert image.getpixel((0, 0)) == (100, 150, 50)


def test_each_distortion_is_drawn_half_of_the_time_from_its_whole_range(monkeypatch):
    ranges = {'adjust_brightness': (.5, 1.5), 'adjust_contrast': (.5, 1.5), 'adjust_saturation': (.5, 1.5),
              'adjust_hue': (-18 / 255, 18 / 255)}
    drawn, rng, image, n = [], random.Random(0), Image.new('RGB', (2, 2)), 2000
    for name in ranges:
        monkeypatch.setattr(utils.FT, name, lambda image, value, name=name: (drawn.append((name, value)), image)[1])
    firsts = set()
    for _ in range(n):
        n_before = len(drawn)
        photometric_distort(image, rng)
        firsts.update(name for name, _ in drawn[n_before:n_before + 1])
    assert firsts == set(ranges)  # in random order
    for name, (low, high) in ranges.items():
        values = [value for other, value in drawn if other == name]
        assert 0.45 < len(values) / n < 0.55
        assert low <= min(values) < low + (high - low) / 50 and high - (high - low) / 50 < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=(high - low) / 20)


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_pictures_without_objects(split):
    rng = random.Random(0)
    for _ in range(20):
        tensor, boxes, labels, difficulties = transform(Image.new('RGB', (50, 80)), torch.empty(0, 4),
                                                        torch.empty(0).long(), torch.empty(0).byte(), split, rng)
        assert tensor.shape == (3, 300, 300) and boxes.shape == (0, 4) and len(labels) == len(difficulties) == 0


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (3000, 2)])
def test_pictures_of_extreme_size(size):
    for seed in range(30):
        boxes = torch.tensor([[0., 0., float(size[0]), float(size[1])]])
        tensor, boxes, _, _ = transform(Image.new('RGB', size), boxes, torch.tensor([1]), torch.tensor([0]), 'TRAIN',
                                        random.Random(seed))
        assert tensor.isfinite().all() and (boxes[0, 2:] > boxes[0, :2]).all()


def test_normalization():
    tensor = to_input(Image.new('RGB', (300, 300), (255, 0, 51)))
    assert tensor[:, 0, 0].tolist() == pytest.approx([(1 - .485) / .229, -.456 / .224, (.2 - .406) / .225], abs=1e-5)


@pytest.mark.parametrize('mode, color, expected', [
    ('L', 100, (100, 100, 100)), ('1', 1, (255, 255, 255)), ('RGBA', (200, 0, 0, 255), (200, 0, 0)),
    ('RGBA', (0, 0, 0, 0), (255, 255, 255)), ('LA', (100, 255), (100, 100, 100)),
    ('CMYK', (0, 255, 255, 0), (255, 0, 0)), ('I;16', 32896, (128, 128, 128)), ('I', 65535, (255, 255, 255)),
    ('F', .5, (255, 255, 255)), ('P', 0, (0, 0, 0))])
def test_pictures_of_any_mode(tmp_path, mode, color, expected):
    image = Image.new(mode, (20, 10), color)
    assert to_rgb(image).getpixel((3, 3)) == expected and to_rgb(image).mode == 'RGB'
    assert image.mode == mode and image.size == (20, 10)
    suffix = {'CMYK': 'tif', 'I': 'tif', 'F': 'tif'}.get(mode, 'png')
    image.save(tmp_path / f'a.{suffix}')
    assert open_image(tmp_path / f'a.{suffix}').getpixel((3, 3)) == expected


@pytest.mark.filterwarnings('error')
def test_pixels_that_are_no_numbers_do_not_blacken_the_others():
    for value in (float('nan'), float('inf'), float('-inf')):
        image = to_rgb(Image.fromarray(np.array([[2, value, 1]], dtype=np.float32)))
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [255, 0, 127]


def test_palette_transparency_is_white():
    image = Image.new('P', (5, 5), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info['transparency'] = 0
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_honored(tmp_path, orientation, suffix):
    image = Image.new('RGB', (40, 20), 'white')
    image.paste(red, (0, 0, 20, 10))  # the stored picture's top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'a.{suffix}'
    image.save(path, exif=exif)
    upright = open_image(path)
    size = (40, 20) if orientation < 5 else (20, 40)
    assert upright.size == size and image_header(path) == (size, orientation)
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    for x in (0, 1):
        for y in (0, 1):
            color = upright.getpixel((x * (upright.width - 1), y * (upright.height - 1)))
            assert color == (red if (x, y) == corner else (255, 255, 255))


def plain_transform(image, boxes, rng):
    """Training's transform, step by step on whole pictures, as a slow but plain reference."""
    image = photometric_distort(image, rng)
    pixels, boxes = np.asarray(image), boxes.numpy()
    if rng.random() < 0.5:  # expand
        height, width = pixels.shape[:2]
        scale = rng.uniform(1, 4)
        canvas = np.full((round(height * scale), round(width * scale), 3), utils.mean_color, dtype=np.uint8)
        x, y = rng.randint(0, canvas.shape[1] - width), rng.randint(0, canvas.shape[0] - height)
        canvas[y:y + height, x:x + width] = pixels
        pixels, boxes = canvas, boxes + [x, y, x, y]
    height, width = pixels.shape[:2]
    found = False
    while not found:  # crop
        min_overlap = rng.choice([None, 0, .1, .3, .5, .7, .9])
        if min_overlap is None:
            break
        for _ in range(50):
            w, h = rng.uniform(.3, 1) * width, rng.uniform(.3, 1) * height
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            centers = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = ((centers > [x, y]) & (centers < [x + w, y + h])).all(axis=1)
            window = torch.tensor([[x, y, x + w, y + h]])
            overlap = find_jaccard_overlap(window, torch.tensor(boxes, dtype=torch.float32)).max()
            if .5 <= w / h <= 2 and overlap >= min_overlap and inside.any():
                x, y, right, bottom = round(x), round(y), round(x + w), round(y + h)
                pixels = pixels[y:bottom, x:right]
                boxes = boxes[inside].clip([x, y, x, y], [right, bottom, right, bottom]) - [x, y, x, y]
                found = True
                break
    height, width = pixels.shape[:2]
    boxes = boxes / [width, height, width, height]
    if rng.random() < 0.5:  # flip
        pixels, boxes = pixels[:, ::-1], np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    image = Image.fromarray(pixels).resize((300, 300), Image.Resampling.BILINEAR)
    return to_input(image), torch.tensor(boxes, dtype=torch.float32)


def test_pixels_and_boxes_are_distributed_as_in_a_plain_reference():
    image = draw_background((160, 120), random.Random(5))
    boxes = torch.tensor([[10., 20., 60., 90.], [80., 10., 150., 50.], [100., 70., 120., 100.]])
    n, rng = 600, random.Random(2)
    samples = {'plain': [], 'ours': []}
    for _ in range(n):
        results = {'plain': plain_transform(image, boxes, rng),
                   'ours': transform(image, boxes, torch.ones(3), torch.zeros(3), 'TRAIN', rng)[:2]}
        for name, (tensor, kept) in results.items():
            box = kept[0]  # of each variation: its colors' mean and spread, how many objects, where the first is
            samples[name].append(torch.cat([
                tensor.mean(dim=(1, 2)), tensor.std(dim=(1, 2)), torch.tensor([float(len(kept))]),
                (box[:2] + box[2:]) / 2, box[2:] - box[:2], (kept[:, 2:] - kept[:, :2]).prod(dim=1).sum(0, True)]))
    plain, ours = torch.stack(samples['plain']), torch.stack(samples['ours'])  # (n, 12)
    # Kolmogorov and Smirnov's test: the largest difference of the two shares of values below any bound. By chance, it
    # is above this limit once in a thousand times.
    limit = 1.95 * (2 / n) ** 0.5
    for a, b in zip(plain.T, ours.T):
        bounds = torch.cat([a, b]) + 1e-4
        share_a, share_b = (torch.searchsorted(x.sort().values, bounds) / n for x in (a, b))
        assert (share_a - share_b).abs().max() < limit
