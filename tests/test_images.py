"""Images of any kind become upright and 8-bit RGB, or are named with the reason; and sheets of tiles."""
import errno
import os
import struct
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, TiffTags

from datasets import PascalVOCDataset
from errors import UserError
from images import check_image_path, is_image, list_images, open_image, read_image, save_tiles, to_rgb

noise = np.random.default_rng(0).random((60, 80))
gray, white, black = (100, 100, 100), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize('mode, color, expected', [
    ('L', 100, gray), ('1', 1, white), ('RGBA', (200, 0, 0, 255), (200, 0, 0)), ('RGBA', (0, 0, 0, 0), white),
    ('LA', (100, 255), gray), ('CMYK', (0, 255, 255, 0), (255, 0, 0)), ('P', 0, black), ('RGB', (1, 2, 3), (1, 2, 3)),
    ('I;16', 32896, black), ('I', -5, black), ('F', .5, black)])  # all pixels the same: the darkest
def test_images_of_any_mode(tmp_path, mode, color, expected):
    image = Image.new(mode, (20, 10), color)
    assert to_rgb(image).getpixel((3, 3)) == expected and to_rgb(image).mode == 'RGB'
    assert image.mode == mode and image.size == (20, 10)
    path = tmp_path / ('a.tif' if mode in ('CMYK', 'I', 'F') else 'a.png')
    image.save(path, icc_profile=b'for this mode')
    read, orientation, bits = read_image(path)
    assert read.getpixel((3, 3)) == open_image(path).getpixel((3, 3)) == expected and read.size == (20, 10)
    assert (orientation, bits > 8, 'icc_profile' in read.info) == (1, mode in ('I;16', 'I', 'F'), mode == 'RGB')


def test_palette_transparency_is_white():
    image = Image.new('P', (5, 5), 0)
    image.info['transparency'] = 0
    for transparent in image, Image.new('RGBA', (5, 5)).quantize(4), Image.new('La', (5, 5)):
        assert to_rgb(transparent).getpixel((0, 0)) == white  # else black


def spoilt(pixels, dtype, *spots):
    """Pixels as this type; for each (value, share), every 1 / share-th of them has that value."""
    pixels = pixels.astype(dtype)
    for i, (value, share) in enumerate(spots):
        pixels.flat[i::round(1 / share)] = value
    return pixels


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('pixels', [
    spoilt(noise * 4095, '<u2'), spoilt(noise * 4095, '>u2'),  # 12 bits of a microscope
    spoilt(noise * 65535, 'u2'), spoilt(noise * 255, 'u2'), spoilt(21000 + noise * 3000, 'u2'),  # thermal counts
    spoilt(noise - 25, 'f4'), spoilt(noise * 1e-9, 'f4'), spoilt(noise * 1e29, 'f4'), spoilt(noise * 9000 - 1e6, 'i4'),
    spoilt(noise * 4095, 'u2', (65535, 1 / 4800)), spoilt(noise, 'f4', (3e38, 1 / 4800), (-np.inf, 1 / 300)),  # a glint
    spoilt(noise * 4095, 'u2', (65535, .2)), spoilt(21000 + noise * 3000, 'u2', (0, .3), (65535, .2)),
    spoilt(noise * 500, 'f4', (-9999, .1), (np.nan, .3)), spoilt(noise * 500 - 100, 'i4', (-32768, .1)),
    spoilt(noise * 500, 'i4', (-2 ** 31, .1), (2 ** 31 - 1, .1)), spoilt(noise, 'f4', (-3.4e38, .4), (1e20, .01))])
def test_most_levels_of_gray_are_used_in_their_order(pixels):
    levels = np.asarray(to_rgb(Image.fromarray(pixels)))[..., 0].astype(int)
    usual = np.abs(pixels.astype(float)) < 1e30
    assert len(np.unique(levels)) > 240 and (levels[~usual] == 0).all()
    assert (np.diff(levels[usual][np.argsort(pixels[usual])]) >= 0).all()


@pytest.mark.parametrize('gap', [1, 30, 300, 900, 1100, 3000, 10 ** 6])
def test_a_value_of_many_pixels_costs_at_most_half_of_the_levels(gap):
    levels = np.asarray(to_rgb(Image.fromarray(spoilt(noise * 1000, 'i4', (1000 + gap, .1)))))[..., 0]
    assert len(np.unique(levels)) > 120 and (levels.flat[::10] == 255).all()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('pixels, expected', [
    ([2, np.nan, 1], [255, 0, 0]), ([2, np.inf, 1], [255, 0, 0]), ([2, -np.inf, 1], [255, 0, 0]),
    ([np.nan, np.inf, 3e38], [0, 0, 0]), ([7, 7, 7], [0, 0, 0]), ([0, 9, 9], [0, 255, 255]),
    ([0, 1, 2, 3], [0, 85, 170, 255]), ([0] * 999 + [5], [0] * 999 + [255])])
def test_few_different_values(pixels, expected):
    image = to_rgb(Image.fromarray(np.array([pixels], dtype=np.float32)))
    assert [image.getpixel((x, 0))[0] for x in range(image.width)] == expected


def exif_with(orientation, ifd, tag, kind, count=1):
    """EXIF with an orientation and a tag of a type (1 to 13), in the main part (ifd = 0) or in the one called `ifd`."""
    value = {1: b'\5', 2: b'a', 3: struct.pack('<H', 70), 4: struct.pack('<I', 70000), 5: struct.pack('<II', 35, 10),
             6: b'\xfb', 7: b'a', 8: struct.pack('<h', -3), 9: struct.pack('<i', -3), 10: struct.pack('<ii', -35, 10),
             11: struct.pack('<f', 2.5), 12: struct.pack('<d', 2.5), 13: struct.pack('<I', 8)}[kind] * count
    end = 8 + 2 + 2 * 12 + 4 + (18 if ifd else 0)  # where a value of more than 4 bytes is
    row = struct.pack('<HHI', tag, kind, count) + (value.ljust(4, b'\0') if len(value) <= 4 else struct.pack('<I', end))
    rest = struct.pack('<H', 1) + row + bytes(4) if ifd else b''
    row = struct.pack('<HHII', ifd, 4, 1, end - 18) if ifd else row
    rows = sorted((struct.pack('<HHIHH', 0x0112, 3, 1, orientation, 0), row), key=lambda entry: entry[1::-1])
    return b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + b''.join(rows) + bytes(4) + rest + value


@pytest.mark.filterwarnings('ignore')
def test_a_rotated_photograph_is_turned_whatever_its_other_tags_are(tmp_path):
    """Pillow can't write many of these again."""
    path, wrong = tmp_path / 'a.jpg', []
    tags = [(0, tag) for tag in TiffTags.TAGS_V2 if tag != 0x0112] + [(0x8825, tag) for tag in range(32)]  # GPS
    cases = [(*tag, kind) for tag in tags for kind in range(1, 14)]
    for n, case in enumerate(cases):
        orientation, count = 2 + n % 7, 1 + n % 2
        Image.new('L', (4, 2)).save(path, exif=exif_with(orientation, *case, count))
        size = (4, 2) if orientation < 5 else (2, 4)
        image, *others = read_image(path)
        if others != [orientation, 8] or image.size != size:
            wrong.append(case)
    assert len(cases) > 1300 and not wrong


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix, mode', [('jpg', 'RGB'), ('png', 'RGB'), ('webp', 'RGB'), ('tif', 'RGB'), ('tif', 'L'),
                                          ('tif', 'CMYK'), ('tif', 'I;16'), ('png', 'I;16')])
def test_exif_orientation_is_honored(tmp_path, orientation, suffix, mode):
    pixels = np.full((16, 32), 255, np.uint8)
    pixels[:8, :16] = 0
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(pixels).convert(mode)
    path = tmp_path / f'a.{suffix}'
    image.getexif()[0x0112] = orientation
    image.save(path, exif=image.getexif())
    pixels = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T, 6: pixels.T[:, ::-1],
              7: pixels.T[::-1, ::-1], 8: pixels.T[::-1]}[orientation]
    upright, of_file, _ = read_image(path)
    assert (upright.size, of_file) == (pixels.shape[::-1], orientation)
    assert np.abs(np.asarray(upright) - pixels[..., None].astype(int)).max() < 5
    assert to_rgb(upright).tobytes() == upright.tobytes()  # not turned again


def test_an_image_that_was_turned_is_not_turned_again():
    image = Image.new('RGB', (40, 20))
    image.info['XML:com.adobe.xmp'] = 'tiff:Orientation="6"'  # a PNG's
    assert to_rgb(image).size == to_rgb(to_rgb(image)).size == (20, 40) and image.size == (40, 20)


@pytest.mark.parametrize('exif', [exif_with(orientation, 0, 0x0131, 2) for orientation in (0, 9, 77, 65535)] +
                         [b'Exif\0\0' + damaged for damaged in (b'', b'garbage', b'II*\0', b'II*\0\x08\0\0\0\xff\xff')])
def test_exif_that_means_nothing_turns_nothing(tmp_path, exif):
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.jpg', exif=exif, dpi=(72, 72))
    image, *others = read_image(tmp_path / 'a.jpg')
    assert image.size == (40, 20) and others == [1, 8]


# ------------------------------------------------------------------------------------------------- What is not an image

def said(read, path):
    """The one line of the UserError that reading this file raises; it names the file."""
    with pytest.raises(UserError) as raised:
        read(path)
    assert str(path) in str(raised.value) and '\n' not in str(raised.value)
    return str(raised.value)


lfs = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
convert = 'not an image that can be read: Pillow does not know its format; convert it to JPEG or PNG'


@pytest.mark.parametrize('content, words', [
    (b'', 'not an image but empty: copy or download it again'), (bytes(5000), 'empty'), (lfs, 'run "git lfs pull"'),
    (None, 'is missing: check the path'), (b'\n <!DOCTYPE html><title>Fehler \xc3\xbc</title>', 'perhaps a web page'),
    (b'{"error": "expired"}', 'text'), (b'404: Not Found', 'text'), (b'\xef\xbb\xbf<html>\xfc', 'text'),
    (b'\xff\xd8\xff\xe0' + bytes(50), 'that can be read: its beginning is damaged; copy or download it again'),
    (b'P5 90 90 255 ' + bytes(50), 'not an image that can be read: image file is truncated'),
    (b'<?xml version="1.0"?><svg width="9"/>', convert), (b'\0\0\0\x18ftypheic\0\0mif1\x80', convert),  # an iPhone's
    (b'P4 20000 20000 ', 'a.jpg has more than 179 million pixels: cut it into tiles')])
@pytest.mark.parametrize('read', [open_image, read_image])
def test_a_file_that_is_no_image_is_named_with_the_remedy(tmp_path, read, content, words):
    if content is not None:
        (tmp_path / 'a.jpg').write_bytes(content)
    line = said(read, tmp_path / 'a.jpg')
    assert words in line and ('convert' in line) == (words == convert)


@pytest.mark.parametrize('function', ['Image.open', 'JpegImagePlugin.JpegImageFile.load', 'Image.Image.transpose'])
@pytest.mark.parametrize('error, words', [
    *((error, 'is not an image that can be read') for error in
      (OSError(-2), EOFError(), ValueError('bad\nheader'), OSError(errno.EINVAL, 'Invalid argument'))),
    (OSError(errno.EMFILE, 'Too many open files'), 'cannot be read: Too many open files'),
    (PermissionError(errno.EACCES, 'Permission denied'), 'cannot be read: Permission denied'),
    (MemoryError(), 'needs more memory than there is: end other programs, or cut it into tiles')])
def test_what_pillow_and_the_system_raise_is_told_apart(tmp_path, monkeypatch, function, error, words):
    path = tmp_path / 'a.jpg'
    Image.new('RGB', (40, 20)).save(path, exif=exif_with(6, 0, 0x0131, 2))
    monkeypatch.setattr(f'PIL.{function}', Mock(side_effect=error))
    if function == 'Image.Image.transpose' and not isinstance(error, MemoryError):
        with pytest.raises(type(error)):  # a slip in our own code is not said of the image
            open_image(path)
    else:
        assert words in said(open_image, path)


def test_a_missing_image_of_the_lists_says_to_write_them_again(voc_folder):
    test_set = PascalVOCDataset(voc_folder, 'TEST')
    test_set.images[1] = 'gone.jpg'
    with pytest.raises(UserError, match='^gone.jpg is missing: .*run "python create_data_lists.py" again$'):
        test_set[1]


def test_a_pattern_and_a_folder_stand_for_their_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'd').mkdir()
    for name in ('b.png', 'a.png', 'a.jpg', '[a].jpg', 'd/c.png', 'd/a.jpg', 'd/b.txt', 'd/B.TIF', 'd/._a.jpg'):
        (tmp_path / name).touch()
    found = list_images([(tmp_path / '*.png').relative_to(tmp_path), 'd', 'a.jpg', '[a].jpg', 'no*.jpg'])
    assert found == ['a.png', 'b.png', *(os.path.join('d', name) for name in ('B.TIF', 'a.jpg', 'c.png')),
                     'a.jpg', '[a].jpg', 'no*.jpg']


@pytest.mark.parametrize('name, readable, writable', [
    ('a.jpg', True, True), ('A.JPG', True, True), ('a.webp', True, True), ('a.gif', True, True), ('a.psd', True, False),
    ('a.eps', False, False), ('a.mpg', False, False), ('a.h5', False, False), ('a.pdf', False, False),
    ('a.xml', False, False), ('jpg', False, False), ('', False, False)])
def test_images_are_known_by_their_extension(name, readable, writable):
    assert is_image(name) == readable
    if writable:
        check_image_path('eval.py', 'mistakes_path', name)
    else:
        with pytest.raises(UserError, match=f'mistakes_path = {name!r} in eval.py: end it in .png or .jpg'):
            check_image_path('eval.py', 'mistakes_path', name)


@pytest.mark.parametrize('name, n_shown', [('s.jpg', 1637), ('s.png', 1637), ('s.webp', 409)])
def test_a_sheet_for_many_classes_has_the_rows_that_fit(tmp_path, capsys, name, n_shown):
    """A JPEG file can have 65,500 pixels a side, or Pillow's error is 'broken data stream'. A row has 40 here."""
    for n_rows in 1700, n_shown:
        save_tiles(str(tmp_path / name), [[]] * n_rows, 4, 6)
        assert Image.open(tmp_path / name).size == (14, 40 * n_shown)
    assert capsys.readouterr().out == f'{tmp_path / name} has room for the first {n_shown} of 1700 rows\n'
