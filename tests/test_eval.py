"""Evaluation."""
import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from tiny import TinyDetector
from torch.utils.data import DataLoader

import create_data_lists
import detect
import eval as eval_script
import train
from datasets import PascalVOCDataset, collate_fn
from demo import shapes
from errors import UserError
from images import open_image
from utils import make_label_map

label_map = make_label_map(shapes)


class FindsEverything(TinyDetector):
    """Detects a square in the middle of each image; keeps how it was asked."""

    asked = None

    def detect_objects(self, locs, scores, *how):
        self.asked = how
        n = len(locs)
        return [torch.tensor([[.25, .25, .75, .75]])] * n, [torch.tensor([2])] * n, [torch.tensor([0.9])] * n


def test_evaluation_asks_as_pascal_voc_does(voc_folder):
    model = FindsEverything(len(label_map)).train()
    eval_script.evaluate(DataLoader(PascalVOCDataset(voc_folder, 'TEST', True), 2, collate_fn=collate_fn), model)
    assert model.asked == (0.01, 0.45, 200) and not model.training


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
    for name, value in (('data_folder', str(tmp_path)), ('workers', 0), ('checkpoint', 'c.pth'),
                        ('load_detector', lambda *_: (FindsEverything(len(label_map)), label_map))):
        monkeypatch.setattr(eval_script, name, value)
    eval_script.main()
    printed, table = capsys.readouterr().out, r'circle +0 +-\nsquare +1 +1\.000\ntriangle +0 +-\nmAP +1 +1\.000\n'
    assert re.search(table, printed)
    mistakes = r'At scores above 0\.4:\n +true positive .*\n.*\nsquare( +[01]){8}\n.*\nall +1 +0 +0 +0 +0 +0 +1 +0\n'
    assert re.search(mistakes, printed)  # one true positive, one ignored
    with Image.open(eval_script.mistakes_path) as sheet:
        assert len(sheet.getcolors(10)) == 1  # no mistake to show


def test_scripts_read_what_the_one_before_wrote():
    assert create_data_lists.output_folder == train.data_folder == eval_script.data_folder
    assert train.checkpoint_path == eval_script.checkpoint == detect.checkpoint
    assert eval_script.mistakes_min_score == detect.min_score


@pytest.mark.filterwarnings('error:.*pin_memory')
def test_eval_runs_with_its_own_parameters(voc_folder, monkeypatch, capsys):
    """In a folder with lists, and with a stand-in for the checkpoint."""
    monkeypatch.chdir(voc_folder)
    monkeypatch.setattr(eval_script, 'load_detector', lambda *_: (TinyDetector(len(label_map)), label_map))
    eval_script.main()
    assert '2 images' in capsys.readouterr().out


@pytest.mark.parametrize('name, value', [('batch_size', 0), ('workers', -1), ('mistakes_path', 'mistakes')])
def test_parameters_that_cannot_be_are_named(monkeypatch, name, value):
    monkeypatch.setattr(eval_script, name, value)
    with pytest.raises(UserError, match=f'^{name} = {value!r} in eval.py: '):
        eval_script.main()


@pytest.mark.parametrize('bfloat16', [False, True])
def test_main_evaluates_in_16_bits_only_if_its_parameter_says_so(voc_folder, monkeypatch, bfloat16):
    asked = []
    monkeypatch.setattr(eval_script, 'load_detector', lambda *_: (TinyDetector(len(label_map)), label_map))
    monkeypatch.setattr(eval_script, 'evaluate', lambda *_, **options: asked.append(options))
    for name, value in {'data_folder': voc_folder, 'workers': 0, 'bfloat16': bfloat16}.items():
        monkeypatch.setattr(eval_script, name, value)
    eval_script.main()
    assert asked == [{'bfloat16': bfloat16, 'mistakes_path': eval_script.mistakes_path,
                      'mistakes_min_score': eval_script.mistakes_min_score}]


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs Linux, to know how many files are open')
def test_an_evaluation_keeps_no_files_open(voc_folder, capsys):
    """A worker sends tensors as files in shared memory, which are open as long as a tensor lives."""
    import resource  # Windows has none
    dataset = PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    loader = DataLoader(dataset, 20, sampler=[0, 1] * 50, collate_fn=collate_fn, num_workers=1, timeout=20)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 60, limits[1]))
    try:
        eval_script.evaluate(loader, TinyDetector(len(label_map)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert '100 images, ' in capsys.readouterr().out


def test_the_first_process_shows_how_far_an_evaluation_is(voc_folder, capsys):
    dataset = PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), TinyDetector(len(label_map)))
    printed = capsys.readouterr()
    assert re.search(r'Evaluating: +100%.* 2/2 ', printed.err) and 'mAP' in printed.out


def test_only_the_first_process_prints_an_evaluation(voc_folder, monkeypatch, capsys):
    model, dataset = TinyDetector(len(label_map)), PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    monkeypatch.setattr(eval_script, 'get_rank', lambda: 1)
    eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), model)
    assert capsys.readouterr() == ('', '')


@pytest.fixture
def images(voc_folder, tmp_path):
    """Lists whose test images have many modes and shapes; the folder."""
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    noise, paths = Image.effect_noise((500, 500), 100), []
    for i, size in enumerate([(500, 375), (300, 300), (1, 1), (37, 451), (299, 7)]):
        for mode in ('L', 'RGB', 'P', 'RGBA', 'CMYK', 'I;16'):
            paths.append(str(tmp_path / f'{i} {mode[0]}{len(mode)}.{"tif" if mode == "CMYK" else "png"}'))
            image = noise.crop((i, 2 * i, i + size[0], 2 * i + size[1]))
            if mode == 'RGB':
                image = Image.merge('RGB', [image, image.rotate(90).resize(size), image.rotate(180)])
            image.convert(mode).save(paths[-1])
    lists = {'TEST_images.json': paths,
             'TEST_objects.json': [{'boxes': [[0, 0, 1, 1]], 'labels': [1], 'difficulties': [0]}] * len(paths)}
    for name, values in lists.items():
        (tmp_path / name).write_text(json.dumps(values))
    return str(tmp_path)


def test_eval_and_detect_find_the_same(images, monkeypatch):
    """The same input to the last bit, the same precision, the same detections."""
    inputs, settings, found = [], [], []

    class Model(TinyDetector):
        def forward(self, image):
            inputs.append(image.clone())
            settings.append((torch.backends.cudnn.enabled, torch.is_autocast_enabled('cpu'),
                             torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
            return super().forward(image)

    monkeypatch.setattr(eval_script, 'calculate_mAP', lambda *lists: (found.extend(lists[:3]), ({}, 0.))[1])
    before = [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]
    model, dataset = Model(len(label_map)), PascalVOCDataset(images, 'TEST')
    eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), model, min_score=0.5, top_k=50)
    assert len(inputs) == len(dataset) == 30
    n_found = 0
    for path, boxes, labels, scores in zip(dataset.images, *found):
        image = open_image(path)
        detections = detect.find_objects(image, 0.5, 0.45, 50, model, label_map)
        assert [label_map[label] for label, _, _ in detections] == [label for label in labels.tolist() if label > 0]
        assert [score for _, score, _ in detections] == scores[labels > 0].tolist()
        pixels = (boxes[labels > 0].clamp(0, 1) * torch.tensor([image.width, image.height] * 2)).round().tolist()
        assert [box for _, _, box in detections] == pixels
        n_found += len(detections)
    assert n_found > 100
    assert all(map(torch.equal, inputs[:30], inputs[30:]))
    assert set(settings) == {(True, False, False, False)}
    assert [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark] == before


def test_an_evaluation_in_16_bits_is_asked_for(voc_folder, monkeypatch):
    for script_says, bits in ((False, torch.float32), (True, torch.bfloat16)):
        dtypes = set()

        class Model(TinyDetector):
            def forward(self, image):
                dtypes.add(self.head(image[:, :, 0, 0]).dtype)
                return super().forward(image)

        loader = DataLoader(PascalVOCDataset(voc_folder, 'TEST', True), collate_fn=collate_fn)
        eval_script.evaluate(loader, Model(len(label_map)), bfloat16=script_says)
        assert dtypes == {bits}
    assert eval_script.bfloat16 is False
