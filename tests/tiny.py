"""A network for tests of what is around the network: it takes milliseconds where SSD300 takes seconds."""
import torch
import torch.nn.functional as F
from torch import nn

from model import SSD300


class TinyDetector(SSD300):
    """
    Predictions of SSD300's shapes, from nothing but the image's mean color; detection and checkpoints are SSD300's.

    :param n_classes: number of classes, background included
    :param pretrained: not supported
    :param thin: not supported
    """

    def __init__(self, n_classes, pretrained=False, thin=1):
        assert not pretrained and thin == 1
        nn.Module.__init__(self)
        self.n_classes = n_classes
        self.register_buffer('priors_cxcy', self.create_prior_boxes())  # (8732, 4)
        self.base = nn.ModuleDict({'conv1_1': nn.Conv2d(3, 64, 1)})  # which tells `load_detector` how thin a network is
        self.aux_convs = self.pred_convs = nn.ModuleDict()
        self.head = nn.Linear(3, 8732 * (4 + n_classes))

    def forward(self, image):
        """
        :param image: images, a tensor (N, 3, 300, 300)
        :return: locs (N, 8732, 4), classes_scores (N, 8732, n_classes)
        """
        color = F.adaptive_avg_pool2d(image, 1)  # (N, 3, 1, 1)
        color = self.base['conv1_1'](color)[:, :3].flatten(1)  # (N, 3)
        predictions = self.head(color).view(len(image), 8732, 4 + self.n_classes)
        return predictions[:, :, :4], predictions[:, :, 4:]


class SpoiledImages(torch.utils.data.Dataset):
    """
    A data set in which one image has a single color that no image has.

    :param dataset: PascalVOCDataset
    :param spoiled: the image's index
    :param value: of all its pixels: NaN, infinite, or so large that the loss becomes infinite
    """

    def __init__(self, dataset, spoiled, value):
        self.dataset, self.spoiled, self.value = dataset, spoiled, value
        self.images, self.label_map = dataset.images, dataset.label_map

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, *objects = self.dataset[i]
        return torch.full_like(image, self.value) if i[0] == self.spoiled else image, *objects
