"""Token merging by bipartite soft matching (ToMe, arXiv 2210.09461, section 3)."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tocom.parts import Attention, Compressor, Tokens, descending, gather, ones_like_size, widen


class Matching(NamedTuple):
    """Which tokens of A merge into which tokens of B, as positions in the sequence.

    Attributes:
        source: A tokens that merge [B, r]. target: the B token that each merges into, as an index into B [B, r].
        kept: A tokens that stay [B, len(A) - r]: ascending, so that the prefix stays first; without a prefix by falling
            similarity, the order of the public code, on which depends what the next block pairs.
    """

    source: Tensor
    target: Tensor
    kept: Tensor


def match(metric: Tensor, count: int, prefix: int) -> Matching:
    """Pair each even token (A) with its most similar odd token (B) and pick the ``count`` most similar pairs.

    Similarities are computed in float32 at least, under autocast too: in bfloat16 those close to 1 would tie.

    Args:
        metric: what tokens are compared by [B, N, C]; the similarity is the cosine.
        count: pairs to merge; at most half of the tokens that are not in the prefix.
        prefix: leading tokens that neither merge nor receive (class, distillation, registers).
    """
    metric = F.normalize(widen(metric), dim=-1)
    with _without_autocast(metric.device.type):
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    in_a, in_b = (prefix + 1) // 2, prefix // 2
    if in_a:  # exporters mind writing to nothing
        similarity[:, :in_a] = -torch.inf
    if in_b:
        similarity[:, :, :in_b] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = descending(best)
    merging, staying = order[:, :count], order[:, count:]
    if prefix:
        staying = staying.sort(dim=-1).values
    return Matching(2 * merging, partner.gather(1, merging), 2 * staying)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    available = torch.amp.is_autocast_available(device_type)  # the meta device has none
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def merge(x: Tensor, size: Tensor, matching: Matching, prefix: int) -> tuple[Tensor, Tensor]:
    """Average matched tokens, weighted by size; the sums are taken in float32 at least.

    Args:
        x: tokens [B, N, D]. size: [B, N, 1].

    Returns:
        Tokens [B, N - r, D] and sizes [B, N - r, 1], both of x's type: prefix tokens, then the A tokens that stayed,
        then B.
    """
    odd = torch.arange(1, x.shape[1], 2, device=x.device).expand(x.shape[0], -1)
    wide = widen(size)
    mass = torch.cat([x * wide, wide], dim=-1)  # one pass sums values and sizes alike
    received = gather(mass, matching.source)
    target = matching.target.unsqueeze(-1).expand_as(received)
    merged = gather(mass, odd).scatter_add(1, target, received)
    kept = gather(mass, matching.kept)
    in_a, in_b = (prefix + 1) // 2, prefix // 2
    head = gather(mass, torch.arange(prefix, device=x.device).expand(x.shape[0], -1))
    mass = torch.cat([head, kept[:, in_a:], merged[:, in_b:]], dim=1)
    # Sizes do not depend on any parameter; an attention mask with a gradient would rule out the fused kernel.
    size = mass[..., -1:].detach()
    return (mass[..., :-1] / size).to(x.dtype), size.to(x.dtype)


class ToMe(Compressor):
    """Merge the ``r`` most similar pairs of tokens, compared by their keys averaged over heads."""

    title = "ToMe"
    reference = "arXiv 2210.09461"

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Merge exactly ``tokens.count`` tokens."""
        size = ones_like_size(tokens.x) if tokens.size is None else tokens.size
        matching = match(attention.k.detach().mean(dim=1), tokens.count, tokens.prefix)
        return tokens.now(*merge(tokens.x, size, matching, tokens.prefix))
