"""Every statistic against scipy, statsmodels, enumeration or by hand; what they guarantee: test_simulate.py."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tocom.analysis import stats
from tocom.analysis.stats import Contrast, Means, Part, Spreads, Trained

pytestmark = pytest.mark.filterwarnings("error")

SAME, OTHER = Trained("one", False), Trained("another", False)
SHARED = Trained("one", True)
GAIN = (-1, 1)


def differences(max_seeds=4, max_images=30):
    """Return a strategy of differences [seeds, images]."""
    shapes = st.tuples(st.integers(1, max_seeds), st.integers(1, max_images))
    return shapes.flatmap(lambda shape: arrays(np.int8, shape, elements=st.integers(-1, 1)))


def draw(rng, seeds, images, p=(0.2, 0.5, 0.3)):
    return rng.choice([-1, 0, 1], p=p, size=(seeds, images))


def enumerate_signs(values):
    """Return the sums of ``values`` [n] under all 2 ** n signs."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    return signs @ np.asarray(values)


def scattered(rng, seeds, images, levels=(80.0, 83.0), of_image=20.0, of_seed=2.0, rest=15.0):
    """Return values [2, seeds, images] with errors of all kinds."""
    common = rng.normal(0, of_image, images)
    return np.stack(
        [
            level + common * (0.5 + k) + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, rest, (seeds, images))
            for k, level in enumerate(levels)
        ]
    )


def test_needs_no_torch():
    modules = "report, overview, headline, verify, figures, compare"
    code = f"import sys; from tocom.analysis import {modules}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# --- over images and trainings ---------------------------------------------------------------------------------------


def anova(difference):
    """Return the mean squares of seeds, images and the rest of a two-way table [seeds, images], by statsmodels."""
    seeds, images = difference.shape
    frame = pd.DataFrame(
        {"y": difference.ravel(), "seed": np.repeat(range(seeds), images), "image": np.tile(range(images), seeds)}
    )
    table = anova_lm(ols("y ~ C(seed) + C(image)", frame).fit())
    return table.mean_sq["C(seed)"], table.mean_sq["C(image)"], table.mean_sq["Residual"]


def test_variances_are_those_of_an_analysis_of_variance():
    task = scattered(np.random.default_rng(0), 4, 30)
    by_seed, by_image, rest = anova(task[1] - task[0])
    gain = Means.of([task], [SAME, SAME]).contrast(GAIN)
    assert gain.value == pytest.approx((task[1] - task[0]).mean())
    (trainings,) = gain.trainings
    assert trainings == pytest.approx((by_seed / (4 * 30), 3))
    assert gain.images == pytest.approx(((by_image - rest) / (4 * 30), 29))
    assert gain.error**2 == pytest.approx(trainings.variance + gain.images.variance)
    assert gain.effect == pytest.approx(gain.value / (task[1] - task[0]).mean(axis=1).std(ddof=1))


def test_tasks_of_independent_trainings_add_their_variances_and_shared_parts_tie_them():
    rng = np.random.default_rng(1)
    tasks = [scattered(rng, 3, images) for images in (25, 40)]
    alone = [Means.of([task], [SAME, SAME]).contrast(GAIN) for task in tasks]
    apart = Means.of(tasks, [SAME, SAME]).contrast(GAIN)
    assert apart.value == pytest.approx(np.mean([one.value for one in alone]))
    v = np.array([one.trainings[0].variance for one in alone])
    assert apart.trainings == (pytest.approx((v.sum() / 4, v.sum() ** 2 / (v**2 / 2).sum())),)  # Satterthwaite's
    assert apart.images.variance == pytest.approx(sum(one.images.variance for one in alone) / 4)
    tied = Means.of(tasks, [SHARED, SHARED]).contrast(GAIN)
    by_seed = np.mean([(task[1] - task[0]).mean(axis=1) for task in tasks], axis=0)
    assert tied.trainings == (pytest.approx((by_seed.var(ddof=1) / 3, 2)),)
    assert tied.images == pytest.approx(apart.images)
    weighed = Means.of(tasks, [SHARED, SHARED], [0.2, 0.8]).contrast(GAIN)
    assert weighed.value == pytest.approx(0.2 * alone[0].value + 0.8 * alone[1].value)
    # one method's tasks err together, the other's do not
    first, second = ([task[k].mean(axis=1) for task in tasks] for k in (0, 1))
    both = Means.of(tasks, [SHARED, OTHER]).contrast(GAIN)
    w = np.array([scores.var(ddof=1) for scores in second]) / 4
    expected = np.mean(first, axis=0).var(ddof=1) / 3, 2, w.sum() / 3, w.sum() ** 2 / (w**2 / 2).sum()
    assert [number for part in both.trainings for number in part] == pytest.approx(expected)
    t = [scipy.stats.t(df).isf(0.005) for df in (2, expected[3], both.images.df)]
    v = [expected[0], expected[2], both.images.variance]
    assert both.critical(0.01) == pytest.approx(np.dot(v, t) / sum(v))


def test_independent_trainings_are_not_paired_by_seed():
    rng = np.random.default_rng(2)
    task = scattered(rng, 5, 30)
    gain = Means.of([task], [SAME, OTHER]).contrast(GAIN)
    scores = task.mean(axis=2)
    assert gain.trainings[0].variance == pytest.approx(scores.var(axis=1, ddof=1).sum() / 5)
    # the order of the second's seeds says nothing
    other = np.stack([task[0], task[1][[3, 0, 4, 1, 2]]])
    assert Means.of([other], [SAME, OTHER]).contrast(GAIN).p() == pytest.approx(gain.p(), rel=1e-9)
    welch = scipy.stats.ttest_ind(scores[1], scores[0], equal_var=False).pvalue
    assert Means.of([task], [SAME, OTHER]).p_seeds(GAIN) == pytest.approx(welch)
    rest = sum(anova(one)[2] for one in task)
    assert gain.images.variance == pytest.approx((task[1] - task[0]).mean(axis=0).var(ddof=1) / 30 - rest / (5 * 30))


@given(
    value=st.floats(0.01, 20),
    trainings=st.floats(0, 4),
    images=st.floats(0, 4),
    df=st.floats(1.5, 40),
    than=st.floats(-3, 3),
)
@settings(deadline=None, max_examples=60)
def test_p_is_where_the_weighted_critical_value_is_reached(value, trainings, images, df, than):
    contrast = Contrast(value, (Part(trainings, df),), Part(images, 700.0))
    p = contrast.p(than)
    if abs(value - than) < 1e-9 or trainings + images == 0:
        assert p == 1 or math.isnan(p)
        return
    ratio = abs(value - than) / math.sqrt(trainings + images)
    if p > 1e-12:
        t = scipy.stats.t(df).isf(p / 2), scipy.stats.t(700).isf(p / 2)
        assert (trainings * t[0] + images * t[1]) / (trainings + images) == pytest.approx(ratio, rel=1e-6)
    low, high = contrast.interval()
    assert (low <= than <= high) == (p >= 0.05) or p == pytest.approx(0.05, rel=1e-6)
    one_sided = contrast.p_above(than)
    assert one_sided == pytest.approx(p / 2 if value > than else 1 - p / 2)


def test_with_one_source_of_errors_it_is_the_t_test():
    gains = np.array([1.0, 2.5, 4.0, 3.0])
    task = np.stack([np.zeros((4, 6)), np.repeat(gains[:, None], 6, axis=1)])  # images do not differ
    means = Means.of([task], [SAME, SAME])
    expected = scipy.stats.ttest_1samp(gains, 0)
    assert means.contrast(GAIN).p() == pytest.approx(expected.pvalue, rel=1e-6)
    assert means.p_seeds(GAIN) == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(means.contrast(GAIN).interval(), expected.confidence_interval(), rtol=1e-9)
    one = np.stack([np.zeros((1, 6)), [[1.0, 2, 3, 4, 0, -1]]])  # one seed: images alone, and nothing to claim
    alone = Means.of([one], [SAME, SAME])
    np.testing.assert_allclose(
        alone.contrast(GAIN).interval(), scipy.stats.ttest_1samp(one[1, 0], 0).confidence_interval(), rtol=1e-9
    )
    assert math.isnan(alone.contrast(GAIN).p())
    assert math.isnan(alone.p_seeds(GAIN))


def test_edges_of_the_tests_over_trainings():
    nothing = Means.of([np.ones((2, 3, 5))], [SAME, SAME])
    assert (nothing.contrast(GAIN).p(), nothing.p_seeds(GAIN)) == (1, 1)
    assert nothing.contrast(GAIN).interval() == (0, 0)
    assert math.isnan(nothing.contrast(GAIN).effect)
    # no spread among a few seeds tells that a score is discrete, not that the gain is certain
    level = np.stack([np.zeros((3, 5)), np.ones((3, 5))])
    assert math.isnan(Means.of([level], [SAME, SAME]).contrast(GAIN).p())
    assert math.isnan(Means.of([level], [SAME, SAME]).p_seeds(GAIN))
    assert Contrast(1e9, (Part(0.0, 2.0),), Part(1.0, 500.0)).p() == pytest.approx(1e-100)


def test_gap_closed_is_what_a_search_over_shares_finds():
    rng = np.random.default_rng(4)
    tasks = [scattered(rng, 4, images, (70, 75)) for images in (200, 300)]
    tasks = [np.concatenate([task, scattered(rng, 4, task.shape[2], (82, 82))[:1]]) for task in tasks]
    trained = [SHARED, SHARED, OTHER]
    means = Means.of(tasks, trained)
    share, low, high = means.gap_closed()
    plain, after, matched = np.mean([task.mean(axis=(1, 2)) for task in tasks], axis=0)
    assert share == pytest.approx((after - plain) / (matched - plain))
    grid = np.linspace(-1, 3, 4001)
    kept = [of for of in grid if means.contrast([of - 1, 1, -of]).p() >= 0.05]
    assert (low, high) == (pytest.approx(min(kept), abs=0.0011), pytest.approx(max(kept), abs=0.0011))
    # Fieller's own formula, where one source of errors is all there is
    flat = [np.repeat(task.mean(axis=2, keepdims=True), 5, axis=2) for task in tasks]
    means = Means.of(flat, [SHARED] * 3)
    cov, t = means.trainings[0].covariance, scipy.stats.t.isf(0.025, 3)
    a = np.array([[-1, 1, 0], [-1, 0, 1]]) @ means.values
    v = np.array([[-1, 1, 0], [-1, 0, 1]]) @ cov @ np.array([[-1, 1, 0], [-1, 0, 1]]).T
    roots = np.sort(
        np.roots([a[1] ** 2 - t**2 * v[1, 1], -2 * (a[0] * a[1] - t**2 * v[0, 1]), a[0] ** 2 - t**2 * v[0, 0]])
    )
    np.testing.assert_allclose(means.gap_closed()[1:], roots, rtol=1e-6)


def test_no_share_of_a_gap_that_may_not_be_there():
    rng = np.random.default_rng(5)
    task = np.concatenate([scattered(rng, 3, 40), scattered(rng, 3, 40)[:1] - 5])
    assert np.isnan(Means.of([task], [SAME, SAME, OTHER]).gap_closed()).all()
    sure = np.concatenate([scattered(rng, 1, 400), scattered(rng, 1, 400)[:1] + 30])
    assert np.isnan(Means.of([sure], [SAME, SAME, OTHER]).gap_closed()).all()  # one seed


# --- tests that take trainings or images as given -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "p"),
    [
        ([2, -1, 1], 6 / 8),  # sums 4, 2, 2, 0, 0, -2, -2, -4
        ([2, 1, 1], 2 / 8),
        ([1, 0, 0], 1),
        ([0, 0, 0], 1),
        ([2, -2, 0], 1),
        ([2, 2, 2, 2, 2, 2], 2 / 64),
    ],
)
def test_sign_flip_by_hand(net, p):
    first = np.sign(net)
    assert stats.sign_flip_test([np.array([first, np.subtract(net, first)])]) == pytest.approx(p, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(differences(max_images=10))
def test_sign_flip_agrees_with_enumeration(difference):
    net = difference.sum(axis=0, dtype=int)
    expected = np.mean(np.abs(enumerate_signs(net)) >= abs(net.sum()))
    assert stats.sign_flip_test([100.0 * difference]) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(differences(max_seeds=1, max_images=60))
def test_sign_flip_of_one_seed_is_mcnemar(difference):
    table = [[0, (difference == 1).sum()], [(difference == -1).sum(), 0]]
    assert stats.sign_flip_test([difference]) == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)


def test_sign_flip_keeps_small_tails():
    assert stats.sign_flip_test([np.ones((2, 1000), int)]) == pytest.approx(2.0**-999, rel=1e-9)
    assert 0 < stats.sign_flip_test([np.ones((2, 3000), int)]) < 1e-300


def test_sign_flip_over_tasks_agrees_with_enumeration():
    rng = np.random.default_rng(7)
    tasks = [draw(rng, 2, 7), draw(rng, 2, 10)]
    sums = [enumerate_signs(task.sum(axis=0)) / task.size for task in tasks]
    null = sums[0][:, None] + sums[1][None]
    expected = np.mean(np.abs(null) >= abs(sum(task.mean() for task in tasks)) - 1e-12)
    assert 0.05 < expected < 0.95
    assert stats.sign_flip_test(tasks) == pytest.approx(expected, rel=1e-12)


def test_sign_flip_weighs_tasks_alike():
    # images count by their task: the four that lose weigh as much as the 400 that gain
    small, big = -np.ones((2, 4), int), np.ones((2, 400), int)
    assert stats.sign_flip_test([small, big]) == 1


@pytest.mark.parametrize("shift", [0.02, 0.05, 0.1, 0.2])
def test_the_approximation_for_many_images_is_close_far_into_the_tail(shift, monkeypatch):
    task = draw(np.random.default_rng(9), 3, 4000, (0.1, 0.8 - shift, 0.1 + shift))
    exact = stats._exact_p(task.sum(axis=0))
    monkeypatch.setattr(stats, "_LONGEST", 0)
    assert stats.sign_flip_test([task]) == pytest.approx(exact, rel=0.02 + 3 / np.abs(task.sum(axis=0)).sum() ** 0.5)
    assert stats.sign_flip_test([task * 0.1234567]) == pytest.approx(stats.sign_flip_test([task]), rel=1e-6)


def test_the_approximation_agrees_with_random_flips_of_real_numbers():
    rng = np.random.default_rng(10)
    values = rng.normal(0.1, 1, (2, 60))
    signs = rng.choice([-1, 1], (200_000, 60))
    expected = np.mean(np.abs(signs @ values.sum(axis=0)) >= abs(values.sum()))
    assert stats.sign_flip_test([values]) == pytest.approx(expected, rel=0.03)
    # all on one side
    assert stats.sign_flip_test([np.abs(rng.normal(1, 0.3, (1, 20)))]) == pytest.approx(2.0**-19, rel=0.2)
    assert stats.sign_flip_test([np.array([[1.5, -1.5, 0.0]])]) == 1


def test_task_test_at_the_edges():
    assert stats.task_test([0, 0, 0]) == 1
    assert math.isnan(stats.task_test([]))
    assert math.isnan(stats.task_test([1.5]))
    # round-off breaks no ties
    assert stats.task_test([0.1 + 0.2, -0.3, 0.5]) == stats.task_test([0.3, -0.3, 0.5])


def test_task_test_is_that_of_scipy_and_cannot_fall_below_its_bound():
    gains = np.random.default_rng(8).normal(0.4, 1, 19)
    assert stats.task_test(gains) == pytest.approx(scipy.stats.wilcoxon(gains, method="exact").pvalue, rel=1e-12)
    for tasks in range(2, 20):
        assert stats.task_test(np.arange(1, tasks + 1)) == pytest.approx(2.0 ** (1 - tasks))


def test_task_test_is_exact_with_ties_in_many_tasks():
    gains = np.array([1, 1, 2, 2, 2, -1, 3, 3, 4, -2, 4, 5, 5, -3, 6, 6])
    ranks = scipy.stats.rankdata(np.abs(gains))
    expected = np.mean(np.abs(enumerate_signs(ranks)) >= abs((np.sign(gains) * ranks).sum()))
    assert stats.task_test(gains) == pytest.approx(expected, rel=1e-12)


# --- many tests ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_holm_is_that_of_statsmodels(p_values):
    np.testing.assert_allclose(stats.holm(p_values), multipletests(p_values, method="holm")[1], rtol=1e-12, atol=1e-300)


def test_holm_by_hand_and_nan_is_passed_over():
    # sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 raised to the one before it
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, np.nan, 0.005]), [0.03, 0.06, 0.06, np.nan, 0.02])
    assert stats.holm([]).shape == (0,)


def test_stars_stand_for_levels():
    levels = (0, 0.001, 0.0099, 0.01, 0.0499, 0.05, math.nan)
    assert [stats.stars(p) for p in levels] == ["***", "**", "**", "*", "*", "", ""]


# --- sizes of errors ------------------------------------------------------------------------------------------------


def test_spreads_are_found_again():
    rng, found = np.random.default_rng(11), []
    for _ in range(200):
        shared = rng.normal(0, 2, (5, 1))
        tasks = []
        for level in (1.0, 4.0, 7.0):
            errors = rng.normal(0, 20, 300) + shared + rng.normal(0, 1.5, (5, 1)) + rng.normal(0, 10, (5, 300))
            tasks.append(np.stack([np.zeros((5, 300)), level + errors]))
        found.append(Means.of(tasks, [SHARED, SHARED]).spreads(GAIN))
    squares = np.mean(np.square(found), axis=0)
    for name, square, true in zip(Spreads._fields, squares, (20, 1.5, 2, 10, 3), strict=True):
        assert math.sqrt(square) == pytest.approx(true, rel=0.12), name
    lone = Means.of([tasks[0]], [SHARED, SHARED]).spreads(GAIN)
    assert math.isnan(lone.compensator)
    assert math.isnan(lone.task)
    assert Means.of(tasks, [SAME, SAME]).spreads(GAIN).compensator == 0


def test_spreads_of_one_task_are_those_of_an_analysis_of_variance():
    task = scattered(np.random.default_rng(12), 4, 30)
    by_seed, by_image, rest = anova(task[1] - task[0])
    found = Means.of([task], [SAME, SAME]).spreads(GAIN)
    assert found.rest == pytest.approx(math.sqrt(rest))
    assert found.image == pytest.approx(math.sqrt((by_image - rest) / 4))
    assert found.seed == pytest.approx(math.sqrt(max((by_seed - rest) / 30, 0)))


def test_what_is_planned_is_what_a_study_with_these_errors_has():
    spread, images = Spreads(20.0, 1.5, 1.0, 15.0, math.nan), (200, 400)
    plan = stats.planned(spread, 5, images, True)
    of_images = sum(20**2 / n for n in images) / 4
    trainings = (sum(1.5**2 + 15**2 / n for n in images) / 4 + 1) / 5
    assert (plan.images.variance, plan.trainings) == (pytest.approx(of_images), (pytest.approx((trainings, 4)),))
    assert stats.planned(spread, 5, images, False).trainings[0].df == 8
    assert math.isnan(stats.detectable(stats.planned(spread, 1, images, True)))


@pytest.mark.parametrize(("df", "images"), [(2, 0.5), (2, 0.0), (4, 0.5), (8, 2.0)])
def test_the_detectable_gain_is_found_as_often_as_is_said(df, images):
    truth = Contrast(0.0, (Part(1.0, df),), Part(images, 1e6))
    gain, rng, found = stats.detectable(truth), np.random.default_rng(13), 0
    draws = gain + rng.normal(0, truth.error, 2000)
    for value, variance in zip(draws, rng.chisquare(df, 2000) / df, strict=True):
        found += Contrast(value, (Part(variance, df),), Part(images, 1e6)).p() < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.036)  # four standard errors
    assert stats.power(0.0, truth) <= 0.055
    assert math.isnan(stats.detectable(Contrast(0.0, (Part(0.0, 2),), Part(0.0, 9))))
