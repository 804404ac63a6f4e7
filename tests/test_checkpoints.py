"""Checkpoints: what training saves and loads."""
import io
import os
import pickle

import pytest
import torch
from conftest import kept_checkpoint, root
from harmful import Malicious, Program

import detect
import eval as eval_script
import train
from checkpoints import load_checkpoint, load_detector, save_checkpoint
from errors import UserError
from model import SSD300


def test_checkpoint_round_trip(tmp_path):
    model, path = SSD300(n_classes=3, thin=16), str(tmp_path / 'c.pth')
    model.priors_cxcy *= 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save_checkpoint(path, 4, model, optimizer, {'background': 0, 'a': 1, 'b': 2}, seed=7)
    saved = load_checkpoint(path)
    assert saved['epoch'] == 4 and saved['seed'] == 7 and saved['optimizer']['param_groups'][0]['lr'] == 0.5
    loaded, label_map = load_detector(path)
    assert label_map == saved['label_map'] and torch.equal(loaded.priors_cxcy, model.priors_cxcy)
    assert 'priors_cxcy' in saved['model'] and 'priors_cxcy' not in saved
    for (key, a), (other_key, b) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(a, b)
    assert os.listdir(tmp_path) == ['c.pth']

    torch.save(saved | {'label_map': {'background': 0, 'a': 1}}, path)
    with pytest.raises(UserError, match='c.pth does not fit'):
        load_detector(path)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    path.write_bytes(b'old')

    def interrupted(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    model = SSD300(n_classes=2, thin=64)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(path), 0, model, torch.optim.SGD(model.parameters(), lr=1), {}, 0)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['c.pth']


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, zipped):
    content = {'epoch': 0, 'label_map': {}, 'model': Malicious(str(tmp_path / 'harm'))}
    torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match='mkdir, which could be harmful') as error:
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert not (tmp_path / 'harm').exists() and '\n' not in str(error.value)


@pytest.mark.filterwarnings('ignore')
def test_a_program_is_refused(tmp_path, capfd):
    torch.jit.script(Program()).save(str(tmp_path / 'c.pth'))
    with pytest.raises(UserError, match='TorchScript'):
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert 'harm' not in capfd.readouterr().out


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04 no zip', pickle.dumps({'epoch': 1}), None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, recwarn):
    path = tmp_path / 'c.pth'
    if content is None:
        file = io.BytesIO()
        torch.save({'weights': torch.zeros(3)}, file)
        content = file.getvalue()
    path.write_bytes(content)
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(str(path))
    assert '\n' not in str(error.value) and not recwarn.list


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = str(tmp_path / 'c.pth')
    model = torch.nn.Linear(2, 2)
    model.register_buffer('priors_cxcy', torch.zeros(3, 4))
    save_checkpoint(path, 0, model, torch.optim.SGD(model.parameters(), lr=1), {'background': 0, 'cat': 1}, 0)
    with open(path, 'rb') as file:
        content = file.read()
    damages = (content[:len(content) // 2], content[:100], bytes(4096) + content[4096:],
               content.replace(b'OrderedDict', b'OrderedEict'), content.replace(b'}q', b'\xfdq', 1))
    reasons = ('RuntimeError', 'RuntimeError', 'RuntimeError',
               'it calls collections.OrderedEict, which could be harmful', 'UnpicklingError')
    for damaged, reason in zip(damages, reasons, strict=True):
        with open(path, 'wb') as file:
            file.write(damaged)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        message = str(error.value)
        assert message == f'{path} is damaged or no checkpoint ({reason}): take one that train.py wrote'


def test_a_missing_checkpoint_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match='python train.py'):
        load_checkpoint(str(tmp_path / 'none.pth'))


@pytest.mark.parametrize('thin', [1, 2, 4, 64])
def test_a_checkpoint_knows_how_thin_it_is(tmp_path, thin):
    network, path = SSD300(n_classes=3, thin=thin), str(tmp_path / 'c.pth')
    optimizer = torch.optim.SGD(network.parameters(), lr=1)
    save_checkpoint(path, 0, network, optimizer, {'background': 0, 'a': 1, 'b': 2}, seed=0)
    loaded, _ = load_detector(path)
    assert all(torch.equal(loaded.state_dict()[key], values) for key, values in network.state_dict().items())
    assert loaded.base.conv7.out_channels == 1024 // thin and loaded.pred_convs.cl_conv7.out_channels == 18


@pytest.mark.parametrize('first_layer', [{}, {'base.conv1_1.bias': torch.zeros(0)}, {'base.conv1_1.bias': 3},
                                         {'base.conv1_1.bias': torch.zeros(21)}])
def test_weights_with_another_first_layer_are_no_detector(tmp_path, first_layer):
    saved = load_checkpoint(kept_checkpoint)
    saved['model'] = {'priors_cxcy': saved['model']['priors_cxcy'], **first_layer}
    torch.save(saved, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth does not fit SSD300 with its classes') as error:
        load_detector(tmp_path / 'c.pth')
    assert '\n' not in str(error.value)


def test_a_checkpoint_may_have_only_a_model(tmp_path):
    save_checkpoint(tmp_path / 'c.pth', 3, SSD300(2, thin=64), None, {'background': 0, 'cat': 1}, seed=4)
    saved = load_checkpoint(tmp_path / 'c.pth')
    assert set(saved) == {'version', 'epoch', 'label_map', 'seed', 'model'} and saved['epoch'] == 3
    assert load_detector(tmp_path / 'c.pth')[1] == {'background': 0, 'cat': 1}


def write_kept_checkpoint(path):
    """
    Write a checkpoint of SSD300 with save_checkpoint, as training does, but small: each weight tensor has but one
    value, and so has its momentum, which the file holds once. Call it with a new name when checkpoint_version changes.

    :param path: the file
    """
    model, label_map = SSD300(n_classes=3), {'background': 0, 'cat': 1, 'dog': 2}
    optimizer = train.make_optimizer(model, 'sgd', 1e-3, 5e-4)
    values = torch.arange(1000.)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = values[i:i + 1].expand(parameter.shape)
        optimizer.state[parameter]['momentum_buffer'] = values[500 + i:501 + i].expand(parameter.shape)
    model.priors_cxcy = values[:4].expand(8732, 4)
    save_checkpoint(path, 7, model, optimizer, label_map, seed=11)


@pytest.mark.parametrize('version', [1, 2])
def test_checkpoints_of_all_versions_are_read(version):
    """Version 1 has the priors beside the model."""
    path = os.path.join(root, 'tests', f'checkpoint_version_{version}.pth')
    assert os.path.getsize(path) < 100_000
    saved = load_checkpoint(path)
    assert (saved['version'], saved['epoch'], saved['seed']) == (version, 7, 11) and 'priors_cxcy' not in saved
    assert saved['label_map'] == {'background': 0, 'cat': 1, 'dog': 2}
    model, _ = load_detector(path)
    assert torch.equal(model.priors_cxcy, torch.arange(4.).expand(8732, 4))
    optimizer = train.make_optimizer(model, 'sgd', 1e-3, 5e-4)
    optimizer.load_state_dict(saved['optimizer'])
    assert [group['lr'] for group in optimizer.param_groups] == [2e-3, 1e-3]
    for i, parameter in enumerate(model.parameters()):
        assert (parameter == i).all()
        assert (optimizer.state[parameter]['momentum_buffer'] == 500 + i).all()


@pytest.mark.parametrize('change, line', [
    ({'version': 3}, 'has version 3, and is from a newer version of this project, which writes version 2'),
    ({'epoch': None}, "lacks ['epoch']"), ({'label_map': ['cat', 'dog']}, "lacks ['label_map']"),
    ({'model': 3, 'seed': []}, "lacks ['model', 'seed']"), ({'optimizer': []}, 'is damaged'),
    ({'model': {}}, 'is damaged'), ({'label_map': {'background': 0, 'cat': 9, 'dog': 2}}, 'is damaged')])
def test_checkpoints_that_cannot_be_used_are_named(tmp_path, change, line):
    saved = load_checkpoint(kept_checkpoint)
    torch.save(saved | change, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(tmp_path / 'c.pth')
    assert line in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('priors', [torch.rand(3, 4), torch.rand(8732, 3), 'no tensor'])
def test_other_priors_are_named(tmp_path, priors):
    torch.save(torch.load(kept_checkpoint, weights_only=True) | {'priors_cxcy': priors}, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth does not fit .* feature_maps of utils.py: .*priors_cxcy') as error:
        load_detector(tmp_path / 'c.pth')
    assert '\n' not in str(error.value)


def test_weights_saved_by_hand_bring_their_priors():
    """After a start from COCO, the priors are not those of a new SSD300."""
    trained, fresh = SSD300(2, thin=64), SSD300(2, thin=64)
    trained.priors_cxcy *= 0.9
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.priors_cxcy, trained.priors_cxcy)


@pytest.mark.parametrize('version', ['1.0.1', '1.4.0'])
def test_scripts_say_how_to_convert_an_earlier_checkpoint(voc_folder, monkeypatch, version):
    earlier = os.path.join(root, 'tests', f'earlier_torch_{version}.pth')
    line = f'{earlier} is a checkpoint of the earlier implementation: convert it with "python convert_checkpoint.py ' \
           f'{earlier} NEW"'
    for script in (train, eval_script):
        for name, value in (('data_folder', voc_folder), ('checkpoint', earlier), ('workers', 0)):
            monkeypatch.setattr(script, name, value)
    for main in (train.main, eval_script.main, lambda: detect.kept_detector(earlier)):
        with pytest.raises(UserError) as error:
            main()
        assert str(error.value) == line
