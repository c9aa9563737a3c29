"""LoRC on ViTs and language models: ranks by depth, projections against the decomposition, latents, whose bases."""

from copy import deepcopy
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import ARCHITECTURE, KWARGS, beside, build, refusal, tune
from tests.small_lm import build_lm, tokens
from tocom import CompressedLM, CompressedViT, load_model, make_part, save_model
from tocom.compressed import cost
from tocom.lm import heads
from tocom.methods.lorc import LoRC, LoRCOptions, directions, log_condition, progressive, truncate
from tocom.models import compress
from tocom.parts import Shape


def part(depth=3, **options):
    return LoRC(LoRCOptions(**options), Shape(depth, 24, 2, 17, 1))


def projected(weight, rank):
    """Return a weight [out, in] of which the projection onto its first directions is left, by another routine."""
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    first = vectors[:, values.argsort(descending=True)[:rank]]
    return first @ first.T @ weight


# --- ranks ------------------------------------------------------------------------------------------------------------


@given(
    conditions=st.lists(st.floats(0, 30), min_size=1, max_size=13),
    full=st.integers(1, 800),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_ranks_fall_with_depth_and_sum_to_what_is_asked(conditions, full, share):
    n = len(conditions)
    total = max(n, round(share * n * full))
    ranks = progressive(conditions, full, total)
    assert sum(ranks) == total
    assert ranks == sorted(ranks, reverse=True)
    assert 1 <= ranks[-1] <= ranks[0] <= full


def test_ranks_are_those_of_the_formula():
    conditions = [log(4), log(2), log(8)]  # cumulative: log 64, log 16, log 8, so the fall is 0, 2/3 and 1
    assert progressive(conditions, 60, 180) == [60, 60, 60]
    assert progressive(conditions, 60, 130) == [60, 40, 30]  # d_min = 30
    assert progressive(conditions, 60, 131) == [60, 40, 31]  # 30.6 and 40.4
    assert progressive(conditions, 60, 30) == [21, 8, 1]  # d_min = 1, d_max = 21.25: 21.25, 7.75 and 1
    assert progressive([3.0], 60, 20) == [20]
    assert progressive([1.0, 0.0, 0.0], 60, 100)[0] == 60


def test_condition_numbers_are_bounded():
    assert log_condition(torch.tensor([6.0, 3.0, 2.0])) == pytest.approx(log(3))
    assert log_condition(torch.tensor([5.0, 0.0])) == pytest.approx(log(1e6))
    assert log_condition(torch.zeros(2)) == 0


@pytest.mark.parametrize("ranks", ["progressive", "uniform"])
def test_a_degree_keeps_its_share_of_all_ranks(make_vit, ranks):
    vit = CompressedViT(make_vit(), {"kind": "lorc", "ranks": ranks})
    for degree in range(16):
        dropped = vit.compressor.counts(degree, 3)
        assert sum(24 - count for count in dropped) == max(3, round(72 * (1 - degree / 16)))
        assert list(dropped) == sorted(dropped)
        assert cost(vit.set_degree(degree)) == 8 * 2 * 17 * (72 - sum(dropped))  # 8 bytes of float64
        if ranks == "uniform":
            assert max(dropped) - min(dropped) <= 1
    assert vit.compressor.counts([0, 5, 0], 3) == (0, vit.compressor.counts(5, 3)[1], 0)
    assert "goes up to 15" in refusal(vit.set_degree, 16)


@pytest.mark.parametrize("ranks", ["progressive", "uniform"])
def test_a_degree_keeps_the_same_share_of_a_language_models_keys_and_values(ranks):
    lm = CompressedLM(build_lm(), {"kind": "lorc", "ranks": ranks})
    for degree in range(16):
        dropped = lm.set_degree(degree).compressor.counts(degree, 2)
        assert list(dropped) == sorted(dropped)
        assert lm.cache_bytes() == cost(lm) == round((1 - degree / 16) * 32) * 2 * 256 * 8
        assert lm.cache_bytes(64) == lm.cache_bytes() / 4
    assert lm.compressor.counts([0, 5], 2) == (0, lm.compressor.counts(5, 2)[1])
    assert "goes up to 15" in refusal(lm.set_degree, [0, 16])


def test_ranks_do_not_depend_on_the_type_of_the_weights(make_vit):
    tables = [CompressedViT(make_vit().to(dtype), "lorc").compressor.ranks for dtype in (torch.float32, torch.float64)]
    assert torch.equal(*tables)
    vit = CompressedViT(make_vit(), "lorc").to(torch.bfloat16)
    assert torch.equal(vit.compressor.ranks, tables[0])


# --- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (8, 24), (24, 8)], ids=str)
def test_what_is_lost_of_a_weight_is_the_singular_values_dropped(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, singular = directions(weight)
    zero = torch.zeros(shape[0], dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(shape[0], dtype=torch.float64))
    torch.testing.assert_close(singular, torch.linalg.svdvals(weight))
    for rank in range(1, min(shape) + 1):
        left = truncate(weight.T, basis[:, :rank], zero).T
        torch.testing.assert_close(left, projected(weight, rank))
        torch.testing.assert_close((weight - left).square().sum(), singular[rank:].square().sum())


def absorbed_logits(model, images, ranks):
    """Classify by latents alone: queries and outputs take in what would expand keys and values.

    ``ranks`` has one for every block.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block, rank in zip(model.blocks, ranks, strict=True):
        attn, normed = block.attn, block.norm1(x)
        (wq, wk, wv), (bq, _, bv) = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
        left_k, left_v = (torch.linalg.svd(w)[0][:, :rank] for w in (wk, wv))
        latent_k, latent_v = normed @ wk.T @ left_k, normed @ wv.T @ left_v  # [B, N, rank]: all that is cached
        result = attn.proj.bias + attn.proj.weight @ bv
        for head in range(attn.num_heads):
            rows = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            query = (normed @ wq[rows].T + bq[rows]) @ left_k[rows]  # [B, N, rank]; the bias of keys cancels
            weights = (query @ latent_k.mT / attn.head_dim**0.5).softmax(dim=-1)
            result = result + weights @ latent_v @ (attn.proj.weight[:, rows] @ left_v[rows]).T
        x = x + result
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("degree", [1, 7, 15])
@torch.no_grad()
def test_expanded_and_absorbed_are_the_same(make_vit, images, degree):
    vit = CompressedViT(make_vit(), "lorc", degree)
    ranks = [24 - count for count in vit.compressor.counts(degree, 3)]
    torch.testing.assert_close(vit(images), absorbed_logits(vit.model, images, ranks), rtol=0, atol=1e-10)


@torch.no_grad()
def test_all_directions_together_lose_nothing(make_vit):
    compressor = CompressedViT(make_vit(), "lorc").compressor
    bases, offsets = compressor.bases[0], compressor.offsets[0]
    keys = torch.randn(2, 17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for basis, offset in zip(bases, offsets, strict=True):
        torch.testing.assert_close(truncate(keys, basis, offset), keys, rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{"qk_norm": True}, {"qkv_bias": False}, {"init_values": 0.5}], ids=str)
@torch.no_grad()
def test_it_is_the_model_whose_weights_are_truncated(make_vit, images, settings):
    model = make_vit(**settings)
    vit = CompressedViT(deepcopy(model), "lorc", 9)
    for block, count in zip(model.blocks, vit.compressor.counts(9, 3), strict=True):
        weight = block.attn.qkv.weight
        q, *rest = weight.chunk(3)
        weight.copy_(torch.cat([q, *(projected(w, 24 - count) for w in rest)]))
    torch.testing.assert_close(vit(images), model(images), rtol=0, atol=1e-9)


#: Keys of two heads that queries share; with biases; keys that are wider [32] than what they are made of [16].
LMS = pytest.mark.parametrize("overrides", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}], ids=str)


def projections(model):
    return [layer for block in model.model.layers for layer in (block.self_attn.k_proj, block.self_attn.v_proj)]


@LMS
@pytest.mark.parametrize("ranks", ["progressive", "uniform"])
@torch.no_grad()
def test_it_is_the_language_model_whose_weights_are_truncated(overrides, ranks):
    lm = CompressedLM(build_lm(**overrides), {"kind": "lorc", "ranks": ranks}, 7)
    logits, width = lm(tokens()), lm.shape.keys
    for index, linear in enumerate(projections(lm.model)):
        u, s, vt = np.linalg.svd(linear.weight.numpy(), full_matrices=False)
        s[width - lm.compressor.counts(7, 2)[index // 2] :] = 0
        linear.weight.copy_(torch.from_numpy(u * s @ vt))
    torch.testing.assert_close(logits, lm.model(tokens()).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_values_of_a_language_model_read_as_latents_give_what_expanded_ones_do():
    lm = CompressedLM(build_lm(), "lorc", 9)
    attn, x = lm.model.model.layers[1].self_attn, torch.randn(2, 10, 16, dtype=torch.float64)
    basis = torch.linalg.svd(attn.v_proj.weight)[0][:, : 16 - lm.compressor.counts(9, 2)[1]]
    weights = torch.rand(2, 4, 10, 10, dtype=torch.float64).softmax(-1)
    layer, values = lm.layers()[1], attn.v_proj(x)
    expanded = heads(lm.compressor.keep(layer, values, values)[1], attn).repeat_interleave(2, dim=1)
    through_out = attn.o_proj((weights @ expanded).transpose(1, 2).flatten(2))
    latents = values @ basis  # [2, 10, rank], all that is cached
    absorbed = torch.zeros_like(through_out)
    for head in range(4):
        out = attn.o_proj.weight[:, 8 * head : 8 * head + 8]  # [16, head_dim]
        shared = basis[8 * (head // 2) : 8 * (head // 2) + 8]  # [head_dim, rank], of the head of values
        absorbed += weights[:, head] @ latents @ (out @ shared).T
    torch.testing.assert_close(absorbed, through_out)


# --- whose bases ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_changes_of_the_weights_pass_through_the_bases_of_the_weights_before(make_vit, images):
    model = make_vit()
    vit = CompressedViT(model, "lorc", 9)
    plain, generator = make_vit(), torch.Generator().manual_seed(0)
    counts = vit.compressor.counts(9, 3)
    for block, other, count in zip(model.blocks, plain.blocks, counts, strict=True):
        bases, qkv = (
            [torch.linalg.svd(w)[0][:, : 24 - count] for w in block.attn.qkv.weight.chunk(3)[1:]],
            other.attn.qkv,
        )
        change = torch.randn(72, 24, generator=generator).double() / 5
        shift = torch.randn(72, generator=generator).double() / 5
        block.attn.qkv.weight += change
        block.attn.qkv.bias += shift
        left = torch.block_diag(torch.eye(24), *(basis @ basis.T for basis in bases)).double()
        qkv.weight.copy_(left @ (qkv.weight + change))
        qkv.bias += left @ shift
    torch.testing.assert_close(vit(images), plain(images), rtol=0, atol=1e-9)


@LMS
@torch.no_grad()
def test_so_do_changes_of_a_language_models_weights(overrides):
    model, plain, generator = build_lm(**overrides), build_lm(**overrides), torch.Generator().manual_seed(0)
    lm = CompressedLM(model, "lorc", 7)
    counts, width = lm.compressor.counts(7, 2), lm.shape.keys
    for index, (linear, other) in enumerate(zip(projections(model), projections(plain), strict=True)):
        basis = torch.linalg.svd(linear.weight)[0][:, : width - counts[index // 2]]
        left = basis @ basis.T
        linear.weight += torch.randn(linear.weight.shape, generator=generator).double() / 5
        other.weight.copy_(left @ linear.weight)
        if linear.bias is not None:
            shift = torch.randn(width, generator=generator).double() / 5
            linear.bias += shift
            other.bias += left @ shift
    torch.testing.assert_close(lm(tokens()), plain(tokens()).logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(lm.set_degree(0)(tokens()), model(tokens()).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["tocom", "widecom"])
@torch.no_grad()
def test_a_compensator_acts_before_the_truncation_folded_in_and_beside(make_vit, images, kind):
    model = make_vit()
    shape, generator = Shape.of(model), torch.Generator().manual_seed(2)
    compensator = make_part("compensator", kind, shape, 9).eval().double()
    for parameter in compensator.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    compressor = part()
    compressor.fit_to(model)
    student, run = beside(model, compensator, 2, 9)
    student.compressor = compressor
    student.set_degree(9)
    logits = run(images)
    vit = CompressedViT(model, compressor, degree=2).attach(compensator).set_degree(9)
    torch.testing.assert_close(vit(images), logits, rtol=0, atol=1e-9)
    vit.detach()
    assert not torch.allclose(vit(images), logits, rtol=1e-3)


@torch.no_grad()
def test_bases_are_of_the_first_model_and_come_with_checkpoints(make_vit, images, tmp_path):
    compressor, model = part(depth=2), build(embed_dim=24)
    CompressedViT(model, compressor)
    expected = compressor.bases.clone()
    other = deepcopy(model)
    for parameter in other.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    vit = CompressedViT(other, compressor, 9)
    about = {"compressor": {"kind": "lorc", "ranks": "progressive"}}
    save_model(tmp_path / "m", other, ARCHITECTURE, KWARGS | {"embed_dim": 24}, {"compressor": compressor}, **about)
    again = compress(*load_model(tmp_path / "m"), "lorc", 9)
    assert torch.equal(again.compressor.bases, expected)
    assert torch.equal(again(images.float()), vit(images.float()))
    assert not torch.equal(CompressedViT(other, "lorc", 9).compressor.bases, expected)


def test_fine_tuned_models_and_models_from_elsewhere_have_the_bases_of_the_backbone(backbone, digits, tmp_path):
    expected = CompressedViT(load_model(backbone)[0], "lorc").compressor.state_dict()
    tuned, _ = tune(backbone, digits, tmp_path / "tuned", "2", compressor="lorc")
    plain, _ = tune(backbone, digits, tmp_path / "plain", "0", compressor="quantise")
    given = {"tuning": "none", "fine_tuned": str(plain)}
    taken, _ = tune(backbone, digits, tmp_path / "taken", "0", compressor="lorc", **given)
    low_rank, _ = tune(backbone, digits, tmp_path / "lora", "2", compressor="lorc", tuning="lora")
    for path in (tuned, taken, low_rank):
        model, about = load_model(path)
        assert not torch.equal(model.head.weight, load_model(backbone)[0].head.weight[:10])
        state = about["beside"]["compressor"]
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    again = {"tuning": "none", "fine_tuned": str(taken)}
    state = load_model(tune(backbone, digits, tmp_path / "x", "0", compressor="topk", **again)[0])[1]["beside"]
    assert "compressor" not in state


def test_labels_tell_options_apart():
    assert LoRC.label(LoRCOptions()) == "LoRC"
    assert LoRC.label(LoRCOptions(ranks="uniform")) == "LoRC (uniform ranks)"
