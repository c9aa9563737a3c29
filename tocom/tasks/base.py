"""The kinds of tasks: how a model gets a head, what its loss is, what is kept of an image, and what is measured."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tocom.compressed import Compressed
from tocom.errors import TocomError
from tocom.settings import Settings

#: Splits of more bytes than that stay in main memory, and go to a GPU batch by batch.
RESIDENT_BYTES = 4 * 2**30


class Validated(NamedTuple):
    """How well a model does on the validation images; larger is better.

    Attributes:
        score, loss: the score, and minus the loss (nats).
        by_image: "score" and "loss" -> values [images] whose mean it is; if it is no mean over images, linearised.
    """

    score: float
    loss: float
    by_image: dict[str, NDArray]


class Task(abc.ABC):
    """A prepared task in memory.

    Attributes:
        name, group, classes: see :mod:`tocom.data.registry`. device: where models are to be.
        n_train: number of training images.
    """

    kind: ClassVar[str]
    metric: ClassVar[str]
    n_train: int

    def __init__(self, about: dict, device: torch.device):
        self.name, self.group, self.classes = about["task"], about["group"], about["classes"]
        self.device = device

    @abc.abstractmethod
    def backbone(self, path: str | os.PathLike, settings: Settings) -> tuple[nn.Module, dict]:
        """Return a backbone's timm ViT, with a new head if it is one of timm's, and its checkpoint's metadata."""

    @abc.abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise TocomError unless the task's images have the size that a timm ViT takes."""

    def module(self, vit: Compressed, settings: Settings) -> nn.Module:
        """Return what maps images to the task's outputs; its head, if it has one of its own, is new."""
        return vit

    def restore(self, vit: Compressed, about: dict) -> nn.Module:
        """Return what :meth:`module` made, with the weights that its checkpoint holds."""
        return vit

    def beside(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return what of a module is no part of the timm ViT, by the prefix of its parameters in a checkpoint."""
        return {}

    def about(self, settings: Settings) -> dict[str, Any]:
        """Return what a checkpoint's metadata have to say so that :meth:`restore` can do its work."""
        return {}

    @abc.abstractmethod
    def training(
        self, module: nn.Module, vit: Compressed, settings: Settings, seed: int, workers: int
    ) -> tuple[Callable[[Any], Tensor], Callable | None]:
        """Return the loss of a micro-batch, and what feeds it (None: the indices of its images are enough)."""

    def unlabelled(self, model: nn.Module) -> tuple[Tensor | Sequence[Path], Tensor]:
        """Return the training images, decoded [n, 3, H, W] uint8 or as paths, and the validation images, decoded.

        Raises:
            TocomError: tasks of this kind have no images to adapt a compensator on.
        """
        raise TocomError(f"a compensator cannot be adapted to {self.name}, a task to {self.kind}; leave adapt out")

    @abc.abstractmethod
    def validate(self, module: nn.Module, batch_size: int, precision: str, workers: int = 0) -> Validated:
        """Return the score on the validation images and minus their loss."""

    @abc.abstractmethod
    def test(self, module: nn.Module, batch_size: int, precision: str) -> dict[str, np.ndarray]:
        """Return what is kept of the outputs for every test image, arrays [images, ...] by name."""

    def labels(self) -> dict[str, np.ndarray]:
        """Return what has to be stored once beside what :meth:`test` returns."""
        return {}


def check_shape(name: str, images: Sequence[Path] | Tensor, model: nn.Module) -> None:
    """Raise TocomError unless decoded images [n, 3, H, W] have the size that a timm ViT takes."""
    have, takes = tuple(images.shape[-2:]), tuple(model.patch_embed.img_size)
    if have != takes:
        raise TocomError(
            f"the images of {name} have {have[0]} x {have[1]} pixels, the model takes {takes[0]} x {takes[1]};"
            " prepare the task with data.image_size"
        )
