"""The network, its loss and its detections."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import random_boxes, root
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VGG16_Weights
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou

from errors import UserError
from model import SSD300, MultiBoxLoss, PredictionConvolutions, VGGBase, fully_connected_to_convolution, own_priors
from utils import (
    create_prior_boxes,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    feature_maps,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    xy_to_cxcy,
)

first_of_map = {'conv4_3': 0, 'conv7': 5776, 'conv8_2': 7942, 'conv9_2': 8542, 'conv10_2': 8692, 'conv11_2': 8728}


@pytest.fixture(scope='module')
def ssd():
    torch.manual_seed(0)
    return SSD300(n_classes=21).eval()


def test_shapes_of_all_maps():
    ssd, images = SSD300(n_classes=21).to('meta'), torch.empty(2, 3, 300, 300, device='meta')  # shapes without values
    conv4_3, conv7 = ssd.base(images)
    maps = (conv4_3, conv7, *ssd.aux_convs(conv7))
    assert [tuple(m.shape) for m in maps] == [(2, f.channels, f.size, f.size) for f in feature_maps.values()]
    locs, scores = ssd(images)
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, 21)


def test_sizes_of_the_base_layer_by_layer():
    """Not only at its end: a wrong padding can be lost again where a pool rounds."""
    with torch.device('meta'):
        base, sizes = VGGBase(), {}
        for name, layer in base.named_children():
            layer.register_forward_hook(lambda *args, name=name: sizes.update({name: tuple(args[2].shape[2:])}))
        base(torch.empty(1, 3, 300, 300))
    of_block = {'1': 300, '2': 150, '3': 75, '4': 38, '5': 19, '6': 19, '7': 19}
    pools = {'pool1': 150, 'pool2': 75, 'pool3': 38, 'pool4': 19, 'pool5': 19}
    assert sizes == {name: (pools.get(name) or of_block[name[4]],) * 2 for name in sizes} and len(sizes) == 15 + 5


def test_values_of_a_pixel_lie_next_to_each_other():
    ssd = SSD300(n_classes=3, thin=16)
    weights = [layer.weight for layer in ssd.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(weights) == 15 + 8 + 12 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_state_dict_has_the_names_that_other_weights_use(ssd):
    base = [f'conv{block}_{i}' for block, n in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)) for i in range(1, n + 1)]
    layers = [f'base.{name}' for name in (*base, 'conv6', 'conv7')]
    layers += [f'aux_convs.conv{block}_{i}' for block in (8, 9, 10, 11) for i in (1, 2)]
    layers += [f'pred_convs.{kind}_{name}' for kind in ('loc', 'cl') for name in feature_maps]
    expected = {f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')}
    expected |= {'rescale_factors', 'priors_cxcy'}
    assert set(ssd.state_dict()) == expected
    assert ssd.rescale_factors.shape == (1, 512, 1, 1) and (ssd.rescale_factors == 20).all()
    assert ssd.base.conv6.weight.shape == (1024, 512, 3, 3) and ssd.base.conv7.weight.shape == (1024, 1024, 1, 1)


@pytest.mark.parametrize('thin', [1, 2, 4])
def test_random_start_keeps_the_signal_alive(thin):
    network = SSD300(n_classes=3, thin=thin)
    with torch.no_grad():
        conv4_3, conv7 = network.base(torch.randn(1, 3, 300, 300))
    assert 0.1 < conv4_3.std() < 10 and 0.1 < conv7.std() < 10
    assert all((layer.bias == 0).all() for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))


def test_a_thin_network_keeps_every_fourth_channel():
    torch.manual_seed(5)
    whole = SSD300(n_classes=3)
    torch.manual_seed(5)
    thin = SSD300(n_classes=3, thin=4)
    assert thin.state_dict().keys() == whole.state_dict().keys()
    for (key, few), all_of_them in zip(thin.state_dict().items(), whole.state_dict().values()):
        if key == 'rescale_factors':
            assert few.shape == (1, 128, 1, 1) and (few == 20).all()
        elif key == 'priors_cxcy':
            assert torch.equal(few, all_of_them)
        elif key == 'base.conv1_1.weight':
            assert torch.equal(few, all_of_them[::4])  # it still sees red, green and blue
        elif key.startswith('pred_convs'):
            assert torch.equal(few, 2 * all_of_them[:, ::4] if key.endswith('weight') else all_of_them)
        else:
            assert torch.equal(few, 2 * all_of_them[::4, ::4] if key.endswith('weight') else all_of_them[::4]), key
    with torch.no_grad():
        locs, scores = thin(torch.rand(2, 3, 300, 300))
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, 3)


def test_a_thin_network_needs_a_fifteenth_of_the_operations():
    counts = []
    for thin in (1, 4):
        network = SSD300(n_classes=21, thin=thin).to('meta')
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 300, 300, device='meta'))
        counts.append(counter.get_total_flops())
    assert 13 < counts[0] / counts[1] < 16


@pytest.mark.parametrize('thin', [0, 3, 128, None, 'a lot'])
def test_other_thin_networks_do_not_exist(thin):
    with pytest.raises(ValueError, match=f'thin is {thin!r}, not one of .1, 2, 4, 8, 16, 32, 64.'):
        SSD300(n_classes=3, thin=thin)


def test_an_image_without_features_has_finite_predictions_and_gradients():
    ssd = SSD300(n_classes=3, thin=16)
    locs, scores = ssd(torch.zeros(1, 3, 300, 300))  # biases are 0, so all features are 0, and so is their norm
    (locs.sum() + scores.sum()).backward()
    assert locs.isfinite().all() and scores.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ssd.parameters())


def test_features_of_conv4_3_get_the_length_1_and_are_multiplied_by_their_factors():
    ssd, seen = SSD300(n_classes=3, thin=16), []
    ssd.rescale_factors.data = 1 + torch.rand(1, 32, 1, 1)
    ssd.pred_convs.loc_conv4_3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        conv4_3, _ = ssd.base(images)
        ssd(images)
    lengths = conv4_3.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(seen[0], conv4_3 / lengths * ssd.rescale_factors.detach())


def test_fully_connected_layer_as_convolution():
    linear, features = torch.nn.Linear(512 * 7 * 7, 64), torch.randn(2, 512, 7, 7)
    weight, bias = fully_connected_to_convolution(linear.weight, linear.bias, 512, 7, m=(None, None, None, None))
    assert weight.shape == (64, 512, 7, 7)
    outputs = F.conv2d(features, weight, bias).flatten(1)
    torch.testing.assert_close(outputs, linear(features.flatten(1)), atol=1e-4, rtol=0)

    weight, bias = fully_connected_to_convolution(linear.weight, linear.bias, 512, 7, m=(4, None, 3, 3))
    assert weight.shape == (16, 512, 3, 3) and bias.shape == (16,)
    for filter, channel, row, column in ((0, 0, 0, 0), (1, 2, 1, 0), (15, 511, 2, 2)):
        position = channel * 49 + 3 * row * 7 + 3 * column
        assert weight[filter, channel, row, column] == linear.weight[4 * filter, position]
        assert bias[filter] == linear.bias[4 * filter]


def test_pretrained_weights_go_where_they_belong(tmp_path, monkeypatch):
    """A state dict in torchvision's layout stands in for the download."""
    vgg, indices = {}, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    base = VGGBase()
    names = [name for name, _ in base.named_children() if name.startswith('conv')]
    for name, index in zip(names, indices):
        vgg[f'features.{index}.weight'] = torch.randn_like(getattr(base, name).weight)
        vgg[f'features.{index}.bias'] = torch.randn_like(getattr(base, name).bias)
    vgg |= {'classifier.0.weight': torch.randn(4096, 512 * 49), 'classifier.0.bias': torch.randn(4096),
            'classifier.3.weight': torch.randn(4096, 4096), 'classifier.3.bias': torch.randn(4096)}

    monkeypatch.setattr(VGG16_Weights, 'get_state_dict', lambda self, **_: vgg)
    base = VGGBase(pretrained=True)
    assert torch.equal(base.conv1_1.weight, vgg['features.0.weight'])
    assert torch.equal(base.conv3_1.weight, vgg['features.10.weight'])
    assert torch.equal(base.conv5_3.bias, vgg['features.28.bias'])
    assert torch.equal(base.conv6.weight, vgg['classifier.0.weight'].view(4096, 512, 7, 7)[::4, :, ::3, ::3])
    assert torch.equal(base.conv7.weight[:, :, 0, 0], vgg['classifier.3.weight'][::4, ::4])

    thin = SSD300(n_classes=3, pretrained=True, thin=4)
    assert torch.equal(thin.base.conv2_1.weight, 2 * vgg['features.5.weight'][::4, ::4])
    assert torch.equal(thin.base.conv7.weight[:, :, 0, 0], 2 * vgg['classifier.3.weight'][::16, ::16])

    vgg['features.5.weight'] = torch.randn(128, 64, 5, 5)
    with pytest.raises(RuntimeError, match='conv2_1.weight'):
        VGGBase(pretrained=True)


def test_without_network_pretrained_says_where_the_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def no_network(*_, **__):
        raise OSError('no network')

    monkeypatch.setattr('torch.hub.download_url_to_file', no_network)
    with pytest.raises(UserError) as error:
        SSD300(n_classes=3, pretrained=True)
    message = str(error.value)
    assert 'vgg16-397923af.pth' in message and str(tmp_path) in message and '\n' not in message


@pytest.mark.parametrize('name, row, column, prior, expected', [
    ('conv4_3', 0, 0, 0, (0.5 / 38, 0.5 / 38, 0.1, 0.1)),
    ('conv4_3', 37, 20, 1, (20.5 / 38, 37.5 / 38, math.sqrt(0.1 * 0.2), math.sqrt(0.1 * 0.2))),
    ('conv7', 3, 7, 2, (7.5 / 19, 3.5 / 19, 0.2 * math.sqrt(2), 0.2 / math.sqrt(2))),
    ('conv8_2', 9, 0, 3, (0.05, 0.95, 0.375 * math.sqrt(3), 0.375 / math.sqrt(3))),
    ('conv9_2', 2, 4, 5, (0.9, 0.5, 0.55 / math.sqrt(3), 0.55 * math.sqrt(3))),
    ('conv10_2', 1, 1, 3, (0.5, 0.5, 0.725 / math.sqrt(2), 1.)),  # 0.725 * sqrt(2) = 1.025, clamped
    ('conv11_2', 0, 0, 1, (0.5, 0.5, 1., 1.)),
    ('conv11_2', 0, 0, 2, (0.5, 0.5, 1., 0.9 / math.sqrt(2)))])
def test_priors_by_hand_and_the_order_of_predictions(ssd, name, row, column, prior, expected):
    """A score made at one tile, for one prior, must come out at that prior's place, and detect that prior's box."""
    size, n_priors = feature_maps[name].size, len(feature_maps[name].ratios) + 1
    index = first_of_map[name] + (row * size + column) * n_priors + prior
    assert ssd.priors_cxcy[index].tolist() == pytest.approx(expected, abs=1e-6)

    heads = PredictionConvolutions(n_classes=3)
    for layer in heads.children():
        torch.nn.init.zeros_(layer.weight)
    getattr(heads, f'cl_{name}').weight.data[prior * 3 + 2, 0, 1, 1] = 50.  # class 2, looks at the tile itself
    getattr(heads, f'loc_{name}').weight.data[prior * 4, 0, 1, 1] = 1.  # moves by a tenth of the prior's width
    feats = [torch.zeros(1, f.channels, f.size, f.size) for f in feature_maps.values()]
    feats[list(feature_maps).index(name)][0, 0, row, column] = 1.
    locs, scores = heads(*feats)
    assert scores.nonzero().tolist() == [[0, index, 2]] and locs.nonzero().tolist() == [[0, index, 0]]

    boxes, labels, _ = SSD300.detect_objects(_Predictor(3), locs, scores, min_score=0.9, max_overlap=0.5, top_k=10)
    assert labels[0].tolist() == [2]
    moved = (expected[0] + expected[2] / 10, *expected[1:])
    assert xy_to_cxcy(boxes[0])[0].tolist() == pytest.approx(moved, abs=1e-5)


def test_prediction_convolutions_equal_a_plain_loop():
    """Over maps, rows, columns, and the priors of a tile."""
    heads = PredictionConvolutions(n_classes=3)
    feats = [torch.randn(2, f.channels, f.size, f.size) for f in feature_maps.values()]
    with torch.no_grad():
        predictions = heads(*feats)
        for kind, n, ours in zip(('loc', 'cl'), (4, 3), predictions):
            rows = []
            for (name, of_map), feat in zip(feature_maps.items(), feats):
                out = getattr(heads, f'{kind}_{name}')(feat)  # (2, n_priors * n, size, size)
                rows += [out[:, prior * n:(prior + 1) * n, row, column] for row in range(of_map.size)
                         for column in range(of_map.size) for prior in range(len(of_map.ratios) + 1)]
            torch.testing.assert_close(ours, torch.stack(rows, dim=1))  # (2, 8732, n)


class _Predictor:
    """What detect_objects needs of a model."""

    def __init__(self, n_classes):
        self.n_classes, self.priors_cxcy = n_classes, create_prior_boxes()


def test_priors_are_loaded_with_the_weights_that_fit_them():
    """As after a start from COCO's weights, whose priors are others; weights without priors leave them alone."""
    trained, fresh = SSD300(n_classes=3, thin=64), SSD300(n_classes=3, thin=64)
    with torch.no_grad():
        trained.priors_cxcy *= 0.9
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.priors_cxcy, trained.priors_cxcy)

    earlier = {key: 2 * values for key, values in trained.state_dict().items() if key != 'priors_cxcy'}
    fresh.load_state_dict(earlier)
    assert torch.equal(fresh.priors_cxcy, trained.priors_cxcy)
    assert torch.equal(fresh.base.conv1_1.weight, 2 * trained.base.conv1_1.weight)
    del earlier['base.conv1_1.weight']
    with pytest.raises(RuntimeError, match='conv1_1.weight'):
        fresh.load_state_dict(earlier)


def test_priors_follow_the_model_to_another_device():
    assert SSD300(n_classes=2).to('meta').priors_cxcy.device.type == 'meta'


def scenes_without_conflicts(n):
    """Boxes and labels of n images, in which no two objects overlap the same prior most."""
    priors_xy, boxes, labels = cxcy_to_xy(create_prior_boxes()), [], []
    while len(boxes) < n:
        candidates = random_boxes(torch.randint(1, 8, ()).item())
        favorites = box_iou(candidates, priors_xy).argmax(dim=1)
        if len(favorites.unique()) == len(favorites):
            boxes.append(candidates)
            labels.append(torch.randint(1, 21, (len(candidates),)))
    return boxes, labels


quarters = torch.tensor([[.25, .25, .5, .5], [.75, .25, .5, .5], [.25, .75, .5, .5], [.75, .75, .5, .5]])  # priors


def test_losses_by_hand():
    """
    Four priors, and three images: an object on the first prior, none, and one on the second prior. Two negatives
    count for each of the two positives.
    """
    chances = torch.tensor([[.1, .2, .5, .4], [.9, .9, .9, .9], [.6, .7, .8, .8]])  # what softmax gives to the object
    locs = torch.full((3, 4, 4), 9.)
    locs[0, 0], locs[2, 1] = torch.tensor([.2, 1., -3., 0.]), torch.tensor([0., 0., -.2, 0.])
    criterion = MultiBoxLoss(quarters, neg_pos_ratio=2)
    matched = criterion.match([cxcy_to_xy(quarters[:1]), torch.empty(0, 4), cxcy_to_xy(quarters[1:2])],
                              [torch.tensor([1]), torch.empty(0, dtype=torch.long), torch.tensor([1])])
    loc_loss, conf_loss = criterion.losses(locs, torch.stack([1 - chances, chances], dim=2).log(), *matched)
    assert loc_loss.item() == pytest.approx((.02 + .5 + 2.5 + .02) / 2)
    # What softmax gives to the true class: of the positives .1 and .7, of the hard negatives .5, .6, .2 and .2
    assert conf_loss.item() == pytest.approx(-math.log(.1 * .5 * .6 * .7 * .2 * .2) / 2)


def test_loss_and_gradients_equal_torchvisions():
    boxes, labels = scenes_without_conflicts(6)
    boxes.append(torch.empty(0, 4)), labels.append(torch.empty(0, dtype=torch.long))  # and an image without objects
    with torch.device('meta'):  # its loss needs no weights
        theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21)
    priors_xy = cxcy_to_xy(create_prior_boxes())
    matches = [theirs.proposal_matcher(box_iou(b, priors_xy)) if len(b) else torch.full((8732,), -1) for b in boxes]

    results = []
    values = torch.randn(7, 8732, 4), 3 * torch.randn(7, 8732, 21)
    for name in ('ours', 'theirs'):
        locs, scores = (v.clone().requires_grad_() for v in values)
        if name == 'ours':
            criterion = MultiBoxLoss(create_prior_boxes())
            loc_loss, conf_loss = criterion.losses(locs, scores, *criterion.match(boxes, labels))
        else:
            losses = theirs.compute_loss([{'boxes': b, 'labels': of_image} for b, of_image in zip(boxes, labels)],
                                         {'bbox_regression': locs, 'cls_logits': scores}, [priors_xy] * 7, matches)
            loc_loss, conf_loss = losses['bbox_regression'], losses['classification']
        (loc_loss + conf_loss).backward()
        results.append((loc_loss.detach(), conf_loss.detach(), locs.grad, scores.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert results[0][2].abs().sum() > 0 and results[0][3].abs().sum() > 0


def test_match_by_hand():
    """
    Four priors, and three images: one with three objects, of which two want the first prior, and one is small; one
    without any; and one whose object overlaps two priors by exactly the threshold.
    """
    boxes, priors_xy = torch.tensor([[.1, 0., .6, .5], [0., 0., .5, .5], [.7, .7, .8, .8]]), cxcy_to_xy(quarters)
    true_boxes, true_classes = MultiBoxLoss(quarters).match(
        [boxes, torch.empty(0, 4), torch.tensor([[0., .5, 1., 1.]])],
        [torch.tensor([3, 2, 1]), torch.empty(0, dtype=torch.long), torch.tensor([4])])
    assert true_classes.tolist() == [[2, 3, 0, 1], [0, 0, 0, 0], [0, 0, 4, 4]]
    assert torch.equal(true_boxes[0], torch.stack([boxes[1], boxes[0], priors_xy[2], boxes[2]]))
    assert torch.equal(true_boxes[1], priors_xy)


def test_match_equals_a_plain_loop():
    """Over images with no object, one, and many, and over priors."""
    priors = create_prior_boxes()
    priors_xy, boxes = cxcy_to_xy(priors), [random_boxes(7), torch.empty(0, 4), random_boxes(1), small_boxes(30)]
    labels = [torch.randint(1, 21, (len(b),)) for b in boxes]
    true_boxes, true_classes = MultiBoxLoss(priors).match(boxes, labels)
    for image, (of_image, its_labels) in enumerate(zip(boxes, labels)):
        expected_boxes, expected_classes = priors_xy.clone(), torch.zeros(8732, dtype=torch.long)
        if len(of_image) > 0:
            overlap = find_jaccard_overlap(of_image, priors_xy)
            best, of_prior = overlap.max(dim=0)
            for row, prior in enumerate(own_priors(overlap[None])[0]):
                best[prior], of_prior[prior] = 1, row
            for prior in (best >= 0.5).nonzero().flatten():
                row = of_prior[prior]
                expected_boxes[prior], expected_classes[prior] = of_image[row], its_labels[row]
        assert torch.equal(true_boxes[image], expected_boxes) and torch.equal(true_classes[image], expected_classes)


def test_two_objects_that_want_the_same_prior_both_stay():
    priors = create_prior_boxes()
    index = first_of_map['conv9_2'] + 12 * 6  # the square prior in the middle of conv9_2
    prior_xy = cxcy_to_xy(priors[index])
    nearer, further = prior_xy + torch.tensor([0., 0., .01, 0.]), prior_xy + torch.tensor([0., 0., .03, 0.])
    favorites = box_iou(torch.stack([further, nearer]), cxcy_to_xy(priors)).argmax(dim=1)
    assert favorites.tolist() == [index, index]

    true_boxes, true_classes = MultiBoxLoss(priors, threshold=0.99).match([torch.stack([further, nearer])],
                                                                          [torch.tensor([7, 9])])
    assert true_classes[0, index] == 9 and torch.equal(true_boxes[0, index], nearer)
    assert (true_classes == 7).sum() == 1  # the other has its next best prior
    next_best = box_iou(further[None], cxcy_to_xy(priors))[0].topk(2).indices[1]
    assert true_classes[0, next_best] == 7


def small_boxes(n):
    """Fractional boundary coordinates of n boxes with sides from 0.02 to 0.08, which lie inside several priors."""
    sides = 0.02 + 0.06 * torch.rand(n, 2)
    corners = torch.rand(n, 2) * (1 - sides)
    return torch.cat([corners, corners + sides], dim=1)


def test_a_prior_of_its_own_by_hand():
    """In the first image all three objects want the first prior; in the second, two are padding."""
    overlap = torch.tensor([[[.6, .5, .1], [.7, .2, .3], [.7, .6, .3]], [[.1, .2, .2], [-1, -1, -1], [-1, -1, -1]]])
    assert own_priors(overlap).tolist() == [[2, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize('some_boxes', [random_boxes, small_boxes])
def test_every_object_gets_a_prior_of_its_own(some_boxes):
    """Against the plain algorithm: of all overlaps the largest first, of equals the first, until each has one."""
    priors_xy = cxcy_to_xy(create_prior_boxes())
    for n_objects in (1, 2, 5, 12, 30):
        boxes = some_boxes(n_objects)
        boxes[n_objects // 2:] = boxes[:n_objects - n_objects // 2] + 1e-3 * torch.rand(n_objects - n_objects // 2, 4)
        boxes[-1] = boxes[0]
        overlap = find_jaccard_overlap(boxes, priors_xy)
        left, plain = overlap.clone(), [None] * n_objects
        for _ in range(n_objects):
            row, prior = divmod(left.argmax().item(), 8732)
            plain[row] = prior
            left[row], left[:, prior] = -1, -1
        before = overlap.clone()
        assert own_priors(overlap[None])[0].tolist() == plain and len(set(plain)) == n_objects
        assert torch.equal(overlap, before)


def test_of_priors_that_overlap_an_object_equally_the_first_wins():
    """Whether its image is alone in the batch, or beside another with many objects."""
    priors = create_prior_boxes()
    criterion, n_ties = MultiBoxLoss(priors), 0
    for n_others in range(1, 31):
        small, others = small_boxes(1), random_boxes(n_others)
        overlap = find_jaccard_overlap(small, cxcy_to_xy(priors))[0]
        n_ties += (overlap == overlap.max()).sum() > 1
        for boxes in ([small], [small, others], [others, small]):
            _, true_classes = criterion.match(boxes, [torch.full((len(b),), 2) for b in boxes])
            positive = true_classes[-1 if len(boxes[0]) > 1 or boxes[0] is others else 0].nonzero().flatten()
            assert positive.tolist() == [overlap.argmax()]
    assert n_ties > 15


def test_confidence_loss_of_small_objects_equals_a_plain_computation():
    """Image by image, as the earlier implementation computes it: of equal priors, the first is an object's best."""
    priors_xy, boxes, labels = cxcy_to_xy(create_prior_boxes()), [], []
    while len(boxes) < 5:
        candidates = small_boxes(len(boxes) + 1)
        if len(find_jaccard_overlap(candidates, priors_xy).argmax(dim=1).unique()) == len(candidates):
            boxes.append(candidates)
            labels.append(torch.randint(1, 4, (len(candidates),)))
    scores, total, n_positive = 3 * torch.randn(5, 8732, 4), 0., 0
    for image in range(5):
        overlap = find_jaccard_overlap(boxes[image], priors_xy)  # (n_objects, 8732)
        best, of_prior = overlap.max(dim=0)
        for row, prior in enumerate(overlap.argmax(dim=1)):
            best[prior], of_prior[prior] = 1, row
        classes = labels[image][of_prior].where(best >= 0.5, 0)
        losses = F.cross_entropy(scores[image], classes, reduction='none')
        n = (classes > 0).sum().item()
        total += losses[classes > 0].sum() + losses[classes == 0].sort(descending=True).values[:3 * n].sum()
        n_positive += n
    criterion = MultiBoxLoss(create_prior_boxes())
    _, conf_loss = criterion.losses(torch.zeros(5, 8732, 4), scores, *criterion.match(boxes, labels))
    torch.testing.assert_close(conf_loss, total / n_positive)


@pytest.mark.parametrize('alpha, neg_pos_ratio, threshold', [(0., 3, 0.5), (2.5, 3, 0.5), (1., 1, 0.5), (1., 3, 0.7)])
def test_parameters_of_the_loss(alpha, neg_pos_ratio, threshold):
    """alpha multiplies the localization loss, and nothing else."""
    boxes, labels = scenes_without_conflicts(2)
    locs, scores = torch.randn(2, 8732, 4), torch.randn(2, 8732, 21)
    criterion = MultiBoxLoss(create_prior_boxes(), threshold, neg_pos_ratio, alpha)
    true_boxes, true_classes = criterion.match(boxes, labels)
    positive = true_classes > 0
    overlap = [find_jaccard_overlap(b, cxcy_to_xy(create_prior_boxes())) for b in boxes]
    expected = torch.stack([(o >= threshold).any(dim=0) for o in overlap])
    assert (positive & ~expected).sum() <= sum(map(len, boxes)) and (expected & ~positive).sum() == 0
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), criterion.priors_cxcy)
    loc_loss = F.smooth_l1_loss(locs[positive], offsets[positive], reduction='sum') / positive.sum()
    losses = F.cross_entropy(scores.permute(0, 2, 1), true_classes, reduction='none')
    conf_loss = losses[positive].sum()
    for image in range(2):
        n = neg_pos_ratio * positive[image].sum()
        conf_loss += losses[image][~positive[image]].sort(descending=True).values[:n].sum()
    loss = criterion(locs, scores, boxes, labels)
    torch.testing.assert_close(loss, conf_loss / positive.sum() + alpha * loc_loss)


crowd = '''
import resource, torch
from model import MultiBoxLoss
from utils import create_prior_boxes
criterion = MultiBoxLoss(create_prior_boxes())
corners, sides = torch.rand(32, 300, 2) * 0.9, 0.02 + 0.08 * torch.rand(32, 300, 2)
boxes, labels = list(torch.cat([corners, corners + sides], dim=2)), list(torch.ones(32, 300, dtype=torch.long))
criterion.match(boxes[:1], [labels[0]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
criterion.match(boxes, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''


def test_matching_a_crowd_needs_less_than_a_gigabyte():
    """32 images with 300 objects each."""
    result = subprocess.run([sys.executable, '-c', crowd], cwd=root, capture_output=True, text=True, check=True)
    assert 1024 * int(result.stdout) < 1e9


def test_identical_objects_each_get_a_prior():
    box = torch.tensor([0.2, 0.2, 0.4, 0.4])
    criterion = MultiBoxLoss(create_prior_boxes(), threshold=1.)
    _, true_classes = criterion.match([box.repeat(3, 1)], [torch.tensor([1, 2, 3])])
    assert true_classes[true_classes > 0].sort().values.tolist() == [1, 2, 3]


def test_objects_do_not_depend_on_the_rest_of_the_batch():
    """The padding of one image's objects must not leave a trace."""
    boxes, labels = scenes_without_conflicts(4)
    criterion = MultiBoxLoss(create_prior_boxes())
    together = criterion.match(boxes, labels)
    for i in range(4):
        alone = criterion.match(boxes[i:i + 1], labels[i:i + 1])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize('n_images, n_hard', [(1, 30), (2, 60)])
def test_images_without_objects_teach_min_negatives(n_images, n_hard):
    """The loss is the sum over the hardest negatives, divided by a third of their number, however many images."""
    torch.manual_seed(0)
    locs, scores = torch.randn(n_images, 8732, 4), torch.randn(n_images, 8732, 5)
    no_boxes, no_labels = [torch.empty(0, 4)] * n_images, [torch.empty(0, dtype=torch.long)] * n_images
    criterion = MultiBoxLoss(create_prior_boxes(), min_negatives=30)
    losses = F.cross_entropy(scores.flatten(0, 1), torch.zeros(n_images * 8732, dtype=torch.long), reduction='none')
    hardest = losses.view(n_images, 8732).topk(30, dim=1).values
    assert hardest.numel() == n_hard
    loc_loss, conf_loss = criterion.losses(locs, scores, *criterion.match(no_boxes, no_labels))
    assert loc_loss == 0 and conf_loss.item() == pytest.approx(hardest.sum().item() / (n_hard / 3), rel=1e-5)


def test_min_negatives_change_only_images_with_few_positives():
    torch.manual_seed(0)
    priors = create_prior_boxes()
    boxes, labels = [cxcy_to_xy(priors[7000:7001]), random_boxes(60)], [torch.tensor([2]), torch.ones(60).long()]
    locs, scores = torch.randn(2, 8732, 4), torch.randn(2, 8732, 5)
    matches = MultiBoxLoss(priors).match(boxes, labels)
    n_positive = (matches[1] > 0).sum(dim=1).tolist()
    assert n_positive[0] < 50 < n_positive[1]
    plain, at_least = (MultiBoxLoss(priors, min_negatives=n).losses(locs, scores, *matches) for n in (0, 150))
    assert at_least[0].item() == pytest.approx(plain[0].item() * sum(n_positive) / (50 + n_positive[1]), rel=1e-5)
    unchanged = MultiBoxLoss(priors, min_negatives=3 * min(n_positive)).losses(locs, scores, *matches)
    assert [loss.item() for loss in unchanged] == pytest.approx([loss.item() for loss in plain], rel=1e-6)


@pytest.mark.parametrize('n_images', [1, 3])
def test_no_object_in_the_batch_means_no_loss(n_images):
    locs, scores = (torch.randn(n_images, 8732, n, requires_grad=True) for n in (4, 5))
    loss = MultiBoxLoss(create_prior_boxes())(locs, scores, [torch.empty(0, 4)] * n_images,
                                             [torch.empty(0, dtype=torch.long)] * n_images)
    loss.backward()
    assert loss.item() == 0 and (locs.grad == 0).all() and (scores.grad == 0).all()


def test_hard_negatives_are_three_times_the_positives_and_the_hardest():
    boxes, labels = scenes_without_conflicts(2)
    criterion, scores = MultiBoxLoss(create_prior_boxes()), torch.randn(2, 8732, 21, requires_grad=True)
    matches = criterion.match(boxes, labels)
    _, conf_loss = criterion.losses(torch.zeros(2, 8732, 4), scores, *matches)
    conf_loss.backward()
    counted, positive = scores.grad.abs().sum(dim=2) > 0, matches[1] > 0
    losses = -scores.log_softmax(dim=2)[:, :, 0]
    for i in range(2):
        n = 3 * positive[i].sum()
        assert (counted[i] & ~positive[i]).sum() == n and counted[i][positive[i]].all()
        assert losses[i][counted[i] & ~positive[i]].min() >= losses[i][~counted[i]].max()


def detect_plainly(predictor, locs, scores, min_score, max_overlap, top_k):
    """Each image and class on its own, box by box: what detect_objects has to equal."""
    images = []
    for loc, score in zip(locs, scores.softmax(dim=2)):
        boxes, found = cxcy_to_xy(gcxgcy_to_cxcy(loc, predictor.priors_cxcy)), []
        for label in range(1, score.size(1)):
            left = score[:, label].argsort(descending=True)
            left = left[score[left, label] > min_score][:400]
            while len(left) > 0:
                best, left = left[0].item(), left[1:]
                found.append((score[best, label].item(), label, best))
                overlap = find_jaccard_overlap(boxes[best:best + 1].double(), boxes[left].double())[0]
                left = left[overlap <= max_overlap]
        found = sorted(found, reverse=True)[:top_k]
        all_scores, labels, indices = zip(*found)
        images.append((boxes[list(indices)], list(labels), list(all_scores)))
    return images


@pytest.mark.parametrize('spread, top_k, min_score', [(1., 5, 0.2), (1., 200, 0.3), (0., 200, 0.05), (10., 5, 0.3)])
def test_detections_equal_the_plain_algorithm(spread, top_k, min_score):
    """Scattered boxes, boxes exactly on priors, and boxes far outside; few candidates needed, and all of them."""
    predictor = _Predictor(n_classes=4)
    locs = spread * torch.randn(2, 8732, 4)
    scores = torch.cat([torch.full((2, 8732, 1), 4.), 2 * torch.randn(2, 8732, 3)], dim=2)
    ours = SSD300.detect_objects(predictor, locs, scores, min_score, 0.45, top_k)
    for i, (boxes, labels, all_scores) in enumerate(detect_plainly(predictor, locs, scores, min_score, 0.45, top_k)):
        assert ours[1][i].tolist() == labels
        assert ours[2][i].tolist() == pytest.approx(all_scores)
        torch.testing.assert_close(ours[0][i], boxes)
        assert 0 < len(labels) <= top_k


def some_predictions(n_images):
    """Offsets and scores of 4 classes; about a twentieth of the priors find something."""
    locs, scores = torch.randn(n_images, 8732, 4), 2 * torch.randn(n_images, 8732, 4)
    scores[:, :, 0] += 5
    return locs, scores


def test_an_image_does_not_depend_on_the_others():
    """Nor on how large a box is decoded in another, or in another class."""
    predictor, (locs, scores) = _Predictor(n_classes=4), some_predictions(2)
    alone = [values[0] for values in SSD300.detect_objects(predictor, locs[:1], scores[:1], 0.2, 0.45, 200)]
    assert 20 < len(alone[1]) <= 200
    locs[1, 7, 2:], scores[1, 7] = 200, torch.tensor([0., 20., 0., 0.])  # e^40 priors wide
    together = [values[0] for values in SSD300.detect_objects(predictor, locs, scores, 0.2, 0.45, 200)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))

    locs[0, 7], scores[0, 7] = locs[1, 7], scores[1, 7]
    boxes, labels, all_scores = (values[0] for values in SSD300.detect_objects(predictor, locs, scores, 0.2, 0.45, 200))
    assert labels[0] == 1 and boxes[0, 2] > 1e15
    kept = alone[1] != 1
    assert torch.equal(boxes[labels != 1], alone[0][kept][:(labels != 1).sum()]) and (labels != 1).sum() > 10


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e30])
def test_an_infinite_prediction_gives_no_box(value):
    predictor, (locs, scores) = _Predictor(n_classes=4), some_predictions(1)
    scores[0, 7] = torch.tensor([0., 20., 0., 0.])
    locs[0, 7, 2] = value
    boxes, _, all_scores = SSD300.detect_objects(predictor, locs, scores, 0.2, 0.45, 200)
    assert boxes[0].isfinite().all() and len(boxes[0]) > 20
    locs[0, 7], scores[0, 7, 1] = 0, value
    boxes, _, all_scores = SSD300.detect_objects(predictor, locs, scores, 0.2, 0.45, 200)
    assert all_scores[0].isfinite().all() and len(boxes[0]) > 20
    scores[0, 1000:4000, 1] = value
    with_many, _, _ = SSD300.detect_objects(predictor, locs, scores, 0.2, 0.45, 200)
    assert with_many[0].isfinite().all() and len(with_many[0]) > 20
    boxes, labels, _ = SSD300.detect_objects(predictor, torch.full_like(locs, value), scores, 0.2, 0.45, 200)
    assert boxes[0].isfinite().all()


@pytest.mark.parametrize('n_better, found', [(399, True), (400, False)])
def test_only_the_400_best_of_each_class_are_candidates(n_better, found):
    """One box everywhere, except for one prior, which is the 400th or 401st of its class; another class has 1000."""
    predictor = _Predictor(n_classes=3)
    target = torch.tensor([0.5, 0.5, 0.3, 0.3]).expand(1, 8732, 4).clone()
    target[0, 8000] = torch.tensor([0.1, 0.1, 0.05, 0.05])
    scores = torch.zeros(1, 8732, 3)
    scores[0, :n_better, 1] = 5 + torch.rand(n_better)
    scores[0, 8000, 1] = 4
    scores[0, 4000:5000, 2] = 4 + torch.rand(1000)
    locs = cxcy_to_gcxgcy(target, predictor.priors_cxcy)
    boxes, labels, _ = SSD300.detect_objects(predictor, locs, scores, 0.5, 0.45, 50)
    expected = [pytest.approx([.5, .5, .3, .3], abs=1e-5)] + found * [pytest.approx([.1, .1, .05, .05], abs=1e-5)]
    assert xy_to_cxcy(boxes[0])[labels[0] == 1].tolist() == expected
    assert labels[0].tolist().count(2) == 1


def test_a_score_must_be_above_the_minimum():
    scores = torch.zeros(1, 8732, 2)  # all of them exactly one half
    _, labels, _ = SSD300.detect_objects(_Predictor(2), torch.zeros(1, 8732, 4), scores, 0.5, 0.45, 200)
    assert labels[0].tolist() == [0]
    _, labels, _ = SSD300.detect_objects(_Predictor(2), torch.zeros(1, 8732, 4), scores, 0.4999, 0.45, 200)
    assert labels[0].tolist() == [1] * len(labels[0]) and len(labels[0]) > 10


def test_no_detection_gives_a_placeholder():
    scores = torch.zeros(2, 8732, 3)
    scores[..., 0] = 20.
    scores[1, 7, 2] = 40.
    boxes, labels, all_scores = SSD300.detect_objects(_Predictor(3), torch.zeros(2, 8732, 4), scores, 0.5, 0.45, 200)
    assert boxes[0].tolist() == [[0, 0, 1, 1]] and labels[0].tolist() == [0] and all_scores[0].tolist() == [0]
    assert labels[1].tolist() == [2] and labels[0].dtype == labels[1].dtype == torch.long
