"""A GPU of its own for every job on a machine that several jobs share without a scheduler.

Snakemake limits how many GPU jobs run at a time (``resources: gpu=4``) but does not say which GPU a job gets, and all
of them would take the first. Here a job locks free ones, and sees no others from then on. The operating system frees
the locks when the process ends, however it ends.

:func:`tocom.models.pick_device` does so for ``device: cuda``. Several processes that train one model get their GPUs
before torchrun starts, all at once (:func:`tocom.distributed.launch`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path

from tocom.errors import TocomError

#: Which GPUs CUDA shows a process; read once, when CUDA starts.
VISIBLE = "CUDA_VISIBLE_DEVICES"
#: The GPUs that this process, or the one that started it, has locked.
CLAIMED = "TOCOM_GPUS"
#: Seconds between two looks for a free GPU.
PATIENCE = 0.5


def installed() -> list[str]:
    """Return the UUIDs of the machine's NVIDIA GPUs, by PCI address; none if nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.split()


def visible(environment: MutableMapping[str, str]) -> list[str]:
    """Return the UUIDs of the GPUs that a process with this environment sees; none if nvidia-smi cannot tell.

    Numbers count by PCI address, as nvidia-smi does, and CUDA with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    found = installed()
    if not found or VISIBLE not in environment:
        return found
    words = [word.strip() for word in environment[VISIBLE].split(",") if word.strip()]
    return [found[int(word)] if word.isdigit() and int(word) < len(found) else word for word in words]


def claim(
    count: int = 1,
    environment: MutableMapping[str, str] = os.environ,
    timeout: float | None = None,
) -> tuple[str, ...]:
    """Lock ``count`` free GPUs for the rest of this process's life, and hide all others from it.

    Call it before CUDA starts. Waits until enough are free. Does nothing where there is nothing to choose: where
    nvidia-smi finds no GPU; with one GPU to be seen, as in a job that a cluster gave its own; among several processes
    of torchrun, which share out what that was given; and where this process, or the one that started it, has its GPUs.

    Args:
        count: how many GPUs, all or none.
        environment: where CUDA_VISIBLE_DEVICES is read, and set if some GPUs are to be hidden.
        timeout: seconds to wait; None for as long as it takes.

    Returns:
        The UUIDs of the GPUs that this call locked; empty if it did nothing.

    Raises:
        TocomError: fewer GPUs are visible than are wanted, or they were not free in time.
    """
    if environment.get(CLAIMED) or int(environment.get("WORLD_SIZE", "1")) > 1:
        return ()
    devices = visible(environment)
    if not devices or len(devices) == count == 1:
        return ()
    if count > len(devices):
        raise TocomError(f"{count} GPUs wanted, {len(devices)} visible; ask for fewer, or set {VISIBLE}")
    claimed = _wait_for(devices, count, timeout)
    environment[CLAIMED] = ",".join(claimed)
    if count < len(devices):
        environment[VISIBLE] = environment[CLAIMED]
    return claimed


def _wait_for(devices: list[str], count: int, timeout: float | None) -> tuple[str, ...]:
    folder = _folder()
    started, told = time.monotonic(), False
    while True:
        held = _lock(devices, count, folder)
        if held:
            return held
        if timeout is not None and time.monotonic() - started >= timeout:
            raise TocomError(f"no {count} of {len(devices)} GPUs came free in {timeout:g} s; run fewer jobs at a time")
        if not told:
            print(f"tocom: waiting for {count} of {len(devices)} GPUs", file=sys.stderr)
            told = True
        time.sleep(PATIENCE)


def _lock(devices: list[str], count: int, folder: Path) -> tuple[str, ...]:
    """Lock ``count`` devices and return them, or none: half a claim could block another half for ever."""
    held: dict[str, int] = {}
    for device in devices:
        descriptor = os.open(folder / f"{device.replace(os.sep, '_')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        held[device] = descriptor
        if len(held) == count:
            for number in held.values():
                os.set_inheritable(number, True)  # the lock outlives this program when it becomes another one, as below
            return tuple(held)
    for number in held.values():
        os.close(number)
    return ()


def _folder() -> Path:
    """Return the user's folder for locks. XDG_RUNTIME_DIR would not do: it goes at logout, while jobs may go on."""
    folder = Path(tempfile.gettempdir(), f"tocom-gpus-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError("it belongs to somebody else")
    except OSError as error:
        raise TocomError(f"cannot use {folder} for locks ({error.strerror or error}); set TMPDIR") from None
    return folder
