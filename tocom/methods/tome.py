"""Token merging by bipartite soft matching (ToMe, arXiv 2210.09461, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tocom.merging import Matching, cosines, directions, mean_keys, merge
from tocom.parts import Attention, Compressor, Tokens, descending, ones_like_size


def match(metric: Tensor, count: int, prefix: int) -> Matching:
    """Pair each even token (A) with its most similar odd token (B) and pick the ``count`` most similar pairs.

    Args:
        metric: what tokens are compared by [B, N, C]; the similarity is the cosine.
        count: pairs to merge; at most half of the tokens that are not in the prefix.
        prefix: leading tokens that neither merge nor receive (class, distillation, registers).

    Returns:
        The pairs. After the prefix come the A tokens that stay, ascending; without a prefix by falling similarity, the
        order of the public code, on which depends what the next block pairs. Then comes B.
    """
    batch, n_tokens = metric.shape[:2]
    metric = directions(metric)
    similarity = cosines(metric[:, ::2], metric[:, 1::2])
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
    head = torch.arange(prefix, device=metric.device).expand(batch, -1)
    odd = torch.arange(1, n_tokens, 2, device=metric.device).expand(batch, -1)
    kept = torch.cat([head, 2 * staying[:, in_a:]], dim=1)
    return Matching(2 * merging, partner.gather(1, merging) - in_b, kept, odd[:, in_b:])


class ToMe(Compressor):
    """Merge the ``r`` most similar pairs of tokens, compared by their keys averaged over heads."""

    title = "ToMe"
    reference = "arXiv 2210.09461"

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Merge exactly ``tokens.count`` tokens."""
        size = ones_like_size(tokens.x) if tokens.size is None else tokens.size
        matching = match(mean_keys(attention), tokens.count, tokens.prefix)
        return tokens.now(*merge(tokens.x, size, matching))
