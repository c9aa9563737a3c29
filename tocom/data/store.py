"""What lies under the folder of all data sets: which of them are there, what they were made from, and where.

NAME/                 a complete data set; ``.complete.json`` says what it was made from,
                      ``.sha256sums`` lists its files (also for `sha256sum --check`)
.NAME.download/       verified files of one that is not complete
.NAME.unpack/         being unpacked; cleared by the next fetch if the process was killed
.NAME.old/            what --force replaces, for the moment that takes
.NAME.lock            while a process fetches it
.archives/NAME/       archives, if they were to be kept
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from tocom.data.catalogue import CatalogueOrPath, DataSet, as_catalogue, owner_of
from tocom.errors import TocomError
from tocom.settings import Settings

RECORD = ".complete.json"
SUMS = ".sha256sums"


class FetchedFile(Settings):
    """A file as it was fetched, with the checksum of the file, or of its content, that it was verified by.

    ``verified`` is false where the catalogue had no checksum to compare with.
    """

    name: str
    size: int
    checksum: str
    verified: bool
    url: str


class Record(Settings):
    """What ``.complete.json`` says: files as fetched, and number, bytes and digest of those in the folder.

    ``digest`` is the SHA-256 of ``.sha256sums``; it is null for a data set that is registered where it lies,
    in ``folder``.
    """

    data_set: str
    files: tuple[FetchedFile, ...] = ()
    count: int
    bytes: int
    digest: str | None = None
    folder: str | None = None

    def fits(self, entry: DataSet) -> bool:
        """Return whether it agrees with the catalogue, as far as the catalogue has checksums."""
        recorded = {file.name: (file.checksum, file.verified) for file in self.files}
        return self.folder is not None or (
            recorded.keys() == {file.name for file in entry.files}
            and all(
                file.checksum is None or recorded[file.name] in ((file.checksum, True), (file.content, True))
                for file in entry.files
            )
        )


def default_root() -> Path:
    """Return the folder of all data sets: what TOCOM_DATA names, or else ``data``."""
    return Path(os.environ.get("TOCOM_DATA") or "data")


def hidden(root: Path, name: str, what: str) -> Path:
    """Return the path that only a fetch uses: of its "download", "unpack", "old" or "lock"."""
    return root / f".{name}.{what}"


def read_record(folder: Path) -> Record | None:
    """Return what a data set's folder says of itself, or None if it is not complete."""
    path = folder / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TocomError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except ValidationError:
        raise TocomError(f"{path} is corrupt; fetch the data set again with --force") from None


def folder_of(name: str, root: str | os.PathLike, catalogue: CatalogueOrPath = None) -> Path:
    """Return the folder that holds a complete data set's files: root/NAME, or where it was registered.

    Raises:
        TocomError: the data set is unknown, was not fetched, or the folder that was registered is gone.
    """
    owner = owner_of(name, catalogue)
    folder = Path(root) / owner
    record = read_record(folder)
    if record is None:
        raise TocomError(f"the data set {name!r} is not in {root}; run `tocom data fetch {owner} --root {root}`")
    if record.folder is None:
        return folder
    if not Path(record.folder).is_dir():
        raise TocomError(
            f"{record.folder}, which was registered as {owner!r}, is not there;"
            f" mount it, or run `tocom data fetch {owner} --root {root} --force --from FOLDER`"
        )
    return Path(record.folder)


def status(name: str, root: str | os.PathLike, catalogue: CatalogueOrPath = None) -> str:
    """Return "fetched", "registered", "outdated" (the catalogue has other checksums now), "partly" or "no"."""
    entries = as_catalogue(catalogue)
    owner = owner_of(name, entries)
    record = read_record(Path(root) / owner)
    if record is None:
        return "partly" if hidden(Path(root), owner, "download").exists() else "no"
    if record.folder is not None:
        return "registered"
    return "fetched" if record.fits(entries[owner]) else "outdated"
