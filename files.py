"""
What can go wrong with files: errors that end in one line, files that must not be left half written, annotations and
pictures of any kind. Skip this file on a first reading; `UserError` is all that the others need to know of it.
"""
import os
import sys
import xml.etree.ElementTree as ET
from contextlib import ExitStack, contextmanager
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image, ImageOps


# --------------------------------------------------------------------------------------------------------------- Errors

class UserError(Exception):
    """Something the user can put right. Its message is one line; scripts print that line and exit with code 1."""


killed_worker = 'a process that loads pictures was killed, perhaps for lack of memory: lower workers'


def run(main):
    """
    Run a script's `main`, and turn what a user can put right into one line and a non-zero exit.

    :param main: a function without arguments
    """
    try:
        main()
    except (UserError, OSError) as error:
        # A data loader's worker wraps our line in a traceback of its own; the last line is still ours.
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        sys.exit('Error: ' + line.split('UserError: ')[-1])
    except torch.cuda.OutOfMemoryError:
        sys.exit('Error: the GPU ran out of memory: lower batch_size')
    except RuntimeError as error:
        if 'DataLoader worker (pid' in str(error):  # a signal brought the news: see `datasets.load_batches`
            sys.exit(f'Error: {killed_worker}')
        if not ('onnection' in str(error) and torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise
        sys.exit('Error: another process ended or was killed; start all again, from the last checkpoint')
    except KeyboardInterrupt as stop:
        sys.exit(f'Stopped. {stop}'.strip())


def one_line(error):
    """:return: an error's message, in one line that is not too long"""
    return ' '.join(str(error).split())[:300]


# ----------------------------------------------------------------------------------------------- Files that are written

@contextmanager
def write_whole(*paths, mode='wb'):
    """
    Open files for writing that replace `paths` only when all are complete: whatever interrupts the writing, a path is
    either the old file or the new one.

    :param paths: the files to write
    :param mode: 'wb' for bytes, 'w' for text
    :return: the open files, a list
    :raises UserError: they can't be written
    """
    temporaries = [f'{path}.tmp' for path in paths]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(temporary, mode, encoding=None if 'b' in mode else 'utf-8'))
                     for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())  # on the disk, not just on its way there
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the second of the first
        raise UserError(f'{", ".join(map(str, paths))} could not be written, and what was there before is as it was: '
                        f'{error.__context__ or error}') from None
    finally:
        for temporary in filter(os.path.exists, temporaries):
            os.remove(temporary)


# ---------------------------------------------------------------------------------------------------------- Annotations

def read_objects(annotation_path):
    """
    Read an XML file in Pascal VOC's format.

    :param annotation_path: the file
    :return: the picture's (width, height) as the file states it, 0 if not; and a list of (label, difficult, box),
        one for each object; box is the four edges as they stand there, in pixels from 1
    :raises UserError: the file is missing, is no annotation, or has an object without a name or numeric box, or whose
        `difficult` is neither 0 nor 1
    """
    try:
        root = parse_xml(annotation_path)
        if root.tag != 'annotation':
            raise ValueError(f'its root is {root.tag}')
        size = tuple(float(root.findtext(f'size/{side}') or 0) for side in ('width', 'height'))
        objects = [read_object(node) for node in root.findall('object')]  # VOC 2012 nests 'part' boxes deeper
        if len(objects) > 8732:
            raise ValueError(f'it has {len(objects)} objects, more than there are priors')
    except FileNotFoundError:
        raise UserError(f'{annotation_path} is missing: each picture of a split needs an annotation') from None
    except (expat.ExpatError, LookupError, ValueError, AttributeError, TypeError) as error:
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


def parse_xml(path):
    """
    Like `ET.parse`, but refuse XML that defines entities of its own: a few lines of them can stand for gigabytes.

    :param path: the XML file
    :return: its root element
    """
    def refuse(*_):
        raise ValueError('it defines or uses entities')

    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = parser.SkippedEntityHandler = refuse
    with open(path, 'rb') as file:
        parser.ParseFile(file)
    return builder.close()


def turn_box(box, size, orientation):
    """
    Cameras store some pictures lying on their side, and say so in EXIF. Viewers, and we, turn them upright; some tools
    for annotation don't. So if an annotation states the size of the picture as it is stored, its boxes have to be
    turned. They are taken to be upright already if both sizes are the same, in square pictures or those that are upside
    down or mirrored (orientations 2 to 4), or if no size is stated.

    :param box: boundary coordinates in a picture as it is stored, in pixels from 1
    :param size: the picture's width and height when it is upright
    :param orientation: 5 to 8, see `image_header`
    :return: the box in the upright picture
    """
    y_min, x_min, y_max, x_max = box  # rows become columns; then mirror, from left to right, or from top to bottom
    if orientation in (6, 7):
        x_min, x_max = size[0] + 1 - x_max, size[0] + 1 - x_min
    if orientation in (7, 8):
        y_min, y_max = size[1] + 1 - y_max, size[1] + 1 - y_min
    return [x_min, y_min, x_max, y_max]


# ------------------------------------------------------------------------------------------------------------- Pictures

def is_picture(name):
    """
    :param name: of a file
    :return: whether its extension is that of a picture that Pillow reads by itself
    """
    format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return format in Image.OPEN and format not in ('EPS', 'MPEG')


@contextmanager
def opened_image(path):
    """
    Open a picture file; the pixels are read when they are needed.

    :param path: a file
    :raises UserError: the file is missing, or is no picture that Pillow can read whole
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f'{path} is missing: check the path') from None
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise UserError(f'{path} is not a picture that can be read: {one_line(error)}') from None


def image_header(path):
    """
    :param path: a picture file, of which little more than the header is read; errors as in `opened_image`
    :return: (width, height) in pixels, as `open_image` will have them; and EXIF's orientation: 1 if the picture is
        stored upright, 2 to 4 if it is upside down or mirrored, 5 to 8 if its rows are the upright picture's columns
    """
    with opened_image(path) as image:
        orientation = image.getexif().get(0x0112)
        orientation = orientation if orientation in range(1, 9) else 1  # anything can stand there
        if image.format in ('JPEG', 'MPO'):
            image.fp.seek(-2, os.SEEK_END)
            if image.fp.read() != b'\xff\xd9':  # it seems to be cut off: find out now, not in training
                image.load()
        if orientation >= 5 and image.format == 'TIFF':
            image.load()  # Pillow turns these upright by itself, old versions only now
            return image.size, orientation
        return image.size[::-1] if orientation >= 5 else image.size, orientation


def open_image(path):
    """
    :param path: a picture file; errors as in `opened_image`
    :return: a PIL image in RGB, see `to_rgb`
    """
    with opened_image(path) as image:
        return to_rgb(image)


def to_rgb(image):
    """
    Bring a picture of any mode to 8-bit RGB, turned the way its EXIF orientation says.

    :param image: a PIL image, which stays as it is
    :return: a new PIL image in RGB
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':  # one channel of 16 or 32 bits: convert('RGB') would cut off all above 255
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        brightest = 65535 if image.mode[0] == 'I' else max(float(pixels.max()), 1e-6)
        image = Image.fromarray((pixels * (255 / brightest)).clip(0, 255).astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')  # what is transparent gets white behind it, as on a page
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')
