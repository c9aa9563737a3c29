"""The arithmetic of ToCom, folding in and out, and its files."""

import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import Attention

from tocom.compensator import Compensator
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


# --- in a model -----------------------------------------------------------------------------------------------


def test_a_new_compensator_changes_nothing(make_vit, images):
    model = make_vit()
    plain = CompressedViT(model).set_degree(5)(images)
    vit = CompressedViT(model).attach(Compensator.for_model(model, steps=STEPS)).set_degree(5)
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


@torch.no_grad()
def test_live_and_folded_agree_in_float32(make_vit, images, make_compensator):
    model, compensator, images = make_vit().float(), make_compensator().float(), images.float()
    live = CompressedViT(model, degree=4)
    live.set_live_update(compensator, compensator.coefficients(0, 4))
    beside = live(images)
    folded = CompressedViT(model).attach(compensator).set_degree(4)
    torch.testing.assert_close(folded(images), beside, rtol=1e-4, atol=1e-4)


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
    original = Compensator(2, 8, 5, rank=3, compressor="evit", trained_scale=0.1, dropout=0.2, metadata=about)
    torch.nn.init.normal_(original.up)
    original.save(tmp_path / "p.safetensors")
    loaded = Compensator.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.down, original.down)
    assert torch.equal(loaded.up, original.up)
    for name in ("depth", "dim", "steps", "rank", "compressor", "trained_scale", "dropout", "metadata"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert not loaded.training


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
