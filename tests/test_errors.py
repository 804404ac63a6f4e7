"""Errors that end in one line, those that keep their traceback, and files that are written whole."""
import errno
import importlib
import io
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import root
from torch.utils.data import DataLoader

from errors import UserError, run, write_whole


def last_line(function):
    """The line that ends a script whose main this function is."""
    with pytest.raises(SystemExit) as stop:
        run(function)
    assert stop.value.__context__ is None and '\n' not in stop.value.code  # IPython 8 shows no exit with a context
    return stop.value.code


def throw(error):
    """Raise an error, in an expression."""
    raise error


def load(fail, workers):
    """A function that loads the only image of a data set with a data loader: it fails."""
    return lambda: list(DataLoader([0], num_workers=workers, collate_fn=lambda batch: fail()))


@pytest.mark.parametrize('number, words', [(signal.SIGKILL, 'Killed.'),
                                           (signal.SIGBUS, 'raise your shared memory limit')])
def test_a_killed_worker_ends_in_one_line_of_pytorch(number, words):
    """Short of shared memory, as in a container, a worker gets SIGBUS; then PyTorch says what to do."""
    line = last_line(load(lambda: os.kill(os.getpid(), number), 1))
    assert line.startswith('Error: DataLoader worker (pid') and words in line


@pytest.mark.parametrize('error', [EOFError(), ConnectionResetError(104, 'Connection reset by peer')])
def test_what_a_killed_worker_passes_on_breaks_off_before_pytorch_says_why(monkeypatch, error):
    killed = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
    monkeypatch.setattr('errors.time.sleep', lambda _: throw(killed))  # as PyTorch does when it hears from the system
    assert last_line(lambda: throw(error)) == f'Error: {killed}'


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_in_workers_keep_their_lines(workers):
    assert last_line(load(lambda: throw(UserError('a.jpg is broken')), workers)) == 'Error: a.jpg is broken'
    assert 'not enough memory' in last_line(load(lambda: throw(MemoryError()), workers))
    with pytest.raises(RuntimeError, match='shapes do not fit'):
        run(load(lambda: throw(RuntimeError('shapes do not fit')), workers))


@pytest.mark.parametrize('error, line', [
    (UserError('a.jpg is broken'), 'Error: a.jpg is broken'), (KeyboardInterrupt(), 'Stopped.'),
    (KeyboardInterrupt('c.pth has epoch 3'), 'Stopped. c.pth has epoch 3'),
    (MemoryError(), 'Error: there is not enough memory: {}end other programs that use it'),
    (RuntimeError('DefaultCPUAllocator: no'), 'Error: there is not enough memory: {}end other programs that use it'),
    (UserError('two\nlines'), 'Error: two lines'),
    (torch.OutOfMemoryError('CUDA'), 'Error: the GPU ran out of memory: {}end other programs that use it'),
    (RuntimeError('CUDA error: out of memory'), 'Error: the GPU ran out of memory: {}end other programs that use it'),
    (OSError(errno.ENOSPC, 'No space left on device', 'a.csv'), "Error: [Errno 28] No space left on device: 'a.csv'"),
    (RuntimeError('Pin memory thread exited unexpectedly'), 'Error: Pin memory thread exited unexpectedly'),
    (RuntimeError('DataLoader worker (pid(s) 7, 8) exited\nunexpectedly'),
     'Error: DataLoader worker (pid(s) 7, 8) exited unexpectedly')])
def test_what_a_user_can_cause_ends_in_one_line(monkeypatch, error, line):
    assert last_line(lambda: throw(error)) == line.format('')
    monkeypatch.setitem(globals(), 'batch_size', 8)  # in the script, which has none above
    assert last_line(lambda: throw(error)) == line.format('lower batch_size, or ')


@pytest.mark.parametrize('error', [
    RuntimeError('Connection closed by peer'), RuntimeError('no connection between the layers, out of memory'),
    EOFError(), OSError('no number'), KeyError('slip'),
    NameError("name 'nn' is not defined"), RuntimeError('Caught it in DataLoader worker process 0')])
def test_everything_else_shows_its_traceback(monkeypatch, error):
    monkeypatch.setattr('errors.time.sleep', lambda _: None)
    with pytest.raises(type(error)) as raised:
        run(lambda: throw(error))
    assert raised.value is error


@pytest.mark.parametrize('stream', [None, io.StringIO(), io.TextIOBase()])  # pythonw; IDLE, %run in a notebook
def test_scripts_run_with_any_stdout(monkeypatch, stream):
    for name in 'stdout', 'stderr':
        monkeypatch.setattr(sys, name, stream)
    assert run(lambda: sys.stdout.write and sys.stderr.write and 'ran') == 'ran'


def test_a_script_prints_names_that_the_console_lacks_and_no_warning_of_an_attack(tmp_path):
    code = r'''
import images
from errors import run
images.Image.new('L', (20, 10)).save('a.png')
images.Image.MAX_IMAGE_PIXELS = 150
run(lambda: print('\u732b', '\udcff', images.open_image('a.png').size))'''
    environment = {**os.environ, 'PYTHONIOENCODING': 'cp1252', 'PYTHONPATH': root}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '\\u732b \\udcff (20, 10)\n', '')


@pytest.mark.parametrize('script, remedy', [
    ('create_data_lists', 'download = True'), ('train', 'python create_data_lists.py'),
    ('eval', 'python create_data_lists.py'), ('detect', 'photo.jpg is missing: name an image')])
def test_without_data_scripts_end_in_one_line(tmp_path, monkeypatch, capsys, script, remedy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [f'{script}.py'])
    line = last_line(importlib.import_module(script).main)
    assert line.startswith('Error: ') and remedy in line
    assert capsys.readouterr() == ('', '') and os.listdir(tmp_path) == []


def test_arguments_are_refused_but_not_those_of_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['eval.py', 'best.pth'])
    exec('def main(): return 1', script := {'__name__': '__main__', '__file__': 'eval.py'})
    exec('def main(): return 1', notebook := {'__name__': '__main__'})
    assert last_line(script['main']) == 'Error: eval.py takes no arguments: edit the parameters at its top'
    assert run(script['main'], takes_arguments=True) == run(notebook['main']) == 1


def test_importing_touches_nothing(tmp_path):
    modules = ', '.join(name[:-3] for name in sorted(os.listdir(root)) if name.endswith('.py'))
    program = ('import socket, torch\n'
               'torch.load = torch.cuda.is_available = torch.cuda.init = socket.socket = None\n'
               f'import {modules}\nprint(torch.cuda.is_initialized())')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root, 'PYTHONDONTWRITEBYTECODE': '1'})
    assert result.stdout == 'False\n' and result.stderr == '' and os.listdir(tmp_path) == []


@pytest.mark.parametrize('n_refused, removable', [(3, True), (100, True), (100, False)])
def test_a_file_that_is_open_elsewhere_is_replaced_when_it_is_free(tmp_path, monkeypatch, n_refused, removable):
    """On Windows, os.replace fails while another program has the file open, and so may os.remove."""
    def replace_later(source, path, replace=os.replace):
        if len(waited) < n_refused:
            raise PermissionError(13, 'Access is denied', source, None, path)
        replace(source, path)

    path, waited = tmp_path / 'c.pth', []
    path.write_bytes(b'old')
    monkeypatch.setattr('errors.os.replace', replace_later)
    monkeypatch.setattr('errors.time.sleep', waited.append)
    if not removable:
        monkeypatch.setattr('errors.os.remove', lambda path: throw(PermissionError(13, 'Access is denied', path)))
    refused = pytest.raises(UserError, match='c.pth could not be written and is unchanged: .*Access is denied[^\n]*$')
    with refused if n_refused == 100 else nullcontext():
        write_whole({path: b'new'})
    assert path.read_bytes() == (b'new' if n_refused == 3 else b'old') and (len(waited) == 3 or 3 < sum(waited) < 15)
    assert os.listdir(tmp_path) == ['c.pth'] or not removable


@pytest.mark.parametrize('folder, a_is', [('b', b'new'), ('b.tmp', b'old'), (None, b'new')])
def test_of_several_files_each_is_old_or_new(tmp_path, monkeypatch, folder, a_is):
    """And nothing is waited for."""
    monkeypatch.setattr('errors.time.sleep', lambda _: pytest.fail('waited'))
    (tmp_path / 'a').write_bytes(b'old')
    (tmp_path / folder).mkdir() if folder else (tmp_path / 'b').symlink_to('c')  # then what it leads to is written
    words = 'a, .*b could not be written and each is unchanged or complete: .*s a directory'
    with pytest.raises(UserError, match=words) if folder else nullcontext():
        write_whole({tmp_path / 'a': b'new', tmp_path / 'b': b'new'})
    assert (tmp_path / 'a').read_bytes() == a_is
    assert sorted(os.listdir(tmp_path)) == (['a', folder] if folder else ['a', 'b', 'c'])
