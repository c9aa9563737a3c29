"""Quantisation against loops, its levels and errors, and that images do not share them unless they are told to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.methods.quantise import Quantise, QuantiseOptions, quantised
from tocom.parts import Shape


def part(**options):
    return Quantise(QuantiseOptions(**options), Shape(3, 24, 2, 17, 1))


def draw(seed, n=60, dtype=torch.float64):
    return torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(n=st.integers(1, 60), count=st.integers(1, 15), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1, 50]))
@settings(deadline=None, max_examples=80)
def test_entries_are_rounded_to_the_nearest_of_so_many_levels(n, count, seed, scale):
    x = scale * draw(seed, n)
    y, steps = part().squeeze(x, count), 2 ** (16 - count) - 1
    for row, got in zip(x.tolist(), y.tolist(), strict=True):
        low, high = min(row), max(row)
        assert len(set(got)) <= steps + 1
        assert max(abs(a - b) for a, b in zip(row, got, strict=True)) <= (high - low) / (2 * steps) + 1e-12 * scale
        if steps < 300:
            levels = [low + (high - low) * i / steps for i in range(steps + 1)]
            assert got == pytest.approx(
                [min(levels, key=lambda level, v=v: abs(level - v)) for v in row], abs=1e-9 * scale
            )
    torch.testing.assert_close(part().squeeze(y, count), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_constant_stays_and_half_types_are_computed_in_float32(dtype):
    x = torch.full((2, 9), 0.3, dtype=dtype)
    assert torch.equal(part().squeeze(x, 15), x)
    x = draw(0, dtype=dtype)
    y = part().squeeze(x, 10)
    assert y.dtype == dtype
    assert torch.equal(y, quantised(x.float(), 6).to(dtype))


def test_images_share_the_extremes_of_their_batch_in_training_alone_and_only_if_told_to():
    x = draw(1) * torch.tensor([[1.0], [9.0]])
    alone = torch.cat([part().squeeze(row[None], 12) for row in x])
    batch = quantised(x.flatten(), 4).view_as(x)
    assert not torch.allclose(alone, batch)
    for extremes, expected in (("image", alone), ("batch", batch)):
        assert torch.equal(part(extremes=extremes).train().squeeze(x, 12), expected)
        assert torch.equal(part(extremes=extremes).eval().squeeze(x, 12), alone)


def test_labels_tell_options_apart():
    assert Quantise.label(QuantiseOptions()) == "quantisation"
    assert Quantise.label(QuantiseOptions(backward="none", feedback="aq_sgd", extremes="batch")) == (
        "quantisation (gradients whole, AQ-SGD) by batches"
    )
