"""
Learn a few pictures by heart, before you train for hours:

    python overfit.py

A detector that can't learn four pictures won't learn four thousand. If this one does not find all that is in them,
there is a mistake in the boxes, in the labels, or in a change to the code. Edit the parameters below first.
"""
import torch
from PIL import Image, ImageDraw

from datasets import PascalVOCDataset, collate_fn
from detect import draw_objects, load_font
from files import UserError, open_image, run
from mistakes import find_mistakes
from model import SSD300, MultiBoxLoss, possible_thin
from train import make_optimizer, one_cycle, standardize, update

data_folder = './'  # where create_data_lists.py wrote the lists
n_pictures = 4  # how many of the first training pictures to learn
steps = 100  # each with all of these pictures
thin = 4  # every thin-th channel is kept; 1 for the paper's network, which takes fifteen times as long
lr = 1e-3  # the highest learning rate; AdamW, from random weights
min_score, max_overlap, top_k = 0.4, 0.45, 200  # what is counted and drawn: see detect.py
picture_path = 'overfit.png'  # where a sheet goes: the objects, and what was found on the way

tile = 360, 280  # width and height of a picture in the sheet


def overfit(train_set, n_pictures, steps, thin, lr, picture_path, device):
    """
    Train on the same pictures in each step, and look four times at what is found in them.

    :param train_set: PascalVOCDataset
    :param device: where to train; the others are the parameters at the top of this file
    :return: the last loss, and how many of the objects were found in the end
    :raises UserError: the loss or the gradient was not finite
    """
    n_pictures = min(n_pictures, len(train_set))
    train_set.split = 'TEST'  # the pictures as they are, without random variations
    images, boxes, labels, difficulties = collate_fn([train_set[i] for i in range(n_pictures)])
    images = images.to(device)  # (N, 3, 300, 300)
    difficulties = [torch.zeros_like(of_picture) for of_picture in difficulties]  # all are learned, so all count
    pictures = [open_image(path) for path in train_set.images[:n_pictures]]
    n_objects = sum(map(len, boxes))

    model = SSD300(len(train_set.label_map), thin=thin).to(device)
    standardize(model, images)
    criterion = MultiBoxLoss(model.priors_cxcy)
    optimizer = make_optimizer(model, lr, momentum=0.9, weight_decay=0, kind='adamw')
    one_cycle(optimizer, steps)

    certain = [torch.ones(len(of_picture)) for of_picture in labels]  # the score of what is really there
    columns = [(f'{n_objects} objects', boxes, labels, certain)]
    for step in range(1, steps + 1):
        predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        if not update(optimizer, loss, grad_clip=10):
            raise UserError(f'the loss or the gradient became infinite or NaN in step {step}: check the boxes of these '
                            'pictures, or lower lr in overfit.py')
        if step in (steps // 4, steps // 2, 3 * steps // 4, steps):
            with torch.no_grad():
                found = model.detect_objects(*model(images), min_score, max_overlap, top_k)  # boxes, labels, scores
            counts, alarms, _ = find_mistakes([*found, boxes, labels, difficulties], train_set.label_map, min_score)
            n_found = sum(of_label['hit'] for of_label in counts.values())
            n_alarms = sum(map(len, alarms.values()))
            print(f'step {step}  loss {loss.item():.4f}  found {n_found} of {n_objects}  false alarms {n_alarms}',
                  flush=True)
            columns.append((f'step {step}: {n_found} found', *found))
    save_sheet(picture_path, pictures, columns, train_set.label_map)
    return loss.item(), n_found


def save_sheet(path, pictures, columns, label_map):
    """
    Save a row for each picture, and in it a column for each time.

    :param path: where to save the sheet
    :param pictures: list of PIL images in RGB
    :param columns: tuples of a heading, and boxes, labels and scores as `SSD300.detect_objects` returns them
    :param label_map: dict of label -> index
    """
    header, names = 40, list(label_map)
    sheet = Image.new('RGB', (len(columns) * tile[0], header + len(pictures) * tile[1]), 'white')
    for column, (heading, *lists) in enumerate(columns):
        ImageDraw.Draw(sheet).text((column * tile[0] + 5, 8), heading, fill='black', font=load_font(24))
        for row, (picture, boxes, labels, scores) in enumerate(zip(pictures, *lists)):
            boxes = boxes.cpu().clamp(0, 1) * torch.tensor([picture.width, picture.height] * 2)  # (n, 4)
            found = zip(labels.tolist(), scores.tolist(), boxes.round().int().tolist())
            drawn = draw_objects(picture, [(names[label], score, box) for label, score, box in found if label > 0],
                                 label_map)
            drawn.thumbnail((tile[0] - 10, tile[1] - 10))
            sheet.paste(drawn, (column * tile[0] + 5, header + row * tile[1]))
    sheet.save(path)


def main():
    """Overfit with the parameters at the top of this file."""
    if min(n_pictures, steps) < 1 or thin not in possible_thin:
        raise UserError(f'n_pictures = {n_pictures}, steps = {steps}, thin = {thin} in overfit.py: set the first two '
                        f'to at least 1, and thin to one of {possible_thin}')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult=True)
    overfit(train_set, n_pictures, steps, thin, lr, picture_path, device)
    print(f'Look at {picture_path}. If objects are still missing, look for a mistake before you train.')


if __name__ == '__main__':
    run(main)
