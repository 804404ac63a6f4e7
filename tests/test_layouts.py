"""Folders as annotation tools and people make them: which images and objects are listed, and for which split."""
import json
import os
import unicodedata

import pytest
from PIL import Image
from test_create_data_lists import annotation, list_names

from create_data_lists import create_data_lists
from errors import UserError
from images import list_images

box = (11, 12, 41, 52)  # of a dog in each image of 100x80 pixels


def add(folder, image_name, xml_name, objects=(('dog', box, ''),), image_size=(100, 80), **options):
    """Save an image, unless its name is None, and an annotation, unless its name is None."""
    if image_name is not None:
        (folder / image_name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', image_size).save(folder / image_name)
    if xml_name is not None:
        (folder / xml_name).parent.mkdir(parents=True, exist_ok=True)
        (folder / xml_name).write_text(annotation(*objects, **options), encoding='utf-8')


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def lists_of(folder, capsys, **options):
    """The names of the images for training and for the test, and what was printed; each image has one dog."""
    output = folder.parent / 'lists'
    create_data_lists(str(folder), None, str(output), **{'labels': ['dog'], **options})
    for split in ('TRAIN', 'TEST'):
        objects = json.loads((output / f'{split}_objects.json').read_text())
        assert all(of_image['boxes'] == [[10, 11, 40, 51]] for of_image in objects)
    assert all(os.path.isfile(path) for path in json.loads((output / 'TRAIN_images.json').read_text()))
    return *list_names(output), capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- What tools write

def cvat(folder):
    for i in range(10):
        add(folder, f'JPEGImages/{i}.jpg', f'Annotations/{i}.xml',
            size='<size><width>100</width><height>80</height><depth></depth></size>')
    write(folder / 'ImageSets/Main/default.txt', *map(str, range(10)))
    write(folder / 'labelmap.txt', 'dog:255,0,0::')


def labelimg(folder):
    for i in range(10):
        add(folder, f'{i}.jpg', f'{i}.xml')
    write(folder / 'predefined_classes.txt', 'dog')


def label_studio(folder):
    for i in range(12):
        add(folder, f'images/{i}.jpg', f'Annotations/{i}.xml' if i < 10 else None)


def vott(folder):
    for i in range(10):
        add(folder, f'JPEGImages/{i}.jpg', f'Annotations/{i}.xml',
            size='<size><width>0</width><height>0</height></size>')
    for label, flag in (('dog', 1), ('cat', -1)):
        write(folder / f'ImageSets/Main/{label}_train.txt', *(f'{i}.jpg {flag}' for i in range(8)))
        write(folder / f'ImageSets/Main/{label}_val.txt', *(f'{i}.jpg {flag}' for i in (8, 9)))


def supervisely(folder):
    for i in range(10):
        add(folder, f'JPEGImages/{i}.jpg', f'Annotations/{i}.xml')
    write(folder / 'ImageSets/Main/train.txt', *map(str, range(8)))
    write(folder / 'ImageSets/Main/val.txt', '8', '9')
    write(folder / 'ImageSets/Main/trainval.txt', *map(str, range(10)))


def labelme(folder):
    for i in range(10):
        add(folder, f'JPEGImages/{i}.jpg', f'Annotations/{i}.xml', [('dog', box, '<truncated/><difficult/>')])


def roboflow(folder):
    edges = '<bndbox><xmin>11</xmin><xmax>41</xmax><ymin>12</ymin><ymax>52</ymax></bndbox>'
    for i in range(10):
        name = f'{"train" if i < 7 else "valid" if i < 8 else "test"}/{i}_jpg.rf.0123456789abcdef'
        add(folder, name + '.jpg', None)
        write(folder / f'{name}.xml', f'<annotation><object><name>dog</name>{edges}</object></annotation>')
    write(folder / 'README.roboflow.txt', 'dogs')


def kaggle(folder):
    for i in range(10):
        add(folder, f'images/{i}.png', f'annotations/{i}.xml')


at_random = 8, 2  # of ten images


@pytest.mark.parametrize('layout, n_train, n_test, rule', [
    (cvat, 8, 2, '8 images for training, 2 for the test: at random, from its lists in ImageSets/Main: default (10).'),
    (labelimg, 8, 2, '8 images for training, 2 for the test: at random, from its folders: others (10).'),
    (label_studio, 8, 2, 'at random'), (vott, 8, 2, 'at random, from its lists in ImageSets/Main: cat_train (8), '),
    (supervisely, 8, 2, 'val is the test, by its lists in ImageSets/Main: trainval (10), '),
    (roboflow, 8, 2, 'as given by its folders: train (7), val (1), test (2).'),
    (labelme, 8, 2, 'at random'), (kaggle, 8, 2, 'at random')])
def test_what_tools_write(tmp_path, capsys, layout, n_train, n_test, rule):
    layout(tmp_path / 'data')
    train, test, printed = lists_of(tmp_path / 'data', capsys)
    assert (len(train), len(test)) == (n_train, n_test) and not set(train) & set(test)
    assert rule in printed
    if layout in (supervisely, roboflow):
        assert sorted(name[0] for name in test) == ['8', '9']
    assert f'Images without annotation, which are not listed: {2 if layout is label_studio else 0}.' in printed


# ------------------------------------------------------------------------------------------------------ Which files

def test_annotations_at_any_depth_in_any_case(tmp_path, capsys):
    data = tmp_path / 'data'
    add(data, 'JPEGImages/day1/a.JPG', 'Annotations/day1/a.XML')
    add(data, 'JPEGImages/day2/a.jpg', 'Annotations/day2/a.xml')
    add(data, 'photos/b.png', 'deep/down/b.xml')  # the only b
    add(data, 'SegmentationClass/c.png', None)
    add(data, 'JPEGImages/c.jpg', 'Annotations/c.xml')
    add(data, 'x/d.jpg', 'x/d.xml')  # beside
    add(data, 'JPEGImages/d.jpg', None)
    train, _, _ = lists_of(data, capsys, test_fraction=0.2)
    paths = [os.path.relpath(path, data) for path in json.loads((tmp_path / 'lists/TRAIN_images.json').read_text())
             + json.loads((tmp_path / 'lists/TEST_images.json').read_text())]
    assert sorted(paths) == sorted(map(os.path.normpath, [
        'JPEGImages/day1/a.JPG', 'JPEGImages/day2/a.jpg', 'photos/b.png', 'JPEGImages/c.jpg', 'x/d.jpg']))


def test_hidden_files_are_none(tmp_path, capsys):
    data = tmp_path / 'data'
    labelimg(data)
    (data / '._0.xml').write_bytes(b'\x00\x05\x16\x07')
    (data / '._0.jpg').write_bytes(b'\x00\x05\x16\x07')
    (data / '.DS_Store').write_bytes(b'\x00')
    write(data / '.idea/workspace.xml', '<project/>')
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 10 and '10 annotations. Images without annotation, which are not listed: 0.' in printed
    assert len(list_images([str(data)])) == 10


def test_links_to_folders_are_followed_once(tmp_path, capsys):
    data = tmp_path / 'data'
    labelimg(tmp_path / 'elsewhere')
    data.mkdir()
    try:
        (data / 'link').symlink_to(tmp_path / 'elsewhere', target_is_directory=True)
        (tmp_path / 'elsewhere/up').symlink_to(data, target_is_directory=True)
    except OSError:
        pytest.skip('links need a permission here')
    train, test, _ = lists_of(data, capsys)
    assert len(train + test) == 10


def test_names_with_dots_two_extensions_and_accents(tmp_path, capsys):
    data = tmp_path / 'data'
    add(data, 'a.b.c.jpg', 'a.b.c.xml')
    add(data, 'd.jpg', 'd.jpg.xml')
    add(data, unicodedata.normalize('NFD', 'images/é.jpg'), unicodedata.normalize('NFC', 'annotations/é.xml'))
    train, test, _ = lists_of(data, capsys, test_fraction=0.34)
    assert len(train + test) == 3


def test_xml_of_other_programs_is_left_alone(tmp_path, capsys):
    data = tmp_path / 'data'
    labelimg(data)
    write(data / 'sitemap.xml', '<urlset/>')
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 10 and 'data: 10 annotations.' in printed


# ------------------------------------------------------------------------------------------------------------ Splits

def images_beside(folder, names):
    for name in names:
        add(folder, f'{name}.jpg', f'{name}.xml')


def test_lines_of_lists(tmp_path, capsys):
    data = tmp_path / 'data'
    images_beside(data, ['a', 'b 1', 'c', 'd', 'e'])
    write(data / 'ImageSets/Main/trainval.txt', 'a.jpg', 'b 1', r'C:\photos\c.jpg 1', 'a')  # a only once
    write(data / 'ImageSets/Main/test.txt', 'd.jpg -1', 'photos/e')
    write(data / 'ImageSets/Main/dog_trainval.txt', 'a 1', 'd -1')  # VOC's lists of a class say nothing here
    train, test, printed = lists_of(data, capsys)
    assert (train, test) == (['a', 'b 1', 'c'], ['d', 'e'])
    assert 'data: 4 images for training, 2 for the test: ' in printed and 'trainval (4), test (2).' in printed


@pytest.mark.parametrize('lists, expected', [
    ({'train': 'ab', 'val': 'c', 'test': 'd'}, ('abc', 'd')), ({'train': 'ab', 'test': 'd'}, ('ab', 'd')),
    ({'train': 'ab', 'val': 'c', 'trainval': 'abc'}, ('ab', 'c')), ({'Training': 'ab', 'Validation': 'c'}, ('ab', 'c')),
    ({'train': 'ab', 'val': 'c', 'test': ''}, ('ab', 'c')),
    ({'test': 'd'}, ('abc', 'd')), ({'train': '', 'test': ''}, None), ({'trainval': 'abcd'}, None)])
def test_which_lists_count(tmp_path, capsys, lists, expected):
    data = tmp_path / 'data'
    images_beside(data, 'abcd')
    for name, images in lists.items():
        write(data / f'ImageSets/Main/{name}.txt', *images)
    train, test, printed = lists_of(data, capsys, test_fraction=0.25)
    if expected is None:
        assert (len(train), len(test)) == (3, 1) and 'at random' in printed
    else:
        assert (''.join(train), ''.join(test)) == expected


@pytest.mark.parametrize('names, expected', [
    (['train/a', 'valid/b', 'test/c'], ('ab', 'c')), (['Train/a', 'validation/b'], ('a', 'b')),
    (['images/train/a', 'images/val/b'], ('a', 'b')), (['training/a', 'testing/b', 'extra/c'], ('a', 'b')),
    (['extra/a', 'test/b'], ('a', 'b'))])
def test_folders_called_by_a_split(tmp_path, capsys, names, expected):
    data = tmp_path / 'data'
    for name in names:
        add(data, f'{name}.jpg', f'{name.replace("images", "annotations")}.xml')
    train, test, printed = lists_of(data, capsys)
    assert (''.join(sorted(train)), ''.join(test)) == expected


def test_folders_of_the_images_count_where_annotations_lie_together(tmp_path, capsys):
    data = tmp_path / 'data'
    for folder, name in (('train', 'a'), ('train', 'b'), ('test', 'c')):
        add(data, f'images/{folder}/{name}.jpg', f'annotations/{name}.xml')
    assert lists_of(data, capsys)[:2] == (['a', 'b'], ['c'])


def test_of_a_second_folder_only_the_test_is_left_out(tmp_path):
    images_beside(tmp_path / '07', 'ab')
    for name in ('train/c', 'valid/d', 'test/e'):
        add(tmp_path / '12', f'{name}.jpg', f'{name}.xml')
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), ['dog'], test_fraction=0.5)
    train, test = list_names(tmp_path)
    assert set(train) | set(test) == set('abcd') and len(test) == 1 and {'c', 'd'} < set(train)


def test_lines_with_folders_name_the_image_in_that_folder(tmp_path, capsys):
    data = tmp_path / 'data'
    for camera in ('cam1', 'cam2'):
        for i in (0, 1):
            add(data, f'JPEGImages/{camera}/{i}.jpg', f'Annotations/{camera}/{i}.xml')
    write(data / 'ImageSets/Main/train.txt', '/home/me/data/JPEGImages/cam1/0.jpg', 'cam1/1', '"cam2/1" 1')
    write(data / 'ImageSets/Main/test.txt', '/home/me/data/JPEGImages/cam2/0.jpg')
    lists_of(data, capsys)
    paths = json.loads((tmp_path / 'lists/TEST_images.json').read_text())
    assert paths == [str(data / 'JPEGImages/cam2/0.jpg')]


def test_an_annotation_whose_image_is_missing_is_named(tmp_path, capsys):
    data = tmp_path / 'data'
    images_beside(data, map(str, range(20)))
    (data / '7.jpg').unlink()
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 19 and f'{data / "7.xml"} or its image is missing' in printed


def test_without_a_single_box_the_error_says_what_the_objects_are(tmp_path, capsys):
    data = tmp_path / 'data'
    images_beside(data, 'abcde')
    for path in data.glob('*.xml'):
        path.write_text('<annotation><object><name>dog</name><robndbox><cx>3</cx></robndbox></object></annotation>')
    with pytest.raises(UserError, match=r'no training image of .*data has .* \(dog has no bndbox\)'):
        lists_of(data, capsys, labels=None)


@pytest.mark.parametrize('settings', [{'labels': 'dog'}, {'test_fraction': 20}])
def test_wrong_parameters_are_named(tmp_path, settings):
    images_beside(tmp_path / 'data', 'ab')
    with pytest.raises(UserError, match=f"{[*settings][0]} = .*{[*settings.values()][0]}.* set labels to None"):
        create_data_lists(str(tmp_path / 'data'), None, str(tmp_path), **settings)


# ----------------------------------------------------------------------------------------------- What is in the files

def test_an_object_without_a_box_is_dropped_and_swapped_edges_are_put_in_order(tmp_path, capsys):
    data = tmp_path / 'data'
    images_beside(data, 'abcd')
    polygon = '<object><name>dog</name><polygon><x1>3</x1><y1>4</y1></polygon></object>'
    text = annotation(('dog', (41, 52, 11, 12), '')).replace('</annotation>', polygon + '</annotation>')
    for name in 'ab':
        (data / f'{name}.xml').write_text(text)
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 4
    assert 'swapped the edges of 2 boxes, and dropped 2 boxes' in printed
    assert f'{data / "a.jpg"}: dog has no bndbox' in printed


@pytest.mark.parametrize('text, words', [
    (annotation(('dog', (.1, .2, .5, 1), '')), ['fractions', '[0.1, 0.2, 0.5, 1.0]', 'pixels']),
    (annotation(('', box, '')), ['an object has no name']),
    (annotation(('dog', (1, 2, 3), '')), ['an object has no bndbox/ymax']),
    (annotation(('dog', box, '')).replace('<name>', '<n>').replace('</name>', '</n>'), ['an object has no name'])])
def test_what_is_wrong_in_an_annotation_is_said(tmp_path, capsys, text, words):
    data = tmp_path / 'data'
    images_beside(data, 'ab')
    (data / 'a.xml').write_text(text)
    with pytest.raises(UserError):
        lists_of(data, capsys)
    [line] = capsys.readouterr().err.splitlines()
    assert 'a.xml' in line and all(word in line for word in words) and 'NoneType' not in line


def test_a_text_in_another_encoding_than_declared(tmp_path, capsys):
    data = tmp_path / 'data'
    images_beside(data, 'ab')
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + annotation(('d\xe4chsel', box, ''))
    (data / 'a.xml').write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError):
        lists_of(data, capsys)
    line = capsys.readouterr().err
    assert 'a.xml' in line and 'text at line 2, column 7' in line and 'another encoding than the file declares' in line


@pytest.mark.parametrize('suffix', ['.heic', '.dng'])
def test_an_image_that_pillow_cannot_read_is_not_called_missing(tmp_path, capsys, suffix):
    data = tmp_path / 'data'
    images_beside(data, 'ab')
    (data / 'a.jpg').rename(data / f'a{suffix}')
    (data / f'a{suffix}').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100))
    with pytest.raises(UserError):
        lists_of(data, capsys)
    line = capsys.readouterr().err
    assert f'a{suffix} is not an image that can be read' in line and 'convert it to JPEG or PNG' in line


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.gif', '.tif', '.webp'])
def test_half_an_image_is_found_whatever_its_format(tmp_path, capsys, suffix):
    data = tmp_path / 'data'
    images_beside(data, [str(i) for i in range(20)])
    (data / '3.jpg').unlink()
    Image.effect_noise((100, 80), 50).convert('RGB').save(data / f'3{suffix}')
    path = data / f'3{suffix}'
    path.write_bytes(path.read_bytes()[:os.path.getsize(path) // 2])
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 19 and f'{path} is not an image that can be read' in printed


def test_the_summary_says_when_the_objects_are_too_small_for_the_priors(tmp_path, capsys):
    data = tmp_path / 'data'
    small = ('cat', (1, 1, 4, 4), '')
    for i in range(5):
        add(data, f'{i}.jpg', f'{i}.xml', [('dog', box, ''), small, small])
    create_data_lists(str(data), None, str(tmp_path), labels=None)
    assert ('at least 0.5: 33% (of Pascal VOC 2008, 84%)\nHalf of the others cover less than 10x10 of the 300x300 '
            'pixels that the network sees: see "My objects are small" in README.md.') in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- Images without objects

@pytest.mark.parametrize('keep_empty', [False, True])
def test_training_images_without_objects_are_kept_if_asked(tmp_path, capsys, keep_empty):
    data = tmp_path / 'data'
    for i in range(5):
        add(data, f'train/{i}.jpg', f'train/{i}.xml', [('dog', box, '')] if i else [])
    add(data, 'test/9.jpg', 'test/9.xml', [])
    create_data_lists(str(data), None, str(tmp_path), ['dog'], keep_empty=keep_empty)
    train, test = list_names(tmp_path)
    assert ('0' in train) == keep_empty and len(train) == 4 + keep_empty and test == ['9']
    assert f'Left out {1 - keep_empty} training images without objects' in capsys.readouterr().out
    objects = json.loads((tmp_path / 'TRAIN_objects.json').read_text())
    assert sum(of_image['boxes'] == [] for of_image in objects) == keep_empty
