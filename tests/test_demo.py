"""The demo's images, and the demo itself; and that tests see no GPU."""
import csv
import random
import re
from collections import Counter
from colorsys import rgb_to_hsv

import pytest
import torch
from conftest import root
from PIL import Image

import demo
from checkpoints import load_checkpoint
from create_data_lists import parse_annotation
from demo import draw_dataset, draw_image, draw_shape, shapes
from utils import find_jaccard_overlap


def test_shapes_have_all_sizes_and_do_not_cover_each_other():
    rng, widths, names, difficult = random.Random(0), [], Counter(), 0
    for _ in range(100):
        image, objects = draw_image(rng)
        boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32)
        assert 1 <= len(objects) <= 8 and boxes.min() >= 0
        assert boxes[:, 2].max() < image.width and boxes[:, 3].max() < image.height
        overlaps = find_jaccard_overlap(boxes, boxes)
        assert torch.equal(overlaps > 0, torch.eye(len(boxes)) > 0)
        widths += (boxes[:, 2] - boxes[:, 0] + 1).tolist()
        names.update(shape for shape, _, _ in objects)
        difficult += sum(is_difficult for _, _, is_difficult in objects)
    assert min(widths) == 28 and 180 < max(widths) <= 200
    assert set(names) == set(shapes) and max(names.values()) < 1.3 * min(names.values())
    assert 0 < difficult < len(widths) / 10


@pytest.mark.parametrize('shape', shapes)
def test_boxes_are_tight_and_colors_tell_nothing(monkeypatch, shape):
    rng, hues = random.Random(0), []
    for _ in range(60):
        image, box = Image.new('RGB', (300, 300)), (40, 60, 40 + rng.randint(27, 199), 60 + rng.randint(27, 199))
        draw_shape(image, shape, box, False, rng)
        assert image.getbbox() == (box[0], box[1], box[2] + 1, box[3] + 1)
        color = image.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))
        hues.append(int(6 * rgb_to_hsv(*color)[0]))
    assert set(hues) == set(range(6))  # each class has every color


def test_the_same_seed_draws_the_same_data_set(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        draw_dataset(str(tmp_path / name), 2, 1, seed)
    contents = {name: [path.read_bytes() for path in sorted((tmp_path / name).rglob('*')) if path.is_file()]
                for name in 'abc'}
    assert len(contents['a']) == 3 * 2 + 2 and contents['a'] == contents['b'] != contents['c']
    image, objects = draw_image(random.Random(3))
    parsed = parse_annotation(tmp_path / 'a/Annotations/trainval_0000.xml', shapes, image.size)
    assert parsed['boxes'] == [list(map(float, box)) for _, box, _ in objects] and parsed['dropped'] == []
    assert parsed['labels'] == [shape for shape, _, _ in objects]
    assert parsed['difficulties'] == [int(difficult) for _, _, difficult in objects]


def test_the_whole_pipeline(tmp_path, monkeypatch, capsys):
    """With few images and a very thin network: what it prints, and leaves behind."""
    for name, value in {'folder': str(tmp_path), 'n_train': 6, 'n_test': 5, 'thin': 64, 'epochs': 2}.items():
        monkeypatch.setattr(demo, name, value)
    demo.main()
    printed = capsys.readouterr().out
    assert re.findall(r'^\d\. (\w+)', printed, re.M) == ['Drawing', 'Listing', 'Training', 'Evaluating', 'Detecting']
    [in_table], [at_end] = (re.findall(pattern, printed, re.M) for pattern in (r'^mAP +\d+ +(.*)', r'^mAP (\S+) after'))
    assert in_table == at_end and 0 <= float(at_end) <= 1
    saved = load_checkpoint(str(tmp_path / 'checkpoint_ssd300.pth'))
    assert list(saved['label_map'])[1:] == list(shapes) and (saved['thin'], saved['optimizer_kind']) == (64, 'AdamW')
    [_, *log] = csv.reader((tmp_path / 'checkpoint_ssd300.csv').open())  # of the second step and the fourth
    assert [float(row[5]) for row in log] == pytest.approx([1.5e-3 * left / 4 / 0.93 for left in (3, 1)])  # the rates
    assert Image.open(tmp_path / 'detections.png').size == (4 * 360, 3 * 324)


def test_only_test_gpu_sees_a_gpu(tmp_path, run_forked, monkeypatch):
    """On a machine that seems to have one: tests with this project's conftest.py."""
    for name, seen in (('gpu', "(True, '3')"), ('other', "(False, '')")):
        (tmp_path / f'test_{name}.py').write_text(
            'import os, torch\n\ndef test_what_is_seen():\n'
            f"    assert (torch.cuda.is_available(), os.environ['CUDA_VISIBLE_DEVICES']) == {seen}\n")
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    code, printed = run_forked(tmp_path, f"""python -c "
import sys, pytest, torch
sys.path.insert(0, '{root}/tests')
torch.cuda.is_available = lambda: True
assert pytest.main(['-p', 'conftest', '-p', 'no:cacheprovider', '-q', '.']) == 0
" """)
    assert code == 0 and '2 passed' in printed, printed
