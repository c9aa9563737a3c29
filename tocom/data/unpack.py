"""Unpack archives from the network, with everything refused that a data set has no need of.

The standard library's checks (``tarfile.data_filter``: nothing leaves the folder, no devices) come on top of ours:
no member is written through a link or over another one, and no more bytes come out than are expected.
"""

from __future__ import annotations

import errno
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tocom.errors import TocomError

_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_CORRUPT = (
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, NotImplementedError, ValueError),
    MemoryError,  # LZMA's header says how much it takes
)
#: Most bytes of a tar's header on a member, and of a member's name; most members, besides one for so many bytes.
_HEADER, _NAME, _MEMBERS, _BYTES_EACH = 1 << 20, 1_000, 1_000, 50
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def is_archive(name: str) -> bool:
    """Return whether a file name has the ending of an archive that can be unpacked."""
    return name.lower().endswith(_ENDINGS)


class _RefusedError(Exception):
    """Something in an archive that is not to be unpacked."""


class _Member(tarfile.TarInfo):
    """A member of a tar, whose header may not be endless: tarfile reads one into memory, whatever its length."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """Read a block of a header."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _LONG_HEADERS and member.size > _HEADER:
            raise _RefusedError(f"a header of {member.size:,} bytes")
        return member


@dataclass
class _Target:
    """The folder to unpack into, and how many bytes and members it may still take."""

    folder: Path
    bytes: int
    advance: Callable[[int], object]

    def __post_init__(self) -> None:
        """Allow as many members as so many bytes may be made of."""
        self.members = _MEMBERS + self.bytes // _BYTES_EACH

    def admit(self, name: str, size: int, is_folder: bool) -> None:
        """Count a member, and refuse it if its place is not a new one inside the folder, or there is no more room."""
        path = PurePosixPath(name)
        if len(os.fsencode(name)) > _NAME or any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise _RefusedError(f"the name {name[:50]!r}... is too long")
        if re.search(r"[\\\x00-\x1f\x7f]", name):
            raise _RefusedError(f"the name {name!r} has a backslash or control character in it")
        if path.is_absolute() or ".." in path.parts:
            raise _RefusedError(f"{name!r} lies outside the folder that it is unpacked into")
        if any((self.folder / parent).is_symlink() for parent in path.parents):
            raise _RefusedError(f"{name!r} would be written through a link")
        there = self.folder / path
        if there.is_symlink() or (there.exists() and not (is_folder and there.is_dir())):
            raise _RefusedError(f"{name!r} is in it twice, or would overwrite a file of another archive")
        self.bytes -= size
        self.members -= 1
        if self.members < 0:
            raise _RefusedError("it has far more files than the bytes that the catalogue says are made of")
        if self.bytes < 0:
            raise _RefusedError("it unpacks to far more bytes than the catalogue says")
        self.advance(size)


def unpack(archive: Path, folder: Path, max_bytes: int, advance: Callable[[int], object] = lambda size: None) -> int:
    """Unpack an archive into a folder, which may hold files already (none is overwritten).

    On an error the folder is left as it is, half full: give a temporary one.

    Args:
        archive: a zip, or a tar of whichever compression.
        max_bytes: the most that its files may take, unpacked.
        advance: called with the bytes of each file, for a progress bar.

    Returns:
        The bytes of all its files, unpacked.

    Raises:
        TocomError: the archive is corrupt, or holds something that is refused.
        OSError: the disk is full.
    """
    archive, target = Path(archive), _Target(Path(folder), max_bytes, advance)
    target.folder.mkdir(parents=True, exist_ok=True)
    try:
        (_unpack_zip if archive.name.lower().endswith(".zip") else _unpack_tar)(archive, target)
    except (_RefusedError, tarfile.FilterError) as error:
        reason = f"is refused: {error}"
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        reason = f"is refused: {error.filename} is both a file and a folder in it"
    except _CORRUPT as error:
        reason = f"is corrupt, or not what its ending says ({' '.join(str(error).split()) or type(error).__name__})"
    except OSError as error:
        # bz2 and gzip report damage as an OSError without a number; EINVAL: zipfile was sent to before the beginning.
        if error.errno not in (None, errno.EINVAL):
            raise
        reason = f"is corrupt ({error})"
    else:
        return max_bytes - target.bytes
    raise TocomError(f"{archive.name} {reason}; nothing of it was kept: take it from another source with --from PATH")


def _unpack_tar(archive: Path, target: _Target) -> None:
    with tarfile.open(archive, tarinfo=_Member) as tar:
        for member in tar:
            target.admit(member.name, member.size, member.isdir())
            if member.islnk() and not (target.folder / member.linkname).is_file():
                raise _RefusedError(f"the hard link {member.name!r} leads to no file of it")
            tar.extract(member, target.folder, set_attrs=False, filter="data")
            tar.members.clear()  # tarfile keeps every header, which takes gigabytes for millions of files
        tar.fileobj.read(1 << 20)  # to the end of the stream, where gzip has its checksum


def _unpack_zip(archive: Path, target: _Target) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            target.admit(member.filename, member.file_size, member.is_dir())
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _RefusedError(f"{member.filename!r} is a link, device or pipe")
            if member.flag_bits & 0x1:
                raise _RefusedError(f"{member.filename!r} is encrypted")
            zipped.extract(member, target.folder)  # reads no more than file_size bytes, and checks the CRC
