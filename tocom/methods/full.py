"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from torch import nn

from tocom.parts import Tuning, TuningOptions


class Full(Tuning):
    """Train all weights."""

    title = "full fine-tuning"
    reference = "common practice"
    trains = "all weights"
    needs = "labelled images of the task, or its text"
    reads = ("images", "text")

    @classmethod
    def label(cls, options: TuningOptions) -> str:
        """Return how degrees are drawn alone: it is what tables mean where they name no tuning."""
        return super().label(options).removeprefix(cls.title).removeprefix(", ")

    def prepare(self, model: nn.Module) -> None:
        """Train every parameter."""
        model.requires_grad_(True)
