"""What the README shows runs as it stands there."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import onnxruntime
import pytest
import torch
from conftest import root
from torchvision.models.detection import ssd300_vgg16

from model import SSD300
from pretrained import coco_weights
from utils import make_label_map, save_checkpoint

with open(os.path.join(root, 'README.md'), encoding='utf-8') as file:
    readme = file.read()


def section(title):
    """A section's code: its Python blocks, and its commands."""
    text = readme.split(f'\n## {title}\n')[1].split('\n## ')[0]
    return re.findall(r'```python\n(.*?)```', text, re.S), re.findall(r'^    ((?:python|torchrun) .*)$', text, re.M)


def test_own_pictures_from_a_folder_to_a_detector(tmp_path, monkeypatch):
    blocks, commands = section('Your own pictures')
    for name in os.listdir(root):
        if name.endswith('.py'):
            shutil.copy(os.path.join(root, name), tmp_path)
    for block in blocks:
        name, *settings = block.splitlines()
        path = tmp_path / name.removeprefix('# ')
        text = path.read_text()
        for setting in [*settings, 'workers = 1']:
            setting = setting.replace('epochs = 30', 'epochs = 1')  # enough to see that it runs
            text, n = re.subn(rf'^{setting.split()[0]} = .*$', setting, text, flags=re.M)
            assert n == 1 or setting.startswith('workers'), setting
        path.write_text(text)

    hub = tmp_path / 'hub' / 'checkpoints'  # where torchvision looks before it downloads
    hub.mkdir(parents=True)
    torch.save(ssd300_vgg16(weights=None, weights_backbone=None).state_dict(), hub / os.path.basename(coco_weights.url))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert [shlex.split(command)[1] for command in commands[2:]] == ['create_data_lists.py', 'train.py', 'eval.py',
                                                                     'detect.py']
    for command in commands:
        _, *arguments = shlex.split(command.replace('300, 0)', '6, 0)'))
        result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        if arguments[0] == 'create_data_lists.py':
            assert re.search(r'pictures +5 +1\n', result.stdout)
        if arguments[0] == 'train.py':
            assert "lack ['circle', 'square', 'triangle']" in result.stdout
        if arguments[0] == 'eval.py':
            assert re.search(r'^mAP +\d+ +\d', result.stdout, re.M)
    assert len(os.listdir(tmp_path / 'detections')) == 6


def test_other_peoples_weights():
    (block,), _ = section("Other people's weights")
    names = {}
    exec(block, names)
    assert names['locs'].shape == (1, 8732, 4) and names['scores'].shape == (1, 8732, 4)


@pytest.mark.filterwarnings('ignore')
def test_exported_networks_compute_the_same(tmp_path, monkeypatch):
    (block,), _ = section('Deployment')
    (tmp_path / 'demo').mkdir()
    model = SSD300(n_classes=4).eval()
    save_checkpoint(str(tmp_path / 'demo' / 'checkpoint_ssd300.pth'), 0, model,
                    torch.optim.SGD(model.parameters(), lr=1), make_label_map(['a', 'b', 'c']), 0)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    session = onnxruntime.InferenceSession(tmp_path / 'ssd300.onnx')
    exported = torch.export.load(tmp_path / 'ssd300.pt2').module()
    for n in (1, 3):
        images = torch.randn(n, 3, 300, 300)
        with torch.no_grad():
            expected, again = model(images), exported(images)
        for plain, onnx, export in zip(expected, session.run(['locs', 'scores'], {'image': images.numpy()}), again):
            assert plain.abs().max() > 1
            assert (plain - torch.from_numpy(onnx)).abs().max() < 1e-4
            assert (plain - export).abs().max() < 1e-4
