"""The demo's pictures, and how it starts."""
import pytest
import torch

from demo import shapes, standardize
from model import SSD300
from utils import make_label_map


label_map = make_label_map(shapes)


@pytest.mark.parametrize('thin', [4, 16])
def test_standardized_layers_have_mean_0_and_spread_1(thin):
    model, images = SSD300(len(label_map), thin=thin), torch.randn(4, 3, 300, 300)
    images[:2] += 3
    model.aux_convs.conv8_1.weight.data[0] = 0  # a channel that never changes
    heads = [layer.weight.clone() for layer in model.pred_convs.children()]
    standardize(model, images)
    outputs, layers = {}, dict(model.named_modules())
    for name, layer in layers.items():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda *args, name=name: outputs.update({name: args[2].clone()}))  # before ReLU
    with torch.no_grad():
        model(images)
    assert len(outputs) == 15 + 8 + 12
    for name, output in outputs.items():
        if not name.startswith('pred_convs'):
            spread, mean = torch.std_mean(output, dim=(0, 2, 3))
            changing = torch.arange(len(mean)) >= (name == 'aux_convs.conv8_1')
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(spread[changing], torch.ones_like(spread[changing]), atol=0.02, rtol=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for before, layer in zip(heads, model.pred_convs.children()):
        torch.testing.assert_close(layer.weight, 0.1 * before)
