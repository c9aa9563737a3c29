"""Stanford Dogs (A. Khosla et al., FGVC workshop at CVPR 2011): a folder for each breed, MATLAB lists."""

from __future__ import annotations

from pathlib import Path

from tocom.data.families.reading import items_of, read_mat, reading
from tocom.data.listing import Listing


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and test images, in the order of the lists."""
    splits, classes = {}, 0
    for split in ("train", "test"):
        lists = folder / f"{split}_list.mat"
        files, labels = read_mat(lists, "file_list", "labels")
        with reading(lists):
            paths = [folder / "Images" / file for file in files]
        splits[split] = items_of(paths, labels, lists, first=1)
        classes = max(classes, int(splits[split].labels.max()) + 1)
    return Listing(classes, "FGVC", name, splits)
