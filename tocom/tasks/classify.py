"""Classification: timm's own head, cross-entropy, the predicted class of every image, accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from tocom import distributed
from tocom.data.loading import TrainImages, feed, mixer, train_transform
from tocom.data.registry import unpack_paths
from tocom.errors import TocomError
from tocom.models import load_model
from tocom.settings import FinetuneSettings
from tocom.tasks.base import RESIDENT_BYTES, Task, Validated, check_shape
from tocom.training import check_pairs, compiled, inference, normalise, random_shift
from tocom.vit import CompressedViT


@dataclass(frozen=True)
class Split:
    """Images [n, 3, H, W] uint8, or the paths of n training images; labels [n] int64 on the task's device."""

    images: Tensor | Sequence[Path]
    labels: Tensor


class Classification(Task):
    """A task with one class for every image."""

    kind, metric = "classify", "accuracy"

    def __init__(self, path: str | os.PathLike, arrays: dict[str, np.ndarray], about: dict, device: torch.device):
        super().__init__(about, device)

        def split(name: str) -> Split:
            labels = torch.from_numpy(arrays[f"{name}_labels"]).to(device)
            if f"{name}_files" in arrays:
                return Split(unpack_paths(arrays[f"{name}_files"]), labels)
            images = torch.from_numpy(arrays[f"{name}_images"])
            return Split(images if images.nbytes > RESIDENT_BYTES else images.to(device), labels)

        self.train_split, self.val_split, self.test_split = map(split, ("train", "val", "test"))
        self.n_train = len(self.train_split.labels)

    def backbone(self, path: str | os.PathLike, settings: FinetuneSettings) -> tuple[nn.Module, dict]:
        """Return a backbone with a new head, whose weights are zero, and its checkpoint's metadata."""
        model, about = load_model(path, num_classes=self.classes, drop_path_rate=settings.drop_path)
        about["kwargs"] = about["kwargs"] | {"num_classes": self.classes}
        return model, about

    def check(self, model: nn.Module) -> None:
        """Raise TocomError unless the images have the size that the model takes."""
        check_shape(self.name, self.val_split.images, model)

    def training(
        self, module: nn.Module, vit: CompressedViT, settings: FinetuneSettings, seed: int, workers: int
    ) -> tuple[Callable, Callable | None]:
        """Return the loss of a micro-batch, and what feeds it; without augmentation by timm, indices are enough."""
        run, images, labels = compiled(module, settings), self.train_split.images, self.train_split.labels
        mix = mixer(settings, self.classes, settings.label_smoothing)
        soft = SoftTargetCrossEntropy()

        def loss(batch: Tensor, wanted: Tensor) -> Tensor:
            if mix is None:
                return F.cross_entropy(run(batch), wanted, label_smoothing=settings.label_smoothing)
            batch, targets = mix(batch, wanted)
            return soft(run(batch), targets)

        def from_memory(indices: Tensor) -> Tensor:
            batch = images[indices].to(self.device)
            if settings.augmentation == "shift":
                batch = random_shift(batch, settings.shift)
            return loss(normalise(batch, vit.model), labels[indices])

        def from_loader(batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss(*(part.to(self.device, non_blocking=True) for part in batch))

        check_pairs(settings)
        if settings.augmentation == "timm":
            transform = train_transform(vit.model, settings)
            source = images.cpu() if isinstance(images, Tensor) else images  # loaders must not touch a GPU
            data = TrainImages(source, labels.cpu(), transform, seed)
            return from_loader, feed(data, workers, pin=self.device.type == "cuda")
        if not isinstance(images, Tensor) or images.shape[-2:] != self.val_split.images.shape[-2:]:
            raise TocomError(
                f"the training images of {self.name} are not decoded, which augmentation {settings.augmentation!r}"
                " needs; prepare the task with decode_train, or use augmentation 'timm'"
            )
        return from_memory, None

    def unlabelled(self, model: nn.Module) -> tuple[Tensor | Sequence[Path], Tensor]:
        """Return the training images, decoded [n, 3, H, W] uint8 or as paths, and the validation images, decoded."""
        self.check(model)
        return self.train_split.images, self.val_split.images

    def validate(self, module: nn.Module, batch_size: int, precision: str, workers: int = 0) -> Validated:
        """Return the accuracy on the validation images and minus their cross-entropy (nats)."""
        return scored(predict(module, self.val_split.images, batch_size, precision), self.val_split.labels)

    def test(self, module: nn.Module, batch_size: int, precision: str) -> dict[str, np.ndarray]:
        """Return the predicted class of every test image [images] int16."""
        logits = predict(module, self.test_split.images, batch_size, precision)
        return {"predictions": logits.argmax(-1).numpy().astype(np.int16)}

    def labels(self) -> dict[str, np.ndarray]:
        """Return the class of every test image [images] int64."""
        return {"labels": self.test_split.labels.cpu().numpy()}


def predict(vit: CompressedViT, images: Tensor, batch_size: int, precision: str = "fp32") -> Tensor:
    """Return logits [n, classes] on the CPU for images [n, 3, H, W] uint8; several processes share the work."""
    vit.eval()
    device = next(vit.parameters()).device
    with inference(vit, precision, device):
        logits = [
            vit(normalise(batch.to(device), vit.model)).float().cpu()
            for batch in distributed.share(images.split(batch_size))
        ]
    return torch.cat(distributed.gather(logits))


def scored(logits: Tensor, labels: Tensor) -> Validated:
    """Return the accuracy and minus the cross-entropy (nats) of logits [n, classes]."""
    labels = labels.cpu()
    right, losses = (logits.argmax(-1) == labels).double(), F.cross_entropy(logits, labels, reduction="none").double()
    by_image = {"score": right.numpy(), "loss": -losses.numpy()}
    return Validated(float(right.mean()), -float(F.cross_entropy(logits, labels)), by_image)
