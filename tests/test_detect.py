"""Detection in images, and drawing."""
import os
import re
import sys
from unittest.mock import Mock

import matplotlib
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

import detect
import images
from checkpoints import save_checkpoint
from demo import shapes
from errors import UserError
from images import output_paths
from model import SSD300
from utils import make_color_map, make_label_map

label_map = make_label_map(shapes)
dejavu = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')  # no Chinese


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


@pytest.fixture
def run_detect(checkpoint, tmp_path, monkeypatch):
    """A function that runs detect.py, by default into tmp_path / 'out', with this checkpoint and these parameters."""
    def run(*paths, **parameters):
        for name, value in {'checkpoint': checkpoint, 'output_folder': str(tmp_path / 'out'), **parameters}.items():
            monkeypatch.setattr(detect, name, value)
        monkeypatch.setattr(sys, 'argv', ['detect.py', *map(str, paths)])
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
        detect.main()
        assert not torch.backends.cudnn.allow_tf32
    return run


def test_detect_files_and_folders(run_detect, tmp_path, capsys):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        Image.new('RGB', (200, 100), 'white').save(tmp_path / folder / 'x.png')
    Image.new('CMYK', (60, 90)).save(tmp_path / 'b' / 'y.tif')
    before = (tmp_path / 'a' / 'x.png').read_bytes()
    run_detect(tmp_path / 'a' / 'x.png', tmp_path / 'b')
    assert sorted(os.listdir(tmp_path / 'out')) == ['x-2.png', 'x.png', 'y.tif.png']
    assert Image.open(tmp_path / 'out' / 'x.png').size == (200, 100)
    assert (tmp_path / 'a' / 'x.png').read_bytes() == before
    assert re.search(r'square +0\.99  x 10-190, y 5-95', capsys.readouterr().out)


def test_detect_goes_on_after_a_file_that_it_cannot_read(run_detect, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.jpg').write_text('no image')
    Image.effect_noise((64, 64), 50).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:800])
    Image.new('L', (9, 7)).save(tmp_path / 'huge.png')
    monkeypatch.setattr(images, 'to_rgb', Mock(side_effect=[MemoryError, Image.new('RGB', (64, 64))]))
    names = ('text.jpg', 'cut.jpg', 'none.jpg', 'huge.png', 'whole.jpg')
    with pytest.raises(UserError, match='4 of 5'):
        run_detect(*(tmp_path / name for name in names))
    assert os.listdir(tmp_path / 'out') == ['whole.jpg']
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(name in line for name, line in zip(names, errors)) and 'memory' in errors[3]


@pytest.mark.parametrize('path, message', [
    ('empty', 'empty has no images'), ('none.jpg', 'none.jpg is missing'), ('full', r'c\.pth'), ('', '^min_score = ')])
def test_errors_that_end_it_at_once(run_detect, tmp_path, capsys, path, message):
    """One file or folder alone, for which the detector is not loaded; a damaged checkpoint, named once; a parameter."""
    for folder in 'empty', 'full':
        (tmp_path / folder).mkdir()
    for i in range(9):
        Image.new('RGB', (40, 30)).save(tmp_path / f'full/{i}.png')
    (tmp_path / 'c.pth').write_text('no checkpoint')
    with pytest.raises(UserError, match=message):
        run_detect(tmp_path / path, checkpoint=str(tmp_path / 'c.pth'), min_score=0.4 if path else (0, 4))
    assert capsys.readouterr() == ('', '') and not (tmp_path / 'out').exists()


def test_each_image_is_detected_and_saved_by_itself(run_detect, tmp_path, capsys):
    """Lines in the order of the images; each copy is what `detect` draws: of an animated file, in the first frame."""
    outputs = {'00.png': '00.png', '01.PNG': '01.PNG', '02.bmp': '02.bmp.png', '03.gif': '03.gif.png'}
    for name, size in zip(outputs, ((40, 71), (300, 200), (640, 33), (50, 70))):
        frames = [Image.effect_noise(size, 50).convert('RGB') for _ in range(2)]
        options = {} if name == '02.bmp' else {'save_all': True, 'append_images': frames[1:]}
        frames[0].save(tmp_path / name, **options)
    run_detect(tmp_path)
    assert re.findall(r'^(.*): 1 objects, drawn in (.*)$', capsys.readouterr().out, re.M) == [
        (str(tmp_path / name), str(tmp_path / 'out' / output)) for name, output in outputs.items()]
    for name, output in outputs.items():
        with Image.open(tmp_path / name) as image, Image.open(tmp_path / 'out' / output) as annotated:
            assert annotated.size == image.size and (annotated.format, getattr(annotated, 'n_frames', 1)) == ('PNG', 1)
            assert annotated.tobytes() == detect.detect(image, detect.min_score).tobytes()


def test_the_parameters_at_the_top(run_detect, tmp_path, monkeypatch, capsys):
    """The image, if none is given; how certain detections must be; how many; a window with each."""
    path, shown = tmp_path / 'x.png', []
    Image.new('RGB', (200, 100)).save(path)
    monkeypatch.setattr(Image.Image, 'show', lambda image: shown.append(image.tobytes()))
    for parameters, n in ({}, 1), ({'min_score': 0.995}, 0), ({'min_score': 0.4, 'top_k': 0}, 0):
        run_detect(img_path=str(path), **parameters)
        assert f'{path}: {n} objects' in capsys.readouterr().out and shown == []
    run_detect(show=True, top_k=200)
    assert shown == [Image.open(tmp_path / 'out' / 'x.png').tobytes()]


def test_a_jpeg_stays_one_and_loses_little(run_detect, tmp_path):
    image = Image.effect_noise((300, 200), 80).convert('RGB')
    for name in 'a.jpg', 'b.JPEG':
        image.save(tmp_path / name, quality=100)
    image.save(tmp_path / 'reference', 'JPEG', quality=95)
    run_detect(tmp_path)
    assert sorted(os.listdir(tmp_path / 'out')) == ['a.jpg', 'b.JPEG']
    for path in (tmp_path / 'out').iterdir():
        with Image.open(path) as annotated, Image.open(tmp_path / 'reference') as reference:
            assert annotated.format == 'JPEG' and annotated.quantization == reference.quantization


def test_no_copy_has_the_path_of_another_or_of_an_image(tmp_path):
    """Even if the file system does not tell A from a, and if adding ".png" gives the name of another file."""
    folder = str(tmp_path / 'Out')
    paths = [str(tmp_path / path) for path in ('p/A.png', 'q/a.PNG', 'q/a.tif', 'q/a.tif.png', 'out/B.jpg', 'q/b.jpg',
                                               'r/b.jpg')]
    assert [os.path.relpath(path, folder) for path in output_paths(paths, folder)] == [
        'A.png', 'a-2.PNG', 'a.tif.png', 'a.tif-2.png', 'B-2.jpg', 'b-3.jpg', 'b-4.jpg']
    (tmp_path / 'Out').symlink_to(tmp_path / 'p')
    assert [os.path.basename(path) for path in output_paths(paths[:1], folder)] == ['A-2.png']


def test_without_a_checkpoint_torchvisions(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(detect, 'load_detector', lambda path: (loaded.append(path) or torch.nn.Dropout(), label_map))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'is.pth').write_text('')
    detect.load_once.cache_clear()
    for changed, path in enumerate(['checkpoint_ssd300.pth', None, 'is.pth', 'checkpoint_ssd300.pth', 'is.pth']):
        os.utime('is.pth', (1, max(changed, 3)))
        model, found = detect.kept_detector(path)
        assert found is label_map and not model.training
    assert loaded == [None, None, 'is.pth', 'is.pth']  # what is missing only once, what has changed again
    assert capsys.readouterr().err.startswith("There is no checkpoint_ssd300.pth here: using torchvision's weights")
    detect.load_once.cache_clear()
    monkeypatch.undo()
    with pytest.raises(UserError, match='^no checkpoint at typo.pth: '):
        detect.kept_detector('typo.pth')


def test_boxes_are_in_pixels_of_each_image():
    """Whole ones, inside the image; wanted labels only, and no placeholder."""
    class Model:
        priors_cxcy = torch.zeros(1)

        def __call__(self, images):
            assert images.shape == (1, 3, 300, 300) and not torch.is_grad_enabled()
            return images, images

        def detect_objects(self, locs, scores, *settings):
            assert settings == (0.3, 0.6, 7)
            boxes = torch.tensor([[0.1, 0.25, 0.505, 0.9], [-0.2, 0.3, 1.3, 0.5], [0, 0, 1, 1], [0.2, 0.2, 0.4, 0.4]])
            return [boxes], [torch.tensor([1, 3, 0, 2])], [torch.tensor([0.875, 0.75, 0.625, 0.5])]

    def find(*size, **options):
        return detect.find_objects(Image.new('RGB', size), 0.3, 0.6, 7, Model(), label_map, **options)

    assert find(200, 100) == [('circle', 0.875, [20, 25, 101, 90]), ('triangle', 0.75, [0, 30, 200, 50]),
                              ('square', 0.5, [40, 20, 80, 40])]
    assert [box for _, _, box in find(31, 50)] == [[3, 12, 16, 45], [0, 15, 31, 25], [6, 10, 12, 20]]
    for suppress, left in ((['circle', 'square'], ['triangle']), ('circle', ['triangle', 'square'])):
        assert [label for label, _, _ in find(200, 100, suppress=suppress)] == left
    with pytest.raises(UserError, match=r"^suppress: \['Circle'\] are not among the labels.*: \['circle', .*\]$"):
        find(200, 100, suppress=['Circle'])


def test_the_best_is_drawn_on_top():
    colors = {label: ImageColor.getrgb(color) for label, color in make_color_map(label_map).items()}
    box = [50, 60, 250, 160]
    for first, second in ('circle', 'square'), ('square', 'circle'):
        image = detect.draw_objects(Image.new('RGB', (300, 200)), [(first, 0.9, box), (second, 0.4, box)], label_map)
        for corner in (50, 60), (249, 159), (51, 59):  # of the box, and in its label
            assert image.getpixel(corner) == colors[first]


@pytest.mark.parametrize('scale, width', [(1, 1), (3, 4)])
def test_where_boxes_and_labels_are_drawn(scale, width):
    """An outline inside the box, whose width goes with the image; its label above it, inside at the upper edge."""
    color = ImageColor.getrgb(make_color_map(label_map)['square'])
    image = Image.new('RGB', (300 * scale, 200 * scale))
    box = [50 * scale, 60 * scale, 250 * scale, 160 * scale]
    drawn = detect.draw_objects(image, [('square', 0.9, box)], label_map)
    outline = Image.new('RGB', image.size)
    outline.paste(color, box)
    outline.paste('black', (box[0] + width, box[1] + width, box[2] - width, box[3] - width))
    below = 0, box[1], *image.size
    assert drawn.crop(below).tobytes() == outline.crop(below).tobytes()
    left, top, right, bottom = drawn.crop((0, 0, image.width, box[1])).getbbox()
    assert (left, bottom) == (box[0], box[1])
    assert 8 * scale < bottom - top < 16 * scale and 40 * scale < right - left < 80 * scale
    assert image.getbbox() is None  # the image stays as it is

    point = detect.draw_objects(image, [('square', 0.9, [100 * scale] * 4)], label_map)
    assert point.getpixel((100 * scale, 100 * scale)) == color


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'])
def test_detect_takes_any_mode_and_leaves_the_image_alone(checkpoint, monkeypatch, mode):
    """Turned upright; 8 bits in red, green and blue."""
    monkeypatch.setattr(detect, 'checkpoint', checkpoint)
    image = Image.new(mode, (120, 80))
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    annotated = detect.detect(image, min_score=0.5, max_overlap=0.5, top_k=10)
    assert annotated.mode == 'RGB' and annotated.size == (80, 120) and annotated is not image
    assert image.mode == mode and image.tobytes() == before and image.getexif()[0x0112] == 6
    assert annotated.tobytes() != detect.detect(image, 0.5, suppress=['square']).tobytes()
    assert detect.detect(image, min_score=0.9999).tobytes() == detect.to_rgb(image).tobytes()


@pytest.mark.parametrize('size', [(30, 20), (300, 200), (4000, 3000)])
def test_labels_stay_inside_the_image(monkeypatch, size):
    """Boxes in the corners and beyond: each label is drawn whole, and scales with the image."""
    drawn, plain = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', lambda self, xy, text, **options: (
        drawn.append(self.textbbox(xy, text, options['font'])), plain(self, xy, text, **options)))
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


@pytest.mark.parametrize('labels, font, lacks', [
    (['cat', 'big dog_2'], None, None), (['кот', 'cat'], None, "Pillow's own font lacks 3 characters of the labels"),
    (['кот', 'قطة', 'naïve e\u0301', 'a\tb'], dejavu, None),
    (['汽车', 'кот'], dejavu, 'DejaVuSans.ttf lacks 2 characters of the labels, such as 汽: set font in a.py to a')])
def test_labels_in_any_script(capsys, labels, font, lacks):
    """One line says what the font lacks. In Pillow's own, two letters that it lacks look the same."""
    for _ in range(2):
        images.check_font('a.py', font, tuple(labels))
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.count('\n') == (lacks is not None) and (lacks or '') in printed.err
    drawn = [detect.draw_objects(Image.new('RGB', (300, 200)), [(label, 0.9, (50, 60, 250, 160))], {label: 1}, font)
             for label in ('ко', 'ок')]
    assert (drawn[0].tobytes() == drawn[1].tobytes()) == (font is None)


def test_the_font_of_detect(run_detect, tmp_path, capsys):
    Image.new('RGB', (200, 100)).save(tmp_path / 'x.png')
    copies = []
    for font, lacks in (None, False), (dejavu, False), (dejavu.replace('DejaVuSans', 'STIXSizOneSymReg'), True):
        run_detect(tmp_path / 'x.png', font=font)
        copies.append(Image.open(tmp_path / 'out' / 'x.png').tobytes())
        assert copies[-1] == detect.detect(Image.new('RGB', (200, 100)), 0.4, font=font).tobytes()
        assert ('font in detect.py' in capsys.readouterr().err) == lacks
    assert len(set(copies)) == 3
    (tmp_path / 'a.ttf').write_text('no font')
    for path in str(tmp_path / 'a.ttf'), 'none.ttf':
        with pytest.raises(UserError, match=f'^font = {path!r} is not a font that can be read'):
            run_detect(tmp_path / 'x.png', font=path)
