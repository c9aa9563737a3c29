"""ImageNet-1k (ILSVRC 2012, arXiv 1409.0575): its usual folders, or the Hub's parquet files unpacked into them.

Three layouts are read: ``train/CLASS/*.JPEG`` with ``val/CLASS/*.JPEG``, where CLASS is a WordNet id; the same with a
flat ``val/*.JPEG`` and the development kit, ``ILSVRC2012_devkit_t12/data``; and what :func:`unpack_parquet` writes,
where CLASS is the label in four digits. Labels count up with the WordNet ids, as in every timm model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tocom.data.families.reading import by_class, class_names, malformed, read_mat, reading
from tocom.data.listing import Items, Listing
from tocom.errors import TocomError
from tocom.files import atomic, write_text

DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
#: Shards of the Hub's data set: split, number, count.
_SHARD = re.compile(r"(train|validation)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")
_FOLDERS = {"train": "train", "validation": "val"}
_NOTES = ".unpacked"
BATCH = 64


def listing(folder: Path, name: str) -> Listing:
    """Return the training images and, as the test split, the 50,000 of the official validation set.

    ImageNet's own test labels are not public, so a split to choose on has to be drawn from the training images.
    """
    classes = _classes(folder / "train")
    train = by_class(folder / "train", classes)
    val = folder / "val"
    with reading(val):
        has_folders = any(path.is_dir() for path in val.iterdir())
    test = by_class(val, classes) if has_folders else _flat(val, folder / DEVKIT, classes)
    return Listing(max(classes.values()) + 1, "ImageNet-1k", name, {"train": train, "test": test})


def _classes(folder: Path) -> dict[str, int]:
    """Return the label of each class folder: the number that it is called, or else its place in the alphabet."""
    names = class_names(folder)
    numbered = all(name.isdecimal() for name in names)
    return {name: int(name) if numbered else place for place, name in enumerate(names)}


def _flat(val: Path, devkit: Path, classes: dict[str, int]) -> Items:
    """Return the images of a flat folder with the labels of the development kit, in the order of their names."""
    files = sorted(path for path in val.iterdir() if path.suffix.upper() == ".JPEG")
    truth = devkit / "ILSVRC2012_validation_ground_truth.txt"
    if not truth.is_file():
        raise TocomError(
            f"{val} has no class folders, and {truth} is missing; unpack ILSVRC2012_devkit_t12.tar.gz beside val"
        )
    (synsets,) = read_mat(devkit / "meta.mat", "synsets")
    with reading(devkit / "meta.mat"):
        wnids = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    with reading(truth):
        labels = [classes[wnids[int(line)]] for line in truth.read_text(encoding="ascii").split()]
    if len(labels) != len(files):
        raise malformed(truth, f"has {len(labels)} lines for the {len(files)} images of {val}")
    return Items(np.array(labels, dtype=np.int64), files=tuple(files))


def unpack_parquet(folder: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Unpack the Hub's parquet files of ImageNet-1k into ``output/{train,val}/LABEL/*.JPEG``, byte for byte.

    The work is done in ``output.part``, a shard at a time; after an interruption the same call goes on where it was.

    Args:
        folder: holds ``train-*-of-*.parquet`` and ``validation-*-of-*.parquet``; those of the test split, which has
            no labels, are skipped.
        output: a folder that does not exist yet.

    Returns:
        The folder, complete.

    Raises:
        TocomError: a shard is missing or unreadable, has no images with labels, or the disk is full.
    """
    from tqdm import tqdm

    folder, output = Path(folder), Path(output)
    if output.exists():
        raise TocomError(f"{output} exists; remove it or choose another folder")
    partial = output.with_name(f"{output.name}.part")
    for shard in tqdm(_shards(folder), desc="unpack ImageNet-1k", unit="shard"):
        _unpack_shard(shard, partial)
    try:
        partial.replace(output)
    except OSError as error:
        raise TocomError(f"cannot rename {partial} to {output}: {error.strerror}; rename it yourself") from None
    return output


def _shards(folder: Path) -> list[Path]:
    """Return all shards, sorted; refuse a folder that lacks some."""
    with reading(folder):
        found = {path: _SHARD.fullmatch(path.name) for path in sorted(folder.iterdir())}
    shards = {path: match for path, match in found.items() if match}
    for split in _FOLDERS:
        matches = [match for match in shards.values() if match[1] == split]
        numbers, wanted = {int(match[2]) for match in matches}, {int(match[3]) for match in matches}
        if len(wanted) != 1 or numbers != set(range(*wanted)):
            total = str(*wanted) if len(wanted) == 1 else "all"
            raise TocomError(
                f"{folder} has {len(numbers)} of {total} {split}-*.parquet files; download what is missing from the Hub"
            )
    return list(shards)


def _unpack_shard(shard: Path, output: Path) -> None:
    """Write one shard's images, unless a note says that this was done."""
    note = output / _NOTES / f"{shard.name}.json"
    about = {"size": shard.stat().st_size}
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == about:
        return
    split = _FOLDERS[_SHARD.fullmatch(shard.name)[1]]
    for row, (content, label) in enumerate(_rows(shard)):
        # The names in the shards are no more than labels again; these are unique and sort in the shards' order.
        path = output / split / f"{label:04d}" / f"{shard.stem}-{row:06d}.JPEG"
        with atomic(path) as temporary:
            temporary.write_bytes(content)
    write_text(note, json.dumps(about))


def _rows(shard: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (file content, label) of every image of a shard, a few at a time."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with reading(shard, pa.ArrowException), ParquetFile(shard) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=["image", "label"]):
            for row in batch.to_pylist():
                content, label = row["image"]["bytes"], row["label"]
                if not content or label is None or label < 0:
                    raise ValueError(f"an image has no content or no label: {row['image'].get('path')}")
                yield content, label
