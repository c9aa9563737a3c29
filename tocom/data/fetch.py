"""Fetch, verify and unpack public data sets, so that each is either complete or not there at all.

:mod:`tocom.data.store` says what lies where. After an interruption (a cut connection, Ctrl-C, a kill) the files that
were verified stay, hidden, and the next fetch goes on with the others. After a full disk or a refused archive nothing
is left; after a wrong checksum the wrong file is deleted.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tqdm import tqdm

from tocom.data.catalogue import Catalogue, CatalogueOrPath, DataSet, RemoteFile, as_catalogue, owner_of, size_text
from tocom.data.families import check_layout
from tocom.data.store import RECORD, SUMS, FetchedFile, Record, folder_of, hidden, read_record
from tocom.data.unpack import unpack
from tocom.errors import TocomError
from tocom.files import alone, sha256

#: How often all mirrors are tried, seconds before the second time (doubled each time), seconds until silence is a cut.
TRIES, WAIT, TIMEOUT = 4, 1.0, 30.0
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


# --- one file from one mirror -------------------------------------------------------------------------------------


class _MirrorError(Exception):
    """A mirror did not give the file; ``final`` if asking it again would not help."""

    def __init__(self, reason: str, final: bool = True):
        super().__init__(reason)
        self.final = final


def _bar(items: Iterable | None = None, **options) -> tqdm:
    """Show progress with rate and time left; in a log file, one update every few seconds."""
    return tqdm(items, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


def _download(file: RemoteFile, url: str, folder: Path, title: str) -> tuple[Path, str | None]:
    """Leave a verified file in ``folder``, unless it is there already.

    Returns:
        Its path, and the checksum that it was verified by: of the file, or of its content.

    Raises:
        _MirrorError: the mirror does not have it, broke off, or has another file.
        OSError: the disk is full.
    """
    import pooch
    import requests

    anew = ""  # the checksum of a file that holds what it should, but was compressed anew

    def get(url: str, output: str, _: object) -> None:
        nonlocal anew
        transfer(url, output)
        anew = sha256(output) if file.content is not None and _content_of(Path(output)) == file.content else ""

    def transfer(url: str, output: str) -> None:
        Path(output).unlink()  # pooch makes it private; one that is new is as readable as any
        if url.startswith("file:"):
            local = Path(unquote(urlsplit(url).path))
            if not (local.is_file() and os.access(local, os.R_OK)):
                raise _MirrorError("no such file, or it cannot be read")
            shutil.copyfile(local, output)
            return
        options = {"headers": {"Accept-Encoding": "identity"}, "hooks": {"response": _as_it_is}, "timeout": TIMEOUT}
        with _bar(desc=title, unit="B", unit_scale=True, total=file.size) as bar:
            pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, **options)(url, output, None)

    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(url, file.checksum, file.name, folder, downloader=get)), file.checksum
    except requests.HTTPError as error:
        code = error.response.status_code
        passing = code >= 500 or code in (408, 425, 429)
        raise _MirrorError(f"{code} {error.response.reason}", final=not passing) from None
    except requests.RequestException as error:
        raise _MirrorError(type(error).__name__, final=False) from None  # such as ConnectTimeout, SSLError
    except ValueError as error:  # pooch's way to say that the hash is wrong; it has deleted the file
        if anew:
            again = file.model_copy(update={"checksum": f"sha256:{anew}", "content": None})
            return _download(again, url, folder, title)[0], file.content
        found = re.search(r"but got (\w+)", str(error))
        raise _MirrorError(f"wrong checksum {found[1]}, expected {file.checksum}" if found else str(error)) from None


def _content_of(path: Path) -> str | None:
    """Return the checksum of what a .gz file holds, or None if it is none."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) as stream:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
    except (OSError, EOFError, zlib.error):
        return None
    return f"sha256:{digest.hexdigest()}"


def _as_it_is(response, **_: object) -> None:
    """Keep requests from unpacking a .tgz that a server labels as an encoding of a .tar."""
    response.raw.headers.pop("Content-Encoding", None)


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
        The folder that holds its files; see :func:`tocom.data.store.folder_of`.

    Raises:
        TocomError: it is unknown, cannot be downloaded by a link, no mirror has it, its checksum is wrong on all of
            them, its archive is refused, or the disk is full. No root/NAME is left that was not there before.
    """
    entries = as_catalogue(catalogue)
    name = owner_of(name, entries)
    root = Path(root)
    mirror = mirror or os.environ.get("TOCOM_MIRROR")
    if mirror and not mirror.startswith(("https://", "http://", "file:///")):
        raise TocomError(f"the mirror {mirror!r} is not a URL; write https://, http:// or file:/// before it")
    job = _Job(name, entries, root, mirror, source, keep_archives)
    leftovers = [hidden(root, name, what) for what in ("download", "unpack", "old")]
    try:
        if force or any(os.path.lexists(path) for path in leftovers) or not job.is_complete():
            root.mkdir(parents=True, exist_ok=True)
            with alone(hidden(root, name, "lock"), f"another process is fetching {name}; waiting for it"):
                job.clear_killed()
                if force or not job.is_complete():  # another process may have fetched it meanwhile
                    job.run()
                    return folder_of(name, root, entries)
                shutil.rmtree(job.download, ignore_errors=True)
    except OSError as error:
        raise TocomError(
            f"cannot write {error.filename or root / name}: {error.strerror or error};"
            " free some space or choose another folder with --root"
        ) from error
    if source is not None and read_record(root / name).folder != str(Path(source).absolute()):
        _log.warning("%s is there already, so --from %s was not used; --force replaces it", name, source)
    return folder_of(name, root, entries)


def _remove(path: Path) -> None:
    """Remove a folder with all it holds, or a file or link, and not what a link leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


class _RefusedError(TocomError):
    """An archive that is refused or corrupt: nothing that was fetched is worth keeping."""


@dataclass
class _Job:
    """One run of :func:`fetch`."""

    name: str
    catalogue: Catalogue
    root: Path
    mirror: str | None
    source: str | os.PathLike | None
    keep_archives: bool

    def __post_init__(self) -> None:
        """Name the paths."""
        self.entry: DataSet = self.catalogue[self.name]
        self.target = self.root / self.name
        self.download, self.staging, self.old = (hidden(self.root, self.name, w) for w in ("download", "unpack", "old"))

    def is_complete(self) -> bool:
        """Return whether the data set is in place; raise TocomError if something else is."""
        record = read_record(self.target)
        if record is not None and not record.fits(self.entry):
            raise TocomError(
                f"{self.target} was fetched with other files or checksums than the catalogue has now;"
                " fetch it again with --force"
            )
        # An empty folder, as a workflow makes for the files of a job, is nothing.
        empty = self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir())
        if record is None and os.path.lexists(self.target) and not empty:
            raise TocomError(
                f"{self.target} is there, but was not made by `tocom data fetch`; move it away"
                " (then `--from FOLDER` registers it), or replace it with --force"
            )
        return record is not None

    def clear_killed(self) -> None:
        """Remove what a killed run left, other than files that were verified."""
        if os.path.lexists(self.old) and not os.path.lexists(self.target):
            self.old.rename(self.target)  # killed between the two renames that replace it
        known = {file.name for file in self.entry.files}
        halves = [path for path in self.download.iterdir() if path.name not in known] if self.download.exists() else []
        for leftover in (self.staging, self.old, *halves):
            _remove(leftover)

    def run(self) -> None:
        """Leave a complete data set in place, or raise and leave no more than the module's text says."""
        local = self._local_files()
        archives = [file.name for file in self.entry.files if file.unpack is not None]
        # Some data sets keep plain files beside what is unpacked, so those alone make no download.
        if self.source is not None and Path(self.source).is_dir() and not local.keys() & (archives or local.keys()):
            self._register(Path(self.source).absolute(), archives)
            return
        self._check_by_hand(local)
        self._check_space()
        try:
            fetched = [self._fetch_file(file, local.get(file.name)) for file in self.entry.files]
            with self._in_place() as staging:
                self._fill(staging)
                _seal(staging, self.name, fetched)
                if self.keep_archives:
                    self._keep(self.root / ".archives" / self.name)
            shutil.rmtree(self.download)
        except (OSError, _RefusedError):
            shutil.rmtree(self.download, ignore_errors=True)
            raise

    # --- sources

    def _local_files(self) -> dict[str, Path]:
        """The files that ``source`` has of those in the catalogue."""
        if self.source is None:
            return {}
        source = Path(self.source).absolute()
        if not source.exists():
            raise TocomError(f"--from {self.source}: no such file or folder")
        if source.resolve().is_relative_to(self.target.resolve()):
            raise TocomError(f"--from {self.source} lies in {self.target}; move it elsewhere first")
        folder, found = (source, None) if source.is_dir() else (source.parent, source.name)
        local = {f.name: folder / f.name for f in self.entry.files if found in (None, f.name)}
        local = {name: path for name, path in local.items() if path.is_file()}
        if found and not local:
            names = ", ".join(file.name for file in self.entry.files) or "none"
            raise TocomError(f"--from {self.source} is no file of {self.name}; its files are: {names}")
        return local

    def _register(self, source: Path, archives: list[str]) -> None:
        """Note where an unpacked data set lies, if it is one; nothing is copied."""
        files = _files_below(source)
        if not files:
            raise TocomError(f"--from {source} holds no files; give the folder that holds {self.name}")
        try:
            check_layout(self.name, source, self.catalogue)
        except TocomError as error:
            nor = f", nor does it hold {', '.join(archives)}" if archives else ""
            raise TocomError(f"--from {source} is not {self.name} as it is unpacked{nor}: {error}") from None
        size = sum(path.stat().st_size for path in files)
        with self._in_place() as staging:
            _write(Record(data_set=self.name, count=len(files), bytes=size, folder=str(source)), staging)
        shutil.rmtree(self.download, ignore_errors=True)

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
        missing = sum(file.size for file in self.entry.files if not (self.download / file.name).exists())
        needed = missing + (self.entry.unpacked_bytes if any(f.unpack is not None for f in self.entry.files) else 0)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise TocomError(
                f"fetching {self.name} takes {size_text(needed)}, but {self.root} has {size_text(free)} free;"
                " free some space or choose another folder with --root"
            )

    # --- download

    def _fetch_file(self, file: RemoteFile, local: Path | None) -> FetchedFile:
        """Try the mirrors in turn, and those that may only be busy again."""
        urls = [] if local is None else [local.as_uri()]
        urls += [f"{self.mirror.rstrip('/')}/{quote(self.name)}/{quote(file.name)}"] if self.mirror else []
        problems = dict.fromkeys((*urls, *file.urls), _MirrorError("not tried", final=False))
        for attempt in range(TRIES):
            for url in [url for url, problem in problems.items() if not problem.final]:
                try:
                    path, checksum = _download(file, url, self.download, f"{self.name}: {file.name}")
                except _MirrorError as problem:
                    problems[url] = problem
                    continue
                checksum = checksum or f"sha256:{sha256(path)}"
                if file.checksum is None:
                    _log.warning("%s was not verified: %s; it has %s", file.name, file.checksum_note, checksum)
                about = {"name": file.name, "size": path.stat().st_size, "checksum": checksum}
                return FetchedFile(**about, verified=file.checksum is not None, url=url)
            if all(problem.final for problem in problems.values()):
                break
            if attempt + 1 < TRIES:
                time.sleep(WAIT * 2**attempt)
        with contextlib.suppress(OSError):
            self.download.rmdir()  # if nothing in it was verified
        reasons = "; ".join(f"{_host(url)}: {problem}" for url, problem in problems.items())
        raise TocomError(
            f"cannot fetch {self.name}: {file.name}: {reasons}; try again later (news: {self.entry.homepage}),"
            " or give another mirror with --mirror URL or a copy of your own with --from PATH"
        )

    # --- unpack and move into place

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[Path]:
        """A folder beside the target to fill; it takes the target's place at the end, or is gone if that fails."""
        self.staging.mkdir()
        try:
            yield self.staging
            if os.path.lexists(self.target):
                self.target.rename(self.old)
            self.staging.rename(self.target)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
        _remove(self.old)

    def _fill(self, staging: Path) -> None:
        archives = [file for file in self.entry.files if file.unpack is not None]
        limit = self.entry.unpacked_bytes + self.entry.unpacked_bytes // 2
        options = {"unit": "B", "unit_scale": True, "total": self.entry.unpacked_bytes, "disable": not archives}
        with _bar(desc=f"{self.name}: unpacking", **options) as bar:
            for file in archives:
                try:
                    limit -= unpack(self.download / file.name, staging / file.unpack, limit, advance=bar.update)
                except TocomError as error:
                    raise _RefusedError(f"{self.name}: {error}") from None
        for file in self.entry.files:
            if file.unpack is None:
                if (staging / file.name).exists():
                    raise _RefusedError(f"{self.name}: {file.name} is a file of its own, and in an archive too")
                # A kill from here to the end costs these files; unpacking, which takes longest, is over.
                (self.download / file.name).replace(staging / file.name)

    def _keep(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for archive in self.download.iterdir():  # plain files have gone into the data set
            archive.replace(folder / archive.name)


def _seal(folder: Path, name: str, fetched: list[FetchedFile]) -> None:
    """Write the records of a folder that is complete."""
    sums, size = _hashed(folder, name), sum(path.stat().st_size for path in _files_below(folder))
    text = "".join(f"{digest}  {path}\n" for path, digest in sums.items())
    (folder / SUMS).write_text(text, encoding="utf-8", errors="surrogateescape")
    _write(Record(data_set=name, files=fetched, count=len(sums), bytes=size, digest=sha256(folder / SUMS)), folder)


def _write(record: Record, folder: Path) -> None:
    text = json.dumps(record.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder but its two records, sorted by path; links to folders are not followed."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path not in (folder / RECORD, folder / SUMS) and path.is_file())


def _hashed(folder: Path, name: str) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder by its relative path, sorted."""
    files = _bar(_files_below(folder), desc=f"{name}: hashing", unit="file")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


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
    entries = as_catalogue(catalogue)
    name = owner_of(name, entries)
    folder = folder_of(name, root, entries)
    record = read_record(Path(root) / name)
    again = f"run `tocom data fetch {name} --root {root} --force`"
    if record.folder is not None:
        files = _files_below(folder)
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
    recorded = {path: digest for digest, _, path in (line.partition("  ") for line in text.split("\n")[:-1])}
    found = _hashed(folder, name)
    for path in sorted(recorded.keys() | found.keys()):
        if path not in found:
            raise TocomError(f"{folder / path} is missing; {again}")
        if path not in recorded:
            raise TocomError(f"{folder / path} is no file of the data set; remove it, or {again}")
        if found[path] != recorded[path]:
            raise TocomError(f"{folder / path} was changed (its SHA-256 is not the recorded one); {again}")
    return record
