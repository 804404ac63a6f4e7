"""Image files of any kind, as upright images in 8-bit RGB; and sheets of images with captions."""
import errno
import os
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from errors import UserError, one_line


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


def check_image_path(script, name, path):
    """Raise UserError unless Pillow can write an image with the extension of this path."""
    if not is_image(path):
        raise UserError(f'{name} = {path!r} in {script}: end it in .png or .jpg')


def save_tiles(path, rows, width, height, font_size=24):
    """Save a sheet of `rows`, lists of (PIL image, caption). Images are shrunk in place to at most this width and
    height in pixels. Below each are 34 pixels, for one line in font size 24 or two in 10."""
    columns = max(1, *map(len, rows))
    sheet = Image.new('RGB', (columns * (width + 10), len(rows) * (height + 34)), 'white')
    for y, row in enumerate(rows):
        for x, (image, caption) in enumerate(row):
            drawn = Image.new('RGB', (width, height + 34), 'white')  # a tile, which cuts off long captions
            image.thumbnail((width, height))
            drawn.paste(image)
            ImageDraw.Draw(drawn).text((2, height + 2), caption, fill='black', font_size=font_size, spacing=2)
            sheet.paste(drawn, (x * (width + 10), y * (height + 34)))
    sheet.save(path)
