"""Convert small COCO and YOLO data sets into Pascal VOC's format with GUIDE.md's lines, and list the result:

    pip install supervision globox
    python tests/long/converters.py

Each image and object must be listed, with its class, and its box within one pixel. This takes about 20 seconds.
"""
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from create_data_lists import create_data_lists

documents = sorted(Path(sys.path[0]).glob('*.md'))  # one has a block of Python lines for each converter
converters = 'supervision', 'globox'
readers = {'COCO': 'from_coco', 'YOLO': 'from_yolo'}  # the function of both converters that reads this format
classes = 'cat', 'dog', 'traffic light'
images = {  # name -> size, and objects: label, and (x_min, y_min, x_max, y_max), the first and last pixel, from 0
    'a.jpg': ((50, 40), []),
    'b.jpg': ((100, 80), [('cat', (0, 0, 99, 79)), ('dog', (10, 20, 29, 44))]),
    'c.large.jpg': ((333, 222), [('dog', (5, 7, 332, 221)), ('cat', (100, 101, 102, 105))]),
    'd.jpg': ((61, 97), [('traffic light', (30, 0, 59, 95))]),
}


def write_coco(folder):
    """Write annotations.json. Each object's segmentation has two parts, as of one behind a pole."""
    content = {'images': [], 'annotations': [],
               'categories': [{'id': 10 * (i + 1), 'name': label} for i, label in enumerate(classes)]}
    for image_id, (name, (size, objects)) in enumerate(images.items(), start=7):
        content['images'].append({'id': image_id, 'file_name': name, 'width': size[0], 'height': size[1]})
        for label, (x_min, y_min, x_max, y_max) in objects:
            width, height = x_max + 1 - x_min, y_max + 1 - y_min
            parts = [[left, y_min, left + 1, y_min, left + 1, y_max, left, y_max] for left in (x_min, x_max - 1)]
            content['annotations'].append({
                'id': len(content['annotations']) + 1, 'image_id': image_id, 'iscrowd': 0, 'segmentation': parts,
                'category_id': 10 * (classes.index(label) + 1), 'bbox': [x_min, y_min, width, height],
                'area': width * height})
    (folder / 'annotations.json').write_text(json.dumps(content))


def write_yolo(folder):
    """Write data.yaml, and a text file for each image into folder/labels."""
    (folder / 'data.yaml').write_text(f'train: images\nval: images\nnc: {len(classes)}\nnames: {list(classes)}\n')
    (folder / 'labels').mkdir()
    for name, ((width, height), objects) in images.items():
        with (folder / 'labels' / name).with_suffix('.txt').open('w') as file:
            for label, (x_min, y_min, x_max, y_max) in objects:
                x, y = (x_min + x_max + 1) / 2 / width, (y_min + y_max + 1) / 2 / height
                w, h = (x_max + 1 - x_min) / width, (y_max + 1 - y_min) / height
                file.write(f'{classes.index(label)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n')


def read_blocks():
    """:return: dict of converter -> its lines in the documents; they name both formats, and a reader keeps one"""
    texts = [text for path in documents for text in re.findall(r'```python\n(.*?)```', path.read_text('utf-8'), re.S)]
    blocks = {}
    for converter in converters:
        [blocks[converter]] = [text for text in texts if re.search(rf'^(import|from) {converter}\b', text, re.M)]
    return blocks


def listed(folder):
    """:return: dict of image name -> list of (label, box) of a folder in VOC's layout, training and test together"""
    with redirect_stdout(io.StringIO()):
        create_data_lists(str(folder / 'voc'), None, str(folder), labels=None, test_fraction=0.5, keep_empty=True)
    lists = {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json')}
    names = {index: label for label, index in lists['label_map'].items()}
    return {os.path.basename(path): [(names[i], box) for i, box in zip(objects['labels'], objects['boxes'])]
            for split in ('TRAIN', 'TEST')
            for path, objects in zip(lists[f'{split}_images'], lists[f'{split}_objects'])}


def largest_difference(found):
    """The largest difference between an edge in the lists and the true one, in pixels; infinite if the images, or the
    classes of an image's objects, are not the true ones."""
    largest = 0.
    for name in found.keys() | images.keys():
        true, objects = (sorted(each) for each in (images.get(name, (None, []))[1], found.get(name, [])))
        if name not in found or [label for label, _ in objects] != [label for label, _ in true]:
            return float('inf')
        for (_, box), (_, true_box) in zip(objects, true):
            largest = max(largest, *(abs(edge - true_edge) for edge, true_edge in zip(box, true_box)))
    return largest


def main():
    """Convert, list, compare, and print the results."""
    if not all(map(importlib.util.find_spec, converters)):
        sys.exit(f'Converters are missing: pip install {" ".join(converters)}')
    print(f'{"converter":22}{"images":>8}{"objects":>9}{"largest difference":>20}')
    print(f'{"true":22}{len(images):8}{sum(len(objects) for _, objects in images.values()):9}')
    all_right = True
    for converter, block in read_blocks().items():
        for kind, write in (('COCO', write_coco), ('YOLO', write_yolo)):
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / 'data'
                (data / 'images').mkdir(parents=True)
                for name, (size, _) in images.items():
                    Image.new('RGB', size, 'gray').save(data / 'images' / name)
                write(data)
                others = [reader for other, reader in readers.items() if other != kind]  # a reader of GUIDE keeps one
                lines = [line for line in block.splitlines() if not any(reader in line for reader in others)]
                subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=folder, check=True)
                found = listed(Path(folder))
            difference = largest_difference(found)
            all_right &= difference < 1.01  # YOLO's files have six decimals
            print(f'{converter + ", " + kind:22}{len(found):8}{sum(map(len, found.values())):9}'
                  f'{difference:14.2f} pixels')
    sys.exit(0 if all_right else 1)


if __name__ == '__main__':
    main()
