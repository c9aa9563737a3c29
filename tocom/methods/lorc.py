"""Low-rank keys and values (LoRC, arXiv 2410.03111): what would be cached of a token is a short latent.

The pre-trained projections have a singular value decomposition each; keys and values are replaced by their projection
onto its first directions. Early layers keep more of them: their errors pass through more layers. For ViTs and language
models alike; docs/methods/lorc.md tells the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tocom.degrees import Degree
from tocom.lm import CompressedLM, Layer, TextCompressor
from tocom.parts import SIXTEENTHS, Shape, Share, Tokens, left_of, split_heads
from tocom.settings import Settings

#: Singular values below this share of the largest are taken for this share in condition numbers.
SMALLEST = 1e-6


def directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of what a projection puts out [out, out], the most important first, and singular values.

    In float64 on the CPU, so that every device comes to the same. There are min(out, in) singular values.

    Args:
        weight: of a linear layer [out, in]; keys of several heads count as one.
    """
    out, ins = weight.shape
    left, singular, _ = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=out > ins)
    return left, singular


def log_condition(singular: Tensor) -> float:
    """Return the logarithm of the condition number, from singular values [m], the largest first."""
    largest, smallest = float(singular[0]), float(singular[-1])
    return log(largest / max(smallest, SMALLEST * largest)) if largest else 0.0


def progressive(conditions: Sequence[float], full: int, total: int) -> list[int]:
    """Return the rank of each layer: they fall from d_max to d_min as fewer layers follow (section 3 of the paper).

    With c_l the sum of the log condition numbers of the layers from l on, and t_l = (max c - c_l) / (max c - min c),
    r_l = d_max - (d_max - d_min) t_l. d_max is ``full``, and d_min such that the ranks sum to ``total``; where it would
    be below 1, it is 1 and d_max is less. Fractions go to the largest remainders, so that the sum is exact.

    Args:
        conditions: log condition numbers of each layer's projections to keys and to values, added up.
        total: from the number of layers to ``full`` for each of them.
    """
    n = len(conditions)
    rest = [sum(conditions[layer:]) for layer in range(n)]
    span = rest[0] - rest[-1]
    fall = [(rest[0] - value) / span for value in rest] if span else [0.0] * n
    falls = sum(fall)
    if not falls:
        return shared_out([total / n] * n, total)
    d_max, d_min = float(full), full - (n * full - total) / falls
    if d_min < 1:
        d_max, d_min = (total - falls) / (n - falls), 1.0
    return shared_out([d_max - (d_max - d_min) * t for t in fall], total)


def shared_out(parts: Sequence[float], total: int) -> list[int]:
    """Return falling parts that sum to about ``total`` as whole numbers that do; remainders, then positions, decide."""
    whole = [int(part + 1e-9) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: whole[i] - parts[i])
    more = set(order[: total - sum(whole)])
    return [number + (i in more) for i, number in enumerate(whole)]


def truncate(x: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
    """Return keys or values x [..., out] projected onto directions [out, rank], what lies beyond an offset [out]."""
    return (offset + ((x - offset) @ basis) @ basis.T).to(x.dtype)


def projections(model: nn.Module) -> list[list[tuple[Tensor, Tensor]]]:
    """Return each layer's weight [out, in] and bias [out] to keys, and those to values; 0 where there is no bias."""
    if CompressedLM.takes(model):
        attentions = [layer.self_attn for layer in model.model.layers]
        found = [[(part.weight, part.bias) for part in (attn.k_proj, attn.v_proj)] for attn in attentions]
    else:
        found = [_key_and_value(block.attn.qkv) for block in model.blocks]
    return [[(w, w.new_zeros(len(w)) if bias is None else bias) for w, bias in parts] for parts in found]


def _key_and_value(qkv: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    biases = [None] * 3 if qkv.bias is None else qkv.bias.chunk(3)
    return list(zip(qkv.weight.chunk(3), biases, strict=True))[1:]


class LoRCOptions(Settings):
    """Options of :class:`LoRC`."""

    ranks: Literal["progressive", "uniform"] = Field(
        "progressive",
        description="progressive: early layers keep more, by cumulative condition numbers; uniform: all keep as much",
    )


class LoRC(Share, TextCompressor):
    """Project keys and values onto directions of the pre-trained weights, which stay as they are.

    Attributes:
        width: of the keys, and of the values, of all heads. bases, offsets: directions, and biases, of the projections
            to keys and to values [depth, 2, width, width] and [depth, 2, width]. ranks: by sixteenth [16, depth].
    """

    Options = LoRCOptions
    title = "LoRC"
    reference = "arXiv 2410.03111"
    axis = "16ths of the ranks of keys and values that are dropped"
    reads = ("images", "text")
    needs = "the backbone's weights"

    def __init__(self, options: LoRCOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        depth, self.width = (shape.depth, shape.keys or shape.dim) if shape else (0, 0)
        self.register_buffer("bases", torch.zeros(depth, 2, self.width, self.width))
        self.register_buffer("offsets", torch.zeros(depth, 2, self.width))
        self.register_buffer("ranks", torch.zeros(SIXTEENTHS, depth, dtype=torch.int64))  # 0: of no model yet

    @classmethod
    def label(cls, options: LoRCOptions) -> str:
        """Return what tables call it with these options."""
        return cls.title if options.ranks == "progressive" else f"{cls.title} (uniform ranks)"

    @torch.no_grad()
    def fit_to(self, model: nn.Module) -> None:
        """Take directions, biases and ranks from the first model that it sees, unless they were loaded."""
        layers = projections(model)
        like = layers[0][0][0]
        if like.is_meta or self.ranks.any():
            return
        bases, conditions = [], []
        for layer in layers:
            found = [directions(weight) for weight, _ in layer]
            bases.append(torch.stack([basis.to(like) for basis, _ in found]))
            conditions.append(sum(log_condition(singular) for _, singular in found))
        self.bases = torch.stack(bases)
        self.offsets = torch.stack([torch.stack([bias for _, bias in layer]) for layer in layers]).to(like)
        ranks = [self._ranks(conditions, count) for count in range(SIXTEENTHS)]
        self.ranks = torch.tensor(ranks, device=like.device)

    def _ranks(self, conditions: Sequence[float], count: int) -> list[int]:
        n, full = len(conditions), self.width
        total = max(n, left_of(n * full, count))
        if self.options.ranks == "uniform":
            return shared_out([total / n] * n, total)
        return progressive(conditions, full, total)

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return how many directions each block drops of its keys, and as many of its values."""
        counts = super().counts(degree, depth)
        if not any(counts):
            return counts
        return tuple(self.width - int(self.ranks[count, block]) for block, count in enumerate(counts))

    def kept(self, counts: tuple[int, ...], tokens: int) -> int:
        """Return how many numbers the latents of so many tokens are, all layers together."""
        return 2 * tokens * sum(self.width - count for count in counts)

    def project(self, attn: nn.Module, x: Tensor, tokens: Tokens) -> Sequence[Tensor]:
        """Return a ViT's queries, and its keys and values of the block's rank, all heads as one."""
        if not tokens.count:
            return super().project(attn, x, tokens)
        q, *rest = attn.qkv(x).chunk(3, dim=-1)
        return split_heads(attn, q, *self._truncated(tokens.block, tokens.count, *rest))

    def keep(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a language model's keys and values [B, T, keys] of the layer's rank; keys are not rotated yet."""
        return self._truncated(layer.index, layer.count, k, v) if layer.count else (k, v)

    def _truncated(self, block: int, count: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bases, offsets = self.bases[block, :, :, : self.width - count], self.offsets[block]
        k, v = map(truncate, (k, v), bases, offsets)
        return k, v
