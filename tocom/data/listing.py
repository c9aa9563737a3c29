"""What every source of images gives: which images there are, with their labels, before any is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tocom.errors import TocomError

SPLITS = ("train", "val", "test")
#: What is asked of an image: one label, or one for every pixel; of a text: what comes next, everywhere.
TaskKind = Literal["classify", "segment", "language"]


@dataclass(frozen=True)
class Items:
    """The images of one split, as files or as decoded arrays (exactly one of them).

    Attributes:
        labels: [n] int64, to classify; to segment: [n, H, W] uint8 with arrays, n paths of annotations with files; of
            texts, these themselves.
        files: n paths. arrays: [n, 3, H, W] uint8 at the source's own size; of texts, [n, T] uint8.
    """

    labels: np.ndarray | tuple[Path, ...]
    files: tuple[Path, ...] | None = None
    arrays: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; only a mistake in the code gets here."""
        if (self.files is None) == (self.arrays is None):
            raise ValueError("Items hold either files or arrays")
        if len(self) != len(self.images):
            raise ValueError("there must be one label for every image")

    @property
    def images(self) -> tuple[Path, ...] | np.ndarray:
        """The files or arrays, whichever there are."""
        return self.arrays if self.files is None else self.files

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Items:
        """Return the images at ``indices`` [m], in that order."""
        return Items(*(_take(part, indices) for part in (self.labels, self.files, self.arrays)))


def _take(values: Sequence | None, indices: np.ndarray) -> Sequence | None:
    if values is None or isinstance(values, np.ndarray):
        return values if values is None else values[indices]
    return tuple(values[i] for i in indices)


@dataclass(frozen=True)
class Listing:
    """A task as its source has it.

    Attributes:
        classes: number of classes. group: the group of tasks that tables average over ("FGVC", "real tasks").
        source: where it comes from, for tables and cards.
        splits: "train", "test" and, if the source has one, "val".
    """

    classes: int
    group: str
    source: str
    splits: dict[str, Items]
    kind: TaskKind = "classify"

    def __post_init__(self) -> None:
        """Raise TocomError if a split is empty or the label of an image out of range."""
        for split, items in self.splits.items():
            if not len(items):
                raise TocomError(f"{self.source}: the {split} split is empty; check its folder or lists")
            if self.kind == "classify" and (items.labels.min() < 0 or items.labels.max() >= self.classes):
                raise TocomError(
                    f"{self.source}: a label of the {split} split lies outside 0..{self.classes - 1}; check its lists"
                )


def with_validation(listing: Listing, n_val: int | float, seed: int = 0) -> Listing:
    """Return the listing with a validation split, drawn from the training images if it has none.

    It is class-balanced if there are classes of images; either part keeps the order of the source.

    Args:
        n_val: number of images, or the share of the training images if below 1.
    """
    if "val" in listing.splits:
        return listing
    train = listing.splits["train"]
    wanted = round(n_val * len(train)) if n_val < 1 else int(n_val)
    if not 0 < wanted < len(train):
        raise TocomError(
            f"{listing.source} has {len(train)} training images, of which {wanted} cannot be kept to choose on;"
            " change data.val"
        )
    if listing.kind == "segment":
        kept, rest = np.split(np.random.default_rng(seed).permutation(len(train)), [wanted])
    else:
        kept, rest = _balanced(train.labels, wanted, seed)
    parts = {"train": train.take(np.sort(rest)), "val": train.take(np.sort(kept))}
    return replace(listing, splits=listing.splits | parts)


def _balanced(labels: np.ndarray, wanted: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``wanted`` places; return them and the others."""
    from sklearn.model_selection import train_test_split

    _, counts = np.unique(labels, return_counts=True)
    # Stratifying needs two of every class and room for each class in either part.
    balanced = counts.min() > 1 and min(wanted, len(labels) - wanted) >= len(counts)
    rest, kept = train_test_split(
        np.arange(len(labels)), test_size=wanted, stratify=labels if balanced else None, random_state=seed
    )
    return kept, rest


def check_disjoint(name: str, listing: Listing) -> None:
    """Refuse a task with one image, byte for byte, among its test images and among those that a model is made with.

    The same image may go by several names, which would make a test one of memory.

    Raises:
        TocomError: there is such an image; the first is named.
    """
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        items = listing.splits[split]
        for index, image in enumerate(items.images):
            data = image.read_bytes() if isinstance(image, Path) else np.ascontiguousarray(image).tobytes()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            called = str(image) if isinstance(image, Path) else f"image {index} of {split}"
            if split == "test" and digest in seen:
                raise TocomError(
                    f"{name}: {called} is among the test images, and the same image among the others as {seen[digest]};"
                    " leave one of them out"
                )
            if split != "test":
                seen[digest] = called
