"""Annotations, lists, boxes, encodings, suppression, mean average precision, checkpoints."""
import functools
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import shutil
import tarfile
import threading
import xml.etree.ElementTree as ET
from typing import Tuple

import numpy as np
import pytest
import torch
import torchvision.datasets.voc
from conftest import random_boxes
from PIL import Image
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_convert, box_iou

import create_data_lists as create_data_lists_script
import utils
from demo import draw_dataset
from files import UserError, image_header, open_image, run
from model import SSD300
from utils import (calculate_mAP, create_data_lists, create_prior_boxes, cxcy_to_gcxgcy, cxcy_to_xy,
                   find_jaccard_overlap, gcxgcy_to_cxcy, load_checkpoint, make_color_map, make_label_map,
                   non_maximum_suppression, parse_annotation, picture_ids, read_split, save_checkpoint, voc_labels,
                   xy_to_cxcy)


# ------------------------------------------------------------------------------------------------------------ Boxes

def test_coordinates_equal_torchvisions_and_round_trip():
    xy = random_boxes(3, 50)
    torch.testing.assert_close(xy_to_cxcy(xy), box_convert(xy, 'xyxy', 'cxcywh'))
    torch.testing.assert_close(cxcy_to_xy(xy_to_cxcy(xy)), xy)
    assert xy_to_cxcy(torch.empty(0, 4)).shape == (0, 4)


def test_overlaps_equal_torchvisions():
    set_1, set_2 = random_boxes(40), random_boxes(70)
    torch.testing.assert_close(find_jaccard_overlap(set_1, set_2), box_iou(set_1, set_2))
    both = find_jaccard_overlap(torch.stack([set_1, set_1 / 2]), set_2)  # a batch of sets against one
    torch.testing.assert_close(both[1], box_iou(set_1 / 2, set_2))
    assert find_jaccard_overlap(set_1, torch.empty(0, 4)).shape == (40, 0)
    assert find_jaccard_overlap(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_encoding_equals_torchvisions_and_round_trips():
    priors = create_prior_boxes()
    boxes = random_boxes(len(priors))
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(boxes), priors)
    theirs = BoxCoder(weights=(10., 10., 5., 5.)).encode_single(boxes, cxcy_to_xy(priors))
    torch.testing.assert_close(offsets, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cxcy_to_xy(gcxgcy_to_cxcy(offsets, priors)), boxes, atol=1e-5, rtol=0)


def test_suppression_equals_torchvisions():
    for n, n_classes in ((0, 5), (1, 5), (30, 5), (2000, 5), (20000, 90)):
        boxes, scores, labels = random_boxes(n), torch.rand(n), torch.randint(0, n_classes, (n,))
        expected = batched_nms(boxes.double(), scores.double(), labels, 0.45)
        assert torch.equal(non_maximum_suppression(boxes, scores, labels, 0.45), expected)


def test_suppression_keeps_classes_apart_even_far_outside_the_picture():
    """Were boxes only moved by (largest coordinate + 1), the second would come to lie on the first."""
    boxes = torch.tensor([[0., 0., 1., 1.], [-2., -2., -1., -1.]])
    assert non_maximum_suppression(boxes, torch.tensor([.9, .8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_suppression_beside_an_enormous_box():
    boxes = torch.tensor([[-1e17, -1e17, 1e17, 1e17], [.1, .1, .2, .2], [.11, .1, .2, .2], [.5, .5, .6, .6]])
    labels = torch.tensor([1, 90, 90, 90])
    assert non_maximum_suppression(boxes, torch.tensor([.9, .8, .7, .6]), labels, 0.5).tolist() == [0, 1, 3]


# ----------------------------------------------------------------------------------------------------------- Labels

def test_labels():
    assert [utils.label_map[label] for label in ('background', 'aeroplane', 'tvmonitor')] == [0, 1, 20]
    assert utils.rev_label_map[12] == 'dog' and set(utils.label_color_map) == {'background', *voc_labels}
    colors = make_color_map(make_label_map([str(i) for i in range(80)])).values()
    assert len(set(colors)) == 81 and all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colors)
    for labels in (['a', 'a'], ['background'], []):
        with pytest.raises(UserError):
            make_label_map(labels)


# ------------------------------------------------------------------------------------------------------ Annotations

def annotation(*objects, size='<size><width>100</width><height>80</height></size>'):
    """XML of an annotation; an object is (name, box, more XML)."""
    edges = ('xmin', 'ymin', 'xmax', 'ymax')
    return f'<annotation>{size}' + ''.join(
        f'<object><name>{name}</name>{more}<bndbox>' + ''.join(f'<{e}>{v}</{e}>' for e, v in zip(edges, box))
        + '</bndbox></object>' for name, box, more in objects) + '</annotation>'


def parse(tmp_path, text, **options):
    path = tmp_path / 'a.xml'
    path.write_text(text)
    return parse_annotation(str(path), **options)


def test_annotation(tmp_path):
    part = '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    parsed = parse(tmp_path, annotation(('dog', (1, 1, 100, 80), '<difficult>1</difficult>'),
                                        ('person', (45.5, 10.25, 60, 20), part), ('cat', (0, 0, 101, 81), '')))
    assert parsed['boxes'] == [[0, 0, 99, 79], [44.5, 9.25, 59, 19], [0, 0, 100, 80]]  # the last was a pixel outside
    assert parsed['labels'] == [12, 15, 8] and parsed['difficulties'] == [1, 0, 0] and parsed['dropped'] == []


@pytest.mark.parametrize('name, box, reason', [
    ('dog', (5, 5, 5, 9), 'no area'), ('dog', (9, 5, 5, 9), 'no area'), ('dog', ('nan', 5, 5, 9), 'not finite'),
    ('dog', (5, 5, 110, 9), 'outside'), ('dog', (-5, 5, 10, 9), 'outside'),
    ('dog', (5, 5, 'inf', 9), 'not finite'), ('dog', (0, 5, .5, 9), 'no area'), ('dog', (5, 5, 5.05, 9), 'no area'),
    ('dog', (5, 5, 9, '5.00000001'), 'no area'),
    ('dragon', (5, 5, 10, 9), 'dragon'), ('background', (5, 5, 10, 9), 'background')])
def test_wrong_objects_are_dropped_with_a_reason(tmp_path, name, box, reason):
    parsed = parse(tmp_path, annotation((name, box, ''), ('cat', (5, 5, 10, 9), '')))
    assert parsed['boxes'] == [[4, 4, 9, 8]] and len(parsed['dropped']) == 1 and reason in parsed['dropped'][0]


def test_without_a_size_in_the_annotation_the_pictures_counts(tmp_path):
    for size in ('', '<size><width>0</width><height>0</height></size>'):
        text = annotation(('dog', (5, 5, 110, 9), ''), ('cat', (5, 5, 100, 80), ''), size=size)
        assert len(parse(tmp_path, text, size=(100, 80))['dropped']) == 1
        assert len(parse(tmp_path, text)['dropped']) == 0
    with pytest.raises(UserError, match='a.xml is for a picture of .* but the picture has'):
        parse(tmp_path, annotation(), size=(80, 100))


laughs = ''.join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha" * 10}">' for i in range(12))


@pytest.mark.parametrize('text', [
    '', 'no xml', '<annotation><object></object></annotation>', annotation(('dog', ('a', 1, 2, 3), '')),
    annotation(('dog', (1, 2), '')), annotation(('', (1, 2, 3, 4), '')), annotation((' ', (1, 2, 3, 4), '')),
    '<html><body>Page not found</body></html>', '<?xml version="1.0" encoding="klingon"?>' + annotation(),
    '<?xml version="1.0" encoding="utf-7"?>' + annotation(), '\x00' * 100,
    annotation(*[('dog', (1, 2, 3, 4), '')] * 8733), annotation(('dog', (1, 2, 3, 4), '<difficult>2</difficult>')),
    annotation(('dog', (1, 2, 3, 4), '<difficult>-1</difficult>')),
    annotation(('dog', (1, 2, 3, 4), '<difficult>nan</difficult>')),
    annotation(('dog', (1, 2, 3, 4), '<difficult>no</difficult>')),
    f'<!DOCTYPE annotation [{laughs}]>' + annotation(('&e11;', (1, 2, 3, 4), '')),
    '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + annotation(('&e;', (1, 2, 3, 4), '')),
    '<!DOCTYPE annotation [<!ENTITY % e SYSTEM "http://127.0.0.1/e.dtd"> %e;]>' + annotation(),
    '<!DOCTYPE annotation SYSTEM "e.dtd">' + annotation(('d&e;og', (1, 2, 3, 4), ''))])
def test_an_unreadable_annotation_is_named(tmp_path, text):
    with pytest.raises(UserError, match='a.xml is not an annotation') as error:
        parse(tmp_path, text)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize('difficult, expected', [('<difficult>1.0</difficult>', 1), ('<difficult>\n1 </difficult>', 1),
                                                 ('<difficult> </difficult>', 0), ('<difficult/>', 0), ('', 0)])
def test_difficult_may_be_missing(tmp_path, difficult, expected):
    assert parse(tmp_path, annotation(('dog', (1, 2, 3, 4), difficult)))['difficulties'] == [expected]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'iso-8859-1', 'cp1252'])
def test_encodings_and_ends_of_lines(tmp_path, encoding):
    text = annotation(('d\xe4ch sel', (1, 2, 3, 4), ''))
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>' + text
    (tmp_path / 'a.xml').write_bytes(text.replace('><', '>\r\n<').replace(' sel', '\r\nsel').encode(encoding))
    parsed = parse_annotation(tmp_path / 'a.xml', make_label_map(['d\xe4ch sel']))
    assert parsed['boxes'] == [[0, 1, 2, 3]] and parsed['labels'] == [1]


def test_a_list_of_names_from_windows(tmp_path):
    draw_dataset(str(tmp_path), 2, 2)
    path = tmp_path / 'ImageSets/Main/test.txt'
    names = path.read_text().split()
    path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(names).encode())
    assert picture_ids(str(tmp_path), 'test', 0) == names
    path.write_bytes(b'\xff\xfe\x00\xd8')
    with pytest.raises(UserError, match='test.txt is no list of names'):
        picture_ids(str(tmp_path), 'test', 0)


def test_the_label_background_is_dropped_where_all_labels_are_taken(tmp_path, capsys):
    draw_dataset(str(tmp_path), 3, 1)
    path = tmp_path / 'Annotations/trainval_0001.xml'
    background = annotation(('background', (1, 1, 9, 9), ''), size='')[len('<annotation>'):]
    path.write_text(path.read_text().replace('</annotation>', background))
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=None)
    assert re.search(r"trainval_0001.jpg: label 'background' is not", capsys.readouterr().out)


def boxes_of(folder, size, box):
    """The boxes of a data set's only picture, when its annotation states this size, or None, and this box."""
    size = '' if size is None else '<size><width>{}</width><height>{}</height></size>'.format(*size)
    (folder / 'Annotations/a.xml').write_text(annotation(('dog', box, ''), size=size))
    [(_, parsed)], _ = read_split(str(folder), 'test', ['a'], make_label_map(['dog']))
    return parsed['boxes']


def red_box(image):
    """Where a picture is red: the first and last columns and rows, from 1."""
    rows, columns = (np.array(image.convert('RGB')) == (255, 0, 0)).all(axis=2).nonzero()
    return columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize('height', [25, 40])  # the second: square
@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_for_the_stored_picture_are_turned_upright(tmp_path, orientation, height):
    (tmp_path / 'JPEGImages').mkdir()
    (tmp_path / 'Annotations').mkdir()
    stored = Image.new('RGB', (40, height))
    stored.paste((255, 0, 0), (3, 5, 23, 12))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / 'JPEGImages/a.png', exif=exif)
    upright = open_image(tmp_path / 'JPEGImages/a.png')
    box = red_box(upright)
    expected = [[edge - 1 for edge in box]]
    assert boxes_of(tmp_path, upright.size, box) == expected
    assert boxes_of(tmp_path, None, box) == expected
    if upright.size != stored.size:
        assert boxes_of(tmp_path, stored.size, red_box(stored)) == expected
        assert boxes_of(tmp_path, stored.size, (0, 0, 41, 26)) == [[0, 0, 25, 40]]  # a pixel beyond each edge
        assert boxes_of(tmp_path, stored.size, (1, 1, 40, 28)) == []  # outside
    elif orientation > 1:  # nothing tells that the box is for the stored picture
        assert boxes_of(tmp_path, stored.size, red_box(stored)) == [[edge - 1 for edge in red_box(stored)]]


@pytest.mark.parametrize('orientation', [0, 9, 77, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert open_image(tmp_path / 'a.jpg').size == (40, 20) and image_header(tmp_path / 'a.jpg') == ((40, 20), 1)


def test_lists(tmp_path, capsys):
    folder = tmp_path / 'data'
    draw_dataset(str(folder), 4, 2)
    annotations = folder / 'Annotations'
    (annotations / 'trainval_0001.xml').write_text('<annotation></annotation>')
    (annotations / 'test_0001.xml').write_text('<annotation></annotation>')
    root = ET.parse(annotations / 'trainval_0002.xml').getroot()
    root.find('object/bndbox/xmax').text = root.find('object/bndbox/xmin').text
    ET.ElementTree(root).write(annotations / 'trainval_0002.xml')

    create_data_lists(str(folder), None, str(tmp_path / 'lists'), labels=('triangle', 'square', 'circle'))
    lists = {name: json.loads((tmp_path / 'lists' / name).read_text()) for name in os.listdir(tmp_path / 'lists')}
    assert set(lists) == {'TRAIN_images.json', 'TRAIN_objects.json', 'TEST_images.json', 'TEST_objects.json',
                          'label_map.json'}
    assert lists['label_map.json'] == {'background': 0, 'triangle': 1, 'square': 2, 'circle': 3}
    assert len(lists['TRAIN_images.json']) == len(lists['TRAIN_objects.json']) == 3  # all but the one without objects
    assert len(lists['TEST_images.json']) == 2 and lists['TEST_objects.json'][1]['boxes'] == []
    assert all(os.path.isfile(path) for path in lists['TRAIN_images.json'])

    printed = capsys.readouterr().out
    assert 'trainval_0002.jpg: ' in printed and 'has no area' in printed and 'dropped 1 boxes' in printed
    n_objects = sum(len(objects['labels']) for objects in lists['TRAIN_objects.json'])
    assert f'{"objects":20}{n_objects:10}' in printed


def make_voc_folder(folder, n_train, n_test):
    """A folder in VOC layout with pictures of 20x20 pixels, each of a dog; trainval_00.jpg, ..., test_00.jpg, ..."""
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    size = '<size><width>20</width><height>20</height></size>'
    for split, n in (('trainval', n_train), ('test', n_test)):
        ids = [f'{split}_{i:02}' for i in range(n)]
        (folder / f'ImageSets/Main/{split}.txt').write_text('\n'.join(ids))
        for id in ids:
            Image.new('RGB', (20, 20)).save(folder / f'JPEGImages/{id}.jpg')
            (folder / f'Annotations/{id}.xml').write_text(annotation(('dog', (2, 2, 9, 9), ''), size=size))


def list_names(folder):
    """The names of the listed pictures, without extension: for training, for the test."""
    return [[os.path.splitext(os.path.basename(path))[0] for path in json.loads((folder / name).read_text())]
            for name in ('TRAIN_images.json', 'TEST_images.json')]


def cut_picture(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize('labels', [('dog',), None])
def test_what_cannot_be_read_is_left_out_and_named_in_one_run(tmp_path, capsys, labels):
    make_voc_folder(tmp_path, 50, 20)
    pictures, annotations = tmp_path / 'JPEGImages', tmp_path / 'Annotations'
    cut_picture(pictures / 'trainval_03.jpg')
    (annotations / 'trainval_05.xml').unlink()
    (pictures / 'trainval_07.jpg').unlink()
    (annotations / 'trainval_09.xml').write_text('<annotation>')
    (annotations / 'trainval_11.xml').write_text(annotation(size='<size><width>7</width><height>9</height></size>'))
    cut_picture(pictures / 'test_00.jpg')
    (annotations / 'test_01.xml').unlink()
    (annotations / 'test_01.xml').mkdir()
    text = (annotations / 'test_00.xml').read_text().replace('dog', 'cat')  # the only cat is in a picture left out
    (annotations / 'test_00.xml').write_text(text)

    create_data_lists(str(tmp_path), None, str(tmp_path), labels)
    assert list_names(tmp_path) == [[f'trainval_{i:02}' for i in range(50) if i not in (3, 5, 7, 9, 11)],
                                    [f'test_{i:02}' for i in range(2, 20)]]
    assert json.loads((tmp_path / 'label_map.json').read_text()) == {'background': 0, 'dog': 1}
    assert len(json.loads((tmp_path / 'TRAIN_objects.json').read_text())) == 45
    _, lines = capsys.readouterr().out.split("Left out 7 pictures that can't be read, or whose annotation can't:\n")
    expected = (r'test_00\.jpg is not a picture .*truncated', r'Errno.*test_01\.xml',
                r'trainval_03\.jpg is not a picture .*truncated', r'trainval_05\.xml is missing',
                r'trainval_07\.\* is missing', r'trainval_09\.xml is not an annotation',
                r'trainval_11\.xml is for a picture of 7x9 pixels')
    for line, pattern in zip(lines.splitlines(), expected):
        assert re.search(pattern, line), line
    assert lines.count('\n') == 8 and lines.splitlines()[7].startswith('The lists are in')


@pytest.mark.parametrize('labels', [('dog',), None])
def test_more_than_a_tenth_of_a_split_that_cannot_be_read_is_an_error(tmp_path, capsys, labels):
    """Each split of each folder counts by itself."""
    make_voc_folder(tmp_path / '07', 100, 20)
    make_voc_folder(tmp_path / '12', 110, 0)
    folders = str(tmp_path / '07'), str(tmp_path / '12')
    for i in range(11):
        cut_picture(tmp_path / f'12/JPEGImages/trainval_{i:02}.jpg')
    create_data_lists(*folders, str(tmp_path), labels)  # exactly a tenth
    assert len(list_names(tmp_path)[0]) == 199
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
    capsys.readouterr()

    (tmp_path / '12/Annotations/trainval_11.xml').unlink()
    with pytest.raises(UserError, match="12 of the 110 pictures in .*/12's split trainval can't be read") as error:
        create_data_lists(*folders, str(tmp_path), labels)
    assert '\n' not in str(error.value)
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 10
    assert re.findall(r'trainval_(\d+)\.jpg is not a picture', err) == [f'{i:02}' for i in range(10)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_one_broken_picture_of_three_is_an_error_in_one_line(tmp_path, capsys):
    make_voc_folder(tmp_path, 3, 2)
    cut_picture(tmp_path / 'JPEGImages/trainval_01.jpg')
    with pytest.raises(SystemExit, match=r"^Error: 1 of the 3 pictures in .* split trainval can't be read") as end:
        run(lambda: create_data_lists(str(tmp_path), None, str(tmp_path)))
    assert '\n' not in end.value.code and 'trainval_01.jpg is not' in capsys.readouterr().err
    assert not list(tmp_path.glob('*.json'))


def test_a_folder_without_annotations_is_named_where_all_labels_are_taken(tmp_path):
    make_voc_folder(tmp_path, 3, 2)
    shutil.rmtree(tmp_path / 'Annotations')
    with pytest.raises(UserError, match="2 of the 2 pictures in .* split test can't be read"):
        create_data_lists(str(tmp_path), None, str(tmp_path), labels=None)


@pytest.mark.parametrize('extension', ['.png', '.PNG'])
def test_two_pictures_of_one_name_are_an_error_if_a_split_names_them(tmp_path, extension):
    make_voc_folder(tmp_path, 3, 2)
    for name in ('unused.jpg', 'unused' + extension):
        Image.new('RGB', (20, 20)).save(tmp_path / 'JPEGImages' / name)
    (tmp_path / 'JPEGImages/trainval_01.txt').write_text('no picture')
    create_data_lists(str(tmp_path), None, str(tmp_path))
    assert len(list_names(tmp_path)[0]) == 3

    Image.new('RGB', (20, 20)).save(tmp_path / f'JPEGImages/trainval_01{extension}')
    with pytest.raises(UserError, match=r'keep one') as error:
        create_data_lists(str(tmp_path), None, str(tmp_path))
    paths = [os.path.join(str(tmp_path), 'JPEGImages', f'trainval_01{suffix}') for suffix in ('.jpg', extension)]
    assert all(path in str(error.value) for path in paths) and '\n' not in str(error.value)


def test_lists_of_two_folders_and_unknown_labels(tmp_path, capsys):
    draw_dataset(str(tmp_path / '07'), 3, 2)
    draw_dataset(str(tmp_path / '12'), 4, 0, seed=1)
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), labels=('square',))
    images = json.loads((tmp_path / 'TRAIN_images.json').read_text())
    assert {os.path.dirname(path) for path in images} <= {str(tmp_path / year / 'JPEGImages') for year in ('07', '12')}
    assert "label 'circle' is not one of the labels" in capsys.readouterr().out
    with pytest.raises(UserError, match='dragon'):
        create_data_lists(str(tmp_path / '07'), None, str(tmp_path), labels=('dragon',))
    for path in (tmp_path / '07/Annotations').iterdir():
        path.write_text('<annotation></annotation>')
    with pytest.raises(UserError, match='no object in the training pictures of .*07'):
        create_data_lists(str(tmp_path / '07'), None, str(tmp_path), labels=None)


def test_a_folder_without_splits_is_split_always_alike(tmp_path, capsys):
    draw_dataset(str(tmp_path), 8, 2)
    shutil.rmtree(tmp_path / 'ImageSets')
    (tmp_path / 'Annotations' / 'notes.txt').write_text('no annotation')
    lists = []
    for _ in range(2):
        create_data_lists(str(tmp_path), None, str(tmp_path), labels=None, test_fraction=0.3)
        lists.append([json.loads((tmp_path / f'{split}_images.json').read_text()) for split in ('TRAIN', 'TEST')])
    train, test = lists[0]
    assert lists[0] == lists[1] and len(train) == 7 and len(test) == 3 and not set(train) & set(test)
    assert json.loads((tmp_path / 'label_map.json').read_text()) == \
        {'background': 0, 'circle': 1, 'square': 2, 'triangle': 3}


@pytest.mark.parametrize('breakage', ['picture', 'cut picture', 'annotation', 'no picture', 'size', 'disk full',
                                      'disk full later'])
def test_lists_are_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, breakage):
    draw_dataset(str(tmp_path), 3, 1)
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=('square', 'circle', 'triangle'))
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
    picture, annotated = tmp_path / 'JPEGImages/test_0000.jpg', tmp_path / 'Annotations/test_0000.xml'
    if breakage == 'picture':
        picture.unlink()
    elif breakage == 'cut picture':
        picture.write_bytes(picture.read_bytes()[:-300])
    elif breakage == 'annotation':
        annotated.unlink()
    elif breakage == 'no picture':
        picture.write_text('text')
    elif breakage == 'size':
        annotated.write_text(annotation(size='<size><width>7</width><height>7</height></size>'))
    else:
        written = []

        def fsync(file):
            written.append(file)
            if len(written) == {'disk full': 1, 'disk full later': 3}[breakage]:
                raise OSError(28, 'No space left on device')
        monkeypatch.setattr(utils.os, 'fsync', fsync)
    with pytest.raises(UserError, match='No space left on device' if 'disk' in breakage else '1 of the 1 pictures'):
        create_data_lists(str(tmp_path), None, str(tmp_path), labels=('square',))
    assert 'disk' in breakage or 'test_0000' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.fixture
def server(tmp_path):
    """The address of a server on this machine that offers the files in tmp_path."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_download_merges_the_archives(tmp_path, monkeypatch, server):
    """Small archives stand in for Pascal VOC's, with their own checksums."""
    years = {}
    for key, year, splits in (('2007', '2007', (2, 0)), ('2007-test', '2007', (0, 2)), ('2012', '2012', (3, 0))):
        source = tmp_path / 'source' / key
        draw_dataset(str(source), *splits, seed=len(key) + int(year))
        for split in ('trainval', 'test'):
            path = source / 'ImageSets/Main' / f'{split}.txt'
            if not path.read_text().strip():
                path.unlink()
        archive = tmp_path / f'{key}.tar'
        with tarfile.open(archive, 'w') as tar:
            tar.add(source, f'VOCdevkit/VOC{year}')
        years[key] = {'url': f'{server}/{archive.name}', 'filename': archive.name, 'base_dir': f'VOCdevkit/VOC{year}',
                      'md5': hashlib.md5(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(torchvision.datasets.voc, 'DATASET_YEAR_DICT', years)
    create_data_lists_script.download_voc(str(tmp_path / 'root'))
    devkit = tmp_path / 'root/VOCdevkit'
    create_data_lists(str(devkit / 'VOC2007'), str(devkit / 'VOC2012'), str(tmp_path), ('circle', 'square', 'triangle'))
    assert len(json.loads((tmp_path / 'TEST_images.json').read_text())) == 2
    assert len(json.loads((tmp_path / 'TRAIN_images.json').read_text())) == 5

    years['2012']['md5'] = 'wrong'
    with pytest.raises(UserError, match='2012'):
        create_data_lists_script.download_voc(str(tmp_path / 'root'))


# -------------------------------------------------------------------------------------------- Mean average precision

left, right, far = [0., 0., .4, .4], [.5, .5, .9, .9], [.9, 0., 1., .1]


def mAP(detections, objects, label_map={'background': 0, 'a': 1, 'b': 2}):
    """Of pictures, each a list of detections (box, label, score) and of objects (box, label, difficult)."""
    def tensors(pictures):
        return ([torch.tensor([row[0] for row in rows]).view(-1, 4) for rows in pictures],
                [torch.tensor([row[1] for row in rows], dtype=torch.long) for rows in pictures],
                [torch.tensor([float(row[2]) for row in rows]) for rows in pictures])
    return calculate_mAP(*tensors(detections), *tensors(objects), label_map)


def test_mAP_by_hand():
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0)]]) == ({'a': 1.}, 1.)
    # A miss: one of two objects found, precision 1 up to a recall of 0.5, that is at 6 of the 11 points
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0), (right, 1, 0)]])[1] == pytest.approx(6 / 11)
    # A false positive with a higher score: precision 1/2 at all points
    assert mAP([[(left, 1, .9), (far, 1, .95)]], [[(left, 1, 0)]])[1] == pytest.approx(1 / 2)
    # The same with a lower score does no harm
    assert mAP([[(left, 1, .9), (far, 1, .5)]], [[(left, 1, 0)]])[1] == 1
    # A duplicate is a false positive: hit, duplicate, hit; precision 1 at 6 points, 2/3 at 5
    found = [(left, 1, .9), (left, 1, .8), (right, 1, .7)]
    assert mAP([found], [[(left, 1, 0), (right, 1, 0)]])[1] == pytest.approx((6 + 5 * 2 / 3) / 11)
    # The right box with the wrong class, and the right box in another picture, are false positives
    assert mAP([[(left, 2, .9)], []], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    assert mAP([[], [(left, 1, .9)]], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    # The mean over two classes
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0), (right, 2, 0)]]) == ({'a': 1., 'b': 0.}, .5)


def test_mAP_needs_an_overlap_of_more_than_half():
    half = [0., 0., .5, .25]
    assert mAP([[(half, 1, .9)]], [[([0., 0., .5, .5], 1, 0)]])[1] == 0  # exactly one half
    assert mAP([[([0., 0., .5, .26], 1, .9)]], [[([0., 0., .5, .5], 1, 0)]])[1] == 1


def test_mAP_ignores_difficult_objects():
    objects = [(left, 1, 0), (right, 1, 1)]
    assert mAP([[(left, 1, .9)]], [objects])[1] == 1  # not found: no miss
    assert mAP([[(left, 1, .8), (right, 1, .9)]], [objects])[1] == 1  # found: no false positive
    assert mAP([[(left, 1, .8), (right, 1, .9), (right, 1, .85)]], [objects])[1] == 1  # found twice: neither
    assert math.isnan(mAP([[(right, 1, .9)]], [[(right, 1, 1)]])[1])  # a class of difficult objects only has no AP


def test_mAP_belongs_detections_to_the_object_they_overlap_most():
    """The second detection overlaps both objects by more than half, but more the one that is found already."""
    first, second = [0., 0., .5, .5], [.06, 0., .56, .5]
    objects = [(first, 1, 0), (second, 1, 0)]
    assert mAP([[(first, 1, .9), ([.01, 0., .51, .5], 1, .8)]], [objects])[1] == pytest.approx(6 / 11)


def test_mAP_of_ties_keeps_the_order_of_detections():
    objects = [[(left, 1, 0)]]
    assert mAP([[(left, 1, .5), (far, 1, .5)]], objects)[1] == 1
    assert mAP([[(far, 1, .5), (left, 1, .5)]], objects)[1] == pytest.approx(1 / 2)
    twins = [[(left, 1, 0), (left, 1, 0)]]  # two identical objects: both detections belong to the first
    assert mAP([[(left, 1, .5), (left, 1, .5)]], twins)[1] == pytest.approx(6 / 11)


def test_mAP_without_detections_or_objects():
    assert mAP([[], []], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    assert mAP([[([0., 0., 1., 1.], 0, 0.)]], [[(left, 1, 0)]]) == ({'a': 0.}, 0.)  # the placeholder
    for detections in ([[]], [[(left, 1, .9)]]):
        average_precisions, mean = mAP(detections, [[]])
        assert average_precisions == {} and math.isnan(mean)
    assert mAP([[(left, 2, .9)]], [[(right, 1, 0)]]) == ({'a': 0.}, 0.)  # class b has no objects and no AP


def test_mAP_equals_a_plain_count():
    """Against loops over classes, detections and objects, on random boxes."""
    def some(n, last):
        boxes = torch.randint(0, 2, (n, 4)) * .1  # few different corners: many overlaps, and many ties between them
        boxes[:, 2:] += .4
        return list(zip(boxes.tolist(), torch.randint(1, 3, (n,)).tolist(), last(n)))

    def scores(n):
        return (torch.randint(0, 10, (n,)) / 10).tolist()

    def difficulties(n):
        return (torch.rand(n) < .2).int().tolist()

    detections = [some(torch.randint(0, 25, ()).item(), scores) for _ in range(30)]
    objects = [some(torch.randint(0, 5, ()).item(), difficulties) for _ in range(30)]
    expected = {}
    for label, name in ((1, 'a'), (2, 'b')):
        ranked = [(score, i, box) for i, found in enumerate(detections) for box, l, score in found if l == label]
        ranked.sort(key=lambda row: -row[0])
        n_objects = sum(l == label and not difficult for rows in objects for _, l, difficult in rows)
        taken, hits, counted = set(), 0, []
        for n, (_, i, box) in enumerate(ranked):
            best = max(((box_iou(torch.tensor([box]), torch.tensor([b])).item(), -k, difficult)
                        for k, (b, l, difficult) in enumerate(objects[i]) if l == label), default=(0, 0, 0))
            if best[0] > .5 and best[2]:
                continue
            hit = best[0] > .5 and (i, best[1]) not in taken
            hits += hit
            taken |= {(i, best[1])} if hit else set()
            counted.append((hits / (len(counted) + 1), hits))
        expected[name] = sum(max([p for p, h in counted if h * 10 >= t * n_objects], default=0) for t in range(11)) / 11
    average_precisions, mean = mAP(detections, objects)
    assert average_precisions == pytest.approx(expected) and mean == pytest.approx(sum(expected.values()) / 2)
    assert 0.05 < mean < 0.95


# ------------------------------------------------------------------------------------------------- Training helpers

@pytest.mark.parametrize('capability, expected', [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_bfloat16_is_fast_on_gpus_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert utils.fast_in_bfloat16(torch.device('cuda')) is expected
    assert utils.fast_in_bfloat16(torch.device('cpu')) is False


# ------------------------------------------------------------------------------------------------------ Checkpoints

def test_checkpoint_round_trip(tmp_path):
    model, path = SSD300(n_classes=3, thin=16), str(tmp_path / 'c.pth')
    model.priors_cxcy = model.priors_cxcy * 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save_checkpoint(path, 4, model, optimizer, {'background': 0, 'a': 1, 'b': 2}, seed=7)
    saved = load_checkpoint(path)
    assert saved['epoch'] == 4 and saved['seed'] == 7 and saved['optimizer']['param_groups'][0]['lr'] == 0.5
    loaded = SSD300.from_checkpoint(saved)
    assert torch.equal(loaded.priors_cxcy, model.priors_cxcy)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert os.listdir(tmp_path) == ['c.pth']

    saved['label_map'] = {'background': 0, 'a': 1}
    with pytest.raises(UserError, match='does not fit'):
        SSD300.from_checkpoint(saved)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    path.write_bytes(b'old')

    def interrupted(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    model = SSD300(n_classes=2, thin=64)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(path), 0, model, torch.optim.SGD(model.parameters(), lr=1), {}, 0)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['c.pth']


class Malicious:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, zipped):
    content = {'epoch': 0, 'label_map': {}, 'model': Malicious(str(tmp_path / 'harm')), 'priors_cxcy': torch.zeros(1)}
    torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match='mkdir, which could be harmful') as error:
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert not (tmp_path / 'harm').exists() and '\n' not in str(error.value)


class Program(torch.nn.Module):
    """A TorchScript module: torch.load runs what it does when it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return 0, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[int, bool]):
        print('harm')
        self.training = state[1]


@pytest.mark.filterwarnings('ignore')
def test_a_program_is_refused(tmp_path, capfd):
    torch.jit.script(Program()).save(str(tmp_path / 'c.pth'))
    with pytest.raises(UserError, match='TorchScript'):
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert 'harm' not in capfd.readouterr().out


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04 no zip', pickle.dumps({'epoch': 1}), None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / 'c.pth'
    if content is None:
        file = io.BytesIO()
        torch.save({'weights': torch.zeros(3)}, file)
        content = file.getvalue()
    path.write_bytes(content)
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(str(path))
    assert '\n' not in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = str(tmp_path / 'c.pth')
    model = torch.nn.Linear(2, 2)
    model.priors_cxcy = torch.zeros(3, 4)
    save_checkpoint(path, 0, model, torch.optim.SGD(model.parameters(), lr=1), {'background': 0, 'cat': 1}, 0)
    with open(path, 'rb') as file:
        content = file.read()
    damages = (content[:len(content) // 2], content[:100], content.replace(b'OrderedDict', b'OrderedEict'),
               content.replace(b'}q', b'\xfdq', 1))
    for damaged, reason in zip(damages, ('', '', 'it calls collections.OrderedEict, which could be harmful',
                                         'Unsupported operand 253'), strict=True):
        with open(path, 'wb') as file:
            file.write(damaged)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        message = str(error.value)
        assert message.startswith(f'{path} is damaged or no checkpoint: {reason}') and '\n' not in message
        assert message.endswith('; take one that train.py wrote') and 'weights_only' not in message


def test_a_missing_checkpoint_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match='python train.py'):
        load_checkpoint(str(tmp_path / 'none.pth'))
