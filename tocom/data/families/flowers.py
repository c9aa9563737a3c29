"""Oxford 102 Flowers (M.-E. Nilsback and A. Zisserman, ICVGIP 2008): numbered images, MATLAB lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tocom.data.families.reading import items_of, read_mat, reading
from tocom.data.listing import Listing

#: The official splits. Some papers train on tstid, which is the largest; ToCom's is trained on trnid.
_SETS = {"train": "trnid", "val": "valid", "test": "tstid"}


def listing(folder: Path, name: str) -> Listing:
    """Return the official train and val (10 of each class) and test images, in the order of setid.mat."""
    (labels,) = read_mat(folder / "imagelabels.mat", "labels")
    lists = folder / "setid.mat"
    splits = {}
    for split, numbers in zip(_SETS, read_mat(lists, *_SETS.values()), strict=True):
        with reading(lists):
            numbers = numbers.astype(np.int64)
            if numbers.min() < 1:
                raise ValueError("images count from 1")
            chosen = labels[numbers - 1]
        files = [folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
        splits[split] = items_of(files, chosen, lists, first=1)
    return Listing(int(labels.max()), "FGVC", name, splits)
