"""Fashion-MNIST: grey images and labels in MNIST's IDX files.

arXiv 1708.07747. A file may be compressed, as it is published, or not, as torchvision leaves it in its folder ``raw``.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from tocom.data.families.reading import malformed, reading
from tocom.data.listing import Items, Listing

SPLITS = {"train": "train", "test": "t10k"}
#: What IDX calls bytes; and the most that are read: MNIST's largest file holds 47 MB.
_UBYTE, _MOST = 8, 1 << 30


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
    packed = path.with_name(f"{path.name}.gz")
    path = path if path.is_file() else packed
    with reading(path, zlib.error, struct.error), (gzip.open if path == packed else open)(path, "rb") as stream:
        zero, kind, sides = struct.unpack(">HBB", stream.read(4))
        if zero or kind != _UBYTE:
            raise ValueError("it holds no bytes")
        shape = struct.unpack(f">{sides}I", stream.read(4 * sides))
        n = math.prod(shape)
        if n > _MOST:
            raise ValueError(f"it says that it holds {n:,} bytes")
        values = np.frombuffer(stream.read(n), dtype=np.uint8)
        if len(values) < n or stream.read(1):
            raise ValueError(f"it holds {'more' if len(values) == n else 'fewer'} than the {n:,} bytes that it says")
        return values.reshape(shape)
