"""VTAB-1k (arXiv 1910.04867) in the folder layout that the adapter-tuning community shares.

A task's folder holds ``images/`` and the lists train800.txt, val200.txt and test.txt, with a line ``path label`` for
each image. The layout is that of NOAH (arXiv 2206.04673) and of the methods that followed it.
"""

from __future__ import annotations

import warnings
from itertools import combinations
from pathlib import Path

from tocom.data.families.reading import items_of, malformed, read_table
from tocom.data.listing import Listing

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def task_folder(folder: Path, name: str) -> Path:
    """Return the folder with a task's lists: ``folder`` itself, or the task's own in a copy of the whole benchmark."""
    task = name.removeprefix("vtab.")
    places = (folder, folder / task, folder / "vtab-1k" / task)
    return next((place for place in places if (place / LISTS["train"]).is_file()), folder)


def listing(folder: Path, name: str) -> Listing:
    """Return a task's train (800), val (200) and test images, in the order of the lists.

    Warns:
        UserWarning: there are not 800 and 200 images to train and choose on.
    """
    whole, folder = folder, task_folder(folder, name)
    if not (folder / LISTS["train"]).is_file():
        raise malformed(whole, f"holds no {name.removeprefix('vtab.')}/{LISTS['train']}")
    tables = {split: read_table(folder / file, "path", "label") for split, file in LISTS.items()}
    for one, other in combinations(LISTS, 2):
        shared = {*tables[one].path} & {*tables[other].path}
        if shared:
            raise malformed(folder / LISTS[one], f"and {LISTS[other]} share images, such as {min(shared)}")
    sizes = [len(tables[split]) for split in ("train", "val")]
    if sizes != [800, 200]:
        warnings.warn(f"{name} has {sizes[0]} + {sizes[1]} images, not VTAB-1k's 800 + 200", stacklevel=2)
    splits = {
        split: items_of([folder / path for path in table.path], table.label, folder / LISTS[split])
        for split, table in tables.items()
    }
    classes = max(int(items.labels.max()) for items in splits.values()) + 1
    return Listing(classes, "VTAB-1k", name, splits)
