"""VTAB-1k (arXiv 1910.04867) in the folder layout that the adapter-tuning community shares.

A task's folder holds ``images/`` and the lists train800.txt, val200.txt, train800val200.txt and test.txt, with a line
``path label`` for each image. The layout is that of NOAH (arXiv 2206.04673) and of the methods that followed it. There,
every list has a folder of its own (``images/train800/000000.jpg``), so the 1,000 images are stored twice.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from tocom.data.families.reading import items_of, malformed, reading
from tocom.data.listing import Items, Listing

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
UNION = "train800val200.txt"
SIZES = {"train": 800, "val": 200}


def task_folder(folder: Path, name: str) -> Path:
    """Return the folder with a task's lists: ``folder`` itself, or the task's own in a copy of the whole benchmark."""
    task = name.removeprefix("vtab.")
    places = (folder, folder / task, folder / "vtab-1k" / task)
    return next((place for place in places if (place / LISTS["train"]).is_file()), folder)


def listing(folder: Path, name: str) -> Listing:
    """Return a task's train (800), val (200) and test images, in the order of the lists.

    Warns:
        UserWarning: there are not 800 and 200 images to train and choose on, or the labels of the list of 1,000 are not
            those of the two.

    Raises:
        TocomError: a list or image is missing, the lists share an image, or the list of 1,000 is not their union.
    """
    whole, folder = folder, task_folder(folder, name)
    if not (folder / LISTS["train"]).is_file():
        task = name.removeprefix("vtab.")
        raise malformed(whole, f"holds no {task}/{LISTS['train']}")
    rows = {split: _rows(folder / file) for split, file in LISTS.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = {path for path, _ in rows[one]} & {path for path, _ in rows[other]}
        if shared:
            raise malformed(folder / LISTS[one], f"and {LISTS[other]} share images, such as {min(shared)}")
    _check_union(folder / UNION, rows["train"] + rows["val"], name)
    sizes = {split: len(rows[split]) for split in SIZES}
    if sizes != SIZES:
        warnings.warn(f"{name} has {sizes['train']} + {sizes['val']} images, not VTAB-1k's 800 + 200", stacklevel=2)
    splits = {split: _items(folder, LISTS[split], rows[split]) for split in LISTS}
    classes = max(int(items.labels.max()) for items in splits.values()) + 1
    return Listing(classes, "VTAB-1k", name, splits)


def _check_union(path: Path, both: list[tuple[str, int]], name: str) -> None:
    """Compare the list of 1,000 with the two others: by paths if it names their images, else by number and labels."""
    union = _rows(path)
    if {file for file, _ in union} & {file for file, _ in both}:
        same = sorted(union) == sorted(both)
    else:
        same = len(union) == len(both)
        if same and sorted(label for _, label in union) != sorted(label for _, label in both):
            warnings.warn(f"{name}: {path} has other labels than {LISTS['train']} and {LISTS['val']}", stacklevel=3)
    if not same:
        raise malformed(path, f"is not the union of {LISTS['train']} and {LISTS['val']}")


def _rows(path: Path) -> list[tuple[str, int]]:
    """Return (relative path, label) of every line; a path may hold blanks."""
    with reading(path):
        lines = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [(file, int(label)) for file, label in lines]
    if not rows:
        raise malformed(path, "is empty")
    return rows


def _items(folder: Path, lists: str, rows: list[tuple[str, int]]) -> Items:
    return items_of([folder / path for path, _ in rows], [label for _, label in rows], folder / lists)
