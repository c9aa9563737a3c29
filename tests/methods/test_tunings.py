"""What each tuning trains, AdaptFormer's and LoRA's arithmetic."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from tests.conftest import build, randomise
from tests.small import refusal
from tocom import CompressedViT, make_part
from tocom.methods import PARTS
from tocom.methods.adaptformer import AdaptedMlp
from tocom.parts import describe


def apply(model, kind, **options):
    """Prepare a model as a tuning of that kind does."""
    make_part("tuning", {"kind": kind} | options).prepare(model)
    return model


def merge(model, kind="lora"):
    make_part("tuning", kind).finish(model)
    return model


def trainable(model):
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, images):
    """One step of SGD on everything that is trained, with gradients that are not small."""
    torch.manual_seed(0)
    F.cross_entropy(model(images), torch.arange(len(images)) % 7).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad / (parameter.grad.norm() + 1e-9)
                parameter.grad = None


# --- what is trained ------------------------------------------------------------------------------------------------


def test_each_kind_trains_just_its_own_parameters():
    """Counts by hand: width 24, 3 blocks, 7 classes; head 24 * 7 + 7; a bottleneck 2 * 24 * 5 + 5 + 24."""
    head = {"head.weight": 168, "head.bias": 7}
    assert trainable(apply(build(), "head")) == head
    assert trainable(apply(build(), "none")) == {}
    assert trainable(apply(build(), "full")) == {n: p.numel() for n, p in build().named_parameters()}
    sizes = {"down.weight": 120, "down.bias": 5, "up.weight": 120, "up.bias": 24}
    adapted = trainable(apply(build(), "adaptformer", width=5))
    assert adapted == {f"blocks.{b}.mlp.{part}": size for b in range(3) for part, size in sizes.items()} | head
    lora = trainable(apply(build(), "lora", rank=4))
    assert {name for name in lora if "lora" not in name} == set(head)
    assert sum(lora.values()) == 3 * (4 * 24 + 72 * 4) + 175


def test_both_heads_of_a_distilled_deit_are_trained():
    names = trainable(apply(build(distilled=True), "head"))
    assert set(names) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("kind", ["head", "adaptformer", "lora"])
def test_a_training_step_changes_only_what_is_trained(images, kind):
    model = apply(build(), kind).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, images)
    step(model, images)  # the gradient of what comes before a zero matrix is zero in the first
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trainable(model))


def test_a_model_without_a_head_has_no_probe():
    assert "'head' has nothing to train" in refusal(apply, build(num_classes=0), "head")


@pytest.mark.parametrize("kind", ["adaptformer", "lora"])
def test_what_is_added_depends_on_torch_s_random_state_alone(kind):
    def added(seed):
        torch.manual_seed(seed)
        model = apply(build(), kind)
        names = [name for name in trainable(model) if "head" not in name]
        return torch.cat([model.get_parameter(name).flatten() for name in names])

    assert torch.equal(added(1), added(1))
    assert not torch.equal(added(1), added(2))


@pytest.mark.parametrize(("degree", "labels"), [("fixed", ("0", "3")), ("random", ("random",))])
def test_a_tuning_says_how_its_models_are_labelled_and_draws_its_degrees(degree, labels):
    tuning = make_part("tuning", {"kind": "full", "degree": degree}, max_degree=5)
    assert tuning.labels(tuning.options, [0, 3]) == labels
    assert tuning.label(tuning.options) == ("" if degree == "fixed" else "random degrees")
    vit, seen = CompressedViT(build(), degree=2), set()
    torch.manual_seed(0)
    for _ in range(100):
        tuning.begin(vit)
        seen.add(vit.degree)
    assert seen == ({2} if degree == "fixed" else set(range(6)))
    assert tuning.score_degrees(labels[-1]) == ((3,) if degree == "fixed" else (0, 2, 5))


def drawing(kind, max_degree, **options):
    return make_part("tuning", {"kind": kind, "degree": "random"} | options, max_degree=max_degree)


def draws(tuning, n, seed=0):
    """Return the degrees of n steps."""
    vit, found = CompressedViT(build(), degree=1), []
    torch.manual_seed(seed)
    for _ in range(n):
        tuning.begin(vit)
        found.append(vit.degree)
    return found


#: Options -> the degrees that are drawn from up to 8, those that are scored, and what tables say.
DRAWN = [
    ({}, [*range(9)], (0, 4, 8), "random degrees"),
    ({"lowest": 0}, [*range(9)], (0, 4, 8), "random degrees"),
    ({"lowest": 3}, [3, 4, 5, 6, 7, 8], (3, 5, 8), "random degrees from 3"),
    ({"highest": 2}, [0, 1, 2], (0, 1, 2), "random degrees 0 to 2"),
    ({"lowest": 2, "highest": 5}, [2, 3, 4, 5], (2, 3, 5), "random degrees 2 to 5"),
    ({"among": [8, 0, 3]}, [0, 3, 8], (0, 3, 8), "random degrees among 0, 3, 8"),
]


@pytest.mark.parametrize("kind", [kind for kind in PARTS["tuning"] if kind != "none"])
@pytest.mark.parametrize(("options", "degrees", "scored", "label"), DRAWN, ids=lambda value: str(value)[:30])
def test_every_tuning_draws_each_degree_of_a_range_or_set_as_often(kind, options, degrees, scored, label):
    tuning = drawing(kind, 8, **options)
    assert tuning.score_degrees("random") == scored
    assert tuning.score_degrees("5") == (5,)
    assert tuning.label(tuning.options).endswith(label)
    assert tuning.labels(tuning.options, [0, 3]) == ("random",)
    n = 1500
    counts = Counter(draws(tuning, n))
    assert sorted(counts) == degrees
    assert chisquare([counts[degree] for degree in degrees]).pvalue > 1e-3
    # The same again, as positions in the list that torch's global state draws; another seed gives others.
    torch.manual_seed(0)
    places = [int(torch.randint(0, len(degrees), ())) for _ in range(20)]
    assert draws(tuning, 20) == [degrees[place] for place in places] != draws(tuning, 20, seed=1)


def test_the_order_of_a_set_makes_no_difference():
    assert describe(drawing("full", 8, among=[8, 0, 3])) == describe(drawing("full", 8, among=[0, 3, 8]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": "random", "lowest": -1}, "lowest = -1: give 0 or more"),
        ({"degree": "random", "among": [-1, 2]}, "among.0 = -1: give 0 or more"),
        ({"degree": "random", "among": []}, "among = []: give at least 1"),
        ({"degree": "random", "among": [2, 2]}, "a degree is listed twice"),
        ({"degree": "random", "lowest": 5, "highest": 2}, "lowest 5 is above highest 2; swap them"),
        ({"degree": "random", "highest": 5, "among": [2]}, "among stands in place of highest; leave one"),
        ({"lowest": 1, "highest": 5}, "lowest and highest: say what is drawn from; set degree: random"),
        ({"among": [0, 2]}, "among: say what is drawn from; set degree: random"),
        ({"degree": "random", "amung": [2]}, "unknown key 'amung' (did you mean 'among'?)"),
    ],
)
def test_a_range_or_set_that_makes_no_sense_is_refused_in_one_line(options, message):
    assert message in refusal(make_part, "tuning", {"kind": "lora"} | options)


@pytest.mark.parametrize("options", [{"highest": 6}, {"lowest": 5}, {"among": [0, 9]}])
def test_degrees_beyond_the_highest_are_refused_where_they_are_drawn(options):
    tuning = drawing("full", 4, **options)
    for what in (lambda: tuning.begin(CompressedViT(build())), lambda: tuning.score_degrees("random")):
        assert "is out of range: max_degree is 4; raise it or draw lower degrees" in refusal(what)


# --- AdaptFormer ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adaptformer_adds_a_scaled_bottleneck_beside_the_mlp(images):
    """Against a loop over blocks in which the bottleneck is written out (arXiv 2205.13535, section 3.2)."""
    model = build()
    tuned = randomise(apply(build(), "adaptformer", width=5, scale=0.3), seed=7).eval()
    model.load_state_dict(
        {name.replace("mlp.mlp.", "mlp."): value for name, value in tuned.state_dict().items()}, False
    )

    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for plain, adapted in zip(model.blocks, tuned.blocks, strict=True):
        x = x + plain.attn(plain.norm1(x))
        normalised = plain.norm2(x)
        hidden = torch.clamp(normalised @ adapted.mlp.down.weight.T + adapted.mlp.down.bias, min=0)
        bottleneck = hidden @ adapted.mlp.up.weight.T + adapted.mlp.up.bias
        x = x + plain.mlp(normalised) + 0.3 * bottleneck
    expected = model.forward_head(model.norm(x))

    torch.testing.assert_close(tuned(images), expected)
    assert (model(images) - expected).abs().max() > 0.1
    torch.testing.assert_close(CompressedViT(tuned)(images), expected)


def test_the_bottleneck_starts_as_the_paper_says():
    torch.manual_seed(0)
    adapted = AdaptedMlp(torch.nn.Identity(), 200, 50, 0.1, 0.0)
    limit = 200**-0.5  # Kaiming-uniform with a = sqrt(5): sqrt(6 / (1 + 5) / fan-in)
    assert 0.95 * limit < adapted.down.weight.abs().max() <= limit
    assert not any(part.any() for part in (adapted.down.bias, adapted.up.weight, adapted.up.bias))


def test_adapters_cannot_be_added_twice():
    model = apply(build(), "adaptformer")
    assert "already has AdaptFormer's bottlenecks; start from its backbone" in refusal(apply, model, "adaptformer")


# --- LoRA -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_adds_a_scaled_product_to_the_fused_weight_and_merges_into_it(images):
    model, tuned = build(), build()
    apply(tuned, "lora", rank=3, alpha=6.0)
    randomise(tuned, seed=7).eval()
    for plain, block in zip(model.blocks, tuned.blocks, strict=True):
        down, up = (getattr(block.attn.qkv, part)["default"].weight for part in ("lora_A", "lora_B"))
        plain.load_state_dict(
            {name.replace("base_layer.", ""): value for name, value in block.state_dict().items() if "lora" not in name}
        )
        plain.attn.qkv.weight += 6.0 / 3 * up @ down
    kept = {name: value for name, value in tuned.state_dict().items() if not name.startswith("blocks.")}
    model.load_state_dict(kept, strict=False)
    expected = model(images)
    unmerged = tuned(images)
    torch.testing.assert_close(unmerged, expected)
    merged = merge(tuned)
    torch.testing.assert_close(merged(images), expected)
    assert set(merged.state_dict()) == set(model.state_dict())
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert type(merged.blocks[0].attn.qkv) is torch.nn.Linear
    assert not hasattr(merged, "peft_config")


@torch.no_grad()
def test_lora_drops_a_share_of_its_own_input_while_it_trains():
    tuned = randomise(apply(build(), "lora", rank=3, alpha=6.0, dropout=0.4), seed=7)
    layer, x = tuned.blocks[1].attn.qkv, torch.randn(2, 17, 24, dtype=torch.float64)
    down, up = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(1)
        output = layer(x)
        torch.manual_seed(1)
        expected = layer.base_layer(x) + 2 * F.dropout(x, 0.4, training) @ down.T @ up.T
        torch.testing.assert_close(output, expected)


def test_a_lora_update_that_is_not_finite_is_refused():
    model = apply(build(), "lora")
    with torch.no_grad():
        model.blocks[1].attn.qkv.lora_B["default"].weight.fill_(float("nan"))
    assert "LoRA's update of blocks.1.attn.qkv is not finite; lower the learning rate" in refusal(merge, model)


@torch.no_grad()
def test_lora_updates_the_layers_that_are_named(images):
    targets = ("attn.proj", "mlp.fc1")
    tuned = apply(build(), "lora", rank=2, targets=targets)
    layers = {name.split(".lora_")[0] for name in trainable(tuned) if "lora" in name}
    assert layers == {f"blocks.{block}.{target}" for block in range(3) for target in targets}
    randomise(tuned, seed=7).eval()
    before = tuned(images)
    torch.testing.assert_close(merge(tuned)(images), before)
    message = refusal(apply, build(), "lora", targets=("attn.qvk",))
    assert "no linear layer 'attn.qvk' (did you mean 'attn.qkv'?)" in message
