"""
Runs pytest again and again, each time anew, for test_exercises.py.

Each line of the input is, in JSON, a folder with a copy of the project, and a list of pytest's arguments. The answer is
pytest's exit code; what it printed is in output.txt in that folder. A run that takes a minute is ended.

To start Python and to import torch takes seconds, the tests themselves a fraction of one. So this process does it once,
imports nothing of the project, and then forks for each run: the child begins with all that is imported here, and gets
the project from its own folder.
"""
import gc
import importlib
import json
import os
import signal
import sys

import pytest

for name in ('numpy', 'PIL.Image', 'torch.utils.data', 'torch.utils.flop_counter', 'torchvision.datasets',
             'torchvision.models.detection', 'tqdm', 'xdist.plugin'):
    importlib.import_module(name)


def run_pytest(folder, arguments):
    """
    :param folder: where to run it
    :param arguments: pytest's
    :return: its exit code; negative if it took too long
    """
    child = os.fork()
    if child == 0:
        code = -1
        try:
            signal.alarm(60)  # unless it has ended by then, this ends it
            os.chdir(folder)
            sys.path[0] = folder  # as "python -m pytest" does; it was the folder of this file
            sys.dont_write_bytecode = True  # files change too quickly to be told apart by their time
            with open('output.txt', 'w') as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            code = int(pytest.main(arguments))
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == '__main__':
    gc.freeze()  # what is there now is not searched for garbage in each run
    for line in sys.stdin:
        print(run_pytest(*json.loads(line)), flush=True)
