"""Errors that end in one line, and files that are never left half written. On a first reading, skip this file."""
import os
import sys
import time
from contextlib import suppress

import torch

# --------------------------------------------------------------------------------------------------------------- Errors

class UserError(Exception):
    """Something the user can put right. Its message is one line; scripts print that line and exit with code 1."""


def run(main, takes_arguments=False):
    """Run a script's `main`. What a user can put right ends in one line and a non-zero exit, without a traceback; so do
    arguments, unless the script takes some."""
    for name in 'stdout', 'stderr':
        stream = getattr(sys, name)
        if stream is None:  # with pythonw, where tqdm would fail
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
        elif hasattr(stream, 'reconfigure'):  # not in a notebook or IDLE
            stream.reconfigure(errors='backslashreplace')  # a name with letters that the console lacks
    try:
        # Pasted into a notebook, a script has no __file__, but the notebook's arguments.
        is_script = main.__module__ == '__main__' and '__file__' in main.__globals__
        if is_script and not takes_arguments and sys.argv[1:]:
            raise UserError(f'{sys.argv[0]} takes no arguments: edit the parameters at its top')
        try:
            return main()
        except (EOFError, ConnectionError):
            time.sleep(1)  # if a worker was killed while it sent images, PyTorch raises its own error now
            raise
    except UserError as error:
        # From a worker of a data loader, the message is a whole traceback, which ends in ours.
        line = 'Error: ' + str(error).split('UserError: ')[-1].strip().replace('\n', ' ')
    except OSError as error:
        if error.errno is None:  # the system's have a number: a full disk, no permission, ...
            raise
        line = f'Error: {one_line(error)}'
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            on_gpu = isinstance(error, torch.OutOfMemoryError) or 'CUDA' in str(error)
            where = 'the GPU ran out of memory' if on_gpu else 'there is not enough memory'
            lower = 'lower batch_size, or ' if 'batch_size' in main.__globals__ else ''
            line = f'Error: {where}: {lower}end other programs that use it'
        elif str(error).startswith(('DataLoader worker (pid', 'Pin memory thread exited')):  # one was killed
            # The cause names the signal and, if it was short of shared memory, the remedy.
            line = f'Error: {one_line(error)}: {one_line(error.__cause__ or "")}'.rstrip(': ')
        else:
            raise
    except KeyboardInterrupt as stop:
        line = f'Stopped. {stop}'.strip()
    sys.exit(line)  # not in the lines above: IPython 8 fails to show an exit during the handling of another error


def check_numbers(script, least, kind=int, **parameters):
    """Raise UserError unless each of these parameters of a script is a number and at least `least`. With int as `kind`
    it must be a whole number; with float, any."""
    for name, value in parameters.items():
        if not isinstance(value, (int, kind)) or not value >= least:  # NaN is never >= least
            what = 'a whole number' if kind is int else 'a number'
            raise UserError(f'{name} = {value!r} in {script}: set it to {what}, at least {least}')


def is_out_of_memory(error):
    """Whether an error says that there is not enough memory: PyTorch also raises RuntimeError then."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(words in str(error) for words in ('DefaultCPUAllocator', 'CUDA error: out of memory')))


def one_line(error):
    """:return: the message of an error, in one line of at most 300 characters"""
    return ' '.join(str(error).split())[:300]


# ----------------------------------------------------------------------------------------------- Files that are written

def write_whole(contents):
    """Write files, a dict of path -> bytes, and make folders that are missing. They replace older files only when all
    are complete: after an interruption, each path has the old file or the new one, never half a file. Raises UserError
    if a file can't be written."""
    files = {}
    try:
        files = {os.path.realpath(path): content for path, content in contents.items()}  # of a link, what it leads to
        for path, content in files.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(f'{path}.tmp', 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # on the disk, not just on its way there
        for path in files:
            replace(f'{path}.tmp', path)
    except OSError as error:
        state = 'is unchanged' if len(contents) == 1 else 'each is unchanged or complete'
        raise UserError(f'{", ".join(map(str, contents))} could not be written and {state}: {one_line(error)}; check '
                        'the free space, the permissions, and whether another program has it open') from None
    finally:
        for path in files:
            with suppress(OSError):  # it is gone, or on Windows still open in another program
                os.remove(f'{path}.tmp')


def replace(source, path):
    """os.replace, tried again for some seconds: on Windows, it fails as long as another program, such as a virus
    scanner, has the older file open."""
    for seconds in 0.1, 0.2, 0.4, 0.8, 1.6, 3.2:
        with suppress(PermissionError):
            return os.replace(source, path)
        time.sleep(seconds)
    os.replace(source, path)
