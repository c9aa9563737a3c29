"""Paired statistics: does a condition beat the plain one, by how much, and how sure is that?

One comparison is a difference [seeds, images] in {-1, 0, 1}: whether an image is right with the compensator minus
whether it is right without it (cast to int first; numpy does not subtract booleans). All seeds see the same images.
Every test is two-sided and each answers a question of its own:

=================================  ==================================================================================
:func:`sign_flip_test`             would these trained models gain on other images of one task?
:func:`pooled_sign_flip_test`      the same for the mean over several tasks
:func:`seed_test`                  would models trained from other seeds gain?
:func:`task_test`                  would other tasks gain?
=================================  ==================================================================================

A bootstrap interval covers images and seeds together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tocom.errors import TocomError

#: Most bootstrap counts to hold at once (8 bytes each).
_CHUNK = 2**22
#: Decimals of a percentage point that count; the rest is round-off, which must not break ties.
_DECIMALS = 9


def gain(difference: ArrayLike) -> float:
    """Return the mean of a difference [seeds, images] in percentage points.

    Raises:
        TocomError: the difference is empty, has another shape, or holds anything but -1, 0 and 1.
    """
    return float(100 * _difference(difference).mean())


# --- intervals ----------------------------------------------------------------------------------------------


def bootstrap_gain(
    differences: Sequence[ArrayLike], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return a percentile interval, in percentage points, of the mean over tasks of the mean gain.

    Question: which gains are plausible, were other images and other seeds drawn? Seeds and images are resampled
    crosswise: every task draws its own images, all tasks share the draw of seeds. What three seeds can tell is
    limited: in simulations a 95 % interval covered the truth 99 % of the time where seeds scatter independently, but
    76 % where what a seed does to all images outweighs everything else. With one seed that spread is not seen at all.

    Args:
        differences: for each task [seeds, images of the task] in {-1, 0, 1}; one task is a list of one.
        resamples: draws. seed: of the draws. level: the share of draws in the interval.

    Raises:
        TocomError: there is no task, one is no such array, or the tasks differ in their number of seeds.
    """
    means = _crossed_bootstrap([_difference(d)[None] for d in differences], resamples, seed)
    return _interval(100 * means[:, 0], level)


def gap_closed(plain: float, compensated: float, matched: float) -> float:
    """Return the share of the gap to the matched-degree model that is closed; NaN where there is no gap to close.

    Args:
        plain, compensated, matched: accuracies in one unit, of the model without and with the compensator and of
            the model trained at the degree that it runs at.
    """
    return (compensated - plain) / (matched - plain) if matched > plain else float("nan")


def bootstrap_gap_closed(
    plain: Sequence[ArrayLike],
    compensated: Sequence[ArrayLike],
    matched: Sequence[ArrayLike],
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return a percentile interval of the mean gain over tasks divided by the mean gap over tasks, a share.

    Question and draws are those of :func:`bootstrap_gain`. Draws without a gap are left out; where the data
    themselves show none, both ends are NaN, as :func:`gap_closed` is.

    Args:
        plain, compensated, matched: for each task, which images are right [seeds, images of the task] bool.
        resamples: draws. seed: of the draws. level: the share of draws in the interval.

    Raises:
        TocomError: there is no task, the three do not match in shape, or the tasks differ in their number of seeds.
    """
    tasks = [_conditions(*task) for task in _zip_tasks(plain, compensated, matched)]
    means = _crossed_bootstrap(tasks, resamples, seed)
    observed = np.mean([task.mean(axis=(1, 2)) for task in tasks], axis=0)
    means = means[means[:, 2] > means[:, 0]]
    if observed[2] <= observed[0] or not len(means):
        return float("nan"), float("nan")
    return _interval((means[:, 1] - means[:, 0]) / (means[:, 2] - means[:, 0]), level)


def _crossed_bootstrap(tasks: Sequence[NDArray], resamples: int, seed: int) -> NDArray:
    """Resample seeds and images of ``tasks``, each [conditions, seeds, images]; return means [resamples, conditions].

    A draw with replacement is a multinomial vector of counts. Images with equal columns are interchangeable, so the
    counts are drawn for distinct columns: a few dozen numbers a draw, whatever the number of images.
    """
    if not tasks:
        raise TocomError("there is no task to compare; give at least one")
    if len({task.shape[1] for task in tasks}) > 1:
        raise TocomError(f"tasks have {[task.shape[1] for task in tasks]} seeds; run the same seeds in every task")
    n_conditions, n_seeds, _ = tasks[0].shape
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples) / n_seeds
    total = np.zeros((resamples, n_conditions))
    for task in tasks:
        n_images = task.shape[2]
        columns, counts = np.unique(task.reshape(-1, n_images), axis=1, return_counts=True)
        for rows in _chunks(resamples, len(counts)):
            image_weights = rng.multinomial(n_images, counts / n_images, size=rows.stop - rows.start) / n_images
            by_seed = (image_weights @ columns.T).reshape(-1, n_conditions, n_seeds)
            total[rows] += np.einsum("rcs,rs->rc", by_seed, seed_weights[rows])
    return total / len(tasks)


def _chunks(length: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _interval(values: NDArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- tests --------------------------------------------------------------------------------------------------


def sign_flip_test(difference: ArrayLike) -> float:
    """Return the exact two-sided p-value of a paired permutation test on images.

    Question: would these trained models gain on other images of the task? Under the null, exchanging the two
    conditions of an image under all seeds at once changes nothing. Seeds of one image are thus free to agree, which
    would make a test on all seed-image pairs overconfident. With one seed this is the exact McNemar test.

    Args:
        difference: [seeds, images] in {-1, 0, 1}.

    Returns:
        p in (0, 1], 1 when no image has a net difference.

    Raises:
        TocomError: as :func:`gain`.
    """
    return _sign_flip_p(_difference(difference).sum(axis=0, dtype=int))


def mcnemar_exact(difference: ArrayLike) -> float:
    """Return the p-value of the exact McNemar test; the question is that of :func:`sign_flip_test` for one seed.

    Args:
        difference: of one seed [images] in {-1, 0, 1}.

    Raises:
        TocomError: as :func:`gain`.
    """
    difference = _difference(difference, ndim=1)
    table = [[0, np.sum(difference > 0)], [np.sum(difference < 0), 0]]
    return float(mcnemar(table, exact=True).pvalue)


def pooled_sign_flip_test(differences: Sequence[ArrayLike], resamples: int = 100_000, seed: int = 0) -> float:
    """Return the two-sided Monte Carlo p-value of the sign-flip test for the mean over tasks of the mean gain.

    Question: would these trained models gain on other images of these tasks, on average over the tasks?

    Args:
        differences: for each task [seeds, images of the task] in {-1, 0, 1}.
        resamples: draws of the null. seed: of the draws.

    Returns:
        p = (1 + draws at least as extreme) / (1 + draws), so never below 1 / (1 + resamples).

    Raises:
        TocomError: there is no task, or one is no such array.
    """
    if not len(differences):
        raise TocomError("there is no task to compare; give at least one")
    rng = np.random.default_rng(seed)
    null, observed, largest = np.zeros(resamples), 0.0, 0.0
    for difference in map(_difference, differences):
        net = difference.sum(axis=0, dtype=int)
        for magnitude, count in zip(*_magnitudes(net), strict=True):
            # the sum of `count` fair signs is 2 * Binomial(count, 1/2) - count
            null += magnitude / difference.size * (2 * rng.binomial(count, 0.5, size=resamples) - count)
        observed += net.sum() / difference.size
        largest += np.abs(net).sum() / difference.size
    # the tolerance keeps draws that equal the observation but for round-off
    extreme = np.abs(null) >= abs(observed) - 1e-10 * largest
    return float((1 + extreme.sum()) / (1 + resamples))


def seed_test(gains_by_seed: ArrayLike) -> float:
    """Return the two-sided p-value of a one-sample t-test across seeds.

    Question: would models trained from other seeds gain, on these images?

    Args:
        gains_by_seed: [seeds], in points.

    Returns:
        p, 1 when all gains are 0. NaN (undefined) with fewer than two seeds, and when all gains are equal but not 0:
        no spread among a few seeds tells that accuracy is discrete, not that the gain is certain.
    """
    gains = np.asarray(gains_by_seed, dtype=float)
    if len(gains) < 2:
        return float("nan")
    if not gains.any():
        return 1.0
    if np.ptp(gains) < 10.0**-_DECIMALS:
        return float("nan")
    return float(stats.ttest_1samp(gains, 0).pvalue)


def task_test(gains_by_task: ArrayLike) -> float:
    """Return the exact two-sided p-value of the Wilcoxon signed-rank test across tasks.

    Question: would other tasks gain? Tasks without any gain or loss are left out, as Wilcoxon does. With n tasks
    left, no p-value is below 2 ** (1 - n): five tasks cannot reach 0.05.

    Args:
        gains_by_task: [tasks], in points.

    Returns:
        p, 1 when all gains are 0, NaN with fewer than two tasks or where a gain is NaN.
    """
    gains = np.round(np.asarray(gains_by_task, dtype=float), _DECIMALS)
    if len(gains) < 2 or np.isnan(gains).any():
        return float("nan")
    gains = gains[gains != 0]
    # Flipping the signs of ranks is the signed-rank test. scipy's own is exact only without ties or up to 13 tasks;
    # ties share a rank that is whole or a half, hence the 2.
    ranks = 2 * stats.rankdata(np.abs(gains))
    return _sign_flip_p((np.sign(gains) * ranks).astype(int))


def _sign_flip_p(values: NDArray) -> float:
    """Return how likely integers [n] with random signs sum to something as far from 0 as they do, exactly."""
    total, observed = np.abs(values).sum(), abs(values.sum())
    # the distribution of the sum of the values that keep a plus sign, on the grid 0..total
    kept = np.ones(1)
    for magnitude, count in zip(*_magnitudes(values), strict=True):
        step = np.zeros(magnitude * count + 1)
        step[::magnitude] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        kept = np.convolve(kept, step)  # not by FFT, which would lose small tails
    # kept minus flipped is 2 * kept - total: compare whole numbers, free of round-off
    tail = 2 * kept[(total + observed) // 2 :].sum()
    # more than a thousand images all on one side underflow to 0
    return float(np.clip(tail, np.finfo(float).tiny, 1))


def _magnitudes(values: NDArray) -> tuple[NDArray, NDArray]:
    """Return the distinct sizes of the integers that are not 0, and how often each occurs."""
    return np.unique(np.abs(values[values != 0]), return_counts=True)


# --- many tests ---------------------------------------------------------------------------------------------


def holm(p_values: ArrayLike) -> NDArray:
    """Return Holm's adjusted p-values [n] of a family [n]: the chance of any false claim stays below the level.

    A NaN stays NaN and does not count as a member of the family.
    """
    adjusted = np.array(p_values, dtype=float)
    defined = ~np.isnan(adjusted)
    if defined.any():
        adjusted[defined] = multipletests(adjusted[defined], method="holm")[1]
    return adjusted


def stars(p: float) -> str:
    """Return ``***`` for p < 0.001, ``**`` for p < 0.01, ``*`` for p < 0.05, and nothing above or for NaN."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


# --- what goes in -------------------------------------------------------------------------------------------


def _difference(difference: ArrayLike, ndim: int = 2) -> NDArray:
    difference = np.asarray(difference)
    if difference.ndim != ndim or not difference.size:
        axes = "[seeds, images]" if ndim == 2 else "[images]"
        raise TocomError(f"a difference is {axes} and not empty; this one has shape {list(difference.shape)}")
    if not np.isin(difference, (-1, 0, 1)).all():
        raise TocomError("a difference holds -1, 0 and 1 only; subtract signed integers, one for each image")
    return difference.astype(np.int8)


def _conditions(*conditions: ArrayLike) -> NDArray:
    """Stack the conditions of one task, each [seeds, images] bool, as [conditions, seeds, images]."""
    arrays = [np.asarray(condition) for condition in conditions]
    shapes = [list(array.shape) for array in arrays]
    if any(shape != shapes[0] for shape in shapes) or arrays[0].ndim != 2 or not arrays[0].size:
        raise TocomError(f"conditions have shapes {shapes}; they share one [seeds, images] that is not empty")
    if not all(np.isin(array, (0, 1)).all() for array in arrays):
        raise TocomError("whether an image is right is true or false; give booleans, not labels or scores")
    return np.stack(arrays).astype(np.int8)


def _zip_tasks(*conditions: Sequence[ArrayLike]) -> Iterator[tuple[ArrayLike, ...]]:
    lengths = [len(condition) for condition in conditions]
    if len(set(lengths)) > 1:
        raise TocomError(f"conditions have {lengths} tasks; give every condition of every task")
    return zip(*conditions, strict=True)
