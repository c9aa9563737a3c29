"""mIoU against torchmetrics; what tests are made of against derivatives, a bootstrap and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from tocom.analysis.scores import METRICS, Counts, count, miou, read_predictions
from tocom.analysis.stats import sign_flip_test
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


def test_values_of_miou_are_the_influence_of_single_images():
    some = runs(1, 2, n=40)
    values = MIOU.values(some)
    for seed, records in enumerate(some):
        whole = percent(records.sum(axis=0))
        assert values[seed].mean() == pytest.approx(whole)
        # weights of images that are moved a little: the derivative, by differences
        for image in (0, 7, 39):
            weights = np.ones(40)
            weights[image] += 1e-6
            moved = percent(np.tensordot(weights, records, axes=1))
            assert values[seed, image] == pytest.approx(whole + 40 * (moved - whole) / 1e-6, rel=1e-4)
    # what a jackknife finds, but for what falls faster than 1 / images
    left = [percent(np.delete(some[0], image, axis=0).sum(axis=0)) for image in range(40)]
    jackknife = math.sqrt(39 / 40 * np.sum((np.array(left) - np.mean(left)) ** 2))
    assert values[0].std(ddof=1) / math.sqrt(40) == pytest.approx(jackknife, rel=0.05)


def test_the_error_of_a_gain_in_miou_is_that_of_a_bootstrap_over_images():
    before, after = runs(1, 2, n=60), runs(3, 4, n=60, agreement=0.8)
    task = np.stack([MIOU.values(before), MIOU.values(after)])
    rng, gains = np.random.default_rng(0), []
    for _ in range(2000):
        images = rng.integers(60, size=60)
        gains.append(
            np.mean(
                [
                    percent(b[images].sum(axis=0)) - percent(a[images].sum(axis=0))
                    for a, b in zip(before, after, strict=True)
                ]
            )
        )
    by_image = (task[1] - task[0]).mean(axis=0)
    assert by_image.std(ddof=1) / math.sqrt(60) == pytest.approx(np.std(gains), rel=0.08)


@pytest.mark.parametrize(("seeds", "better"), [(((1,), (2,)), 0.68), (((1, 2), (3, 4)), 0.63)])
def test_the_test_on_images_agrees_with_all_exchanges(seeds, better):
    before, after = (runs(*some, n=10, agreement=level) for some, level in zip(seeds, (0.6, better), strict=True))
    gains = []
    for exchange in itertools.product([False, True], repeat=10):
        which = np.array(exchange)[None, :, None, None]
        pair = np.where(which, after, before), np.where(which, before, after)
        scores = [np.mean([percent(run.sum(axis=0)) for run in part]) for part in pair]
        gains.append(scores[1] - scores[0])
    expected = np.mean(np.abs(gains) >= abs(gains[0]) - 1e-9)
    assert 0.01 < expected < 0.9
    assert sign_flip_test([MIOU.values(after) - MIOU.values(before)]) == pytest.approx(expected, abs=0.03)


def test_accuracy_is_the_share_of_right_images():
    records = ACCURACY.records({"predictions": np.array([[1, 2, 3], [1, 2, 0]]), "labels": np.array([1, 2, 0])})
    assert ACCURACY.row(records[0]) == {"n": 3, "correct": 2, "accuracy": 2 / 3, "score": 2 / 3}
    assert ACCURACY.values(records).tolist() == [[100, 100, 0], [100, 100, 100]]


def test_other_files_are_refused(tmp_path):
    save_arrays(tmp_path / "a", {"labels": np.zeros(3)}, {"kind": "task"})
    with pytest.raises(TocomError, match="holds no predictions"):
        read_predictions(tmp_path / "a")
