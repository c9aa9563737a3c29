"""ADE20k's scene-parsing data (ADEChallengeData2016), and own images with a label for every pixel in its layout.

``images/{training,validation}/*.jpg`` and ``annotations/{training,validation}/*.png`` with the same stems: 20,210 and
2,000 images. An annotation holds 1 to 150 for the classes and 0 for everything else (sceneparsing.csail.mit.edu).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tocom.data.images import opened
from tocom.data.listing import Items, Listing
from tocom.data.scenes import IGNORED
from tocom.errors import TocomError

#: Folder inside the archive.
NAME = "ADEChallengeData2016"
#: The split of the data set that each of ours is made from; the challenge keeps the labels of its own test images.
SOURCES = {"train": "training", "test": "validation"}


def listing(folder: str | os.PathLike, name: str, classes: int = 150, group: str = "segmentation") -> Listing:
    """Return the images and annotations of "train" and "test", by ascending name; none is decoded.

    Args:
        folder: ADEChallengeData2016, or the folder that holds it.
        classes: how many classes annotations may hold; they do not tell themselves.
    """
    root = Path(folder)
    root = root / NAME if (root / NAME).is_dir() else root
    splits = {split: _pairs(root, source) for split, source in SOURCES.items()}
    return Listing(classes, group, name, splits, "segment")


def _pairs(root: Path, source: str) -> Items:
    images, annotations = (_by_stem(root / part / source) for part in ("images", "annotations"))
    for stem in sorted(images.keys() ^ annotations.keys()):
        has, lacks = ("an image", "annotation") if stem in images else ("an annotation", "image")
        raise TocomError(f"{root}: {source}/{stem} has {has} but no {lacks}; add or remove one, or unpack it again")
    for stem, path in images.items():
        with opened(path) as image, opened(annotations[stem]) as annotation:
            if image.size != annotation.size:
                sizes = f"{image.size} pixels, its annotation {annotation.size}"
                raise TocomError(f"{path} has {sizes}; mend them, or unpack it again")
    return Items(tuple(annotations[stem] for stem in images), files=tuple(images.values()))


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise TocomError(
            f"no such folder: {folder}; give the folder that holds images/ and annotations/, or {NAME} with them in it"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise TocomError(f"{folder} is empty; put images in, or unpack the archive again")
    return {path.stem: path for path in files}


def read_labels(path: str | os.PathLike, classes: int) -> np.ndarray:
    """Read an annotation as labels [H, W] uint8: class k of 1..classes becomes k - 1, 0 becomes 255 (ignored)."""
    with opened(path) as image:
        values = np.asarray(image)
    if values.ndim != 2:
        raise TocomError(f"{path} has {values.shape[-1]} channels; an annotation has one, with class numbers")
    highest = values.max(initial=0)
    if highest > classes:
        raise TocomError(f"{path} holds the value {highest}, but there are {classes} classes; check the data set")
    return np.where(values == 0, IGNORED, values.astype(np.int64) - 1).astype(np.uint8)
