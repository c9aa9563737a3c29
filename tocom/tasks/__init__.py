"""Downstream tasks in memory: one file a kind of task."""

from __future__ import annotations

import os

import torch

from tocom.data.registry import read
from tocom.tasks.base import Task, Validated
from tocom.tasks.classify import Classification
from tocom.tasks.language import Language
from tocom.tasks.segment import Segmentation

__all__ = ["KINDS", "Task", "Validated", "load_task"]

KINDS: dict[str, type[Task]] = {kind.kind: kind for kind in (Classification, Segmentation, Language)}


def load_task(path: str | os.PathLike, device: torch.device) -> Task:
    """Read a prepared task onto a device.

    Raises:
        TocomError: the file is missing, corrupt or no prepared task.
    """
    arrays, about = read(path)
    return KINDS[about["task_kind"]](path, arrays, about, device)
