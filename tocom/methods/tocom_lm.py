"""ToCom for language models: low-rank updates of a layer's linear maps for every step of one degree.

The compensator of arXiv 2408.06798, section 4, carried over to Llama's layers, of which it changes all by default. It
is learned on the text that the model was pre-trained on, by the divergence of the student's next-token distributions
from the teacher's. docs/methods/tocom_lm.md tells the rest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from torch import nn

from tocom.parts import Shape
from tocom.settings import Positive
from tocom.steps import LowRank, StepCompensator, StepOptions, draw_low_rank, each_once

#: Linear maps of a layer -> their names in it.
MODULES = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
MODULES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


class ToComLMOptions(StepOptions):
    """Options of :class:`ToComLM`."""

    layers: Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Field(min_length=1)] = Field(
        tuple(MODULES), description="linear maps that are updated"
    )
    rank: Positive = Field(4, description="rank of one step's update")

    @field_validator("layers")
    @classmethod
    def _each_once_in_order(cls, value):
        return each_once(value, tuple(MODULES), "layers")


class ToComLM(StepCompensator):
    """Low-rank updates of linear maps.

    Attributes:
        down, up: linear map -> factors of its updates, as in :class:`tocom.steps.LowRank`.
    """

    Options = ToComLMOptions
    title = "ToCom"
    reference = "arXiv 2408.06798, on language models"
    trains = "low-rank updates of all linear maps for every step of one degree"
    needs = "the text that the model was pre-trained on"
    reads = ("text",)
    blocks = "model.layers"

    def __init__(self, options: ToComLMOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        ins = dict.fromkeys(MODULES, shape.dim) | {"o": shape.queries, "down": shape.hidden}
        outs = {"q": shape.queries, "k": shape.keys, "v": shape.keys, "o": shape.dim}
        outs |= {"gate": shape.hidden, "up": shape.hidden, "down": shape.dim}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in self.options.layers:
            drawn = draw_low_rank(shape, 1, self.steps, self.options.rank, ins[name], outs[name])
            self.down[name], self.up[name] = drawn

    def linear(self) -> dict[str, LowRank]:
        """Return the updates of the linear maps."""
        return {MODULES[name]: LowRank(self.down[name], self.up[name]) for name in self.options.layers}
