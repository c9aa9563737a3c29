"""One forward pass for timm's VisionTransformer that a compressor and a compensator plug into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tocom.compressed import Compressed
from tocom.degrees import Degree
from tocom.errors import TocomError
from tocom.methods import DEFAULTS
from tocom.parts import Attention, Compressor, Shape, Tokens
from tocom.training import normalise

_POOLS = ("token", "avg", "")


class CompressedViT(Compressed):
    """A timm ViT that removes tokens as it runs, at a degree that can be changed at any time.

    The model is used, not copied: its weights stay where they are, and at degree 0 without a compensator the
    logits are those of the model itself, unless the compressor adapts it with parameters that were trained.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer`` (ViT, DeiT, distilled DeiT; class token or
            average pooling; LayerScale, q/k norm, register tokens).
        compressor: a name that `tocom methods` lists, or a mapping with its ``kind`` and options, or a Compressor.
        degree: the degree it runs at, which is taken as the source degree: the one it was trained at.
        proportional_attention: add log(token size) to the attention logits (ToMe, section 3). The ToMe paper
            turns it off for MAE models that are evaluated off the shelf.
        max_degree: highest degree that a compressor with parameters has them for.

    Raises:
        TocomError: the model has a part that compression or folding cannot handle; the message names it.
    """

    reads = "images"

    def __init__(
        self,
        model: nn.Module,
        compressor: str | dict[str, Any] | Compressor = DEFAULTS["compressor"],
        degree: Degree = 0,
        proportional_attention: bool = True,
        max_degree: int = 0,
    ):
        super().__init__(model, compressor, degree, max_degree)
        if self.compressor.needs_class_token and not model.has_class_token:
            raise TocomError(
                f"{self.compressor.title} ranks tokens by class attention, but the model has no class token; use"
                " another compressor"
            )
        self.proportional_attention = proportional_attention
        self.prefix = model.num_prefix_tokens

    # --- what stages ask of a family of models --------------------------------------------------------------

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """Return that it is for every model that no other family takes; what it cannot handle, it refuses by name."""
        return True

    @classmethod
    def shape_of(cls, model: nn.Module) -> Shape:
        """Return what parts may need to know of a timm ViT.

        Raises:
            TocomError: it has a part that this forward pass would silently get wrong.
        """
        check_supported(model)
        return Shape.of(model)

    @classmethod
    def geometry(cls, model: nn.Module) -> tuple:
        """Return blocks, width, patch and input size, which a fine-tuned model shares with its backbone."""
        return len(model.blocks), model.embed_dim, *model.patch_embed.patch_size, *model.patch_embed.img_size

    @classmethod
    def outputs(cls, model: nn.Module) -> int:
        """Return the number of classes."""
        return model.num_classes

    @classmethod
    def run_as(cls, model: nn.Module) -> dict[str, Any]:
        """Return the mean and standard deviation of its input's colours."""
        return {name: list(model.pretrained_cfg[name]) for name in ("mean", "std")}

    @classmethod
    def how(cls, about: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by which a checkpoint's metadata say that it is to be run."""
        return {"proportional_attention": about.get("proportional_attention", True)}

    @staticmethod
    def inputs(images: Tensor, model: nn.Module) -> Tensor:
        """Return normalised images [B, 3, H, W] of images in uint8."""
        return normalise(images, model)

    def example(self, batch_size: int, image_size: int | tuple[int, int] | None = None) -> Tensor:
        """Return random numbers [B, 3, H, W], always the same ones, of a size or of the model's own."""
        patch = self.model.patch_embed
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size or patch.img_size
        shape = (batch_size, self.model.in_chans, *sides)
        reference = next(self.parameters())
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(reference)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers are not to decay, those of the ViT that says so itself."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_head(*self.forward_features(images))

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the final tokens [B, N', D] and their sizes [B, N', 1] (None while all are 1)."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        tokens = Tokens(x, None, 0, 0, self.prefix)
        for index, (block, count) in enumerate(zip(model.blocks, self._counts, strict=True)):
            tokens = replace(tokens, block=index, count=count)
            if self.training and model.grad_checkpointing:
                tokens = checkpoint(self._block, block, tokens, use_reentrant=False)
            else:
                tokens = self._block(block, tokens)
        return model.norm(tokens.x), tokens.size

    def _block(self, block: nn.Module, tokens: Tokens) -> Tokens:
        attended, attention = self._attend(block.attn, block.norm1(tokens.x), tokens)
        tokens = tokens.now(tokens.x + block.drop_path1(block.ls1(attended)), tokens.size)

        def mlp(x: Tensor) -> Tensor:
            return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return self.compressor.around_mlp(tokens, attention, mlp)

    def _attend(self, attn: nn.Module, x: Tensor, tokens: Tokens) -> tuple[Tensor, Attention]:
        q, k, v = self.compressor.project(attn, x, tokens)
        q, k = attn.q_norm(q), attn.k_norm(k)
        size = self.compressor.key_sizes(tokens)
        bias = size.log().transpose(1, 2).unsqueeze(1) if size is not None and self.proportional_attention else None
        attention = Attention(q, k, v, attn.scale, bias, attn.attn_drop.p if attn.training else 0.0)
        y = self.compressor.mix(attention, tokens)
        y = attn.norm(y.transpose(1, 2).reshape(*x.shape[:2], attn.attn_dim))
        if attn.gate is not None:
            y = y * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y)), attention

    def forward_head(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Pool and classify tokens [B, N, D] -> [B, classes]; averages are weighted by token size."""
        model = self.model
        if model.global_pool != "avg" or size is None:
            return model.forward_head(x)
        return model.head(self.pool(x, size))

    def pool(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Pool tokens [B, N, D] to what is classified [B, D]: the class token, or an average, normed."""
        model = self.model
        if model.global_pool != "avg" or size is None:
            return model.forward_head(x, pre_logits=True)
        first = 0 if model.pool_include_prefix else self.prefix
        x, size = x[:, first:], size[:, first:]
        pooled = (x * size).sum(dim=1) / size.sum(dim=1)
        return model.head_drop(model.fc_norm(pooled))

    def pooled_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is classified [B, D], and the logits [B, classes], of images [B, 3, H, W]."""
        features = self.forward_features(images)
        return self.pool(*features), self.forward_head(*features)

    def tokens(self) -> tuple[int, ...]:
        """Return the number of tokens after each block at the present degree and the model's own input size."""
        n_tokens = self.model.patch_embed.num_patches + self.prefix
        return self.compressor.token_counts(self._degree, self.depth, n_tokens, self.prefix)


def check_supported(model: nn.Module) -> None:
    """Refuse, by name, every part that the forward pass would silently get wrong.

    Raises:
        TocomError: the model has such a part.
    """

    def refuse(what: str) -> None:
        raise TocomError(
            f"{type(model).__name__} is not supported: it has {what};"
            " use a timm VisionTransformer with plain blocks and token or average pooling"
        )

    if type(model) not in (timm_vit.VisionTransformer, VisionTransformerDistilled):
        refuse("its own forward pass")
    if model.attn_pool is not None or model.global_pool not in _POOLS:
        refuse(f"{model.global_pool!r} pooling, which mixes tokens without their sizes")
    if not isinstance(model.patch_drop, nn.Identity):
        refuse("patch dropout, which already removes tokens")
    for block in model.blocks:
        if type(block) is not timm_vit.Block:
            refuse(f"blocks of type {type(block).__name__}")
        if type(block.attn) is not TimmAttention:
            refuse(f"attention of type {type(block.attn).__name__}")
