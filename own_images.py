"""Any folder with images and annotations in Pascal VOC's format: which image belongs to which annotation, which are for
training and which for the test, and boxes in images that are stored rotated.
"""
import os
import random
import re
import unicodedata
from pathlib import Path

from errors import UserError
from images import is_image

split_names = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
               'test': 'test', 'testing': 'test'}


def find_images(folder):
    """Find all annotations under a folder, and their images. The image has the annotation's name, and lies beside it,
    or in the folder that corresponds (see `folders_of`), or anywhere, if just one has that name.

    :return: dict of an annotation's path -> list of its image's path, or none, or several; all relative to the folder
    :raises UserError: the folder is missing, or has no annotation"""
    images, unknown, found = {}, {}, {}
    paths = list_files(folder)
    for path in paths:
        if is_image(path):
            images.setdefault(name_of(path), []).append(path)
        elif not path.lower().endswith(('.xml', '.txt', '.json')):  # it may be an image that must be converted first
            unknown.setdefault(name_of(os.path.splitext(path)[0]), []).append(path)
    for path in paths:
        if path.lower().endswith('.xml'):
            same_name = images.get(name_of(path), [])
            beside = [image for image in same_name if os.path.dirname(image) == os.path.dirname(path)]
            corresponding = [image for image in same_name if folders_of(image) == folders_of(path)]
            image_paths = beside or corresponding or same_name or unknown.get(name_of(path), [])
            if image_paths or b'<annotation>' in Path(folder, path).read_bytes()[:1000]:  # others are not annotations
                found[path] = image_paths
    if not found:
        what = 'has no annotations in VOC format (.xml)' if os.path.isdir(folder) else 'is not a folder'
        raise UserError(f'{folder} {what}: set the paths in create_data_lists.py to folders with images and '
                        'annotations, or download = True')
    n_images = sum(len(images[name]) for name in images.keys() - set(map(name_of, found)))
    print(f'{folder}: {len(found)} annotations. Images without annotation, which are not listed: {n_images}.')
    return found


def read_image_sets(folder, found):
    """Read the lists in ImageSets/Main. A line is the name of an image, perhaps with folder and extension. A flag may
    follow, as in VOC's lists of one class; here it does not matter.

    :return: dict of a list's name -> paths of annotations; a name without annotation or image stays as it is"""
    by_name, image_sets = {}, {}
    for path in found:
        by_name.setdefault(name_of(path), []).append(path)
    for path in list_files(folder):
        list_name, extension = os.path.splitext(os.path.basename(path).lower())
        if folders_of(path)[-2:] != ['imagesets', 'main'] or extension != '.txt':
            continue
        try:
            with open(os.path.join(folder, path), encoding='utf-8-sig') as file:  # sig: skip a byte order mark
                lines = [line.strip().replace('\\', '/').replace('"', '') for line in file if line.strip()]
        except ValueError as error:
            raise UserError(f'{os.path.join(folder, path)} is not a list in UTF-8 ({error}): save it as that') from None
        for line in lines:
            if name_of(line) not in by_name:
                line = re.sub(r'\s+(-1|0|1)$', '', line)  # without the flag
            same_name = by_name.get(name_of(line), [name_of(line)])
            # The line's path may begin with folders of another computer, so compare only its end.
            in_folder = [name for name in same_name if folders_of(line)[-len(folders_of(name)):] == folders_of(name)]
            image_sets.setdefault(split_names.get(list_name, list_name), []).extend(in_folder or same_name)
    return image_sets


def choose_split(folder, found, test_fraction):
    """Choose the images for training and for the test: by the lists in ImageSets/Main called trainval, train, val or
    test; without lists, by folders with these names; else at random, in the same way each time. Without a test, val
    is the test.

    :param test_fraction: share of the test if it is chosen at random, from 0 to 1; or None if all are for training
    :return: paths of annotations for training, and for the test, see `find_images`"""
    sets, where = read_image_sets(folder, found), 'lists in ImageSets/Main:'
    if not sets:
        where = 'folders:'
        for path, image_paths in found.items():
            names = [name for either in (path, *image_paths) for name in folders_of(either) if name in split_names]
            sets.setdefault(split_names[names[0]] if names else 'others', []).append(path)
    trainval, train, val, test = (sets.get(name, []) for name in ('trainval', 'train', 'val', 'test'))
    trainval = trainval or train + val or sorted(set(found).difference(test))
    if test_fraction is None:
        train, test, rule = trainval, [], 'all for training, by'
    elif test:
        train, rule = trainval, 'as given by'
    elif train and val:
        test, rule = val, 'val is the test, by'
    else:
        paths = sorted({path for of_set in sets.values() for path in of_set}, key=os.path.splitext)
        random.Random(0).shuffle(paths)
        n_test = round(test_fraction * len(paths))
        train, test = sorted(paths[n_test:]), sorted(paths[:n_test])
        rule = 'at random, from'
    known = [name for name in ('trainval', 'train', 'val', 'test', 'others') if name in sets] or list(sets)
    print(f'{folder}: {len(train)} images for training, {len(test)} for the test: {rule} its {where} '
          f'{", ".join(f"{name} ({len(sets[name])})" for name in known)}.')
    return train, test


def list_files(folder):
    """:return: all files under a folder, relative to it and sorted; links are followed, hidden files left out"""
    paths, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in names if not name.startswith('.')]
    return sorted(paths, key=os.path.splitext)


# Folders whose names only say what is in them: Annotations/day1/a.xml belongs to JPEGImages/day1/a.jpg
content_folders = 'jpegimages', 'images', 'image', 'imgs', 'img', 'annotations', 'annotation', 'labels', 'xmls', 'xml'


def folders_of(path):
    """:return: list of the folders on a path, in lower case, without `content_folders`"""
    folders = os.path.dirname(path).replace(os.sep, '/').lower().split('/')
    return [name for name in folders if name not in ('', '.', *content_folders)]


def name_of(path):
    """:return: the name without folders and without the extension of an image or annotation: a for x/a.jpg and a.xml"""
    name = os.path.basename(path)
    while is_image(name) or name.lower().endswith('.xml'):
        name = os.path.splitext(name)[0]  # twice for a.jpg.xml, as some tools write
    return unicodedata.normalize('NFC', name)  # macOS writes an accent as a character of its own


def turn_box(box, size, orientation):
    """Turn a box upright. Cameras store some images rotated, with an EXIF orientation by which viewers (and
    `open_image`) turn them upright. A tool that ignores it writes the size and boxes of the stored image, and the boxes
    must be turned. If both sizes are the same (square images, orientations 2 to 4) or none is stated, boxes are taken
    to be upright.

    :param box: boundary coordinates in the stored image, in pixels from 1
    :param size: (width, height) of the upright image in pixels
    :param orientation: EXIF orientation from 5 to 8: rows of the stored image are columns of the upright one
    :return: the box in the upright image, in the same form"""
    y_min, x_min, y_max, x_max = box  # rows become columns
    if orientation in (6, 7):  # mirrored left to right
        x_min, x_max = size[0] + 1 - x_max, size[0] + 1 - x_min
    if orientation in (7, 8):  # mirrored top to bottom
        y_min, y_max = size[1] + 1 - y_max, size[1] + 1 - y_min
    return [x_min, y_min, x_max, y_max]
