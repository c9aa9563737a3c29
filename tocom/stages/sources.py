"""What backbones are pre-trained on, and parts learned on, where nothing is downloaded: letters, or text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.data import glyphs, texts
from tocom.tasks.classify import predict
from tocom.tasks.language import foretell, next_byte_losses, scored

#: Seeds of the letters; the held-out ones are never trained on, by any stage.
TRAIN_IMAGES_SEED, HELD_OUT_SEED = 0, 1
#: Images, or sequences, in a forward pass that scores.
SCORE_BATCH = 250


class Source(Protocol):
    """Where pre-training data come from.

    Attributes:
        name: what model cards call it. figure: what the held-out score is.
    """

    name: str
    figure: str

    def draw(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return n items in uint8 [n, ...] and what is to be said of them."""

    def loss(self, wrapped: Compressed, items: Tensor, wanted: Tensor, label_smoothing: float) -> Tensor:
        """Return the mean loss of pre-training on items and what is to be said of them."""

    def score(self, wrapped: Compressed, items: Tensor, wanted: Tensor) -> float:
        """Return the score on held-out items; larger is better."""


class Letters:
    """Procedural images of letters; which letter is it?"""

    name, figure = "glyph letters", "accuracy"

    def draw(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return images [n, 3, 32, 32] uint8 and labels [n] int64."""
        images, labels = glyphs.letters(n, HELD_OUT_SEED if held_out else TRAIN_IMAGES_SEED)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def loss(self, wrapped: Compressed, items: Tensor, wanted: Tensor, label_smoothing: float) -> Tensor:
        """Return the cross-entropy."""
        logits = wrapped(wrapped.inputs(items, wrapped.model))
        return F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)

    def score(self, wrapped: Compressed, items: Tensor, wanted: Tensor) -> float:
        """Return the share of images that are classified as labelled."""
        logits = predict(wrapped, items.to(next(wrapped.parameters()).device), SCORE_BATCH)
        return (logits.argmax(-1) == wanted.cpu()).double().mean().item()


class Texts:
    """Source code of a pinned package; what is the next byte?"""

    figure = "bits_saved"

    @property
    def name(self) -> str:
        """What it is, with version and hash."""
        return texts.described(texts.PRETRAINING)

    def draw(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return sequences [n, T] uint8, twice: they are what is to be said of themselves."""
        rows = torch.from_numpy(texts.pretraining(n, held_out))
        return rows, rows

    def loss(self, wrapped: Compressed, items: Tensor, wanted: Tensor, label_smoothing: float) -> Tensor:
        """Return the cross-entropy; labels of bytes are not smoothed."""
        return next_byte_losses(wrapped(wrapped.inputs(items, wrapped.model)), wanted).mean()

    def score(self, wrapped: Compressed, items: Tensor, wanted: Tensor) -> float:
        """Return the share of bits saved."""
        return scored(foretell(wrapped, items, SCORE_BATCH)).score / 100


#: What models read -> what they are pre-trained on.
SOURCES: dict[str, Source] = {"images": Letters(), "text": Texts()}
