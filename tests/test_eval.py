"""Evaluation."""
import inspect
import json
import os
import re
import shutil

import matplotlib
import pytest
import torch
from conftest import copy_lists
from PIL import Image
from tiny import TinyDetector
from torch.utils.data import DataLoader

import create_data_lists
import demo
import detect
import eval as eval_script
import overfit
import train
from datasets import PascalVOCDataset, collate_fn
from demo import shapes
from errors import UserError
from images import open_image
from model import SSD300
from utils import calculate_mAP, make_label_map

label_map = make_label_map(shapes)


class FindsEverything(TinyDetector):
    """Detects a square in the middle of each image; keeps how it was asked."""

    asked = None

    def detect_objects(self, locs, scores, *how):
        self.asked = how
        n = len(locs)
        return [torch.tensor([[.25, .25, .75, .75]])] * n, [torch.tensor([2])] * n, [torch.tensor([0.75])] * n


def load(folder, **options):
    """The test images, one after the other, in batches of two."""
    return DataLoader(PascalVOCDataset(folder, 'TEST', keep_difficult=True), 2, collate_fn=collate_fn, **options)


def test_evaluation_asks_as_pascal_voc_does_and_returns_what_it_found(voc_folder):
    model, loader = FindsEverything(len(label_map)).train(), load(voc_folder)
    found = eval_script.evaluate(loader, model)
    assert model.asked == (0.01, 0.45, 200) and not model.training
    expected = list(zip(*(loader.dataset[i][1:] for i in range(2))))
    assert all(torch.equal(a, b) for lists in zip(found.objects, expected) for a, b in zip(*lists, strict=True))
    for values, of_image in zip(found.detections, ([[.25, .25, .75, .75]], [2], [0.75])):
        assert [value.tolist() for value in values] == [of_image] * 2
    assert (found.average_precisions, found.mAP) == calculate_mAP(*found.detections, *found.objects, label_map)
    assert found.seconds > 0


def test_detections_of_difficult_objects_are_no_false_positives_in_eval(voc_folder, tmp_path, monkeypatch, capsys):
    """The first image's object is difficult; were it left out, its detection would halve the precision."""
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    images = json.loads((tmp_path / 'TEST_images.json').read_text())
    objects = []
    for path, difficult in zip(images, (1, 0)):
        width, height = Image.open(path).size
        objects.append({'boxes': [[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], 'labels': [2],
                        'difficulties': [difficult]})
    (tmp_path / 'TEST_objects.json').write_text(json.dumps(objects))
    run_main(monkeypatch, FindsEverything(len(label_map)), data_folder=str(tmp_path), workers=0)
    printed, table = capsys.readouterr().out, r'circle +0 +-\nsquare +1 +1\.000\ntriangle +0 +-\nmAP +1 +1\.000\n'
    assert re.search(table, printed)
    mistakes = r'At scores above 0\.4:\n +true positive .*\n.*\nsquare( +[01]){8}\n.*\nall +1 +0 +0 +0 +0 +0 +1 +0\n'
    assert re.search(mistakes, printed)  # one true positive, one ignored
    with Image.open(eval_script.mistakes_path) as sheet:
        assert len(sheet.getcolors(10)) == 1  # no mistake to show


def test_scripts_agree():
    """Each reads what the one before wrote; what is counted, drawn and learned is the same, unless asked otherwise."""
    assert create_data_lists.output_folder == train.data_folder == eval_script.data_folder == overfit.data_folder
    assert train.checkpoint_path == eval_script.checkpoint == detect.checkpoint
    assert eval_script.mistakes_min_score == detect.min_score == overfit.min_score == demo.min_score
    for function in detect.detect, eval_script.evaluate, SSD300.detect_objects:
        defaults = inspect.signature(function).parameters
        assert [defaults[name].default for name in ('max_overlap', 'top_k')] == [detect.max_overlap, detect.top_k]


def run_main(monkeypatch, model, **parameters):
    """Run eval.py with a stand-in for the checkpoint's model."""
    parameters['load_detector'] = lambda *_: (model, label_map)
    for name, value in parameters.items():
        monkeypatch.setattr(eval_script, name, value)
    eval_script.main()


@pytest.mark.filterwarnings('error:.*pin_memory')
def test_eval_runs_with_its_own_parameters(voc_folder, monkeypatch, capsys):
    """In a folder with lists, without TF32."""
    monkeypatch.chdir(voc_folder)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    run_main(monkeypatch, TinyDetector(len(label_map)))
    assert not torch.backends.cudnn.allow_tf32
    printed = capsys.readouterr()
    assert re.search(r'\n.*\.pth: 2 images, [\d.]+/s on cpu\n', printed.out)
    assert re.search(r'Evaluating: +100%.* 1/1 ', printed.err)
    assert os.path.exists(eval_script.mistakes_path) and eval_script.bfloat16 is False


def test_only_the_first_process_prints(voc_folder, monkeypatch, capsys):
    monkeypatch.setattr(eval_script, 'get_rank', lambda: 1)
    monkeypatch.setattr(eval_script, 'get_world_size', lambda: 2)
    run_main(monkeypatch, TinyDetector(len(label_map)), data_folder=voc_folder, workers=0)
    assert capsys.readouterr() == ('', '') and not os.path.exists(eval_script.mistakes_path)


@pytest.mark.parametrize('bfloat16', [False, True])
def test_in_16_bits_only_if_its_parameter_says_so(voc_folder, monkeypatch, bfloat16):
    dtypes = set()

    class Model(TinyDetector):
        def forward(self, image):
            dtypes.add(self.head(image[:, :, 0, 0]).dtype)
            return super().forward(image)

    run_main(monkeypatch, Model(len(label_map)), data_folder=voc_folder, workers=0, bfloat16=bfloat16)
    assert dtypes == {torch.bfloat16 if bfloat16 else torch.float32}


@pytest.mark.parametrize('name, value', [
    ('mistakes_path', 'mistakes'), ('batch_size', 0), ('workers', None), ('mistakes_min_score', '0.4')])
def test_what_cannot_be_is_named_first(monkeypatch, name, value):
    with pytest.raises(UserError, match=f'^{name} = {value!r} in eval.py: (end it in .png|set it to a )'):
        run_main(monkeypatch, None, **{name: value})


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs Linux, to know how many files are open')
def test_an_evaluation_keeps_no_files_open(voc_folder):
    """A worker sends tensors as files in shared memory, which are open as long as a tensor lives."""
    import resource  # Windows has none
    dataset = PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    loader = DataLoader(dataset, 20, sampler=[0, 1] * 50, collate_fn=collate_fn, num_workers=1, timeout=20)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 60, limits[1]))
    try:
        found = eval_script.evaluate(loader, TinyDetector(len(label_map)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(len(values) == 100 for values in (*found.detections, *found.objects))


def test_eval_and_detect_find_the_same(voc_folder, tmp_path, monkeypatch):
    """In images of many modes and shapes: the same input to the last bit, the same detections."""
    copy_lists(voc_folder, tmp_path)
    original, paths, inputs = open_image(PascalVOCDataset(voc_folder, 'TEST').images[0]), [], []
    for size in [(500, 375), (300, 300), (1, 1), (37, 451), (299, 7)]:
        for mode in ('L', 'RGB', 'P', 'RGBA', 'CMYK', 'I;16'):
            paths.append(str(tmp_path / f'{size} {mode[0]}{len(mode)}.{"tif" if mode == "CMYK" else "png"}'))
            original.resize(size).convert('L' if mode == 'I;16' else mode).convert(mode).save(paths[-1])
    objects = [{'boxes': [[0, 0, 1, 1]], 'labels': [1], 'difficulties': [0]}] * len(paths)
    for name, values in ('images', paths), ('objects', objects):
        (tmp_path / f'TEST_{name}.json').write_text(json.dumps(values))

    class Model(TinyDetector):
        def forward(self, image):
            inputs.append(image.clone())
            return super().forward(image)

    model, dataset = Model(len(label_map)), PascalVOCDataset(str(tmp_path), 'TEST')
    found = eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), model, min_score=0.5, top_k=50)
    assert len(inputs) == len(dataset) == 30
    n_found = 0
    for path, boxes, labels, scores in zip(dataset.images, *found.detections):
        image = open_image(path)
        detections = detect.find_objects(image, 0.5, 0.45, 50, model, label_map)
        assert [label_map[label] for label, _, _ in detections] == [label for label in labels.tolist() if label > 0]
        assert [score for _, score, _ in detections] == scores[labels > 0].tolist()
        pixels = (boxes[labels > 0].clamp(0, 1) * torch.tensor([image.width, image.height] * 2)).round().tolist()
        assert [box for _, _, box in detections] == pixels
        n_found += len(detections)
    assert n_found > 100
    assert all(map(torch.equal, inputs[:30], inputs[30:]))


def test_the_font_of_the_sheet(voc_folder, monkeypatch, capsys):
    """It is checked before the evaluation, and draws the captions."""
    sheets, font = [], os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    for path in None, font:
        run_main(monkeypatch, FindsEverything(len(label_map)), data_folder=voc_folder, workers=0, font=path)
        sheets.append(Image.open(eval_script.mistakes_path).tobytes())
    assert len(sheets[0]) == len(sheets[1]) and sheets[0] != sheets[1]
    capsys.readouterr()
    with pytest.raises(UserError, match="^font = 'none.ttf'"):
        run_main(monkeypatch, None, data_folder=voc_folder, font='none.ttf')
