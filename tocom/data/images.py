"""Image files in, pixels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from tocom.errors import TocomError

#: How an image gets to the size of the input. crop: the shorter side is scaled to size * 256 / 224, then the centre is
#: cut out, as is usual for testing. squash: both sides are scaled to size, as is usual for VTAB-1k.
Resize = Literal["crop", "squash"]
#: Shorter side before the centre crop, over the side of the crop.
CROP_RATIO = 256 / 224
#: Formats whose endings Pillow knows, but that it only writes, only recognises, or hands to another program (EPS is a
#: program itself, which Ghostscript would run).
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
#: Most times that an image may be longer than it is wide: 1 x 100,000 pixels, the short side scaled to 256, take 20 GB.
_LONGEST = 1_000


@contextmanager
def opened(path: str | os.PathLike):
    """Open an image file with Pillow (the header; pixels are read as needed); damage is an error of one line."""
    from PIL import Image

    try:
        if not Path(path).is_file():  # a pipe would wait for ever
            raise OSError("it is no file" if os.path.lexists(path) else "there is no such file")
        with Image.open(path) as image:
            if image.format in _NOT_READ:
                raise OSError(f"{image.format} is not read")
            yield image
    except TocomError:
        raise
    except Exception as error:  # the readers of damaged files have no common base for their errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TocomError(f"{path} is not a readable image ({reason}); remove or replace it") from None


def open_image(path: str | os.PathLike):
    """Read an image file as a PIL image in RGB; 16 bits of grey become 8.

    Raises:
        TocomError: it is missing, not an image that Pillow can read, too large or too long, or its pixels have no known
            range.
    """
    from PIL import Image

    with opened(path) as image:
        if max(image.size) > _LONGEST * min(image.size):
            raise TocomError(f"{path} is a strip of {image.size[0]:,} x {image.size[1]:,} pixels; cut or remove it")
        image.load()
        if image.mode.startswith("I;16"):  # convert() would clip to 255, which leaves white
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.mode not in ("I", "F"):
            return image.convert("RGB")
    raise TocomError(f"{path} has pixels of 32 bits, whose range is not known; save it with 8 bits a channel")


def fit_size(image, size: int, resize: Resize = "crop") -> np.ndarray:
    """Scale (bicubic) a PIL image to [3, size, size] uint8."""
    from PIL import Image

    if resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        # Rounded as torchvision's Resize and CenterCrop do, which the published recipes evaluate with.
        shorter = int(size * CROP_RATIO)
        sides = [int(shorter * side / min(image.size)) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2.0) for side in image.size)
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
    """Return every image file anywhere below a folder, sorted; by the endings that Pillow reads."""
    from PIL import Image

    endings = {ending for ending, format_ in Image.registered_extensions().items() if format_ not in _NOT_READ}
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings and path.is_file())
