"""ToCom: low-rank weight updates that describe the gap between degrees (arXiv 2408.06798, section 4).

A compensator holds one low-rank update for each step of one degree, i -> i+1, for the q and the v projection of
every block. The update from degree m to degree n sums the steps between them, with a minus sign when n < m:
P(m->n) = -P(n->m) and P(m->k) + P(k->n) = P(m->n). It is linear in the tokens, so it can be folded into the
fused qkv weight, after which the model costs exactly what it cost before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.errors import TocomError
from tocom.files import digest, load_tensors, save_tensors

#: The projections that a compensator updates, in the order of its second dimension.
PROJECTIONS = ("q", "v")
#: Their place among the three equal parts of a fused qkv weight.
_ROWS = {"q": 0, "k": 1, "v": 2}
FORMAT = 1
_PUBLIC_NAME = re.compile(r"blocks\.(\d+)\.attn\.[qv]_tocom\.adapter_(?:down|up)\.weight")


class Compensator(nn.Module):
    """The parameters of ToCom and their arithmetic.

    Args:
        depth, dim: blocks and width of the backbone.
        steps: the highest degree; there is one update for each step of one degree up to it.
        rank: rank of one step's update.
        compressor: the compressor it is distilled for.
        trained_scale: factor on the update while it is distilled (the public code uses 0.1).
        dropout: dropout on the bottleneck while it is distilled.
        metadata: what else is to be stored with it (backbone, hashes, recipe).

    Attributes:
        down: [depth, 2, steps, rank, dim], Kaiming-uniform. up: [depth, 2, steps, dim, rank], zero at the start.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        steps: int,
        rank: int = 2,
        compressor: str = "tome",
        trained_scale: float = 1.0,
        dropout: float = 0.1,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__()
        if steps < 1 or rank < 1:
            raise TocomError(f"a compensator needs at least one step and rank 1; got steps={steps}, rank={rank}")
        self.depth, self.dim, self.steps, self.rank = depth, dim, steps, rank
        self.compressor, self.trained_scale, self.dropout = compressor, trained_scale, dropout
        self.metadata = dict(metadata or {})
        down = torch.empty(depth * 2 * steps * rank, dim)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self.down = nn.Parameter(down.view(depth, len(PROJECTIONS), steps, rank, dim))
        self.up = nn.Parameter(torch.zeros(depth, len(PROJECTIONS), steps, dim, rank))

    # --- arithmetic -----------------------------------------------------------------------------------------

    def coefficients(self, source: int, target: int) -> Tensor:
        """Return the coefficient of every step in P(source->target): 1, -1 or 0 [steps].

        Raises:
            TocomError: a degree lies outside 0..steps.
        """
        for degree in (source, target):
            if not 0 <= degree <= self.steps:
                raise TocomError(
                    f"degree {degree} is out of range: this compensator was trained for degrees 0 to {self.steps}"
                )
        result = torch.zeros(self.steps, device=self.down.device, dtype=self.down.dtype)
        result[min(source, target) : max(source, target)] = 1.0 if target > source else -1.0
        return result

    def update(self, source: int | Sequence[int], target: int | Sequence[int]) -> Tensor:
        """Return P(source->target) as weights, before any scale.

        Args:
            source, target: one degree for all blocks, or one for each block.

        Returns:
            [depth, 2, dim, dim], rows are outputs: block, projection (q, v), weight to add.
        """
        signs = torch.stack(
            [self.coefficients(m, n) for m, n in zip(self._per_block(source), self._per_block(target), strict=True)]
        )
        return torch.einsum("ls,lpsok,lpski->lpoi", signs, self.up, self.down)

    def _per_block(self, degree: int | Sequence[int]) -> Sequence[int]:
        per_block = (degree,) * self.depth if isinstance(degree, int) else degree
        if len(per_block) != self.depth:
            raise TocomError(f"degree {list(per_block)} has {len(per_block)} entries for {self.depth} blocks")
        return per_block

    def forward(self, block: int, x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the update beside the frozen projection, at the trained scale.

        Args:
            block: index of the block. x: its normalised input [B, N, dim]. signs: from :meth:`coefficients`.

        Returns:
            What to add to the queries and to the values, both [B, N, dim].
        """
        active = signs.nonzero().squeeze(-1)
        coefficients = self.trained_scale * signs[active].view(-1, 1, 1)
        query, value = (
            self._bottleneck(self.down[block, p, active], coefficients * self.up[block, p, active], x)
            for p in range(len(PROJECTIONS))
        )
        return query, value

    def _bottleneck(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        hidden = F.linear(x, down.flatten(0, 1))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        return F.linear(hidden, up.transpose(0, 1).flatten(1))

    # --- fitting a model ------------------------------------------------------------------------------------

    @classmethod
    def for_model(cls, model: nn.Module, steps: int, **settings) -> Compensator:
        """Return a new compensator for a timm ViT; ``settings`` are those of the constructor."""
        return cls(depth=len(model.blocks), dim=model.embed_dim, steps=steps, **settings)

    def check_fits(self, model: nn.Module, compressor: str) -> None:
        """Raise TocomError unless this compensator was made for such a model and compressor."""
        depth, dim = len(model.blocks), model.embed_dim
        if (depth, dim) != (self.depth, self.dim):
            raise TocomError(
                f"this compensator fits a backbone of {self.depth} blocks and width {self.dim},"
                f" not one of {depth} blocks and width {dim}; distil one for this backbone"
            )
        if model.blocks[0].attn.attn_dim != dim:
            raise TocomError("the attention is not as wide as the backbone; a compensator cannot be folded into it")
        if compressor != self.compressor:
            raise TocomError(
                f"this compensator was distilled for {self.compressor!r}, not {compressor!r}; distil one for it"
            )

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write safetensors with every setting and a hash of the parameters as metadata."""
        tensors = {"down": self.down.detach(), "up": self.up.detach()}
        settings = {
            "format": FORMAT,
            "kind": "compensator",
            "depth": self.depth,
            "dim": self.dim,
            "degrees": [0, self.steps],
            "rank": self.rank,
            "compressor": self.compressor,
            "trained_scale": self.trained_scale,
            "dropout": self.dropout,
            "sha256": digest(tensors),
        }
        save_tensors(path, tensors, self.metadata | settings)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Compensator:
        """Read what :meth:`save` wrote.

        Raises:
            TocomError: the file is missing, corrupt, of another kind, or its hash is wrong.
        """
        tensors, meta = load_tensors(path)
        if meta.get("kind") != "compensator":
            raise TocomError(f"{path} holds {meta.get('kind', 'something else')}, not a compensator; check the path")
        if digest(tensors) != meta["sha256"]:
            raise TocomError(f"{path} is corrupt: its parameters do not match their hash; distil it again")
        own = ("depth", "dim", "rank", "compressor", "trained_scale", "dropout")
        rest = {key: value for key, value in meta.items() if key not in (*own, "degrees", "sha256", "kind", "format")}
        result = cls(steps=meta["degrees"][1], metadata=rest, **{key: meta[key] for key in own})
        result.load_state_dict(tensors)
        return result.eval()

    @classmethod
    def from_public(
        cls, path: str | os.PathLike, steps: int = 16, compressor: str = "tome", trained_scale: float = 0.1
    ) -> Compensator:
        """Import a checkpoint in the layout of the paper's public code.

        It holds ``blocks.{l}.attn.{q,v}_tocom.adapter_down.weight`` [steps * k, D] and ``.adapter_up.weight``
        [D, steps * k] under the key ``model``, and counts its steps backwards: P(i->i+1) is group steps - 1 - i.

        Raises:
            TocomError: the file is no such checkpoint, or its pickle holds more than tensors.
        """
        state = _read_public(path)
        groups: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        depth = 1 + max((int(match[1]) for match in map(_PUBLIC_NAME.fullmatch, state) if match), default=-1)
        for block in range(depth):
            for projection in PROJECTIONS:
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                try:
                    groups[block, projection] = state[f"{stem}down.weight"], state[f"{stem}up.weight"]
                except KeyError as error:
                    raise TocomError(f"{path} lacks {error}; it is not a complete public ToCom checkpoint") from None
        if not groups:
            raise TocomError(f"{path} has no q_tocom or v_tocom weights; it is not a public ToCom checkpoint")
        rows, dim = len(groups[0, "q"][0]), len(groups[0, "q"][1])
        if any(down.shape != (rows, dim) or up.shape != (dim, rows) for down, up in groups.values()):
            raise TocomError(f"{path} has weights of unequal shapes; it is not a public ToCom checkpoint")
        if steps < 1 or rows % steps:
            raise TocomError(f"{path} has {rows} rows, which is not a multiple of {steps} steps; give its steps")
        result = cls(depth, dim, steps, rows // steps, compressor, trained_scale, metadata={"imported": True})
        with torch.no_grad():
            for (block, projection), (down, up) in groups.items():
                index = block, PROJECTIONS.index(projection)
                result.down[index] = down.reshape(steps, -1, dim).flip(0)
                result.up[index] = up.reshape(dim, steps, -1).transpose(0, 1).flip(0)
        return result.eval()

    def to_public(self) -> dict[str, Tensor]:
        """Return the parameters in the layout of the paper's public code; see :meth:`from_public`."""
        result = {}
        for block in range(self.depth):
            for index, projection in enumerate(PROJECTIONS):
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                result[f"{stem}down.weight"] = self.down[block, index].flip(0).flatten(0, 1).detach()
                result[f"{stem}up.weight"] = self.up[block, index].flip(0).transpose(0, 1).flatten(1).detach()
        return result


def _read_public(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a .pth with nothing but tensors in it, or a .safetensors file."""
    if os.fspath(path).endswith(".safetensors"):
        return load_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TocomError(f"no such file: {path}; check the path") from None
    except Exception as error:  # torch raises pickle, zip, runtime and end-of-file errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TocomError(f"{path} cannot be read as tensors alone and is refused ({reason})") from None
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise TocomError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


@dataclass
class Folding:
    """An update that has been added to a model's qkv weights, with what is needed to take it out again.

    Unfolding restores the stored rows rather than subtracting, so the weights come back bit for bit.
    """

    model: nn.Module
    originals: list[Tensor]

    @classmethod
    @torch.no_grad()
    def apply(cls, model: nn.Module, update: Tensor, scale: float) -> Folding:
        """Add ``scale * update`` [depth, 2, dim, dim] to the q and v rows of every fused qkv weight."""
        originals = []
        for block, delta in zip(model.blocks, update, strict=True):
            weight = block.attn.qkv.weight
            originals.append(weight.detach().clone())
            parts = weight.detach().view(3, -1, weight.shape[1])
            for projection, part in zip(PROJECTIONS, delta, strict=True):
                rows = parts[_ROWS[projection]]
                rows.copy_((rows.double() + scale * part.to(rows.device).double()).to(rows.dtype))
        return cls(model, originals)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the original weights back."""
        for block, original in zip(self.model.blocks, self.originals, strict=True):
            block.attn.qkv.weight.copy_(original)
