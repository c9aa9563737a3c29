"""The one training loop: AdamW, cosine schedule, best epoch on held-out data, exact resume after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from tqdm import tqdm

from tocom.errors import TocomError
from tocom.files import atomic
from tocom.settings import Optimisation
from tocom.timing import counting_files


def normalise(images: Tensor, model: nn.Module) -> Tensor:
    """Turn uint8 images [B, 3, H, W] into what the model was pre-trained on: (pixel / 255 - mean) / std.

    The mean and std are those of timm's ``pretrained_cfg``; a model built with ``pretrained_cfg_overlay`` brings
    its own.
    """
    mean, std = (
        torch.tensor(model.pretrained_cfg[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std")
    )
    return (images.float() / 255.0 - mean) / std


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and on nothing else (not on PYTHONHASHSEED)."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def make_deterministic(threads: int) -> None:
    """Make torch give the same numbers for the same seed, whatever else runs on the machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and guards against nothing here


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Shift each image [B, C, H, W] by up to ``pixels`` in x and y, repeating its edge."""
    if not pixels:
        return images
    batch, _, height, width = images.shape
    padded = nn.functional.pad(images.float(), (pixels,) * 4, mode="replicate").to(images.dtype)
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, batch))
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(width))[:, None, None, :]
    first = torch.arange(batch)[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[first, channels, rows, columns]


def bar(items: Iterable, title: str, total: int | None = None) -> tqdm:
    """Show progress with the time left; in a log file, one update every few seconds."""
    return tqdm(items, desc=title, total=total, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True)


def fit(
    step: Callable[[Tensor], Tensor],
    module: nn.Module,
    n_images: int,
    settings: Optimisation,
    seed: int,
    score: Callable[[], tuple[float, ...]],
    title: str,
    identity: dict,
    resume: Path | None = None,
) -> dict:
    """Train ``module`` in place and leave it with the parameters of its best epoch.

    The random state is set from (seed, epoch) at the start of every epoch, so a run that was killed and resumed
    gives the same parameters as one that was not.

    Args:
        step: maps indices of training images [B] to a loss; draws from torch's global generator.
        module: what is trained; only its parameters that require gradients.
        score: called after each epoch; larger tuples are better.
        identity: JSON-able values that name all inputs of the run (hashes, degrees); a state that was left by a
            run with other inputs or settings is not resumed.
        resume: where the state is kept between epochs; removed by :func:`forget` once the result is written.

    Returns:
        ``{"best_epoch": ..., "score": [...], "losses": [...], "seconds": ...}``; epochs count from 1, seconds
        include those before an interruption.

    Raises:
        TocomError: the loss or a held-out figure is NaN or infinite; no state is left to resume from.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = create_optimizer_v2(module, "adamw", lr=settings.peak_lr, weight_decay=settings.weight_decay)
    per_epoch = -(-n_images // settings.batch_size)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.peak_lr / 1000,
        min_lr=min(settings.min_lr, settings.peak_lr),
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    fingerprint = json.dumps([title, seed, n_images, settings.model_dump(mode="json"), identity], sort_keys=True)
    state = _load_state(resume, fingerprint) or {
        "epoch": 0,
        "best": None,
        "best_epoch": 0,
        "score": [],
        "losses": [],
        "seconds": 0.0,
    }
    started = time.monotonic() - state["seconds"]
    if state["epoch"]:
        _copy_into(parameters, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])

    def check_finite(what: str, value: float, epoch: int) -> None:
        if not np.isfinite(value):
            if resume is not None:
                resume.unlink(missing_ok=True)
            raise TocomError(
                f"{title}: {what} became {value} in epoch {epoch + 1};"
                f" lower the learning rate (now {settings.peak_lr:g}) or check the data"
            )

    with bar(range(per_epoch * settings.epochs), title) as progress:
        progress.update(state["epoch"] * per_epoch)
        for epoch in range(state["epoch"], settings.epochs):
            module.train()
            torch.manual_seed(derive_seed(seed, "epoch", epoch))
            scheduler.step_update(epoch * per_epoch)
            total = 0.0
            for number, indices in enumerate(torch.randperm(n_images).split(settings.batch_size)):
                loss = step(indices)
                value = loss.item()
                check_finite("the loss", value, epoch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step_update(epoch * per_epoch + number + 1)
                total += value * len(indices)
                progress.update()
            module.eval()
            result = list(score())
            for figure in result:
                check_finite("a held-out figure", figure, epoch)
            state["losses"].append(total / n_images)
            if not state["score"] or tuple(result) > tuple(state["score"]):
                state |= {"score": result, "best_epoch": epoch + 1, "best": _copies(parameters)}
            progress.set_postfix(loss=f"{state['losses'][-1]:.3f}", held_out=f"{result[0]:.3f}", refresh=False)
            state["seconds"] = time.monotonic() - started
            state |= {"epoch": epoch + 1, "parameters": _copies(parameters), "optimizer": optimizer.state_dict()}
            _save_state(resume, fingerprint, state)
    _copy_into(parameters, state["best"])
    return {key: state[key] for key in ("best_epoch", "score", "losses", "seconds")}


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def _copy_into(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _save_state(path: Path | None, fingerprint: str, state: dict) -> None:
    if path is not None:
        with counting_files(), atomic(path) as temporary:
            torch.save({"fingerprint": fingerprint, **state}, temporary)


def _load_state(path: Path | None, fingerprint: str) -> dict | None:
    """Return the state of an interrupted run, or None if there is none for just these settings."""
    if path is None or not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # a state that cannot be read is only lost time: start again
        return None
    return state if state.pop("fingerprint", None) == fingerprint else None


def resume_path(output: str | os.PathLike) -> Path:
    """Return where an interrupted run that will write ``output`` keeps its state."""
    output = Path(output)
    return output.with_name(f".{output.name}.resume")


def forget(output: str | os.PathLike) -> None:
    """Remove the state of a run whose output has been written."""
    resume_path(output).unlink(missing_ok=True)
