"""Token compressors behind one interface; to add one, write a file with a Compressor and list it here."""

from __future__ import annotations

from tocom.compress.base import Attention, Compressor
from tocom.compress.evit import EViT
from tocom.compress.tome import ToMe
from tocom.compress.tome_mlp import ToMeMLP
from tocom.errors import TocomError, suggest

#: Name -> a function that makes the compressor.
COMPRESSORS = {"tome": ToMe, "evit": EViT, "evit_fuse": lambda: EViT(fuse=True), "tome_mlp": ToMeMLP}


def make_compressor(name: str) -> Compressor:
    """Return the compressor called ``name``.

    Raises:
        TocomError: there is none of that name.
    """
    if name not in COMPRESSORS:
        raise TocomError(f"unknown compressor {name!r}{suggest(name, COMPRESSORS)}; known: {', '.join(COMPRESSORS)}")
    return COMPRESSORS[name]()


__all__ = ["COMPRESSORS", "Attention", "Compressor", "EViT", "ToMe", "ToMeMLP", "make_compressor"]
