"""Caltech-UCSD Birds-200-2011 (C. Wah et al., Caltech technical report CNS-TR-2011-001): text files of ids."""

from __future__ import annotations

from pathlib import Path

from tocom.data.families.reading import items_of, malformed, read_table
from tocom.data.listing import Listing


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and test images, in the order of images.txt."""
    folder = folder / "CUB_200_2011"
    images = read_table(folder / "images.txt", "id", "path")
    for file, column in (("image_class_labels.txt", "label"), ("train_test_split.txt", "is_train")):
        images = images.merge(read_table(folder / file, "id", column), how="left", on="id")
    without = images[images.label.isna() | ~images.is_train.isin(["0", "1"])]
    if len(without):
        raise malformed(folder / "images.txt", f"has the image {without.id.iloc[0]}, which has no label or split")
    splits = {}
    for split, flag in (("train", "1"), ("test", "0")):
        chosen = images[images.is_train == flag]
        files = [folder / "images" / path for path in chosen.path]
        splits[split] = items_of(files, chosen.label, folder / "images.txt", first=1)
    return Listing(len(read_table(folder / "classes.txt", "id", "name")), "FGVC", name, splits)
