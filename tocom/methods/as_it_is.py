"""No tuning: a model that was fine-tuned elsewhere is used as it is."""

from __future__ import annotations

from torch import nn

from tocom.parts import Tuning


class AsItIs(Tuning):
    """Train nothing."""

    title = "as it is"
    reference = "off the shelf"
    needs = "a fine-tuned model (fine_tuned of a task)"
    reads = ("images", "text")
    trains_anything = False

    def prepare(self, model: nn.Module) -> None:
        """Freeze everything."""
        model.requires_grad_(False)
