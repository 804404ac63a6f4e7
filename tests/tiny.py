"""A network, images and a loss for tests of what is around them."""
import torch
import torch.nn.functional as F
from torch import nn

from model import SSD300, MultiBoxLoss


class TinyDetector(SSD300):
    """Predictions of SSD300's shapes, from nothing but the image's mean color, in milliseconds instead of seconds;
    detection and checkpoints are SSD300's. It can be neither pretrained nor thin."""

    def __init__(self, n_classes, pretrained=False, thin=1):
        assert not pretrained and thin == 1
        nn.Module.__init__(self)
        self.n_classes, self.thin = n_classes, thin
        self.register_buffer('priors_cxcy', self.create_prior_boxes())  # (8732, 4)
        self.base = nn.ModuleDict({'conv1_1': nn.Conv2d(3, 64, 1)})
        self.aux_convs = self.pred_convs = nn.ModuleDict()
        self.head = nn.Linear(3, 8732 * (4 + n_classes))

    def forward(self, image):
        """As SSD300's."""
        color = F.adaptive_avg_pool2d(image, 1)  # (N, 3, 1, 1)
        color = self.base['conv1_1'](color)[:, :3].flatten(1)  # (N, 3)
        predictions = self.head(color).view(len(image), 8732, 4 + self.n_classes)
        return predictions[:, :, :4], predictions[:, :, 4:]


class SpoiledImages(torch.utils.data.Dataset):
    """A PascalVOCDataset, but all pixels of the image with the index `spoiled` have a value that no image has: NaN,
    infinite, or so large that the loss becomes infinite."""

    def __init__(self, dataset, spoiled, value):
        self.dataset, self.spoiled, self.value = dataset, spoiled, value
        self.label_map = dataset.label_map

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, *objects = self.dataset[i]
        return torch.full_like(image, self.value) if i[0] == self.spoiled else image, *objects


class SpoiledLoss(MultiBoxLoss):
    """The loss, but in batch number `batches`, from 1, it or its gradient, as `what` says, is infinite."""

    def __init__(self, priors_cxcy, what, batches):
        super().__init__(priors_cxcy)
        self.what, self.batches = what, batches

    def losses(self, predicted_locs, *args):
        self.batches -= 1
        loss, *parts = super().losses(predicted_locs, *args)
        if self.batches == 0 and self.what == 'gradient':
            predicted_locs.register_hook(lambda gradient: gradient * float('inf'))
        return loss + float('inf') if self.batches == 0 and self.what == 'loss' else loss, *parts
