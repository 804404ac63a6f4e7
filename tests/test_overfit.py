"""overfit.py: it learns a few images by heart, and shows it."""
import math

import pytest
import torch
from PIL import Image

import overfit
from datasets import PascalVOCDataset
from files import UserError


def learn(folder, tmp_path, n_images, steps, lr=3e-3):
    """Overfit a very thin network on the CPU; what `overfit` returns, and the sheet."""
    train_set = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    path = str(tmp_path / 'overfit.png')
    result = overfit.overfit(train_set, n_images, steps, 16, lr, path, torch.device('cpu'))
    return train_set, result, Image.open(path)


def test_it_learns_images_by_heart(voc_folder, tmp_path, capsys):
    train_set, (loss, n_found), sheet = learn(voc_folder, tmp_path, 2, 40)
    n_objects = sum(len(objects['labels']) for objects in train_set.objects[:2])
    assert n_found == n_objects > 5 and loss < 0.5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['step 10', 'step 20', 'step 30', 'step 40']
    assert lines[-1].endswith(f'found {n_objects} of {n_objects}  false alarms 0')
    assert sheet.size == (5 * overfit.tile[0], 40 + 2 * overfit.tile[1])  # objects, and four looks
    assert len(sheet.getcolors(10 ** 6)) > 1000


def test_fewer_images_than_asked_for(voc_folder, tmp_path):
    train_set, _, sheet = learn(voc_folder, tmp_path, 9, 1)
    assert sheet.size == (2 * overfit.tile[0], 40 + len(train_set) * overfit.tile[1])


def test_a_loss_that_is_not_finite(voc_folder, tmp_path):
    with pytest.raises(UserError, match='infinite or NaN in step 2'):
        learn(voc_folder, tmp_path, 1, 4, lr=math.inf)


def test_what_the_parameters_say_is_done(voc_folder, tmp_path, monkeypatch, capsys):
    for name, value in dict(data_folder=voc_folder, n_images=1, steps=1, thin=16,
                            sheet_path=str(tmp_path / 'sheet.png')).items():
        monkeypatch.setattr(overfit, name, value)
    overfit.main()
    assert f'Look at {tmp_path / "sheet.png"}' in capsys.readouterr().out
    assert Image.open(tmp_path / 'sheet.png').height == 40 + overfit.tile[1]
    for name in 'n_images', 'steps', 'thin':
        with monkeypatch.context() as wrong:
            wrong.setattr(overfit, name, 0)
            with pytest.raises(UserError, match=f'{name} = 0.* in overfit.py'):
                overfit.main()
    monkeypatch.setattr(overfit, 'data_folder', str(tmp_path))
    with pytest.raises(UserError, match='create_data_lists.py'):
        overfit.main()
