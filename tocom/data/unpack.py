"""Unpack archives from the network, with everything refused that a data set has no need of.

Refused: paths that leave the folder (absolute, '..', through a link), links that lead out of it, devices and pipes,
two members of one path, names with control characters or backslashes, encrypted members, more files or bytes than
the catalogue lets expect, and streams that expand to far more than their members say.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tocom.errors import TocomError

#: More than twice the files of the largest data set in the catalogue (ImageNet-1k, 1.3 million).
MAX_MEMBERS = 3_000_000
#: What a tar stream may hold beyond its files: headers and padding, up to as much again, or this many bytes.
_OVERHEAD = 64_000_000
_CHUNK = 1 << 20
#: The standard library's own checks, on top of ours; Python 3.11.0 to 3.11.3 have none.
_FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
_ENDINGS = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tbz2": "tar",
    ".tar.xz": "tar",
    ".txz": "tar",
    ".gz": "gzip",
}
_CORRUPT = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    UnicodeDecodeError,
)


def kind_of(name: str) -> str | None:
    """Return "tar", "zip", "gzip" (one compressed file) or None, by a file name's ending."""
    # The longest ending decides: .tar.gz before .gz.
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return _ENDINGS[ending]
    return None


class _RefusedError(Exception):
    """Something in an archive that is not to be unpacked."""


@dataclass
class _Budget:
    """How many files and bytes may still be unpacked."""

    members: int
    bytes: int
    advance: Callable[[int], object]

    def take(self, size: int, members: int = 1) -> None:
        self.members -= members
        self.bytes -= size
        self.advance(size)
        if self.members < 0:
            raise _RefusedError("it holds more files than expected")
        if self.bytes < 0:
            raise _RefusedError("it unpacks to far more bytes than the catalogue says")


def unpack(
    archive: Path,
    folder: Path,
    max_bytes: int,
    max_members: int = MAX_MEMBERS,
    advance: Callable[[int], object] = lambda size: None,
) -> int:
    """Unpack an archive into a folder, which may hold files already (none is overwritten).

    On an error the folder is left as it is, half full: give a temporary one.

    Args:
        archive: .zip, .tar, .tar.gz, .tar.bz2, .tar.xz (or .tgz, .tbz2, .txz), or .gz of a single file.
        max_bytes: the most that its files may take, unpacked.
        max_members: the most files, folders and links that it may hold.
        advance: called with the bytes of each file, for a progress bar.

    Returns:
        The bytes of all its files, unpacked.

    Raises:
        TocomError: the archive is corrupt, or holds something that is refused.
        OSError: the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unpackers = {"tar": _unpack_tar, "zip": _unpack_zip, "gzip": _unpack_gzip}
    budget = _Budget(max_members, max_bytes, advance)
    try:
        unpackers[kind_of(archive.name)](archive, folder, budget)
    except (_RefusedError, tarfile.FilterError) as error:
        reason = f"is refused: {error}"
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        reason = f"is refused: {error.filename} is both a file and a folder in it"
    except _CORRUPT as error:
        reason = f"is corrupt, or not what its ending says ({' '.join(str(error).split()) or type(error).__name__})"
    except OSError as error:
        if error.errno is not None:  # bz2 reports damage as an OSError without a number; this one is the system's
            raise
        reason = f"is corrupt ({error})"
    else:
        return max_bytes - budget.bytes
    raise TocomError(f"{archive.name} {reason}; nothing of it was kept: take it from another source with --from PATH")


# --- paths --------------------------------------------------------------------------------------------------------


def _inside(name: str, links: set[PurePosixPath]) -> PurePosixPath:
    """Return a member's path, if it lies in the folder and leads through no link of the archive."""
    path = PurePosixPath(name)
    if "\\" in name or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise _RefusedError(f"the name {name!r} has a backslash or control character in it")
    if path.is_absolute() or ".." in path.parts:
        raise _RefusedError(f"{name!r} lies outside the folder that it is unpacked into")
    if links and not links.isdisjoint(path.parents):
        raise _RefusedError(f"{name!r} would be written through a link")
    return path


def _check_link(path: PurePosixPath, target: str) -> None:
    """Refuse a symbolic link that leads out of the folder.

    A target may begin with as many '..' as the link lies deep, and have none further on: members are never written
    through a link, so the link's own folders are real, and by induction every link ends inside.
    """
    parts = PurePosixPath(target).parts
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if PurePosixPath(target).is_absolute() or ups > len(path.parent.parts) or ".." in parts[ups:]:
        raise _RefusedError(f"the link {str(path)!r} leads out of the folder, to {target!r}")


def _refuse_second(target: Path, name: str, folder: bool = False) -> None:
    if os.path.lexists(target) and not (folder and target.is_dir() and not target.is_symlink()):
        raise _RefusedError(f"{name!r} is in it twice, or would overwrite a file of another archive")


# --- formats ------------------------------------------------------------------------------------------------------


class _Counted(io.RawIOBase):
    """A decompressed stream that ends with an error when it has given more than ``limit`` bytes."""

    def __init__(self, stream, limit: int):
        self._stream, self._left = stream, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(_CHUNK if size < 0 else min(size, _CHUNK))
        self._left -= len(data)
        if self._left < 0:
            raise _RefusedError("its stream expands to far more bytes than the catalogue says")
        return data


def _decompressed(archive: Path) -> BinaryIO:
    """The tar stream in a file, whichever of the three compressions it has, or none."""
    with archive.open("rb") as stream:
        start = stream.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    return next((opener for magic, opener in openers.items() if start.startswith(magic)), open)(archive, "rb")


def _unpack_tar(archive: Path, folder: Path, budget: _Budget) -> None:
    links = _links_in(folder)  # of archives before it
    with (
        _decompressed(archive) as stream,
        tarfile.open(fileobj=_Counted(stream, 2 * budget.bytes + _OVERHEAD), mode="r|", bufsize=_CHUNK) as tar,
    ):
        for member in tar:
            path = _inside(member.name, links)
            if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                raise _RefusedError(f"{member.name!r} is a device or pipe")
            budget.take(member.size if member.isfile() else 0)
            _refuse_second(folder / path, member.name, member.isdir())
            if member.issym():
                _check_link(path, member.linkname)
                links.add(path)
            if member.islnk() and not _is_file(folder / _inside(member.linkname, links)):
                raise _RefusedError(f"the hard link {member.name!r} leads to no file of it")
            if member.isdir():
                (folder / path).mkdir(parents=True, exist_ok=True)
            else:
                tar.extract(member, folder, set_attrs=False, **_FILTER)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _links_in(folder: Path) -> set[PurePosixPath]:
    paths = (Path(parent) / name for parent, folders, files in os.walk(folder) for name in folders + files)
    return {PurePosixPath(path.relative_to(folder).as_posix()) for path in paths if path.is_symlink()}


def _unpack_zip(archive: Path, folder: Path, budget: _Budget) -> None:
    links = _links_in(folder)
    with zipfile.ZipFile(archive) as zipped:
        # Names and sizes are all known before the first byte is written.
        for member in zipped.infolist():
            _inside(member.filename, links)
            budget.take(member.file_size)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _RefusedError(f"{member.filename!r} is a link, device or pipe")
            if member.flag_bits & 0x1:
                raise _RefusedError(f"{member.filename!r} is encrypted")
        for member in zipped.infolist():
            _refuse_second(folder / member.filename, member.filename, member.is_dir())
            zipped.extract(member, folder)  # reads no more than file_size bytes, and checks the CRC


def _unpack_gzip(archive: Path, folder: Path, budget: _Budget) -> None:
    target = folder / archive.name[: -len(".gz")]
    _refuse_second(target, target.name)
    with gzip.open(archive, "rb") as stream, target.open("xb") as output:
        while data := stream.read(_CHUNK):
            budget.take(len(data), members=0)
            output.write(data)
