"""Image files in, pixels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from tocom.errors import TocomError

#: How an image gets to the size of the input. crop: the shorter side is scaled to size * 256 / 224, then the centre is
#: cut out, as is usual for testing. squash: both sides are scaled to size, as is usual for VTAB-1k.
Resize = Literal["crop", "squash"]
#: Shorter side before the centre crop, over the side of the crop.
CROP_RATIO = 256 / 224


def open_image(path: str | os.PathLike):
    """Read an image file as a PIL image in RGB.

    Raises:
        TocomError: it is missing, or not an image that Pillow can read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise TocomError(f"{path} is not a readable image ({error}); remove or replace it") from None


def fit_size(image, size: int, resize: Resize = "crop") -> np.ndarray:
    """Scale (bicubic) a PIL image to [3, size, size] uint8."""
    from PIL import Image, ImageOps

    if resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = ImageOps.scale(image, size * CROP_RATIO / min(image.size), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def decode(images: Sequence[Path] | np.ndarray, size: int, resize: Resize = "crop", title: str = "decode"):
    """Decode images to [n, 3, size, size] uint8.

    Args:
        images: paths, or arrays [n, 3, H, W] uint8, which stay as they are if they have the right size.
    """
    from PIL import Image
    from tqdm import tqdm

    decoded = isinstance(images, np.ndarray)
    if decoded and images.shape[-2:] == (size, size):
        return images
    result = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for index, item in enumerate(tqdm(images, desc=title, mininterval=10, leave=False)):
        image = Image.fromarray(item.transpose(1, 2, 0)) if decoded else open_image(item)
        result[index] = fit_size(image, size, resize)
    return result


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Return every image file anywhere below a folder, sorted; by the endings that Pillow knows."""
    from PIL import Image

    endings = Image.registered_extensions()
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
