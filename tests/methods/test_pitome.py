"""PiToMe against loops, what it protects, and the laws that merging keeps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import draw_tokens, squeeze
from tocom import CompressedViT
from tocom.methods.pitome import PiToMe, PiToMeOptions, match
from tocom.parts import Attention, Shape, Tokens


def part(depth=1, **options):
    return PiToMe(PiToMeOptions(**options), Shape(depth, 5, 2, 17, 1))


def attention(k):
    return Attention(q=torch.zeros_like(k), k=k, v=k, scale=1.0, bias=None)


def by_loops(x, sizes, k, count, prefix, margin, alpha, protect):
    """Merge the tokens [N, D] of one image, of whose keys [heads, N, C] the mean over heads is compared.

    Returns:
        What is left, its sizes, and where the protected patches were.
    """
    keys = [[sum(float(head[i, c]) for head in k) / len(k) for c in range(k.shape[2])] for i in range(len(x))]
    patches = range(prefix, len(x))

    def cosine(i, j):
        dot, lengths = sum(p * q for p, q in zip(keys[i], keys[j], strict=True)), [math.hypot(*keys[t]) for t in (i, j)]
        return dot / lengths[0] / lengths[1]

    def energy(i):
        above = [cosine(i, j) - margin for j in patches]
        return sum(z if z > 0 else alpha * (math.exp(z) - 1) for z in above) / len(above)

    ranked = sorted(patches, key=energy, reverse=True)
    taking_part = ranked[: 2 * count] if protect else ranked
    protected = ranked[2 * count :] if protect else []
    side_a, side_b = taking_part[::2], taking_part[1::2]
    partner = {a: max(side_b, key=lambda b: cosine(a, b)) for a in side_a}
    by_similarity = sorted(side_a, key=lambda a: cosine(a, partner[a]), reverse=True)
    merging = by_similarity[:count]
    members = {i: [i, *(a for a in merging if partner[a] == i)] for i in range(len(x))}
    order = [*range(prefix), *protected, *by_similarity[count:], *side_b]
    left = [sum(sizes[i] * x[i] for i in members[j]) / sum(sizes[i] for i in members[j]) for j in order]
    return torch.stack(left), [sum(sizes[i] for i in members[j]) for j in order], protected


@given(
    n_tokens=st.integers(4, 18),
    prefix=st.integers(0, 3),
    count=st.integers(1, 12),
    margin=st.sampled_from([-0.5, 0.0, 0.75, 0.9]),
    alpha=st.sampled_from([0.3, 1.0, 2.0]),
    protect=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=80)
def test_merging_is_that_of_the_loops(n_tokens, prefix, count, margin, alpha, protect, seed):
    x, size, k = draw_tokens(n_tokens, seed)
    prefix = min(prefix, n_tokens - 2)
    merger = part(margin=margin, alpha=alpha, unprotected="none" if protect else "all")
    merged, sizes = squeeze(merger, x, size, count, attention(k), prefix)
    removed = min(count, (n_tokens - prefix) // 2)
    assert merged.shape[1] == n_tokens - removed
    for image in range(len(x)):
        arguments = removed, prefix, margin, alpha, protect
        expected, expected_sizes, protected = by_loops(x[image], size[image, :, 0].tolist(), k[image], *arguments)
        torch.testing.assert_close(merged[image], expected, rtol=0, atol=1e-12)
        assert sizes[image, :, 0].tolist() == expected_sizes
        alone = slice(prefix, prefix + len(protected))
        torch.testing.assert_close(merged[image, alone], x[image, protected], rtol=1e-15, atol=0)


@given(n_tokens=st.integers(2, 30), prefix=st.integers(0, 5), count=st.integers(0, 20), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_conserves_mass_and_size(n_tokens, prefix, count, seed):
    x, size, k = draw_tokens(n_tokens, seed)
    for unprotected in ("none", "all"):
        merged, sizes = squeeze(part(unprotected=unprotected), x, size, count, attention(k), prefix)
        assert sizes.sum(dim=1).tolist() == size.sum(dim=1).tolist()
        torch.testing.assert_close((merged * sizes).sum(dim=1), (x * size).sum(dim=1))


def test_the_order_of_the_patches_does_not_matter():
    x, size, k = draw_tokens(20, seed=4)
    order = torch.cat([torch.arange(1), 1 + torch.randperm(19, generator=torch.Generator().manual_seed(5))])
    merged, sizes = squeeze(part(), x, size, 6, attention(k), 1)
    other, other_sizes = squeeze(part(), x[:, order], size[:, order], 6, attention(k[:, :, order]), 1)
    torch.testing.assert_close(merged, other)
    assert torch.equal(sizes, other_sizes)


def test_patches_that_are_like_no_other_are_left_alone():
    x, _, k = draw_tokens(12, seed=6)
    k[:] = torch.tensor([1.0, 0, 0]) + 0.01 * k
    k[:, :, 3], k[:, :, 8] = torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 1.0])
    merged, sizes = squeeze(part(), x, None, 4, attention(k), 1)
    for alone in (3, 8):
        assert (merged == x[:, [alone]]).all(dim=-1).any(dim=-1).all()
    assert (sizes[:, :4] == 1).all()


@pytest.mark.parametrize("unprotected", ["none", "all"])
@pytest.mark.parametrize("prefix", [1, 2, 5], ids="prefix{}".format)
def test_the_prefix_neither_merges_nor_receives_even_if_it_is_most_similar(prefix, unprotected):
    x, _, k = draw_tokens(14, seed=5)
    k[:, :, : prefix + 4] = k[:, :, :1]  # the prefix and four patches have one and the same key
    merged, sizes = squeeze(part(unprotected=unprotected), x, None, 100, attention(k), prefix)
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    assert (sizes[:, :prefix] == 1).all()


def test_equal_patches_merge_in_the_order_of_their_positions():
    x, _, k = draw_tokens(7, seed=7, batch=1)
    k[:] = torch.tensor([1.0, 0, 0])
    merged, sizes = squeeze(part(), x, None, 2, attention(k), 1)
    expected = torch.stack([x[0, 0], x[0, 5], x[0, 6], x[0, 1:4].mean(dim=0), x[0, 4]])
    torch.testing.assert_close(merged[0], expected)
    assert sizes[0, :, 0].tolist() == [1, 1, 1, 3, 1]


def test_the_margin_falls_with_depth_and_half_of_the_blocks_may_be_unprotected():
    assert [part(4).margin(block) for block in range(4)] == [0.75, 0.5625, 0.375, 0.1875]
    assert [part(4, margin=0.9).margin(block) for block in (0, 2)] == [0.9, 0.45]
    expected = {"none": [], "first_half": [0, 1, 2], "second_half": [3, 4], "all": [0, 1, 2, 3, 4]}
    for unprotected, blocks in expected.items():
        merger = part(5, unprotected=unprotected)
        assert [block for block in range(5) if not merger.protects(block)] == blocks
    assert [part(4, unprotected="first_half").protects(block) for block in range(4)] == [False, False, True, True]


def test_a_block_merges_by_its_own_margin():
    x, _, k = draw_tokens(16, seed=1)
    merger = part(4)
    for block in range(4):
        merged = merger.compress(Tokens(x, None, 4, block, 1), attention(k)).x
        alone, _ = squeeze(part(margin=0.75 * (1 - block / 4)), x, None, 4, attention(k), 1)
        assert torch.equal(merged, alone)


def test_merging_passes_gradients_to_the_tokens_but_not_to_the_keys():
    x, size, k = draw_tokens(9, seed=11)
    x.requires_grad_()
    k.requires_grad_()
    squeeze(part(), x, size, 3, attention(k), 1)[0].sum().backward()
    assert (x.grad != 0).all()
    assert k.grad is None


@pytest.mark.parametrize("protect", [True, False], ids=["protected", "unprotected"])
def test_pairs_depend_on_neither_autocast_nor_the_type_of_the_same_keys(protect):
    generator = torch.Generator().manual_seed(8)
    metric = (1 + 0.02 * torch.randn(2, 30, 8, generator=generator)).bfloat16()  # it cannot tell their cosines apart
    expected = match(metric.float(), 7, 1, 0.75, 1.0, protect)
    with torch.autocast("cpu", torch.bfloat16):
        found = match(metric, 7, 1, 0.75, 1.0, protect)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_large_tokens_that_stand_for_many_merge_without_overflow_in_float16():
    x, size = torch.full((1, 4, 5), 600.0).half(), torch.full((1, 4, 1), 150.0).half()  # the product is too large
    merged, sizes = squeeze(part(), x, size, 1, attention(torch.ones(1, 1, 4, 2).half()), 1)
    assert merged.dtype == sizes.dtype == torch.float16
    assert (merged == 600).all()
    assert sizes.flatten().tolist() == [150, 150, 300]


def test_highest_degree_tables_and_the_sizes_of_a_model(make_vit, images):
    vit = CompressedViT(make_vit(), "pitome", degree=3)
    features, size = vit.forward_features(images)
    assert features.shape[1] == vit.tokens()[-1] == 17 - 9
    assert size.sum(dim=1).tolist() == [[17.0], [17.0]]
    assert PiToMe.highest(PiToMeOptions(), 196) == 98
    assert PiToMe.label(PiToMeOptions()) == "PiToMe"
    assert PiToMe.label(PiToMeOptions(unprotected="first_half")) == "PiToMe (first half unprotected)"
