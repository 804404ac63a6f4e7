"""overfit.py: it learns a few images, and shows it."""
import json
import math
import re

import pytest
import torch
from conftest import copy_lists
from PIL import Image

import overfit
from datasets import PascalVOCDataset
from detect import draw_objects
from errors import UserError
from images import open_image
from model import SSD300
from utils import make_label_map

tile = 490, 394  # width and height in the sheet, with the caption


def learn(folder, tmp_path, n_images, steps, lr=3e-3):
    """Overfit a very thin network on the CPU; what `overfit` returns, and the sheet."""
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    path = str(tmp_path / 'overfit.png')
    return train_set, overfit.overfit(train_set, n_images, steps, 16, lr, path, torch.device('cpu')), Image.open(path)


@pytest.mark.parametrize('difficult', [0, 1])
def test_what_is_found_is_counted(voc_folder, tmp_path, monkeypatch, capsys, difficult):
    """Two of the objects, difficult or not, for all are learned; and three boxes that are none."""
    copy_lists(voc_folder, tmp_path)
    all_objects = json.loads((tmp_path / 'TRAIN_objects.json').read_text())
    for objects in all_objects:
        objects['difficulties'] = [difficult] * len(objects['labels'])
    (tmp_path / 'TRAIN_objects.json').write_text(json.dumps(all_objects))
    train_set = PascalVOCDataset(str(tmp_path), 'TRAIN', keep_difficult=True)
    train_set.split = 'TEST'
    _, boxes, labels, _ = train_set[0]
    asked = []

    def detect_objects(model, locs, scores, *settings):
        asked.append((settings, locs.requires_grad, len(locs)))
        nowhere = torch.tensor([[0, 0, 0.01, 0.01]]).repeat(4, 1)  # (4, 4)
        return ([torch.cat([boxes[:2], nowhere])], [torch.cat([labels[:2], torch.tensor([1, 2, 3, 1])])],
                [torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.3])])  # the last one's score is too low to count

    monkeypatch.setattr(SSD300, 'detect_objects', detect_objects)
    _, n_found, _ = learn(str(tmp_path), tmp_path, 1, 2)
    assert n_found == 2 and asked == [((0.4,), False, 1)] * 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  loss')[0] for line in lines[::2]] == [f'epoch {look}  batch 2/2' for look in range(4)]
    assert lines[1::2] == [f'found 2 of {len(boxes)}  false positives 3'] * 4


def test_the_sheet_shows_each_image_and_what_was_found(monkeypatch):
    """A row for each image, a column for each list; no placeholder."""
    label_map = make_label_map(['a', 'b'])
    images = [Image.new('RGB', (200, 100), 'gray'), Image.new('RGB', (1000, 500), 'navy')]
    none = torch.tensor([[0., 0, 1, 1]]), torch.tensor([0]), torch.tensor([0.])
    some = torch.tensor([[0.1, 0.222, 0.5, 1.2]]), torch.tensor([1]), torch.tensor([0.625])
    columns = [('first', *zip(none, some)), ('second', *zip(some, none))]
    sheets = []
    monkeypatch.setattr(overfit, 'save_tiles', lambda *sheet: sheets.append(sheet))
    overfit.save_sheet('s.png', images, columns, label_map)
    drawn = draw_objects(images[0], [('a', 0.625, [20, 22, 100, 100])], label_map)
    large = draw_objects(images[1], [('a', 0.625, [100, 111, 500, 500])], label_map)
    [(path, rows, *size)] = sheets
    assert (path, size) == ('s.png', [480, 360])
    assert [[caption for _, caption in row] for row in rows] == [
        ['first: 0 boxes', 'second: 1 boxes'], ['first: 1 boxes', 'second: 0 boxes']]
    expected = [[images[0], drawn], [large, images[1]]]
    assert [[image.tobytes() for image, _ in row] for row in rows] == [
        [image.tobytes() for image in row] for row in expected]


def test_the_first_column_is_the_ground_truth(voc_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(overfit, 'save_sheet', lambda *args: shown.append(args))
    Image.new('L', (1, 1)).save(tmp_path / 'overfit.png')
    train_set, *_ = learn(voc_folder, tmp_path, 9, 1)
    [(_, images, [(heading, boxes, labels, scores), *looks], label_map)] = shown
    assert [heading, *(look[0] for look in looks)] == ['ground truth', 'step 1', 'step 2', 'step 3', 'step 4']
    assert len(images) == len(train_set) == 3 and label_map == train_set.label_map  # fewer than asked for
    for i, image in enumerate(images):
        assert image.tobytes() == open_image(train_set.images[i]).tobytes()
        assert torch.equal(boxes[i], train_set[i][1]) and torch.equal(labels[i], train_set[i][2])
        assert scores[i].tolist() == [1] * len(labels[i])


def test_the_learning_rate_follows_one_cycle(voc_folder, tmp_path, monkeypatch, capsys):
    """With a rate only for the first of four steps, the loss changes once."""
    monkeypatch.setattr(overfit, 'one_cycle', lambda step, n_steps: step == 0 and n_steps == 4)
    learn(voc_folder, tmp_path, 1, 1)
    first, *others = re.findall(r'loss (\S+)', capsys.readouterr().out)
    assert len(others) == 3 and first != others[0] and len(set(others)) == 1


def test_a_loss_that_is_not_finite(voc_folder, tmp_path):
    with pytest.raises(UserError, match='became infinite or NaN in epoch 1, batch 1 '):
        learn(voc_folder, tmp_path, 1, 1, lr=math.inf)


def test_what_the_parameters_say_is_done(voc_folder, tmp_path, monkeypatch, capsys):
    """Difficult objects are learned, too."""
    monkeypatch.chdir(tmp_path)
    for name, value in {'data_folder': voc_folder, 'n_images': 2, 'steps': 1, 'thin': 16}.items():
        monkeypatch.setattr(overfit, name, value)
    torch.manual_seed(5)
    overfit.main()
    n_objects = sum(len(objects['labels']) for objects in PascalVOCDataset(voc_folder, 'TRAIN').objects[:2])
    printed = capsys.readouterr().out
    assert f' of {n_objects} ' in printed and 'Look at overfit.png' in printed and torch.initial_seed() == 0
    assert Image.open('overfit.png').size == (5 * tile[0], 2 * tile[1])


@pytest.mark.parametrize('name, value, message', [
    ('n_images', 0, 'n_images = 0 in overfit.py: .* at least 1$'), ('steps', 0, 'steps = 0 in overfit.py: .* 1$'),
    ('data_folder', 'nowhere', '.*create_data_lists.py'),
    ('sheet_path', None, 'sheet_path = None in overfit.py: end it in .png')])
def test_parameters_that_cannot_be_are_named(monkeypatch, name, value, message):
    monkeypatch.setattr(overfit, name, value)
    with pytest.raises(UserError, match=f'^{message}'):
        overfit.main()


def test_it_learns_images(voc_folder, tmp_path, capsys):
    train_set, n_found, sheet = learn(voc_folder, tmp_path, 2, 10)
    n_objects = sum(len(objects['labels']) for objects in train_set.objects[:2])
    [*_, (loss, found)] = re.findall(r'loss (\S+).*\nfound (.*)\n', capsys.readouterr().out)
    assert n_found == n_objects > 5 and float(loss) < 0.5 and found == f'{n_objects} of {n_objects}  false positives 0'
    assert sheet.size == (5 * tile[0], 2 * tile[1]) and len(sheet.getcolors(10 ** 6)) > 1000
