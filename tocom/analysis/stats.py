"""Does one condition beat another, by how much, and how sure is that: for other test images and other trainings.

A condition is a method at a train and an inference degree. Its values are [seeds, images]: for every image a number
whose mean over images is the score in points (100 or 0 for accuracy). Errors of a mean come from the images, which all
conditions and seeds share; from the trainings, of which every seed is a new one; and from what is learned once for all
tasks, such as a compensator, which is another with every seed, too. Every p-value answers a question of its own:

=============================  ======================================================================================
:meth:`Contrast.p`             would other trainings gain on other images of these tasks?
:func:`sign_flip_test`         would these trained models gain on other images of these tasks?
:meth:`Means.p_seeds`          would other trainings gain on these images?
:func:`task_test`              would other tasks gain?
=============================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

#: Decimals of a percentage point that count; the rest is round-off, which must not break ties.
_DECIMALS = 9
#: In what share of repetitions an interval is to hold the truth.
LEVEL = 0.95
#: The smallest p-value over images and trainings; scipy's quantiles of t fail beyond.
_SMALLEST = 1e-100
#: The longest distribution of a sum of signed whole numbers that is computed exactly; longer ones are approximated.
_LONGEST = 20_000


# --- means of conditions, and where their errors come from ----------------------------------------------------------


class Trained(NamedTuple):
    """Which trainings a condition comes from.

    Attributes:
        by: conditions are of the same trainings if this is equal.
        shared: whether something that is learned for all tasks at once takes part, so that tasks err together.
    """

    by: Hashable
    shared: bool


class Source(NamedTuple):
    """Covariances [K, K] of the errors of K means, from one source of errors.

    Attributes:
        covariance: the estimate. df: its degrees of freedom. tied: whether all tasks are in it, as they err together.
    """

    covariance: NDArray
    df: int
    tied: bool = False

    def part(self, weights: NDArray) -> Part:
        """Return the variance of a weighted sum of the means [K] from this source."""
        return Part(weights @ self.covariance @ weights, self.df)


class Part(NamedTuple):
    """An estimated variance of an error, in squared points, and the degrees of freedom of the estimate."""

    variance: float
    df: float


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of means of conditions, in points, with the variance of its error in independent parts.

    Attributes:
        value: the sum.
        trainings: of trainings whose tasks err together, and of those whose tasks do not; none with one seed.
        images: of images.
        spread: the standard deviation of a single training; NaN with one seed.
    """

    value: float
    trainings: tuple[Part, ...]
    images: Part
    spread: float = np.nan

    def critical(self, level: float) -> float:
        """Return by how many standard errors the value has to differ for a two-sided test at ``level``.

        The critical values of t for every part, weighted by their variances (Cochran and Cox 1950). One effective
        number of degrees of freedom instead (Satterthwaite 1946) takes too many where the spread of a few trainings
        happens to look small: `tocom analyse simulate` compares them.
        """
        variances, dfs = np.array([*self.trainings, self.images]).T
        return float(variances @ _quantile(level, dfs) / variances.sum()) if variances.any() else 0.0

    @property
    def error(self) -> float:
        """The standard error."""
        return float(np.sqrt(sum(part.variance for part in (*self.trainings, self.images))))

    def p(self, than: float = 0.0) -> float:
        """Return the two-sided p-value of the true value being ``than``, over images and trainings.

        Returns:
            p, 1 when the value is ``than``. NaN (undefined) with one seed, and where nothing varies but the value is
            another.
        """
        distance = abs(self.value - than)
        if not self.trainings or distance < 10.0**-_DECIMALS:
            return 1.0 if self.trainings else np.nan
        if not self.error:
            return np.nan
        lowest = np.log(_SMALLEST)

        def too_far(log_level: float) -> float:
            return self.critical(np.exp(log_level)) - distance / self.error

        return float(np.exp(lowest if too_far(lowest) <= 0 else optimize.brentq(too_far, lowest, 0, xtol=1e-12)))

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of the true value being no more than ``bound``."""
        p = self.p(bound)
        return p / 2 if self.value > bound else 1 - p / 2

    def interval(self) -> tuple[float, float]:
        """Return the ends of the interval that belongs to :meth:`p`; with one seed, of one over images alone."""
        half = self.critical(1 - LEVEL) * self.error
        return self.value - half, self.value + half

    @property
    def effect(self) -> float:
        """The value in standard deviations of a single training (Cohen's d); NaN where trainings do not differ."""
        return self.value / self.spread if self.spread > 0 else np.nan


class Spreads(NamedTuple):
    """Standard deviations of a gain, in points, by where they come from.

    Attributes:
        image: of an image, whatever the training. seed: of a training, on one task.
        compensator: of what is learned once for all tasks; 0 where nothing is. NaN with one task, where it is in seed.
        rest: of an image under a training. task: of a task; NaN with one.
    """

    image: float
    seed: float
    compensator: float
    rest: float
    task: float


@dataclass(frozen=True)
class Means:
    """The mean scores of K conditions, averaged over seeds and tasks, and the sources of their errors.

    Attributes:
        values: [K], in points. trainings, images: independent sources.
        trained: of which trainings each condition is. scores: [tasks, K, seeds], of which the means are made.
        analysed: of each task, what :func:`_analysed` returns, and its images.
    """

    values: NDArray
    trainings: tuple[Source, ...]
    images: tuple[Source, ...]
    trained: tuple[Trained, ...]
    scores: NDArray
    analysed: tuple[tuple[NDArray, NDArray, int], ...]

    @property
    def seeds(self) -> int:
        """Over how many seeds the means are."""
        return self.scores.shape[2]

    @classmethod
    def of(cls, tasks: Sequence[NDArray], trained: Sequence[Trained], weights: ArrayLike | None = None) -> Means:
        """Estimate them: two-way analysis of variance (images x seeds) of every task.

        Args:
            tasks: values [K, seeds, images] each, in points. trained: of which trainings each condition is.
            weights: of the tasks, [tasks], with sum 1; by default all alike.
        """
        weights = np.full(len(tasks), 1 / len(tasks)) if weights is None else np.asarray(weights, dtype=float)
        n_seeds = tasks[0].shape[1]
        scores = np.stack([task.mean(axis=2) for task in tasks])
        by_seed = weights[:, None, None] * scores
        analysed = tuple((*_analysed(task, trained), task.shape[2]) for task in tasks)
        images = tuple(
            Source(w**2 * (between - rest / n_seeds) / n, n - 1)
            for w, (between, rest, n) in zip(weights, analysed, strict=True)
        )
        values = by_seed.sum(axis=0).mean(axis=1)
        trainings = []
        for one in dict.fromkeys(trained) if n_seeds > 1 else ():
            mine = np.array([other == one for other in trained])
            block = np.outer(mine, mine)
            tied = one.shared and len(tasks) > 1
            draws = by_seed.sum(axis=0, keepdims=True) if tied else by_seed
            trainings += [Source(block * np.atleast_2d(np.cov(draw)) / n_seeds, n_seeds - 1, tied) for draw in draws]
        return cls(values, tuple(trainings), images, tuple(trained), scores, analysed)

    def contrast(self, weights: ArrayLike) -> Contrast:
        """Return a weighted sum of the means; of two conditions, [-1, 1] is the gain."""
        w = np.asarray(weights, dtype=float)
        kinds = ([s.part(w) for s in self.trainings if s.tied == tied] for tied in (True, False))
        trainings = tuple(_added(parts) for parts in kinds if parts)
        spread = np.sqrt(self.seeds * sum(part.variance for part in trainings)) if trainings else np.nan
        return Contrast(float(w @ self.values), trainings, _added([s.part(w) for s in self.images]), float(spread))

    def p_seeds(self, weights: ArrayLike) -> float:
        """Return the two-sided p-value of a weighted sum of the means being 0, over trainings on these images.

        A t-test on the values by seed, with Satterthwaite's degrees of freedom where trainings are independent.

        Returns:
            p, 1 when the values are 0 for all seeds. NaN (undefined) with one seed, and when all are equal but not 0:
            no spread among a few seeds tells that a score is discrete, not that the gain is certain.
        """
        w = np.asarray(weights, dtype=float)
        if not self.trainings:
            return np.nan
        variance, df = _added([source.part(w) for source in self.trainings])
        value = abs(w @ self.values)
        if variance < 10.0 ** (-2 * _DECIMALS):
            return 1.0 if value < 10.0**-_DECIMALS else np.nan
        return float(2 * stats.t.sf(value / np.sqrt(variance), df))

    def spreads(self, weights: ArrayLike) -> Spreads:
        """Return the standard deviations behind a weighted sum of the means, of tasks alike, from several seeds."""
        w, n_tasks = np.asarray(weights, dtype=float), len(self.analysed)
        rest = np.array([w @ remains @ w for _, remains, _ in self.analysed])
        image = np.array([w @ between @ w for between, _, _ in self.analysed]) - rest / self.seeds
        n_images = np.array([n for *_, n in self.analysed])
        covariance = np.full((n_tasks, n_tasks), np.nan)  # of the tasks' sums by seed
        if self.seeds > 1:
            groups = [np.array([other == one for other in self.trained]) for one in dict.fromkeys(self.trained)]
            covariance = sum(np.atleast_2d(np.cov(np.einsum("k,tks->ts", w * mine, self.scores))) for mine in groups)
        tied = any(one.shared for one in self.trained)
        shared = covariance[~np.eye(n_tasks, dtype=bool)].mean() if tied and n_tasks > 1 else 0.0
        seed = np.diag(covariance).mean() - shared - np.mean(rest / n_images)
        errors = np.maximum(image / n_images, 0) + (np.diag(covariance) / self.seeds if self.seeds > 1 else 0)
        task = (self.scores.mean(axis=2) @ w).var(ddof=1) - errors.mean() if n_tasks > 1 else np.nan
        roots = np.sqrt(np.maximum([image.mean(), seed, shared, rest.mean(), task], 0.0))
        return Spreads(*roots)._replace(**({"compensator": np.nan} if tied and n_tasks == 1 else {}))

    def gap_closed(self) -> tuple[float, float, float]:
        """Return the share of the gap between the first and the third condition that the second one closes.

        Returns:
            The share and its interval by Fieller's method (1954): the shares that a test at the interval's level does
            not exclude. All NaN where the interval of the gap itself does not lie above 0, so that there may be
            nothing to close, and with one seed.
        """
        gap = self.contrast([-1, 0, 1])
        if not gap.interval()[0] > 0 or not self.trainings:
            return np.nan, np.nan, np.nan
        share = self.contrast([-1, 1, 0]).value / gap.value

        def excess(of: float) -> float:
            left = self.contrast([of - 1, 1, -of])
            return abs(left.value) - left.critical(1 - LEVEL) * left.error

        def end(direction: int) -> float:
            step = direction * 0.5
            while excess(share + step) < 0:
                step *= 2
            return optimize.brentq(excess, share, share + step, xtol=1e-9) if excess(share) < 0 else share

        return share, end(-1), end(1)


def _analysed(task: NDArray, trained: Sequence[Trained]) -> tuple[NDArray, NDArray]:
    """Return the covariance over images of the means over seeds, and that of what remains of an image under a seed.

    Both are [K, K] for values [K, seeds, images]; conditions of different trainings share no remainder.
    """
    n_conditions, n_seeds, n_images = task.shape
    flat = task.reshape(-1, n_images).astype(float)
    products = np.atleast_2d(np.cov(flat)) if n_images > 1 else np.zeros((len(flat), len(flat)))
    products = products.reshape(n_conditions, n_seeds, n_conditions, n_seeds)
    between = products.mean(axis=(1, 3))
    if n_seeds < 2:
        return between, np.zeros_like(between)
    rest = (np.einsum("ksls->kl", products) - n_seeds * between) / (n_seeds - 1)
    same = np.array([[a.by == b.by for b in trained] for a in trained])
    return between, np.where(same, rest, 0.0)


def _added(parts: Sequence[Part]) -> Part:
    """Return the sum of independent estimates, not below 0, and its degrees of freedom (Satterthwaite 1946)."""
    variances, dfs = np.array(parts).T
    total = max(variances.sum(), 0.0)
    return Part(float(total), float(total**2 / (variances**2 / dfs).sum()) if total else float(min(dfs)))


def _quantile(level: float, dfs: ArrayLike) -> NDArray:
    """Return the critical values of t for two-sided tests."""
    return -special.stdtrit(np.asarray(dfs, dtype=float), level / 2)


# --- tests that take trainings, or images, as given -------------------------------------------------------------------


def sign_flip_test(differences: Sequence[NDArray]) -> float:
    """Return the two-sided p-value of a paired permutation test on images, for the mean over tasks of the mean gain.

    Question: would these trained models gain on other images of these tasks? Under the null, exchanging the two
    conditions of an image under all seeds at once changes nothing. Seeds of one image are thus free to agree, which
    would make a test on all seed-image pairs overconfident. With one task and one seed it is the exact McNemar test.

    The distribution under the null is exact where the gains are whole multiples of a unit and not too many, and its
    saddlepoint approximation otherwise (Lugannani and Rice 1980; for permutations, Robinson 1982), whose relative
    error stays small however small the p-value.

    Args:
        differences: gains [seeds, images] of each task.

    Returns:
        p in (0, 1], 1 when no image has a net gain.
    """
    nets = [np.round(difference.sum(axis=0, dtype=float), _DECIMALS) for difference in differences]
    multiple = np.lcm.reduce([len(net) for net in nets])
    if all((net == np.rint(net)).all() for net in nets) and multiple < 10**9:
        whole = np.concatenate([net.astype(int) * int(multiple // len(net)) for net in nets])
        whole //= max(np.gcd.reduce(whole), 1)
        if np.abs(whole).sum() <= _LONGEST:
            return _exact_p(whole)
    return _saddlepoint_p(np.concatenate([net / len(net) for net in nets]))


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
    return _exact_p((np.sign(gains) * ranks).astype(int))


def _exact_p(values: NDArray) -> float:
    """Return how likely integers [n] with random signs sum to something as far from 0 as they do, exactly."""
    total, observed = np.abs(values).sum(), abs(values.sum())
    # the distribution of the sum of the values that keep a plus sign, on the grid 0..total
    kept = np.ones(1)
    for magnitude, count in zip(*np.unique(np.abs(values[values != 0]), return_counts=True), strict=True):
        step = np.zeros(magnitude * count + 1)
        step[::magnitude] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        kept = np.convolve(kept, step)  # not by FFT, which would lose small tails
    # kept minus flipped is 2 * kept - total: compare whole numbers, free of round-off
    tail = 2 * kept[(total + observed) // 2 :].sum()
    # more than a thousand images all on one side underflow to 0
    return float(np.clip(tail, np.finfo(float).tiny, 1))


def _saddlepoint_p(values: NDArray) -> float:
    """Return about what :func:`_exact_p` does, for real numbers [n]."""
    sizes = np.abs(values[values != 0])
    observed = abs(values.sum())
    if not len(sizes) or observed < 1e-6 * np.sqrt((sizes**2).sum()):
        return 1.0
    sizes, observed = sizes / sizes.max(), observed / sizes.max()

    def excess(tilt: float) -> float:
        return float((sizes * np.tanh(sizes * tilt)).sum()) - observed

    highest = 1.0
    while excess(highest) < 0 and highest < 1e6:
        highest *= 2
    if excess(highest) < 0:  # all on one side, but for round-off
        return float(max(2.0 ** (1 - len(sizes)), np.finfo(float).tiny))
    tilt = optimize.brentq(excess, 0, highest, xtol=1e-14)
    # log cosh and 1 / cosh ** 2 without overflow
    decay = np.exp(-2 * sizes * tilt)
    generating = (sizes * tilt + np.log1p(decay) - np.log(2)).sum()
    curvature = (sizes**2 * 4 * decay / (1 + decay) ** 2).sum()
    w, u = np.sqrt(2 * max(tilt * observed - generating, 0.0)), tilt * np.sqrt(curvature)
    tail = stats.norm.sf(w) + stats.norm.pdf(w) * (1 / u - 1 / w)
    return float(np.clip(2 * tail, np.finfo(float).tiny, 1))


# --- many tests -------------------------------------------------------------------------------------------------------


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


# --- sizes of errors, and what can be seen in spite of them -----------------------------------------------------------


#: Quantiles at which the distribution of an estimated variance is taken for power.
_NODES = (np.arange(400) + 0.5) / 400


def power(gain: float, contrast: Contrast, level: float = 0.05) -> float:
    """Return how often a true gain is found by :meth:`Contrast.p` at ``level``, were the variances the true ones."""
    estimates = [part.variance * stats.chi2.ppf(_NODES, part.df) / part.df for part in contrast.trainings]
    grid = [*np.meshgrid(*estimates), np.array(contrast.images.variance)]
    t = _quantile(level, [part.df for part in (*contrast.trainings, contrast.images)])
    needed = sum(v * c for v, c in zip(grid, t, strict=True)) / np.sqrt(sum(grid)) / contrast.error
    away = gain / contrast.error
    return float((stats.norm.sf(needed - away) + stats.norm.sf(needed + away)).mean())


def detectable(contrast: Contrast, level: float = 0.05, share: float = 0.8) -> float:
    """Return the gain that is found in ``share`` of all studies whose errors have these variances; NaN if unknown."""
    if not contrast.error > 0 or not contrast.trainings:
        return np.nan
    return float(optimize.brentq(lambda gain: power(gain, contrast, level) - share, 0, 1e4 * contrast.error))


def planned(spread: Spreads, seeds: int, images: Sequence[int], tied: bool) -> Contrast:
    """Return the errors that a study will have: a gain of 0, with variances instead of their estimates.

    Args:
        spread: standard deviations. seeds: how many. images: test images of each task. tied: whether something is
            learned once for all tasks, so that they err together.
    """
    images = np.asarray(images)
    share = np.full(len(images), 1 / len(images)) ** 2
    of_images = float((share * spread.image**2 / images).sum())
    of_trainings = float((share * (spread.seed**2 + spread.rest**2 / images)).sum() + spread.compensator**2) / seeds
    df = (seeds - 1) * (1 if tied else len(images))
    trainings = (Part(of_trainings, df),) if seeds > 1 else ()
    return Contrast(0.0, trainings, Part(of_images, float(sum(images) - len(images))))
