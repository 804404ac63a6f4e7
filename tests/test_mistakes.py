"""What a detector gets wrong."""
from collections import Counter

import pytest
import torch
from conftest import random_boxes
from PIL import Image

import mistakes
from utils import find_hits, make_label_map

label_map = make_label_map(['cat', 'dog'])
none = torch.empty(0, 4), torch.empty(0, dtype=torch.long)


def test_each_kind_of_mistake_by_hand():
    """A cat on the left, a dog on the right, each 0.4 wide and high; below, a difficult cat."""
    true_boxes = torch.tensor([[0., 0., .4, .4], [.5, 0., .9, .4], [0., .5, .4, .9]])
    true_labels, difficult = torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1])
    detections = [([0., 0., .4, .3], 1, ('hit', 0)),           # 0.75 of the cat
                  ([0., 0., .4, .4], 1, ('second box', 0)),    # all of it, but later
                  ([.5, 0., .9, .4], 1, ('wrong class', 1)),   # the dog, called a cat
                  ([.5, 0., .9, .2], 2, ('loose box', 1)),     # 0.5 of the dog, which is not more than 0.5
                  ([.8, .3, .9, .4], 2, ('nothing there', None)),  # a sixteenth of it
                  ([.5, 0., .9, .2], 1, ('nothing there', None)),  # 0.5 of an object of another class
                  ([.5, .5, .9, .9], 2, ('nothing there', None)),
                  ([0., .5, .4, .9], 1, ('difficult', 2)),
                  ([0., .5, .4, .9], 1, ('difficult', 2)),
                  ([0., .5, .4, .9], 2, ('wrong class', 2))]
    boxes, labels, expected = zip(*detections)
    verdicts, found = mistakes.judge(torch.tensor(boxes), torch.tensor(labels), true_boxes, true_labels, difficult)
    assert verdicts == list(expected) and found == {0}


@pytest.mark.parametrize('n, n_objects', [(0, 0), (3, 0), (0, 3)])
def test_without_detections_or_objects(n, n_objects):
    boxes = random_boxes(n)
    verdicts, found = mistakes.judge(boxes, torch.ones(n).long(), random_boxes(n_objects), torch.ones(n_objects).long(),
                                     torch.zeros(n_objects))
    assert verdicts == [('nothing there', None)] * n and found == set()


def random_lists(n_images):
    """Detections near objects and elsewhere; the arguments of `calculate_mAP`."""
    lists = [[] for _ in range(6)]
    for i in range(n_images):
        n = i % 5
        true_boxes, true_labels = random_boxes(n), torch.randint(1, 3, (n,))
        near = (true_boxes.repeat(4, 1) + 0.05 * torch.randn(4 * n, 4)).clamp(0, 1)
        boxes = torch.cat([near, random_boxes(6)])
        scores = torch.rand(len(boxes)).sort(descending=True).values
        for values, value in zip(lists, (boxes[torch.randperm(len(boxes))], torch.randint(1, 3, (len(boxes),)), scores,
                                         true_boxes, true_labels, (torch.rand(n) < 0.2).byte())):
            values.append(value)
    return lists


def test_hits_mistakes_and_misses_add_up():
    """To all detections and all objects; and hits are those of the mean average precision."""
    lists = random_lists(60)
    lists[0][0], lists[1][0], lists[2][0] = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([0]), torch.tensor([0.])
    for min_score in (0, 0.4):
        counts, alarms, missed = mistakes.find_mistakes(lists, label_map, min_score)
        shown = [scores > min_score for scores in lists[2]]
        judged = [[t[s] for t, s in zip(values, shown)] for values in lists[:3]]
        hits = find_hits(*judged, *lists[3:], label_map)
        labels, true_labels, difficult = torch.cat(judged[1]), torch.cat(lists[4]), torch.cat(lists[5])
        for label, index in list(label_map.items())[1:]:
            of_label = counts[label]
            assert min(of_label[kind] for kind in mistakes.kinds) > 0
            assert sum(of_label[kind] for kind in mistakes.kinds) == (labels == index).sum()
            n_objects = ((true_labels == index) & (difficult == 0)).sum()
            assert of_label['hit'] + of_label['not found'] == n_objects == hits[label][1]
            assert of_label['hit'] == hits[label][0].sum()
            assert of_label['hit'] + len(alarms[label]) == len(hits[label][0])
            assert len(missed[label]) == of_label['not found']
            scores = [score for score, *_ in alarms[label]]
            assert scores == sorted(scores, reverse=True) and scores[-1] > min_score


def test_the_sheet_shows_the_surest(tmp_path, capsys):
    """One white image with a black square as the cat, which was not found; a dog is claimed elsewhere."""
    image = Image.new('RGB', (200, 100), 'white')
    image.paste((0, 0, 0), (20, 20, 60, 60))
    image.save(tmp_path / 'a.png')
    lists = [[torch.tensor([[.5, .5, .75, 1.], [-1e5, -1e5, 1e5, 1e5]])], [torch.tensor([2, 2])],  # one is enormous
             [torch.tensor([.9, .8])],
             [torch.tensor([[.1, .2, .3, .6]])], [torch.tensor([1])], [torch.tensor([0])]]
    counts, alarms, missed = mistakes.find_mistakes(lists, label_map, 0.4)
    assert counts == {'cat': Counter({'not found': 1}), 'dog': Counter({'nothing there': 2})}
    mistakes.print_counts(counts, 0.4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == 'At scores above 0.4:' and printed[-1].split() == ['all', *'0200001']
    mistakes.save_sheet(tmp_path / 'm.png', alarms, missed, [tmp_path / 'a.png'])
    sheet = Image.open(tmp_path / 'm.png')
    tile, step = mistakes.tile, mistakes.tile + mistakes.caption_height
    assert sheet.size == (10 * (tile + 10), 2 * step)
    cat = sheet.crop((5 * (tile + 10), 0, 5 * (tile + 10) + tile, tile))  # it has no false alarms
    colors = {color: n for n, color in cat.getcolors(9999)}
    square = (tile / 1.6) ** 2
    assert colors[(0, 255, 0)] > tile and square * 0.9 < colors[(0, 0, 0)] + colors[(0, 255, 0)] < square * 1.1
    dog = sheet.crop((0, step, tile, step + tile))
    assert (255, 165, 0) in {color for _, color in dog.getcolors(9999)}
    assert (0, 255, 0) not in {color for _, color in dog.getcolors(9999)}
    assert sheet.crop((0, 0, 5 * (tile + 10), step)).getcolors(2) == [(5 * (tile + 10) * step, (255, 255, 255))]
