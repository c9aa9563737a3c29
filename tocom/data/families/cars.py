"""Stanford Cars (J. Krause et al., 3dRR 2013), in either of the two layouts that it was published in.

One folder: ``car_ims/*.jpg`` with ``cars_annos.mat``. Two folders: ``cars_train/*.jpg`` and ``cars_test/*.jpg`` with
``devkit/cars_train_annos.mat`` and ``cars_test_annos_withlabels.mat``, as torchvision reads them. The images and the
official split are the same ones, in another order.
"""

from __future__ import annotations

from pathlib import Path

from tocom.data.families.reading import items_of, read_mat, reading
from tocom.data.listing import Items, Listing

#: What marks the images of a split in the list of both.
FLAGS = {"train": 0, "test": 1}


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and test images, in the order of the annotations."""
    lists = folder / "cars_annos.mat"
    if lists.is_file():
        (classes,) = read_mat(lists, "class_names")
        splits = {split: _annotated(lists, folder, "relative_im_path", flag) for split, flag in FLAGS.items()}
    else:
        (classes,) = read_mat(folder / "devkit" / "cars_meta.mat", "class_names")
        splits = {
            "train": _annotated(folder / "devkit" / "cars_train_annos.mat", _images(folder, "train")),
            "test": _annotated(folder / "cars_test_annos_withlabels.mat", _images(folder, "test")),
        }
    return Listing(len(classes), "FGVC", name, splits)


def _images(folder: Path, split: str) -> Path:
    """Return the folder of a split's images; one public copy has it twice, one in the other."""
    folder = folder / f"cars_{split}"
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def _annotated(lists: Path, images: Path, field: str = "fname", flag: int | None = None) -> Items:
    """Return the annotated images of a list; those with a flag, if the list holds both splits."""
    (annotations,) = read_mat(lists, "annotations")
    with reading(lists):
        chosen = annotations if flag is None else annotations[annotations["test"].astype(int) == flag]
        files = [images / path for path in chosen[field]]
        labels = chosen["class"]
    return items_of(files, labels, lists, first=1)
