"""
List the images and objects of Pascal VOC 2007 and 2012, or of your own folder in the same layout:

    python create_data_lists.py

writes five JSON files, which train.py and eval.py read. Edit the parameters below first.
"""
import json
import math
import os
import random
import sys
import xml.etree.ElementTree as ET
from collections import Counter

from torchvision.datasets import VOCDetection

from files import UserError, image_header, is_image, one_line, run, write_whole
from utils import make_label_map, voc_labels

voc07_path = 'VOCdevkit/VOC2007'  # folder with JPEGImages, Annotations and ImageSets; its splits trainval and test
voc12_path = 'VOCdevkit/VOC2012'  # a second such folder, whose trainval is added for training; or None
output_folder = './'  # where the lists are written
labels = voc_labels  # the classes to detect, without the background; or None for all that occur
test_fraction = 0.2  # share of the images used for the test, if the first folder has no ImageSets
download = False  # download Pascal VOC first: 2.9 GB, into VOCdevkit in the current folder


def download_voc(root):
    """
    Download VOC 2007 trainval and test and VOC 2012 trainval to root/VOCdevkit/VOC2007 and VOC2012. Archives that are
    in `root` with the right checksum are not downloaded again.

    :param root: path of a folder
    :raises UserError: the download failed
    """
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(root, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'the download of VOC {year} {image_set} to {os.path.abspath(root)} failed: {error}. '
                            'Try again, or put the archive there yourself') from None


# ---------------------------------------------------------------------------------------------------------------- Lists

def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, test_fraction=0.2):
    """
    List the images and objects of Pascal VOC, or of any folder in its layout, for training and evaluation:
    TRAIN_images.json, TRAIN_objects.json, TEST_images.json, TEST_objects.json, label_map.json.

    Training uses the trainval splits, without the images that have no objects. The test uses the first folder's test
    split, with those images: a detection in an image without objects is a false positive and must count.

    :param voc07_path: path of a folder with the splits trainval and test
    :param voc12_path: path of a second folder, whose split trainval is added for training; or None
    :param output_folder: path of the folder where the lists are written, see `write_lists`
    :param labels: names of the classes to detect, others are dropped; or None for all that occur, in alphabetical order
    :param test_fraction: share of the first folder's images used for the test if it has no ImageSets, from 0 to 1
    :raises UserError: no object of these classes for training, or no test image; or see `image_names` and `read_split`
    """
    label_map = None if labels is None else make_label_map(labels)
    parts = [('TEST', voc07_path, 'test', image_names(voc07_path, 'test', test_fraction))]
    for folder in filter(None, (voc07_path, voc12_path)):
        names = image_names(folder, 'trainval', test_fraction if folder == voc07_path else 0)
        parts.append(('TRAIN', folder, 'trainval', names))
    splits, left_out = {'TRAIN': [], 'TEST': []}, []
    for name, *part in parts:
        images, reasons = read_split(*part, label_map)
        splits[name] += images
        left_out += reasons
    if not any(annotation['boxes'] for _, annotation in splits['TRAIN']):
        which = 'no object' if labels is None else f'no object with one of the labels {list(labels)}'
        raise UserError(f'{which} in the training images of {voc07_path}: set labels to those of its annotations')
    if not splits['TEST']:
        raise UserError(f'no test image in {voc07_path}: list some in ImageSets/Main/test.txt, or, without ImageSets, '
                        'raise test_fraction')
    if labels is None:
        found = {label for images in splits.values() for _, annotation in images for label in annotation['labels']}
        label_map = make_label_map(sorted(found))

    dropped = [f'{image_path}: {reason}' for images in splits.values()
               for image_path, annotation in images for reason in annotation['dropped']]
    n_empty = sum(not annotation['boxes'] for _, annotation in splits['TRAIN'])
    splits['TRAIN'] = [image for image in splits['TRAIN'] if image[1]['boxes']]
    write_lists(splits, label_map, output_folder)
    print_summary(splits, label_map, left_out, n_empty, dropped)
    print(f'The lists are in {os.path.abspath(output_folder)}.')


def image_names(folder, split, test_fraction):
    """
    Get the names of a split's images from ImageSets/Main/trainval.txt or test.txt. If the folder has no ImageSets, all
    annotated images are split at random, in the same way each time.

    :param folder: path of a folder in Pascal VOC's layout
    :param split: 'trainval' or 'test'
    :param test_fraction: share of the images in the test split if the folder has no ImageSets, from 0 to 1
    :return: list of names, without extensions
    :raises UserError: the list of the split is missing, or is not a text file
    """
    annotation_folder = os.path.join(folder, 'Annotations')
    if os.path.isdir(annotation_folder) and not os.path.isdir(os.path.join(folder, 'ImageSets')):
        names = sorted(os.path.splitext(name)[0] for name in os.listdir(annotation_folder)
                       if name.lower().endswith('.xml'))
        random.Random(0).shuffle(names)
        n_test = round(test_fraction * len(names))
        return sorted(names[:n_test] if split == 'test' else names[n_test:])
    list_path = os.path.join(folder, 'ImageSets', 'Main', split + '.txt')
    if not os.path.isfile(list_path):
        raise UserError(f'{list_path} is missing: set the paths in create_data_lists.py to folders in VOC layout, '
                        'or download = True to download Pascal VOC')
    try:
        with open(list_path, encoding='utf-8-sig') as file:  # some editors put a byte order mark at the beginning
            return [line.strip() for line in file if line.strip()]
    except ValueError as error:
        raise UserError(f'{list_path} is not a list of names in UTF-8 ({error}): save it as plain text') from None


def read_split(folder, split, names, labels=None):
    """
    Read the annotations of a split. An image is left out if it or its annotation is missing or can't be read. More than
    a tenth of them mean a wrong or incomplete folder: the first ten reasons are printed, and an error is raised.

    :param folder: path of a folder in Pascal VOC's layout, with JPEGImages and Annotations
    :param split: name of the split, for the message
    :param names: names of the split's images, without extensions
    :param labels: the labels of objects to keep; or None to keep all
    :return: list of (path of an image, what `parse_annotation` returns); and the reason for each image left out
    :raises UserError: more than a tenth of the images can't be read; or a name has several images, see `find_images`
    """
    image_paths = find_images(folder, names)
    images, left_out = [], []
    for name in names:
        try:
            if name not in image_paths:
                raise UserError(f'{os.path.join(folder, "JPEGImages", name)}.* is missing: the splits or annotations '
                                f'of {folder} name this image')
            annotation_path = os.path.join(folder, 'Annotations', name + '.xml')
            annotation = parse_annotation(annotation_path, labels, *image_header(image_paths[name]))
            images.append((image_paths[name], annotation))
        except (UserError, OSError) as error:
            left_out.append(str(error))
    if 10 * len(left_out) > len(names):
        print('\n'.join(left_out[:10]), file=sys.stderr)
        raise UserError(f"{len(left_out)} of the {len(names)} images in {folder}'s split {split} can't be read (the "
                        'first are named above), so no lists were written: check that the folder is the right one and '
                        'complete, or repair these images')
    return images, left_out


def find_images(folder, names):
    """
    :param folder: path of a folder in Pascal VOC's layout, with the images in JPEGImages
    :param names: names of images, without extensions
    :return: dict of name -> path of the image, without the names that have no image
    :raises UserError: a name has several images, for example cat.jpg and cat.png
    """
    image_folder = os.path.join(os.path.abspath(folder), 'JPEGImages')
    paths = {name: [] for name in names}
    for file_name in sorted(os.listdir(image_folder)) if os.path.isdir(image_folder) else []:
        name = os.path.splitext(file_name)[0]
        if name in paths and is_image(file_name):
            paths[name].append(os.path.join(image_folder, file_name))
    ambiguous = [found for found in paths.values() if len(found) > 1]
    if ambiguous:
        raise UserError(f'{" and ".join(ambiguous[0])} differ only in the extension: keep one, and move or rename the '
                        f'others; there are {len(ambiguous)} such names in {folder}')
    return {name: found[0] for name, found in paths.items() if found}


def write_lists(splits, label_map, output_folder):
    """
    Write the five files that `create_data_lists` names. They replace older ones only when all are complete.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation, see `parse_annotation`)
    :param label_map: dict of label -> index
    :param output_folder: path of the folder where they are written
    """
    contents = {'label_map.json': label_map}
    for split, images in splits.items():
        contents[f'{split}_images.json'] = [image_path for image_path, _ in images]
        contents[f'{split}_objects.json'] = [
            {'boxes': annotation['boxes'], 'labels': [label_map[label] for label in annotation['labels']],
             'difficulties': annotation['difficulties']} for _, annotation in images]
    os.makedirs(output_folder, exist_ok=True)
    with write_whole(*(os.path.join(output_folder, name) for name in contents), mode='w') as files:
        for file, content in zip(files, contents.values()):
            json.dump(content, file)


def print_summary(splits, label_map, left_out, n_empty, dropped):
    """
    Print how many images and objects are in the lists, and what was left out.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation, see `parse_annotation`)
    :param label_map: dict of label -> index
    :param left_out: list of reasons, one for each image that can't be read
    :param n_empty: number of training images without objects, which were left out
    :param dropped: list of reasons, one for each dropped box
    """
    counts = {split: Counter(label for _, annotation in images for label in annotation['labels'])
              for split, images in splits.items()}
    print(f'{"":20}{"train":>10}{"test":>10}')
    for row, count in (('images', lambda split: len(splits[split])),
                       ('objects', lambda split: sum(counts[split].values())),
                       ('of which difficult', lambda split: sum(sum(a['difficulties']) for _, a in splits[split]))):
        print(f'{row:20}{count("TRAIN"):10}{count("TEST"):10}')
    for label in list(label_map)[1:]:
        print(f'  {label:18}{counts["TRAIN"][label]:10}{counts["TEST"][label]:10}')
    print(f'Left out {n_empty} training images without objects, and dropped {len(dropped)} boxes:')
    print('\n'.join('  ' + line for line in dropped) or '  none')
    print(f"Left out {len(left_out)} images that can't be read, or whose annotation can't:")
    print('\n'.join('  ' + line for line in left_out) or '  none')


# ---------------------------------------------------------------------------------------------------------- Annotations

def parse_annotation(annotation_path, labels=None, size=None, orientation=1):
    """
    Read the objects from an XML file in Pascal VOC's format, and drop those whose box or label is invalid.

    Pascal VOC counts pixels from 1; we subtract 1. A box may extend one pixel beyond the image, because some tools
    count from 0 or round up: it is clipped. A box that extends further, or is narrower or lower than a tenth of a
    pixel, is dropped: in the network's coordinates it would have no area. Rotated images: see `turn_box`.

    :param annotation_path: path of the XML file
    :param labels: the labels of objects to keep; or None to keep all, except background
    :param size: (width, height) of the upright image in pixels; or None if unknown
    :param orientation: the image's EXIF orientation, 1 to 8, see `image_header`
    :return: dict of boxes (boundary coordinates in pixels, from 0), labels (strings) and difficulties (0 or 1), a list
        each, with one element for each object; and dropped, a list of reasons, one for each dropped object
    :raises UserError: the annotation can't be read, see `read_objects`; or it states another size than the image's
    """
    stated_size, objects = read_objects(annotation_path)
    known = min(stated_size) > 0  # some tools write 0 for a size they don't know
    as_stored = orientation >= 5 and size == stated_size[::-1] != stated_size
    if known and size not in (None, stated_size) and not as_stored:
        raise UserError(f'{annotation_path} is for an image of {stated_size[0]:g}x{stated_size[1]:g} pixels, '
                        f'but the image has {size[0]}x{size[1]}: annotate it again, or remove it from the split')
    width, height = size or (stated_size if known else (math.inf, math.inf))
    annotation = {'boxes': [], 'labels': [], 'difficulties': [], 'dropped': []}
    for label, difficult, box in objects:
        x_min, y_min, x_max, y_max = (edge - 1 for edge in (turn_box(box, size, orientation) if as_stored else box))
        clipped = [max(x_min, 0), max(y_min, 0), min(x_max, width), min(y_max, height)]
        if label == 'background' or (labels is not None and label not in labels):
            annotation['dropped'].append(f"label '{label}' is not one of the labels")
        elif not all(map(math.isfinite, box)):
            annotation['dropped'].append(f'{label} {box} is not finite')
        elif min(x_min, y_min) < -1 or x_max > width or y_max > height:
            annotation['dropped'].append(f'{label} {box} is outside the image of {width:.0f}x{height:.0f}')
        elif min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < 0.1:
            annotation['dropped'].append(f'{label} {box} has no area')
        else:
            annotation['boxes'].append(clipped)
            annotation['labels'].append(label)
            annotation['difficulties'].append(difficult)
    return annotation


def read_objects(annotation_path):
    """
    Read an XML file in Pascal VOC's format.

    :param annotation_path: path of the file
    :return: the (width, height) that it states, 0 if missing; and a list of (label, difficult, box), one for each
        object, with boundary coordinates in pixels from 1
    :raises UserError: the file is missing or is not an annotation in which each object has a name and a box of numbers
    """
    try:
        root = ET.parse(annotation_path).getroot()
        if root.tag != 'annotation':
            raise ValueError(f'its root is {root.tag}')
        size = tuple(float(root.findtext(f'size/{side}') or 0) for side in ('width', 'height'))
        objects = []
        for node in root.findall('object'):  # not VOC 2012's nested 'part' boxes
            label = ' '.join(node.find('name').text.split())
            difficult = float(node.findtext('difficult', '').strip() or 0)
            if label == '' or difficult not in (0, 1):
                raise ValueError(f"an object has the name '{label}' and difficult {difficult:g}")
            box = [float(node.find(f'bndbox/{edge}').text) for edge in ('xmin', 'ymin', 'xmax', 'ymax')]
            objects.append((label, int(difficult), box))
        if len(objects) > 8732:
            raise ValueError(f'it has {len(objects)} objects, more than there are priors')
    except FileNotFoundError:
        raise UserError(f'{annotation_path} is missing: each image of a split needs an annotation') from None
    except (ET.ParseError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f'{annotation_path} is not an annotation in VOC format ({one_line(error)}): '
                        'an object needs a name, a bndbox of xmin, ymin, xmax, ymax, and difficult 0 or 1') from None
    return size, objects


def turn_box(box, size, orientation):
    """
    Turn a box upright. Cameras store some images rotated, with an EXIF orientation by which viewers (and `open_image`)
    turn them upright. An annotation made without it states the size of the stored image, and its boxes must be turned.
    If both sizes are the same (square images, orientations 2 to 4) or none is stated, boxes are taken to be upright.

    :param box: boundary coordinates in the stored image, in pixels from 1
    :param size: (width, height) of the upright image in pixels
    :param orientation: EXIF orientation from 5 to 8: rows of the stored image are columns of the upright one
    :return: boundary coordinates in the upright image, in pixels from 1
    """
    y_min, x_min, y_max, x_max = box  # rows become columns
    if orientation in (6, 7):  # mirrored left to right
        x_min, x_max = size[0] + 1 - x_max, size[0] + 1 - x_min
    if orientation in (7, 8):  # mirrored top to bottom
        y_min, y_max = size[1] + 1 - y_max, size[1] + 1 - y_min
    return [x_min, y_min, x_max, y_max]


def main():
    """Download Pascal VOC if `download` is set, then write the lists."""
    if download:
        download_voc('.')
    create_data_lists(voc07_path, voc12_path, output_folder, labels, test_fraction)


if __name__ == '__main__':
    run(main)
