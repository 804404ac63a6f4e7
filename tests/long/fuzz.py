"""Write thousands of valid, damaged and unusual annotations, images and checkpoints, and read them:

    python tests/long/fuzz.py

Each must be read correctly, or reported in one line that names the file, in bounded time and memory. This takes about 5
minutes. tests/test_fuzz.py runs a small part of it. (libtiff prints lines of its own.)
"""
import io
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(sys.path[0]))

from tiny import TinyDetector

import checkpoints
from checkpoints import save_checkpoint
from create_data_lists import parse_annotation
from datasets import transform
from errors import UserError
from images import read_image
from utils import cxcy_to_gcxgcy, xy_to_cxcy

n_files = {'annotation': 20_000, 'image': 4_000, 'checkpoint': 1_000}
seed = 0
max_seconds = 20  # to read one file
known_labels = 'cat', 'dog', 'white horse'
part = '<part><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>8</xmax><ymax>9</ymax></bndbox></part>'


def stop(*_):
    """At the alarm. Nothing that reads a file catches this error."""
    raise KeyboardInterrupt(f'this took more than {max_seconds} seconds')


def read_or_report(path, read):
    """Read a file by a function; None if that raised UserError with one line that names the file. Raises AssertionError
    if the line does not; other errors pass through."""
    signal.signal(signal.SIGALRM, stop)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's, about unusual files
        warnings.simplefilter('error', RuntimeWarning)  # numpy's, about NaN and overflow
        signal.alarm(max_seconds)
        try:
            return read(path)
        except UserError as error:
            line = str(error)
            assert path in line and len(line.splitlines()) == 1 and len(line) < 1000, line
            return None
        finally:
            signal.alarm(0)


# ------------------------------------------------------------------------------------------------------ Annotations

class RandomAnnotation:
    """A valid annotation of an image (`root`), and what `parse_annotation` must return for it (`expected`)."""

    def __init__(self, rng):
        self.rng = rng
        self.size = rng.randint(1, 700), rng.randint(1, 700)
        self.orientation = rng.choice([1, 1, 1, *range(1, 9)])
        self.root = ET.Element('annotation')
        for tag in ('folder', 'filename', 'source'):
            if rng.random() < 0.5:
                ET.SubElement(self.root, tag).text = rng.choice(['x', '', 'a\nb', '\u732b'])
        self.stored = self.orientation >= 5 and self.size[0] != self.size[1] and rng.random() < 0.5
        if self.stored or rng.random() < 0.8:
            size = ET.SubElement(self.root, 'size')
            for tag, value in zip(('width', 'height'), self.size[::-1] if self.stored else self.size):
                ET.SubElement(size, tag).text = str(value)
        self.expected = {'boxes': [], 'labels': [], 'difficulties': []}
        for _ in range(rng.randint(0, 5)):
            self.add_object()

    def add_object(self):
        """Add an object inside the image; it is expected only if its box has an area and its label is known."""
        rng, (width, height) = self.rng, self.size
        (x_min, x_max), (y_min, y_max) = (sorted(rng.choice([rng.randint(1, side), rng.randint(4, 4 * side) / 4])
                                                 for _ in range(2)) for side in self.size)
        label = rng.choice(['background', *known_labels, 'dragon', 'Cat'])
        difficult = rng.choice([None, '0', '1', '', ' 1 ', '0.0'])
        node = ET.SubElement(self.root, 'object')
        if rng.random() < 0.2:  # before the object's own name and box
            node.append(ET.fromstring(part))
        ET.SubElement(node, 'name').text = rng.choice(['{}', ' {}', '{}\n', '\t{} ']).format(label)
        if difficult is not None:
            ET.SubElement(node, 'difficult').text = difficult
        if rng.random() < 0.2:
            node.append(ET.fromstring(part))
        box = x_min, y_min, x_max, y_max
        if self.stored:  # the box in the stored image, by EXIF's definition of orientations
            left, top, right, bottom = x_min, y_min, x_max, y_max
            if self.orientation in (6, 7):  # the stored image's last row is the upright image's first column
                left, right = width + 1 - x_max, width + 1 - x_min
            if self.orientation in (7, 8):  # its last column is the first row
                top, bottom = height + 1 - y_max, height + 1 - y_min
            box = top, left, bottom, right
        bndbox = ET.SubElement(node, 'bndbox')
        edges = list(zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
        rng.shuffle(edges)  # any order is valid
        for tag, value in edges:
            ET.SubElement(bndbox, tag).text = rng.choice(['{}', ' {} ', '{}\n']).format(value)
        if label in known_labels and x_min < x_max and y_min < y_max:
            self.expected['boxes'].append([x_min - 1, y_min - 1, x_max - 1, y_max - 1])
            self.expected['labels'].append(label)
            self.expected['difficulties'].append(int(float((difficult or '').strip() or 0)))


strange_texts = ('', ' ', 'nan', 'inf', '-inf', '-1', '0', '-0.0', '1e999', '-1e308', '1e-320', '9' * 400, '0x10',
                 '1,5', '1.5.2', '1_0', '\u0663', 'None', 'true', '2', '-7', '300', '1e18', '\ud7ff', 'cat',
                 'a' * 100_000, '\n', '12\n34', '{}', '%s', '../../x')


def mutate_tree(root, rng):
    """Change an element: remove it, repeat it, rename it, copy it to another place, swap it, or replace its text."""
    parents = [parent for parent in root.iter() if len(parent)]
    if not parents:
        return
    parent = rng.choice(parents)
    child = rng.choice(list(parent))
    what = rng.randrange(6)
    if what == 0:
        parent.remove(child)
    elif what == 1:
        parent.insert(0, child)
    elif what == 2:
        child.tag = rng.choice(['object', 'bndbox', 'xmin', 'xmax', 'name', 'Object', 'size', 'part', 'difficult'])
    elif what == 3:
        rng.choice([root, parent]).append(ET.fromstring(ET.tostring(child)))
    elif what == 4:
        child.text = rng.choice(strange_texts)
    elif len(parent) > 1:  # swap two, for example xmin and xmax
        other = rng.choice(list(parent))
        child.text, other.text = other.text, child.text


def mutate_bytes(data, rng):
    """Cut, change, insert, repeat or remove bytes."""
    changed, at = bytearray(data), rng.randrange(len(data) + 1)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return rng.choice([
        bytes(changed), data[:at], data[at:], data[:at] + rng.randbytes(rng.choice([1, 4, 1000])) + data[at:],
        data[:at] + data[at:at + rng.randint(1, 200)] * rng.choice([1, 2, 1000]) + data[at:],
        data[:at] + data[at + rng.choice([1, 2, 50]):]])


def xml_bomb(rng):
    """XML that expands to a large text, refers to another file, or is very deep or long."""
    entities = ''.join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha" * 10}">' for i in range(rng.randint(1, 15)))
    address = rng.choice(['file:///etc/passwd', '/dev/zero', 'http://127.0.0.1:9/x', 'label_map.json'])
    return rng.choice([
        f'<!DOCTYPE annotation [{entities}]><annotation><object><name>&e0;</name></object></annotation>',
        f'<!DOCTYPE annotation [<!ENTITY {rng.choice(["", "% "])}e SYSTEM "{address}">]>'
        '<annotation><object><name>&e;</name></object></annotation>',
        f'<!DOCTYPE annotation [<!ENTITY e "{"a" * 100_000}">]><annotation>{"&e;" * 100_000}</annotation>',
        '<annotation>' + '<object>' * 100_000,
        '<annotation>' + '<object>' * 50_000 + '</object>' * 50_000 + '</annotation>',
        '<annotation ' + ' '.join(f'a{i}="{i}"' for i in range(50_000)) + '/>',
        '<annotation><!--' + '-' * rng.randrange(4) + 'x' * 1_000_000 + '--></annotation>'])


def fuzz_annotation(path, rng):
    """Write an annotation, valid or mutated, read it, and check the result. Return 'read' or 'reported'."""
    made = RandomAnnotation(rng)
    kind = rng.choices(['valid', 'tree', 'bytes', 'bomb'], [30, 45, 24, 1])[0]
    if kind == 'tree':
        for _ in range(rng.choice([1, 1, 2, 10])):
            mutate_tree(made.root, rng)
    encoding = rng.choice(['utf-8', 'utf-8', 'utf-16', 'iso-8859-1', 'us-ascii', 'cp1252'])
    data = ET.tostring(made.root, encoding)
    if kind == 'bytes':
        data = mutate_bytes(data, rng)
    elif kind == 'bomb':
        data = xml_bomb(rng).encode()
    elif rng.random() < 0.5:
        data = data.decode(encoding).replace('><', '>\r\n<').encode(encoding)
    if rng.random() < 0.1 and encoding == 'utf-8':
        data = b'\xef\xbb\xbf' + data
    Path(path).write_bytes(data)

    parsed = read_or_report(path, lambda path: parse_annotation(path, known_labels, made.size, made.orientation))
    if kind == 'valid':
        assert parsed is not None, 'a valid annotation was refused'
        assert np.allclose(parsed.pop('boxes'), made.expected.pop('boxes'), atol=1e-6)
        assert {key: parsed[key] for key in made.expected} == made.expected, (parsed, made.expected)
        return 'read'
    if parsed is None:
        return 'reported'
    assert len(parsed['boxes']) == len(parsed['labels']) == len(parsed['difficulties'])
    for x_min, y_min, x_max, y_max in parsed['boxes']:
        assert 0 <= x_min <= x_max - 0.1 <= made.size[0] and 0 <= y_min <= y_max - 0.1 <= made.size[1], parsed
    assert set(parsed['labels']) <= set(known_labels) and set(parsed['difficulties']) <= {0, 1}
    assert all(len(reason.splitlines()) == 1 for reason in parsed['dropped'])
    return 'read'


# --------------------------------------------------------------------------------------------------------- Images

def draw_random(size, mode, rng):
    """A PIL image of a mode, with a few rectangles."""
    image = Image.new('RGB', size, tuple(rng.randrange(256) for _ in range(3)))
    for _ in range(3):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        ImageDraw.Draw(image).rectangle((x, y, x + rng.randint(1, 99), y + rng.randint(1, 99)),
                                        tuple(rng.randrange(256) for _ in range(3)))
    if mode in ('I', 'I;16', 'F'):
        pixels = np.asarray(image.convert('L'), dtype=np.float32) * 257
        if mode == 'F':
            pixels.flat[rng.randrange(pixels.size)] = rng.choice([math.nan, math.inf, -math.inf, -5, 1e38])
        return Image.fromarray(pixels.astype({'I': np.int32, 'I;16': np.uint16, 'F': np.float32}[mode]))
    if mode == 'PA':
        return image.convert('P').convert('PA')
    return image.convert('RGBA').convert(mode) if mode in ('LA', 'RGBA') else image.convert(mode)


modes_of_format = {  # the modes that Pillow can write
    'JPEG': ('L', 'RGB', 'CMYK', 'YCbCr'), 'PNG': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'),
    'GIF': ('1', 'L', 'P', 'RGB', 'RGBA'), 'WEBP': ('L', 'RGB', 'RGBA'), 'BMP': ('1', 'L', 'P', 'RGB', 'RGBA'),
    'TIFF': ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'LAB', 'I;16', 'I', 'F'), 'PPM': ('1', 'L', 'RGB', 'I'),
    'TGA': ('L', 'LA', 'P', 'RGB', 'RGBA'), 'PCX': ('1', 'L', 'P', 'RGB'), 'MPO': ('RGB', 'CMYK')}


def make_image(rng):
    """:return: an image file's bytes; the PIL image as stored in it; and its EXIF orientation"""
    format = rng.choice(list(modes_of_format))
    mode = rng.choice(modes_of_format[format])
    size = rng.choice([(rng.randint(1, 400), rng.randint(1, 400)), (1, rng.randint(1, 2000)), (rng.randint(1, 2000), 1),
                       (1, 1), (2, 3)])
    if rng.random() < 0.01 and format != 'WEBP':  # limited to 16,383 pixels a side
        size = rng.choice([(20_000, rng.randint(1, 300)), (rng.randint(1, 300), 20_000)])
    image, orientation, options = draw_random(size, mode, rng), 1, {}
    if format in ('JPEG', 'PNG', 'WEBP', 'TIFF', 'MPO') and rng.random() < 0.5:  # a TIFF can't have an invalid one
        orientation = rng.choice([*range(1, 9)] if format == 'TIFF' else [0, 9, 65535, *range(1, 9)])
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = orientation
    if format in ('GIF', 'PNG', 'WEBP', 'TIFF', 'MPO') and rng.random() < 0.3:
        options |= {'save_all': True, 'append_images': [draw_random(size, mode, rng) for _ in range(3)]}
    if format == 'JPEG':
        options |= {'quality': rng.choice([1, 50, 95]), 'progressive': rng.random() < 0.5}
    if format in ('PNG', 'GIF') and mode in ('P', 'L') and rng.random() < 0.3:
        options['transparency'] = rng.randrange(256)
    if format == 'WEBP':
        options['lossless'] = True
    if format == 'TIFF':
        options['compression'] = rng.choice([None, 'tiff_lzw', 'tiff_deflate', 'packbits'])
    file = io.BytesIO()
    image.save(file, format, **options)
    try:
        Image.open(file).load()
    except OSError:  # old versions of Pillow can't read all files that they write
        return make_image(rng)
    return file.getvalue(), image, orientation


def image_bomb(rng):
    """A small file that claims to be a huge image, or is not an image."""
    what = rng.randrange(3)
    if what == 0:  # the header's width and height
        file = io.BytesIO()
        Image.new('L', (8, 8)).save(file, rng.choice(['PNG', 'BMP', 'GIF', 'JPEG', 'TIFF', 'WEBP', 'TGA', 'PCX']))
        data = bytearray(file.getvalue())
        for _ in range(4):
            data[rng.randrange(min(len(data), 64))] = rng.choice([0, 1, 0x7f, 0x80, 0xff])
        return bytes(data)
    if what == 1:
        return rng.choice([b'', b'\x00', b'\x00' * 10_000, b'no image', '\u732b'.encode('utf-16'), b'\xff\xd8\xff',
                           b'\x89PNG\r\n\x1a\n', b'GIF89a', b'RIFF', b'BM', b'II*\x00', b'P6 9 9 255 ',
                           b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n', b'P6 999999 999999 255\n',
                           b'P4 20000 20000\n'])  # the last: more than Pillow's limit of 178 million pixels
    return rng.randbytes(rng.randrange(3000))


def fuzz_image(path, rng):
    """Write an image, valid or mutated, read it, and check the results. Return 'read' or 'reported'."""
    kind = rng.choices(['valid', 'bytes', 'bomb'], [50, 45, 5])[0]
    image = None
    if kind == 'bomb':
        data = image_bomb(rng)
    else:
        data, image, orientation = make_image(rng)
        if kind == 'bytes':
            for _ in range(rng.choice([1, 1, 3])):
                data = mutate_bytes(data, rng) or b'\x00'
    Path(path).write_bytes(data)

    read = read_or_report(path, read_image)
    if kind == 'valid':
        assert read is not None, 'a valid image was refused'
        opened, *others, bits = read
        size = image.size[::-1] if 5 <= orientation <= 8 else image.size
        orientation = orientation if orientation in range(1, 9) else 1
        assert (opened.size, *others) == (size, orientation), (read, image, orientation)
        assert (bits > 8) == (image.mode in ('I', 'I;16', 'F')), (bits, image)
    if read is None:
        return 'reported'
    assert read[0].mode == 'RGB', read
    check_transforms(read[0], rng)
    return 'read'


def check_transforms(image, rng):
    """Check that the transforms accept the image, and that boxes keep an area."""
    (x_min, x_max), (y_min, y_max) = (sorted((rng.uniform(0, side), rng.uniform(0, side))) for side in image.size)
    boxes = torch.tensor([[0, 0, image.width, image.height], [x_min, y_min, x_max, y_max], [0, 0, 0.1, 0.1],
                          [image.width - 0.1, image.height - 0.1, image.width, image.height]])
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= 0.09).all(dim=1)]  # parse_annotation drops smaller ones
    for split in ('TRAIN', 'TEST'):
        tensor, kept, labels, _ = transform(image, boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)), split, rng)
        assert tensor.shape == (3, 300, 300) and tensor.isfinite().all() and len(kept) == len(labels) >= 1
        assert kept.min() >= 0 and kept.max() <= 1
        offsets = cxcy_to_gcxgcy(xy_to_cxcy(kept), torch.tensor([.5, .5, .1, .1]))  # infinite for a box without area
        assert offsets.isfinite().all(), (image.size, boxes, kept)


def fuzz_checkpoint(path, rng):
    """Write a damaged checkpoint of a small network, and read it. Return 'read' or 'reported'."""
    model = TinyDetector(2)
    save_checkpoint(path, 3, model, torch.optim.SGD(model.parameters(), lr=1), {'background': 0, 'cat': 1}, 0)
    data = Path(path).read_bytes()
    start = rng.choice([2000, len(data)])  # the beginning has the structure
    Path(path).write_bytes(mutate_bytes(data[:start], rng) + data[start:])
    with patch.object(checkpoints, 'SSD300', TinyDetector):
        detector = read_or_report(path, checkpoints.load_detector)
    return 'read' if detector is not None else 'reported'


def fuzz(kind, n, folder, seed=0):
    """Write and read n files of a kind, 'annotation', 'image' or 'checkpoint', in a folder; each has its own random
    numbers. Return a Counter of 'read' and 'reported'. Raises AssertionError if a file was neither read correctly nor
    reported; it names the file, which is kept."""
    one, name = {'annotation': (fuzz_annotation, 'a.xml'), 'image': (fuzz_image, 'a.jpg'),
                 'checkpoint': (fuzz_checkpoint, 'a.pth')}[kind]
    path, results = os.path.join(folder, name), Counter()
    for i in range(n):
        try:
            results[one(path, random.Random(f'{seed} {i}'))] += 1
        except BaseException as error:
            raise AssertionError(f'{kind} {i} of seed {seed}, in {path}: {type(error).__name__}: {error}') from error
    return results


def main():
    """Run all kinds, and print the results."""
    folder = tempfile.mkdtemp()
    for kind, n in n_files.items():
        start = time.time()
        results = fuzz(kind, n, folder, seed)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f'{n} {kind}s: {results["read"]} read, {results["reported"]} reported in a line that names the file; '
              f'{time.time() - start:.0f} s, at most {memory:.0f} MB of memory until now', flush=True)


if __name__ == '__main__':
    main()
