"""LoRC: keep keys and values in fewer dimensions, progressively more of them in early layers (arXiv 2410.03111).

The projections to keys and to values are cut off after their largest singular values. What is kept of a token is its
coordinates in the bases of these, r numbers a layer for the keys and r for the values, of keys before they are rotated:
rotations lie between the basis and the queries, so keys are expanded, then rotated. Errors of a layer pass through
all later ones, and grow with their condition numbers: early layers keep more. docs/methods/lorc_lm.md tells the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tocom.degrees import Degree, counts
from tocom.errors import TocomError
from tocom.lm import Layer, TextCompressor
from tocom.parts import Shape, widen
from tocom.settings import Settings

#: Degree d keeps the share 1 - d / DEGREES of all ranks.
DEGREES = 16
#: Smallest singular value, over the largest, that a condition number counts.
SMALLEST = 1e-6


def principal(weight: Tensor) -> tuple[Tensor, float]:
    """Return the basis of a linear layer's outputs, most important first, and the log of its condition number.

    Args:
        weight: [out, in].

    Returns:
        orthonormal columns [out, out]: the first r of them span what the best approximation of rank r puts out.
    """
    basis, values, _ = torch.linalg.svd(weight.detach().double(), full_matrices=True)
    return basis, float(torch.log(values[0] / values[-1].clamp(min=SMALLEST * values[0])))


def through_basis(x: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Return what is left of x [..., out] in the first ``rank`` vectors of a basis [out, out]."""
    kept = basis[:, :rank].to(x.dtype)
    return x @ kept @ kept.T


def sensitivity(conditions: Sequence[float]) -> np.ndarray:
    """Return where each layer stands between the most sensitive one (0) and the least (1).

    Args:
        conditions: log of the product of the condition numbers of each layer's projections. A layer's errors pass
            through itself and all later ones: their sum is what counts.
    """
    amplified = np.cumsum(np.asarray(conditions, dtype=float)[::-1])[::-1]
    span = amplified.max() - amplified.min()
    return (amplified.max() - amplified) / span if span > 0 else np.zeros(len(amplified))


def allocate(conditions: Sequence[float], full: int, share: float, progressive: bool = True) -> list[int]:
    """Return the rank of every layer, together the given share of all, each at least 1.

    Layers' ranks fall linearly with :func:`sensitivity` from d_max to d_min. d_max is the full rank, and d_min follows
    from the share; where it would fall below 1, d_min is 1 and d_max follows. Fractions go to the largest remainders,
    so that the sum is that of equal ranks.
    """
    depth = len(conditions)
    total = max(round(share * depth * full), depth)
    places = sensitivity(conditions) if progressive else np.zeros(depth)
    mean, each = places.mean(), total / depth
    wanted = np.full(depth, each)
    if mean > 0:
        lowest = full - (full - each) / mean
        highest = full if lowest >= 1 else min((each - mean) / (1 - mean), full)
        wanted = highest - places * (highest - max(lowest, 1))
    ranks = np.floor(wanted + 1e-9).astype(int)
    for layer in np.argsort(ranks - wanted, kind="stable")[: total - int(ranks.sum())]:
        ranks[layer] += 1
    return ranks.tolist()


class LoRCOptions(Settings):
    """Options of :class:`LoRC`."""

    ranks: Literal["progressive", "uniform"] = Field(
        "progressive", description="early layers keep more, by condition numbers; or all layers keep the same"
    )


class LoRC(TextCompressor):
    """Keep keys and values in the leading singular directions of their projections.

    The bases are those of the weights of the model that it is first put into (the pre-trained one), and stay: a model
    trained at one degree runs at all others.

    Attributes:
        k_basis, v_basis: [depth, keys, keys]. conditions: log of the product of both condition numbers [depth].
    """

    Options = LoRCOptions
    title = "LoRC"
    reference = "arXiv 2410.03111"
    axis = "16ths of the ranks of keys and values that are dropped"
    needs = "the weights of the pre-trained model"

    def __init__(self, options: LoRCOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        size = (shape.depth, shape.keys, shape.keys)
        for name in ("k_basis", "v_basis"):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("conditions", torch.zeros(shape.depth, dtype=torch.float64))
        self.register_buffer("adapted", torch.tensor(False))

    @classmethod
    def label(cls, options: LoRCOptions) -> str:
        """Return what tables call it: the published ranks need no word."""
        return cls.title if options.ranks == "progressive" else f"{cls.title}, {options.ranks} ranks"

    @classmethod
    def highest(cls, options: LoRCOptions, patches: int) -> int:
        """Return the highest degree, which keeps a 16th of the ranks."""
        return DEGREES - 1

    @torch.no_grad()
    def fit_to(self, model: nn.Module) -> None:
        """Take the bases and condition numbers of a model's projections."""
        if next(model.parameters()).is_meta or self.adapted:  # of a model without weights there is nothing to take
            return
        reference = widen(next(model.parameters()))
        self.to(reference.device)
        self.k_basis, self.v_basis = (basis.to(reference.dtype) for basis in (self.k_basis, self.v_basis))
        for index, block in enumerate(model.model.layers):
            k, k_condition = principal(block.self_attn.k_proj.weight)
            v, v_condition = principal(block.self_attn.v_proj.weight)
            self.k_basis[index], self.v_basis[index] = k, v
            self.conditions[index] = k_condition + v_condition
        self.adapted.fill_(True)

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return how many ranks every layer drops; of a list, which has a degree for each, its own share.

        Raises:
            TocomError: a degree is beyond 15.
        """
        degrees, full = counts(degree, depth), self.shape.keys
        if max(degrees) >= DEGREES:
            raise TocomError(f"degree {degree} is out of range: {self.title} goes up to {DEGREES - 1}")
        if not isinstance(degree, int) or degree == 0:
            return tuple(full - max(round((1 - each / DEGREES) * full), 1) for each in degrees)
        progressive = self.options.ranks == "progressive"
        ranks = allocate(self.conditions.tolist(), full, 1 - degree / DEGREES, progressive)
        return tuple(full - rank for rank in ranks)

    def keep(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, T, keys] as they come out of the cache, which leaves biases out."""
        if not layer.count:
            return k, v
        rank, attn = self.shape.keys - layer.count, layer.attn
        cut = [
            through_basis(x, bases[layer.index], rank)
            if linear.bias is None
            else through_basis(x - linear.bias, bases[layer.index], rank) + linear.bias
            for x, linear, bases in ((k, attn.k_proj, self.k_basis), (v, attn.v_proj, self.v_basis))
        ]
        return cut[0], cut[1]

    def kept(self, counts: tuple[int, ...], tokens: int) -> int:
        """Return how many numbers are kept of so many tokens: a rank's worth of each for keys and for values."""
        return 2 * tokens * sum(self.shape.keys - count for count in counts)
