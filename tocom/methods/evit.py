"""Pruning of the tokens that the class token attends to least (EViT, arXiv 2202.07800, section 3).

EViT prunes in three blocks at a keep rate; here every block removes the same number of tokens, so that merging
and pruning share one degree axis and one number of tokens in every block.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tocom.parts import Attention, Compressor, Tokens, descending, gather, widen
from tocom.settings import Settings


def class_attention(attention: Attention) -> Tensor:
    """Return how much the class token attends to each token, averaged over heads [B, N]; rows sum to 1.

    It is in float32 at least: float16 would flush what gets little attention to 0.
    """
    logits = (attention.q[:, :, :1] * attention.scale) @ attention.k.transpose(-1, -2)
    if attention.bias is not None:
        logits = logits + attention.bias
    return widen(logits).softmax(dim=-1).mean(dim=1).squeeze(1)


def split(score: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the positions kept [B, N - count] and pruned [B, count], both ascending; the prefix is always kept."""
    score = score.clone()
    score[:, :prefix] = torch.inf
    order = descending(score)
    n_kept = score.shape[1] - count
    return order[:, :n_kept].sort(dim=-1).values, order[:, n_kept:].sort(dim=-1).values


class EViTOptions(Settings):
    """Options of :class:`EViT`."""

    fuse: Literal["none", "sum", "mean"] = Field(
        "none",
        description="sum: also put in one token for those that are pruned, their sum weighted by class attention, as in"
        " the public code; mean: the same with weights that sum to 1; one more token is then pruned, so that the block"
        " still loses r tokens",
    )


class EViT(Compressor):
    """Prune the ``r`` least attended tokens."""

    Options = EViTOptions
    title = "EViT"
    reference = "arXiv 2202.07800"
    needs_class_token = True

    @classmethod
    def label(cls, options: EViTOptions) -> str:
        """Return what tables call it with these options."""
        return {"none": cls.title, "sum": f"{cls.title} (fused)", "mean": f"{cls.title} (fused, mean)"}[options.fuse]

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Prune exactly ``tokens.count`` tokens."""
        fuse, x = self.options.fuse != "none", tokens.x
        score = class_attention(attention).detach()
        kept, pruned = split(score, tokens.count + fuse, tokens.prefix)
        result = gather(x, kept)
        if fuse:
            weight = score.gather(1, pruned).unsqueeze(-1)
            if self.options.fuse == "mean":
                weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)  # attention that underflowed is no 0 / 0
                weight = weight / weight.sum(dim=1, keepdim=True)
            fused = (weight * gather(x, pruned)).sum(dim=1, keepdim=True)
            result = torch.cat([result, fused.to(x.dtype)], dim=1)
        return tokens.now(result, tokens.size)
