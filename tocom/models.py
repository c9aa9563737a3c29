"""Backbones and checkpoints: timm models in, safetensors out."""

from __future__ import annotations

import os
from typing import Any

import timm
import torch
from torch import nn

from tocom.bundled import resolve
from tocom.errors import TocomError, suggest
from tocom.files import digest, load_tensors, save_tensors


def create(architecture: str, kwargs: dict[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """Build a timm model by name, with overrides of its constructor's arguments.

    Raises:
        TocomError: timm has no such model, refuses an argument, or cannot fetch the weights.
    """
    if not timm.is_model(architecture.split(".")[0]):
        names = timm.list_models("*vit*") + timm.list_models("deit*")
        raise TocomError(f"timm has no model {architecture!r}{suggest(architecture, names)}; see `tocom models`")
    try:
        return timm.create_model(architecture, pretrained=pretrained, **(kwargs or {}))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TocomError(f"timm could not build {architecture!r}: {reason}") from error


def compressible(pattern: str) -> list[tuple[str, str]]:
    """Return (name, module) of the timm models built by the modules whose ViTs can be compressed.

    Some of them have parts that are refused by name when they are wrapped (see :mod:`tocom.vit`).
    """
    modules = ("vision_transformer", "deit")
    return [(name, module) for module in modules for name in timm.list_models(pattern, module=module)]


def save_model(path: str | os.PathLike, model: nn.Module, architecture: str, kwargs: dict, **metadata) -> None:
    """Write a model with what is needed to build it again; ``metadata`` is stored beside it."""
    tensors = model.state_dict()
    described = {
        "format": 1,
        "kind": "model",
        "architecture": architecture,
        "kwargs": kwargs,
        "sha256": digest(tensors),
    }
    save_tensors(path, tensors, metadata | described)


def load_model(checkpoint: str | os.PathLike, num_classes: int | None = None, **overrides):
    """Build the model that a checkpoint describes and load its weights.

    Args:
        checkpoint: a bundled name (see :data:`tocom.bundled.BUNDLED`) or a path.
        num_classes: replace the head by a new one for so many classes; its initial weights are zero, so
            that they do not depend on a random state.
        overrides: constructor arguments that do not change the weights (``drop_path_rate``).

    Returns:
        The model in eval mode and the checkpoint's metadata.

    Raises:
        TocomError: the file is missing, corrupt, of another kind, a pickle, or does not match its hash.
    """
    path = resolve(checkpoint)
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "model":
        raise TocomError(f"{path} holds {meta.get('kind', 'something else')}, not a model; check the path")
    if digest(tensors) != meta["sha256"]:
        raise TocomError(f"{path} is corrupt: its weights do not match their hash; make or fetch it again")
    model = create(meta["architecture"], meta["kwargs"] | overrides)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise TocomError(f"{path} does not fit {meta['architecture']!r} as this timm builds it: {reason}") from None
    if num_classes is not None:
        model.reset_classifier(num_classes)
        for head in (model.head, getattr(model, "head_dist", None)):
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
    return model.eval(), meta


def pick_device(device: str = "auto") -> torch.device:
    """Return the device that "auto", "cpu", "cuda" or "cuda:1" stands for.

    Raises:
        TocomError: there is no such device, or a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise TocomError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise TocomError(f"device {device!r} was asked for, but torch sees no GPU; use --device cpu")
    return chosen
