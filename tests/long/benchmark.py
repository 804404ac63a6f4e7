"""Measure how fast this project is on this machine, and torchvision beside it:

    python tests/long/benchmark.py

prints a table of medians. All rows are measured in the same run; compare the two columns rather than the numbers
themselves, which depend on the machine. Without a GPU, the rows that need one are not measured. Only for Linux.
"""
import io
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import tv_tensors
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import datasets
import utils
from datasets import PascalVOCDataset
from demo import draw_background
from detect import detect
from model import SSD300, MultiBoxLoss
from train import make_optimizer, make_train_loader, train

n_classes = 21
recipe_images = 232 * 16551  # 232 epochs of VOC 07+12
gpu = torch.device('cuda') if torch.cuda.is_available() else None
kept = {}  # the step that a process of `race` takes


def median_seconds(function, n=5, warm_up=1, times=1):
    """The median time that a function takes, the mean of `times` runs, including its work on the GPU."""
    seconds = []
    for _ in range(warm_up + n):
        start = time.perf_counter()
        for _ in range(times):
            function()
        if gpu is not None:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:]) / times


def peak_memory():
    """The peak memory of this process until now, in GiB. (getrusage counts the peak of the parent process, too.)"""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) / 2**20


def row(what, ours='', other='', ratio=''):
    """Print a row of the table, or the title of a part of it, which begins with a line break."""
    print(f'{what:62}{ours:>22}{other:>22}{ratio:>8}'.rstrip(), flush=True)


# --------------------------------------------------------------------------------------------------------- Detection

def predictions(n_images, trained, device):
    """Predictions like those of a network early in training (about 90,000 scores above 0.01 in each image), or of a
    trained one (a few hundred: 25 objects, each with high scores at a dozen priors around it)."""
    rng = torch.Generator().manual_seed(0)
    locs = torch.randn(n_images, 8732, 4, generator=rng)
    scores = 0.6 * torch.randn(n_images, 8732, n_classes, generator=rng)
    scores[:, :, 0] += 4.3 if not trained else 9
    if trained:
        priors_xy = utils.cxcy_to_xy(utils.create_prior_boxes())
        for image in range(n_images):
            for prior in torch.randint(8732, (25,), generator=rng):
                near = utils.find_jaccard_overlap(priors_xy[prior, None], priors_xy)[0].topk(12).indices
                scores[image, near, torch.randint(1, n_classes, (1,), generator=rng)] += 9
    return locs.to(device), scores.to(device)


def benchmark_detection(device):
    """Decoding and non-maximum suppression, ours and torchvision's, of a batch of 8 images."""
    row(f'\nDetection on {device}: 8 images, {n_classes} classes', 'ours', 'torchvision', 'ratio')
    model = SSD300(n_classes).to(device)
    other = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=n_classes).to(device).eval()
    other.score_thresh, other.nms_thresh, other.detections_per_img = 0.01, 0.45, 200
    priors = [utils.cxcy_to_xy(model.priors_cxcy) * 300] * 8
    for trained in (False, True):
        locs, scores = predictions(8, trained, device)
        n = (scores.softmax(dim=2)[:, :, 1:] > 0.01).sum().item() // 8
        ours = median_seconds(partial(model.detect_objects, locs, scores, 0.01)) / 8
        theirs = median_seconds(partial(other.postprocess_detections, {'bbox_regression': locs, 'cls_logits': scores},
                                        priors, [(300, 300)] * 8)) / 8
        row(f'  time per image with {n:,} candidates', f'{1000 * ours:.2f} ms', f'{1000 * theirs:.2f} ms',
            f'{theirs / ours:.1f}x')


def benchmark_one_image():
    """The time that detect.py takes for an image of 500x375 on the CPU, without loading and saving it."""
    row('\nAn image of 500x375 in detect.py, on the CPU')
    image, _ = photograph()
    for thin in (1, 4):
        detector = SSD300(n_classes, thin=thin).eval(), utils.label_map
        row(f'  thin = {thin}', f'{1000 * median_seconds(partial(detect, image, 0.4, detector=detector), 10):.0f} ms')


def benchmark_mAP():
    """Mean average precision on one core, of as many images and objects as VOC 2007's test has."""
    row('\nMean average precision on one core: 200 detections in each image')
    rng = torch.Generator().manual_seed(0)

    def boxes(n):
        return torch.rand(n, 2, 2, generator=rng).sort(dim=1).values.flatten(1)

    n_images, n_objects = 4952, 12032
    n = 200 * n_images
    counts = torch.randint(n_images, (n_objects,), generator=rng).bincount(minlength=n_images).tolist()
    arguments = (boxes(n).split(200), torch.randint(1, 21, (n,), generator=rng).split(200),
                 torch.rand(n, generator=rng).split(200), boxes(n_objects).split(counts),
                 torch.randint(1, 21, (n_objects,), generator=rng).split(counts),
                 (torch.rand(n_objects, generator=rng) < 0.1).byte().split(counts))
    row(f'  {n_images:,} images, {n_objects:,} objects',
        f'{median_seconds(partial(utils.calculate_mAP, *arguments), 3):.2f} s')


# -------------------------------------------------------------------------------------------------------------- Data

def photograph():
    """A PIL image of 500x375, as hard to compress as a photograph, and the bytes of its JPEG file."""
    image = draw_background((500, 375), random.Random(3))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return image, file.getvalue()


def benchmark_transforms():
    """Augmentation for training, ours and torchvision's, of an image with two objects, on one thread."""
    row('\nTraining transform on one thread: 500x375 pixels', 'ours', 'torchvision v2', 'ratio')
    image, jpeg = photograph()
    boxes = torch.tensor([[100., 50., 300., 300.], [320., 100., 420., 200.]])
    labels, difficulties = torch.tensor([1, 2]), torch.zeros(2, dtype=torch.uint8)
    chain = v2.Compose([
        v2.ToImage(), v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill={tv_tensors.Image: datasets.mean_color}),
        v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.Resize((300, 300)), v2.SanitizeBoundingBoxes(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(utils.mean, utils.std)])
    targets = {'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(375, 500)), 'labels': labels}
    rng = random.Random(0)
    torch.manual_seed(0)

    def ours(image):
        datasets.transform(image(), boxes, labels, difficulties, 'TRAIN', rng)

    def theirs(image):
        chain(image(), targets)

    def decoded():
        return Image.open(io.BytesIO(jpeg)).convert('RGB')

    tensor = tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    for what, our_input, their_input in (('without decoding', lambda: image, lambda: tensor),
                                         (f'with decoding a JPEG of {len(jpeg) // 1000} kB', decoded, decoded)):
        a, b = (median_seconds(partial(*step), times=50) for step in ((ours, our_input), (theirs, their_input)))
        row(f'  images per second, {what}', f'{1 / a:.0f}', f'{1 / b:.0f}', f'{b / a:.1f}x')


# ---------------------------------------------------------------------------------------------------------- Training

def objects(n_images, device, n_objects=3):
    """Random boxes (fractional boundary coordinates) and labels: two lists of tensors, one for each image."""
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(n_images, n_objects, 2, generator=rng) * 0.6
    boxes = torch.cat([corners, corners + 0.1 + 0.3 * torch.rand(n_images, n_objects, 2, generator=rng)], dim=2)
    return list(boxes.to(device)), list(torch.randint(1, n_classes, (n_images, n_objects), generator=rng).to(device))


def our_step(batch_size, device, bfloat16, thin=1):
    """A function that takes a training step of our model, with README's lines."""
    model = SSD300(n_classes, thin=thin).to(device)
    criterion, optimizer = MultiBoxLoss(model.priors_cxcy), make_optimizer(model, 'sgd', 1e-5, 5e-4)
    images, (boxes, labels) = torch.randn(batch_size, 3, 300, 300, device=device), objects(batch_size, 'cpu')

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted_locs, predicted_scores = model(images)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def their_step(batch_size, device, bfloat16):
    """A function that takes a training step of torchvision's model."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=n_classes).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9, weight_decay=5e-4)
    images = list(torch.rand(batch_size, 3, 300, 300, device=device))
    targets = [{'boxes': boxes * 300, 'labels': labels} for boxes, labels in zip(*objects(batch_size, device))]

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return step


def prepare(make_step, *arguments):
    """Make the step of this process."""
    kept['step'] = make_step(*arguments)


def take_step():
    """Take the step of this process: the seconds, and the peak memory so far in GiB."""
    seconds = median_seconds(kept['step'], 1, 0)
    return seconds, peak_memory() if gpu is None else torch.cuda.max_memory_allocated() / 2**30


def race(runners, n, warm_up):
    """Time n steps of several kinds, after `warm_up` others. `runners` are (function that returns the step, *its
    arguments). Each has a process of its own, because memory that another one has freed would change its speed; they
    take turns, so that a machine that slows down slows all. Returns (median seconds, peak memory in GiB) of each."""
    processes = [ProcessPoolExecutor(1, get_context('spawn'), prepare, runner) for runner in runners]
    measured = [[process.submit(take_step).result() for process in processes] for _ in range(warm_up + n)]
    for process in processes:
        process.shutdown()
    return [(statistics.median(seconds for seconds, _ in of_runner[warm_up:]), of_runner[-1][1])
            for of_runner in zip(*measured)]


def benchmark_loss(device, batch_size):
    """Matching of one image, on the CPU, and the loss of a batch that is matched, with its gradient."""
    row(f'\nLoss on {device}: batch {batch_size}', 'matching an image', 'loss and gradient')
    criterion = MultiBoxLoss(utils.create_prior_boxes())
    locs = torch.randn(batch_size, 8732, 4, device=device, requires_grad=True)
    scores = torch.randn(batch_size, 8732, n_classes, device=device, requires_grad=True)

    def gradient(true_boxes, true_classes):
        criterion(locs, scores, true_boxes, true_classes).backward()

    for n_objects in (3, 40, 150, 300):
        boxes, labels = objects(batch_size, 'cpu', n_objects)
        matching = median_seconds(partial(criterion.match, boxes, labels)) / batch_size
        loss = median_seconds(partial(gradient, *criterion.match(boxes, labels)))
        row(f'  {n_objects} objects in each image', f'{1000 * matching:.2f} ms', f'{1000 * loss:.1f} ms')


def benchmark_training(device, batch_size, n):
    """A training step of our model and of torchvision's, in both precisions."""
    row(f'\nTraining step on {device}: batch {batch_size}', 'ours', 'torchvision', 'ratio')
    for bfloat16 in (False, True):
        (ours, our_memory), (theirs, their_memory), *thin_ones = race(
            [(our_step, batch_size, device, bfloat16), (their_step, batch_size, device, bfloat16),
             (our_step, batch_size, device, bfloat16, 4), (our_step, batch_size, device, bfloat16, 8)], n, 1 + n // 5)
        row('  bfloat16' if bfloat16 else '  float32', f'{batch_size / ours:.2f} images/s',
            f'{batch_size / theirs:.2f} images/s', f'{theirs / ours:.2f}x')
        for thin, (seconds, memory) in zip((4, 8), thin_ones):
            row(f'    with thin = {thin}, compared with the whole network', f'{batch_size / seconds:.2f} images/s',
                f'{memory:.2f} GiB', f'{ours / seconds:.1f}x')
        row('    peak memory' + (' of the process' if device.type == 'cpu' else ''), f'{our_memory:.2f} GiB',
            f'{their_memory:.2f} GiB', f'{their_memory / our_memory:.2f}x')


def benchmark_loader():
    """The training loop of train.py on the GPU, with images loaded from JPEG files."""
    row('\nTraining from JPEG files of 500x375 on the GPU')
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'a.jpg')
        Path(path).write_bytes(photograph()[1])
        [boxes], [labels] = objects(1, 'cpu')
        of_image = {'boxes': (boxes * torch.tensor([500, 375] * 2)).tolist(), 'labels': labels.tolist(),
                    'difficulties': [0] * 3}
        contents = {'label_map': utils.label_map, 'TRAIN_images': [path] * 6400, 'TRAIN_objects': [of_image] * 6400}
        for name, content in contents.items():
            Path(folder, f'{name}.json').write_text(json.dumps(content))
        for batch_size, bfloat16 in ((8, False), (32, False), (32, True)):
            model = SSD300(n_classes).to(gpu)
            criterion, optimizer = MultiBoxLoss(model.priors_cxcy), make_optimizer(model, 'sgd', 1e-5, 5e-4)
            loader = make_train_loader(PascalVOCDataset(folder, 'TRAIN'), batch_size, criterion, workers=workers,
                                       pin_memory=True)
            for epoch in range(2):  # the first is a warm-up
                start = time.perf_counter()
                train(loader, model, criterion, optimizer, epoch, print_freq=100, bfloat16=bfloat16)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            row(f'  batch {batch_size}, {"bfloat16" if bfloat16 else "float32"}, {workers} workers',
                f'{6400 / seconds:.0f} images/s', f'recipe: {recipe_images / (6400 / seconds) / 3600:.1f} hours')


def main():
    """Measure everything."""
    name = torch.cuda.get_device_name() if gpu is not None else 'no GPU'
    threads = torch.get_num_threads()
    print(f'torch {torch.__version__}, torchvision {torchvision.__version__}, {threads} threads, {name}')
    torch.set_num_threads(1)
    benchmark_mAP()
    benchmark_transforms()
    torch.set_num_threads(threads)
    benchmark_detection(torch.device('cpu'))
    benchmark_one_image()
    benchmark_loss(torch.device('cpu'), 8)
    benchmark_training(torch.device('cpu'), 8, 7)
    if gpu is None:
        print('\nNo GPU here: training, its memory, the loader and detection on a GPU not measured.')
        return
    benchmark_detection(gpu)
    for batch_size in (8, 32):
        benchmark_loss(gpu, batch_size)
        benchmark_training(gpu, batch_size, 20)
    benchmark_loader()


if __name__ == '__main__':
    main()
