"""What a method is made of: compressors, tunings and compensators, and what each of them has to offer.

A part is a class in a file of its own (:mod:`tocom.methods`) with options of its own, which are validated, are its
section of a config and belong to its fingerprint. The forward pass (:mod:`tocom.vit`), the stages and the workflow know
these base classes and no part by name.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tocom import hub
from tocom.degrees import Degree, counts, limit, token_counts
from tocom.errors import TocomError, suggest
from tocom.files import (
    Paths,
    check_finite,
    digest,
    listed,
    load_metadata,
    load_tensors,
    save_tensors,
    understood,
    write_text,
)
from tocom.methods import PARTS
from tocom.settings import GFLOPS, DegreeSettings, Settings, explain

if TYPE_CHECKING:
    from tocom.compressed import Compressed


class Shape(NamedTuple):
    """What a part may need to know of a model: blocks, width, attention heads, tokens, and how many are no patches.

    Of a language model also the width of all queries, of all keys (as of all values), and of the MLP's inside.
    """

    depth: int
    dim: int
    heads: int
    tokens: int
    prefix: int
    queries: int = 0
    keys: int = 0
    hidden: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the shape of a timm ViT."""
        prefix = model.num_prefix_tokens
        heads = model.blocks[0].attn.num_heads
        return cls(len(model.blocks), model.embed_dim, heads, model.patch_embed.num_patches + prefix, prefix)


class Part(nn.Module):
    """Base of all parts.

    Attributes:
        Options: its options; a class of settings.
        title: what tables call it. reference: the paper. trains, needs: what `tocom methods` says of it.
        reads: what the models read that it is for: "images", "text".
        options, shape: what it was built with.
    """

    role: ClassVar[str]
    Options: ClassVar[type[Settings]] = Settings
    title: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    trains: ClassVar[str] = "nothing"
    needs: ClassVar[str] = "nothing"
    reads: ClassVar[tuple[str, ...]] = ("images",)

    def __init__(self, options: Settings | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__()
        self.options = self.Options() if options is None else options
        self.shape, self.max_degree = shape, max_degree
        self.metadata: dict[str, Any] = {}

    @classmethod
    def label(cls, options: Settings) -> str:
        """Return what tables call it with these options."""
        return cls.title

    @classmethod
    def noted(cls, *notes: str | None) -> str:
        """Return the title, and in brackets what there is to be noted of the options."""
        said = ", ".join(filter(None, notes))
        return f"{cls.title} ({said})" if said else cls.title

    @classmethod
    def learns(cls, options: Settings) -> bool:
        """Return whether it is learned on the backbone before it can be used."""
        return False

    def objective(self, teacher: Compressed, student: Compressed, whole: bool) -> Objective:
        """Return what is minimised, over this part's parameters alone, to learn it on a frozen backbone.

        Args:
            teacher, student: the backbone twice, behind the method's compressor.
            whole: avoid shapes that depend on a draw, each of which torch.compile would make a program for.
        """
        raise TocomError(f"{type(self).__name__} has nothing to learn on a backbone")

    def save_pretrained(
        self, folder: str | os.PathLike, license: str = "unknown", repository: str | None = None
    ) -> None:
        """Write a learned part as a repository of the Hugging Face Hub: its file, config.json and a model card.

        :func:`load_part` reads the folder. config.json says what the file's metadata say, for people to look at.

        Args:
            license: as the Hub names licences, such as apache-2.0. repository: OWNER/NAME, for the card.

        Raises:
            TocomError: that is no name of a licence, or the folder cannot be written to.
        """
        folder, about = Path(folder), about_part(self)
        text = hub.card(about, self.title, self.trains, self.reference, license, repository)
        save_part(folder / hub.WEIGHTS, self)
        write_text(folder / hub.CONFIG, json.dumps(about, indent=2, sort_keys=True) + "\n")
        write_text(folder / hub.CARD, text)

    def push_to_hub(self, repository: str, license: str = "unknown", private: bool = False) -> str:
        """Upload what :meth:`save_pretrained` writes, as the user that is logged in; return the repository's address.

        Raises:
            TocomError: the name or the licence is malformed, or it cannot be uploaded.
        """
        hub.check_repository(repository)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, license, repository)
            return hub.push(Path(folder), repository, private)

    @classmethod
    def from_pretrained(cls, place: str | os.PathLike) -> Self:
        """Read a learned part from the Hub (OWNER/NAME, or OWNER/NAME@REVISION), a folder or a file.

        Raises:
            TocomError: see :func:`load_part`; or it is a part of another class.
        """
        part = load_part(place, cls.role)
        if not isinstance(part, cls):
            raise TocomError(f"{place} holds a {part.title}, not a {cls.title}; load it as what it is")
        return part

    def summary(self) -> dict[str, Any]:
        """Return JSON-able values that its file is to say of it beside its parameters, for `tocom info` to show."""
        return {}


class Objective(nn.Module):
    """A loss on images, or on text, with something to draw for every step, such as a pair of degrees."""

    def draw(self, generator: torch.Generator | None = None) -> Any:
        """Draw what one step, or one held-out trial, is about."""

    def set(self, drawn: Any) -> Self:
        """Compute the loss for what was drawn from now on."""
        return self

    def compiled(self, wrap: Callable) -> Self:
        """Compile the forward passes by ``wrap``."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean loss on what models take: normalised images [B, 3, H, W], or tokens [B, T]."""
        raise NotImplementedError

    def held_out(self, images: Tensor) -> Tensor:
        """Return the mean loss by which held-out images choose the best epoch; what is minimised, by default."""
        return self(images)


# --- compressors ------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """The tokens on their way through the blocks.

    Attributes:
        x: [B, N, D]. size: patches in each token [B, N, 1], or None while all are 1.
        count: how many tokens the block is to remove at the present degree (see :meth:`Compressor.counts`).
        block: index of the block. prefix: leading tokens that are not patches (class, distillation, registers).
        memory: kept through one forward pass, for parts that look back.
    """

    x: Tensor
    size: Tensor | None
    count: int
    block: int
    prefix: int
    memory: dict[str, Any] = field(default_factory=dict)

    def now(self, x: Tensor, size: Tensor | None) -> Tokens:
        """Return the same with other tokens and sizes."""
        return replace(self, x=x, size=size)


@dataclass(frozen=True)
class Attention:
    """What the attention of one block is made of.

    Attributes:
        q, k, v: queries, keys and values [B, heads, N, head_dim], as they enter the dot product.
        scale: factor on the logits (head_dim ** -0.5). dropout: on the attention weights, 0 in eval mode.
        bias: log token size [B or 1, 1, 1, N] that is added to the logits, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    dropout: float = 0.0


#: The most attention weights that are written out at once (256 MB in bfloat16).
WRITTEN_OUT = 2**27


def attend(attention: Attention) -> Tensor:
    """Return softmax(q k^T * scale + bias) v, head by head [B, heads, N, head_dim]."""
    q, k, v = attention.q, attention.k, attention.v
    (batch, heads, n, width), keys = q.shape, k.shape[2]
    # torch's fused kernel takes twice as long as these three operations in bfloat16 on a CPU (docs/speed.md).
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and batch * heads * n * keys <= WRITTEN_OUT
    if not written_out:
        return F.scaled_dot_product_attention(q, k, v, attention.bias, dropout_p=attention.dropout)
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    bias = q.new_zeros(1) if attention.bias is None else attention.bias.to(q.dtype)
    bias = bias.expand(batch, heads, 1, keys).reshape(-1, 1, keys)
    weights = torch.baddbmm(bias, q, k.mT, beta=int(attention.bias is not None), alpha=attention.scale).softmax(-1)
    return (F.dropout(weights, attention.dropout) @ v).view(batch, heads, n, width)


class Compressor(Part):
    """What a block does at a degree: by default it removes tokens between its attention and its MLP.

    Attributes:
        axis: what a degree is a number of. saves: what falls as it rises; see :meth:`cost`.
        needs_class_token: whether it can only work on a model with a class token.
        restores: whether every token leaves the block that entered it, so that only a part of the block sees fewer.
        adapts: whether its parameters, once they are trained, change what the model computes at degree 0, too.
    """

    role = "compressor"
    axis: ClassVar[str] = "tokens removed in each block"
    saves: ClassVar[str] = GFLOPS
    needs_class_token: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    @classmethod
    def highest(cls, options: Settings, patches: int) -> int:
        """Return the highest degree at which images of so many patches can run."""
        return patches // 2

    def fit_to(self, model: nn.Module) -> None:
        """Take what it has to know of the model behind it.

        Called by every :class:`tocom.compressed.Compressed`, before its first degree. What is to stay that of the
        pre-trained weights belongs into buffers, which checkpoints hold, and must not be taken from a second model.
        """

    def cost(self, model: Compressed) -> float | None:
        """Return how much of what it saves one input of a model's own size takes, at its present degree.

        None stands for GFLOPs, which are counted; see :func:`tocom.compressed.cost`.
        """
        return None

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return what each of ``depth`` blocks is told to remove at a degree, before the block's own limit."""
        return counts(degree, depth)

    def token_counts(self, degree: Degree, depth: int, n_tokens: int, prefix: int) -> tuple[int, ...]:
        """Return the number of tokens that leave each block."""
        return token_counts(0 if self.restores else self.counts(degree, depth), depth, n_tokens, prefix, self.most)

    def most(self, n_tokens: int, prefix: int) -> int:
        """Return the most tokens that a block may remove of so many: half of those that are no prefix."""
        return limit(n_tokens, prefix)

    def project(self, attn: nn.Module, x: Tensor, tokens: Tokens) -> Sequence[Tensor]:
        """Return queries, keys and values [B, heads, N, head_dim] of normalised tokens x [B, N, D].

        There may be fewer keys and values than tokens; see :meth:`key_sizes`.
        """
        return split_heads(attn, *attn.qkv(x).chunk(3, dim=-1))

    def key_sizes(self, tokens: Tokens) -> Tensor | None:
        """Return how many patches each key stands for [B or 1, keys, 1], or None while each stands for one."""
        return tokens.size

    def mix(self, attention: Attention, tokens: Tokens) -> Tensor:
        """Return the attention's output, head by head [B, heads, N, head_dim]."""
        return attend(attention)

    def around_mlp(self, tokens: Tokens, attention: Attention, mlp: Callable[[Tensor], Tensor]) -> Tokens:
        """Finish a block after its attention: remove tokens and add the MLP's branch ([B, M, D] -> [B, M, D])."""
        tokens = self.compress(tokens, attention)
        return tokens.now(tokens.x + mlp(tokens.x), tokens.size)

    def compress(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Remove ``tokens.count`` tokens, but :meth:`most` of them; see :meth:`reduce`."""
        count = min(tokens.count, self.most(tokens.x.shape[1], tokens.prefix))
        return self.reduce(replace(tokens, count=count), attention) if count else tokens

    def reduce(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Remove exactly ``tokens.count`` >= 1 tokens: x [B, N - count, D], and their sizes if they are tracked."""
        raise NotImplementedError

    def penalty(self) -> Tensor | float:
        """Return a loss of its own that fine-tuning adds."""
        return 0.0


#: Of compressors that leave a share of something: degree d leaves 1 - d / SIXTEENTHS.
SIXTEENTHS = 16


class Share(Compressor):
    """A compressor whose degree d = 0..15 leaves the share 1 - d / 16 of something, and all tokens where they are."""

    restores = True

    @classmethod
    def highest(cls, options: Settings, patches: int) -> int:
        """Return the highest degree, at which a sixteenth is left."""
        return SIXTEENTHS - 1

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return the sixteenths that each block goes without.

        Raises:
            TocomError: the degree is malformed, or nothing would be left.
        """
        result = counts(degree, depth)
        if max(result) >= SIXTEENTHS:
            raise TocomError(f"degree {degree!r} is out of range: {self.title} goes up to {SIXTEENTHS - 1}")
        return result

    def compress(self, tokens: Tokens, attention: Attention) -> Tokens:
        """Return the tokens as they are."""
        return tokens


def left_of(number: int, count: int) -> int:
    """Return how many of ``number`` things are left without ``count`` sixteenths of them; at least one."""
    return max(1, round(int(number) * (SIXTEENTHS - count) / SIXTEENTHS))  # to a tracer, shapes are tensors


def split_heads(attn: nn.Module, *parts: Tensor) -> list[Tensor]:
    """Return queries, keys or values [B, N, heads * head_dim] head by head [B, heads, N, head_dim]."""
    return [part.view(*part.shape[:2], attn.num_heads, attn.head_dim).transpose(1, 2) for part in parts]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Select tokens: x [B, N, C], index [B, M] -> [B, M, C]."""
    batch, n_tokens, width = x.shape
    first = torch.arange(batch, device=index.device).unsqueeze(1) * n_tokens  # whole rows are copied, not numbers
    return x.reshape(-1, width).index_select(0, (first + index).flatten()).view(batch, -1, width)


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if its type is wider: sums over tokens overflow or stall in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def descending(scores: Tensor) -> Tensor:
    """Return positions by falling score [B, N]; of equal ones the first comes first.

    ONNX has no stable sort, but its selection of the largest breaks ties so, which torch's does not promise.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return scores.topk(scores.shape[-1], dim=-1).indices
    return scores.argsort(dim=-1, descending=True, stable=True)


def ones_like_size(x: Tensor) -> Tensor:
    """Return sizes of 1 [B, N, 1] for tokens x [B, N, D]."""
    return torch.ones_like(x[..., :1])


# --- tunings ----------------------------------------------------------------------------------------------------------


class TuningOptions(DegreeSettings):
    """What every tuning can be told."""


def draw_degree(settings: DegreeSettings, max_degree: int) -> int:
    """Draw the degree of a step, from torch's global state.

    Raises:
        TocomError: one of those that are drawn from is beyond ``max_degree``.
    """
    degrees = settings.drawn(max_degree)
    return degrees[int(torch.randint(len(degrees), ()))]


class Tuning(Part):
    """Which weights fine-tuning trains, and at which degree each of its steps runs."""

    role = "tuning"
    Options = TuningOptions
    trains_anything: ClassVar[bool] = True

    @classmethod
    def label(cls, options: TuningOptions) -> str:
        """Return what tables call it with these options."""
        return ", ".join(filter(None, (cls.title, options.drawn_label)))

    @classmethod
    def labels(cls, options: TuningOptions, degrees: Sequence[int]) -> tuple[str, ...]:
        """Return how cells name what it trains: at each of the study's train degrees, or once at all of them."""
        return tuple(map(str, degrees)) if options.degree == "fixed" else (options.degree,)

    def prepare(self, model: nn.Module) -> None:
        """Add modules to a timm ViT and set ``requires_grad`` on just what is trained.

        At the start the model computes what it computed before. Initial weights are drawn from torch's global state.
        """
        raise NotImplementedError

    def restore(self, model: nn.Module) -> None:
        """Add the modules that a model tuned so has besides its architecture's, before its weights are loaded."""

    def finish(self, model: nn.Module) -> None:
        """Merge what can be merged once training is over, so that the model costs what it cost before."""

    def begin(self, vit: Compressed) -> None:
        """Set the degree of the next step; called with the same random state in all processes."""
        if self.options.degree == "random":
            vit.set_degree(draw_degree(self.options, self.max_degree))

    def score_degrees(self, label: str) -> tuple[int, ...]:
        """Return the degrees at which validation images are scored, to choose the best epoch."""
        return tuple(self.options.scored(self.max_degree)) if source_degree(label) is None else (int(label),)


def source_degree(label: str | int) -> int | None:
    """Return the degree that a checkpoint was trained at, or None if it was trained at no one degree.

    Raises:
        TocomError: the degree is negative.
    """
    text = str(label)
    if text.lstrip("-").isdigit():
        if int(text) < 0:
            raise TocomError(f"train degree {text} is out of range: give 0 or more")
        return int(text)
    return None


def is_head(name: str) -> bool:
    """Return whether a parameter of a timm ViT belongs to its classifier, which no two tasks share."""
    return name.startswith(("head.", "head_dist."))


def train_heads(model: nn.Module) -> bool:
    """Freeze a timm ViT but for its classifiers; return whether it has one."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name))
    return any(parameter.requires_grad for parameter in model.parameters())


# --- compensators -----------------------------------------------------------------------------------------------------


class Compensator(Part):
    """Changes of weights that take a model trained at one degree to another.

    It names parameters of the model; whoever folds them (:mod:`tocom.folding`) knows nothing else of it.

    Attributes:
        compressor: what it was learned for: the compressor's name and options.
    """

    role = "compensator"
    compressor: dict[str, Any] | None = None

    @classmethod
    def learns(cls, options: Settings) -> bool:
        """Return that it is learned on the backbone."""
        return True

    @property
    def trained_scale(self) -> float:
        """The factor on its changes while it is learned; scales are multiples of it."""
        return 1.0

    @property
    def source(self) -> int | None:
        """The source degree that it is learned for; None: any."""
        return None

    @property
    def need(self) -> float:
        """While it is learned, pairs of degrees are drawn in proportion to their distance to this power."""
        return 0.0

    def deltas(self, source: Degree, target: Degree) -> dict[str, Tensor]:
        """Return what to add to which parameters of a model trained at ``source`` that runs at ``target``, unscaled.

        Raises:
            TocomError: a degree is beyond those it was learned for.
        """
        raise NotImplementedError

    def between(self, source: Degree, target: Degree, whole: bool = False) -> None:
        """Have :meth:`changes` and :meth:`branches` be about these two degrees from now on, while it is learned."""
        raise NotImplementedError

    def changes(self) -> dict[str, Tensor]:
        """Return what is added to which parameters while it is learned, at the trained scale and with gradients."""
        return {}

    def branches(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Return how else it acts beside the frozen weights while it is learned, at the trained scale.

        Returns:
            Name of a module of the ViT -> a function of the module's input and output that returns the new output.
        """
        return {}

    def check_fits(self, vit: Compressed) -> None:
        """Raise TocomError unless it was learned for such a model and compressor."""
        if vit.reads not in self.reads:
            raise TocomError(f"{self.title} is for models that read {' or '.join(self.reads)}, not {vit.reads}")
        have = vit.shape
        if self.shape and have[:2] != self.shape[:2]:
            raise TocomError(
                f"this compensator fits a backbone of {self.shape.depth} blocks and width {self.shape.dim},"
                f" not one of {have.depth} blocks and width {have.dim}; learn one for this backbone"
            )
        described = describe(vit.compressor)
        if self.compressor not in (None, described):
            raise TocomError(f"this compensator was learned for {self.compressor}, not {described}; learn one for it")


# --- parts by name, and their files -----------------------------------------------------------------------------------


def part_class(role: str, kind: str) -> type[Part]:
    """Import the class of a part: a name of the registry, or ``package.module:Class``.

    Raises:
        TocomError: there is none of that name, it cannot be imported, or it is no part of that role.
    """
    known = PARTS[role]
    if kind not in known and ":" not in kind:
        raise TocomError(
            f"unknown {role} {kind!r}{suggest(kind, known)}; known: {', '.join(known)}, or package.module:Class"
        )
    module, _, name = known.get(kind, kind).partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where a study is run is where its own code is
    try:
        if kind not in known and module not in sys.modules and not _defines(module, name):
            raise ImportError(f"{module} has no class {name!r}, so it is not run")
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TocomError(f"{role} {kind!r} cannot be imported ({reason}); check the module's name and place") from None
    if not (isinstance(found, type) and issubclass(found, Part) and found.role == role):
        raise TocomError(f"{kind!r} is no {role}: give a subclass of tocom.parts.{role.capitalize()}")
    return found


def _defines(module: str, name: str) -> bool:
    """Return whether a module's source has a class of that name, or imports it; neither it nor its packages are run.

    Files of weights name their parts, too: without this, one that came from elsewhere could have any script run that
    happens to lie where Python looks for modules.

    Raises:
        ImportError: there is no such module. SyntaxError, ValueError: it is no Python source.
    """
    path, spec = None, None
    for place in accumulate(module.split("."), "{}.{}".format):
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(place, path) for finder in finders)), None)
        if spec is None:
            raise ImportError(f"No module named {place!r}")
        path = spec.submodule_search_locations or []
    source = getattr(spec.loader, "get_source", lambda _: None)(module)
    for node in ast.walk(ast.parse(source or "")):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return True
    return False


def make_part(role: str, spec: str | dict[str, Any] | Part, shape: Shape | None = None, max_degree: int = 0) -> Any:
    """Build a part from its name, or from a mapping with its ``kind`` and options; a part stays as it is.

    Raises:
        TocomError: see :func:`part_class`; or an option is unknown or out of range.
    """
    if isinstance(spec, Part):
        return spec
    kind, options = _kind_and_options(spec)
    cls = part_class(role, kind)
    part = cls(check_options(role, kind, options), shape, max_degree)
    part.kind = kind
    return part


def described(role: str, spec: str | dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`describe` says of a part, without building it."""
    kind, options = _kind_and_options(spec)
    return {"kind": kind} | check_options(role, kind, options).recipe()


def _kind_and_options(spec: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return (spec, {}) if isinstance(spec, str) else (spec["kind"], {k: v for k, v in spec.items() if k != "kind"})


def check_options(role: str, kind: str, options: dict[str, Any]) -> Settings:
    """Return the validated options of a part.

    Raises:
        TocomError: one is unknown or out of range.
    """
    cls = part_class(role, kind)
    try:
        return cls.Options.model_validate(options)
    except ValidationError as error:
        raise explain(error, f"{role} {kind!r}", {"": cls.Options}) from None


def describe(part: Part) -> dict[str, Any]:
    """Return a part's name and all its options as JSON; :func:`make_part` builds it again."""
    return {"kind": getattr(part, "kind", kind_of(type(part)))} | part.options.recipe()


def kind_of(cls: type[Part]) -> str:
    """Return the name by which a class is known to the registry, or ``package.module:Class``."""
    where = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, place in PARTS[cls.role].items() if place == where), where)


#: Of the files of learned parts.
FORMAT = 2


def save_part(path: Any, part: Part) -> None:
    """Write a learned part with all that is needed to build it again, and a hash of its parameters."""
    save_tensors(path, part.state_dict(), about_part(part))


def about_part(part: Part) -> dict[str, Any]:
    """Return what a learned part's file says of it."""
    about = {"format": FORMAT, "kind": part.role, "part": describe(part), "max_degree": part.max_degree}
    about |= {"shape": part.shape, "sha256": digest(part.state_dict())}
    about |= {"compressor": getattr(part, "compressor", None)}
    return part.metadata | about | ({"summary": summary} if (summary := part.summary()) else {})


def load_part(path: Any, role: str) -> Any:
    """Read what :func:`save_part` wrote, in eval mode.

    Args:
        path: a file, a folder that :meth:`Part.save_pretrained` wrote, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.

    Raises:
        TocomError: the file is missing, corrupt or of another kind, or its hash is wrong; a repository cannot be
            fetched, or asks for a class that is not this package's.
    """
    file, is_remote = hub.locate(path)
    tensors, about = load_tensors(file)
    if about.get("kind") != role:
        raise TocomError(f"{path} holds {about.get('kind', 'something else')}, not a {role}; check the path")
    if about.get("format") != FORMAT:
        raise TocomError(f"{path} was written by another version; learn or import it again")
    check_finite(tensors, path)
    with understood(path):
        if digest(tensors) != about["sha256"]:
            raise TocomError(f"{path} is corrupt: its parameters do not match their hash; make it again")
        kind, _ = _kind_and_options(about["part"])
        if is_remote and kind not in PARTS[role]:  # to import what a stranger names would run it
            raise TocomError(f"{path} asks for {kind!r}, which is not this package's; read it, and load it from a file")
        shape, spec = Shape(*about["shape"]) if about["shape"] else None, described(role, about["part"])
        _check_declared(path, shape, spec, about["max_degree"], tensors)
        part = make_part(role, spec, shape, about["max_degree"])
        compressor = about["compressor"]
    try:
        part.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise TocomError(f"{path} does not fit {kind!r} of this version: {reason}") from None
    own = ("format", "kind", "part", "max_degree", "shape", "sha256", "compressor", "summary")
    part.metadata = {key: value for key, value in about.items() if key not in own}
    if role == "compensator":
        part.compressor = compressor
    return part.eval()


def check_backbone(part: Part, file: Any, backbone_sha256: str) -> None:
    """Raise TocomError if a learned part says that it was learned on another backbone; a foreign one does not say.

    Args:
        backbone_sha256: what the backbone's checkpoint calls ``sha256``.
    """
    learned_on = part.metadata.get("backbone_sha256", backbone_sha256)
    if learned_on != backbone_sha256:
        raise TocomError(
            f"{file} was learned on another backbone than this one ({learned_on[:12]}, {backbone_sha256[:12]});"
            " learn one for it"
        )


def _check_declared(path: Any, shape: Shape | None, spec: dict, max_degree: int, tensors: dict[str, Tensor]) -> None:
    """Refuse a file whose metadata describe a part that is far larger than its parameters, before it is built."""
    options = [value for value in spec.values() if isinstance(value, int)]
    wanted = math.prod((*(shape[:2] if shape else ()), max(max_degree, 1), max(options, default=1)))
    if wanted > 1000 * max(10**6, sum(value.numel() for value in tensors.values())):
        raise TocomError(
            f"{path} describes a part that is far larger than its parameters; take it from its source again"
        )


def file_of_seed(paths: Paths, seed: int) -> Path:
    """Return which file of a learned part goes with the models of a seed: the one learned with it, or the only one.

    Raises:
        TocomError: of several, not just one says that it was learned with the seed; or one cannot be read.
    """
    files = listed(paths)
    found = files if len(files) == 1 else [path for path in files if load_metadata(path).get("seed") == seed]
    if len(found) != 1:
        raise TocomError(
            f"{len(found)} of the files {', '.join(map(str, files))} say that they were learned with seed {seed}, that"
            " of a model; give one for each seed, or a single file for all"
        )
    return found[0]
