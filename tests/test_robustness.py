"""Nothing a user, a disk or a data set does loses their work."""
import json
import os
import subprocess

import pytest
import torch
from conftest import draw_and_list
from test_processes import command, no_gpu
from tiny import SpoiledPictures, TinyDetector
from torch.utils.data import DataLoader

import train
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from model import MultiBoxLoss
from utils import UserError, load_checkpoint, save_checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Lists of 40 training pictures."""
    return draw_and_list(tmp_path_factory.mktemp('robust'), 40, 3)


# --------------------------------------------------------------------------------------------------------- Numbers

def copies(optimizer):
    """Of the weights and their momentum."""
    tensors = {id(p): p for group in optimizer.param_groups for p in group['params']}
    momenta = {(id(p), 'momentum'): state['momentum_buffer'] for p, state in optimizer.state.items()}
    return {key: tensor.detach().clone() for key, tensor in (tensors | momenta).items()}


def spoil(monkeypatch, how, n):
    """Make the loss or the gradient of the n-th batch infinite."""
    plain, count = MultiBoxLoss.parts, []

    def parts(self, predicted_locs, *args):
        count.append(1)
        loc_loss, conf_loss = plain(self, predicted_locs, *args)
        if len(count) == n:
            if how == 'loss':  # its gradient is finite
                loc_loss = loc_loss + float('inf')
            else:
                predicted_locs.register_hook(lambda gradient: gradient * float('inf'))
        return loc_loss, conf_loss
    monkeypatch.setattr(MultiBoxLoss, 'parts', parts)


@pytest.mark.parametrize('how, grad_clip', [('nan', None), ('inf', 5.), ('1e38', None), ('loss', 5.),
                                            ('gradient', None), ('gradient', 5.)])
def test_no_step_is_taken_after_a_loss_that_is_no_number(folder, tmp_path, monkeypatch, how, grad_clip):
    """Two batches are fine, the third is not, and seven more follow before anybody looks."""
    path = str(tmp_path / 'c.pth')
    dataset = PascalVOCDataset(folder, 'TRAIN', keep_difficult=True)
    sampler = EpochSampler(40, seed=0)
    sampler.set_epoch(1)
    third = [index for index, _ in sampler][8:12]
    if how in ('nan', 'inf', '1e38'):
        dataset = SpoiledPictures(dataset, third[1], float(how))
    else:
        spoil(monkeypatch, how, 3)
    model = TinyDetector(4)
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    save_checkpoint(path, 0, model, optimizer, dataset.label_map, seed=0)
    with open(path, 'rb') as file:
        checkpoint = file.read()
    before = []  # each step
    optimizer.register_step_pre_hook(lambda *_: before.append(copies(optimizer)))
    with pytest.raises(UserError) as error:
        train.fit(model, optimizer, dataset, path, 2, batch_size=4, start_epoch=1, grad_clip=grad_clip)
    names = ', '.join(os.path.basename(dataset.images[index]) for index in third)
    what = {'nan': 'loss became nan', 'gradient': 'gradient became infinite'}
    assert f'the {what.get(how, "loss became ")}' in str(error.value)
    assert f'in epoch 1, batch 3, with the pictures {names}. ' in str(error.value) and '\n' not in str(error.value)

    assert len(before) == 10
    after = copies(optimizer)
    assert len(after) == 4 and all(torch.equal(after[key], before[2][key]) for key in after)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(torch.equal(before[1][key], before[2][key]) for key in after)
    with open(path, 'rb') as file:
        assert file.read() == checkpoint


def test_a_broken_first_step_is_followed_by_no_other(folder, monkeypatch):
    """The optimizer has no momentum yet."""
    spoil(monkeypatch, 'loss', 1)
    model = TinyDetector(4)
    before = {key: values.clone() for key, values in model.state_dict().items()}
    with pytest.raises(UserError, match='batch 1, '):
        train.fit(model, train.make_optimizer(model, 1e-3, 0.9, 5e-4), PascalVOCDataset(folder, 'TRAIN'), 'c.pth', 1, 8)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())


def test_processes_stop_together(folder):
    """Of two processes, the second has the picture; both say so, and neither changes its weights after it."""
    result = subprocess.run(command(2, 'spoiled', folder), capture_output=True, text=True, env=no_gpu)
    assert result.returncode != 0
    dataset, sampler = PascalVOCDataset(folder, 'TRAIN'), EpochSampler(40, 0, process=1, n_processes=2)
    names = ', '.join(os.path.basename(dataset.images[index]) for index, _ in list(sampler)[4:8])
    line = f'Error: the loss became nan in epoch 0, batch 2, with the pictures {names}. '
    assert result.stderr.count(line) == 2
    for process in range(2):
        with open(os.path.join(folder, f'changes {process}.json')) as file:
            assert json.load(file) == [True, False, False, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_an_update_does_not_wait_for_the_gpu():
    model = TinyDetector(4).cuda()
    optimizer = train.make_optimizer(model, 1e-3, 0.9, 5e-4)
    broken = torch.zeros((), device='cuda')
    for value in (0., float('nan'), 0.):
        before = copies(optimizer)
        with_value = torch.full((2, 3, 300, 300), value, device='cuda')
        torch.cuda.set_sync_debug_mode('error')
        try:
            broken = train.update(optimizer, sum(p.mean() for p in model(with_value)), 5., broken)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        changed = [not torch.equal(tensor, before[key]) for key, tensor in copies(optimizer).items() if key in before]
        assert all(changed) if broken.item() == 0 else not any(changed)


@pytest.mark.parametrize('max_norm', [0.1, 100.])
def test_clipping_shortens_the_gradient_to_at_most_its_limit(folder, max_norm):
    steps = []
    for grad_clip in (None, max_norm):
        torch.manual_seed(0)
        model = TinyDetector(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1., fused=True)
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
    train.fit(model, train.make_optimizer(model, 1e-4, 0.9, 5e-4), PascalVOCDataset(folder, 'TRAIN', True), path, 1,
              batch_size, print_freq=1)
    assert capsys.readouterr().out.count('\n') == n_batches
    assert all(values.isfinite().all() for values in load_checkpoint(path)['model'].values())
