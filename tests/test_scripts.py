"""The scripts, as a user runs them: data set, training, resuming, evaluation, detection, and what goes wrong."""
import csv
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import root
from PIL import Image
from tiny import TinyDetector
from torch.utils.data import DataLoader

import create_data_lists
import detect
import eval as eval_script
import train
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from demo import shapes
from files import UserError, open_image
from model import SSD300, MultiBoxLoss
from utils import load_checkpoint, make_color_map, make_label_map, save_checkpoint

label_map = make_label_map(shapes)


# --------------------------------------------------------------------------------------------------------- Data set

def test_dataset_items(voc_folder):
    for split, n in (('TRAIN', 3), ('TEST', 2)):
        dataset = PascalVOCDataset(voc_folder, split)
        assert len(dataset) == n and dataset.label_map == label_map
        image, boxes, labels, difficulties = dataset[0]
        assert image.shape == (3, 300, 300) and image.dtype == torch.float32
        assert boxes.shape == (len(labels), 4) and boxes.dtype == torch.float32
        assert 0 <= boxes.min() and boxes.max() <= 1
        assert labels.dtype == torch.long and difficulties.dtype == torch.uint8 and len(difficulties) == len(labels)


def test_pictures_whose_objects_are_all_difficult_or_that_have_none(voc_folder, tmp_path):
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    objects = json.loads((tmp_path / 'TEST_objects.json').read_text())
    objects[0]['difficulties'] = [1] * len(objects[0]['labels'])
    objects[1] = {'boxes': [], 'labels': [], 'difficulties': []}
    for split in ('TRAIN', 'TEST'):
        (tmp_path / f'{split}_images.json').write_text((tmp_path / 'TEST_images.json').read_text())
        (tmp_path / f'{split}_objects.json').write_text(json.dumps(objects))
        hidden, kept = PascalVOCDataset(tmp_path, split), PascalVOCDataset(tmp_path, split, keep_difficult=True)
        assert hidden[0][1].shape == hidden[1][1].shape == kept[1][1].shape == (0, 4)
        assert kept[0][3].all() and len(kept[0][3]) > 0


def test_batches_do_not_depend_on_the_number_of_workers(voc_folder):
    dataset, batches = PascalVOCDataset(voc_folder, 'TRAIN'), []
    for workers in (0, 2):
        sampler = EpochSampler(len(dataset), seed=3)
        loader = DataLoader(dataset, 2, sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                            persistent_workers=workers > 0)
        epochs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            epochs.append([batch[0] for batch in loader])
        assert not torch.equal(epochs[0][0], epochs[1][0])
        batches.append(torch.cat(epochs[0] + epochs[1]))
    assert batches[0].shape == (6, 3, 300, 300) and torch.equal(*batches)


def test_sampler_visits_each_picture_once_in_a_new_order():
    sampler, orders = EpochSampler(50, seed=0), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([i for i, _ in sampler])
        assert sorted(orders[-1]) == list(range(50)) and list(sampler) == list(sampler)
    assert orders[0] != orders[1] != orders[2]


def test_a_picture_is_varied_anew_in_each_epoch(voc_folder):
    dataset, sampler, seen = PascalVOCDataset(voc_folder, 'TRAIN'), EpochSampler(3, seed=0), []
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        [seed] = [seed for i, seed in sampler if i == 1]
        seen.append(dataset[1, seed][0])
    assert torch.equal(seen[1], seen[3])
    assert not any(torch.equal(seen[i], seen[k]) for i, k in ((0, 1), (0, 2), (1, 2)))


# ---------------------------------------------------------------------------------------------- Training, resuming

def train_on(folder, path, epochs, workers=0, resume=False):
    """Train with the functions of train.py."""
    torch.manual_seed(0)
    model = SSD300.from_checkpoint(load_checkpoint(path)) if resume else SSD300(len(label_map), thin=16)
    optimizer = train.make_optimizer(model, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    if resume:
        optimizer.load_state_dict(load_checkpoint(path)['optimizer'])
    train.fit(model, optimizer, PascalVOCDataset(folder, 'TRAIN', keep_difficult=True), path, epochs, batch_size=2,
              start_epoch=int(resume), workers=workers, decay_lr_at=(1,), decay_lr_to=0.5, print_freq=1, grad_clip=10)


def test_interrupted_training_ends_in_the_same_weights(voc_folder, tmp_path, capsys):
    """Two epochs at once; and one, then, with other workers, another. Three pictures: the last batch is of one."""
    whole, parts = str(tmp_path / 'whole.pth'), str(tmp_path / 'parts.pth')
    train_on(voc_folder, whole, epochs=2, workers=2)
    train_on(voc_folder, parts, epochs=1)
    first = load_checkpoint(parts)
    train_on(voc_folder, parts, epochs=2, resume=True)
    expected, resumed = load_checkpoint(whole), load_checkpoint(parts)
    assert expected['epoch'] == resumed['epoch'] == 1
    assert all(torch.equal(expected['model'][key], resumed['model'][key]) for key in expected['model'])
    assert any(not torch.equal(expected['model'][key], first['model'][key]) for key in expected['model'])
    assert [group['lr'] for group in resumed['optimizer']['param_groups']] == [1e-4, 5e-5]  # biases learn twice as fast

    logs = []
    for path in (whole, parts):
        with open(path.replace('.pth', '.csv'), newline='') as file:
            logs.append([[row[key] for key in ('epoch', 'batch', 'loss', 'lr')] for row in csv.DictReader(file)])
    assert logs[0] == logs[1] and [row[:2] for row in logs[0]] == [['0', '1'], ['0', '2'], ['1', '1'], ['1', '2']]
    assert re.search(r'epoch 1  batch 2/2  loss [\d.]+ \(loc [\d.]+, conf [\d.]+\)  lr 5e-05  [\d.]+ images/s  '
                     r'data [\d.]+ s  left 0:00:00', capsys.readouterr().out)


def test_the_log_of_epochs_to_come_is_cut_off(tmp_path):
    path = str(tmp_path / 'c.csv')
    train.start_log(path, 0)
    with open(path, 'a', newline='') as file:
        csv.writer(file).writerows([[0, 1], [1, 1], [2, 1]])
    train.start_log(path, 2)
    with open(path, newline='') as file:
        assert [row[0] for row in csv.reader(file)] == ['epoch', '0', '1']
    train.start_log(path, 0)
    with open(path, newline='') as file:
        assert len(list(csv.reader(file))) == 1


def test_a_loss_that_is_no_number_stops_training(voc_folder, tmp_path):
    path = str(tmp_path / 'c.pth')
    model = SSD300(len(label_map), thin=16)
    optimizer = train.make_optimizer(model, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    save_checkpoint(path, 0, model, optimizer, label_map, seed=0)
    before = open(path, 'rb').read()
    model.pred_convs.loc_conv7.bias.data[0] = float('nan')
    with pytest.raises(UserError, match='the loss became nan in epoch 1'):
        train.fit(model, optimizer, PascalVOCDataset(voc_folder, 'TRAIN'), path, 2, 2, start_epoch=1)
    assert open(path, 'rb').read() == before


def test_main_trains_evaluates_and_refuses_other_labels(voc_folder, tmp_path, monkeypatch, capsys):
    settings = {'data_folder': voc_folder, 'checkpoint_path': str(tmp_path / 'c.pth'), 'pretrained': None, 'thin': 4,
                'epochs': 1, 'batch_size': 3, 'workers': 0}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    train.main()
    with pytest.raises(UserError, match='exists'):
        train.main()  # would overwrite it
    monkeypatch.setattr(train, 'checkpoint', settings['checkpoint_path'])
    for name, value in (('epochs', 2), ('lr', 1e-5), ('decay_lr_at', (0, 1))):  # changed between the epochs
        monkeypatch.setattr(train, name, value)
    train.main()
    saved = load_checkpoint(settings['checkpoint_path'])
    assert saved['epoch'] == 1 and len(saved['model']['base.conv1_1.bias']) == 16  # a quarter of 64
    assert [group['lr'] for group in saved['optimizer']['param_groups']] == pytest.approx([2e-7, 1e-7])

    for name, value in {'data_folder': voc_folder, 'checkpoint': settings['checkpoint_path'], 'workers': 0}.items():
        monkeypatch.setattr(eval_script, name, value)
    capsys.readouterr()
    eval_script.main()
    printed = capsys.readouterr().out
    assert re.search(r'circle +\d+ +(\d\.\d{3}|-)\n', printed) and re.search(r'mAP +\d+ +\d\.\d{3}\n', printed)
    assert re.search(r'2 pictures, [\d.]+ pictures/s', printed)

    other = tmp_path / 'other'
    shutil.copytree(voc_folder, other)
    (other / 'label_map.json').write_text(json.dumps(make_label_map(['cat', 'dog', 'cow'])))
    for script in (train, eval_script):
        monkeypatch.setattr(script, 'data_folder', str(other))
        with pytest.raises(UserError, match='dog'):
            script.main()
    monkeypatch.setattr(train, 'checkpoint', None)
    monkeypatch.setattr(train, 'checkpoint_path', str(tmp_path / 'new.pth'))
    monkeypatch.setattr(train, 'pretrained', 'vgg')
    with pytest.raises(UserError, match="pretrained = 'vgg'"):
        train.main()


def test_steps_of_the_optimizer_by_hand():
    """Stochastic gradient descent with momentum and weight decay; biases learn at twice the rate."""
    layer = torch.nn.Linear(1, 1)
    layer.weight.data.fill_(2.)
    layer.bias.data.fill_(3.)
    optimizer = train.make_optimizer(torch.nn.Sequential(layer), lr=0.1, momentum=0.5, weight_decay=0.01)
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.tensor([[1.]]), torch.tensor([1.])
        optimizer.step()
    first, second = 2 - 0.1 * (1 + 0.02), 3 - 0.2 * (1 + 0.03)
    assert layer.weight.item() == pytest.approx(first - 0.1 * (0.5 * 1.02 + 1 + 0.01 * first))
    assert layer.bias.item() == pytest.approx(second - 0.2 * (0.5 * 1.03 + 1 + 0.01 * second))


@pytest.mark.parametrize('thin', [4, 16])
def test_standardized_layers_have_mean_0_and_spread_1(thin):
    model, images = SSD300(len(label_map), thin=thin), torch.randn(4, 3, 300, 300)
    images[:2] += 3
    model.aux_convs.conv8_1.weight.data[0] = 0  # a channel that never changes
    heads = [layer.weight.clone() for layer in model.pred_convs.children()]
    train.standardize(model, images)
    outputs, layers = {}, dict(model.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda *args, name=name: outputs.update({name: args[2].clone()}))  # before ReLU
    with torch.no_grad():
        model(images)
    assert len(outputs) == 15 + 8 + 12
    for name, output in outputs.items():
        if not name.startswith('pred_convs'):
            spread, mean = torch.std_mean(output, dim=(0, 2, 3))
            changing = torch.arange(len(mean)) >= (name == 'aux_convs.conv8_1')
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(spread[changing], torch.ones_like(spread[changing]), atol=0.02, rtol=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for before, layer in zip(heads, model.pred_convs.children()):
        torch.testing.assert_close(layer.weight, 0.1 * before)


@pytest.mark.parametrize('keep_difficult, grad_clip, bfloat16, thin', [(True, None, None, 8), (False, 7., False, 4)])
def test_main_hands_its_parameters_on(voc_folder, tmp_path, monkeypatch, keep_difficult, grad_clip, bfloat16, thin):
    settings = {'data_folder': voc_folder, 'keep_difficult': keep_difficult, 'workers': 3, 'pretrained': None,
                'thin': thin, 'checkpoint_path': str(tmp_path / 'c.pth'), 'batch_size': 5, 'epochs': 17, 'lr': 0.02,
                'decay_lr_at': (3, 4), 'decay_lr_to': 0.3, 'momentum': 0.6, 'weight_decay': 0.01, 'seed': 9,
                'grad_clip': grad_clip, 'bfloat16': bfloat16, 'print_freq': 11}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    calls, plain_fit = [], train.fit
    monkeypatch.setattr(train, 'fit', lambda *args, **options: calls.append(
        inspect.signature(plain_fit).bind(*args, **options).arguments))
    train.main()
    [given] = calls
    train_set, model, optimizer = given.pop('train_set'), given.pop('model'), given.pop('optimizer')
    assert train_set.keep_difficult == keep_difficult and train_set.split == 'TRAIN' and len(train_set) == 3
    assert model.base.conv1_1.out_channels == 64 // thin
    assert [(g['lr'], g['momentum'], g['weight_decay']) for g in optimizer.param_groups] == [(0.04, 0.6, 0.01),
                                                                                          (0.02, 0.6, 0.01)]
    given |= given.pop('options')
    expected = {name: settings[name] for name in ('checkpoint_path', 'epochs', 'batch_size', 'workers', 'decay_lr_at',
                                                  'decay_lr_to', 'seed', 'grad_clip', 'bfloat16', 'print_freq')}
    assert given == expected | {'start_epoch': 0}
    torch.manual_seed(9)
    assert torch.equal(model.base.conv3_2.weight, SSD300(len(label_map), thin=thin).base.conv3_2.weight)


@pytest.mark.parametrize('bfloat16, expected', [(None, False), (False, False), (True, True)])
def test_on_a_cpu_numbers_have_16_bits_only_if_asked(voc_folder, bfloat16, expected):
    model, seen = TinyDetector(len(label_map)), []
    model.head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    loader = DataLoader(PascalVOCDataset(voc_folder, 'TRAIN'), 2, sampler=EpochSampler(3, 0), collate_fn=collate_fn)
    optimizer = train.make_optimizer(model, 1e-4, 0.9, 5e-4)
    train.train(loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 0, bfloat16=bfloat16)
    assert seen == [torch.bfloat16 if expected else torch.float32] * 2


def test_the_recipe_is_the_papers(voc_folder, tmp_path, monkeypatch):
    """A tenth of the learning rate after 80,000 of 120,000 iterations of 32 pictures, and again after 100,000."""
    rates = []
    monkeypatch.setattr(train, 'train', lambda *args, **_: rates.append(args[3].param_groups[-1]['lr']))
    monkeypatch.setattr(train, 'save_checkpoint', lambda *_: None)
    model = TinyDetector(len(label_map))
    optimizer = train.make_optimizer(model, train.lr, train.momentum, train.weight_decay)
    train.fit(model, optimizer, PascalVOCDataset(voc_folder, 'TRAIN'), str(tmp_path / 'c.pth'), train.epochs,
              train.batch_size, decay_lr_at=train.decay_lr_at, decay_lr_to=train.decay_lr_to)
    epochs = [iterations * 32 // 16551 for iterations in (80_000, 20_000, 20_000)]
    assert rates == pytest.approx([1e-3] * epochs[0] + [1e-4] * (epochs[1] + 1) + [1e-5] * (epochs[2] + 1))
    assert train.keep_difficult


@pytest.mark.parametrize('n_processes', [1, 2])
def test_numbers_of_the_log_by_hand(voc_folder, tmp_path, monkeypatch, n_processes):
    """On a clock that goes on 0.5 s as a picture is loaded, and 2 s in the network. Batches of 2 pictures and of 1."""
    now = [0.]
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(train, 'n_processes', lambda: n_processes)

    class Pictures(PascalVOCDataset):
        def __getitem__(self, i):
            now[0] += 0.5
            return super().__getitem__(i)

    class Model(TinyDetector):
        def forward(self, image):
            now[0] += 2
            return super().forward(image)

    model, log_path = Model(len(label_map)), str(tmp_path / 'c.csv')
    optimizer = train.make_optimizer(model, 1e-4, 0.9, 5e-4)
    loader = DataLoader(Pictures(voc_folder, 'TRAIN'), 2, sampler=EpochSampler(3, 0), collate_fn=collate_fn)
    train.start_log(log_path, 0)
    train.train(loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 4, epochs=7, print_freq=1, log_path=log_path)
    with open(log_path, newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    for row, batch, n_pictures, seconds, left in zip(rows, (1, 2), (2, 1), (3, 2.5), (5 * 3, 4 * 2.5), strict=True):
        assert row['epoch'] == 4 and row['batch'] == batch and row['lr'] == 1e-4 and row['left_s'] == left
        assert row['loss'] == pytest.approx(row['loc_loss'] + row['conf_loss']) and row['loc_loss'] > 0
        assert row['images_per_s'] == pytest.approx(n_pictures * n_processes / seconds)
        assert row['data_s'] == pytest.approx(0.5 * n_pictures)


# ------------------------------------------------------------------------------------------------------ Evaluation

class FindsEverything(TinyDetector):
    """Detects a square in the middle of each picture; keeps how it was asked."""

    asked = None

    def detect_objects(self, locs, scores, *how):
        self.asked = how
        n = len(locs)
        return [torch.tensor([[.25, .25, .75, .75]])] * n, [torch.tensor([2])] * n, [torch.tensor([0.9])] * n


def test_evaluation_asks_as_pascal_voc_does(voc_folder):
    model = FindsEverything(len(label_map)).train()
    eval_script.evaluate(DataLoader(PascalVOCDataset(voc_folder, 'TEST', True), 2, collate_fn=collate_fn), model)
    assert model.asked == (0.01, 0.45, 200) and not model.training


def test_detections_of_difficult_objects_are_no_false_alarms_in_eval(voc_folder, tmp_path, monkeypatch, capsys):
    """The first picture's object is difficult; were it left out, its detection would halve the precision."""
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
    assert re.search(r'square +1 +1\.000\n', capsys.readouterr().out)


def test_scripts_read_what_the_one_before_wrote():
    assert create_data_lists.output_folder == train.data_folder == eval_script.data_folder
    assert train.checkpoint_path == eval_script.checkpoint


@pytest.mark.filterwarnings('error:.*pin_memory')
def test_eval_runs_with_its_own_parameters(voc_folder, monkeypatch, capsys):
    """In a folder with lists, and with a stand-in for the checkpoint."""
    monkeypatch.chdir(voc_folder)
    monkeypatch.setattr(eval_script, 'load_detector', lambda *_: (TinyDetector(len(label_map)), label_map))
    eval_script.main()
    assert '2 pictures' in capsys.readouterr().out


def test_only_the_first_process_prints_an_evaluation(voc_folder, monkeypatch, capsys):
    model, dataset = TinyDetector(len(label_map)), PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    monkeypatch.setattr(eval_script, 'process_number', lambda: 1)
    eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), model)
    assert capsys.readouterr() == ('', '')


# ------------------------------------------------------------------------------------------------------- Detection

@pytest.fixture
def pictures(voc_folder, tmp_path):
    """Lists whose test pictures have many modes and shapes; the folder."""
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


def test_eval_and_detect_find_the_same(pictures, monkeypatch):
    """The same input to the last bit, the same precision, the same detections."""
    inputs, settings, found = [], [], []

    class Model(TinyDetector):
        def forward(self, image):
            inputs.append(image.clone())
            settings.append((torch.is_autocast_enabled('cpu'), torch.backends.cudnn.allow_tf32,
                             torch.backends.cudnn.benchmark))
            return super().forward(image)

    monkeypatch.setattr(eval_script, 'fast_in_bfloat16', lambda _: True, raising=False)  # as on a new GPU
    monkeypatch.setattr(eval_script, 'calculate_mAP', lambda *lists: (found.extend(lists[:3]), ({}, 0.))[1])
    before = [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]
    model, dataset = Model(len(label_map)), PascalVOCDataset(pictures, 'TEST')
    eval_script.evaluate(DataLoader(dataset, collate_fn=collate_fn), model, min_score=0.5, top_k=50)
    assert len(inputs) == len(dataset) == 30
    n_found = 0
    for path, boxes, labels, scores in zip(dataset.images, *found):
        image = open_image(path)
        [detections] = detect.find_objects([image], 0.5, 0.45, 50, model, label_map)
        assert [label_map[label] for label, _, _ in detections] == [label for label in labels.tolist() if label > 0]
        assert [score for _, score, _ in detections] == scores[labels > 0].tolist()
        pixels = (boxes[labels > 0].clamp(0, 1) * torch.tensor([image.width, image.height] * 2)).round().tolist()
        assert [box for _, _, box in detections] == pixels
        n_found += len(detections)
    assert n_found > 100
    assert all(map(torch.equal, inputs[:30], inputs[30:]))
    assert set(settings) == {(False, False, False)}
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


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint whose model finds a square at one place in every picture, whatever it shows."""
    model = SSD300(len(label_map), thin=8)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.zeros_(layer.weight)
    for name, layer in model.pred_convs.named_children():
        if name.startswith('cl_'):
            layer.bias.data.view(-1, len(label_map))[:, 0] = 20
    model.pred_convs.cl_conv11_2.bias.data[label_map['square']] = 25  # the last map's first prior: the middle, 0.9 wide
    path = str(tmp_path_factory.mktemp('checkpoint') / 'c.pth')
    save_checkpoint(path, 0, model, torch.optim.SGD(model.parameters(), lr=1), label_map, seed=0)
    return path


def run_detect(monkeypatch, checkpoint, output_folder, *paths):
    for name, value in {'checkpoint': checkpoint, 'output_folder': str(output_folder)}.items():
        monkeypatch.setattr(detect, name, value)
    monkeypatch.setattr(sys, 'argv', ['detect.py', *map(str, paths)])
    detect.main()


def test_detect_files_and_folders(checkpoint, tmp_path, monkeypatch, capsys):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        Image.new('RGB', (200, 100), 'white').save(tmp_path / folder / 'x.png')
    Image.new('CMYK', (60, 90)).save(tmp_path / 'b' / 'y.tif')
    (tmp_path / 'b' / 'notes.txt').write_text('no picture, and not asked for')
    before = (tmp_path / 'a' / 'x.png').read_bytes()
    run_detect(monkeypatch, checkpoint, tmp_path / 'out', tmp_path / 'a' / 'x.png', tmp_path / 'b')
    assert sorted(os.listdir(tmp_path / 'out')) == ['x-2.png', 'x.png', 'y.tif.png']
    assert Image.open(tmp_path / 'out' / 'x.png').size == (200, 100)
    assert (tmp_path / 'a' / 'x.png').read_bytes() == before
    assert re.search(r'square +0\.99  x 10-190, y 5-95', capsys.readouterr().out)

    run_detect(monkeypatch, checkpoint, tmp_path / 'a', tmp_path / 'a')  # into the folder itself
    assert (tmp_path / 'a' / 'x.png').read_bytes() == before and (tmp_path / 'a' / 'x-2.png').exists()


def test_detect_goes_on_after_a_file_that_is_no_picture(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.jpg').write_text('no picture')
    Image.effect_noise((64, 64), 50).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:800])
    with pytest.raises(UserError, match='3 of 4'):
        paths = (tmp_path / f'{name}.jpg' for name in ('text', 'cut', 'none', 'whole'))
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', *paths)
    assert os.listdir(tmp_path / 'out') == ['whole.jpg']
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(f'{n}.jpg' in line for n, line in zip(('text', 'cut', 'none'), errors))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty has no pictures'):
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', tmp_path / 'empty')


@pytest.mark.parametrize('suffix, options', [('gif', {'loop': 0}), ('webp', {}), ('png', {'loop': 3})])
def test_moving_pictures_come_back_moving(checkpoint, tmp_path, monkeypatch, suffix, options):
    frames, durations = [], [40, 100, 250, 70, 90]
    for i in range(5):
        frames.append(Image.new('RGB', (200, 100), 'white'))
        frames[-1].paste('blue', (60 + 20 * i, 40, 80 + 20 * i, 60))
    path = tmp_path / f'moving.{suffix}'
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
    monkeypatch.setattr(detect, 'batch_size', 2)
    run_detect(monkeypatch, checkpoint, tmp_path / 'out', path)
    with Image.open(path) as before, Image.open(tmp_path / 'out' / path.name) as after:
        assert after.n_frames == 5 and after.size == (200, 100) and before.info.get('loop') == after.info.get('loop')
        for i in range(5):
            after.seek(i)
            pixels = after.convert('RGB')
            assert after.info['duration'] == durations[i]
            red, green, blue = pixels.getpixel((70 + 20 * i, 50))
            assert blue > 150 and red < 100 and green < 100  # the picture of this frame ...
            assert min(pixels.getpixel((10, 70))) < 200  # ... with the box's left edge


def test_more_frames_than_memory_holds_are_refused(tmp_path):
    frames = [Image.new('1', (6000, 6000), i % 2) for i in range(6)]  # of which RGB would take 650 MB
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match='a.gif is not .* 6 frames of 6000x6000 are too many'):
        detect.read_frames(str(tmp_path / 'a.gif'))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'])
def test_detect_takes_any_mode_and_leaves_the_picture_alone(checkpoint, monkeypatch, mode):
    monkeypatch.setattr(detect, 'checkpoint', checkpoint)
    image = Image.new(mode, (120, 80))
    before = image.tobytes()
    annotated = detect.detect(image, min_score=0.5, max_overlap=0.5, top_k=10)
    assert annotated.mode == 'RGB' and annotated.size == (120, 80) and annotated is not image
    assert image.mode == mode and image.tobytes() == before
    assert annotated.tobytes() != detect.detect(image, 0.5, 0.5, 10, suppress=['square']).tobytes()
    unmarked = detect.detect(image, min_score=0.9999, max_overlap=0.5, top_k=10)
    assert unmarked.tobytes() == detect.to_rgb(image).tobytes()


def test_detect_honors_exif_orientation(checkpoint, monkeypatch):
    monkeypatch.setattr(detect, 'checkpoint', checkpoint)
    image = Image.new('RGB', (120, 80))
    image.getexif()[0x0112] = 6
    assert detect.detect(image, 0.5, 0.5, 10).size == (80, 120)
    assert image.size == (120, 80) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize('size', [(30, 20), (300, 200), (4000, 3000)])
def test_labels_stay_inside_the_picture(monkeypatch, size):
    """Boxes in the corners and beyond: each label is drawn whole, and scales with the picture."""
    drawn = []
    plain = detect.ImageDraw.ImageDraw.text
    monkeypatch.setattr(detect.ImageDraw.ImageDraw, 'text',
                        lambda self, xy, text, **options: (drawn.append(self.textbbox(xy, text, options['font'])),
                                                           plain(self, xy, text, **options)))
    w, h = size
    corners = [(0, 0, w // 4, h // 4), (w - w // 4, 0, w, h // 4), (0, h - h // 4, w // 4, h), (w - 2, h - 2, w, h),
               (0, 0, w, h)]
    detect.draw_objects(Image.new('RGB', size), [('square', 0.9, box) for box in corners], label_map)
    assert len(drawn) == 5
    for x_min, y_min, x_max, y_max in drawn:
        assert x_min >= 0 and y_min >= 0 and y_max <= h and (x_max <= w or w < 100)
        assert y_max - y_min >= min(h / 50, 5)


def test_text_is_readable_on_every_label_color():
    """The text is black or white, whichever differs more from the label's color."""
    many = make_label_map([f'class{i}' for i in range(80)])
    for label in list(many)[1:]:
        background = Image.new('RGB', (400, 300), make_color_map(many)[label])
        image = detect.draw_objects(background, [(label, 0.5, (0, 100, 300, 280))], many)
        band = image.crop((4, 80, 60, 98)).convert('L')
        assert band.getextrema()[1] - band.getextrema()[0] > 90


# ----------------------------------------------------------------------------------------------- What users run into

@pytest.mark.parametrize('command, remedy', [
    (['create_data_lists.py'], 'download = True'), (['train.py'], 'python create_data_lists.py'),
    (['eval.py'], 'python create_data_lists.py'), (['detect.py', 'x.jpg'], 'check the path')])
def test_without_data_scripts_end_in_one_line(tmp_path, command, remedy):
    result = subprocess.run([sys.executable, os.path.join(root, command[0]), *command[1:]], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1 and remedy in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_broken_picture_is_named_even_by_a_worker(voc_folder, tmp_path):
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'broken.jpg').write_text('no picture')
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps([str(tmp_path / 'broken.jpg')] * 3))
    program = ('import torch, train\nfrom files import run\n'
               'train.data_folder, train.checkpoint_path, train.pretrained, train.workers = ".", "c.pth", None, 1\n'
               'if __name__ == "__main__":\n    run(train.main)')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root})
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert result.stderr.startswith(f'Error: {tmp_path / "broken.jpg"} is not a picture')


def test_importing_touches_nothing(tmp_path):
    modules = ', '.join(name[:-3] for name in sorted(os.listdir(root)) if name.endswith('.py'))
    assert modules.count(',') >= 9
    program = ('import socket, torch\n'
               'torch.load = torch.cuda.is_available = torch.cuda.init = socket.socket = None\n'
               f'import {modules}\nprint(torch.cuda.is_initialized())')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root, 'PYTHONDONTWRITEBYTECODE': '1'})
    assert result.stdout == 'False\n' and result.stderr == '' and os.listdir(tmp_path) == []
