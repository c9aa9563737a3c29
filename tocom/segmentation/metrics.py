"""Mean intersection over union (mIoU) from counts that are kept for every image, so that images can be resampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tocom.errors import TocomError
from tocom.segmentation.scenes import IGNORED

#: Resamples that are summed at once.
_CHUNK = 256


class Counts(NamedTuple):
    """Pixels by class: right, wrongly given the class, wrongly denied it; arrays [..., images, classes]."""

    tp: NDArray
    fp: NDArray
    fn: NDArray


class Interval(NamedTuple):
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float


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
    return _mean_iou(*(np.asarray(part).sum(axis=-2, dtype=np.int64) for part in counts))


def _mean_iou(tp: NDArray, fp: NDArray, fn: NDArray) -> NDArray:
    union = tp + fp + fn
    shares = np.divide(tp, union, out=np.zeros(union.shape), where=union > 0)
    return 100 * shares.sum(axis=-1) / np.maximum((union > 0).sum(axis=-1), 1)


def pixel_accuracy(counts: Counts) -> float:
    """Return the percentage of labelled pixels that are right."""
    right, missed = int(np.sum(counts.tp, dtype=np.int64)), int(np.sum(counts.fn, dtype=np.int64))
    return 100 * right / max(right + missed, 1)


def bootstrap(conditions: Sequence[Counts], resamples: int = 2000, seed: int = 0) -> NDArray:
    """Return the mIoU of each condition, averaged over seeds, for random draws of images and seeds.

    Every draw takes the same images and the same seeds for all conditions, so differences are paired. Seeds and
    images are drawn crosswise, as in :func:`tocom.analysis.stats.bootstrap_gain`.

    Args:
        conditions: counts [seeds, images, classes] of the same seeds and images.

    Returns:
        Draws [resamples, conditions], in percent.

    Raises:
        TocomError: the conditions differ in shape.
    """
    shapes = {np.shape(part) for counts in conditions for part in counts}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise TocomError(f"conditions have counts of shapes {sorted(shapes)}; give the same [seeds, images, classes]")
    n_seeds, n_images, _ = next(iter(shapes))
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    draws = np.empty((resamples, len(conditions)))
    for start in range(0, resamples, _CHUNK):
        rows = slice(start, min(start + _CHUNK, resamples))
        of_images = rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=rows.stop - rows.start)
        for column, counts in enumerate(conditions):
            # Products of whole numbers below 2^53 are exact in floats, and those are what BLAS multiplies fast.
            sums = [of_images.astype(float) @ np.asarray(part, dtype=float) for part in counts]
            by_seed = _mean_iou(*sums)  # [seeds, draws]
            draws[rows, column] = (by_seed.T * of_seeds[rows]).sum(axis=1) / n_seeds
    return draws


def interval(draws: ArrayLike, value: float, level: float = 0.95) -> Interval:
    """Return a figure with the percentile interval of its draws [resamples]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def estimate(counts: Counts, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mIoU in percent of counts [seeds, images, classes], averaged over seeds, and its 95 % interval."""
    return interval(bootstrap([counts], resamples, seed)[:, 0], miou(counts).mean())


def difference(counts: Counts, plain: Counts, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the gain in mIoU (points) of one condition over another and its paired 95 % interval.

    Args:
        counts, plain: [seeds, images, classes] of the same seeds and images.
    """
    draws = bootstrap([counts, plain], resamples, seed)
    return interval(draws[:, 0] - draws[:, 1], (miou(counts) - miou(plain)).mean())
