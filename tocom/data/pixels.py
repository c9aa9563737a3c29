"""Images with a label for every pixel: read from a prepared task, cut to the input size and augmented as needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tocom.data.families.ade20k import read_labels
from tocom.data.images import open_image
from tocom.data.listing import SPLITS
from tocom.data.registry import read, unpack_paths
from tocom.data.scenes import IGNORED
from tocom.errors import TocomError
from tocom.seeds import derive_seed
from tocom.settings import SegmentSettings


@dataclass(frozen=True)
class Split:
    """Some images and their labels; ``split[i]`` is the view of one that is tested on.

    Attributes:
        images: [n, 3, S, S] uint8, or n paths. labels: [n, S, S] uint8 (255: ignored), or n paths in ADE20k's coding.
        size: side S that images are cut to. classes: number of classes.
    """

    images: np.ndarray | tuple[Path, ...]
    labels: np.ndarray | tuple[Path, ...]
    size: int
    classes: int

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, index: int):
        """Return an image and its labels as PIL images of the source's own size."""
        from PIL import Image

        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index].transpose(1, 2, 0)), Image.fromarray(self.labels[index])
        labels = read_labels(self.labels[index], self.classes)
        return open_image(self.images[index]), Image.fromarray(labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the view that is tested on: the shorter side scaled to S, the centre cut out.

        Returns:
            image [3, S, S] uint8 and labels [S, S] uint8.
        """
        image, labels = self.read(index)
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(scale * side)) for side in image.size)
        return _cut(image, labels, (width, height), (width - self.size) // 2, (height - self.size) // 2, self.size)


def random_view(
    split: Split, index: int, settings: SegmentSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a training view: scaled at random, cut out at random, perhaps flipped.

    The factor on the scale is drawn log-uniformly, 1 is the scale of testing. Where the image is smaller than the
    view, the rest is black and ignored.

    Returns:
        image [3, S, S] uint8 and labels [S, S] uint8.
    """
    image, labels = split.read(index)
    factor = np.exp(rng.uniform(np.log(settings.min_scale), np.log(settings.max_scale)))
    scale = factor * split.size / min(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    # Of an image that is smaller than the view, any place inside it; of a larger one, any part of it.
    left, top = (
        int(rng.integers(min(0, side - split.size), max(0, side - split.size) + 1)) for side in (width, height)
    )
    view = _cut(image, labels, (width, height), left, top, split.size)
    if rng.random() < settings.horizontal_flip:
        view = tuple(np.ascontiguousarray(part[..., ::-1]) for part in view)
    return view


def _cut(image, labels, size: tuple[int, int], left: int, top: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale PIL images to ``size`` (bicubic; labels: nearest) and cut out a square, padded where it sticks out."""
    from PIL import Image

    box = (left, top, left + side, top + side)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
        labels = labels.resize(size, Image.Resampling.NEAREST)
    canvas = Image.new("L", (side, side), IGNORED)
    canvas.paste(labels, (-left, -top))
    return np.array(image.crop(box)).transpose(2, 0, 1), np.array(canvas)  # copies: torch wants to own what it gets


class TrainViews:
    """Training views by (epoch, index), as :func:`tocom.data.loading.feed` asks for them.

    A view depends on (seed, epoch, index) alone, so the number of loading processes does not change it.
    """

    def __init__(self, split: Split, settings: SegmentSettings, seed: int):
        self.split, self.settings, self.seed = split, settings, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the view of an image in an epoch: uint8 [3, S, S] and labels int64 [S, S]."""
        epoch, index = key
        rng = np.random.default_rng(derive_seed(self.seed, "view", epoch, index))
        image, labels = random_view(self.split, index, self.settings, rng)
        return image, labels.astype(np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split)


@dataclass(frozen=True)
class SegmentationData:
    """A prepared task: its name, number of classes, side of its images and its splits."""

    name: str
    classes: int
    size: int
    splits: dict[str, Split]


def load(path: str | os.PathLike) -> SegmentationData:
    """Read what :func:`tocom.data.registry.prepare` wrote of a task to segment."""
    arrays, meta = read(path)
    if meta["task_kind"] != "segment":
        raise TocomError(f"{path} is a task to classify, not to segment; give another, such as scenes")

    def split(name: str) -> Split:
        images, labels = (arrays[f"{name}_{part}"] for part in ("images", "labels"))
        if images.ndim == 1:
            images, labels = unpack_paths(images), unpack_paths(labels)
        return Split(images, labels, meta["image_size"], meta["classes"])

    return SegmentationData(meta["task"], meta["classes"], meta["image_size"], {name: split(name) for name in SPLITS})
