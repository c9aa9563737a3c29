"""Activation Beacon: beacon tokens summarise each window, and only their keys and values stay (arXiv 2401.03462).

A text is read window by window. In every window but the last, a beacon follows every alpha tokens; it has projections
to queries, keys and values of its own, and sees what a token in its place would see. Once a window is read, the keys
(before rotation) and values of its beacons stay, those of its tokens go; positions are counted anew over what is
there, and keys are rotated by them. docs/methods/beacon.md tells the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.degrees import Degree, counts
from tocom.errors import TocomError
from tocom.lm import CompressedLM, Layer, TextCompressor, attention, heads, turned
from tocom.parts import Objective, Shape
from tocom.settings import Positive, Settings


class BeaconOptions(Settings):
    """Options of :class:`Beacon`."""

    alphas: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (2, 4, 8, 16), description="tokens that one beacon stands for at degrees 1, 2, ...; at degree 0 all are kept"
    )
    window: Positive = Field(32, description="tokens that are read at a time, a multiple of every alpha")
    sink: Annotated[int, Field(ge=0)] = Field(1, description="first tokens of a text that always stay")

    @model_validator(mode="after")
    def _alphas_fit(self):
        if list(self.alphas) != sorted(set(self.alphas)):
            raise ValueError(f"alphas {list(self.alphas)} do not rise; a higher degree keeps less")
        if unfit := [alpha for alpha in self.alphas if self.window % alpha]:
            raise ValueError(f"window {self.window} is no multiple of alpha {unfit[0]}; change one of them")
        if self.sink > self.window:
            raise ValueError(f"sink {self.sink} is larger than the window of {self.window} tokens; make it smaller")
        return self


class Window(NamedTuple):
    """The rows of one window as they are read: its tokens, with beacons between them.

    Attributes:
        tokens, beacons: their places among the rows [w], [b]. order: from tokens, then beacons, to rows [w + b].
        staying: which rows stay in memory. mask: what a row sees of memory and rows [rows, memory + rows] bool.
        turns: cosines and sines at the positions of memory and rows.
    """

    tokens: Tensor
    beacons: Tensor
    order: Tensor
    staying: Tensor
    mask: Tensor
    turns: tuple[Tensor, Tensor]


class Beacon(TextCompressor):
    """Keep the keys and values of beacon tokens instead of those of what they stand for.

    Attributes:
        maps: "q", "k" and "v" -> the beacons' own projections [depth, out, dim]. embedding: of a beacon [dim].
    """

    Options = BeaconOptions
    title = "Activation Beacon"
    reference = "arXiv 2401.03462"
    axis = "which of its numbers of tokens for a beacon"
    trains = "projections to queries, keys and values of beacons, and their embedding"
    needs = "the text that the model was pre-trained on"

    def __init__(self, options: BeaconOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        widths = {"q": shape.queries, "k": shape.keys, "v": shape.keys}
        sizes = {name: (shape.depth, width, shape.dim) for name, width in widths.items()}
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()})
        self.embedding = nn.Parameter(torch.zeros(shape.dim))
        self.register_buffer("adapted", torch.tensor(False))

    @classmethod
    def highest(cls, options: BeaconOptions, patches: int) -> int:
        """Return the highest degree, that of the largest alpha."""
        return len(options.alphas)

    @classmethod
    def learns(cls, options: BeaconOptions | None) -> bool:
        """Return that the beacons are learned on the backbone, whose own weights stay."""
        return True

    def objective(self, teacher: Compressed, student: Compressed, whole: bool) -> Objective:
        """Foretell what comes next, with an alpha that is drawn for every step."""
        return Foretelling(student, self)

    @torch.no_grad()
    def fit_to(self, model: nn.Module) -> None:
        """Begin with the model's own projections, and the embedding of the token that ends (or begins) a text."""
        if next(model.parameters()).is_meta or self.adapted:  # of a model without weights there is nothing to take
            return
        self.to(next(model.parameters()))
        for index, block in enumerate(model.model.layers):
            for name, own in self.maps.items():
                own[index] = getattr(block.self_attn, f"{name}_proj").weight
        ends = (model.config.eos_token_id, model.config.bos_token_id)
        known = [end for end in ends if isinstance(end, int) and end < model.config.vocab_size]
        embeddings = model.model.embed_tokens.weight
        self.embedding.copy_(embeddings[known[0]] if known else embeddings.mean(dim=0))
        self.adapted.fill_(True)

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return the alpha of every layer, one for all of them; 0 at degree 0.

        Raises:
            TocomError: there is no such alpha, or layers differ.
        """
        degrees, alphas = counts(degree, depth), (0, *self.options.alphas)
        if max(degrees) >= len(alphas):
            raise TocomError(f"degree {degree} is out of range: {self.title} has {len(alphas) - 1} alphas")
        if len(set(degrees)) > 1:
            raise TocomError(f"degrees {list(degrees)} differ, but beacons pass through all layers; give one degree")
        return tuple(alphas[each] for each in degrees)

    def kept(self, counts: tuple[int, ...], tokens: int) -> int:
        """Return how many numbers are kept at most: of the sink, all beacons, and the tokens of the window."""
        alpha, window = counts[0], self.options.window
        if alpha and tokens > window:
            left = -(-tokens // window) - 1  # windows before the last one
            tokens = left * (window // alpha) + self.options.sink + window
        return super().kept(counts, tokens)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, lm: CompressedLM, tokens: Tensor) -> Tensor:
        """Return the final features [B, T, D] of tokens [B, T], those of beacons left out."""
        alpha = lm.layers()[0].count
        if not alpha or tokens.shape[1] <= self.options.window:
            return super().read(lm, tokens)
        return self.by_windows(lm, tokens, alpha)

    def by_windows(self, lm: CompressedLM, tokens: Tensor, alpha: int) -> Tensor:
        """Return what :meth:`read` does, reading window by window; with alpha 0, all keys and values stay."""
        layers, chunks = lm.layers(), lm.embed(tokens).split(self.options.window, dim=1)
        nothing = chunks[0].new_zeros(len(tokens), 0, self.shape.keys)
        memory, results = [(nothing, nothing)] * len(layers), []
        for number, x in enumerate(chunks):
            window = self.window(lm, x, memory[0][0].shape[1], number, alpha if number + 1 < len(chunks) else 0)
            if len(window.beacons):
                beacons = self.embedding.to(x.dtype).expand(len(x), len(window.beacons), -1)
                x = torch.cat([x, beacons], dim=1)[:, window.order]
            for layer in layers:
                made: list[tuple[Tensor, Tensor]] = []
                x = lm.through(layer, x, partial(self.attend_window, layer, window, memory[layer.index], made))
                k, v = made[0]
                memory[layer.index] = k[:, window.staying], v[:, window.staying]
            results.append(x[:, window.tokens])
        return lm.model.model.norm(torch.cat(results, dim=1))

    def window(self, lm: CompressedLM, x: Tensor, memory: int, number: int, alpha: int) -> Window:
        """Return how a window of tokens x [B, w, D] is read, so many rows of memory before it."""
        here, n = {"device": x.device}, x.shape[1]
        beacons = n // alpha if alpha else 0
        ends = torch.arange(1, beacons + 1, **here) * (alpha + 1) - 1  # a beacon ends each group
        rows = torch.arange(n + beacons, **here)
        is_beacon = torch.isin(rows, ends)
        tokens = rows[~is_beacon]
        order = torch.cat([tokens, ends]).argsort()
        stays = is_beacon if alpha else torch.ones_like(is_beacon)
        if number == 0 and alpha:
            stays = stays | torch.isin(rows, tokens[: self.options.sink])
        staying = torch.cat([torch.arange(memory, **here), memory + rows[stays]])
        seen = torch.arange(memory + len(rows), **here)
        return Window(tokens, ends, order, staying, seen <= memory + rows[:, None], lm.turns(x, seen))

    def attend_window(
        self, layer: Layer, window: Window, memory: tuple[Tensor, Tensor], made: list[tuple[Tensor, Tensor]], x: Tensor
    ) -> Tensor:
        """Return what a layer's attention gathers for normed rows x [B, rows, D]; ``made`` gets all keys and values.

        Args:
            memory: keys before rotation, and values [B, memory, keys].
        """
        attn, rows = layer.attn, x.shape[1]
        q, k, v = (self.project(layer, name, x, window) for name in ("q", "k", "v"))
        k, v = (torch.cat(both, dim=1) for both in zip(memory, (k, v), strict=True))
        made.append((k, v))
        cos, sin = window.turns
        q = turned(heads(q, attn), cos[:, -rows:], sin[:, -rows:])
        return attention(attn, q, turned(heads(k, attn), cos, sin), v, window.mask)

    def project(self, layer: Layer, name: str, x: Tensor, window: Window) -> Tensor:
        """Return a projection of rows x [B, rows, D]: beacons have their own, and the model's bias."""
        linear = getattr(layer.attn, f"{name}_proj")
        if not len(window.beacons):
            return linear(x)
        own = self.maps[name][layer.index].to(x.dtype)
        beacons = F.linear(x[:, window.beacons], own, linear.bias)
        return torch.cat([linear(x[:, window.tokens]), beacons], dim=1)[:, window.order]


class Foretelling(Objective):
    """The cross-entropy of a frozen model that reads with beacons, of every token but the first.

    Args:
        student: the model behind them; its own weights are not trained.
    """

    def __init__(self, student: Compressed, beacon: Beacon):
        super().__init__()
        self.student, self.beacon = student, beacon
        student.model.requires_grad_(False)
        self._forward = (student,)

    def compiled(self, wrap) -> Foretelling:
        """Compile the forward pass by ``wrap``; in a tuple, so that it is no module of this one."""
        self._forward = (wrap(self.student),)
        return self

    def draw(self, generator: torch.Generator | None = None) -> int:
        """Draw a degree at which there are beacons."""
        return 1 + int(torch.randint(len(self.beacon.options.alphas), (), generator=generator))

    def set(self, drawn: int) -> Foretelling:
        """Read at a degree from now on."""
        self.student.set_degree(drawn)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss (nats) on tokens [B, T]."""
        logits = self._forward[0](tokens)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
