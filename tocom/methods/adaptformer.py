"""AdaptFormer (arXiv 2205.13535): a bottleneck beside each block's MLP; the backbone stays frozen."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.errors import TocomError
from tocom.parts import Tuning, TuningOptions, train_heads
from tocom.settings import Fraction, Positive


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


class AdaptFormerOptions(TuningOptions):
    """Options of :class:`AdaptFormer`."""

    width: Positive = Field(8, description="width of the bottleneck (8 is usual for VTAB-1k)")
    scale: float = Field(0.1, gt=0, description="factor on the bottleneck's output")
    dropout: Fraction = Field(0.1, description="dropout on the bottleneck while training")


class AdaptFormer(Tuning):
    """Train a bottleneck in every block, and the head."""

    Options = AdaptFormerOptions
    title = "AdaptFormer"
    reference = "arXiv 2205.13535"
    trains = "bottlenecks and the head"
    needs = "labelled images of the task"

    def prepare(self, model: nn.Module) -> None:
        """Add the bottlenecks and train them.

        Raises:
            TocomError: the model has some already.
        """
        train_heads(model)
        self.restore(model)
        for block in model.blocks:
            block.mlp.down.requires_grad_(True)
            block.mlp.up.requires_grad_(True)

    def restore(self, model: nn.Module) -> None:
        """Put an :class:`AdaptedMlp` in place of every block's MLP; draws from torch's random state."""
        options = self.options
        for block in model.blocks:
            if isinstance(block.mlp, AdaptedMlp):
                raise TocomError("the model already has AdaptFormer's bottlenecks; start from its backbone")
            reference = next(block.parameters())
            adapted = AdaptedMlp(block.mlp, model.embed_dim, options.width, options.scale, options.dropout)
            block.mlp = adapted.train(block.training).to(device=reference.device, dtype=reference.dtype)
