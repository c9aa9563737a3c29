"""Token merging that protects what is isolated among the tokens (PiToMe, arXiv 2405.16148).

The energy of a patch says how many others are like it. Only the patches of the highest energy merge, and neighbours in
the order of energy take opposite sides of the matching, where the plain one takes neighbours in the sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tocom.merging import Matching, cosines, directions, mean_keys, merge
from tocom.parts import Attention, Compressor, Tokens, descending, ones_like_size
from tocom.settings import Settings


def energy(similarity: Tensor, margin: float, alpha: float) -> Tensor:
    """Return the energy [B, T] of patches from the cosine of each with each, itself included [B, T, T]."""
    return F.elu(similarity - margin, alpha).mean(dim=-1)


def match(metric: Tensor, count: int, prefix: int, margin: float, alpha: float, protect: bool) -> Matching:
    """Rank patches by energy, take turns to put them into A and B, and merge A tokens into their most similar B token.

    Args:
        metric: what tokens are compared by [B, N, C]; the similarity is the cosine.
        count: pairs to merge; at most half of the tokens that are not in the prefix.
        prefix: leading tokens that neither merge nor receive, nor count in the energy of others.
        margin, alpha: see :class:`PiToMeOptions`.
        protect: whether A and B are the ``2 * count`` patches of the highest energy, so that all of A merges; if not,
            they are all patches, and the ``count`` most similar pairs merge.

    Returns:
        The pairs. After the prefix come the protected patches by falling energy, then the A tokens that stay, then B.
    """
    metric = directions(metric[:, prefix:])
    similarity = cosines(metric, metric)
    order = descending(energy(similarity, margin, alpha))
    if protect:
        order, protected = order[:, : 2 * count], order[:, 2 * count :]
    else:
        protected = order[:, :0]
    a, b = order[:, ::2], order[:, 1::2]
    rows = similarity.gather(1, a.unsqueeze(-1).expand(-1, -1, similarity.shape[-1]))
    best, partner = rows.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1)).max(dim=-1)
    if not protect:
        ranked = descending(best)
        a, partner = a.gather(1, ranked), partner.gather(1, ranked)
    head = torch.arange(prefix, device=metric.device).expand(metric.shape[0], -1)
    kept = torch.cat([head, prefix + protected, prefix + a[:, count:]], dim=1)
    return Matching(prefix + a[:, :count], partner[:, :count], kept, prefix + b)


class PiToMeOptions(Settings):
    """Options of :class:`PiToMe`."""

    margin: float = Field(
        0.75,
        ge=-1,
        le=1,
        description="cosine above which patches are alike, in the first block; it falls linearly over depth and would"
        " be 0 after the last",
    )
    alpha: float = Field(1.0, gt=0, description="weight of patches that are not alike, in the energy")
    unprotected: Literal["none", "first_half", "second_half", "all"] = Field(
        "none",
        description="blocks in which all patches are matched and the most similar pairs merge; the public code has"
        " first_half for DeiT and second_half for MAE",
    )


class PiToMe(Compressor):
    """Merge ``r`` of the ``2 r`` patches of the highest energy into the others."""

    Options = PiToMeOptions
    title = "PiToMe"
    reference = "arXiv 2405.16148"

    @classmethod
    def label(cls, options: PiToMeOptions) -> str:
        """Return what tables call it with these options."""
        where = {"first_half": "first half unprotected", "second_half": "second half unprotected", "all": "unprotected"}
        return f"{cls.title} ({where[options.unprotected]})" if options.unprotected in where else cls.title

    def margin(self, block: int) -> float:
        """Return the margin of a block."""
        return self.options.margin * (1 - block / self.shape.depth)

    def protects(self, block: int) -> bool:
        """Return whether patches of low energy are left alone in a block."""
        first = 2 * block < self.shape.depth
        return {"none": True, "first_half": not first, "second_half": first, "all": False}[self.options.unprotected]

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Merge exactly ``tokens.count`` tokens."""
        size = ones_like_size(tokens.x) if tokens.size is None else tokens.size
        matching = match(
            mean_keys(attention),
            tokens.count,
            tokens.prefix,
            self.margin(tokens.block),
            self.options.alpha,
            self.protects(tokens.block),
        )
        return tokens.now(*merge(tokens.x, size, matching))
