"""What the stages of a simulated pipeline send each other, compressed (arXiv 2401.07788): cuts, gradients, feedback.

A model is cut after some of its blocks. At a cut, what the block leaves is replaced by what an operator makes of it,
and in training the gradient on its way back by what the operator makes of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tocom import distributed
from tocom.compressed import Compressed
from tocom.errors import TocomError
from tocom.parts import SIXTEENTHS, Attention, Shape, Share, Tokens
from tocom.settings import Settings

#: Bytes of a number that is sent as it is.
NUMBER = 4
FEEDBACK = (
    "error feedback of the activations, in training alone. ef: what one step left out is added in the next; ef21: only"
    " the change against what was sent last is compressed; aq_sgd: that, and the first batch is sent whole"
)


class PipelineOptions(Settings):
    """What every operator can be told."""

    cuts: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        None, description="blocks, from 0, after which the model is cut; null: after one and two thirds of them"
    )
    backward: Literal["own", "none"] = Field(
        "own", description="what is sent back. own: the gradient, compressed like an activation; none: all of it"
    )
    backward_degree: Annotated[int, Field(ge=0, lt=SIXTEENTHS)] | None = Field(
        None, description="degree of gradients (backward: own) wherever activations have one; null: the same degree"
    )
    feedback: Literal["none", "ef", "ef21", "aq_sgd"] = Field("none", description=FEEDBACK)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.backward_degree is not None and self.backward != "own":
            raise ValueError("backward_degree goes with backward: own; leave it out")
        return self


class Sent(NamedTuple):
    """What is sent [B, n] in place of a tensor, and of an operator that selects which entries [B, n] it is."""

    x: Tensor
    mask: Tensor | None = None


class Pipeline(Share):
    """A compressor that acts at the cuts of a pipeline, after a block's MLP; see :class:`PipelineOptions`."""

    Options = PipelineOptions
    saves = "bytes sent between stages"
    needs = "nothing, but it adapts in fine-tuning"

    def __init__(self, options: PipelineOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        self.cuts = _cuts(self.options.cuts, shape.depth) if shape else ()
        if self.options.feedback != "none":
            for cut in self.cuts:  # of the last batch, so no part of what is kept of a model
                self.register_buffer(f"feedback_{cut}", torch.empty(0), persistent=False)

    @classmethod
    def label(cls, options: PipelineOptions) -> str:
        """Return what tables call it with these options."""
        usual = options.backward == cls.Options().backward
        back = None if usual else "gradients whole" if options.backward == "none" else f"{options.backward} gradients"
        milder = None if options.backward_degree is None else f"gradients at {options.backward_degree}"
        feedback = None if options.feedback == "none" else options.feedback.replace("_", "-").upper()
        return cls.noted(back, milder, feedback)

    def squeeze(self, x: Tensor, count: int) -> Tensor | Sent:
        """Return what is sent of tensors x [B, n], image by image, without ``count`` sixteenths."""
        raise NotImplementedError

    def size(self, n: int, count: int) -> float:
        """Return the bytes that are sent of ``n`` numbers without ``count`` >= 1 sixteenths."""
        raise NotImplementedError

    def cost(self, model: Compressed) -> float:
        """Return the bytes that one image takes at all cuts, forward, with 4 bytes for a number sent as it is."""
        counts, n = self.counts(model.degree, self.shape.depth), self.shape.tokens * self.shape.dim
        return sum(self.size(n, counts[cut]) if counts[cut] else NUMBER * n for cut in self.cuts)

    def around_mlp(self, tokens: Tokens, attention: Attention, mlp: Callable[[Tensor], Tensor]) -> Tokens:
        """Add the MLP's branch, and send the block's result on if the model is cut here."""
        x = tokens.x + mlp(tokens.x)
        if tokens.count and tokens.block in self.cuts:
            x = self.send(x.flatten(1), tokens.count, tokens.block).view_as(x)
        return tokens.now(x, tokens.size)

    def send(self, x: Tensor, count: int, cut: int) -> Tensor:
        """Return what arrives of x [B, n]; its gradient is what is sent back of the gradient of what arrives."""
        with torch.no_grad():
            feedback = self.training and self.options.feedback != "none"
            sent = self._with_feedback(x, count, f"feedback_{cut}") if feedback else _sent(self.squeeze(x, count))
        if not torch.is_grad_enabled():
            return sent.x
        back = self.options.backward_degree
        return _Cut.apply(x, sent.x, sent.mask, self, count if back is None else back)

    def send_back(self, gradient: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """Return what is sent back of a gradient [B, n], if the forward pass sent the entries of a mask."""
        if self.options.backward == "none" or not count:
            return gradient
        return _sent(self.squeeze(gradient, count)).x

    def _with_feedback(self, x: Tensor, count: int, name: str) -> Sent:
        """Send x [B, n] with what the buffer of that name holds; a batch of another shape starts without it.

        Raises:
            TocomError: several processes train, whose states know the buffers of one alone.
        """
        if distributed.world_size() > 1:
            raise TocomError(f"{self.title}: feedback belongs to the batches of one process; train with one")
        held = getattr(self, name)
        fresh = held.shape != x.shape
        held = torch.zeros_like(x) if fresh else held
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing computes the block once more
            return Sent(x, torch.ones_like(x, dtype=torch.bool))
        sent, left = self.feed_back(x, held, count, fresh)
        setattr(self, name, left)
        return sent

    def feed_back(self, x: Tensor, held: Tensor, count: int, fresh: bool) -> tuple[Sent, Tensor]:
        """Return what is sent of x [B, n], and what is held for the next batch [B, n].

        Args:
            held: zeros if it is ``fresh``.
        """
        how = self.options.feedback
        if how == "ef":
            sent = _sent(self.squeeze(x + held, count))
            return sent, x + held - sent.x
        if how == "aq_sgd" and fresh:
            return Sent(x, torch.ones_like(x, dtype=torch.bool)), x
        change = _sent(self.squeeze(x - held, count))
        return Sent(held + change.x, change.mask), held + change.x


class _Cut(torch.autograd.Function):
    """Let a tensor arrive as what was sent of it, and its gradient as what is sent back of that."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: Tensor, mask: Tensor | None, pipeline: Pipeline, count: int) -> Tensor:
        ctx.mask, ctx.pipeline, ctx.count = mask, pipeline, count
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.pipeline.send_back(gradient, ctx.mask, ctx.count), None, None, None, None


def _sent(squeezed: Tensor | Sent) -> Sent:
    return squeezed if isinstance(squeezed, Sent) else Sent(squeezed)


def _cuts(chosen: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Return the blocks after which a model is cut, ascending."""
    thirds = {depth // 3 - 1, 2 * depth // 3 - 1} - {-1}
    found = tuple(sorted(thirds if chosen is None else set(chosen)))
    if not found or found[-1] > depth - 2:
        at = f"0 to {depth - 2}" if depth > 1 else "none"
        raise TocomError(f"a model of {depth} blocks cannot be cut after {list(found)}; set cuts to some of {at}")
    return found
