"""Boxes, encodings, suppression, labels, mean average precision."""
import json
import math
import os

import pytest
import torch
from conftest import random_boxes, root
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, box_iou, nms

import utils
from errors import UserError
from utils import FeatureMap, create_prior_boxes, cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, xy_to_cxcy

# ---------------------------------------------------------------------------------------------------------------- Boxes

def test_coordinates_by_hand():
    xy, cxcy = torch.tensor([[[.25, .5, .75, 1.], [0., 0., .25, .5]]]), [[[.5, .75, .5, .5], [.125, .25, .25, .5]]]
    assert xy_to_cxcy(xy).tolist() == cxcy and cxcy_to_xy(torch.tensor(cxcy)).equal(xy)


def test_coordinates_equal_torchvisions_and_round_trip():
    xy = random_boxes(3, 50)
    torch.testing.assert_close(xy_to_cxcy(xy), box_convert(xy, 'xyxy', 'cxcywh'))
    torch.testing.assert_close(cxcy_to_xy(xy_to_cxcy(xy)), xy)
    assert xy_to_cxcy(torch.empty(0, 4)).shape == (0, 4)


def test_overlaps_by_hand():
    """A box with itself, with one that it shares a quarter of its area with, one beside it, and one far off."""
    boxes = torch.tensor([[0., 0., 4., 4.], [2., 2., 6., 6.], [4., 0., 8., 4.], [8., 9., 9., 10.]])
    assert utils.find_intersection(boxes[:1], boxes).tolist() == [[16, 4, 0, 0]]
    torch.testing.assert_close(find_jaccard_overlap(boxes[:1], boxes), torch.tensor([[1, 4 / 28, 0, 0]]))


def test_overlaps_equal_torchvisions():
    set_1, set_2 = random_boxes(40), random_boxes(70)
    torch.testing.assert_close(find_jaccard_overlap(set_1, set_2), box_iou(set_1, set_2))
    assert find_jaccard_overlap(set_1, torch.empty(0, 4)).shape == (40, 0)
    assert find_jaccard_overlap(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_encoding_by_hand():
    """Half a width to the right, a quarter of a height up, twice as wide, half as high."""
    prior, box = torch.tensor([[.5, .5, .2, .4]]), torch.tensor([[.6, .4, .4, .2]])
    offsets = torch.tensor([[5, -2.5, 5 * math.log(2), -5 * math.log(2)]])
    torch.testing.assert_close(cxcy_to_gcxgcy(box, prior), offsets)
    torch.testing.assert_close(utils.gcxgcy_to_cxcy(offsets, prior), box)


def test_encoding_equals_torchvisions_and_round_trips():
    priors = create_prior_boxes()
    boxes = random_boxes(len(priors))
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(boxes), priors)
    theirs = BoxCoder(weights=(10., 10., 5., 5.)).encode_single(boxes, cxcy_to_xy(priors))
    torch.testing.assert_close(offsets, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cxcy_to_xy(utils.gcxgcy_to_cxcy(offsets, priors)), boxes, atol=1e-5, rtol=0)


@pytest.mark.parametrize('max_overlap, kept', [(0.1, [2, 3]), (0.49, [2, 0, 3]), (0.5, [2, 1, 0, 3])])
def test_suppression_by_hand(max_overlap, kept):
    """The best and the second, and the second and the third overlap by exactly one half. Where the best suppresses the
    second, that can suppress nothing. Another class is always kept."""
    boxes = torch.tensor([[.5, 0., 1.25, 1.], [.25, 0., 1., 1.], [0., 0., .75, 1.], [0., 0., .75, 1.]])
    labels = torch.tensor([1, 1, 1, 2])
    assert utils.non_maximum_suppression(boxes, torch.tensor([.7, .8, .9, .6]), labels, max_overlap).tolist() == kept


@pytest.mark.parametrize('low, high', [(0, 1), (-1, 2), (-4, 4), (-1e17, 1e17)])
@pytest.mark.parametrize('n, n_classes', [(0, 5), (1, 5), (30, 5), (900, 5), (2000, 90)])
def test_suppression_equals_that_of_each_class(n, n_classes, low, high):
    """Inside the image, at its sides, and far outside, where boxes are limited to a range. Half of the boxes have the
    place of another, which may have another class: were classes not kept apart, they would suppress each other."""
    boxes, labels = low + (high - low) * random_boxes(n), torch.randint(0, n_classes, (n,))
    boxes[n // 2:] = boxes[:n - n // 2]
    scores = torch.randperm(n) / max(n, 1)  # no two the same, of which any might come first
    kept = [torch.where(labels == c)[0][nms(boxes.clamp(-1, 2)[labels == c], scores[labels == c], 0.45)]
            for c in range(n_classes)]
    expected = sorted(torch.cat(kept).tolist(), key=lambda i: -scores[i])
    assert utils.non_maximum_suppression(boxes, scores, labels, 0.45).tolist() == expected


@pytest.mark.parametrize('boxes, labels, kept', [
    ([[0., 0., 1., 1.], [-2., -2., -1., -1.]], [0, 1], [0, 1]),  # moved by the largest coordinate + 1: the same place
    ([[.9, .9, 2., 2.], [-1., -1., .1, .1]], [0, 1], [0, 1]),
    ([[-1e17, -1e17, 1e17, 1e17], [.1, .1, .2, .2], [.11, .1, .2, .2], [.5, .5, .6, .6]], [1, 90, 90, 90], [0, 1, 3])],
    ids=['left of 0', 'side by side', 'beside an enormous box'])
def test_suppression_keeps_classes_apart(boxes, labels, kept):
    scores = torch.linspace(.9, .6, len(boxes))
    assert utils.non_maximum_suppression(torch.tensor(boxes), scores, torch.tensor(labels), 0.5).tolist() == kept


# --------------------------------------------------------------------------------------------------------------- Labels

def test_labels():
    assert [utils.label_map[label] for label in ('background', 'aeroplane', 'tvmonitor')] == [0, 1, 20]
    assert utils.rev_label_map[12] == 'dog' and set(utils.label_color_map) == {'background', *utils.voc_labels}
    colors = utils.make_color_map(utils.make_label_map([str(i) for i in range(80)])).values()
    assert len(set(colors)) == 81 and all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colors)
    for labels in (['a', 'a'], ['background'], []):
        with pytest.raises(UserError):
            utils.make_label_map(labels)


# --------------------------------------------------------------------------------------------------------------- Priors

def test_priors_of_each_map_are_the_papers():
    """Ratios of 3 and 1/3 only on the maps between the finest and the two coarsest; the extra prior has the geometric
    mean of a map's scale and the next one's, and 1 on the last map."""
    priors, first, extra = create_prior_boxes(), 0, (.1 * .2, .2 * .375, .375 * .55, .55 * .725, .725 * .9, 1)
    for (name, feature_map), n, area in zip(utils.feature_maps.items(), (5776, 2166, 600, 150, 36, 4), extra):
        wider = (2, 3) if name in ('conv7', 'conv8_2', 'conv9_2') else (2,)
        assert feature_map.ratios == pytest.approx((1, *wider, *(1 / ratio for ratio in wider)))
        assert n == feature_map.size ** 2 * (len(feature_map.ratios) + 1)
        torch.testing.assert_close(priors[first + 1, 2:], torch.full((2,), area ** 0.5))
        first += n
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32 and priors.min() >= 0 and priors.max() <= 1
    assert (priors == 1).any(dim=1).sum() == 20 + 1  # those that were clamped, and the last map's extra prior
    assert (cxcy_to_xy(priors) < 0).any()  # boxes are not cut at the image's edge


def test_priors_of_four_tiles_and_of_one_by_hand(monkeypatch):
    """Two rows of two tiles, where one prior would be wider than the image, and one higher; and a map of one tile."""
    maps = {'fine': FeatureMap(1, 2, 0.6, (1, 4, 1 / 4)), 'coarse': FeatureMap(1, 1, 0.8, (1,))}
    extra = math.sqrt(0.6 * 0.8)
    sizes = (.6, .6), (extra, extra), (1., .3), (.3, 1.)
    expected = [[x, y, *size] for y in (.25, .75) for x in (.25, .75) for size in sizes]
    expected += [[.5, .5, .8, .8], [.5, .5, 1., 1.]]
    monkeypatch.setattr(utils, 'feature_maps', maps)
    torch.testing.assert_close(create_prior_boxes(), torch.tensor(expected))


def test_each_tile_has_an_extra_prior_even_without_the_ratio_1(monkeypatch):
    monkeypatch.setattr(utils, 'feature_maps', {'only': FeatureMap(1, 1, 0.5, (4, 1 / 4))})
    priors = create_prior_boxes()
    torch.testing.assert_close(priors, torch.tensor([[.5, .5, 1., .25], [.5, .5, 1., 1.], [.5, .5, .25, 1.]]))


def test_decimate():
    tensor = torch.arange(24).view(4, 6)
    assert utils.decimate(tensor, (3, 2)).tolist() == [[0, 2, 4], [18, 20, 22]]
    assert utils.decimate(tensor, (None, 5)).tolist() == [[0, 5], [6, 11], [12, 17], [18, 23]]


# ----------------------------------------------------------------------------------------------- Mean average precision

left, right, far = [0., 0., .4, .4], [.5, .5, .9, .9], [.9, 0., 1., .1]
square, half, wide_half = [0., 0., .5, .5], [0., 0., .5, .25], [0., 0., .5, .26]
moved, beside = [.01, 0., .51, .5], [.06, 0., .56, .5]


def tensors(images):
    """Of images, each a list of rows with a box and two numbers: three lists of tensors."""
    return ([torch.tensor([row[0] for row in rows]).view(-1, 4) for rows in images],
            [torch.tensor([row[1] for row in rows], dtype=torch.long) for rows in images],
            [torch.tensor([float(row[2]) for row in rows]) for rows in images])


# Detections (box, label, score) and objects (box, label, difficult) of each image, and the average precision of each
# class. With one object, it is the best precision from the hit on.
@pytest.mark.parametrize('detections, objects, expected', [
    ([[(left, 1, .9)]], [[(left, 1, 0)]], {'a': 1}),
    # A miss: one of two objects found, precision 1 up to a recall of 0.5, that is at 6 of the 11 points
    ([[(left, 1, .9)]], [[(left, 1, 0), (right, 1, 0)]], {'a': 6 / 11}),
    # A false positive with a higher score: precision 1/2 at all points; with a lower score it does no harm
    ([[(left, 1, .9), (far, 1, .95)]], [[(left, 1, 0)]], {'a': 1 / 2}),
    ([[(left, 1, .9), (far, 1, .5)]], [[(left, 1, 0)]], {'a': 1}),
    # A false positive in each of two images, and then a hit
    ([[(far, 1, .9)], [(far, 1, .9)], [(left, 1, .8)]], [[], [], [(left, 1, 0)]], {'a': 1 / 3}),
    # A duplicate is a false positive: hit, duplicate, hit; precision 1 at 6 points, 2/3 at 5
    ([[(left, 1, .9), (left, 1, .8), (right, 1, .7)]], [[(left, 1, 0), (right, 1, 0)]], {'a': (6 + 5 * 2 / 3) / 11}),
    # The right box with the wrong class, and the right box in another image, are false positives
    ([[(left, 2, .9)], []], [[(left, 1, 0)], []], {'a': 0}), ([[], [(left, 1, .9)]], [[(left, 1, 0)], []], {'a': 0}),
    # Two classes
    ([[(left, 1, .9)]], [[(left, 1, 0), (right, 2, 0)]], {'a': 1, 'b': 0}),
    # An overlap of exactly one half is not enough
    ([[(half, 1, .9)]], [[(square, 1, 0)]], {'a': 0}),
    ([[(wide_half, 1, .9)]], [[(square, 1, 0)]], {'a': 1}),
    # A difficult object that is not found, also as the first of all objects, found, or found twice: all the same
    ([[(left, 1, .9)]], [[(left, 1, 0), (right, 1, 1)]], {'a': 1}),
    ([[(left, 1, .8), (right, 1, .9)]], [[(right, 1, 1), (left, 1, 0)]], {'a': 1}),
    ([[(left, 1, .8), (right, 1, .9)]], [[(left, 1, 0), (right, 1, 1)]], {'a': 1}),
    ([[(left, 1, .8), (right, 1, .9), (right, 1, .85)]], [[(left, 1, 0), (right, 1, 1)]], {'a': 1}),
    ([[(right, 1, .9)]], [[(right, 1, 1)]], {}),
    # The second detection overlaps both objects by more than half, but more the one that is found already
    ([[(square, 1, .9), (moved, 1, .8)]], [[(square, 1, 0), (beside, 1, 0)]], {'a': 6 / 11}),
    # Of equal scores, the first detection counts first; of identical objects, both detections belong to the first
    ([[(left, 1, .5), (far, 1, .5)]], [[(left, 1, 0)]], {'a': 1}),
    ([[(far, 1, .5), (left, 1, .5)]], [[(left, 1, 0)]], {'a': 1 / 2}),
    ([[(left, 1, .5), (left, 1, .5)]], [[(left, 1, 0), (left, 1, 0)]], {'a': 6 / 11}),
    # No detections, also as the placeholder has it; no objects, also of one class
    ([[], []], [[(left, 1, 0)], []], {'a': 0}),
    ([[([0., 0., 1., 1.], 0, 0.)]], [[(left, 1, 0)]], {'a': 0}), ([[]], [[]], {}), ([[(left, 1, .9)]], [[]], {}),
    ([[(left, 2, .9)]], [[(right, 1, 0)]], {'a': 0})])
def test_mAP_by_hand(detections, objects, expected):
    average_precisions, mean = utils.calculate_mAP(*tensors(detections), *tensors(objects),
                                                   {'background': 0, 'a': 1, 'b': 2})
    assert average_precisions == pytest.approx(expected)
    assert mean == pytest.approx(sum(expected.values()) / len(expected)) if expected else math.isnan(mean)


def test_mAP_of_an_image_by_hand():
    """In the order of the detections, though the third has the highest score; the last overlaps a difficult object."""
    detections = torch.tensor([left, far, left, left, right])
    matches = utils.match_detections(detections, torch.tensor([1, 1, 1, 2, 1]), torch.tensor([.5, .9, .8, .9, .3]),
                                     torch.tensor([right, left]), torch.tensor([1, 1]), torch.tensor([1, 0]))
    assert [values.tolist() for values in matches] == [[False, False, True, False, False],
                                                       [False, False, False, False, True], [1, -1, 1, -1, 0]]
    for n, n_objects in ((0, 2), (2, 0), (0, 0)):
        none = utils.match_detections(random_boxes(n), torch.ones(n), torch.ones(n), random_boxes(n_objects),
                                      torch.ones(n_objects), torch.zeros(n_objects))
        assert [values.tolist() for values in none] == [[False] * n, [False] * n, [-1] * n]


def test_mAP_equals_that_of_pycocotools_matching():
    """Ground truth of 60 images of VOC 2008, 18 of its objects difficult, and detections made from it: moved, missed,
    doubled, of a wrong class, of nothing. The expected numbers are pycocotools' matches at 0.5, with VOC's two rules: a
    detection belongs only to the object that it overlaps most, and all detections of a difficult object are ignored."""
    with open(os.path.join(root, 'tests', 'voc_detections.json')) as file:
        content = json.load(file)
    expected = content.pop('average_precisions')
    lists = [[torch.tensor(of_image).view(-1, 4) if 'boxes' in name else torch.tensor(of_image) for of_image in values]
             for name, values in content.items()]
    average_precisions, mean_average_precision = utils.calculate_mAP(*lists)
    assert len(expected) == 18 and average_precisions == pytest.approx(expected, abs=1e-6)
    assert mean_average_precision == pytest.approx(sum(expected.values()) / 18, abs=1e-6)


def test_mAP_of_one_class_by_hand():
    assert utils.average_precision(torch.tensor([True, False]), 1) == 1
    assert utils.average_precision(torch.tensor([], dtype=torch.bool), 3) == 0
    # Recalls of 0.3 and 0.6 are reached exactly: 0, .1, .2, .3 at precision 1, .4 to .6 at 2/3
    hits = torch.tensor([True] * 3 + [False] * 3 + [True] * 3)
    assert utils.average_precision(hits, 10) == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
