"""WideCom against sums written as loops: its changes, folded in and beside the weights, and what it is learned by."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small import beside, check_beside_is_folded, check_half_precision, refusal
from tocom.distillation import FeatureMatching, distillation_loss, feature_loss
from tocom.errors import TocomError
from tocom.parts import Shape, make_part
from tocom.vit import CompressedViT

STEPS = 6
degrees = st.integers(0, STEPS)
BLOCK_NORMS = [f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")]
BIASES = ["attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"]
MATRICES = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]


@torch.no_grad()
def widecom(depth=3, dim=24, max_degree=STEPS, seed=0, fresh=False, **options):
    options = {"kind": "widecom", "rank": 2, "step": 1, "sources": "any", "need": 0} | options
    result = make_part("compensator", options, Shape(depth, dim, 2, 17, 1), max_degree)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in result.named_parameters():
        if not fresh:
            parameter.copy_((1 if name.startswith("down") else 0.1) * torch.randn(parameter.shape, generator=generator))
    return result.double().eval()


def for_family(model):
    """Return the vectors that a model has."""
    lacks = set()
    if not isinstance(model.norm, nn.LayerNorm):
        lacks.add("last_norm")
    if model.blocks[0].attn.qkv.bias is None:
        lacks.add("biases")
    return tuple(name for name in ("biases", "norms", "last_norm") if name not in lacks)


def by_hand(part, block, name, m, n):
    """Return one change in one block: a sum over single degrees, outer product by outer product."""
    low, high, sign, step = min(m, n), max(m, n), 1 if n > m else -1, part.options.step or STEPS
    total = 0
    for degree in range(low, high):
        i = degree // step
        if name in MATRICES:
            key = name.split(".")[1]
            if part.options.rank is None:
                change = torch.cat(list(part.matrix[key][block, :, i]))
            else:
                up, down, pieces = part.up[key][block], part.down[key][block], []
                for p in range(len(up)):
                    outer = sum(up[p, i, :, k, None] * down[p, i, None, k] for k in range(part.options.rank))
                    pieces.append(outer)
                change = torch.cat(pieces)
        else:
            change = part.vector[name.removeprefix("attn.").removeprefix("mlp.").replace(".", "_")][block, i]
        total = total + sign * change / step
    return total


# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(
    m=degrees,
    n=degrees,
    step=st.sampled_from([1, 4, None]),
    rank=st.sampled_from([1, 3, None]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_every_change_is_the_sum_of_its_steps(m, n, step, rank, seed):
    part = widecom(depth=2, dim=4, seed=seed, step=step, rank=rank)
    deltas = part.deltas(m, n)
    names = [f"blocks.{block}.{name}" for block in range(2) for name in MATRICES + BIASES + BLOCK_NORMS]
    assert set(deltas) == {*names, "norm.weight", "norm.bias"}
    for name in names:
        block, inside = int(name.split(".")[1]), name.split(".", 2)[2]
        expected = torch.zeros_like(deltas[name]) + by_hand(part, block, inside, m, n)
        torch.testing.assert_close(deltas[name], expected, rtol=0, atol=1e-12)
    for kind in ("weight", "bias"):
        spans = step or STEPS
        steps = part.vector[f"last_{kind}"][0].repeat_interleave(spans, 0)[min(m, n) : max(m, n)]
        expected = (1 if n > m else -1) * steps.sum(0) / spans
        torch.testing.assert_close(deltas[f"norm.{kind}"], expected, rtol=0, atol=1e-12)


@given(m=degrees, k=degrees, n=degrees, step=st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_changes_add_up_over_a_degree_between_and_turn_round(m, k, n, step):
    part = widecom(depth=2, dim=4, step=step)
    whole, first, second, back = (part.deltas(*pair) for pair in ((m, n), (m, k), (k, n), (n, m)))
    for name, change in whole.items():
        torch.testing.assert_close(first[name] + second[name], change, rtol=0, atol=1e-12)
        assert torch.equal(back[name], -change)


def test_lists_of_degrees_are_changes_block_by_block_and_the_last_norm_goes_with_the_last_block():
    part = widecom()
    deltas = part.deltas([0, 2, 4], [3, 2, 1])
    for block, pair in enumerate([(0, 3), (2, 2), (4, 1)]):
        alone = part.deltas(*pair)
        names = [name for name in deltas if name.startswith(f"blocks.{block}.")]
        names += ["norm.weight", "norm.bias"] if block == 2 else []
        assert names
        for name in names:
            torch.testing.assert_close(deltas[name], alone[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rank", "expected"), [(2, {"down"}), (None, set())])
@torch.no_grad()
def test_it_starts_at_zero_and_only_with_down_drawn(make_vit, images, rank, expected):
    part, model = widecom(fresh=True, rank=rank), make_vit()
    drawn = {name.partition(".")[0] for name, parameter in part.named_parameters() if parameter.any()}
    assert drawn == expected
    assert not any(change.any() for change in part.deltas(0, STEPS).values())
    plain = CompressedViT(model, degree=4)(images)
    assert torch.equal(CompressedViT(model).attach(part).set_degree(4)(images), plain)


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({}, MATRICES + BIASES + BLOCK_NORMS),
        ({"rank": None, "step": None}, MATRICES + BIASES + BLOCK_NORMS),
        ({"rank": None, "layers": ("fc2", "k"), "vectors": ()}, ["attn.qkv.weight", "mlp.fc2.weight"]),
        ({"layers": ("fc2", "k"), "vectors": ()}, ["attn.qkv.weight", "mlp.fc2.weight"]),
        ({"layers": (), "vectors": ("norms",)}, BLOCK_NORMS),
        ({"layers": (), "vectors": ("biases",)}, BIASES),
        ({"layers": ("proj",), "vectors": ("last_norm",)}, ["attn.proj.weight"]),
    ],
)
@torch.no_grad()
def test_only_what_is_chosen_changes_and_by_the_scaled_sum(make_vit, options, inside):
    model, part = make_vit(), widecom(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CompressedViT(model, degree=1).attach(part, scale=0.7).set_degree(5)
    expected = {f"blocks.{block}.{name}" for block in range(3) for name in inside}
    expected |= {"norm.weight", "norm.bias"} if "last_norm" in part.options.vectors else set()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == expected
    for name, change in part.deltas(1, 5).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] + 0.7 * change, rtol=0, atol=1e-12)
    if "k" in part.options.layers and part.options.layers != ("q", "k", "v", "proj", "fc1", "fc2"):
        q, k, v = part.deltas(1, 5)["blocks.0.attn.qkv.weight"].chunk(3)
        assert (bool(q.any()), bool(k.any()), bool(v.any())) == (False, True, False)


# --- while it is learned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "rank"), [(0, 4, 2), (5, 1, None), (3, 3, 2)])
def test_beside_the_weights_it_is_what_it_is_folded_in(family, images, m, n, rank):
    part = widecom(trained_scale=0.5, step=2, rank=rank, vectors=for_family(family))
    check_beside_is_folded(family, part, images, m, n, whole=1e-11, folded=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_float32_folded_and_beside(make_vit, images, dtype):
    check_half_precision(make_vit, widecom(), images, dtype)


def test_a_compiled_objective_has_the_same_loss_and_gradients(make_vit, images):
    part = widecom(depth=1, kl=0.5)
    objective = part.objective(CompressedViT(make_vit(depth=1)), CompressedViT(make_vit(depth=1)), True).set((1, 4))

    def run():
        part.zero_grad()
        loss = objective(images)
        loss.backward()
        return [loss.detach()] + [parameter.grad.clone() for parameter in part.parameters()]

    expected = run()
    torch.compiler.reset()
    objective.compiled(lambda view: torch.compile(view, backend="eager", dynamic=False))
    for actual, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)
    assert all(gradient.any() for gradient in expected)


@pytest.mark.parametrize("rank", [2, None])
def test_steps_beyond_the_two_degrees_get_no_gradient(make_vit, images, rank):
    part = widecom(rank=rank)
    beside(make_vit(), part, 2, 4)[1](images).square().sum().backward()
    for name, parameter in part.named_parameters():
        steps = parameter.grad.movedim(1 if name.startswith("vector") else 2, 0)
        assert [bool(step.any()) for step in steps] == [False, False, True, True, False, False], name


def test_the_feature_loss_is_the_square_error_over_the_variance_of_each_image():
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = 0
    for wanted, found in zip(teacher, student, strict=True):
        variance = sum(float(v - wanted.mean()) ** 2 for v in wanted) / 7
        expected += sum(float(a - b) ** 2 for a, b in zip(wanted, found, strict=True)) / 7 / variance / 5
    assert float(feature_loss(teacher, student)) == pytest.approx(expected)
    assert feature_loss(teacher, teacher) == 0
    assert feature_loss(torch.ones(2, 3), torch.zeros(2, 3)).isfinite()


@torch.no_grad()
def test_the_loss_is_the_weighted_sum_and_held_out_images_are_scored_in_nats(family, images):
    if family.global_pool == "":
        pytest.skip("without pooling, degrees give other numbers of tokens")
    part = widecom(vectors=for_family(family), feature=0.7, kl=0.2)
    models = [CompressedViT(deepcopy(family)) for _ in range(2)]
    objective = part.objective(*models, False).eval().set((1, 4))
    views = []
    for degree, vit in ((1, CompressedViT(family, degree=1)), (4, CompressedViT(family, degree=1).attach(part))):
        tokens, size = vit.set_degree(degree).forward_features(images)
        first = 0 if family.global_pool != "avg" or family.pool_include_prefix else family.num_prefix_tokens
        if family.global_pool == "avg":
            size = torch.ones_like(tokens[..., :1]) if size is None else size
            feature = family.fc_norm((tokens * size)[:, first:].sum(1) / size[:, first:].sum(1))
        elif hasattr(family, "head_dist"):
            feature = tokens[:, :2].mean(1)
        else:
            feature = family.fc_norm(tokens[:, 0])
        views.append((feature, vit(images)))
        vit.detach()
    kl = distillation_loss(views[0][1], views[1][1])
    expected = 0.7 * feature_loss(views[0][0], views[1][0]) + 0.2 * kl
    for actual, wanted in ((objective(images), expected), (objective.held_out(images), kl)):  # computed in float32
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


def test_only_the_compensator_learns(make_vit):
    objective = widecom().objective(CompressedViT(make_vit()), CompressedViT(make_vit()), False).train()
    assert isinstance(objective, FeatureMatching)
    assert {name.split(".")[1] for name, p in objective.named_parameters() if p.requires_grad} == {
        "down", "up", "vector"}  # fmt: skip
    assert (objective.teacher.training, objective.student.training) == (False, True)


@pytest.mark.parametrize("options", [{}, {"kl": 1.0}, {"layers": ()}, {"vectors": ()}, {"rank": None}], ids=str)
def test_learning_lowers_the_loss_of_the_pairs_it_sees(make_vit, options):
    part = widecom(fresh=True, **options).train()
    objective = part.objective(CompressedViT(make_vit()), CompressedViT(make_vit()), False).train()
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(part.parameters(), lr=3e-3)
    pairs = [(0, 6), (6, 0)]
    before = [float(objective.set(pair)(images).detach()) for pair in pairs]
    for step in range(40):
        optimizer.zero_grad()
        objective.set(pairs[step % 2])(images).backward()
        optimizer.step()
    after = [float(objective.set(pair)(images).detach()) for pair in pairs]
    assert all(now < 0.9 * then for now, then in zip(after, before, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "cause"),
    [
        ({"mlp_ratio": 2.0}, {}, "mlp.fc1.weight has shape .*; set the options of WideCom"),
        ({"qkv_bias": False}, {}, "attn.qkv.bias, which the model has not; set the options of WideCom"),
        ({"final_norm": False}, {}, "norm.weight, which the model has not"),
        ({"norm_layer": nn.RMSNorm}, {"vectors": ["biases"]}, None),
        ({"mlp_ratio": 2.0}, {"mlp_ratio": 2.0}, None),
    ],
)
def test_a_model_without_what_it_changes_is_refused_before_it_learns(make_vit, settings, options, cause):
    part = widecom(**options)
    pair = [CompressedViT(make_vit(**settings)) for _ in range(2)]
    if cause is None:
        part.objective(*pair, False)
    else:
        with pytest.raises(TocomError, match=cause):
            part.objective(*pair, False)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"layers": ["q", "q"]}, "layers lists something twice"),
        ({"vectors": ["norms", "norms"]}, "vectors lists something twice"),
        ({"layers": [], "vectors": []}, "both empty"),
        ({"feature": 0}, "both 0, so there is no loss"),
    ],
)
def test_options_that_leave_nothing_to_learn_are_refused(options, cause):
    assert cause in refusal(widecom, **options)


def test_a_highest_degree_of_zero_is_refused():
    assert "degrees from 0 to 1 or more" in refusal(widecom, max_degree=0)
