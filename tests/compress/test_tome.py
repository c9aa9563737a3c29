"""ToMe against the loops of conftest.py, and the laws that merging keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom.compress import Attention, ToMe


def attention(k, prefix):
    return Attention(q=torch.zeros_like(k), k=k, scale=1.0, bias=None, prefix=prefix)


def draw(n_tokens, seed, batch=2, heads=2, dim=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_tokens, dim, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (batch, n_tokens, 1), generator=generator).double()
    k = torch.randn(batch, heads, n_tokens, 3, generator=generator, dtype=torch.float64)
    return x, size, k


def check_against_loops(loop_merge, x, size, k, count, prefix):
    merged, merged_size = ToMe()(x, size, count, attention(k, prefix))
    sizes = torch.ones_like(x[..., :1]) if size is None else size
    for image in range(len(x)):
        metric = k[image].mean(dim=0)
        tokens, expected = loop_merge(x[image], sizes[image, :, 0].tolist(), metric, count, prefix)
        torch.testing.assert_close(merged[image], tokens, rtol=0, atol=1e-12)
        assert merged_size[image, :, 0].tolist() == expected
    return merged, merged_size


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5], ids="prefix{}".format)
@pytest.mark.parametrize("n_tokens", [16, 17], ids="tokens{}".format)
@pytest.mark.parametrize("count", [1, 4, 100], ids="count{}".format)
def test_merging_is_that_of_the_loops_when_all_sizes_are_one(loop_merge, prefix, n_tokens, count):
    x, _, k = draw(n_tokens, seed=prefix)
    check_against_loops(loop_merge, x, None, k, count, prefix)


@given(n_tokens=st.integers(7, 20), prefix=st.integers(0, 5), count=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_is_that_of_the_loops_for_tokens_that_stand_for_several(loop_merge, n_tokens, prefix, count, seed):
    x, size, k = draw(n_tokens, seed)
    check_against_loops(loop_merge, x, size, k, count, prefix)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5], ids="prefix{}".format)
def test_two_successive_merges_are_those_of_the_loops(loop_merge, prefix):
    x, _, k = draw(21, seed=3)
    x, size = check_against_loops(loop_merge, x, None, k, 5, prefix)
    _, _, k = draw(16, seed=4)
    _, size = check_against_loops(loop_merge, x, size, k, 4, prefix)
    assert size.max() > 2


@given(n_tokens=st.integers(2, 30), prefix=st.integers(0, 5), count=st.integers(0, 20), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_conserves_mass_and_size(n_tokens, prefix, count, seed):
    x, size, k = draw(n_tokens, seed)
    merged, merged_size = ToMe()(x, size, count, attention(k, prefix))
    assert merged_size.sum(dim=1).tolist() == size.sum(dim=1).tolist()
    torch.testing.assert_close((merged * merged_size).sum(dim=1), (x * size).sum(dim=1))


@pytest.mark.parametrize("prefix", [1, 2, 5], ids="prefix{}".format)
def test_the_prefix_neither_merges_nor_receives_even_if_it_is_most_similar(prefix):
    x, _, k = draw(14, seed=5)
    k[:, :, : prefix + 4] = k[:, :, :1]  # the prefix and four patches have one and the same key
    merged, size = ToMe()(x, None, 100, attention(k, prefix))
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    assert (size[:, :prefix] == 1).all()


def test_what_is_in_the_prefix_does_not_change_how_patches_merge():
    x, _, k = draw(14, seed=6)
    other = k.clone()
    other[:, :, :2] = torch.randn_like(other[:, :, :2])
    before, after = (ToMe()(x, None, 4, attention(keys, 2))[0] for keys in (k, other))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_duplicate_tokens_merge_first_and_exactly():
    x, _, k = draw(9, seed=7)
    x[:, 4], k[:, :, 4] = x[:, 7], k[:, :, 7]
    merged, size = ToMe()(x, None, 1, attention(k, 1))
    expected = torch.cat([x[:, [0]], x[:, [2, 6, 8]], x[:, [1, 3, 5, 7]]], dim=1)
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)
    assert size[:, :, 0].tolist() == [[1, 1, 1, 1, 1, 1, 1, 2]] * 2


def test_several_tokens_may_merge_into_one_at_once():
    x, _, k = draw(8, seed=8)
    k[:, :, [2, 4, 6]] = k[:, :, [3]]  # three tokens of A have the key of one token of B
    merged, size = ToMe()(x, None, 3, attention(k, 1))
    torch.testing.assert_close(merged[:, 2], x[:, [2, 3, 4, 6]].mean(dim=1))
    assert size[:, :, 0].tolist() == [[1, 1, 4, 1, 1]] * 2


def test_only_the_direction_of_a_key_counts_not_its_length():
    x, _, k = draw(12, seed=9)
    lengths = torch.rand(2, 1, 12, 1, dtype=torch.float64) + 0.5
    plain, _ = ToMe()(x, None, 4, attention(k[:, :1], 1))
    scaled, _ = ToMe()(x, None, 4, attention(k[:, :1] * lengths, 1))
    torch.testing.assert_close(plain, scaled, rtol=0, atol=0)


@pytest.mark.parametrize(("n_tokens", "count"), [(2, 3), (9, 0)])
def test_nothing_changes_where_nothing_may_merge(n_tokens, count):
    x, _, k = draw(n_tokens, seed=10)
    merged, size = ToMe()(x, None, count, attention(k, 1))
    assert merged is x
    assert size is None


def test_merging_passes_gradients_to_the_tokens_but_not_to_the_keys():
    x, size, k = draw(9, seed=11)
    x.requires_grad_()
    k.requires_grad_()
    ToMe()(x, size, 3, attention(k, 1))[0].sum().backward()
    assert (x.grad != 0).all()
    assert k.grad is None
