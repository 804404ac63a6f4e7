"""Training, and going on with it; and nothing that a user, a disk or a data set does loses what was learned."""
import csv
import json
import os
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import copy_lists
from kill_loop import runs, same, workers_of
from PIL import Image
from tiny import SpoiledImages, SpoiledLoss, TinyDetector
from together import read_log, start, train_main
from torch.utils.data import DataLoader

import checkpoints
import eval as eval_script
import train
from checkpoints import load_checkpoint, load_detector, save_checkpoint
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from demo import shapes
from errors import UserError
from model import SSD300, MultiBoxLoss
from utils import create_prior_boxes, make_label_map

label_map = make_label_map(shapes)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def columns(log, *names):
    """Some columns of a log, row by row, without those that depend on the clock."""
    return [[row[name] for name in names or ('epoch', 'batch', 'loss', 'loc_loss', 'conf_loss', 'lr', 'mAP')]
            for row in log]


# ------------------------------------------------------------------------------------------- Loading, learning, logging

@pytest.mark.parametrize('workers', [0, 2])
def test_objects_are_matched_where_they_are_loaded(voc_folder, workers):
    """Three images: the last batch is of one. Workers stay for the next epoch."""
    dataset, criterion = PascalVOCDataset(voc_folder, 'TRAIN', True), MultiBoxLoss(create_prior_boxes(), threshold=0.4)
    loader = train.make_train_loader(dataset, 2, criterion, seed=3, workers=workers)
    assert loader.num_workers == workers and loader.persistent_workers == (workers > 0)
    for epoch in 0, 1:
        loader.sampler.set_epoch(epoch)
        sampler = EpochSampler(3, 3)
        sampler.set_epoch(epoch)
        plain = DataLoader(dataset, 2, sampler=sampler, collate_fn=collate_fn)
        for n, batch, (images, boxes, labels, difficulties) in zip((2, 1), loader, plain, strict=True):
            assert batch[1].shape == (n, 8732, 4) and batch[2].shape == (n, 8732) and batch[2].any()
            assert all(map(torch.equal, batch[:3], (images, *criterion.match(boxes, labels))))
            assert all(map(torch.equal, batch[3], difficulties))


def test_the_real_network_learns_and_is_evaluated(voc_folder, monkeypatch, capsys):
    saved, log = train_main(SSD300, data_folder=voc_folder, thin=16, optimizer_kind='adamw', lr=1e-3, epochs=8,
                            batch_size=3, grad_clip=10)
    losses = [float(row['loss']) for row in log]
    assert len(losses) == 8 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert saved['thin'] == 16 and len(saved['model']['base.conv1_1.bias']) == 4 and saved['epoch'] == 7
    for name, value in {'data_folder': voc_folder, 'checkpoint': 'c.pth', 'workers': 0}.items():
        monkeypatch.setattr(eval_script, name, value)
    capsys.readouterr()
    eval_script.main()
    printed = capsys.readouterr().out
    assert re.search(r'circle +\d+ +(\d\.\d{3}|-)\n', printed) and re.search(r'mAP +\d+ +\d\.\d{3}\n', printed)
    assert re.search(r'c\.pth: 2 images, [\d.]+/s', printed)


common = {'epochs': 2, 'lr': 1e-3, 'decay_lr_at': (1,)}  # two steps in each epoch


@pytest.fixture(scope='module')
def usual(voc_folder, tmp_path_factory):
    """A folder with lists, in which each image has a difficult object, and what was trained on them."""
    folder = tmp_path_factory.mktemp('usual')
    copy_lists(voc_folder, folder)
    objects = json.loads((folder / 'TRAIN_objects.json').read_text())
    for of_image in objects:
        of_image['difficulties'] = [1] + [0] * (len(of_image['labels']) - 1)
    (folder / 'TRAIN_objects.json').write_text(json.dumps(objects))
    return str(folder), *train_main(data_folder=str(folder), checkpoint_path=str(folder / 'c.pth'), **common)


@pytest.mark.parametrize('name, value', [
    ('keep_difficult', False), ('batch_size', 3), ('epochs', 3), ('optimizer_kind', 'adamw'), ('lr', 2e-3),
    ('warm_up', 4), ('decay_lr_at', (0, 1)), ('decay_lr_to', 0.5), ('momentum', 0.5), ('weight_decay', 0.1),
    ('grad_clip', 0.1), ('min_negatives', 5000), ('bfloat16', True), ('seed', 3)])
def test_parameters_that_change_the_weights(usual, name, value):
    folder, before, _ = usual
    after, _ = train_main(data_folder=folder, **common | {name: value})
    assert not any(torch.equal(before['model'][key], after['model'][key]) for key in ('head.weight', 'head.bias'))


@pytest.mark.parametrize('name, value', [('workers', 1), ('print_freq', 9), ('evaluate_every', 1)])
def test_parameters_that_do_not_change_the_weights(usual, name, value):
    folder, before, _ = usual
    after, _ = train_main(data_folder=folder, **common | {name: value})
    assert same(before['model'], after['model'])
    rates = [[group[key] for key in ('lr', 'momentum', 'weight_decay')] for group in after['optimizer']['param_groups']]
    assert rates == [pytest.approx([2e-4, 0.9, 5e-4]), pytest.approx([1e-4, 0.9, 5e-4])]  # twice the rate for biases


@pytest.mark.parametrize('batch_size, print_freq, batches', [(1, 1, [1, 2, 3]), (1, 2, [2, 3]), (1, 9, [3]),
                                                             (2, 1, [1, 2]), (32, 1, [1])])
def test_the_log_has_a_line_every_so_many_batches_and_for_the_last(voc_folder, capsys, batch_size, print_freq, batches):
    _, log = train_main(data_folder=voc_folder, batch_size=batch_size, print_freq=print_freq, lr=5e-5)
    assert [int(row['batch']) for row in log] == batches
    lines = re.findall(r'epoch 0  batch (\d)/(\d)  loss [\d.]+ \(loc [\d.]+, conf [\d.]+\)  lr 5e-05  [\d.]+ images/s  '
                       r'data [\d.]+ s  left \d:\d\d:\d\d\n', capsys.readouterr().out)
    assert lines == [(str(batch), str(batches[-1])) for batch in batches]


@pytest.mark.parametrize('n_processes', [1, 2])
def test_numbers_of_the_log_by_hand(voc_folder, monkeypatch, n_processes):
    """On a clock that goes on 0.5 s as an image is loaded, and 2 s in the network. Batches of 2 images and of 1."""
    now = [0.]

    class Images(PascalVOCDataset):
        def __getitem__(self, i):
            now[0] += 0.5
            return super().__getitem__(i)

    class Model(TinyDetector):
        def forward(self, image):
            now[0] += 2
            return super().forward(image)

    model = Model(4)
    criterion, optimizer = MultiBoxLoss(model.priors_cxcy), train.make_optimizer(model, 'sgd', 1e-4, 5e-4)
    loader = train.make_train_loader(Images(voc_folder, 'TRAIN'), 2, criterion)
    monkeypatch.setattr(train, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, 'get_world_size', lambda: n_processes)
    train.start_log('log.csv', 0)
    train.train(loader, model, criterion, optimizer, 4, epochs=7, print_freq=1, log_path='log.csv')
    rows = [{name: float(value) for name, value in row.items() if name != 'mAP'} for row in read_log('log.csv')]
    for row, batch, n_images, seconds, left in zip(rows, (1, 2), (2, 1), (3, 2.5), (5 * 3, 4 * 2.5), strict=True):
        assert row['epoch'] == 4 and row['batch'] == batch and row['lr'] == 1e-4 and row['left_s'] == left
        assert row['loss'] == pytest.approx(row['loc_loss'] + row['conf_loss']) and row['loc_loss'] > 0
        assert row['images_per_s'] == pytest.approx(n_images * n_processes / seconds)
        assert row['data_s'] == pytest.approx(0.5 * n_images)

    train.train(loader, model, criterion, optimizer, 4, print_freq=9, log_path='log.csv')
    assert float(read_log('log.csv')[-1]['data_s']) == pytest.approx(0.75)  # of batches of 2 and of 1


def test_the_log_of_epochs_to_come_is_cut_off():
    train.start_log('log.csv', 0)
    with open('log.csv', 'a', newline='') as file:
        file.write('\0\0')  # as power failures leave them
        csv.writer(file).writerows([[0, 1, ''], [1, 1, ''], [1, 1, 0.5], [2, 1, '']])  # the third has an mAP
    train.start_log('log.csv', 2, evaluated=False)
    assert columns(read_log('log.csv'), 'epoch') == [['0'], ['1']]
    train.start_log('log.csv', 0)
    assert read_log('log.csv') == []


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    """As on Windows, where a spreadsheet program has it open."""
    train.write_log(str(tmp_path), **dict.fromkeys(train.log_columns, 1))
    assert capsys.readouterr().err.startswith(f'A line could not be written to the log {tmp_path}: ')


# ------------------------------------------------------------------------------------------------ Steps and their rates

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
    [group] = train.make_optimizer(layer, 'adamw', 0.01, 5e-4, momentum=0.5).param_groups
    assert (group['betas'], group['lr'], group['weight_decay']) == ((0.9, 0.99), 0.01, 5e-4)


@pytest.mark.parametrize('warm_up, expected', [(0, [1, 1, 1, .1, .1, .1, .01, .01, .01]),
                                               (2, [.5, 1, 1, .1, .1, .1, .01, .01, .01]),
                                               (5, [.2, .4, .6, .08, .1, .1, .01, .01, .01])])
def test_learning_rates_of_warm_up_and_decay_by_hand(warm_up, expected):
    """Three steps in each of three epochs."""
    assert [train.warm_up_and_decay(step, 3, warm_up, (1, 2), .1) for step in range(9)] == pytest.approx(expected)


def test_the_learning_rate_rises_and_falls_to_nothing():
    factors = [train.one_cycle(step, 400) for step in range(400)]
    highest = factors.index(max(factors))
    assert max(factors) == pytest.approx(1, rel=0.01) and 0.06 * 400 < highest < 0.08 * 400
    assert factors[:highest] == sorted(factors[:highest])
    assert factors[highest:] == sorted(factors[highest:], reverse=True)
    assert 0 < factors[0] < 0.1 and 0 < factors[-1] < 0.01


def test_the_recipe_is_the_papers():
    """A tenth of the learning rate after 80,000 of 120,000 iterations of 32 images, and again after 100,000."""
    n_steps = 16551 // train.batch_size + 1
    factors = [train.warm_up_and_decay(n_steps * epoch - 1, n_steps, train.warm_up, train.decay_lr_at,
                                       train.decay_lr_to) for epoch in range(1, train.epochs + 1)]
    epochs = [iterations * 32 // 16551 for iterations in (80_000, 20_000, 20_000)]
    assert factors == pytest.approx([1] * epochs[0] + [.1] * (epochs[1] + 1) + [.01] * (epochs[2] + 1))
    assert train.lr == 1e-3 and train.keep_difficult and train.optimizer_kind == 'sgd' and train.warm_up == 500


@pytest.mark.parametrize('bfloat16', [False, True])
def test_numbers_have_16_bits_only_if_asked(voc_folder, bfloat16):
    """Those of the network, in training and in evaluation."""
    seen = []

    class Model(TinyDetector):
        def forward(self, image):
            locs, scores = super().forward(image)
            seen.append((self.training, scores.dtype))
            return locs, scores
    saved, _ = train_main(Model, data_folder=voc_folder, bfloat16=bfloat16, evaluate_every=1)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    assert set(seen[1:]) == {(True, dtype), (False, dtype)}  # the first: random weights are prepared
    assert all(values.dtype == torch.float32 for values in saved['model'].values())


@pytest.mark.parametrize('max_norm', [0.1, 100.])
def test_clipping_shortens_the_gradient_to_at_most_its_limit(voc_folder, max_norm):
    steps = []
    for grad_clip in (None, max_norm):
        torch.manual_seed(0)
        model = TinyDetector(4)
        criterion, optimizer = MultiBoxLoss(model.priors_cxcy), torch.optim.SGD(model.parameters(), lr=1.)
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        loader = train.make_train_loader(PascalVOCDataset(voc_folder, 'TRAIN'), 3, criterion)
        train.train(loader, model, criterion, optimizer, 0, grad_clip=grad_clip)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    length = steps[0].norm()
    assert 0.3 < length < 50
    torch.testing.assert_close(steps[1], steps[0] * min(1, max_norm / length), atol=1e-6, rtol=1e-4)


def copies(optimizer):
    """Of the weights, and of what the optimizer remembers of each."""
    weights = {id(p): p for group in optimizer.param_groups for p in group['params']}
    memories = {(id(p), name): values for p, state in optimizer.state.items() for name, values in state.items()}
    return {key: tensor.detach().clone() for key, tensor in (weights | memories).items() if tensor is not None}


@pytest.mark.parametrize('how, grad_clip, kind', [
    ('nan', None, 'sgd'), ('inf', 5., 'adamw'), ('1e38', None, 'sgd'), ('loss', 5., 'sgd'), ('loss', None, 'adamw'),
    ('gradient', None, 'adamw'), ('gradient', 5., 'sgd')])
def test_no_step_is_taken_with_a_loss_that_is_no_number(voc_folder, tmp_path, how, grad_clip, kind):
    """Two batches are fine, the third is not: because of an image, or of the loss alone, or of its gradient alone."""
    model, dataset, sampler = TinyDetector(4), PascalVOCDataset(voc_folder, 'TRAIN', True), EpochSampler(3, seed=0)
    criterion, optimizer = MultiBoxLoss(model.priors_cxcy), train.make_optimizer(model, kind, 1e-3, 5e-4)
    if how in ('loss', 'gradient'):
        criterion = SpoiledLoss(model.priors_cxcy, how, 3)
    else:
        sampler.set_epoch(1)
        dataset = SpoiledImages(dataset, [index for index, _ in sampler][2], float(how))
    save_checkpoint('c.pth', 0, model, optimizer, dataset.label_map, seed=0)
    checkpoint, after = (tmp_path / 'c.pth').read_bytes(), []  # after each step
    optimizer.register_step_post_hook(lambda *_: after.append(copies(optimizer)))
    with pytest.raises(UserError) as error:
        train.fit(model, optimizer, criterion, train.make_train_loader(dataset, 1, criterion), 'c.pth', epochs=2,
                  lr_factor=lambda _: 1, start_epoch=1, grad_clip=grad_clip)
    loss = {'nan': 'nan', 'gradient': r'\d+\.\d+', 'loss': 'inf'}.get(how, 'nan|inf')
    assert re.match(fr'the loss or the gradient became infinite or NaN in epoch 1, batch 3 \(loss ({loss})\)\. ',
                    str(error.value)) and '\n' not in str(error.value)

    now = copies(optimizer)
    assert len(after) == 2 and len(now) >= 4 and same(now, after[1])
    assert all(tensor.isfinite().all() for tensor in now.values())
    assert not any(torch.equal(after[0][key], after[1][key]) for key in now)
    assert (tmp_path / 'c.pth').read_bytes() == checkpoint


# ------------------------------------------------------------------------------------------------------------- Going on

def interrupt(monkeypatch, name, n):
    """Let a function of train.py interrupt the program when it is called the n-th time, after it has done its work."""
    plain, calls = getattr(train, name), []

    def interrupting(*args, **options):
        plain(*args, **options)
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, name, interrupting)


@pytest.mark.parametrize('name, n, kind', [
    ('write_log', 1, 'sgd'), ('write_log', 3, 'sgd'), ('write_log', 7, 'adamw'), ('save_checkpoint', 1, 'adamw'),
    ('save_checkpoint', 3, 'sgd')])
def test_interrupted_training_ends_in_the_same_weights(voc_folder, monkeypatch, name, n, kind):
    """Four epochs of two steps; warm-up takes three. It goes on with other workers, and another seed at the top."""
    parameters = {'data_folder': voc_folder, 'epochs': 4, 'warm_up': 3, 'decay_lr_at': (2,), 'lr': 1e-3,
                  'optimizer_kind': kind}
    expected, whole_log = train_main(checkpoint_path='whole.pth', seed=5, **parameters)
    is_saved = (name, n) != ('write_log', 1)
    with monkeypatch.context() as patch:
        interrupt(patch, name, n)
        line = 'The last checkpoint is c.pth.' if is_saved else 'There is no checkpoint yet.'
        with pytest.raises(KeyboardInterrupt, match=line):
            train_main(seed=5, workers=2, **parameters)
    changed = {'checkpoint': 'c.pth', 'seed': 6, 'pretrained': 'gone.pth'} if is_saved else {'seed': 5}
    resumed, log = train_main(**parameters | changed)
    assert same(resumed, expected) and columns(log) == columns(whole_log)
    assert resumed['seed'] == 5 and resumed['epoch'] == 3 and [row['epoch'] for row in log] == list('00112233')
    if kind == 'sgd':
        rates = [float(row['lr']) for row in log]
        assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4, 1e-4])


def test_training_goes_on_with_other_images_and_another_rate(voc_folder, tmp_path, capsys):
    copy_lists(voc_folder, tmp_path)
    train_main(data_folder='.', batch_size=1)
    for name in ('TRAIN_images.json', 'TRAIN_objects.json'):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text())[1:]))
    saved, _ = train_main(data_folder='.', batch_size=1, epochs=2, checkpoint='c.pth', lr=1e-5, decay_lr_at=(0, 1))
    assert 'epoch 1  batch 2/2' in capsys.readouterr().out and saved['epoch'] == 1
    assert [group['lr'] for group in saved['optimizer']['param_groups']] == pytest.approx([2e-7, 1e-7])


def test_a_new_training_can_start_from_another_detector(voc_folder, capsys):
    """With a learning rate of 0, its weights and priors stay as they are."""
    torch.manual_seed(7)
    model = SSD300(3, thin=64)
    model.priors_cxcy *= 0.9
    save_checkpoint('old.pth', 9, model, None, make_label_map(['square', 'dog']), seed=3)
    saved, log = train_main(SSD300, data_folder=voc_folder, pretrained='old.pth', thin=64, lr=0.)
    assert saved['label_map'] == label_map and saved['seed'] == 0 and [row['epoch'] for row in log] == ['0', '0']
    for key, values in model.state_dict().items():
        if '.cl_' not in key:  # of the class scores, those of squares are kept: see test_checkpoints.py
            assert torch.equal(saved['model'][key], values), key
    assert ("Starting from the weights of old.pth, with its priors; classes whose scores start at "
            "random: ['circle', 'triangle'].\n") in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['sgd', 'adamw'])
def test_frozen_groups_keep_their_weights(voc_folder, kind):
    model = SSD300(4, thin=16)
    save_checkpoint('old.pth', 9, model, None, label_map, seed=3)
    parameters = {'data_folder': voc_folder, 'optimizer_kind': kind, 'thin': 16, 'frozen': 3, 'pretrained': 'old.pth'}
    saved, _ = train_main(SSD300, **parameters)
    frozen = [key for key, values in model.state_dict().items() if torch.equal(values, saved['model'][key])]
    assert [key for key in frozen if key.endswith('weight')] == [
        f'base.conv{layer}.weight' for layer in ('1_1', '1_2', '2_1', '2_2', '3_1', '3_2', '3_3')]
    on, _ = train_main(SSD300, **parameters | {'checkpoint': 'c.pth', 'epochs': 2, 'frozen': 2, 'pretrained': None})
    assert [torch.equal(on['model'][f'base.conv{i}_1.weight'], saved['model'][f'base.conv{i}_1.weight'])
            for i in range(1, 6)] == [True, True, False, False, False]


@pytest.mark.parametrize('parameters, line', [
    ({'optimizer_kind': 'adam'}, "^optimizer_kind = 'adam': set it to 'sgd' or 'adamw'$"), ({'frozen': 2.}, '^froz'),
    ({'frozen': 3}, '^frozen = 3 in train.py would keep random or thinned-out weights: set it to 0$'),
    ({'frozen': 6}, '^frozen = 6 in train.py: set it to'), ({'pretrained': 'vgg'}, "^pretrained = 'vgg' in train.py: "),
    ({'frozen': 1, 'thin': 4, 'pretrained': 'coco'}, '^frozen = 1 in train.py would'), ({'lr': None}, '^lr = None in'),
    ({'print_freq': 0}, '^print_freq = 0 in train.py: set it to a whole number, at least 1$'), ({'lr': -1}, '^lr = -1'),
    ({'evaluate_every': None}, '^evaluate_every = None in train.py: .* at least 0$'), ({'seed': '1'}, "^seed = '1' in"),
    ({'decay_lr_at': 154}, r'^decay_lr_at = 154 in train.py: set it to epochs, as \(154, 193\) or \(154,\), or \(\)$'),
    ({'pretrained': 'c.pth', 'checkpoint_path': 'c.pth'}, '^c.pth exists, and training would overwrite it: '),
    ({'checkpoint': 'c.pth', 'checkpoint_path': 'another.pth', 'epochs': 3}, '^another.pth exists.* move it'),
    ({'checkpoint': 'c.pth', 'checkpoint_path': 'c.pth', 'epochs': 1, 'evaluate_every': 1}, '^epochs = 1 in train.py'),
    ({'checkpoint': 'c.pth', 'checkpoint_path': 'c.pth', 'epochs': 2},
     '^epochs = 2 in train.py, but 2 have been trained already: raise epochs; or with'),
    ({'checkpoint': 'c.pth', 'checkpoint_path': 'c.pth', 'epochs': 3, 'optimizer_kind': 'adamw'},
     "^the checkpoint was trained with SGD, whose state does not fit AdamW: set optimizer_kind = 'sgd'")])
def test_what_cannot_be_is_named_and_no_checkpoint_is_changed(usual, tmp_path, parameters, line):
    folder, *_ = usual
    for name in 'c.pth', 'another.pth':
        shutil.copy(f'{folder}/c.pth', name)
    before = (tmp_path / 'c.pth').read_bytes()
    with pytest.raises(UserError, match=line):
        train_main(**{'data_folder': folder, 'checkpoint_path': 'new.pth'} | parameters)
    assert sorted(os.listdir()) == ['another.pth', 'c.pth']
    assert all((tmp_path / name).read_bytes() == before for name in ('c.pth', 'another.pth'))


def test_other_labels_are_refused(usual, tmp_path, monkeypatch):
    folder, *_ = usual
    copy_lists(folder, tmp_path)
    (tmp_path / 'label_map.json').write_text(json.dumps(make_label_map(['cat', 'dog', 'cow'])))
    monkeypatch.setattr(checkpoints, 'SSD300', TinyDetector)
    monkeypatch.setattr(eval_script, 'data_folder', '.')
    monkeypatch.setattr(eval_script, 'checkpoint', f'{folder}/c.pth')
    for main in partial(train_main, data_folder='.', checkpoint=f'{folder}/c.pth'), eval_script.main:
        with pytest.raises(UserError, match=r"\['circle', 'square', 'triangle'\].*\['cat', 'dog', 'cow'\]"):
            main()


def test_too_few_images_for_the_processes_are_named(voc_folder, monkeypatch):
    monkeypatch.setattr(train, 'get_world_size', lambda: 100)
    with pytest.raises(UserError, match='^3 training images are too few for 100 process'):
        train_main(data_folder=voc_folder)


# ---------------------------------------------------------------------------------------------- The mAP while it trains

def evaluations(monkeypatch, *results):
    """Instead of an evaluation: the next of these results, a mAP or an interruption."""
    remaining = iter(results)

    def evaluate(*_, **__):
        result = next(remaining)
        if result is KeyboardInterrupt:
            raise result
        return SimpleNamespace(mAP=result)
    monkeypatch.setattr(train, 'evaluate', evaluate)


def test_the_best_checkpoint_is_kept(voc_folder, monkeypatch, capsys):
    """Made-up mAPs, one of them NaN, with an interruption: the best so far is known."""
    evaluations(monkeypatch, float('nan'), 0.3, 0.2, 0.1, 0.5, 0.4)
    parameters = {'data_folder': voc_folder, 'print_freq': 9, 'evaluate_every': 2}
    saved, _ = train_main(epochs=6, **parameters)  # measured after epochs 1, 3 and 5
    best = load_checkpoint('c_best.pth')
    assert (best['mAP'], best['epoch'], saved['mAP'], saved['epoch']) == (0.3, 3, 0.2, 5)
    saved, log = train_main(epochs=11, checkpoint='c.pth', **parameters)  # after 7, 9 and the last
    best = load_checkpoint('c_best.pth')
    assert (best['mAP'], best['epoch'], saved['mAP'], saved['epoch']) == (0.5, 9, 0.4, 10)
    assert columns([row for row in log if row['mAP']], 'epoch', 'mAP', 'loss') == [
        ['1', 'nan', ''], ['3', '0.3', ''], ['5', '0.2', ''], ['7', '0.1', ''], ['9', '0.5', ''],
        ['10', '0.4', '']]
    assert 'epoch 7  mAP 0.1000  best 0.3000' in capsys.readouterr().out

    # Neither of the two is overwritten by another training; and one can go on from the best.
    with pytest.raises(UserError, match=r'^c\.pth exists'):
        train_main(epochs=11, checkpoint='c_best.pth', **parameters)
    os.rename('c.pth', 'old.pth')
    with pytest.raises(UserError, match=r'^c_best\.pth exists'):
        train_main(epochs=11, **parameters)
    again, _ = train_main(epochs=11, checkpoint='c_best.pth', **parameters | {'evaluate_every': 0})
    assert same(again['model'], saved['model'])


@pytest.mark.parametrize('results', [(KeyboardInterrupt, 0.4, 0.2), (0.2, KeyboardInterrupt, 0.4),
                                     (KeyboardInterrupt, KeyboardInterrupt, 0.2, KeyboardInterrupt, 0.4)])
def test_an_interrupted_evaluation_is_repeated(voc_folder, monkeypatch, results):
    """Four epochs, with evaluations after the second and the last: all is as without the interruption."""
    parameters = {'data_folder': voc_folder, 'epochs': 4, 'evaluate_every': 2}
    evaluations(monkeypatch, *[result for result in results if result is not KeyboardInterrupt])
    expected, expected_log = train_main(checkpoint_path='whole.pth', **parameters)
    evaluations(monkeypatch, *results)
    checkpoint = None
    for _ in range(results.count(KeyboardInterrupt)):
        with pytest.raises(KeyboardInterrupt, match='^The last checkpoint is c.pth.$'):
            train_main(checkpoint=checkpoint, **parameters)
        checkpoint = 'c.pth'
        assert 'mAP' not in load_checkpoint('c.pth')
    saved, log = train_main(checkpoint=checkpoint, **parameters)
    assert same(saved, expected) and saved['mAP'] == results[-1] and columns(log) == columns(expected_log)
    assert same(load_checkpoint('c_best.pth'), load_checkpoint('whole_best.pth'))
    assert load_checkpoint('c_best.pth')['mAP'] == 0.4
    with pytest.raises(UserError, match='4 have been trained already'):
        train_main(checkpoint='c.pth', **parameters)


def test_the_map_while_it_trains_is_eval_pys(voc_folder, monkeypatch):
    everything = {'min_score': 0, 'top_k': 5000}  # so that an untrained detector has some hits
    monkeypatch.setattr(train, 'evaluate', partial(eval_script.evaluate, **everything))
    monkeypatch.setattr(checkpoints, 'SSD300', TinyDetector)
    saved, _ = train_main(data_folder=voc_folder, evaluate_every=1, workers=1)
    test_set = PascalVOCDataset(voc_folder, 'TEST', keep_difficult=True)
    found = eval_script.evaluate(DataLoader(test_set, 2, collate_fn=collate_fn), load_detector('c_best.pth')[0],
                                 **everything)
    assert saved['mAP'] == load_checkpoint('c_best.pth')['mAP'] == found.mAP > 0


# ------------------------------------------------------------------------- Killed processes, broken images, full disks

@pytest.fixture
def start_training(voc_folder, tmp_path):
    """A function that starts a training with workers in a process of its own; none outlives the test."""
    started = []

    def start_main(**parameters):
        parameters = {'data_folder': voc_folder, 'workers': 2, 'epochs': 10 ** 6} | parameters
        started.extend(start(tmp_path, partial(train_main, **parameters)))
        return started[-1]

    yield start_main
    for process in started:
        process.kill()


def printed(name):
    """What a process printed: its 'output' or its 'errors'."""
    path = Path(f'{name} 0')
    return path.read_text() if path.exists() else ''


def wait_for(process, text):
    """Wait until a process has printed this."""
    while text not in printed('output'):
        assert process.is_alive(), printed('errors')
        time.sleep(0.01)


def none_runs(pids, seconds):
    """Whether all of these processes end within so many seconds."""
    until = time.time() + seconds
    while any(map(runs, pids)) and time.time() < until:
        time.sleep(0.1)
    return len(pids) > 0 and not any(map(runs, pids))


@pytest.mark.parametrize('progress, line', [('epoch 0  batch 1/', 'Stopped. There is no checkpoint yet.'),
                                            ('epoch 2  batch 1/', 'Stopped. The last checkpoint is c.pth.')])
def test_ctrl_c_names_the_last_checkpoint(folder, start_training, progress, line):
    process = start_training(data_folder=folder)
    wait_for(process, progress)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    process.join(60)
    *before, last = printed('errors').splitlines()
    assert (process.exitcode, last) == (1, line)
    # A worker may be handing over a batch: then a thread of Python's own, which does that, says that it was cut off.
    assert not before or 'resource_sharer.py' in before[1], before
    assert len(workers) >= 2 and none_runs(workers, 10)
    assert not os.path.exists('c.pth.tmp')
    if 'no checkpoint' not in line:
        assert load_checkpoint('c.pth')['epoch'] >= 1


@pytest.mark.parametrize('whom', ['training', 'worker'])
def test_when_one_is_killed_the_others_end(folder, start_training, whom):
    process = start_training(data_folder=folder)
    wait_for(process, 'epoch 0  batch 2/')
    workers = workers_of(process.pid)
    os.kill(process.pid if whom == 'training' else max(workers), signal.SIGKILL)
    process.join(60)
    assert len(workers) >= 2 and none_runs(workers, 30)
    if whom == 'worker':  # Other lines can be Python's own, if PyTorch raised the error while an object was destroyed.
        [line] = [line for line in printed('errors').splitlines() if line.startswith('Error: ')]
        assert process.exitcode == 1
        assert line.startswith('Error: DataLoader worker (pid')


@pytest.mark.parametrize('n_bytes, line', [(4000, 'is not an image that can be read.*truncat'), (9, 'is not an image')])
def test_a_broken_image_is_named_by_a_worker_and_no_worker_stays(voc_folder, tmp_path, start_training, n_bytes, line):
    copy_lists(voc_folder, tmp_path)
    images, objects = (json.loads((tmp_path / f'TRAIN_{kind}.json').read_text()) for kind in ('images', 'objects'))
    with open(images[0], 'rb') as file:
        (tmp_path / 'cut.jpg').write_bytes(file.read(n_bytes))
    if n_bytes > 1000:
        Image.open('cut.jpg')  # the header is whole
    images = images * 6 + ['cut.jpg']  # the first are also read by the main process, for random weights
    (tmp_path / 'TRAIN_images.json').write_text(json.dumps(images))
    (tmp_path / 'TRAIN_objects.json').write_text(json.dumps(objects * 6 + objects[:1]))
    process, workers = start_training(data_folder='.'), set()
    while process.is_alive():
        workers |= set(workers_of(process.pid))
        time.sleep(0.02)
    errors = printed('errors')
    assert process.exitcode == 1 and re.match(f'Error: cut.jpg {line}.*\n$', errors), errors
    assert none_runs(list(workers), 10)


def test_a_full_disk_leaves_the_last_checkpoint(voc_folder, tmp_path):
    """A limit on the size of files stands in for the disk; training goes on when there is room again."""
    parameters = {'data_folder': voc_folder, 'epochs': 2, 'checkpoint': 'c.pth'}
    train_main(data_folder=voc_folder)
    before = {name: (tmp_path / name).read_bytes() for name in ('c.pth', 'c.csv')}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before['c.pth']) // 2, hard))
    try:
        with pytest.raises(UserError, match='^c.pth could not be written and is unchanged: .*File too large'):
            train_main(**parameters)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / 'c.pth').read_bytes() == before['c.pth'] and not os.path.exists('c.pth.tmp')
    assert (tmp_path / 'c.csv').read_bytes().startswith(before['c.csv'])
    assert train_main(**parameters)[0]['epoch'] == 1


@pytest.mark.parametrize('name, blocked', [('c.pth', {'1'}), ('c.pth', {'1', '2'}), ('c_best.pth', {'1'})])
def test_a_checkpoint_that_cannot_be_written_does_not_end_training(voc_folder, monkeypatch, capsys, name, blocked):
    """As on Windows, while another program has the file open: in epoch 1, or also in epoch 2, the last."""
    plain = os.replace

    def replace(source, path):
        if os.path.basename(path) == name and read_log('c.csv')[-1]['epoch'] in blocked:
            raise PermissionError('another program has it open')
        plain(source, path)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr('errors.time.sleep', lambda _: None)
    evaluations(monkeypatch, 0.1, 0.2, 0.3)
    parameters = {'data_folder': voc_folder, 'epochs': 3, 'evaluate_every': int(name == 'c_best.pth')}
    line = f'{name} could not be written and is unchanged: another program has it open'
    if '2' in blocked:
        with pytest.raises(UserError, match=f'^{line}'):
            train_main(**parameters)
    else:
        train_main(**parameters)
    assert load_checkpoint(name)['epoch'] == (0 if '2' in blocked else 2)
    out, err = capsys.readouterr()
    assert err.startswith(f'Epoch 1 is not saved: {line}') and err.count('\n') == 1
    assert 'epoch 2  batch 2/2' in out and not os.path.exists(f'{name}.tmp')
