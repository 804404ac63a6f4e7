"""overfit.py: it learns a few images, and shows it."""
import json
import math

import pytest
import torch
from conftest import copy_lists
from PIL import Image, ImageChops, ImageDraw

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
    result = overfit.overfit(train_set, n_images, steps, 16, lr, path, torch.device('cpu'))
    return train_set, result, Image.open(path)


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
    _, (_, n_found), _ = learn(str(tmp_path), tmp_path, 1, 8)
    assert n_found == 2 and asked == [((0.4, 0.45, 200), False, 1)] * 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['step 2', 'step 4', 'step 6', 'step 8']
    assert all(line.endswith(f'found 2 of {len(boxes)}  false positives 3') for line in lines)


def test_the_sheet_shows_each_image_and_what_was_found(tmp_path):
    """A row for each image, a column for each list; no placeholder."""
    label_map = make_label_map(['a', 'b'])
    images = [Image.new('RGB', (200, 100), 'gray'), Image.new('RGB', (1000, 500), 'navy')]
    none = torch.tensor([[0., 0, 1, 1]]), torch.tensor([0]), torch.tensor([0.])
    some = torch.tensor([[0.1, 0.222, 0.5, 1.2]]), torch.tensor([1]), torch.tensor([0.625])
    columns = [('first', *zip(none, some)), ('second', *zip(some, none))]
    overfit.save_sheet(str(tmp_path / 's.png'), images, columns, label_map)
    drawn = draw_objects(images[0], [('a', 0.625, [20, 22, 100, 100])], label_map)
    large = draw_objects(images[1], [('a', 0.625, [100, 111, 500, 500])], label_map)
    large.thumbnail((480, 360))
    small = images[1].copy()
    small.thumbnail((480, 360))
    with Image.open(tmp_path / 's.png') as sheet:
        assert sheet.size == (2 * tile[0], 2 * tile[1])
        for column, (heading, *of_column) in enumerate([('first', images[0], large), ('second', drawn, small)]):
            for row, expected in enumerate(of_column):
                x, y = column * tile[0], row * tile[1]
                assert sheet.crop((x, y, x + expected.width, y + expected.height)).tobytes() == expected.tobytes()
                around = sheet.crop((x, y, x + tile[0], y + tile[1]))
                around.paste('white', (0, 0, expected.width, expected.height))
                caption = Image.new('RGB', tile, 'white')
                ImageDraw.Draw(caption).text((2, 362), f'{heading}: {int(row != column)} boxes', 'black', font_size=24)
                assert around.tobytes() == caption.tobytes()
                left, top, right, bottom = ImageChops.invert(caption).getbbox()
                assert left <= 9 and 360 < top and bottom < 394 and 100 < right < 480  # nothing is cut off


def test_what_it_trains_and_the_first_column_is_the_ground_truth(voc_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(overfit, 'save_sheet', lambda path, images, columns, label_map: shown.append(
        (images, columns, label_map)) or Image.new('RGB', (1, 1)).save(path))
    plain, told = overfit.make_optimizer, []
    monkeypatch.setattr(overfit, 'make_optimizer', lambda model, *args, **options: told.append(
        (args, options)) or plain(model, *args, **options))
    train_set, *_ = learn(voc_folder, tmp_path, 2, 1)
    assert told == [(('adamw', 3e-3), {'weight_decay': 0})]  # nothing holds it back from overfitting
    [(images, [(heading, boxes, labels, scores), (last, *_)], label_map)] = shown
    assert label_map == train_set.label_map
    assert [image.tobytes() for image in images] == [open_image(path).tobytes() for path in train_set.images[:2]]
    for i in range(2):
        assert torch.equal(boxes[i], train_set[i][1]) and torch.equal(labels[i], train_set[i][2])
        assert scores[i].tolist() == [1] * len(labels[i])
    assert heading == 'ground truth' and last == 'step 1'


def test_fewer_images_than_asked_for(voc_folder, tmp_path):
    train_set, _, sheet = learn(voc_folder, tmp_path, 9, 1)
    assert sheet.size == (2 * tile[0], len(train_set) * tile[1])


def test_a_loss_that_is_not_finite(voc_folder, tmp_path):
    with pytest.raises(UserError, match='infinite or NaN in step 2'):
        learn(voc_folder, tmp_path, 1, 4, lr=math.inf)


def test_what_the_parameters_say_is_done(voc_folder, tmp_path, monkeypatch, capsys):
    for name, value in dict(data_folder=voc_folder, n_images=1, steps=1, thin=16,
                            sheet_path=str(tmp_path / 'sheet.png')).items():
        monkeypatch.setattr(overfit, name, value)
    plain, told = overfit.overfit, []
    monkeypatch.setattr(overfit, 'overfit', lambda train_set, *rest: told.append(
        (train_set.images, train_set.keep_difficult, torch.initial_seed(), rest)) or plain(train_set, *rest))
    torch.manual_seed(5)
    overfit.main()
    images = PascalVOCDataset(voc_folder, 'TRAIN').images
    assert told == [(images, True, 0, (1, 1, 16, 1e-3, str(tmp_path / 'sheet.png'), torch.device('cpu')))]
    assert f'Look at {tmp_path / "sheet.png"}' in capsys.readouterr().out
    assert Image.open(tmp_path / 'sheet.png').height == tile[1]
    for name in 'n_images', 'steps', 'thin':
        with monkeypatch.context() as wrong:
            wrong.setattr(overfit, name, 0)
            with pytest.raises(UserError, match=f'^{name} = 0 in overfit.py: set it to'):
                overfit.main()
    with monkeypatch.context() as wrong:
        wrong.setattr(overfit, 'sheet_path', 'sheet')
        with pytest.raises(UserError, match="^sheet_path = 'sheet' in overfit.py: end it in .png"):
            overfit.main()
    monkeypatch.setattr(overfit, 'data_folder', str(tmp_path))
    with pytest.raises(UserError, match='create_data_lists.py'):
        overfit.main()


def test_it_learns_images(voc_folder, tmp_path, capsys):
    train_set, (loss, n_found), sheet = learn(voc_folder, tmp_path, 2, 40)
    n_objects = sum(len(objects['labels']) for objects in train_set.objects[:2])
    assert n_found == n_objects > 5 and loss < 0.5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['step 10', 'step 20', 'step 30', 'step 40']
    assert lines[-1].endswith(f'found {n_objects} of {n_objects}  false positives 0')
    assert sheet.size == (5 * tile[0], 2 * tile[1])  # objects, and four looks
    assert len(sheet.getcolors(10 ** 6)) > 1000
