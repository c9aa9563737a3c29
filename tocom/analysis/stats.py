"""Paired statistics: does a condition beat the plain one, by how much, and how sure is that?

One comparison is a difference [seeds, images] of integers in {-1, 0, 1}: whether an image is right with the compensator
minus whether it is right without it. All seeds see the same images.
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

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

#: Most bootstrap counts to hold at once (8 bytes each).
_CHUNK = 2**22
#: Decimals of a percentage point that count; the rest is round-off, which must not break ties.
_DECIMALS = 9
#: What share of draws an interval holds.
_LEVEL = 0.95


# --- intervals ----------------------------------------------------------------------------------------------


def gap_closed(plain: float, compensated: float, matched: float) -> float:
    """Return the share of the gap to the matched-degree model that is closed; NaN where there is no gap to close.

    Args:
        plain, compensated, matched: accuracies in one unit, of the model without and with the compensator and of
            the model trained at the degree that it runs at.
    """
    return (compensated - plain) / (matched - plain) if matched > plain else float("nan")


def interval_of_gap(means: NDArray, observed: ArrayLike) -> tuple[float, float]:
    """Return the percentile interval of the share of a gap that is closed.

    Draws without a gap are left out; where the data themselves show none, both ends are NaN, as :func:`gap_closed` is.

    Args:
        means: draws [resamples, 3] of the scores that :func:`gap_closed` takes. observed: the scores themselves.
    """
    means = means[means[:, 2] > means[:, 0]]
    if observed[2] <= observed[0] or not len(means):
        return float("nan"), float("nan")
    return interval((means[:, 1] - means[:, 0]) / (means[:, 2] - means[:, 0]))


def crossed_bootstrap(
    tasks: Sequence[NDArray], resamples: int, seed: int, score: Callable[[NDArray], NDArray] = lambda means: means
) -> NDArray:
    """Resample seeds and images of tasks, the same ones for all conditions.

    Question: which scores are plausible, were other images and other seeds drawn? Seeds and images are resampled
    crosswise: every task draws its own images, all tasks share the draw of seeds. What three seeds can tell is
    limited: in simulations a 95 % interval covered the truth 99 % of the time where seeds scatter independently, but
    76 % where what a seed does to all images outweighs everything else. With one seed that spread is not seen at all.

    A draw with replacement is a multinomial vector of counts. Images with equal columns are interchangeable, so the
    counts are drawn for distinct columns: a few dozen numbers a draw, whatever the number of images.

    Args:
        tasks: each [conditions, seeds, images, ...] of the same seeds; what is behind the images is averaged over them.
        score: makes a score [...] of such averages.

    Returns:
        Scores [resamples, conditions], averaged over seeds and tasks.
    """
    n_conditions, n_seeds = tasks[0].shape[:2]
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples) / n_seeds
    total = np.zeros((resamples, n_conditions))
    for task in tasks:
        n_images, *rest = task.shape[2:]
        flat = np.moveaxis(task, 2, -1).reshape(-1, n_images)
        columns, counts = np.unique(flat, axis=1, return_counts=True)
        step = max(1, _CHUNK // max(columns.shape))
        for start in range(0, resamples, step):
            rows = slice(start, min(start + step, resamples))
            image_weights = rng.multinomial(n_images, counts / n_images, size=rows.stop - rows.start) / n_images
            by_seed = score((image_weights @ columns.T).reshape(-1, n_conditions, n_seeds, *rest))
            total[rows] += np.einsum("rcs,rs->rc", by_seed, seed_weights[rows])
    return total / len(tasks)


def interval(values: NDArray) -> tuple[float, float]:
    """Return the ends of the percentile interval of some draws."""
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


# --- tests --------------------------------------------------------------------------------------------------


def sign_flip_test(difference: NDArray) -> float:
    """Return the exact two-sided p-value of a paired permutation test on images.

    Question: would these trained models gain on other images of the task? Under the null, exchanging the two
    conditions of an image under all seeds at once changes nothing. Seeds of one image are thus free to agree, which
    would make a test on all seed-image pairs overconfident. With one seed this is the exact McNemar test.

    Returns:
        p in (0, 1], 1 when no image has a net difference.
    """
    return _sign_flip_p(difference.sum(axis=0, dtype=int))


def pooled_sign_flip_test(differences: Sequence[NDArray], resamples: int = 100_000, seed: int = 0) -> float:
    """Return the two-sided Monte Carlo p-value of the sign-flip test for the mean over tasks of the mean gain.

    Question: would these trained models gain on other images of these tasks, on average over the tasks?

    Args:
        differences: one for each task.
        resamples: draws of the null. seed: of the draws.

    Returns:
        p = (1 + draws at least as extreme) / (1 + draws), so never below 1 / (1 + resamples).
    """
    rng = np.random.default_rng(seed)
    null, observed, largest = np.zeros(resamples), 0.0, 0.0
    for difference in differences:
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
    order = np.argsort(adjusted)[: np.sum(~np.isnan(adjusted))]  # NaN are last
    raised = np.maximum.accumulate(adjusted[order] * np.arange(len(order), 0, -1))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted


def stars(p: float) -> str:
    """Return ``***`` for p < 0.001, ``**`` for p < 0.01, ``*`` for p < 0.05, and nothing above or for NaN."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))
