"""Checkpoints: what training saves and loads, and what a training can start from."""
import os
import pickle
import re

import pytest
import torch
from conftest import kept_checkpoint, root
from harmful import Malicious, Program
from torch import nn

import train
from checkpoints import load_checkpoint, load_detector, save_checkpoint, start_from
from convert_checkpoint import convert
from errors import UserError
from model import SSD300, VGGBase
from torchvision_weights import from_torchvision, names
from utils import make_label_map

earlier = [os.path.join(root, 'tests', f'earlier_torch_{version}.pth') for version in ('1.0.1', '1.4.0')]


def line_of(path, read=load_checkpoint):
    """The one line that says why a checkpoint is refused, without its path."""
    with pytest.raises(UserError) as error:
        read(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
    return str(error.value).replace(str(path), '').strip()


@pytest.mark.parametrize('thin', [1, 2, 4, 64])
def test_checkpoint_round_trip(tmp_path, thin):
    model, path = SSD300(n_classes=3, thin=thin), str(tmp_path / 'c.pth')
    model.priors_cxcy *= 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save_checkpoint(path, 4, model, optimizer, make_label_map(['a', 'b']), seed=7, mAP=0.5)
    saved = load_checkpoint(path)
    assert (saved['epoch'], saved['seed'], saved['thin'], saved['mAP'], saved['version']) == (4, 7, thin, 0.5, 2)
    assert saved['optimizer']['param_groups'][0]['lr'] == 0.5 and saved['optimizer_kind'] == 'SGD'
    del saved['thin']  # as earlier versions of the project wrote it
    torch.save(saved, tmp_path / 'earlier.pth')
    for name in ('c.pth', 'earlier.pth'):
        loaded, label_map = load_detector(tmp_path / name)
        assert label_map == {'background': 0, 'a': 1, 'b': 2} and loaded.thin == thin
        for (key, a), (other_key, b) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
            assert key == other_key and torch.equal(a, b)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'c.pth'
    path.write_bytes(b'old')

    def interrupted(content, file):
        file.write(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(path), 0, SSD300(n_classes=2, thin=64), None, {}, 0)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['c.pth']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
def test_no_code_in_a_checkpoint_is_run(tmp_path, zipped, capfd):
    content = {'epoch': 0, 'label_map': {}, 'model': Malicious(str(tmp_path / 'harm'))}
    torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    torch.jit.script(Program()).save(str(tmp_path / 'program.pth'))
    for name in ('c.pth', 'program.pth'):
        assert 'holds more than plain values and tensors, which could be harmful' in line_of(tmp_path / name)
    assert not (tmp_path / 'harm').exists() and 'harm' not in capfd.readouterr().out


def test_a_damaged_checkpoint_is_named(tmp_path, recwarn):
    path = tmp_path / 'c.pth'
    save_checkpoint(path, 0, SSD300(2, thin=64), None, {'background': 0, 'cat': 1}, 0)
    content = path.read_bytes()
    for damaged in (b'', b'text', b'PK\x03\x04 no zip', pickle.dumps({'epoch': 1}), content[:len(content) // 2],
                    content[:100], bytes(4096) + content[4096:], content.replace(b'OrderedDict', b'OrderedEict'),
                    content.replace(b'}q', b'\xfdq', 1)):
        path.write_bytes(damaged)
        assert re.fullmatch('is damaged, or holds more than plain values and tensors, which could be harmful '
                            r'\(\w+Error\): take a checkpoint that train.py wrote', line_of(path))
    assert not recwarn.list


@pytest.mark.parametrize('error, read', [
    (MemoryError(), load_checkpoint), (MemoryError(), lambda path: convert(path, 'none.pth')),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), load_checkpoint)])
def test_without_memory_a_checkpoint_is_not_called_damaged(monkeypatch, error, read):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(type(error)):
        read(kept_checkpoint)


def test_what_to_do_without_a_checkpoint(tmp_path):
    for path in (tmp_path / 'none.pth', tmp_path):
        assert line_of(path) == 'no checkpoint at : train one with "python train.py", or set the right path'
    for path in earlier:
        assert line_of(path) == ('is a checkpoint of the earlier implementation: convert it with '
                                 '"python convert_checkpoint.py  NEW"')


def write_kept_checkpoint(path):
    """Write a checkpoint of SSD300 with save_checkpoint, as training does, but small: a tensor of weights has but one
    value, and so has its momentum; the file holds it once. Call it with a new name when checkpoint_version changes."""
    model = SSD300(n_classes=3)
    optimizer = train.make_optimizer(model, 'sgd', 1e-3, 5e-4)
    values = torch.arange(1000.)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = values[i:i + 1].expand(parameter.shape)
        optimizer.state[parameter]['momentum_buffer'] = values[500 + i:501 + i].expand(parameter.shape)
    model.priors_cxcy = values[:4].expand(8732, 4)
    save_checkpoint(path, 7, model, optimizer, make_label_map(['cat', 'dog']), seed=11)


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
    ({'model': 3, 'seed': []}, "lacks ['model', 'seed']"), ({'thin': 2}, 'does not fit SSD300'),
    ({'label_map': {'background': 0, 'a': 1}}, "does not fit SSD300 with its classes ['background', 'a']"),
    ({'priors_cxcy': torch.rand(3, 4)}, 'feature_maps of utils.py: '), ({'priors_cxcy': torch.rand(8732, 3)}, 'fit'),
    ({'model': {'base.conv1_1.bias': torch.zeros(0)}}, 'does not fit SSD300 with its classes'),
    *(({key: value}, 'is damaged: take another checkpoint') for key, value in [
        ('optimizer', []), ('label_map', {}), ('label_map', {'background': 0, 'cat': 9, 'dog': 2}), ('thin', 3),
        ('thin', '1'), ('thin', None), ('priors_cxcy', 'no tensor'), ('model', {}), ('model', {'base.conv1_1.bias': 3}),
        ('model', {'base.conv1_1.bias': torch.zeros(21)}), ('model', {3: torch.zeros(21)})])])
def test_checkpoints_that_cannot_be_used_are_named(tmp_path, change, line):
    torch.save(torch.load(kept_checkpoint, weights_only=True) | change, tmp_path / 'c.pth')
    assert line in line_of(tmp_path / 'c.pth', load_detector)


@pytest.mark.parametrize('load', [
    lambda _: load_detector(kept_checkpoint), lambda _: start_from(kept_checkpoint, {'background': 0, 'cat': 1}, 1),
    lambda path: convert(earlier[0], path), lambda _: from_torchvision(dict.fromkeys(names, torch.zeros(8)))])
def test_a_mistake_in_a_layer_is_not_blamed_on_the_file(tmp_path, monkeypatch, load):
    """A student who mistypes a layer sees the traceback of that line."""
    def mistyped(self, pretrained=False):
        nn.Module.__init__(self)
        self.conv1_1 = nn.conv2d(3, 64, kernel_size=3, padding=1)

    monkeypatch.setattr(VGGBase, '__init__', mistyped)
    with pytest.raises(AttributeError, match='conv2d') as error:
        load(str(tmp_path / 'c.pth'))
    assert error.traceback[-1].name == 'mistyped'


@pytest.fixture(scope='module')
def shapes_detector(tmp_path_factory):
    """A detector of circles and squares, with other priors than a new one's; and the path of its checkpoint."""
    detector, path = SSD300(3, thin=32), str(tmp_path_factory.mktemp('shapes') / 'shapes.pth')
    detector.priors_cxcy *= 0.9
    for layer in detector.pred_convs.children():
        nn.init.normal_(layer.bias)
    save_checkpoint(path, 3, detector, None, make_label_map(['circle', 'square']), seed=0)
    return detector, path


@pytest.mark.parametrize('labels', [['circle', 'square'], ['triangle', 'square', 'circle'], ['square'], ['dog', 'cat']])
@torch.no_grad()
def test_a_start_from_a_checkpoint_keeps_what_has_the_same_name(shapes_detector, labels):
    trained, path = shapes_detector
    model, new_labels = start_from(path, make_label_map(labels), 32)
    assert new_labels == [label for label in labels if label not in ('circle', 'square')]
    assert torch.equal(model.priors_cxcy, trained.priors_cxcy) and model.thin == 32
    image = torch.randn(1, 3, 300, 300)
    (locs, scores), (trained_locs, trained_scores) = model(image), trained(image)
    torch.testing.assert_close(locs, trained_locs)
    old = ['background', 'circle', 'square']
    for index, label in enumerate(['background', *labels]):
        if label in old:
            torch.testing.assert_close(scores[:, :, index], trained_scores[:, :, old.index(label)])
    random_layers = SSD300(model.n_classes, thin=32).pred_convs.children()
    for (name, layer), random in zip(model.pred_convs.named_children(), random_layers, strict=True):
        for index in [1 + labels.index(label) for label in new_labels if name.startswith('cl_')]:
            new, usual = (each.weight.unflatten(0, (-1, model.n_classes))[:, index].std() for each in (layer, random))
            assert 0.08 < new / usual < 0.12 and not layer.bias.view(-1, model.n_classes)[:, index].any()


def test_a_start_needs_only_a_model_that_is_as_thin(shapes_detector):
    saved = torch.load(shapes_detector[1], weights_only=True)
    assert set(saved) == {'version', 'epoch', 'label_map', 'seed', 'thin', 'model'}
    assert line_of(shapes_detector[1], lambda path: start_from(path, {'background': 0, 'cat': 1}, 1)) == (
        'has thin = 32, but train.py has thin = 1: set thin = 32 there')
