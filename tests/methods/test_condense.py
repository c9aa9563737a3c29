"""Condensed keys and values: order and runs of patches, attention against loops, equal tokens, cost, training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import refusal, tune
from tocom import CompressedViT, gflops
from tocom.files import load_tensors
from tocom.methods.condense import Condense, CondenseOptions, Runs, morton, runs
from tocom.parts import Tokens

SHARED = {"kind": "condense", "own_maps": False}


@torch.no_grad()
def drawn(model, degree=6, **options):
    """Return a model behind it, with maps that are not those of the model."""
    proportional = options.pop("proportional_attention", True)
    vit = CompressedViT(model, {"kind": "condense"} | options, degree, proportional).double()
    if vit.compressor.change is not None:
        vit.compressor.change.copy_(0.2 * torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(3)))
    return vit


# --- runs -------------------------------------------------------------------------------------------------------------


def test_patches_go_through_quarters_of_quarters():
    assert morton(4, 4) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert morton(2, 3) == [0, 1, 3, 4, 2, 5]
    assert morton(1, 5) == [0, 1, 2, 3, 4]


@given(side=st.integers(0, 4), level=st.integers(0, 4))
def test_runs_of_powers_of_four_are_squares(side, level):
    order, length = morton(2**side, 2**side), 4 ** min(level, side)
    for run in runs(order, 4**side // length):
        rows, columns = {patch // 2**side for patch in run}, {patch % 2**side for patch in run}
        assert len(rows) == len(columns) == 2 ** min(level, side)
        assert max(rows) - min(rows) == max(columns) - min(columns) == len(rows) - 1


@given(height=st.integers(1, 15), width=st.integers(1, 15), share=st.floats(0, 1))
@settings(deadline=None)
def test_runs_part_all_patches_evenly_and_their_means_are_means(height, width, share):
    n = height * width
    number = max(1, round(share * n))
    found = runs(morton(height, width), number)
    assert sorted(patch for run in found for patch in run) == list(range(n))
    assert len(found) == number
    assert max(map(len, found)) - min(map(len, found)) <= 1
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    grid = Runs.of((height, width), number, x.device)
    torch.testing.assert_close(grid.mean(x), torch.stack([x[:, run].mean(dim=1) for run in found], dim=1))
    assert grid.sizes.tolist() == [len(run) for run in found]


# --- attention --------------------------------------------------------------------------------------------------------


def logits_by_loops(vit, image, degree):
    """Classify one image [3, H, W] of 4 x 4 patches, one head and one token at a time."""
    model, change, prefix = vit.model, vit.compressor.change, vit.prefix
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    groups = [[i] for i in range(prefix)]
    groups += [[prefix + i for i in run] for run in runs(morton(4, 4), round(16 * (1 - degree / 16)))]
    for index, block in enumerate(model.blocks):
        attn, normed = block.attn, block.norm1(x)
        weight, bias = attn.qkv.weight, torch.zeros(72) if attn.qkv.bias is None else attn.qkv.bias
        queries, keys, values = normed @ weight[:24].T + bias[:24], [], []
        for number, group in enumerate(groups):
            own = 0 if number < prefix or change is None else change[index]
            mean = sum(normed[i] for i in group) / len(group)
            key, value = ((weight[24:] + own) @ mean + bias[24:]).chunk(2)
            keys.append(key)
            values.append(value)
        outputs = []
        for head in range(2):
            rows = slice(12 * head, 12 * head + 12)
            q = attn.q_norm(queries[:, rows])
            k = attn.k_norm(torch.stack(keys)[:, rows])
            logits = q @ k.T / 12**0.5
            if vit.proportional_attention:
                logits = logits + x.new_tensor([len(group) for group in groups]).log()
            outputs.append(logits.softmax(dim=-1) @ torch.stack(values)[:, rows])
        x = x + block.ls1(attn.proj(torch.cat(outputs, dim=1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)[None])[0]


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"qkv_bias": False, "reg_tokens": 2},
                                      {"class_token": False, "global_pool": "avg"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("own_maps", [True, False], ids="own_maps={}".format)
@pytest.mark.parametrize("proportional", [True, False], ids="proportional={}".format)
@pytest.mark.parametrize("degree", [1, 6, 15])
@torch.no_grad()
def test_logits_are_those_of_the_loops(make_vit, images, settings, own_maps, proportional, degree):
    vit = drawn(make_vit(**settings), degree, own_maps=own_maps, proportional_attention=proportional)
    expected = torch.stack([logits_by_loops(vit, image, degree) for image in images])
    torch.testing.assert_close(vit(images), expected, rtol=0, atol=1e-10)


def attended(vit, x, degree):
    """Return what the attention of the first block gives for normed tokens x [B, N, D]."""
    (count, *_) = vit.compressor.counts(degree, 3)
    return vit._attend(vit.model.blocks[0].attn, x, Tokens(x, None, count, 0, vit.prefix))[0]


def draw(n=17):
    return torch.randn(2, n, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("degree", [2, 8, 13])
@torch.no_grad()
def test_before_training_means_of_keys_are_keys_of_means(make_vit, degree):
    vit, x = CompressedViT(make_vit(), "condense").double(), draw()
    attn, order = vit.model.blocks[0].attn, morton(4, 4)
    _, *kv = vit.compressor.project(attn, x, Tokens(x, None, degree, 0, 1))
    _, *every = super(Condense, vit.compressor).project(attn, x, Tokens(x, None, degree, 0, 1))
    for condensed, all_of_them in zip(kv, every, strict=True):
        pooled = [all_of_them[:, :, [1 + i for i in run]].mean(dim=2) for run in runs(order, 16 - degree)]
        torch.testing.assert_close(condensed, torch.stack([all_of_them[:, :, 0], *pooled], dim=2))


@pytest.mark.parametrize("degree", [1, 8, 15])
@torch.no_grad()
def test_equal_tokens_in_a_run_change_nothing_if_attention_is_proportional(make_vit, degree):
    x = draw()
    for run in runs(morton(4, 4), 16 - degree):
        x[:, [1 + i for i in run]] = x[:, [1 + run[0]]]
    for proportional in (True, False):
        vit = CompressedViT(make_vit(), "condense", 0, proportional).double()
        same = torch.allclose(attended(vit, x, degree), attended(vit, x, 0), rtol=0, atol=1e-12)
        assert same == proportional


@torch.no_grad()
def test_the_order_within_a_run_does_not_matter_to_others(make_vit):
    vit, x = drawn(make_vit()), draw()
    run = [1 + i for i in runs(morton(4, 4), 8)[2]]
    shuffled = x.clone()
    shuffled[:, run] = x[:, run[::-1]]
    before, after = attended(vit, x, 8), attended(vit, shuffled, 8)
    others = [i for i in range(17) if i not in run]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[:, run], before[:, run[::-1]], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, run], before[:, run])


def test_other_grids_are_those_of_the_model_and_others_are_refused(make_vit):
    model = make_vit(img_size=(16, 40), dynamic_img_size=True)
    vit = CompressedViT(model, "condense", 5).double()
    for height, width in ((16, 40), (24, 24)):
        assert vit(torch.zeros(1, 3, height, width, dtype=torch.float64)).isfinite().all()
    assert "12 patches are no square" in refusal(vit, torch.zeros(1, 3, 24, 32, dtype=torch.float64))


# --- cost and training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_maps", [True, False])
def test_the_cost_is_that_of_fewer_keys_and_values(make_vit, own_maps):
    vit = CompressedViT(make_vit(), {"kind": "condense", "own_maps": own_maps}).double()
    whole = gflops(vit)
    for degree in (1, 8, 15):
        saved = degree * (2 * 24 * 24 + 2 * 17 * 24) * 3
        assert gflops(vit.set_degree(degree)) * 1e9 == pytest.approx(whole * 1e9 - saved, abs=0.5)


@pytest.mark.parametrize("degree", ["0", "2"])
def test_fine_tuning_trains_the_maps_where_there_are_runs(backbone, digits, tmp_path, degree):
    path, _ = tune(backbone, digits, tmp_path / "x", degree, compressor="condense")
    assert load_tensors(path)[0]["compressor.change"].any() == (degree != "0")
    path, _ = tune(backbone, digits, tmp_path / "y", degree, compressor=SHARED)
    assert "compressor.change" not in load_tensors(path)[0]


def test_labels_tell_options_apart():
    assert Condense.label(CondenseOptions()) == "condensed keys and values"
    assert Condense.label(CondenseOptions(own_maps=False)) == "condensed keys and values (shared maps)"
