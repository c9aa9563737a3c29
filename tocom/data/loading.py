"""Training images as they are needed: decoded, augmented, and the same whoever asks for them.

What an image becomes depends on (seed, epoch, index) alone, so neither the number of loading processes nor the number
of training processes changes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from tocom.data.images import open_image
from tocom.errors import TocomError
from tocom.seeds import derive_seed, seed_cpu
from tocom.settings import Augmentation


@contextmanager
def own_random_state(*parts: int | str) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's (CPU) generators from ``parts`` for the block, then put them back."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002, timm draws from it
    seed_cpu(*parts)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_rng_state(state[2])


class TrainImages(Dataset):
    """Training images by (epoch, index), augmented by timm.

    Args:
        images: paths, or decoded images [n, 3, H, W] uint8 of any size.
        labels: [n] int64.
        transform: a PIL image in, a normalised tensor [3, H, W] out.
    """

    def __init__(self, images: Sequence[Path] | Tensor, labels: Tensor, transform: Callable, seed: int):
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return image [3, H, W] and label [] for (epoch, index)."""
        epoch, index = key
        image = self.images[index]
        image = to_pil_image(image.cpu()) if isinstance(image, Tensor) else open_image(image)
        with own_random_state(self.seed, "image", epoch, index):
            return self.transform(image), self.labels[index]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


def train_transform(model: nn.Module, settings: Augmentation) -> Callable:
    """Return timm's training transform for a model's input size, mean and standard deviation.

    It is that of DeiT (arXiv 2012.12877, table 9) with bicubic crops.
    """
    from timm.data import auto_augment, create_transform

    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is auto_augment.posterize:
            auto_augment.NAME_TO_OP[name] = posterize
    try:
        return create_transform(
            (3, *model.patch_embed.img_size),
            is_training=True,
            scale=(settings.min_crop, 1.0),
            hflip=settings.horizontal_flip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.auto_augment,
            re_prob=settings.random_erasing,
            re_mode="pixel",
            interpolation="bicubic",
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
        )
    except (AssertionError, ValueError, IndexError) as error:  # all other arguments are checked
        raise TocomError(
            f"auto_augment {settings.auto_augment!r} is no policy that timm knows ({error});"
            " write one such as rand-m9-mstd0.5-inc1, or null"
        ) from None


def posterize(image, bits_to_keep: int, **_):
    """Keep the highest bits of a PIL image's channels, as timm's operation of this name does, and also none of them.

    RandAugment's strongest magnitude keeps none, which makes the image black; Pillow refuses that from version 13 on.
    """
    from PIL import ImageOps

    if bits_to_keep <= 0:
        return image.point(lambda _: 0)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def feed(data: TrainImages, workers: int, pin: bool = False) -> Callable[[int, list[Tensor]], Iterator]:
    """Return a function (epoch, pieces) -> iterator over (images [B, 3, H, W], labels [B]), a batch a piece.

    Args:
        workers: processes that load ahead. pin: page-locked memory, for a GPU.
    """

    def start(epoch: int, pieces: list[Tensor]) -> Iterator:
        keys = [[(epoch, index) for index in piece.tolist()] for piece in pieces]
        # A generator of its own: the loader must not draw from the training's random stream.
        generator = torch.Generator().manual_seed(derive_seed(data.seed, "loader", epoch))
        loader = DataLoader(data, batch_sampler=keys, num_workers=workers, pin_memory=pin, generator=generator)
        return in_one_line(iter(loader))

    return start


def in_one_line(items: Iterator) -> Iterator:
    """Yield what a loader yields; of a TocomError in a loading process, leave its own line, not the traceback above."""
    try:
        yield from items
    except TocomError as error:
        raise TocomError(str(error).rpartition("tocom.errors.TocomError: ")[2]) from None


def mixer(settings: Augmentation, classes: int, label_smoothing: float):
    """Return timm's mixup and cutmix (half of the batches each, if both are on), or None if both are off.

    It maps images [B, 3, H, W] and labels [B] to mixed images and soft targets [B, classes], smoothed labels
    included; B must be even.
    """
    if not settings.mixes:
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=label_smoothing,
        num_classes=classes,
    )
