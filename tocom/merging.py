"""What methods that merge tokens share: cosines, which token goes into which, weighted averages, and what it costs."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tocom.degrees import limit
from tocom.parts import Attention, Shape, gather, widen

#: The degree axis of methods for which a degree is a budget, :meth:`BlockCosts.merging`.
BUDGET = "the cost of merging so many tokens in each block"


class Matching(NamedTuple):
    """Which tokens merge into which, as positions in the sequence; together they are all tokens.

    Attributes:
        source: tokens that merge [B, r]. target: what each merges into, as an index into ``receiver`` [B, r].
        kept: tokens that neither merge nor receive, the prefix first [B, K]. receiver: tokens that may receive [B, M].
    """

    source: Tensor
    target: Tensor
    kept: Tensor
    receiver: Tensor

    @property
    def left(self) -> Tensor:
        """The tokens that are left, in the order in which they go on [B, K + M]."""
        return torch.cat([self.kept, self.receiver], dim=1)


def directions(metric: Tensor) -> Tensor:
    """Return what tokens are compared by [B, N, C] with a length of 1, in float32 at least."""
    return F.normalize(widen(metric), dim=-1)


def mean_keys(attention: Attention) -> Tensor:
    """Return the keys averaged over heads [B, N, head_dim], by which ToMe compares tokens; without gradients."""
    return attention.k.detach().transpose(1, 2).mean(dim=2)  # the order in which they lie in memory


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each of the directions a [B, N, C] with each of b [B, M, C] -> [B, N, M].

    They are computed in float32 at least, under autocast too: in bfloat16 those close to 1 would tie.
    """
    without = a.device.type == "meta"  # it has no autocast; to ask torch for it, torch.compile cannot
    with contextlib.nullcontext() if without else torch.autocast(a.device.type, enabled=False):
        return a @ b.transpose(-1, -2)


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Average matched tokens, weighted by size; the sums are taken in float32 at least.

    Args:
        x: tokens [B, N, D]. size: [B, N, 1].

    Returns:
        Tokens [B, N - r, D] and sizes [B, N - r, 1], both of x's type, in the order of ``matching.left``.
    """
    wide = widen(size)
    left, given = gather(wide, matching.left), gather(wide, matching.source)
    target = (matching.target + matching.kept.shape[1]).unsqueeze(-1)
    # Sizes do not depend on any parameter; an attention mask with a gradient would rule out the fused kernel.
    size = left.scatter_add(1, target, given).detach()
    given = gather(x, matching.source) * given
    total = (gather(x, matching.left) * left).scatter_add_(1, target.expand_as(given), given)
    return total.div_(size).to(x.dtype), size.to(x.dtype)


class BlockCosts(NamedTuple):
    """Multiply-adds of the blocks of a ViT, counted as :func:`tocom.compressed.gflops` counts them.

    Attributes:
        attention, mlp: of one token in a block's linear layers, those of its attention and those beside or in its MLP.
    """

    shape: Shape
    attention: int
    mlp: int

    def attending(self, n: Any) -> Any:
        """Return the cost of attention among n tokens, ranking left out."""
        return n * self.attention + 2 * n * n * self.shape.dim

    def ranking(self, n: int) -> int:
        """Return the cost of the class token's attention to n tokens, by which they are ranked."""
        return n * self.shape.dim

    def merging(self, degree: int) -> int:
        """Return the cost of all blocks if each merges ``degree`` tokens by bipartite matching: the budget."""
        total, n = 0, self.shape.tokens
        for _ in range(self.shape.depth):
            count = min(degree, limit(n, self.shape.prefix))
            total += self.attending(n)
            if count:
                total += (n + 1) // 2 * (n // 2) * (self.shape.dim // self.shape.heads)
            n -= count
            total += n * self.mlp
        return total
