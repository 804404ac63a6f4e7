"""
What README.md, GUIDE.md and EXERCISES.md show runs as it stands there, and what they say of the code is true.

    python tests/test_readme.py

brings the line numbers in their links into the code up to date.
"""
import ast
import csv
import doctest
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from conftest import draw_and_list, random_boxes, root
from PIL import Image
from torchvision.models.detection import ssd300_vgg16

import detect
import model as code
import train
from checkpoints import save_checkpoint
from datasets import transform
from demo import draw_dataset, shapes
from images import open_image
from model import SSD300, MultiBoxLoss
from torchvision_weights import coco_weights
from utils import create_prior_boxes, cxcy_to_xy, feature_maps, find_jaccard_overlap, gcxgcy_to_cxcy, make_label_map

sys.path.insert(0, os.path.join(root, 'img'))
import draw_figures  # noqa: E402
import examples  # noqa: E402


def read(name):
    with open(os.path.join(root, name), encoding='utf-8') as file:
        return file.read()


def without_code(text):
    """All but the blocks of code."""
    return re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)


def headings(name):
    return re.findall(r'^#+ (.*)$', without_code(pages[name]), re.M)


pages = {name: read(name) for name in ('README.md', 'GUIDE.md', 'EXERCISES.md')}
everything = '\n'.join(pages.values())
words = ' '.join(everything.split())  # without line breaks
prose = without_code(everything)


def section(title, name='README.md'):
    """The text of a section of a page, its Python blocks, and its commands."""
    text = pages[name].split(f'\n## {title}\n')[1].split('\n## ')[0]
    return (text, re.findall(r'```python\n(.*?)```', text, re.S),
            re.findall(r'^    ((?:python|torchrun) .*)$', text, re.M))


# ----------------------------------------------------------------------------------------------- Names, links, images

def definitions(file_name):
    """Line numbers of the functions, classes, methods (as Class.method) and constants that a file defines."""
    with open(os.path.join(root, file_name), encoding='utf-8') as file:
        nodes = ast.parse(file.read()).body
    lines = {}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            for method in getattr(node, 'body', []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef):
                    lines[f'{node.name}.{method.name}'] = method.lineno
        elif isinstance(node, ast.Assign):
            lines.update({name.id: node.lineno for target in node.targets for name in ast.walk(target)
                          if isinstance(name, ast.Name)})
    return lines


def with_line_numbers(text):
    """A page with links such as [`decimate`](utils.py) leading to the line of the definition."""
    def link(match):
        name, file_name = match.groups()
        return f'[`{name}`]({file_name}#L{definitions(file_name)[name]})'
    return re.sub(r'\[`([\w.]+)`\]\((\w+\.py)(?:#L\d+)?\)', link, text)


def test_links_into_the_code_lead_to_the_definitions():
    """Or near them: lines move with each change, and need not be brought up to date each time."""
    links = re.findall(r'\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)', everything)
    assert len(links) > 20
    far = [f'{name}: {file_name}#L{line}' for name, file_name, line in links
           if abs(definitions(file_name)[name] - int(line)) > 15]
    assert not far, f'{far} lead elsewhere: run "python tests/test_readme.py", which puts the line numbers right'
    with_numbers = re.sub(r'(\.py)#L\d+', r'\1', with_line_numbers(everything))
    assert with_numbers == re.sub(r'(\.py)#L\d+', r'\1', everything)  # none but numbers are changed


def test_numbers_of_lines():
    for name, text in ('model.py', r'about (\d+) lines'), ('utils.py', r'about (\d+), has'):
        with open(os.path.join(root, name), encoding='utf-8') as file:
            assert int(re.search(text, words)[1]) == pytest.approx(len(file.readlines()), abs=10), name


def test_links_lead_to_sections_and_files():
    anchors = {name: {re.sub(r'[^\w\- ]', '', heading).lower().replace(' ', '-') for heading in headings(name)}
               for name in pages}
    for name in pages:
        assert len(anchors[name]) == len(headings(name)), name
    links = [(name, *target.partition('#')[::2]) for name, text in pages.items()
             for target in re.findall(r'\]\(([^)\s]+)\)', text) if not target.startswith('http')]
    assert len(links) > 100
    for name, target, anchor in links:
        assert os.path.exists(os.path.join(root, target or name)), f'{name}: {target}'
        if anchor and (target or name) in pages:
            assert anchor in anchors[target or name], f'{name}: {target}#{anchor}'
    others = [(name, target) for name, target, _ in links if name != target and target in pages]
    assert {('README.md', 'GUIDE.md'), ('README.md', 'EXERCISES.md'),
            ('GUIDE.md', 'README.md'), ('EXERCISES.md', 'README.md')} <= set(others)


def test_sections_that_the_code_names_exist():
    titles = {title for name in pages for title in headings(name)}
    for name, least in (('model.py', 8), ('utils.py', 5), ('datasets.py', 3)):
        text = ' '.join(read(name).split())
        named = [title for some in re.findall(r'See ("[^.]*")\.', text) for title in re.findall(r'"([^"]+)"', some)]
        assert len(named) >= least, name
        assert set(named) <= titles, name


def test_images_drawn_and_kept_and_shown_are_the_same():
    shown = re.findall(r'!\[[^\]]+\]\(img/([^)]+)\)', everything)
    kept = [name for name in os.listdir(os.path.join(root, 'img')) if name.endswith(('.png', '.svg', '.gif', '.jpg'))]
    assert len(kept) >= 25
    assert sorted(shown) == sorted(kept) == sorted(draw_figures.figures)
    assert sum(os.path.getsize(os.path.join(root, 'img', name)) for name in kept) < 8 * 2**20


def names_in_the_code():
    """What the scripts define or use: names, and words in quotes; and the files and folders that there are."""
    names = {'checkpoint_ssd300.csv', 'demo/detections.png', 'ImageSets/Main/trainval.txt', 'test.txt',  # put together
             'ssd300_vgg16', 'compile', 'benchmark', 'OMP_NUM_THREADS', 'pip'}  # others' names
    for folder in ('', 'img', 'tests', 'tests/long'):
        names.update(os.path.join(folder, name).replace(os.sep, '/') for name in os.listdir(os.path.join(root, folder)))
    for name in os.listdir(root):
        if name.endswith('.py'):
            with open(os.path.join(root, name), 'rb') as file:
                tokens = list(tokenize.tokenize(file.readline))
            names.update(token.string for token in tokens if token.type == tokenize.NAME)
            names.update(token.string.strip('"\'rb') for token in tokens if token.type == tokenize.STRING)
    return names


def test_no_number_is_left_open():
    assert not re.search(r'@[A-Z]{3,}', everything)


def test_names_in_the_text_exist():
    names, spans = names_in_the_code(), set(re.findall(r'`([A-Za-z_][\w./]*)(?:\(\))?`', prose))
    assert len(spans) > 60
    unknown = [span for span in spans if span not in names and not set(span.split('.')) <= names]
    assert not unknown
    for owner, attribute in re.findall(r'`(SSD300|MultiBoxLoss|VGGBase)\.(\w+)`', prose):
        assert hasattr(getattr(code, owner), attribute), f'{owner}.{attribute}'


# -------------------------------------------------------------------------------------------------------------- Numbers

def test_interactive_examples_give_what_is_shown():
    blocks = re.findall(r'```pycon\n(.*?)```', everything, re.S)
    assert len(blocks) >= 10
    names, runner = {}, doctest.DocTestRunner()
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, names, 'README.md', None, 0)
        assert len(test.examples) > 0
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    torch.set_printoptions(profile='default')
    assert runner.failures == 0
    shared = [name for name in vars(examples) if isinstance(names.get(name), torch.Tensor)]
    assert len(shared) >= 8, shared
    for name in shared:  # the images show the same examples
        assert names[name].equal(getattr(examples, name)), name


def rows_of_table(header):
    """The cells of a table, row by row, without its header."""
    lines = everything[everything.index(header):].split('\n\n')[0].splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_table_of_priors():
    rows = rows_of_table('| map | tiles |')
    assert [row[0] for row in rows[:-1]] == list(feature_maps)
    for (_, tiles, scale, ratios, n_priors, total), of_map in zip(rows, feature_maps.values()):
        listed = ratios.replace('extra 1, ', '').split(', ')
        assert [eval(ratio) for ratio in listed] == list(of_map.ratios)
        assert tiles == f'{of_map.size}x{of_map.size}' and float(scale) == of_map.scale
        assert int(n_priors) == len(of_map.ratios) + 1 and int(total) == of_map.size ** 2 * int(n_priors)
    assert rows[-1][-1] == f'**{len(create_prior_boxes())}**'


def test_numbers_of_priors_in_the_text():
    of_map = feature_maps['conv8_2']
    assert f'{of_map.scale} · 1.732 = {of_map.scale * math.sqrt(3):.3f}' in words
    assert f'{of_map.scale} / 1.732 = {of_map.scale / math.sqrt(3):.3f}' in words
    changed = sum(size ** 2 * sum(scale * max(ratio, 1 / ratio) ** 0.5 > 1 for ratio in ratios)
                  for _, size, scale, ratios in feature_maps.values())  # the extra prior's scale never exceeds 1
    assert (create_prior_boxes()[:, 2:] == 1).any(dim=1).sum() == changed + 1  # and the last extra prior, of scale 1
    assert f'which changes {changed} of the {len(create_prior_boxes())}' in words
    wide = feature_maps['conv10_2'].scale * math.sqrt(2)
    assert f'would be {wide:.3f} wide' in words
    assert f'5 ln 2 = {5 * math.log(2):.2f}' in words


def test_numbers_of_parameters():
    fc6, fc7 = torch.nn.Linear(512 * 7 * 7, 4096, device='meta'), torch.nn.Linear(4096, 4096, device='meta')
    assert f'fc6 alone has {sum(p.numel() for p in fc6.parameters()):,} parameters' in words
    base = SSD300(n_classes=21).base
    conv6, conv7 = (sum(p.numel() for p in layer.parameters()) for layer in (base.conv6, base.conv7))
    assert f'has {conv6:,} and {conv7:,} parameters' in words
    assert fc7.in_features == 4096 == 4 * base.conv7.in_channels


def test_table_of_receptive_fields():
    rows, fields, first = rows_of_table('| map | a tile has seen |'), examples.receptive_fields(), 0
    assert [row[0] for row in rows] == list(feature_maps)
    for name, tile, kernel, largest in rows:
        assert (tile, kernel) == tuple(f'{field} pixels' for field in fields[name])
        n = feature_maps[name].size ** 2 * (len(feature_maps[name].ratios) + 1)
        sizes = (300 * create_prior_boxes()[first:first + n, 2:]).round().int()
        assert largest in {f'{w}x{h}' for w, h in sizes.tolist()} and sizes.max() == int(largest.split('x')[0])
        first += n


def test_receptive_fields_are_where_gradients_come_from():
    network = SSD300(n_classes=2, thin=16).double()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1 / parameter[0].numel())  # nothing cancels, nothing is cut off by ReLU
    image = torch.ones(1, 3, 300, 300, dtype=torch.float64, requires_grad=True)
    network.base.pool1 = torch.nn.AvgPool2d(2, 2)  # a maximum would pass the gradient on to one pixel only
    network.base.pool2, network.base.pool3 = torch.nn.AvgPool2d(2, 2), torch.nn.AvgPool2d(2, 2, ceil_mode=True)
    conv4_3_feats, _ = network.base(image)
    conv4_3_feats[0, :, 19, 19].sum().backward()
    seen = image.grad[0, 0].abs().sum(dim=0).nonzero()
    assert seen.max() - seen.min() + 1 == examples.receptive_fields()['conv4_3'][0]


def test_numbers_of_average_precision_in_the_text():
    n_found = examples.true_positives.cumsum(0)
    precisions = n_found / torch.arange(1, len(examples.true_positives) + 1)
    best = [max(precisions[10 * n_found >= tenth * examples.n_objects].tolist(), default=0) for tenth in range(11)]
    assert best == pytest.approx([1] * 5 + [0.75] * 2 + [0.571] * 2 + [0] * 2, abs=0.0005)
    assert 'it is 1 at the first five (up to 0.4), 0.75 at the next two, 0.571 at 0.7 and 0.8, and 0 at the' in words
    assert f'(5 · 1 + 2 · 0.75 + 2 · 0.571 + 2 · 0) / 11 = {sum(best) / 11:.3f}' in words
    assert 'eight detections of a class with five objects' in words and len(precisions) == 8 and n_found[-1] == 4


def test_overlaps_of_the_matching_in_the_text():
    cat, dog, ball = find_jaccard_overlap(examples.matching_boxes, cxcy_to_xy(examples.matching_priors)).tolist()
    assert f'no prior overlaps it by more than {max(ball):.2f}' in words and ball.index(max(ball)) == 4 - 1
    assert f'overlaps prior 2 by {dog[1]:.2f}' in words and cat[1] > dog[1] == max(dog)
    assert f'the dog prior 3 at best, and {dog[2]:.2f} is not' in words and sorted(dog)[-2] == dog[2]
    assert f'the cat takes prior 2 ({cat[1]:.2f})' in words


def test_table_of_overlaps():
    overlap = find_jaccard_overlap(examples.nms_boxes, examples.nms_boxes)
    scores = [f'{score:.2f}' for score in examples.nms_scores]
    for label, score, *overlaps, _ in rows_of_table('| | score |'):
        i = scores.index(score)
        assert label == examples.nms_labels[i]
        for best, cell in zip(('0.95', '0.85'), overlaps):
            assert cell in ('', f'{overlap[i, scores.index(best)]:.2f}')


def test_table_of_parameters_of_training():
    for names, values, _ in rows_of_table('| parameter | is |'):
        for name, value in zip(re.findall(r'`(\w+)`', names), [values] if '_at' in names else values.split(', ')):
            assert eval(value) == getattr(train, name), name


def test_line_of_the_log_is_one_of_the_run_that_is_drawn():
    line = re.search(r'^    epoch (\d+)  batch (\d+)/\d+  loss ([\d.]+) \(loc ([\d.]+), conf ([\d.]+)\)', everything,
                     re.M)
    with open(os.path.join(root, 'img', 'learning.csv'), newline='') as file:
        rows = [list(row.values())[:5] for row in csv.DictReader(file)]
    assert [float(value) for value in line.groups()] in [[round(float(value), 4) for value in row] for row in rows]


def read_rows(name):
    """The rows of one of the tables that figures leave behind: dicts of column -> text."""
    with open(os.path.join(root, 'img', name), newline='') as file:
        return list(csv.DictReader(file))


def test_numbers_of_hard_negatives_are_those_of_the_image():
    before, after = ({name: float(value) for name, value in row.items() if name != 'training'}
                     for row in read_rows('hard_negatives.csv'))
    for row in before, after:
        assert row['hard_negatives'] == 3 * row['positives']
        assert sum(row[name] for name in ('positives', 'hard_negatives', 'ignored')) == len(create_prior_boxes())
        row['negative_loss'] = row['hard_loss'] + row['ignored_loss']
    n_negatives = len(create_prior_boxes()) - before['positives']
    assert f"has {before['positives']:.0f} positive priors, and {n_negatives:.0f} negative ones" in words
    assert f"total loss was {before['negative_loss'] / before['positive_loss']:.0f} times the positives'" in words
    share = before['hard_negatives'] / n_negatives
    assert f"the {before['hard_negatives']:.0f} worst, {share:.0%} of all; the other {before['ignored']:.0f} " in words
    assert f"the {share:.0%} that the cut keeps have {before['hard_loss'] / before['negative_loss']:.0%} of" in words
    assert f"After training they have {after['hard_loss'] / after['negative_loss']:.0%}" in words
    assert f'4 ln *n*, {4 * math.log(21):.1f} with' in words


def test_numbers_of_locality_are_those_of_the_image():
    shares = [(row['map'], f"{float(row['prior_area']):.0%}", f"{float(row['in_prior']):.0%}")
              for row in read_rows('locality.csv')]
    (_, first_area, first_share), *others = shares
    text = f'covers {first_area} of the image and gets {first_share} of the weight'
    text += ''.join(f'; on {name}, {area} and {share}' for name, area, share in others)
    assert f'On {shares[0][0]}, the prior {text}.' in words


def test_ssd512_as_described():
    """With the changes that the guide names, the maps have the sizes that it names, and as many priors."""
    model = SSD300(n_classes=2, thin=16)
    assert 'conv10_2 and conv11_2 need stride 2 and padding 1' in words
    for name in ('conv10_2', 'conv11_2'):
        layer = getattr(model.aux_convs, name)
        layer.stride, layer.padding = (2, 2), (1, 1)
    n = model.aux_convs.conv11_2.out_channels
    seventh = torch.nn.Sequential(torch.nn.Conv2d(n, n // 2, 1), torch.nn.Conv2d(n // 2, n, 3, stride=2, padding=1))
    with torch.no_grad():
        conv4_3_feats, conv7_feats = model.base(torch.zeros(1, 3, 512, 512))
        maps = [conv4_3_feats, conv7_feats, *model.aux_convs(conv7_feats)]
        maps.append(seventh(maps[-1]))
    sizes, n_priors = [feats.size(3) for feats in maps], (4, 6, 6, 6, 6, 4, 4)
    assert 'have {}, {}, {}, {}, {}, {} and {} tiles a side'.format(*sizes) in words
    assert 'with {}, {}, {}, {}, {}, {} and {} priors each'.format(*n_priors) in words
    assert f'each: {sum(n * size ** 2 for n, size in zip(n_priors, sizes)):,}.' in words


# ------------------------------------------------------------------------------------------------------- What is to run

def test_all_python_blocks_are_run_by_a_test_below():
    tested = {'README.md': ('Multibox loss', 'Training', 'Inference', 'Your own images'),
              'GUIDE.md': ('Webcam and video', 'Your own images', 'COCO and YOLO', 'A first training on a laptop',
                           "Other people's weights", 'Deployment'),  # COCO: tests/long/converters.py
              'EXERCISES.md': ()}
    for name, text in pages.items():
        assert text.count('```python\n') == sum(len(section(title, name)[1]) for title in tested[name]), name
    assert set(re.findall(r'```(\w+)', everything)) == {'python', 'pycon', 'math'}


def set_parameters(folder, block):
    """Edit a script as a block of a page says: its first line names the file, the others are parameters."""
    name, *settings = block.splitlines()
    script = folder / name.removeprefix('# ')
    text = script.read_text()
    for setting in [*settings, 'workers = 1']:
        setting = setting.replace('epochs = 30', 'epochs = 1')  # enough to see that it runs
        text, n = re.subn(rf'^{setting.split()[0]} = .*$', setting, text, flags=re.M)
        assert n == 1 or setting.startswith('workers'), setting
    script.write_text(text)


def copy_scripts(folder):
    """Copy the project's scripts into a folder."""
    for name in os.listdir(root):
        if name.endswith('.py'):
            shutil.copy(os.path.join(root, name), folder)


def function(text, name):
    """The syntax tree of a function in Python code, without its docstring (comments are not in it)."""
    [node] = [node for node in ast.parse(text).body if getattr(node, 'name', None) == name]
    if ast.get_docstring(node) is not None:
        del node.body[0]
    return node


def test_matching_is_the_function_that_runs():
    (block,) = section('Multibox loss')[1]
    assert ast.dump(function(block, 'match')) == ast.dump(function(read('model.py'), 'match'))


def test_training_loop_is_the_one_that_runs():
    """Its statements, all but the print, are those of train.py, in the same order."""
    loop = ast.parse(section('Training')[1][0]).body[-1]
    code_loop = function(read('train.py'), 'train').body[-1]
    assert ast.unparse(loop.target) in ast.unparse(code_loop.target) and loop.iter.id in ast.unparse(code_loop.iter)
    *statements, last = map(ast.unparse, loop.body)
    assert len(statements) == 5 and last.startswith('print(')
    in_order = sorted((node for node in ast.walk(code_loop) if isinstance(node, ast.stmt)), key=lambda n: n.lineno)
    code_statements = iter(map(ast.unparse, in_order))
    assert all(statement in code_statements for statement in statements)  # `in` goes on where it stopped


def test_the_plain_loop_learns(tmp_path, monkeypatch, capsys):
    block, _ = section('Training')[1]
    monkeypatch.chdir(tmp_path)
    draw_and_list(tmp_path / 'demo', 12, 1)
    capsys.readouterr()
    exec(block, {})
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6 and sum(losses[3:]) < sum(losses[:3])


def test_going_on_is_set_at_the_top_of_the_script(tmp_path):
    _, block = section('Training')[1]
    shutil.copy(os.path.join(root, 'train.py'), tmp_path)
    set_parameters(tmp_path, block)
    assert f'\n{block.splitlines()[1]}\n' in (tmp_path / 'train.py').read_text()


def test_detection_from_python(tmp_path, monkeypatch):
    (block,) = section('Inference')[1]
    monkeypatch.chdir(tmp_path)
    os.mkdir('demo')
    Image.new('RGB', (120, 80)).save('photo.jpg')
    model = SSD300(n_classes=3, thin=4)
    save_checkpoint('demo/checkpoint_ssd300.pth', 0, model, torch.optim.SGD(model.parameters(), lr=1),
                    make_label_map(['cat', 'person']), 0)
    exec(block, {})
    with Image.open('annotated.png') as annotated:
        assert annotated.size == (120, 80)


class FakeVideo:
    """OpenCV's VideoCapture of three images, and VideoWriter, which keeps what is written."""
    CAP_PROP_FRAME_WIDTH, CAP_PROP_FRAME_HEIGHT, CAP_PROP_FPS = 120, 80, 25
    written = []

    def __init__(self, *arguments):
        self.left = 3

    def get(self, property):
        return property

    def read(self):
        self.left -= 1
        return self.left >= 0, np.full((80, 120, 3), (255, 0, 0), dtype=np.uint8)  # blue

    def write(self, image):
        self.written.append(image)

    def release(self):
        self.written.append('released')

    @staticmethod
    def VideoWriter_fourcc(*letters):
        return ''.join(letters)


FakeVideo.VideoCapture = FakeVideo.VideoWriter = FakeVideo


def test_video(tmp_path, monkeypatch):
    (block,) = section('Webcam and video', 'GUIDE.md')[1]
    monkeypatch.setitem(sys.modules, 'cv2', FakeVideo)
    monkeypatch.chdir(tmp_path)
    save_checkpoint('checkpoint_ssd300.pth', 0, SSD300(n_classes=2, thin=16), None, make_label_map(['cat']), 0)
    exec(block, {})
    *images, last = FakeVideo.written
    assert len(images) == 3 and last == 'released'
    assert all(image.shape == (80, 120, 3) and (image[40, 60] == (255, 0, 0)).all() for image in images)


def test_the_next_command_after_the_demo(tmp_path):
    """As it stands: in the demo's folder, whose checkpoint detect.py then takes."""
    [command] = re.findall('^    (cd demo .*)$', section('Run it')[0], re.M)
    copy_scripts(tmp_path)
    draw_dataset(str(tmp_path / 'demo'), 1, 1)
    model = SSD300(n_classes=4, thin=16)
    save_checkpoint(str(tmp_path / 'demo' / 'checkpoint_ssd300.pth'), 0, model,
                    torch.optim.SGD(model.parameters(), lr=1), make_label_map(shapes), 0)
    result = subprocess.run(command.replace('python', sys.executable), shell=True, cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0 and 'There is no' not in result.stderr, result.stderr
    assert sorted(os.listdir(tmp_path / 'demo' / 'detections')) == ['test_0000.jpg', 'trainval_0000.jpg']


def test_own_images_from_a_folder_to_a_detector(tmp_path, monkeypatch, run_forked):
    _, blocks, commands = section('Your own images', 'GUIDE.md')
    of_readme = [block.replace('my_images', 'shapes') for block in section('Your own images')[1]]
    assert of_readme == blocks  # the README's settings are the same
    copy_scripts(tmp_path)
    for block in blocks:
        set_parameters(tmp_path, block)
    set_parameters(tmp_path, '# train.py\nthin = 16')  # to be quick

    hub = tmp_path / 'hub' / 'checkpoints'  # where torchvision looks before it downloads
    hub.mkdir(parents=True)
    torch.save(ssd300_vgg16(weights=None, weights_backbone=None).state_dict(), hub / os.path.basename(coco_weights.url))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert [shlex.split(command)[1] for command in commands[2:]] == ['create_data_lists.py', 'train.py', 'eval.py',
                                                                     'detect.py']
    for command in commands:
        code, printed = run_forked(tmp_path, command.replace('300, 0)', '6, 0)'))
        assert code == 0, printed
        if 'create_data_lists.py' in command:
            assert re.search(r'images +5 +1\n', printed)
        if 'train.py' in command:
            assert "['circle', 'square', 'triangle'] are random" in printed
        if 'eval.py' in command:
            assert re.search(r'^mAP +\d+ +\d', printed, re.M)
    assert len(os.listdir(tmp_path / 'detections')) == 6


def test_a_first_training(tmp_path, run_forked):
    """With shapes in place of cells, one epoch, and one step to overfit."""
    _, blocks, commands = section('A first training on a laptop', 'GUIDE.md')
    copy_scripts(tmp_path)
    for block in blocks:
        set_parameters(tmp_path, block.replace('epochs = 16', 'epochs = 1'))
    set_parameters(tmp_path, '# overfit.py\nsteps = 1')
    draw_dataset(str(tmp_path / 'BCCD_Dataset' / 'BCCD'), 6, 2)
    for command in commands:
        code, printed = run_forked(tmp_path, command)
        assert code == 0, printed
        if 'train.py' in command:
            assert re.search(r'^epoch 0  mAP 0\.\d+  best 0\.\d+$', printed, re.M)
    left = {'checkpoint_ssd300.pth', 'checkpoint_ssd300_best.pth', 'mistakes.png', 'overfit.png'}
    assert left <= set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path / 'detections')) == 8


def test_other_peoples_weights():
    (block,) = section("Other people's weights", 'GUIDE.md')[1]
    names = {}
    exec(block, names)
    assert names['locs'].shape == (1, 8732, 4) and names['scores'].shape == (1, 8732, 4)


@torch.no_grad()
def find_a_few(model, image, min_score):
    """Change random weights such that at most a few dozen scores are above `min_score`."""
    none = torch.empty(0, 4), torch.empty(0), torch.empty(0)
    locs, scores = model(transform(image, *none, 'TEST')[0][None])  # (1, 8732, 4), (1, 8732, n_classes)
    bias = next(b for b in range(100) if (with_bias(scores / scores.std(), b)[..., 1:] > min_score).sum() < 60)
    for name, layer in model.pred_convs.named_children():
        layer.weight /= (locs if name.startswith('loc') else scores).std()
        if name.startswith('cl'):
            layer.bias.view(-1, model.n_classes)[:, 0] = bias


def with_bias(scores, bias):
    """Probabilities, if the background's score were so much higher."""
    return (scores + torch.tensor([bias, 0, 0, 0])).softmax(dim=2)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('thin', [1, 4])
def test_exported_networks_find_the_same(tmp_path, monkeypatch, thin):
    """Both files yield what the network does, decoded; and the example's detections are detect.py's, also rotated."""
    export, run = section('Deployment', 'GUIDE.md')[1]
    monkeypatch.chdir(tmp_path)
    os.mkdir('demo')
    photograph = Image.fromarray(skimage.data.chelsea())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the file's rows are the image's columns
    photograph.transpose(Image.Transpose.ROTATE_90).save('photo.jpg', quality=95, exif=exif)
    model, labels = SSD300(n_classes=4, thin=thin).eval(), make_label_map(['a', 'b', 'c'])
    find_a_few(model, photograph, 0.4)
    save_checkpoint(str(tmp_path / 'demo' / 'checkpoint_ssd300.pth'), 0, model,
                    torch.optim.SGD(model.parameters(), lr=1), labels, 0)
    exec(export, {})
    session = onnxruntime.InferenceSession(tmp_path / 'ssd300.onnx')
    exported = torch.export.load(tmp_path / 'ssd300.pt2').module()
    for n in (1, 3):
        images = torch.randn(n, 3, 300, 300)
        with torch.no_grad():
            locs, scores = model(images)
            expected = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy)), scores.softmax(dim=2)
            again = exported(images)
        for plain, onnx, export in zip(expected, session.run(['boxes', 'scores'], {'image': images.numpy()}), again):
            torch.testing.assert_close(torch.from_numpy(onnx), plain, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(export, plain, atol=1e-4, rtol=1e-4)

    names = {}
    exec(run, names)
    photograph = open_image('photo.jpg')
    detections = detect.find_objects(photograph, 0.4, 0.45, 200, model, labels)
    size = torch.tensor(photograph.size * 2)
    found = sorted(((list(labels)[label], float(score), (torch.from_numpy(box).clamp(0, 1) * size).tolist())
                    for label, score, box in names['found']), key=lambda found: -found[1])
    assert len(found) == len(detections) > 5
    for (label, score, box), (expected_label, expected_score, expected_box) in zip(found, detections):
        assert label == expected_label and score == pytest.approx(expected_score, abs=1e-4)
        assert box == pytest.approx(expected_box, abs=1)  # pixels, rounded there
    assert Image.open('found.png').size == photograph.size


if __name__ == '__main__':
    updated = {name: with_line_numbers(text) for name, text in pages.items()}
    for name, text in updated.items():
        with open(os.path.join(root, name), 'w', encoding='utf-8') as file:
            file.write(text)
