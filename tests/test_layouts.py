"""Folders as annotation tools and people make them: which images and objects are listed, and for which split."""
import json
import os
import unicodedata

import pytest
from PIL import Image
from test_create_data_lists import annotation, list_names, size_of
from test_errors import throw

from create_data_lists import create_data_lists
from errors import UserError
from own_images import list_files, name_of

box = (11, 12, 41, 52)  # of a dog in each image of 100x80 pixels
digits = '0123456789'


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')


# What a folder is made of: functions that take the folder.

def pairs(image='{}.jpg', xml='{}.xml', names=digits, objects=(('dog', box, ''),), **options):
    """An image and an annotation with each of these names, unless its pattern is None."""
    def save(folder):
        for name in names:
            if image is not None:
                path = folder / image.format(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (100, 80)).save(path)
            if xml is not None:
                write(folder / xml.format(name), annotation(*objects, **options))
    return save


def text(path, *lines):
    return lambda folder: write(folder / path, *lines)


def in_main(folder='', **lists):
    """Lists in ImageSets/Main."""
    def save(data):
        for name, lines in lists.items():
            write(data / folder / f'ImageSets/Main/{name}.txt', *lines)
    return save


def links(path, target, names=digits):
    """Symbolic links to files or folders."""
    def save(folder):
        for name in names:
            (folder / path.format(name)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.format(name)).symlink_to(folder / target.format(name))
    return save


def build(tmp_path, *parts):
    for save in parts:
        save(tmp_path / 'data')
    return tmp_path / 'data'


def lists_of(folder, capsys, **options):
    """The names of the images for training and for the test, and what was printed; each image has one dog."""
    output = folder.parent / 'lists'
    create_data_lists(str(folder), None, str(output), **{'labels': ['dog'], **options})
    for split in ('TRAIN', 'TEST'):
        objects = json.loads((output / f'{split}_objects.json').read_text())
        assert all(of_image['boxes'] == [[10, 11, 40, 51]] for of_image in objects)
    assert all(os.path.isfile(path) for path in paths_in(output))
    return *list_names(output), capsys.readouterr().out


def paths_in(output, splits=('TRAIN', 'TEST')):
    """The paths of the listed images."""
    return [path for split in splits for path in json.loads((output / f'{split}_images.json').read_text())]


voc = 'JPEGImages/{}.jpg', 'Annotations/{}.xml'
roboflow = '{0}/{{}}_jpg.rf.0123456789abcdef.jpg', '{0}/{{}}_jpg.rf.0123456789abcdef.xml'
tools = {
    'CVAT': ([pairs(*voc, size='<size><width>100</width><height>80</height><depth></depth></size>'),
              in_main(default=digits), text('labelmap.txt', 'dog:255,0,0::')],
             'at random, from its lists in ImageSets/Main: default (10).'),
    'LabelImg': ([pairs(), text('predefined_classes.txt', 'dog')], 'at random, from its folders: others (10).'),
    'Label Studio': ([pairs('images/{}.jpg', 'Annotations/{}.xml'), pairs('images/{}.jpg', None, ('x', 'y'))],
                     'at random, from its folders: others (10).'),
    'VoTT': ([pairs(*voc, size=size_of(0, 0))] + [
        in_main(**{f'{label}_{split}': [f'{i}.jpg {flag}' for i in names]})
        for label, flag in (('dog', 1), ('cat', -1)) for split, names in (('train', digits[:8]), ('val', '89'))],
        'val is the test, by its lists in ImageSets/Main: train (8), val (2).'),
    'Supervisely': ([pairs(*voc), in_main(train=digits[:8], val='89', trainval=digits)],
                    'val is the test, by its lists in ImageSets/Main: trainval (10), '),
    'Labelme': ([pairs(*voc, objects=[('dog', box, '<truncated/><difficult/>')])], 'at random'),
    'Roboflow': ([pairs(*(pattern.format(split) for pattern in roboflow), names, size='')
                  for split, names in (('train', digits[:7]), ('valid', '7'), ('test', '89'))]
                 + [text('README.roboflow.txt', 'dogs')],
                 'as given by its folders: train (7), val (1), test (2).'),
    'masks': ([pairs(names=digits[1:]), pairs('fotos/0.jpg', '0.xml', '0', size='<filename>day1/0.jpg</filename>'),
               text('masken/0.png', 'broken')], 'at random'),
    'Kaggle': ([pairs('images/{}.png', 'annotations/{}.xml')], 'at random')}


@pytest.mark.parametrize('tool', tools)
def test_what_tools_write(tmp_path, capsys, tool):
    parts, rule = tools[tool]
    train, test, printed = lists_of(build(tmp_path, *parts), capsys)
    assert len(train) == 8 and len(test) == 2 and not set(train) & set(test)
    assert f'8 images for training, 2 for the test: {rule}' in printed or f', 2 for the test: {rule}' in printed
    if tool in ('Supervisely', 'Roboflow'):
        assert sorted(name[0] for name in test) == ['8', '9']
    left_out = '2, such as images/' if tool == 'Label Studio' else '0.'
    assert f'Images without annotation, left out: {left_out}' in printed


# ------------------------------------------------------------------------------------------------------ Which files

def test_annotations_at_any_depth_in_any_case(tmp_path, capsys):
    data = build(
        tmp_path, pairs('JPEGImages/{}.JPG', 'Annotations/{}.XML', ['day1/a']), pairs(*voc, ['day2/a', 'c']),
        pairs('photos/{}.png', 'deep/down/{}.xml', 'b'), pairs('SegmentationClass/{}.png', None, 'c'),  # the only b
        pairs('x/{}.jpg', 'x/{}.xml', 'd'), pairs(voc[0], None, 'd'),  # the first is beside
        pairs('north/photos/x/{}.jpg', 'north/boxes/{}.xml', 'e'),  # most words in common
        pairs('south/photos/x/{}.jpg', None, 'e'))
    lists_of(data, capsys, test_fraction=0.2)
    paths = [os.path.relpath(path, data) for path in paths_in(tmp_path / 'lists')]
    assert sorted(paths) == sorted(map(os.path.normpath, [
        'JPEGImages/day1/a.JPG', 'JPEGImages/day2/a.jpg', 'photos/b.png', 'JPEGImages/c.jpg', 'x/d.jpg',
        'north/photos/x/e.jpg']))


@pytest.mark.parametrize('parts, n', [
    ([pairs(), text('._0.xml', '\0'), text('._0.jpg', '\0'), text('.DS_Store', '\0'),
      text('.idea/workspace.xml', '<project/>')], 10),  # hidden files are none
    ([text('empty'), pairs('../elsewhere/{}.jpg', '../elsewhere/{}.xml'), links('link', '../elsewhere', [0]),
      links('../elsewhere/up', '', [0])], 10),  # links to folders are followed once
    ([pairs('{}.b.c.jpg', '{}.b.c.xml', ['\udce9']), pairs('{}.jpg', '{}.jpg.xml', 'd'),  # \xe9, not in UTF-8
      pairs(unicodedata.normalize('NFD', 'images/é.jpg'), unicodedata.normalize('NFC', 'annotations/é.xml'), 'e')], 3)])
def test_each_pair_is_found_and_nothing_else(tmp_path, capsys, parts, n):
    train, test, printed = lists_of(build(tmp_path, *parts), capsys, test_fraction=.34)
    assert len(train + test) == n and f'{n} annotations. Images without annotation, left out: 0.' in printed
    assert 'that are no annotations' not in printed


objects = annotation(('dog', box, ''), size='')[len('<annotation>'):-len('</annotation>')]
declared = '<?xml version="1.0" encoding="{}"?>'.format


@pytest.mark.parametrize('xml', [
    f'<annotation verified="yes">{objects}</annotation>', f'<annotation\n>{objects}</annotation>',
    f'<annotation xmlns="http://host/voc">{objects}</annotation>', f'\ufeff<annotation>{objects}</annotation>',
    declared('utf-8') + f'<!-- <a> {"-x" * 9999} --><?a b?><!DOCTYPE annotation><annotation>{objects}</annotation>',
    f'<v:annotation xmlns:v="v">{objects.replace("<", "<v:").replace("<v:/", "</v:")}</v:annotation>',
    *((declared(encoding) + f'<annotation>{objects}<o>\u72d7</o></annotation>').encode(encoding)
      for encoding in ('utf-16', 'gb2312', 'shift_jis'))])
def test_annotations_are_told_by_their_root(tmp_path, capsys, xml):
    """So those whose image is missing are named."""
    data = build(tmp_path, pairs(names=range(30)))
    for path in data.glob('*.xml'):
        path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    (data / '7.jpg').unlink()
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 29 and f'{data / "7.xml"} or its image is missing' in printed


@pytest.mark.parametrize('name, xml, root', [
    ('sitemap.xml', '<urlset/>', 'urlset'), ('3.tif.xml', '<metadata xml:lang="en"><Esri/></metadata>', 'metadata'),
    ('3.jpg.xml', '<metadata/>', 'metadata'), ('3.jpg.aux.xml', '<PAMDataset/>', 'PAMDataset'),
    ('meta/3.xml', '<g:MD_Metadata xmlns:g="http://www.isotc211.org/2005/gmd"/>', 'MD_Metadata'),
    ('annotations.xml', '<annotations><image name="3.jpg"/></annotations>', 'annotations'),
    ('3.jpg.xml', '<metadata><broken></metadata>', 'metadata'), ('notes.xml', 'no xml', 'None')])
def test_xml_of_other_programs_is_left_alone_and_counted(tmp_path, capsys, name, xml, root):
    train, test, printed = lists_of(build(tmp_path, pairs(), text(name, xml)), capsys)
    assert len(train + test) == 10 and 'data: 10 annotations.' in printed
    assert f'.xml files that are no annotations, left alone: 1, such as {name}, whose root is {root}.' in printed


# --------------------------------------------------------------------------------------------- Each image only once

def task(name, subset=None, n=5):
    """Folders of a task in CVAT; each task has the same names of frames."""
    frames = [f'frame_{i}' for i in range(n)]
    return [pairs(f'{name}/JPEGImages/{{}}.png', f'{name}/Annotations/{{}}.xml', frames),
            in_main(name, **({subset: frames} if subset else {}))]


oriented = {'objects': [], 'size': '<object><name>dog</name><robndbox><cx>3</cx></robndbox></object>'}
folders = 'Annotations/Horizontal Bounding Boxes/{}.xml', 'Annotations/Oriented Bounding Boxes/{}.xml'


@pytest.mark.parametrize('parts, n_train, words', [
    ([pairs('JPEGImages/{}.jpg', folders[0]), pairs(None, folders[1], **oriented)], 8,
     'without a box whose image has another annotation, left alone: 10, such as Annotations/Oriented'),
    ([pairs(), pairs(None, 'a/{}.xml', objects=[]), in_main(train=digits[:8], test='89')], 8, 'such as a/0.xml'),
    ([*task('hall', 'Train'), *task('yard', 'Test')], 5, 'train (5), test (5).'),
    ([*task('hall', 'Train'), *task('yard', 'Test'), *task('roof')], 5, 'train (5), test (5), not used (5).'),
    ([*task('hall', 'Train', 9), *task('yard', 'default', 9), *task('roof', 'Test', 1)], 9, 'test (1), not used (9).'),
    ([pairs(f'{{}}.{kind}.jpg', f'{{}}.{kind}.xml', digits[:5]) for kind in ('rgb', 'bw')], 8, ''),
    ([*(pairs(f'{{}}.{kind}.jpg', f'{{}}.{kind}.xml', digits[:5]) for kind in ('rgb', 'bw')),
      in_main(train=[f'{i}.rgb' for i in digits[:5]], test=[f'{i}.bw' for i in digits[:5]])], 5, 'train (5), test (5)'),
    ([pairs('{}.jpg', '{}.jpg.xml'), pairs('{}.png', None)], 8, 'left out: 0.'),
    ([pairs('all/{}.jpg', 'all/{}.xml'), links('train/{}.jpg', 'all/{}.jpg', digits[:7]), links('test/{}.jpg',
      'all/{}.jpg', digits[7:]), pairs(None, 'train/{}.xml', digits[:7]), pairs(None, 'test/{}.xml', digits[7:])], 7,
     'train (7), test (3), others (10).')])
def test_what_could_be_listed_twice_is_listed_once(tmp_path, capsys, parts, n_train, words):
    train, test, printed = lists_of(build(tmp_path, *parts), capsys)
    assert len(train) == n_train and len(test) == 10 - n_train and words in printed
    assert len(set(map(os.path.realpath, paths_in(tmp_path / 'lists')))) == 10
    if 'hall' in printed:
        assert all('hall' in path for path in paths_in(tmp_path / 'lists', ['TRAIN']))


@pytest.mark.parametrize('parts, second, n, words', [
    ([pairs('{}.jpg', 'anna/{}.xml'), pairs(None, 'bert/{}.xml')], False, 10, ['0.jpg', 'anna/0.xml', 'bert/0.xml']),
    ([pairs(), pairs(None, '{}.jpg.xml')], False, 10, ['0.jpg', '0.xml', '0.jpg.xml']),
    ([pairs(), pairs(None, 'sub/{}.xml', '37')], False, 2, ['3.jpg', '3.xml', 'sub/3.xml']),
    ([pairs(), text('sub/3.xml', f'<annotation>{objects.replace("<bndbox>", "<bndbox >")}</annotation>')], False, 1,
     ['3.jpg', '3.xml', 'sub/3.xml']),
    ([pairs(), in_main(train=digits[:8], test='789')], False, 1, ['7.jpg', 'for TRAIN', 'for TEST', '7.xml']),
    ([pairs(), in_main(train=digits[:8], val='6789')], False, 2, ['6.jpg', 'for TRAIN', 'for TEST', '6.xml']),
    ([*task('hall', 'train'), in_main(test=['hall/frame_1'])], False, 1, ['frame_1.png', 'for TRAIN', 'for TEST']),
    ([pairs('a/{}.jpg', 'a/{}.xml'), links('b/{}.jpg', 'a/{}.jpg'), pairs(None, 'b/{}.xml')], False, 10,
     ['a/0.jpg', 'a/0.xml', 'b/0.xml']),
    ([pairs(names=range(13))], True, 13, ['0.jpg', 'for TRAIN'])])
def test_an_image_that_is_listed_twice_is_an_error_that_names_it(tmp_path, capsys, parts, second, n, words):
    folder = str(build(tmp_path, *parts))
    with pytest.raises(UserError, match=f'^{n} images are listed twice .*: keep one annotation of each'):
        create_data_lists(folder, folder if second else None, str(tmp_path), ['dog'])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == min(n, 10) and all(word in lines[0] for word in words) and not list(tmp_path.glob('*.json'))


@pytest.mark.parametrize('images', [
    ('visible/{}.jpg', 'infrared/{}.jpg'), ('{}.rgb.jpg', '{}.bw.jpg'), ('{}.jpg', '{}.PNG')])
def test_an_annotation_with_two_images_is_named_with_the_remedy(tmp_path, capsys, images):
    data = build(tmp_path, pairs('x/{}.jpg', 'x/{}.xml', [f'x{i}' for i in range(40)]),
                 *(pairs(image, '{}.xml', 'a') for image in images))
    train, test, printed = lists_of(data, capsys, test_fraction=.5)
    [line] = [line for line in printed.splitlines() if 'choose a folder' in line]
    assert len(train + test) == 40 and all(str(data / path.format('a')) in line for path in (*images, '{}.xml'))


# ------------------------------------------------------------------------------------------------------------ Splits

def test_lines_of_lists(tmp_path, capsys):
    """VOC's lists of a class say nothing if there are others."""
    data = build(tmp_path, pairs(names=['a', 'sub/a', 'b 1', *'cde']), in_main(test=['d.jpg -1', 'photos/e']), in_main(
        trainval=['a.jpg', 'b 1', r'C:\photos\c.jpg 1', 'a'], dog_trainval=['a 1', 'd -1']))
    train, test, printed = lists_of(data, capsys)
    assert (train, test) == (['a', 'b 1', 'c'], ['d', 'e'])
    assert 'data: 3 images for training, 2 for the test: ' in printed and 'trainval (3), test (2), not' in printed


def test_lists_from_windows(tmp_path, capsys):
    data = build(tmp_path, pairs('x/{}.jpg', 'x/{}.xml'), in_main('x', test=''))
    path = data / 'x/ImageSets/Main/test.txt'
    path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join([*digits[1:], '', 'IMG (1) ', *digits[1:]]).encode())
    train, test, printed = lists_of(data, capsys)
    assert train == ['0'] and ''.join(test) == digits[1:] and f'{data / "x/IMG (1)"} or its image is missing' in printed
    path.write_bytes(b'\xff\xfe\x00\xd8')
    with pytest.raises(UserError, match='test.txt is not a list in UTF-8'):
        lists_of(data, capsys)


@pytest.mark.parametrize('lists, expected', [
    ({'train': 'ab', 'val': 'c', 'test': 'd'}, ('abc', 'd')), ({'train': 'ab', 'test': 'd'}, ('ab', 'd')),
    ({'train': 'ab', 'val': 'c', 'trainval': 'abc'}, ('ab', 'c')), ({'Training': 'ab', 'Validation': 'c'}, ('ab', 'c')),
    ({'train': 'ab', 'val': 'c', 'test': ''}, ('ab', 'c')), ({'crash_test': 'ab', 'x': 'cd'}, None),
    ({'test': 'd'}, ('abc', 'd')), ({'train': '', 'test': ''}, None), ({'trainval': 'abcd'}, None)])
def test_which_lists_count(tmp_path, capsys, lists, expected):
    data = build(tmp_path, pairs(names='abcd'), in_main(**lists))
    train, test, printed = lists_of(data, capsys, test_fraction=0.25)
    if expected is None:
        assert (len(train), len(test)) == (3, 1) and 'at random' in printed
    else:
        assert (''.join(train), ''.join(test)) == expected


@pytest.mark.parametrize('names, expected', [
    (['train/a', 'valid/b', 'test/c'], ('ab', 'c')), (['Train/a', 'validation/b'], ('a', 'b')),
    (['images/train/a', 'images/val/b'], ('a', 'b')), (['training/a', 'testing/b', 'extra/c'], ('a', 'b')),
    (['extra/a', 'test/b'], ('a', 'b')), (['images_train/a', 'images_test/b'], ('a', 'b')),
    (['images_train/a', 'images_test/a'], ('a', 'a')),  # images_test/a.jpg belongs to annotations_test/a.xml
    (['images-trainval/a', 'images-test/b', 'extra/c'], ('a', 'b')), (['x/WIDER_train/a', 'x/WIDER_val/b'], ('a', 'b')),
    (['images/train2017/a', 'images/val2017/b', 'images/test2017/c'], ('ab', 'c')),
    (['TrainImages/a', 'TestImages/b'], ('a', 'b')), (['my test/img train/a', 'my test/img val/b'], ('a', 'b')),
    (['train/test_1/a', 'test/train_2/b'], ('a', 'b')),
    (['x_test/a', 'extra/b', 'extra/c'], None), (['latest/a', 'contest/b', 'trains/c'], None),
    (['my_test/images/a', 'my_test/images/b', 'my_test/images/c'], None)])
def test_folders_called_by_a_split(tmp_path, capsys, names, expected):
    data = build(tmp_path, *(pairs(xml=f'{name.replace("images", "annotations")}.xml', names=[name]) for name in names))
    train, test, printed = lists_of(data, capsys, test_fraction=.34)
    if expected is None:
        assert (len(train), len(test)) == (2, 1) and 'at random, from its folders: others (3).' in printed
    else:
        assert (''.join(sorted(train)), ''.join(test)) == expected and 'at random' not in printed


def test_folders_of_the_images_count_where_annotations_lie_together(tmp_path, capsys):
    data = build(tmp_path, pairs('images-train/{}.jpg', 'annotations/{}.xml', 'ab'),
                 pairs('images-test/{}.jpg', 'annotations/{}.xml', 'c'))
    assert lists_of(data, capsys)[:2] == (['a', 'b'], ['c'])


@pytest.mark.parametrize('path, expected', [
    ('train.txt', True), ('lists/test_list.csv', True), ('ImageSets/val.txt', True),
    ('ImageSets/Layout/Test2007.txt', True), ('classes.txt', False), ('labels/trains.txt', False),
    ('test.json', False), ('ImageSets/Main/test.txt', False)])
def test_lists_elsewhere_are_not_read_and_one_line_says_so(tmp_path, capsys, path, expected):
    _, _, printed = lists_of(build(tmp_path, pairs(names='abcde'), text(path, 'a')), capsys)
    lines = [line for line in printed.splitlines() if f'ImageSets/Main are not read, such as {path}' in line]
    assert len(lines) == expected and ('at random' in printed) == (path != 'ImageSets/Main/test.txt')


@pytest.mark.parametrize('names, expected, words', [
    (('train/c', 'valid/d', 'test/e'), 'cd', '2 images for training, 1 of the test left out: as given by its folders'),
    (('x/c', 'x/d', 'test/e'), 'cd', '2 images for training, 1 of the test left out: as given by its folders: test'),
    (('val/c', 'x/d', 'test/e'), 'cd', '2 images for training, 1 of the test left out: as given by its folders: val'),
    (('x/c', 'x/d'), 'cd', '2 images for training, 0 of the test left out: as given by its folders: others (2).')])
def test_of_a_second_folder_only_the_test_is_left_out(tmp_path, capsys, names, expected, words):
    pairs(names='ab')(tmp_path / '07')
    pairs(names=names)(tmp_path / '12')
    create_data_lists(str(tmp_path / '07'), str(tmp_path / '12'), str(tmp_path), ['dog'], test_fraction=0.5)
    train, test = list_names(tmp_path)
    assert set(train) | set(test) == {*'ab', *expected} and len(test) == 1 and set(expected) < set(train)
    assert f'{tmp_path / "12"}: {words}' in capsys.readouterr().out


@pytest.mark.parametrize('inside', ['', 'VOC', 'my data'])
def test_lines_with_folders_name_the_image_in_that_folder(tmp_path, capsys, inside):
    data = build(tmp_path, lambda folder: pairs(*voc, [f'cam{camera}/{i}' for camera in (1, 2) for i in (0, 1)])(
        folder / inside), in_main(inside, train=['/home/me/data/JPEGImages/cam1/0.jpg', 'cam1/1', '"cam2/1" 1'],
                                  test=['/home/me/data/JPEGImages/cam2/0.jpg']))
    lists_of(data, capsys)
    assert paths_in(tmp_path / 'lists', ['TEST']) == [str(data / inside / 'JPEGImages/cam2/0.jpg')]
    assert name_of('x/.xml') == '.xml'


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    for error in PermissionError(13, 'Permission denied', str(tmp_path)), OSError(5, 'I/O error', f'{tmp_path}/sub'):
        monkeypatch.setattr(os, 'scandir', lambda path, error=error: throw(error))
        assert list_files(str(tmp_path)) == [] and capsys.readouterr().err == f'{error}: left out\n'


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.gif', '.tif', '.webp', '.heic', '.dng'])
def test_half_an_image_is_found_whatever_its_format(tmp_path, capsys, suffix):
    """One that Pillow cannot read is not called missing."""
    data = build(tmp_path, pairs(names=range(20)))
    path = data / f'3{suffix}'
    (data / '3.jpg').unlink()
    if suffix in ('.heic', '.dng'):
        path.write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic\xfc' + bytes(100))
    else:
        Image.effect_noise((100, 80), 50).convert('RGB').save(path)
        path.write_bytes(path.read_bytes()[:os.path.getsize(path) // 2])
    train, test, printed = lists_of(data, capsys)
    assert len(train + test) == 19 and f'{path} is not an image that can be read' in printed


@pytest.mark.parametrize('label', ['cat', 'Cat'])
def test_the_summary_says_that_objects_are_small_and_labels_alike(tmp_path, capsys, label):
    objects = [('dog', box, ''), ('cat', (1, 1, 4, 4), ''), (label, (1, 1, 4, 4), '')]
    create_data_lists(str(build(tmp_path, pairs(objects=objects))), None, str(tmp_path), labels=None)
    printed = capsys.readouterr().out
    assert ('at least 0.5: 33% (of Pascal VOC 2008, 84%)\nHalf of the others cover less than 10x10 of the 300x300 '
            'pixels that the network sees: see "My objects are small" in README.md; ') in printed
    assert ('\nSome labels below differ only in upper and lower case: ' in printed) == (label == 'Cat')


@pytest.mark.parametrize('keep_empty', [False, True])
def test_training_images_without_objects_are_kept_if_asked(tmp_path, capsys, keep_empty):
    data = build(tmp_path, pairs('train/{}.jpg', 'train/{}.xml', '1234'),
                 pairs('{}.jpg', '{}.xml', ('train/0', 'test/9'), objects=[]))
    create_data_lists(str(data), None, str(tmp_path), ['dog'], keep_empty=keep_empty)
    train, test = list_names(tmp_path)
    assert ('0' in train) == keep_empty and len(train) == 4 + keep_empty and test == ['9']
    assert f'Left out {1 - keep_empty} training images without objects' in capsys.readouterr().out
    objects = json.loads((tmp_path / 'TRAIN_objects.json').read_text())
    assert sum(of_image['boxes'] == [] for of_image in objects) == keep_empty
