"""Language: a text's next byte everywhere, cross-entropy, the bits of every sequence, the share of bits saved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom import distributed
from tocom.analysis.scores import METRICS
from tocom.compressed import Compressed
from tocom.errors import TocomError
from tocom.models import family_of, load_model
from tocom.settings import LanguageSettings
from tocom.tasks.base import Task, Validated
from tocom.training import autocast, compiled


class Language(Task):
    """A text, cut into sequences of which every byte is to be foretold from those before it."""

    kind, metric = "language", "bits saved"

    def __init__(self, path: str | os.PathLike, arrays: dict[str, np.ndarray], about: dict, device: torch.device):
        super().__init__(about, device)
        splits = (torch.from_numpy(arrays[f"{name}_text"]).to(device) for name in ("train", "val", "test"))
        self.train_split, self.val_split, self.test_split = splits
        self.n_train = len(self.train_split)

    def backbone(self, path: str | os.PathLike, settings: LanguageSettings) -> tuple[nn.Module, dict]:
        """Return a backbone, which keeps its head, and its checkpoint's metadata."""
        return load_model(path, drop_path_rate=settings.drop_path)

    def check(self, model: nn.Module) -> None:
        """Raise TocomError unless a model reads bytes, and as many as a sequence has."""
        family, length = family_of(model), self.val_split.shape[1]
        if family.reads != "text" or family.outputs(model) < self.classes:
            raise TocomError(f"{self.name} is a text of {self.classes} tokens, which the backbone does not read")
        if family.shape_of(model).tokens < length:
            raise TocomError(
                f"the sequences of {self.name} have {length} bytes, the backbone's context"
                f" {family.shape_of(model).tokens}; give it max_position_embeddings: {length}"
            )

    def unlabelled(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the training and the validation sequences [n, T] uint8."""
        self.check(model)
        return self.train_split, self.val_split

    def training(
        self, module: nn.Module, vit: Compressed, settings: LanguageSettings, seed: int, workers: int
    ) -> tuple[Callable, None]:
        """Return the loss of a micro-batch; the indices of its sequences are enough."""
        run, text = compiled(module, settings), self.train_split

        def loss(indices: Tensor) -> Tensor:
            batch = text[indices.to(text.device)]
            return next_byte_losses(run(vit.inputs(batch, vit.model)), batch).mean()

        return loss, None

    def validate(self, module: nn.Module, batch_size: int, precision: str, workers: int = 0) -> Validated:
        """Return the share of bits saved on the validation sequences (%) and minus their cross-entropy (nats)."""
        return scored(foretell(module, self.val_split, batch_size, precision))

    def test(self, module: nn.Module, batch_size: int, precision: str) -> dict[str, np.ndarray]:
        """Return bits, bytes, and bytes that were the likeliest, of every test sequence [sequences]."""
        return foretell(module, self.test_split, batch_size, precision)


def next_byte_losses(logits: Tensor, text: Tensor) -> Tensor:
    """Return the cross-entropy (nats) of logits [B, T, V] for every byte of a text [B, T] -> [B, T]."""
    wanted = text.long().flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="none").view(text.shape)


@torch.inference_mode()
def foretell(lm: Compressed, text: Tensor, batch_size: int, precision: str = "fp32") -> dict[str, np.ndarray]:
    """Return bits (float64), bytes and bytes that were the likeliest (int32) of sequences [n, T] uint8, each [n].

    Several processes share the work.
    """
    lm.eval()
    device, results = next(lm.parameters()).device, []
    for batch in distributed.share(text.split(batch_size)):
        batch = batch.to(device)
        with autocast(precision, device):
            logits = lm(lm.inputs(batch, lm.model))
        bits = next_byte_losses(logits, batch).double().sum(dim=1) / math.log(2)
        results.append((bits.cpu().numpy(), (logits.argmax(-1) == batch).sum(dim=1).cpu().numpy()))
    bits, foretold = (np.concatenate(parts) for parts in zip(*distributed.gather(results), strict=True))
    return {"bits": bits, "bytes": np.full(len(bits), text.shape[1], np.int32), "foretold": foretold.astype(np.int32)}


def scored(found: dict[str, np.ndarray]) -> Validated:
    """Return what :func:`foretell` found as a score and minus a loss, the mean over sequences of equal length."""
    metric = METRICS[Language.metric]
    saved = metric.values(metric.records({name: values[None] for name, values in found.items()}))[0]
    losses = math.log(2) * found["bits"] / found["bytes"]
    return Validated(float(saved.mean()), -float(losses.mean()), {"score": saved, "loss": -losses})
