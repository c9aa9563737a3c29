"""CIFAR-100: Python 2 pickles of arrays, read without running what a pickle can run.

https://www.cs.toronto.edu/~kriz/cifar.html (technical report by A. Krizhevsky, 2009). torchvision reads the same
files, but with an unrestricted unpickler.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from tocom.data.families.reading import malformed, reading
from tocom.data.listing import Items, Listing

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # as NumPy 1 and Python 2 called it
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, texts and NumPy arrays; refuses every other object, so no code can run."""

    def find_class(self, module: str, name: str):
        """Return one of the few callables that an array needs."""
        try:
            return _NUMPY[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code") from None


def read_batch(path: Path, *keys: str) -> tuple:
    """Return entries of a pickled dict, which may hold data only."""
    with reading(path, pickle.UnpicklingError, ImportError, MemoryError, OverflowError), path.open("rb") as stream:
        batch = ArrayUnpickler(stream, encoding="latin1").load()
        return tuple(batch[key] for key in keys)


def listing(folder: Path, name: str) -> Listing:
    """Return CIFAR-100's train and test images, arrays [n, 3, 32, 32], with the fine labels."""
    folder = folder / "cifar-100-python"
    splits = {}
    for split in ("train", "test"):
        path = folder / split
        images, labels = read_batch(path, "data", "fine_labels")
        with reading(path):
            labels = np.array(labels, dtype=np.int64)
            if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
                raise malformed(path, f"holds images {images.dtype} {images.shape} for {len(labels)} labels")
            splits[split] = Items(labels, arrays=np.ascontiguousarray(images.reshape(-1, 3, 32, 32)))
    (names,) = read_batch(folder / "meta", "fine_label_names")
    return Listing(len(names), "CIFAR-100", name, splits)
