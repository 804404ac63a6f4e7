"""List the images and objects of Pascal VOC 2007 and 2012, or of any folder with images and VOC annotations:

    python create_data_lists.py

writes five JSON files, which train.py and eval.py read. Edit the parameters below first.
"""
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torchvision.datasets import VOCDetection
from tqdm import tqdm

from errors import UserError, one_line, run, write_whole
from images import read_image
from own_images import check_each_once, choose_split, compare_sizes, find_images, is_inside, parse_xml, turn_box
from utils import create_prior_boxes, cxcy_to_xy, find_jaccard_overlap, make_label_map, voc_labels

voc07_path = 'VOCdevkit/VOC2007'  # folder with images and annotations, for training and for the test
voc12_path = 'VOCdevkit/VOC2012'  # a second such folder, only for training; or None
output_folder = './'  # where the lists are written
labels = voc_labels  # the classes to detect, without the background; or None for all that occur
test_fraction = 0.2  # share of the images used for the test, if the first folder does not say which these are
keep_empty = False  # also train on images without objects: set min_negatives in train.py, too
download = False  # download Pascal VOC first: 2.9 GB, into VOCdevkit in the current folder


def download_voc(root):
    """Download VOC 2007 trainval and test and VOC 2012 trainval to root/VOCdevkit/VOC2007 and VOC2012. Archives that
    are in `root` with the right checksum are not downloaded again. Raises UserError if a download fails."""
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(root, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'the download of VOC {year} {image_set} to {os.path.abspath(root)} failed: {error}. '
                            'Try again, or put the .tar from host.robots.ox.ac.uk/pascal/VOC there') from None


def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, test_fraction=0.2, keep_empty=False):
    """List images and objects for training and evaluation: TRAIN_images.json, TRAIN_objects.json, TEST_images.json,
    TEST_objects.json, label_map.json. The test keeps images without objects: detections in them are false positives.

    :param voc07_path: path of a folder for training and test, see `find_images` and `choose_split`
    :param voc12_path: path of a second folder, only for training; or None
    :param output_folder: path of the folder where the lists are written
    :param labels: names of the classes to detect, others are dropped; or None for all that occur, in alphabetical order
    :param test_fraction: share of the first folder's images used for the test if it does not say which, from 0 to 1
    :param keep_empty: keep training images without objects
    :raises UserError: no training image has an object of these classes, there is no test image, a label occurs twice,
        or one of the reasons of `find_images`, `check_each_once` and `read_split`"""
    if not (labels is None or isinstance(labels, (list, tuple))):
        raise UserError(f"labels = {labels!r} in create_data_lists.py: set it to None, or a list such as ['cat']")
    if not isinstance(test_fraction, (int, float)) or not 0 <= test_fraction <= 1:
        raise UserError(f'test_fraction = {test_fraction!r} in create_data_lists.py: set it to a number from 0 to 1')
    # Bring labels into the form in which `read_objects` reads them: text, without needless blanks.
    label_map = None if labels is None else make_label_map([' '.join(str(label).split()) for label in labels])
    chosen, splits, left_out = [], {'TRAIN': [], 'TEST': []}, []
    for folder, fraction in [(str(voc07_path), test_fraction)] + ([(str(voc12_path), None)] if voc12_path else []):
        train, test = choose_split(folder, find_images(folder), fraction)
        chosen += [(folder, split, found) for split, found in (('TRAIN', train), ('TEST', test)) if found]
    check_each_once(chosen)
    for folder, split, found in chosen:
        images, not_read = read_split(folder, split, found, label_map)
        splits[split] += images
        left_out += not_read
    for split, name in (('TRAIN', 'training'), ('TEST', 'test')):
        if not splits[split]:
            raise UserError(f'no {name} image in {voc07_path}: list some in ImageSets, set test_fraction, or add some')
    if not any(annotation['boxes'] for _, annotation in splits['TRAIN']):
        wanted = 'a box' if labels is None else f'a box and one of the labels {list(labels)}'
        reasons = {reason for _, annotation in splits['TRAIN'] for reason in annotation['dropped']}
        raise UserError(f'no training image of {voc07_path} has an object with {wanted} (dropped: '
                        f'{"; ".join(sorted(reasons)[:5]) or "none"}): correct the annotations, or set other labels')
    if labels is None:
        occurring = {label for images in splits.values() for _, annotation in images for label in annotation['labels']}
        label_map = make_label_map(sorted(occurring))
        if len({label.lower() for label in occurring}) < len(occurring):
            print('Some labels below differ only in upper and lower case: correct them, or they stay separate classes.')

    listed = splits | {'TRAIN': [image for image in splits['TRAIN'] if keep_empty or image[1]['boxes']]}
    write_lists(listed, label_map, output_folder)
    print_summary(splits, listed, label_map, left_out)
    print(f'The lists are in {os.path.abspath(output_folder)}.')


def write_lists(listed, label_map, output_folder):
    """Write the five files that `create_data_lists` names. They replace older ones only when all are complete. `listed`
    is a dict of 'TRAIN' and 'TEST' -> list of (path of an image, its annotation, see `parse_annotation`)."""
    contents = {'label_map.json': label_map}
    for split, images in listed.items():
        contents[f'{split}_images.json'] = [image_path for image_path, _ in images]
        contents[f'{split}_objects.json'] = [
            {'boxes': annotation['boxes'], 'labels': [label_map[label] for label in annotation['labels']],
             'difficulties': annotation['difficulties']} for _, annotation in images]
    write_whole({os.path.join(output_folder, name): json.dumps(content).encode() for name, content in contents.items()})


def print_summary(splits, listed, label_map, left_out):
    """Print how many images and objects are `listed`, what of `splits` was left out, and how well the priors fit."""
    counts = {split: Counter(label for _, annotation in images for label in annotation['labels'])
              for split, images in listed.items()}
    print(f'{"":20}{"train":>10}{"test":>10}')
    for row, count in (('images', len), ('objects', lambda images: sum(len(a['boxes']) for _, a in images)),
                       ('of which difficult', lambda images: sum(sum(a['difficulties']) for _, a in images))):
        print(f'{row:20}{count(listed["TRAIN"]):10}{count(listed["TEST"]):10}')
    for label in list(label_map)[1:]:
        print(f'  {label:18}{counts["TRAIN"][label]:10}{counts["TEST"][label]:10}')
    images = [*splits['TRAIN'], *splits['TEST']]
    dropped = [f'{path}: {reason}' for path, annotation in images for reason in annotation['dropped']]
    for note, n in Counter(note for _, annotation in images for note in annotation['notes']).items():
        print(f'Read {n} {note}.')
    n_empty = len(splits['TRAIN']) - len(listed['TRAIN'])
    print(f'Left out {n_empty} training images without objects, dropped {len(dropped)} boxes.', *dropped, sep='\n  ')
    print(f"Left out {len(left_out)} images that can't be read, or whose annotation can't.", *left_out, sep='\n  ')

    boxes = torch.cat([torch.tensor(annotation['boxes']).view(-1, 4) / torch.tensor(annotation['size'] * 2)
                       for _, annotation in listed['TRAIN']])  # (n_objects, 4), fractional boundary coordinates
    priors_xy = cxcy_to_xy(create_prior_boxes())  # (8732, 4)
    overlap = torch.cat([find_jaccard_overlap(few, priors_xy).amax(dim=1) for few in boxes.split(100)])  # (n_objects)
    share = (overlap >= 0.5).float().mean().item()
    print(f'Training objects that overlap some prior by at least 0.5: {share:.0%} (of Pascal VOC 2008, 84%)')
    if share < 0.7:
        others = boxes[overlap < 0.5]  # (n, 4)
        side = 300 * (others[:, 2:] - others[:, :2]).prod(dim=1).sqrt().median().item()
        print(f'Half of the others cover less than {side:.0f}x{side:.0f} of the 300x300 pixels that the network sees: '
              'see "My objects are small" in README.md; or, if they are long, "How do I choose scales and ratios".')


def read_split(folder, split, found, labels=None):
    """Read the images and annotations of a split. Raises UserError if more than a tenth of them can't be read.

    :param found: dict of an annotation's path -> paths of the images with its name: one, if all is well
    :param labels: the labels of objects to keep, or a dict of them; or None to keep all
    :return: list of (path of an image, what `parse_annotation` returns); and the reason for each image left out"""
    def read(annotation_path):
        """:return: an image's path and annotation; or the reason why they can't be read, a string"""
        paths = [os.path.join(os.path.abspath(folder), path) for path in found[annotation_path]]
        annotation_path = os.path.join(folder, annotation_path)
        try:
            if not paths:
                raise UserError(f'{annotation_path} or its image is missing')
            if len(paths) > 1:
                raise UserError(f'{" and ".join(paths)} have the name of {annotation_path}: choose a folder that has '
                                'just one of them, or move the others out of it')
            image, orientation, bits = read_image(paths[0])  # a broken one must be found now, not in training
            annotation = parse_annotation(annotation_path, labels, image.size, orientation)
            if bits > 8:
                annotation['notes'].append('images with more than 8 bits, each scaled to 8 by itself')
            return paths[0], annotation
        except (UserError, OSError) as error:  # OSError: the annotation can't be read
            return str(error)

    with ThreadPool() as pool:  # Pillow decodes in parallel
        results = list(tqdm(pool.imap(read, found), f'Reading {split}', len(found), disable=None))
    left_out = [result for result in results if isinstance(result, str)]
    if 10 * len(left_out) > len(results):
        print('\n'.join(left_out[:10]), file=sys.stderr)
        raise UserError(f"{len(left_out)} of the {len(results)} images in {folder}'s split {split} can't be read (see "
                        'above), so no lists were written: repair the files, or set the path to a folder that has both '
                        'these images and their .xml files')
    return [result for result in results if not isinstance(result, str)], left_out


def parse_annotation(annotation_path, labels=None, size=None, orientation=1):
    """Read the objects from an XML file in Pascal VOC's format, and drop those whose box or label is invalid.

    Pascal VOC counts pixels from 1; we subtract 1. A box that crosses the image's edge is clipped if at least half of
    its area is inside, or if it extends by just one pixel, because some tools count from 0 or round up. Otherwise it is
    dropped, and so is one of less than a tenth of a pixel in width or height, which has next to no area.

    :param annotation_path: path of the XML file
    :param labels: the labels of objects to keep; or None to keep all, except background
    :param size: (width, height) of the upright image in pixels; or None if unknown
    :param orientation: the image's EXIF orientation, 1 to 8, see `own_images.compare_sizes`
    :return: dict of boxes (boundary coordinates in pixels, from 0), labels (strings) and difficulties (0 or 1), a list
        each, with one element for each object; dropped, a list of reasons, one for each dropped object; notes, a list
        of what was assumed or changed, each to follow a number in a sentence; and size
    :raises UserError: the annotation can't be read, is for an image of another size, or has boxes in fractions"""
    stated_size, objects, dropped = read_objects(annotation_path)
    boxes = [box for _, _, box in objects]
    as_stored, notes = compare_sizes(annotation_path, stated_size, size, orientation, boxes)
    width, height = size or (stated_size if min(stated_size) > 0 else (math.inf, math.inf))
    if any(edge % 1 for box in boxes for edge in box) and max(map(max, boxes)) <= 1 and min(width, height) > 10:
        raise UserError(f'{annotation_path} has boxes in fractions, such as {boxes[0]}: export them in pixels')
    annotation = {'boxes': [], 'labels': [], 'difficulties': [], 'dropped': dropped, 'notes': notes, 'size': size}
    for label, difficult, box in objects:
        if label == 'background' or (labels is not None and label not in labels):
            dropped.append(f"label '{label}' is not one of the labels")
        elif not all(map(math.isfinite, box)):
            dropped.append(f'{label} {box} is not finite')
        else:
            ordered = [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]
            upright = turn_box(ordered, size, orientation) if as_stored else ordered
            x_min, y_min, x_max, y_max = (edge - 1 for edge in upright)
            clipped = [max(x_min, 0), max(y_min, 0), min(x_max, width), min(y_max, height)]
            sides = clipped[2] - clipped[0], clipped[3] - clipped[1]
            crosses = not is_inside(upright, (width, height))  # by more than a pixel; `upright` counts from 1
            if crosses and (min(sides) < 0 or sides[0] * sides[1] < (x_max - x_min) * (y_max - y_min) / 2):
                dropped.append(f'{label} {box} is mostly outside the image of {width:.0f}x{height:.0f}')
            elif min(sides) < 0.1:
                dropped.append(f'{label} {box} has no area')
            else:
                annotation['boxes'].append(clipped)
                annotation['labels'].append(label)
                annotation['difficulties'].append(difficult)
                if ordered != box:
                    notes.append('boxes with swapped edges, put in order')
                if crosses:
                    notes.append("boxes across the image's edge, clipped")
    return annotation


edges = 'xmin', 'ymin', 'xmax', 'ymax'  # of a bndbox
difficult_words = {'': 0, 'unspecified': 0, 'false': 0, 'no': 0, 'true': 1, 'yes': 1}  # other files have a number


def read_objects(annotation_path):
    """Read an XML file in Pascal VOC's format.

    :return: the (width, height) that it states, 0 if not a number; a list of (label, difficult, box), one for each
        bndbox, with boundary coordinates in pixels from 1; and a list of reasons, one for each object or box dropped
    :raises UserError: the file is not XML, or an object lacks a name or an edge"""
    try:
        root = parse_xml(Path(annotation_path).read_bytes())
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise UserError(f'{annotation_path} is not an annotation in XML ({one_line(error)}): export it again') from None
    try:
        if root.tag != 'annotation':
            raise ValueError(f'its root is {root.tag}')
        sizes = [root.findtext(f'size/{side}', '').strip() for side in ('width', 'height')]
        size = tuple(float(text) if re.fullmatch(r'\d+(\.\d+)?', text) else 0 for text in sizes)
        objects, dropped = [], [f'a bndbox in {node.tag}, not in an object' for node in root.iter()
                                if node.tag not in ('object', 'part') for _ in node.findall('bndbox')]
        for node in root.iter('object'):  # at any depth, but not VOC 2012's nested 'part' boxes
            if not (len(node) or node.attrib or (node.text or '').strip()):  # <object/>, where a tool found none
                continue
            name = ' '.join(node.findtext('name', '').split())
            difficult = node.findtext('difficult', '').strip().lower()
            difficult = difficult_words[difficult] if difficult in difficult_words else int(float(difficult) != 0)
            if not name:
                raise ValueError('an object has no name')
            if node.find('bndbox') is None:  # but, say, a polygon
                dropped.append(f'{name} has no bndbox')
            for bndbox in node.findall('bndbox'):
                tags = [child.tag for child in (*node, *bndbox)]
                missing = [edge for edge in edges if not bndbox.findtext(edge, '').strip()]
                repeated = [tag for tag in ('name', 'difficult', *edges) if tags.count(tag) > 1]
                if missing:
                    raise ValueError(f'an object has no {missing[0]}')
                if repeated:
                    dropped.append(f'{name} has more than one {repeated[0]}')
                else:
                    objects.append((name, difficult, [float(bndbox.findtext(edge)) for edge in edges]))
        if len(objects) > 8732:
            raise UserError(f'{annotation_path} has {len(objects)} objects for 8732 priors: cut the image into tiles')
    except ValueError as error:
        raise UserError(f'{annotation_path} is not an annotation in VOC format ({one_line(error)}): an object needs a '
                        'name, a bndbox of xmin, ymin, xmax, ymax in numbers, and difficult 0 or 1') from None
    return size, objects, dropped


def main():
    """Download Pascal VOC if `download` is set, then write the lists."""
    if download:
        download_voc('.')
    create_data_lists(voc07_path, voc12_path, output_folder, labels, test_fraction, keep_empty)


if __name__ == '__main__':
    run(main)
