"""SSD300 (Liu et al., "SSD: Single Shot MultiBox Detector", 2016, arXiv 1512.02325) and its loss.

An image goes through three sets of convolutions. The base (elsewhere: the backbone) finds edges, textures and parts;
the auxiliary convolutions go on from there, on coarser and coarser maps; the prediction convolutions (elsewhere: the
heads) turn six of these maps into 8732 predictions, one for each prior: how the prior has to move and stretch to fit an
object, and a score for each class. `MultiBoxLoss` says how wrong they are; `SSD300.detect_objects` turns them into
detections. Each class names the section of README.md that explains it.

In comments on shapes, N is the number of images in the batch; numbers of channels are those of the whole network (a
thin one has fewer, see `thin_out`). For boxes and priors, see utils.py.
"""
import math
import os
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights

import utils
from distributed import all_reduce_mean, local_rank_0_first
from errors import UserError
from utils import cxcy_to_gcxgcy, cxcy_to_xy, decimate, feature_maps, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy


class VGGBase(nn.Module):
    """The backbone: VGG-16 up to its last convolution, and its fully connected layers fc6 and fc7 as convolutions. See
    "Base convolutions".

    :param pretrained: start from torchvision's ImageNet weights instead of random ones"""

    def __init__(self, pretrained=False):
        super().__init__()
        self.conv1_1 = nn.Conv2d(3, 64, kernel_size=3, padding=1)
        self.conv1_2 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.pool1 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv2_1 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.conv2_2 = nn.Conv2d(128, 128, kernel_size=3, padding=1)
        self.pool2 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv3_1 = nn.Conv2d(128, 256, kernel_size=3, padding=1)
        self.conv3_2 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.conv3_3 = nn.Conv2d(256, 256, kernel_size=3, padding=1)
        self.pool3 = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)  # 75 -> 38, not 37

        self.conv4_1 = nn.Conv2d(256, 512, kernel_size=3, padding=1)
        self.conv4_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv4_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.pool4 = nn.MaxPool2d(kernel_size=2, stride=2)

        self.conv5_1 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_2 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.conv5_3 = nn.Conv2d(512, 512, kernel_size=3, padding=1)
        self.pool5 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)  # keeps 19x19, which VGG-16's halves

        # fc6 and fc7. With its dilation, the 3x3 kernel that remains of fc6 covers 13x13 tiles.
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)

        if pretrained:
            self.load_pretrained_layers()
        else:
            # PyTorch's default initialization shrinks the signal from layer to layer, and this network has no
            # normalization to restore it. He initialization keeps its variance through convolution and ReLU.
            initialize(self, nn.init.kaiming_normal_)  # its default gain is that for ReLU

    def forward(self, image):
        """:param image: images, a tensor (N, 3, 300, 300), see `datasets.to_input`
        :return: conv4_3_feats (N, 512, 38, 38), conv7_feats (N, 1024, 19, 19)"""
        # relu_ works in place, to save memory. In the first three groups, the last is after the pool: the same result,
        # with a quarter of the work. (conv4_3's features are used before the pool; pool5 keeps the size.)
        out = self.conv1_1(image).relu_()  # (N, 64, 300, 300)
        out = self.conv1_2(out)  # (N, 64, 300, 300)
        out = self.pool1(out).relu_()  # (N, 64, 150, 150)

        out = self.conv2_1(out).relu_()  # (N, 128, 150, 150)
        out = self.conv2_2(out)  # (N, 128, 150, 150)
        out = self.pool2(out).relu_()  # (N, 128, 75, 75)

        out = self.conv3_1(out).relu_()  # (N, 256, 75, 75)
        out = self.conv3_2(out).relu_()  # (N, 256, 75, 75)
        out = self.conv3_3(out)  # (N, 256, 75, 75)
        out = self.pool3(out).relu_()  # (N, 256, 38, 38)

        out = self.conv4_1(out).relu_()  # (N, 512, 38, 38)
        out = self.conv4_2(out).relu_()  # (N, 512, 38, 38)
        conv4_3_feats = self.conv4_3(out).relu_()  # (N, 512, 38, 38)
        out = self.pool4(conv4_3_feats)  # (N, 512, 19, 19)

        out = self.conv5_1(out).relu_()  # (N, 512, 19, 19)
        out = self.conv5_2(out).relu_()  # (N, 512, 19, 19)
        out = self.conv5_3(out).relu_()  # (N, 512, 19, 19)
        out = self.pool5(out)  # (N, 512, 19, 19)

        out = self.conv6(out).relu_()  # (N, 1024, 19, 19)
        conv7_feats = self.conv7(out).relu_()  # (N, 1024, 19, 19)
        return conv4_3_feats, conv7_feats

    def load_pretrained_layers(self):
        """Load torchvision's VGG-16 weights, trained on ImageNet. Raises UserError if they can't be downloaded."""
        vgg = download_weights(VGG16_Weights.IMAGENET1K_V1, "set pretrained = None, optimizer_kind 'adamw' in train.py")

        # torchvision numbers its layers, ReLUs and pools included.
        indices = {'conv1_1': 0, 'conv1_2': 2, 'conv2_1': 5, 'conv2_2': 7, 'conv3_1': 10, 'conv3_2': 12, 'conv3_3': 14,
                   'conv4_1': 17, 'conv4_2': 19, 'conv4_3': 21, 'conv5_1': 24, 'conv5_2': 26, 'conv5_3': 28}
        state_dict = {f'{name}.{kind}': vgg[f'features.{index}.{kind}']
                      for name, index in indices.items() for kind in ('weight', 'bias')}
        # fc6 (4096, 512 * 7 * 7) -> conv6 (1024, 512, 3, 3); fc7 (4096, 4096) -> conv7 (1024, 1024, 1, 1)
        state_dict['conv6.weight'], state_dict['conv6.bias'] = fully_connected_to_convolution(
            vgg['classifier.0.weight'], vgg['classifier.0.bias'], 512, 7, m=(4, None, 3, 3))
        state_dict['conv7.weight'], state_dict['conv7.bias'] = fully_connected_to_convolution(
            vgg['classifier.3.weight'], vgg['classifier.3.bias'], 4096, 1, m=(4, 4, None, None))
        self.load_state_dict(state_dict)


def fully_connected_to_convolution(weight, bias, channels, size, m):
    """Turn a fully connected layer into the convolution that computes the same values, then decimate it. See "A fully
    connected layer is a convolution", and "Decimation, and a kernel with holes".

    :param weight: (n_outputs, channels * size * size), with bias (n_outputs)
    :param channels: channels of the layer's input before it was flattened, whose width and height are `size`
    :param m: keep every m-th of the filters, channels, rows and columns, a tuple of four; None keeps all
    :return: the convolution's weight (n_filters, n_channels, n_rows, n_columns) and bias (n_filters)"""
    return decimate(weight.view(-1, channels, size, size), m), decimate(bias, m[:1])


def download_weights(weights, remedy):
    """The state_dict of weights that torchvision publishes, which are downloaded unless an earlier download is there.
    Raises UserError if that fails, with `remedy`, what the user can do without them."""
    try:
        with local_rank_0_first():
            return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
        raise UserError(f'the download or reading of {weights.url} failed ({error}): put that file into {folder}, or '
                        f'{remedy}') from error


class AuxiliaryConvolutions(nn.Module):
    """Four pairs of convolutions. Each pair shrinks the map, for larger objects. See "Auxiliary convolutions"."""

    def __init__(self):
        super().__init__()
        self.conv8_1 = nn.Conv2d(1024, 256, kernel_size=1)
        self.conv8_2 = nn.Conv2d(256, 512, kernel_size=3, stride=2, padding=1)
        self.conv9_1 = nn.Conv2d(512, 128, kernel_size=1)
        self.conv9_2 = nn.Conv2d(128, 256, kernel_size=3, stride=2, padding=1)
        self.conv10_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv10_2 = nn.Conv2d(128, 256, kernel_size=3)  # without padding: 5 -> 3
        self.conv11_1 = nn.Conv2d(256, 128, kernel_size=1)
        self.conv11_2 = nn.Conv2d(128, 256, kernel_size=3)  # without padding: 3 -> 1
        initialize(self, nn.init.xavier_uniform_)  # as in the paper

    def forward(self, conv7_feats):
        """:param conv7_feats: (N, 1024, 19, 19)
        :return: conv8_2_feats (N, 512, 10, 10), conv9_2_feats (N, 256, 5, 5), conv10_2_feats (N, 256, 3, 3),
            conv11_2_feats (N, 256, 1, 1)"""
        out = self.conv8_1(conv7_feats).relu_()  # (N, 256, 19, 19)
        conv8_2_feats = self.conv8_2(out).relu_()  # (N, 512, 10, 10)
        out = self.conv9_1(conv8_2_feats).relu_()  # (N, 128, 10, 10)
        conv9_2_feats = self.conv9_2(out).relu_()  # (N, 256, 5, 5)
        out = self.conv10_1(conv9_2_feats).relu_()  # (N, 128, 5, 5)
        conv10_2_feats = self.conv10_2(out).relu_()  # (N, 256, 3, 3)
        out = self.conv11_1(conv10_2_feats).relu_()  # (N, 128, 3, 3)
        conv11_2_feats = self.conv11_2(out).relu_()  # (N, 256, 1, 1)
        return conv8_2_feats, conv9_2_feats, conv10_2_feats, conv11_2_feats


def initialize(module, method):
    """Set the weights of a module's convolutions by a method of `torch.nn.init`, and the biases to 0, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            method(layer.weight)
            nn.init.zeros_(layer.bias)


class PredictionConvolutions(nn.Module):
    """The heads: two convolutions over each of the six feature maps. One predicts offsets (loc_...), the other class
    scores (cl_...). For each of a tile's priors, the first has 4 output channels, and the second has n_classes. See
    "Prediction convolutions".

    :param n_classes: number of classes, background included"""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        for name, feature_map in feature_maps.items():
            n_priors = len(feature_map.ratios) + 1  # per tile; one more for the extra prior
            setattr(self, f'loc_{name}', nn.Conv2d(feature_map.channels, n_priors * 4, kernel_size=3, padding=1))
            setattr(self, f'cl_{name}', nn.Conv2d(feature_map.channels, n_priors * n_classes, kernel_size=3, padding=1))
        initialize(self, nn.init.xavier_uniform_)

    def forward(self, *feats):
        """:param feats: the six maps, in the order of `utils.feature_maps`: conv4_3's (N, 512, 38, 38), and so on
        :return: locs (N, 8732, 4), offsets from the priors; classes_scores (N, 8732, n_classes), logits"""
        locs, classes_scores = [], []
        for name, feat in zip(feature_maps, feats, strict=True):
            loc = getattr(self, f'loc_{name}')(feat)  # (N, n_priors * 4, size, size)
            cl = getattr(self, f'cl_{name}')(feat)  # (N, n_priors * n_classes, size, size)
            # `reshape` follows the order of the dimensions. Channels must come last, or tiles would get mixed up.
            loc = loc.permute(0, 2, 3, 1)  # (N, size, size, n_priors * 4)
            cl = cl.permute(0, 2, 3, 1)  # (N, size, size, n_priors * n_classes)
            locs.append(loc.reshape(loc.size(0), -1, 4))  # (N, size * size * n_priors, 4)
            classes_scores.append(cl.reshape(cl.size(0), -1, self.n_classes))  # (N, size * size * n_priors, n_classes)
        return torch.cat(locs, dim=1), torch.cat(classes_scores, dim=1)  # (N, 8732, 4), (N, 8732, n_classes)


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions, and the priors. See "Multibox".

    :param n_classes: number of classes, background included
    :param pretrained: start the base from torchvision's ImageNet weights instead of random ones
    :param thin: keep only every thin-th channel of each layer, for a network that a laptop can train: see `thin_out`
    :raises UserError: thin is not one of `possible_thin`, or the pretrained weights can't be downloaded"""

    def __init__(self, n_classes, pretrained=False, thin=1):
        super().__init__()
        self.n_classes = n_classes
        self.thin = thin

        self.base = VGGBase(pretrained)
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)

        # conv4_3's features differ in scale from those of the other maps. They are divided by their L2 norm, then
        # multiplied by learned factors, one for each channel, which start at 20 (Liu et al., "ParseNet", 2015).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.))

        # A buffer is not learned, but moves to the GPU and is saved with the weights, which fit only these priors.
        self.register_buffer('priors_cxcy', self.create_prior_boxes())  # (8732, 4)
        if thin != 1:
            thin_out(self, thin)
        # channels_last (NHWC): a pixel's channels are adjacent in memory, which is faster. The shapes stay the same.
        for part in (self.base, self.aux_convs, self.pred_convs):
            part.to(memory_format=torch.channels_last)

    def create_prior_boxes(self):
        """:return: the priors in fractional center-size coordinates, (8732, 4), see `utils.create_prior_boxes`"""
        return utils.create_prior_boxes()

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in nn.Module. Priors in the state_dict replace the network's own; a state_dict without priors, such as the
        earlier implementation's, leaves these as they are."""
        return super().load_state_dict({'priors_cxcy': self.priors_cxcy, **state_dict}, *args, **kwargs)

    def forward(self, image):
        """:param image: images, a tensor (N, 3, 300, 300), see `datasets.to_input`
        :return: locs (N, 8732, 4), offsets from the priors; classes_scores (N, 8732, n_classes), logits"""
        conv4_3_feats, conv7_feats = self.base(image)  # (N, 512, 38, 38), (N, 1024, 19, 19)
        aux_feats = self.aux_convs(conv7_feats)  # (N, 512, 10, 10), (N, 256, 5, 5), (N, 256, 3, 3), (N, 256, 1, 1)
        # Divide by the L2 norm over the channels, at each tile (`normalize` replaces a norm of 0 by a tiny number).
        conv4_3_feats = F.normalize(conv4_3_feats, dim=1) * self.rescale_factors  # (N, 512, 38, 38)
        return self.pred_convs(conv4_3_feats, conv7_feats, *aux_feats)  # (N, 8732, 4), (N, 8732, n_classes)

    @torch.no_grad()
    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap=0.45, top_k=200,
                       n_candidates=400):
        """Turn predictions into detections: decode the boxes, drop low scores, suppress boxes that overlap one of their
        class with a higher score, and keep the best of each image. See "Processing predictions".

        :param predicted_locs: offsets from the priors, (N, 8732, 4)
        :param predicted_scores: logits, (N, 8732, n_classes)
        :param min_score: keep only scores above this
        :param max_overlap: of two boxes of a class that overlap by more, the one with the lower score is suppressed
        :param top_k: keep at most this many detections of an image
        :param n_candidates: suppress among this many of the highest scores of each class, as in the authors' code
        :return: lists of N tensors, by decreasing score: boxes (n, 4) in fractional boundary coordinates, labels (n)
            long, scores (n). An image without detections has one placeholder: box [0, 0, 1, 1], label 0, score 0."""
        batch_boxes = cxcy_to_xy(gcxgcy_to_cxcy(predicted_locs.float(), self.priors_cxcy))  # (N, 8732, 4)
        batch_scores = predicted_scores.float().softmax(dim=2)[:, :, 1:]  # (N, 8732, n_classes - 1), no background
        finite = batch_boxes.isfinite().all(dim=2, keepdim=True)  # (N, 8732, 1); exp can overflow
        batch_scores = batch_scores.where(finite, 0).nan_to_num(0)  # the softmax of infinite logits is NaN
        # The highest scores of each class, and the indices of their priors: (N, n_candidates, n_classes - 1)
        batch_scores, batch_indices = batch_scores.topk(min(n_candidates, batch_scores.size(1)), dim=1)
        all_boxes, all_labels, all_scores = [], [], []
        for boxes, scores, indices in zip(batch_boxes, batch_scores, batch_indices):  # of an image
            ranks, classes = torch.where(scores > min_score)  # row and column of each candidate: (n), (n)
            boxes, labels = boxes[indices[ranks, classes]], classes + 1  # of the candidates: (n, 4), (n)
            scores = scores[ranks, classes]  # (n)
            kept = utils.non_maximum_suppression(boxes, scores, labels, max_overlap)[:top_k]  # (n_kept)
            boxes, labels, scores = boxes[kept], labels[kept], scores[kept]  # (n_kept, 4), (n_kept), (n_kept)
            if len(kept) == 0:  # the placeholder
                boxes, labels, scores = boxes.new_tensor([[0., 0., 1., 1.]]), labels.new_zeros(1), scores.new_zeros(1)
            all_boxes.append(boxes)
            all_labels.append(labels)
            all_scores.append(scores)
        return all_boxes, all_labels, all_scores


def match(boxes, labels, priors_cxcy, threshold=0.5):
    """Assign an object of an image, or background, to each prior (the paper's section 2.2). See "Matching".

    :param boxes: ground truth in fractional boundary coordinates, (n_objects, 4); with labels (n_objects)
    :param priors_cxcy: priors in center-size coordinates, (8732, 4)
    :param threshold: a prior that overlaps no object by at least this is background, unless it is an object's own prior
    :return: true_boxes (8732, 4), the box of each prior's object in fractional boundary coordinates, or for background
        the prior itself; true_classes (8732), the object's label, or 0
    :raises ValueError: there are more objects than priors"""
    priors_xy = cxcy_to_xy(priors_cxcy)  # (8732, 4)
    if len(boxes) == 0:
        return priors_xy, labels.new_zeros(len(priors_xy))
    if len(boxes) > len(priors_xy):
        raise ValueError(f'{len(boxes)} objects cannot each have one of {len(priors_xy)} priors')
    overlap = find_jaccard_overlap(boxes, priors_xy)  # (n_objects, 8732)

    # Each prior gets the object that it overlaps most.
    overlap_of_prior, object_of_prior = overlap.max(dim=0)  # (8732), (8732)

    # Then each object gets a prior of its own. The largest of all overlaps goes first, then the largest
    # between the other objects and the other priors, and so on.
    for _ in range(len(boxes)):
        largest = int(overlap.cpu().numpy().argmax())  # of equals, the first; torch's argmax is slower
        i, prior = divmod(largest, len(priors_xy))  # its row and its column
        object_of_prior[prior] = i
        overlap_of_prior[prior] = 1  # reaches any threshold
        overlap[i] = overlap[:, prior] = -1  # both are taken

    positive = overlap_of_prior >= threshold  # (8732)
    true_classes = labels[object_of_prior].where(positive, 0)  # (8732)
    true_boxes = boxes[object_of_prior].where(positive.unsqueeze(1), priors_xy)  # (8732, 4)
    return true_boxes, true_classes


class MultiBoxLoss(nn.Module):
    """The loss of a batch: how wrong the offsets of the positive priors are, which should find an object, and how wrong
    the class scores of these and of the hardest negative priors are (the paper's section 2.2, equations 1 to 3). See
    "Multibox loss". Several processes must compute it at the same time, because they exchange the number of positives.

    :param priors_cxcy: priors in center-size coordinates, (8732, 4)
    :param threshold: see `match`
    :param neg_pos_ratio: number of hard negatives for each positive
    :param alpha: weight of the localization loss
    :param min_negatives: minimum number of hard negatives in an image; with 0, images without objects teach nothing"""

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1., min_negatives=0):
        super().__init__()
        self.priors_cxcy = priors_cxcy.cpu()  # (8732, 4); matching runs on the CPU
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha
        self.min_negatives = min_negatives

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """The loss, the first of what `losses` returns for the same arguments."""
        return self.losses(predicted_locs, predicted_scores, boxes, labels)[0]

    def losses(self, predicted_locs, predicted_scores, boxes, labels):
        """:param predicted_locs: offsets from the priors, (N, 8732, 4)
        :param predicted_scores: logits, (N, 8732, n_classes)
        :param boxes: ground truth in fractional boundary coordinates, a list of N tensors (n_objects, 4), with labels,
            a list of N tensors (n_objects); or the two tensors that `match` makes of them
        :return: the loss, which is confidence loss + alpha * localization loss; the localization loss; the confidence
            loss. They are scalars, and 0 if there is no object in the batch, unless `min_negatives` is above 0."""
        if isinstance(boxes, (list, tuple)):
            boxes, labels = self.match(boxes, labels)
        device = predicted_locs.device
        true_boxes = boxes.to(device, non_blocking=True)  # (N, 8732, 4)
        true_classes = labels.to(device, non_blocking=True)  # (N, 8732)

        positive = true_classes > 0  # (N, 8732)
        n_positive = positive.sum(dim=1, keepdim=True)  # (N, 1)
        n_hard = (self.neg_pos_ratio * n_positive).clamp(min=self.min_negatives)  # (N, 1), hard negatives
        # Both losses are divided by the number of positives in the batch; with several processes, by the mean of these,
        # as gradients are averaged. Without any object the loss is 0, not 0/0.
        if self.min_negatives > 0:  # an image counts as if it had enough positives for them
            n_positive = n_positive.clamp(min=self.min_negatives / self.neg_pos_ratio)  # (N, 1)
        divisor = all_reduce_mean(n_positive.sum().float()).clamp(min=1e-6)

        # Localization: Smooth L1 over the four offsets of the positive priors (equation 2)
        priors_cxcy = self.priors_cxcy.to(device, non_blocking=True)  # (8732, 4)
        true_locs = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), priors_cxcy)  # (N, 8732, 4)
        loc_losses = F.smooth_l1_loss(predicted_locs.float(), true_locs, reduction='none').sum(dim=2)  # (N, 8732)
        loc_loss = loc_losses.where(positive, 0).sum() / divisor

        # Confidence: cross entropy (equation 3) over the positives, and over the hard negatives: in each image, the
        # negatives with the highest loss, `neg_pos_ratio` times as many as its positives
        conf_losses = F.cross_entropy(predicted_scores.float().flatten(0, 1), true_classes.flatten(),
                                      reduction='none').view_as(true_classes)  # (N, 8732)
        negative_losses = conf_losses.where(~positive, 0).sort(dim=1, descending=True).values  # (N, 8732)
        # Sorted, the hardest come first: take the ranks 0, 1, ... below n_hard
        hard_ranks = torch.arange(negative_losses.size(1), device=device) < n_hard  # (N, 8732)
        conf_loss = (conf_losses.where(positive, 0).sum() + negative_losses.where(hard_ranks, 0).sum()) / divisor
        return conf_loss + self.alpha * loc_loss, loc_loss, conf_loss

    def match(self, boxes, labels):
        """The function `match` for each of N images, on the CPU, where a data loader leaves boxes; its workers can call
        it, see `datasets.collate_fn`. Returns true_boxes (N, 8732, 4) and true_classes (N, 8732)."""
        matched = [match(image_boxes.cpu(), image_labels.cpu(), self.priors_cxcy, self.threshold)
                   for image_boxes, image_labels in zip(boxes, labels, strict=True)]
        true_boxes, true_classes = zip(*matched)
        return torch.stack(true_boxes), torch.stack(true_classes)  # (N, 8732, 4), (N, 8732)


possible_thin = 1, 2, 4, 8, 16, 32, 64  # the thinnest network keeps one of the 64 channels of conv1_1


def thin_out(model, thin):
    """Keep every thin-th channel of every layer, except for the image's colors and the predictions: a width multiplier
    of 1 / thin. With thin = 4 the network needs a fourteenth of the operations. See "A thin network".

    :param model: SSD300, whose layers are changed in place
    :param thin: one of `possible_thin`; another raises UserError"""
    if thin not in possible_thin:
        raise UserError(f'thin = {thin!r}: set it to one of {possible_thin}')
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            keeps_inputs = layer is model.base.conv1_1  # red, green and blue
            keeps_outputs = layer in model.pred_convs.children()
            m = (None if keeps_outputs else thin, None if keeps_inputs else thin, None, None)
            weight, bias = decimate(layer.weight.detach(), m), decimate(layer.bias.detach(), m[:1])
            # With thin = 4, a sum over a quarter of the inputs has a quarter of the variance, and over fifteen layers
            # the signal would vanish. So multiply the weights by the square root of the ratio of the numbers of inputs.
            # (conv4_3's features are normalized to one length: with thin = 4, its predictions become twice as large.)
            layer.weight = nn.Parameter(weight * math.sqrt(layer.in_channels / weight.size(1)))
            layer.bias = nn.Parameter(bias.clone())
            layer.out_channels, layer.in_channels = weight.shape[:2]
    model.rescale_factors = nn.Parameter(decimate(model.rescale_factors.detach(), (None, thin, None, None)).clone())


@torch.no_grad()
def standardize(model, images):
    """Prepare random weights for training. Layer after layer, random weights make the features of different images more
    alike. So scale and shift each layer but the predictions such that over some images each channel has mean 0 and
    standard deviation 1 before its ReLU (data-dependent initialization: Salimans and Kingma, "Weight normalization",
    2016). And scale the layers of the predictions by 0.1, so that these start near 0.

    :param model: SSD300 with random weights, which are changed in place
    :param images: some images, a tensor (N, 3, 300, 300)"""
    def shift_and_scale(layer, _, output):
        """Change a layer's weights and biases, and its output, which is the next layer's input."""
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=int(output[:, 0].numel() > 1))  # (n_channels) each
        std = std.where(std > 1e-3, 1)  # (n_channels); a channel that is constant, or has one value, is only shifted
        layer.weight /= std.view(-1, 1, 1, 1)
        layer.bias.sub_(mean).div_(std)
        return (output - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)  # (N, n_channels, height, width)

    layers = [*model.base.children(), *model.aux_convs.children()]
    hooks = [layer.register_forward_hook(shift_and_scale) for layer in layers if isinstance(layer, nn.Conv2d)]
    model(images)
    for hook in hooks:
        hook.remove()
    for layer in model.pred_convs.children():
        layer.weight *= 0.1
