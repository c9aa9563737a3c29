"""What the stages share: a task in memory as tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tocom import distributed
from tocom.data.registry import read, unpack_paths
from tocom.errors import TocomError
from tocom.training import autocast, normalise
from tocom.vit import CompressedViT

#: Splits of more bytes than that stay in main memory, and go to a GPU batch by batch.
RESIDENT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Split:
    """Images [n, 3, H, W] uint8, or the paths of n training images; labels [n] int64 on the task's device."""

    images: Tensor | Sequence[Path]
    labels: Tensor


@dataclass(frozen=True)
class TaskData:
    """A task's three splits, its name, group, number of classes, and where its tensors are."""

    name: str
    group: str
    classes: int
    train: Split
    val: Split
    test: Split
    device: torch.device


def load_task(path: str | os.PathLike, device: torch.device) -> TaskData:
    """Read a prepared task onto a device."""
    arrays, metadata = read(path)

    def split(name: str) -> Split:
        labels = torch.from_numpy(arrays[f"{name}_labels"]).to(device)
        if f"{name}_files" in arrays:
            return Split(unpack_paths(arrays[f"{name}_files"]), labels)
        images = torch.from_numpy(arrays[f"{name}_images"])
        return Split(images if images.nbytes > RESIDENT_BYTES else images.to(device), labels)

    splits = [split(name) for name in ("train", "val", "test")]
    return TaskData(metadata["task"], metadata["group"], metadata["classes"], *splits, device)


def check_size(task: TaskData, model: nn.Module) -> None:
    """Raise TocomError unless the task's images have the size that the model takes."""
    have, takes = tuple(task.val.images.shape[-2:]), tuple(model.patch_embed.img_size)
    if have != takes:
        raise TocomError(
            f"the images of {task.name} have {have[0]} x {have[1]} pixels, the model takes {takes[0]} x {takes[1]};"
            " prepare the task with --image-size"
        )


@torch.inference_mode()
def predict(vit: CompressedViT, images: Tensor, batch_size: int, precision: str = "fp32") -> Tensor:
    """Return logits [n, classes] on the CPU for images [n, 3, H, W] uint8; several processes share the work."""
    vit.eval()
    device = next(vit.parameters()).device
    with autocast(precision, device):
        logits = [
            vit(normalise(batch.to(device), vit.model)).float().cpu()
            for batch in distributed.share(images.split(batch_size))
        ]
    return torch.cat(distributed.gather(logits))


def compressed(model: nn.Module, about: dict, compressor: str, degree: int = 0) -> CompressedViT:
    """Wrap a loaded model as its checkpoint's metadata say it is to be run."""
    return CompressedViT(model, compressor, degree, about.get("proportional_attention", True))


def scored(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the accuracy and minus the cross-entropy (nats) of logits [n, classes]; larger is better."""
    labels = labels.cpu()
    accuracy = (logits.argmax(-1) == labels).double().mean()
    return float(accuracy), -float(nn.functional.cross_entropy(logits, labels))
