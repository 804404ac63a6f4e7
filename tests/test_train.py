"""Training, and going on with it; and nothing that a user, a disk or a data set does loses what was learned."""
import csv
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import copy_lists, kept_checkpoint, no_gpu, root
from kill_loop import runs, workers_of
from PIL import Image
from tiny import SpoiledImages, TinyDetector
from torch.utils.data import DataLoader

import checkpoints
import eval as eval_script
import train
from checkpoints import load_checkpoint, load_detector, save_checkpoint
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from demo import shapes
from errors import UserError
from model import SSD300, MultiBoxLoss
from utils import make_label_map

# ------------------------------------------------------------------------------------------------------------- Training

label_map = make_label_map(shapes)


def train_on(folder, path, epochs, workers=0, resume=False):
    """Train with the functions of train.py."""
    torch.manual_seed(0)
    model = load_detector(path)[0] if resume else SSD300(len(label_map), thin=16)
    optimizer = train.make_optimizer(model, 'sgd', lr=1e-4, weight_decay=5e-4)
    if resume:
        train.restore(optimizer, load_checkpoint(path))
    train.fit(model, optimizer, PascalVOCDataset(folder, 'TRAIN', keep_difficult=True), path, epochs, batch_size=2,
              start_epoch=int(resume), workers=workers, decay_lr_at=(1,), decay_lr_to=0.5, print_freq=1, grad_clip=10)


def test_interrupted_training_ends_in_the_same_weights(voc_folder, tmp_path, capsys):
    """Two epochs at once; and one, then, with other workers, another. Three images: the last batch is of one."""
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


@pytest.mark.parametrize('print_freq, batches', [(1, [1, 2, 3]), (2, [2, 3]), (10, [3])])
def test_the_log_has_a_line_every_so_many_batches_and_for_the_last(voc_folder, tmp_path, capsys, print_freq, batches):
    model = TinyDetector(len(label_map))
    train.fit(model, train.make_optimizer(model, 'sgd', 1e-4, 5e-4), PascalVOCDataset(voc_folder, 'TRAIN'),
              str(tmp_path / 'c.pth'), 1, batch_size=1, print_freq=print_freq)
    with open(tmp_path / 'c.csv', newline='') as file:
        assert [int(row['batch']) for row in csv.DictReader(file)] == batches
    assert [int(batch) for batch in re.findall(r'batch (\d)/3', capsys.readouterr().out)] == batches


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


def test_main_trains_evaluates_and_refuses_other_labels(voc_folder, tmp_path, monkeypatch, capsys):
    settings = {'data_folder': voc_folder, 'checkpoint_path': str(tmp_path / 'c.pth'), 'pretrained': None, 'thin': 4,
                'epochs': 1, 'batch_size': 3, 'workers': 0, 'warm_up': 0}
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
    assert re.search(r'2 images, [\d.]+ images/s', printed)

    other = tmp_path / 'other'
    shutil.copytree(voc_folder, other)
    (other / 'label_map.json').write_text(json.dumps(make_label_map(['cat', 'dog', 'cow'])))
    for script in (train, eval_script):
        monkeypatch.setattr(script, 'data_folder', str(other))
        with pytest.raises(UserError, match=r"\['circle', 'square', 'triangle'\].*\['cat', 'dog', 'cow'\]"):
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
    optimizer = train.make_optimizer(torch.nn.Sequential(layer), 'sgd', lr=0.1, weight_decay=0.01, momentum=0.5)
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.tensor([[1.]]), torch.tensor([1.])
        optimizer.step()
    first, second = 2 - 0.1 * (1 + 0.02), 3 - 0.2 * (1 + 0.03)
    assert layer.weight.item() == pytest.approx(first - 0.1 * (0.5 * 1.02 + 1 + 0.01 * first))
    assert layer.bias.item() == pytest.approx(second - 0.2 * (0.5 * 1.03 + 1 + 0.01 * second))


@pytest.mark.parametrize('warm_up, expected', [(0, [1, 1, 1, .1, .1, .1, .01, .01, .01]),
                                               (2, [.5, 1, 1, .1, .1, .1, .01, .01, .01]),
                                               (5, [.2, .4, .6, .08, .1, .1, .01, .01, .01])])
def test_learning_rates_of_warm_up_and_decay_by_hand(voc_folder, tmp_path, warm_up, expected):
    """Three steps in each of three epochs; the rates of biases are twice the others'."""
    rates, model = [], TinyDetector(len(label_map))
    optimizer = train.make_optimizer(model, 'sgd', 1e-4, 5e-4)
    optimizer.register_step_post_hook(lambda *_: rates.append([group['lr'] for group in optimizer.param_groups]))
    train.fit(model, optimizer, PascalVOCDataset(voc_folder, 'TRAIN'), str(tmp_path / 'c.pth'), 3, batch_size=1,
              warm_up=warm_up, decay_lr_at=(1, 2), decay_lr_to=.1)
    assert torch.tensor(rates) == pytest.approx(torch.tensor([[2e-4 * factor, 1e-4 * factor] for factor in expected]))


@pytest.mark.parametrize('keep_difficult, grad_clip, bfloat16, thin, evaluate_every', [
    (True, None, True, 8, 0), (False, 7., False, 4, 2)])
def test_main_hands_its_parameters_on(voc_folder, tmp_path, monkeypatch, keep_difficult, grad_clip, bfloat16, thin,
                                      evaluate_every):
    settings = {'data_folder': voc_folder, 'keep_difficult': keep_difficult, 'workers': 3, 'pretrained': None,
                'thin': thin, 'checkpoint_path': str(tmp_path / 'c.pth'), 'batch_size': 5, 'epochs': 17, 'lr': 0.02,
                'decay_lr_at': (3, 4), 'decay_lr_to': 0.3, 'momentum': 0.6, 'weight_decay': 0.01, 'seed': 9,
                'grad_clip': grad_clip, 'bfloat16': bfloat16, 'print_freq': 11, 'warm_up': 13,
                'evaluate_every': evaluate_every, 'min_negatives': 7}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    calls, plain_fit = [], train.fit
    monkeypatch.setattr(train, 'fit', lambda *args, **options: calls.append(
        inspect.signature(plain_fit).bind(*args, **options).arguments))
    monkeypatch.setattr(train, 'standardize', lambda *_: None)  # then the weights are those of the seed
    train.main()
    [given] = calls
    train_set, model, optimizer = given.pop('train_set'), given.pop('model'), given.pop('optimizer')
    assert train_set.keep_difficult == keep_difficult and train_set.split == 'TRAIN' and len(train_set) == 3
    assert model.base.conv1_1.out_channels == 64 // thin
    assert [(g['lr'], g['momentum'], g['weight_decay']) for g in optimizer.param_groups] == [(0.04, 0.6, 0.01),
                                                                                          (0.02, 0.6, 0.01)]
    test_set = given.pop('test_set')
    if evaluate_every:  # detections of difficult objects are ignored, so these must be known
        assert test_set.split == 'TEST' and test_set.keep_difficult and len(test_set) == 2
    else:
        assert test_set is None
    given |= given.pop('options')
    expected = {name: settings[name] for name in ('checkpoint_path', 'epochs', 'batch_size', 'workers', 'decay_lr_at',
                                                  'decay_lr_to', 'seed', 'grad_clip', 'bfloat16', 'print_freq',
                                                  'warm_up', 'evaluate_every', 'min_negatives')}
    assert given == expected | {'start_epoch': 0, 'rise_and_fall': False}
    torch.manual_seed(9)
    assert torch.equal(model.base.conv3_2.weight, SSD300(len(label_map), thin=thin).base.conv3_2.weight)


def test_fit_hands_min_negatives_to_the_loss(voc_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, 'train', lambda loader, network, criterion, *_, **__: given.append(criterion))
    model = TinyDetector(len(label_map))
    optimizer = train.make_optimizer(model, 'sgd', 1e-4, 5e-4)
    train_set = PascalVOCDataset(voc_folder, 'TRAIN')
    for options in ({}, {'min_negatives': 30}):
        train.fit(model, optimizer, train_set, str(tmp_path / 'c.pth'), 1, batch_size=1, **options)
    assert [criterion.min_negatives for criterion in given] == [0, 30]


@pytest.mark.parametrize('bfloat16', [False, True])
def test_numbers_have_16_bits_only_if_asked(voc_folder, bfloat16):
    model, seen = TinyDetector(len(label_map)), []
    model.head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    loader = DataLoader(PascalVOCDataset(voc_folder, 'TRAIN'), 2, sampler=EpochSampler(3, 0), collate_fn=collate_fn)
    optimizer = train.make_optimizer(model, 'sgd', 1e-4, 5e-4)
    train.train(loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 0, bfloat16=bfloat16)
    assert seen == [torch.bfloat16 if bfloat16 else torch.float32] * 2


def test_the_recipe_is_the_papers(voc_folder, tmp_path, monkeypatch):
    """A tenth of the learning rate after 80,000 of 120,000 iterations of 32 images, and again after 100,000."""
    rates = []

    def take_a_step(_, __, ___, optimizer, *____, schedule, **_____):
        optimizer.step()
        rates.append(optimizer.param_groups[-1]['lr'])
        schedule.step()
    monkeypatch.setattr(train, 'train', take_a_step)
    monkeypatch.setattr(train, 'save_checkpoint', lambda *_: None)
    model = TinyDetector(len(label_map))
    optimizer = train.make_optimizer(model, 'sgd', train.lr, train.weight_decay, train.momentum)
    train.fit(model, optimizer, PascalVOCDataset(voc_folder, 'TRAIN'), str(tmp_path / 'c.pth'), train.epochs,
              train.batch_size, decay_lr_at=train.decay_lr_at, decay_lr_to=train.decay_lr_to)
    epochs = [iterations * 32 // 16551 for iterations in (80_000, 20_000, 20_000)]
    assert rates == pytest.approx([1e-3] * epochs[0] + [1e-4] * (epochs[1] + 1) + [1e-5] * (epochs[2] + 1))
    assert train.keep_difficult and train.optimizer_kind == 'sgd' and train.warm_up == 500


def test_workers_stay_for_the_next_epoch(voc_folder, tmp_path, monkeypatch):
    loaders = []
    monkeypatch.setattr(train, 'train', lambda loader, *_, **__: loaders.append(loader))
    monkeypatch.setattr(train, 'save_checkpoint', lambda *_: None)
    for workers in (0, 1, 2):
        model = TinyDetector(len(label_map))
        train.fit(model, train.make_optimizer(model, 'sgd', 1e-4, 5e-4), PascalVOCDataset(voc_folder, 'TRAIN'),
                  str(tmp_path / 'c.pth'), 1, 2, workers=workers)
    assert [(loader.num_workers, loader.persistent_workers) for loader in loaders] == [(0, False), (1, True), (2, True)]


@pytest.mark.parametrize('n_processes', [1, 2])
def test_numbers_of_the_log_by_hand(voc_folder, tmp_path, monkeypatch, n_processes):
    """On a clock that goes on 0.5 s as an image is loaded, and 2 s in the network. Batches of 2 images and of 1."""
    now = [0.]
    monkeypatch.setattr(train, 'time', SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(train, 'get_world_size', lambda: n_processes)

    class Images(PascalVOCDataset):
        def __getitem__(self, i):
            now[0] += 0.5
            return super().__getitem__(i)

    class Model(TinyDetector):
        def forward(self, image):
            now[0] += 2
            return super().forward(image)

    model, log_path = Model(len(label_map)), str(tmp_path / 'c.csv')
    optimizer = train.make_optimizer(model, 'sgd', 1e-4, 5e-4)
    loader = DataLoader(Images(voc_folder, 'TRAIN'), 2, sampler=EpochSampler(3, 0), collate_fn=collate_fn)
    train.start_log(log_path, 0)
    train.train(loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 4, epochs=7, print_freq=1, log_path=log_path)
    with open(log_path, newline='') as file:
        rows = [{name: float(value) for name, value in row.items() if name != 'mAP'} for row in csv.DictReader(file)]
    for row, batch, n_images, seconds, left in zip(rows, (1, 2), (2, 1), (3, 2.5), (5 * 3, 4 * 2.5), strict=True):
        assert row['epoch'] == 4 and row['batch'] == batch and row['lr'] == 1e-4 and row['left_s'] == left
        assert row['loss'] == pytest.approx(row['loc_loss'] + row['conf_loss']) and row['loc_loss'] > 0
        assert row['images_per_s'] == pytest.approx(n_images * n_processes / seconds)
        assert row['data_s'] == pytest.approx(0.5 * n_images)

    train.train(loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 4, print_freq=9, log_path=log_path)
    with open(log_path, newline='') as file:
        assert float(list(csv.DictReader(file))[-1]['data_s']) == pytest.approx(0.75)  # of batches of 2 and of 1


@pytest.mark.parametrize('max_norm', [0.1, 100.])
def test_clipping_shortens_the_gradient_to_at_most_its_limit(folder, max_norm):
    steps = []
    for grad_clip in (None, max_norm):
        torch.manual_seed(0)
        model = TinyDetector(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.)
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        train_loader = DataLoader(PascalVOCDataset(folder, 'TRAIN'), 4, sampler=EpochSampler(4, seed=0),
                                  collate_fn=collate_fn)
        train.train(train_loader, model, MultiBoxLoss(model.priors_cxcy), optimizer, 0, grad_clip=grad_clip)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    length = steps[0].norm()
    assert 0.3 < length < 50
    torch.testing.assert_close(steps[1], steps[0] * min(1, max_norm / length), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('batch_size, n_batches', [(1, 40), (32, 2), (13, 4)])  # the last: three batches, and one of 1
def test_batch_sizes(folder, tmp_path, capsys, batch_size, n_batches):
    path = str(tmp_path / 'c.pth')
    model = TinyDetector(4)
    train.fit(model, train.make_optimizer(model, 'sgd', 1e-4, 5e-4), PascalVOCDataset(folder, 'TRAIN', True), path, 1,
              batch_size, print_freq=1)
    assert capsys.readouterr().out.count('\n') == n_batches
    assert all(values.isfinite().all() for values in load_checkpoint(path)['model'].values())


# -------------------------------------------------------------------------------------------- Losses that are no number

def test_a_loss_that_is_no_number_stops_training(voc_folder, tmp_path):
    path = str(tmp_path / 'c.pth')
    model = SSD300(len(label_map), thin=16)
    optimizer = train.make_optimizer(model, 'sgd', lr=1e-4, weight_decay=5e-4)
    save_checkpoint(path, 0, model, optimizer, label_map, seed=0)
    before = open(path, 'rb').read()
    model.pred_convs.loc_conv7.bias.data[0] = float('nan')
    with pytest.raises(UserError, match=r'became infinite or NaN in epoch 1, batch 1 \(loss nan\)'):
        train.fit(model, optimizer, PascalVOCDataset(voc_folder, 'TRAIN'), path, 2, 2, start_epoch=1)
    assert open(path, 'rb').read() == before


def copies(optimizer):
    """Of the weights, and of what the optimizer remembers of each."""
    weights = {id(p): p for group in optimizer.param_groups for p in group['params']}
    memories = {(id(p), name): values for p, state in optimizer.state.items() for name, values in state.items()}
    return {key: tensor.detach().clone() for key, tensor in (weights | memories).items() if tensor is not None}


def spoil(monkeypatch, how, n):
    """Make the loss or the gradient of the n-th batch infinite."""
    plain, count = MultiBoxLoss.losses, []

    def parts(self, predicted_locs, *args):
        count.append(1)
        loc_loss, conf_loss = plain(self, predicted_locs, *args)
        if len(count) == n:
            if how == 'loss':  # its gradient is finite
                loc_loss = loc_loss + float('inf')
            else:
                predicted_locs.register_hook(lambda gradient: gradient * float('inf'))
        return loc_loss, conf_loss
    monkeypatch.setattr(MultiBoxLoss, 'losses', parts)


optimizers = {'train.py': lambda model: train.make_optimizer(model, 'sgd', 1e-3, 5e-4),
              'fused SGD': lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True),
              'AdamW': lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
              'Adagrad': lambda model: torch.optim.Adagrad(model.parameters(), 1e-3)}


@pytest.mark.parametrize('how, grad_clip, kind', [
    ('nan', None, 'train.py'), ('inf', 5., 'AdamW'), ('1e38', None, 'fused SGD'), ('loss', 5., 'train.py'),
    ('loss', None, 'Adagrad'), ('gradient', None, 'AdamW'), ('gradient', 5., 'train.py')])
def test_no_step_is_taken_with_a_loss_that_is_no_number(folder, tmp_path, monkeypatch, how, grad_clip, kind):
    """Two batches are fine, the third is not."""
    path = str(tmp_path / 'c.pth')
    dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    sampler = EpochSampler(40, seed=0)
    sampler.set_epoch(1)
    in_third_batch = [index for index, _ in sampler][9]
    if how in ('nan', 'inf', '1e38'):
        dataset = SpoiledImages(dataset, in_third_batch, float(how))
    else:
        spoil(monkeypatch, how, 3)
    model = TinyDetector(4)
    optimizer = optimizers[kind](model)
    save_checkpoint(path, 0, model, optimizer, dataset.label_map, seed=0)
    with open(path, 'rb') as file:
        checkpoint = file.read()
    after = []  # each step
    optimizer.register_step_post_hook(lambda *_: after.append(copies(optimizer)))
    with pytest.raises(UserError) as error:
        train.fit(model, optimizer, dataset, path, 2, batch_size=4, start_epoch=1, grad_clip=grad_clip)
    loss = {'nan': 'nan', 'gradient': r'\d+\.\d+', 'loss': 'inf'}.get(how, 'nan|inf')
    assert re.match(fr'the loss or the gradient became infinite or NaN in epoch 1, batch 3 \(loss ({loss})\)\. ',
                    str(error.value)) and '\n' not in str(error.value)

    assert len(after) == 2
    now = copies(optimizer)
    assert len(now) >= 4 and all(torch.equal(now[key], after[1][key]) for key in now)
    assert all(tensor.isfinite().all() for tensor in now.values())
    assert not any(torch.equal(after[0][key], after[1][key]) for key in now)
    with open(path, 'rb') as file:
        assert file.read() == checkpoint


# ------------------------------------------------------------------------------------------------------------- Going on

common_settings = {'pretrained': None, 'batch_size': 4, 'workers': 0, 'print_freq': 1, 'lr': 1e-5,
                   'checkpoint_path': 'c.pth'}


def train_here(monkeypatch, folder, **settings):
    """Run train.py's main with a tiny network, in a folder with lists."""
    monkeypatch.chdir(folder)
    for module in (train, checkpoints):
        monkeypatch.setattr(module, 'SSD300', TinyDetector)
    for name, value in {**common_settings, **settings}.items():
        monkeypatch.setattr(train, name, value)
    train.main()


def test_training_does_not_keep_the_checkpoint_it_went_on_from(folder, tmp_path, monkeypatch):
    """When training begins, the model's weights are the only ones."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    loaded, seen = [], []

    def load(*args):
        saved = load_checkpoint(*args)
        loaded.extend(weakref.ref(tensor) for tensor in saved['model'].values())
        return saved

    def fit(model, optimizer, *_, **__):
        seen.append([ref() is None for ref in loaded])
        assert all(optimizer.state[p]['momentum_buffer'].any() for p in model.parameters())
    monkeypatch.setattr(train, 'load_checkpoint', load)
    monkeypatch.setattr(train, 'fit', fit)
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert seen == [[True] * 5]  # weights and biases of two layers, and the priors


def test_training_does_not_overwrite_another_checkpoint(folder, tmp_path, monkeypatch):
    for name in ('mine.pth', 'another.pth'):
        shutil.copy(kept_checkpoint, tmp_path / name)
    for name, value in (('data_folder', folder), ('checkpoint', str(tmp_path / 'mine.pth')),
                        ('checkpoint_path', str(tmp_path / 'another.pth'))):
        monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match='another.pth exists'):
        train.main()


def test_a_checkpoint_of_another_optimizer_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    with pytest.raises(UserError, match="trained with SGD, whose state does not fit AdamW: set optimizer_kind = 'sgd'"):
        train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth', optimizer_kind='adamw')


def test_going_on_keeps_the_first_seed(folder, tmp_path, monkeypatch):
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1, seed=5)
    train_here(monkeypatch, tmp_path, epochs=2, seed=6, checkpoint='c.pth')
    assert load_checkpoint(tmp_path / 'c.pth')['seed'] == 5


@pytest.mark.parametrize('epochs_before', [1, 2])
def test_going_on_inside_the_warm_up_and_after_it(folder, tmp_path, monkeypatch, epochs_before):
    """Warm-up takes 15 steps, an epoch 10. Learning rates and weights are those of an uninterrupted training."""
    copy_lists(folder, tmp_path)
    settings = {'warm_up': 15, 'lr': 1e-3, 'decay_lr_at': (2,)}
    train_here(monkeypatch, tmp_path, **settings, epochs=3, checkpoint_path='whole.pth')
    train_here(monkeypatch, tmp_path, **settings, epochs=epochs_before)
    train_here(monkeypatch, tmp_path, **settings, epochs=3, checkpoint='c.pth')
    whole, resumed = load_checkpoint('whole.pth')['model'], load_checkpoint('c.pth')['model']
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    rates = []
    for name in ('whole.csv', 'c.csv'):
        with open(name, newline='') as file:
            rates.append([float(row['lr']) for row in csv.DictReader(file)])
    expected = [1e-3 * (step + 1) / 15 for step in range(15)] + [1e-3] * 5 + [1e-4] * 10
    assert rates[0] == rates[1] == pytest.approx(expected)


def test_a_network_that_cannot_be_so_thin_is_named(folder, tmp_path, monkeypatch):
    copy_lists(folder, tmp_path)
    with pytest.raises(UserError, match='thin = 3 in train.py: set it to one of'):
        train_here(monkeypatch, tmp_path, thin=3)


def test_a_training_that_is_finished_says_so(folder, tmp_path, monkeypatch):
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    with pytest.raises(UserError, match='c.pth has been trained for all 1 epochs: raise epochs'):
        train_here(monkeypatch, tmp_path, epochs=1, checkpoint='c.pth')


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    """As on Windows, where a spreadsheet program has it open."""
    train.write_log(str(tmp_path), **dict.fromkeys(train.log_columns, 1))
    assert capsys.readouterr().err.startswith(f'A line could not be written to the log {tmp_path}: ')


def test_training_goes_on_with_other_images(folder, tmp_path, monkeypatch, capsys):
    """Of 40 images, 33 are left."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    for name in ('TRAIN_images.json', 'TRAIN_objects.json'):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text())[7:]))
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert 'epoch 1  batch 9/9' in capsys.readouterr().out
    assert load_checkpoint(tmp_path / 'c.pth')['epoch'] == 1


# ------------------------------------------------------------------------ Killed processes, broken images, full disks

def listen_to_ctrl_c():
    """A shell's background processes, and what they start, do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_training():
    """A function that starts train.py with a tiny network, in a folder with lists; none outlives the test."""
    started = []

    def start(folder, **settings):
        started.append(start_process(folder, settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def start_process(folder, settings):
    """Start train.py with a tiny network; the process."""
    settings = {**common_settings, **settings}
    program = ('import checkpoints, files, train\nfrom tiny import TinyDetector\n'
               'train.SSD300 = checkpoints.SSD300 = TinyDetector\n'
               + ''.join(f'train.{name} = {value!r}\n' for name, value in settings.items())
               + 'if __name__ == "__main__":\n    errors.run(train.main)')
    return subprocess.Popen([sys.executable, '-u', '-c', program], cwd=folder, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, preexec_fn=listen_to_ctrl_c,
                            env=no_gpu | {'PYTHONPATH': f'{root}:{root}/tests', 'OMP_NUM_THREADS': '1'})


def wait_for(process, text):
    """Read what a process prints, up to a line with this text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'ended without {text!r}: {process.stderr.read()}')


def none_runs(pids, seconds):
    """Whether all of these processes end within so many seconds."""
    until = time.time() + seconds
    while any(map(runs, pids)) and time.time() < until:
        time.sleep(0.1)
    return len(pids) > 0 and not any(map(runs, pids))


@pytest.mark.parametrize('progress, line', [
    ('epoch 0  batch 1/', 'Stopped. There is no checkpoint yet.\n'),
    ('epoch 2  batch 1/', 'Stopped. The last checkpoint is c.pth.\n')])
def test_ctrl_c_names_the_last_checkpoint(folder, tmp_path, start_training, progress, line):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, progress)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    _, errors = process.communicate(timeout=60)
    *before, last = errors.splitlines()
    assert (process.returncode, last + '\n') == (1, line)
    # A worker may be handing over a batch: then a thread of Python's own, which does that, says that it was cut off.
    assert not before or 'resource_sharer.py' in before[1], errors
    assert len(workers) >= 2 and none_runs(workers, 10)
    assert not (tmp_path / 'c.pth.tmp').exists()
    if 'no checkpoint' not in line:
        assert load_checkpoint(tmp_path / 'c.pth')['epoch'] >= 1


def test_no_worker_outlives_a_killed_training(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, 'epoch 0  batch 2/')
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and none_runs(workers, 30)


def test_a_killed_worker_ends_training_with_one_line(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    process = start_training(tmp_path, workers=2, epochs=10 ** 6)
    wait_for(process, 'epoch 0  batch 2/')
    workers = workers_of(process.pid)
    os.kill(max(workers), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    # Other lines can be Python's own, if PyTorch raised the error while an object was being destroyed.
    [line] = [line for line in errors.splitlines() if line.startswith('Error: ')]
    assert line.startswith(('Error: DataLoader worker (pid', 'Error: a worker that loads images was killed'))
    assert none_runs(workers, 10)


def test_a_truncated_image_is_named_by_a_worker_and_no_worker_stays(folder, tmp_path, start_training):
    copy_lists(folder, tmp_path)
    images = json.loads((tmp_path / 'TRAIN_images.json').read_text())
    with open(images[0], 'rb') as file:
        (tmp_path / 'cut.jpg').write_bytes(file.read()[:4000])
    Image.open(tmp_path / 'cut.jpg')  # the header is whole: only a worker finds out
    images[30] = str(tmp_path / 'cut.jpg')  # not one of the first, which random weights are prepared on
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps(images))
    process = start_training(tmp_path, workers=2, epochs=1)
    wait_for(process, 'Training on')
    workers = set()
    while process.poll() is None:
        workers |= set(workers_of(process.pid))
        time.sleep(0.02)
    errors = process.stderr.read()
    assert process.returncode == 1 and errors.count('\n') == 1
    assert errors.startswith(f'Error: {tmp_path / "cut.jpg"} is not an image that can be read') and 'truncat' in errors
    assert none_runs(list(workers), 10)


def test_a_full_disk_leaves_the_last_checkpoint(folder, tmp_path, start_training, monkeypatch):
    """A limit on the size of files stands in for the disk; training goes on when there is room again."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    before = {name: (tmp_path / name).read_bytes() for name in ('c.pth', 'c.csv')}
    limit = len(before['c.pth']) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = start_training(tmp_path, epochs=2, checkpoint='c.pth')
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, hard))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.count('\n') == 1
    assert errors.startswith('Error: c.pth could not be written and is unchanged: ')
    assert 'File too large' in errors
    assert (tmp_path / 'c.pth').read_bytes() == before['c.pth'] and not (tmp_path / 'c.pth.tmp').exists()
    assert (tmp_path / 'c.csv').read_bytes().startswith(before['c.csv'])
    train_here(monkeypatch, tmp_path, epochs=2, checkpoint='c.pth')
    assert load_checkpoint(tmp_path / 'c.pth')['epoch'] == 1


@pytest.mark.parametrize('blocked', [{'1'}, {'1', '2'}])
def test_an_epochs_checkpoint_that_cannot_be_written_does_not_end_training(folder, tmp_path, monkeypatch, capsys,
                                                                           blocked):
    """As on Windows, while another program has the file open: in epoch 1, or also in epoch 2, the last."""
    copy_lists(folder, tmp_path)
    train_here(monkeypatch, tmp_path, epochs=1)
    before, plain_replace = (tmp_path / 'c.pth').read_bytes(), os.replace

    def replace(source, path):
        epoch = (tmp_path / 'c.csv').read_text().splitlines()[-1].split(',')[0]
        if path == 'c.pth' and epoch in blocked:
            assert (tmp_path / 'c.pth').read_bytes() == before
            raise PermissionError('another program has it open')
        plain_replace(source, path)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr('errors.time.sleep', lambda _: None)
    capsys.readouterr()
    if '2' in blocked:
        with pytest.raises(UserError, match='^c.pth could not be written and is unchanged: another program has it'):
            train_here(monkeypatch, tmp_path, epochs=3, checkpoint='c.pth')
        assert (tmp_path / 'c.pth').read_bytes() == before
    else:
        train_here(monkeypatch, tmp_path, epochs=3, checkpoint='c.pth')
        assert load_checkpoint('c.pth')['epoch'] == 2
    out, err = capsys.readouterr()
    assert err.startswith('Epoch 1 is not saved: c.pth could not be written and is unchanged: another program has it')
    assert err.count('\n') == 1 and 'epoch 2  batch 10/10' in out and not (tmp_path / 'c.pth.tmp').exists()


def test_a_best_checkpoint_that_cannot_be_written_does_not_end_training(folder, tmp_path, monkeypatch, capsys):
    """Of three better and better epochs, the second can't be saved as the best."""
    copy_lists(folder, tmp_path)
    measured, plain_replace = [], os.replace

    def replace(source, path):
        if path == 'c_best.pth' and len(measured) == 2:
            raise PermissionError('another program has it open')
        plain_replace(source, path)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr('errors.time.sleep', lambda _: None)
    monkeypatch.setattr(train, 'evaluate', lambda *_: (measured.append(0), len(measured) / 10))
    train_here(monkeypatch, tmp_path, epochs=3, evaluate_every=1)
    assert load_checkpoint('c_best.pth')['mAP'] == 0.3 and load_checkpoint('c_best.pth')['epoch'] == 2
    assert capsys.readouterr().err.startswith('Epoch 1 is not saved: c_best.pth could not be written and is unchanged')


def test_a_broken_image_is_named_even_by_a_worker(voc_folder, tmp_path):
    shutil.copytree(voc_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'broken.jpg').write_text('no image')
    images, objects = (json.loads((tmp_path / f'TRAIN_{kind}.json').read_text()) for kind in ('images', 'objects'))
    images = images * 6 + [str(tmp_path / 'broken.jpg')] * 3  # the first are read by the main process, too
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps(images))
    (tmp_path / 'TRAIN_objects.json').write_text(json.dumps(objects * 7))
    program = ('import torch, train\nfrom errors import run\n'
               'train.data_folder, train.checkpoint_path, train.pretrained, train.workers = ".", "c.pth", None, 1\n'
               'train.thin = 16\n'
               'if __name__ == "__main__":\n    run(train.main)')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root})
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert result.stderr.startswith(f'Error: {tmp_path / "broken.jpg"} is not an image')


# ------------------------------------------------------------------------------------------- From random weights

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


def test_one_image_is_enough_to_standardize():
    """Its last maps have one pixel, hence no spread."""
    model = SSD300(len(label_map), thin=16)
    train.standardize(model, torch.randn(1, 3, 300, 300))
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in model.base.parameters())
    assert model.aux_convs.conv11_2.weight.abs().max() < 10


def test_the_learning_rate_rises_and_falls_to_nothing(folder, tmp_path, monkeypatch):
    """At once, and with an interruption after two of ten epochs of 40 steps."""
    def rates(start_epoch, stop_after):
        found = []

        def train_epoch(loader, model, criterion, optimizer, epoch, *_, schedule, **__):
            for _ in loader.sampler:
                optimizer.step()
                found.append(optimizer.param_groups[0]['lr'])
                schedule.step()
            if epoch == stop_after:
                raise KeyboardInterrupt
        monkeypatch.setattr(train, 'train', train_epoch)
        model = TinyDetector(4)
        with pytest.raises(KeyboardInterrupt):
            train.fit(model, train.make_optimizer(model, 'adamw', 0.01, 5e-4), PascalVOCDataset(folder, 'TRAIN', True),
                      str(tmp_path / 'c.pth'), 10, 1, start_epoch, rise_and_fall=True)
        return found

    monkeypatch.setattr(train, 'save_checkpoint', lambda *_: None)
    whole = rates(0, 9)
    highest = whole.index(max(whole))
    assert len(whole) == 400 and max(whole) == pytest.approx(0.01, rel=0.01) and 0.06 * 400 < highest < 0.08 * 400
    assert whole[:highest] == sorted(whole[:highest]) and whole[highest:] == sorted(whole[highest:], reverse=True)
    assert whole[0] < 0.001 and 0 < whole[-1] < 1e-4
    assert whole == rates(0, 1) + rates(2, 9)


def test_adamw_does_not_depend_on_momentum():
    for momentum in (0., 0.5, 0.9):
        [group] = train.make_optimizer(torch.nn.Linear(1, 1), 'adamw', 0.01, 5e-4, momentum).param_groups
        assert group['betas'] == (0.9, 0.99) and group['lr'] == 0.01


def test_adamw_learns_with_the_parameters_at_the_top(voc_folder, tmp_path, monkeypatch):
    """Going on after an interruption ends in the same weights; the loss has fallen."""
    def run(path, epochs, checkpoint=None):
        settings = {'data_folder': voc_folder, 'checkpoint_path': str(tmp_path / path), 'pretrained': None, 'thin': 16,
                    'optimizer_kind': 'adamw', 'epochs': epochs, 'batch_size': 2, 'workers': 0,
                    'checkpoint': checkpoint, 'lr': 1e-3, 'print_freq': 1, 'grad_clip': 10}
        for name, value in settings.items():
            monkeypatch.setattr(train, name, value)
        train.main()
        return load_checkpoint(settings['checkpoint_path'])

    whole = run('whole.pth', 6)
    assert whole['optimizer_kind'] == 'AdamW' and whole['optimizer']['param_groups'][0]['weight_decay'] == 5e-4
    with open(tmp_path / 'whole.csv', newline='') as file:
        losses = [float(row['loss']) for row in csv.DictReader(file)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    monkeypatch.setattr(train, 'save_checkpoint', stop_after(2, train.save_checkpoint))
    with pytest.raises(KeyboardInterrupt):
        run('parts.pth', 6)
    monkeypatch.undo()
    parts = run('parts.pth', 6, str(tmp_path / 'parts.pth'))
    assert all(torch.equal(whole['model'][key], parts['model'][key]) for key in whole['model'])


def stop_after(n, function):
    """:return: `function`, which the n-th time interrupts the program when it is done"""
    calls = []

    def interrupting(*args, **kwargs):
        function(*args, **kwargs)
        calls.append(0)
        if len(calls) == n:
            raise KeyboardInterrupt
    return interrupting


# ----------------------------------------------------------------------------------------- The mAP while it trains

def test_the_best_checkpoint_is_kept(voc_folder, tmp_path, monkeypatch, capsys):
    """Made-up mAPs, one of them NaN, with an interruption: the best so far is known; training itself stays the same."""
    measured = iter([float('nan'), 0.3, 0.2, 0.5, 0.4])
    monkeypatch.setattr(train, 'evaluate', lambda loader, model: ({}, next(measured)))
    path = str(tmp_path / 'c.pth')
    for name, value in {'data_folder': voc_folder, 'checkpoint_path': path, 'pretrained': None, 'thin': 16, 'epochs': 6,
                        'batch_size': 3, 'workers': 0, 'evaluate_every': 2}.items():
        monkeypatch.setattr(train, name, value)
    train.main()  # measured after epochs 1, 3 and 5
    assert load_checkpoint(train.best_of(path))['mAP'] == 0.3 and load_checkpoint(train.best_of(path))['epoch'] == 3
    assert load_checkpoint(path)['epoch'] == 5 and train.best_of(path) == str(tmp_path / 'c_best.pth')
    monkeypatch.setattr(train, 'checkpoint', path)
    monkeypatch.setattr(train, 'epochs', 9)
    train.main()  # after 7, and after the last
    assert load_checkpoint(train.best_of(path))['mAP'] == 0.5 and load_checkpoint(train.best_of(path))['epoch'] == 7
    with open(tmp_path / 'c.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['mAP']]
    assert [(row['epoch'], row['mAP'], row['loss']) for row in rows] == [
        ('1', 'nan', ''), ('3', '0.3', ''), ('5', '0.2', ''), ('7', '0.5', ''), ('8', '0.4', '')]
    assert re.search(r'epoch 8  mAP 0\.4000  best 0\.5000', capsys.readouterr().out)

    # Neither of the two is overwritten by another training; and one can go on from the best
    monkeypatch.setattr(train, 'checkpoint', train.best_of(path))
    with pytest.raises(UserError, match=r'c\.pth exists'):
        train.main()
    os.rename(path, tmp_path / 'old.pth')
    monkeypatch.setattr(train, 'checkpoint', None)
    with pytest.raises(UserError, match=r'c_best\.pth exists'):
        train.main()
    monkeypatch.setattr(train, 'checkpoint', train.best_of(path))
    monkeypatch.setattr(train, 'evaluate_every', 0)
    train.main()
    again, before = load_checkpoint(path), load_checkpoint(str(tmp_path / 'old.pth'))
    assert all(torch.equal(again['model'][key], before['model'][key]) for key in before['model'])


def test_the_map_while_it_trains_is_eval_pys(voc_folder, tmp_path, monkeypatch):
    path = str(tmp_path / 'c.pth')
    for name, value in {'data_folder': voc_folder, 'checkpoint_path': path, 'pretrained': None, 'thin': 16, 'epochs': 1,
                        'batch_size': 3, 'workers': 1, 'evaluate_every': 1}.items():
        monkeypatch.setattr(train, name, value)
    everything = {'min_score': 0, 'top_k': 5000}  # so that an untrained detector has some hits
    monkeypatch.setattr(train, 'evaluate', partial(eval_script.evaluate, **everything))
    train.main()
    test_set = PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    _, expected = eval_script.evaluate(DataLoader(test_set, 2, collate_fn=collate_fn),
                                       load_detector(train.best_of(path))[0], **everything)
    assert load_checkpoint(train.best_of(path))['mAP'] == expected > 0


@pytest.mark.parametrize('name, value', [('optimizer_kind', 'adam'), ('evaluate_every', -1), ('evaluate_every', 0.5),
                                         ('warm_up', -1), ('warm_up', 'x'), ('batch_size', 0), ('epochs', 0),
                                         ('epochs', 1.5), ('print_freq', 0), ('workers', -1), ('seed', None)])
def test_parameters_that_cannot_be_are_named(monkeypatch, name, value):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match=f'^{name} = {value!r} in train.py: set it to .*$'):
        train.main()


@pytest.mark.parametrize('name, value', [('lr', 0), ('lr', '1e-3'), ('decay_lr_at', 20), ('decay_lr_at', None)])
def test_a_rate_that_cannot_be_is_named(monkeypatch, name, value):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match=f'^lr = .* in train.py: set lr to a number above 0, and decay_lr_at to a list'):
        train.main()
    assert f'{name} = {value!r}' in str(pytest.raises(UserError, train.main).value)


def test_too_few_images_for_the_processes_are_named(voc_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'data_folder', voc_folder)
    monkeypatch.setattr(train, 'get_world_size', lambda: 100)
    with pytest.raises(UserError, match='training images are too few for 100 process'):
        train.main()
