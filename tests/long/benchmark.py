"""
Measure how fast this project is on this machine, and torchvision beside it:

    python tests/long/benchmark.py

prints a table of medians. All rows are measured in the same run; compare the two columns rather than the numbers
themselves, which depend on the machine. Without a GPU, the rows that need one are not measured.
"""
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms import v2

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # on Windows
    getrusage = None

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import datasets  # noqa: E402
import utils  # noqa: E402
from datasets import EpochSampler, PascalVOCDataset, collate_fn  # noqa: E402
from demo import draw_background  # noqa: E402
from detect import detect  # noqa: E402
from model import SSD300, MultiBoxLoss  # noqa: E402
from train import make_optimizer, train, update  # noqa: E402

n_classes = 21
flop_per_image = 188e9  # of a training step, forward and backward
peaks = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # bfloat16 operations per second, from the makers' data sheets
recipe_images = 232 * 16551  # 232 epochs of VOC 07+12
gpu = torch.device('cuda') if torch.cuda.is_available() else None


def median_seconds(function, n=5, warm_up=1):
    """The median time that a function takes, including its work on the GPU."""
    seconds = []
    for i in range(warm_up + n):
        start = time.perf_counter()
        function()
        if gpu is not None:
            torch.cuda.synchronize()
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory():
    """The peak memory of this process until now, in GiB; NaN on Windows."""
    unit = 2**30 if sys.platform == 'darwin' else 2**20
    return getrusage(RUSAGE_SELF).ru_maxrss / unit if getrusage is not None else float('nan')


def row(what, ours, other='', ratio=''):
    """Print a row of the table."""
    print(f'{what:62}{ours:>22}{other:>22}{ratio:>8}', flush=True)


def section(title):
    """Print the title of a part of the table."""
    print(f'\n{title}')


# --------------------------------------------------------------------------------------------------------- Detection

def predictions(n_images, trained, device):
    """
    Predictions like those of a network early in training (about 90,000 scores above 0.01 in each image), or of a
    trained one (a few hundred: 25 objects, each with high scores at a dozen priors around it).
    """
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
    section(f'Detection on {device}: 8 images, {n_classes} classes' + ' ' * 25 + 'ours           torchvision   ratio')
    model = SSD300(n_classes).to(device)
    other = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=n_classes).to(device).eval()
    other.score_thresh, other.nms_thresh, other.detections_per_img = 0.01, 0.45, 200
    priors = [utils.cxcy_to_xy(model.priors_cxcy) * 300] * 8
    for trained in (False, True):
        locs, scores = predictions(8, trained, device)
        n = (scores.softmax(dim=2)[:, :, 1:] > 0.01).sum().item() // 8
        ours = median_seconds(lambda: model.detect_objects(locs, scores, 0.01, 0.45, 200)) / 8
        theirs = median_seconds(lambda: other.postprocess_detections(
            {'bbox_regression': locs, 'cls_logits': scores}, priors, [(300, 300)] * 8)) / 8
        row(f'  time per image with {n:,} candidates', f'{1000 * ours:.2f} ms', f'{1000 * theirs:.2f} ms',
            f'{theirs / ours:.1f}x')


def benchmark_one_image():
    """The time that detect.py takes for an image of 500x375 on the CPU, without loading and saving it."""
    section('An image of 500x375 in detect.py, on the CPU')
    image, _ = photograph()
    for thin in (1, 4):
        detector = SSD300(n_classes, thin=thin).eval(), utils.label_map
        seconds = median_seconds(lambda: detect(image, 0.4, 0.45, 200, detector=detector), 10)
        row(f'  thin = {thin}', f'{1000 * seconds:.0f} ms')


@torch.no_grad()
def benchmark_forward_and_detection():
    """The forward pass on the GPU in batches of 64, alone and with detection."""
    section('Forward pass on the GPU: batch 64, bfloat16' + ' ' * 29 + 'alone      with detection   ratio')
    model, images = SSD300(n_classes).to(gpu).eval(), torch.randn(64, 3, 300, 300, device=gpu)
    locs, scores = predictions(64, True, gpu)

    def forward():
        with torch.autocast('cuda', torch.bfloat16):
            model(images)

    def both():
        forward()
        model.detect_objects(locs, scores, 0.01, 0.45, 200)

    torch.cuda.reset_peak_memory_stats()
    alone, together = median_seconds(forward, 20, 5), median_seconds(both, 20, 5)
    row('  images per second', f'{64 / alone:.0f}', f'{64 / together:.0f}', f'{100 * alone / together:.0f}%')
    memory = torch.cuda.max_memory_allocated() / 2**30
    other = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=n_classes).to(gpu).eval()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast('cuda', torch.bfloat16):
        other(list(images))
    row("  peak memory with detection, and torchvision's", f'{memory:.2f} GiB',
        f'{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB')


# --------------------------------------------------------------------------------------------------------------- mAP

def random_detections(n_images):
    """Arguments of `calculate_mAP`: 200 detections in each image, 20 classes, as many objects per image as in VOC."""
    rng = torch.Generator().manual_seed(0)

    def boxes(n):
        corners = torch.rand(n, 2, 2, generator=rng)
        return torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)

    n_objects = 12032 * n_images // 4952
    counts = torch.randint(n_images, (n_objects,), generator=rng).bincount(minlength=n_images).tolist()
    n = 200 * n_images
    return (boxes(n).split(200), torch.randint(1, 21, (n,), generator=rng).split(200),
            torch.rand(n, generator=rng).split(200), boxes(n_objects).split(counts),
            torch.randint(1, 21, (n_objects,), generator=rng).split(counts),
            (torch.rand(n_objects, generator=rng) < 0.1).byte().split(counts))


def benchmark_mAP():
    """Mean average precision on one core, of 4,952 images (VOC 2007 test) and ten times as many."""
    section('Mean average precision on one core: 200 detections in each image')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {}
    for n_images in (4952, 49520):
        arguments = random_detections(n_images)
        seconds[n_images] = median_seconds(lambda: utils.calculate_mAP(*arguments), 3)
        row(f'  {n_images:,} images, {sum(map(len, arguments[4])):,} objects', f'{seconds[n_images]:.2f} s',
            f'{peak_memory():.2f} GiB process', f'{seconds[n_images] / seconds[4952]:.1f}x')
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------------- Data

def photograph():
    """A PIL image of 500x375, as hard to compress as a photograph, and the bytes of its JPEG file."""
    image = draw_background((500, 375), random.Random(3))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return image, file.getvalue()


def benchmark_transforms():
    """Augmentation for training, ours and torchvision's, of an image with two objects, on one thread."""
    section('Training transform on one thread: 500x375 pixels' + ' ' * 24 + 'ours        torchvision v2   ratio')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
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
        return lambda: [datasets.transform(image(), boxes, labels, difficulties, 'TRAIN', rng) for _ in range(50)]

    def theirs(image):
        return lambda: [chain(image(), targets) for _ in range(50)]

    def decoded():
        return Image.open(io.BytesIO(jpeg)).convert('RGB')

    tensor = tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    for what, our_input, their_input in (('without decoding', lambda: image, lambda: tensor),
                                         (f'with decoding a JPEG of {len(jpeg) // 1000} kB', decoded, decoded)):
        a, b = median_seconds(ours(our_input)) / 50, median_seconds(theirs(their_input)) / 50
        row(f'  images per second, {what}', f'{1 / a:.0f}', f'{1 / b:.0f}', f'{b / a:.1f}x')
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- Training

def objects(n_images, device, n_objects=3):
    """Random boxes (fractional boundary coordinates) and labels: two lists of tensors, one for each image."""
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(n_images, n_objects, 2, generator=rng) * 0.6
    boxes = torch.cat([corners, corners + 0.1 + 0.3 * torch.rand(n_images, n_objects, 2, generator=rng)], dim=2)
    return list(boxes.to(device)), list(torch.randint(1, n_classes, (n_images, n_objects), generator=rng).to(device))


def our_step(batch_size, device, bfloat16, channels_last=True, thin=1):
    """A function that takes a training step of our model."""
    model = SSD300(n_classes, thin=thin).to(device)
    if not channels_last:
        model = model.to(memory_format=torch.contiguous_format)
    criterion, optimizer = MultiBoxLoss(model.priors_cxcy), make_optimizer(model, 'sgd', 1e-5, 5e-4)
    images, (boxes, labels) = torch.randn(batch_size, 3, 300, 300, device=device), objects(batch_size, 'cpu')

    def step():
        matched = criterion.match(boxes, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted = model(images)
        update(optimizer, sum(criterion.losses(*predicted, *matched)))
    return step


def our_loss(batch_size, device, n_objects):
    """A function that computes the loss of such a step, and its gradient with respect to the predictions."""
    criterion = MultiBoxLoss(utils.create_prior_boxes()).to(device)
    boxes, labels = objects(batch_size, 'cpu', n_objects)
    locs = torch.randn(batch_size, 8732, 4, device=device, requires_grad=True)
    scores = torch.randn(batch_size, 8732, n_classes, device=device, requires_grad=True)
    return lambda: criterion(locs, scores, boxes, labels).backward()


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


def take_steps(connection, make_step, arguments):
    """Take a step whenever the other process asks for it; send it the seconds, and the peak memory so far in GiB."""
    step = make_step(*arguments)
    while connection.recv():
        seconds = median_seconds(step, 1, 0)
        on_gpu = 0 if gpu is None else torch.cuda.max_memory_allocated() / 2**30
        connection.send((seconds, on_gpu or peak_memory()))


def race(runners, n, warm_up):
    """
    Time several kinds of steps. Each has a process of its own, because memory that another one has freed would change
    its speed. They take turns, so that a machine that slows down slows all of them.

    :param runners: list of (function that returns the step, *its arguments)
    :param n: number of steps to time
    :param warm_up: number of steps before these, which are not timed
    :return: list of (median seconds, peak memory in GiB), one for each runner
    """
    context = multiprocessing.get_context('spawn')
    connections = []
    for make_step, *arguments in runners:
        connection, other_end = context.Pipe()
        context.Process(target=take_steps, args=(other_end, make_step, arguments), daemon=True).start()
        other_end.close()  # in this process: if the other one fails, `recv` raises instead of waiting
        connections.append(connection)
    measured = []
    for _ in range(warm_up + n):
        for connection in connections:
            connection.send(True)
            measured.append(connection.recv())
    for connection in connections:
        connection.send(False)
    return [(statistics.median(seconds for seconds, _ in of_runner[warm_up:]), of_runner[-1][1])
            for of_runner in (measured[i::len(runners)] for i in range(len(runners)))]


def benchmark_training(device, batch_size, n):
    """A training step of our model and of torchvision's, in both precisions."""
    section(f'Training step on {device}: batch {batch_size}' + ' ' * 35 + 'ours           torchvision   ratio')
    for bfloat16 in (False, True):
        ((ours, our_memory), (theirs, their_memory), (plain, _), (thin_4, memory_4), (thin_8, memory_8), (loss, _),
         (loss_of_many, _)) = race(
            [(our_step, batch_size, device, bfloat16), (their_step, batch_size, device, bfloat16),
             (our_step, batch_size, device, False, False), (our_step, batch_size, device, bfloat16, True, 4),
             (our_step, batch_size, device, bfloat16, True, 8), (our_loss, batch_size, device, 3),
             (our_loss, batch_size, device, 40)], n, 1 + n // 5)
        row('  bfloat16' if bfloat16 else '  float32', f'{batch_size / ours:.2f} images/s',
            f'{batch_size / theirs:.2f} images/s', f'{theirs / ours:.2f}x')
        row('    of which the loss and its gradient, 3 objects per image', f'{100 * loss / ours:.2f}%')
        row('    the same with 40 objects per image', f'{100 * loss_of_many / ours:.2f}%')
        for thin, seconds, memory in ((4, thin_4, memory_4), (8, thin_8, memory_8)):
            row(f'    with thin = {thin}, compared with the whole network', f'{batch_size / seconds:.2f} images/s',
                f'{memory:.2f} GiB', f'{ours / seconds:.1f}x')
        row('    compared with float32 without channels_last', f'{batch_size / plain:.2f} images/s', '',
            f'{plain / ours:.2f}x')
        row('    peak memory' + (' of the process' if device.type == 'cpu' else ''), f'{our_memory:.2f} GiB',
            f'{their_memory:.2f} GiB', f'{their_memory / our_memory:.2f}x')
        for name, peak in peaks.items() if device.type == 'cuda' and bfloat16 else ():
            if name in torch.cuda.get_device_name():
                row('    share of the peak of matrix multiplication',
                    f'{100 * batch_size / ours * flop_per_image / peak:.0f}%')


def benchmark_loader():
    """The training loop of train.py on the GPU, with images loaded from JPEG files."""
    section('Training from JPEG files of 500x375 on the GPU')
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            with open(os.path.join(folder, f'{i}.jpg'), 'wb') as file:
                file.write(photograph()[1])
        boxes, labels = objects(64, 'cpu')
        annotations = [{'boxes': (boxes[i] * torch.tensor([500, 375] * 2)).tolist(), 'labels': labels[i].tolist(),
                        'difficulties': [0] * 3} for i in range(64)]
        contents = {'label_map': utils.label_map, 'TRAIN_objects': annotations * 100,
                    'TRAIN_images': [os.path.join(folder, f'{i}.jpg') for i in range(64)] * 100}
        for name, content in contents.items():
            with open(os.path.join(folder, f'{name}.json'), 'w') as file:
                json.dump(content, file)
        for batch_size, bfloat16 in ((8, False), (32, False), (32, True)):
            model = SSD300(n_classes).to(gpu)
            criterion, optimizer = MultiBoxLoss(model.priors_cxcy), make_optimizer(model, 'sgd', 1e-5, 5e-4)
            loader = DataLoader(PascalVOCDataset(folder, 'TRAIN'), batch_size, sampler=EpochSampler(6400, 0),
                                collate_fn=collate_fn, num_workers=workers, pin_memory=True, persistent_workers=True)
            for epoch in range(2):  # the first is a warm-up
                start = time.perf_counter()
                train(loader, model, criterion, optimizer, epoch, print_freq=100, bfloat16=bfloat16)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            precision = 'bfloat16' if bfloat16 else 'float32'
            row(f'  batch {batch_size}, {precision}, {workers} workers', f'{6400 / seconds:.0f} images/s',
                f'recipe: {recipe_images / (6400 / seconds) / 3600:.1f} hours')


def main():
    """Measure everything."""
    name = torch.cuda.get_device_name() if gpu is not None else 'no GPU'
    print(f'torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads, '
          f'{name}')
    benchmark_mAP()
    benchmark_transforms()
    benchmark_detection(torch.device('cpu'))
    benchmark_one_image()
    benchmark_training(torch.device('cpu'), 8, 7)
    if gpu is None:
        print('\nNo GPU here: training, its memory, the loader, and forward pass with detection on a GPU not measured.')
        return
    benchmark_detection(gpu)
    benchmark_forward_and_detection()
    for batch_size in (8, 32):
        benchmark_training(gpu, batch_size, 20)
    benchmark_loader()


if __name__ == '__main__':
    main()
