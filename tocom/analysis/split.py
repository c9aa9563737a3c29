"""Where the time of a run went: data, training, evaluation, and everything else; and how much memory it took."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tocom.errors import TocomError
from tocom.timing import MARK

#: What the target of item "at most 15 % outside data, training and evaluation" calls useful, by stage.
GROUPS = {
    "data": "data",
    "pretrain": "training",
    "distil": "training",
    "finetune": "training",
    "evaluate": "evaluation",
    "analyse": "analysis",
}
USEFUL = ("data", "training", "evaluation")
START_UP, FILES = "start-up of jobs (imports)", "reading and writing files"


@dataclass(frozen=True)
class Split:
    """What a run took.

    Attributes:
        core_seconds: what its cores were busy with, in seconds. wall: its duration (s).
        memory_mb: an upper bound on the memory of its jobs (MB): the peaks of the ``cores`` largest of them.
    """

    core_seconds: dict[str, float]
    wall: float
    cores: int
    memory_mb: float

    @property
    def share_elsewhere(self) -> float:
        """Share of all core-seconds outside data, training and evaluation."""
        useful = sum(self.core_seconds.get(name, 0.0) for name in USEFUL)
        return 1.0 - useful / (self.wall * self.cores)

    def rows(self) -> list[tuple[str, float, float]]:
        """Return (what, core-seconds, share of all)."""
        total = self.wall * self.cores
        return [(name, seconds, seconds / total) for name, seconds in self.core_seconds.items()]


def available_cores(cores: str) -> int:
    """Return the number that Snakemake takes "all" or a number for.

    Raises:
        TocomError: it is neither.
    """
    if cores == "all":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not cores.isdigit() or int(cores) < 1:
        raise TocomError(f"--cores {cores!r}: give a number of cores, or all")
    return int(cores)


def split(root: Path, since: float, until: float, cores: int) -> Split | None:
    """Read the logs of a finished run.

    Args:
        root: the study's folder. since, until: when snakemake started and ended, in seconds since 1970.

    Returns:
        The split, or None if no job ran in that time.
    """
    seconds: dict[str, float] = defaultdict(float)
    memory: list[float] = []
    for log in _written(root / "logs", "*.log", since, until):
        for line in log.read_text(errors="replace").splitlines():
            _, found, text = line.partition(MARK)
            if found:
                figures = json.loads(text)
                memory.append(figures["memory_mb"])
                seconds[GROUPS[figures["stage"]]] += figures["compute"] * figures["threads"]
                seconds[START_UP] += figures["start_up"]
                seconds[FILES] += figures["files"]
    if not seconds:
        return None
    wall = until - since
    known = {name: seconds[name] for name in (*USEFUL, "analysis", START_UP, FILES)}
    known["Snakemake and idle cores"] = max(wall * cores - sum(known.values()), 0.0)
    return Split(known, wall, cores, sum(sorted(memory)[-cores:]))


def _written(folder: Path, pattern: str, since: float, until: float) -> list[Path]:
    return [path for path in sorted(folder.rglob(pattern)) if since <= path.stat().st_mtime <= until + 1]
