"""Checkpoints that ship with the package."""

import os
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
#: Name -> file.
BUNDLED = {"glyph_vit": ASSETS / "glyph_vit.safetensors"}


def resolve(checkpoint: str | os.PathLike) -> Path:
    """Return the file that a checkpoint's name stands for: a bundled one, or a path."""
    return BUNDLED.get(str(checkpoint), Path(checkpoint))
