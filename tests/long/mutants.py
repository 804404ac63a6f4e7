"""Mutation testing: do the tests notice if a random line of the program is wrong?

    python tests/long/mutants.py [how many, 100] [first, 0]

changes one operator, number or statement at a time in a copy of the project, and runs the tests: first those of the
file, then, if these pass, all. It prints each change that no test notices. This takes hours.
"""
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[2]
seed = 37
timeout = 1800  # seconds, of a run of tests; a change that makes it slower is noticed
operators = {ast.Lt: ('<', '<='), ast.LtE: ('<=', '<'), ast.Gt: ('>', '>='), ast.GtE: ('>=', '>'), ast.Eq: ('==', '!='),
             ast.NotEq: ('!=', '=='), ast.Is: ('is', 'is not'), ast.IsNot: ('is not', 'is'), ast.In: ('in', 'not in'),
             ast.NotIn: ('not in', 'in'), ast.Add: ('+', '-'), ast.Sub: ('-', '+'), ast.Mult: ('*', '/'),
             ast.Div: ('/', '*'), ast.FloorDiv: ('//', '*'), ast.Mod: ('%', '*'), ast.Pow: ('**', '*'),
             ast.And: ('and', 'or'), ast.Or: ('or', 'and'), ast.BitAnd: ('&', '|'), ast.BitOr: ('|', '&')}
# Words of lines that need a GPU or a screen
needs_gpu = 'cuda', 'nccl', 'pin_memory', 'non_blocking', 'memory_format', 'allow_tf32', 'if show', '.show()'
tests_of = {'own_images': 'test_own_images test_layouts test_create_data_lists'}  # others: test_<name>


def mutants_of(path):
    """All changes of a file: list of (line number, first and last offset in the source, text that replaces it)."""
    source = path.read_text('utf-8')
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    data, found = source.encode(), []

    def add(first, last, new):
        """Keep a change, unless its line needs a GPU."""
        number = data[:first].count(b'\n') + 1
        line = data[starts[number - 1]:starts[number]].decode()
        if not any(word in line for word in needs_gpu):
            found.append((number, first, last, new))

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def swap(left, operator, right):
        """Another operator between two nodes."""
        old, new = operators.get(type(operator), ('', ''))
        first = data.find(old.encode(), span(left)[1], span(right)[0])
        if old and first >= 0:
            add(first, first + len(old), new)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                swap(left, operator, right)
        elif isinstance(node, ast.BinOp):
            swap(node.left, node.op, node.right)
        elif isinstance(node, ast.BoolOp):
            swap(node.values[0], node.op, node.values[1])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            add(span(node)[0], span(node.operand)[0], '')
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            add(*span(node), repr(not node.value if isinstance(node.value, bool) else node.value + 1))
        elif isinstance(node, ast.Return) and node.value is not None:
            add(*span(node.value), 'None')
        elif isinstance(node, (ast.Expr, ast.AugAssign)) and not isinstance(node.value, ast.Constant):
            add(*span(node), 'pass')
    return found


def is_noticed(folder, name):
    """Whether some test fails in a copy of the project: of the file with this name, or of all."""
    of_file = [f'tests/{test}.py' for test in tests_of.get(name, f'test_{name}').split()
               if (folder / f'tests/{test}.py').exists()]
    for tests in ([*of_file, '-n', '0'], ['-n', '2']):
        command = [sys.executable, '-m', 'pytest', '-q', '-x', *tests]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, timeout=timeout, check=True)
        except subprocess.SubprocessError:
            return True
    return False


def main():
    """Change, test, and print what no test notices."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    everything = [(path.stem, mutant) for path in sorted(root.glob('*.py')) for mutant in mutants_of(path)]
    chosen, n_noticed = random.Random(seed).sample(everything, n), 0
    for i, (name, (number, start, end, new)) in list(enumerate(chosen))[first:]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / 'copy'
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.git', '__pycache__'))
            data = (copy / f'{name}.py').read_bytes()
            (copy / f'{name}.py').write_bytes(data[:start] + new.encode() + data[end:])
            noticed = is_noticed(copy, name)
        n_noticed += noticed
        line = data.splitlines()[number - 1].decode().strip()
        print(f'{i}: {"noticed" if noticed else "SURVIVED"} {name}.py:{number} {line!r}: '
              f'{data[start:end].decode()!r} -> {new!r}', flush=True)
    print(f'{n_noticed} of {n - first} were noticed')


if __name__ == '__main__':
    main()
