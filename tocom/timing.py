"""Where the time of a job goes: starting up, reading and writing files, and the computation itself."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Starts a line in a job's log that :mod:`tocom.analysis.split` reads.
MARK = "tocom-timing: "
#: Seconds spent in tocom.files so far.
_files = 0.0


@contextmanager
def counting_files() -> Iterator[None]:
    """Count the time of the block as reading or writing files."""
    global _files
    start = time.perf_counter()
    try:
        yield
    finally:
        _files += time.perf_counter() - start


def process_age() -> float:
    """Return the seconds since this process started, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def is_main() -> bool:
    """Return whether this process is the one of torchrun's that reports; without torchrun it is."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def timed(stage: str, threads: int = 1) -> Iterator[None]:
    """Report, on standard error, how long the block took, how long files took, how long start-up had taken,
    and the most memory (MB, 10^6 bytes) that the process has had."""
    before, files, start = process_age(), _files, time.perf_counter()
    yield
    elapsed, files = time.perf_counter() - start, _files - files
    figures = {"start_up": before, "files": files, "compute": elapsed - files}
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)
    line = {"stage": stage, "threads": threads, "memory_mb": round(memory_mb)} | {
        name: round(value, 3) for name, value in figures.items()
    }
    if is_main():
        print(MARK + json.dumps(line), file=sys.stderr)
