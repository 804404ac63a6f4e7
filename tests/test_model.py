"""The network, how its weights start, its loss and its detections."""
import math
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import random_boxes
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VGG16_Weights
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou, nms

from errors import UserError
from model import SSD300, MultiBoxLoss, PredictionConvolutions, fully_connected_to_convolution, match, standardize
from utils import create_prior_boxes, cxcy_to_xy, feature_maps, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy

priors = create_prior_boxes()
priors_xy = cxcy_to_xy(priors)
first_of_map = {'conv4_3': 0, 'conv7': 5776, 'conv8_2': 7942, 'conv9_2': 8542, 'conv10_2': 8692, 'conv11_2': 8728}


# --------------------------------------------------------------------------------------------------------- The network

@pytest.fixture(scope='module')
def networks():
    """A whole network and one with a sixteenth of the channels, from the same random weights; not to be changed."""
    made = []
    for thin in (1, 16):
        torch.manual_seed(5)
        made.append(SSD300(n_classes=3, thin=thin))
    return made


@pytest.fixture
def thin(networks):
    """A thin network, which may be changed."""
    return deepcopy(networks[1])


def shapes_only(n_classes, thin=1):
    """A network without values; it computes the shapes, in no time."""
    with torch.device('meta'):
        return SSD300(n_classes, thin=thin)


@pytest.mark.parametrize('thin, operations', [(1, 62.8e9), (4, 4.45e9)])
def test_shapes_of_all_maps_and_operations_for_an_image(thin, operations):
    """In the base of each layer, not only at its end: a wrong padding can be lost again where a pool rounds."""
    ssd, images, sizes = shapes_only(21, thin), torch.empty(2, 3, 300, 300, device='meta'), {}
    for name, layer in ssd.base.named_children():
        layer.register_forward_hook(lambda *args, name=name: sizes.update({name: tuple(args[2].shape[2:])}))
    conv4_3, conv7 = ssd.base(images)
    of_block = {'1': 300, '2': 150, '3': 75, '4': 38, '5': 19, '6': 19, '7': 19}
    pools = {'pool1': 150, 'pool2': 75, 'pool3': 38, 'pool4': 19, 'pool5': 19}
    assert sizes == {name: (pools.get(name) or of_block[name[4]],) * 2 for name in sizes} and len(sizes) == 15 + 5
    maps = (conv4_3, conv7, *ssd.aux_convs(conv7))
    assert [tuple(m.shape) for m in maps] == [(2, f.channels // thin, f.size, f.size) for f in feature_maps.values()]
    with FlopCounterMode(display=False) as counter:
        locs, scores = ssd(images)
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, 21)
    assert counter.get_total_flops() / 2 == pytest.approx(operations, rel=0.01)


def test_state_dict_has_the_names_that_other_weights_use():
    ssd = shapes_only(21)
    base = [f'conv{block}_{i}' for block, n in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)) for i in range(1, n + 1)]
    layers = [f'base.{name}' for name in (*base, 'conv6', 'conv7')]
    layers += [f'aux_convs.conv{block}_{i}' for block in (8, 9, 10, 11) for i in (1, 2)]
    layers += [f'pred_convs.{kind}_{name}' for kind in ('loc', 'cl') for name in feature_maps]
    expected = {f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')}
    expected |= {'rescale_factors', 'priors_cxcy'}
    assert set(ssd.state_dict()) == expected and [name for name, _ in ssd.named_buffers()] == ['priors_cxcy']
    assert ssd.base.conv6.weight.shape == (1024, 512, 3, 3) and ssd.base.conv7.weight.shape == (1024, 1024, 1, 1)
    weights = [layer.weight for layer in ssd.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(weights) == 15 + 8 + 12 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_priors_are_loaded_with_the_weights_that_fit_them(thin):
    """As after a start from COCO's weights, whose priors are others; weights without priors leave them alone."""
    trained, fresh = deepcopy(thin), thin
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


def test_an_image_without_features_has_finite_predictions_and_gradients(thin):
    locs, scores = thin(torch.zeros(1, 3, 300, 300))  # biases are 0, so all features are 0, and so is their norm
    (locs.sum() + scores.sum()).backward()
    assert locs.isfinite().all() and scores.isfinite().all()
    assert all(p.grad.isfinite().all() for p in thin.parameters())


def test_features_of_conv4_3_get_the_length_1_and_are_multiplied_by_their_factors(thin):
    seen, images = [], torch.randn(1, 3, 300, 300)
    thin.rescale_factors.data = 1 + torch.rand(1, 32, 1, 1)
    thin.pred_convs.loc_conv4_3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        conv4_3, _ = thin.base(images)
        thin(images)
    lengths = conv4_3.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(seen[0], conv4_3 / lengths * thin.rescale_factors.detach())


@pytest.mark.parametrize('name, row, column, prior, expected', [
    ('conv4_3', 0, 0, 0, (0.5 / 38, 0.5 / 38, 0.1, 0.1)),
    ('conv4_3', 37, 20, 1, (20.5 / 38, 37.5 / 38, math.sqrt(0.1 * 0.2), math.sqrt(0.1 * 0.2))),
    ('conv7', 3, 7, 2, (7.5 / 19, 3.5 / 19, 0.2 * math.sqrt(2), 0.2 / math.sqrt(2))),
    ('conv8_2', 9, 0, 3, (0.05, 0.95, 0.375 * math.sqrt(3), 0.375 / math.sqrt(3))),
    ('conv9_2', 2, 4, 5, (0.9, 0.5, 0.55 / math.sqrt(3), 0.55 * math.sqrt(3))),
    ('conv10_2', 1, 1, 3, (0.5, 0.5, 0.725 / math.sqrt(2), 1.)),  # 0.725 * sqrt(2) = 1.025, clamped
    ('conv11_2', 0, 0, 1, (0.5, 0.5, 1., 1.)), ('conv11_2', 0, 0, 2, (0.5, 0.5, 1., 0.9 / math.sqrt(2)))])
def test_priors_by_hand_and_the_order_of_predictions(name, row, column, prior, expected):
    """A score made at one tile, for one prior, must come out at that prior's place, and detect that prior's box."""
    size, n_priors = feature_maps[name].size, len(feature_maps[name].ratios) + 1
    index = first_of_map[name] + (row * size + column) * n_priors + prior
    assert priors[index].tolist() == pytest.approx(expected, abs=1e-6)
    heads = PredictionConvolutions(n_classes=3)
    for layer in heads.children():
        torch.nn.init.zeros_(layer.weight)
    getattr(heads, f'cl_{name}').weight.data[prior * 3 + 2, 0, 1, 1] = 50.  # class 2, looks at the tile itself
    getattr(heads, f'loc_{name}').weight.data[prior * 4, 0, 1, 1] = 1.  # moves by a tenth of the prior's width
    feats = [torch.zeros(1, f.channels, f.size, f.size) for f in feature_maps.values()]
    feats[list(feature_maps).index(name)][0, 0, row, column] = 1.
    locs, scores = heads(*feats)
    assert scores.nonzero().tolist() == [[0, index, 2]] and locs.nonzero().tolist() == [[0, index, 0]]
    boxes, labels, _ = detect(locs, scores, min_score=0.9)
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


# -------------------------------------------------------------------------------------------------- How weights start

def test_random_start_keeps_the_signal_alive(networks):
    images = torch.randn(1, 3, 128, 128)
    for network in networks:
        with torch.no_grad():
            conv4_3, conv7 = network.base(images)
            scores = network.pred_convs.cl_conv4_3(F.normalize(conv4_3) * network.rescale_factors)
        assert 0.1 < conv4_3.std() < 10 and 0.1 < conv7.std() < 10
        assert scores.std() == pytest.approx(1.2 * math.sqrt(network.thin), rel=0.25)  # see `thin_out`
        assert all((layer.bias == 0).all() for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))


def test_a_thin_network_keeps_every_sixteenth_channel(networks):
    whole, thin = networks
    assert (whole.thin, thin.thin) == (1, 16) and thin.state_dict().keys() == whole.state_dict().keys()
    for (key, few), all_of_them in zip(thin.state_dict().items(), whole.state_dict().values()):
        if key == 'rescale_factors':
            assert few.shape == (1, 32, 1, 1) and (few == 20).all() and (all_of_them == 20).all()
        elif key == 'priors_cxcy':
            assert torch.equal(few, all_of_them) and torch.equal(few, priors)
        elif key == 'base.conv1_1.weight':
            assert torch.equal(few, all_of_them[::16])  # it still sees red, green and blue
        elif key.startswith('pred_convs'):
            assert torch.equal(few, 4 * all_of_them[:, ::16] if key.endswith('weight') else all_of_them)
        else:
            assert torch.equal(few, 4 * all_of_them[::16, ::16] if key.endswith('weight') else all_of_them[::16]), key


@pytest.mark.parametrize('thin', [0, 3, 128, None, 'a lot'])
def test_other_thin_networks_do_not_exist(thin):
    with pytest.raises(UserError, match=f'thin = {thin!r}: set it to one of .1, 2, 4, 8, 16, 32, 64.'):
        shapes_only(3, thin)


def test_standardized_layers_have_mean_0_and_spread_1(thin):
    images = torch.randn(4, 3, 300, 300)
    images[:2] += 3
    thin.aux_convs.conv8_1.weight.data[0] = 1e-9  # a channel that hardly changes, and is only shifted
    heads = [layer.weight.clone() for layer in thin.pred_convs.children()]
    standardize(thin, images)
    outputs = {}
    for name, layer in (*thin.base.named_children(), *thin.aux_convs.named_children()):
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda *args, name=name: outputs.update({name: args[2].clone()}))  # before ReLU
    with torch.no_grad():
        thin(images)
    assert len(outputs) == 15 + 8
    for name, output in outputs.items():
        spread, mean = torch.std_mean(output, dim=(0, 2, 3))
        changing = torch.arange(len(mean)) >= (name == 'conv8_1')
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        torch.testing.assert_close(spread[changing], torch.ones_like(spread[changing]), atol=0.02, rtol=0)
    assert all(parameter.isfinite().all() for parameter in thin.parameters())
    assert thin.aux_convs.conv8_1.weight[0].unique().tolist() == pytest.approx([1e-9], rel=1e-6, abs=0)
    for before, layer in zip(heads, thin.pred_convs.children()):
        torch.testing.assert_close(layer.weight, 0.1 * before)


def test_one_image_is_enough_to_standardize(thin):
    """Its last maps have one pixel, hence no spread."""
    standardize(thin, torch.randn(1, 3, 300, 300))
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in thin.base.parameters())
    assert thin.aux_convs.conv11_2.weight.abs().max() < 10


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


def test_pretrained_weights_go_where_they_belong(networks, monkeypatch):
    """A state dict in torchvision's layout stands in for the download."""
    vgg, indices = {}, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    convolutions = [layer for name, layer in networks[0].base.named_children() if name.startswith('conv')]
    for layer, index in zip(convolutions, indices):
        vgg[f'features.{index}.weight'] = torch.randn_like(layer.weight)
        vgg[f'features.{index}.bias'] = torch.randn_like(layer.bias)
    for index, n_inputs in ((0, 512 * 49), (3, 4096)):  # overlapping rows, because 103 million random numbers take long
        vgg[f'classifier.{index}.weight'] = torch.randn(4096 * 101 + n_inputs).as_strided((4096, n_inputs), (101, 1))
        vgg[f'classifier.{index}.bias'] = torch.randn(4096)
    monkeypatch.setattr(VGG16_Weights, 'get_state_dict', lambda self, **_: vgg)
    for thin in (1, 4):
        base, factor = SSD300(n_classes=3, pretrained=True, thin=thin).base, math.sqrt(thin)
        assert torch.equal(base.conv1_1.weight, vgg['features.0.weight'][::thin])
        assert torch.equal(base.conv3_1.weight, factor * vgg['features.10.weight'][::thin, ::thin])
        assert torch.equal(base.conv5_3.bias, vgg['features.28.bias'][::thin])
        conv6 = vgg['classifier.0.weight'].view(4096, 512, 7, 7)[::4 * thin, ::thin, ::3, ::3]
        assert torch.equal(base.conv6.weight, factor * conv6)
        assert torch.equal(base.conv7.weight[:, :, 0, 0], factor * vgg['classifier.3.weight'][::4 * thin, ::4 * thin])

    vgg['features.5.weight'] = torch.randn(128, 64, 5, 5)
    with pytest.raises(RuntimeError, match='conv2_1.weight'):
        SSD300(n_classes=3, pretrained=True)


def test_without_network_pretrained_says_where_the_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    download = Mock(side_effect=OSError('no network'))
    monkeypatch.setattr('torch.hub.download_url_to_file', download)
    with pytest.raises(UserError, match=f'vgg16-397923af.pth failed .no network.: put that file into {tmp_path}.*, or'):
        SSD300(n_classes=3, pretrained=True)
    assert download.call_args.args[2] == '397923af'  # so that a damaged download is noticed


# ------------------------------------------------------------------------------------------------------------ Matching

quarters = torch.tensor([[.25, .25, .5, .5], [.75, .25, .5, .5], [.25, .75, .5, .5], [.75, .75, .5, .5]])  # priors


@pytest.mark.parametrize('threshold, of_third_image', [(0.5, [0, 0, 4, 4]), (0.51, [0, 0, 4, 0])])
def test_match_by_hand(threshold, of_third_image):
    """Four priors, and three images: one with three objects, of which two want the first prior, and one is small; one
    without any; and one whose object overlaps two priors by exactly one half. Then each of the images by itself."""
    boxes = [torch.tensor([[.1, 0., .6, .5], [0., 0., .5, .5], [.7, .7, .8, .8]]), torch.empty(0, 4),
             torch.tensor([[0., .5, 1., 1.]])]
    labels = [torch.tensor(of_image, dtype=torch.long) for of_image in ([3, 2, 1], [], [4])]
    quarters_xy = cxcy_to_xy(quarters)
    true_boxes, true_classes = MultiBoxLoss(quarters, threshold).match(boxes, labels)
    assert true_classes.tolist() == [[2, 3, 0, 1], [0, 0, 0, 0], of_third_image]
    assert torch.equal(true_boxes[0], torch.stack([boxes[0][1], boxes[0][0], quarters_xy[2], boxes[0][2]]))
    assert torch.equal(true_boxes[1], quarters_xy)
    for i in range(3):
        alone = match(boxes[i], labels[i], quarters, threshold)
        assert torch.equal(alone[0], true_boxes[i]) and torch.equal(alone[1], true_classes[i])


def small_boxes(n):
    """Fractional boundary coordinates of n boxes with sides from 0.02 to 0.08, which lie inside several priors."""
    sides = 0.02 + 0.06 * torch.rand(n, 2)
    corners = torch.rand(n, 2) * (1 - sides)
    return torch.cat([corners, corners + sides], dim=1)


def match_plainly(boxes, labels):
    """Go through all pairs of an object and a prior, the largest overlap first: they belong together if neither is
    taken yet. Then go from prior to prior."""
    overlap, own = find_jaccard_overlap(boxes, priors_xy), {}
    for pair in overlap.flatten().argsort(descending=True, stable=True).tolist():
        i, prior = divmod(pair, 8732)
        if prior not in own and i not in own.values():
            own[prior] = i
    true_boxes, true_classes = priors_xy.clone(), torch.zeros(8732, dtype=torch.long)
    for prior, overlaps in enumerate(overlap.T.tolist()):
        i = own.get(prior, overlaps.index(max(overlaps)))
        if prior in own or overlaps[i] >= 0.5:
            true_boxes[prior], true_classes[prior] = boxes[i], labels[i]
    return true_boxes, true_classes


@pytest.mark.parametrize('some_boxes', [random_boxes, small_boxes])
@pytest.mark.parametrize('n_objects', [1, 2, 5, 12, 40])
def test_match_gives_every_object_a_prior_of_its_own(n_objects, some_boxes):
    """Half of the objects are almost where others are, and one is exactly there; small ones overlap priors equally."""
    boxes, labels = some_boxes(n_objects), torch.arange(n_objects) + 1
    boxes[n_objects // 2:] = boxes[:n_objects - n_objects // 2] + 1e-3 * torch.rand(n_objects - n_objects // 2, 4)
    boxes[-1] = boxes[0]
    overlap, given = find_jaccard_overlap(boxes, priors_xy), boxes.clone()
    assert n_objects < 12 or some_boxes is random_boxes or (overlap == overlap.amax(1, True)).sum() > 1.2 * n_objects
    true_boxes, true_classes = match(boxes, labels, priors)
    expected_boxes, expected_classes = match_plainly(boxes, labels)
    assert torch.equal(true_boxes, expected_boxes) and torch.equal(true_classes, expected_classes)
    assert true_classes.unique().tolist() == list(range(n_objects + 1)) and torch.equal(boxes, given)


def test_match_of_as_many_objects_as_priors():
    """All are on the first prior. The first object keeps it, and the others get one that they do not even overlap."""
    boxes = cxcy_to_xy(quarters[:1]).repeat(5, 1)
    _, true_classes = match(boxes[:4], torch.tensor([3, 2, 4, 1]), quarters)
    assert true_classes.tolist() == [3, 2, 4, 1]
    with pytest.raises(ValueError, match='5 objects cannot each have one of 4 priors'):
        match(boxes, torch.ones(5, dtype=torch.long), quarters)


# ------------------------------------------------------------------------------------------------------------ The loss

def no_objects(n_images):
    """Boxes and labels of images without objects."""
    return [torch.empty(0, 4)] * n_images, [torch.empty(0, dtype=torch.long)] * n_images


@pytest.mark.parametrize('neg_pos_ratio, alpha, of_true_class', [
    (2, 1., (.1, .7, .5, .6, .2, .2)), (1, 2.5, (.1, .7, .5, .2)), (9, 0., (.1, .7, .8, .5, .6, .4, .2, .2))])
def test_losses_by_hand(neg_pos_ratio, alpha, of_true_class):
    """Four priors, and three images: an object on the first prior, none, and one on the second prior. `of_true_class`
    is what softmax gives to the true class: of the two positives, and of those negatives that count."""
    chances = torch.tensor([[.1, .2, .5, .4], [.9, .9, .9, .9], [.6, .7, .8, .8]])  # what it gives to the object
    scores, locs = torch.stack([1 - chances, chances], dim=2).log(), torch.full((3, 4, 4), 9.)
    locs[0, 0], locs[2, 1] = torch.tensor([.2, 1., -3., 0.]), torch.tensor([0., 0., -.2, 0.])
    objects = ([cxcy_to_xy(quarters[:1]), torch.empty(0, 4), cxcy_to_xy(quarters[1:2])],
               [torch.tensor([1]), torch.empty(0, dtype=torch.long), torch.tensor([1])])
    criterion = MultiBoxLoss(quarters, 0.5, neg_pos_ratio, alpha)
    loss, loc_loss, conf_loss = criterion.losses(locs, scores, *objects)
    assert loc_loss.item() == pytest.approx((.02 + .5 + 2.5 + .02) / 2)
    assert conf_loss.item() == pytest.approx(-math.log(math.prod(of_true_class)) / 2)
    assert loss == conf_loss + alpha * loc_loss and criterion(locs, scores, *objects) == loss


def test_loss_of_lists_or_of_what_match_made_of_them():
    """On the CPU; then the network is on another device than the boxes."""
    boxes, labels = [random_boxes(n) for n in (3, 0, 1)], [torch.arange(n) + 1 for n in (3, 0, 1)]
    locs, scores, criterion = torch.randn(3, 8732, 4), torch.randn(3, 8732, 5), MultiBoxLoss(priors)
    expected = criterion.losses(locs, scores, boxes, labels)
    assert expected[0] == expected[1] + expected[2]
    for objects in ((tuple(boxes), tuple(labels)), criterion.match(boxes, labels)):
        assert criterion.losses(locs, scores, *objects) == expected
        elsewhere = criterion.losses(locs.to('meta'), scores.to('meta'), *objects)
        assert [loss.device.type for loss in elsewhere] == ['meta'] * 3


def test_loss_and_gradients_equal_torchvisions():
    """Where no two objects want the same prior; and in an image without objects."""
    boxes, labels = no_objects(1)
    while len(boxes) < 7:
        some = random_boxes(len(boxes))
        if len(box_iou(some, priors_xy).argmax(dim=1).unique()) == len(some):
            boxes.append(some)
            labels.append(torch.randint(1, 21, (len(some),)))
    with torch.device('meta'):  # its loss needs no weights
        theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21)
    matches = [theirs.proposal_matcher(box_iou(b, priors_xy)) if len(b) else torch.full((8732,), -1) for b in boxes]
    results = []
    values = torch.randn(7, 8732, 4), 3 * torch.randn(7, 8732, 21)
    for name in ('ours', 'theirs'):
        locs, scores = (v.clone().requires_grad_() for v in values)
        if name == 'ours':
            _, loc_loss, conf_loss = MultiBoxLoss(priors).losses(locs, scores, boxes, labels)
        else:
            losses = theirs.compute_loss([{'boxes': b, 'labels': of_image} for b, of_image in zip(boxes, labels)],
                                         {'bbox_regression': locs, 'cls_logits': scores}, [priors_xy] * 7, matches)
            loc_loss, conf_loss = losses['bbox_regression'], losses['classification']
        (loc_loss + conf_loss).backward()
        results.append((loc_loss.detach(), conf_loss.detach(), locs.grad, scores.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize('n_images, min_negatives, neg_pos_ratio', [(1, 0, 3), (3, 0, 3), (1, 30, 3), (2, 57, 7)])
def test_loss_of_images_without_objects(n_images, min_negatives, neg_pos_ratio):
    """It is the sum over the hardest negatives, divided by their number over the ratio, however many images; or 0."""
    locs, scores = (torch.randn(n_images, 8732, n, requires_grad=True) for n in (4, 5))
    criterion = MultiBoxLoss(priors, neg_pos_ratio=neg_pos_ratio, min_negatives=min_negatives)
    loss, loc_loss, _ = criterion.losses(locs, scores, *no_objects(n_images))
    loss.backward()
    hardest = -scores.log_softmax(dim=2)[:, :, 0].topk(min_negatives, dim=1, largest=False).values
    assert loss.item() == pytest.approx(neg_pos_ratio * hardest.sum().item() / max(1, hardest.numel()), rel=1e-5)
    assert loc_loss == 0 and (locs.grad == 0).all() and (scores.grad != 0).any(dim=2).sum() == hardest.numel()


def test_loss_with_min_negatives_changes_only_for_images_with_few_positives():
    objects = [priors_xy[7000:7001], random_boxes(60)], [torch.tensor([2]), torch.ones(60, dtype=torch.long)]
    locs, scores = torch.randn(2, 8732, 4), torch.randn(2, 8732, 5)
    few, many = (MultiBoxLoss(priors).match(*objects)[1] > 0).sum(dim=1).tolist()
    assert few < 50 < many
    plain, same, at_least = (MultiBoxLoss(priors, min_negatives=n).losses(locs, scores, *objects)
                             for n in (0, 3 * few, 150))
    assert at_least[1].item() == pytest.approx(plain[1].item() * (few + many) / (50 + many), rel=1e-5)
    assert [loss.item() for loss in same] == pytest.approx([loss.item() for loss in plain], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- Detections

def detect(locs, scores, min_score, *settings):
    """`SSD300.detect_objects` needs no more of a network than its priors."""
    return SSD300.detect_objects(SimpleNamespace(priors_cxcy=priors), locs, scores, min_score, *settings)


def some_predictions(n_images):
    """Offsets and scores of 4 classes; about a twentieth of the priors find something."""
    locs, scores = torch.randn(n_images, 8732, 4), 2 * torch.randn(n_images, 8732, 4)
    scores[:, :, 0] += 5
    return locs, scores


@pytest.mark.parametrize('spread, min_score, settings', [
    (1., 0.2, (0.45, 5)), (1., 0.01, ()), (0., 0.05, (0.45, 200)), (10., 0.3, (0.3, 5)), (1., 0.01, (0.5, 99, 20))])
def test_detections_equal_those_of_nms_in_each_class(spread, min_score, settings):
    """Scattered boxes, boxes exactly on priors, and boxes far outside; with the paper's settings and with others."""
    locs, scores = spread * torch.randn(2, 8732, 4), 2 * torch.randn(2, 8732, 4)
    scores[:, :, 0] = 4
    ours = detect(locs, scores, min_score, *settings)
    max_overlap, top_k, n_candidates = settings + (0.45, 200, 400)[len(settings):]
    for image, score in enumerate(scores.softmax(dim=2)):
        boxes, found = cxcy_to_xy(gcxgcy_to_cxcy(locs[image], priors)), []
        for label in (1, 2, 3):
            best = score[:, label].topk(n_candidates).indices
            best = best[score[best, label] > min_score]
            best = best[nms(boxes[best].clamp(-1, 2), score[best, label], max_overlap)]
            found += [(score[prior, label].item(), label, prior) for prior in best.tolist()]
        all_scores, labels, indices = zip(*sorted(found, reverse=True)[:top_k])
        assert ours[1][image].tolist() == list(labels) and ours[2][image].tolist() == list(all_scores)
        assert torch.equal(ours[0][image], boxes[list(indices)])


def test_detections_of_an_image_do_not_depend_on_the_others():
    """Nor on how large a box is decoded in another, or in another class."""
    locs, scores = some_predictions(2)
    alone = [values[0] for values in detect(locs[:1], scores[:1], 0.2)]
    assert 20 < len(alone[1]) <= 200
    locs[1, 7, 2:], scores[1, 7] = 200, torch.tensor([0., 20., 0., 0.])  # e^40 priors wide
    together = [values[0] for values in detect(locs, scores, 0.2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    locs[0, 7], scores[0, 7] = locs[1, 7], scores[1, 7]
    boxes, labels, _ = (values[0] for values in detect(locs, scores, 0.2))
    assert labels[0] == 1 and boxes[0, 2] > 1e15
    kept = alone[1] != 1
    assert torch.equal(boxes[labels != 1], alone[0][kept][:(labels != 1).sum()]) and (labels != 1).sum() > 10


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 1e30])
def test_detection_of_an_infinite_prediction_is_no_box(value):
    locs, scores = some_predictions(1)
    scores[0, 7] = torch.tensor([0., 20., 0., 0.])
    for which, spoiled in ((0, (0, 7, 2)), (0, (0, 7)), (1, (0, 7, 1)), (1, (0, slice(1000, 4000), 1))):
        predictions = locs.clone(), scores.clone()
        predictions[which][spoiled] = value
        boxes, _, all_scores = (values[0] for values in detect(*predictions, 0.2))
        assert boxes.isfinite().all() and all_scores.isfinite().all() and len(boxes) > 20
    boxes, _, _ = detect(torch.full_like(locs, value), scores, 0.2)
    assert boxes[0].isfinite().all()


@pytest.mark.parametrize('n_better, found', [(399, True), (400, False)])
def test_detection_among_the_400_best_of_each_class(n_better, found):
    """One box everywhere, except for one prior, which is the 400th or 401st of its class; another class has 1000."""
    target = torch.tensor([0.5, 0.5, 0.3, 0.3]).expand(1, 8732, 4).clone()
    target[0, 8000] = torch.tensor([0.1, 0.1, 0.05, 0.05])
    scores = torch.zeros(1, 8732, 3)
    scores[0, :n_better, 1] = 5 + torch.rand(n_better)
    scores[0, 8000, 1] = 4
    scores[0, 4000:5000, 2] = 4 + torch.rand(1000)
    locs = torch.cat([(target - priors)[..., :2] / priors[:, 2:] * 10, (target / priors)[..., 2:].log() * 5], dim=2)
    boxes, labels, _ = detect(locs, scores, 0.5)
    expected = [pytest.approx([.5, .5, .3, .3], abs=1e-5)] + found * [pytest.approx([.1, .1, .05, .05], abs=1e-5)]
    assert xy_to_cxcy(boxes[0])[labels[0] == 1].tolist() == expected
    assert labels[0].tolist().count(2) == 1


@pytest.mark.parametrize('min_score, expected', [(0.5, {0}), (0.4999, {1})])
def test_detection_needs_a_score_above_the_minimum(min_score, expected):
    locs, scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 2)  # all of them exactly one half
    assert set(detect(locs, scores, min_score)[1][0].tolist()) == expected


def test_detection_of_nothing_gives_a_placeholder():
    scores = torch.zeros(2, 8732, 3)
    scores[..., 0] = 20.
    scores[1, 7, 2] = 40.
    boxes, labels, all_scores = detect(torch.zeros(2, 8732, 4), scores, 0.5)
    assert boxes[0].tolist() == [[0, 0, 1, 1]] and labels[0].tolist() == [0] and all_scores[0].tolist() == [0]
    assert labels[1].tolist() == [2] and labels[0].dtype == labels[1].dtype == torch.long
