"""Learned numbers of tokens to prune and to merge in every block (DiffRate, arXiv 2305.17997).

A degree stands for a budget here: what merging that many tokens in every block costs. See docs/methods/diffrate.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.degrees import Degree, counts, limit
from tocom.distillation import distillation_loss
from tocom.errors import TocomError
from tocom.files import write_text
from tocom.merging import BUDGET, BlockCosts, cosines, directions
from tocom.methods.evit import class_attention
from tocom.parts import Attention, Compressor, Objective, Shape, Tokens, descending, gather, ones_like_size, widen
from tocom.settings import Positive, Settings

if TYPE_CHECKING:
    from tocom.vit import CompressedViT


class Removal(NamedTuple):
    """How many tokens a block prunes, and how many of the others it then merges."""

    pruned: int
    merged: int


class Kept(NamedTuple):
    """How many tokens, prefix included, a block keeps when it prunes, and when it then merges."""

    pruning: int
    merging: int


# --- what a schedule costs --------------------------------------------------------------------------------------------


class Costs(BlockCosts):
    """What schedules cost."""

    def deciding(self, n: int, kept: Kept) -> int:
        """Return the cost of ranking n tokens and of comparing those that merge with those that stay."""
        pruning = min(n, kept.pruning)
        merging = min(pruning, kept.merging)
        if merging == n:
            return 0
        return self.ranking(n) + (pruning - merging) * (merging - self.shape.prefix) * self.shape.dim

    def schedule(self, schedule: Sequence[Kept]) -> int:
        """Return the cost of all blocks under a schedule."""
        total, n = 0, self.shape.tokens
        for kept in schedule:
            total += self.attending(n) + self.deciding(n, kept)
            n = min(n, *kept)
            total += n * self.mlp
        return total


def ordered(schedule: Sequence[Kept], tokens: int) -> list[Kept]:
    """Return a schedule with the numbers that come about: none is above the one before it."""
    result = []
    for kept in schedule:
        pruning = min(tokens, kept.pruning)
        tokens = min(pruning, kept.merging)
        result.append(Kept(pruning, tokens))
    return result


#: Steps in which a schedule is moved towards all tokens, or towards none.
_STEPS = 1 << 12


def within(schedule: Sequence[Kept], budget: int, costs: Costs, fixed: int) -> list[Kept]:
    """Return the schedule nearest to one that costs no more than a budget, but less by one token's share at most.

    All blocks but the first ``fixed`` move together, from the schedule towards all tokens or towards a single patch;
    then tokens are given back one by one, the first blocks first. A budget that cannot be met is missed by as little as
    can be.
    """
    tokens, lowest = costs.shape.tokens, costs.shape.prefix + 1

    def at(step: int) -> list[Kept]:
        share = step / _STEPS

        def move(kept: int) -> int:
            far = tokens + share * (kept - tokens) if share <= 1 else kept + (share - 1) * (lowest - kept)
            return math.ceil(far - 1e-9)

        moved = [Kept(*map(move, kept)) for kept in schedule[fixed:]]
        return ordered([Kept(tokens, tokens)] * fixed + moved, tokens)

    low, high = -1, 2 * _STEPS  # the first step that is cheap enough, by halving
    if costs.schedule(at(_STEPS)) <= budget:
        high = _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if costs.schedule(at(middle)) <= budget else (middle, high)
    result = at(high)
    while (more := _given_back(result, budget, costs, fixed)) is not None:
        result = more
    return result


def _given_back(schedule: list[Kept], budget: int, costs: Costs, fixed: int) -> list[Kept] | None:
    """Return the schedule with one more token in one block, if there is a block where that is within the budget."""
    n = costs.shape.tokens
    for block, kept in enumerate(schedule):
        if block >= fixed and kept.merging < n:
            more = Kept(max(kept.pruning, kept.merging + 1), kept.merging + 1)
            changed = [*schedule[:block], more, *schedule[block + 1 :]]
            if costs.schedule(changed) <= budget:
                return changed
        n = kept.merging
    return None


# --- options ----------------------------------------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    """Return the list that a text holds, as the published schedules are written."""
    return json.loads(value) if isinstance(value, str) else value


Numbers = Annotated[tuple[Annotated[int, Field(ge=1, strict=True)], ...], BeforeValidator(_as_list)]


class Schedule(Settings):
    """How many tokens, prefix included, every block keeps; named as in the published file."""

    prune_kept_num: Numbers = Field(description="tokens that are left after pruning, block by block")
    merge_kept_num: Numbers = Field(description="tokens that are left after merging, block by block")

    @model_validator(mode="after")
    def _as_long(self) -> Self:
        pruning, merging = len(self.prune_kept_num), len(self.merge_kept_num)
        if pruning != merging:
            raise ValueError(f"prune_kept_num has {pruning} entries, merge_kept_num {merging}; give as many")
        return self

    def blocks(self) -> list[Kept]:
        """Return the numbers by block."""
        return [Kept(*pair) for pair in zip(self.prune_kept_num, self.merge_kept_num, strict=True)]


def _read(value: Any) -> Any:
    """Return the schedules that a JSON file holds; what is no path stays as it is."""
    if isinstance(value, str | os.PathLike):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror}); give the path of a JSON file") from None
        except ValueError as error:
            raise ValueError(f"the file is not JSON ({error}); write it with save_schedules") from None
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


class DiffRateOptions(Settings):
    """Options of :class:`DiffRate`."""

    degrees: tuple[Positive, ...] | None = Field(
        None,
        description="degrees whose schedules are learned; those between are interpolated; null: four up to max_degree",
    )
    fixed_blocks: Annotated[int, Field(ge=0)] = Field(
        1, description="first blocks that remove nothing; at least two of a model remove, however many it has"
    )
    budget_weight: float = Field(
        100.0, ge=0, description="weight of the squared miss of the budget, as a share of all cost"
    )
    speed: float = Field(10.0, gt=0, description="factor from parameters to logits, and so on the learning rate")
    schedule: dict[str, Schedule] | None = Field(
        None,
        description="schedules to use instead of learned ones: degree -> numbers of tokens, or the JSON file that holds"
        " them, whose contents then count as the option",
    )

    @field_validator("degrees")
    @classmethod
    def _no_degree_twice(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("give one degree or more, none twice")
        return value if value is None else tuple(sorted(value))

    @field_validator("schedule", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return _read(value)

    @field_validator("schedule")
    @classmethod
    def _by_degree(cls, value: dict[str, Schedule] | None) -> dict[str, Schedule] | None:
        wrong = [key for key in value or () if not (key.isascii() and key.isdigit() and str(int(key)) == key != "0")]
        if wrong or value == {}:
            raise ValueError(f"{wrong[0]!r} is no degree; give 1 or more" if wrong else "it is empty; give a degree")
        return value


# --- the search -------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A number of tokens to keep, as it is learned.

    Attributes:
        expected: its expectation, rounded up, prefix included; its gradient is that of the expectation.
        kept: the same as a number. survival: probability that the token at each position is kept [N].
    """

    expected: Tensor
    kept: int
    survival: Tensor

    @classmethod
    def of(cls, logits: Tensor, prefix: int) -> Self:
        """Return the choice by the logits of keeping 1, 2, ... patches."""
        p = logits.softmax(-1)
        mean = (p * torch.arange(1, len(p) + 1, dtype=p.dtype, device=p.device)).sum()
        up = (mean.detach() - 1e-3).ceil()  # a certain choice sums to its number but for rounding
        survival = p.flip(0).cumsum(0).flip(0)
        return cls(mean + (up - mean).detach() + prefix, int(up) + prefix, F.pad(survival, (prefix, 0), value=1.0))

    def mask(self, n: int) -> Tensor:
        """Return 1 for what stays of the first n tokens and for all behind them [N], with the survival's gradient."""
        hard = torch.ones_like(self.survival)
        hard[self.kept : n] = 0
        return hard + (self.survival - self.survival.detach())


def spent(choices: Sequence[tuple[Choice, Choice] | None], costs: Costs) -> Tensor:
    """Return the multiply-adds of all blocks under choices, with a gradient to every expected number.

    Of the numbers that a block's tokens are the least of, both choices get the gradient, the tokens that came in none;
    what it costs to rank and compare counts, but has no gradient.
    """
    n: Tensor | int = costs.shape.tokens
    now, total = costs.shape.tokens, 0
    for pair in choices:
        total = total + costs.attending(n)
        if pair is not None:
            pruning, merging = pair
            total = total + costs.deciding(now, Kept(pruning.kept, merging.kept))
            now = min(now, pruning.kept, merging.kept)
            both = pruning.expected + merging.expected
            n = now + (both - both.detach())
        total = total + n * costs.mlp
    return total


def _logits(mean: float, patches: int) -> Tensor:
    """Return logits of keeping 1..patches, of a normal shape, with an expectation [patches]."""
    number = torch.arange(1, patches + 1, dtype=torch.float64)
    width = max(patches / 8, 0.5)
    low, high = -50.0 * patches, 50.0 * patches
    for _ in range(60):
        middle = (low + high) / 2
        p = (-((number - middle) ** 2) / (2 * width**2)).softmax(0)
        low, high = (middle, high) if float(p @ number) < mean else (low, middle)
    logits = -((number - low) ** 2) / (2 * width**2)
    return logits - logits.max()


def merge(x: Tensor, size: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Put each of the last ``count`` tokens into the most similar one before them; compared by cosine.

    Args:
        x: tokens, the most important first [B, N, D]. size: [B, N, 1].

    Returns:
        Tokens [B, N - count, D], plain means, and sizes [B, N - count, 1], to which what joins adds its own, times the
        cosine; at least 1.
    """
    kept = x.shape[1] - count
    metric = directions(x.detach())
    cosine, target = cosines(metric[:, kept:], metric[:, prefix:kept]).max(dim=-1)
    share = torch.cat([torch.ones_like(size[:, :kept]), cosine.unsqueeze(-1).to(size.dtype)], dim=1)
    mass = torch.cat([widen(x), widen(ones_like_size(x)), widen(size * share)], dim=-1)
    target = (target + prefix).unsqueeze(-1).expand(-1, -1, mass.shape[-1])
    mass = mass[:, :kept].scatter_add(1, target, mass[:, kept:])
    merged = mass[..., :-2] / mass[..., -2:-1].detach()
    return merged.to(x.dtype), mass[..., -1:].detach().clamp_min(1).to(x.dtype)


# --- the compressor ---------------------------------------------------------------------------------------------------


class DiffRate(Compressor):
    """Prune the tokens that the class token attends to least, merge those next to them, by learned numbers.

    Parameters are changes of logits from those of a schedule that removes evenly, one tensor for each learned degree.
    """

    Options = DiffRateOptions
    title = "DiffRate"
    reference = "arXiv 2305.17997"
    trains = "how many tokens each block prunes and merges, by degree"
    needs = "pre-training images, or a file of schedules"
    axis = BUDGET
    needs_class_token = True

    def __init__(self, options: DiffRateOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        self.choices: list[tuple[Choice, Choice] | None] | None = None
        self.change = nn.ParameterList()
        self.degrees: tuple[int, ...] = ()
        if shape is None:
            return
        #: Multiply-adds of one token in the linear layers of a block's attention, and of its MLP; see objective().
        self.register_buffer("per_token", torch.tensor([4 * shape.dim**2, 8 * shape.dim**2]))
        self.fixed = max(min(self.options.fixed_blocks, shape.depth - 2), 0)
        self.given = {}
        if self.options.schedule is not None:
            self.given = {int(key): self._fitting(key, item) for key, item in self.options.schedule.items()}
            return
        quarters = {math.ceil(part * max_degree / 4) for part in range(1, 5)} - {0}
        self.degrees = self.options.degrees or tuple(sorted(quarters))
        size = 2, shape.depth - self.fixed, shape.tokens - shape.prefix
        for degree in self.degrees:
            self.change.append(nn.Parameter(torch.zeros(size), requires_grad=False))
            self.register_buffer(f"start_{degree}", self._start(degree), persistent=False)

    @classmethod
    def label(cls, options: DiffRateOptions) -> str:
        """Return what tables call it with these options."""
        return cls.title if options.schedule is None else f"{cls.title} (given schedule)"

    @classmethod
    def learns(cls, options: DiffRateOptions | None) -> bool:
        """Return whether its schedules are to be learned: they are given by none of the options."""
        return options is None or options.schedule is None

    # --- schedules ------------------------------------------------------------------------------------------

    @property
    def costs(self) -> Costs:
        """What its backbone's blocks cost."""
        return Costs(self.shape, *self.per_token.tolist())

    def _fitting(self, degree: str, schedule: Schedule) -> list[Kept]:
        """Return a schedule that was given, if it is one for this model."""
        blocks, shape = schedule.blocks(), self.shape
        if len(blocks) != shape.depth:
            raise TocomError(f"schedule {degree} is for {len(blocks)} blocks, but the model has {shape.depth}")
        for number in (number for kept in blocks for number in kept):
            if not shape.prefix < number <= shape.tokens:
                raise TocomError(
                    f"schedule {degree} keeps {number} tokens, but the model can {shape.prefix + 1} to {shape.tokens}"
                )
        return ordered(blocks, shape.tokens)

    def _even(self, degree: int) -> list[Kept]:
        """Return the schedule that it starts from: each block removes as many, half of them by pruning."""
        result, n = [], self.shape.tokens
        for _ in range(self.shape.depth):
            count = min(degree, limit(n, self.shape.prefix))
            result.append(Kept(n - count // 2, n - count))
            n -= count
        costs = self.costs
        return within(result, costs.merging(degree), costs, self.fixed)

    def _start(self, degree: int) -> Tensor:
        """Return the logits of the schedule that it starts from [2, blocks, patches]."""
        patches = self.shape.tokens - self.shape.prefix
        free = self._even(degree)[self.fixed :]

        def logits(kept: int) -> Tensor:
            return _logits(min(max(kept - self.shape.prefix - 0.5, 1.2), patches - 0.5), patches)

        return torch.stack([torch.stack(list(map(logits, part))) for part in zip(*free, strict=True)]).float()

    def logits(self, degree: int) -> Tensor:
        """Return the logits of a learned degree [prune or merge, blocks that may remove, patches]."""
        change = self.change[self.degrees.index(degree)]
        return getattr(self, f"start_{degree}").to(change) + self.options.speed * change

    def chosen(self, degree: int, exact: bool = False) -> list[tuple[Choice, Choice] | None]:
        """Return the choices of a learned degree by block: what to keep in pruning and in merging.

        Args:
            exact: compute on the CPU in float64, so that every device comes to the same numbers.
        """
        logits = self.logits(degree)
        pruning, merging = logits.double().cpu() if exact else logits.float()
        pairs = zip(pruning, merging, strict=True)
        return [None] * self.fixed + [tuple(Choice.of(part, self.shape.prefix) for part in pair) for pair in pairs]

    @torch.no_grad()
    def _known(self) -> dict[int, list[Kept]]:
        """Return the schedules that were given or learned, these as the search left them; and that of degree 0."""
        whole = Kept(self.shape.tokens, self.shape.tokens)
        known = {0: [whole] * self.shape.depth} | self.given
        for degree in self.degrees:
            choices = [
                whole if pair is None else Kept(*(part.kept for part in pair))
                for pair in self.chosen(degree, exact=True)
            ]
            known[degree] = ordered(choices, self.shape.tokens)
        return known

    def schedule(self, degree: int) -> list[Kept]:
        """Return how many tokens each block keeps at a degree: within its budget, or as given."""
        if self.shape is None:
            raise TocomError(f"{self.title} needs a model to say what a degree stands for; build it with one")
        known = self._known()
        if degree in self.given or degree == 0:
            return known[degree]
        below, above = max(d for d in known if d <= degree), min((d for d in known if d >= degree), default=None)
        if len(known) == 1:
            blocks = self._even(degree)
        elif above is None or above == below:
            blocks = known[below]
        else:
            share = (degree - below) / (above - below)
            pairs = zip(known[below], known[above], strict=True)
            blocks = [Kept(*(round(p + share * (q - p)) for p, q in zip(*pair, strict=True))) for pair in pairs]
        costs = self.costs
        return within(blocks, costs.merging(degree), costs, self.fixed)

    def counts(self, degree: Degree, depth: int) -> tuple[Removal, ...]:
        """Return what each block prunes and merges; a list of numbers, a count a block, is merged."""
        removed = counts(degree, depth)
        if not isinstance(degree, int):
            return tuple(Removal(0, count) for count in removed)
        if not degree:
            return (Removal(0, 0),) * depth
        schedule = self.schedule(degree)
        if len(schedule) != depth:
            raise TocomError(f"these schedules are for {len(schedule)} blocks, but the model has {depth}; learn others")
        before = [self.shape.tokens, *(kept.merging for kept in schedule)]
        return tuple(Removal(n - k.pruning, k.pruning - k.merging) for n, k in zip(before, schedule, strict=False))

    def token_counts(self, degree: Degree, depth: int, n_tokens: int, prefix: int) -> tuple[int, ...]:
        """Return the number of tokens that leave each block; one patch always stays."""
        result = []
        for count in self.counts(degree, depth):
            n_tokens -= sum(_limited(count, n_tokens, prefix))
            result.append(n_tokens)
        return tuple(result)

    def schedules(self) -> dict[str, dict[str, list[int]]]:
        """Return the schedules of all degrees up to max_degree, as the option and its JSON file take them."""
        degrees = sorted({*range(1, self.max_degree + 1), *self.degrees, *self.given})
        parts = {str(degree): list(zip(*self.schedule(degree), strict=True)) for degree in degrees}
        return {key: {"prune_kept_num": list(p), "merge_kept_num": list(m)} for key, (p, m) in parts.items()}

    def save_schedules(self, path: str | os.PathLike) -> None:
        """Write its schedules as JSON."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.schedules().items()]
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    def summary(self) -> dict[str, Any]:
        """Return its schedules, for whoever looks into its file."""
        return {"schedules": self.schedules()} if self.shape else {}

    # --- tokens ---------------------------------------------------------------------------------------------

    def compress(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Remove the block's tokens; one patch always stays."""
        count = Removal(0, tokens.count) if isinstance(tokens.count, int) else tokens.count
        count = _limited(count, tokens.x.shape[1], tokens.prefix)
        return self.reduce(replace(tokens, count=count), attention) if sum(count) else tokens

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Prune and merge exactly ``tokens.count`` tokens, the least attended first; leaves them by attention."""
        pruned, merged = tokens.count
        score = class_attention(attention).detach().clone()
        score[:, : tokens.prefix] = torch.inf
        kept = descending(score)[:, : score.shape[1] - pruned]
        x, size = gather(tokens.x, kept), None if tokens.size is None else gather(tokens.size, kept)
        if merged:
            x, size = merge(x, ones_like_size(x) if size is None else size, merged, tokens.prefix)
        return tokens.now(x, size)

    # --- learning -------------------------------------------------------------------------------------------

    @contextmanager
    def searching(self, choices: list[tuple[Choice, Choice] | None]):
        """Run at choices: no token is taken away, what is removed is masked, and the masks have gradients."""
        self.choices = choices
        try:
            yield
        finally:
            self.choices = None

    def mix(self, attention: Attention, tokens: Tokens) -> Tensor:
        """Return the attention's output; while searching, by an attention that leaves masked tokens to themselves."""
        if self.choices is None:
            return super().mix(attention, tokens)
        logits = (attention.q * attention.scale) @ attention.k.transpose(-1, -2)
        logits = widen(logits if attention.bias is None else logits + attention.bias)
        weight = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp()
        mask = tokens.memory.get("mask")
        if mask is not None:
            alone = torch.eye(mask.shape[1], dtype=mask.dtype, device=mask.device)
            visible = mask.unsqueeze(1) + (1 - mask.unsqueeze(1)) * alone  # [B, N, N]
            weight = weight * visible.unsqueeze(1)
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        tokens.memory["attention"] = weight[:, :, 0].mean(dim=1).detach()
        return F.dropout(weight.to(attention.v.dtype), attention.dropout) @ attention.v

    def around_mlp(self, tokens: Tokens, attention: Attention, mlp: Callable[[Tensor], Tensor]) -> Tokens:
        """Finish a block: remove tokens, or mask them while searching, and add the MLP's branch."""
        if self.choices is None:
            return super().around_mlp(tokens, attention, mlp)
        pair = self.choices[tokens.block]
        if pair is not None:
            tokens = self._masked(tokens, *pair)
        mask, size = tokens.memory.get("mask"), tokens.size
        if mask is not None and tokens.block == self.shape.depth - 1:  # an average over patches is to skip them
            size = mask.unsqueeze(-1) * (ones_like_size(tokens.x) if size is None else size)
        return tokens.now(tokens.x + mlp(tokens.x), size)

    def _masked(self, tokens: Tokens, pruning: Choice, merging: Choice) -> Tokens:
        """Sort the tokens that are left, mask those that are to go, and merge in place; all N tokens stay."""
        memory, n = tokens.memory, tokens.x.shape[1]
        left = memory.get("left", n)
        score = memory["attention"].clone()
        score[:, : tokens.prefix], score[:, left:] = torch.inf, -torch.inf
        order = descending(score)
        x = gather(tokens.x, order)
        size = ones_like_size(x) if tokens.size is None else gather(tokens.size, order)
        mask = memory["mask"].gather(1, order) if "mask" in memory else widen(torch.ones_like(x[..., 0]))
        if pruning.kept < left:
            mask, left = mask * pruning.mask(left), pruning.kept
        if merging.kept < left:
            merged, sizes = merge(x[:, :left], size[:, :left], left - merging.kept, tokens.prefix)
            x = torch.cat([merged, x[:, merging.kept :]], dim=1)
            size = torch.cat([sizes, size[:, merging.kept :]], dim=1)
            mask, left = mask * merging.mask(left), merging.kept
        memory["mask"], memory["left"] = mask, left
        return tokens.now(x, size)

    def objective(self, teacher: CompressedViT, student: CompressedViT, whole: bool) -> Search:
        """Return what its schedules are learned by."""
        if not self.degrees:
            return super().objective(teacher, student, whole)
        block = teacher.model.blocks[0]
        weights = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (block.attn, block.mlp)]
        self.per_token.copy_(torch.tensor(weights))
        return Search(teacher, student, self)


def _limited(count: Removal, n: int, prefix: int) -> Removal:
    pruned = min(count.pruned, max(n - prefix - 1, 0))
    return Removal(pruned, min(count.merged, max(n - pruned - prefix - 1, 0)))


class Search(Objective):
    """Stay near the logits of the whole model, and within a degree's budget, by the choices alone.

    In training the choices are masks with gradients; on held-out images the schedule runs as it will be used.
    """

    def __init__(self, teacher: CompressedViT, student: CompressedViT, compressor: DiffRate):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.requires_grad_(False)
        self.compressor = compressor.requires_grad_(True)
        self._forward: tuple[Callable, ...] = (self.teacher.set_degree(0),)
        self.degree = compressor.degrees[-1]

    def compiled(self, wrap: Callable) -> Self:
        """Compile the forward pass of the whole model by ``wrap``; the other one changes from step to step."""
        self._forward = (wrap(self.teacher),)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student; the teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def draw(self, generator: torch.Generator | None = None) -> int:
        """Draw one of the degrees that are learned."""
        return self.compressor.degrees[int(torch.randint(len(self.compressor.degrees), (), generator=generator))]

    def set(self, drawn: int) -> Self:
        """Learn, or score, this degree from now on."""
        self.degree = drawn
        return self

    def miss(self, choices: list[tuple[Choice, Choice] | None]) -> Tensor:
        """Return the squared difference between what choices spend and the budget, as a share of the whole model."""
        costs = self.compressor.costs
        whole = costs.merging(0)
        return ((spent(choices, costs) - costs.merging(self.degree)) / whole).square()

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss on images [B, 3, H, W]; the miss of the budget is a part of it in training."""
        with torch.no_grad():
            expected = self._forward[0](images).float()
        if not self.training:
            return distillation_loss(expected, self.student.set_degree(self.degree)(images).float())
        self.student.set_degree(0)
        choices = self.compressor.chosen(self.degree)
        with self.compressor.searching(choices):
            loss = distillation_loss(expected, self.student(images).float())
        return loss + self.compressor.options.budget_weight * self.miss(choices)
