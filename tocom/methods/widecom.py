"""WideCom: a compensator of our own that changes every layer of a block (docs/methods/widecom.md).

Wide, as it changes all that a block consists of: each linear layer by a matrix, and each bias and norm by a vector, in
proportion to the distance of the two degrees. It learns to give what the teacher classifies, the normed class token: a
new task goes on from that, and not from the old classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from tocom.distillation import FeatureMatching
from tocom.parts import Shape
from tocom.settings import Positive
from tocom.steps import QKV, LowRank, StepCompensator, StepOptions, Vectors, Whole, draw_low_rank, each_once
from tocom.vit import CompressedViT

#: The linear layers that can be changed; those of the fused qkv layer are parts of it.
LAYERS = (*QKV, "proj", "fc1", "fc2")
#: The name of each layer in a block.
MODULES = dict.fromkeys(QKV, "attn.qkv") | {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
#: The vectors that can be changed: biases of linear layers, norms of the blocks, the norm after the last block.
VECTORS = ("biases", "norms", "last_norm")


class WideComOptions(StepOptions):
    """Options of :class:`WideCom`."""

    rank: Positive | None = Field(None, description="rank of one step's update; null: any, a whole matrix")
    step: Positive | None = Field(
        None,
        description="degrees that one update spans; inside a step, they are interpolated linearly; null: all degrees",
    )
    sources: Literal["any", "zero"] = Field(
        "zero", description="source degrees that are drawn while it is learned: any, or 0 alone"
    )
    need: float = Field(
        2.0, ge=0, description="pairs of degrees are drawn in proportion to their distance to this power"
    )
    layers: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = Field(
        LAYERS, description="linear layers that are updated"
    )
    vectors: tuple[Literal["biases", "norms", "last_norm"], ...] = Field(
        VECTORS,
        description="what gets a vector: the biases of these layers, weight and bias of the norms in the blocks, and of"
        " the norm after the last block",
    )
    feature: float = Field(1.0, ge=0, description="weight of the error of the features (relative mean square)")
    kl: float = Field(0.0, ge=0, description="weight of the divergence of the logits (nats)")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the backbone's MLPs over that of the backbone")

    @field_validator("layers")
    @classmethod
    def _layers_in_order(cls, value):
        return each_once(value, LAYERS, "layers")

    @field_validator("vectors")
    @classmethod
    def _vectors_in_order(cls, value):
        return each_once(value, VECTORS, "vectors")

    @model_validator(mode="after")
    def _something_to_learn(self):
        if not self.layers and not self.vectors:
            raise ValueError("layers and vectors are both empty; give one of them something to change")
        if not self.feature and not self.kl:
            raise ValueError("feature and kl are both 0, so there is no loss; raise one")
        return self


class WideCom(StepCompensator):
    """Updates of linear layers, and vectors for biases and norms.

    Attributes:
        matrix: by layer (that of q, k and v is ``qkv``), as in :class:`tocom.steps.Whole`; or, with a rank,
        down, up: as in :class:`tocom.steps.LowRank`.
        vector: by kind of vector (``norm1_weight``) [depth, steps, length], zero at the start.
    """

    Options = WideComOptions
    title = "WideCom"
    reference = "docs/methods/widecom.md"
    trains = "changes of all linear layers, biases and norms"
    needs = "the backbone's pre-training images, no labels"

    def __init__(self, options: WideComOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        dim, hidden = shape.dim, round(shape.dim * self.options.mlp_ratio)
        sizes = {"attn.qkv": (dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (dim, hidden), "mlp.fc2": (hidden, dim)}
        self.down, self.up, self.matrix, self.vector = (nn.ParameterDict() for _ in range(4))
        for module, layers in self._chosen().items():
            key, (n_in, n_out) = _key(module), sizes[module]
            if self.options.rank is None:
                self.matrix[key] = torch.zeros(shape.depth, len(layers), self.steps, n_out, n_in)
            else:
                drawn = draw_low_rank(shape, len(layers), self.steps, self.options.rank, n_in, n_out)
                self.down[key], self.up[key] = drawn
        lengths = {f"{module}.bias": n_out for module, (_, n_out) in sizes.items()} | {"attn.qkv.bias": 3 * dim}
        names = list(lengths) if "biases" in self.options.vectors else []
        if "norms" in self.options.vectors:
            names += [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
        for name in names:
            self.vector[_key(name)] = torch.zeros(shape.depth, self.steps, lengths.get(name, dim))
        if "last_norm" in self.options.vectors:
            for kind in ("weight", "bias"):
                self.vector[f"last_{kind}"] = torch.zeros(1, self.steps, dim)
        self._names = {_key(name): name for name in names}

    def _chosen(self) -> dict[str, list[str]]:
        """Return the name of a linear layer in a block -> which of its layers are updated."""
        chosen = self.options.layers
        found = dict.fromkeys(MODULES[layer] for layer in chosen)
        return {module: [layer for layer in chosen if MODULES[layer] == module] for module in found}

    def linear(self) -> dict[str, LowRank | Whole]:
        """Return the updates of the linear layers."""
        result = {}
        for module, layers in self._chosen().items():
            key = _key(module)
            of = ((0,), 1) if module != "attn.qkv" else (tuple(map(QKV.index, layers)), len(QKV))
            if key in self.matrix:
                result[module] = Whole(self.matrix[key], *of)
            else:
                result[module] = LowRank(self.down[key], self.up[key], *of)
        return result

    def vectors(self) -> dict[str, Vectors]:
        """Return the changes of biases and norms."""
        result, last = {}, self.shape.depth - 1
        for key, values in self.vector.items():
            if key in self._names:
                for block in range(self.shape.depth):
                    result[f"blocks.{block}.{self._names[key]}"] = Vectors(values, block, block)
            else:
                result[f"norm.{key.removeprefix('last_')}"] = Vectors(values, 0, last)
        return result

    def objective(self, teacher: CompressedViT, student: CompressedViT, whole: bool) -> FeatureMatching:
        """Match features between two degrees that are drawn for every step."""
        self.check_parameters(student)
        return FeatureMatching(teacher, student, self, whole, self.options.feature, self.options.kl)


def _key(name: str) -> str:
    """Return the name of a module or parameter as a key, without dots."""
    return name.removeprefix("attn.").removeprefix("mlp.").replace(".", "_")
