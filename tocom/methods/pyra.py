"""Token merging with a gate on what is merged, which fine-tuning trains with the model (PYRA, arXiv 2403.09192).

The gate is the identity at the start: an untrained model is one with plain token merging.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.degrees import Degree, limit
from tocom.errors import TocomError
from tocom.merging import mean_keys, merge
from tocom.methods.tome import ToMe, match
from tocom.parts import Attention, Shape, Tokens, gather, ones_like_size, widen
from tocom.settings import Settings


class Gate(nn.Module):
    """Factors on the tokens of one block that merge (PYRA, section 3).

    Of r pairs, the most similar first, M = LayerNorm(source + target) [r, D] says by how much a source is scaled before
    it is added: 1 + w1 w2, w1 = 2 sigmoid(by_rank M) [D], w2 = 2 sigmoid(M by_width) - 1 [r]. by_rank is uniform in
    -1..1 at the start, by_width zero, so all factors are 1. All parameters are vectors, which timm's optimizers never
    decay.

    Args:
        dim: width of the tokens. pairs: most pairs that merge.
    """

    def __init__(self, dim: int, pairs: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.by_width = nn.Parameter(torch.zeros(dim))
        self.register_buffer("start", torch.empty(pairs).uniform_(-1, 1))
        self.change = nn.Parameter(torch.zeros(pairs))

    def by_rank(self) -> Tensor:
        """Return the weight of each rank [pairs]; in eval mode 0 for those that were never trained."""
        weight = self.start + self.change
        return weight if self.training else torch.where(self.change == 0, 0, weight)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the factors [B, r, D] of sums of source and target [B, r, D]."""
        weight, bias, by_width, by_rank = (
            part.to(pair.dtype) for part in (self.norm.weight, self.norm.bias, self.by_width, self.by_rank())
        )
        m = F.layer_norm(pair, pair.shape[-1:], weight, bias, self.norm.eps)
        by_rank = by_rank[: m.shape[1]]
        w1 = 2 * (by_rank.unsqueeze(0) @ m[:, : len(by_rank)]).sigmoid()  # [B, 1, D]
        w2 = 2 * (m @ by_width.unsqueeze(-1)).sigmoid() - 1  # [B, r, 1]
        return 1 + w1 * w2


class PYRA(ToMe):
    """Merge the ``r`` most similar pairs of tokens, the sources scaled by a gate of the block's own."""

    title = "PYRA"
    reference = "arXiv 2403.09192"
    trains = "a gate for every block, with the model"
    needs = "labelled images of the task"

    def __init__(self, options: Settings | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        self.gates = nn.ModuleList()
        if shape is not None:  # as many ranks as any degree can need
            self.gates.extend(Gate(shape.dim, limit(shape.tokens, shape.prefix)) for _ in range(shape.depth))

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return what each of ``depth`` blocks is told to merge.

        Raises:
            TocomError: see :func:`tocom.degrees.counts`; or its gates are for another model.
        """
        if len(self.gates) != depth:
            raise TocomError(f"{self.title} has gates for {len(self.gates)} blocks, but the model has {depth}")
        return super().counts(degree, depth)

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Merge exactly ``tokens.count`` tokens."""
        x, size = tokens.x, ones_like_size(tokens.x) if tokens.size is None else tokens.size
        matching = match(mean_keys(attention), tokens.count, tokens.prefix)
        mass = widen(x) * widen(size)
        receiver = matching.receiver.gather(1, matching.target)
        factor = self.gates[tokens.block](gather(mass, matching.source) + gather(mass, receiver))
        source = matching.source.unsqueeze(-1).expand_as(factor)
        gated = x.scatter(1, source, (gather(x, matching.source) * factor).to(x.dtype))
        return tokens.now(*merge(gated, size, matching))
