"""
Train SSD300 on the images that create_data_lists.py has listed:

    python train.py

Edit the parameters below first. After each epoch the weights go to `checkpoint_path`, and the log to a .csv file beside
it. To go on after an interruption, set `checkpoint` to that file. With several GPUs (see processes.py):

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
from torch.utils.data import DataLoader

from checkpoints import load_checkpoint, load_detector, save_checkpoint, start_from_coco
from datasets import EpochSampler, PascalVOCDataset, collate_fn, load_batches, quiet_worker
from eval import evaluate, make_test_loader
from files import UserError, run, write_whole
from model import SSD300, MultiBoxLoss, possible_thin
from processes import (join_processes, leave_processes, mean_over_processes, n_processes, process_number,
                       share_gradients)
from utils import adjust_learning_rate, clip_gradient, fast_in_bfloat16

# Data
data_folder = './'  # where create_data_lists.py wrote the lists
keep_difficult = True  # train on objects that are marked as difficult, too
workers = 4  # processes that load images

# Model
checkpoint = None  # a checkpoint to go on from, or None to start anew
checkpoint_path = 'checkpoint_ssd300.pth'  # where checkpoints are written
pretrained = 'imagenet'  # start: 'imagenet' for VGG-16's base, 'coco' for a whole detector, None for random weights
thin = 1  # of a new training, every thin-th channel is kept: 1 for the paper's network, 4 for one a laptop can train

# Learning: the paper's recipe, 120,000 iterations of 32 images of VOC 07+12, in epochs and with a smaller batch
batch_size = 8  # images in a batch, of each process if there are several
epochs = 232  # times to go through the training images
optimizer = 'sgd'  # 'sgd' for the paper's recipe, 'adamw' for few images or random weights
lr = 1e-3  # learning rate; with 'sgd', biases learn at twice this rate; with 'adamw', it is the highest
decay_lr_at = (154, 193)  # with 'sgd', epochs from which the learning rate is lower ...
decay_lr_to = 0.1  # ... by this factor, each time; with 'adamw', it rises and falls by itself
momentum = 0.9  # how long earlier gradients count
weight_decay = 5e-4  # how hard large weights are pulled back
grad_clip = None  # largest length of the gradient; set it, say to 10, if the loss explodes
bfloat16 = None  # compute in 16 bits: True, False, or None for only on GPUs that are made for it
seed = 0  # the same seed gives the same weights, on the same processor
print_freq = 200  # batches between two lines of the log
evaluate_every = 0  # epochs between two measurements of the mAP; 0 for none: VOC's test must not choose the epoch

log_columns = 'epoch', 'batch', 'loss', 'loc_loss', 'conf_loss', 'lr', 'images_per_s', 'data_s', 'left_s', 'mAP'


def make_optimizer(model, lr, momentum, weight_decay, kind='sgd'):
    """
    :param model: SSD300
    :param kind: 'sgd' or 'adamw'; the others are the parameters at the top of this file
    :return: stochastic gradient descent, with twice the learning rate for biases, as in the paper's code; or AdamW,
        which needs far fewer steps from random weights
    """
    if kind == 'adamw':
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.99), weight_decay=weight_decay)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    return torch.optim.SGD([{'params': biases, 'lr': 2 * lr}, {'params': others}],
                           lr=lr, momentum=momentum, weight_decay=weight_decay)


def one_cycle(optimizer, n_steps, n_done=0):
    """
    Let the learning rate rise from nearly nothing, because the first steps are rough, and then fall to nothing.

    :param optimizer: its learning rate is from now on a part of what it is, and another after each step
    :param n_steps: how many steps the training has
    :param n_done: how many of them were done before
    """
    def part(step):
        """:return: what part of the highest learning rate a step has"""
        return min((step + 1) / (0.07 * n_steps), (n_steps - step) / (0.93 * n_steps), 1)

    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, part, n_done - 1)
    optimizer.register_step_post_hook(lambda *_: schedule.step())


def best_of(checkpoint_path):
    """:return: where the best checkpoint is kept, beside the last"""
    return '{}_best{}'.format(*os.path.splitext(checkpoint_path))


def fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, start_epoch=0, seed=0, workers=0,
        decay_lr_at=(), decay_lr_to=0.1, rise_and_fall=False, test_set=None, evaluate_every=0, **options):
    """
    Train from `start_epoch` up to `epochs`, with a checkpoint after each epoch; if the mAP is measured, also one of the
    best epoch.

    :param model: SSD300, on the device to train on
    :param optimizer: its optimizer
    :param train_set: PascalVOCDataset
    :param start_epoch: the first epoch to come, from 0
    :param rise_and_fall: let the learning rate follow `one_cycle`; then `decay_lr_at` should be empty
    :param test_set: PascalVOCDataset to measure the mAP on
    :param options: see `train`; the others are the parameters at the top of this file
    """
    criterion = MultiBoxLoss(model.priors_cxcy)
    sampler = EpochSampler(len(train_set), seed, process_number(), n_processes())
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                              pin_memory=model.priors_cxcy.is_cuda, persistent_workers=workers > 0,
                              worker_init_fn=quiet_worker)
    network = share_gradients(model)
    first = process_number() == 0  # the only process that writes
    log_path = os.path.splitext(checkpoint_path)[0] + '.csv' if first else None
    if first:
        start_log(log_path, start_epoch)
    best_path, best = best_of(checkpoint_path), -math.inf
    if evaluate_every > 0:
        test_loader = make_test_loader(test_set, batch_size, workers, model.priors_cxcy.device)
        if start_epoch > 0 and os.path.exists(best_path):
            best = load_checkpoint(best_path).get('mAP', best)
    if rise_and_fall:
        one_cycle(optimizer, epochs * len(train_loader), start_epoch * len(train_loader))
    for epoch in range(start_epoch, epochs):
        if epoch in decay_lr_at:
            adjust_learning_rate(optimizer, decay_lr_to)
        sampler.set_epoch(epoch)
        train(train_loader, network, criterion, optimizer, epoch, epochs=epochs, log_path=log_path, **options)
        if first:
            save_checkpoint(checkpoint_path, epoch, model, optimizer, train_set.label_map, seed)
        if evaluate_every > 0 and ((epoch + 1) % evaluate_every == 0 or epoch + 1 == epochs):
            _, mean_average_precision = evaluate(test_loader, model)
            if first:
                add_to_log(log_path, epoch=epoch, batch=len(train_loader), mAP=mean_average_precision)
                if mean_average_precision > best:
                    best = mean_average_precision
                    save_checkpoint(best_path, epoch, model, optimizer, train_set.label_map, seed, mAP=best)
                print(f'epoch {epoch}  mAP {mean_average_precision:.4f}  best {best:.4f}', flush=True)


def train(train_loader, model, criterion, optimizer, epoch, epochs=None, print_freq=200, grad_clip=None, bfloat16=None,
          log_path=None):
    """
    Train for one epoch.

    :param train_loader: DataLoader of PascalVOCDataset, with an EpochSampler
    :param model: SSD300, or what `processes.share_gradients` made of it
    :param criterion: MultiBoxLoss
    :param optimizer: optimizer of the model's parameters
    :param epoch: the epoch's number, from 0
    :param epochs: how many there will be, for the time left
    :param log_path: CSV file to which the log's lines are added; the others are the parameters at the top of this file
    :raises UserError: the loss or the gradient was not finite; the weights are as they were before that batch
    """
    model.train()
    device = criterion.priors_cxcy.device
    bfloat16 = fast_in_bfloat16(device) if bfloat16 is None else bfloat16
    n_batches = len(train_loader)
    losses, n_images, loading, last_line = [], 0, 0., time.time()  # since the last line of the log
    end = time.time()  # of the last batch

    # To name a batch's images: their order is fixed within an epoch, so the sampler tells us, too, which they are.
    batches = zip(train_loader.batch_sampler, load_batches(train_loader))
    for i, (images, (images, boxes, labels, _)) in enumerate(batches):
        loading += time.time() - end
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)

        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loc_loss, conf_loss = criterion.losses(predicted_locs, predicted_scores, boxes, labels)
        loss = conf_loss + criterion.alpha * loc_loss
        if not update(optimizer, loss, grad_clip):
            names = ', '.join(os.path.basename(train_loader.dataset.images[index]) for index, _ in images)
            raise UserError(f'the loss or the gradient became infinite or NaN in epoch {epoch}, batch {i + 1}. Here, '
                            f'the loss was {loss.item()}, of the images {names}. The weights were not changed, and '
                            'the last checkpoint is as it was: check the boxes of these images, lower lr, or set '
                            'grad_clip')

        losses.append(torch.stack([loc_loss, conf_loss]).detach())  # left on the GPU until a line is printed
        n_images += len(images) * n_processes()
        if (i + 1) % print_freq == 0 or i + 1 == n_batches:
            loc, conf = mean_over_processes(torch.stack(losses).mean(dim=0)).tolist()
            seconds = time.time() - last_line
            n_left = ((epochs or epoch + 1) - epoch) * n_batches - (i + 1)
            write_log(log_path, n_batches, epoch=epoch, batch=i + 1, loss=conf + criterion.alpha * loc, loc_loss=loc,
                      conf_loss=conf, lr=optimizer.param_groups[-1]['lr'], images_per_s=n_images / seconds,
                      data_s=loading / len(losses), left_s=round(n_left * seconds / len(losses)))
            losses, n_images, loading, last_line = [], 0, 0., time.time()
        end = time.time()


def update(optimizer, loss, grad_clip=None):
    """
    Take a step down the gradient, unless the loss or the gradient is not finite, in this process or another: then the
    weights and the optimizer's memory stay as they are.

    :param optimizer: its weights change
    :param loss: the loss, a scalar
    :param grad_clip: see `train`
    :return: whether the step was taken
    """
    optimizer.zero_grad()
    loss.backward()
    length = clip_gradient(optimizer, math.inf if grad_clip is None else grad_clip)
    # Of several processes, each has its own loss, and if one is not finite, the mean is not; the gradient is the same.
    finite = mean_over_processes(loss.detach()).isfinite() & length.isfinite()
    finite = finite.item()  # a GPU has to finish its work here, to tell
    if finite:
        optimizer.step()
    return finite


def start_log(log_path, start_epoch):
    """
    Make sure that the log ends where training starts: after an interruption, later epochs will be logged again.

    :param log_path: CSV file, which may exist
    :param start_epoch: the first epoch to come
    """
    rows = []
    if start_epoch > 0 and os.path.exists(log_path):
        with open(log_path, newline='') as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) < start_epoch]
    with write_whole(log_path, mode='w') as [file]:
        csv.writer(file, lineterminator='\n').writerows([log_columns, *rows])


def write_log(log_path, n_batches, **row):
    """
    Print a line of the log, and add it to the file; in the first process only.

    :param log_path: CSV file, or None
    :param n_batches: of an epoch
    :param row: a value for each of `log_columns` but the mAP
    """
    if process_number() == 0:
        print('epoch {epoch}  batch {batch}/{n}  loss {loss:.4f} (loc {loc_loss:.4f}, conf {conf_loss:.4f})  '
              'lr {lr:.2g}  {images_per_s:.1f} images/s  data {data_s:.3f} s  left {left}'.format(
                  n=n_batches, left=timedelta(seconds=row['left_s']), **row), flush=True)
    if log_path is not None:
        add_to_log(log_path, **row)


def add_to_log(log_path, **row):
    """Add a row to a CSV file, with values for some of `log_columns`; the others stay empty."""
    try:
        with open(log_path, 'a', newline='') as file:
            csv.writer(file, lineterminator='\n').writerow([row.get(column, '') for column in log_columns])
    except OSError as error:  # no reason to end a training of days
        print(f'This line is not in {log_path}: {error}', file=sys.stderr)


def make_model(label_map, checkpoint, pretrained, thin):
    """
    :param label_map: dict of label -> index, of the classes to learn; the others are the parameters at the top of this
        file
    :return: SSD300 to start from, on the CPU
    :raises UserError: a parameter has a value that it can't have, or the checkpoint is for other classes
    """
    if pretrained not in ('imagenet', 'coco', None):
        raise UserError(f"pretrained = {pretrained!r} in train.py: set it to 'imagenet', 'coco', or None")
    if thin not in possible_thin:
        raise UserError(f'thin = {thin!r} in train.py: set it to one of {possible_thin}')
    if checkpoint is not None:
        model, saved_label_map = load_detector(checkpoint)
        if saved_label_map != label_map:
            raise UserError(f'{checkpoint} detects {list(saved_label_map)[1:]}, but the lists have '
                            f'{list(label_map)[1:]}: use the lists it was trained with')
        return model
    if pretrained == 'coco':
        model, new_labels = start_from_coco(label_map, thin)
        if process_number() == 0:
            print(f'Starting from weights trained on COCO, which lack {new_labels or "none of the labels"}.')
        return model
    return SSD300(len(label_map), pretrained == 'imagenet', thin)


@torch.no_grad()
def standardize(model, images):
    """
    Prepare random weights for learning. Layer after layer, random weights make different images more alike, until
    hardly anything tells them apart. So shift and scale each layer but the predictions, such that over some images
    each of its channels has the mean 0 and the spread 1 (Salimans and Kingma, "Weight normalization", 2016). And let
    the first predictions be nearly 0: random ones would be wild guesses, which would take many steps to take back.

    :param model: SSD300 with random weights, which are changed in place
    :param images: some images, a tensor (N, 3, 300, 300)
    """
    def shift_and_scale(layer, _, output):
        """Change a layer's weights and biases for these images; its output too, which the next layer gets."""
        n_values = output[:, 0].numel()  # of each channel; with one image, conv11_2's have a single one
        spread, mean = torch.std_mean(output, dim=(0, 2, 3), correction=min(1, n_values - 1))  # (n_channels) each
        spread = spread.where(spread > 1e-3, 1)  # (n_channels); a channel that never changes is only shifted
        layer.weight /= spread.view(-1, 1, 1, 1)
        layer.bias.sub_(mean).div_(spread)
        return (output - mean.view(-1, 1, 1)) / spread.view(-1, 1, 1)  # (N, n_channels, height, width)

    layers = [*model.base.children(), *model.aux_convs.children()]
    hooks = [layer.register_forward_hook(shift_and_scale) for layer in layers if isinstance(layer, nn.Conv2d)]
    model(images)
    for hook in hooks:
        hook.remove()
    for layer in model.pred_convs.children():
        layer.weight *= 0.1


def restore(optimizer, saved, decay_lr_at, decay_lr_to):
    """
    Bring a new optimizer to where it was when a checkpoint was saved. Its momentum is the checkpoint's; its learning
    rate follows from the parameters at the top of this file, which may have changed.

    :param saved: see `checkpoints.load_checkpoint`
    :raises UserError: the checkpoint is of another kind of optimizer
    """
    kind, saved_kind = type(optimizer).__name__, saved.get('optimizer_kind', 'SGD')
    if kind != saved_kind:
        raise UserError(f'the checkpoint was trained with {saved_kind}, which remembers other things than {kind}: go '
                        f'on with {saved_kind}, or start anew')
    optimizer.load_state_dict(saved['optimizer'] | {'param_groups': optimizer.state_dict()['param_groups']})
    for epoch in decay_lr_at:
        if epoch <= saved['epoch']:
            adjust_learning_rate(optimizer, decay_lr_to)


def main():
    """Train with the parameters at the top of this file."""
    if optimizer not in ('sgd', 'adamw'):
        raise UserError(f"optimizer = {optimizer!r} in train.py: set it to 'sgd' or 'adamw'")
    if not isinstance(evaluate_every, int) or evaluate_every < 0:
        raise UserError(f'evaluate_every = {evaluate_every!r} in train.py: set it to a whole number of epochs, or to 0')
    device = join_processes()
    torch.backends.cudnn.benchmark = True  # nearly all batches have one shape: let cuDNN find the fastest way
    torch.manual_seed(seed)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult)
    saved = {} if checkpoint is None else load_checkpoint(checkpoint)
    resumes = 'optimizer' in saved  # else it is from the earlier implementation: only its weights
    existing = [path for path in (checkpoint_path, best_of(checkpoint_path)) if os.path.exists(path)]
    if existing and not (resumes and os.path.samefile(checkpoint, existing[0])):
        raise UserError(f'{existing[0]} exists, and training would overwrite it: to go on with it, set '
                        f"checkpoint = '{existing[0]}' in train.py; else move it away, and its log")
    test_set = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True) if evaluate_every else None

    model = make_model(train_set.label_map, checkpoint, pretrained, thin).to(device)
    if checkpoint is None and pretrained is None:
        standardize(model, torch.stack([train_set[i, i][0] for i in range(min(16, len(train_set)))]).to(device))
    learner = make_optimizer(model, lr, momentum, weight_decay, optimizer)
    rise_and_fall = optimizer == 'adamw'
    decays = () if rise_and_fall else decay_lr_at
    start_epoch, first_seed = 0, seed
    if resumes:
        start_epoch, first_seed = saved['epoch'] + 1, saved['seed']
        restore(learner, saved, decays, decay_lr_to)
        if start_epoch >= epochs:
            raise UserError(f'{checkpoint} has been trained for all {epochs} epochs: raise epochs in train.py')
    del saved  # or its weights would take up memory to the end
    if process_number() == 0:
        print(f'Training on {device} with {len(train_set)} images, epochs {start_epoch} to {epochs - 1}.')
    try:
        fit(model, learner, train_set, checkpoint_path, epochs, batch_size, start_epoch=start_epoch, seed=first_seed,
            workers=workers, decay_lr_at=decays, decay_lr_to=decay_lr_to, rise_and_fall=rise_and_fall,
            test_set=test_set, evaluate_every=evaluate_every, print_freq=print_freq, grad_clip=grad_clip,
            bfloat16=bfloat16)
    except KeyboardInterrupt:
        last = checkpoint_path if os.path.exists(checkpoint_path) else checkpoint
        raise KeyboardInterrupt('There is no checkpoint yet.' if last is None else f'The last checkpoint is {last}.')
    leave_processes()


if __name__ == '__main__':
    run(main)
