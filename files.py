"""What can go wrong with files: errors that end in one line, files that must not be left half written, and images of
any kind. Skip this file on a first reading; `UserError` is all that the others need to know of it.
"""
import errno
import os
import sys
import time
import unicodedata
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# --------------------------------------------------------------------------------------------------------------- Errors

class UserError(Exception):
    """Something the user can put right. Its message is one line; scripts print that line and exit with code 1."""


not_enough_memory = 'there is not enough memory: lower batch_size'

# PyTorch raises these as plain RuntimeError: words of its message -> our line, or None to print its own message, which
# has the remedy. The first words that are found count.
runtime_errors = {
    'DataLoader worker (pid': None,  # it was killed
    'Pin memory thread exited': None,
    'Too many open files': None,
    'received 0 items of ancdata': 'there are too many open files: raise the limit with "ulimit -n", or lower workers',
    'out of memory': 'the GPU ran out of memory: lower batch_size, or end what else uses this GPU',
    "can't allocate memory": not_enough_memory,
    'not enough memory': not_enough_memory,  # on Windows
    'onnection': 'another process ended or was killed: start all of them again, from the last checkpoint'}


def run(main):
    """Run a script's `main`. What a user can put right ends in one line and a non-zero exit, without a traceback."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors='backslashreplace')  # a name with letters that the console lacks
        main()
    except (EOFError, ConnectionError):  # from the data loader, if its worker died while it was passing on images
        sys.exit('Error: a worker that loads images was killed, perhaps for lack of memory: lower workers or '
                 'batch_size, and in a container raise its shared memory (--shm-size)')
    except (UserError, OSError) as error:
        # From a worker of a data loader, the message is a whole traceback, whose last line is ours.
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        sys.exit('Error: ' + line.split('UserError: ')[-1])
    except MemoryError:
        sys.exit(f'Error: {not_enough_memory}')
    except RuntimeError as error:
        lines = [line for words, line in runtime_errors.items() if words in str(error)]
        if not lines:
            raise
        # If a worker was killed, the cause names the signal and, if it was short of shared memory, the remedy.
        message = f'{one_line(error)}: {one_line(error.__cause__ or "")}'.rstrip(': ')
        sys.exit(f'Error: {lines[0] or message}')
    except KeyboardInterrupt as stop:
        sys.exit(f'Stopped. {stop}'.strip())


def check_numbers(script, least, **parameters):
    """Raise UserError unless these parameters at the top of a script are whole numbers of at least `least`."""
    for name, value in parameters.items():
        if not isinstance(value, int) or value < least:
            raise UserError(f'{name} = {value!r} in {script}: set it to a whole number, at least {least}')


def check_image_path(script, name, path):
    """Raise UserError unless Pillow can write an image with the extension of this path."""
    if not is_image(path):
        raise UserError(f'{name} = {path!r} in {script}: end it in .png or .jpg')


def one_line(error):
    """:return: the message of an error, in one line of at most 300 characters"""
    return ' '.join(str(error).split())[:300]


# ----------------------------------------------------------------------------------------------- Files that are written

@contextmanager
def write_whole(*paths, mode='wb'):
    """Yield a list of files, open for writing, that replace `paths` only when all are complete: if writing is
    interrupted, each path is still the old file, or already the new one, but never half a file. Raises UserError if it
    is not possible. `mode` is 'wb' for bytes or 'w' for text."""
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
            replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises RuntimeError after the OSError, which says more.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        state = 'is unchanged' if len(paths) == 1 else 'each is unchanged or complete'
        raise UserError(f'{", ".join(map(str, paths))} could not be written and {state}: {one_line(reason)}; check the '
                        'free space, the permissions, and whether another program has it open') from None
    finally:
        for temporary in temporaries:
            with suppress(OSError):  # it is gone, or on Windows still open in another program
                os.remove(temporary)


def replace(source, path):
    """Rename a file to `path`, where an older file may be. On Windows this fails as long as another program has the
    older file open, such as a virus scanner or detect.py: then try again for some seconds, before raising OSError."""
    for seconds in 0.1, 0.2, 0.4, 0.8, 1.6, 3.2:
        try:
            return os.replace(source, path)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, path)


# ------------------------------------------------------------------------------------------------------------- Images

def is_image(name):
    """Whether a file's name has the extension of an image that Pillow reads by itself."""
    image_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return image_format in Image.OPEN and image_format not in ('EPS', 'MPEG')


def list_images(paths):
    """Replace each folder among the paths with the images in it, by name. Raises UserError if it has none."""
    files = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = [os.path.join(path, name) for name in sorted(os.listdir(path))
                      if is_image(name) and not name.startswith('.')]  # macOS's hidden files are not images
        if not inside:
            raise UserError(f'{path} has no images in it: give an image, or a folder with images')
        files += inside
    return files


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


@contextmanager
def opened_image(path):
    """Open an image file; the pixels are read when they are needed.

    :raises UserError: the file is missing, or is not an image that Pillow can read whole
    :raises OSError: the file may be good, but the system can't read it: too many open files, no permission, ...
    :raises MemoryError: there is not enough memory for its pixels"""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f'{path} is missing: check the path') from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        # Pillow's own OSErrors have no number. EINVAL is the system's answer to an offset before the beginning.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or path
            raise
        convert = '; convert it to JPEG or PNG' if isinstance(error, UnidentifiedImageError) else ''
        raise UserError(f'{path} is not an image that can be read: {one_line(error)}{convert}') from None


def decode_once(path):
    """Decode an image, to find out whether it is whole. Raises the same errors as `opened_image`. Returns (width,
    height) in pixels, as `open_image` will have them, and EXIF's orientation: 1 if the image is stored upright, 2 to 4
    if it is upside down or mirrored, 5 to 8 if its rows are the upright image's columns."""
    with opened_image(path) as image:
        orientation = image.getexif().get(0x0112)
        orientation = orientation if orientation in range(1, 9) else 1  # files can have any value
        turned = orientation >= 5 and image.format != 'TIFF'  # Pillow turns a TIFF upright by itself
        image.load()
        return image.size[::-1] if turned else image.size, orientation


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


def open_image(path):
    """Read an image file as a PIL image in RGB, see `to_rgb`. Raises the same errors as `opened_image`."""
    with opened_image(path) as image:
        return to_rgb(image)


def to_rgb(image):
    """Bring a PIL image of any mode to 8-bit RGB, turned the way its EXIF orientation says, in a new image."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':  # one channel of 16 or 32 bits: convert('RGB') would cut off all above 255
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        brightest = 65535 if image.mode[0] == 'I' else max(float(pixels.max()), 1e-6)
        image = Image.fromarray((pixels * (255 / brightest)).clip(0, 255).astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')  # what is transparent gets white behind it, as on a page
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')
