"""Token merging around the MLP alone, for dense prediction (ToCom, arXiv 2408.06798, the ADE20k experiment).

In each block tokens merge before the MLP, and each gets its group's result back after it: attention and the head
see the full grid of patches. The paper gives no formula for how many merge at degree r. Its GFLOPs for ViT-B at
512 x 512 pixels (1,024 patches) tell: 106.2, 91.8, 84.5 and 77.3 at r = 0, 8, 12 and 16 fall by 1.8 a degree, and
the MLPs take 12 * 1024 * 2 * 768 * 3072 = 58.0 G multiply-adds, of which 14.4, 21.7 and 28.9 G are the shares 0.249,
0.374 and 0.498. So degree r is taken to merge the share r / 32 of the patches: a half, the most that a bipartite
matching can merge, at r = 16. This is inferred, not stated in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tocom.degrees import limit
from tocom.merging import Matching, mean_keys, merge
from tocom.methods.tome import ToMe, match
from tocom.parts import Attention, Tokens, gather, ones_like_size
from tocom.settings import Settings

#: Degree r merges r / DEGREES of the patches before each MLP.
DEGREES = 32


def positions(matching: Matching) -> Tensor:
    """Return where each token went: its place [B, N] among the N - r tokens that :func:`tocom.merging.merge` leaves."""
    left, source = matching.left, matching.source
    places = torch.arange(left.shape[1], device=left.device).expand_as(left)
    result = left.new_empty(left.shape[0], left.shape[1] + source.shape[1]).scatter_(1, left, places)
    return result.scatter_(1, source, matching.target + matching.kept.shape[1])


class ToMeMLP(ToMe):
    """Merge the share r / 32 of the patches, as ToMe matches them, before each MLP and restore them after it."""

    title = "ToMe before the MLP"
    reference = "arXiv 2408.06798, ADE20k"
    axis = "32nds of the patches that merge before each MLP"
    restores = True

    @classmethod
    def highest(cls, options: Settings, patches: int) -> int:
        """Return the highest degree: a half of the patches."""
        return DEGREES // 2

    def around_mlp(self, tokens: Tokens, attention: Attention, mlp: Callable[[Tensor], Tensor]) -> Tokens:
        """Add the MLP's branch, computed on merged tokens, to every token; ``tokens.count`` is the degree."""
        merged, restore = self.shrink(tokens, attention)
        return tokens.now(tokens.x + restore(mlp(merged)), tokens.size)

    def shrink(self, tokens: Tokens, attention: Attention) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Merge tokens for the MLP.

        Returns:
            tokens [B, M, D], and a function that gives every one of the N tokens the value of its group
            ([B, M, D] -> [B, N, D]).
        """
        x, prefix = tokens.x, tokens.prefix
        count = min((x.shape[1] - prefix) * tokens.count // DEGREES, limit(x.shape[1], prefix))
        if count <= 0:
            return x, lambda merged: merged
        matching = match(mean_keys(attention), count, prefix)
        merged, _ = merge(x, ones_like_size(x), matching)
        where = positions(matching)
        return merged, lambda merged: gather(merged, where)
