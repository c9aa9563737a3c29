"""Modules that tuning adds to a ViT's blocks (see :mod:`tocom.tuning`)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class AdaptedMlp(nn.Module):
    """A block's MLP with AdaptFormer's bottleneck beside it (arXiv 2205.13535, section 3.2).

    It stands where ``block.mlp`` stood and gives mlp(x) + scale * up(relu(down(x))), where x is the MLP's own
    (normalised) input, as the paper's equations have it; the public code feeds the bottleneck the input before the
    norm. Drop path and LayerScale of the block act on the sum. At the start the bottleneck adds nothing: ``down`` is
    Kaiming-uniform, all else zero.

    Args:
        mlp: what it wraps. dim: width of the tokens. width: of the bottleneck.
        scale: factor on the bottleneck's output. dropout: on the bottleneck while training.
    """

    def __init__(self, mlp: nn.Module, dim: int, width: int, scale: float, dropout: float):
        super().__init__()
        self.mlp, self.scale, self.dropout = mlp, scale, dropout
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised tokens [B, N, dim] -> [B, N, dim]."""
        hidden = F.dropout(F.relu(self.down(x)), self.dropout, self.training)
        return self.mlp(x) + self.scale * self.up(hidden)


def add_adapters(model: nn.Module, width: int, scale: float, dropout: float) -> None:
    """Put an :class:`AdaptedMlp` in place of every block's MLP of a timm ViT; draws from torch's random state."""
    for block in model.blocks:
        reference = next(block.parameters())
        adapted = AdaptedMlp(block.mlp, model.embed_dim, width, scale, dropout).train(block.training)
        block.mlp = adapted.to(device=reference.device, dtype=reference.dtype)


def describe_adapters(model: nn.Module) -> dict | None:
    """Return a model's adapters as settings of :class:`tocom.settings.TuningSettings`, or None if it has none."""
    blocks = getattr(model, "blocks", None)
    if not blocks or not isinstance(blocks[0].mlp, AdaptedMlp):
        return None
    adapted = blocks[0].mlp
    return {
        "mode": "adaptformer",
        "adapter_width": adapted.down.out_features,
        "adapter_scale": adapted.scale,
        "adapter_dropout": adapted.dropout,
    }
