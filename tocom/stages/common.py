"""What the stages share: a task in memory as tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tocom.data.registry import read
from tocom.errors import TocomError
from tocom.training import normalise
from tocom.vit import CompressedViT


@dataclass(frozen=True)
class Split:
    """Images [n, 3, H, W] uint8 and labels [n] int64 on one device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TaskData:
    """A task's three splits, its name and its number of classes."""

    name: str
    classes: int
    train: Split
    val: Split
    test: Split


def load_task(path: str | os.PathLike, device: torch.device) -> TaskData:
    """Read a prepared task onto a device; the data sets of the study are small enough to stay there."""
    arrays, metadata = read(path)

    def split(name: str) -> Split:
        images, labels = (torch.from_numpy(arrays[f"{name}_{part}"]).to(device) for part in ("images", "labels"))
        return Split(images, labels)

    return TaskData(metadata["task"], metadata["classes"], split("train"), split("val"), split("test"))


def check_size(task: TaskData, model: nn.Module) -> None:
    """Raise TocomError unless the task's images have the size that the model takes."""
    have, takes = tuple(task.train.images.shape[-2:]), tuple(model.patch_embed.img_size)
    if have != takes:
        raise TocomError(
            f"the images of {task.name} have {have[0]} x {have[1]} pixels, the model takes {takes[0]} x {takes[1]};"
            " prepare the task with --image-size, from a folder"
        )


@torch.inference_mode()
def predict(vit: CompressedViT, images: Tensor, batch_size: int) -> Tensor:
    """Return logits [n, classes] on the CPU for images [n, 3, H, W] uint8."""
    vit.eval()
    return torch.cat([vit(normalise(batch, vit.model)).float().cpu() for batch in images.split(batch_size)])
