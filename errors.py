"""Errors that end in one line, and files that are never left half written. Skip this file on a first reading; `UserError`
is all that the others need to know of it.
"""
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

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
