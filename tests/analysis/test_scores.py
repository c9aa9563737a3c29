"""mIoU against torchmetrics; intervals and tests against loops and enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from tocom.analysis.scores import METRICS, Counts, count, miou, read_predictions
from tocom.errors import TocomError
from tocom.files import save_arrays

ACCURACY, MIOU = METRICS["accuracy"], METRICS["mIoU"]


def draw(seed, n=6, classes=5, agreement=0.7, present=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, (n, 8, 8))
    predicted = np.where(rng.random(labels.shape) < agreement, labels, rng.integers(0, present or classes, (n, 8, 8)))
    labels[rng.random(labels.shape) < 0.1] = 255
    return predicted, labels


def runs(*seeds, **how):
    """Return runs [seeds, images, 3, classes]."""
    return np.stack([np.stack(count(*draw(seed, **how), how.get("classes", 5)), axis=-2) for seed in seeds])


def percent(sums):
    """Return the mIoU of pixels [3, classes], as its definition says."""
    return 100 * np.mean([tp / (tp + fp + fn) for tp, fp, fn in sums.T if tp + fp + fn])


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), present=st.integers(1, 9), agreement=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_miou_is_that_of_torchmetrics(seed, classes, present, agreement):
    predicted, labels = draw(seed, classes=classes, present=min(present, classes), agreement=agreement)
    metric = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    expected = metric(torch.from_numpy(predicted), torch.from_numpy(labels))
    assert miou(count(predicted, labels, classes)) == pytest.approx(100 * float(expected), rel=1e-5)


def test_counts_are_those_of_loops():
    predicted, labels = draw(1, n=2, classes=3)
    counts = count(predicted, labels, 3)
    for image in range(2):
        pairs = [(p, t) for p, t in zip(predicted[image].ravel(), labels[image].ravel(), strict=True) if t != 255]
        for c in range(3):
            assert counts.tp[image, c] == sum(p == t == c for p, t in pairs)
            assert counts.fp[image, c] == sum(p == c != t for p, t in pairs)
            assert counts.fn[image, c] == sum(t == c != p for p, t in pairs)
    right = [p == t for p, t in zip(predicted.ravel(), labels.ravel(), strict=True) if t != 255]
    row = MIOU.row(np.stack(counts, axis=-2))
    assert (row["n"], row["correct"], row["accuracy"]) == (len(right), sum(right), np.mean(right))
    assert row["score"] == pytest.approx(miou(counts) / 100)


def test_pixels_are_summed_over_images_before_the_ratio():
    one = Counts(*(np.array([[a], [b]]) for a, b in ((1, 8), (1, 0), (0, 0))))
    assert miou(one) == pytest.approx(100 * 9 / 10)


def test_without_any_labelled_pixel_the_figures_are_zero_not_nan():
    record = np.stack(count(np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), 3), axis=-2)
    assert MIOU.row(record) == {"n": 0, "correct": 0, "accuracy": 0, "score": 0}


def test_bootstrap_of_miou_agrees_with_a_loop_over_tasks_seeds_and_images():
    tasks = [(runs(1, 2, n=6), runs(3, 4, n=6, agreement=0.8)), (runs(5, 6, n=9), runs(7, 8, n=9))]
    rng, gains = np.random.default_rng(0), []
    for _ in range(4000):
        seeds, of_tasks = rng.integers(2, size=2), []
        for before, after in tasks:
            images = rng.integers(before.shape[1], size=before.shape[1])
            scores = [[percent(part[s, images].sum(axis=0)) for s in seeds] for part in (before, after)]
            of_tasks.append(np.mean(scores[1]) - np.mean(scores[0]))
        gains.append(np.mean(of_tasks))
    expected = np.quantile(gains, [0.025, 0.975])
    actual = MIOU.gain_interval(*zip(*tasks, strict=True), resamples=4000)
    np.testing.assert_allclose(actual, expected, atol=0.06 * np.ptp(expected))


def test_equal_conditions_never_differ_and_close_no_gap():
    same, better = runs(1, 2), runs(1, 2, agreement=0.95)
    assert MIOU.gain_interval([same], [same], 300) == (0, 0)
    assert MIOU.image_test([same], [same]) == 1
    assert MIOU.gap_interval([same], [better], [better], 300) == (1, 1)
    assert np.isnan(MIOU.gap_interval([better], [better], [same], 300)).all()


@pytest.mark.parametrize("seeds", [((1,), (2,)), ((1, 2), (3, 4))])
def test_the_test_on_images_agrees_with_all_exchanges(seeds):
    before, after = (runs(*some, n=7, agreement=level) for some, level in zip(seeds, (0.6, 0.68), strict=True))
    gains = []
    for exchange in itertools.product([False, True], repeat=7):
        which = np.array(exchange)[None, :, None, None]
        pair = np.where(which, after, before), np.where(which, before, after)
        scores = [np.mean([percent(run.sum(axis=0)) for run in part]) for part in pair]
        gains.append(scores[1] - scores[0])
    expected = np.mean(np.abs(gains) >= abs(gains[0]) - 1e-9)
    assert 0.01 < expected < 0.9
    assert MIOU.image_test([before], [after]) == pytest.approx(expected, abs=0.025)


def test_the_test_on_images_keeps_its_level_and_finds_an_effect():
    p_values = [MIOU.image_test([runs(2 * k, n=20)], [runs(2 * k + 1, n=20)], exchanges=200) for k in range(200)]
    assert np.mean(np.array(p_values) < 0.05) <= 0.1
    assert MIOU.image_test([runs(1, n=20)], [runs(1, n=20, agreement=0.8)]) < 0.001


def test_accuracy_is_the_share_of_right_images():
    records = ACCURACY.records({"predictions": np.array([[1, 2, 3], [1, 2, 0]]), "labels": np.array([1, 2, 0])})
    assert ACCURACY.row(records[0]) == {"n": 3, "correct": 2, "accuracy": 2 / 3, "score": 2 / 3}
    assert ACCURACY.gains(records[:1], records[1:]) == pytest.approx([100 / 3])


def test_other_files_are_refused(tmp_path):
    save_arrays(tmp_path / "a", {"labels": np.zeros(3)}, {"kind": "task"})
    with pytest.raises(TocomError, match="holds no predictions"):
        read_predictions(tmp_path / "a")
