"""The arithmetic of ToCom, folding in and out, and its files."""

import os
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import Attention

from tests.small import beside, check_beside_is_folded, check_half_precision, refusal
from tocom.errors import TocomError
from tocom.files import load_tensors, save_tensors
from tocom.methods.tocom import ToCom
from tocom.parts import Shape, load_part, make_part, save_part
from tocom.vit import CompressedViT

STEPS = 6
degrees = st.integers(0, STEPS)
seeds = st.integers(0, 10**6)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def tocom(depth=1, dim=4, max_degree=2, **options):
    return make_part("compensator", {"kind": "tocom"} | options, Shape(depth, dim, 1, 5, 1), max_degree)


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- arithmetic -----------------------------------------------------------------------------------------------


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


# --- steps of several degrees ---------------------------------------------------------------------------------


@st.composite
def grids(draw):
    """A step, a highest degree and three degrees up to it."""
    step, highest = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    return step, highest, *(draw(st.integers(0, highest)) for _ in range(3))


def stepped(step, highest, seed=0):
    result = tocom(2, 4, highest, step=step).double()
    torch.nn.init.normal_(result.up, generator=torch.Generator().manual_seed(seed))
    return result


@given(grid=grids())
@settings(deadline=None)
def test_a_coefficient_is_the_share_of_the_step_that_lies_between_the_degrees(grid):
    step, highest, m, n, _ = grid
    expected = []
    for update in range(-(-highest // step)):
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


# --- in a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(0, 4), (5, 1), (3, 3)])
def test_the_update_beside_the_weights_is_the_update_folded_in(family, images, make_compensator, m, n):
    compensator = make_compensator(trained_scale=0.5, projections=("k", "q", "v")[m % 2 :], step=2)
    check_beside_is_folded(family, compensator, images, m, n, whole=1e-12, folded=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_float32_folded_and_beside(make_vit, images, make_compensator, dtype):
    check_half_precision(make_vit, make_compensator(), images, dtype)


def test_a_compiled_student_has_the_same_logits_and_gradients(make_vit, images, make_compensator):
    compensator = make_compensator(depth=1)
    _, student = beside(make_vit(depth=1), compensator, 1, 4)

    def run(forward):
        compensator.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        return logits.detach(), compensator.down.grad.clone(), compensator.up.grad.clone()

    expected = run(student)
    torch.compiler.reset()
    compiled = run(torch.compile(student, backend="eager", dynamic=False))
    for actual, wanted in zip(compiled, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


def test_only_steps_between_the_degrees_get_gradients(make_vit, images, make_compensator):
    compensator = make_compensator()
    beside(make_vit(), compensator, 2, 4)[1](images).square().sum().backward()
    for gradient in (compensator.down.grad, compensator.up.grad):
        assert gradient[:, :, 2:4].any(dim=-1).any(dim=-1).all()
        assert not gradient[:, :, :2].any()
        assert not gradient[:, :, 4:].any()


def test_dropout_acts_while_it_is_learned_only(make_vit, images, make_compensator):
    compensator = make_compensator(dropout=0.5)
    _, student = beside(make_vit(), compensator, 0, 4)
    assert torch.equal(student(images), student(images))
    compensator.train()
    assert not torch.allclose(student(images), student(images))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


def test_a_compensator_for_lower_degrees_is_refused_and_the_old_one_stays(make_vit, images, make_compensator):
    old = make_compensator()
    vit = CompressedViT(make_vit()).attach(old).set_degree(5)
    logits = vit(images)
    assert "degree 5 is out of range" in refusal(vit.attach, make_compensator(max_degree=4))
    assert vit.compensator is old
    assert torch.equal(vit(images), logits)


def test_attention_of_another_width_is_refused(make_vit, make_compensator):
    model = make_vit()
    for block in model.blocks:
        block.attn = Attention(24, 2, attn_head_dim=8).double()
    with pytest.raises(TocomError, match="not as wide as the backbone"):
        CompressedViT(model).attach(make_compensator())


# --- files ----------------------------------------------------------------------------------------------------


def one_line_refusal(path):
    message = refusal(load_part, path, "compensator")
    assert str(path) in message
    return message


def test_a_change_of_any_byte_is_found(tmp_path):
    path = tmp_path / "p.safetensors"
    save_part(path, tocom(1, 2, 1, rank=1))
    content = path.read_bytes()
    checksum_key = content.index(b'"checksum"')
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if checksum_key < place < checksum_key + len(b'"checksum') and content[place] ^ 1 != ord('"'):
            continue  # without its checksum a file is read as one of another program
        one_line_refusal(path)


def test_another_parameter_under_the_old_hash_is_refused(tmp_path):
    save_part(tmp_path / "p.safetensors", tocom())
    tensors, metadata = load_tensors(tmp_path / "p.safetensors")
    tensors["up"][0, 0, 0, 0, 0] += 1e-3
    save_tensors(tmp_path / "p.safetensors", tensors, metadata)
    assert "parameters do not match their hash" in one_line_refusal(tmp_path / "p.safetensors")


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
    compensator = ToCom.from_public(save_public(tmp_path / "p.pth", state, epoch=9))
    assert (compensator.shape[:2], compensator.steps, compensator.options.rank) == ((2, 6), 16, 2)
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
    compensator = ToCom.from_public(save_public(tmp_path / "p.pth", state))
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
    loaded = ToCom.from_public(path, steps=STEPS, trained_scale=0.1)
    assert torch.equal(loaded.down, original.down)
    assert torch.equal(loaded.up, original.up)
    assert (loaded.options.rank, loaded.trained_scale, loaded.compressor) == (3, 0.1, None)
    assert not loaded.training


@pytest.mark.parametrize("settings", [{"projections": ("v",)}, {"step": 2}], ids=str)
def test_what_the_public_layout_cannot_say_is_not_written_in_it(make_compensator, settings):
    with pytest.raises(TocomError, match="q and v in steps of 1 degree only; .*save it with tocom.save_part"):
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
        ToCom.from_public(path, steps=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [3, 0, -4])
def test_a_number_of_steps_that_does_not_divide_the_rows_is_refused(tmp_path, steps):
    path = save_public(tmp_path / "p.pth", public_checkpoint())
    with pytest.raises(TocomError, match="8 rows, which is not a multiple"):
        ToCom.from_public(path, steps=steps)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_public_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, how):
    path, trap = tmp_path / "p.pth", Trap(tmp_path / "sprung")
    if how == "torch.save":
        save_public(path, public_checkpoint(), args=trap)
    else:
        path.write_bytes(pickle.dumps({"model": trap}, 2))
    with pytest.raises(TocomError, match="refused") as caught:
        ToCom.from_public(path, steps=4)
    assert "\n" not in str(caught.value)
    assert not trap.path.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_public_checkpoint_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "p.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TocomError, match="no such file" if content is None else "refused") as caught:
        ToCom.from_public(path)
    assert "\n" not in str(caught.value)
