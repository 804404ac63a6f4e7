"""Detection in images, and drawing."""
import os
import re
import sys
import threading

import pytest
import torch
from PIL import Image

import detect
from checkpoints import save_checkpoint
from demo import shapes
from files import UserError
from model import SSD300
from utils import make_color_map, make_label_map


label_map = make_label_map(shapes)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint whose model finds a square at one place in every image, whatever it shows."""
    model = SSD300(len(label_map), thin=8)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.zeros_(layer.weight)
    for name, layer in model.pred_convs.named_children():
        if name.startswith('cl_'):
            layer.bias.data.view(-1, len(label_map))[:, 0] = 20
    model.pred_convs.cl_conv11_2.bias.data[label_map['square']] = 25  # the last map's first prior: the middle, 0.9 wide
    path = str(tmp_path_factory.mktemp('checkpoint') / 'c.pth')
    save_checkpoint(path, 0, model, torch.optim.SGD(model.parameters(), lr=1), label_map, seed=0)
    return path


def run_detect(monkeypatch, checkpoint, output_folder, *paths):
    for name, value in {'checkpoint': checkpoint, 'output_folder': str(output_folder)}.items():
        monkeypatch.setattr(detect, name, value)
    monkeypatch.setattr(sys, 'argv', ['detect.py', *map(str, paths)])
    detect.main()


def test_detect_files_and_folders(checkpoint, tmp_path, monkeypatch, capsys):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        Image.new('RGB', (200, 100), 'white').save(tmp_path / folder / 'x.png')
    Image.new('CMYK', (60, 90)).save(tmp_path / 'b' / 'y.tif')
    (tmp_path / 'b' / 'notes.txt').write_text('no image, and not asked for')
    before = (tmp_path / 'a' / 'x.png').read_bytes()
    run_detect(monkeypatch, checkpoint, tmp_path / 'out', tmp_path / 'a' / 'x.png', tmp_path / 'b')
    assert sorted(os.listdir(tmp_path / 'out')) == ['x-2.png', 'x.png', 'y.tif.png']
    assert Image.open(tmp_path / 'out' / 'x.png').size == (200, 100)
    assert (tmp_path / 'a' / 'x.png').read_bytes() == before
    assert re.search(r'square +0\.99  x 10-190, y 5-95', capsys.readouterr().out)

    # Into a folder with one of the images: not over it, from whatever folder an image of its name comes
    run_detect(monkeypatch, checkpoint, tmp_path / 'a', tmp_path / 'b' / 'x.png', tmp_path / 'a')
    assert (tmp_path / 'a' / 'x.png').read_bytes() == before
    assert sorted(os.listdir(tmp_path / 'a')) == ['x-2.png', 'x-3.png', 'x.png']


def test_detect_goes_on_after_a_file_that_is_no_image(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.jpg').write_text('no image')
    Image.effect_noise((64, 64), 50).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:800])
    with pytest.raises(UserError, match='3 of 4'):
        paths = (tmp_path / f'{name}.jpg' for name in ('text', 'cut', 'none', 'whole'))
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', *paths)
    assert os.listdir(tmp_path / 'out') == ['whole.jpg']
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(f'{n}.jpg' in line for n, line in zip(('text', 'cut', 'none'), errors))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty has no images'):
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', tmp_path / 'empty')


def test_of_many_images_each_keeps_its_own(checkpoint, tmp_path, monkeypatch, capsys):
    """In any order they may be ready in: lines in the order of the images, and what one image alone yields."""
    folder, sizes = tmp_path / 'in', [(40 + 31 * i % 300, 40 + 17 * i % 200) for i in range(30)]
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 50).convert('RGB').save(folder / f'{i:02}.png')
    (folder / '11.jpg').write_text('no image')
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    with pytest.raises(UserError, match='1 of 31 files'):
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', folder)
    printed = capsys.readouterr()
    assert re.findall(r'(\d\d).png: 1 objects, drawn in (.*)', printed.out) == [
        (f'{i:02}', str(tmp_path / 'out' / f'{i:02}.png')) for i in range(30)]
    assert printed.err.count('\n') == 1 and '11.jpg' in printed.err
    for i, size in enumerate(sizes):
        with Image.open(folder / f'{i:02}.png') as image, Image.open(tmp_path / 'out' / f'{i:02}.png') as annotated:
            assert annotated.size == size
            assert annotated.tobytes() == detect.detect(image, detect.min_score, 0.45, 200).tobytes()


def test_no_copy_has_the_name_of_another(checkpoint, tmp_path, monkeypatch):
    """The first one's copy gets ".png" added, which is then the second one's name."""
    folder, out = tmp_path / 'in', tmp_path / 'out'
    folder.mkdir()
    Image.new('RGB', (40, 30)).save(folder / 'y.tif')
    Image.new('RGB', (50, 60)).save(folder / 'y.tif.png')
    run_detect(monkeypatch, checkpoint, out, folder)
    assert {path.name: Image.open(path).size for path in out.iterdir()} == {'y.tif.png': (40, 30),
                                                                            'y.tif-2.png': (50, 60)}


def test_a_damaged_checkpoint_is_named_once(tmp_path, monkeypatch, capsys):
    (tmp_path / 'c.pth').write_text('no checkpoint')
    for i in range(9):
        Image.new('RGB', (40, 30)).save(tmp_path / f'{i}.png')
    with pytest.raises(UserError, match=r'c\.pth'):
        run_detect(monkeypatch, str(tmp_path / 'c.pth'), tmp_path / 'out', tmp_path)
    assert 'Error' not in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_an_error_while_saving_ends_it(checkpoint, tmp_path, monkeypatch):
    """A file is where the folder should be: the other images are not tried, and no thread stays."""
    for i in range(20):
        Image.new('RGB', (50, 50)).save(tmp_path / f'{i:02}.png')
    (tmp_path / 'out').write_text('a file')
    drawn, threads = [], threading.active_count()
    monkeypatch.setattr(detect, 'draw_objects', lambda image, *_: drawn.append(1) or image)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    with pytest.raises(FileExistsError):
        run_detect(monkeypatch, checkpoint, tmp_path / 'out', tmp_path)
    assert len(drawn) < 20 and threading.active_count() == threads


@pytest.mark.parametrize('suffix, options', [('gif', {'loop': 0}), ('webp', {}), ('png', {'loop': 3})])
def test_moving_images_come_back_moving(checkpoint, tmp_path, monkeypatch, suffix, options):
    frames, durations = [], [40, 100, 250, 70, 90]
    for i in range(5):
        frames.append(Image.new('RGB', (200, 100), 'white'))
        frames[-1].paste('blue', (60 + 20 * i, 40, 80 + 20 * i, 60))
    path = tmp_path / f'moving.{suffix}'
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
    monkeypatch.setattr(detect, 'batch_size', 2)
    run_detect(monkeypatch, checkpoint, tmp_path / 'out', path)
    with Image.open(path) as before, Image.open(tmp_path / 'out' / path.name) as after:
        assert after.n_frames == 5 and after.size == (200, 100) and before.info.get('loop') == after.info.get('loop')
        for i in range(5):
            after.seek(i)
            pixels = after.convert('RGB')
            assert after.info['duration'] == durations[i]
            red, green, blue = pixels.getpixel((70 + 20 * i, 50))
            assert blue > 150 and red < 100 and green < 100  # the image of this frame ...
            assert min(pixels.getpixel((10, 70))) < 200  # ... with the box's left edge


def test_more_frames_than_memory_holds_are_refused(tmp_path):
    frames = [Image.new('1', (6000, 6000), i % 2) for i in range(6)]  # of which RGB would take 650 MB
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match='a.gif is not .* 6 frames of 6000x6000 are too many'):
        detect.read_frames(str(tmp_path / 'a.gif'))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'])
def test_detect_takes_any_mode_and_leaves_the_image_alone(checkpoint, monkeypatch, mode):
    monkeypatch.setattr(detect, 'checkpoint', checkpoint)
    image = Image.new(mode, (120, 80))
    before = image.tobytes()
    annotated = detect.detect(image, min_score=0.5, max_overlap=0.5, top_k=10)
    assert annotated.mode == 'RGB' and annotated.size == (120, 80) and annotated is not image
    assert image.mode == mode and image.tobytes() == before
    assert annotated.tobytes() != detect.detect(image, 0.5, 0.5, 10, suppress=['square']).tobytes()
    unmarked = detect.detect(image, min_score=0.9999, max_overlap=0.5, top_k=10)
    assert unmarked.tobytes() == detect.to_rgb(image).tobytes()


def test_detect_honors_exif_orientation(checkpoint, monkeypatch):
    monkeypatch.setattr(detect, 'checkpoint', checkpoint)
    image = Image.new('RGB', (120, 80))
    image.getexif()[0x0112] = 6
    assert detect.detect(image, 0.5, 0.5, 10).size == (80, 120)
    assert image.size == (120, 80) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize('size', [(30, 20), (300, 200), (4000, 3000)])
def test_labels_stay_inside_the_image(monkeypatch, size):
    """Boxes in the corners and beyond: each label is drawn whole, and scales with the image."""
    drawn = []
    plain = detect.ImageDraw.ImageDraw.text
    monkeypatch.setattr(detect.ImageDraw.ImageDraw, 'text',
                        lambda self, xy, text, **options: (drawn.append(self.textbbox(xy, text, options['font'])),
                                                           plain(self, xy, text, **options)))
    w, h = size
    corners = [(0, 0, w // 4, h // 4), (w - w // 4, 0, w, h // 4), (0, h - h // 4, w // 4, h), (w - 2, h - 2, w, h),
               (0, 0, w, h)]
    detect.draw_objects(Image.new('RGB', size), [('square', 0.9, box) for box in corners], label_map)
    assert len(drawn) == 5
    for x_min, y_min, x_max, y_max in drawn:
        assert x_min >= 0 and y_min >= 0 and y_max <= h and (x_max <= w or w < 100)
        assert y_max - y_min >= min(h / 50, 5)


def test_text_is_readable_on_every_label_color():
    """The text is black or white, whichever differs more from the label's color."""
    many = make_label_map([f'class{i}' for i in range(80)])
    for label in list(many)[1:]:
        background = Image.new('RGB', (400, 300), make_color_map(many)[label])
        image = detect.draw_objects(background, [(label, 0.5, (0, 100, 300, 280))], many)
        band = image.crop((4, 80, 60, 98)).convert('L')
        assert band.getextrema()[1] - band.getextrema()[0] > 90
