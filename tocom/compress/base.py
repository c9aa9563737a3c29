"""What a compressor is: a name, what it needs of a model, and what it does in a block."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tocom.degrees import limit


@dataclass(frozen=True)
class Attention:
    """What the attention of one block leaves for a compressor to look at.

    Attributes:
        q, k: queries and keys [B, heads, N, head_dim], as they entered the dot product.
        scale: factor on the logits (head_dim ** -0.5).
        bias: log token size [B, 1, 1, N] that was added to the logits, or None.
        prefix: number of leading tokens that are not patches (class, distillation, registers).
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None
    prefix: int


class Compressor(abc.ABC):
    """Removes tokens between the attention and the MLP of a block.

    Attributes:
        name: what configs and tables call it.
        needs_class_token: whether it can only work on a model with a class token.
        restores: whether every token leaves the block that entered it, so that only the MLP sees fewer of them.
    """

    name: str
    needs_class_token = False
    restores = False

    def __call__(self, x: Tensor, size: Tensor | None, count: int, attention: Attention):
        """Remove ``count`` tokens, or as many as the block may lose.

        Args:
            x: tokens [B, N, D]. size: patches in each token [B, N, 1], or None while all are 1.

        Returns:
            tokens [B, N - r, D] and their sizes (None if nothing tracks them), where
            r = min(count, half of the tokens that are not in the prefix).
        """
        count = min(count, limit(x.shape[1], attention.prefix))
        return self.reduce(x, size, count, attention) if count else (x, size)

    def around_mlp(
        self, x: Tensor, size: Tensor | None, count: int, attention: Attention, mlp: Callable[[Tensor], Tensor]
    ):
        """Finish a block after its attention: compress tokens and add the MLP's branch to them.

        Args:
            x, size, count: as for :meth:`__call__`. mlp: maps tokens [B, M, D] to what is added to them.

        Returns:
            tokens that leave the block and their sizes.
        """
        x, size = self(x, size, count, attention)
        return x + mlp(x), size

    @abc.abstractmethod
    def reduce(self, x: Tensor, size: Tensor | None, count: int, attention: Attention):
        """Remove exactly ``count`` >= 1 tokens; see :meth:`__call__` for the shapes."""


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Select tokens: x [B, N, C], index [B, M] -> [B, M, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if its type is wider: sums over tokens overflow or stall in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ones_like_size(x: Tensor) -> Tensor:
    """Return sizes of 1 [B, N, 1] for tokens x [B, N, D]."""
    return torch.ones_like(x[..., :1])
