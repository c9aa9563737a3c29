"""Segmentation: a small head on the patch tokens, cross-entropy of pixels, counts for every image, mIoU.

Images are scaled and cut to the square input size, in testing too; there is no sliding window, so figures on ADE20k
are of the centre of each image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tocom import distributed
from tocom.analysis.scores import METRICS, Counts, count, miou
from tocom.data.loading import feed, in_one_line
from tocom.data.pixels import Split, TrainViews, load
from tocom.data.scenes import IGNORED
from tocom.errors import TocomError
from tocom.models import check_patches, load_model, set_image_size
from tocom.settings import SegmentSettings
from tocom.tasks.base import Task, Validated
from tocom.training import autocast, compiled, normalise
from tocom.vit import CompressedViT


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
        vit: the backbone; its compressor has to give every token back.
        decoder: maps patch tokens [B, D, h, w] to class scores [B, classes, h, w].

    Raises:
        TocomError: the compressor takes tokens away for good.
    """

    def __init__(self, vit: CompressedViT, decoder: nn.Module):
        super().__init__()
        if not vit.compressor.restores:
            raise TocomError(
                f"compressor {vit.compressor.title!r} takes patches away that a segmentation head needs; use one that"
                " restores them (`tocom methods`)"
            )
        self.vit, self.decoder = vit, decoder

    def forward(self, images: Tensor) -> Tensor:
        """Score images [B, 3, H, W] -> [B, classes, H, W]: the scores of the patches, bilinearly interpolated."""
        tokens, _ = self.vit.forward_features(images)
        grid = self.vit.model.patch_embed.grid_size
        tokens = self.vit.model.fc_norm(tokens)  # the last norm of models that average before it, else nothing
        patches = tokens[:, self.vit.prefix :].transpose(1, 2).unflatten(2, grid)
        scores = self.decoder(patches).float()
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers are not to decay."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}


class Segmentation(Task):
    """A task with one class for every pixel."""

    kind, metric = "segment", "mIoU"

    def __init__(self, path: str | os.PathLike, arrays: dict[str, np.ndarray], about: dict, device: torch.device):
        super().__init__(about, device)
        self.size, self.splits = about["image_size"], load(path).splits
        self.n_train = len(self.splits["train"])

    def backbone(self, path: str | os.PathLike, settings: SegmentSettings) -> tuple[nn.Module, dict]:
        """Return a backbone without its classifier, its position embedding resized to the images."""
        model, about = load_model(path, drop_path_rate=settings.drop_path)
        check_patches(self.size, model.patch_embed.patch_size[0])
        model.reset_classifier(0)
        set_image_size(model, self.size)
        about["kwargs"] = about["kwargs"] | {"num_classes": 0, "img_size": self.size}
        return model, about

    def check(self, model: nn.Module) -> None:
        """Raise TocomError unless the images have the size that the model takes."""
        if tuple(model.patch_embed.img_size) != (self.size, self.size):
            raise TocomError(
                f"the images of {self.name} have {self.size} pixels a side, the model takes"
                f" {model.patch_embed.img_size}; prepare the task with data.image_size"
            )

    def module(self, vit: CompressedViT, settings: SegmentSettings) -> Segmenter:
        """Return the ViT behind a new head, drawn from torch's random state."""
        return Segmenter(vit, make_head(settings.head, vit.model.embed_dim, self.classes)).to(self.device)

    def restore(self, vit: CompressedViT, about: dict) -> Segmenter:
        """Return the ViT behind the head that its checkpoint holds."""
        head = make_head(about["head"], vit.model.embed_dim, self.classes)
        try:
            head.load_state_dict(about["beside"]["decoder"])
        except (KeyError, RuntimeError):
            raise TocomError(f"the checkpoint has no head for the {self.classes} classes of {self.name}") from None
        return Segmenter(vit, head).to(self.device)

    def beside(self, module: Segmenter) -> dict[str, nn.Module]:
        """Return the head, which is no part of the timm ViT."""
        return {"decoder": module.decoder}

    def about(self, settings: SegmentSettings) -> dict[str, Any]:
        """Return the kind of head."""
        return {"head": settings.head}

    def training(
        self, module: Segmenter, vit: CompressedViT, settings: SegmentSettings, seed: int, workers: int
    ) -> tuple[Callable, Callable]:
        """Return the loss of a micro-batch, and what feeds it random views."""
        run, views = compiled(module, settings), TrainViews(self.splits["train"], settings, seed)

        def step(item: Sequence[Tensor]) -> Tensor:
            images, labels = (part.to(self.device, non_blocking=True) for part in item)
            return pixel_loss(run(normalise(images, vit.model)), labels, IGNORED)

        return step, feed(views, workers, pin=self.device.type == "cuda")

    def validate(self, module: Segmenter, batch_size: int, precision: str, workers: int = 0) -> Validated:
        """Return the mIoU (%) on the validation images and minus the cross-entropy of their labelled pixels (nats)."""
        return scored(*segment(module, self.splits["val"], batch_size, precision, workers))

    def test(self, module: Segmenter, batch_size: int, precision: str) -> dict[str, np.ndarray]:
        """Return the counts tp, fp and fn of every test image [images, classes] int32."""
        return segment(module, self.splits["test"], batch_size, precision)[0]._asdict()


@torch.inference_mode()
def segment(
    segmenter: Segmenter, split: Split, batch_size: int, precision: str = "fp32", workers: int = 0
) -> tuple[Counts, NDArray]:
    """Label every image of a split; several processes share the work.

    Args:
        workers: processes that decode images ahead.

    Returns:
        Counts [images, classes] int32, and the cross-entropy of each image, summed over labelled pixels [images].
    """
    segmenter.eval()
    device = next(segmenter.parameters()).device
    batches = distributed.share([batch.tolist() for batch in torch.arange(len(split)).split(batch_size)])
    # A generator of its own: the loader must not draw from the training's random stream.
    loader = DataLoader(split, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    results = []
    for item in in_one_line(iter(loader)):
        images, labels = (part.to(device) for part in item)
        labels = labels.long()
        with autocast(precision, device):
            scores = segmenter(normalise(images, segmenter.vit.model))
        # A sum over one image's pixels does not depend on what else is in the batch.
        losses = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none").double().sum(dim=(1, 2))
        results.append((count(scores.argmax(1).cpu(), labels.cpu(), split.classes), losses.cpu().numpy()))
    results = distributed.gather(results)
    counts = Counts(*(np.concatenate(parts) for parts in zip(*(c for c, _ in results), strict=True)))
    return counts, np.concatenate([losses for _, losses in results])


def scored(counts: Counts, losses: NDArray) -> Validated:
    """Return what :func:`segment` found as a score and minus a loss: of all pixels, so linearised by image."""
    scores = METRICS[Segmentation.metric].values(np.stack(counts, axis=-2)[None])[0]
    pixels = (counts.tp + counts.fn).sum(axis=-1, dtype=np.int64)
    total = max(int(pixels.sum()), 1)
    loss = float(losses.sum()) / total
    by_image = {"score": scores, "loss": -loss - len(losses) / total * (losses - loss * pixels)}
    return Validated(float(miou(counts)), -loss, by_image)


def pixel_loss(scores: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Return the cross-entropy of scores [B, classes, H, W] and labels [B, H, W], averaged over labelled pixels.

    Without any labelled pixel it is 0, where torch's own mean is not a number.
    """
    total = F.cross_entropy(scores, labels, ignore_index=ignored, reduction="sum")
    return total / torch.count_nonzero(labels != ignored).clamp_min(1)
