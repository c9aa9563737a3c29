"""Adding a compensator's changes to a model's weights and taking them out again, bit for bit.

Knows names of parameters, not of methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tocom.errors import TocomError

#: The attribute by which a model tells that changes other than zero are folded into it.
_MARK = "_tocom_folded"


@dataclass
class Folding:
    """Changes that have been added to a model's parameters, with what is needed to take them out again.

    Unfolding restores the stored values rather than subtracting, so they come back bit for bit. Until then the model
    says so itself (:func:`is_folded`): whoever saves it would save the compensator with it.
    """

    model: nn.Module
    originals: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def apply(cls, model: nn.Module, deltas: dict[str, Tensor], scale: float) -> Folding:
        """Add ``scale * change`` to each named parameter, computed in float64.

        Raises:
            TocomError: the model has no such parameter, or one of another shape; nothing is changed then.
        """
        check_deltas(model, deltas)
        originals = {}
        for name, delta in deltas.items():
            parameter = model.get_parameter(name)
            originals[name] = parameter.detach().clone()
            parameter.copy_(changed(parameter, delta, scale))
        mark(model, bool(scale) and any(bool(delta.any()) for delta in deltas.values()))
        return cls(model, originals)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the original parameters back."""
        for name, original in self.originals.items():
            self.model.get_parameter(name).copy_(original)
        mark(self.model, False)


@torch.no_grad()
def changed(parameter: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Return ``parameter + scale * delta``, computed in float64, in the parameter's own type."""
    wide = parameter.detach().double() + scale * delta.to(parameter.device).double()
    return wide.to(parameter.dtype)


def check_deltas(model: nn.Module, deltas: dict[str, Tensor]) -> None:
    """Raise TocomError unless a model has all these parameters, of these shapes."""
    parameters = dict(model.named_parameters())
    for name, delta in deltas.items():
        if name not in parameters:
            raise TocomError(f"the compensator changes {name}, which the model has not; learn one for this model")
        if parameters[name].shape != delta.shape:
            raise TocomError(
                f"the compensator's change of {name} has shape {list(delta.shape)}, the model's"
                f" {list(parameters[name].shape)}; learn one for this model"
            )


def mark(model: nn.Module, folded: bool) -> None:
    """Have a model say whether a compensator is folded into its weights."""
    setattr(model, _MARK, folded)


def is_folded(model: nn.Module) -> bool:
    """Return whether a compensator is folded into the weights of a timm ViT at this moment."""
    return getattr(model, _MARK, False)
