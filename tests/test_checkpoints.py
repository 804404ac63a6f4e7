"""Checkpoints, ours and others; and torchvision's SSD300."""
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from typing import Tuple

import numpy as np
import pytest
import torch
from conftest import kept_checkpoint, root
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.image_list import ImageList

import checkpoints
import detect
import eval as eval_script
import train
from checkpoints import (coco_detector, coco_index, from_torchvision, load_checkpoint, load_detector, save_checkpoint,
                         start_from_coco)
from datasets import to_input
from demo import draw_image
from files import UserError
from model import SSD300
from utils import (cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, make_label_map, non_maximum_suppression,
                   voc_labels, xy_to_cxcy)


# -------------------------------------------------------------------------------------------------------------- Our own

def test_checkpoint_round_trip(tmp_path):
    model, path = SSD300(n_classes=3, thin=16), str(tmp_path / 'c.pth')
    model.priors_cxcy = model.priors_cxcy * 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save_checkpoint(path, 4, model, optimizer, {'background': 0, 'a': 1, 'b': 2}, seed=7)
    saved = load_checkpoint(path)
    assert saved['epoch'] == 4 and saved['seed'] == 7 and saved['optimizer']['param_groups'][0]['lr'] == 0.5
    loaded, label_map = load_detector(path)
    assert label_map == saved['label_map'] and torch.equal(loaded.priors_cxcy, model.priors_cxcy)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
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


class Malicious:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, zipped):
    content = {'epoch': 0, 'label_map': {}, 'model': Malicious(str(tmp_path / 'harm')), 'priors_cxcy': torch.zeros(1)}
    torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match='mkdir, which could be harmful') as error:
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert not (tmp_path / 'harm').exists() and '\n' not in str(error.value)


class Program(torch.nn.Module):
    """A TorchScript module: torch.load runs what it does when it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return 0, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[int, bool]):
        print('harm')
        self.training = state[1]


@pytest.mark.filterwarnings('ignore')
def test_a_program_is_refused(tmp_path, capfd):
    torch.jit.script(Program()).save(str(tmp_path / 'c.pth'))
    with pytest.raises(UserError, match='TorchScript'):
        load_checkpoint(str(tmp_path / 'c.pth'))
    assert 'harm' not in capfd.readouterr().out


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04 no zip', pickle.dumps({'epoch': 1}), None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / 'c.pth'
    if content is None:
        file = io.BytesIO()
        torch.save({'weights': torch.zeros(3)}, file)
        content = file.getvalue()
    path.write_bytes(content)
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(str(path))
    assert '\n' not in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = str(tmp_path / 'c.pth')
    model = torch.nn.Linear(2, 2)
    model.priors_cxcy = torch.zeros(3, 4)
    save_checkpoint(path, 0, model, torch.optim.SGD(model.parameters(), lr=1), {'background': 0, 'cat': 1}, 0)
    with open(path, 'rb') as file:
        content = file.read()
    damages = (content[:len(content) // 2], content[:100], bytes(4096) + content[4096:],
               content.replace(b'OrderedDict', b'OrderedEict'), content.replace(b'}q', b'\xfdq', 1))
    reasons = ('', '', 'it is one of files', 'it calls collections.OrderedEict, which could be harmful',
               'Unsupported operand 253')
    for damaged, reason in zip(damages, reasons, strict=True):
        with open(path, 'wb') as file:
            file.write(damaged)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        message = str(error.value)
        assert message.startswith(f'{path} is damaged or no checkpoint: {reason}') and '\n' not in message
        assert message.endswith('; take one that train.py wrote') and 'weights_only' not in message


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
    torch.save(load_checkpoint(kept_checkpoint) | {'model': first_layer}, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth does not fit SSD300 with its classes') as error:
        load_detector(tmp_path / 'c.pth')
    assert '\n' not in str(error.value)


def write_kept_checkpoint(path):
    """
    Write a checkpoint of SSD300 with save_checkpoint, as training does, but small: each weight tensor has but one
    value, and so has its momentum, which the file holds once. Call it with a new name when checkpoint_version changes.

    :param path: the file
    """
    model, label_map = SSD300(n_classes=3), {'background': 0, 'cat': 1, 'dog': 2}
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    values = torch.arange(1000.)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = values[i:i + 1].expand(parameter.shape)
        optimizer.state[parameter]['momentum_buffer'] = values[500 + i:501 + i].expand(parameter.shape)
    model.priors_cxcy = values[:4].expand(8732, 4)
    save_checkpoint(path, 7, model, optimizer, label_map, seed=11)


def test_a_checkpoint_of_version_1_is_read():
    assert os.path.getsize(kept_checkpoint) < 100_000
    saved = load_checkpoint(kept_checkpoint)
    assert (saved['version'], saved['epoch'], saved['seed']) == (1, 7, 11)
    assert saved['label_map'] == {'background': 0, 'cat': 1, 'dog': 2}
    model, _ = load_detector(kept_checkpoint)
    assert torch.equal(model.priors_cxcy, torch.arange(4.).expand(8732, 4))
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    optimizer.load_state_dict(saved['optimizer'])
    assert [group['lr'] for group in optimizer.param_groups] == [2e-3, 1e-3]
    for i, parameter in enumerate(model.parameters()):
        assert (parameter == i).all()
        assert (optimizer.state[parameter]['momentum_buffer'] == 500 + i).all()


@pytest.mark.parametrize('change, line', [
    ({'version': 2}, 'has version 2, and is from a newer version of this project, which writes version 1'),
    ({'epoch': None}, "lacks ['epoch']"), ({'label_map': ['cat', 'dog']}, "lacks ['label_map']"),
    ({'model': 3, 'optimizer': []}, "lacks ['model', 'optimizer']"),
    ({'priors_cxcy': torch.zeros(8732, 3)}, 'is damaged'),
    ({'label_map': {'background': 0, 'cat': 9, 'dog': 2}}, 'is damaged')])
def test_checkpoints_that_cannot_be_used_are_named(tmp_path, change, line):
    saved = load_checkpoint(kept_checkpoint)
    torch.save(saved | change, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(tmp_path / 'c.pth')
    assert line in str(error.value) and '\n' not in str(error.value)


def test_another_number_of_priors_is_named(tmp_path):
    torch.save(load_checkpoint(kept_checkpoint) | {'priors_cxcy': torch.rand(3, 4)}, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='c.pth has 3 priors, but feature_maps in utils.py make 8732'):
        load_detector(tmp_path / 'c.pth')


# ---------------------------------------------------------------------------- Checkpoints of the earlier implementation

@pytest.mark.parametrize('location', ['cpu', 'cuda:0'])
@pytest.mark.parametrize('version', ['1.0.1', '1.4.0'])
def test_checkpoints_written_by_old_versions_of_pytorch(tmp_path, version, location):
    """Files of tests/earlier/write.py. They name the device once, for all tensors, and so are easily made a GPU's."""
    with open(os.path.join(root, 'tests', f'earlier_torch_{version}.pth'), 'rb') as file:
        content = file.read()
    assert len(content) < 100_000 and content.count(b'X\3\0\0\0cpu') == 1
    path = tmp_path / 'c.pth.tar'
    path.write_bytes(content.replace(b'X\3\0\0\0cpu', b'X' + bytes([len(location), 0, 0, 0]) + location.encode()))
    saved = load_checkpoint(path)
    assert set(saved) == {'epoch', 'label_map', 'model', 'priors_cxcy'}
    assert saved['epoch'] == 7 and saved['label_map'] == make_label_map(voc_labels)
    model, _ = load_detector(path)
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        assert (parameter == i).all(), name
    assert torch.equal(model.priors_cxcy, torch.arange(4.).expand(8732, 4))


def change_earlier(path, old, new):
    """Write the checkpoint of PyTorch 1.0.1 with some bytes replaced."""
    with open(os.path.join(root, 'tests', 'earlier_torch_1.0.1.pth'), 'rb') as file:
        content = file.read()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize('old, new, line', [
    (b'cmodel\nVGGBase\n', b'cos\nsystem\n', 'it calls os.system, which could be harmful; take one'),
    (b'ctorch.nn.backends.thnn\n_get_thnn_function_backend\n', b'cbuiltins\neval\n', 'it calls builtins.eval, which'),
    (b'\n\0\0\0pred_convs', b'\n\0\0\0else_convs', "not the SSD300 of the earlier implementation: 'pred_convs"),
    (b'priors_cxcy', b'priors_else', "not the SSD300 of the earlier implementation: 'StandIn'")])
def test_an_earlier_checkpoint_that_cannot_be_used_is_named(tmp_path, old, new, line):
    change_earlier(tmp_path / 'c.pth', old, new)
    with pytest.raises(UserError, match='c.pth') as error:
        load_checkpoint(tmp_path / 'c.pth')
    assert line in str(error.value) and '\n' not in str(error.value)


def test_a_wrong_bit_in_an_earlier_checkpoint_takes_no_memory(tmp_path):
    change_earlier(tmp_path / 'c.pth', b'r\0\1\0\0', b'r\0\1\0\4')  # where to remember an object: at 256, or 2^26 more
    tracemalloc.start()
    load_checkpoint(tmp_path / 'c.pth')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_an_earlier_checkpoint_for_other_classes_is_named():
    content = checkpoints.read_saved(os.path.join(root, 'tests', 'earlier_torch_1.0.1.pth'))
    content['model']._modules['pred_convs']._modules['cl_conv11_2']._parameters['bias'] = torch.zeros(4 * 3)
    with pytest.raises(UserError, match='c.pth is a checkpoint of the earlier implementation for 2 classes') as error:
        checkpoints.from_earlier(content, 'c.pth')
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def earlier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('earlier')
    torch.manual_seed(3)
    model = SSD300(n_classes=21)
    torch.save(model.state_dict() | {'priors_cxcy': model.priors_cxcy}, folder / 'weights.pth')
    # In a process of its own, because the earlier implementation's module has our module's name
    subprocess.run([sys.executable, os.path.join(root, 'tests', 'earlier', 'write.py'), 'earlier_True.pth.tar',
                    'weights.pth', 'earlier_False.pth.tar'], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize('zipped', [False, True])
def test_checkpoints_of_the_earlier_implementation(earlier_folder, zipped):
    saved = load_checkpoint(earlier_folder / f'earlier_{zipped}.pth.tar')
    assert saved['epoch'] == 7 and saved['label_map'] == make_label_map(voc_labels) and 'optimizer' not in saved
    expected = torch.load(earlier_folder / 'weights.pth', weights_only=True)
    assert torch.equal(saved['priors_cxcy'], expected.pop('priors_cxcy'))
    model, _ = load_detector(earlier_folder / f'earlier_{zipped}.pth.tar')
    assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)
    reference = SSD300(21)
    reference.load_state_dict(expected)
    image = to_input(draw_random_image()).unsqueeze(0)
    with torch.no_grad():
        for mine, other in zip(model(image), reference(image)):
            assert torch.equal(mine, other)


def test_scripts_take_earlier_checkpoints(earlier_folder, voc_folder, tmp_path, monkeypatch, capsys):
    lists_with_labels(voc_folder, tmp_path, voc_labels)
    earlier = str(earlier_folder / 'earlier_True.pth.tar')
    for script in (train, eval_script):
        for name, value in (('data_folder', str(tmp_path)), ('checkpoint', earlier), ('workers', 0)):
            monkeypatch.setattr(script, name, value)
    eval_script.main()
    assert 'tvmonitor' in capsys.readouterr().out
    detect.kept_detector.cache_clear()
    monkeypatch.setattr(detect, 'checkpoint', earlier)
    assert detect.detect(draw_random_image(), 0.1, 0.45, 5).size == (300, 300)

    for name, value in (('checkpoint_path', str(tmp_path / 'a.pth')), ('epochs', 1), ('lr', 1e-9)):
        monkeypatch.setattr(train, name, value)
    train.main()
    saved = load_checkpoint(tmp_path / 'a.pth')
    assert saved['epoch'] == 0  # training starts anew, from these weights
    before = torch.load(earlier_folder / 'weights.pth', weights_only=True)
    torch.testing.assert_close(saved['model'] | {'priors_cxcy': saved['priors_cxcy']}, before, atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match='a.pth exists'):
        train.main()


# ------------------------------------------------------------------------------------------------- torchvision's SSD300

per_tile = 4, 6, 6, 6, 4, 4


tiles = 38 ** 2, 19 ** 2, 10 ** 2, 5 ** 2, 3 ** 2, 1


@pytest.fixture(scope='module')
def theirs():
    """torchvision's model with random weights, which scores neither near 0 nor near 1."""
    torch.manual_seed(1)
    model = ssd300_vgg16(weights=None, weights_backbone=None, score_thresh=0.01, nms_thresh=0.45,
                         topk_candidates=9000).eval()
    model.backbone.scale_weight.data = 10 + 20 * torch.rand(512)
    for head in (model.head.classification_head, model.head.regression_head):
        for layer in head.module_list:
            torch.nn.init.normal_(layer.bias)
    image = draw_random_image()
    with torch.no_grad():  # scale each map's outputs to a spread of 2 for scores, of 1 for offsets
        features = list(model.backbone(to_their_input(image)).values())
        for head, spread in ((model.head.classification_head, 2.), (model.head.regression_head, 1.)):
            for layer, feature in zip(head.module_list, features):
                out = layer(feature)
                layer.weight.mul_(spread / out.std())
                layer.bias.mul_(spread / out.std())
    return model


def draw_random_image():
    """A PIL image of 300x300."""
    return draw_image(random.Random(4))[0].resize((300, 300))


def to_pixels(image):
    """(3, 300, 300), from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_their_input(image):
    """(1, 3, 300, 300), as torchvision normalizes it."""
    return ((to_pixels(image) - torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)) * 255).unsqueeze(0)


def to_our_order(tensor):
    """Reorder the ratios within each tile, along dimension 0."""
    parts = []
    for part, n in zip(tensor.split([n * t for n, t in zip(per_tile, tiles)]), per_tile):
        order = [0, 1, 2, 4, 3, 5] if n == 6 else [0, 1, 2, 3]
        parts.append(part.unflatten(0, (-1, n))[:, order].flatten(0, 1))
    return torch.cat(parts)


@torch.no_grad()
def test_predictions_equal_torchvisions(theirs):
    image = draw_random_image()
    ours = from_torchvision(theirs.state_dict()).eval()
    features = list(theirs.backbone(to_their_input(image)).values())
    outputs = theirs.head(features)
    default_boxes = theirs.anchor_generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), features)[0]
    torch.testing.assert_close(ours.priors_cxcy, to_our_order(xy_to_cxcy(default_boxes / 300)), atol=1e-5, rtol=0)

    locs, scores = ours(to_input(image).unsqueeze(0))
    for mine, other in ((locs[0], outputs['bbox_regression'][0]), (scores[0], outputs['cls_logits'][0])):
        other = to_our_order(other)
        assert (mine - other).norm() < 3e-3 * other.norm()

    # Torchvision clips boxes before it suppresses; so do we here.
    boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs[0], ours.priors_cxcy)).clamp(0, 1)
    probabilities, labels = scores[0].softmax(dim=1)[:, 1:].flatten().topk(9000)
    boxes, labels = boxes[labels // 90], labels % 90 + 1
    kept = non_maximum_suppression(boxes, probabilities, labels, 0.45)[:60]
    found = theirs([to_pixels(image)])[0]
    assert 0.05 < found['scores'][49] and found['scores'][0] < 0.999
    for box, label, score in zip(found['boxes'][:50] / 300, found['labels'], found['scores']):
        same = kept[labels[kept] == label]
        overlaps = find_jaccard_overlap(box[None], boxes[same])[0]
        assert overlaps.max() > 0.95
        assert (probabilities[same[overlaps.argmax()]] - score).abs() < 0.01


@torch.no_grad()
def test_a_choice_of_classes_keeps_their_scores(theirs):
    image = to_input(draw_random_image()).unsqueeze(0)
    locs, scores = from_torchvision(theirs.state_dict())(image)
    some_locs, some_scores = from_torchvision(theirs.state_dict(), [0, 17, 3])(image)
    torch.testing.assert_close(some_locs, locs)
    torch.testing.assert_close(some_scores, scores[:, :, [0, 17, 3]], atol=1e-4, rtol=1e-4)


def test_other_weights_are_refused():
    with pytest.raises(UserError, match='ssd300_vgg16'):
        from_torchvision({'features.0.weight': torch.zeros(1)})


def test_voc_labels_have_their_names_in_coco():
    assert [label for label in voc_labels if coco_index(label) is None] == []
    assert len({coco_index(label) for label in voc_labels}) == 20
    assert coco_index('tvmonitor') == checkpoints.coco_categories.index('tv')
    assert coco_index('background') is coco_index('__background__') is coco_index('triceratops') is None


def test_fine_tuning_keeps_the_rows_of_known_labels(theirs, monkeypatch):
    monkeypatch.setattr(checkpoints, 'download_coco', theirs.state_dict)
    label_map = make_label_map(['triceratops', 'sofa', 'cat'])
    model, anew = start_from_coco(label_map)
    assert anew == ['triceratops']
    coco = from_torchvision(theirs.state_dict())
    torch.testing.assert_close(model.priors_cxcy, coco.priors_cxcy)
    for (key, mine), other in zip(model.state_dict().items(), coco.state_dict().values(), strict=True):
        if '.cl_' not in key:
            assert torch.equal(mine, other), key
            continue
        mine, other = mine.unflatten(0, (-1, 4)), other.unflatten(0, (-1, 91))
        assert torch.equal(mine[:, [0, 2, 3]], other[:, [0, coco_index('sofa'), coco_index('cat')]])
        if key.endswith('.bias'):
            assert (mine[:, 1] == 0).all()
        else:
            assert mine[:, 1].abs().max() > 0 and not torch.equal(mine[:, 1], other[:, 1])


def test_train_says_which_labels_start_anew(theirs, voc_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, 'download_coco', theirs.state_dict)
    for name, value in (('data_folder', voc_folder), ('pretrained', 'coco'), ('workers', 0), ('epochs', 1),
                        ('checkpoint_path', str(tmp_path / 'a.pth')), ('lr', 1e-6)):
        monkeypatch.setattr(train, name, value)
    train.main()
    assert "['circle', 'square', 'triangle']" in capsys.readouterr().out
    torch.testing.assert_close(load_checkpoint(tmp_path / 'a.pth')['priors_cxcy'], checkpoints.coco_default_boxes())


def lists_with_labels(voc_folder, folder, labels):
    """Copy lists, with other names for the labels."""
    shutil.copytree(voc_folder, folder, dirs_exist_ok=True)
    (folder / 'label_map.json').write_text(json.dumps(make_label_map(labels)))


def test_eval_measures_coco_weights_on_other_labels(theirs, voc_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, 'download_coco', theirs.state_dict)
    lists_with_labels(voc_folder, tmp_path, ['sofa', 'dog', 'tvmonitor'])
    for name, value in (('data_folder', str(tmp_path)), ('checkpoint', None), ('workers', 0)):
        monkeypatch.setattr(eval_script, name, value)
    eval_script.main()
    assert re.search(r'^sofa +\d.*^dog +\d.*^tvmonitor +\d.*^mAP ', capsys.readouterr().out, re.M | re.S)
    lists_with_labels(voc_folder, tmp_path, ['sofa', 'triceratops', 'dog'])
    with pytest.raises(UserError, match='triceratops'):
        eval_script.main()


def test_with_the_file_in_place_no_network_is_touched(theirs, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError('no network')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', no_network)
    name = os.path.basename(checkpoints.coco_weights.url)
    with pytest.raises(UserError) as error:
        coco_detector()
    assert str(tmp_path / 'hub' / 'checkpoints') in str(error.value) and name in str(error.value)
    assert '\n' not in str(error.value)

    os.makedirs(tmp_path / 'hub' / 'checkpoints', exist_ok=True)
    torch.save(theirs.state_dict(), tmp_path / 'hub' / 'checkpoints' / name)
    model, label_map = coco_detector()
    assert len(label_map) == 81 and label_map['person'] == 1 and 'N/A' not in label_map
    monkeypatch.chdir(tmp_path)
    detect.kept_detector.cache_clear()
    capsys.readouterr()  # older versions of PyTorch say that a download begins
    annotated = detect.detect(draw_random_image(), 0.1, 0.45, 5)
    assert annotated.size == (300, 300)
    line = capsys.readouterr().err
    assert line.startswith('There is no checkpoint_ssd300.pth') and line.count('\n') == 1 and 'COCO' in line
    model, label_map = coco_detector(['sofa', 'dog'])
    assert label_map == {'background': 0, 'sofa': 1, 'dog': 2} and model.n_classes == 3
    with pytest.raises(UserError, match='triceratops'):
        coco_detector(['triceratops'])
