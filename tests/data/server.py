"""A local HTTP server of a folder, with Range and faults on demand, for tests of fetching.

from tests.data.server import serve

with serve(folder) as server:                    # any thread may fetch; nothing outside 127.0.0.1 sees it
    url = server.url("CUB_200_2011.tgz")         # http://127.0.0.1:PORT/CUB_200_2011.tgz
    server.fail("a.tgz", cut=1000)               # send 1,000 bytes of the body, then cut the connection, once
    server.fail("a.tgz", status=503, times=2)    # the next two answers
    server.fail("a.tgz", status=404, times=None) # always
    server.fail("a.tgz", corrupt=17, times=None) # flip the byte at offset 17 of the file
    server.fail("a.tgz", ignore_range=True)      # answer 200 with the whole file
    ...
    assert [r.range for r in server.requests("a.tgz")] == [None, "bytes=1000-"]
    assert server.requests("a.tgz")[1].sent == size - 1000
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with the next ``times`` answers for a path (None: with all of them)."""

    times: int | None = 1
    cut: int | None = None
    status: int | None = None
    corrupt: int | None = None
    ignore_range: bool = False
    delay: threading.Event | None = None


@dataclass
class Request:
    """A request as it was answered; ``sent`` counts the bytes of the body."""

    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent: int = 0


class FolderServer:
    """Serves the files of ``folder``; see the module's text for its use."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._faults: dict[str, list[Fault]] = {}
        self._requests: list[Request] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def base(self) -> str:
        """The server's URL, without a final slash."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def url(self, path: str) -> str:
        """The URL of a file of the folder."""
        return f"{self.base}/{path}"

    def fail(self, path: str, **fault) -> None:
        """Queue a `Fault` for a path, after those that are queued already."""
        with self._lock:
            self._faults.setdefault(path, []).append(Fault(**fault))

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def requests(self, path: str | None = None) -> list[Request]:
        """The requests so far, in order; those for one path if given."""
        with self._lock:
            return [request for request in self._requests if path in (None, request.path)]

    def start(self) -> FolderServer:
        """Start answering."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _record(self, request: Request) -> Fault:
        """Note a request and take the fault that its answer has, if any."""
        with self._lock:
            self._requests.append(request)
            queue = self._faults.get(request.path, [])
            if not queue:
                return Fault()
            fault = queue[0]
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    queue.pop(0)
            return fault


def _handler(server: FolderServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (the name that http.server calls)
            path = unquote(urlsplit(self.path).path).lstrip("/")
            request = Request(path, self.headers.get("Range"), self.headers.get("If-Range"))
            fault = server._record(request)
            if fault.delay is not None:
                fault.delay.wait(20)
            file = server.folder / path
            request.status = fault.status or (200 if file.is_file() else 404)
            if request.status != 200:
                self.send_error(request.status)
                return
            content = bytearray(file.read_bytes())
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            if fault.corrupt is not None:
                content[fault.corrupt] ^= 0xFF
            start = self._start(request, fault, tag)
            if start is None:
                body, length = content, len(content)
                self.send_response(200)
            elif start >= len(content):
                request.status = 416
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            else:
                request.status = 206
                body, length = content[start:], len(content) - start
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(length))
            self.send_header("ETag", tag)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            # A cut: fewer bytes than the header promised, then a closed connection.
            part = bytes(body if fault.cut is None else body[: fault.cut])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(part)
                request.sent = len(part)
            self.close_connection = True

        def _start(self, request: Request, fault: Fault, tag: str) -> int | None:
            """The first byte asked for, or None if the whole file is to be sent."""
            match = re.fullmatch(r"bytes=(\d+)-", request.range or "")
            if match is None or fault.ignore_range or request.if_range not in (None, tag):
                return None
            return int(match[1])

        def log_message(self, *_):
            """Keep the tests' output quiet."""

    return Handler


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FolderServer]:
    """Serve ``folder`` on a free port of 127.0.0.1 while the block runs."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    server = FolderServer(folder).start()
    try:
        yield server
    finally:
        server.stop()
