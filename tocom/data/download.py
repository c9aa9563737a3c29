"""Download one file from one mirror, going on where a connection was cut, and verify it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tocom.data.catalogue import RemoteFile, size_text

TAG = ".tag"
_CHUNK = 1 << 20
#: How many bytes beyond half as many again a file may have before a mirror is cut off; sizes in catalogues are rounded.
_SLACK = 64_000_000
#: Answers after which asking the same mirror again may help.
_PASSING = {408, 425, 429}


@dataclass(frozen=True)
class Patience:
    """How long a mirror is tried.

    Attributes:
        tries: attempts in a row that bring nothing new before the next mirror is tried.
        wait: seconds before the second attempt; doubled with each that brings nothing.
        timeout: seconds without a byte until a connection counts as cut.
    """

    tries: int = 4
    wait: float = 1.0
    timeout: float = 30.0


class CutError(Exception):
    """A mirror gave no file, or not all of it; ``final`` if asking again would not help."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


class WrongError(Exception):
    """A mirror gave a file with another checksum."""


def bar_of(items: Iterable | None, title: str, unit: str = "file", **options):
    """Show progress with rate and time left; in a log file, one update every few seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(items, desc=title, unit=unit, mininterval=interval, dynamic_ncols=True, **options)


def part_name(file: RemoteFile) -> str:
    """Return the name under which a file is kept until it is whole; :data:`TAG` is added for a note of its origin."""
    return f".{file.name}.part"


def download_file(file: RemoteFile, url: str, folder: Path, title: str, patience: Patience) -> Path:
    """Leave a verified file in ``folder`` and return its path.

    Raises:
        CutError: the mirror does not have it, or broke off; the part that arrived stays.
        WrongError: its checksum is wrong, also when fetched in one piece; it is deleted.
        OSError: the disk is full.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    part = folder / part_name(file)
    for last in (False, True):
        resume = Resume(part, file.size, title, patience, file.checksum is not None)
        try:
            return Path(pooch.retrieve(url, file.checksum, file.name, folder, downloader=resume))
        except ValueError as error:  # pooch's way to say that the hash is wrong; it has deleted the file
            # A piece from an earlier run or another mirror may be to blame: once more, from the start.
            if last or not resume.resumed:
                found = re.search(r"but got (\w+)", str(error))
                algorithm = (file.checksum or "").partition(":")[0]
                raise WrongError(f"found {algorithm}:{found[1]}" if found else str(error)) from None
    raise AssertionError("unreachable")


class Resume:
    """A downloader for pooch that goes on where a connection was cut, in this run or an earlier one.

    With a checksum, pieces of several mirrors may be put together: the checksum tells whether they fit. Without one, a
    piece is only continued at the URL that it came from, and only if the server says that the file is the same (the
    If-Range of RFC 9110, section 13.1.5).

    Args:
        part: where bytes are kept until the file is whole.
        size: bytes that are expected; a mirror that sends far more is cut off.
        hashed: whether a checksum will be compared.
    """

    def __init__(self, part: Path, size: int, title: str, patience: Patience, hashed: bool):
        self.part, self.size, self.title, self.patience, self.hashed = part, size, title, patience, hashed
        self.tag = part.with_name(part.name + TAG)
        self.resumed = False

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Download ``url`` to ``output_file``, on the same file system as ``part``."""
        most, failures = self._arrived(), 0
        while True:
            try:
                self._receive(url)
                self.part.replace(output_file)
                self.tag.unlink(missing_ok=True)
                return
            except CutError as cut:
                if isinstance(cut, _CannotResumeError):
                    self.part.unlink(missing_ok=True)
                failures = 0 if self._arrived() > most else failures + 1
                most = max(most, self._arrived())
                if cut.final or failures >= self.patience.tries:
                    if not self.hashed and not self.tag.exists():
                        self.part.unlink(missing_ok=True)  # nobody could tell what it belongs to
                    raise
                time.sleep(self.patience.wait * 2 ** max(0, failures - 1))

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _validator(self, url: str) -> str | None:
        """What the server called the file that the part is of, if that came from this URL."""
        if not self.tag.exists():
            return None
        source, _, validator = self.tag.read_text(encoding="utf-8").partition("\n")
        return validator if source == url else None

    def _receive(self, url: str) -> None:
        """Append to the part what is missing; raise CutError if it is not whole then."""
        same = None if self.hashed else self._validator(url)
        offset = self._arrived() if self.hashed or same else 0
        most = int(1.5 * self.size + _SLACK)
        opener = _open_file if url.startswith("file:") else _open_http
        with opener(url, offset, same, self.patience.timeout) as (start, total, chunks, validator):
            self.resumed = start > 0
            if not self.hashed and not start:
                self.tag.unlink(missing_ok=True)
                if validator:
                    self.tag.write_text(f"{url}\n{validator}", encoding="utf-8")
            bar = bar_of(None, self.title, "B", unit_scale=True, total=total or self.size, initial=start)
            with self.part.open("r+b" if start else "wb") as stream, bar:
                arrived = stream.seek(start)
                try:
                    for chunk in chunks:
                        arrived += stream.write(chunk)
                        bar.update(len(chunk))
                        if arrived > most:
                            break
                except CutError as cut:
                    raise CutError(f"{cut} after {arrived:,} of {total or self.size:,} bytes", cut.final) from None
        if arrived > most:
            self.part.unlink()
            raise CutError(f"sends far more than the {size_text(self.size)} that the catalogue says", final=True)
        if total is not None and arrived < total:
            raise CutError(f"connection cut after {arrived:,} of {total:,} bytes")


#: A source opened at an offset: where it really starts (0 if it cannot resume), size of the whole, the bytes, and a
#: validator for If-Range.
_Opened = tuple[int, int | None, Iterator[bytes], str | None]


@contextlib.contextmanager
def _open_file(url: str, offset: int, _same: None, _timeout: float) -> Iterator[_Opened]:
    path = Path(unquote(urlsplit(url).path))
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CutError(error.strerror or str(error), final=True) from None
    with stream:
        total = os.fstat(stream.fileno()).st_size
        start = offset if offset <= total else 0
        stream.seek(start)
        yield start, total, iter(lambda: _reading(stream.read), b""), None


def _reading(read: Callable[[int], bytes]) -> bytes:
    try:
        return read(_CHUNK)
    except OSError as error:  # not to be mistaken for a full disk at the other end
        raise CutError(f"cannot be read: {error.strerror}", final=True) from None


@contextlib.contextmanager
def _open_http(url: str, offset: int, same: str | None, timeout: float) -> Iterator[_Opened]:
    import requests

    from tocom import __version__

    # The bytes as they are on the mirror: servers that label a .tgz as "gzip-encoded" are not to be obeyed.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"tocom/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    if offset and same:
        headers["If-Range"] = same
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            start, total = _extent(response, offset)
            chunks = _chunks(response, timeout) if start != total else iter(())
            tag = response.headers.get("ETag", "")
            strong = tag if tag.startswith('"') else None  # a weak one (W/) does not promise the same bytes
            yield start, total, chunks, strong or response.headers.get("Last-Modified")
    except requests.RequestException as error:
        raise CutError(_reason(error, timeout)) from None


def _chunks(response, timeout: float) -> Iterator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        yield from response.raw.stream(_CHUNK, decode_content=False)
    except HTTPError as error:
        raise CutError(_reason(error, timeout)) from None


def _extent(response, offset: int) -> tuple[int, int | None]:
    """Return where an answer starts in the file, and the file's size if it is told."""
    code = response.status_code
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    total = int(match[2]) if match and match[2].isdigit() else None
    if code == 416 and total == offset:
        return offset, total  # all of it had arrived before
    if code == 206 and match and int(match[1] or -1) == offset:
        return offset, total
    if code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    if code in (206, 416):
        raise _CannotResumeError(f"cannot resume at byte {offset}")
    raise CutError(f"{code} {response.reason}", final=code < 500 and code not in _PASSING)


class _CannotResumeError(CutError):
    """The part does not fit what the mirror has."""


def _reason(error: Exception, timeout: float) -> str:
    """Say in a few words what requests and urllib3 say in many."""
    import requests
    from urllib3.exceptions import ProtocolError, ReadTimeoutError

    kinds = {
        (requests.exceptions.SSLError,): "its certificate is refused",
        (requests.exceptions.ProxyError,): "the proxy does not answer",
        (requests.exceptions.Timeout, ReadTimeoutError): f"no answer for {timeout:g} s",
        (requests.exceptions.ConnectionError,): "no connection",
        (ProtocolError,): "connection cut",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), type(error).__name__)
