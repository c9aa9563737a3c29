"""EViT: what it keeps, what it fuses, what it needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import squeeze
from tocom.methods.evit import EViT, EViTOptions
from tocom.methods.tome import ToMe
from tocom.parts import Attention

FUSED = {how: EViT(EViTOptions(fuse=how)) for how in ("sum", "mean")}


def draw(n_tokens, seed=0, batch=2, heads=3, with_bias=False):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, n_tokens, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(batch, 1, 1, n_tokens, generator=generator, dtype=torch.float64) if with_bias else None
    x = torch.randn(batch, n_tokens, 5, generator=generator, dtype=torch.float64)
    return x, Attention(q, k, k, 0.5, bias)


def class_attention_by_loops(attention, image):
    """Return how much the class token attends to each token, averaged over heads, as a list."""
    total = torch.zeros(attention.k.shape[2], dtype=torch.float64)
    for q, k in zip(attention.q[image], attention.k[image], strict=True):
        logits = torch.stack([attention.scale * (q[0] @ key) for key in k])
        if attention.bias is not None:
            logits = logits + attention.bias[image, 0, 0]
        total += logits.exp() / logits.exp().sum()
    return (total / len(attention.q[image])).tolist()


@given(
    n_tokens=st.integers(4, 20),
    prefix=st.integers(1, 5),
    count=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_pruning_keeps_the_prefix_and_exactly_the_most_attended_in_order(n_tokens, prefix, count, seed, with_bias):
    prefix = min(prefix, n_tokens)
    x, attention = draw(n_tokens, seed, with_bias=with_bias)
    pruned, size = squeeze(EViT(), x, None, count, attention, prefix)
    removed = min(count, (n_tokens - prefix) // 2)
    assert size is None
    for image in range(len(x)):
        score = class_attention_by_loops(attention, image)
        ranked = sorted(range(prefix, n_tokens), key=score.__getitem__)
        kept = [*range(prefix), *sorted(ranked[removed:])]
        assert torch.equal(pruned[image], x[image, kept])


@pytest.mark.parametrize("how", FUSED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fused_token_is_the_attention_weighted_sum_or_mean_of_what_is_pruned(with_bias, how):
    x, attention = draw(12, seed=1, with_bias=with_bias)
    fused, _ = squeeze(FUSED[how], x, None, 4, attention, prefix=2)
    assert fused.shape[1] == 8
    for image in range(len(x)):
        score = class_attention_by_loops(attention, image)
        ranked = sorted(range(2, 12), key=score.__getitem__)
        pruned, kept = ranked[:5], [0, 1, *sorted(ranked[5:])]
        expected = sum(score[i] * x[image, i] for i in pruned)
        if how == "mean":
            expected = expected / sum(score[i] for i in pruned)
        torch.testing.assert_close(fused[image, :-1], x[image, kept], rtol=0, atol=0)
        torch.testing.assert_close(fused[image, -1], expected)


def test_fusing_tokens_that_get_no_attention_at_all_gives_finite_tokens():
    x, attention = draw(9, heads=1)
    attention.q[:, :, 0] = torch.tensor([1000.0, 0, 0, 0])
    attention.k[:, :, :5] = torch.tensor([1000.0, 0, 0, 0])
    attention.k[:, :, 5:] = torch.tensor([-1000.0, 0, 0, 0])
    fused, _ = squeeze(FUSED["mean"], x, None, 3, attention, prefix=1)
    torch.testing.assert_close(fused[:, -1], x[:, 5:].mean(dim=1))


@given(n_tokens=st.integers(1, 30), prefix=st.integers(1, 5), count=st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_every_compressor_removes_the_same_number_of_tokens(n_tokens, prefix, count):
    x, attention = draw(n_tokens)
    prefix = min(prefix, n_tokens)
    left = {squeeze(part, x, None, count, attention, prefix)[0].shape[1] for part in (ToMe(), EViT(), *FUSED.values())}
    assert len(left) == 1
