"""One forward pass for Llama-style language models of Hugging Face transformers that a compressor plugs into."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.degrees import Degree
from tocom.errors import TocomError, suggest
from tocom.parts import Compressor, Shape

#: Architectures that are built by name -> their classes in transformers.
ARCHITECTURES = {"llama": ("LlamaConfig", "LlamaForCausalLM")}
#: Classes of transformers whose forward pass this is, as long as they look at the whole context.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def build(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a language model with random weights.

    Args:
        kwargs: of its config in transformers (``hidden_size``, ``num_hidden_layers``, ...).

    Raises:
        TocomError: transformers has no such option, or cannot build the model; or stochastic depth is asked for.
    """
    import transformers

    config, cls = (getattr(transformers, name) for name in ARCHITECTURES[architecture])
    kwargs = dict(kwargs)
    if kwargs.pop("drop_path_rate", 0):
        raise TocomError(f"{architecture} has no stochastic depth; set drop_path: 0")
    known = inspect.signature(config).parameters
    for name in kwargs:
        if name not in known:
            raise TocomError(f"{architecture} has no option {name!r}{suggest(name, known)}")
    try:
        return cls(config(**kwargs))
    except Exception as error:  # its checks raise errors of many kinds
        raise TocomError(f"transformers could not build {architecture!r}: {' '.join(str(error).split())}") from error


class Layer(NamedTuple):
    """Where a compressor is at work.

    Attributes:
        index: of the layer. attn: its attention. count: what it is told to remove (:meth:`Compressor.counts`).
    """

    index: int
    attn: nn.Module
    count: int


class TextCompressor(Compressor):
    """What a language model keeps of the keys and values of what it has read: by default all of them.

    A subclass changes what is kept of them (:meth:`keep`), or the whole way of reading (:meth:`read`).
    """

    reads = ("text",)
    axis = "how much less is kept of keys and values"
    saves = "bytes of keys and values"

    def read(self, lm: CompressedLM, tokens: Tensor) -> Tensor:
        """Return the final features [B, T, D] of tokens [B, T]."""
        x = lm.embed(tokens)
        turns = lm.turns(x, torch.arange(tokens.shape[1], device=x.device))
        for layer in lm.layers():
            x = lm.through(layer, x, partial(self.attend, layer, turns))
        return lm.model.model.norm(x)

    def attend(self, layer: Layer, turns: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """Return what a layer's attention gathers for normed features x [B, T, D] before its last map."""
        attn = layer.attn
        k, v = self.keep(layer, attn.k_proj(x), attn.v_proj(x))
        return attention(attn, turned(heads(attn.q_proj(x), attn), *turns), turned(heads(k, attn), *turns), v)

    def keep(self, layer: Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is read of keys and values [B, T, keys] once they were kept; keys are not rotated yet."""
        return k, v

    def kept(self, counts: tuple[int, ...], tokens: int) -> int:
        """Return how many numbers are kept at most while a context of so many tokens is read, all layers together."""
        return 2 * self.shape.keys * tokens * len(counts)

    def cost(self, model: Compressed, tokens: int | None = None) -> int:
        """Return the bytes of what is :meth:`kept`, in the type of the model's weights.

        Args:
            tokens: of the context; by default all that the model takes.
        """
        counts = self.counts(model.degree, self.shape.depth)
        return self.kept(counts, tokens or self.shape.tokens) * next(model.model.parameters()).element_size()


class CompressedLM(Compressed):
    """A language model that keeps less of its keys and values, at a degree that can be changed at any time.

    The model is used, not copied: its weights stay where they are, and at degree 0 without a compensator the
    logits are those of the model itself. It reads whole sequences; there is no cache between calls.

    Args:
        model: a Llama, Mistral or Qwen2 ``ForCausalLM`` of transformers that looks at its whole context.
        compressor: a name that `tocom methods` lists, or a mapping with its ``kind`` and options, or a Compressor.
        degree: the degree it runs at, which is taken as the source degree: the one it was trained at.
        max_degree: highest degree that a compressor with parameters has them for.

    Raises:
        TocomError: the model is of another kind, or looks through a sliding window; or the compressor is for images.
    """

    reads = "text"

    def __init__(
        self, model: nn.Module, compressor: str | dict[str, Any] | Compressor, degree: Degree = 0, max_degree: int = 0
    ):
        if not self.takes(model):
            raise TocomError(
                f"{type(model).__name__} is not supported; give a {', '.join(SUPPORTED[:-1])} or"
                f" {SUPPORTED[-1]} of transformers"
            )
        kinds = set(getattr(model.config, "layer_types", None) or ())
        if "sliding_attention" in kinds or (not kinds and getattr(model.config, "sliding_window", None)):
            raise TocomError(
                f"{type(model).__name__} looks through a sliding window, which keeps less by itself; set"
                " sliding_window=None in its config"
            )
        super().__init__(model, compressor, degree, max_degree)

    # --- what stages ask of a family of models --------------------------------------------------------------

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """Return whether a model is one of :data:`SUPPORTED`; transformers is not imported for it."""
        return type(model).__name__ in SUPPORTED and type(model).__module__.startswith("transformers.")

    @classmethod
    def shape_of(cls, model: nn.Module) -> Shape:
        """Return what parts may need to know of a language model."""
        config, layer = model.config, model.model.layers[0]
        widths = (linear.weight.shape[0] for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        hidden = layer.mlp.gate_proj.weight.shape[0]
        own = (len(model.model.layers), config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
        return Shape(*own, 0, *widths, hidden)

    @classmethod
    def geometry(cls, model: nn.Module) -> tuple:
        """Return the shape, and the number of tokens there are."""
        return *cls.shape_of(model), model.config.vocab_size

    @classmethod
    def outputs(cls, model: nn.Module) -> int:
        """Return the number of tokens there are."""
        return model.config.vocab_size

    @staticmethod
    def inputs(batch: Tensor, model: nn.Module) -> Tensor:
        """Return tokens [B, T] int64 of bytes [B, T]: the token that begins a text, then all bytes but the last."""
        begin = batch.new_full((len(batch), 1), model.config.bos_token_id, dtype=torch.long)
        return torch.cat([begin, batch[:, :-1].long()], dim=1)

    def example(self, batch_size: int, size: int | None = None) -> Tensor:
        """Return random tokens [B, T], always the same ones; as many as the context holds, or ``size``."""
        shape = batch_size, size or self.shape.tokens
        drawn = torch.randint(self.outputs(self.model), shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(next(self.parameters()).device)

    def cache_bytes(self, tokens: int | None = None) -> int:
        """Return the bytes of keys and values that are kept at most while a context is read.

        Args:
            tokens: of the context; by default all that the model takes.
        """
        return self.compressor.cost(self, tokens)

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of what follows each of the tokens [B, T] int64."""
        return self.model.lm_head(self.compressor.read(self, tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of tokens [B, T]."""
        return self.model.model.embed_tokens(tokens)

    def layers(self) -> list[Layer]:
        """Return the layers, each with what it is told to remove at the present degree."""
        blocks = enumerate(zip(self.model.model.layers, self._counts, strict=True))
        return [Layer(index, block.self_attn, count) for index, (block, count) in blocks]

    def turns(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [1, T, head_dim] of the rotations at positions [T], in the type of x."""
        return self.model.model.rotary_emb(x, position_ids=positions[None])

    def through(self, layer: Layer, x: Tensor, attend) -> Tensor:
        """Take features x [B, N, D] through a layer whose attention gathers what ``attend`` returns for normed ones."""
        block = self.model.model.layers[layer.index]
        x = x + block.self_attn.o_proj(attend(block.input_layernorm(x)))
        return x + block.mlp(block.post_attention_layernorm(x))


def heads(x: Tensor, attn: nn.Module) -> Tensor:
    """Split x [B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
    return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, N, head_dim] by positions (RoPE, arXiv 2104.09864): halves are the pairs' two parts."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def attention(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what queries gather [B, N, heads * head_dim].

    Args:
        q, k: [B, heads, N or M, head_dim], rotated; keys may have fewer heads, each of which several queries share.
        v: [B, M, keys]. mask: what a query sees [N, M] bool; None: all up to itself.
    """
    shared = attn.num_key_value_groups
    k, v = (part.repeat_interleave(shared, dim=1) if shared > 1 else part for part in (k, heads(v, attn)))
    dropout = attn.attention_dropout if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=attn.scaling)
    return y.transpose(1, 2).flatten(2)
