"""A first config for images or a model of one's own (`tocom init`)."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tocom.bundled import ASSETS
from tocom.errors import TocomError
from tocom.study import NAME

_BUNDLED = """\
  # Small and bundled: images are scaled to 32 pixels. `tocom init --model NAME` takes one of timm's.
  - name: glyph_vit
    checkpoint: glyph_vit
"""
_TIMM = """\
  # timm's weights, downloaded; `weights: FILE` takes yours.
  - name: {name}
    timm: {model}
    image_size: {image_size}
    patch_size: {patch_size}
    # Images like those it was pre-trained on, to learn on: a folder, or a data set such as imagenet1k.
    images: {images}
"""


def first_config(path: Path, folder: str | None = None, model: str | None = None) -> str:
    """Return a commented config as YAML.

    Args:
        path: where it will be; its name becomes the study's. folder: images of one's own, a subfolder a class; by
            default bundled images. model: a timm ViT; by default the bundled one.

    Raises:
        TocomError: the name cannot be a study's, there is no such folder, or timm has no such ViT.
    """
    name = path.stem
    if not NAME.fullmatch(name):
        raise TocomError(f"{name!r} cannot name a study: use letters, digits, '_' and '.'")
    if folder is not None and not Path(folder).is_dir():
        raise TocomError(f"no such folder: {folder}; name one that holds a subfolder of images for each class")
    task = f"  - {{name: {_word(name)}, folder: {_quoted(folder)}}}\n" if folder else "  - digits\n"
    backbone, high = (_BUNDLED, 14) if model is None else (_of_timm(model), 16)
    lr, images = ("5.0e-4", 10_000) if model is None else ("5.0e-5", 20_000)
    parts = {"backbone": backbone, "task": task, "high": high, "middle": high // 2, "lr": lr, "images": images}
    text = (ASSETS / "first_config.yaml").read_text(encoding="utf-8")
    return text.format(path=path, name=_quoted(name), **parts)


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", text)


def _quoted(text: str) -> str:
    """Return a text as YAML writes it on one line."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _of_timm(model: str) -> str:
    from tocom.models import create
    from tocom.vit import CompressedViT

    vit = CompressedViT(create(model)).model  # refuses, by name, what cannot be compressed
    sizes = {"image_size": vit.patch_embed.img_size[0], "patch_size": vit.patch_embed.patch_size[0]}
    return _TIMM.format(name=_word(model.partition(".")[0]), model=model, images="imagenet1k", **sizes)
