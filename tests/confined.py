"""A fence around code that reads what it should not trust: bounded time and memory, no programs, no files elsewhere."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

#: What Python reports before it starts another program or a connection.
_PROGRAMS = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "webbrowser.open", "ctypes.dlopen"),
)
#: What it reports before it changes files, with the places of paths among the arguments.
_CHANGES = {
    **{"os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.chmod": (0,), "os.truncate": (0,), "os.utime": (0,)},
    **{"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "shutil.rmtree": (0,)},
}
_allowed: list[Path] = []
_seen: list[str] = []


def _hook(event, arguments):
    if not _allowed:
        return
    if event in _PROGRAMS:
        _seen.append(f"{event} {arguments}")
    paths = [arguments[place] for place in _CHANGES.get(event, ())]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        paths = [arguments[0]]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            real = Path(os.path.realpath(os.fsdecode(path)))
            if not any(real.is_relative_to(folder) for folder in _allowed) and str(real) != "/dev/null":
                _seen.append(f"{event} {real}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def confined(folder, seconds=20, megabytes=1500):
    """Fail if the block takes too long, takes too much memory, or starts a program or changes a file out of a folder.

    Args:
        folder: beside it, the temporary folder may be used. seconds: of the processor's time; a hundred times as
            many may pass, for who waits for what never comes uses none. megabytes: beyond what the process has.
    """

    def late(*_):
        raise AssertionError(f"it takes more than {seconds} seconds")

    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 100 * seconds)}
    handlers = {number: signal.signal(number, late) for number, _ in timers.values()}
    _seen.clear()
    _allowed.extend(Path(os.path.realpath(place)) for place in (folder, tempfile.gettempdir()))
    resource.setrlimit(resource.RLIMIT_AS, (has + megabytes * 2**20, limits[1]))
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        _allowed.clear()
    assert not _seen, _seen
