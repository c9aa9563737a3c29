"""ToCom: low-rank weight updates that describe the gap between degrees (arXiv 2408.06798, section 4).

A compensator holds one low-rank update for each step of one degree, i -> i+1, for the q and the v projection of
every block (ablations: for other projections, and for steps of several degrees). The update from degree m to degree n
sums the steps between them, with a minus sign when n < m: P(m->n) = -P(n->m) and P(m->k) + P(k->n) = P(m->n). It is
linear in the tokens, so it can be folded into the fused qkv weight, after which the model costs exactly what it cost
before.
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

#: The three equal parts of a fused qkv weight, in their order there.
QKV = ("q", "k", "v")
#: The projections that the paper's compensator updates.
PROJECTIONS = ("q", "v")
FORMAT = 1
#: The attribute by which a model tells that an update other than zero is folded into it.
_MARK = "_tocom_folded"
_PUBLIC_NAME = re.compile(r"blocks\.(\d+)\.attn\.(\w+)_tocom\.adapter_(?:down|up)\.weight")


class Compensator(nn.Module):
    """The parameters of ToCom and their arithmetic.

    Args:
        depth, dim: blocks and width of the backbone.
        steps: number of updates; see :meth:`for_model` to give the highest degree instead.
        rank: rank of one step's update.
        compressor: the compressor it is distilled for.
        trained_scale: factor on the update while it is distilled (the public code uses 0.1).
        dropout: dropout on the bottleneck while it is distilled.
        metadata: what else is to be stored with it (backbone, hashes, recipe).
        projections: which of "q", "k" and "v" it updates, P of them; kept in that order.
        step: degrees that one update spans; inside a step, degrees are interpolated linearly.
        max_degree: the highest degree, by default ``steps * step``. The last update may reach beyond it.

    Attributes:
        down: [depth, P, steps, rank, dim], Kaiming-uniform. up: [depth, P, steps, dim, rank], zero at the start.

    Raises:
        TocomError: a number is below 1, the steps do not end at the highest degree, or there is no such projection.
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
        projections: Sequence[str] = PROJECTIONS,
        step: int = 1,
        max_degree: int | None = None,
    ):
        super().__init__()
        if steps < 1 or rank < 1:
            raise TocomError(f"a compensator needs at least one step and rank 1; got steps={steps}, rank={rank}")
        max_degree = steps * step if max_degree is None else max_degree
        if step < 1 or _n_steps(max_degree, step) != steps:
            raise TocomError(
                f"{steps} steps of {step} degrees do not end at degree {max_degree};"
                " use steps of 1 degree or more, as many as the highest degree needs"
            )
        self.depth, self.dim, self.steps, self.rank = depth, dim, steps, rank
        self.step, self.max_degree, self.projections = step, max_degree, _in_order(projections)
        self.compressor, self.trained_scale, self.dropout = compressor, trained_scale, dropout
        self.metadata = dict(metadata or {})
        down = torch.empty(depth * len(self.projections) * steps * rank, dim)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self.down = nn.Parameter(down.view(depth, len(self.projections), steps, rank, dim))
        self.up = nn.Parameter(torch.zeros(depth, len(self.projections), steps, dim, rank))

    # --- arithmetic -----------------------------------------------------------------------------------------

    def coefficients(self, source: int, target: int) -> Tensor:
        """Return the coefficient of every update in P(source->target) [steps].

        It is the part of the update's step that lies between the two degrees, negative when target < source:
        1, -1 or 0 with steps of one degree.

        Raises:
            TocomError: a degree lies outside 0..max_degree.
        """
        for degree in (source, target):
            if not 0 <= degree <= self.max_degree:
                raise TocomError(
                    f"degree {degree} is out of range: this compensator was trained for degrees 0 to {self.max_degree}"
                )
        low, high, sign = min(source, target), max(source, target), 1 if target > source else -1
        starts = range(0, self.steps * self.step, self.step)
        overlaps = [max(0, min(high, start + self.step) - max(low, start)) for start in starts]
        return self.down.new_tensor([sign * overlap / self.step for overlap in overlaps])

    def update(self, source: int | Sequence[int], target: int | Sequence[int]) -> Tensor:
        """Return P(source->target) as weights, before any scale.

        Args:
            source, target: one degree for all blocks, or one for each block.

        Returns:
            [depth, P, dim, dim], rows are outputs: block, projection, weight to add.
        """
        coefficients = torch.stack(
            [self.coefficients(m, n) for m, n in zip(self._per_block(source), self._per_block(target), strict=True)]
        )
        return torch.einsum("ls,lpsok,lpski->lpoi", coefficients, self.up, self.down)

    def _per_block(self, degree: int | Sequence[int]) -> Sequence[int]:
        per_block = (degree,) * self.depth if isinstance(degree, int) else degree
        if len(per_block) != self.depth:
            raise TocomError(f"degree {list(per_block)} has {len(per_block)} entries for {self.depth} blocks")
        return per_block

    def forward(self, block: int, x: Tensor, coefficients: Tensor, first: int = 0) -> dict[str, Tensor]:
        """Apply the update beside the frozen projections, at the trained scale.

        Args:
            block: index of the block. x: its normalised input [B, N, dim].
            coefficients: those of the updates from number ``first`` on, see :meth:`coefficients` and
                :func:`active`; the other updates are not computed and get no gradient.

        Returns:
            What to add to each projection's output, by its name [B, N, dim].
        """
        steps = slice(first, first + len(coefficients))
        factors = self.trained_scale * coefficients.view(-1, 1, 1)
        return {
            name: self._bottleneck(self.down[block, p, steps], factors * self.up[block, p, steps], x)
            for p, name in enumerate(self.projections)
        }

    def _bottleneck(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype)  # of a float32 compensator beside a backbone in bfloat16
        hidden = F.linear(x, down.flatten(0, 1))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        return F.linear(hidden, up.transpose(0, 1).flatten(1))

    # --- fitting a model ------------------------------------------------------------------------------------

    @classmethod
    def for_model(cls, model: nn.Module, max_degree: int, step: int = 1, **settings) -> Compensator:
        """Return a new compensator for a timm ViT and degrees 0..max_degree.

        Args:
            step: degrees that one update spans. settings: those of the constructor.
        """
        settings |= {"step": step, "max_degree": max_degree}
        return cls(len(model.blocks), model.embed_dim, _n_steps(max_degree, step), **settings)

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
            "degrees": [0, self.max_degree],
            "step": self.step,
            "projections": self.projections,
            "rank": self.rank,
            "compressor": self.compressor,
            "trained_scale": self.trained_scale,
            "dropout": self.dropout,
            "sha256": digest(tensors),
        }
        save_tensors(path, tensors, self.metadata | settings)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Compensator:
        """Read what :meth:`save` wrote; files of earlier versions have steps of one degree, for q and v.

        Raises:
            TocomError: the file is missing, corrupt, of another kind, or its hash is wrong.
        """
        tensors, meta = load_tensors(path)
        if meta.get("kind") != "compensator":
            raise TocomError(f"{path} holds {meta.get('kind', 'something else')}, not a compensator; check the path")
        if digest(tensors) != meta["sha256"]:
            raise TocomError(f"{path} is corrupt: its parameters do not match their hash; distil it again")
        meta = {"step": 1, "projections": PROJECTIONS} | meta
        own = ("depth", "dim", "rank", "compressor", "trained_scale", "dropout", "step", "projections")
        rest = {key: value for key, value in meta.items() if key not in (*own, "degrees", "sha256", "kind", "format")}
        max_degree = meta["degrees"][1]
        settings = {key: meta[key] for key in own}
        result = cls(steps=_n_steps(max_degree, meta["step"]), max_degree=max_degree, metadata=rest, **settings)
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
            TocomError: the file is no such checkpoint, updates another projection than q and v, or its pickle holds
                more than tensors.
        """
        state = _read_public(path)
        groups: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        matches = [match for match in map(_PUBLIC_NAME.fullmatch, state) if match]
        if foreign := sorted({match[2] for match in matches} - set(PROJECTIONS)):
            raise TocomError(f"{path} updates {', '.join(foreign)} too; only public checkpoints for q and v are read")
        depth = 1 + max((int(match[1]) for match in matches), default=-1)
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
        """Return the parameters in the layout of the paper's public code; see :meth:`from_public`.

        Raises:
            TocomError: that layout cannot say which projections or how many degrees a step these updates are for.
        """
        if self.projections != PROJECTIONS or self.step != 1:
            raise TocomError(
                "the public layout holds q and v in steps of 1 degree only; this compensator updates"
                f" {', '.join(self.projections)} in steps of {self.step}: save it with save()"
            )
        result = {}
        for block in range(self.depth):
            for index, projection in enumerate(PROJECTIONS):
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                result[f"{stem}down.weight"] = self.down[block, index].flip(0).flatten(0, 1).detach()
                result[f"{stem}up.weight"] = self.up[block, index].flip(0).transpose(0, 1).flatten(1).detach()
        return result


def active(coefficients: Tensor) -> tuple[Tensor, int]:
    """Cut the zeros off both ends of coefficients [steps]; return what is left and the number of its first update."""
    numbers = coefficients.nonzero().flatten().tolist()
    first, end = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
    return coefficients[first:end], first


def _n_steps(max_degree: int, step: int) -> int:
    return -(-max_degree // max(step, 1))


def _in_order(projections: Sequence[str]) -> tuple[str, ...]:
    """Return projections in the order of the fused weight, or refuse what is none or named twice."""
    unknown = [name for name in projections if name not in QKV]
    if unknown or not projections or len(set(projections)) < len(projections):
        raise TocomError(f"projections {list(projections)} are refused: name one or more of q, k and v, each once")
    return tuple(name for name in QKV if name in projections)


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

    Unfolding restores the stored rows rather than subtracting, so the weights come back bit for bit. Until then the
    model says so itself (:func:`is_folded`): whoever saves it would save the compensator with it.
    """

    model: nn.Module
    originals: list[Tensor]

    @classmethod
    @torch.no_grad()
    def apply(cls, model: nn.Module, update: Tensor, scale: float, projections: Sequence[str] = PROJECTIONS) -> Folding:
        """Add ``scale * update`` [depth, P, dim, dim] to the rows of P projections of every fused qkv weight."""
        originals = []
        for block, delta in zip(model.blocks, update, strict=True):
            weight = block.attn.qkv.weight
            originals.append(weight.detach().clone())
            parts = dict(zip(QKV, weight.detach().view(3, -1, weight.shape[1]), strict=True))
            for name, part in zip(projections, delta, strict=True):
                rows = parts[name]
                rows.copy_((rows.double() + scale * part.to(rows.device).double()).to(rows.dtype))
        setattr(model, _MARK, bool(scale) and bool(update.any()))
        return cls(model, originals)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the original weights back."""
        for block, original in zip(self.model.blocks, self.originals, strict=True):
            block.attn.qkv.weight.copy_(original)
        setattr(self.model, _MARK, False)


def is_folded(model: nn.Module) -> bool:
    """Return whether a compensator is folded into the weights of a timm ViT at this moment."""
    return getattr(model, _MARK, False)
