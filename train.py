"""Train SSD300 on the images that create_data_lists.py has listed:

    python train.py

Edit the parameters below first. After each epoch the weights are saved at `checkpoint_path`, and the log in a .csv file
beside it. To go on after an interruption, set `checkpoint` to the same path. With several GPUs (see distributed.py):

    torchrun --nproc_per_node=8 train.py
"""
import csv
import math
import os
import sys
import time
from datetime import timedelta
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import distributed
from checkpoints import load_checkpoint, load_detector, restore, save_checkpoint, start_from
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from distributed import all_reduce_mean, data_parallel, get_rank, get_world_size
from errors import UserError, check_numbers, run, write_whole
from eval import evaluate, make_test_loader
from model import SSD300, MultiBoxLoss, standardize

# Data
data_folder = './'  # where create_data_lists.py wrote the lists
keep_difficult = True  # also train on objects that are marked as difficult
workers = 4  # processes that load images

# Model
checkpoint = None  # a checkpoint to resume from, or None to start anew
checkpoint_path = 'checkpoint_ssd300.pth'  # where checkpoints are written
pretrained = 'imagenet'  # start from 'imagenet' (VGG-16), 'coco' (a detector), a path (your detector), or None (random)
thin = 1  # keep every thin-th channel in a new training: 1 for the paper's network, 4 for one that a laptop can train
frozen = 0  # how many of VGG's five groups of convolutions keep the weights that they start with; 0 for none

# Learning: as many images of VOC 07+12 as in the paper's 120,000 iterations of 32, but in smaller batches
batch_size = 8  # images in a batch, of each process if there are several
epochs = 232  # passes over the training images
optimizer_kind = 'sgd'  # 'sgd' for the paper's recipe, 'adamw' for random weights
lr = 1e-3  # peak learning rate; with 'sgd', that of biases is twice this
warm_up = 500  # with 'sgd', steps in which the learning rate rises from near 0 to lr; 0 for none
decay_lr_at = (154, 193)  # with 'sgd', epochs, say (154,), at which the learning rate is multiplied by decay_lr_to
decay_lr_to = 0.1  # with 'sgd'; with 'adamw', the learning rate follows `one_cycle`
momentum = 0.9  # with 'sgd'
weight_decay = 5e-4  # L2 penalty with 'sgd', decoupled with 'adamw'
grad_clip = None  # maximum norm, to which a larger gradient is scaled down; set it, say to 10, if the loss explodes
min_negatives = 0  # minimum number of hard negatives in an image; set it, say to 30, if the lists have empty images
bfloat16 = False  # compute in 16 bits: faster on recent GPUs, much slower on most CPUs; see GUIDE.md
seed = 0  # the same seed gives the same weights on the same processor; on a GPU, they drift apart
print_freq = 200  # batches between two lines of the log
evaluate_every = 0  # epochs between two evaluations; 0 for none, so that no checkpoint is selected on the test set

log_columns = 'epoch', 'batch', 'loss', 'loc_loss', 'conf_loss', 'lr', 'images_per_s', 'data_s', 'left_s', 'mAP'
log_line = ('epoch {epoch}  batch {batch}/{n_batches}  loss {loss:.4f} (loc {loc_loss:.4f}, conf {conf_loss:.4f})  '
            'lr {lr:.2g}  {images_per_s:.1f} images/s  data {data_s:.3f} s  left {left}')


def make_optimizer(model, kind, lr, weight_decay, momentum=0.9):
    """Make the optimizer of an SSD300; `lr` is its peak rate. `kind` is 'sgd' as in the paper, but with twice the rate
    for biases; or 'adamw', without `momentum`, which learns faster from random weights. Raises UserError for others."""
    if kind == 'adamw':
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    if kind != 'sgd':
        raise UserError(f"optimizer_kind = {kind!r}: set it to 'sgd' or 'adamw'")
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    return torch.optim.SGD([{'params': biases, 'lr': 2 * lr}, {'params': others}],  # others last: the log has their lr
                           lr=lr, momentum=momentum, weight_decay=weight_decay)


def one_cycle(step, n_steps):
    """:return: the factor of the learning rate: it rises to 1 in the first 7% of the steps, then falls to 0"""
    return min((step + 1) / (0.07 * n_steps), (n_steps - step) / (0.93 * n_steps), 1)


def warm_up_and_decay(step, steps_per_epoch, warm_up, decay_lr_at, decay_lr_to):
    """The factor of the learning rate in a step (the first is 0). It rises to 1 in the first `warm_up` steps, because
    the full rate could wreck the weights; at each epoch of `decay_lr_at`, it is multiplied by `decay_lr_to`."""
    factor = (step + 1) / warm_up if step < warm_up else 1
    for epoch in decay_lr_at:
        if step >= epoch * steps_per_epoch:
            factor *= decay_lr_to
    return factor


def make_train_loader(train_set, batch_size, criterion, seed=0, workers=0, pin_memory=False):
    """A DataLoader for `train`, with an `EpochSampler`. `criterion`, a MultiBoxLoss, matches the objects of each batch
    where it is loaded: in the workers, if there are some, so that a fast GPU need not wait for it."""
    sampler = EpochSampler(len(train_set), seed, get_rank(), get_world_size())
    return DataLoader(train_set, batch_size, sampler=sampler, collate_fn=partial(collate_fn, match=criterion.match),
                      num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0)  # kept between epochs


def best_of(checkpoint_path):
    """The path of the best checkpoint: `checkpoint_path` with "_best" before its extension."""
    return '{}_best{}'.format(*os.path.splitext(checkpoint_path))


def fit(model, optimizer, criterion, train_loader, checkpoint_path, *, epochs, lr_factor, start_epoch=0,
        test_loader=None, evaluate_every=0, evaluated=True, bfloat16=False, **options):
    """Train from `start_epoch` up to `epochs`. Save a checkpoint after each epoch and, with evaluations, the best one.

    :param model: SSD300, on the device to train on; with its optimizer, see `make_optimizer`
    :param criterion: MultiBoxLoss
    :param train_loader: see `make_train_loader`
    :param checkpoint_path: where to save the checkpoint; the log is saved beside it
    :param epochs: number of epochs of the whole training; start_epoch is the first to train, from 0
    :param lr_factor: function that maps a step, counted from 0 over all epochs, to the factor of the learning rate
    :param test_loader: DataLoader to evaluate with every `evaluate_every` epochs and after the last; 0 for never
    :param evaluated: False if the evaluation after epoch start_epoch - 1 was interrupted, so that it is done first
    :param bfloat16: train and evaluate in 16 bits
    :param options: `print_freq` and `grad_clip` of `train`"""
    network = data_parallel(model)
    first_step = start_epoch * len(train_loader)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(first_step + step))  # LambdaLR counts from 0 in every run
    log_path = os.path.splitext(checkpoint_path)[0] + '.csv' if get_rank() == 0 else None  # rank 0 writes
    start_log(log_path, start_epoch, evaluated)
    best = -math.inf
    if evaluate_every > 0 and start_epoch > 0 and os.path.exists(best_of(checkpoint_path)):
        best = load_checkpoint(best_of(checkpoint_path)).get('mAP', best)

    def save(path, epoch, **more):
        """Save a checkpoint, return True. If it fails, print why, return False; in the last epoch, raise UserError."""
        try:
            save_checkpoint(path, epoch, model, optimizer, train_loader.dataset.label_map, train_loader.sampler.seed,
                            **more)
        except UserError as error:
            if epoch + 1 == epochs:
                raise
            print(f'Epoch {epoch} is not saved: {error}', file=sys.stderr, flush=True)
            return False
        return True

    # If the last evaluation was interrupted, begin with it: in its epoch, start_epoch - 1, the loop only evaluates.
    for epoch in range(start_epoch if evaluated else start_epoch - 1, epochs):
        if epoch >= start_epoch:
            train_loader.sampler.set_epoch(epoch)
            train(train_loader, network, criterion, optimizer, epoch, epochs, bfloat16=bfloat16, log_path=log_path,
                  schedule=schedule, **options)
            if get_rank() == 0:
                save(checkpoint_path, epoch)
        if evaluation_is_due(epoch, epochs, evaluate_every):
            mAP = evaluate(test_loader, model, bfloat16=bfloat16).mAP
            if get_rank() == 0:
                write_log(log_path, epoch=epoch, batch=len(train_loader), mAP=mAP)
                if mAP > best and save(best_of(checkpoint_path), epoch, mAP=mAP):
                    best = mAP
                save(checkpoint_path, epoch, mAP=mAP)  # with it, this epoch counts as evaluated
                print(f'epoch {epoch}  mAP {mAP:.4f}  best {best:.4f}', flush=True)


def evaluation_is_due(epoch, epochs, evaluate_every):
    """Whether an evaluation follows this epoch: every `evaluate_every` epochs, if not 0, and after the last."""
    return evaluate_every > 0 and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs)


def train(train_loader, model, criterion, optimizer, epoch, epochs=None, print_freq=200, grad_clip=None, bfloat16=False,
          log_path=None, schedule=None):
    """Train for one epoch.

    :param train_loader: DataLoader of PascalVOCDataset; that of `make_train_loader` has matched the objects already
    :param model: SSD300, or what `distributed.data_parallel` returns for it
    :param criterion: MultiBoxLoss; `optimizer` is that of the model's parameters
    :param epoch: number of the epoch, from 0; `epochs`, their number, is only for the time left
    :param print_freq: batches between two lines of the log
    :param grad_clip: maximum norm of the gradient; None for no limit
    :param bfloat16: compute in 16 bits, and only the loss in 32
    :param log_path: CSV file of the log; None for none
    :param schedule: PyTorch's LRScheduler, which sets the learning rate of the next step; None to keep it
    :raises UserError: the loss or the gradient was not finite; the weights are as they were before that batch"""
    model.train()
    device = next(model.parameters()).device
    n_batches = len(train_loader)
    losses, n_images, loading, line_start = [], 0, 0., time.perf_counter()  # since the last line of the log
    step_end = time.perf_counter()

    for i, (images, boxes, labels, _) in enumerate(train_loader):  # boxes, labels: of the objects, or matched
        loading += time.perf_counter() - step_end
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loss, loc_loss, conf_loss = criterion.losses(predicted_locs, predicted_scores, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)  # with inf, it only measures
        # The sum is finite only if each process's loss is, and the gradient, which all share. This waits for the GPU.
        if not (all_reduce_mean(loss.detach()) + norm).isfinite():
            raise UserError(f'the loss or the gradient became infinite or NaN in epoch {epoch}, batch {i + 1} (loss '
                            f'{loss.item()}). The weights were not changed, and the last checkpoint, if any, is fine: '
                            "go on with a lower lr or grad_clip = 10; or, with 'sgd', start with a longer warm_up")
        optimizer.step()

        losses.append(torch.stack([loss, loc_loss, conf_loss]).detach())
        n_images += len(images) * get_world_size()
        if (i + 1) % print_freq == 0 or i + 1 == n_batches:
            means = all_reduce_mean(torch.stack(losses).mean(dim=0)).tolist()
            seconds = time.perf_counter() - line_start
            n_left = ((epochs or epoch + 1) - epoch) * n_batches - (i + 1)
            row = {'epoch': epoch, 'batch': i + 1, 'loss': means[0], 'loc_loss': means[1], 'conf_loss': means[2],
                   'lr': optimizer.param_groups[-1]['lr'], 'images_per_s': n_images / seconds,
                   'data_s': loading / len(losses), 'left_s': round(n_left * seconds / len(losses))}
            if get_rank() == 0:
                left = timedelta(seconds=row['left_s'])
                print(log_line.format(n_batches=n_batches, left=left, **row), flush=True)
            write_log(log_path, **row)
            losses, n_images, loading, line_start = [], 0, 0., time.perf_counter()
        if schedule is not None:
            schedule.step()
        step_end = time.perf_counter()


def start_log(log_path, start_epoch, evaluated=True):
    """Begin the log, or remove from it what will be done again: the epochs from `start_epoch` on and, if `evaluated` is
    False, the evaluation before them. Nothing is done if `log_path` is None, as in all processes but rank 0."""
    if log_path is None:
        return
    rows = []
    if start_epoch > 0 and os.path.exists(log_path):
        with open(log_path, newline='', errors='replace') as file:
            lines = [line.replace('\0', '') for line in file]  # a power failure can leave null bytes
        rows = [row for row in csv.reader(lines) if row and row[0].isdigit() and int(row[0]) < start_epoch
                and (evaluated or int(row[0]) < start_epoch - 1 or not row[-1])]  # row[-1] is the mAP
    write_whole({log_path: ''.join(','.join(row) + '\n' for row in (log_columns, *rows)).encode()})


def write_log(log_path, **row):
    """Add a row with some of `log_columns`, unless `log_path` is None, as in all processes but rank 0."""
    if log_path is None:
        return
    try:
        with open(log_path, 'a', newline='') as file:
            csv.writer(file, lineterminator='\n').writerow([row.get(column, '') for column in log_columns])
    except OSError as error:  # not worth ending days of training
        print(f'A line could not be written to the log {log_path}: {error}', file=sys.stderr)


def make_model(label_map, checkpoint, pretrained, thin):
    """The SSD300 to start from, on the CPU, for the parameters of these names. Raises UserError if one does not fit."""
    if checkpoint is not None:
        model, saved_label_map = load_detector(checkpoint)
        if saved_label_map != label_map:
            raise UserError(f'{checkpoint} detects {list(saved_label_map)[1:]}, but the lists have '
                            f'{list(label_map)[1:]}: use the lists it was trained with; or rename this file and its '
                            'log, and set checkpoint = None and pretrained to its new name, to start anew from its '
                            'weights')
        return model
    if pretrained in ('imagenet', None):
        return SSD300(len(label_map), pretrained == 'imagenet', thin)
    if pretrained != 'coco' and not os.path.isfile(str(pretrained)):
        raise UserError(f"pretrained = {pretrained!r} in train.py: set it to 'imagenet', 'coco', the path of a "
                        'checkpoint, or None')
    model, new_labels = start_from(pretrained, label_map, thin)
    if get_rank() == 0:
        print(f'Starting from the weights of {pretrained}, with its priors; classes whose scores '
              f'start at random: {new_labels or "none"}.')
    return model


def check_overwriting(saved):
    """Raise UserError if training would overwrite a checkpoint. `saved` is the content of the one to go on from, or an
    empty dict; that one may be overwritten."""
    existing = [path for path in (checkpoint_path, best_of(checkpoint_path)) if os.path.exists(path)]
    if existing and not ('optimizer' in saved and os.path.samefile(checkpoint, existing[0])):
        go_on = '' if checkpoint else f"to go on with it, set checkpoint = '{existing[0]}' in train.py; else "
        raise UserError(f'{existing[0]} exists, and training would overwrite it: {go_on}move it and its log away, or '
                        'set checkpoint_path to another name')


def main():
    """Train with the parameters at the top of this file."""
    check_numbers('train.py', 1, thin=thin, batch_size=batch_size, epochs=epochs, print_freq=print_freq)
    check_numbers('train.py', 0, workers=workers, warm_up=warm_up, min_negatives=min_negatives, seed=seed,
                  evaluate_every=evaluate_every, frozen=frozen)
    check_numbers('train.py', 0, float, lr=lr, decay_lr_to=decay_lr_to, momentum=momentum, weight_decay=weight_decay,
                  grad_clip=grad_clip or 0)
    if optimizer_kind == 'sgd' and not isinstance(decay_lr_at, (tuple, list)):
        raise UserError(f'decay_lr_at = {decay_lr_at!r} in train.py: set it to epochs, as (154, 193) or (154,), or ()')
    if frozen not in range(6):
        raise UserError(f'frozen = {frozen!r} in train.py: set it to the number of groups, from 0 to 5')
    if checkpoint is None and frozen and (pretrained is None or (thin != 1 and pretrained in ('imagenet', 'coco'))):
        raise UserError(f'frozen = {frozen} in train.py would keep random or thinned-out weights: set it to 0')
    device = distributed.init_process_group()
    torch.manual_seed(seed)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult)
    if len(train_set) < get_world_size():
        raise UserError(f'{len(train_set)} training images are too few for {get_world_size()} processes: list more')
    saved = {} if checkpoint is None else load_checkpoint(checkpoint)
    check_overwriting(saved)

    model = make_model(train_set.label_map, checkpoint, pretrained, thin).to(device)
    if checkpoint is None and pretrained is None:
        images = [train_set[i, i][0] for i in range(min(16, len(train_set)))]  # i is also the seed of its augmentation
        standardize(model, torch.stack(images).to(device))
    frozen_layers = tuple(f'base.conv{group}_' for group in range(1, frozen + 1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen_layers))  # the optimizer skips those without a gradient
    optimizer = make_optimizer(model, optimizer_kind, lr, weight_decay, momentum)
    start_epoch, seed_of_run, evaluated = 0, seed, True
    if 'optimizer' in saved:  # convert_checkpoint.py writes only weights, to start from
        restore(optimizer, saved)
        start_epoch, seed_of_run = saved['epoch'] + 1, saved['seed']  # images go on in the order of the first run
        evaluated = 'mAP' in saved or not evaluation_is_due(saved['epoch'], epochs, evaluate_every)
    if start_epoch > epochs or (start_epoch == epochs and evaluated):
        raise UserError(f'epochs = {epochs} in train.py, but {start_epoch} have been trained already: raise epochs; '
                        "or with 'adamw', whose learning rate has fallen to 0 by now, start anew with more")
    del saved  # frees the memory of its weights

    criterion = MultiBoxLoss(model.priors_cxcy, min_negatives=min_negatives)
    train_loader = make_train_loader(train_set, batch_size, criterion, seed_of_run, workers, device.type == 'cuda')
    if optimizer_kind == 'adamw':
        lr_factor = partial(one_cycle, n_steps=epochs * len(train_loader))
    else:
        lr_factor = partial(warm_up_and_decay, steps_per_epoch=len(train_loader), warm_up=warm_up,
                            decay_lr_at=decay_lr_at, decay_lr_to=decay_lr_to)
    test_loader = None
    if evaluate_every > 0:
        test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
        test_loader = make_test_loader(test_set, batch_size, workers, device)
    if get_rank() == 0:
        print(f'Training on {device} with {len(train_set)} images, from epoch {start_epoch} of {epochs}.')
    try:
        fit(model, optimizer, criterion, train_loader, checkpoint_path, epochs=epochs, lr_factor=lr_factor,
            start_epoch=start_epoch, test_loader=test_loader, evaluate_every=evaluate_every, evaluated=evaluated,
            print_freq=print_freq, grad_clip=grad_clip, bfloat16=bfloat16)
    except KeyboardInterrupt:
        last = checkpoint_path if os.path.exists(checkpoint_path) else checkpoint
        told = 'There is no checkpoint yet.' if last is None else f'The last checkpoint is {last}.'
        raise KeyboardInterrupt(told) from None  # `run` prints it
    distributed.destroy_process_group()


if __name__ == '__main__':
    run(main)
