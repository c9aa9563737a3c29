"""A local HTTP server of a folder, with faults on demand, for tests of fetching.

with serve(folder) as server:                    # any thread may fetch; nothing outside 127.0.0.1 sees it
    url = server.url("CUB_200_2011.tgz")         # http://127.0.0.1:PORT/CUB_200_2011.tgz
    server.fail("a.tgz", cut=1000)               # send 1,000 bytes of the body, then cut the connection, once
    server.fail("a.tgz", status=503, times=2)    # the next two answers
    server.fail("a.tgz", corrupt=17, times=None) # always flip the byte at offset 17 of the file
    ...
    assert server.requests == ["a.tgz", "a.tgz"]
"""

from __future__ import annotations

import contextlib
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
    encoding: str | None = None
    delay: threading.Event | None = None


class FolderServer:
    """Serves the files of ``folder``; see the module's text for its use."""

    def __init__(self, folder: Path):
        self.folder, self.requests = Path(folder), []
        self._faults: dict[str, list[Fault]] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.http.server_port}"

    def url(self, path: str) -> str:
        """The URL of a file of the folder."""
        return f"{self.base}/{path}"

    def fail(self, path: str, **fault) -> None:
        """Queue a `Fault` for a path, after those that are queued already."""
        self._faults.setdefault(path, []).append(Fault(**fault))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def record(self, path: str) -> Fault:
        """Note a request and take the fault that its answer has, if any."""
        self.requests.append(path)
        queue = self._faults.get(path) or [Fault(None)]
        if queue[0].times is None:
            return queue[0]
        queue[0].times -= 1
        return queue[0] if queue[0].times else queue.pop(0)


def _handler(server: FolderServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (the name that http.server calls)
            path = unquote(urlsplit(self.path).path).lstrip("/")
            fault, file = server.record(path), server.folder / path
            if fault.delay is not None:
                fault.delay.wait(20)
            if fault.status or not file.is_file():
                self.send_error(fault.status or 404)
                return
            content = bytearray(file.read_bytes())
            if fault.corrupt is not None:
                content[fault.corrupt] ^= 0xFF
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if fault.encoding:
                self.send_header("Content-Encoding", fault.encoding)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content if fault.cut is None else content[: fault.cut])
            self.close_connection = True

        def log_message(self, *_):
            """Keep the tests' output quiet."""

    return Handler


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FolderServer]:
    """Serve ``folder`` on a free port of 127.0.0.1 while the block runs."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    server = FolderServer(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
