"""Texts that are on every machine where this project is installed: the source code of pinned dependencies, as bytes.

A corpus is the files of one suffix below a folder of a package, as the package's own record lists them. Files are
shared out to train, val and test by a hash of their names, and cut into sequences of equal length; what occurs twice
counts once. The hash of all its bytes goes into whatever is prepared from it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import PurePosixPath

import numpy as np

from tocom.data.listing import SPLITS
from tocom.errors import TocomError

#: Bytes of a sequence; tokens there are: the bytes, and one that begins a sequence.
CONTEXT, TOKENS = 256, 257
#: Up to which share of the hashes a file goes to which split.
_UP_TO = {"train": 0.7, "val": 0.8, "test": 1.0}


@dataclass(frozen=True)
class Corpus:
    """Text of one kind.

    Attributes:
        package: which has the files. folder: where they lie, from the folder that packages are installed in.
        suffix: of their names. what: for people. version, sha256: of the package and of all bytes, as
            requirements/run.txt pins them.
    """

    package: str
    folder: str
    suffix: str
    what: str
    version: str
    sha256: str


CORPORA = {
    "pandas": Corpus(
        "pandas",
        "pandas",
        ".py",
        "Python source of pandas",
        "3.1.1",
        "c639e54a016c71be47e2a4fd288928b528091d872f7808fc95dcc66a4ba6684a",
    ),
    "sympy": Corpus(
        "sympy",
        "sympy",
        ".py",
        "Python source of sympy",
        "1.14.0",
        "0abb391969e4e4059897913fa6aef2d663b9f847ef719519907789b816da5c35",
    ),
    "torch_headers": Corpus(
        "torch",
        "torch/include/torch/csrc/api",
        ".h",
        "C++ headers of torch",
        "2.15.0",
        "17a69157f26ef7f01cb7e2a3bb7772c11bc55d1a075e572c6028ec43527ac907",
    ),
}
#: What language models are pre-trained on.
PRETRAINING = "pandas"


@dataclass(frozen=True)
class Text:
    """What is there of a corpus.

    Attributes:
        files: name -> content, by name. version: of the package. sha256: of names and contents.
    """

    files: dict[str, bytes]
    version: str
    sha256: str


@cache
def read(name: str) -> Text:
    """Read a corpus from where its package is installed; tests of a package are left out.

    Raises:
        TocomError: the package is not installed, or its record lists no such files.
    """
    corpus = CORPORA[name]
    try:
        package = metadata.distribution(corpus.package)
    except metadata.PackageNotFoundError:
        raise TocomError(f"text {name!r} is source of {corpus.package}, which is not installed; install it") from None
    found = {path.as_posix(): path for path in package.files or ()}
    files, total = {}, hashlib.sha256()
    for place in sorted(found):
        path = PurePosixPath(place)
        if path.is_relative_to(corpus.folder) and path.suffix == corpus.suffix and "tests" not in path.parts:
            files[place] = found[place].locate().read_bytes()
            total.update(place.encode() + b"\0" + hashlib.sha256(files[place]).digest())
    if not files:
        raise TocomError(f"the record of {corpus.package} lists no {corpus.suffix} files below {corpus.folder}")
    return Text(files, package.version, total.hexdigest())


def described(name: str) -> str:
    """Return what a corpus is, with its version and hash; of another text than the pinned one it says so."""
    corpus, text = CORPORA[name], read(name)
    own = f"{corpus.what} {text.version}, {len(text.files)} files, SHA-256 {text.sha256}"
    if text.sha256 == corpus.sha256:
        return own
    return f"{own}; NOT the pinned text (version {corpus.version}, SHA-256 {corpus.sha256}): figures differ"


def split_of(place: str) -> str:
    """Return the split that a file belongs to, by its name alone."""
    share = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") / 2**64
    return next(split for split, end in _UP_TO.items() if share < end)


@cache
def sequences(name: str) -> dict[str, np.ndarray]:
    """Return the sequences of each split of a corpus [n, CONTEXT] uint8; the rest of a file's bytes is left out."""
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for place, content in read(name).files.items():
        whole = len(content) // CONTEXT * CONTEXT
        parts[split_of(place)].append(np.frombuffer(content[:whole], dtype=np.uint8).reshape(-1, CONTEXT))
    seen: set[bytes] = set()
    result = {}
    for split, arrays in parts.items():
        rows = np.concatenate(arrays)
        new = [row.tobytes() not in seen and not seen.add(row.tobytes()) for row in rows]
        result[split] = rows[new]
    return result


def draw(name: str, split: str, n: int) -> np.ndarray:
    """Return so many sequences [n, CONTEXT] of a split, drawn once and for all, in the order of the corpus.

    Raises:
        TocomError: the split has fewer.
    """
    rows = sequences(name)[split]
    if n > len(rows):
        raise TocomError(f"{CORPORA[name].what}: the {split} split has {len(rows)} sequences, not {n}; ask for fewer")
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:n])]


def pretraining(n: int, held_out: bool = False) -> np.ndarray:
    """Return sequences [n, CONTEXT] to pre-train on, or others of which none is ever trained on."""
    return draw(PRETRAINING, "test" if held_out else "train", n)
