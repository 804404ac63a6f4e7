"""Image files of any kind, as upright images in 8-bit RGB; and sheets of images with captions."""
import errno
import os
import sys
import warnings
from functools import cache
from glob import glob

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from errors import UserError, one_line

# Pillow refuses images above 179 million pixels, see `read_image`. From half of that on, it would warn of an attack.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)


def is_image(name):
    """Whether a file's name has the extension of an image that Pillow reads by itself."""
    image_format = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return image_format in Image.OPEN and image_format not in ('EPS', 'MPEG', 'BUFR', 'GRIB', 'HDF5')


def list_images(paths):
    """Replace each folder among the paths with the images in it, by name, and each pattern like *.jpg, which Windows
    does not expand, with the files that match. Raises UserError if a folder has no images."""
    files = []
    for path in paths:
        for match in [path] if os.path.exists(path) else (sorted(glob(str(path))) or [path]):
            inside = [match]
            if os.path.isdir(match):
                inside = [os.path.join(match, name) for name in sorted(os.listdir(match))
                          if is_image(name) and not name.startswith('.')]  # macOS's hidden files are not images
            if not inside:
                raise UserError(f'{match} has no images in it: give an image, or a folder with images')
            files += inside
    return files


def output_paths(paths, folder):
    """Yield the path in a folder of each image's annotated copy: JPEG and PNG files keep their format, others become
    PNG. No copy overwrites another or one of the images, even on case-insensitive file systems."""
    taken = {os.path.realpath(path).casefold() for path in paths}
    for path in paths:
        stem, extension = os.path.splitext(os.path.basename(path))
        if extension.lower() not in ('.jpg', '.jpeg', '.png'):
            extension += '.png'
        output_path, number = os.path.join(folder, stem + extension), 2
        while os.path.realpath(output_path).casefold() in taken:
            output_path, number = os.path.join(folder, f'{stem}-{number}{extension}'), number + 1
        taken.add(os.path.realpath(output_path).casefold())
        yield output_path


def open_image(path, if_missing='check the path'):
    """Read an image file as an upright PIL image in 8-bit RGB, see `to_rgb`.

    :param if_missing: the remedy in the message if the file is missing
    :raises UserError: the file is missing or is not an image that Pillow can read whole; or the system can't read it:
        not enough memory, too many open files, no permission, ..."""
    return read_image(path, if_missing)[0]


def read_image(path, if_missing='check the path'):
    """:return: what `open_image` returns; EXIF's orientation, see `exif_orientation`; and bits: 16 or 32 if
        `scale_to_8_bits` had to scale the image, else 8"""
    try:
        # Not Image.open(path): Pillow would map an uncompressed TIFF into memory, and not turn it upright, or wrongly.
        with open(path, 'rb') as file, Image.open(file) as image:
            turned = exif_orientation(image) if image.format == 'TIFF' else 1  # by Pillow, when it loads the pixels
            image.load()
            orientation = max(turned, exif_orientation(image))
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file
        raise UserError(why_not_read(path, error, if_missing)) from None
    try:
        return to_rgb(image), orientation, bits_of_mode.get(image.mode, 8)
    except MemoryError as error:
        raise UserError(why_not_read(path, error)) from None


def why_not_read(path, error, if_missing=''):
    """:return: in one line, the cause of an error that was raised when reading a file, and the remedy, if any"""
    if isinstance(error, MemoryError):
        return f'{path} needs more memory than there is: end other programs, or cut it into tiles'
    if isinstance(error, FileNotFoundError):
        return f'{path} is missing: {if_missing}'
    if isinstance(error, Image.DecompressionBombError):
        return f'{path} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels: cut it into tiles'
    # Pillow's own OSErrors have no number. EINVAL is the system's answer to an offset before the beginning.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f'{path} cannot be read: {one_line(error.strerror)}'
    if not isinstance(error, UnidentifiedImageError):
        return f'{path} is not an image that can be read: {one_line(error)}'
    with open(path, 'rb') as file:
        start = file.read(1000).strip(b'\0\r\n\t \xef\xbb\xbf')  # the last three are a text's byte order mark
    if start.startswith(b'version https://git-lfs'):
        return f'{path} is not an image but a Git LFS pointer to one: run "git lfs pull"'
    if (start.startswith(b'<') or start.isascii()) and b'\0' not in start and b'<svg' not in start:
        what = 'text, perhaps a web page with an error' if start else 'empty'
        return f'{path} is not an image but {what}: copy or download it again'
    reason = 'Pillow does not know its format; convert it to JPEG or PNG'
    if start.startswith((b'\xff\xd8', b'\x89PNG')):  # JPEG or PNG
        reason = 'its beginning is damaged; copy or download it again'
    return f'{path} is not an image that can be read: {reason}'


turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF's orientation -> what turns the stored image upright
bits_of_mode = {'I;16': 16, 'I;16B': 16, 'I;16L': 16, 'I;16N': 16, 'I': 32, 'F': 32}  # Pillow's modes of more than 8


def exif_orientation(image):
    """:return: EXIF's orientation of a PIL image: 1 if it is stored upright, 2 to 4 if upside down or mirrored, 5 to 8
        if its rows are the upright image's columns"""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # Pillow raises nearly anything on damaged EXIF; the pixels may be good
        return 1
    return orientation if orientation in range(1, 9) else 1  # files can have any value


def to_rgb(image):
    """Bring a PIL image of any mode to 8-bit RGB, turned the way its EXIF orientation says. It stays as it is; an image
    that is upright and in RGB already is returned itself."""
    image.load()
    orientation = exif_orientation(image)
    if orientation > 1:
        image = image.transpose(turns[orientation])
        # ImageOps.exif_transpose would also write the other EXIF tags anew, and fails at some that cameras write.
        for key in 'exif', 'Raw profile type exif', 'xmp', 'XML:com.adobe.xmp':
            image.info.pop(key, None)  # so that nobody turns it again
    if image.mode in bits_of_mode:
        image = scale_to_8_bits(image)
    if image.mode == 'La':  # of a TIFF; Pillow converts it only to LA
        image = image.convert('LA')
    if image.has_transparency_data:
        image = image.convert('RGBA')  # what is transparent gets white behind it, as on a page
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if image.mode != 'RGB':
        image = image.convert('RGB')
        image.info.pop('icc_profile', None)  # for the former mode; a PNG would keep it
    return image


def scale_to_8_bits(image):
    """Scale a PIL image with one channel of 16 or 32 bits to 8, mode L; convert('RGB') would cut off all above 255. The
    darkest pixel becomes black and the brightest white, but for half a percent at either end, such as glints.

    A value that means "no data" would leave few levels of gray for the rest. So NaN, infinity and numbers beyond 1e30
    become black; and a lowest or highest value that more than half a percent of the pixels have, and that is far from
    the others, does not count."""
    pixels = np.asarray(image, dtype=np.float32)  # (height, width)
    valid = np.abs(pixels) < 1e30  # (height, width); not for NaN
    if not valid.any():
        return Image.new('L', image.size)
    values = pixels[valid]  # (n)
    sample = values[::1 + len(values) // 100_000]  # enough for percentiles
    ends = np.percentile(sample, (0.5, 99.5)).tolist()
    inner = sample[~np.isin(sample, ends)]
    low, high = np.percentile(inner if len(inner) else sample, (0.5, 99.5)).tolist()
    reach = high - low
    for end in ends:
        if low - reach <= end <= high + reach:  # it is not far, so at least a third of the levels is left for the rest
            low, high = min(low, end), max(high, end)
    if low == high:  # nearly all pixels are the same
        low, high = values.min().item(), values.max().item()
    scaled = (np.where(valid, pixels, low).clip(low, high) - low) * (255 / max(high - low, 1e-30))
    return Image.fromarray(scaled.round().astype(np.uint8))


def check_image_path(script, name, path):
    """Raise UserError unless Pillow can write an image with the extension of this path."""
    extension = os.path.splitext(str(path))[1].lower()
    if not is_image(str(path)) or Image.registered_extensions()[extension] not in Image.SAVE:
        raise UserError(f'{name} = {path!r} in {script}: end it in .png or .jpg')


@cache
def load_font(path, size):
    """A Pillow font from a .ttf, .otf or .ttc file; None for Pillow's own. Each is cached: loading takes longer than
    drawing with it. Raises UserError if the file can't be read."""
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise UserError(f'font = {path!r} is not a font that can be read ({error}): set it to the path of a .ttf, .otf '
                        "or .ttc file, or to None for Pillow's own") from None


@cache
def check_font(script, path, labels):
    """Print a line, once, if the font (see `load_font`) has no glyph for some characters of a tuple of labels."""
    font = load_font(path, 20)
    unknown = bytes(font.getmask('\U0010ffff'))  # of no character: what the font shows for all that it lacks
    characters = sorted({character for character in ''.join(labels) if not character.isspace()})
    lacking = [character for character in characters if bytes(font.getmask(character)) == unknown]
    if lacking:
        name = "Pillow's own font" if path is None else path
        print(f'{name} lacks {len(lacking)} characters of the labels, such as {lacking[0]}: set font in {script} to a '
              'file that has them, for instance one of Noto Sans from fonts.google.com/noto', file=sys.stderr)


def save_tiles(path, rows, width, height, font=None):
    """Save a sheet of `rows`, lists of (PIL image, caption). Images are shrunk in place to at most this width and
    height in pixels. Below each are 34 pixels, for one line in font size 24 or two in 10. `font` is a Pillow font, see
    `load_font`; None for Pillow's own in size 24."""
    font = font or load_font(None, 24)
    tallest = 16383 if str(path).lower().endswith('.webp') else 65500  # pixels, of a WebP and of a JPEG file
    most = tallest // (height + 34)
    if len(rows) > most:
        print(f'{path} has room for the first {most} of {len(rows)} rows')
        rows = rows[:most]
    columns = max(1, *map(len, rows))
    sheet = Image.new('RGB', (columns * (width + 10), len(rows) * (height + 34)), 'white')
    for y, row in enumerate(rows):
        for x, (image, caption) in enumerate(row):
            drawn = Image.new('RGB', (width, height + 34), 'white')  # a tile, which cuts off long captions
            image.thumbnail((width, height))
            drawn.paste(image)
            ImageDraw.Draw(drawn).text((2, height + 2), caption, fill='black', font=font, spacing=2)
            sheet.paste(drawn, (x * (width + 10), y * (height + 34)))
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    sheet.save(path)
