"""LoRC: what is cut off, how ranks are allotted, and that latents give what expanded keys and values do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import refusal
from tests.small_lm import build_lm, tokens
from tocom import CompressedLM
from tocom.lm import heads
from tocom.methods.lorc_lm import DEGREES, allocate, principal, sensitivity, through_basis

RANKS = pytest.mark.parametrize("ranks", ["progressive", "uniform"])


def lorc(ranks="progressive", **overrides):
    return CompressedLM(build_lm(**overrides), {"kind": "lorc_lm", "ranks": ranks})


def truncated(weight, rank):
    """The best approximation of a rank, by numpy."""
    u, s, vt = np.linalg.svd(weight.detach().numpy(), full_matrices=False)
    s[rank:] = 0
    return torch.from_numpy(u * s @ vt)


@given(rank=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_what_is_cut_off_are_the_smallest_singular_values(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6, 9), (4, 9)))
    basis, condition = principal(weight)
    kept = through_basis(x @ weight.T, basis, rank)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(kept, x @ truncated(weight, rank).T)
    error = weight - (through_basis(weight.T, basis, rank)).T
    assert error.square().sum() == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)
    assert condition == pytest.approx(math.log(values[0] / values[-1]))


@RANKS
@torch.no_grad()
def test_on_the_pretrained_weights_it_runs_the_published_truncation(ranks):
    lm = lorc(ranks).set_degree(7)
    logits, dropped = lm(tokens()), lm.compressor.counts(7, 2)
    for block, count in zip(lm.model.model.layers, dropped, strict=True):
        for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
            linear.weight.copy_(truncated(linear.weight, 16 - count))
    torch.testing.assert_close(logits, lm.model(tokens()).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_with_biases_they_are_added_after_the_cache():
    lm = lorc(attention_bias=True).set_degree(7)
    logits, dropped = lm(tokens()), lm.compressor.counts(7, 2)
    for block, count in zip(lm.model.model.layers, dropped, strict=True):
        for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
            linear.weight.copy_(truncated(linear.weight, 16 - count))
    torch.testing.assert_close(logits, lm.model(tokens()).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_values_read_as_latents_give_what_expanded_ones_do():
    lm = lorc().set_degree(9)
    attn, x = lm.model.model.layers[1].self_attn, torch.randn(2, 10, 16, dtype=torch.float64)
    rank = 16 - lm.compressor.counts(9, 2)[1]
    basis = lm.compressor.v_basis[1][:, :rank]
    weights = torch.rand(2, 4, 10, 10, dtype=torch.float64).softmax(-1)
    latents = attn.v_proj(x) @ basis  # [2, 10, rank], what is cached
    expanded = heads(latents @ basis.T, attn).repeat_interleave(2, dim=1)
    through_out = attn.o_proj((weights @ expanded).transpose(1, 2).flatten(2))
    absorbed = torch.zeros_like(through_out)
    for head in range(4):
        out = attn.o_proj.weight[:, 8 * head : 8 * head + 8]  # [16, head_dim]
        shared = basis[8 * (head // 2) : 8 * (head // 2) + 8]  # [head_dim, rank], of the head of keys and values
        absorbed += weights[:, head] @ latents @ (out @ shared).T
    torch.testing.assert_close(absorbed, through_out)


@given(
    conditions=st.lists(st.floats(0.01, 20), min_size=2, max_size=12),
    full=st.integers(8, 128),
    degree=st.integers(0, DEGREES - 1),
)
@settings(deadline=None)
def test_ranks_fall_with_depth_and_add_up_to_the_share(conditions, full, degree):
    share, depth = 1 - degree / DEGREES, len(conditions)
    progressive, uniform = (allocate(conditions, full, share, each) for each in (True, False))
    assert sum(progressive) == sum(uniform) == max(round(share * depth * full), depth)
    assert progressive == sorted(progressive, reverse=True)
    assert max(uniform) - min(uniform) <= 1
    assert all(1 <= rank <= full for rank in progressive)


def test_ranks_are_those_of_the_papers_formula():
    conditions, full, share = [2.0, 1.0, 3.0], 100, 0.75
    logs = [6.0, 4.0, 3.0]  # of the products from each layer on
    places = [(6 - log) / (6 - 3) for log in logs]
    np.testing.assert_allclose(sensitivity(conditions), places)
    lowest = 100 - (100 - 75) / np.mean(places)
    expected = [100 * (1 - place * (1 - lowest / 100)) for place in places]
    found = allocate(conditions, full, share)
    assert np.abs(np.array(found) - expected).max() < 1
    assert (found[0], found[-1]) == (100, round(lowest))


@torch.no_grad()
def test_uniform_and_progressive_ranks_take_the_same_bytes():
    progressive, uniform = lorc(), lorc("uniform")
    for degree in range(DEGREES):
        sizes = [lm.set_degree(degree).cache_bytes() for lm in (progressive, uniform)]
        assert sizes[0] == sizes[1] == round((1 - degree / DEGREES) * 32) * 2 * 256 * 8
    assert progressive.set_degree([0, 8]).compressor.counts([0, 8], 2) == (0, 8)
    assert "goes up to 15" in refusal(progressive.set_degree, [0, 16])
