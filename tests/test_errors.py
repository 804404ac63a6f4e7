"""Errors that end in one line, and images of any kind."""
import errno
import os
import re
import signal
import subprocess
import sys
from copy import copy

import numpy as np
import pytest
import torch
from conftest import root
from PIL import Image
from torch.utils.data import DataLoader

from errors import UserError, run, write_whole
from images import decode_once, is_image, open_image, to_rgb

# --------------------------------------------------------------------------------------------------------------- Errors

def last_line(function):
    """The line that ends a script whose main this function is."""
    with pytest.raises(SystemExit) as stop:
        run(function)
    return stop.value.code


class Unlucky(torch.utils.data.Dataset):
    """Its only image can't be loaded."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 1

    def __getitem__(self, i):
        self.fail()


def load(fail, workers):
    """A function that loads the only image of a data set with a data loader: it fails."""
    return lambda: list(DataLoader(Unlucky(fail), num_workers=workers))


def throw(error):
    """Raise an error, in an expression."""
    raise error


@pytest.mark.parametrize('number, words', [(signal.SIGKILL, 'Killed.'),
                                           (signal.SIGBUS, 'raise your shared memory limit')])
def test_a_killed_worker_ends_in_one_line_of_pytorch(number, words):
    """Short of shared memory, as in a container, a worker gets SIGBUS; then PyTorch says what to do."""
    line = last_line(load(lambda: os.kill(os.getpid(), number), 1))
    assert re.match(r'Error: DataLoader worker \(pid', line) and words in line and '\n' not in line


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_in_workers_keep_their_lines(workers):
    assert last_line(load(lambda: throw(UserError('a.jpg is broken')), workers)) == 'Error: a.jpg is broken'
    line = last_line(load(lambda: throw(PermissionError(13, 'Permission denied', 'a.jpg')), workers))
    assert line.startswith('Error: ') and line.endswith("denied: 'a.jpg'")
    with pytest.raises(RuntimeError, match='shapes do not fit'):
        run(load(lambda: throw(RuntimeError('shapes do not fit')), workers))


@pytest.mark.parametrize('error, line', [
    (MemoryError(), 'lower batch_size'),
    (RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'), 'lower batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'lower batch_size'),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), 'lower batch_size'),
    (RuntimeError('Connection closed by peer [127.0.0.1]:1'), 'another process ended'),
    (RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'), 'worker (pid(s) 7, 8) exited unexpectedly'),
    (RuntimeError('Pin memory thread exited unexpectedly'), 'Pin memory thread exited'),
    (EOFError(), 'a worker that loads images was killed'),
    (ConnectionResetError(104, 'Connection reset by peer'), 'a worker that loads images was killed'),
    (RuntimeError('Too many open files. Please increase the limit\nusing `ulimit -n`'), 'limit using `ulimit -n`'),
    (RuntimeError('received 0 items of ancdata'), 'too many open files: raise the limit with "ulimit -n"')])
def test_errors_of_pytorch_that_a_user_can_cause(error, line):
    def fail():
        raise error

    assert last_line(fail).startswith('Error: ') and line in last_line(fail) and '\n' not in last_line(fail)


def test_names_that_the_console_lacks_are_printed(tmp_path):
    code = r"from errors import run; run(lambda: print('\u732b', '\udcff'))"
    done = subprocess.run([sys.executable, '-c', code], cwd=root, env={**os.environ, 'PYTHONIOENCODING': 'cp1252'},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, r'\u732b \udcff'), done.stderr


def test_an_error_without_a_message_is_still_a_line():
    def fail():
        raise OSError

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 'Error: OSError'


@pytest.mark.parametrize('command, remedy', [
    (['create_data_lists.py'], 'download = True'), (['train.py'], 'python create_data_lists.py'),
    (['eval.py'], 'python create_data_lists.py'), (['detect.py', 'x.jpg'], 'check the path')])
def test_without_data_scripts_end_in_one_line(tmp_path, command, remedy):
    result = subprocess.run([sys.executable, os.path.join(root, command[0]), *command[1:]], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1 and remedy in result.stderr
    assert os.listdir(tmp_path) == []


def test_importing_touches_nothing(tmp_path):
    modules = ', '.join(name[:-3] for name in sorted(os.listdir(root)) if name.endswith('.py'))
    assert modules.count(',') >= 9
    program = ('import socket, torch\n'
               'torch.load = torch.cuda.is_available = torch.cuda.init = socket.socket = None\n'
               f'import {modules}\nprint(torch.cuda.is_initialized())')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root, 'PYTHONDONTWRITEBYTECODE': '1'})
    assert result.stdout == 'False\n' and result.stderr == '' and os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------- Files that are written

def refuse_to_replace(monkeypatch, times):
    """Let os.replace fail as on Windows, while another program has the file open; the list of the seconds waited."""
    waited, replace = [], os.replace

    def replace_later(source, path):
        if len(waited) < times:
            raise PermissionError(13, 'Access is denied', source, None, path)
        replace(source, path)

    monkeypatch.setattr('errors.os.replace', replace_later)
    monkeypatch.setattr('errors.time.sleep', waited.append)
    return waited


def write(path):
    """Write 'new' to a file."""
    with write_whole(path) as [file]:
        file.write(b'new')


def test_a_file_that_is_open_elsewhere_is_replaced_when_it_is_free(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    path.write_bytes(b'old')
    waited = refuse_to_replace(monkeypatch, 3)
    write(path)
    assert path.read_bytes() == b'new' and os.listdir(tmp_path) == ['c.pth'] and len(waited) == 3


def test_a_file_that_stays_open_elsewhere_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    path.write_bytes(b'old')
    waited = refuse_to_replace(monkeypatch, 100)
    with pytest.raises(UserError) as error:
        write(path)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['c.pth'] and 3 < sum(waited) < 15
    assert str(error.value).startswith(f'{path} could not be written and is unchanged: ')
    assert 'Access is denied' in str(error.value) and str(error.value).endswith('whether another program has it open')
    assert '\n' not in str(error.value)


def test_a_temporary_file_that_is_open_elsewhere_hides_no_error(tmp_path, monkeypatch):
    def no_removal(path):
        raise PermissionError(13, 'Access is denied', path)

    refuse_to_replace(monkeypatch, 100)
    monkeypatch.setattr('errors.os.remove', no_removal)
    with pytest.raises(UserError, match='c.pth could not be written and is unchanged'):
        write(tmp_path / 'c.pth')


def test_other_errors_of_a_replacement_are_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / 'c.pth').mkdir()
    monkeypatch.setattr('errors.time.sleep', lambda _: pytest.fail('waited'))
    with pytest.raises(UserError, match='could not be written'):
        write(tmp_path / 'c.pth')


def test_of_several_files_each_is_old_or_new(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ('a', 'b')]
    replace = os.replace
    monkeypatch.setattr('errors.os.replace', lambda source, path: replace(source, path) if path == paths[0] else throw(
        OSError(errno.EIO, 'Input/output error')))
    with pytest.raises(UserError, match='a, .*b could not be written and each is unchanged or complete: .*put error'):
        with write_whole(*paths, mode='w') as files:
            for file in files:
                file.write('new')
    assert os.listdir(tmp_path) == ['a'] and paths[0].read_text() == 'new'


# ------------------------------------------------------------------------------------------------------------- Images

red, gray = (255, 0, 0), (120, 120, 120)


@pytest.mark.parametrize('mode, color, expected', [
    ('L', 100, (100, 100, 100)), ('1', 1, (255, 255, 255)), ('RGBA', (200, 0, 0, 255), (200, 0, 0)),
    ('RGBA', (0, 0, 0, 0), (255, 255, 255)), ('LA', (100, 255), (100, 100, 100)),
    ('CMYK', (0, 255, 255, 0), (255, 0, 0)), ('I;16', 32896, (128, 128, 128)), ('I', 65535, (255, 255, 255)),
    ('F', .5, (255, 255, 255)), ('P', 0, (0, 0, 0))])
def test_images_of_any_mode(tmp_path, mode, color, expected):
    image = Image.new(mode, (20, 10), color)
    assert to_rgb(image).getpixel((3, 3)) == expected and to_rgb(image).mode == 'RGB'
    assert image.mode == mode and image.size == (20, 10)
    suffix = {'CMYK': 'tif', 'I': 'tif', 'F': 'tif'}.get(mode, 'png')
    image.save(tmp_path / f'a.{suffix}')
    assert open_image(tmp_path / f'a.{suffix}').getpixel((3, 3)) == expected


@pytest.mark.filterwarnings('error')
def test_pixels_that_are_no_numbers_do_not_blacken_the_others():
    for value in (float('nan'), float('inf'), float('-inf')):
        image = to_rgb(Image.fromarray(np.array([[2, value, 1]], dtype=np.float32)))
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [255, 0, 127]


def test_palette_transparency_is_white():
    image = Image.new('P', (5, 5), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info['transparency'] = 0
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_honored(tmp_path, orientation, suffix):
    image = Image.new('RGB', (40, 20), 'white')
    image.paste(red, (0, 0, 20, 10))  # the stored image's top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'a.{suffix}'
    image.save(path, exif=exif)
    upright = open_image(path)
    size = (40, 20) if orientation < 5 else (20, 40)
    assert upright.size == size and decode_once(path) == (size, orientation)
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    for x in (0, 1):
        for y in (0, 1):
            color = upright.getpixel((x * (upright.width - 1), y * (upright.height - 1)))
            assert color == (red if (x, y) == corner else (255, 255, 255))


@pytest.mark.parametrize('orientation', [0, 9, 77, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert open_image(tmp_path / 'a.jpg').size == (40, 20) and decode_once(tmp_path / 'a.jpg') == ((40, 20), 1)


@pytest.mark.parametrize('name, expected', [('a.jpg', True), ('A.JPG', True), ('a.webp', True), ('a.gif', True),
                                            ('a.eps', False), ('a.mpg', False), ('a.pdf', False), ('a.xml', False),
                                            ('jpg', False)])
def test_images_are_known_by_their_extension(name, expected):
    assert is_image(name) == expected


@pytest.mark.parametrize('read', [open_image, decode_once])
@pytest.mark.parametrize('when', ['opened', 'loaded'])
@pytest.mark.parametrize('error, line', [
    (MemoryError(), 'there is not enough memory'),
    (OSError(errno.EMFILE, 'Too many open files'), "Too many open files: '{path}'"),
    (OSError(errno.ENFILE, 'Too many open files in system', 'x'), "Too many open files in system: 'x'"),
    (PermissionError(errno.EACCES, 'Permission denied'), "Permission denied: '{path}'"),
    (OSError(errno.EIO, 'Input/output error'), "Input/output error: '{path}'")])
def test_what_the_system_cannot_do_is_not_said_of_the_image(tmp_path, monkeypatch, read, when, error, line):
    path = str(tmp_path / 'a.jpg')
    Image.new('RGB', (40, 20)).save(path)
    function = 'PIL.Image.open' if when == 'opened' else 'PIL.JpegImagePlugin.JpegImageFile.load'
    monkeypatch.setattr(function, lambda *_, **__: throw(copy(error)))  # which may get the file's name
    with pytest.raises(type(error)):
        read(path)
    said = last_line(lambda: read(path))
    assert line.format(path=path) in said and 'not an image' not in said


def test_too_many_open_files_end_in_that_line(tmp_path):
    resource = pytest.importorskip('resource')
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.png')
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        line = last_line(lambda: open_image(tmp_path / 'a.png'))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 'Too many open files' in line and 'a.png' in line and 'not an image' not in line


@pytest.mark.parametrize('error', [OSError('image file is truncated'), OSError(-2), EOFError(),
                                   ValueError('bad\nheader'), SyntaxError('not a TIFF file'),
                                   OSError(errno.EINVAL, 'Invalid argument')])
def test_what_a_bad_file_makes_pillow_raise_is_said_of_the_image(tmp_path, monkeypatch, error):
    monkeypatch.setattr('PIL.Image.open', lambda _: throw(error))
    for read in (open_image, decode_once):
        with pytest.raises(UserError, match='a.jpg is not an image that can be read') as stop:
            read(tmp_path / 'a.jpg')
        assert '\n' not in str(stop.value)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / 'text.jpg').write_text('no image')
    Image.effect_noise((200, 200), 100).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:4000])
    for name in ('text.jpg', 'cut.jpg'):
        for read in (open_image, decode_once):
            with pytest.raises(UserError, match=f'{name} is not an image that can be read'):
                read(tmp_path / name)
    with pytest.raises(UserError, match='none.jpg is missing: check the path'):
        open_image(tmp_path / 'none.jpg')
