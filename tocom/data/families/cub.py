"""Caltech-UCSD Birds-200-2011 (C. Wah et al., Caltech technical report CNS-TR-2011-001): text files of ids."""

from __future__ import annotations

from pathlib import Path

from tocom.data.families.reading import items_of, malformed, read_table, reading
from tocom.data.listing import Listing


def _by_id(path: Path) -> dict[str, str]:
    return dict(read_table(path, 2))


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and test images, in the order of images.txt.

    Raises:
        TocomError: a list is missing or malformed, an id has no label or split, or an image is missing.
    """
    folder = folder / "CUB_200_2011"
    classes = read_table(folder / "classes.txt", 2)
    labels, is_train = _by_id(folder / "image_class_labels.txt"), _by_id(folder / "train_test_split.txt")
    lists = folder / "images.txt"
    images = read_table(lists, 2)
    without = [number for number, _ in images if number not in labels or is_train.get(number) not in ("0", "1")]
    if without:
        raise malformed(lists, f"has the image {without[0]}, which has no label or split")
    splits = {}
    for split, flag in (("train", "1"), ("test", "0")):
        chosen = [(number, path) for number, path in images if is_train[number] == flag]
        with reading(folder / "image_class_labels.txt"):
            numbers = [int(labels[number]) - 1 for number, _ in chosen]
        splits[split] = items_of([folder / "images" / path for _, path in chosen], numbers, lists)
    return Listing(len(classes), "FGVC", name, splits)
