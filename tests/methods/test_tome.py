"""ToMe against the loops of conftest.py, and the laws that merging keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import draw_tokens, squeeze
from tocom.methods.tome import ToMe
from tocom.parts import Attention


def tome(x, size, count, k, prefix):
    return squeeze(ToMe(), x, size, count, Attention(q=torch.zeros_like(k), k=k, v=k, scale=1.0, bias=None), prefix)


def check_against_loops(loop_merge, x, size, k, count, prefix):
    merged, merged_size = tome(x, size, count, k, prefix)
    sizes = torch.ones_like(x[..., :1]) if size is None else size
    for image in range(len(x)):
        metric = k[image].mean(dim=0)
        tokens, expected = loop_merge(x[image], sizes[image, :, 0].tolist(), metric, count, prefix)
        torch.testing.assert_close(merged[image], tokens, rtol=0, atol=1e-12)
        assert merged_size[image, :, 0].tolist() == expected
    return merged, merged_size


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5], ids="prefix{}".format)
@pytest.mark.parametrize("n_tokens", [16, 17], ids="tokens{}".format)
@pytest.mark.parametrize("count", [1, 100], ids="count{}".format)
def test_merging_is_that_of_the_loops_when_all_sizes_are_one(loop_merge, prefix, n_tokens, count):
    x, _, k = draw_tokens(n_tokens, seed=prefix)
    check_against_loops(loop_merge, x, None, k, count, prefix)


@given(n_tokens=st.integers(7, 20), prefix=st.integers(0, 5), count=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_is_that_of_the_loops_for_tokens_that_stand_for_several(loop_merge, n_tokens, prefix, count, seed):
    x, size, k = draw_tokens(n_tokens, seed)
    check_against_loops(loop_merge, x, size, k, count, prefix)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5], ids="prefix{}".format)
def test_two_successive_merges_are_those_of_the_loops(loop_merge, prefix):
    x, _, k = draw_tokens(21, seed=3)
    x, size = check_against_loops(loop_merge, x, None, k, 5, prefix)
    _, _, k = draw_tokens(16, seed=4)
    _, size = check_against_loops(loop_merge, x, size, k, 4, prefix)
    assert size.max() > 2


@given(n_tokens=st.integers(2, 30), prefix=st.integers(0, 5), count=st.integers(0, 20), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_conserves_mass_and_size(n_tokens, prefix, count, seed):
    x, size, k = draw_tokens(n_tokens, seed)
    merged, merged_size = tome(x, size, count, k, prefix)
    assert merged_size.sum(dim=1).tolist() == size.sum(dim=1).tolist()
    torch.testing.assert_close((merged * merged_size).sum(dim=1), (x * size).sum(dim=1))


@pytest.mark.parametrize("prefix", [1, 2, 5], ids="prefix{}".format)
def test_the_prefix_neither_merges_nor_receives_even_if_it_is_most_similar(prefix):
    x, _, k = draw_tokens(14, seed=5)
    k[:, :, : prefix + 4] = k[:, :, :1]  # the prefix and four patches have one and the same key
    merged, size = tome(x, None, 100, k, prefix)
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    assert (size[:, :prefix] == 1).all()


def test_merging_passes_gradients_to_the_tokens_but_not_to_the_keys():
    x, size, k = draw_tokens(9, seed=11)
    x.requires_grad_()
    k.requires_grad_()
    tome(x, size, 3, k, 1)[0].sum().backward()
    assert (x.grad != 0).all()
    assert k.grad is None
