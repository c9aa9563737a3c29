"""Images of the user, named in a config: folders, CSV files, a Hugging Face Hub data set, or a Python function.

Every reader gives a :class:`tocom.data.listing.Listing` and decodes nothing. docs/own_data.md has a worked page for
each. Imports neither torch nor datasets: configs are read with it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from tocom.data.families import ade20k
from tocom.data.listing import SPLITS, Items, Listing
from tocom.errors import TocomError, suggest
from tocom.files import atomic, read_rows, write_text
from tocom.settings import Positive, Settings, explain

Split = Literal["train", "val", "test"]

#: Source -> the options that belong to it; ``group`` belongs to all.
OPTIONS: dict[str, tuple[str, ...]] = {
    "folder": ("links",),
    "segment": ("classes", "links"),
    "csv": ("root", "image_column", "label_column", "classes"),
    "hub": ("subset", "revision", "splits", "image_column", "label_column", "classes"),
    "python": ("arguments", "classes"),
}
#: What data sets of the Hub call their validation split.
_VALIDATION = ("validation", "val", "valid", "dev")
#: Hidden files that do not start with a dot.
_HIDDEN = ("thumbs.db", "desktop.ini")


class OwnOptions(Settings):
    """Where images of the user come from: one of folder, segment, csv, hub and python, or none of them."""

    folder: str | None = Field(None, description="folder/{train,test[,val]}/CLASS/*, any format that Pillow reads")
    segment: str | None = Field(
        None, description="folder/{images,annotations}/{training,validation}/*: a label for every pixel"
    )
    csv: str | dict[Split, str] | None = Field(
        None, description="CSV with columns path, label, split; or {train: a.csv, test: b.csv[, val: c.csv]}"
    )
    hub: str | None = Field(None, description="data set of the Hugging Face Hub (user/name), or a folder with a copy")
    python: str | None = Field(None, description="package.module:function that returns images; see docs/own_data.md")
    links: Literal["refuse", "follow"] = Field(
        "refuse", description="folder, segment: links that lead out of the folder; those within it are followed"
    )
    root: str | None = Field(None, description="csv: folder that paths are relative to; null: that of the CSV")
    image_column: str | None = Field(None, description="csv: default path; hub: default the column of images")
    label_column: str | None = Field(None, description="csv: default label; hub: default the column of class labels")
    subset: str | None = Field(None, description="hub: which configuration, where a data set has several")
    revision: str | None = Field(None, description="hub: branch, tag or commit; pin a commit to make runs repeatable")
    splits: dict[Split, str] = Field({}, description="hub: {train: train, test: validation}, as it names them")
    arguments: dict[str, Any] = Field({}, description="python: keyword arguments of the function")
    classes: Positive | None = Field(
        None, description="number of classes; segment: needed; csv, hub, python: if some have no training image"
    )
    group: str = Field("real tasks", description="group of tasks that tables average it with")

    @property
    def kind(self) -> str | None:
        """The source that is given: folder, segment, csv, hub, python or None."""
        return next((name for name in OPTIONS if getattr(self, name) is not None), None)

    @model_validator(mode="after")
    def _one_source_and_its_options(self):
        given = [name for name in OPTIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; a task has one source")
        allowed = OPTIONS[given[0]] if given else ()
        for option in dict.fromkeys(name for names in OPTIONS.values() for name in names):
            changed = getattr(self, option) != OwnOptions.model_fields[option].default
            if changed and option not in allowed:
                owners = " or ".join(source for source, names in OPTIONS.items() if option in names)
                raise ValueError(f"{option} goes with {owners}" + (f", not with {given[0]}" if given else ""))
        for option in ("csv", "splits"):
            value = getattr(self, option)
            if isinstance(value, dict) and value and not {"train", "test"} <= value.keys():
                raise ValueError(f"{option} needs train and test: {option}: {{train: ..., test: ...}}")
        if self.segment is not None and not 2 <= (self.classes or 0) <= 255:
            raise ValueError("segment needs the number of classes, 2 to 255: classes: N")
        if self.python is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.python):
            raise ValueError(f"python = {self.python!r}: write package.module:function")
        return self


def read_own(name: str, source: OwnOptions | Mapping[str, Any], cache: Path) -> Listing:
    """List the images of a task of the user.

    Args:
        name: what the config calls the task; errors begin with it.
        source: a mapping of the options will do.
        cache: folder below which images of a Hub data set are kept as files.

    Raises:
        TocomError: something is missing, malformed or unreadable, or a class has test but no training images.
    """
    try:
        source = OwnOptions.model_validate(source)
    except ValidationError as error:
        raise explain(error, f"task {name!r}", {"": OwnOptions}) from None
    if source.kind is None:
        raise TocomError(f"task {name!r}: no source; give one of {', '.join(OPTIONS)}")
    readers: dict[str, Callable[[OwnOptions], Listing]] = {
        "folder": _read_folder,
        "segment": _read_segment,
        "csv": _read_csv,
        "hub": partial(_read_hub, cache=Path(cache)),
        "python": _read_python,
    }
    try:
        return readers[source.kind](source)
    except TocomError as error:
        raise TocomError(f"task {name!r}: {error}") from error
    except OSError as error:
        raise TocomError(f"task {name!r}: cannot read {error.filename}: {error.strerror}; check the path") from None


def _titled(source: OwnOptions) -> str:
    return f"folder {Path(source.folder or source.segment).name}"


# --- labels of images, for all sources of them ----------------------------------------------------------------------


def _listing(
    source: OwnOptions,
    where: str,
    images: Mapping[str, Sequence[Path] | np.ndarray],
    labels: Mapping[str, Sequence],
    classes: int | None = None,
) -> Listing:
    """Build the listing of splits of files or arrays and labels, which are class indices or names.

    Args:
        classes: number of classes as the source states it; the config's ``classes`` goes first.
    """
    for split in SPLITS:
        if split in labels and not len(labels[split]):
            raise TocomError(f"{where}: the {split} split is empty; check its folder or lists")
    indices, found = _encode(labels, where)
    stated = source.classes or classes
    trained = np.unique(indices["train"])
    absent = np.flatnonzero(trained != np.arange(len(trained)))
    if stated is None and found is None and len(absent):  # usually they count from 1
        odd = f"label {trained[0]} is negative" if trained[0] < 0 else f"no training image has label {absent[0]}"
        raise TocomError(f"{where}: {odd}; number classes from 0 without gaps, use names, or state `classes: N`")
    for split in indices if source.classes is None else ():
        for label in np.setdiff1d(indices[split], trained).tolist():
            raise TocomError(
                f"{where}: class {found[label] if found else label!r} is in {split} but not in train;"
                " add training images, remove it, or state `classes: N`"
            )
    splits = {}
    for split in (split for split in SPLITS if split in indices):
        kind = "arrays" if isinstance(images[split], np.ndarray) else "files"
        splits[split] = Items(indices[split], **{kind: images[split] if kind == "arrays" else tuple(images[split])})
    # Labels of one split may exceed those of train if the config's `classes` says so; Listing refuses the others.
    return Listing(stated or (len(found) if found else int(indices["train"].max()) + 1), source.group, where, splits)


def _encode(labels: Mapping[str, Sequence], where: str) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Turn whole numbers into themselves, and names into their place in sorted order.

    Returns:
        Labels [n] int64 by split, and the names (None if labels are numbers).
    """
    arrays = {split: np.asarray(values) for split, values in labels.items()}
    kinds = {split: array.dtype.kind if array.ndim == 1 else "?" for split, array in arrays.items()}
    are_numbers = set(kinds.values()) <= set("iu")
    mixed = [split for split, kind in kinds.items() if kind != "U" and not are_numbers]
    if mixed:
        raise TocomError(f"{where}: labels of the {mixed[0]} split are not all whole numbers or all names; mend them")
    known = [] if are_numbers else np.unique(np.concatenate(list(arrays.values()))).tolist()
    if not all(re.fullmatch(r"-?[0-9]+", label) for label in known):
        return {split: np.searchsorted(known, array).astype(np.int64) for split, array in arrays.items()}, known
    try:
        return {split: array.astype(np.int64) for split, array in arrays.items()}, None
    except (OverflowError, ValueError):  # Python reads no number of thousands of digits
        longest = max(known, key=len)
        raise TocomError(f"{where}: {longest[:18]}... is no label; number classes from 0, or use names") from None


def _check_files(files: Sequence[Path], where: str, hint: str) -> None:
    missing = [path for path in files if not _is_file(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TocomError(f"{where}: there is no file {str(missing[0])[:300]}{more}; {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long
        return False


def _check_links(files: Sequence[Path], folder: Path, links: str) -> None:
    """Refuse a file of a folder that is elsewhere, by a link of its own or of a folder on the way to it."""
    if links == "follow":
        return
    within = folder.resolve()
    for path in [*dict.fromkeys(file.parent for file in files), *(file for file in files if file.is_symlink())]:
        if not (real := path.resolve()).is_relative_to(within):
            raise TocomError(
                f"{path} leads out of {folder}, to {str(real)[:300]}; copy it there, or, if you trust the links in that"
                " folder, say `links: follow`"
            )


def _check_once(files: Mapping[str, Sequence[Path]], where: str) -> None:
    """Refuse a file that is there twice, by whatever path or link.

    In two splits, it would be tested on what it was trained on; twice in train, some of it might be drawn for val.
    """
    seen: dict[str, tuple[str, Path]] = {}
    for split, paths in files.items():
        for path in paths:
            real = os.path.realpath(path)
            if real in seen:
                earlier, alias = seen[real]
                places = f"in {split} twice" if earlier == split else f"in {earlier} and in {split}"
                also = "" if alias == path else f" (once as {alias})"
                raise TocomError(f"{where}: {path} is {places}{also}; keep one of the two")
            seen[real] = (split, path)


# --- folders --------------------------------------------------------------------------------------------------------


def _read_segment(source: OwnOptions) -> Listing:
    """List ``segment/{images,annotations}/{training,validation}/*``."""
    listing = ade20k.listing(source.segment, _titled(source), source.classes, source.group)
    of_pixels = [path for items in listing.splits.values() for path in (*items.files, *items.labels)]
    _check_links(of_pixels, Path(source.segment), source.links)
    _check_once({split: items.files for split, items in listing.splits.items()}, listing.source)
    return listing


def _read_folder(source: OwnOptions) -> Listing:
    """List ``folder/{train,test[,val]}/CLASS/*``; classes are the sorted names of the class folders."""
    folder = Path(source.folder)
    if not folder.is_dir():
        raise TocomError(f"there is no folder {folder}; check the path (it is relative to where you start)")
    present = [split for split in SPLITS if split != "val" or (folder / split).is_dir()]
    names = {split: [path.name for path in _visible(folder / split) if path.is_dir()] for split in present}
    if not names["train"]:
        raise TocomError(f"{folder / 'train'} has no class folders; put the images of each class in one of its own")
    for split in present:
        differing = sorted(set(names[split]) ^ set(names["train"]))
        if differing:
            raise TocomError(
                f"{folder}: {' and '.join(present)} must hold the same class folders (they may be empty outside train);"
                f" {differing[0]!r} is not in {'train' if differing[0] in names[split] else split}"
            )
    files = {split: [path for name in names[split] for path in _images(folder / split / name)] for split in present}
    labels = {split: [path.parent.name for path in files[split]] for split in present}
    _check_links([path for those in files.values() for path in those], folder, source.links)
    _check_once(files, _titled(source))
    empty = sorted(set(names["train"]) - set(labels["train"]))
    if empty:
        raise TocomError(f"{folder / 'train' / empty[0]} holds no images; put some in, or remove the class")
    classes = {name: index for index, name in enumerate(names["train"])}
    # By place, not through _encode: folders called "1", "2" are names.
    numbers = {split: np.array([classes[name] for name in labels[split]], dtype=np.int64) for split in present}
    return _listing(source, _titled(source), files, numbers, len(classes))


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, less hidden files, sorted by name."""
    if not folder.is_dir():
        raise TocomError(
            f"{folder.parent} has no sub-folder {folder.name!r}; make train and test (val if you like),"
            " each with a folder a class"
        )
    entries = (path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _HIDDEN)
    return sorted(entries, key=lambda path: path.name)


def _images(folder: Path) -> list[Path]:
    files = _visible(folder)
    for path in files:
        if path.is_dir():
            raise TocomError(f"{path} is a folder inside a class folder; put its images into {folder}")
    _check_files(files, str(folder), "a link that leads nowhere, a pipe and a device are none: remove it")
    return files


# --- CSV ------------------------------------------------------------------------------------------------------------


def _read_csv(source: OwnOptions) -> Listing:
    """List images by CSV: one with a split column, or one for each split."""
    image, label = source.image_column or "path", source.label_column or "label"
    if isinstance(source.csv, str):
        where, table = f"CSV {Path(source.csv).name}", _read_table(Path(source.csv), (image, label, "split"))
        unknown = sorted(set(table["split"]) - set(SPLITS))
        if unknown:
            raise TocomError(f"{where}: split {unknown[0]!r}{suggest(unknown[0], SPLITS)}; use {', '.join(SPLITS)}")
        tables = {split: table[table["split"] == split] for split in SPLITS if split in set(table["split"])}
        for split in ("train", "test"):
            if split not in tables:
                raise TocomError(f"{where} has no rows of the {split} split; it needs train and test")
        lists = dict.fromkeys(tables, Path(source.csv))
    else:
        lists = {split: Path(source.csv[split]) for split in SPLITS if split in source.csv}
        where = "CSV " + ", ".join(path.name for path in lists.values())
        tables = {split: _read_table(path, (image, label)) for split, path in lists.items()}
    roots = {split: Path(source.root) if source.root else path.parent for split, path in lists.items()}
    files = {split: [roots[split] / path for path in table[image]] for split, table in tables.items()}
    for split, paths in files.items():
        _check_files(paths, where, f"paths are relative to {roots[split]}, which `root:` changes")
    _check_once(files, where)
    labels = {split: np.array(table[label].tolist(), dtype=str) for split, table in tables.items()}
    return _listing(source, where, files, labels)


def _read_table(path: Path, columns: tuple[str, ...]):
    """Read columns of a CSV as text without blanks at the ends; every field must be filled in."""
    if not path.is_file():
        raise TocomError(f"there is no CSV {path}; check the path (it is relative to where you start)")
    table = read_rows(path, dtype=str, na_filter=False, index_col=False)
    table.columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in table.columns:
            fix = (
                "give a CSV for each split: csv: {train: train.csv, test: test.csv}"
                if name == "split"
                else "name yours with `image_column:` and `label_column:`"
            )
            raise TocomError(f"{path} has no column {name!r} but {', '.join(table.columns)[:300]}; add one, or {fix}")
    table = table[list(columns)].apply(lambda column: column.str.strip())
    for name in columns:
        if (table[name] == "").any():
            row = int((table[name] == "").to_numpy().argmax()) + 1
            raise TocomError(f"{path}: row {row} below the header has no {name}; fill it in")
    return table


# --- Hugging Face Hub -----------------------------------------------------------------------------------------------


def _read_hub(source: OwnOptions, cache: Path) -> Listing:
    """List the images of a data set of the Hub, which are written as files the first time."""
    from datasets import ClassLabel, Image

    where = f"Hub data set {source.hub}"
    tables = _load_hub(source, where)
    features = tables["train"].features
    image = _pick_column(features, Image, source.image_column, "image_column", where)
    label = _pick_column(features, ClassLabel, source.label_column, "label_column", where)
    index = _export(tables, image, label, cache / "hub" / _export_name(source, tables, image, label), where)
    labels = {split: entry["labels"] for split, entry in index.items()}
    files = {split: [Path(path) for path in entry["files"]] for split, entry in index.items()}
    for split, values in labels.items():
        if isinstance(features[label], ClassLabel) and any(value in (-1, None) for value in values):
            raise TocomError(f"{where}: the {split} split is not labelled; choose another with `splits:`")
    return _listing(source, where, files, labels, getattr(features[label], "num_classes", None))


def _load_hub(source: OwnOptions, where: str) -> dict:
    """Return the splits of a data set as ``datasets.Dataset``s, by our names."""
    import datasets

    try:
        # Given splits may be slices (train[:90%]), which only load_dataset understands.
        loaded = datasets.load_dataset(
            source.hub, source.subset, revision=source.revision, split=dict(source.splits) or None
        )
    except ConnectionError as error:
        pinned = f" --revision {source.revision}" if source.revision else ""
        raise TocomError(
            f"{where} cannot be reached ({_reason(error)}); where there is network, run `hf download {source.hub}"
            f" --repo-type dataset{pinned} --local-dir data/{Path(source.hub).name}`, then give that folder as `hub:`"
        ) from None
    except Exception as error:
        # The library and the formats below it have no common base for their errors.
        fix = "check name, subset, revision and splits"
        raise TocomError(f"{where} cannot be loaded ({_reason(error)}); {fix}") from error
    if source.splits:
        _check_parts(source.splits, loaded["train"].info.splits, where)
    # Splits that the config gives already have our names; a data set's own validation split has one of several.
    validation = next((name for name in _VALIDATION if name in loaded), None)
    names = {"train": "train", "val": validation, "test": "test"}
    for name in ("train", "test"):
        if name not in loaded:
            raise TocomError(
                f"{where} has no {name} split but {', '.join(loaded)}; say which to use:"
                " splits: {train: train, test: validation} (or parts: 'train[:80%]')"
            )
    return {split: loaded[name] for split, name in names.items() if name is not None}


def _check_parts(splits: Mapping[str, str], available: Mapping, where: str) -> None:
    """Refuse parts of a data set's splits that share images.

    Args:
        splits: what the config takes for each of ours ("train[:90%]"). available: the data set's own, with sizes.
    """
    from datasets import ReadInstruction

    sizes = {name: info.num_examples for name, info in available.items()}
    parts = [
        (ours, text, p) for ours, text in splits.items() for p in ReadInstruction.from_spec(text).to_absolute(sizes)
    ]
    for (ours, text, one), (others, other_text, other) in itertools.combinations(parts, 2):
        if one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to):
            raise TocomError(
                f"{where}: {ours}: {text} and {others}: {other_text} share images; take parts that do not overlap,"
                " such as 'train[:90%]' and 'train[90%:]'"
            )


def _pick_column(features: Mapping[str, Any], kind: type, given: str | None, option: str, where: str) -> str:
    if given is not None:
        if given not in features:
            raise TocomError(f"{where} has no column {given!r}{suggest(given, features)} but {', '.join(features)}")
        return given
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    candidates = f"several columns of type {kind.__name__}" if found else f"no column of type {kind.__name__}"
    raise TocomError(f"{where} has {candidates}; choose with `{option}:` among {', '.join(found or features)}")


def _export_name(source: OwnOptions, tables: Mapping, image: str, label: str) -> str:
    """Name the folder of exported images: another revision or content gives another folder."""
    identity = [source.hub, source.subset, source.revision, image, label]
    identity += [[split, table._fingerprint] for split, table in tables.items()]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", source.hub.strip("/"))[-80:]
    return f"{slug}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"


def _export(tables: Mapping, image: str, label: str, folder: Path, where: str) -> dict[str, dict[str, list]]:
    """Write every image as a file, unless it is there; the index comes last and says that all are.

    Returns:
        By split: ``{"files": [paths], "labels": [as in the data set]}``.
    """
    from datasets import Image
    from tqdm import tqdm

    done = folder / "index.json"
    if not done.is_file():
        index = {}
        for split, table in tables.items():
            raw = table.select_columns([image])
            raw = raw.cast_column(image, Image(decode=False)) if isinstance(raw.features[image], Image) else raw
            files = []
            for number, row in enumerate(tqdm(raw, desc=f"export {split} of {where}", mininterval=1)):
                data, ending = _image_file(row[image], f"{where}: image {number} of {split}")
                # Folders of ten thousand: some file systems are slow with more.
                files.append(f"{split}/{number // 10_000:04d}/{number:08d}{ending}")
                if not (folder / files[-1]).is_file():
                    with atomic(folder / files[-1]) as temporary:
                        temporary.write_bytes(data)
            index[split] = {"files": files, "labels": list(table[label])}
        write_text(done, json.dumps(index))
    index = json.loads(done.read_text(encoding="utf-8"))
    return {split: entry | {"files": [folder / path for path in entry["files"]]} for split, entry in index.items()}


def _image_file(value: Any, what: str) -> tuple[bytes, str]:
    """Return the bytes of an image file and its ending: the original ones, or those of a PNG of an array.

    Args:
        value: ``{"bytes", "path"}`` of the library, bytes, or pixels [H, W], [H, W, 3] or [3, H, W] from 0 to 255.
    """
    from PIL import Image

    try:
        if isinstance(value, dict):
            if value.get("bytes") is None and not Path(value["path"]).is_file():  # a device would be read without end
                raise ValueError(f"there is no file {value['path']}")
            value = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        if not isinstance(value, bytes):
            pixels = np.asarray(value)
            if pixels.ndim != 2 and (pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2])):
                raise ValueError(f"its shape is {list(pixels.shape)}")
            if pixels.min() < 0 or pixels.max() > 255 or pixels.dtype.kind not in "iu":
                raise ValueError("pixels are not whole numbers from 0 to 255")
            pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[2] != 3 else pixels
            stream = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
            value = stream.getvalue()
        with Image.open(io.BytesIO(value)) as opened:
            return value, f".{opened.format.lower()}"
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, NotImplementedError) as error:
        raise TocomError(f"{what} is not a readable image ({_reason(error)}); choose with `image_column:`") from None


# --- Python ---------------------------------------------------------------------------------------------------------


def _read_python(source: OwnOptions) -> Listing:
    """Call a function of the user; the folder in which tocom or snakemake was started is importable."""
    where = f"Python function {source.python}"
    sys.path.insert(0, here := str(Path.cwd()))
    try:
        result = _call(source, where)
    finally:
        sys.path.remove(here)
    if isinstance(result, Listing):
        if not {"train", "test"} <= result.splits.keys() <= set(SPLITS):
            raise TocomError(f"{where}: its Listing has splits {', '.join(result.splits)}; it needs train and test")
        _check_once({split: items.files for split, items in result.splits.items() if items.files is not None}, where)
        return result
    images, labels = _check_result(result, where)
    return _listing(source, where, images, labels)


def _call(source: OwnOptions, where: str) -> Any:
    """Import the function and call it with the arguments of the config."""
    importlib.invalidate_caches()
    try:
        function = pkgutil.resolve_name(source.python)
    except (Exception, SystemExit) as error:
        raise TocomError(
            f"{where} cannot be imported ({type(error).__name__}: {_reason(error)}); it is looked for in {Path.cwd()}"
            " and among installed packages"
        ) from error
    try:
        inspect.signature(function).bind(**source.arguments)
    except TypeError as error:
        raise TocomError(f"{where}: {error}; mend it or `arguments:`") from None
    try:
        return function(**source.arguments)
    except TocomError:
        raise
    except (Exception, SystemExit) as error:
        raise TocomError(f"{where} raised {type(error).__name__}: {_reason(error)}; mend it") from error


def _check_result(result: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return images (files or arrays) and labels by split of what a function of the user gave."""
    if not isinstance(result, Mapping) or not {"train", "test"} <= result.keys() <= set(SPLITS):
        got = f"a mapping of {', '.join(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
        raise TocomError(f"{where} returned {got}; return a Listing or {{'train': ..., 'test': ...[, 'val': ...]}}")
    images, labels = {}, {}
    for split in (split for split in SPLITS if split in result):
        pair = result[split]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TocomError(f"{where}: {split} is not a pair (images, labels)")
        images[split], labels[split] = _check_images(pair[0], f"{where}: images of {split}"), pair[1]
        if len(images[split]) != len(labels[split]):
            raise TocomError(f"{where}: {split} has {len(images[split])} images but {len(labels[split])} labels")
    _check_once({split: value for split, value in images.items() if isinstance(value, list)}, where)
    return images, labels


def _check_images(images: Any, what: str) -> list[Path] | np.ndarray:
    if isinstance(images, list | tuple) and all(isinstance(path, str | Path) for path in images):
        files = [Path(path) for path in images]
        _check_files(files, what, "paths are relative to where you start")
        return files
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3:
        raise TocomError(
            f"{what} are {array.dtype} of shape {list(array.shape)}; give paths, or uint8 of shape [n, 3, H, W]"
        )
    return array


def _reason(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".;") if text else type(error).__name__
