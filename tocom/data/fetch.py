"""Fetch, verify and unpack public data sets, so that each is either complete or not there at all.

What lies under the root folder (``data/`` by default):

    NAME/                 a complete data set; ``.complete.json`` says what it was made from,
                          ``.sha256sums`` lists its files (also for `sha256sum --check`)
    .NAME.download/       what has arrived of one that is not complete: verified files, and ``.FILE.part`` to resume
    .NAME.unpack/         being unpacked; cleared by the next fetch if the process was killed
    .NAME.old/            what --force replaces, for the moment that takes
    .NAME.lock            while a process fetches it
    .archives/NAME/       archives, if they were to be kept

After an interruption (a cut connection, Ctrl-C, a kill) what arrived stays, hidden, and the next fetch goes on from
there. After a full disk or a refused archive nothing is left; after a wrong checksum the wrong file is deleted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pydantic import ValidationError

from tocom.data.catalogue import Catalogue, DataSet, RemoteFile, as_catalogue, owner_of, size_text
from tocom.data.download import TAG, CutError, Patience, WrongError, bar_of, download_file, part_name
from tocom.data.unpack import unpack
from tocom.errors import TocomError
from tocom.files import sha256
from tocom.settings import Settings

RECORD = ".complete.json"
SUMS = ".sha256sums"
_log = logging.getLogger(__name__)

CatalogueOrPath = Catalogue | str | os.PathLike | None


class FetchedFile(Settings):
    """A file as it was fetched: ``verified`` is false where the catalogue had no checksum to compare with."""

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


def default_root() -> Path:
    """Return the folder of all data sets: what TOCOM_DATA names, or else ``data``."""
    return Path(os.environ.get("TOCOM_DATA") or "data")


# --- what is there ------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> Record | None:
    """Return what a data set's folder says of itself, or None if it is not complete.

    Raises:
        TocomError: the record is there, but cannot be read.
    """
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
        return "partly" if _download_folder(Path(root), owner).exists() else "no"
    if record.folder is not None:
        return "registered"
    return "fetched" if _is_current(record, entries[owner]) else "outdated"


def _is_current(record: Record, entry: DataSet) -> bool:
    """Whether a record agrees with the catalogue, as far as the catalogue has checksums."""
    recorded = {file.name: (file.checksum, file.verified) for file in record.files}
    return record.folder is not None or (
        recorded.keys() == {file.name for file in entry.files}
        and all(file.checksum is None or recorded[file.name] == (file.checksum, True) for file in entry.files)
    )


def _download_folder(root: Path, name: str) -> Path:
    return root / f".{name}.download"


def _staging_folder(root: Path, name: str) -> Path:
    return root / f".{name}.unpack"


def _old_folder(root: Path, name: str) -> Path:
    return root / f".{name}.old"


# --- fetch --------------------------------------------------------------------------------------------------------


def fetch(
    name: str,
    root: str | os.PathLike,
    catalogue: CatalogueOrPath = None,
    *,
    mirror: str | None = None,
    source: str | os.PathLike | None = None,
    force: bool = False,
    keep_archives: bool = False,
    patience: Patience = Patience(),
) -> Path:
    """Fetch a data set: download, verify, unpack, and move into place at the end.

    Returns at once if it is complete. Processes that fetch the same data set wait for one another.

    Args:
        root: folder of all data sets.
        catalogue: as read, or its path; by default, see :func:`tocom.data.catalogue.read_catalogue`.
        mirror: base URL that is tried first, as MIRROR/NAME/FILE; by default what TOCOM_MIRROR says.
        source: a local folder that has (some of) its files, or one such file, which are then taken from there; or a
            folder that has it unpacked, which is read once, registered where it lies, and not copied.
        force: fetch it again, and replace what is there.
        keep_archives: keep archives under root/.archives/NAME.

    Returns:
        The folder that holds its files; see :func:`folder_of`.

    Raises:
        TocomError: it is unknown, cannot be downloaded by a link, no mirror has it, its checksum is wrong on all of
            them, its archive is refused, or the disk is full. No root/NAME is left that was not there before.
    """
    entries = as_catalogue(catalogue)
    name = owner_of(name, entries)
    entry = entries[name]
    root = Path(root)
    mirror = _checked_mirror(mirror or os.environ.get("TOCOM_MIRROR"))
    leftovers = (_download_folder(root, name), _staging_folder(root, name), _old_folder(root, name))
    if not force and _is_complete(name, root, entry) and not any(os.path.lexists(path) for path in leftovers):
        _warn_of_unused(source, name, root)
        return folder_of(name, root, entries)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(name, root):
            _clear_killed(name, root, entry)
            if force or not _is_complete(name, root, entry):  # another process may have fetched it meanwhile
                _Job(name, entries, root, mirror, source, keep_archives, patience).run()
            else:
                _warn_of_unused(source, name, root)
                shutil.rmtree(_download_folder(root, name), ignore_errors=True)
    except OSError as error:
        raise TocomError(
            f"cannot write {error.filename or root / name}: {error.strerror or error};"
            " free some space or choose another folder with --root"
        ) from error
    return folder_of(name, root, entries)


def _checked_mirror(mirror: str | None) -> str | None:
    if mirror and not mirror.startswith(("https://", "http://", "file:///")):
        raise TocomError(f"the mirror {mirror!r} is not a URL; write https://, http:// or file:/// before it")
    return mirror


def _warn_of_unused(source: str | os.PathLike | None, name: str, root: Path) -> None:
    """Say that --from changes nothing, unless that folder is the one that is registered."""
    record = read_record(root / name)
    if source is not None and record.folder != str(Path(source).absolute()):
        _log.warning("%s is there already, so --from %s was not used; --force replaces it", name, source)


def _is_occupied(folder: Path) -> bool:
    """Return whether something is there; an empty folder, as a workflow makes for the files of a job, is nothing."""
    return folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))


def _remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file or link, and not what a link leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _is_complete(name: str, root: Path, entry: DataSet) -> bool:
    record = read_record(root / name)
    if record is not None and not _is_current(record, entry):
        raise TocomError(
            f"{root / name} was fetched with other files or checksums than the catalogue has now;"
            " fetch it again with --force"
        )
    if record is None and _is_occupied(root / name):
        raise TocomError(
            f"{root / name} is there, but was not made by `tocom data fetch`; move it away"
            " (then `--from FOLDER` registers it), or replace it with --force"
        )
    return record is not None


@contextlib.contextmanager
def _alone(name: str, root: Path) -> Iterator[None]:
    """Hold the data set's lock; wait, and say so, while another process does."""
    from filelock import FileLock, Timeout

    path = root / f".{name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is fetching %s; waiting for it", name)
        lock.acquire()
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for the removed file notices that and takes a new one.
        path.unlink(missing_ok=True)
        lock.release()


def _clear_killed(name: str, root: Path, entry: DataSet) -> None:
    """Remove what a killed run left, other than what can be resumed."""
    target, old = root / name, _old_folder(root, name)
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)  # killed between the two renames that replace it
    for leftover in (_staging_folder(root, name), old):
        _remove(leftover)
    known = {name for f in entry.files for name in (f.name, part_name(f), part_name(f) + TAG)}
    download = _download_folder(root, name)
    for path in download.iterdir() if download.exists() else ():
        if path.name not in known:
            path.unlink()


@dataclass
class _Job:
    """One run of :func:`fetch`."""

    name: str
    catalogue: Catalogue
    root: Path
    mirror: str | None
    source: str | os.PathLike | None
    keep_archives: bool
    patience: Patience

    @property
    def entry(self) -> DataSet:
        """What the catalogue says of it."""
        return self.catalogue[self.name]

    def run(self) -> None:
        """Leave a complete data set in place, or raise and leave no more than the module's text says."""
        local = self._local_files()
        if self.source is not None and (not local or self._is_unpacked(local)):
            self._register(Path(self.source))
            return
        self._check_by_hand(local)
        self._check_space()
        download = _download_folder(self.root, self.name)
        try:
            fetched = [self._fetch_file(file, local.get(file.name), download) for file in self.entry.files]
            with self._staging() as staging:
                self._fill(staging, download)
                self._seal(staging, fetched)
                if self.keep_archives:
                    self._keep(download)
                self._put_in_place(staging)
            shutil.rmtree(download)
        except (OSError, _RefusedError):
            shutil.rmtree(download, ignore_errors=True)
            raise

    # --- sources

    def _local_files(self) -> dict[str, Path]:
        """The files that ``source`` has of those in the catalogue."""
        if self.source is None:
            return {}
        source = Path(self.source).absolute()
        if not source.exists():
            raise TocomError(f"--from {self.source}: no such file or folder")
        if source.resolve().is_relative_to((self.root / self.name).resolve()):
            raise TocomError(f"--from {self.source} lies in {self.root / self.name}; move it elsewhere first")
        folder, found = (source, None) if source.is_dir() else (source.parent, source.name)
        local = {f.name: folder / f.name for f in self.entry.files if found in (None, f.name)}
        local = {name: path for name, path in local.items() if path.is_file()}
        if found and not local:
            names = ", ".join(file.name for file in self.entry.files) or "none"
            raise TocomError(f"--from {self.source} is no file of {self.name}; its files are: {names}")
        return local

    def _is_unpacked(self, local: dict[str, Path]) -> bool:
        """Whether ``source`` has all but the archives: some data sets keep plain files beside what is unpacked."""
        from tocom.data.families import FAMILIES, check_layout

        archives = {file.name for file in self.entry.files if file.unpack is not None}
        if not archives or archives & local.keys() or self.entry.family not in FAMILIES:
            return False
        with contextlib.suppress(TocomError):
            check_layout(self.name, Path(self.source), self.catalogue)
            return True
        return False

    def _check_by_hand(self, local: dict[str, Path]) -> None:
        missing = [file.name for file in self.entry.files if file.name not in local]
        if self.entry.manual and (missing or not self.entry.files):
            what = f"{', '.join(missing)} missing: " if local else ""
            then = f"; then run `tocom data fetch {self.name} --root {self.root} --from FOLDER`"
            raise TocomError(
                f"{self.name} cannot be downloaded by a link: {what}{self.entry.manual.strip()}"
                f"{'' if '--from' in self.entry.manual else then}"
            )

    def _check_space(self) -> None:
        download = _download_folder(self.root, self.name)
        names = {file.name: (file.name, part_name(file)) for file in self.entry.files}
        there = sum((download / n).stat().st_size for pair in names.values() for n in pair if (download / n).exists())
        unpacked = self.entry.unpacked_bytes if any(file.unpack is not None for file in self.entry.files) else 0
        needed = max(0, self.entry.download_bytes - there) + unpacked
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise TocomError(
                f"fetching {self.name} takes {size_text(needed)}, but {self.root} has {size_text(free)} free;"
                " free some space or choose another folder with --root"
            )

    def _urls(self, file: RemoteFile, local: Path | None) -> Iterator[str]:
        if local is not None:
            yield local.as_uri()
        if self.mirror:
            yield f"{self.mirror.rstrip('/')}/{quote(self.name)}/{quote(file.name)}"
        yield from file.urls

    # --- download

    def _fetch_file(self, file: RemoteFile, local: Path | None, download: Path) -> FetchedFile:
        problems: list[tuple[str, Exception]] = []
        for url in self._urls(file, local):
            try:
                path = download_file(file, url, download, f"{self.name}: {file.name}", self.patience)
            except (CutError, WrongError) as problem:
                problems.append((_host(url), problem))
                continue
            checksum = file.checksum or f"sha256:{sha256(path)}"
            if file.checksum is None:
                _log.warning("%s was not verified: %s; it has %s", file.name, file.checksum_note, checksum)
            return FetchedFile(
                name=file.name,
                size=path.stat().st_size,
                checksum=checksum,
                verified=file.checksum is not None,
                url=url,
            )
        with contextlib.suppress(OSError):
            download.rmdir()  # if nothing in it can be resumed
        raise TocomError(self._report(file, download, problems))

    def _report(self, file: RemoteFile, download: Path, problems: list[tuple[str, Exception]]) -> str:
        reasons = "; ".join(f"{host}: {problem}" for host, problem in problems)
        elsewhere = "give another mirror with --mirror URL or a copy of your own with --from PATH"
        if all(isinstance(problem, WrongError) for _, problem in problems):
            return (
                f"{self.name}: {file.name} has the wrong checksum on every mirror, expected {file.checksum}: {reasons};"
                f" look for news at {self.entry.homepage}, or {elsewhere}"
            )
        kept = (
            f" (what arrived is kept in {download}, and the next fetch goes on from there)" if download.exists() else ""
        )
        return f"cannot fetch {self.name}: {file.name}: {reasons}; try again later{kept}, or {elsewhere}"

    # --- unpack, record, move into place

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder beside the target that is gone at the end, unless it was moved into place."""
        staging = _staging_folder(self.root, self.name)
        staging.mkdir()
        try:
            yield staging
        finally:
            if staging.exists():
                shutil.rmtree(staging)

    def _fill(self, staging: Path, download: Path) -> None:
        archives = [file for file in self.entry.files if file.unpack is not None]
        limit = self.entry.unpacked_bytes + self.entry.unpacked_bytes // 2
        title = f"{self.name}: unpacking"
        with bar_of(None, title, "B", unit_scale=True, total=self.entry.unpacked_bytes, disable=not archives) as bar:
            for file in archives:
                try:
                    limit -= unpack(download / file.name, staging / file.unpack, limit, advance=bar.update)
                except TocomError as error:
                    raise _RefusedError(f"{self.name}: {error}") from None
        for file in self.entry.files:
            if file.unpack is None:
                if (staging / file.name).exists():
                    raise _RefusedError(
                        f"{self.name}: {file.name} is a file of its own, and in one of the archives too"
                    )
                # A kill from here to the end costs these files; unpacking, which takes longest, is over.
                (download / file.name).replace(staging / file.name)

    def _seal(self, folder: Path, fetched: list[FetchedFile]) -> None:
        lines, size = [], 0
        for path in bar_of(_files_below(folder), f"{self.name}: hashing"):
            lines.append(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n")
            size += path.stat().st_size
        (folder / SUMS).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        record = Record(data_set=self.name, files=fetched, count=len(lines), bytes=size, digest=sha256(folder / SUMS))
        (folder / RECORD).write_text(_dump(record), encoding="utf-8")

    def _keep(self, download: Path) -> None:
        folder = self.root / ".archives" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.entry.files:
            if file.unpack is not None:
                (download / file.name).replace(folder / file.name)

    def _put_in_place(self, staging: Path) -> None:
        target = self.root / self.name
        old = _old_folder(self.root, self.name)
        if os.path.lexists(target):
            target.rename(old)
        staging.rename(target)
        _remove(old)

    def _register(self, source: Path) -> None:
        """Note where an unpacked data set lies, if it is one; nothing is copied."""
        from tocom.data.families import check_layout

        source = source.absolute()
        files = _files_below(source)
        if not files:
            raise TocomError(f"--from {source} holds no files; give the folder that holds {self.name}")
        try:
            check_layout(self.name, source, self.catalogue)
        except TocomError as error:
            names = ", ".join(file.name for file in self.entry.files)
            archives = f", nor does it hold {names}" if names else ""
            raise TocomError(f"--from {source} is not {self.name} as it is unpacked{archives}: {error}") from None
        size = sum(path.stat().st_size for path in files)
        record = Record(data_set=self.name, count=len(files), bytes=size, folder=str(source))
        with self._staging() as staging:
            (staging / RECORD).write_text(_dump(record), encoding="utf-8")
            self._put_in_place(staging)
        shutil.rmtree(_download_folder(self.root, self.name), ignore_errors=True)


class _RefusedError(TocomError):
    """An archive that is refused or corrupt: nothing that was fetched is worth keeping."""


def _dump(record: Record) -> str:
    return json.dumps(record.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder but its two records, sorted by path; links to folders are not followed."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path not in (folder / RECORD, folder / SUMS) and path.is_file())


def _host(url: str) -> str:
    """How an error names a mirror."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or unquote(parts.path)


# --- check --------------------------------------------------------------------------------------------------------


def check(name: str, root: str | os.PathLike, catalogue: CatalogueOrPath = None) -> Record:
    """Hash every file of a fetched data set again.

    Of a data set that is registered where it lies, only the number of files and their bytes are compared, and its
    lists are read.

    Raises:
        TocomError: the data set is not there, or a file is missing, changed or too many; the first is named.
    """
    from tocom.data.families import check_layout

    entries = as_catalogue(catalogue)
    name = owner_of(name, entries)
    folder = folder_of(name, root, entries)
    record = read_record(Path(root) / name)
    again = f"run `tocom data fetch {name} --root {root} --force`"
    files = _files_below(folder)
    if record.folder is not None:
        found = (len(files), sum(path.stat().st_size for path in files))
        if found != (record.count, record.bytes):
            raise TocomError(
                f"{folder} holds {found[0]:,} files of {found[1]:,} bytes, but {record.count:,} of {record.bytes:,}"
                f" when it was registered as {name!r}; restore it, or {again} --from {folder}"
            )
        check_layout(name, folder, entries)
        return record
    if not (folder / SUMS).is_file() or sha256(folder / SUMS) != record.digest:
        raise TocomError(f"{folder / SUMS} is missing or was changed; {again}")
    text = (folder / SUMS).read_text(encoding="utf-8", errors="surrogateescape")
    sums = {path: digest for digest, _, path in (line.partition("  ") for line in text.split("\n")[:-1])}
    there = {path.relative_to(folder).as_posix(): path for path in files}
    for path in bar_of(sorted(sums.keys() | there.keys()), f"{name}: hashing"):
        if path not in there:
            raise TocomError(f"{folder / path} is missing; {again}")
        if path not in sums:
            raise TocomError(f"{folder / path} is no file of the data set; remove it, or {again}")
        if sha256(there[path]) != sums[path]:
            raise TocomError(f"{folder / path} was changed (its SHA-256 is not the recorded one); {again}")
    return record
