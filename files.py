"""
What can go wrong with files: errors that end in one line, files that must not be left half written, and images of any
kind. Skip this file on a first reading; `UserError` is all that the others need to know of it.
"""
import errno
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
from PIL import Image, ImageOps


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
    'out of memory': 'the GPU ran out of memory: lower batch_size',
    "can't allocate memory": not_enough_memory,
    'not enough memory': not_enough_memory,  # on Windows
    'onnection': 'another process ended or was killed: start all of them again, from the last checkpoint'}


def run(main):
    """
    Run a script's `main`. What a user can put right ends in one line and a non-zero exit, without a traceback.

    :param main: a function without arguments
    """
    try:
        main()
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


def one_line(error):
    """:return: the message of an error, in one line of at most 300 characters"""
    return ' '.join(str(error).split())[:300]


# ----------------------------------------------------------------------------------------------- Files that are written

@contextmanager
def write_whole(*paths, mode='wb'):
    """
    Open files for writing that replace `paths` only when all are complete: if writing is interrupted, each path is
    still the old file, or already the new one, but never half a file.

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
    """
    Rename a file to `path`, where an older file may be. On Windows this fails as long as another program has the older
    file open, such as a virus scanner or detect.py: then try again for some seconds.

    :param source: the new file
    :param path: its new path
    :raises OSError: it is not possible
    """
    for seconds in 0.1, 0.2, 0.4, 0.8, 1.6, 3.2:
        try:
            return os.replace(source, path)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, path)


# ------------------------------------------------------------------------------------------------------------- Images

def is_image(name):
    """
    :param name: of a file
    :return: whether its extension is that of an image that Pillow reads by itself
    """
    image_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return image_format in Image.OPEN and image_format not in ('EPS', 'MPEG')


def list_images(paths):
    """
    :param paths: image files and folders
    :return: the files, and in place of each folder the images in it, by name
    :raises UserError: a folder has no images
    """
    files = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = [os.path.join(path, name) for name in sorted(os.listdir(path)) if is_image(name)]
        if not inside:
            raise UserError(f'{path} has no images in it: give an image, or a folder with images')
        files += inside
    return files


@contextmanager
def opened_image(path):
    """
    Open an image file; the pixels are read when they are needed.

    :param path: a file
    :raises UserError: the file is missing, or is not an image that Pillow can read whole
    :raises OSError: the file may be good, but the system can't read it: too many open files, no permission, ...
    :raises MemoryError: there is not enough memory for its pixels
    """
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
        raise UserError(f'{path} is not an image that can be read: {one_line(error)}') from None


def image_header(path):
    """
    :param path: an image file, of which little more than the header is read; errors as in `opened_image`
    :return: (width, height) in pixels, as `open_image` will have them; and EXIF's orientation: 1 if the image is
        stored upright, 2 to 4 if it is upside down or mirrored, 5 to 8 if its rows are the upright image's columns
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
    :param path: an image file; errors as in `opened_image`
    :return: a PIL image in RGB, see `to_rgb`
    """
    with opened_image(path) as image:
        return to_rgb(image)


def to_rgb(image):
    """
    Bring an image of any mode to 8-bit RGB, turned the way its EXIF orientation says.

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
