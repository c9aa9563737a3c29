"""Pruning of the tokens that the class token attends to least (EViT, arXiv 2202.07800, section 3).

EViT prunes in three blocks at a keep rate; here every block removes the same number of tokens, so that merging
and pruning share one degree axis and one number of tokens in every block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tocom.compress.base import Attention, Compressor, gather, widen


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
    order = score.argsort(dim=-1, descending=True, stable=True)
    n_kept = score.shape[1] - count
    return order[:, :n_kept].sort(dim=-1).values, order[:, n_kept:].sort(dim=-1).values


class EViT(Compressor):
    """Prune the ``r`` least attended tokens.

    Args:
        fuse: also replace what is pruned by its average, weighted by class attention (normalised over what is
            pruned); one more token is then pruned, so that the block still loses ``r`` tokens.
    """

    needs_class_token = True

    def __init__(self, fuse: bool = False):
        self.fuse = fuse
        self.name = "evit_fuse" if fuse else "evit"

    def reduce(self, x: Tensor, size: Tensor | None, count: int, attention: Attention):
        """Prune exactly ``count`` tokens; see :class:`~tocom.compress.base.Compressor`."""
        score = class_attention(attention).detach()
        kept, pruned = split(score, count + self.fuse, attention.prefix)
        tokens = gather(x, kept)
        if self.fuse:
            weight = score.gather(1, pruned).unsqueeze(-1)
            weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)  # attention that underflowed to 0 is no 0 / 0
            weight = weight / weight.sum(dim=1, keepdim=True)
            fused = (weight * gather(x, pruned)).sum(dim=1, keepdim=True)
            tokens = torch.cat([tokens, fused.to(x.dtype)], dim=1)
        return tokens, size
