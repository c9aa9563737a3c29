"""Token fusion: early blocks prune, later ones merge and keep the norm (ToFu, arXiv 2312.01026).

Both act on the pairs of plain token merging. Where the response to a mix of two tokens is far from linear, one of them
had better be dropped; averaging suits the other blocks, but shortens tokens, which MLERP undoes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tocom.merging import Matching, mean_keys, merge
from tocom.methods.tome import match
from tocom.parts import Attention, Compressor, Tokens, gather, ones_like_size, widen
from tocom.settings import Settings

#: The mean of a group shorter than this share of its longest member has no direction to speak of, and stays shorter.
SHORTEST = 1e-6


def longest(norm: Tensor, matching: Matching) -> Tensor:
    """Return the largest norm in each receiver's group [B, M], itself included, from the norm of all tokens [B, N]."""
    given = norm.gather(1, matching.source).unsqueeze(1)
    places = torch.arange(matching.receiver.shape[1], device=norm.device)
    into = matching.target.unsqueeze(1) == places.unsqueeze(-1)  # [B, M, r]; exporters know no scatter of the largest
    return torch.maximum(norm.gather(1, matching.receiver), torch.where(into, given, 0).amax(dim=-1))


def fuse(x: Tensor, matching: Matching, scale: Literal["mlerp", "receiver", "none"]) -> Tensor:
    """Replace each receiver by the mean of its group, every member counted once, and scale it.

    The arithmetic is in float32 at least.

    Args:
        x: tokens [B, N, D]. scale: see :class:`ToFuOptions`.

    Returns:
        Tokens [B, N - r, D] of x's type, in the order of ``matching.left``.
    """
    wide = widen(x)
    mean, _ = merge(wide, ones_like_size(wide), matching)
    if scale == "none":
        return mean.to(x.dtype)
    n_kept = matching.kept.shape[1]
    norm = wide.norm(dim=-1)
    largest = longest(norm, matching)
    length = mean[:, n_kept:].norm(dim=-1) if scale == "mlerp" else norm.gather(1, matching.receiver)
    length = length.maximum(SHORTEST * largest).clamp_min(torch.finfo(wide.dtype).tiny)
    receiver = mean[:, n_kept:] * (largest / length).unsqueeze(-1)
    return torch.cat([mean[:, :n_kept], receiver], dim=1).to(x.dtype)


class ToFuOptions(Settings):
    """Options of :class:`ToFu`."""

    pruning_blocks: int | None = Field(
        None,
        ge=0,
        description="how many of the first blocks prune; null: one more than half of them, rounded down",
    )
    scale: Literal["mlerp", "receiver", "none"] = Field(
        "mlerp",
        description="norm of a merged token. mlerp: the largest of its group; receiver: that times the norm of the mean"
        " over the receiver's, as in public code of others; none: that of the mean",
    )
    sizes: bool = Field(
        False,
        description="count the patches that a token stands for, pruned ones too, for proportional attention and average"
        " pooling",
    )


class ToFu(Compressor):
    """Prune or merge the ``r`` tokens that are most similar to another, by the depth of the block."""

    Options = ToFuOptions
    title = "ToFu"
    reference = "arXiv 2312.01026"

    @classmethod
    def label(cls, options: ToFuOptions) -> str:
        """Return what tables call it with these options."""
        blocks = None if options.pruning_blocks is None else f"{options.pruning_blocks} blocks prune"
        scale = {"mlerp": None, "receiver": "receiver's norm", "none": "mean"}[options.scale]
        return cls.noted(blocks, scale, "sizes" if options.sizes else None)

    def prunes(self, block: int) -> bool:
        """Return whether a block prunes."""
        chosen = self.options.pruning_blocks
        return block < (self.shape.depth // 2 + 1 if chosen is None else chosen)

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Remove exactly ``tokens.count`` tokens."""
        x, size = tokens.x, tokens.size
        matching = match(mean_keys(attention), tokens.count, tokens.prefix)
        if self.options.sizes:
            size = ones_like_size(x) if size is None else size
            size = merge(size, size, matching)[1]
        fused = gather(x, matching.left) if self.prunes(tokens.block) else fuse(x, matching, self.options.scale)
        return tokens.now(fused, size)
