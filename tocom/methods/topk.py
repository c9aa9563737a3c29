"""The entries of largest absolute value, at the cuts of a pipeline (arXiv 2401.07788, TopK; see tocom.pipeline)."""

from __future__ import annotations

from math import ceil, log2
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tocom.parts import descending, left_of
from tocom.pipeline import FEEDBACK, NUMBER, Pipeline, PipelineOptions, Sent


def largest(x: Tensor, number: int) -> Tensor:
    """Return which ``number`` entries of the last dimension of x [..., n] are largest in absolute value; bool [..., n].

    There are exactly so many; of equal ones the first count.
    """
    chosen = descending(x.detach().abs().flatten(0, -2))[:, :number].view(*x.shape[:-1], number)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))


class TopKOptions(PipelineOptions):
    """Options of :class:`TopK`."""

    backward: Literal["shared", "own", "none"] = Field(
        "shared",
        description="what is sent back. shared: the gradient of the entries that were sent; own: its own largest"
        " entries; none: all of it",
    )
    feedback: Literal["none", "ef", "ef21", "ef_mixed", "aq_sgd"] = Field(
        "none",
        description=f"{FEEDBACK}; ef_mixed: half of the entries are of the activation, half of what was left out",
    )


class TopK(Pipeline):
    """Send the share 1 - d / 16 of the entries of each image."""

    Options = TopKOptions
    title = "TopK"
    reference = "arXiv 2401.07788"
    axis = "16ths of the entries that are not sent between stages"

    def squeeze(self, x: Tensor, count: int) -> Sent:
        """Return x [B, n] with zeros for the entries that are not sent, and which are."""
        return _masked(x, largest(x, left_of(x.shape[-1], count)))

    def size(self, n: int, count: int) -> float:
        """Return the bytes of the entries and of their positions: a bit for each of n, or a number for each sent."""
        number = left_of(n, count)
        return NUMBER * number + min(n, number * ceil(log2(n))) / 8

    def send_back(self, gradient: Tensor, mask: Tensor, count: int) -> Tensor:
        """Return what is sent back of a gradient [B, n]."""
        if self.options.backward == "shared":
            return torch.where(mask, gradient, 0)
        return super().send_back(gradient, mask, count)

    def feed_back(self, x: Tensor, held: Tensor, count: int, fresh: bool) -> tuple[Sent, Tensor]:
        """Return what is sent of x [B, n], and what is held for the next batch."""
        if self.options.feedback != "ef_mixed":
            return super().feed_back(x, held, count, fresh)
        number = left_of(x.shape[-1], count)
        new, old = _masked(x, largest(x, number - number // 2)), _masked(held, largest(held, number // 2))
        return Sent(new.x + old.x, new.mask | old.mask), x + held - new.x - old.x


def _masked(x: Tensor, mask: Tensor) -> Sent:
    return Sent(torch.where(mask, x, 0), mask)
