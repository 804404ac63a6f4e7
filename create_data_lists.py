"""
Index the images and objects of Pascal VOC 2007 and 2012, or of your own folder in the same layout:

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
from utils import label_map, make_label_map, voc_labels

voc07_path = 'VOCdevkit/VOC2007'  # folder with JPEGImages, Annotations and ImageSets; its splits trainval and test
voc12_path = 'VOCdevkit/VOC2012'  # another such folder, whose trainval is added; or None
output_folder = './'  # where the lists go
labels = voc_labels  # the classes to detect, without the background; or None for all that occur
test_fraction = 0.2  # share of the images that are for the test, in a folder without ImageSets
download = False  # fetch Pascal VOC first: 2.9 GB, into VOCdevkit in the current folder


def download_voc(root):
    """
    Fetch VOC 2007 trainval and test and VOC 2012 trainval into root/VOCdevkit/VOC2007 and VOC2012. Archives that lie in
    `root` with the right checksum are not fetched again.

    :param root: a folder
    :raises UserError: the download failed
    """
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(root, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'the download of VOC {year} {image_set} into {os.path.abspath(root)} failed: {error}. '
                            'Try again, or put the archive there yourself') from None


# ---------------------------------------------------------------------------------------------------------------- Lists

def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, test_fraction=0.2):
    """
    Index the images and objects of Pascal VOC, or of any folder in its layout, and write what training and evaluation
    read: TRAIN_images.json, TRAIN_objects.json, TEST_images.json, TEST_objects.json, label_map.json.

    Training takes the trainval splits, without images that have no object. The test takes the first folder's test
    split, also those images: a detection on an empty image is a false positive, and has to count.

    :param voc07_path: folder with the splits trainval and test
    :param voc12_path: folder with another split trainval, or None
    :param output_folder: where the lists go; they replace older ones only when all are written
    :param labels: the classes to detect, objects of other classes are dropped; None for all that occur, sorted
    :param test_fraction: see `image_names`
    :raises UserError: see `image_names` and `read_split`; or no object of these labels was found for training
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
        raise UserError(f'{which} in the training images of {voc07_path}: set the labels that its annotations use')
    if not splits['TEST']:
        raise UserError(f'no image for the test in {voc07_path}: list some in ImageSets/Main/test.txt, or, without '
                        'ImageSets, raise test_fraction')
    label_map = label_map or number_labels(splits)

    dropped = [f'{image_path}: {reason}' for images in splits.values()
               for image_path, annotation in images for reason in annotation['dropped']]
    n_empty = sum(not annotation['boxes'] for _, annotation in splits['TRAIN'])
    splits['TRAIN'] = [image for image in splits['TRAIN'] if image[1]['boxes']]
    write_lists(splits, label_map, output_folder)
    print_summary(splits, label_map, left_out, n_empty, dropped)
    print(f'The lists are in {os.path.abspath(output_folder)}.')


def write_lists(splits, label_map, output_folder):
    """
    Write the five files that `create_data_lists` names; they replace older ones only when all are written.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation)
    :param label_map: dict of label -> index
    :param output_folder: where they go
    """
    contents = {'label_map.json': label_map}
    for split, images in splits.items():
        contents[f'{split}_images.json'] = [image_path for image_path, _ in images]
        contents[f'{split}_objects.json'] = [{key: annotation[key] for key in ('boxes', 'labels', 'difficulties')}
                                             for _, annotation in images]
    os.makedirs(output_folder, exist_ok=True)
    with write_whole(*(os.path.join(output_folder, name) for name in contents), mode='w') as files:
        for file, content in zip(files, contents.values()):
            json.dump(content, file)


def print_summary(splits, label_map, left_out, n_empty, dropped):
    """
    Print how many images and objects the lists have, and what they lack.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation)
    :param label_map: dict of label -> index
    :param left_out: a line for each image that can't be read
    :param n_empty: how many training images without objects were left out
    :param dropped: a line for each dropped box
    """
    counts = {split: Counter(label for _, annotation in images for label in annotation['labels'])
              for split, images in splits.items()}
    print(f'{"":20}{"train":>10}{"test":>10}')
    for row, count in (('images', lambda split: len(splits[split])),
                       ('objects', lambda split: sum(counts[split].values())),
                       ('of them difficult', lambda split: sum(sum(a['difficulties']) for _, a in splits[split]))):
        print(f'{row:20}{count("TRAIN"):10}{count("TEST"):10}')
    for label, index in list(label_map.items())[1:]:
        print(f'  {label:18}{counts["TRAIN"][index]:10}{counts["TEST"][index]:10}')
    print(f'Left out {n_empty} training images without objects, and dropped {len(dropped)} boxes:')
    print('\n'.join('  ' + line for line in dropped) or '  none')
    print(f"Left out {len(left_out)} images that can't be read, or whose annotation can't:")
    print('\n'.join('  ' + line for line in left_out) or '  none')


def image_names(folder, split, test_fraction):
    """
    :param folder: a folder in Pascal VOC's layout
    :param split: 'trainval' or 'test'
    :param test_fraction: share of the annotated images that are for the test, if the folder has no ImageSets; which
        they are is random, but always the same
    :return: the names of the split's images, without extension
    :raises UserError: the list of the split is missing
    """
    list_path = os.path.join(folder, 'ImageSets', 'Main', split + '.txt')
    if os.path.isdir(os.path.join(folder, 'Annotations')) and not os.path.isdir(os.path.join(folder, 'ImageSets')):
        names = sorted(os.path.splitext(name)[0] for name in os.listdir(os.path.join(folder, 'Annotations'))
                       if name.lower().endswith('.xml'))
        random.Random(0).shuffle(names)
        n_test = round(test_fraction * len(names))
        return sorted(names[:n_test] if split == 'test' else names[n_test:])
    if not os.path.isfile(list_path):
        raise UserError(f'{list_path} is missing: set the paths in create_data_lists.py to folders in VOC layout, '
                        'or download = True to fetch Pascal VOC')
    try:
        with open(list_path, encoding='utf-8-sig') as file:  # some editors begin a file with an invisible mark
            return [line.strip() for line in file if line.strip()]
    except ValueError as error:
        raise UserError(f'{list_path} is no list of names: {error}') from None


def find_images(folder, names):
    """
    :param folder: a folder in Pascal VOC's layout, with the images in JPEGImages
    :param names: the names of the images, see `image_names`
    :return: dict of name -> path of the image; names without an image are not in it
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
        raise UserError(f'{" and ".join(ambiguous[0])} differ only in the extension, so it is not clear which of them '
                        f'the splits or annotations of {folder} mean: keep one, and move the other elsewhere or rename '
                        f'it; there are {len(ambiguous)} such names')
    return {name: found[0] for name, found in paths.items() if found}


def read_split(folder, split, names, label_map):
    """
    Read some images' annotations, from a folder in Pascal VOC's layout: Annotations, JPEGImages. An image is left
    out if it, or its annotation, is missing or can't be read. More than a few of them mean that something else is
    wrong, with the folder or its download: then the first ten are printed, and an error is raised.

    :param folder: the folder, for example VOCdevkit/VOC2007
    :param split: 'trainval' or 'test'
    :param names: the names of the split's images, see `image_names`
    :param label_map: see `parse_annotation`
    :return: list of (path of the image, its annotation), see `parse_annotation`; and a reason for each image that
        was left out
    :raises UserError: more than a tenth of the images can't be read; or see `find_images`
    """
    image_paths = find_images(folder, names)
    images, left_out = [], []
    for name in names:
        try:
            if name not in image_paths:
                raise UserError(f'{os.path.join(folder, "JPEGImages", name)}.* is missing: the splits or annotations '
                                f'of {folder} name this image')
            annotation_path = os.path.join(folder, 'Annotations', name + '.xml')
            annotation = parse_annotation(annotation_path, label_map, *image_header(image_paths[name]))
            images.append((image_paths[name], annotation))
        except (UserError, OSError) as error:
            left_out.append(str(error))
    if 10 * len(left_out) > len(names):
        print('\n'.join(left_out[:10]), file=sys.stderr)
        raise UserError(f"{len(left_out)} of the {len(names)} images in {folder}'s split {split} can't be read, more "
                        'than a tenth (the first are named above), so no lists were written: check that the folder is '
                        'the right one, and complete, or mend these images')
    return images, left_out


def number_labels(splits):
    """
    Make a label map of all labels that occur, sorted, and put indices in the place of the names.

    :param splits: dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation, with labels as names)
    :return: dict of label -> index
    """
    annotations = [annotation for images in splits.values() for _, annotation in images]
    label_map = make_label_map(sorted({label for annotation in annotations for label in annotation['labels']}))
    for annotation in annotations:
        annotation['labels'] = [label_map[label] for label in annotation['labels']]
    return label_map


# ---------------------------------------------------------------------------------------------------------- Annotations

def parse_annotation(annotation_path, label_map=label_map, size=None, orientation=1):
    """
    Read the objects from an XML file in Pascal VOC's format, and drop those that can't be right.

    Pascal VOC counts pixels from 1; we subtract 1. A box may lie a pixel outside the image, because some tools count
    from 0 or round up: it is clipped. A box that lies further outside, or is narrower or lower than a tenth of a pixel,
    is wrong, and is dropped: to the network it would have no area. Images that lie on their side: see `turn_box`.

    :param annotation_path: the XML file
    :param label_map: dict of label -> index; or None, to take all labels, and leave them names
    :param size: the image's width and height when it is upright, if known
    :param orientation: how it is stored, see `image_header`
    :return: dict of boxes (boundary coordinates in pixels), labels (indices), difficulties (0 or 1), one of each per
        object; and dropped (a reason for each dropped object)
    :raises UserError: see `read_objects`; or the file is for an image of another size
    """
    stated_size, objects = read_objects(annotation_path)
    known = min(stated_size) > 0  # some tools leave 0 for a size they don't know
    as_stored = known and orientation >= 5 and size == stated_size[::-1] != stated_size
    if known and size not in (None, stated_size) and not as_stored:
        raise UserError(f'{annotation_path} is for an image of {stated_size[0]:g}x{stated_size[1]:g} pixels, '
                        f'but the image has {size[0]}x{size[1]}: annotate it anew, or take it out of the split')
    width, height = size or (stated_size if known else (math.inf, math.inf))
    annotation = {'boxes': [], 'labels': [], 'difficulties': [], 'dropped': []}
    for label, difficult, box in objects:
        x_min, y_min, x_max, y_max = (edge - 1 for edge in (turn_box(box, size, orientation) if as_stored else box))
        clipped = [max(x_min, 0), max(y_min, 0), min(x_max, width), min(y_max, height)]
        if label == 'background' or (label_map is not None and label not in label_map):
            annotation['dropped'].append(f"label '{label}' is not one of the labels")
        elif not all(map(math.isfinite, box)):
            annotation['dropped'].append(f'{label} {box} is not finite')
        elif min(x_min, y_min) < -1 or x_max > width or y_max > height:
            annotation['dropped'].append(f'{label} {box} is outside the image of {width:.0f}x{height:.0f}')
        elif min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < 0.1:
            annotation['dropped'].append(f'{label} {box} has no area')
        else:
            annotation['boxes'].append(clipped)
            annotation['labels'].append(label if label_map is None else label_map[label])
            annotation['difficulties'].append(difficult)
    return annotation


def read_objects(annotation_path):
    """
    Read an XML file in Pascal VOC's format.

    :param annotation_path: the file
    :return: the image's (width, height) as the file states it, 0 if not; and a list of (label, difficult, box),
        one for each object; box is the four edges as they stand there, in pixels from 1
    :raises UserError: the file is missing, is no annotation, or has an object without a name or numeric box, or whose
        `difficult` is neither 0 nor 1
    """
    try:
        root = ET.parse(annotation_path).getroot()
        if root.tag != 'annotation':
            raise ValueError(f'its root is {root.tag}')
        size = tuple(float(root.findtext(f'size/{side}') or 0) for side in ('width', 'height'))
        objects = [read_object(node) for node in root.findall('object')]  # VOC 2012 nests 'part' boxes deeper
        if len(objects) > 8732:
            raise ValueError(f'it has {len(objects)} objects, more than there are priors')
    except FileNotFoundError:
        raise UserError(f'{annotation_path} is missing: each image of a split needs an annotation') from None
    except (ET.ParseError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f'{annotation_path} is not an annotation in VOC format ({one_line(error)}): '
                        'an object needs a name and a bndbox of xmin, ymin, xmax, ymax') from None
    return size, objects


def read_object(node):
    """
    :param node: the XML element of an object
    :return: label, difficult (0 or 1), box, see `read_objects`, whose errors these are
    """
    label = ' '.join(node.find('name').text.split())
    difficult = float(node.findtext('difficult', '').strip() or 0)
    if label == '' or difficult not in (0, 1):
        raise ValueError(f"an object's name is '{label}', its difficult is {difficult:g}")
    return label, int(difficult), [float(node.find(f'bndbox/{edge}').text) for edge in ('xmin', 'ymin', 'xmax', 'ymax')]


def turn_box(box, size, orientation):
    """
    Cameras store some images lying on their side, and say so in EXIF. Viewers, and we, turn them upright; some tools
    for annotation don't. So if an annotation states the size of the image as it is stored, its boxes have to be
    turned. They are taken to be upright already if both sizes are the same, in square images or those that are upside
    down or mirrored (orientations 2 to 4), or if no size is stated.

    :param box: boundary coordinates in an image as it is stored, in pixels from 1
    :param size: the image's width and height when it is upright
    :param orientation: 5 to 8, see `image_header`
    :return: the box in the upright image
    """
    y_min, x_min, y_max, x_max = box  # rows become columns; then mirror, from left to right, or from top to bottom
    if orientation in (6, 7):
        x_min, x_max = size[0] + 1 - x_max, size[0] + 1 - x_min
    if orientation in (7, 8):
        y_min, y_max = size[1] + 1 - y_max, size[1] + 1 - y_min
    return [x_min, y_min, x_max, y_max]


def main():
    """Download if asked, then write the lists."""
    if download:
        download_voc('.')
    create_data_lists(voc07_path, voc12_path, output_folder, labels, test_fraction)


if __name__ == '__main__':
    run(main)
