"""Sparse-Tuning: budgets and keep rates, the forward pass written as loops, and what is trained."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import ARCHITECTURE, KWARGS, build, refusal, tune
from tocom import CompressedViT, gflops, load_model, make_part, save_model
from tocom.files import load_tensors
from tocom.methods.sparse_tuning import SparseTuning, SparseTuningOptions
from tocom.models import compress
from tocom.parts import Shape

DEPTH = 6
GLYPH = Shape(6, 64, 4, 65, 1)


def model(**overrides):
    return build(depth=DEPTH, **overrides)


def fresh(shape, **options):
    torch.manual_seed(0)
    return make_part("compressor", {"kind": "sparse_tuning"} | options, shape, 8).eval()


@torch.no_grad()
def drawn(vit, seed=0, **options):
    """Return a Sparse-Tuning whose adapters matter, for a model."""
    part = fresh(Shape.of(vit), **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return part.to(next(vit.parameters()).dtype)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {}),
        ({"reg_tokens": 3}, {"fuse": "none", "widths": [5, 3]}),
        ({"mlp_ratio": 2.0}, {"mlp_ratio": 2, "blocks": [1, 5], "groups": [1, 3, 5]}),
        ({"num_heads": 4}, {"fuse": "mean", "blocks": [0]}),
    ],
    ids=str,
)
def test_costs_are_those_that_are_counted(overrides, options):
    vit = model(**overrides)
    part = fresh(Shape.of(vit), **options)
    outside = gflops(CompressedViT(vit)) - part.costs.merging(0) / 1e9
    for degree in range(9):
        here, there = CompressedViT(vit, part, degree), CompressedViT(vit, "tome", degree)
        assert gflops(here) - outside == pytest.approx(part.blocks_cost(part.counts(degree, DEPTH)) / 1e9)
        assert gflops(there) - outside == pytest.approx(part.costs.merging(degree) / 1e9)


@pytest.mark.parametrize("shape", [GLYPH, Shape(12, 768, 12, 198, 2)], ids=["glyph_vit", "distilled DeiT-B"])
@pytest.mark.parametrize("fuse", ["none", "sum"])
def test_the_keep_rate_is_the_highest_within_the_budget(shape, fuse):
    with torch.device("meta"):
        part = fresh(shape, fuse=fuse)
    found = {}
    for step in range(1, 4001):
        removed = part.removed(step / 4000)
        found[removed] = part.blocks_cost(removed)
    for degree in (1, 4, 9, 14, 20):
        cost, budget = part.blocks_cost(part.counts(degree, shape.depth)), part.costs.merging(degree)
        assert max(value for value in found.values() if value <= budget) <= cost <= budget
        assert cost > 0.97 * budget
        assert 0 < part.keep_rate(degree) < 1


@given(
    depth=st.integers(1, 24),
    dim=st.integers(24, 64).map(lambda width: 4 * width),
    patches=st.integers(4, 400),
    prefix=st.integers(1, 5),
    fuse=st.sampled_from(["none", "sum"]),
    rates=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
)
@settings(deadline=None, max_examples=80)
def test_a_block_keeps_its_share_of_patches_and_a_higher_rate_costs_no_less(depth, dim, patches, prefix, fuse, rates):
    with torch.device("meta"):
        part = fresh(Shape(depth, dim, 4, patches + prefix, prefix), fuse=fuse, widths=[8, 4])
    low, high = (part.removed(rate) for rate in sorted(rates))
    assert part.blocks_cost(low) <= part.blocks_cost(high)
    n = patches + prefix
    for block, count in enumerate(low):
        kept = prefix + math.ceil(min(rates) * (n - prefix)) + (fuse == "sum") if block in part.blocks else n
        n, before = n - count, n
        assert n == min(kept, before)


def test_blocks_at_the_quarters_prune_and_adapters_are_as_wide_as_published_or_less():
    with torch.device("meta"):
        places = {depth: fresh(Shape(depth, 768, 12, 197, 1)) for depth in (1, 2, 3, 6, 12, 24)}
    assert {depth: part.blocks for depth, part in places.items()} == {
        1: (0,), 2: (0, 1), 3: (0, 1, 2), 6: (1, 3, 4), 12: (3, 6, 9), 24: (6, 12, 18)}  # fmt: skip
    assert places[6].starts == (0, 1, 3, 4)
    assert [part.widths for part in (places[12], fresh(GLYPH), fresh(Shape(2, 6, 2, 17, 1)))] == [
        (64, 32), (16, 8), (1, 1)]  # fmt: skip
    layers = places[12].adapters[0]
    assert [tuple(layer.weight.shape) for layer in (layers.down, layers.inner_down, layers.inner_up, layers.mix)] == [
        (64, 768), (32, 64), (64, 32), (64, 96)]  # fmt: skip


def test_a_budget_that_cannot_be_met_leaves_one_patch_and_the_fused_token():
    part = fresh(GLYPH)
    assert part.counts(32, 6) == (0, 62, 0, 0, 0, 0)
    assert part.token_counts(32, 6, 65, 1) == (65, 3, 3, 3, 3, 3)
    assert fresh(GLYPH, fuse="none").token_counts(32, 6, 65, 1)[-1] == 2
    assert part.blocks_cost(part.counts(32, 6)) > part.costs.merging(32)


def test_cost_falls_with_every_degree_that_can_be_met():
    part = fresh(GLYPH)
    costs = [part.blocks_cost(part.counts(degree, 6)) for degree in range(23)]
    assert all(after < before for before, after in pairwise(costs))


# --- the forward pass -------------------------------------------------------------------------------------------------


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


@torch.no_grad()
def by_loops(vit, part, image, rate, prefix, starts=(0, 1, 3, 4), fuse=True, embedding=False):
    """Return the logits of one image [3, H, W] at a keep rate of blocks 1, 3 and 4."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
    group = [x] if embedding else []
    for index, (block, adapter) in enumerate(zip(vit.blocks, part.adapters, strict=True)):
        attn, n = block.attn, len(x)
        q, k, v = attn.qkv(block.norm1(x)).view(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
        rows = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        x = x + attn.proj((rows @ v).transpose(0, 1).reshape(n, -1))
        kept = math.ceil(rate * (n - prefix))
        if index in (1, 3, 4) and prefix + kept + fuse < n:
            score = rows[:, 0].mean(0).tolist()
            ranked = sorted(range(prefix, n), key=score.__getitem__, reverse=True)
            left = [x[i] for i in [*range(prefix), *ranked[:kept]]]
            if fuse:
                left.append(sum(score[i] * x[i] for i in ranked[kept:]))
            x = torch.stack(left)
            assert len(x) == prefix + kept + fuse
        h = linear(adapter.down, x).clamp(min=0)
        u = linear(adapter.inner_down, h)
        v = linear(adapter.inner_up, u)
        out = linear(adapter.up, linear(adapter.mix, torch.cat([u, v], dim=1)) + h)
        group.append(out)
        x = x + block.mlp(block.norm2(x)) + out
        if index + 1 in starts or index + 1 == len(vit.blocks):
            x, group = x + sum(group), []
    return vit.forward_head(vit.norm(x)[None])[0]


@pytest.mark.parametrize(
    ("registers", "options"),
    [
        (0, {}),
        (2, {"fuse": "none"}),
        (0, {"embedding": True, "widths": [7, 2]}),
        (0, {"blocks": [1, 3, 4], "groups": [1, 2, 3, 4, 5]}),
    ],
    ids=str,
)
def test_logits_are_those_of_the_loops(images, registers, options):
    vit, images = model(reg_tokens=registers).double(), images.double()
    part = drawn(vit, **options)
    told = {"fuse": options.get("fuse") != "none", "embedding": options.get("embedding", False)}
    starts = (0, *options["groups"]) if "groups" in options else (0, 1, 3, 4)
    for degree in (0, 2, 5):
        compressed, rate = CompressedViT(vit, part, degree), part.keep_rate(degree)
        expected = [by_loops(vit, part, image, rate, 1 + registers, starts, **told) for image in images]
        with torch.no_grad():
            torch.testing.assert_close(compressed(images), torch.stack(expected))


@pytest.mark.parametrize("fuse", ["none", "sum", "mean"])
@torch.no_grad()
def test_before_it_is_trained_it_is_evit_in_these_blocks(fuse):
    vit, images = model(img_size=64), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    part = fresh(Shape.of(vit), fuse=fuse)
    for degree in (0, 3, 7):
        removed = part.counts(degree, DEPTH)
        assert bool(sum(removed)) == (degree > 0)
        pruned = CompressedViT(vit, {"kind": "evit", "fuse": fuse}, removed)
        assert pruned.tokens() == CompressedViT(vit, part, degree).tokens()  # no block loses more than half of them
        assert torch.equal(CompressedViT(vit, part, degree)(images), pruned(images))
    assert torch.equal(CompressedViT(vit, part)(images), vit(images))


@torch.no_grad()
def test_the_embedding_makes_another_model_of_an_untrained_one(images):
    vit = model()
    assert not torch.allclose(CompressedViT(vit, fresh(Shape.of(vit), embedding=True))(images), vit(images), atol=0.1)


def test_gradients_are_the_same_where_blocks_are_recomputed(images):
    gradients = []
    for recompute in (False, True):
        vit = model()
        vit.set_grad_checkpointing(recompute)
        compressed = CompressedViT(vit, drawn(vit, embedding=True), 3).train()
        compressed(images).square().sum().backward()
        gradients.append([p.grad for p in compressed.parameters() if p.grad is not None])
    assert len(gradients[0]) > 50
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_close_to_float32(images, dtype):
    part = drawn(model())
    expected = CompressedViT(model(), part)(images)
    plain = model()(images)
    with torch.autocast("cpu", dtype):
        results = [CompressedViT(model(), part)(images)]
    results += [CompressedViT(model().to(dtype), part)(images.to(dtype))]
    for logits in results:
        assert (logits.float() - expected).norm() < 0.2 * (plain - expected).norm()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [1, 6]}, "blocks: there is no block 6; the model has blocks 0 to 5"),
        ({"groups": [1, 3, 4, 9]}, "groups: there is no block 9"),
        ({"groups": [1, 4]}, "block 3 prunes within a group"),
        ({"blocks": [0, 3], "embedding": True}, "block 0 prunes, but with embedding"),
        ({"blocks": [3, 3]}, "it lists a block twice"),
        ({"blocks": []}, "blocks"),
        ({"widths": [8]}, "widths"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    assert message in refusal(make_part, "compressor", {"kind": "sparse_tuning"} | options, GLYPH, 8)


@torch.no_grad()
def test_a_list_of_counts_is_taken_as_it_is_where_groups_start(images):
    vit = CompressedViT(model(), drawn(model()), [0, 4, 0, 2, 0, 0])
    assert vit.tokens() == (17, 13, 13, 11, 11, 11)
    assert vit.forward_features(images)[0].shape[1] == 11
    assert "removes tokens in block 2, within a group" in refusal(vit.set_degree, [0, 0, 1, 0, 0, 0])
    assert vit.set_degree([99, 0, 0, 0, 0, 0]).tokens()[0] == 3
    vit = CompressedViT(model(), drawn(model(), embedding=True))
    assert "block 0, within a group" in refusal(vit.set_degree, [1, 0, 0, 0, 0, 0])


def test_what_tables_call_it_and_a_part_for_another_model():
    assert SparseTuning.label(SparseTuningOptions()) == "Sparse-Tuning"
    options = SparseTuningOptions(fuse="none", blocks=(3, 1), embedding=True)
    assert SparseTuning.label(options) == "Sparse-Tuning (blocks 1, 3, not fused, embedding)"
    assert "adapters for 6 blocks, but the model has 2" in refusal(CompressedViT, build(), fresh(GLYPH))
    assert "adapters for 0 blocks" in refusal(CompressedViT, build(), SparseTuning())


# --- trained with the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_adapters_are_trained_and_the_backbone_only_if_the_tuning_says_so(tuning, backbone, digits, tmp_path):
    path, _ = tune(backbone, digits, tmp_path / "x", "2", compressor="sparse_tuning", tuning=tuning)
    tensors, original = load_tensors(path)[0], load_tensors(backbone)[0]
    changed = {name for name, value in tensors.items() if name in original and not torch.equal(value, original[name])}
    assert (changed == {"head.weight", "head.bias"}) == (tuning == "head")
    assert ("blocks.0.attn.qkv.weight" in changed) == (tuning == "full")
    assert all(
        tensors[f"compressor.adapters.{block}.{name}.weight"].any() for block in (0, 1) for name in ("up", "inner_up")
    )
    loaded, about = load_model(path)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        vit = compress(loaded, about, about["compressor"], 2)
        assert not torch.allclose(vit.set_degree(0)(images), loaded(images))


def test_a_model_from_elsewhere_gets_the_same_adapters_whatever_was_drawn_before(backbone, digits, tmp_path):
    save_model(tmp_path / "m.safetensors", build(num_classes=10), ARCHITECTURE, KWARGS | {"num_classes": 10})
    job = {"compressor": "sparse_tuning", "tuning": "none", "fine_tuned": str(tmp_path / "m.safetensors")}
    written = []
    for draws in (1, 2):
        torch.manual_seed(draws)
        written.append(tune(backbone, digits, tmp_path / str(draws), "0", **job)[0].read_bytes())
    assert written[0] == written[1]
