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
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torchvision.datasets.voc
from PIL import Image

import create_data_lists as script
import errors
from create_data_lists import choose_split, create_data_lists, find_images, parse_annotation, read_split
from demo import draw_dataset
from errors import UserError, run
from images import open_image
from utils import voc_labels

# ---------------------------------------------------------------------------------------------------------- Annotations

def annotation(*objects, size='<size><width>100</width><height>80</height></size>'):
    """XML of an annotation; an object is (name, box, more XML)."""
    edges = ('xmin', 'ymin', 'xmax', 'ymax')
    return f'<annotation>{size}' + ''.join(
        f'<object><name>{name}</name>{more}<bndbox>' + ''.join(f'<{e}>{v}</{e}>' for e, v in zip(edges, box))
        + '</bndbox></object>' for name, box, more in objects) + '</annotation>'


def parse(tmp_path, text, labels=voc_labels, **options):
    path = tmp_path / 'a.xml'
    path.write_text(text)
    return parse_annotation(str(path), labels, **options)


def test_a_word_of_the_parser_as_a_number_is_named(tmp_path):
    message = r"VOC format \(could not convert string to float: 'invalid token'\): an object"
    with pytest.raises(UserError, match=message):
        parse(tmp_path, annotation(('dog', ('invalid token', 2, 3, 4), '')))


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match='^None is not a folder: set the paths in create_data_lists.py'):
        create_data_lists(None, None, tmp_path)
    with pytest.raises(UserError, match='test_fraction = None in create_data_lists.py: set'):
        create_data_lists(str(tmp_path), None, tmp_path, test_fraction=None)


def test_annotation(tmp_path):
    part = '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    parsed = parse(tmp_path, annotation(('dog', (1, 1, 100, 80), '<difficult>1</difficult>'),
                                        ('person', (45.5, 10.25, 60, 20), part), ('cat', (0, 0, 101, 81), '')))
    assert parsed['boxes'] == [[0, 0, 99, 79], [44.5, 9.25, 59, 19], [0, 0, 100, 80]]  # the last was a pixel outside
    assert parsed['labels'] == ['dog', 'person', 'cat'] and parsed['difficulties'] == [1, 0, 0]
    assert parsed['dropped'] == []


def test_a_box_may_extend_a_pixel_beyond_the_image_and_a_tenth_for_rounding(tmp_path):
    inside = -0.05, -0.05, 101.05, 81.05
    outside = (-0.2, 5, 9, 9), (5, -0.2, 9, 9), (5, 5, 101.2, 9), (5, 5, 9, 81.2)
    parsed = parse(tmp_path, annotation(*[('dog', box, '') for box in (inside, *outside)]))
    assert parsed['boxes'] == [[0, 0, 100, 80]] and len(parsed['dropped']) == 4


@pytest.mark.parametrize('name, box, reason', [
    ('dog', (5, 5, 5, 9), 'no area'), ('dog', ('nan', 5, 5, 9), 'not finite'),
    ('dog', (5, 5, 110, 9), 'outside'), ('dog', (-5, 5, 10, 9), 'outside'),
    ('dog', (5, 5, 'inf', 9), 'not finite'), ('dog', (0, 5, .5, 9), 'no area'), ('dog', (5, 5, 5.05, 9), 'no area'),
    ('dog', (5, 5, 9, '5.00000001'), 'no area'),
    ('dragon', (5, 5, 10, 9), 'dragon'), ('background', (5, 5, 10, 9), 'background')])
def test_wrong_objects_are_dropped_with_a_reason(tmp_path, name, box, reason):
    parsed = parse(tmp_path, annotation((name, box, ''), ('cat', (5, 5, 10, 9), '')))
    assert parsed['boxes'] == [[4, 4, 9, 8]] and len(parsed['dropped']) == 1 and reason in parsed['dropped'][0]


def test_without_a_size_in_the_annotation_the_images_counts(tmp_path):
    for size in ('', '<size><width>0</width><height>0</height></size>', '<size><width>100</width></size>'):
        text = annotation(('dog', (5, 5, 110, 9), ''), ('cat', (5, 5, 100, 80), ''), size=size)
        assert len(parse(tmp_path, text, size=(100, 80))['dropped']) == 1
        assert len(parse(tmp_path, text)['dropped']) == 0
    with pytest.raises(UserError, match='a.xml is for an image of 100x80 pixels, but the image has 80x100: '):
        parse(tmp_path, annotation(), size=(80, 100))


laughs = ''.join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha" * 10}">' for i in range(12))


@pytest.mark.parametrize('text', [
    '', 'no xml', '<annotation><object></object></annotation>', annotation(('dog', ('a', 1, 2, 3), '')),
    annotation(('dog', (1, 2), '')), annotation(('', (1, 2, 3, 4), '')), annotation((' ', (1, 2, 3, 4), '')),
    '<html><body>Page not found</body></html>', '<?xml version="1.0" encoding="klingon"?>' + annotation(),
    '<?xml version="1.0" encoding="utf-7"?>' + annotation(), '\x00' * 100,
    annotation(*[('dog', (1, 2, 3, 4), '')] * 8733), annotation(('dog', (1, 2, 3, 4), '<difficult>maybe</difficult>')),
    f'<!DOCTYPE annotation [{laughs}]>' + annotation(('&e11;', (1, 2, 3, 4), '')),
    '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + annotation(('&e;', (1, 2, 3, 4), '')),
    '<!DOCTYPE annotation SYSTEM "e.dtd">' + annotation(('d&e;og', (1, 2, 3, 4), ''))])
def test_an_unreadable_annotation_is_named(tmp_path, text):
    with pytest.raises(UserError, match='a.xml is not an annotation') as error:
        parse(tmp_path, text)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_as_many_objects_as_priors_are_possible(tmp_path):
    assert len(parse(tmp_path, annotation(*[('dog', (1, 2, 3, 4), '')] * 8732))['boxes']) == 8732


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
    assert parse(tmp_path, annotation(('dog', (1, 2, 3, 4), difficult)))['difficulties'] == [expected]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'iso-8859-1', 'cp1252'])
def test_encodings_and_ends_of_lines(tmp_path, encoding):
    text = annotation(('d\xe4ch sel', (1, 2, 3, 4), ''))
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>' + text
    (tmp_path / 'a.xml').write_bytes(text.replace('><', '>\r\n<').replace(' sel', '\r\nsel').encode(encoding))
    parsed = parse_annotation(tmp_path / 'a.xml', ['d\xe4ch sel'])
    assert parsed['boxes'] == [[0, 1, 2, 3]] and parsed['labels'] == ['d\xe4ch sel']


def boxes_of(folder, size, box):
    """The boxes of a data set's only image, when its annotation states this size, or None, and this box."""
    size = '' if size is None else '<size><width>{}</width><height>{}</height></size>'.format(*size)
    (folder / 'Annotations/a.xml').write_text(annotation(('dog', box, ''), size=size))
    [(_, parsed)], _ = read_split(str(folder), 'test', ['Annotations/a.xml'], find_images(str(folder)), ['dog'])
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
        assert boxes_of(tmp_path, stored.size, (0, 0, 41, 26)) == [[0, 0, 25, 40]]  # a pixel beyond each edge
        assert boxes_of(tmp_path, stored.size, (1, 1, 40, 28)) == []  # outside
    elif height == 25:  # sides are swapped only by orientations from 5
        with pytest.raises(UserError, match="1 of the 1 images"):
            boxes_of(tmp_path, stored.size[::-1], box)
    if upright.size == stored.size and orientation > 1:  # nothing tells that the box is for the stored image
        assert boxes_of(tmp_path, stored.size, red_box(stored)) == [[edge - 1 for edge in red_box(stored)]]


# ---------------------------------------------------------------------------------------------------------------- Lists

def test_a_list_of_names_from_windows(tmp_path, capsys):
    draw_dataset(str(tmp_path), 2, 2)
    path = tmp_path / 'ImageSets/Main/test.txt'
    names = path.read_text().split()
    path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join([*names, '', 'IMG (1) ']).encode())
    found = find_images(str(tmp_path))
    _, test = choose_split(str(tmp_path), found, 0)
    assert test == [f'Annotations/{name}.xml' for name in names] + ['IMG (1)']
    path.write_bytes(b'\xff\xfe\x00\xd8')
    with pytest.raises(UserError, match='test.txt is not a list in UTF-8'):
        choose_split(str(tmp_path), found, 0)


def test_the_label_background_is_dropped_where_all_labels_are_taken(tmp_path, capsys):
    draw_dataset(str(tmp_path), 3, 1)
    path = tmp_path / 'Annotations/trainval_0001.xml'
    background = annotation(('background', (1, 1, 9, 9), ''), size='')[len('<annotation>'):]
    path.write_text(path.read_text().replace('</annotation>', background))
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=None)
    assert re.search(r"trainval_0001.jpg: label 'background' is not", capsys.readouterr().out)


def test_lists(tmp_path, capsys):
    folder = tmp_path / 'data'
    draw_dataset(str(folder), 4, 2)
    annotations = folder / 'Annotations'
    (annotations / 'trainval_0001.xml').write_text('<annotation></annotation>')
    (annotations / 'test_0001.xml').write_text('<annotation></annotation>')
    root = ET.parse(annotations / 'trainval_0002.xml').getroot()
    root.find('object/bndbox/xmax').text = root.find('object/bndbox/xmin').text
    ET.ElementTree(root).write(annotations / 'trainval_0002.xml')

    create_data_lists(str(folder), None, str(tmp_path / 'lists'), ('triangle', 'square', 'circle'), test_fraction=0)
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
    """A folder in VOC layout with images of 20x20 pixels, each of a dog; trainval_00.jpg, ..., test_00.jpg, ..."""
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
    (annotations / 'trainval_11.xml').write_text(annotation(size='<size><width>7</width><height>9</height></size>'))
    cut_image(images / 'test_00.jpg')
    (annotations / 'test_01.xml').unlink()
    (annotations / 'test_01.xml').mkdir()
    text = (annotations / 'test_00.xml').read_text().replace('dog', 'cat')  # the only cat is in an image left out
    (annotations / 'test_00.xml').write_text(text)

    create_data_lists(str(tmp_path), None, str(tmp_path), labels)
    assert list_names(tmp_path) == [[f'trainval_{i:02}' for i in range(50) if i not in (3, 5, 7, 9, 11)],
                                    [f'test_{i:02}' for i in range(2, 20)]]
    assert json.loads((tmp_path / 'label_map.json').read_text()) == {'background': 0, 'dog': 1}
    assert len(json.loads((tmp_path / 'TRAIN_objects.json').read_text())) == 45
    _, lines = capsys.readouterr().out.split("Left out 7 images that can't be read, or whose annotation can't:\n")
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
    with pytest.raises(UserError, match="12 of the 110 images in .*/12's split TRAIN can't be read") as error:
        create_data_lists(*folders, str(tmp_path), labels)
    assert '\n' not in str(error.value)
    out, err = capsys.readouterr()
    assert 'Left out' not in out and err.count('\n') == 10
    assert re.findall(r'trainval_(\d+)\.jpg is not an image', err) == [f'{i:02}' for i in range(10)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_one_broken_image_of_three_is_an_error_in_one_line(tmp_path, capsys):
    make_voc_folder(tmp_path, 3, 2)
    cut_image(tmp_path / 'JPEGImages/trainval_01.jpg')
    with pytest.raises(SystemExit, match=r"^Error: 1 of the 3 images in .* split TRAIN can't be read") as end:
        run(lambda: create_data_lists(str(tmp_path), None, str(tmp_path)))
    assert '\n' not in end.value.code and 'trainval_01.jpg is not' in capsys.readouterr().err
    assert not list(tmp_path.glob('*.json'))


def test_a_folder_without_annotations_is_named_where_all_labels_are_taken(tmp_path):
    make_voc_folder(tmp_path, 3, 2)
    shutil.rmtree(tmp_path / 'Annotations')
    with pytest.raises(UserError, match=r'has no annotations in VOC format \(.xml\): set the paths'):
        create_data_lists(str(tmp_path), None, str(tmp_path), labels=None)


@pytest.mark.parametrize('extension', ['.png', '.PNG'])
def test_an_annotation_with_two_images_is_left_out(tmp_path, capsys, extension):
    make_voc_folder(tmp_path, 11, 2)
    for name in ('unused.jpg', 'unused' + extension):
        Image.new('RGB', (20, 20)).save(tmp_path / 'JPEGImages' / name)
    (tmp_path / 'JPEGImages/trainval_01.txt').write_text('no image')
    create_data_lists(str(tmp_path), None, str(tmp_path))
    assert len(list_names(tmp_path)[0]) == 11
    capsys.readouterr()

    Image.new('RGB', (20, 20)).save(tmp_path / f'JPEGImages/trainval_01{extension}')
    create_data_lists(str(tmp_path), None, str(tmp_path))
    paths = [os.path.join(str(tmp_path), 'JPEGImages', f'trainval_01{suffix}') for suffix in ('.jpg', extension)]
    [line] = [line for line in capsys.readouterr().out.splitlines() if 'keep one' in line]
    assert all(path in line for path in paths) and len(list_names(tmp_path)[0]) == 10


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
    with pytest.raises(UserError, match='no training image of .*07 has an object'):
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
    assert train == sorted(train) and test == sorted(test)
    assert json.loads((tmp_path / 'label_map.json').read_text()) == \
        {'background': 0, 'circle': 1, 'square': 2, 'triangle': 3}


def test_a_missing_folder_is_named_with_the_remedy(tmp_path):
    missing = str(tmp_path / 'missing')
    make_voc_folder(tmp_path / '07', 1, 1)
    for folders in ((missing, None), (str(tmp_path / '07'), missing)):
        with pytest.raises(UserError, match='missing.*is not a folder: set the paths .* or download = True'):
            create_data_lists(*folders, str(tmp_path))


def test_the_summary_counts_images_and_objects(tmp_path, capsys):
    make_voc_folder(tmp_path, 3, 2)
    objects = ('cat', (1, 1, 9, 9), '<difficult>1</difficult>'), ('dog', (1, 1, 5, 5), ''), ('cat', (1, 1, 1, 9), '')
    for name, *of_image in (('trainval_00', *objects), ('trainval_01',), ('test_01', *objects[:1])):
        (tmp_path / f'Annotations/{name}.xml').write_text(annotation(*of_image, size=''))
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=('dog', 'cat'))
    assert capsys.readouterr().out.splitlines() == [
        f'{tmp_path}: 5 annotations. Images without annotation, which are not listed: 0.',
        f'{tmp_path}: 3 images for training, 2 for the test: as given by its '
        'lists in ImageSets/Main: trainval (3), test (2).',
        '                         train      test', 'images                       2         2',
        'objects                      3         2', 'of which difficult           1         1',
        '  dog                        2         1', '  cat                        1         1',
        'Left out 1 training images without objects, swapped the edges of 0 boxes, and dropped 1 boxes:',
        f'  {tmp_path / "JPEGImages" / "trainval_00.jpg"}: cat [1.0, 1.0, 1.0, 9.0] has no area',
        "Left out 0 images that can't be read, or whose annotation can't:", '  none',
        'Training objects that overlap some prior by at least 0.5: 100% (of Pascal VOC 2008, 84%)',
        f'The lists are in {tmp_path}.']


def test_without_test_images_there_is_an_error(tmp_path):
    make_voc_folder(tmp_path, 2, 0)
    with pytest.raises(UserError, match='no test image in .*raise test_fraction'):
        create_data_lists(str(tmp_path), None, str(tmp_path))


def test_by_default_the_classes_are_vocs_and_a_fifth_is_for_the_test(tmp_path):
    make_voc_folder(tmp_path, 10, 0)
    shutil.rmtree(tmp_path / 'ImageSets')
    create_data_lists(str(tmp_path), None, str(tmp_path))
    assert [len(names) for names in list_names(tmp_path)] == [8, 2]
    assert list(json.loads((tmp_path / 'label_map.json').read_text())) == ['background', *voc_labels]


@pytest.mark.parametrize('test_fraction, n_test', [(0.36, 4), (0.34, 3), (0.5, 5)])
def test_the_number_of_test_images_is_rounded_to_the_nearest(tmp_path, test_fraction, n_test):
    make_voc_folder(tmp_path, 10, 0)
    shutil.rmtree(tmp_path / 'ImageSets')
    create_data_lists(str(tmp_path), None, str(tmp_path), test_fraction=test_fraction)
    assert [len(names) for names in list_names(tmp_path)] == [10 - n_test, n_test]


def test_a_second_folder_without_splits_is_all_for_training(tmp_path):
    make_voc_folder(tmp_path / '07', 4, 2)
    make_voc_folder(tmp_path / '12', 10, 0)
    shutil.rmtree(tmp_path / '12/ImageSets')
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), test_fraction=0.5)
    train, test = list_names(tmp_path)
    assert sorted(train) == sorted([f'trainval_{i:02}' for i in [*range(4), *range(10)]])
    assert test == ['test_00', 'test_01']


def test_all_labels_are_those_of_training_and_test(tmp_path):
    make_voc_folder(tmp_path / '07', 2, 2)
    make_voc_folder(tmp_path / '12', 2, 0)
    for path, label in (('07/Annotations/test_01.xml', 'cat'), ('12/Annotations/trainval_01.xml', 'zebra')):
        (tmp_path / path).write_text((tmp_path / path).read_text().replace('dog', label))
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), labels=None)
    assert json.loads((tmp_path / 'label_map.json').read_text()) == {'background': 0, 'cat': 1, 'dog': 2, 'zebra': 3}
    for split, labels in (('TRAIN', [[2], [2], [2], [3]]), ('TEST', [[2], [1]])):
        objects = json.loads((tmp_path / f'{split}_objects.json').read_text())
        assert [image['labels'] for image in objects] == labels


@pytest.mark.parametrize('breakage', ['image', 'cut image', 'annotation', 'no image', 'size', 'disk full',
                                      'disk full later'])
def test_lists_are_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, breakage):
    draw_dataset(str(tmp_path), 3, 1)
    create_data_lists(str(tmp_path), None, str(tmp_path), labels=('square', 'circle', 'triangle'))
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
    image, annotated = tmp_path / 'JPEGImages/test_0000.jpg', tmp_path / 'Annotations/test_0000.xml'
    if breakage == 'image':
        image.unlink()
    elif breakage == 'cut image':
        image.write_bytes(image.read_bytes()[:-300])
    elif breakage == 'annotation':
        annotated.unlink()
    elif breakage == 'no image':
        image.write_text('text')
    elif breakage == 'size':
        annotated.write_text(annotation(size='<size><width>7</width><height>7</height></size>'))
    else:
        written = []

        def fsync(file):
            written.append(file)
            if len(written) == {'disk full': 1, 'disk full later': 3}[breakage]:
                raise OSError(28, 'No space left on device')
        monkeypatch.setattr(errors.os, 'fsync', fsync)
    with pytest.raises(UserError, match='No space left on device' if 'disk' in breakage else '1 of the 1 images'):
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
    script.download_voc(str(tmp_path / 'root'))
    devkit = tmp_path / 'root/VOCdevkit'
    create_data_lists(str(devkit / 'VOC2007'), str(devkit / 'VOC2012'), str(tmp_path), ('circle', 'square', 'triangle'))
    assert len(json.loads((tmp_path / 'TEST_images.json').read_text())) == 2
    assert len(json.loads((tmp_path / 'TRAIN_images.json').read_text())) == 5

    years['2012']['md5'] = 'wrong'
    with pytest.raises(UserError, match='2012'):
        script.download_voc(str(tmp_path / 'root'))
