"""What README.md, GUIDE.md, EXERCISES.md and CONTRIBUTING.md show runs as it stands there, and what they say of the
code is true.

    python tests/test_readme.py

brings the line numbers in their links into the code up to date.
"""
import ast
import csv
import doctest
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from conftest import copy_lists, draw_and_list, root
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssd300_vgg16

import detect
import train
import utils
from checkpoints import save_checkpoint
from datasets import PascalVOCDataset, to_input
from demo import draw_dataset, shapes
from images import open_image
from model import SSD300, match
from torchvision_weights import coco_weights
from utils import create_prior_boxes, cxcy_to_xy, feature_maps, find_jaccard_overlap, gcxgcy_to_cxcy, make_label_map

sys.path.insert(0, os.path.join(root, 'img'))
import draw_figures
import examples
from photographs import objects


def read(name):
    """The text of one of the project's files."""
    return Path(root, name).read_text(encoding='utf-8')


def without_code(text):
    """All but the blocks of code."""
    return re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)


pages = {name: read(name) for name in ('README.md', 'GUIDE.md', 'EXERCISES.md', 'CONTRIBUTING.md')}
everything = '\n'.join(pages.values())
words = ' '.join(everything.split())  # without line breaks
prose = without_code(everything)
headings = {name: re.findall(r'^#+ (.*)$', without_code(text), re.M) for name, text in pages.items()}


def section(title, name='README.md'):
    """The Python blocks of a section of a page, and its commands."""
    text = pages[name].split(f'\n## {title}\n')[1].split('\n## ')[0]
    return re.findall(r'```python\n(.*?)```', text, re.S), re.findall(r'^    ((?:cd|python|torchrun) .*)$', text, re.M)


def run_block(title, name='README.md', number=0):
    """Run a Python block of a section; the names that it defines."""
    names = {}
    exec(section(title, name)[0][number], names)
    return names


# ----------------------------------------------------------------------------------------------- Names, links, images

def definitions(file_name):
    """Line numbers of the functions, classes, methods (as Class.method) and constants that a file defines."""
    lines = {}
    for node in ast.parse(read(file_name)).body:
        for name in ast.walk(node) if isinstance(node, ast.Assign) else ():
            if isinstance(name, ast.Name):
                lines.setdefault(name.id, node.lineno)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            lines.update({f'{node.name}.{method.name}': method.lineno for method in node.body
                          if isinstance(method, ast.FunctionDef)})
    return lines


def with_line_numbers(text):
    """A page with links such as [`decimate`](utils.py) leading to the line of the definition."""
    def link(found):
        name, file_name = found.groups()
        return f'[`{name}`]({file_name}#L{definitions(file_name)[name]})'
    return re.sub(r'\[`([\w.]+)`\]\((\w+\.py)(?:#L\d+)?\)', link, text)


def test_links_into_the_code_lead_to_the_definitions():
    """Or near them: lines move with each change, and need not be brought up to date each time."""
    links = re.findall(r'\[`([\w.]+)`\]\((\w+\.py)(?:#L(\d+))?\)', everything)
    assert len(links) > 80
    far = [f'{name}: {file_name}#L{line}' for name, file_name, line in links
           if abs(definitions(file_name)[name] - int(line or 0)) > 15]
    assert not far, f'{far} lead elsewhere: run "python tests/test_readme.py", which puts the line numbers right'


def test_links_lead_to_sections_and_files():
    anchors = {name: {re.sub(r'[^\w\- ]', '', title).lower().replace(' ', '-') for title in titles}
               for name, titles in headings.items()}
    assert all(len(anchors[name]) == len(titles) for name, titles in headings.items())
    links = [(name, *target.partition('#')[::2]) for name, text in pages.items()
             for target in re.findall(r'\]\(([^)\s]+)\)', text) if not target.startswith('http')]
    for name, target, anchor in links:
        assert os.path.exists(os.path.join(root, target or name)), f'{name}: {target}'
        if anchor and (target or name) in pages:
            assert anchor in anchors[target or name], f'{name}: {target}#{anchor}'
    assert pages.keys() - {'README.md'} <= {target for name, target, _ in links if name == 'README.md'}


def test_sections_that_the_code_names_exist():
    titles = {title for titles in headings.values() for title in titles}
    for name, least in (('model.py', 8), ('utils.py', 5), ('datasets.py', 2)):
        text = ' '.join(read(name).split())
        named = [title for some in re.findall(r'See ("[^.]*")\.', text) for title in re.findall(r'"([^"]+)"', some)]
        assert len(named) >= least and set(named) <= titles, name


def test_images_drawn_and_kept_and_shown_are_the_same():
    shown = re.findall(r'!\[[^\]]+\]\(img/([^)]+)\)', everything)
    kept = [name for name in os.listdir(os.path.join(root, 'img')) if name.endswith(('.png', '.svg', '.gif', '.jpg'))]
    assert sorted(shown) == sorted(kept) == sorted(draw_figures.figures)
    assert sum(os.path.getsize(os.path.join(root, 'img', name)) for name in kept) < 8 * 2**20


def test_names_in_the_text_exist():
    """In a script, but for its comments, or as a file."""
    others = {'csv', 'dogs', 'ssd300_vgg16', 'compile', 'OMP_NUM_THREADS', 'OutOfMemoryError', 'pip', ''}
    files = {folder: os.listdir(os.path.join(root, folder)) for folder in ('', 'img', 'tests', 'tests/long')}
    code = ' '.join(re.sub(r'#.*', '', read(name)) for name in files[''] if name.endswith('.py'))
    known = set(re.findall(r'\w+', code + str(files))) | others
    spans = set(re.findall(r'`([A-Za-z_][\w./]*)(?:\(\))?`', prose))
    assert {part for span in spans for part in re.split('[./]', span)} <= known


# -------------------------------------------------------------------------------------------------------------- Numbers

def test_interactive_examples_give_what_is_shown():
    blocks = re.findall(r'```pycon\n(.*?)```', everything, re.S)
    names, runner = {}, doctest.DocTestRunner()
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, names, 'README.md', None, 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    torch.set_printoptions(profile='default')
    assert runner.failures == 0 and runner.tries > 50
    shared = [name for name in vars(examples) if isinstance(names.get(name), torch.Tensor)]
    assert len(shared) >= 8, shared
    for name in shared:  # the images show the same examples
        assert names[name].equal(getattr(examples, name)), name
    assert names['pixels'].equal(torch.tensor(list(objects['astronaut'].values())))


def rows_of_table(header):
    """The cells of a table, row by row, without its header."""
    lines = everything[everything.index(header):].split('\n\n')[0].splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_table_of_priors():
    *rows, last = rows_of_table('| map | tiles |')
    for (map_name, tiles, scale, ratios, n_priors, total), (name, priors) in zip(
            rows, examples.priors_by_map().items(), strict=True):
        of_map = feature_maps[name]
        assert map_name == name and tiles == f'{of_map.size}x{of_map.size}' and float(scale) == of_map.scale
        assert [eval(ratio) for ratio in ratios.replace('extra 1, ', '').split(', ')] == list(of_map.ratios)
        assert int(n_priors) == priors.shape[1] and int(total) == priors.shape[0] * priors.shape[1]
    assert last[-1] == f'**{len(create_prior_boxes())}**'


def test_table_of_receptive_fields():
    rows, fields = rows_of_table('| map | a tile has seen |'), examples.receptive_fields()
    for (name, tile, kernel, widest), priors in zip(rows, examples.priors_by_map().values(), strict=True):
        assert (tile, kernel) == tuple(f'{field} pixels' for field in fields[name])
        sizes = (300 * priors[0, :, 2:]).round().int()
        assert widest in {f'{w}x{h}' for w, h in sizes.tolist()} and sizes.max() == int(widest.split('x')[0])


@pytest.mark.parametrize('header', ['| parameter | value | why |', '| parameter | is | because |'])
def test_tables_of_parameters_of_training(header):
    for names, values, _ in rows_of_table(header):
        for name, value in zip(re.findall(r'`(\w+)`', names), [values] if '_at' in names else values.split(', ')):
            assert ast.literal_eval(value) == getattr(train, name), name


def read_rows(name):
    """The rows of one of the tables that figures leave behind: dicts of column -> text."""
    return list(csv.DictReader(read(f'img/{name}').splitlines()))


def test_line_of_the_log_is_one_of_the_run_that_is_drawn():
    [line] = re.findall(r'^    epoch (\d+)  batch (\d+)/\d+  loss ([\d.]+) \(loc ([\d.]+), conf ([\d.]+)\)', everything,
                        re.M)
    rows = [list(row.values())[:5] for row in read_rows('learning.csv')]
    assert [float(value) for value in line] in [[round(float(value), 4) for value in row] for row in rows]


def test_what_was_found_in_photographs():
    """Detections are as detect.py draws them, and README's example of suppression has six of them."""
    found, decoded = json.loads(read('img/photographs.json')).values()
    for of_image in itertools.chain(*found.values()):
        width, height = open_image(os.path.join(root, 'img', of_image['file'])).size
        for label, score, (x_min, y_min, x_max, y_max) in of_image['detections']:
            assert label in utils.voc_labels and detect.min_score < score <= 1
            assert 0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height
    candidates = torch.tensor([[score, *box] for label, score, box in decoded['candidates'] if label == 'person'])
    shown = torch.cat([examples.nms_scores.unsqueeze(1), examples.nms_boxes], dim=1)  # (6, 5)
    assert ((candidates - shown.unsqueeze(1)).abs().amax(dim=2).amin(dim=1) < 0.0061).all()


def test_the_mean_of_the_classes_is_the_mean_average_precision():
    section = pages['GUIDE.md'].split("## VOC 2008 from ImageNet's weights, measured")[1].split('\n## ')[0]
    rows = re.findall(r'\| (\w+) \| (0\.\d{3}) \| (0\.\d{3}) \|', section)
    assert sorted(label for label, _, _ in rows) == sorted(utils.voc_labels)
    for column, expected in ((1, 0.107), (2, 0.329)):
        assert abs(sum(float(row[column]) for row in rows) / 20 - expected) < 0.0006
    assert '0.329' in section and '| 0.329 |' in pages['README.md']


# Phrases of the text, with numbers from the code

def of_priors():
    scale = feature_maps['conv8_2'].scale
    return (f'{scale * math.sqrt(3):.2f} of the image wide and {scale / math.sqrt(3):.2f} tall',)


def of_parameters_and_operations():
    fc6, operations = torch.nn.Linear(512 * 7 * 7, 4096, device='meta'), []
    for thin in (1, 4):
        with FlopCounterMode(display=False) as counter, torch.device('meta'):
            SSD300(n_classes=21, thin=thin)(torch.empty(1, 3, 300, 300))
        operations.append(counter.get_total_flops())
    assert round(operations[0] / operations[1]) == 14
    return (f'fc6 alone has {sum(parameter.numel() for parameter in fc6.parameters()):,} parameters',
            f'does {operations[0] / 1e9:.0f} billion multiplications and additions', 'a fourteenth of the work')


def of_the_astronaut():
    boxes = torch.tensor(list(objects['astronaut'].values())) / 512
    _, true_classes = match(boxes, torch.tensor([1, 2, 3]), create_prior_boxes())
    background, *counts = true_classes.bincount().tolist()
    n, n_hard = sum(counts), 3 * sum(counts)
    return ('{} priors are responsible for the person, {} for the rocket, and {} for the helmet'.format(*counts),
            f'right for {background} priors of {n + background}, and useless', f'4 ln 5 = {4 * math.log(5):.2f}',
            f'there are {background / n:.0f} for each positive',
            f'these are the {n_hard} worst; the other {background - n_hard} are ignored',
            f'each of {n} positives and {n_hard} negatives costs ln 5', f'would be 4 ln 21 = {4 * math.log(21):.1f}')


def of_overlaps():
    cat, dog, ball = find_jaccard_overlap(examples.matching_boxes, cxcy_to_xy(examples.matching_priors)).tolist()
    assert ball.index(max(ball)) == 4 - 1 and cat[1] > dog[1] == max(dog) and sorted(dog)[-2] == dog[2]
    second, last = 1, 5
    overlap = find_jaccard_overlap(examples.nms_boxes, examples.nms_boxes)[second, last]
    return (f'no prior overlaps it by more than {max(ball):.2f}', f'overlaps prior 2 by {dog[1]:.2f}',
            f'the cat keeps prior 2 ({cat[1]:.2f})', f'The box at {examples.nms_scores[last]:.2f} overlaps the one at '
            f'{examples.nms_scores[second]:.2f} by {overlap:.2f}')


def of_hard_negatives():
    before, after = ({name: float(row[name]) for name in row if name != 'training'}
                     for row in read_rows('hard_negatives.csv'))
    share = before['hard_negatives'] / (len(create_prior_boxes()) - before['positives'])
    of_loss, of_loss_after = (row['hard_loss'] / (row['hard_loss'] + row['ignored_loss']) for row in (before, after))
    assert before['hard_negatives'] == 3 * before['positives']
    return (f"An image of the demo with {before['positives']:.0f} positive priors",
            f'the worst {share:.0%} of', f'these have {of_loss:.0%} of all', f'after training, {of_loss_after:.0%}')


def of_average_precision():
    n_found = examples.true_positives.cumsum(0)
    precisions = n_found / torch.arange(1, 1 + 8)
    best = [max(precisions[10 * n_found >= 5 * tenth].tolist(), default=0) for tenth in range(11)]
    assert best == pytest.approx([1] * 5 + [0.75] * 2 + [0.571] * 2 + [0] * 2, abs=0.0005)
    assert n_found[-1] == 4 and examples.n_objects == 5
    return ('eight detections of a class with five objects, one of which is never found',
            'it is 1 at the first five (up to 0.4), 0.75 at the next two, 0.571 at 0.7 and 0.8, and 0 at the',
            f'(5 · 1 + 2 · 0.75 + 2 · 0.571 + 2 · 0) / 11 = {sum(best) / 11:.3f}')


def of_locality():
    (name, area, share), *others = ((row['map'], f"{float(row['prior_area']):.0%}", f"{float(row['in_prior']):.0%}")
                                    for row in read_rows('locality.csv'))
    text = f'On {name}, the prior covers {area} of the image and gets {share} of the weight'
    return [text + ''.join(f'; on {name}, {area} and {share}' for name, area, share in others) + '.']


def of_ssd512():  # with the changes that the guide names
    model = SSD300(n_classes=2, thin=16)
    for layer in model.aux_convs.conv10_2, model.aux_convs.conv11_2:
        layer.stride, layer.padding = (2, 2), (1, 1)
    maps = list(model.base(torch.zeros(1, 3, 512, 512)))
    maps += model.aux_convs(maps[1])
    sizes, n_priors = [feats.size(3) for feats in maps] + [1], (4, 6, 6, 6, 6, 4, 4)  # the fifth pair: from 2x2 to 1x1
    assert sizes[-2] == 2
    return ('conv10_2 and conv11_2 need stride 2 and padding 1',
            'have {}, {}, {}, {}, {}, {} and {} tiles a side'.format(*sizes),
            'with {}, {}, {}, {}, {}, {} and {} priors each'.format(*n_priors)
            + f': {sum(n * size ** 2 for n, size in zip(n_priors, sizes)):,}.')


@pytest.mark.parametrize('phrases', [of_priors, of_parameters_and_operations, of_the_astronaut, of_overlaps,
                                     of_hard_negatives, of_average_precision, of_locality, of_ssd512])
def test_numbers_in_the_text(phrases):
    for phrase in phrases():
        assert phrase in words


# ------------------------------------------------------------------------------------------- The code that is explained

def function(text, name):
    """The syntax tree of a function in Python code, without its docstring (comments are not in it)."""
    [node] = [node for node in ast.parse(text).body if getattr(node, 'name', None) == name]
    if ast.get_docstring(node) is not None:
        del node.body[0]
    return node


def test_matching_is_the_function_that_runs():
    [block], _ = section('Multibox loss')
    assert ast.dump(function(block, 'match')) == ast.dump(function(read('model.py'), 'match'))


def test_training_loop_is_the_one_that_runs():
    """Its statements, all but the print, are those of train.py, in the same order."""
    loop = ast.parse(section('Training')[0][0]).body[-1]
    code_loop = function(read('train.py'), 'train').body[-1]
    assert ast.unparse(loop.target) in ast.unparse(code_loop.target) and loop.iter.id in ast.unparse(code_loop.iter)
    *statements, last = map(ast.unparse, loop.body)
    assert len(statements) == 5 and last.startswith('print(')
    in_order = sorted((node for node in ast.walk(code_loop) if isinstance(node, ast.stmt)), key=lambda n: n.lineno)
    code_statements = iter(map(ast.unparse, in_order))
    assert all(statement in code_statements for statement in statements)  # `in` goes on where it stopped


def test_training_loop_learns(folder, tmp_path, monkeypatch, capsys):
    """With SGD at the paper's rate, the mean of the last five losses stayed above 20; with AdamW, it is about 10."""
    monkeypatch.chdir(tmp_path)
    os.symlink(folder, 'demo')
    run_block('Training')
    losses = [float(line.split()[1].rstrip(':')) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[0] > 20 and sum(losses[-5:]) / 5 < 14


# ------------------------------------------------------------------------------------------------------- What is to run

def test_all_python_blocks_are_run_by_a_test():
    titles = ['Webcam and video', 'Your own images', 'A first training on a laptop', 'New classes for an old detector',
              "Other people's weights", 'Deployment', 'Plotting the log', "COCO's mAP",
              'Detections as data', 'COCO and YOLO']  # the last by tests/long/converters.py
    blocks = [*(block for title in ('Multibox loss', 'Training', 'Inference', 'Your own images')
                for block in section(title)[0]),
              *(block for title in titles for block in section(title, 'GUIDE.md')[0])]
    assert len(blocks) == everything.count('```python\n')
    for name, *settings in [block.splitlines() for block in blocks if block.startswith('# ')]:
        assert all(f'\n{setting.split()[0]} = ' in read(name[2:]) for setting in settings), settings
    assert set(re.findall(r'```(\w+)', everything)) == {'python', 'pycon', 'math'}


def set_parameters(folder, block):
    """Edit a script as a block of a page says: its first line names the file, the others are parameters."""
    name, *settings = block.splitlines()
    script = folder / name.removeprefix('# ')
    text = script.read_text()
    for setting in [*settings, 'workers = 1']:
        text, n = re.subn(rf'^{setting.split()[0]} = .*$', setting, text, flags=re.M)
        assert n == 1 or setting.startswith('workers'), setting
    script.write_text(text)


def copy_scripts(folder):
    """Copy the project's scripts into a folder."""
    for path in Path(root).glob('*.py'):
        shutil.copy(path, folder)


def save_detector(path, labels):
    """Save a checkpoint of random weights."""
    save_checkpoint(str(path), 0, SSD300(len(labels) + 1, thin=16), None, make_label_map(labels), 0)


def test_detection_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir('demo')
    Image.new('RGB', (120, 80)).save('photo.jpg')
    save_detector('demo/checkpoint_ssd300.pth', shapes)
    run_block('Inference')
    assert Image.open('annotated.png').size == (120, 80)


def test_video(tmp_path, monkeypatch):
    """With stand-ins for OpenCV's VideoCapture, of three blue images, and VideoWriter."""
    cv2, blue = MagicMock(), np.full((80, 120, 3), (255, 0, 0), dtype=np.uint8)
    cv2.VideoCapture().read.side_effect = [(True, blue)] * 3 + [(False, None)]
    monkeypatch.setitem(sys.modules, 'cv2', cv2)
    monkeypatch.chdir(tmp_path)
    save_detector('checkpoint_ssd300.pth', ['cat'])
    run_block('Webcam and video', 'GUIDE.md')
    images = [call.args[0] for call in cv2.VideoWriter().write.call_args_list]
    assert len(images) == 3 and cv2.VideoWriter().release.call_count == 1
    assert all(image.shape == (80, 120, 3) and (image[40, 60] == (255, 0, 0)).all() for image in images)


def test_the_next_command_after_the_demo(tmp_path):
    """As it stands: in the demo's folder, whose checkpoint detect.py then takes."""
    [command] = [command for command in section('Run it')[1] if command.startswith('cd ')]
    copy_scripts(tmp_path)
    draw_dataset(str(tmp_path / 'demo'), 1, 1)
    save_detector(tmp_path / 'demo' / 'checkpoint_ssd300.pth', shapes)
    result = subprocess.run(command.replace('python', sys.executable), shell=True, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0 and b'There is no' not in result.stderr, result.stderr
    assert sorted(os.listdir(tmp_path / 'demo' / 'detections')) == ['test_0000.jpg', 'trainval_0000.jpg']


@pytest.mark.parametrize('title, quick, n_detected, expected', [
    ('Your own images', 'epochs = 1\nthin = 16', 6,
     {'create_data_lists.py': r'images +5 +1\n', 'train.py': r"random: \['circle', 'square', 'triangle'\]",
      'eval.py': r'\nmAP +\d+ +\d', 'detect.py': 'objects, drawn in'}),
    ('A first training on a laptop', 'epochs = 1', 8,  # with shapes in place of cells
     {'create_data_lists.py': r'images +6 +2\n', 'overfit.py': '', 'train.py': r'\nepoch 0  mAP 0\.\d+  best 0\.\d+\n',
      'eval.py': 'mistakes.png', 'detect.py': 'objects, drawn in'}),
    ('New classes for an old detector', 'epochs = 1\nthin = 16', None, {'train.py': r"random: \['triangle'\]"})])
def test_settings_and_commands(tmp_path, monkeypatch, run_forked, title, quick, n_detected, expected):
    blocks, commands = section(title, 'GUIDE.md')
    copy_scripts(tmp_path)
    for block in [*blocks, '# train.py\n' + quick, '# overfit.py\nsteps = 1']:
        set_parameters(tmp_path, block)
    hub = tmp_path / 'hub' / 'checkpoints'  # where torchvision looks before it downloads
    hub.mkdir(parents=True)
    torch.save(ssd300_vgg16(weights=None, weights_backbone=None).state_dict(), hub / os.path.basename(coco_weights.url))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    draw_dataset(str(tmp_path / 'BCCD_Dataset' / 'BCCD'), 6, 2)
    if not commands:
        draw_and_list(tmp_path, 6, 2)
        save_detector(tmp_path / 'dogs.pth', shapes[:2])
    scripts = [command.split()[1] for command in commands]
    assert [script for script in scripts if script != '-c'] == (list(expected) if commands else [])
    for command in commands or ['python train.py']:
        code, printed = run_forked(tmp_path, command.replace('300, 0)', '6, 0)'))
        assert code == 0 and re.search(expected.get(command.split()[1], ''), printed), printed
    assert n_detected is None or len(os.listdir(tmp_path / 'detections')) == n_detected


def test_settings_for_own_images_are_those_of_the_guide():
    short, long = ([set(block.splitlines()) for block in section('Your own images', name)[0]]
                   for name in ('README.md', 'GUIDE.md'))
    assert [of_file - of_guide for of_file, of_guide in zip(short, long, strict=True)] == [
        {"voc07_path = 'your_folder'"}, set()] and all(len(of_file) > 3 for of_file in short)


def test_log_is_plotted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.start_log('checkpoint_ssd300.csv', 0)
    for loc_loss in (3, 2, 1):
        train.write_log('checkpoint_ssd300.csv', loss=3 * loc_loss, loc_loss=loc_loss, conf_loss=2 * loc_loss)
    train.write_log('checkpoint_ssd300.csv', mAP=0.5)
    run_block('Plotting the log', 'GUIDE.md')
    assert [list(line.get_ydata()) for line in plt.gca().get_lines()] == [[3, 2, 1], [6, 4, 2]]
    plt.close('all')
    assert os.path.exists('losses.png')


def test_coco_map_gets_what_evaluate_found(voc_folder, tmp_path, monkeypatch, capsys):
    """With a stand-in for torchmetrics, which gave 1 for perfect detections in these forms."""
    copy_lists(voc_folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    torchmetrics = MagicMock()
    torchmetrics.MeanAveragePrecision().compute.return_value = {'map': 0.1, 'map_50': 0.2, 'map_75': 0.3}
    monkeypatch.setitem(sys.modules, 'torchmetrics', torchmetrics)
    monkeypatch.setitem(sys.modules, 'torchmetrics.detection', torchmetrics)
    save_detector('checkpoint_ssd300.pth', shapes)
    run_block("COCO's mAP", 'GUIDE.md')
    assert 'mAP 0.100, at an overlap of 0.5 0.200, of 0.75 0.300' in capsys.readouterr().out
    detections, true_objects = torchmetrics.MeanAveragePrecision().update.call_args.args
    test_set = PascalVOCDataset('./', 'TEST', keep_difficult=True)
    for found, true, (_, boxes, labels, difficulties) in zip(detections, true_objects, test_set, strict=True):
        assert found['boxes'].shape == (len(found['scores']), 4) and found['labels'].dtype == torch.long
        assert true['boxes'].equal(boxes) and true['labels'].equal(labels)
        assert true['iscrowd'].equal(difficulties.long())


def test_other_peoples_weights():
    names = run_block("Other people's weights", 'GUIDE.md')
    assert names['locs'].shape == (1, 8732, 4) and names['scores'].shape == (1, 8732, 4)


@torch.no_grad()
def find_a_few(model, image, min_score):
    """Change random weights such that at most a few dozen scores are above `min_score`."""
    locs, scores = model(to_input(image.resize((300, 300)))[None])  # (1, 8732, 4), (1, 8732, n_classes)
    for name, layer in model.pred_convs.named_children():
        layer.weight /= (locs if name.startswith('loc') else scores).std()
    background = torch.zeros(model.n_classes)
    while ((scores / scores.std() + background).softmax(dim=2)[..., 1:] > min_score).sum() >= 60:
        background[0] += 1
    for name in feature_maps:
        getattr(model.pred_convs, f'cl_{name}').bias.view(-1, model.n_classes)[:] = background


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('thin', [1, 4])
def test_exported_networks_find_the_same(tmp_path, monkeypatch, thin):
    """Both files yield what the network does, decoded; and the examples' detections are detect.py's, also rotated."""
    monkeypatch.chdir(tmp_path)
    os.mkdir('demo')
    photograph = Image.fromarray(skimage.data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the file's rows are the image's columns
    photograph.transpose(Image.Transpose.ROTATE_90).save('photo.jpg', quality=95, exif=exif)
    labels = ['a', 'b', 'c']
    model = SSD300(n_classes=4, thin=thin).eval()
    find_a_few(model, photograph, 0.4)
    save_checkpoint('demo/checkpoint_ssd300.pth', 0, model, None, make_label_map(labels), 0)
    run_block('Deployment', 'GUIDE.md')
    session, exported = onnxruntime.InferenceSession('ssd300.onnx'), torch.export.load('ssd300.pt2').module()
    for n in (1, 3):
        images = torch.randn(n, 3, 300, 300)
        with torch.no_grad():
            locs, scores = model(images)
            expected = [cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy)), scores.softmax(dim=2)]
            torch.testing.assert_close(list(exported(images)), expected, atol=1e-4, rtol=1e-4)
        from_onnx = session.run(['boxes', 'scores'], {'image': images.numpy()})
        torch.testing.assert_close(list(map(torch.from_numpy, from_onnx)), expected, atol=1e-4, rtol=1e-4)

    found, photograph = run_block('Deployment', 'GUIDE.md', 1)['found'], open_image('photo.jpg')
    detections = detect.find_objects(photograph, 0.4, 0.45, 200, model, make_label_map(labels))
    assert run_block('Detections as data', 'GUIDE.md')['found'] == detections
    assert json.loads(Path('photo.json').read_text()) == list(map(list, detections))
    assert len(found) == len(detections) > 5 and Image.open('found.png').size == photograph.size
    for (label, score, box), (expected_label, expected_score, expected_box) in zip(found, detections):
        assert labels[label - 1] == expected_label and score == pytest.approx(expected_score, abs=1e-4)
        assert box.clip(0, 1) * (photograph.size * 2) == pytest.approx(np.array(expected_box), abs=1)  # pixels


if __name__ == '__main__':
    for page, text in pages.items():
        Path(root, page).write_text(with_line_numbers(text), encoding='utf-8')
