"""Carry the gap between two degrees from one task to another (arXiv 2408.06798, section 3, model arithmetic).

If fine-tuning moves the weights at degree n away from those at degree m in a direction that the tasks share, then
adding task A's difference theta_n - theta_m to task B's theta_m should help B at degree n.
"""

from __future__ import annotations

import os

import torch

from tocom.errors import TocomError
from tocom.models import load_model, pick_device
from tocom.settings import NO_GAP, EvaluateSettings
from tocom.stages.common import compressed, load_task, predict
from tocom.training import bar, make_deterministic
from tocom.tuning import is_head


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
            " to the other; fine-tune both with the same tuning (tuning.mode and its sizes), or leave one out"
        )


def transfer(
    checkpoints: dict[tuple[str, int], tuple[str, str]],
    data: str | os.PathLike,
    settings: EvaluateSettings | None = None,
) -> list[dict]:
    """Evaluate one task's models at the high degree after adding each task's gap.

    Args:
        checkpoints: (task, seed) -> checkpoints fine-tuned at the low and at the high degree.
        data: the prepared target task.

    Returns:
        A row for each (source task or "none", seed): source_task, target_task, seed, train_degree, infer_degree,
        n, correct, accuracy.

    Raises:
        TocomError: a checkpoint is missing or corrupt, the target task has none, or the tasks' models do not have the
            same weights.
    """
    settings = settings or EvaluateSettings()
    make_deterministic(settings.threads)
    task = load_task(data, pick_device(settings.device))
    labels = task.test.labels.cpu()
    seeds = sorted({seed for name, seed in checkpoints if name == task.name})
    if not seeds:
        raise TocomError(f"no checkpoint of {task.name!r} was given; name its low and high checkpoints too")
    sources = [NO_GAP, *dict.fromkeys(name for name, _ in checkpoints)]
    rows = []
    with bar(None, f"transfer to {task.name}", total=len(sources) * len(seeds)) as progress:
        for seed in seeds:
            degree = load_model(checkpoints[task.name, seed][1])[1]["train_degree"]
            for source in sources:
                model, low = load_model(checkpoints[task.name, seed][0])
                if source != NO_GAP:
                    states = [load_model(path)[0].state_dict() for path in checkpoints[source, seed]]
                    _check_same_weights(source, task.name, [model.state_dict(), *states])
                    add_gap(model, *states)
                vit = compressed(model.to(task.device), low, low["compressor"], degree)
                logits = predict(vit, task.test.images, settings.batch_size, settings.precision)
                correct = int((logits.argmax(-1) == labels).sum())
                rows.append(
                    {
                        "source_task": source,
                        "target_task": task.name,
                        "seed": seed,
                        "train_degree": low["train_degree"],
                        "infer_degree": degree,
                        "n": len(labels),
                        "correct": correct,
                        "accuracy": correct / len(labels),
                    }
                )
                progress.update()
    return rows
