"""
The exercises of EXERCISES.md: the command of each passes with the code as it is, and fails with an empty function, and
with a plausible wrong answer.
"""
import ast
import os
import re
import shutil

import pytest
from conftest import root

# A piece of the code, what makes it a wrong answer, and the mistake that this is
wrong_answers = {
    # The center is half the difference of the corners
    'xy_to_cxcy': ('(xy[..., 2:] + xy[..., :2]) / 2', '(xy[..., 2:] - xy[..., :2]) / 2'),
    # Boxes that are apart share the product of two negative sides
    'find_jaccard_overlap': ('(upper - lower).clamp(min=0).prod(dim=-1)', '(upper - lower).prod(dim=-1)'),
    # Weights are taken out of the flattened map in another order than they were put in: with the channels last
    'fully_connected_to_convolution': ('weight.view(-1, channels, size, size)',
                                       'weight.view(-1, size, size, channels).permute(0, 3, 1, 2)'),
    # Column by column instead of row by row
    'create_prior_boxes': ('c_x, c_y = (column + 0.5) / size, (row + 0.5) / size',
                           'c_x, c_y = (row + 0.5) / size, (column + 0.5) / size'),
    # The distance of the centers is divided by 10 instead of multiplied
    'cxcy_to_gcxgcy': ('/ (priors_cxcy[..., 2:] / 10)', '/ (priors_cxcy[..., 2:] * 10)'),
    # The channels do not come last before the output is reshaped
    'PredictionConvolutions.forward': ('loc.permute(0, 2, 3, 1)', 'loc'),
    # An object has its own prior, but below the threshold it is background nevertheless
    'match': ('overlap_of_prior[prior] = 1 ', 'overlap_of_prior[prior] = overlap[i, prior] '),
    # Positives are among the hard negatives
    'MultiBoxLoss.losses': ('conf_losses.where(~positive, 0).sort(', 'conf_losses.sort('),
    # A box also suppresses those of other classes
    'non_maximum_suppression': ('batched_nms(boxes_xy.clamp(-1, 2), scores, labels, max_overlap)',
                                'batched_nms(boxes_xy.clamp(-1, 2), scores, 0 * labels, max_overlap)'),
    # The column of the background is cut off, and not added to the labels again
    'SSD300.detect_objects': ('boxes[indices[ranks, classes]], classes + 1', 'boxes[indices[ranks, classes]], classes'),
    # A second detection of an object is another true positive
    'calculate_mAP': ('elif targets[i] not in found:', 'else:')}


def read_exercises():
    """Of each exercise its number and name, the text up to the next, all as strings."""
    with open(os.path.join(root, 'EXERCISES.md'), encoding='utf-8') as file:
        text = file.read().split('\n## Four open ones\n')[0]
    fields = re.split(r'^## Exercise (\d+): `([\w.]+)`$', text, flags=re.M)[1:]
    return list(zip(fields[::3], fields[1::3], fields[2::3]))


exercises = read_exercises()


def functions_and_file(text):
    """The functions that are to be emptied, all that an exercise links to, and the file that they are in."""
    links = re.findall(r'\[`([\w.]+)`\]\((\w+\.py)#L\d+\)', text)
    [file_name] = {file_name for _, file_name in links}
    return [name for name, _ in links], file_name


def emptied(source, names):
    """A file's source, in which of some functions, or methods (Class.method), only the docstrings are left."""
    lines = source.splitlines()
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for owner in [node for node in nodes.values() if isinstance(node, ast.ClassDef)]:
        nodes |= {f'{owner.name}.{node.name}': node for node in owner.body if isinstance(node, ast.FunctionDef)}
    for node in sorted((nodes[name] for name in names), key=lambda node: -node.lineno):  # from the end of the file up
        assert ast.get_docstring(node)
        lines[node.body[0].end_lineno:node.end_lineno] = [' ' * node.body[0].col_offset + 'pass']
    return '\n'.join(lines) + '\n'


def test_there_are_eleven():
    assert [int(number) for number, _, _ in exercises] == list(range(1, 12))
    assert [name for _, name, _ in exercises] == list(wrong_answers)


@pytest.mark.parametrize('number, name, text', exercises, ids=[name for _, name, _ in exercises])
def test_command_passes_with_the_code_and_fails_without_it(run_forked, tmp_path, number, name, text):
    names, file_name = functions_and_file(text)
    assert text.startswith(f'\n\nEmpty [`{names[0]}`]') and name in names
    [command] = re.findall(r'^    (python -m pytest .*)$', text, re.M)
    options = f' -q --assert=plain -p no:cacheprovider --basetemp={tmp_path / "tmp"}'

    (tmp_path / 'tests').mkdir()
    for folder in ('.', 'tests'):
        for file in os.listdir(os.path.join(root, folder)):
            if file.endswith(('.py', '.toml', '.json')):
                shutil.copy(os.path.join(root, folder, file), tmp_path / folder)
    source = (tmp_path / file_name).read_text()
    piece, wrong_piece = wrong_answers[name]
    assert source.count(piece) == 1
    for kind, answer, code in (('right', source, 0), ('no', emptied(source, names), 1),
                               ('wrong', source.replace(piece, wrong_piece), 1)):  # 1: tests have run, and failed
        (tmp_path / file_name).write_text(answer)
        exit_code, printed = run_forked(tmp_path, command + options)
        assert exit_code == code, f'{kind} answer:\n{printed}'
