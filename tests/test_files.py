"""Errors that end in one line, and images of any kind."""
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import root
from tiny import TinyDetector
from torch.utils.data import DataLoader

import datasets
import eval as eval_script
import train
from datasets import PascalVOCDataset, collate_fn, load_batches
from files import UserError, image_header, killed_worker, open_image, run, to_rgb


# --------------------------------------------------------------------------------------------------------------- Errors

def last_line(function):
    """The line that ends a script whose main this function is."""
    with pytest.raises(SystemExit) as stop:
        run(function)
    return stop.value.code


news_of_a_death = [
    RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
    RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'),
    RuntimeError('Pin memory thread exited unexpectedly'), RuntimeError('received 0 items of ancdata'),
    RuntimeError('Invalid data received'), ConnectionResetError(104, 'Connection reset by peer'),
    ConnectionRefusedError(111, 'Connection refused'), BrokenPipeError(32, 'Broken pipe'),
    FileNotFoundError(2, 'No such file or directory'), OSError('got end of file during message'), EOFError(),
    EOFError('unexpected EOF')]


@pytest.fixture
def fail_to_load(monkeypatch):
    """A function that lets all data loaders with workers fail with an error, at the second batch."""
    monkeypatch.setattr(datasets.time, 'sleep', lambda _: None)

    def fail(error):
        loaded, plain = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data

        def next_data(self):
            loaded.append(1)
            if len(loaded) == 2:
                raise error
            return plain(self)
        monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, '_next_data', next_data)
    return fail


class FakeLoader(list):
    """Batches, and an error in the place of one."""

    num_workers = 1

    def __iter__(self):
        for batch in list.__iter__(self):
            if isinstance(batch, Exception):
                raise batch
            yield batch


@pytest.mark.parametrize('error', news_of_a_death, ids=lambda error: f'{type(error).__name__} {error}')
def test_a_killed_worker_is_named_however_the_news_comes(monkeypatch, error):
    monkeypatch.setattr(datasets.time, 'sleep', lambda _: None)
    batches = load_batches(FakeLoader([1, error]))
    assert next(batches) == 1
    assert last_line(lambda: next(batches)) == f'Error: {killed_worker}' and 'lower workers' in killed_worker


def test_training_and_evaluation_name_a_killed_worker(folder, tmp_path, fail_to_load):
    def fit():
        model = TinyDetector(4)
        train.fit(model, train.make_optimizer(model, 1e-3, 0.9, 5e-4), PascalVOCDataset(folder, 'TRAIN', True),
                  str(tmp_path / 'c.pth'), 1, 4, workers=1)

    def evaluate():
        eval_script.evaluate(DataLoader(PascalVOCDataset(folder, 'TEST'), 1, collate_fn=collate_fn, num_workers=1),
                             TinyDetector(4))

    for script in (fit, evaluate):
        fail_to_load(ConnectionResetError(104, 'Connection reset by peer'))
        assert last_line(script) == f'Error: {killed_worker}'


def test_the_signal_that_a_worker_was_killed_ends_in_the_same_line(monkeypatch):
    """It comes while the last batch is worked on; or after other news, and does not interrupt the end."""
    waits = []

    def work():
        for _ in load_batches(FakeLoader([1, 2])):
            raise news_of_a_death[0]

    def signal_comes(seconds):
        assert seconds > 0.1
        waits.append(seconds)
        raise news_of_a_death[0]

    assert last_line(work) == f'Error: {killed_worker}'
    monkeypatch.setattr(datasets.time, 'sleep', signal_comes)
    with pytest.raises(UserError, match=killed_worker):
        list(load_batches(FakeLoader([EOFError()])))
    assert len(waits) == 1


class Unlucky(torch.utils.data.Dataset):
    """Its only image can't be loaded."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise self.error


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_of_workers_that_live_keep_their_lines(monkeypatch, workers):
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.2)  # how long to wait for their end

    def load(error):
        return lambda: list(load_batches(DataLoader(Unlucky(error), num_workers=workers)))

    assert last_line(load(UserError('a.jpg is broken'))) == 'Error: a.jpg is broken'
    assert last_line(load(PermissionError(13, 'Permission denied', 'a.jpg'))).endswith("denied: 'a.jpg'")
    with pytest.raises(RuntimeError, match='shapes do not fit'):
        run(load(RuntimeError('shapes do not fit')))
    gc.collect()  # the workers end now


def test_errors_from_elsewhere_keep_their_lines():
    def read_checkpoint():
        for _ in load_batches(FakeLoader([1])):
            raise FileNotFoundError(2, 'No such file or directory', 'c.pth')

    assert last_line(read_checkpoint) == "Error: [Errno 2] No such file or directory: 'c.pth'"
    many = RuntimeError('Too many open files. Please increase the limit\nusing `ulimit -n`')
    line = last_line(lambda: list(load_batches(FakeLoader([many]))))
    assert line == 'Error: Too many open files. Please increase the limit using `ulimit -n`'


@pytest.mark.parametrize('error, line', [
    (MemoryError(), 'lower batch_size'),
    (RuntimeError('CUDA out of memory. Tried to allocate 2 GiB'), 'lower batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'lower batch_size'),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), 'lower batch_size'),
    (RuntimeError('Connection closed by peer [127.0.0.1]:1'), 'another process ended')])
def test_errors_of_pytorch_that_a_user_can_cause(error, line):
    def fail():
        raise error

    assert last_line(fail).startswith('Error: ') and line in last_line(fail) and '\n' not in last_line(fail)


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
    assert upright.size == size and image_header(path) == (size, orientation)
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
    assert open_image(tmp_path / 'a.jpg').size == (40, 20) and image_header(tmp_path / 'a.jpg') == ((40, 20), 1)
