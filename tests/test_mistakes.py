"""What a detector gets wrong."""
from collections import Counter

import pytest
import torch
from conftest import random_boxes
from PIL import Image, ImageChops

import mistakes
from datasets import mean_color
from utils import make_label_map, match_detections

label_map = make_label_map(['cat', 'dog'])


def test_each_kind_of_mistake_by_hand():
    """A cat on the left, a dog on the right, each 0.4 wide and high; below, a difficult cat."""
    true_boxes = torch.tensor([[0., 0., .4, .4], [.5, 0., .9, .4], [0., .5, .4, .9]])
    true_labels, difficult = torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1])
    detections = [([0., 0., .4, .3], 1, ('true positive', 0)),  # 0.75 of the cat
                  ([0., 0., .4, .4], 1, ('duplicate', 0)),      # all of it, with a lower score
                  ([.5, 0., .9, .4], 1, ('classification', 1)),  # the dog, called a cat
                  ([.5, 0., .9, .2], 2, ('localization', 1)),   # 0.5 of the dog, which is not more than 0.5
                  ([.8, .3, .9, .4], 2, ('background', None)),  # a sixteenth of it
                  ([.5, 0., .9, .06], 2, ('localization', 1)),  # 0.15 of it
                  ([.2, 0., .9, .4], 1, ('localization', 0)),   # 0.22 of the cat comes before 0.57 of the dog
                  ([.5, 0., .9, .2], 1, ('both', 1)),           # 0.5 of an object of another class
                  ([.5, 0., .9, .06], 1, ('both', 1)),          # 0.15
                  ([.8, .3, .9, .4], 1, ('background', None)),  # a sixteenth
                  ([.5, .5, .9, .9], 2, ('background', None)),
                  ([0., .5, .4, .9], 1, ('ignored', 2)), ([0., .5, .4, .9], 1, ('ignored', 2)),
                  ([0., .5, .4, .9], 2, ('classification', 2))]
    boxes, labels, expected = zip(*detections)
    scores = torch.linspace(1, 0.5, len(boxes))
    verdicts = mistakes.judge(torch.tensor(boxes), torch.tensor(labels), scores, true_boxes, true_labels, difficult)
    assert verdicts == list(expected)


@pytest.mark.parametrize('n, n_objects', [(0, 0), (3, 0), (0, 3)])
def test_without_detections_or_objects(n, n_objects):
    verdicts = mistakes.judge(random_boxes(n), torch.ones(n).long(), torch.ones(n), random_boxes(n_objects),
                              torch.ones(n_objects).long(), torch.zeros(n_objects))
    assert verdicts == [('background', None)] * n


def test_missed_objects_are_those_that_no_correction_would_find(tmp_path, monkeypatch):
    """A cat found as a dog, a cat found by a loose box, a cat nobody found, a difficult one, and one found."""
    true_boxes = torch.tensor([[0., 0., .2, .2], [.3, 0., .5, .2], [.6, 0., .9, .3], [0., .5, .2, .7],
                               [.4, .5, .6, .7]])
    detections = torch.tensor([[0., 0., .2, .2], [.3, 0., .5, .08], [.4, .5, .6, .7]])
    lists = [[detections], [torch.tensor([2, 1, 1])], [torch.tensor([.9, .8, .7])],
             [true_boxes], [torch.ones(5).long()], [torch.tensor([0, 0, 0, 1, 0])]]
    counts, false_positives, missed = mistakes.find_mistakes(lists, label_map, 0.4)
    assert counts == {'cat': Counter({'true positive': 1, 'localization': 1, 'missed': 1}),
                      'dog': Counter({'classification': 1})}
    assert [mistake.true_box.tolist() for mistake in missed['cat']] == [true_boxes[2].tolist()] and not missed['dog']
    [wrong] = false_positives['dog']
    assert wrong.box.tolist() == wrong.true_box.tolist() == true_boxes[0].tolist()
    Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
    captions = []
    monkeypatch.setattr(mistakes, 'save_tiles', lambda _, rows, *__, **___: captions.extend(
        [caption for _, caption in row] for row in rows))
    mistakes.save_sheet('', false_positives, missed, [tmp_path / 'a.png'])
    assert captions == [['cat 0.80\nlocalization', 'cat\nmissed'], ['dog 0.90\nclassification: cat']]


def test_kinds_add_up_to_all_detections_and_objects():
    """Of detections near objects and elsewhere. True positives are those of the mean average precision."""
    lists = [[] for _ in range(6)]  # the arguments of `calculate_mAP`
    for n in [0, 1, 2, 3, 4] * 12:
        true_boxes, true_labels = random_boxes(n), torch.randint(1, 3, (n,))
        near = (true_boxes.repeat(4, 1) + 0.05 * torch.randn(4 * n, 4)).clamp(0, 1)
        boxes = torch.cat([near, random_boxes(6)])
        scores = torch.rand(len(boxes)).sort(descending=True).values
        for values, value in zip(lists, (boxes[torch.randperm(len(boxes))], torch.randint(1, 3, (len(boxes),)), scores,
                                         true_boxes, true_labels, (torch.rand(n) < 0.2).byte())):
            values.append(value)
    lists[0][0], lists[1][0], lists[2][0] = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([0]), torch.tensor([0.])
    for min_score in (0, 0.4):
        counts, false_positives, missed = mistakes.find_mistakes(lists, label_map, min_score)
        shown = [scores > min_score for scores in lists[2]]
        judged = [[t[s] for t, s in zip(values, shown)] for values in lists[:3]]
        true_positive = torch.cat([match_detections(*image)[0] for image in zip(*judged, *lists[3:])])
        labels, true_labels, difficult = torch.cat(judged[1]), torch.cat(lists[4]), torch.cat(lists[5])
        for label, index in list(label_map.items())[1:]:
            of_label = counts[label]
            assert min(of_label[kind] for kind in mistakes.kinds) > 0
            assert sum(of_label[kind] for kind in mistakes.kinds) == (labels == index).sum()
            assert of_label['true positive'] == true_positive[labels == index].sum()
            n_false = (labels == index).sum() - of_label['true positive'] - of_label['ignored']
            assert len(false_positives[label]) == n_false
            n_objects = ((true_labels == index) & (difficult == 0)).sum()
            assert of_label['true positive'] + of_label['missed'] <= n_objects
            assert len(missed[label]) == of_label['missed']
            scores = [mistake.score for mistake in false_positives[label]]
            areas = [(mistake.true_box[2:] - mistake.true_box[:2]).prod() for mistake in missed[label]]
            assert scores == sorted(scores, reverse=True) and scores[-1] > min_score
            assert areas == sorted(areas, reverse=True) and (len(areas) > 1 or min_score == 0)


def test_the_sheet_shows_the_highest_scores(tmp_path, capsys):
    """One white image with a black square as the cat, which is missed; a dog is detected elsewhere."""
    image = Image.new('RGB', (200, 100), 'white')
    image.paste((0, 0, 0), (20, 20, 60, 60))
    image.save(tmp_path / 'a.png')
    lists = [[torch.tensor([[.5, .5, .75, 1.], [-1e5, -1e5, 1e5, 1e5]])], [torch.tensor([2, 2])],  # one is enormous
             [torch.tensor([.9, .8])], [torch.tensor([[.1, .2, .3, .6]])], [torch.tensor([1])], [torch.tensor([0])]]
    counts, false_positives, missed = mistakes.find_mistakes(lists, label_map, 0.4)
    assert counts == {'cat': Counter({'missed': 1}), 'dog': Counter({'background': 2})}
    mistakes.print_counts(counts, 0.4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == 'At scores above 0.4:' and printed[-1].split() == ['all', *'00000201']
    mistakes.save_sheet(str(tmp_path / 'm.png'), false_positives, missed, [tmp_path / 'a.png'])
    sheet = Image.open(tmp_path / 'm.png')
    tile, step = mistakes.tile, mistakes.tile + 34
    assert sheet.size == (2 * (tile + 10), 2 * step)
    cat, dog = ({color for _, color in sheet.crop((0, y, tile, y + tile)).getcolors(9999)} for y in (0, step))
    assert (0, 255, 0) in cat - dog and (255, 165, 0) in dog - cat  # the cat has no false positives


def test_a_tile_shows_both_boxes_whole_and_in_place():
    """A detection at the top left, its object at the bottom right; the part shown is 1.6 times what both cover."""
    image = Image.new('RGB', (400, 200), 'white')
    tile = mistakes.draw_mistake(image, torch.tensor([.2, .2, .3, .4]), torch.tensor([.25, .3, .45, .8]))
    assert tile.size == (mistakes.tile, mistakes.tile)
    # Both cover x from 80 to 180 and y from 40 to 160 pixels: 120 at most, so 192 are shown around (130, 100).
    scale = mistakes.tile / 192
    for color, corners in (((255, 165, 0), (80, 40, 120, 80)), ((0, 255, 0), (100, 60, 180, 160))):
        places = [(x, y) for x in range(mistakes.tile) for y in range(mistakes.tile) if tile.getpixel((x, y)) == color]
        found = [min(x for x, _ in places), min(y for _, y in places), max(x for x, _ in places),
                 max(y for _, y in places)]
        expected = [(corner - start) * scale for corner, start in zip(corners, (34, 4, 34, 4))]
        assert found == pytest.approx(expected, abs=2)


def test_tiles_shrink_images_and_cut_off_captions(tmp_path):
    """A row of two and a row of one, in tiles of 40 x 20 pixels with margins; and two empty rows."""
    images = [Image.new('RGB', (80, 20), 'red'), Image.new('RGB', (20, 40), 'blue'), Image.new('RGB', (9, 8), 'lime')]
    long, empty, short = zip(images, ('W' * 99, '', 'a'))
    path = str(tmp_path / 's.png')
    mistakes.save_tiles(path, [[long, empty], [short]], 40, 20)
    with Image.open(path) as sheet:
        assert sheet.size == (100, 108)
        colors = {(255, 0, 0): (0, 0, 40, 10), (0, 0, 255): (50, 0, 60, 20), (0, 255, 0): (0, 54, 9, 62)}
        for color, box in colors.items():
            area = (box[2] - box[0]) * (box[3] - box[1])
            assert sheet.crop(box).getcolors() == [(area, color)] and (area, color) in sheet.getcolors(9999)
        captions = [ImageChops.invert(sheet.crop(box)).getbbox() for box in ((0, 20, 50, 54), (0, 74, 50, 108))]
        assert captions[0][2] == 40 and captions[1][2] < 25  # one is cut off
        assert all(left < 9 and top > 1 and bottom < 34 for left, top, _, bottom in captions)
        for box in (50, 20, 100, 54), (50, 54, 100, 108):
            assert sheet.crop(box).getextrema() == ((255, 255),) * 3
    mistakes.save_tiles(path, [[], []], 40, 20)
    with Image.open(path) as sheet:
        assert sheet.size == (50, 108) and sheet.getextrema() == ((255, 255),) * 3


def test_around_a_small_box_24_pixels_are_shown():
    """The box ends at the image's edge: from 0 to 10 pixels, so -7 to 17 are shown."""
    tile = mistakes.draw_mistake(Image.new('RGB', (100, 100), mean_color), torch.tensor([-.5, -.5, .1, .1]), None)
    assert ImageChops.difference(tile, Image.new('RGB', tile.size, mean_color)).getbbox() == pytest.approx(
        [edge * mistakes.tile / 24 + (edge == 17) for edge in (7, 7, 17, 17)], abs=0.8)
    wide = Image.new('RGB', (20000, 40))  # Pillow refuses what would be 32000 pixels high
    assert mistakes.draw_mistake(wide, torch.tensor([0., 0, 1, 1]), None).size == tile.size
