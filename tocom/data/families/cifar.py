"""CIFAR-100: Python 2 pickles of arrays, read without running what a pickle can run.

https://www.cs.toronto.edu/~kriz/cifar.html (technical report by A. Krizhevsky, 2009). torchvision reads the same
files, but with an unrestricted unpickler.
"""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path

import numpy as np

from tocom.data.families.reading import malformed, reading
from tocom.data.listing import Items, Listing

#: All that a pickle of lists, dicts, texts, numbers and arrays is made of; and the most places that its memo may have,
#: for which Python makes room at once.
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}
_MEMO = 1_000_000


class _Array:
    """What stands for an array, and for the type of its numbers, until it is known to be one of bytes."""

    def __init__(self, *arguments: object):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def bytes(self) -> np.ndarray:
        """Return the array of bytes; raise ValueError or TypeError if it is none."""
        _, shape, kind, is_fortran, content = self.state
        if kind.arguments[0] not in ("u1", "|u1") or is_fortran:
            raise ValueError("it holds an array of other than bytes")
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # as NumPy 1 and Python 2 called it
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,  # an argument of the first
    ("numpy", "dtype"): _Array,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, texts and NumPy arrays of bytes; refuses every other object, so no code can run."""

    def find_class(self, module: str, name: str):
        """Return one of the few callables that an array needs."""
        try:
            return _NUMPY[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code") from None


def read_batch(path: Path, *keys: str) -> tuple:
    """Return entries of a pickled dict, which may hold data only."""
    with reading(path, pickle.UnpicklingError, ImportError, MemoryError, OverflowError), path.open("rb") as stream:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name not in _OPCODES or ("PUT" in opcode.name and int(argument) > _MEMO):
                raise pickle.UnpicklingError(f"{opcode.name} has no place in a pickle of arrays")
        stream.seek(0)
        batch = ArrayUnpickler(stream, encoding="latin1").load()
        return tuple(batch[key].bytes() if isinstance(batch[key], _Array) else _plain(batch[key]) for key in keys)


def _plain(values: list) -> list:
    """Return a list, if it is one of numbers or texts: one of lists may stand for more than there is memory."""
    if not isinstance(values, list) or not all(isinstance(value, int | str) for value in values):
        raise ValueError("it holds other than lists of numbers or texts")
    return values


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
