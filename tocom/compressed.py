"""A model behind a compressor: its degree, the compensator that is folded in, and what stages ask of it.

One subclass a family of models: :mod:`tocom.vit`, :mod:`tocom.lm`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tocom.degrees import Degree
from tocom.errors import TocomError
from tocom.folding import Folding, check_deltas
from tocom.parts import Compensator, Compressor, Shape, make_part


class Compressed(nn.Module, ABC):
    """A model that is compressed as it runs, at a degree that can be changed at any time.

    Args: see the subclasses.

    Attributes:
        reads: "images" or "text". shape: what parts may need to know of the model.

    Raises:
        TocomError: the compressor is for models that read something else, or the degree is malformed.
    """

    reads: ClassVar[str]

    def __init__(
        self, model: nn.Module, compressor: str | dict[str, Any] | Compressor, degree: Degree, max_degree: int
    ):
        super().__init__()
        self.model = model
        self.shape = self.shape_of(model)
        self.depth = self.shape.depth
        self.compressor: Compressor = make_part("compressor", compressor, self.shape, max_degree)
        if self.reads not in self.compressor.reads:
            raise TocomError(
                f"{self.compressor.title} is for models that read {' or '.join(self.compressor.reads)}, and"
                f" {type(model).__name__} reads {self.reads}; use another compressor (`tocom methods`)"
            )
        self.compressor.train(model.training)
        self.compressor.fit_to(model)
        self.source_degree = degree
        self.compensator: Compensator | None = None
        self.scale = 0.0
        self._folding: Folding | None = None
        self._set_counts(degree)

    # --- what stages ask of a family of models --------------------------------------------------------------

    @classmethod
    @abstractmethod
    def takes(cls, model: nn.Module) -> bool:
        """Return whether a model is of this family."""

    @classmethod
    @abstractmethod
    def shape_of(cls, model: nn.Module) -> Shape:
        """Return what parts may need to know of a model."""

    @classmethod
    @abstractmethod
    def geometry(cls, model: nn.Module) -> tuple:
        """Return what a fine-tuned model shares with its backbone."""

    @classmethod
    @abstractmethod
    def outputs(cls, model: nn.Module) -> int:
        """Return how many classes or tokens a model's logits are of; 0 if it has none."""

    @classmethod
    def run_as(cls, model: nn.Module) -> dict[str, Any]:
        """Return what a compensator's file has to say of how the model is run, which another may be run otherwise."""
        return {}

    @classmethod
    def how(cls, about: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by which a checkpoint's metadata say that it is to be run."""
        return {}

    @staticmethod
    @abstractmethod
    def inputs(batch: Tensor, model: nn.Module) -> Tensor:
        """Return what a model takes of a batch in uint8, as it is stored."""

    @abstractmethod
    def example(self, batch_size: int, size: Any = None) -> Tensor:
        """Return a random input, always the same one, of a size or of the model's own."""

    def cache_bytes(self) -> int | None:
        """Return the bytes of keys and values that reading a full context keeps; None of what keeps none."""
        return None

    # --- degree and compensator -----------------------------------------------------------------------------

    @property
    def degree(self) -> Degree:
        """The degree that the model runs at now."""
        return self._degree

    def _set_counts(self, degree: Degree) -> None:
        self._counts = self.compressor.counts(degree, self.depth)
        self._degree = degree

    def attach(self, compensator: Compensator, scale: float | None = None) -> Self:
        """Use ``compensator`` from now on whenever the degree is not the source degree.

        It is folded into the weights of ``model``, which must not be saved then: ``detach()`` first. The compensator
        itself becomes no part of this module: its parameters are not among ``parameters()`` or in ``state_dict()``.

        Args:
            scale: factor on the weight update; by default the one that the compensator was trained at.

        Raises:
            TocomError: it was made for another architecture, another compressor or lower degrees; the model then
                stays as it was.
        """
        compensator.check_fits(self)
        deltas = compensator.deltas(self.source_degree, self._degree)
        check_deltas(self.model, deltas)
        self.detach()
        object.__setattr__(self, "compensator", compensator)  # past nn.Module, which would make it a submodule
        self.scale = compensator.trained_scale if scale is None else scale
        self._folding = Folding.apply(self.model, deltas, self.scale)
        return self

    def detach(self) -> Self:
        """Forget the compensator; the weights are again, bit for bit, what they were."""
        self._unfold()
        self.compensator = None
        return self

    def set_degree(self, degree: Degree, scale: float | None = None) -> Self:
        """Run at ``degree`` from now on, with the attached compensator (if any) folded in for it.

        Args:
            scale: factor on the weight update from now on; by default the one in use.

        Raises:
            TocomError: the degree is malformed, or beyond what the compensator was trained for; the model then
                stays as it was.
        """
        scale = self.scale if scale is None else scale
        self.compressor.counts(degree, self.depth)  # refuses what is malformed before anything is changed
        if self.compensator is not None:
            deltas = self.compensator.deltas(self.source_degree, degree)
            self._unfold()
            self._folding = Folding.apply(self.model, deltas, scale)
            self.scale = scale
        self._set_counts(degree)
        return self

    def _unfold(self) -> None:
        if self._folding is not None:
            self._folding.undo()
            self._folding = None


@torch.no_grad()
def gflops(model: Compressed, size: Any = None) -> float:
    """Count the cost of one input at the present degree, matching or ranking included.

    Args:
        size: of an image (height, width) in pixels; by default of the model's own input.

    Returns:
        Billions of multiply-adds (the "GFLOPs" of the ViT literature), from torch's FlopCounterMode.
    """
    from torch.utils.flop_counter import FlopCounterMode

    example, training = model.example(1, size), model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(example)
    model.train(training)
    return counter.get_total_flops() / 2 / 1e9


def cost(model: Compressed) -> float:
    """Return what one input takes at the present degree of what the compressor ``saves``, in that unit."""
    own = model.compressor.cost(model)
    return gflops(model) if own is None else own
