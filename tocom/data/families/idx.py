"""Fashion-MNIST: grey images and labels in MNIST's IDX files, read by torchvision.

arXiv 1708.07747. A file may be compressed, as it is published, or not, as torchvision leaves it in its folder ``raw``.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tocom.data.families.reading import malformed, reading
from tocom.data.listing import Items, Listing

SPLITS = {"train": "train", "test": "t10k"}


def listing(folder: Path, name: str) -> Listing:
    """Return the train and test images, arrays [n, 3, H, W] of three equal channels, with their labels."""
    splits = {}
    for split, prefix in SPLITS.items():
        images, labels = (read_idx(folder / f"{prefix}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise malformed(folder, f"has {split} images {images.shape} for labels {labels.shape}")
        splits[split] = Items(labels.astype(np.int64), arrays=np.repeat(images[:, None], 3, axis=1))
    classes = max(int(items.labels.max(initial=0)) for items in splits.values()) + 1
    return Listing(classes, "real tasks", name, splits)


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes that an IDX file holds, as an array of its shape, uint8; with ``.gz`` if there is no other."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    packed = path.with_name(f"{path.name}.gz")
    path = path if path.is_file() else packed
    with reading(path, AssertionError, RuntimeError, zlib.error, OverflowError), TemporaryDirectory() as folder:
        plain = path
        if path == packed:
            plain = Path(folder) / path.stem
            with gzip.open(path) as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target)
        values = read_sn3_pascalvincent_tensor(str(plain))
        if values.element_size() > 1:
            raise ValueError("it holds no bytes")
        return values.numpy()
