"""What every source of images gives: which images there are, with their labels, before any is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tocom.errors import TocomError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Items:
    """The images of one split, as files or as decoded arrays (exactly one of them).

    Attributes:
        labels: [n] int64. files: n paths. arrays: [n, 3, H, W] uint8 at the source's own size.
    """

    labels: np.ndarray
    files: tuple[Path, ...] | None = None
    arrays: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; only a mistake in the code gets here."""
        if (self.files is None) == (self.arrays is None):
            raise ValueError("Items hold either files or arrays")
        if len(self) != len(self.files if self.files is not None else self.arrays):
            raise ValueError("there must be one label for every image")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Items:
        """Return the images at ``indices`` [m], in that order."""
        files = None if self.files is None else tuple(self.files[i] for i in indices)
        return Items(self.labels[indices], files, None if self.arrays is None else self.arrays[indices])


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

    def __post_init__(self) -> None:
        """Raise TocomError if a split is empty or a label out of range."""
        for split, items in self.splits.items():
            if not len(items):
                raise TocomError(f"{self.source}: the {split} split is empty; check its folder or lists")
            if items.labels.min() < 0 or items.labels.max() >= self.classes:
                raise TocomError(
                    f"{self.source}: a label of the {split} split lies outside 0..{self.classes - 1}; check its lists"
                )


def with_validation(listing: Listing, n_val: int | float, seed: int = 0) -> Listing:
    """Return the listing with a validation split, drawn from the training images (class-balanced) if it has none.

    Args:
        n_val: number of images, or the share of the training images if below 1.

    Raises:
        TocomError: there are too few training images.
    """
    from sklearn.model_selection import train_test_split

    if "val" in listing.splits:
        return listing
    train = listing.splits["train"]
    wanted = round(n_val * len(train)) if n_val < 1 else int(n_val)
    if not 0 < wanted < len(train):
        raise TocomError(
            f"{listing.source} has {len(train)} training images, of which {wanted} cannot be kept to choose on;"
            " change data.val"
        )
    _, counts = np.unique(train.labels, return_counts=True)
    # Stratifying needs two of every class and room for each class in either part.
    balanced = counts.min() > 1 and min(wanted, len(train) - wanted) >= len(counts)
    rest, kept = train_test_split(
        np.arange(len(train)), test_size=wanted, stratify=train.labels if balanced else None, random_state=seed
    )
    splits = listing.splits | {"train": train.take(np.sort(rest)), "val": train.take(np.sort(kept))}
    return Listing(listing.classes, listing.group, listing.source, splits)
