"""torchvision's SSD300 and its weights, in ours."""
import json
import os
import random
import re
from unittest.mock import Mock

import pytest
import torch
from conftest import copy_lists
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms
from torchvision.transforms import functional as F

import detect
import eval as eval_script
import torchvision_weights
from checkpoints import start_from
from datasets import to_input
from demo import draw_image
from errors import UserError
from model import thin_out
from torchvision_weights import coco_default_boxes, coco_detector, coco_index, from_torchvision
from utils import cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, make_label_map, voc_labels, xy_to_cxcy

per_tile = 4, 6, 6, 6, 4, 4
tiles = 38 ** 2, 19 ** 2, 10 ** 2, 5 ** 2, 3 ** 2, 1


@pytest.fixture(scope='module')
def theirs():
    """torchvision's model with random weights, which scores neither near 0 nor near 1."""
    torch.manual_seed(1)
    model = ssd300_vgg16(weights=None, weights_backbone=None, score_thresh=0.01, nms_thresh=0.45,
                         topk_candidates=9000).eval()
    model.backbone.scale_weight.data = 10 + 20 * torch.rand(512)
    with torch.no_grad():  # scale each map's outputs to a spread of 2 for scores, of 1 for offsets
        features = list(model.backbone(to_their_input(draw_random_image())).values())
        for head, spread in ((model.head.classification_head, 2.), (model.head.regression_head, 1.)):
            for layer, feature in zip(head.module_list, features):
                torch.nn.init.normal_(layer.bias)
                factor = spread / layer(feature).std()
                layer.weight.mul_(factor)
                layer.bias.mul_(factor)
    return model


def draw_random_image():
    """A PIL image of 300x300."""
    return draw_image(random.Random(4))[0].resize((300, 300))


def to_their_input(image):
    """(1, 3, 300, 300), as torchvision normalizes it."""
    return ((F.to_tensor(image) - torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)) * 255).unsqueeze(0)


def to_our_order(tensor):
    """Reorder the ratios within each tile, along dimension 0."""
    parts = tensor.split([n * t for n, t in zip(per_tile, tiles)])
    return torch.cat([part.unflatten(0, (-1, n))[:, [0, 1, 2, 4, 3, 5] if n == 6 else [0, 1, 2, 3]].flatten(0, 1)
                      for part, n in zip(parts, per_tile)])


@torch.no_grad()
def test_predictions_equal_torchvisions(theirs):
    image = draw_random_image()
    ours = from_torchvision(theirs.state_dict()).eval()  # does not change theirs, else they would differ
    features = list(theirs.backbone(to_their_input(image)).values())
    outputs = theirs.head(features)
    default_boxes = theirs.anchor_generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), features)[0]
    torch.testing.assert_close(ours.priors_cxcy, to_our_order(xy_to_cxcy(default_boxes / 300)), atol=1e-5, rtol=0)

    locs, scores = ours(to_input(image).unsqueeze(0))
    for mine, other in ((locs[0], outputs['bbox_regression'][0]), (scores[0], outputs['cls_logits'][0])):
        other = to_our_order(other)
        assert (mine - other).norm() < 3e-3 * other.norm()

    # Torchvision clips boxes before it suppresses; so do we here.
    boxes = cxcy_to_xy(gcxgcy_to_cxcy(locs[0], ours.priors_cxcy)).clamp(0, 1)
    probabilities, labels = scores[0].softmax(dim=1)[:, 1:].flatten().topk(9000)
    boxes, labels = boxes[labels // 90], labels % 90 + 1
    kept = batched_nms(boxes, probabilities, labels, 0.45)[:60]
    found = theirs([F.to_tensor(image)])[0]
    assert found['scores'][49] > 0.05 and found['scores'][0] < 0.999
    for box, label, score in zip(found['boxes'][:50] / 300, found['labels'], found['scores']):
        same = kept[labels[kept] == label]
        overlaps = find_jaccard_overlap(box[None], boxes[same])[0]
        assert overlaps.max() > 0.95
        assert (probabilities[same[overlaps.argmax()]] - score).abs() < 0.01


@torch.no_grad()
def test_a_choice_of_classes_keeps_their_scores(theirs):
    image = to_input(draw_random_image()).unsqueeze(0)
    locs, scores = from_torchvision(theirs.state_dict())(image)
    some_locs, some_scores = from_torchvision(theirs.state_dict(), [0, 17, 3])(image)
    torch.testing.assert_close(some_locs, locs)
    torch.testing.assert_close(some_scores, scores[:, :, [0, 17, 3]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('key, shape, line', [
    ('head.classification_head.module_list.0.bias', None, 'head.classification_head.module_list.0.bias is missing'),
    ('backbone.features.2.weight', (64, 64, 5, 5), 'base.conv1_2.weight'),
    ('backbone.scale_weight', (256,), 'rescale_factors')])
def test_other_weights_are_refused(theirs, key, shape, line):
    state_dict = theirs.state_dict()
    del state_dict[key]
    if shape is not None:
        state_dict[key] = torch.zeros(shape)
    with pytest.raises(UserError, match=f'^these are not .* ssd300_vgg16, .*: .*{line}.*$'):  # one line
        from_torchvision(state_dict)


def test_other_feature_maps_are_refused(theirs, monkeypatch):
    ours, priors = torchvision_weights.feature_maps, torchvision_weights.coco_default_boxes()
    monkeypatch.setitem(ours, 'conv4_3', ours['conv4_3']._replace(ratios=(1, 3, 1 / 3)))
    assert torch.equal(torchvision_weights.coco_default_boxes(), priors)  # as many: ignored
    monkeypatch.setitem(ours, 'conv7', ours['conv7']._replace(ratios=(1, 2, 1 / 2)))
    with pytest.raises(UserError, match='or feature_maps in utils.py were changed: unflatten'):
        from_torchvision(theirs.state_dict())


def test_voc_labels_have_their_names_in_coco():
    assert [label for label in voc_labels if coco_index(label) is None] == []
    assert len({coco_index(label) for label in voc_labels}) == 20
    assert coco_index('tvmonitor') == torchvision_weights.coco_categories.index('tv')
    assert coco_index('background') is coco_index('__background__') is coco_index('triceratops') is None


@pytest.mark.parametrize('thin', [1, 16])
def test_a_start_from_coco_keeps_the_scores_of_known_labels(theirs, monkeypatch, thin):
    monkeypatch.setattr('checkpoints.download_coco', theirs.state_dict)
    model, new_labels = start_from('coco', make_label_map(['triceratops', 'sofa', 'cat', 'couch']), thin)
    assert new_labels == ['triceratops'] and model.thin == thin
    coco = from_torchvision(theirs.state_dict())
    thin_out(coco, thin)
    assert torch.equal(model.priors_cxcy, coco_default_boxes())
    for (key, mine), other in zip(model.state_dict().items(), coco.state_dict().values(), strict=True):
        if '.cl_' not in key:
            assert torch.equal(mine, other), key
            continue
        mine, other = mine.unflatten(0, (-1, 5)), other.unflatten(0, (-1, 91))
        assert torch.equal(mine[:, [0, 2, 3, 4]], other[:, [0, *map(coco_index, ('sofa', 'cat', 'couch'))]])
        assert not mine[:, 1].any() if key.endswith('.bias') else mine[:, 1].std() > 0


def test_eval_measures_coco_weights_on_other_labels(theirs, voc_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision_weights, 'download_coco', theirs.state_dict)
    copy_lists(voc_folder, tmp_path)
    (tmp_path / 'label_map.json').write_text(json.dumps(make_label_map(['sofa', 'dog', 'tvmonitor'])))
    for name, value in (('data_folder', str(tmp_path)), ('checkpoint', None), ('workers', 0)):
        monkeypatch.setattr(eval_script, name, value)
    eval_script.main()
    assert re.search(r'^sofa +\d.*^dog +\d.*^tvmonitor +\d.*^mAP ', capsys.readouterr().out, re.M | re.S)


def test_with_the_file_in_place_no_network_is_touched(theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', Mock(side_effect=OSError('no network')))
    path = tmp_path / 'hub' / 'checkpoints' / os.path.basename(torchvision_weights.coco_weights.url)
    with pytest.raises(UserError, match=f'{path.name}.*{path.parent}'):
        coco_detector()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), path)
    model, label_map = coco_detector()
    assert len(label_map) == 81 and label_map['person'] == 1 and 'N/A' not in label_map
    monkeypatch.chdir(tmp_path)
    detect.load_once.cache_clear()
    capsys.readouterr()  # older versions of PyTorch say that a download begins
    assert detect.detect(draw_random_image(), 0.1, 0.45, 5).size == (300, 300)
    line = capsys.readouterr().err
    assert line.startswith('There is no checkpoint_ssd300.pth') and line.count('\n') == 1 and 'COCO' in line
    model, label_map = coco_detector(['sofa', 'dog'])
    assert label_map == {'background': 0, 'sofa': 1, 'dog': 2} and model.n_classes == 3
    with pytest.raises(UserError, match='triceratops'):
        coco_detector(['triceratops'])
