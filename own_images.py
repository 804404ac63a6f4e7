"""Any folder with images and annotations in Pascal VOC's format: which image belongs to which annotation, which are for
training and which for the test, and what the size that an annotation states says about its boxes.
"""
import os
import random
import re
import sys
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

from errors import UserError
from images import is_image

split_names = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
               'test': 'test', 'testing': 'test', 'trainval': 'trainval'}


def find_images(folder):
    """Find all annotations under a folder, which are .xml files whose root is `annotation`, and their images. The image
    has the annotation's name, and lies beside it, or in the folder that corresponds (see `words_of`), or in that whose
    path has most words in common with the annotation's; or the annotation's <filename> decides.

    :return: dict of an annotation's path -> list of its image's path, or none, or several; all relative to the folder
    :raises UserError: the folder is missing, or has no annotation"""
    images, unknown, found, others = {}, {}, {}, []
    paths = list_files(folder) if os.path.isdir(folder) else []
    for path in paths:
        if is_image(path):
            images.setdefault(name_of(path), []).append(path)
        elif not path.lower().endswith(('.xml', '.txt', '.json')):  # it may be an image that must be converted first
            unknown.setdefault(name_of(os.path.splitext(path)[0]), []).append(path)
    for path in paths:
        if path.lower().endswith('.xml'):
            root = root_of(os.path.join(folder, path))
            image_paths = choose_images(folder, path, images.get(name_of(path), [])) or unknown.get(name_of(path), [])
            if root == 'annotation' or (root is None and image_paths):  # the second is damaged
                found[path] = image_paths
            else:
                others.append(f'{path}, whose root is {root}')
    if others:
        print(f'{folder}: .xml files that are no annotations, left alone: {len(others)}, such as {others[0]}.')
    if not found:
        what = 'has no annotations in VOC format (.xml)' if os.path.isdir(folder) else 'is not a folder'
        raise UserError(f'{folder} {what}: set the paths in create_data_lists.py to folders with images and '
                        "annotations, or download = True; for COCO's .json or YOLO's .txt files, see GUIDE.md")
    without = sorted(path for name in images.keys() - set(map(name_of, found)) for path in images[name])
    such_as = f', such as {without[0]}' if without else ''
    print(f'{folder}: {len(found)} annotations. Images without annotation, left out: {len(without)}{such_as}.')
    return leave_out_repeated(folder, found)


def root_of(path):
    """:return: the tag of an XML file's root, without namespace, whatever the encoding; None if there is none"""
    with suppress(OSError), open(path, 'rb') as file:
        text = file.read(100_000).replace(b'\0', b'')  # every other byte in UTF-16
        text = re.sub(rb'<!--.*?-->|<\?.*?\?>', b'', text, flags=re.DOTALL)  # without comments and <?xml ...?>
        root = re.search(rb'<([^\s<>/!:]+:)?([^\s<>/!:]+)', text)
        return root[2].decode(errors='replace') if root else None


def parse_xml(content):
    """:return: the root of XML, given as bytes, without namespaces"""
    content = content.replace(b'encoding="utf-16"', b'', 1)  # some C# programs declare it, but write UTF-8
    try:
        root = ET.fromstring(content)
    except ValueError:  # the parser does not know an encoding such as GB2312, but Python does
        encoding = re.search(r'encoding\s*=\s*["\']([\w.-]+)', content[:200].decode('latin-1'))
        root = ET.fromstring(content.decode(encoding[1] if encoding else 'utf-8'))
    for node in root.iter():
        node.tag = node.tag.rpartition('}')[2]
    return root


def choose_images(folder, annotation_path, same_name):
    """:return: of the images with an annotation's name, list of those that may be its image: one, if all is well"""
    beside = [path for path in same_name if os.path.dirname(path) == os.path.dirname(annotation_path)]
    words = words_of(annotation_path)
    candidates = beside or [path for path in same_name if words_of(path) == words] or same_name
    if len(candidates) > 1 and not beside:
        in_common = [(Counter(words_of(path)) & Counter(words)).total() for path in candidates]
        most = max(in_common)
        candidates = [path for path, n in zip(candidates, in_common) if n == most]
    if len(candidates) > 1:  # a.rgb.xml means a.rgb.jpg, not a.bw.jpg; a.jpg.xml means a.jpg, not a.png
        name = Path(annotation_path).stem
        candidates = [path for path in candidates if name in (Path(path).name, Path(path).stem)] or candidates
    if len(candidates) > 1:  # it may say so itself: a.jpg, not the mask a.png in another folder
        with suppress(OSError, ET.ParseError, LookupError, ValueError):  # if it is damaged, `read_objects` says so
            stated = parse_xml(Path(folder, annotation_path).read_bytes()).findtext('filename', '').strip()
            stated = stated.replace('\\', '/').rpartition('/')[2]  # some tools write a path
            candidates = [path for path in candidates if Path(path).name == stated] or candidates
    return candidates


def leave_out_repeated(folder, found):
    """Of several annotations of an image, keep those that have boxes, if any has: of horizontal and oriented boxes, the
    horizontal ones. If several are left, `check_each_once` finds them."""
    of_image, without = {}, set()
    for path, image_paths in found.items():
        of_image.setdefault(tuple(image_paths) or path, []).append(path)
    for paths in of_image.values():
        if len(paths) > 1:
            with_boxes = [path for path in paths
                          if re.search(rb'[<:]bndbox\b', Path(folder, path).read_bytes().replace(b'\0', b''))]
            without.update(set(paths) - set(with_boxes or paths))  # if none has a box, all stay
    if without:
        print(f'{folder}: annotations without a box whose image has another annotation, left alone: {len(without)}, '
              f'such as {min(without)}.')
    return {path: image_paths for path, image_paths in found.items() if path not in without}


# ------------------------------------------------------------------------------------------------------ Train and test

def choose_split(folder, found, test_fraction):
    """Choose the images for training and for the test: by the lists in ImageSets/Main called trainval, train, val or
    test; without lists, by folders with these words in their names; else at random, but always in the same way. Without
    a test, val is the test.

    :param found: see `find_images`
    :param test_fraction: share of the test if it is chosen at random, from 0 to 1; or None to leave out the test
    :return: dicts like `found`, for training and for the test; without images for a name that has no annotation"""
    sets, where = read_image_sets(folder, found), 'lists in ImageSets/Main'
    if not sets:
        sets, where = sets_by_folders(found), 'folders'
    trainval, train, val, test = (sets.get(name, []) for name in ('trainval', 'train', 'val', 'test'))
    used = {path for of_set in sets.values() for path in of_set}
    trainval = trainval or (train and train + val) or sorted(set(found).difference(test) if test else used)
    if test or test_fraction is None:
        train, rule = trainval, 'as given by'
    elif train and val:
        test, rule = val, 'val is the test, by'
    else:
        # An annotation's number depends on its path alone: when others are added, most stay in their split.
        drawn = {path: random.Random(os.fsencode(path.replace(os.sep, '/'))).random() for path in used}
        paths, n_test = sorted(used, key=drawn.get), round(test_fraction * len(used))
        train, test = sorted(paths[n_test:]), sorted(paths[:n_test])
        rule = 'at random, from'
    train, test = ({path: found.get(path, []) for path in paths} for paths in (train, test))  # each only once
    known = [name for name in ('trainval', 'train', 'val', 'test', 'others') if name in sets] or list(sets)
    counts = [f'{name} ({len(set(sets[name]))})' for name in known]
    not_used = found.keys() - train.keys() - test.keys() - set(sets.get('others', ()))
    counts += [f'not used ({len(not_used)})'] if not_used else []
    of_test = 'of the test left out' if test_fraction is None else 'for the test'
    print(f'{folder}: {len(train)} images for training, {len(test)} {of_test}: {rule} its {where}: '
          f'{", ".join(counts)}.')
    return train, {} if test_fraction is None else test


def read_image_sets(folder, found):
    """Read the lists in ImageSets/Main, which are about the folder that has this ImageSets. A line is the name of an
    image, perhaps with folder and extension. A flag may follow, as in VOC's lists of one class; here it is ignored.

    :return: dict of a list's or split's name -> paths of annotations; a name that is no annotation's stays as it is"""
    lists, elsewhere, image_sets = {}, [], {}
    for path in list_files(folder):
        *folders, name = path.lower().split(os.sep)
        if folders[-2:] == ['imagesets', 'main'] and name.endswith('.txt'):
            lists.setdefault(os.path.join(*path.split(os.sep)[:-3], ''), []).append(path)
        elif name.endswith(('.txt', '.csv')) and split_names.keys() & set(re.split(r'[\W\d_]+', name)):
            elsewhere.append(path)
    if elsewhere and not lists:
        print(f'{folder}: lists that are not in a folder ImageSets/Main are not read, such as {elsewhere[0]}.')
    for inside, list_paths in lists.items():
        by_name = {}
        for path, image_paths in found.items():
            if any(either.startswith(inside) for either in (path, *image_paths)):
                by_name.setdefault(name_of(path), []).append(path)
        for list_path in list_paths:
            list_name = os.path.splitext(os.path.basename(list_path).lower())[0]
            for line in read_lines(os.path.join(folder, list_path)):
                if name_of(line) not in by_name:
                    line = re.sub(r'\s+(-1|0|1)$', '', line)  # without the flag
                same_name = by_name.get(name_of(line), [inside + name_of(line)])
                if len(same_name) > 1:
                    likenesses = [likeness(line, path.removeprefix(inside)) for path in same_name]
                    same_name = [path for path, like in zip(same_name, likenesses) if like == max(likenesses)]
                image_sets.setdefault(split_names.get(list_name, list_name), []).extend(same_name)
    ends = {name: split_names.get(name.rpartition('_')[2]) for name in image_sets}
    if None in ends.values() or len(set(ends.values())) == 1 or image_sets.keys() & set(split_names.values()):
        return image_sets
    of_splits = {}  # only lists of one class each, as VoTT's: cat_train, cat_val
    for name, paths in image_sets.items():
        of_splits.setdefault(ends[name], []).extend(paths)
    return of_splits


def likeness(line, path):
    """:return: how well a line of a list fits a path with its name: whether its folders end in all words of the path's
        (the first may be of another computer), in how many words both end alike, and whether whole names are equal"""
    words = words_of(path)
    n = len(os.path.commonprefix([words[::-1], words_of(line)[::-1]]))  # noqa: RUF071 - it also takes lists
    return n == len(words), n, Path(path).stem in (Path(line).name, Path(line).stem)


def read_lines(path):
    """Lines of a text file that are not empty, with / in paths, without quotes. Raises UserError if not in UTF-8."""
    try:
        with open(path, encoding='utf-8-sig') as file:  # sig: skip a byte order mark
            return [line.strip().replace('\\', '/').replace('"', '') for line in file if line.strip()]
    except ValueError as error:
        raise UserError(f'{path} is not a list in UTF-8 ({error}): save it as UTF-8') from None


def sets_by_folders(found):
    """Sort annotations by the innermost folder, of theirs or their image's, that is called train, val, ...; else by the
    innermost with such a word in its name, as img_train or train2017, if two different words occur. A single one may
    have another meaning.

    :return: dict of a split's name, or 'others' -> paths of annotations"""
    sets, called = {}, set()
    for path, image_paths in found.items():
        names = [name for either in (path, *image_paths) for name in os.path.dirname(either).lower().split(os.sep)]
        words = [word for either in (path, *image_paths) for word in words_of(either)]
        of_split = [word for word in words + names if word in split_names]
        sets.setdefault(split_names[of_split[-1]] if of_split else 'others', []).append(path)
        called.update(names)
    return sets if len(sets.keys() - {'others'}) > 1 or called & split_names.keys() else {'others': list(found)}


def check_each_once(chosen):
    """Raise UserError if an image, by its real path, is for training and for the test, or there twice.

    :param chosen: list of (folder, 'TRAIN' or 'TEST', what `choose_split` returns for it)"""
    listed = {}
    for folder, split, images in chosen:
        for path, image_paths in images.items():
            if len(image_paths) == 1:
                real_path = os.path.realpath(os.path.join(folder, image_paths[0]))
                listed.setdefault(real_path, []).append(f'for {split} with {os.path.join(folder, path)}')
    repeated = [f'{path} is listed {" and ".join(uses)}' for path, uses in listed.items() if len(uses) > 1]
    if repeated:
        print('\n'.join(repeated[:10]), file=sys.stderr)
        raise UserError(f'{len(repeated)} images are listed twice (see above): keep one annotation of each image in '
                        'the folder, and name it in one list')


# -------------------------------------------------------------------------------------------------------- Files, names

def list_files(folder):
    """:return: all files under a folder, relative to it and sorted; links are followed, hidden files left out"""
    paths, visited = [], set()
    for parent, folders, names in os.walk(folder, onerror=lambda error: print(f'{error}: left out', file=sys.stderr),
                                          followlinks=True):
        if os.path.realpath(parent) in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in names if not name.startswith('.')]
    return sorted(paths, key=os.path.splitext)


# Words in folders' names that only say what is in them: Annotations/day1/a.xml belongs to JPEGImages/day1/a.jpg
content_words = re.compile('(jpegimage|image|img|jpeg|jpg|png|annotation|annot|anno|label|xml)s?')


@cache
def words_of(path):
    """:return: list of the words and numbers in the names of a path's folders, in lower case, without `content_words`:
        ['train', '2017'] for img_train2017/a.jpg, Annotations/train2017/a.xml and TrainImages/2017/a.jpg"""
    folders = re.sub('(?<=[a-z])(?=[A-Z])', ' ', unicodedata.normalize('NFC', os.path.dirname(path)))
    return [word for word in re.findall(r'[^\W\d_]+|\d+', folders.lower()) if not content_words.fullmatch(word)]


def name_of(path):
    """:return: the name without folders and without the extension of an image or annotation: a for x/a.jpg and a.xml"""
    name = os.path.basename(path)
    while is_image(name) or os.path.splitext(name)[1].lower() == '.xml':
        name = os.path.splitext(name)[0]  # twice for a.jpg.xml, as some tools write
    return unicodedata.normalize('NFC', name)  # macOS writes an accent as a character of its own


# ---------------------------------------------------------------------------------------------------- Sizes and boxes

def compare_sizes(annotation_path, stated, size, orientation, boxes):
    """Compare the size that an annotation states with its image's. It is a hint: some tools write it off by some pixels
    (three or a hundredth are accepted), or width and height exchanged (accepted if the boxes fit only the image), or 0.
    Cameras store some images rotated, with an EXIF orientation by which viewers (and `open_image`) turn them upright. A
    tool that ignores it writes the size and boxes of the stored image, and the boxes must be turned. If both sizes are
    the same (square images, orientations 2 to 4) or none is stated, boxes are taken to be upright.

    :param stated: (width, height) that the annotation states, 0 if unknown
    :param size: (width, height) of the upright image; or None if unknown
    :param orientation: the image's EXIF orientation, 1 to 8
    :param boxes: list of the annotation's boxes, in pixels from 1
    :return: whether boxes must be turned; and a list of what was assumed, to follow a number in a sentence
    :raises UserError: the annotation is for an image of another size"""
    def off(other):
        """:return: how far the stated size is from another one, as a fraction of what is accepted"""
        return max(abs(side - expected) / max(3, expected / 100) for side, expected in zip(stated, other))

    if size in (None, stated) or not min(stated) > 0:
        return False, []
    fit, fit_stated = (all(is_inside(box, of) for box in boxes) for of in (size, stated))
    if off(size[::-1]) <= 1 and off(size[::-1]) < off(size):
        if orientation >= 5 and (fit_stated or not fit):
            return True, []
        if fit and not (boxes and fit_stated):
            return False, ['images whose annotation states width and height exchanged']
    if off(size) <= 1:
        return False, ['images whose annotation states a size that is off by some pixels']
    raise UserError(f'{annotation_path} is for an image of {stated[0]:g}x{stated[1]:g} pixels, but the image has '
                    f'{size[0]}x{size[1]}: annotate it again; or, if its boxes are right, delete its <size>')


def is_inside(box, size):
    """Whether a box, in pixels from 1, is inside an image, but for a pixel (some tools count from 0) and rounding."""
    return min(box) >= -0.1 and max(box[::2]) <= size[0] + 1.1 and max(box[1::2]) <= size[1] + 1.1


def turn_box(box, size, orientation):
    """Turn a box of the stored image upright, see `compare_sizes`. Both are boundary coordinates in pixels from 1;
    `size` is (width, height) of the upright image, whose columns are the stored image's rows (orientation 5 to 8)."""
    y_min, x_min, y_max, x_max = box  # rows become columns
    if orientation in (6, 7):  # mirrored left to right
        x_min, x_max = size[0] + 1 - x_max, size[0] + 1 - x_min
    if orientation in (7, 8):  # mirrored top to bottom
        y_min, y_max = size[1] + 1 - y_max, size[1] + 1 - y_min
    return [x_min, y_min, x_max, y_max]
