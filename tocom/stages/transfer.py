"""Carry the gap between two degrees from one task to another (arXiv 2408.06798, section 3, model arithmetic).

If fine-tuning moves the weights at degree n away from those at degree m in a direction that the tasks share, then
adding task A's difference theta_n - theta_m to task B's theta_m should help B at degree n.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from tocom.errors import TocomError
from tocom.jobs import TransferJob
from tocom.models import compress, load_model, pick_device
from tocom.parts import is_head
from tocom.settings import PLAIN
from tocom.study import Checkpoint
from tocom.tasks import load_task
from tocom.tasks.classify import predict
from tocom.training import bar, make_deterministic


@torch.no_grad()
def add_gap(model: torch.nn.Module, low: dict, high: dict) -> None:
    """Add ``high - low`` to a model's weights, the classifier excepted."""
    for name, parameter in model.named_parameters():
        if not is_head(name):
            parameter.add_(high[name].to(parameter.device) - low[name].to(parameter.device))


def _check_same_weights(source: str, target: str, states: list[dict]) -> None:
    """Raise TocomError unless all models have the same weights but for the classifier, by name and shape."""
    first, *others = [{name: value.shape for name, value in state.items() if not is_head(name)} for state in states]
    if any(other != first for other in others):
        raise TocomError(
            f"the models of {source!r} and {target!r} do not have the same weights, so no gap can be carried from one"
            " to the other; fine-tune both with the same tuning and options, or leave one out"
        )


def transfer(
    job: TransferJob, data: Mapping[str, str | os.PathLike], folders: Mapping[str, list[str | os.PathLike]]
) -> list[dict]:
    """Evaluate every task's models at the high degree after adding each task's gap.

    Args:
        data: task -> its prepared file. folders: task -> where its checkpoints are.

    Returns:
        A row for each (target task, seed, source task or "none"): study, backbone, method, source_task, target_task,
        seed, train_degree, infer_degree, n, correct, accuracy.

    Raises:
        TocomError: a checkpoint is missing or corrupt, or the tasks' models do not have the same weights.
    """
    make_deterministic(job.settings.threads)
    device = pick_device(job.settings.device)
    rows = []
    with bar(None, "transfer", total=len(data) * (len(data) + 1) * len(job.seeds)) as progress:
        for target, path in data.items():
            task = load_task(path, device)
            labels = task.test_split.labels.cpu()
            for seed in job.seeds:
                for source in (PLAIN, *data):
                    model, about = load_model(_find(folders, target, job.low, seed))
                    if source != PLAIN:
                        gap = [_find(folders, source, label, seed) for label in (job.low, job.high)]
                        states = [load_model(path)[0].state_dict() for path in gap]
                        _check_same_weights(source, target, [model.state_dict(), *states])
                        add_gap(model, *states)
                    vit = compress(model.to(device), about, about["compressor"], int(job.high))
                    logits = predict(vit, task.test_split.images, job.settings.batch_size, job.settings.precision)
                    correct = int((logits.argmax(-1) == labels).sum())
                    row = {"study": job.study, "backbone": job.backbone, "method": job.method}
                    row |= {"source_task": source, "target_task": target, "seed": seed}
                    row |= {"train_degree": job.low, "infer_degree": int(job.high), "n": len(labels)}
                    rows.append(row | {"correct": correct, "accuracy": correct / len(labels)})
                    progress.update()
    return rows


def _find(folders: Mapping[str, list[str | os.PathLike]], task: str, label: str, seed: int) -> Path:
    """Return a task's checkpoint, which is in one of its folders."""
    name = Checkpoint(label, seed).file
    found = [Path(folder) / name for folder in folders.get(task, ()) if (Path(folder) / name).is_file()]
    if not found:
        raise TocomError(f"no checkpoint {name} of {task!r} was given; name the folders of all its checkpoints")
    return found[0]
