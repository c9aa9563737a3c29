"""The scores of a study's tasks: accuracy of classifiers, mIoU of segmenters, bits that language models save.

A record is what a score needs to know of every test image: for accuracy whether it is right [images] bool, for mIoU
its pixels by class [images, 3, classes], of a sequence of text its bits, bytes and bytes foretold [images, 3]. Records
of several seeds are stacked as runs [seeds, images, ...].
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tocom.data.scenes import IGNORED
from tocom.errors import TocomError
from tocom.files import load_arrays, understood


class Counts(NamedTuple):
    """Pixels by class: right, wrongly given the class, wrongly denied it; arrays [..., images, classes]."""

    tp: NDArray
    fp: NDArray
    fn: NDArray


def count(predicted: ArrayLike, labels: ArrayLike, classes: int) -> Counts:
    """Count the pixels of some images.

    Args:
        predicted: classes [B, H, W] of integers. labels: [B, H, W], 255 where a pixel does not count.

    Returns:
        Counts [B, classes] int32.
    """
    predicted, labels = np.asarray(predicted, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    tables = [
        np.bincount(classes * wanted[wanted != IGNORED] + given[wanted != IGNORED], minlength=classes**2)
        for given, wanted in zip(predicted, labels, strict=True)
    ]
    confusion = np.stack(tables).reshape(-1, classes, classes)  # image, label, prediction
    right = confusion.diagonal(axis1=1, axis2=2)
    return Counts(*(c.astype(np.int32) for c in (right, confusion.sum(1) - right, confusion.sum(2) - right)))


def miou(counts: Counts) -> NDArray:
    """Return the mIoU in percent, [...] for counts [..., images, classes].

    Pixels are summed over images first. Classes that are neither there nor predicted are left out of the mean.
    """
    return 100 * _miou(np.stack([np.asarray(part).sum(axis=-2, dtype=np.int64) for part in counts], axis=-2))


def _miou(sums: NDArray) -> NDArray:
    """Return the mIoU as a share, [...] for sums over images [..., 3, classes]."""
    union = sums.sum(axis=-2)
    shares = np.divide(sums[..., 0, :], union, out=np.zeros(union.shape), where=union > 0)
    return shares.sum(axis=-1) / np.maximum((union > 0).sum(axis=-1), 1)


class Metric(ABC):
    """Base of all scores, which define what a record is and what comes of it.

    Attributes:
        name: in predictions files, configs and tables.
    """

    name: str

    @abstractmethod
    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return the records of a predictions file's cells [cells, images, ...]."""

    @abstractmethod
    def row(self, record: NDArray) -> dict[str, float]:
        """Return n, correct, accuracy and score of one record, as cells.csv has them."""

    @abstractmethod
    def values(self, runs: NDArray) -> NDArray:
        """Return a number for every image [seeds, images] whose mean over images is the score in points.

        All statistics start from these. A score that is no mean over images is linearised: other images would move it
        as they move the mean of these numbers, but for what falls faster than 1 / images (its influence function).
        """


class Accuracy(Metric):
    """The share of images that are classified right."""

    name = "accuracy"

    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return which images are right [cells, images]."""
        return arrays["predictions"] == arrays["labels"]

    def row(self, record: NDArray) -> dict[str, float]:
        """Return n (images), correct, accuracy and score of one record."""
        correct = int(record.sum())
        share = correct / len(record)
        return {"n": len(record), "correct": correct, "accuracy": share, "score": share}

    def values(self, runs: NDArray) -> NDArray:
        """Return 100 for every image that is right and 0 for the others [seeds, images]."""
        return 100.0 * runs


class MeanIoU(Metric):
    """Mean intersection over union: of pixels that are summed over images first, so no mean over images."""

    name = "mIoU"

    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return pixels by class [cells, images, 3, classes]."""
        return np.stack([arrays[part] for part in Counts._fields], axis=-2)

    def row(self, record: NDArray) -> dict[str, float]:
        """Return n (labelled pixels), correct, accuracy and score of one record."""
        sums = record.sum(axis=0, dtype=np.int64)
        correct, missed = int(sums[0].sum()), int(sums[2].sum())
        n = correct + missed
        return {"n": n, "correct": correct, "accuracy": correct / max(n, 1), "score": float(_miou(sums))}

    def values(self, runs: NDArray) -> NDArray:
        """Return the mIoU plus the influence of every image [seeds, images]."""
        sums = runs.sum(axis=1, dtype=np.int64)
        union = sums.sum(axis=-2)  # [seeds, classes]
        there = np.maximum((union > 0).sum(axis=-1), 1)[:, None]
        share = sums[:, 0] / np.maximum(union, 1)
        # what an image adds to the intersection beyond its share of the union, over the union
        beyond = runs[:, :, 0] - share[:, None] * runs.sum(axis=2, dtype=np.int64)
        influence = (beyond / np.maximum(union, 1)[:, None]).sum(axis=-1) / there
        return 100 * (_miou(sums)[:, None] + runs.shape[1] * influence)


class BitsSaved(Metric):
    """The share of a text's bits that a model saves: 1 - (bits per byte) / 8. An image is a sequence here."""

    name = "bits saved"

    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return bits, bytes, and bytes that were the likeliest, of every sequence [cells, sequences, 3] float64."""
        return np.stack([arrays[part] for part in ("bits", "bytes", "foretold")], axis=-1).astype(np.float64)

    def row(self, record: NDArray) -> dict[str, float]:
        """Return n (bytes), correct (those that were the likeliest), accuracy and score of one record."""
        _, n, correct = record.sum(axis=0)
        return {
            "n": int(n),
            "correct": int(correct),
            "accuracy": float(correct / n),
            "score": float(_saved(record).mean()),
        }

    def values(self, runs: NDArray) -> NDArray:
        """Return the share of bits saved in percent of every sequence [seeds, sequences]."""
        return 100 * _saved(runs)


def _saved(records: NDArray) -> NDArray:
    return 1 - records[..., 0] / (8 * records[..., 1])


def bits_per_byte(saved: ArrayLike) -> NDArray:
    """Return what a mean score of :class:`BitsSaved` in percent is in bits a byte."""
    return 8 * (1 - np.asarray(saved) / 100)


#: Every score by the name that predictions files and configs give it.
METRICS: dict[str, Metric] = {metric.name: metric for metric in (Accuracy(), MeanIoU(), BitsSaved())}


#: What a predictions file says of each of its cells at least.
_CELL = {
    *("method", "seed", "train_degree", "infer_degree"),
    *("compressor", "compensated", "compensator", "scale", "gflops"),
}


def read_predictions(path: str | os.PathLike) -> tuple[dict, list[tuple[dict, NDArray]]]:
    """Return the metadata of a predictions file, and each of its cells with its record."""
    arrays, meta = load_arrays(path)
    if meta.get("kind") != "predictions" or str(meta.get("metric")) not in METRICS:
        raise TocomError(f"{path} holds no predictions of this version; give files that `tocom evaluate` wrote")
    with understood(path):
        found = list(zip(meta["cells"], METRICS[meta["metric"]].records(arrays), strict=True))
        if (
            not all(cell.keys() >= _CELL and len(record) for cell, record in found)
            or not {"backbone", "task"} <= meta.keys()
        ):
            raise ValueError("a cell is not whole")
        return meta, found
