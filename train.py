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

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint, load_detector, save_checkpoint
from datasets import EpochSampler, PascalVOCDataset, collate_fn
from distributed import (
    all_reduce_mean,
    data_parallel,
    destroy_process_group,
    get_rank,
    get_world_size,
    init_process_group,
)
from errors import UserError, check_numbers, run, write_whole
from eval import evaluate, make_test_loader
from model import SSD300, MultiBoxLoss, possible_thin
from torchvision_weights import start_from_coco
from utils import clip_gradient

# Data
data_folder = './'  # where create_data_lists.py wrote the lists
keep_difficult = True  # also train on objects that are marked as difficult
workers = 4  # processes that load images

# Model
checkpoint = None  # a checkpoint to go on from, or None to start anew
checkpoint_path = 'checkpoint_ssd300.pth'  # where checkpoints are written
pretrained = 'imagenet'  # start from 'imagenet' (VGG-16), from 'coco' (a whole detector), or None (random weights)
thin = 1  # keep every thin-th channel in a new training: 1 for the paper's network, 4 for one that a laptop can train

# Learning: as many images of VOC 07+12 as in the paper's 120,000 iterations of 32, but in smaller batches
batch_size = 8  # images in a batch, of each process if there are several
epochs = 232  # passes over the training images
optimizer_kind = 'sgd'  # 'sgd' for the paper's recipe, 'adamw' for few images or random weights
lr = 1e-3  # peak learning rate; with 'sgd', that of biases is twice this
warm_up = 500  # with 'sgd', steps in which the learning rate rises from near 0 to lr; 0 for none
decay_lr_at = (154, 193)  # with 'sgd', epochs at which the learning rate is multiplied by decay_lr_to
decay_lr_to = 0.1  # with 'sgd'; with 'adamw', the learning rate follows `one_cycle`
momentum = 0.9  # with 'sgd'
weight_decay = 5e-4  # L2 penalty with 'sgd', decoupled with 'adamw'
grad_clip = None  # largest norm of the gradient; set it, say to 10, if the loss explodes
min_negatives = 0  # least number of hard negatives in an image; set it, say to 30, if the lists have empty images
bfloat16 = False  # compute in 16 bits: faster on recent GPUs; see GUIDE.md for its effect on the mAP
seed = 0  # the same seed gives the same weights on the same processor; on a GPU, they drift apart
print_freq = 200  # batches between two lines of the log
evaluate_every = 0  # epochs between two evaluations; 0 for none, so that no checkpoint is selected on the test set

log_columns = 'epoch', 'batch', 'loss', 'loc_loss', 'conf_loss', 'lr', 'images_per_s', 'data_s', 'left_s', 'mAP'
log_line = ('epoch {epoch}  batch {batch}/{n_batches}  loss {loss:.4f} (loc {loc_loss:.4f}, conf {conf_loss:.4f})  '
            'lr {lr:.2g}  {images_per_s:.1f} images/s  data {data_s:.3f} s  left {left}')


def make_optimizer(model, kind, lr, weight_decay, momentum=0.9):
    """Make the optimizer of an SSD300, `lr` being the peak rate: 'sgd' as in the paper, where biases have twice the
    rate, as in its authors' code; or 'adamw', which needs far fewer steps from random weights (`momentum` unused)."""
    if kind == 'adamw':
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
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


def best_of(checkpoint_path):
    """The path of the best checkpoint: `checkpoint_path` with "_best" before its extension."""
    return '{}_best{}'.format(*os.path.splitext(checkpoint_path))


def fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, start_epoch=0, seed=0, workers=0, warm_up=0,
        decay_lr_at=(), decay_lr_to=0.1, rise_and_fall=False, min_negatives=0, test_set=None, evaluate_every=0,
        **options):
    """Train from `start_epoch` up to `epochs`, with a checkpoint after each epoch; with evaluations, also one of the
    epoch with the highest mAP.

    :param model: SSD300, on the device to train on; with its optimizer, see `make_optimizer`
    :param train_set: PascalVOCDataset
    :param checkpoint_path: where to save the checkpoint; the log is saved beside it
    :param epochs: number of epochs of the whole training; start_epoch is the first to train, from 0
    :param batch_size: images in a batch, of each process
    :param seed: for the order of the images and their augmentation
    :param workers: processes that load images
    :param warm_up: with `decay_lr_at` and `decay_lr_to`, see `warm_up_and_decay`
    :param rise_and_fall: let the learning rate follow `one_cycle` instead
    :param min_negatives: see `MultiBoxLoss`
    :param test_set: PascalVOCDataset to evaluate on every `evaluate_every` epochs and after the last; 0 for never
    :param options: the other arguments of `train`"""
    criterion = MultiBoxLoss(model.priors_cxcy, min_negatives=min_negatives)
    sampler = EpochSampler(len(train_set), seed, get_rank(), get_world_size())
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                              pin_memory=model.priors_cxcy.is_cuda, persistent_workers=workers > 0)
    network = data_parallel(model)
    first = get_rank() == 0  # the only process that writes
    log_path = os.path.splitext(checkpoint_path)[0] + '.csv' if first else None
    if first:
        start_log(log_path, start_epoch)
    best_path, best = best_of(checkpoint_path), -math.inf
    if evaluate_every > 0:
        test_loader = make_test_loader(test_set, batch_size, workers, model.priors_cxcy.device)
        if start_epoch > 0 and os.path.exists(best_path):
            best = load_checkpoint(best_path).get('mAP', best)

    n_batches = len(train_loader)

    def factor(step):
        """The factor of the learning rate. It depends only on the step, so an interruption changes nothing."""
        step += start_epoch * n_batches  # LambdaLR counts from 0 in every run
        if rise_and_fall:
            return one_cycle(step, epochs * n_batches)
        return warm_up_and_decay(step, n_batches, warm_up, decay_lr_at, decay_lr_to)

    schedule = LambdaLR(optimizer, factor)

    def save(path, epoch, **more):
        """Save a checkpoint. Returns whether it worked: if another program has the file open, the next epoch's may."""
        try:
            save_checkpoint(path, epoch, model, optimizer, train_set.label_map, seed, **more)
        except UserError as error:
            if epoch + 1 == epochs:
                raise
            print(f'Epoch {epoch} is not saved: {error}', file=sys.stderr, flush=True)
            return False
        return True

    for epoch in range(start_epoch, epochs):
        sampler.set_epoch(epoch)
        train(train_loader, network, criterion, optimizer, epoch, epochs, log_path=log_path, schedule=schedule,
              **options)
        if first:
            save(checkpoint_path, epoch)
        if evaluate_every > 0 and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs):
            _, mean_average_precision = evaluate(test_loader, model)
            if first:
                write_log(log_path, epoch=epoch, batch=n_batches, mAP=mean_average_precision)
                if mean_average_precision > best and save(best_path, epoch, mAP=mean_average_precision):
                    best = mean_average_precision
                print(f'epoch {epoch}  mAP {mean_average_precision:.4f}  best {best:.4f}', flush=True)


def train(train_loader, model, criterion, optimizer, epoch, epochs=None, print_freq=200, grad_clip=None, bfloat16=False,
          log_path=None, schedule=None):
    """Train for one epoch.

    :param train_loader: DataLoader of PascalVOCDataset
    :param model: SSD300, or what `distributed.data_parallel` returns for it
    :param criterion: MultiBoxLoss
    :param optimizer: optimizer of the model's parameters
    :param epoch: number of the epoch, from 0
    :param epochs: number of epochs of the whole training, for the time left
    :param print_freq: batches between two lines of the log
    :param grad_clip: largest norm of the gradient; None for no limit
    :param bfloat16: compute in 16 bits, and only the loss in 32
    :param log_path: CSV file of the log; None for none
    :param schedule: PyTorch's LRScheduler, which sets the learning rate of the next step; None to keep it
    :raises UserError: the loss or the gradient was not finite; the weights are as they were before that batch"""
    model.train()
    device = criterion.priors_cxcy.device
    n_batches = len(train_loader)
    losses, n_images, loading, last_line = [], 0, 0., time.time()  # since the last line of the log
    end = time.time()  # of the last batch

    for i, (images, boxes, labels, _) in enumerate(train_loader):
        loading += time.time() - end
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        # Matching waits for the GPU. Before the network, there is little to wait for; after it, Python would wait for
        # the whole network, instead of going ahead meanwhile.
        true_boxes, true_classes = criterion.match(boxes, labels)  # (N, 8732, 4), (N, 8732)

        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loc_loss, conf_loss = criterion.losses(predicted_locs, predicted_scores, true_boxes, true_classes)
        loss = conf_loss + criterion.alpha * loc_loss
        if not update(optimizer, loss, grad_clip):
            raise UserError(f'the loss or the gradient became infinite or NaN in epoch {epoch}, batch {i + 1} (loss '
                            f'{loss.item()}). The weights were not changed, and the last checkpoint, if there is one, '
                            'is intact: go on from it with a lower lr, with grad_clip = 10, or with a longer warm_up')

        losses.append(torch.stack([loc_loss, conf_loss]).detach())  # stays on the GPU until a line is printed
        n_images += len(images) * get_world_size()
        if (i + 1) % print_freq == 0 or i + 1 == n_batches:
            loc, conf = all_reduce_mean(torch.stack(losses).mean(dim=0)).tolist()
            seconds = time.time() - last_line
            n_left = ((epochs or epoch + 1) - epoch) * n_batches - (i + 1)
            row = {'epoch': epoch, 'batch': i + 1, 'loss': conf + criterion.alpha * loc, 'loc_loss': loc,
                   'conf_loss': conf, 'lr': optimizer.param_groups[-1]['lr'], 'images_per_s': n_images / seconds,
                   'data_s': loading / len(losses), 'left_s': round(n_left * seconds / len(losses))}
            if get_rank() == 0:
                print(log_line.format(n_batches=n_batches, left=timedelta(seconds=row['left_s']), **row), flush=True)
            write_log(log_path, **row)
            losses, n_images, loading, last_line = [], 0, 0., time.time()
        if schedule is not None:
            schedule.step()
        end = time.time()


def update(optimizer, loss, grad_clip=None):
    """Take a step, unless the loss or the gradient is not finite in any process. Returns whether it was taken."""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradient(optimizer, math.inf if grad_clip is None else grad_clip)
    # Each process has its own loss, and if one is not finite, neither is the mean. The gradient is the same in all.
    finite = (all_reduce_mean(loss.detach()).isfinite() & norm.isfinite()).item()  # waits for the GPU
    if finite:
        optimizer.step()
    return finite


def start_log(log_path, start_epoch):
    """Begin the log, or remove what follows the last checkpoint, because these epochs will be trained again."""
    rows = []
    if start_epoch > 0 and os.path.exists(log_path):
        with open(log_path, newline='') as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) < start_epoch]
    with write_whole(log_path, mode='w') as [file]:
        csv.writer(file, lineterminator='\n').writerows([log_columns, *rows])


def write_log(log_path, **row):
    """Add a row with some of `log_columns`, unless `log_path` is None, as in all processes but the first."""
    if log_path is None:
        return
    try:
        with open(log_path, 'a', newline='') as file:
            csv.writer(file, lineterminator='\n').writerow([row.get(column, '') for column in log_columns])
    except OSError as error:  # not worth ending a training of days
        print(f'A line could not be written to the log {log_path}: {error}', file=sys.stderr)


def make_model(label_map, checkpoint, pretrained, thin):
    """The SSD300 to start from, on the CPU, for the parameters of these names at the top of this file."""
    if checkpoint is not None:
        model, saved_label_map = load_detector(checkpoint)
        if saved_label_map != label_map:
            raise UserError(f'{checkpoint} detects {list(saved_label_map)[1:]}, but the lists have '
                            f'{list(label_map)[1:]}: use the lists it was trained with')
        return model
    if pretrained == 'coco':
        model, new_labels = start_from_coco(label_map, thin)
        if get_rank() == 0:
            print(f'Starting from weights trained on COCO; the class scores of {new_labels or "no class"} are random. '
                  'The priors are those of these weights, not of feature_maps in utils.py.')
        return model
    return SSD300(len(label_map), pretrained == 'imagenet', thin)


@torch.no_grad()
def standardize(model, images):
    """Prepare random weights for training. Layer after layer, random weights make the features of different images more
    alike. So scale and shift each layer but the predictions such that over some images each channel has mean 0 and
    standard deviation 1 before its ReLU (data-dependent initialization: Salimans and Kingma, "Weight normalization",
    2016). And scale the layers of the predictions by 0.1, so that these start near 0.

    :param model: SSD300 with random weights, which are changed in place
    :param images: some images, a tensor (N, 3, 300, 300)"""
    def shift_and_scale(layer, _, output):
        """Change a layer's weights and biases, and its output, which is the next layer's input."""
        n_values = output[:, 0].numel()  # of each channel; 1 for conv11_2 with a single image
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=min(1, n_values - 1))  # (n_channels) each
        std = std.where(std > 1e-3, 1)  # (n_channels); a constant channel is only shifted
        layer.weight /= std.view(-1, 1, 1, 1)
        layer.bias.sub_(mean).div_(std)
        return (output - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)  # (N, n_channels, height, width)

    layers = [*model.base.children(), *model.aux_convs.children()]
    hooks = [layer.register_forward_hook(shift_and_scale) for layer in layers if isinstance(layer, nn.Conv2d)]
    model(images)
    for hook in hooks:
        hook.remove()
    for layer in model.pred_convs.children():
        layer.weight *= 0.1


def restore(optimizer, saved):
    """Restore the optimizer's state, such as the momentum, from what `load_checkpoint` returns. The learning rates stay
    as they are, because they follow from the parameters at the top of this file, which may have changed."""
    kind, saved_kind = type(optimizer).__name__, saved.get('optimizer_kind', 'SGD')
    if kind != saved_kind:
        raise UserError(f'the checkpoint was trained with {saved_kind}, whose state does not fit {kind}: set '
                        f"optimizer_kind = '{saved_kind.lower()}' in train.py, or start anew")
    optimizer.load_state_dict({'state': saved['optimizer']['state'],
                               'param_groups': optimizer.state_dict()['param_groups']})


def main():
    """Train with the parameters at the top of this file."""
    for name, value, possible in (('optimizer_kind', optimizer_kind, ('sgd', 'adamw')), ('thin', thin, possible_thin),
                                  ('pretrained', pretrained, ('imagenet', 'coco', None))):
        if value not in possible:
            raise UserError(f'{name} = {value!r} in train.py: set it to one of {possible}')
    check_numbers('train.py', 1, batch_size=batch_size, epochs=epochs, print_freq=print_freq)
    check_numbers('train.py', 0, workers=workers, warm_up=warm_up, min_negatives=min_negatives, seed=seed,
                  evaluate_every=evaluate_every)
    if not isinstance(lr, (int, float)) or lr <= 0 or not isinstance(decay_lr_at, (list, tuple)):
        raise UserError(f'lr = {lr!r}, decay_lr_at = {decay_lr_at!r} in train.py: set lr to a number above 0, and '
                        'decay_lr_at to a list of epochs, such as [20] or [154, 193]')
    device = init_process_group()
    torch.manual_seed(seed)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult)
    if len(train_set) < get_world_size():
        raise UserError(f'{len(train_set)} training images are too few for {get_world_size()} process(es): list more')
    saved = {} if checkpoint is None else load_checkpoint(checkpoint)
    resumes = saved.get('optimizer') is not None  # convert_checkpoint.py writes only weights, to start from
    existing = [path for path in (checkpoint_path, best_of(checkpoint_path)) if os.path.exists(path)]
    if existing and not (resumes and os.path.samefile(checkpoint, existing[0])):
        raise UserError(f'{existing[0]} exists, and training would overwrite it: to go on with it, set '
                        f"checkpoint = '{existing[0]}' in train.py; else move it and its log away")
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True) if evaluate_every else None

    model = make_model(train_set.label_map, checkpoint, pretrained, thin).to(device)
    if checkpoint is None and pretrained is None:
        standardize(model, torch.stack([train_set[(i, i)][0] for i in range(min(16, len(train_set)))]).to(device))
    optimizer = make_optimizer(model, optimizer_kind, lr, weight_decay, momentum)
    start_epoch, seed_of_run = 0, seed
    if resumes:
        start_epoch, seed_of_run = saved['epoch'] + 1, saved['seed']  # images go on in the order of the first run
        restore(optimizer, saved)
        if start_epoch >= epochs:
            raise UserError(f'{checkpoint} has been trained for all {epochs} epochs: raise epochs in train.py')
    del saved  # frees the memory of its weights
    if get_rank() == 0:
        print(f'Training on {device} with {len(train_set)} images, epochs {start_epoch} to {epochs - 1}.')
    try:
        fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, start_epoch, seed_of_run, workers,
            warm_up, decay_lr_at, decay_lr_to, rise_and_fall=optimizer_kind == 'adamw', min_negatives=min_negatives,
            test_set=test_set, evaluate_every=evaluate_every, print_freq=print_freq, grad_clip=grad_clip,
            bfloat16=bfloat16)
    except KeyboardInterrupt:
        last = checkpoint_path if os.path.exists(checkpoint_path) else checkpoint
        raise KeyboardInterrupt('There is no checkpoint yet.' if last is None else f'The last checkpoint is {last}.')
    destroy_process_group()


if __name__ == '__main__':
    run(main)
