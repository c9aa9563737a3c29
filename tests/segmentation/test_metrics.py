"""mIoU against torchmetrics; intervals against draws written as loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from tocom.errors import TocomError
from tocom.segmentation.metrics import (
    Counts,
    bootstrap,
    count,
    difference,
    estimate,
    miou,
    pixel_accuracy,
)


def draw(seed, n=6, classes=5, agreement=0.7, present=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, (n, 8, 8))
    predicted = np.where(rng.random(labels.shape) < agreement, labels, rng.integers(0, present or classes, (n, 8, 8)))
    labels[rng.random(labels.shape) < 0.1] = 255
    return predicted, labels


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
    right = np.mean([p == t for p, t in zip(predicted.ravel(), labels.ravel(), strict=True) if t != 255])
    assert pixel_accuracy(counts) == pytest.approx(100 * right)


def test_pixels_are_summed_over_images_before_the_ratio():
    one = Counts(*(np.array([[a], [b]]) for a, b in ((1, 8), (1, 0), (0, 0))))
    assert miou(one) == pytest.approx(100 * 9 / 10)


def test_without_any_labelled_pixel_the_figures_are_zero_not_nan():
    counts = count(np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), 3)
    assert miou(counts) == 0
    assert pixel_accuracy(counts) == 0


def stack(*runs):
    return Counts(*(np.stack(parts) for parts in zip(*runs, strict=True)))


def test_bootstrap_draws_are_those_of_loops():
    plain = stack(*(count(*draw(seed), 5) for seed in (1, 2)))
    draws = bootstrap([plain], resamples=40, seed=3)
    rng = np.random.default_rng(3)
    of_seeds = rng.multinomial(2, [0.5, 0.5], size=40)
    of_images = rng.multinomial(6, np.full(6, 1 / 6), size=40)
    for number in range(40):
        chosen_seeds = np.repeat(np.arange(2), of_seeds[number])
        chosen = np.repeat(np.arange(6), of_images[number])
        values = []
        for seed in chosen_seeds:
            tp, fp, fn = (part[seed][chosen].sum(axis=0) for part in plain)
            union = tp + fp + fn
            values.append(100 * np.mean(tp[union > 0] / union[union > 0]))
        assert draws[number, 0] == pytest.approx(np.mean(values))


def test_the_same_draws_serve_all_conditions_so_that_equal_ones_never_differ():
    counts = stack(count(*draw(1), 5), count(*draw(2), 5))
    assert difference(counts, counts) == (0, 0, 0)
    draws = bootstrap([counts, counts], 300)
    assert np.array_equal(draws[:, 0], draws[:, 1])


def test_pairing_makes_the_interval_of_a_gain_narrower_than_its_parts():
    predicted, labels = draw(4, n=40, agreement=0.5)
    better = predicted.copy()
    better[:, :2] = np.where(labels[:, :2] == 255, 0, labels[:, :2])
    plain, ours = (stack(count(p, labels, 5)) for p in (predicted, better))
    gain = difference(ours, plain)
    assert gain.value == pytest.approx(estimate(ours).value - estimate(plain).value)
    assert 0 < gain.low < gain.value < gain.high
    widths = [e.high - e.low for e in (estimate(ours), estimate(plain))]
    assert gain.high - gain.low < sum(widths)


def test_the_interval_holds_the_figure_and_repeats():
    counts = stack(count(*draw(5, n=30), 5))
    first = estimate(counts, 500)
    assert first == estimate(counts, 500)
    assert first.low < first.value == miou(counts)[0] < first.high


def test_conditions_of_other_images_are_refused():
    with pytest.raises(TocomError, match="give the same"):
        difference(stack(count(*draw(1, n=4), 5)), stack(count(*draw(1, n=5), 5)))
