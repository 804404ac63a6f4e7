"""
Train SSD300 on the pictures that create_data_lists.py has listed:

    python train.py

Edit the parameters below first. After each epoch the weights go to `checkpoint_path`, and the log to a .csv file beside
it. To go on after an interruption, set `checkpoint` to that file. With several GPUs (see processes.py):

    torchrun --nproc_per_node=8 train.py
"""
import csv
import math
import os
import time
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from datasets import EpochSampler, PascalVOCDataset, collate_fn, load_batches, quiet_worker
from files import UserError, run, write_whole
from model import SSD300, MultiBoxLoss
from pretrained import start_from_coco
from processes import join_processes, leave_processes, mean_over_processes, n_processes, process_number
from utils import AverageMeter, adjust_learning_rate, clip_gradient, fast_in_bfloat16, load_checkpoint, save_checkpoint

# Data
data_folder = './'  # where create_data_lists.py wrote the lists
keep_difficult = True  # train on objects that are marked as difficult, too
workers = 4  # processes that load pictures

# Model
checkpoint = None  # a checkpoint to go on from, or None to start anew
checkpoint_path = 'checkpoint_ssd300.pth'  # where checkpoints are written
pretrained = 'imagenet'  # start: 'imagenet' for VGG-16's base, 'coco' for a whole detector, None for random weights
thin = 1  # keep every thin-th channel: 1 for the paper's network; 4 for a laptop, with a fifteenth of the operations

# Learning: the paper's recipe, 120,000 iterations of 32 pictures of VOC 07+12, in epochs and with a smaller batch
batch_size = 8  # pictures in a batch, of each process if there are several
epochs = 232  # times to go through the training pictures
lr = 1e-3  # learning rate; biases learn at twice this rate
decay_lr_at = (154, 193)  # epochs from which the learning rate is lower ...
decay_lr_to = 0.1  # ... by this factor, each time
momentum = 0.9  # of stochastic gradient descent
weight_decay = 5e-4  # how hard large weights are pulled back
grad_clip = None  # largest length of the gradient; set it, say to 10, if the loss explodes
bfloat16 = None  # compute in 16 bits: True, False, or None for only on GPUs that are made for it
seed = 0  # the same seed gives the same weights, on the same processor
print_freq = 200  # batches between two lines of the log


def make_optimizer(model, lr, momentum, weight_decay):
    """
    :param model: SSD300
    :return: stochastic gradient descent, with twice the learning rate for biases, as in the paper's code
    """
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    return torch.optim.SGD([{'params': biases, 'lr': 2 * lr}, {'params': others}],
                           lr=lr, momentum=momentum, weight_decay=weight_decay)


@torch.no_grad()
def standardize(model, images):
    """
    Prepare random weights for learning. Layer after layer, random weights make different pictures more alike, until
    hardly anything tells them apart. So shift and scale each layer but the predictions, such that over some pictures
    each of its channels has the mean 0 and the spread 1 (Salimans and Kingma, "Weight normalization", 2016). And let
    the first predictions be nearly 0: random ones would be wild guesses, which would take many steps to take back.

    :param model: SSD300 with random weights, which are changed in place
    :param images: some pictures, a tensor (N, 3, 300, 300)
    """
    def shift_and_scale(layer, _, output):
        spread, mean = torch.std_mean(output, dim=(0, 2, 3))  # (n_channels), (n_channels)
        spread = spread.clamp(min=1e-3)  # a channel that never changes is left as it is, or nearly so
        layer.weight /= spread.view(-1, 1, 1, 1)
        layer.bias.sub_(mean).div_(spread)
        return (output - mean.view(-1, 1, 1)) / spread.view(-1, 1, 1)  # what the next layer gets

    layers = [*model.base.children(), *model.aux_convs.children()]
    hooks = [layer.register_forward_hook(shift_and_scale) for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    model(images)
    for hook in hooks:
        hook.remove()
    for layer in model.pred_convs.children():
        layer.weight *= 0.1


def fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, start_epoch=0, seed=0, workers=0,
        decay_lr_at=(), decay_lr_to=0.1, **options):
    """
    Train from `start_epoch` up to `epochs`, with a checkpoint after each epoch.

    :param model: SSD300, on the device to train on
    :param optimizer: its optimizer
    :param train_set: PascalVOCDataset
    :param options: see `train`; the others are the parameters at the top of this file
    """
    criterion = MultiBoxLoss(model.priors_cxcy)
    sampler = EpochSampler(len(train_set), seed, process_number(), n_processes())
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                              pin_memory=model.priors_cxcy.is_cuda, persistent_workers=workers > 0,
                              worker_init_fn=quiet_worker)
    first = process_number() == 0  # the only process that writes
    log_path = os.path.splitext(checkpoint_path)[0] + '.csv' if first else None
    if first:
        start_log(log_path, start_epoch)
    network = model
    if n_processes() > 1:
        # Each process has a copy of the model, and they average their gradients; these lie where they are averaged, so
        # that none is copied. The priors, a buffer, never change, and need not be sent around at each step.
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # set here, because newer versions warn of the argument
    for epoch in range(start_epoch, epochs):
        if epoch in decay_lr_at:
            adjust_learning_rate(optimizer, decay_lr_to)
        sampler.set_epoch(epoch)
        train(train_loader, network, criterion, optimizer, epoch, epochs=epochs, log_path=log_path, **options)
        if first:
            save_checkpoint(checkpoint_path, epoch, model, optimizer, train_set.label_map, seed)


def train(train_loader, model, criterion, optimizer, epoch, epochs=None, print_freq=200, grad_clip=None, bfloat16=None,
          log_path=None):
    """
    Train for one epoch.

    :param train_loader: DataLoader of PascalVOCDataset, with an EpochSampler
    :param model: SSD300, or its copy in this process (see `fit`)
    :param criterion: MultiBoxLoss
    :param optimizer: optimizer of the model's parameters
    :param epoch: the epoch's number, from 0
    :param epochs: how many there will be, for the time left
    :param log_path: CSV file to which the log's lines are added; the others are the parameters at the top of this file
    :raises UserError: the loss was not a finite number; the weights are as they were before that batch
    """
    model.train()
    device = criterion.priors_cxcy.device
    bfloat16 = fast_in_bfloat16(device) if bfloat16 is None else bfloat16
    n_batches = len(train_loader)
    loc_losses, conf_losses, data_time, n_images = AverageMeter(), AverageMeter(), AverageMeter(), 0
    last_line = end = time.time()

    # The order of the pictures is fixed within an epoch: asked by us, too, the sampler tells which are in a batch.
    batches = zip(train_loader.batch_sampler, load_batches(train_loader))
    for i, (pictures, (images, boxes, labels, _)) in enumerate(batches):
        data_time.update(time.time() - end)
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)

        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loc_loss, conf_loss = criterion.parts(predicted_locs, predicted_scores, boxes, labels)
        loss = conf_loss + criterion.alpha * loc_loss
        if not update(optimizer, loss, grad_clip):
            names = ', '.join(os.path.basename(train_loader.dataset.images[index]) for index, _ in pictures)
            raise UserError(describe_broken_batch(loss.item(), names, epoch, i))

        loc_losses.update(loc_loss.detach())  # left on the GPU until a line is printed
        conf_losses.update(conf_loss.detach())
        n_images += len(images) * n_processes()
        end = time.time()
        if (i + 1) % print_freq and i + 1 < n_batches:
            continue

        loc, conf = mean_over_processes(torch.stack([loc_losses.avg, conf_losses.avg])).tolist()
        seconds_per_batch = (time.time() - last_line) / loc_losses.count
        batches_left = ((epochs or epoch + 1) - epoch) * n_batches - (i + 1)
        row = {'epoch': epoch, 'batch': i + 1, 'loss': conf + criterion.alpha * loc, 'loc_loss': loc, 'conf_loss': conf,
               'lr': optimizer.param_groups[-1]['lr'], 'images_per_s': n_images / (time.time() - last_line),
               'data_s': data_time.avg, 'left_s': round(batches_left * seconds_per_batch)}
        if process_number() == 0:
            print('epoch {epoch}  batch {batch}/{n}  loss {loss:.4f} (loc {loc_loss:.4f}, conf {conf_loss:.4f})  '
                  'lr {lr:.2g}  {images_per_s:.1f} images/s  data {data_s:.3f} s  left {left}'.format(
                      n=n_batches, left=timedelta(seconds=row['left_s']), **row), flush=True)
        if log_path is not None:
            with open(log_path, 'a', newline='') as file:
                csv.writer(file, lineterminator='\n').writerow(row.values())
        loc_losses, conf_losses, data_time, n_images = AverageMeter(), AverageMeter(), AverageMeter(), 0
        last_line = end = time.time()


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


def describe_broken_batch(loss, names, epoch, i):
    """
    :param loss: this process's loss
    :param names: of the pictures that it is the loss of
    :param epoch: the epoch's number
    :param i: the batch's number, from 0
    :return: a line on a batch whose loss or gradient is not finite
    """
    if math.isfinite(loss) and n_processes() > 1:
        what = 'gradient or the loss of another process became infinite or NaN'
    else:
        what = 'gradient became infinite or NaN' if math.isfinite(loss) else f'loss became {loss}'
    return (f'the {what} in epoch {epoch}, batch {i + 1}, with the pictures {names}. The weights were not changed, '
            'and the last checkpoint is as it was: check the boxes of these pictures, lower lr, or set grad_clip')


def start_log(log_path, start_epoch):
    """
    Make sure that the log ends where training starts: after an interruption, later epochs will be logged again.

    :param log_path: CSV file, which may exist
    :param start_epoch: the first epoch to come
    """
    header = ['epoch', 'batch', 'loss', 'loc_loss', 'conf_loss', 'lr', 'images_per_s', 'data_s', 'left_s']
    rows = []
    if start_epoch > 0 and os.path.exists(log_path):
        with open(log_path, newline='') as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) < start_epoch]
    with write_whole(log_path, mode='w') as [file]:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])


def main():
    """Train with the parameters at the top of this file."""
    device = join_processes()
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult)
    torch.backends.cudnn.benchmark = True  # nearly all batches have one shape: let cuDNN find the fastest way
    saved = None if checkpoint is None else load_checkpoint(checkpoint)
    resumes = saved is not None and 'optimizer' in saved  # else it is from the earlier implementation: only its weights
    if os.path.exists(checkpoint_path) and not (resumes and os.path.samefile(checkpoint, checkpoint_path)):
        raise UserError(f'{checkpoint_path} exists, and training would overwrite it: to go on with it, set '
                        f"checkpoint = '{checkpoint_path}' in train.py; else move it away")
    if pretrained not in ('imagenet', 'coco', None):
        raise UserError(f"pretrained = {pretrained!r} in train.py: set it to 'imagenet', 'coco', or None")

    torch.manual_seed(seed)
    if saved is not None:
        if saved['label_map'] != train_set.label_map:
            raise UserError(f'{checkpoint} detects {list(saved["label_map"])[1:]}, but the lists in {data_folder} have '
                            f'{list(train_set.label_map)[1:]}: use the lists it was trained with')
        model = SSD300.from_checkpoint(saved, checkpoint)
    elif pretrained == 'coco':
        model, new_labels = start_from_coco(train_set.label_map, thin)
        if process_number() == 0:
            print(f'Starting from weights trained on COCO, which lack {new_labels or "none of the labels"}.')
    else:
        model = SSD300(len(train_set.label_map), pretrained == 'imagenet', thin)
    model = model.to(device)
    optimizer = make_optimizer(model, lr, momentum, weight_decay)

    start_epoch, first_seed = (saved['epoch'] + 1, saved['seed']) if resumes else (0, seed)
    if resumes:  # the optimizer's momentum is the checkpoint's; its learning rate follows from the parameters above
        optimizer.load_state_dict(saved['optimizer'] | {'param_groups': optimizer.state_dict()['param_groups']})
        for _ in [epoch for epoch in decay_lr_at if epoch < start_epoch]:
            adjust_learning_rate(optimizer, decay_lr_to)
    del saved  # or its weights would take up memory to the end
    if process_number() == 0:
        print(f'Training on {device} with {len(train_set)} pictures, epochs {start_epoch} to {epochs - 1}.')
    try:
        fit(model, optimizer, train_set, checkpoint_path, epochs, batch_size, start_epoch, first_seed, workers,
            decay_lr_at, decay_lr_to, print_freq=print_freq, grad_clip=grad_clip, bfloat16=bfloat16)
    except KeyboardInterrupt:
        last = checkpoint_path if os.path.exists(checkpoint_path) else checkpoint
        raise KeyboardInterrupt('There is no checkpoint yet.' if last is None else f'The last checkpoint is {last}.')
    leave_processes()


if __name__ == '__main__':
    run(main)
