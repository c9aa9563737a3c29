"""Stanford Cars (J. Krause et al., 3dRR 2013), in either of the two layouts that it was published in.

One folder: ``car_ims/*.jpg`` with ``cars_annos.mat``. Two folders: ``cars_train/*.jpg`` and ``cars_test/*.jpg`` with
``devkit/cars_train_annos.mat`` and ``cars_test_annos_withlabels.mat``, as torchvision reads them. The images and the
official split are the same ones, in another order.
"""

from __future__ import annotations

from pathlib import Path

from tocom.data.families.reading import items_of, read_mat, reading
from tocom.data.listing import Items, Listing


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and test images, in the order of the annotations.

    Raises:
        TocomError: an annotation file is missing or malformed, or an image is missing.
    """
    if (folder / "cars_annos.mat").is_file():
        return _one_folder(folder, name)
    (classes,) = read_mat(folder / "devkit" / "cars_meta.mat", "class_names")
    splits = {
        "train": _annotated(folder / "devkit" / "cars_train_annos.mat", _images(folder, "train")),
        "test": _annotated(folder / "cars_test_annos_withlabels.mat", _images(folder, "test")),
    }
    return Listing(len(classes), "FGVC", name, splits)


def _one_folder(folder: Path, name: str) -> Listing:
    lists = folder / "cars_annos.mat"
    annotations, classes = read_mat(lists, "annotations", "class_names")
    splits = {}
    for split, flag in (("train", 0), ("test", 1)):
        with reading(lists):
            chosen = annotations[annotations["test"].astype(int) == flag]
            files = [folder / path for path in chosen["relative_im_path"]]
            labels = [int(label) - 1 for label in chosen["class"]]
        splits[split] = items_of(files, labels, lists)
    return Listing(len(classes), "FGVC", name, splits)


def _images(folder: Path, split: str) -> Path:
    """Return the folder of a split's images; one public copy has it twice, one in the other."""
    folder = folder / f"cars_{split}"
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def _annotated(lists: Path, images: Path) -> Items:
    (annotations,) = read_mat(lists, "annotations")
    with reading(lists):
        files = [images / file for file in annotations["fname"]]
        labels = [int(label) - 1 for label in annotations["class"]]
    return items_of(files, labels, lists)
