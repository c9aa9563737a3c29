"""What the readers share: files of lists and MATLAB structs, and errors that name the file and the fix.

Each raises a TocomError where a file is missing or not what it should be.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tocom.data.listing import Items
from tocom.errors import TocomError


def malformed(path: Path, reason: str) -> TocomError:
    """Return the error for a file that is not what it should be."""
    return TocomError(f"{path} {reason}; mend the folder or, if it was downloaded, run `tocom data fetch NAME --force`")


@contextlib.contextmanager
def reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while a file is parsed into one line.

    Args:
        errors: exceptions of the parser beside those that every parser may raise.
    """
    try:
        yield
    except TocomError:
        raise
    except FileNotFoundError:
        raise malformed(path, "is missing") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, AttributeError, *errors) as error:
        reason = " ".join(str(error).split())[:200]
        raise malformed(path, f"is not in its format ({type(error).__name__}: {reason})") from None


def read_table(path: Path, *columns: str):
    """Return a text file of columns set apart by single blanks as a pandas frame of texts."""
    import pandas as pd

    with reading(path):
        options = {"dtype": str, "na_filter": False, "index_col": False, "quoting": csv.QUOTE_NONE}
        table = pd.read_csv(path, sep=" ", names=columns, **options)
        if table.empty or (table == "").any(axis=None):
            raise ValueError(f"it is empty, or a line has fewer than {len(columns)} columns")
    return table


#: Most bytes of a file of lists, unpacked, and most cells and structs that hold others: scipy reads one inside another
#: by recursion in C, which thousands of them end.
_MAT_BYTES, _MAT_NESTED = 1 << 26, 1_000


def read_mat(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Return variables of a MATLAB 5 file, each as an array [n] (of numbers, of texts, or a struct array)."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    with reading(path, MatReadError, zlib.error, struct.error, NotImplementedError, MemoryError, NameError):
        content = loadmat(io.BytesIO(_unpacked(path)), squeeze_me=True, variable_names=list(names))
        return tuple(np.atleast_1d(content[name]) for name in names)


def _unpacked(path: Path) -> bytes:
    """Return a MATLAB 5 file with no part compressed, if it is no larger and no deeper than files of lists are."""
    with path.open("rb") as stream:
        header, packed = stream.read(128), stream.read(_MAT_BYTES + 1)
    order, parts, left, place = "<" if header[126:] == b"IM" else ">", [header], _MAT_BYTES, 0
    while place + 8 <= len(packed):
        kind, size = struct.unpack_from(f"{order}II", packed, place)
        small, compressed = kind >> 16, kind == 15
        part = packed[place : place + 8 + (0 if small else size + (0 if compressed else -size % 8))]
        place += len(part)
        if compressed:
            part = zlib.decompressobj().decompress(part[8:], left + 1)
        left -= len(part)
        parts.append(part)
        if left < 0:
            raise ValueError(f"it unpacks to more than {_MAT_BYTES:,} bytes")
    nested = (
        rb"(?=\x0e\0\0\0.{12}[\x01-\x03\x10-\x12])" if order == "<" else rb"(?=\0\0\0\x0e.{15}[\x01-\x03\x10-\x12])"
    )
    content = b"".join(parts)
    if sum(1 for _ in re.finditer(nested, content, re.DOTALL)) > _MAT_NESTED:
        raise ValueError(f"it holds more than {_MAT_NESTED:,} cells and structs")
    return content


def items_of(files: Sequence[Path], labels: Iterable, lists: Path, first: int = 0) -> Items:
    """Return images, which have to be there, and their labels.

    Args:
        lists: the file that names the images, for errors.
        first: the label from which classes count.
    """
    with reading(lists):
        labels = np.array([int(label) - first for label in labels], dtype=np.int64)
    if len(labels) != len(files):
        raise malformed(lists, f"has {len(labels)} labels for {len(files)} images")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise malformed(lists, f"names {len(missing)} images that are not there, such as {missing[0]}")
    return Items(labels, files=tuple(files))


def class_names(folder: Path) -> list[str]:
    """Return the names of the sub-folders, sorted; hidden ones are no classes."""
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise malformed(folder, "holds no class folders")
    return names


def by_class(folder: Path, classes: dict[str, int]) -> Items:
    """Return the images of a folder with a sub-folder for each class, sorted by class and name.

    Args:
        classes: the label of each sub-folder.
    """
    names = class_names(folder)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise malformed(folder, f"has the class {unknown[0]!r}, which the training images have not")
    files = []
    with reading(folder):
        for name in names:
            # A scan tells files from folders without asking for each, which takes minutes for ImageNet on a network.
            with os.scandir(folder / name) as entries:
                found = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
            files += [(folder / name / file, classes[name]) for file in found]
    if not files:
        raise malformed(folder, "holds no images")
    return Items(np.array([label for _, label in files], dtype=np.int64), files=tuple(path for path, _ in files))
