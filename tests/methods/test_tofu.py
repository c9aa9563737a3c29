"""ToFu against loops: what it prunes, which norm merged tokens have, and where it does which."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import groups, squeeze
from tocom import CompressedViT
from tocom.methods.tofu import ToFu, ToFuOptions
from tocom.methods.tome import ToMe
from tocom.parts import Attention, Shape, Tokens


def part(depth=1, **options):
    return ToFu(ToFuOptions(**options), Shape(depth, 5, 2, 17, 1))


def merger(**options):
    return part(pruning_blocks=0, **options)


def attention(k):
    return Attention(q=torch.zeros_like(k), k=k, v=k, scale=1.0, bias=None)


def draw(n_tokens, seed, batch=2, heads=2, dim=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_tokens, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads, n_tokens, 3, generator=generator, dtype=torch.float64)
    return x, k


def left_by_loops(k, count, prefix):
    """Return, of one image, each token that is left with the list of its group, itself first, in their order."""
    n_tokens = k.shape[1]
    found = groups(k, min(count, (n_tokens - prefix) // 2), prefix)
    evens, odds = (range(first, n_tokens, 2) for first in (0, 1))
    staying = [i for i in evens if i >= prefix and found[i] == {i}]
    order = [*range(prefix), *staying, *(i for i in odds if i >= prefix)]
    return [(i, [i, *sorted(found[i] - {i})]) for i in order]


def norm(x):
    return sum(value**2 for value in x.tolist()) ** 0.5


common = {
    "n_tokens": st.integers(7, 20),
    "prefix": st.integers(1, 4),
    "count": st.integers(1, 12),
    "seed": st.integers(0, 10**6),
}


@given(**common)
@settings(deadline=None, max_examples=50)
def test_pruning_drops_exactly_what_tome_would_have_merged(n_tokens, prefix, count, seed):
    x, k = draw(n_tokens, seed)
    pruned, size = squeeze(part(), x, None, count, attention(k), prefix)
    assert size is None
    for image in range(len(x)):
        assert torch.equal(pruned[image], x[image, [i for i, _ in left_by_loops(k[image], count, prefix)]])


@given(scale=st.sampled_from(["mlerp", "receiver", "none"]), **common)
@settings(deadline=None, max_examples=80)
def test_merged_tokens_are_those_of_the_loops(n_tokens, prefix, count, scale, seed):
    x, k = draw(n_tokens, seed)
    merged, size = squeeze(merger(scale=scale), x, None, count, attention(k), prefix)
    assert size is None
    for image in range(len(x)):
        left = left_by_loops(k[image], count, prefix)
        assert merged.shape[1] == len(left)
        for token, (receiver, members) in zip(merged[image], left, strict=True):
            if len(members) == 1:
                assert torch.equal(token, x[image, receiver])
                continue
            mean = sum(x[image, i] for i in members) / len(members)
            largest = max(norm(x[image, i]) for i in members)
            factor = {"mlerp": largest / norm(mean), "receiver": largest / norm(x[image, receiver]), "none": 1}[scale]
            torch.testing.assert_close(token, mean * factor)
            if scale == "mlerp":
                assert norm(token) == pytest.approx(largest)


@given(**common)
@settings(deadline=None, max_examples=40)
def test_sizes_if_they_are_counted_are_those_of_tome(n_tokens, prefix, count, seed):
    x, k = draw(n_tokens, seed)
    before = torch.randint(1, 5, (2, n_tokens, 1), generator=torch.Generator().manual_seed(seed)).double()
    for given_size in (None, before):
        _, expected = squeeze(ToMe(), x, given_size, count, attention(k), prefix)
        for blocks in (0, 1):
            counted = squeeze(part(pruning_blocks=blocks, sizes=True), x, given_size, count, attention(k), prefix)
            uncounted = squeeze(part(pruning_blocks=blocks), x, None, count, attention(k), prefix)
            assert torch.equal(counted[1], expected)
            assert torch.equal(counted[0], uncounted[0])  # the mean does not weigh them


def toward_the_same(x):
    """Merge the patches 2, 4 and 6 of x [1, 8, D] into patch 5, by their keys; return what it becomes."""
    k = torch.zeros(1, 1, 8, 2, dtype=x.dtype)
    k[:, :, [2, 4, 6, 5], 0], k[:, :, [1, 3, 7], 1] = 1, 1
    merged, _ = squeeze(merger(), x, None, 3, attention(k), 1)
    assert merged.shape[1] == 5
    assert torch.equal(merged[:, [0, 1, 2, 4]], x[:, [0, 1, 3, 7]])
    return merged[0, 3]


def test_equal_tokens_stay_what_they_are_and_of_parallel_ones_the_longest_does():
    x, _ = draw(8, seed=1, batch=1)
    x[:, [2, 4, 6]] = x[:, [5]]
    torch.testing.assert_close(toward_the_same(x), x[0, 5])
    x[:, [2, 4, 6]] *= torch.tensor([0.5, 3.0, 2.0], dtype=x.dtype)[None, :, None]
    torch.testing.assert_close(toward_the_same(x), x[0, 4])


def test_tokens_that_cancel_or_are_nothing_give_finite_tokens_and_gradients():
    x = 100 * draw(8, seed=2, batch=1)[0].float()
    x[:, 2], x[:, 4], x[:, 6] = -x[:, 5], x[:, 1], -x[:, 1]
    for value in (x, torch.zeros_like(x)):
        value.requires_grad_()
        token = toward_the_same(value)
        assert norm(token) <= value.detach().norm(dim=-1).max()
        token.sum().backward()
        assert value.grad.isfinite().all()


@pytest.mark.parametrize("blocks", [0, 1], ids=["merging", "pruning"])
@pytest.mark.parametrize("prefix", [1, 2, 5], ids="prefix{}".format)
def test_the_prefix_neither_merges_nor_receives_even_if_it_is_most_similar(prefix, blocks):
    x, k = draw(14, seed=5)
    k[:, :, : prefix + 4] = k[:, :, :1]  # the prefix and four patches have one and the same key
    left, size = squeeze(part(pruning_blocks=blocks, sizes=True), x, None, 100, attention(k), prefix)
    assert torch.equal(left[:, :prefix], x[:, :prefix])
    assert (size[:, :prefix] == 1).all()


@pytest.mark.parametrize(
    ("depth", "chosen", "pruning"), [(12, None, 7), (6, None, 4), (3, None, 2), (12, 0, 0), (12, 5, 5), (3, 9, 3)]
)
def test_the_first_blocks_prune_and_the_others_merge(depth, chosen, pruning):
    x, k = draw(12, seed=3)
    fusion = part(depth, pruning_blocks=chosen)
    pruned, merged = (squeeze(part(pruning_blocks=n), x, None, 3, attention(k), 1)[0] for n in (1, 0))
    for block in range(depth):
        left = fusion.compress(Tokens(x, None, 3, block, 1), attention(k)).x
        assert torch.equal(left, pruned if block < pruning else merged)


def test_gradients_reach_what_merges_but_neither_what_is_pruned_nor_the_keys():
    for fusion, reached in ((merger(), 9), (part(), 6)):
        x, k = draw(9, seed=11)
        x.requires_grad_()
        k.requires_grad_()
        squeeze(fusion, x, None, 3, attention(k), 1)[0].sum().backward()
        assert (x.grad != 0).any(dim=-1).sum(dim=-1).tolist() == [reached, reached]
        assert k.grad is None


def test_long_tokens_merge_in_float32():
    x, k = draw(9, seed=12)
    x = (1e4 * x).half()  # squares are beyond float16
    merged, _ = squeeze(merger(), x, None, 3, attention(k.half()), 1)
    expected, _ = squeeze(merger(), x.float(), None, 3, attention(k.half().float()), 1)
    assert merged.dtype == torch.float16
    torch.testing.assert_close(merged, expected.half(), rtol=0, atol=0)


def test_highest_degree_tables_and_the_sizes_of_a_model(make_vit, images):
    vit = CompressedViT(make_vit(), {"kind": "tofu", "sizes": True}, degree=3)
    features, size = vit.forward_features(images)
    assert features.shape[1] == vit.tokens()[-1] == 17 - 9
    assert size.sum(dim=1).tolist() == [[17.0], [17.0]]
    assert ToFu.highest(ToFuOptions(), 196) == 98
    assert ToFu.label(ToFuOptions()) == "ToFu"
    assert ToFu.label(ToFuOptions(pruning_blocks=0, scale="none")) == "ToFu (0 blocks prune, mean)"
