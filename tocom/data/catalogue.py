"""The catalogue of public data sets: where each comes from, how large it is, and how it is verified.

The entries are in ``tocom/assets/datasets.yaml``; another file can be named in the environment variable
TOCOM_CATALOGUE. Imports neither torch nor a network library, so that configs are checked quickly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from tocom.bundled import ASSETS
from tocom.data.unpack import is_archive
from tocom.errors import TocomError, suggest
from tocom.files import read_yaml
from tocom.settings import Settings, explain

BUNDLED = ASSETS / "datasets.yaml"
#: What data sets and files may be called.
NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"
Group = Literal[
    "CIFAR-100",
    "real tasks",
    "FGVC",
    "VTAB-1k natural",
    "VTAB-1k specialised",
    "VTAB-1k structured",
    "ImageNet-1k",
    "segmentation",
]
Text = Annotated[str, Field(min_length=1)]


class RemoteFile(Settings):
    """One file of a data set, the same on all its mirrors."""

    name: str = Field(pattern=rf"^{NAME}$", description="file name; institutional mirrors serve it as URL/DATASET/NAME")
    urls: tuple[Annotated[str, Field(pattern="^(https?://|file:///)")], ...] = Field(
        (), description="mirrors, in the order in which they are tried"
    )
    checksum: str | None = Field(
        pattern="^(sha256:[0-9a-f]{64}|sha1:[0-9a-f]{40}|md5:[0-9a-f]{32})$",
        description="sha256:, sha1: or md5: and hexadecimal digits; null needs a note",
    )
    checksum_note: Text | None = Field(None, description="why there is no checksum; the first fetch then records one")
    content: str | None = Field(
        None,
        pattern="^sha256:[0-9a-f]{64}$",
        description="of a .gz file: checksum of what it holds, by which a copy that was compressed anew is known, too",
    )
    size: int = Field(gt=0, description="bytes; what the check of disk space goes by")
    unpack: str | None = Field(None, description="folder below the data set's to unpack into; null keeps the file")

    @model_validator(mode="after")
    def _is_verified_and_stays_inside(self):
        if (self.checksum is None) != (self.checksum_note is not None):
            raise ValueError("give a checksum, or null with a note that says why")
        if self.content is not None and (self.checksum is None or not self.name.endswith(".gz")):
            raise ValueError("content goes with the checksum of a .gz file")
        if self.unpack is not None and (Path(self.unpack).is_absolute() or ".." in Path(self.unpack).parts):
            raise ValueError(f"unpack {self.unpack!r}: write a folder below the data set's own, or '.'")
        if self.unpack is not None and not is_archive(self.name):
            raise ValueError(f"{self.name!r} has no ending of an archive that can be unpacked")
        return self


class DataSet(Settings):
    """One data set, or one task that shares another's files."""

    family: Text = Field(description="module of tocom.data.families that reads it")
    title: Text
    group: Group = Field(description="group of tasks that tables average over")
    classes: int = Field(gt=0)
    licence: Text
    homepage: Text
    split: Text = Field(description="sizes of its splits, and who drew them")
    unpacked_mb: float | None = Field(None, gt=0, description="size on disk, unpacked, in 10^6 bytes")
    files: tuple[RemoteFile, ...] = ()
    manual: Text | None = Field(None, description="what to download by hand, where a link alone does not do")
    same_files_as: str | None = Field(None, description="data set whose files it shares")
    fetched_for_real: bool = Field(False, description="whether it was fetched from its public source for this project")

    @model_validator(mode="after")
    def _has_a_source(self):
        if self.same_files_as is not None:
            if self.files or self.manual or self.unpacked_mb:
                raise ValueError("same_files_as stands in place of files, manual and unpacked_mb")
            return self
        if not (self.files or self.manual):
            raise ValueError("give files, manual or same_files_as")
        if self.unpacked_mb is None:
            raise ValueError("unpacked_mb is missing")
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("two files have the same name")
        for file in self.files:
            if bool(file.urls) == bool(self.manual):
                raise ValueError(f"{file.name}: give urls, or manual instructions for the data set, and not both")
        return self

    @property
    def download_bytes(self) -> int:
        """Size of all its files before unpacking."""
        return sum(file.size for file in self.files)

    @property
    def unpacked_bytes(self) -> int:
        """Size on disk, unpacked."""
        return round((self.unpacked_mb or 0) * 1e6)


Catalogue = Mapping[str, DataSet]
CatalogueOrPath = Catalogue | str | os.PathLike | None


def read_catalogue(path: str | os.PathLike | None = None) -> dict[str, DataSet]:
    """Read and check a catalogue.

    Args:
        path: a YAML file; by default the one that TOCOM_CATALOGUE names, or else the bundled one.

    Raises:
        TocomError: the file cannot be read, or an entry has a mistake; all mistakes are named.
    """
    path = Path(path or os.environ.get("TOCOM_CATALOGUE") or BUNDLED)
    try:
        return dict(_read_catalogue(path, path.stat().st_mtime_ns))
    except OSError as error:
        raise TocomError(f"cannot read the catalogue {path}: {error.strerror}; check TOCOM_CATALOGUE") from None


@lru_cache(maxsize=8)
def _read_catalogue(path: Path, modified: int) -> dict[str, DataSet]:
    """Read a catalogue once for as long as it is not changed: planning asks for it for every task."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise TocomError(f"{path} is empty or not a mapping of names to data sets; see docs/datasets.md")
    entries = {str(name): _entry(path, str(name), entry) for name, entry in content.items()}
    for name, entry in entries.items():
        owner = entries.get(entry.same_files_as)
        if entry.same_files_as is not None and (owner is None or owner.same_files_as is not None):
            raise TocomError(
                f"{path}: {name}: same_files_as = {entry.same_files_as!r} is not a data set with files of its own"
                f"{suggest(entry.same_files_as, entries.keys() - {name})}"
            )
    return entries


def _entry(path: Path, name: str, content: object) -> DataSet:
    if not re.fullmatch(NAME, name):
        raise TocomError(f"{path}: {name!r} cannot be a data set's name; use letters, digits, '_', '-' and '.'")
    if not isinstance(content, dict):
        raise TocomError(f"{path}: {name} is not a mapping; see docs/datasets.md")
    places = {f"files.{index}": RemoteFile for index in range(len(content.get("files") or ()))}
    try:
        return DataSet.model_validate(content)
    except ValidationError as error:
        raise explain(error, f"{path}: {name}", {"": DataSet} | places) from None


def as_catalogue(catalogue: CatalogueOrPath) -> Catalogue:
    """Return a catalogue that was read already as it is; read one that is a path, or the default one for None."""
    return catalogue if isinstance(catalogue, Mapping) else read_catalogue(catalogue)


def find(name: str, catalogue: CatalogueOrPath = None) -> DataSet:
    """Return the entry of a data set."""
    entries = as_catalogue(catalogue)
    if name not in entries:
        raise TocomError(f"unknown data set {name!r}{suggest(name, entries)}; `tocom data list` names all of them")
    return entries[name]


def owner_of(name: str, catalogue: CatalogueOrPath = None) -> str:
    """Return the name of the data set whose files ``name`` uses: its own, or that of ``same_files_as``."""
    return find(name, catalogue).same_files_as or name


def select(patterns: list[str], catalogue: Catalogue) -> list[str]:
    """Return the names that match some shell pattern ("vtab.*"), in the catalogue's order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in catalogue):
            find(pattern, catalogue)
    return [name for name in catalogue if any(fnmatchcase(name, pattern) for pattern in patterns)]


def size_text(size: float) -> str:
    """Return bytes as people read them, in powers of 1,000: 1.15 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def markdown(catalogue: Catalogue | None = None) -> str:
    """Return the table of docs/datasets.md, with a final newline."""
    header = ("name", "data set", "group", "classes", "split", "download", "on disk", "checksums", "licence")
    header += ("fetched here for real",)
    lines = [header, ("---",) * len(header)]
    for name, entry in as_catalogue(catalogue).items():
        lines.append(
            (
                f"`{name}`",
                f"[{entry.title}]({entry.homepage})",
                entry.group,
                str(entry.classes),
                entry.split,
                download_text(entry),
                size_text(entry.unpacked_bytes) if entry.unpacked_mb else "",
                _checksums(entry),
                entry.licence,
                "yes" if entry.fetched_for_real else "no",
            )
        )
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def download_text(entry: DataSet) -> str:
    """Return the size of a download, or what there is in place of one."""
    if entry.same_files_as:
        return f"as `{entry.same_files_as}`"
    size = size_text(entry.download_bytes) if entry.files else ""
    return f"{size} by hand".strip() if entry.manual else size


def _checksums(entry: DataSet) -> str:
    """The algorithms that verify its files; "none yet" where a first fetch has to record one."""
    kinds = {file.checksum.partition(":")[0] if file.checksum else "none yet" for file in entry.files}
    return ", ".join(sorted(kinds))
