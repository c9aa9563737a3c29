"""The arithmetic of ToCom, folding in and out, and its files."""

import itertools
import math
import os
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import Attention
from torch._dynamo.testing import CompileCounterWithBackend

from tocom.compensator import QKV, Compensator, active, is_folded
from tocom.errors import TocomError
from tocom.files import load_tensors, save_tensors, sha256
from tocom.vit import CompressedViT

STEPS = 6
degrees = st.integers(0, STEPS)
seeds = st.integers(0, 10**6)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- arithmetic -----------------------------------------------------------------------------------------------


@given(m=degrees, n=degrees, seed=seeds)
@settings(deadline=None)
def test_going_back_is_minus_going_there(make_compensator, m, n, seed):
    compensator = make_compensator(depth=2, dim=4, seed=seed)
    assert torch.equal(compensator.update(m, n), -compensator.update(n, m))


@given(m=degrees, k=degrees, n=degrees, seed=seeds)
@settings(deadline=None)
def test_steps_between_degrees_add_up(make_compensator, m, k, n, seed):
    compensator = make_compensator(depth=2, dim=4, seed=seed)
    whole = compensator.update(m, n)
    torch.testing.assert_close(compensator.update(m, k) + compensator.update(k, n), whole, rtol=0, atol=1e-12)


@given(m=degrees, n=degrees, seed=seeds)
@settings(deadline=None)
def test_the_update_is_the_sum_of_the_steps_between(make_compensator, m, n, seed):
    compensator = make_compensator(depth=2, dim=4, seed=seed)
    expected = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    for block in range(2):
        for projection in range(2):
            for step in range(min(m, n), max(m, n)):
                product = compensator.up[block, projection, step] @ compensator.down[block, projection, step]
                expected[block, projection] += product if n > m else -product
    torch.testing.assert_close(compensator.update(m, n), expected, rtol=0, atol=1e-12)


@given(source=st.tuples(degrees, degrees, degrees), target=st.tuples(degrees, degrees, degrees))
@settings(deadline=None)
def test_every_block_may_have_its_own_degrees(make_compensator, source, target):
    compensator = make_compensator(dim=4)
    update = compensator.update(source, target)
    for block, (m, n) in enumerate(zip(source, target, strict=True)):
        torch.testing.assert_close(update[block], compensator.update(m, n)[block], rtol=0, atol=1e-12)


@given(degree=degrees)
def test_no_change_of_degree_is_no_update(make_compensator, degree):
    assert not make_compensator(dim=4).update(degree, degree).any()


@pytest.mark.parametrize(("m", "n"), [(0, 7), (7, 0), (-1, 3), (2, -1)])
def test_a_degree_that_was_not_trained_is_refused(make_compensator, m, n):
    with pytest.raises(TocomError, match=r"degree (7|-1) is out of range: .* degrees 0 to 6"):
        make_compensator(dim=4).update(m, n)


def test_a_list_of_the_wrong_length_is_refused(make_compensator):
    with pytest.raises(TocomError, match="2 entries for 3 blocks"):
        make_compensator(dim=4).update([0, 0], [1, 1])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 4, "rank": 0}])
def test_a_compensator_of_nothing_is_refused(wrong):
    with pytest.raises(TocomError, match="at least one step and rank 1"):
        Compensator(depth=1, dim=4, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 4, "step": 0},
        {"steps": 4, "step": -1},
        {"steps": 4, "step": 2, "max_degree": 9},
        {"steps": 4, "step": 2, "max_degree": 6},
    ],
    ids=str,
)
def test_steps_that_do_not_end_at_the_highest_degree_are_refused(wrong):
    with pytest.raises(TocomError, match="4 steps of .* do not end at degree"):
        Compensator(depth=1, dim=4, **wrong)


@pytest.mark.parametrize("wrong", [(), ("q", "x"), ("q", "q"), ["qv"]], ids=str)
def test_projections_that_are_none_are_refused(wrong):
    with pytest.raises(TocomError, match="projections .* are refused: name one or more of q, k and v"):
        Compensator(depth=1, dim=4, steps=1, projections=wrong)


# --- steps of several degrees ---------------------------------------------------------------------------------


@st.composite
def grids(draw):
    """A step, a highest degree and three degrees up to it."""
    step, highest = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    return step, highest, *(draw(st.integers(0, highest)) for _ in range(3))


def stepped(step, highest, seed=0):
    result = Compensator(2, 4, math.ceil(highest / step), step=step, max_degree=highest).double()
    torch.nn.init.normal_(result.up, generator=torch.Generator().manual_seed(seed))
    return result


@given(grid=grids())
@settings(deadline=None)
def test_a_coefficient_is_the_share_of_the_step_that_lies_between_the_degrees(grid):
    step, highest, m, n, _ = grid
    expected = []
    for update in range(math.ceil(Fraction(highest, step))):
        whole = range(update * step, (update + 1) * step)  # the single degrees i -> i+1 of this step
        share = Fraction(sum(min(m, n) <= i < max(m, n) for i in whole), step)
        expected.append(float(share if n > m else -share))
    assert stepped(step, highest).coefficients(m, n).tolist() == expected


@given(grid=grids())
@settings(deadline=None)
def test_the_laws_of_the_arithmetic_hold_for_every_step(grid):
    step, highest, m, k, n = grid
    compensator = stepped(step, highest)
    assert torch.equal(compensator.update(m, n), -compensator.update(n, m))
    parts = compensator.update(m, k) + compensator.update(k, n)
    torch.testing.assert_close(parts, compensator.update(m, n), rtol=0, atol=1e-12)


def test_degrees_inside_a_step_are_interpolated_and_the_last_step_may_be_cut_off():
    compensator = stepped(step=3, highest=16)
    assert (compensator.steps, compensator.max_degree) == (6, 16)
    whole = compensator.update(3, 6)
    for n in (4, 5):
        torch.testing.assert_close(compensator.update(3, n), whole * (n - 3) / 3, rtol=0, atol=1e-12)
    product = compensator.up[:, :, 5] @ compensator.down[:, :, 5]
    torch.testing.assert_close(compensator.update(15, 16), product / 3, rtol=0, atol=1e-12)
    with pytest.raises(TocomError, match="degree 17 is out of range: .* degrees 0 to 16"):
        compensator.coefficients(0, 17)


@pytest.mark.parametrize(("highest", "step", "steps"), [(16, 1, 16), (16, 2, 8), (16, 3, 6), (16, 16, 1), (5, 8, 1)])
def test_a_compensator_for_a_model_has_the_steps_that_its_highest_degree_needs(make_vit, highest, step, steps):
    compensator = Compensator.for_model(make_vit(), highest, step=step, rank=3)
    assert compensator.up.shape == (3, 2, steps, 24, 3)
    assert compensator.down.shape == (3, 2, steps, 3, 24)
    assert (compensator.max_degree, compensator.step) == (highest, step)


@pytest.mark.parametrize("coefficients", [[0, 0, 1, -0.5, 0], [1, 1], [0, 0], [0, 2, 0, 0.25]], ids=str)
def test_active_coefficients_are_those_without_zeros_at_the_ends(coefficients):
    coefficients = torch.tensor(coefficients, dtype=torch.float64)
    left, first = active(coefficients)
    assert not left.numel() or (left[0] != 0 and left[-1] != 0)
    padded = torch.zeros_like(coefficients)
    padded[first : first + len(left)] = left
    assert torch.equal(padded, coefficients)


# --- in a model -----------------------------------------------------------------------------------------------


def test_a_new_compensator_changes_nothing(make_vit, images):
    model = make_vit()
    plain = CompressedViT(model).set_degree(5)(images)
    vit = CompressedViT(model).attach(Compensator.for_model(model, STEPS)).set_degree(5)
    assert vit.compensator.down.any()
    assert torch.equal(vit(images), plain)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (5, 1), (0, 6), (3, 3)])
@torch.no_grad()
def test_the_update_beside_the_weights_is_the_update_folded_in(family, images, make_compensator, m, n):
    compensator = make_compensator(trained_scale=0.5)
    live = CompressedViT(family, degree=n)
    plain = live(images)
    live.set_live_update(compensator, compensator.coefficients(m, n))
    beside = live(images)
    live.set_live_update(None)
    assert torch.equal(live(images), plain)
    assert torch.allclose(beside, plain, rtol=1e-3) == (m == n)
    folded = CompressedViT(family, degree=m).attach(compensator).set_degree(n)
    torch.testing.assert_close(folded(images), beside, rtol=0, atol=1e-10)


SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(QKV, n)]


@pytest.mark.parametrize("projections", SUBSETS, ids="".join)
@torch.no_grad()
def test_any_projections_live_are_those_folded_and_touch_no_other_rows(make_vit, images, make_compensator, projections):
    compensator = make_compensator(projections=projections[::-1], step=4, steps=2, max_degree=6)
    assert compensator.projections == projections
    model = make_vit(qk_norm=True)
    live = CompressedViT(model, degree=5)
    live.set_live_update(compensator, compensator.coefficients(1, 5))
    beside = live(images)
    before = weights(model)
    folded = CompressedViT(model, degree=1).attach(compensator).set_degree(5)
    torch.testing.assert_close(folded(images), beside, rtol=0, atol=1e-10)
    update = compensator.update(1, 5)
    assert update.shape == (3, len(projections), 24, 24)
    for index, block in enumerate(model.blocks):
        change = (block.attn.qkv.weight - before[f"blocks.{index}.attn.qkv.weight"]).chunk(3)
        for name, rows in zip("qkv", change, strict=True):
            expected = update[index, projections.index(name)] if name in projections else torch.zeros(24, 24)
            torch.testing.assert_close(rows, expected.double(), rtol=0, atol=1e-12)
    assert same(folded.detach().model, before)


@torch.no_grad()
def test_live_and_folded_agree_in_float32(make_vit, images, make_compensator):
    model, compensator, images = make_vit().float(), make_compensator().float(), images.float()
    live = CompressedViT(model, degree=4)
    live.set_live_update(compensator, compensator.coefficients(0, 4))
    beside = live(images)
    folded = CompressedViT(model).attach(compensator).set_degree(4)
    torch.testing.assert_close(folded(images), beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_agrees_with_float32_folded_and_live(make_vit, images, make_compensator, dtype):
    model, compensator, images = make_vit().float(), make_compensator().float(), images.float()
    vit = CompressedViT(model, degree=4)
    plain = vit(images)
    exact = CompressedViT(make_vit().float()).attach(compensator).set_degree(4)(images)
    vit.set_live_update(compensator, compensator.coefficients(0, 4))
    with torch.autocast("cpu", dtype):
        results = [vit(images)]
    results.append(vit.to(dtype)(images.to(dtype)))
    results.append(CompressedViT(make_vit().to(dtype)).attach(compensator).set_degree(4)(images.to(dtype)))
    for logits in results:
        assert logits.dtype == dtype
        assert (logits - exact).norm() < 0.1 * (plain - exact).norm()


def test_gradients_of_a_live_update_under_autocast_are_those_of_float32(make_vit, images, make_compensator):
    gradients = {}
    for enabled in (False, True):
        compensator = make_compensator().float()
        vit = CompressedViT(make_vit().float().requires_grad_(False), degree=4)
        vit.set_live_update(compensator, compensator.coefficients(0, 4))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            vit(images.float()).float().square().sum().backward()
        gradients[enabled] = torch.cat([compensator.down.grad.flatten(), compensator.up.grad.flatten()])
    assert gradients[True].dtype == torch.float32
    assert (gradients[True] - gradients[False]).norm() < 0.05 * gradients[False].norm()


@pytest.mark.parametrize("compressor", ["tome", "evit_fuse"])
def test_a_compiled_model_is_one_graph_with_the_same_logits_and_gradients(
    make_vit, images, make_compensator, compressor
):
    compensator = make_compensator(compressor=compressor)
    vit = CompressedViT(make_vit().requires_grad_(False), compressor, degree=4)
    vit.set_live_update(compensator, compensator.coefficients(1, 4))

    def run(forward):
        compensator.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        return logits.detach(), compensator.down.grad.clone(), compensator.up.grad.clone()

    expected = run(vit)
    torch.compiler.reset()
    compiled = run(torch.compile(vit, backend="aot_eager", fullgraph=True, dynamic=False))
    for actual, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


def test_a_whole_live_update_needs_one_program_a_degree(make_vit, images, make_compensator):
    vit, compensator = CompressedViT(make_vit(depth=2), degree=4), make_compensator(depth=2)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vit, backend=backend, fullgraph=True, dynamic=False)
    for source in (0, 1, 6):
        vit.set_live_update(compensator, compensator.coefficients(source, 4), whole=True)
        logits = compiled(images)
        vit.set_live_update(compensator, compensator.coefficients(source, 4))
        torch.testing.assert_close(logits, vit(images), rtol=0, atol=1e-10)
    assert backend.frame_count == 1


def test_a_compiled_model_follows_the_degree_and_the_folded_weights(make_vit, images, make_compensator):
    eager = CompressedViT(make_vit()).attach(make_compensator())
    vit = CompressedViT(make_vit()).attach(make_compensator())
    torch.compiler.reset()
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for degree, scale in [(4, 1.0), (4, 0.3), (2, 1.0)]:
            vit.set_degree(degree, scale)
            expected = eager.set_degree(degree, scale)(images)
            torch.testing.assert_close(compiled(images), expected, rtol=0, atol=1e-10)


def test_only_active_steps_of_a_live_update_get_gradients(make_vit, images, make_compensator):
    compensator = make_compensator()
    vit = CompressedViT(make_vit().requires_grad_(False), degree=4)
    vit.set_live_update(compensator, compensator.coefficients(2, 4))
    vit(images).square().sum().backward()
    for gradient in (compensator.down.grad, compensator.up.grad):
        assert gradient[:, :, 2:4].any(dim=-1).any(dim=-1).all()
        assert not gradient[:, :, :2].any()
        assert not gradient[:, :, 4:].any()


def test_dropout_acts_on_a_live_update_in_train_mode_only(make_vit, images, make_compensator):
    compensator = make_compensator(dropout=0.5)
    vit = CompressedViT(make_vit(), degree=4)
    vit.set_live_update(compensator, compensator.coefficients(0, 4))
    assert torch.equal(vit(images), vit(images))
    compensator.train()
    assert not torch.allclose(vit(images), vit(images))


def test_a_live_update_is_no_part_of_the_model(make_vit, make_compensator):
    vit = CompressedViT(make_vit())
    names = set(vit.state_dict())
    vit.set_live_update(make_compensator(), torch.zeros(STEPS))
    assert set(vit.state_dict()) == names


def test_an_attached_compensator_is_no_part_of_the_model_and_keeps_its_precision(make_vit, images, make_compensator):
    vit = CompressedViT(make_vit())
    names, parameters = set(vit.state_dict()), len(list(vit.parameters()))
    compensator = make_compensator()
    vit.attach(compensator).set_degree(3)
    assert vit.compensator is compensator
    assert (set(vit.state_dict()), len(list(vit.parameters()))) == (names, parameters)
    vit.float().set_degree(5)  # as after .to(device): only the model moves, and the update follows it
    assert compensator.up.dtype == torch.float64
    expected = CompressedViT(make_vit().float()).attach(compensator).set_degree(5)(images.float())
    torch.testing.assert_close(vit(images.float()), expected, rtol=1e-5, atol=1e-5)


def test_a_model_says_whether_an_update_is_folded_into_its_weights(make_vit, make_compensator):
    model = make_vit()
    assert not is_folded(model)
    vit = CompressedViT(model).attach(make_compensator())
    for degree, scale, folded in [(0, 1.0, False), (4, 1.0, True), (4, 0.0, False), (2, 0.5, True)]:
        assert is_folded(vit.set_degree(degree, scale).model) == folded
    assert not is_folded(vit.detach().model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_detaching_restores_the_weights_bit_for_bit(family, make_compensator, dtype):
    model = family.to(dtype)
    before = weights(model)
    vit = CompressedViT(model, degree=2).attach(make_compensator())
    for degree, scale in [(5, 1.0), (0, 0.3), (6, -2.0), (2, 1.0), (1, 1e4), (6, 0.1)]:
        vit.set_degree(degree, scale)
        assert same(model, before) == (degree == 2)
    vit.detach()
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_folded_weights_are_rounded_once(make_vit, make_compensator, dtype):
    model, compensator = make_vit().to(dtype), make_compensator()
    before = model.blocks[1].attn.qkv.weight[:24].double()
    CompressedViT(model).attach(compensator, scale=0.3).set_degree(5)
    exact = before + 0.3 * compensator.update(0, 5)[1, 0]
    assert torch.equal(model.blocks[1].attn.qkv.weight[:24], exact.to(dtype))


def test_detaching_restores_the_weights_after_a_change_of_precision(make_vit, make_compensator):
    rounded = weights(make_vit().bfloat16())
    vit = CompressedViT(make_vit()).attach(make_compensator()).set_degree(5)
    vit.bfloat16().detach()
    assert same(vit.model, rounded)


def test_without_its_compensator_the_model_is_what_it_was(make_vit, images, make_compensator):
    vit = CompressedViT(make_vit())
    plain = vit.set_degree(5)(images)
    compensated = vit.attach(make_compensator())(images)
    assert not torch.allclose(compensated, plain, rtol=1e-3)
    assert torch.equal(vit.detach()(images), plain)
    assert torch.equal(vit.set_degree(0).set_degree(5)(images), plain)


def test_only_the_q_and_v_rows_of_qkv_change_and_by_the_scaled_update(family, make_compensator):
    before = weights(family)
    compensator = make_compensator()
    CompressedViT(family, degree=1).attach(compensator, scale=0.7).set_degree(5)
    update = compensator.update(1, 5).detach()
    for name, value in family.state_dict().items():
        change = value - before[name]
        if name.endswith("attn.qkv.weight"):
            q, k, v = change.chunk(3)
            expected_q, expected_v = 0.7 * update[int(name.split(".")[1])]
            torch.testing.assert_close(q, expected_q, rtol=0, atol=1e-12)
            torch.testing.assert_close(v, expected_v, rtol=0, atol=1e-12)
            assert not k.any()
        else:
            assert not change.any(), name


def test_the_change_of_the_weights_is_linear_in_the_scale(make_vit, make_compensator):
    vit = CompressedViT(make_vit()).attach(make_compensator())
    weight = vit.model.blocks[0].attn.qkv.weight
    at = {scale: vit.set_degree(5, scale).model.blocks[0].attn.qkv.weight.clone() for scale in (0, 1, 2.5)}
    torch.testing.assert_close(at[2.5] - at[0], 2.5 * (at[1] - at[0]), rtol=0, atol=1e-12)
    assert torch.equal(at[0], vit.detach().model.blocks[0].attn.qkv.weight)
    assert weight is vit.model.blocks[0].attn.qkv.weight


def test_the_scale_is_the_trained_one_until_told_otherwise(make_vit, images, make_compensator):
    compensator = make_compensator(trained_scale=0.3)
    vit = CompressedViT(make_vit()).attach(compensator).set_degree(4)
    default = vit(images)
    assert torch.equal(vit.set_degree(4, scale=0.3)(images), default)
    assert not torch.allclose(vit.set_degree(4, scale=0.6)(images), default, rtol=1e-3)
    assert vit.scale == 0.6
    assert torch.equal(vit.attach(compensator)(images), default)


def test_lists_of_degrees_fold_block_by_block(make_vit, make_compensator):
    compensator = make_compensator()
    vit = CompressedViT(make_vit(), degree=[0, 2, 4]).attach(compensator)
    before = weights(vit.model)
    vit.set_degree([3, 2, 1])
    for block, (m, n) in enumerate([(0, 3), (2, 2), (4, 1)]):
        name = f"blocks.{block}.attn.qkv.weight"
        change = vit.model.state_dict()[name][:24] - before[name][:24]
        torch.testing.assert_close(change, compensator.update(m, n)[block, 0].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("degree", [7, -1, [1, 2], [0, 0, 7]], ids=str)
def test_a_degree_out_of_range_leaves_the_model_as_it_was(make_vit, images, make_compensator, degree):
    vit = CompressedViT(make_vit()).attach(make_compensator()).set_degree(5, scale=0.5)
    before, logits = weights(vit.model), vit(images)
    with pytest.raises(TocomError):
        vit.set_degree(degree, scale=2.0)
    assert (vit.degree, vit.scale) == (5, 0.5)
    assert same(vit.model, before)
    assert torch.equal(vit(images), logits)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"depth": 2}, "2 blocks and width 24, not one of 3 blocks and width 24"),
        ({"dim": 32}, "3 blocks and width 32, not one of 3 blocks and width 24"),
        ({"compressor": "evit"}, "distilled for 'evit', not 'tome'"),
        ({"steps": 4}, "degree 5 is out of range"),
    ],
    ids=str,
)
def test_a_compensator_that_does_not_fit_is_refused_and_the_old_one_stays(
    make_vit, images, make_compensator, settings, cause
):
    old = make_compensator()
    vit = CompressedViT(make_vit()).attach(old).set_degree(5)
    logits = vit(images)
    with pytest.raises(TocomError, match=cause) as caught:
        vit.attach(make_compensator(**settings))
    assert "\n" not in str(caught.value)
    assert vit.compensator is old
    assert torch.equal(vit(images), logits)


def test_attention_of_another_width_is_refused(make_vit, make_compensator):
    model = make_vit()
    for block in model.blocks:
        block.attn = Attention(24, 2, attn_head_dim=8).double()
    with pytest.raises(TocomError, match="not as wide as the backbone"):
        CompressedViT(model).attach(make_compensator())


# --- files ----------------------------------------------------------------------------------------------------


def test_a_compensator_comes_back_from_its_file_with_all_its_settings(tmp_path):
    about = {"backbone": "deit", "recipe": {"lr": 0.005, "epochs": [1, 2]}}
    original = Compensator(2, 8, 5, 3, "evit", 0.1, 0.2, about, projections=("k", "v"), step=3, max_degree=14)
    torch.nn.init.normal_(original.up)
    original.save(tmp_path / "p.safetensors")
    loaded = Compensator.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.down, original.down)
    assert torch.equal(loaded.up, original.up)
    names = ("depth", "dim", "steps", "rank", "compressor", "trained_scale", "dropout", "metadata")
    for name in (*names, "projections", "step", "max_degree"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert not loaded.training


def test_a_file_of_an_earlier_version_updates_q_and_v_in_steps_of_one_degree(tmp_path):
    original = Compensator(1, 4, 3)
    original.save(tmp_path / "p")
    tensors, metadata = load_tensors(tmp_path / "p")
    save_tensors(tmp_path / "q", tensors, {k: v for k, v in metadata.items() if k not in ("projections", "step")})
    loaded = Compensator.load(tmp_path / "q")
    assert (loaded.projections, loaded.step, loaded.steps, loaded.max_degree) == (("q", "v"), 1, 3, 3)
    assert torch.equal(loaded.down, original.down)
    assert loaded.metadata == {}


def test_the_same_parameters_give_the_same_bytes(tmp_path, make_compensator):
    about = {str(letter): i for i, letter in enumerate("tocom")}
    for copy in range(8):
        make_compensator(dim=4, metadata=about).float().save(tmp_path / f"{copy}")
    assert len({sha256(tmp_path / f"{copy}") for copy in range(8)}) == 1
    Compensator.load(tmp_path / "0").save(tmp_path / "again")
    assert sha256(tmp_path / "again") == sha256(tmp_path / "0")


def one_line_refusal(path):
    with pytest.raises(TocomError) as caught:
        Compensator.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_change_of_any_byte_is_found(tmp_path):
    path = tmp_path / "p.safetensors"
    Compensator(1, 2, 1, rank=1).save(path)
    content = path.read_bytes()
    checksum_key = content.index(b'"checksum"')
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if checksum_key < place < checksum_key + len(b'"checksum') and content[place] ^ 1 != ord('"'):
            continue  # without its checksum a file is read as one of an earlier version
        one_line_refusal(path)


@pytest.mark.parametrize("left", [0, 1, 7, 8, 50, -1])
def test_a_truncated_file_is_refused(tmp_path, left):
    path = tmp_path / "p.safetensors"
    Compensator(1, 4, 2).save(path)
    path.write_bytes(path.read_bytes()[:left])
    assert "corrupt" in one_line_refusal(path)


def test_another_parameter_under_the_old_hash_is_refused(tmp_path):
    compensator = Compensator(1, 4, 2)
    compensator.save(tmp_path / "p.safetensors")
    tensors, metadata = load_tensors(tmp_path / "p.safetensors")
    tensors["up"][0, 0, 0, 0, 0] += 1e-3
    save_tensors(tmp_path / "p.safetensors", tensors, metadata)
    assert "parameters do not match their hash" in one_line_refusal(tmp_path / "p.safetensors")


def test_a_missing_file_is_refused_by_name(tmp_path):
    assert "no such file" in one_line_refusal(tmp_path / "none.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_tensors(tmp_path / "m", {"down": torch.zeros(2), "up": torch.zeros(2)}, {"kind": "model"})
    assert "holds model, not a compensator" in one_line_refusal(tmp_path / "m")
    save_file({"down": torch.zeros(2), "up": torch.zeros(2)}, tmp_path / "n", metadata={"format": "pt"})
    assert "holds something else, not a compensator" in one_line_refusal(tmp_path / "n")


class Trap:
    """Make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_not_run(tmp_path, protocol):
    path, trap = tmp_path / "p.safetensors", Trap(tmp_path / "sprung")
    if protocol == "torch":
        torch.save({"up": trap}, path)
    else:
        path.write_bytes(pickle.dumps({"up": trap}, protocol))
    message = one_line_refusal(path)
    assert protocol == 0 or "pickles can run code and are refused" in message
    assert not trap.path.exists()


# --- the public layout ----------------------------------------------------------------------------------------


def public_checkpoint(depth=2, dim=6, steps=4, rank=2, seed=0):
    """Return a state dict in the layout of method.md, beside weights that have nothing to do with ToCom."""
    generator = torch.Generator().manual_seed(seed)
    state = {"cls_token": torch.zeros(1, 1, dim), "blocks.0.attn.qkv.weight": torch.zeros(3 * dim, dim)}
    for block in range(depth):
        for projection in "qv":
            stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
            state[f"{stem}down.weight"] = torch.randn(steps * rank, dim, generator=generator)
            state[f"{stem}up.weight"] = torch.randn(dim, steps * rank, generator=generator)
    return state


def save_public(path, state, **beside):
    torch.save({"model": state, **beside}, path)
    return path


def test_degree_r_of_a_public_checkpoint_switches_on_its_last_r_groups(tmp_path):
    state = public_checkpoint(steps=16)
    compensator = Compensator.from_public(save_public(tmp_path / "p.pth", state, epoch=9))
    assert (compensator.depth, compensator.dim, compensator.steps, compensator.rank) == (2, 6, 16, 2)
    for degree in range(17):
        update = compensator.update(0, degree)
        on = slice(32 - 2 * degree, 32)
        for block in range(2):
            for index, projection in enumerate("qv"):
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                expected = state[f"{stem}up.weight"][:, on] @ state[f"{stem}down.weight"][on]
                torch.testing.assert_close(update[block, index], expected, rtol=1e-4, atol=1e-4)


def test_step_i_of_a_public_checkpoint_is_group_15_minus_i(tmp_path):
    state = {name: torch.zeros_like(value) for name, value in public_checkpoint(depth=1, steps=16).items()}
    state["blocks.0.attn.v_tocom.adapter_down.weight"][2 * 12, 4] = 1.0  # first row of group 12 reads feature 4
    state["blocks.0.attn.v_tocom.adapter_up.weight"][5, 2 * 12] = 3.0  # and writes three times that to feature 5
    compensator = Compensator.from_public(save_public(tmp_path / "p.pth", state))
    expected = torch.zeros(1, 2, 6, 6)
    expected[0, 1, 5, 4] = 3.0
    assert torch.equal(compensator.update(3, 4), expected)
    assert not compensator.update(0, 3).any()
    assert not compensator.update(4, 16).any()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_compensator_survives_the_way_to_the_public_layout_and_back(tmp_path, make_compensator, suffix):
    original, path = make_compensator(dim=4, rank=3).float(), tmp_path / f"p{suffix}"
    if suffix == ".pth":
        save_public(path, original.to_public())
    else:
        save_file({k: v.contiguous() for k, v in original.to_public().items()}, path, metadata={"format": "pt"})
    loaded = Compensator.from_public(path, steps=STEPS, trained_scale=0.1)
    assert torch.equal(loaded.down, original.down)
    assert torch.equal(loaded.up, original.up)
    assert (loaded.rank, loaded.trained_scale, loaded.compressor) == (3, 0.1, "tome")
    assert not loaded.training


def test_a_public_checkpoint_comes_back_as_it_was(tmp_path):
    state = public_checkpoint()
    again = Compensator.from_public(save_public(tmp_path / "p.pth", state), steps=4).to_public()
    assert set(again) == {name for name in state if "tocom" in name}
    assert all(torch.equal(value, state[name]) for name, value in again.items())


def test_an_imported_compensator_can_be_saved_and_used(tmp_path, make_vit, images):
    path = save_public(tmp_path / "p.pth", public_checkpoint(depth=3, dim=24))
    Compensator.from_public(path, steps=4).save(tmp_path / "p.safetensors")
    vit = CompressedViT(make_vit()).set_degree(4)
    plain = vit(images)
    assert not torch.allclose(vit.attach(Compensator.load(tmp_path / "p.safetensors"))(images), plain)


@pytest.mark.parametrize("settings", [{"projections": ("v",)}, {"step": 2}], ids=str)
def test_what_the_public_layout_cannot_say_is_not_written_in_it(make_compensator, settings):
    with pytest.raises(TocomError, match="q and v in steps of 1 degree only; .* save it with save"):
        make_compensator(dim=4, **settings).to_public()


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


def changed(state, part, change):
    return {name: change(value) if part in name else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda state: without(state, "1.attn.v_tocom.adapter_up"), "lacks .*1.attn.v_tocom.adapter_up.weight"),
        (lambda state: without(state, "0.attn.q_tocom"), "lacks .*0.attn.q_tocom"),
        (lambda state: without(state, "tocom"), "no q_tocom or v_tocom"),
        (lambda state: {f"module.{name}": value for name, value in state.items()}, "no q_tocom or v_tocom"),
        (lambda state: changed(state, "1.attn.q_tocom.adapter_up", lambda value: value[:, :-1]), "unequal shapes"),
        (lambda state: changed(state, "1.attn.q_tocom.adapter_down", lambda value: value[:-1]), "unequal shapes"),
        (lambda state: changed(state, "tocom", lambda value: value[0]), "unequal shapes"),
        (lambda state: changed(state, "0.attn.v_tocom.adapter_up", lambda value: None), "lacks .*v_tocom.adapter_up"),
        (lambda state: torch.zeros(3), "holds a Tensor"),
        (lambda state: state | {"blocks.0.attn.k_tocom.adapter_up.weight": torch.zeros(6, 8)}, "updates k too"),
    ],
)
def test_an_incomplete_public_checkpoint_is_refused(tmp_path, damage, cause):
    path = save_public(tmp_path / "p.pth", damage(public_checkpoint()))
    with pytest.raises(TocomError, match=cause) as caught:
        Compensator.from_public(path, steps=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [3, 0, -4])
def test_a_number_of_steps_that_does_not_divide_the_rows_is_refused(tmp_path, steps):
    path = save_public(tmp_path / "p.pth", public_checkpoint())
    with pytest.raises(TocomError, match="8 rows, which is not a multiple"):
        Compensator.from_public(path, steps=steps)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_public_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, how):
    path, trap = tmp_path / "p.pth", Trap(tmp_path / "sprung")
    if how == "torch.save":
        save_public(path, public_checkpoint(), args=trap)
    else:
        path.write_bytes(pickle.dumps({"model": trap}, 2))
    with pytest.raises(TocomError, match="refused") as caught:
        Compensator.from_public(path, steps=4)
    assert "\n" not in str(caught.value)
    assert not trap.path.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_public_checkpoint_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "p.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TocomError, match="no such file" if content is None else "refused") as caught:
        Compensator.from_public(path)
    assert "\n" not in str(caught.value)
