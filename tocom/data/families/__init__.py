"""Readers of the downloaded data sets: a family is a module with ``listing(folder, name) -> Listing``.

A reader takes the folder that `tocom data fetch` has filled, in the layout of the original archives, and decodes no
image; it raises a TocomError where a list or an image is missing or not what it should be. To add a data set in a
known layout, add an entry to the catalogue; for another layout add a module here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tocom.data.catalogue import Catalogue, CatalogueOrPath, DataSet, find
from tocom.data.families import vtab
from tocom.data.families.reading import malformed
from tocom.data.listing import Listing
from tocom.data.store import folder_of
from tocom.errors import TocomError

#: Families that give images; the catalogue's "collection" holds the files of several tasks.
FAMILIES = ("ade20k", "cars", "cifar", "cub", "dogs", "flowers", "idx", "imagenet", "vtab")
#: Families whose files state labels, but not how many classes there are.
_OPEN_ENDED = ("ade20k", "idx", "vtab")


def why_no_task(family: str) -> str:
    """Say why a data set of a family that is none of :data:`FAMILIES` is no task."""
    if family == "collection":
        return "holds several tasks; name one, such as vtab.dtd"
    return f"is of an unknown family, {family!r}"


def load_listing(name: str, root: str | os.PathLike, catalogue: CatalogueOrPath = None) -> Listing:
    """Return the images of a downloaded data set; number of classes, group and title are the catalogue's.

    Args:
        name: a data set of the catalogue. root: the folder of all downloaded data sets.
        catalogue: as read, or its path; the usual one by default.
    """
    data_set = find(name, catalogue)
    if data_set.family not in FAMILIES:
        raise TocomError(f"{name} {why_no_task(data_set.family)}")
    return _read(name, data_set, folder_of(name, root, catalogue))


def _read(name: str, data_set: DataSet, folder: Path) -> Listing:
    listing = import_module(f"{__name__}.{data_set.family}").listing(folder, name)
    # A missing class would give its label to the next.
    if data_set.family not in _OPEN_ENDED and listing.classes != data_set.classes:
        raise malformed(folder, f"holds {listing.classes:,} classes, not the {data_set.classes:,} of {data_set.title}")
    return replace(listing, classes=data_set.classes, group=data_set.group, source=data_set.title)


def check_layout(name: str, folder: Path, catalogue: Catalogue) -> None:
    """Read a folder as the data set ``name``, so that no other folder passes for it."""
    data_set = catalogue[name]
    if data_set.family in FAMILIES:
        _read(name, data_set, folder)
    elif data_set.family == "collection":
        tasks = [task for task, entry in catalogue.items() if entry.same_files_as == name]
        if (folder / vtab.LISTS["train"]).is_file():
            raise TocomError(f"{folder} is that of one task; give the folder that it lies in")
        there = [task for task in tasks if (vtab.task_folder(folder, task) / vtab.LISTS["train"]).is_file()]
        if not there:
            raise TocomError(f"{folder} holds none of the tasks of {name}, such as dtd/{vtab.LISTS['train']}")
        for task in there:
            _read(task, catalogue[task], folder)
