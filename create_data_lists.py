"""
Index the pictures and objects of Pascal VOC 2007 and 2012, or of your own folder in the same layout:

    python create_data_lists.py

writes five JSON files, which train.py and eval.py read. Edit the parameters below first.
"""
import os

from torchvision.datasets import VOCDetection

from files import UserError, run
from utils import create_data_lists, voc_labels

voc07_path = 'VOCdevkit/VOC2007'  # folder with JPEGImages, Annotations and ImageSets; its splits trainval and test
voc12_path = 'VOCdevkit/VOC2012'  # another such folder, whose trainval is added; or None
output_folder = './'  # where the lists go
labels = voc_labels  # the classes to detect, without the background; or None for all that occur
test_fraction = 0.2  # share of the pictures that are for the test, in a folder without ImageSets
download = False  # fetch Pascal VOC first: 2.8 GB, into VOCdevkit in the current folder


def download_voc(root):
    """
    Fetch VOC 2007 trainval and test and VOC 2012 trainval into root/VOCdevkit/VOC2007 and VOC2012. Archives that lie in
    `root` with the right checksum are not fetched again.

    :param root: a folder
    :raises UserError: the download failed
    """
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(root, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'the download of VOC {year} {image_set} into {os.path.abspath(root)} failed: {error}. '
                            'Try again, or put the archive there yourself') from None


def main():
    """Download if asked, then write the lists."""
    if download:
        download_voc('.')
    create_data_lists(voc07_path, voc12_path, output_folder, labels, test_fraction)


if __name__ == '__main__':
    run(main)
