"""What a pickled model of the earlier implementation has: the names of its classes, and its layers."""
from torch import nn


class VGGBase(nn.Module):

    def __init__(self):
        super().__init__()
        channels = 3
        for block, n_layers, out_channels in (1, 2, 64), (2, 2, 128), (3, 3, 256), (4, 3, 512), (5, 3, 512):
            for i in range(n_layers):
                setattr(self, f'conv{block}_{i + 1}', nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))
                channels = out_channels
            setattr(self, f'pool{block}', nn.MaxPool2d(kernel_size=2, stride=2))
        self.conv6 = nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, kernel_size=1)


class AuxiliaryConvolutions(nn.Module):

    def __init__(self):
        super().__init__()
        for block, channels, between, out_channels in (8, 1024, 256, 512), (9, 512, 128, 256), (10, 256, 128, 256), \
                (11, 256, 128, 256):
            setattr(self, f'conv{block}_1', nn.Conv2d(channels, between, kernel_size=1))
            setattr(self, f'conv{block}_2', nn.Conv2d(between, out_channels, kernel_size=3))


class PredictionConvolutions(nn.Module):

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        for name, channels, n_priors in (('conv4_3', 512, 4), ('conv7', 1024, 6), ('conv8_2', 512, 6),
                                         ('conv9_2', 256, 6), ('conv10_2', 256, 4), ('conv11_2', 256, 4)):
            setattr(self, f'loc_{name}', nn.Conv2d(channels, n_priors * 4, kernel_size=3, padding=1))
            setattr(self, f'cl_{name}', nn.Conv2d(channels, n_priors * n_classes, kernel_size=3, padding=1))


class SSD300(nn.Module):

    def __init__(self, n_classes, rescale_factors, priors_cxcy):
        super().__init__()
        self.n_classes = n_classes
        self.base = VGGBase()
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)
        self.rescale_factors = nn.Parameter(rescale_factors)
        self.priors_cxcy = priors_cxcy  # a plain attribute
