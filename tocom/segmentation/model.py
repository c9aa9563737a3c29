"""A ViT that labels pixels: timm's backbone behind a compressor, and a small head on its patch tokens."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.errors import TocomError
from tocom.files import digest, load_tensors, save_tensors
from tocom.models import create, load_model, set_image_size
from tocom.stages.common import compressed
from tocom.vit import CompressedViT

#: What the metadata of a segmenter's checkpoint say it is.
KIND = "segmenter"


def make_head(kind: str, dim: int, classes: int) -> nn.Module:
    """Return a head that maps patch tokens [B, dim, h, w] to class scores [B, classes, h, w].

    Args:
        kind: "linear" (a 1 x 1 convolution) or "conv" (a 3 x 3 convolution, group norm and GELU before it).
    """
    classifier = nn.Conv2d(dim, classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    if kind == "linear":
        return classifier
    # Not batch norm: its running averages would be no parameters, of which alone training keeps the best epoch.
    return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(1, dim), nn.GELU(), classifier)


class Segmenter(nn.Module):
    """A compressed ViT with a dense head.

    Args:
        vit: the backbone; its compressor has to give every token back (``tome_mlp``).
        head: maps patch tokens [B, D, h, w] to class scores [B, classes, h, w].

    Raises:
        TocomError: the compressor takes tokens away for good.
    """

    def __init__(self, vit: CompressedViT, head: nn.Module):
        super().__init__()
        if not vit.compressor.restores:
            raise TocomError(
                f"compressor {vit.compressor.name!r} takes patches away that a segmentation head needs; use tome_mlp"
            )
        self.vit, self.head = vit, head

    def forward(self, images: Tensor) -> Tensor:
        """Score images [B, 3, H, W] -> [B, classes, H, W]: the scores of the patches, bilinearly interpolated."""
        tokens, _ = self.vit.forward_features(images)
        grid = self.vit.model.patch_embed.grid_size
        tokens = self.vit.model.fc_norm(tokens)  # the last norm of models that average before it, else nothing
        patches = tokens[:, self.vit.prefix :].transpose(1, 2).unflatten(2, grid)
        scores = self.head(patches).float()
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)


def build(
    backbone: str | os.PathLike, classes: int, image_size: int, head: str, compressor: str, degree: int, **overrides
) -> tuple[Segmenter, dict]:
    """Put a new head on a pre-trained backbone, its position embedding resized to the images.

    Args:
        backbone: a bundled name or a classifier's checkpoint. degree: what it will be trained at.
        overrides: constructor arguments that do not change the weights (``drop_path_rate``).

    Returns:
        The segmenter, and what its checkpoint needs to say of the backbone.

    Raises:
        TocomError: the backbone is missing, corrupt or not supported, or the size is no multiple of its patches.
    """
    model, described = load_model(backbone, **overrides)
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        raise TocomError(f"images of {image_size} pixels do not divide into patches of {patch}; change image_size")
    model.reset_classifier(0)
    set_image_size(model, image_size)
    segmenter = Segmenter(compressed(model, described, compressor, degree), make_head(head, model.embed_dim, classes))
    about = {
        "architecture": described["architecture"],
        "kwargs": described["kwargs"] | {"num_classes": 0, "img_size": image_size},
        "backbone_sha256": described["sha256"],
        "proportional_attention": described.get("proportional_attention", True),
        "head": head,
        "classes": classes,
        "compressor": compressor,
        "train_degree": degree,
    }
    return segmenter, about


def save(path: str | os.PathLike, segmenter: Segmenter, about: dict) -> None:
    """Write a segmenter with what is needed to build it again."""
    tensors = segmenter.state_dict()
    save_tensors(path, tensors, about | {"format": 1, "kind": KIND, "sha256": digest(tensors)})


def load(path: str | os.PathLike) -> tuple[Segmenter, dict]:
    """Build the segmenter that :func:`save` wrote, in eval mode at the degree it was trained at.

    Raises:
        TocomError: the file is missing, corrupt or of another kind.
    """
    tensors, about = load_tensors(path)
    if about.get("kind") != KIND:
        raise TocomError(f"{path} holds {about.get('kind', 'something else')}, not a segmenter; check the path")
    if digest(tensors) != about["sha256"]:
        raise TocomError(f"{path} is corrupt: its weights do not match their hash; train it again")
    model = create(about["architecture"], about["kwargs"])
    head = make_head(about["head"], model.embed_dim, about["classes"])
    segmenter = Segmenter(compressed(model, about, about["compressor"], about["train_degree"]), head)
    segmenter.load_state_dict(tensors)
    return segmenter.eval(), about


def pixel_loss(scores: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Return the cross-entropy of scores [B, classes, H, W] and labels [B, H, W], averaged over labelled pixels.

    Without any labelled pixel it is 0, where torch's own mean is not a number.
    """
    total = F.cross_entropy(scores, labels, ignore_index=ignored, reduction="sum")
    return total / torch.count_nonzero(labels != ignored).clamp_min(1)
