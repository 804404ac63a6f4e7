"""Run a command that begins with "python" again and again, each time anew.

Each line of the input is, in JSON, a folder, what follows "python" in the command (-m pytest ..., -c ... or a script),
and the environment. The answer is the exit code; what was printed is in output.txt in that folder. A run that takes two
minutes is ended.

To start Python and to import torch takes seconds, the rest often a fraction of one. So this process does it once,
imports nothing of the project, and then forks for each run: the child begins with all that is imported here, and gets
the project from its own folder.
"""
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

import pytest

for name in ('numpy', 'PIL.Image', 'torch.utils.data', 'torch.utils.flop_counter', 'torchvision.datasets',
             'torchvision.models.detection', 'tqdm', 'xdist.plugin'):
    importlib.import_module(name)


def run(folder, arguments, environment):
    """Run what one line of the input says. Returns its exit code; negative if it took too long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(120)  # unless it has ended by then, this ends it
            os.environ.update(environment)
            os.chdir(folder)
            sys.path[0] = folder  # as python does; it was the folder of this file
            sys.dont_write_bytecode = True  # files change too quickly to be told apart by their time
            with open('output.txt', 'w') as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            if arguments[:2] == ['-m', 'pytest']:
                code = int(pytest.main(arguments[2:]))
            elif arguments[0] == '-c':
                exec(arguments[1], {})
                code = 0
            else:
                sys.argv = arguments
                runpy.run_path(arguments[0], run_name='__main__')
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == '__main__':
    gc.freeze()  # what is there now is not searched for garbage in each run
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
