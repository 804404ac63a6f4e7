"""Annotations, and the lists made from them."""
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import tarfile
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torchvision.datasets.voc
from PIL import Image

import create_data_lists as script
import errors
from create_data_lists import create_data_lists, find_images, parse_annotation, read_split
from errors import UserError, run
from images import open_image
from utils import voc_labels


def size_of(width, height):
    return f'<size><width>{width}</width><height>{height}</height></size>'


def bndbox(box):
    return '<bndbox>' + ''.join(f'<{e}>{v}</{e}>' for e, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box)) + '</bndbox>'


def annotation(*objects, size='<size><width>100</width><height>80</height></size>'):
    """XML of an annotation; an object is (name, box, more XML)."""
    return f'<annotation>{size}' + ''.join(
        f'<object><name>{name}</name>{more}{bndbox(box)}</object>' for name, box, more in objects) + '</annotation>'


def parse(tmp_path, text, labels=voc_labels, **options):
    path = tmp_path / 'a.xml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_annotation(str(path), labels, **options)


def test_annotation(tmp_path):
    part = '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    parsed = parse(tmp_path, annotation(('dog', (1, 1, 100, 80), '<difficult>1</difficult>'),
                                        ('person', (45.5, 10.25, 60, 20), part), ('cat', (0, 0, 101, 81), '')))
    assert parsed['boxes'] == [[0, 0, 99, 79], [44.5, 9.25, 59, 19], [0, 0, 100, 80]]  # the last was a pixel outside
    assert parsed['labels'] == ['dog', 'person', 'cat'] and parsed['difficulties'] == [1, 0, 0]
    assert parsed['dropped'] == parsed['notes'] == []


@pytest.mark.parametrize('box, expected, n_clipped', [  # in an image of 100x80 pixels
    ((-.05, -.05, 101.05, 81.05), [0, 0, 100, 80], 0),  # a pixel, and a tenth for rounding
    ((-.2, 5, 9, 9), [0, 4, 8, 8], 1), ((5, -.2, 9, 9), [4, 0, 8, 8], 1), ((5, 5, 101.2, 9), [4, 4, 100, 8], 1),
    ((5, 5, 9, 81.2), [4, 4, 8, 80], 1), ((-3, -3, 120, 90), [0, 0, 100, 80], 1),
    ((9, 30, 5, -3), [4, 0, 8, 29], 1),  # swapped, too
    ((-48, 5, 51, 9), [0, 4, 50, 8], 1), ((-50, 5, 51, 9), 'mostly outside', 0),  # half of it is inside, less than half
    ((61, 41, 141, 121), 'mostly outside', 0), ((61, 41, 111, 91), [60, 40, 100, 80], 1),
    ((-1e308, 5, 1e308, 9), 'mostly outside', 0), ((120, 5, 130, 9), 'mostly outside', 0),
    ((-5, 5, -3, 9), 'mostly outside', 0),
    ((5, 5, 5, 9), 'no area', 0), ((0, 5, .5, 9), 'no area', 0), ((5, 5, 5.05, 9), 'no area', 0),
    ((5, 5, 9, '5.00000001'), 'no area', 0), (('nan', 5, 5, 9), 'not finite', 0), ((5, 5, 'inf', 9), 'not finite', 0)])
@pytest.mark.parametrize('size', [(100, 80), (0, 0)])  # as the annotation states it; the second: unknown
def test_boxes_are_read_clipped_or_dropped(tmp_path, box, expected, n_clipped, size):
    text = annotation(('dog', box, ''), ('cat', (5, 5, 10, 9), ''), size=size_of(*size))
    parsed = parse(tmp_path, text, size=(100, 80))
    assert parsed['boxes'] == ([[4, 4, 9, 8]] if isinstance(expected, str) else [expected, [4, 4, 9, 8]])
    assert [expected in reason for reason in parsed['dropped']] == ([True] if isinstance(expected, str) else [])
    assert parsed['notes'].count("boxes across the image's edge, clipped") == n_clipped


box = (5, 6, 40, 30)
polygon = '<object><name>dog</name><polygon><x1>3</x1></polygon></object>'
dog, cat = (f'<object><name>{name}</name>{bndbox(box)}</object>' for name in ('dog', 'cat'))


@pytest.mark.parametrize('xml, labels, reasons', [
    (f'<object><name>dog</name><difficult>1</difficult>{bndbox(box) * 3}</object>', ['dog'] * 3, []),
    (f'<objects>{dog}{cat}</objects>', ['dog', 'cat'], []), (f'<a><b>{dog}</b></a><c>{cat}</c>', ['dog', 'cat'], []),
    (dog.replace('</object>', f'{cat}</object>'), ['dog', 'cat'], []),  # one in the other
    (dog + cat.replace('<name>', '<name>dog</name><name>'), ['dog'], ['dog has more than one name']),
    (dog + cat.replace('<xmin>', '<xmin>3</xmin><xmin>'), ['dog'], ['cat has more than one xmin']),
    (dog + cat.replace('<name>', '<difficult/><difficult/><name>'), ['dog'], ['cat has more than one difficult']),
    (dog + bndbox(box), ['dog'], ['a bndbox in annotation, not in an object']),
    (f'<object><name>cat</name><boxes>{bndbox(box) * 2}</boxes></object>{dog}', ['dog'],
     ['a bndbox in boxes, not in an object'] * 2 + ['cat has no bndbox']),
    pytest.param(dog * 8732, ['dog'] * 8732, [], id='as many objects as priors'),
    (dog + polygon, ['dog'], ['dog has no bndbox']), (dog.replace('<name>', '<polygon/><name>'), ['dog'], []),
    (dog + dog.replace('dog', 'dragon'), ['dog'], ["label 'dragon' is not one of the labels"]),
    (dog + dog.replace('dog', 'background'), ['dog'], ["label 'background' is not one of the labels"])])
def test_what_an_annotation_holds_is_read_or_dropped_with_a_reason(tmp_path, xml, labels, reasons):
    parsed = parse(tmp_path, f'<annotation>{xml}</annotation>')
    assert parsed['labels'] == labels and parsed['dropped'] == reasons
    assert parsed['boxes'] == [[4, 5, 39, 29]] * len(labels)
    assert parsed['difficulties'] == [int('<difficult>1' in xml)] * len(labels)


close = ['images whose annotation states a size that is off by some pixels']
exchanged = ['images whose annotation states width and height exchanged']


@pytest.mark.parametrize('size, stated, box, assumed', [
    ((640, 480), (640, 480), box, []), ((640, 480), (0, 0), box, []), ((640, 480), (640, 0), box, []),
    ((640, 480), ('', ''), box, []), ((640, 480), ('nan', 'None'), box, []), ((640, 480), (-1, -1), box, []),
    ((200, 100), (203, 97), box, close), ((1000, 600), (1010, 594), box, close), ((102, 100), (100, 102), box, close),
    ((200, 100), (204, 100), box, None), ((1000, 600), (1010, 593), box, None),  # more than three, and a hundredth
    ((640, 480), (320, 240), box, None), ((640, 480), (1280, 960), box, None), ((640, 480), ('inf', 480), box, []),
    ((640, 480), (480, 640), (50, 60, 600, 300), exchanged), ((640, 480), (479, 642), (50, 60, 600, 300), exchanged),
    ((640, 480), (480, 640), None, exchanged),
    ((640, 480), (480, 640), (50, 60, 300, 300), None), ((640, 480), (480, 640), (50, 60, 600, 600), None)])
def test_the_stated_size_is_a_hint(tmp_path, size, stated, box, assumed):
    text = annotation(*[('dog', box, '')] * (box is not None), size=size_of(*stated))
    if assumed is not None:
        parsed = parse(tmp_path, text, size=size)
        assert parsed['notes'] == assumed and len(parsed['boxes']) == (box is not None) and not parsed['dropped']
    else:
        message = '^[^ ]*a.xml is for an image of {}x{} pixels, but the image has {}x{}: .* delete its <size>$'
        with pytest.raises(UserError, match=message.format(*stated, *size)):
            parse(tmp_path, text, size=size)


def test_without_an_image_the_stated_size_counts(tmp_path):
    for size, n_dropped in (('', 0), (size_of(0, 0), 0), ('<size><width>100</width></size>', 0), (size_of(60, 80), 1)):
        assert len(parse(tmp_path, annotation(('dog', (5, 5, 250, 9), ''), size=size))['dropped']) == n_dropped
    assert 'has no area' in parse(tmp_path, annotation(('dog', (1, 1, 1, 1), '')))['dropped'][0]


laughs = ''.join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha" * 10}">' for i in range(12))


@pytest.mark.parametrize('text, words', [
    *((text, ['is not an annotation']) for text in (
        '', 'no xml', '<annotation><object>dog</object></annotation>', annotation((' ', (1, 2, 3, 4), '')),
        '<html><body>Page not found</body></html>', '<?xml version="1.0" encoding="klingon"?>' + annotation(),
        '<?xml version="1.0" encoding="hex"?>' + annotation(), '\x00' * 100,
        annotation(('dog', box, '<difficult>maybe</difficult>')),
        f'<!DOCTYPE annotation [{laughs}]>' + annotation(('&e11;', box, '')),
        '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + annotation(('&e;', box, '')),
        '<!DOCTYPE annotation SYSTEM "e.dtd">' + annotation(('d&e;og', box, '')))),
    (annotation(('dog', (.1, .2, .5, 1), '')), ['fractions', '[0.1, 0.2, 0.5, 1.0]', 'pixels']),
    (annotation(*[('dog', box, '')] * 8733), ['has 8733 objects for 8732 priors']),
    (annotation(('dog', (1, 2, 3), '')), ['an object has no ymax']),
    (annotation(('dog', box, '')).replace('name>', 'n>'), ['an object has no name']),
    (annotation(('dog', ('invalid token', 2, 3, 4), '')), ["(could not convert string to float: 'invalid token')"]),
    (('<?xml version="1.0" encoding="utf-8"?>\n' + annotation(('d\xe4chsel', box, ''))).encode('latin-1'),
     ['(not well-formed (invalid token): line 2, column 7']),
    (annotation(('a & b', box, '')), ['(not well-formed (invalid token): line 1, column'])])
def test_an_unreadable_annotation_is_named_with_the_reason(tmp_path, text, words):
    with pytest.raises(UserError, match='^[^ ]*a.xml ') as error:
        parse(tmp_path, text, size=(100, 80))
    line = str(error.value)
    assert all(word in line for word in words) and '\n' not in line and len(line) < 500


def test_entities_are_read_but_not_fetched(tmp_path):
    parsed = parse(tmp_path, '<!DOCTYPE annotation [<!ENTITY e "dog">]>' + annotation(('&e;', (1, 2, 3, 4), '')))
    assert parsed['labels'] == ['dog']
    (tmp_path / 'e.dtd').write_text('<!ENTITY e "dog">')
    outside = f'<!DOCTYPE annotation [<!ENTITY % f SYSTEM "file://{tmp_path}/e.dtd"> %f;]>'
    with pytest.raises(UserError, match='undefined entity'):
        parse(tmp_path, outside + annotation(('&e;', (1, 2, 3, 4), '')))


@pytest.mark.parametrize('difficult, expected', [('<difficult>1.0</difficult>', 1), ('<difficult>\n1 </difficult>', 1),
                                                 ('<difficult> </difficult>', 0), ('<difficult/>', 0), ('', 0)] + [
    (f'<difficult>{word}</difficult>', expected) for word, expected in (
        ('Unspecified', 0), ('False', 0), ('no', 0), ('true', 1), ('YES', 1), ('2', 1), ('-1', 1), ('0.0', 0))])
def test_difficult_may_be_missing_or_a_word(tmp_path, difficult, expected):
    text = annotation(('dog', (1, 2, 3, 4), difficult)).replace('</annotation>', '<object/></annotation>')  # it is none
    assert parse(tmp_path, text)['difficulties'] == [expected]


@pytest.mark.parametrize('encoding, label', [
    ('utf-8', 'd\xe4ch sel'), ('utf-8-sig', 'd\xe4ch sel'), ('utf-16', 'd\xe4ch sel'), ('iso-8859-1', 'd\xe4ch sel'),
    ('cp1252', 'd\xe4ch sel'), ('gb2312', '\u72d7 sel'), ('shift_jis', '\u72ac sel'), ('euc-kr', '\uac1c sel'),
    ('utf-16, really utf-8', 'd\xe4ch sel')])  # from C#
def test_encodings_and_ends_of_lines(tmp_path, encoding, label):
    declared, encoding = encoding.split(', ')[0].removesuffix('-sig'), encoding.split('really ')[-1]
    text = f'<?xml version="1.0" encoding="{declared}"?>' + annotation((label, (1, 2, 3, 4), ''))
    parsed = parse(tmp_path, text.replace('><', '>\r\n<').replace(' sel', '\r\nsel').encode(encoding), [label])
    assert parsed['boxes'] == [[0, 1, 2, 3]] and parsed['labels'] == [label]


def boxes_of(folder, size, box):
    """The boxes of a data set's only image, when its annotation states this size, or None, and this box."""
    size = '' if size is None else size_of(*size)
    (folder / 'Annotations/a.xml').write_text(annotation(('dog', box, ''), size=size))
    [(_, parsed)], _ = read_split(str(folder), 'test', find_images(str(folder)), ['dog'])
    return parsed['boxes']


def red_box(image):
    """Where an image is red: the first and last columns and rows, from 1."""
    rows, columns = (np.array(image.convert('RGB')) == (255, 0, 0)).all(axis=2).nonzero()
    return columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize('height', [25, 40])  # the second: square
@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_for_the_stored_image_are_turned_upright(tmp_path, orientation, height):
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
        assert boxes_of(tmp_path, (39, 24), red_box(stored)) == expected
        assert boxes_of(tmp_path, stored.size, (0, 0, 41, 26)) == [[0, 0, 25, 40]]  # a pixel beyond each edge
        assert boxes_of(tmp_path, stored.size, (-1, -1, 43, 28)) == [[0, 0, 25, 40]]  # clipped
        assert boxes_of(tmp_path, stored.size, (3, 3, 20, 38)) == [[2, 2, 19, 37]]  # fits only the upright image
    elif height == 25:  # sides are swapped only by orientations from 5
        with pytest.raises(UserError, match="1 of the 1 images"):
            boxes_of(tmp_path, (25, 40), (1, 1, 20, 20))
    if upright.size == stored.size and orientation > 1:  # nothing tells that the box is for the stored image
        assert boxes_of(tmp_path, stored.size, red_box(stored)) == [[edge - 1 for edge in red_box(stored)]]


# ---------------------------------------------------------------------------------------------------------------- Lists

def make_voc_folder(folder, n_train, n_test):
    """A folder in VOC layout with images of 20x20 pixels, each of a dog; trainval_00.jpg, ..., test_00.jpg, ..."""
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for split, n in (('trainval', n_train), ('test', n_test)):
        ids = [f'{split}_{i:02}' for i in range(n)]
        if ids:
            (folder / f'ImageSets/Main/{split}.txt').write_text('\n'.join(ids))
        for id in ids:
            Image.new('RGB', (20, 20)).save(folder / f'JPEGImages/{id}.jpg')
            (folder / f'Annotations/{id}.xml').write_text(annotation(('dog', (2, 2, 9, 9), ''), size=size_of(20, 20)))


def list_names(folder):
    """The names of the listed images, without extension: for training, for the test."""
    return [[os.path.splitext(os.path.basename(path))[0] for path in json.loads((folder / name).read_text())]
            for name in ('TRAIN_images.json', 'TEST_images.json')]


def cut_image(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize('labels', [('dog',), None])
def test_what_cannot_be_read_is_left_out_and_named_in_one_run(tmp_path, capsys, labels):
    make_voc_folder(tmp_path, 50, 20)
    images, annotations = tmp_path / 'JPEGImages', tmp_path / 'Annotations'
    cut_image(images / 'trainval_03.jpg')
    (annotations / 'trainval_05.xml').unlink()
    (images / 'trainval_07.jpg').unlink()
    (annotations / 'trainval_09.xml').write_text('<annotation>')
    (annotations / 'trainval_11.xml').write_text(annotation(size=size_of(7, 9)))
    cut_image(images / 'test_00.jpg')
    (annotations / 'test_01.xml').unlink()
    (annotations / 'test_01.xml').mkdir()
    (annotations / 'test_00.xml').write_text(annotation(('cat', box, '')))  # the only cat is in an image left out
    create_data_lists(str(tmp_path), None, str(tmp_path), labels)
    assert list_names(tmp_path) == [[f'trainval_{i:02}' for i in range(50) if i not in (3, 5, 7, 9, 11)],
                                    [f'test_{i:02}' for i in range(2, 20)]]
    assert json.loads((tmp_path / 'label_map.json').read_text()) == {'background': 0, 'dog': 1}
    _, lines = capsys.readouterr().out.split("Left out 7 images that can't be read, or whose annotation can't.\n")
    expected = (r'trainval_03\.jpg is not an image .*truncated', r'trainval_05 or its image is missing',
                r'trainval_07.xml or its image is missing', r'trainval_09\.xml is not an annotation',
                r'trainval_11\.xml is for an image of 7x9 pixels', r'test_00\.jpg is not an image .*truncated',
                r'test_01 or its image is missing')
    for line, pattern in zip(lines.splitlines(), expected):
        assert re.search(pattern, line), line
    assert lines.count('\n') == 9 and lines.splitlines()[7].startswith('Training objects that overlap some prior')


@pytest.mark.parametrize('labels', [('dog',), None])
def test_more_than_a_tenth_of_a_split_that_cannot_be_read_is_an_error(tmp_path, capsys, labels):
    """Each split of each folder counts by itself."""
    make_voc_folder(tmp_path / '07', 100, 20)
    make_voc_folder(tmp_path / '12', 110, 0)
    folders = str(tmp_path / '07'), str(tmp_path / '12')
    for i in range(11):
        cut_image(tmp_path / f'12/JPEGImages/trainval_{i:02}.jpg')
    create_data_lists(*folders, str(tmp_path), labels)  # exactly a tenth
    assert len(list_names(tmp_path)[0]) == 199
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
    capsys.readouterr()

    (tmp_path / '12/Annotations/trainval_11.xml').unlink()
    with pytest.raises(SystemExit, match="^Error: 12 of the 110 images in .*/12's split TRAIN can't be read") as end:
        run(lambda: create_data_lists(*folders, str(tmp_path), labels))
    assert '\n' not in end.value.code
    out, err = capsys.readouterr()
    assert 'Left out' not in out and err.count('\n') == 10
    assert re.findall(r'trainval_(\d+)\.jpg is not an image', err) == [f'{i:02}' for i in range(10)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize('voc07_path, voc12_path, settings, message', [
    ('missing', None, {}, '[^ ]*missing is not a folder: set the paths .* or download = True'),
    ('07', 'missing', {}, '[^ ]*missing is not a folder: set the paths .* or download = True'),
    (None, None, {}, 'None is not a folder: set the paths in create_data_lists.py'),
    ('07', None, {'labels': 'dog'}, r"labels = 'dog' in .* set it to None, or a list such as \['cat'\]"),
    ('07', None, {'labels': 5}, 'labels = 5 in create_data_lists.py: set it to None, or a list'),
    ('07', None, {'test_fraction': 20}, 'test_fraction = 20 in create_data_lists.py: set'),
    ('07', None, {'test_fraction': None}, 'test_fraction = None in create_data_lists.py: set'),
    ('07/JPEGImages', None, {}, r'[^ ]*JPEGImages has no annotations in VOC format \(.xml\): set the paths'),
    ('07', None, {'labels': ['dragon']}, r"no training .*07 has an .* \['dragon'\] \(dropped: label 'dog' is not"),
    ('empty', None, {'labels': None}, r'no training image of .*empty has an object with a box \(dropped: none\): '),
    ('single', None, {'test_fraction': 1}, 'no training image in .*single: '),
    ('no test', None, {}, 'no test image in .*no test: list some in ImageSets, set test_fraction')])
def test_a_missing_folder_image_or_setting_is_named(tmp_path, voc07_path, voc12_path, settings, message):
    make_voc_folder(tmp_path / '07', 1, 1)
    make_voc_folder(tmp_path / 'single', 1, 0)
    make_voc_folder(tmp_path / 'no test', 2, 0)
    make_voc_folder(tmp_path / 'empty', 1, 1)
    (tmp_path / 'empty/Annotations/trainval_00.xml').write_text('<annotation/>')
    paths = [path and str(tmp_path / path) for path in (voc07_path, voc12_path)]
    with pytest.raises(UserError, match=f'^{message}'):
        create_data_lists(*paths, str(tmp_path), **settings)


def test_the_lists_and_their_summary(tmp_path, capsys):
    make_voc_folder(tmp_path, 4, 2)
    objects = ('cat', (1, 1, 9, 9), '<difficult>1</difficult>'), ('dog', (1, 1, 5, 5), ''), ('cat', (1, 1, 1, 9), '')
    more = ('dog', (1, 1, 25, 9), ''), ('dog', (9, 9, 5, 5), '')
    for name, size, *of_image in (('trainval_00', '', *objects), ('trainval_01', '', ('cow', (1, 1, 9, 9), '')), (
            'test_00', ''), ('test_01', '', *objects[:1]), ('trainval_02', size_of(19, 20), *more)):
        (tmp_path / f'Annotations/{name}.xml').write_text(annotation(*of_image, size=size))
    (tmp_path / 'JPEGImages/trainval_03.jpg').unlink()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(tmp_path / 'JPEGImages/trainval_03.png')
    create_data_lists(str(tmp_path), None, str(tmp_path / 'lists'), labels=('dog', 'cat'))
    lists = {path.name: json.loads(path.read_text()) for path in (tmp_path / 'lists').iterdir()}
    assert lists == {
        'label_map.json': {'background': 0, 'dog': 1, 'cat': 2},
        'TRAIN_images.json': [str(tmp_path / f'JPEGImages/trainval_0{name}') for name in ('0.jpg', '2.jpg', '3.png')],
        'TRAIN_objects.json': [{'boxes': [[0, 0, 8, 8], [0, 0, 4, 4]], 'labels': [2, 1], 'difficulties': [1, 0]},
                               {'boxes': [[0, 0, 20, 8], [4, 4, 8, 8]], 'labels': [1, 1], 'difficulties': [0, 0]},
                               {'boxes': [[1, 1, 8, 8]], 'labels': [1], 'difficulties': [0]}],
        'TEST_images.json': [str(tmp_path / f'JPEGImages/test_0{i}.jpg') for i in range(2)],
        'TEST_objects.json': [{'boxes': [], 'labels': [], 'difficulties': []},
                              {'boxes': [[0, 0, 8, 8]], 'labels': [2], 'difficulties': [1]}]}
    notes = [f'Read 1 {what}.' for what in (
        'boxes with swapped edges, put in order', "boxes across the image's edge, clipped",
        'images whose annotation states a size that is off by some pixels',
        'images with more than 8 bits, each scaled to 8 by itself')]
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line for line in lines if line.startswith('Read ')) == sorted(notes)
    assert [line for line in lines if not line.startswith('Read ')] == [
        f'{tmp_path}: 6 annotations. Images without annotation, left out: 0.',
        f'{tmp_path}: 4 images for training, 2 for the test: as given by its '
        'lists in ImageSets/Main: trainval (4), test (2).',
        '                         train      test', 'images                       3         2',
        'objects                      5         1', 'of which difficult           1         1',
        '  dog                        4         0', '  cat                        1         1',
        'Left out 1 training images without objects, dropped 2 boxes.',
        f'  {tmp_path / "JPEGImages" / "trainval_00.jpg"}: cat [1.0, 1.0, 1.0, 9.0] has no area',
        f'  {tmp_path / "JPEGImages" / "trainval_01.jpg"}: label \'cow\' is not one of the labels',
        "Left out 0 images that can't be read, or whose annotation can't.",
        'Training objects that overlap some prior by at least 0.5: 100% (of Pascal VOC 2008, 84%)',
        f'The lists are in {tmp_path / "lists"}.']


@pytest.mark.parametrize('n, settings, n_test', [
    (10, {}, 2), (10, {'test_fraction': .36}, 4), (10, {'test_fraction': .34}, 3), (10, {'test_fraction': .5}, 5)])
def test_a_folder_without_splits_is_split_always_alike(tmp_path, n, settings, n_test):
    """By default a fifth is for the test, and the classes are VOC's."""
    make_voc_folder(tmp_path, n, 0)
    shutil.rmtree(tmp_path / 'ImageSets')
    lists = []
    for _ in range(2):
        create_data_lists(str(tmp_path), None, str(tmp_path), **settings)
        lists.append(list_names(tmp_path))
    (train, test), again = lists
    assert again == [train, test] == [sorted(train), sorted(test)] and len(test) == n_test
    assert sorted(train + test) == [f'trainval_{i:02}' for i in range(n)]
    assert list(json.loads((tmp_path / 'label_map.json').read_text())) == ['background', *voc_labels]
    for i in range(4):  # four more, the first by name
        for path in 'JPEGImages/{}.jpg', 'Annotations/{}.xml':
            shutil.copy(tmp_path / path.format('trainval_00'), tmp_path / path.format(f'a{i}'))
    create_data_lists(str(tmp_path), None, str(tmp_path), **settings)
    more = list_names(tmp_path)[1]  # of those that trained, at most as many are now in the test as it has grown by
    assert len(set(train) & set(more)) <= len(more) - n_test <= 2


@pytest.mark.parametrize('labels, in_list', [
    (None, ['1', 'dog', 'traffic light', 'zebra']), ([1, ' traffic  light'], ['1', 'traffic light'])])
def test_labels_of_training_and_test_as_text_without_needless_blanks(tmp_path, labels, in_list):
    make_voc_folder(tmp_path / '07', 2, 2)
    make_voc_folder(tmp_path / '12', 3, 0)
    for path, label in (('07/Annotations/test_01.xml', 'traffic\nlight'), ('12/Annotations/trainval_01.xml', 'zebra'),
                        ('12/Annotations/trainval_02.xml', 1), ('12/Annotations/trainval_00.xml', 'background')):
        (tmp_path / path).write_text((tmp_path / path).read_text().replace('dog', str(label)))
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), labels=labels)
    label_map = json.loads((tmp_path / 'label_map.json').read_text())
    assert label_map == {label: index for index, label in enumerate(['background', *in_list])}
    for split, expected in (('TRAIN', ['dog', 'dog', 'zebra', '1']), ('TEST', ['dog', 'traffic light'])):
        objects = json.loads((tmp_path / f'{split}_objects.json').read_text())
        assert [index for of_image in objects for index in of_image['labels']] == \
            [label_map[label] for label in expected if label in label_map]


@pytest.mark.parametrize('n_written', [0, 2])
def test_lists_are_written_whole_or_not_at_all(tmp_path, monkeypatch, n_written):
    make_voc_folder(tmp_path, 3, 1)
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=('cat', 'dog'))
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
    full = OSError(28, 'No space left on device')
    monkeypatch.setattr(errors.os, 'fsync', Mock(side_effect=[None] * n_written + [full]))
    with pytest.raises(UserError, match='No space left on device'):
        create_data_lists(str(tmp_path), None, str(tmp_path), labels=('dog',))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_download_merges_the_archives(tmp_path, monkeypatch):
    """Small archives on a server on this machine stand in for Pascal VOC's, with their own checksums."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server, years = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler), {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key, year, splits in (('2007', '2007', (2, 0)), ('2007-test', '2007', (0, 2)), ('2012', '2012', (3, 0))):
        source = tmp_path / 'source' / key
        make_voc_folder(source, *splits)
        archive = tmp_path / f'{key}.tar'
        with tarfile.open(archive, 'w') as tar:
            tar.add(source, f'VOCdevkit/VOC{year}')
        years[key] = {'url': f'http://127.0.0.1:{server.server_port}/{archive.name}', 'filename': archive.name,
                      'base_dir': f'VOCdevkit/VOC{year}', 'md5': hashlib.md5(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(torchvision.datasets.voc, 'DATASET_YEAR_DICT', years)
    script.download_voc(str(tmp_path / 'root'))
    devkit = tmp_path / 'root/VOCdevkit'
    create_data_lists(str(devkit / 'VOC2007'), str(devkit / 'VOC2012'), str(tmp_path), ['dog'])
    assert list(map(len, list_names(tmp_path))) == [5, 2]

    years['2012']['md5'] = 'wrong'
    with pytest.raises(UserError, match='2012'):
        script.download_voc(str(tmp_path / 'root'))
    server.shutdown()
    server.server_close()
