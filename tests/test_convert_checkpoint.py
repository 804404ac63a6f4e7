"""Checkpoints of the earlier implementation, converted to ours."""
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import root
from harmful import Malicious, Program

import convert_checkpoint
from checkpoints import load_checkpoint, load_detector
from convert_checkpoint import convert
from errors import UserError, run
from model import SSD300
from utils import make_label_map, voc_labels


def kept(version):
    """Path of the checkpoint that this version of PyTorch wrote: see earlier/write.py."""
    return os.path.join(root, 'tests', f'earlier_torch_{version}.pth')


@pytest.mark.parametrize('version, location', [('1.0.1', 'cpu'), ('1.4.0', 'cuda:0')])
def test_checkpoints_written_by_old_versions_of_pytorch(tmp_path, version, location):
    """They name the device once, for all tensors, and so are easily made a GPU's."""
    content = Path(kept(version)).read_bytes()
    assert len(content) < 100_000 and content.count(b'X\3\0\0\0cpu') == 1
    old, new = tmp_path / 'c.pth.tar', tmp_path / 'c.pth'
    old.write_bytes(content.replace(b'X\3\0\0\0cpu', b'X' + bytes([len(location), 0, 0, 0]) + location.encode()))
    assert convert(old, new) == 7
    saved = load_checkpoint(new)
    assert saved['epoch'] == 7 and saved['seed'] == 0 and saved['label_map'] == make_label_map(voc_labels)
    assert 'optimizer' not in saved and 'optimizer_kind' not in saved
    model, _ = load_detector(new)
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        assert (parameter == i).all(), name
    assert torch.equal(model.priors_cxcy, torch.arange(4.).expand(8732, 4))


@pytest.mark.parametrize('zipped', [False, True])
def test_checkpoints_of_the_earlier_implementation(tmp_path, zipped):
    """Written by the PyTorch of today: the new format is a zip archive, the old one is not."""
    torch.manual_seed(3)
    weights = SSD300(n_classes=21).state_dict()
    weights['priors_cxcy'] = torch.rand(8732, 4)
    torch.save(weights, tmp_path / 'weights.pth')
    # In a process of its own, because the earlier implementation's module has our module's name
    subprocess.run([sys.executable, os.path.join(root, 'tests', 'earlier', 'write.py'), 'zip.pth.tar', 'weights.pth',
                    'old.pth.tar'], cwd=tmp_path, check=True)
    convert(tmp_path / ('zip.pth.tar' if zipped else 'old.pth.tar'), tmp_path / 'c.pth')
    model, label_map = load_detector(tmp_path / 'c.pth')
    assert label_map == make_label_map(voc_labels) and set(model.state_dict()) == set(weights)
    assert all(torch.equal(values, weights[key]) for key, values in model.state_dict().items())
    with pytest.raises(UserError, match='zip.pth.tar is a checkpoint of the earlier implementation: convert it'):
        load_checkpoint(tmp_path / 'zip.pth.tar')


def change_earlier(path, old, new):
    """Write the checkpoint of PyTorch 1.0.1 with some bytes replaced."""
    content = Path(kept('1.0.1')).read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def refused(path):
    """The line that says why a file is refused; no new file is there."""
    new = f'{path}.new'
    with pytest.raises(UserError) as error:
        convert(path, new)
    assert not os.path.exists(new) and str(path) in str(error.value) and '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('old, new, line', [
    (b'cmodel\nVGGBase\n', b'cos\nsystem\n', 'it calls os.system, which could be harmful'),
    (b'ctorch.nn.backends.thnn\n_get_thnn_function_backend\n', b'cbuiltins\neval\n', 'it calls builtins.eval, which'),
    (b'\n\0\0\0pred_convs', b'\n\0\0\0else_convs', "damaged: 'pred_convs"),
    (b'priors_cxcy', b'priors_else', "damaged: 'StandIn' object"), (b'X\5\0\0\0epoch', b'X\5\0\0\0hcope', "'epoch'"),
    (b'conv5_3', b'conv5_9', 'damaged: Error(s) in loading state_dict for SSD300: Missing key(s)')])
def test_an_earlier_checkpoint_that_cannot_be_used_is_named(tmp_path, old, new, line):
    change_earlier(tmp_path / 'c.pth.tar', old, new)
    assert line in refused(tmp_path / 'c.pth.tar')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped, capfd):
    content = {'epoch': 0, 'model': Malicious(str(tmp_path / 'harm'))}
    torch.save(content, tmp_path / 'c.pth.tar', _use_new_zipfile_serialization=zipped)
    assert 'mkdir, which could be harmful' in refused(tmp_path / 'c.pth.tar')
    torch.jit.script(Program()).save(str(tmp_path / 'program.pth'))
    assert 'it is a TorchScript program' in refused(tmp_path / 'program.pth')
    assert not (tmp_path / 'harm').exists() and 'harm' not in capfd.readouterr().out


@pytest.mark.parametrize('name', [b'torch._utils\n_rebuild_tensor_v2', b'collections\nOrderedDict', b'model\nVGGBase'])
def test_a_file_cannot_change_what_it_names(tmp_path, monkeypatch, name):
    """PyTorch writes a file for a class with this attribute whose source has changed."""
    monkeypatch.chdir(tmp_path)
    change_attribute = b'N}X\14\0\0\0dump_patches\x88s\x86b'  # BUILD with (None, {'dump_patches': True})
    change_earlier(tmp_path / 'c.pth.tar', b'cmodel\nVGGBase\n', b'c' + name + b'\n' + change_attribute)
    refused(tmp_path / 'c.pth.tar')
    assert os.listdir(tmp_path) == ['c.pth.tar']


@pytest.mark.filterwarnings('ignore')
def test_a_damaged_index_takes_no_memory(tmp_path):
    path = tmp_path / 'c.pth.tar'
    change_earlier(path, b'r\0\1\0\0', b'r\0\1\0\4')  # pickle's index for an object: 256, or 2^26 more
    tracemalloc.start()
    convert_checkpoint.torch.load(path, 'cpu', convert_checkpoint.SafePickle, weights_only=False)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_damaged_files_are_named(tmp_path):
    content = Path(kept('1.4.0')).read_bytes()
    for other in (b'', b'text', b'PK\x03\x04 no zip'):
        (tmp_path / 'c.pth.tar').write_bytes(other)
        assert 'is no checkpoint of the earlier implementation, or is damaged' in refused(tmp_path / 'c.pth.tar')
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        position = int(torch.randint(len(content), (1,), generator=generator))
        damaged = bytearray(content[:position] if i % 4 == 0 else content)
        for place in torch.randint(len(damaged), (30,), generator=generator).tolist():
            damaged[place] ^= 1 << i % 8
        (tmp_path / 'c.pth.tar').write_bytes(damaged)
        try:
            convert(tmp_path / 'c.pth.tar', tmp_path / 'c.pth')
        except UserError as error:
            assert 'c.pth.tar' in str(error) and '\n' not in str(error)
        else:
            os.remove(tmp_path / 'c.pth')


def test_an_earlier_checkpoint_for_other_classes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint, 'label_map', {'background': 0, 'cat': 1, 'dog': 2})
    assert re.search('for 20 classes, .* does not say which: .* those for the 2 of VOC',
                     refused(shutil.copy(kept('1.0.1'), tmp_path)))


def test_no_file_is_overwritten(tmp_path):
    (tmp_path / 'new.pth').write_bytes(b'mine')
    with pytest.raises(UserError, match='new.pth exists: name another file'):
        convert(kept('1.0.1'), str(tmp_path / 'new.pth'))
    assert (tmp_path / 'new.pth').read_bytes() == b'mine' and os.listdir(tmp_path) == ['new.pth']


def test_wrong_arguments_end_in_a_line(monkeypatch):
    for arguments, line in (['a.pth'], 'usage: python convert_checkpoint.py OLD'), (['a', 'b'], "No such file .*: 'a'"):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *arguments])
        with pytest.raises(SystemExit, match=f'^Error: .*{line}'):
            run(convert_checkpoint.main)


def test_the_script_converts(tmp_path):
    result = subprocess.run([sys.executable, os.path.join(root, 'convert_checkpoint.py'), kept('1.4.0'), 'new.pth'],
                            cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.startswith('new.pth has the weights of epoch 7.') and result.stdout.count('\n') == 1
    assert result.stderr == '' and load_checkpoint(tmp_path / 'new.pth')['epoch'] == 7
    assert os.listdir(tmp_path) == ['new.pth']  # and no patch of PyTorch, for classes that have changed
