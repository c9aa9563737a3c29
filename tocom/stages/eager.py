"""ToMe in a timm ViT as anyone would write it first: the yardstick of `tocom benchmark`, and of tests.

Attention is spelled out (scores, log sizes, softmax, values), tokens are merged in the type that they have, by one
gather and scatter for the tokens and another for the sizes (arXiv 2210.09461, section 3 and appendix D). It shares no
code with :mod:`tocom.vit` and :mod:`tocom.merging`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tocom.errors import TocomError


class EagerToMe(nn.Module):
    """A plain ViT of timm (class token, no q/k norm, no gate) that merges ``degree`` pairs of tokens in every block.

    The model's own weights and modules are used, where they are.

    Raises:
        TocomError: it is another ViT, whose pass would not be the one that is compared with.
    """

    def __init__(self, model: nn.Module, degree: int = 0):
        super().__init__()
        norms = (getattr(block.attn, name, None) for block in model.blocks for name in ("q_norm", "k_norm", "norm"))
        if model.num_prefix_tokens != 1 or not all(isinstance(norm, nn.Identity | None) for norm in norms):
            raise TocomError(
                "the eager reference is of a plain ViT, with a class token and no norm of queries and keys; benchmark"
                " one, such as deit_base_patch16_224"
            )
        self.model, self.degree = model, degree

    def set_degree(self, degree: int) -> EagerToMe:
        """Merge so many pairs in every block from now on."""
        self.degree = degree
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, H, W] -> logits [B, classes]."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = None
        for block in model.blocks:
            attended, keys = self._attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(attended))
            pairs = min(self.degree, (x.shape[1] - model.num_prefix_tokens) // 2)
            if pairs:
                x, size = _merge_pairs(x, size, keys, pairs)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))

    @staticmethod
    def _attend(attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the attention's output [B, N, D], and the keys, averaged over heads [B, N, head_dim]."""
        batch, n_tokens, width = x.shape
        heads = attn.qkv(x).reshape(batch, n_tokens, 3, attn.num_heads, width // attn.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        weights = attn.attn_drop(scores.softmax(dim=-1))
        y = (weights @ v).transpose(1, 2).reshape(batch, n_tokens, width)
        return attn.proj_drop(attn.proj(y)), k.mean(dim=1)


def _merge_pairs(x: Tensor, size: Tensor | None, keys: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Merge the most similar pairs of an even and an odd token; the class token (the first) stays as it is."""
    with torch.no_grad():
        keys = keys / keys.norm(dim=-1, keepdim=True)
        similarity = keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)
        similarity[:, 0] = -torch.inf
        best, partner = similarity.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        merging, staying = order[:, :pairs], order[:, pairs:].sort(dim=-1).values
        target = partner.gather(1, merging)

    def joined(values: Tensor) -> Tensor:
        """Sum values [B, N, C] over the tokens that become one."""
        even, odd = values[:, ::2], values[:, 1::2]

        def wide(index: Tensor) -> Tensor:
            return index.unsqueeze(-1).expand(-1, -1, values.shape[-1])

        odd = odd.scatter_reduce(1, wide(target), even.gather(1, wide(merging)), reduce="sum")
        return torch.cat([even.gather(1, wide(staying)), odd], dim=1)

    size = torch.ones_like(x[..., :1]) if size is None else size
    merged, sizes = joined(x * size), joined(size)
    return merged / sizes, sizes
