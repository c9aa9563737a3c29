"""The scores of a study's tasks: accuracy of classifiers, mean intersection over union (mIoU) of segmenters.

A record is what a score needs to know of every test image: for accuracy whether it is right [images] bool, for mIoU
its pixels by class [images, 3, classes]. Records of several seeds are stacked as runs [seeds, images, ...].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tocom.analysis import stats
from tocom.data.scenes import IGNORED
from tocom.errors import TocomError
from tocom.files import load_arrays

#: Random exchanges of conditions that the test on images of mIoU makes, and how many at once.
_EXCHANGES, _CHUNK = 10_000, 500


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


#: Runs [seeds, images, ...] of one condition, a task each.
Tasks = Sequence[NDArray]


class Metric:
    """Base of all scores, which define what a record is and what comes of it.

    Attributes:
        name: in predictions files, configs and tables. image_test_name: what captions call its test on images.
        share: makes a score, as a share, of records that are averaged over images.
    """

    name: str
    image_test_name: str
    share: Callable[[NDArray], NDArray]

    def draws(self, *conditions: Tasks, resamples: int) -> NDArray:
        """Return scores, as shares, of bootstrap draws [resamples, conditions]; see :func:`stats.crossed_bootstrap`."""
        tasks = [np.stack(task) for task in zip(*conditions, strict=True)]
        return stats.crossed_bootstrap(tasks, resamples, 0, self.share)

    def gain_interval(self, before: Tasks, after: Tasks, resamples: int) -> tuple[float, float]:
        """Return the 95 % interval, in points, of the mean over tasks of the gain, over images and seeds."""
        draws = self.draws(before, after, resamples=resamples)
        return stats.interval(100 * (draws[:, 1] - draws[:, 0]))

    def gap_interval(self, before: Tasks, after: Tasks, matched: Tasks, resamples: int) -> tuple[float, float]:
        """Return the 95 % interval of the share of the gap between ``before`` and ``matched`` that is closed."""
        observed = [np.mean([self.percent(task) for task in tasks]) for tasks in (before, after, matched)]
        return stats.interval_of_gap(self.draws(before, after, matched, resamples=resamples), observed)


class Accuracy(Metric):
    """The share of images that are classified right."""

    name = "accuracy"
    image_test_name = "paired sign-flip test on images"
    share = staticmethod(lambda means: means)

    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return the records of a predictions file's cells [cells, images]."""
        return arrays["predictions"] == arrays["labels"]

    def row(self, record: NDArray) -> dict[str, float]:
        """Return n, correct, accuracy and score of one record, as cells.csv has them."""
        correct = int(record.sum())
        share = correct / len(record)
        return {"n": len(record), "correct": correct, "accuracy": share, "score": share}

    def percent(self, runs: NDArray) -> float:
        """Return the score in percent, averaged over seeds."""
        return 100 * float(runs.mean())

    def gains(self, before: NDArray, after: NDArray) -> NDArray:
        """Return the gain in points by seed [seeds]."""
        return 100 * _difference(before, after).mean(axis=1)

    def gain_interval(self, before: Tasks, after: Tasks, resamples: int) -> tuple[float, float]:
        """Return what :meth:`Metric.gain_interval` does, from draws of differences, of which there are but three."""
        differences = [_difference(*task)[None] for task in zip(before, after, strict=True)]
        return stats.interval(100 * stats.crossed_bootstrap(differences, resamples, 0)[:, 0])

    def image_test(self, before: Tasks, after: Tasks) -> float:
        """Return the p-value of the mean gain over tasks: exact for one task, Monte Carlo for several."""
        differences = list(map(_difference, before, after))
        return stats.sign_flip_test(*differences) if len(differences) == 1 else stats.pooled_sign_flip_test(differences)


def _difference(before: NDArray, after: NDArray) -> NDArray:
    return after.astype(np.int8) - before.astype(np.int8)


class MeanIoU(Metric):
    """Mean intersection over union: of pixels that are summed over images first, so no mean over images."""

    name = "mIoU"
    image_test_name = "test by exchanging the two conditions image by image"
    share = staticmethod(_miou)

    def records(self, arrays: dict[str, NDArray]) -> NDArray:
        """Return the records of a predictions file's cells [cells, images, 3, classes]."""
        return np.stack([arrays[part] for part in Counts._fields], axis=-2)

    def row(self, record: NDArray) -> dict[str, float]:
        """Return n (labelled pixels), correct, accuracy and score of one record, as cells.csv has them."""
        sums = record.sum(axis=0, dtype=np.int64)
        correct, missed = int(sums[0].sum()), int(sums[2].sum())
        n = correct + missed
        return {"n": n, "correct": correct, "accuracy": correct / max(n, 1), "score": float(_miou(sums))}

    def percent(self, runs: NDArray) -> float:
        """Return the score in percent, averaged over seeds."""
        return float(self._by_seed(runs).mean())

    def _by_seed(self, runs: NDArray) -> NDArray:
        return 100 * _miou(runs.sum(axis=1, dtype=np.int64))

    def gains(self, before: NDArray, after: NDArray) -> NDArray:
        """Return the gain in points by seed [seeds]."""
        return self._by_seed(after) - self._by_seed(before)

    def image_test(self, before: Tasks, after: Tasks, exchanges: int = _EXCHANGES) -> float:
        """Return the two-sided Monte Carlo p-value of the mean gain over tasks, never below 1 / (1 + exchanges).

        Under the null, exchanging the two conditions of an image under all seeds at once changes nothing.
        """
        rng = np.random.default_rng(0)
        observed = np.mean([self.gains(*task).mean() for task in zip(before, after, strict=True)])
        null = np.mean([self._exchanged(a, b, exchanges, rng) for a, b in zip(before, after, strict=True)], axis=0)
        return float((1 + (np.abs(null) >= abs(observed) - 1e-9).sum()) / (1 + exchanges))

    def _exchanged(self, before: NDArray, after: NDArray, exchanges: int, rng: np.random.Generator) -> NDArray:
        """Return the gain in points, averaged over seeds, after random exchanges [exchanges]."""
        first, second = (runs.sum(axis=1, dtype=np.int64).astype(float) for runs in (before, after))
        change = np.moveaxis(after.astype(float) - before, 1, 0)  # [images, seeds, 3, classes]
        change = change[change.any(axis=(1, 2, 3))]
        gains = []
        for start in range(0, exchanges, _CHUNK):
            which = rng.integers(2, size=(min(_CHUNK, exchanges - start), len(change))).astype(float)
            moved = np.tensordot(which, change, axes=1)
            gains.append(100 * (_miou(second - moved) - _miou(first + moved)).mean(axis=1))
        return np.concatenate(gains)


#: Every score by the name that predictions files and configs give it.
METRICS: dict[str, Metric] = {metric.name: metric for metric in (Accuracy(), MeanIoU())}


def read_predictions(path: str | os.PathLike) -> tuple[dict, list[tuple[dict, NDArray]]]:
    """Return the metadata of a predictions file, and each of its cells with its record."""
    arrays, meta = load_arrays(path)
    if meta.get("kind") != "predictions" or meta.get("metric") not in METRICS:
        raise TocomError(f"{path} holds no predictions of this version; give files that `tocom evaluate` wrote")
    return meta, list(zip(meta["cells"], METRICS[meta["metric"]].records(arrays), strict=True))
