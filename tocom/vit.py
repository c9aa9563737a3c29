"""One forward pass for timm's VisionTransformer that a compressor and a compensator plug into."""

from __future__ import annotations

import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.compensator import QKV, Compensator, Folding, active
from tocom.compress import Attention, Compressor, make_compressor
from tocom.degrees import Degree, counts, token_counts
from tocom.errors import TocomError

_POOLS = ("token", "avg", "")


class CompressedViT(nn.Module):
    """A timm ViT that removes tokens as it runs, at a degree that can be changed at any time.

    The model is used, not copied: its weights stay where they are, and at degree 0 without a compensator the
    logits are those of the model itself.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer`` (ViT, DeiT, distilled DeiT; class token or
            average pooling; LayerScale, q/k norm, register tokens).
        compressor: a name from :data:`tocom.compress.COMPRESSORS` or a Compressor.
        degree: the degree it runs at, which is taken as the source degree: the one it was trained at.
        proportional_attention: add log(token size) to the attention logits (ToMe, section 3). The ToMe paper
            turns it off for MAE models that are evaluated off the shelf.

    Raises:
        TocomError: the model has a part that compression or folding cannot handle; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: str | Compressor = "tome",
        degree: Degree = 0,
        proportional_attention: bool = True,
    ):
        super().__init__()
        self.model = model
        self.compressor = make_compressor(compressor) if isinstance(compressor, str) else compressor
        self.proportional_attention = proportional_attention
        _check_supported(model, self.compressor)
        self.prefix = model.num_prefix_tokens
        self.depth = len(model.blocks)
        self.source_degree = degree
        self.compensator: Compensator | None = None
        self.scale = 0.0
        self._folding: Folding | None = None
        self._live: tuple[Compensator, Tensor, int] | None = None
        self._set_counts(degree)

    # --- degree and compensator -----------------------------------------------------------------------------

    @property
    def degree(self) -> Degree:
        """The degree that the model runs at now."""
        return self._degree

    def _set_counts(self, degree: Degree) -> None:
        self._counts = counts(degree, self.depth)
        self._degree = degree

    def attach(self, compensator: Compensator, scale: float | None = None) -> CompressedViT:
        """Use ``compensator`` from now on whenever the degree is not the source degree.

        It is folded into the weights of ``model``, which must not be saved then: ``detach()`` first. The compensator
        itself becomes no part of this module: its parameters are not among ``parameters()`` or in ``state_dict()``.

        Args:
            scale: factor on the weight update; by default the one that the compensator was trained at.

        Raises:
            TocomError: it was made for another architecture, another compressor or lower degrees; the model then
                stays as it was.
        """
        compensator.check_fits(self.model, self.compressor.name)
        update = compensator.update(counts(self.source_degree, self.depth), self._counts)
        self.detach()
        object.__setattr__(self, "compensator", compensator)  # past nn.Module, which would make it a submodule
        self.scale = compensator.trained_scale if scale is None else scale
        self._folding = Folding.apply(self.model, update, self.scale, compensator.projections)
        return self

    def detach(self) -> CompressedViT:
        """Forget the compensator; the weights are again, bit for bit, what they were."""
        self._unfold()
        self.compensator = None
        return self

    def set_degree(self, degree: Degree, scale: float | None = None) -> CompressedViT:
        """Run at ``degree`` from now on, with the attached compensator (if any) folded in for it.

        Args:
            scale: factor on the weight update from now on; by default the one in use.

        Raises:
            TocomError: the degree is malformed, or beyond what the compensator was trained for; the model then
                stays as it was.
        """
        scale = self.scale if scale is None else scale
        needed = counts(degree, self.depth)
        if self.compensator is not None:
            update = self.compensator.update(counts(self.source_degree, self.depth), needed)
            self._unfold()
            self._folding = Folding.apply(self.model, update, scale, self.compensator.projections)
            self.scale = scale
        self._set_counts(degree)
        return self

    def _unfold(self) -> None:
        if self._folding is not None:
            self._folding.undo()
            self._folding = None

    def set_live_update(
        self, compensator: Compensator | None, coefficients: Tensor | None = None, whole: bool = False
    ) -> None:
        """Compute the compensator beside the frozen weights, so that it can be trained.

        Args:
            coefficients: coefficient of every update [steps], from :meth:`Compensator.coefficients`.
            whole: compute the updates whose coefficient is 0, too. That costs a little, but the shapes no longer
                depend on the source degree: torch.compile makes one program a degree, not one for every pair.
        """
        if compensator is None:
            self._live = None
        else:
            self._live = (compensator, coefficients, 0) if whole else (compensator, *active(coefficients))

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_head(*self.forward_features(images))

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the final tokens [B, N', D] and their sizes [B, N', 1] (None while all are 1)."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = None
        for index, (block, count) in enumerate(zip(model.blocks, self._counts, strict=True)):
            x, size = self._block(index, block, x, size, count)
        return model.norm(x), size

    def _block(self, index: int, block: nn.Module, x: Tensor, size: Tensor | None, count: int):
        attended, attention = self._attend(index, block.attn, block.norm1(x), size)
        x = x + block.drop_path1(block.ls1(attended))

        def mlp(tokens: Tensor) -> Tensor:
            return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

        return self.compressor.around_mlp(x, size, count, attention, mlp)

    def _attend(self, index: int, attn: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Attention]:
        batch, n_tokens, _ = x.shape
        parts = dict(zip(QKV, attn.qkv(x).chunk(3, dim=-1), strict=True))
        if self._live is not None:
            compensator, coefficients, first = self._live
            for name, change in compensator(index, x, coefficients, first).items():
                parts[name] = parts[name] + change
        shape = batch, n_tokens, attn.num_heads, attn.head_dim
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts.values())
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = size.log().transpose(1, 2).unsqueeze(1) if size is not None and self.proportional_attention else None
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=attn.attn_drop.p if attn.training else 0.0)
        y = attn.norm(y.transpose(1, 2).reshape(batch, n_tokens, attn.attn_dim))
        if attn.gate is not None:
            y = y * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(y)), Attention(q, k, attn.scale, bias, self.prefix)

    def forward_head(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Pool and classify tokens [B, N, D] -> [B, classes]; averages are weighted by token size."""
        model = self.model
        if model.global_pool != "avg" or size is None:
            return model.forward_head(x)
        first = 0 if model.pool_include_prefix else self.prefix
        x, size = x[:, first:], size[:, first:]
        pooled = (x * size).sum(dim=1) / size.sum(dim=1)
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def tokens(self) -> tuple[int, ...]:
        """Return the number of tokens after each block at the present degree and the model's own input size."""
        n_tokens = self.model.patch_embed.num_patches + self.prefix
        removed = 0 if self.compressor.restores else self._counts
        return token_counts(removed, self.depth, n_tokens, self.prefix)


def _check_supported(model: nn.Module, compressor: Compressor) -> None:
    """Refuse, by name, every part that this forward pass would silently get wrong."""

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
    if compressor.needs_class_token and not model.has_class_token:
        raise TocomError(
            f"{compressor.name} ranks tokens by class attention, but the model has no class token; use tome"
        )


@torch.no_grad()
def gflops(vit: CompressedViT, image_size: int | tuple[int, int] | None = None) -> float:
    """Count the cost of one image at the present degree, matching or ranking included.

    Returns:
        Billions of multiply-adds (the "GFLOPs" of the ViT literature), from torch's FlopCounterMode.
    """
    from torch.utils.flop_counter import FlopCounterMode

    patch = vit.model.patch_embed
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size or patch.img_size
    reference = next(vit.parameters())
    image = torch.zeros(1, vit.model.in_chans, height, width, device=reference.device, dtype=reference.dtype)
    training = vit.training
    vit.eval()
    with FlopCounterMode(display=False) as counter:
        vit(image)
    vit.train(training)
    return counter.get_total_flops() / 2 / 1e9
