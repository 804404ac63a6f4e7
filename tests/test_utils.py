"""Boxes, encodings, suppression, labels, mean average precision."""
import json
import math
import os

import pytest
import torch
from conftest import random_boxes, root
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, box_convert, box_iou

import utils
from errors import UserError
from utils import (
    FeatureMap,
    average_precision,
    calculate_mAP,
    create_prior_boxes,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    decimate,
    feature_maps,
    find_intersection,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    make_color_map,
    make_label_map,
    match_detections,
    non_maximum_suppression,
    voc_labels,
    xy_to_cxcy,
)

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
    assert find_intersection(boxes[:1], boxes).tolist() == [[16, 4, 0, 0]]
    torch.testing.assert_close(find_jaccard_overlap(boxes[:1], boxes), torch.tensor([[1, 4 / 28, 0, 0]]))


def test_overlaps_equal_torchvisions():
    set_1, set_2 = random_boxes(40), random_boxes(70)
    torch.testing.assert_close(find_jaccard_overlap(set_1, set_2), box_iou(set_1, set_2))
    both = find_jaccard_overlap(torch.stack([set_1, set_1 / 2]), set_2)  # a batch of sets against one
    torch.testing.assert_close(both[1], box_iou(set_1 / 2, set_2))
    assert find_jaccard_overlap(set_1, torch.empty(0, 4)).shape == (40, 0)
    assert find_jaccard_overlap(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_encoding_by_hand():
    """Half a width to the right, a quarter of a height up, twice as wide, half as high."""
    prior, box = torch.tensor([[.5, .5, .2, .4]]), torch.tensor([[.6, .4, .4, .2]])
    offsets = torch.tensor([[5, -2.5, 5 * math.log(2), -5 * math.log(2)]])
    torch.testing.assert_close(cxcy_to_gcxgcy(box, prior), offsets)
    torch.testing.assert_close(gcxgcy_to_cxcy(offsets, prior), box)


def test_encoding_equals_torchvisions_and_round_trips():
    priors = create_prior_boxes()
    boxes = random_boxes(len(priors))
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(boxes), priors)
    theirs = BoxCoder(weights=(10., 10., 5., 5.)).encode_single(boxes, cxcy_to_xy(priors))
    torch.testing.assert_close(offsets, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cxcy_to_xy(gcxgcy_to_cxcy(offsets, priors)), boxes, atol=1e-5, rtol=0)


def test_suppression_by_hand():
    """The best suppresses the second, which can then suppress nothing: the third is kept, as is another class."""
    boxes = torch.tensor([[.4, 0., .8, 1.], [.2, 0., .6, 1.], [0., 0., .4, 1.], [0., 0., .4, 1.]])
    kept = non_maximum_suppression(boxes, torch.tensor([.7, .8, .9, .6]), torch.tensor([1, 1, 1, 2]), max_overlap=0.3)
    assert kept.tolist() == [2, 0, 3]


def test_suppression_equals_torchvisions():
    for n, n_classes in ((0, 5), (1, 5), (30, 5), (2000, 5), (20000, 90)):
        boxes, labels = random_boxes(n), torch.randint(0, n_classes, (n,))
        scores = torch.randperm(n) / max(n, 1)  # no two the same, of which any might come first
        expected = batched_nms(boxes.double(), scores.double(), labels, 0.45)
        assert torch.equal(non_maximum_suppression(boxes, scores, labels, 0.45), expected)


def test_suppression_keeps_classes_apart_even_far_outside_the_image():
    """Were boxes only moved by (largest coordinate + 1), the second would come to lie on the first."""
    boxes = torch.tensor([[0., 0., 1., 1.], [-2., -2., -1., -1.]])
    assert non_maximum_suppression(boxes, torch.tensor([.9, .8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_suppression_beside_an_enormous_box():
    boxes = torch.tensor([[-1e17, -1e17, 1e17, 1e17], [.1, .1, .2, .2], [.11, .1, .2, .2], [.5, .5, .6, .6]])
    labels = torch.tensor([1, 90, 90, 90])
    assert non_maximum_suppression(boxes, torch.tensor([.9, .8, .7, .6]), labels, 0.5).tolist() == [0, 1, 3]


# --------------------------------------------------------------------------------------------------------------- Labels

def test_labels():
    assert [utils.label_map[label] for label in ('background', 'aeroplane', 'tvmonitor')] == [0, 1, 20]
    assert utils.rev_label_map[12] == 'dog' and set(utils.label_color_map) == {'background', *voc_labels}
    colors = make_color_map(make_label_map([str(i) for i in range(80)])).values()
    assert len(set(colors)) == 81 and all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colors)
    for labels in (['a', 'a'], ['background'], []):
        with pytest.raises(UserError):
            make_label_map(labels)


# --------------------------------------------------------------------------------------------------------------- Priors

def test_aspect_ratios_are_the_papers():
    """Three times as wide as high, or as high as wide: only on the maps between the finest and the two coarsest."""
    for name, feature_map in feature_maps.items():
        wider = (2, 3) if name in ('conv7', 'conv8_2', 'conv9_2') else (2,)
        assert feature_map.ratios == pytest.approx((1, *wider, *(1 / ratio for ratio in wider)))


def test_number_of_priors_and_of_clamped_ones():
    priors = create_prior_boxes()
    assert priors.shape == (8732, 4) and priors.dtype == torch.float32
    assert priors.min() >= 0 and priors.max() <= 1
    assert (priors == 1).any(dim=1).sum() == 20 + 1  # those that were clamped, and the last map's extra prior
    counts = [f.size ** 2 * (len(f.ratios) + 1) for f in feature_maps.values()]
    assert counts == [5776, 2166, 600, 150, 36, 4]
    assert (cxcy_to_xy(priors) < 0).any()  # boxes are not cut at the image's edge


def test_priors_of_four_tiles_and_of_one_by_hand():
    """Two rows of two tiles, where one prior would be wider than the image, and one higher; and a map of one tile."""
    maps = {'fine': FeatureMap(1, 2, 0.6, (1, 4, 1 / 4)), 'coarse': FeatureMap(1, 1, 0.8, (1,))}
    extra = math.sqrt(0.6 * 0.8)
    sizes = (.6, .6), (extra, extra), (1., .3), (.3, 1.)
    expected = [[x, y, *size] for y in (.25, .75) for x in (.25, .75) for size in sizes]
    expected += [[.5, .5, .8, .8], [.5, .5, .9, .9]]
    priors = create_prior_boxes(maps, last_extra_scale=.9)
    assert priors.dtype == torch.float32
    torch.testing.assert_close(priors, torch.tensor(expected))


def test_extra_priors_have_the_papers_scales():
    """The geometric mean of a map's scale and the next one's; 1 on the last map."""
    priors, first = create_prior_boxes(), 0
    for feature_map, extra in zip(feature_maps.values(), (.1 * .2, .2 * .375, .375 * .55, .55 * .725, .725 * .9, 1)):
        torch.testing.assert_close(priors[first + 1, 2:], torch.full((2,), extra ** 0.5))
        first += feature_map.size ** 2 * (len(feature_map.ratios) + 1)


def test_each_tile_has_an_extra_prior_even_without_the_ratio_1():
    priors = create_prior_boxes({'only': FeatureMap(1, 1, 0.5, (4, 1 / 4))}, last_extra_scale=.9)
    torch.testing.assert_close(priors, torch.tensor([[.5, .5, 1., .25], [.5, .5, .9, .9], [.5, .5, .25, 1.]]))


def test_decimate():
    tensor = torch.arange(24).view(4, 6)
    assert decimate(tensor, (3, 2)).tolist() == [[0, 2, 4], [18, 20, 22]]
    assert decimate(tensor, (None, 5)).tolist() == [[0, 5], [6, 11], [12, 17], [18, 23]]


# ----------------------------------------------------------------------------------------------- Mean average precision

left, right, far = [0., 0., .4, .4], [.5, .5, .9, .9], [.9, 0., 1., .1]


def mAP(detections, objects, label_map={'background': 0, 'a': 1, 'b': 2}):
    """Of images, each a list of detections (box, label, score) and of objects (box, label, difficult)."""
    def tensors(images):
        return ([torch.tensor([row[0] for row in rows]).view(-1, 4) for rows in images],
                [torch.tensor([row[1] for row in rows], dtype=torch.long) for rows in images],
                [torch.tensor([float(row[2]) for row in rows]) for rows in images])
    return calculate_mAP(*tensors(detections), *tensors(objects), label_map)


def test_mAP_by_hand():
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0)]]) == ({'a': 1.}, 1.)
    # A miss: one of two objects found, precision 1 up to a recall of 0.5, that is at 6 of the 11 points
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0), (right, 1, 0)]])[1] == pytest.approx(6 / 11)
    # A false positive with a higher score: precision 1/2 at all points
    assert mAP([[(left, 1, .9), (far, 1, .95)]], [[(left, 1, 0)]])[1] == pytest.approx(1 / 2)
    # The same with a lower score does no harm
    assert mAP([[(left, 1, .9), (far, 1, .5)]], [[(left, 1, 0)]])[1] == 1
    # A duplicate is a false positive: hit, duplicate, hit; precision 1 at 6 points, 2/3 at 5
    found = [(left, 1, .9), (left, 1, .8), (right, 1, .7)]
    assert mAP([found], [[(left, 1, 0), (right, 1, 0)]])[1] == pytest.approx((6 + 5 * 2 / 3) / 11)
    # The right box with the wrong class, and the right box in another image, are false positives
    assert mAP([[(left, 2, .9)], []], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    assert mAP([[], [(left, 1, .9)]], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    # The mean over two classes
    assert mAP([[(left, 1, .9)]], [[(left, 1, 0), (right, 2, 0)]]) == ({'a': 1., 'b': 0.}, .5)


def test_mAP_needs_an_overlap_of_more_than_half():
    half = [0., 0., .5, .25]
    assert mAP([[(half, 1, .9)]], [[([0., 0., .5, .5], 1, 0)]])[1] == 0  # exactly one half
    assert mAP([[([0., 0., .5, .26], 1, .9)]], [[([0., 0., .5, .5], 1, 0)]])[1] == 1


def test_mAP_ignores_difficult_objects():
    objects = [(left, 1, 0), (right, 1, 1)]
    assert mAP([[(left, 1, .9)]], [objects])[1] == 1  # not found: no miss
    assert mAP([[(left, 1, .8), (right, 1, .9)]], [objects[::-1]])[1] == 1  # nor if it is the first of all objects
    assert mAP([[(left, 1, .8), (right, 1, .9)]], [objects])[1] == 1  # found: no false positive
    assert mAP([[(left, 1, .8), (right, 1, .9), (right, 1, .85)]], [objects])[1] == 1  # found twice: neither
    assert math.isnan(mAP([[(right, 1, .9)]], [[(right, 1, 1)]])[1])  # a class of difficult objects only has no AP


def test_mAP_belongs_detections_to_the_object_they_overlap_most():
    """The second detection overlaps both objects by more than half, but more the one that is found already."""
    first, second = [0., 0., .5, .5], [.06, 0., .56, .5]
    objects = [(first, 1, 0), (second, 1, 0)]
    assert mAP([[(first, 1, .9), ([.01, 0., .51, .5], 1, .8)]], [objects])[1] == pytest.approx(6 / 11)


def test_mAP_of_ties_keeps_the_order_of_detections():
    objects = [[(left, 1, 0)]]
    assert mAP([[(left, 1, .5), (far, 1, .5)]], objects)[1] == 1
    assert mAP([[(far, 1, .5), (left, 1, .5)]], objects)[1] == pytest.approx(1 / 2)
    twins = [[(left, 1, 0), (left, 1, 0)]]  # two identical objects: both detections belong to the first
    assert mAP([[(left, 1, .5), (left, 1, .5)]], twins)[1] == pytest.approx(6 / 11)


def test_mAP_without_detections_or_objects():
    assert mAP([[], []], [[(left, 1, 0)], []]) == ({'a': 0.}, 0.)
    assert mAP([[([0., 0., 1., 1.], 0, 0.)]], [[(left, 1, 0)]]) == ({'a': 0.}, 0.)  # the placeholder
    for detections in ([[]], [[(left, 1, .9)]]):
        average_precisions, mean = mAP(detections, [[]])
        assert average_precisions == {} and math.isnan(mean)
    assert mAP([[(left, 2, .9)]], [[(right, 1, 0)]]) == ({'a': 0.}, 0.)  # class b has no objects and no AP


def test_matches_of_an_image_by_hand():
    """In the order of the detections, though the third has the highest score; the last overlaps a difficult object."""
    detections = torch.tensor([left, far, left, left, right])
    matches = match_detections(detections, torch.tensor([1, 1, 1, 2, 1]), torch.tensor([.5, .9, .8, .9, .3]),
                               torch.tensor([right, left]), torch.tensor([1, 1]), torch.tensor([1, 0]))
    assert [values.tolist() for values in matches] == [[False, False, True, False, False],
                                                       [False, False, False, False, True], [1, -1, 1, -1, 0]]
    for n, n_objects in ((0, 2), (2, 0), (0, 0)):
        none = match_detections(random_boxes(n), torch.ones(n), torch.ones(n), random_boxes(n_objects),
                                torch.ones(n_objects), torch.zeros(n_objects))
        assert [values.tolist() for values in none] == [[False] * n, [False] * n, [-1] * n]


def test_mAP_equals_that_of_pycocotools_matching():
    """
    Ground truth of 60 images of VOC 2008, 18 of its objects difficult, and detections made from it: moved, missed,
    doubled, of a wrong class, of nothing. The expected numbers are pycocotools' matches at 0.5, with VOC's two rules: a
    detection belongs only to the object that it overlaps most, and all detections of a difficult object are ignored.
    """
    with open(os.path.join(root, 'tests', 'voc_detections.json')) as file:
        content = json.load(file)
    expected = content.pop('average_precisions')
    lists = [[torch.tensor(of_image).view(-1, 4) if 'boxes' in name else torch.tensor(of_image) for of_image in values]
             for name, values in content.items()]
    average_precisions, mean_average_precision = calculate_mAP(*lists)
    assert len(expected) == 18 and average_precisions == pytest.approx(expected, abs=1e-6)
    assert mean_average_precision == pytest.approx(sum(expected.values()) / 18, abs=1e-6)


def test_average_precision_by_hand():
    assert average_precision(torch.tensor([True, False]), 1) == 1
    assert average_precision(torch.tensor([], dtype=torch.bool), 3) == 0
    # Recalls of 0.3 and 0.6 are reached exactly: 0, .1, .2, .3 at precision 1, .4 to .6 at 2/3
    hits = torch.tensor([True] * 3 + [False] * 3 + [True] * 3)
    assert average_precision(hits, 10) == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)


def test_mAP_counts_each_of_many_images_once():
    """A false positive in each of 1,001 images, and then a hit."""
    detections, objects = [[(far, 1, .9)]] * 1001 + [[(left, 1, .8)]], [[]] * 1001 + [[(left, 1, 0)]]
    assert mAP(detections, objects)[1] == pytest.approx(1 / 1002)


def test_mAP_equals_a_plain_count():
    """Against loops over classes, detections and objects, on random boxes."""
    def some(n, last):
        boxes = torch.randint(0, 2, (n, 4)) * .1  # few different corners: many overlaps, and many ties between them
        boxes[:, 2:] += .4
        return list(zip(boxes.tolist(), torch.randint(1, 3, (n,)).tolist(), last(n)))

    def scores(n):
        return (torch.randint(0, 10, (n,)) / 10).tolist()

    def difficulties(n):
        return (torch.rand(n) < .2).int().tolist()

    detections = [some(torch.randint(0, 25, ()).item(), scores) for _ in range(30)]
    objects = [some(torch.randint(0, 5, ()).item(), difficulties) for _ in range(30)]
    expected = {}
    for label, name in ((1, 'a'), (2, 'b')):
        ranked = [(score, i, box) for i, found in enumerate(detections)
                  for box, other, score in found if other == label]
        ranked.sort(key=lambda row: -row[0])
        n_objects = sum(other == label and not difficult for rows in objects for _, other, difficult in rows)
        taken, hits, counted = set(), 0, []
        for n, (_, i, box) in enumerate(ranked):
            best = max(((box_iou(torch.tensor([box]), torch.tensor([b])).item(), -k, difficult)
                        for k, (b, other, difficult) in enumerate(objects[i]) if other == label), default=(0, 0, 0))
            if best[0] > .5 and best[2]:
                continue
            hit = best[0] > .5 and (i, best[1]) not in taken
            hits += hit
            taken |= {(i, best[1])} if hit else set()
            counted.append((hits / (len(counted) + 1), hits))
        expected[name] = sum(max([p for p, h in counted if h * 10 >= t * n_objects], default=0) for t in range(11)) / 11
    average_precisions, mean = mAP(detections, objects)
    assert average_precisions == pytest.approx(expected) and mean == pytest.approx(sum(expected.values()) / 2)
    assert 0.05 < mean < 0.95
