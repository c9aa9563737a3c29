"""Fewer bits for every entry, at the cuts of a pipeline (arXiv 2401.07788, quantisation; see tocom.pipeline)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from tocom.parts import SIXTEENTHS, widen
from tocom.pipeline import NUMBER, Pipeline, PipelineOptions


def quantised(x: Tensor, bits: int, over: int | tuple[int, ...] = -1) -> Tensor:
    """Return x rounded to the nearest of 2 ** bits values from its smallest to its largest, evenly spaced.

    Args:
        over: dimensions that share the smallest and largest value.
    """
    wide, steps = widen(x), 2**bits - 1
    low, high = wide.amin(over, keepdim=True), wide.amax(over, keepdim=True)
    width = (high - low).clamp_min(1e-30)  # where all are equal, whatever it is divided by
    return (low + (high - low) * (steps * (wide - low) / width).round() / steps).to(x.dtype)


class QuantiseOptions(PipelineOptions):
    """Options of :class:`Quantise`."""

    extremes: Literal["image", "batch"] = Field(
        "image",
        description="whose smallest and largest value the levels lie between, in training; batch: as in the public"
        " code. Evaluation takes each image alone",
    )


class Quantise(Pipeline):
    """Send every entry with 16 - d bits."""

    Options = QuantiseOptions
    title = "quantisation"
    reference = "arXiv 2401.07788"
    axis = "bits fewer than 16 for what is sent between stages"

    @classmethod
    def label(cls, options: QuantiseOptions) -> str:
        """Return what tables call it with these options."""
        return super().label(options) + (" by batches" if options.extremes == "batch" else "")

    def squeeze(self, x: Tensor, count: int) -> Tensor:
        """Return x [B, n] rounded to 16 - count bits."""
        batch = self.training and self.options.extremes == "batch"
        return quantised(x, SIXTEENTHS - count, (0, 1) if batch else -1)

    def size(self, n: int, count: int) -> float:
        """Return the bytes of the levels, and of the smallest and largest value."""
        return n * (SIXTEENTHS - count) / 8 + 2 * NUMBER
