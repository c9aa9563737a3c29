"""What each tuning mode trains, AdaptFormer's and LoRA's arithmetic, and checkpoints of tuned models."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import build, randomise
from tocom import CompressedViT
from tocom.adapters import AdaptedMlp, describe_adapters
from tocom.errors import TocomError
from tocom.files import load_tensors
from tocom.models import create, load_model, save_model
from tocom.tuning import TuningSettings, apply_tuning, merge_tuning, trainable

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
MODES = ["full", "head", "adaptformer", "lora", "none"]


def step(model, images, seed=0):
    """One step of SGD on everything that is trained, with gradients that are not small."""
    torch.manual_seed(seed)
    labels = torch.arange(len(images)) % 7
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad / (parameter.grad.norm() + 1e-9)
                parameter.grad = None


# --- what is trained ------------------------------------------------------------------------------------------------


def test_each_mode_trains_just_its_own_parameters():
    """Counts by hand: width 24, 3 blocks, 7 classes; head 24 * 7 + 7; a bottleneck 2 * 24 * 5 + 5 + 24."""
    head = {"head.weight": 168, "head.bias": 7}
    assert trainable(apply_tuning(build(), TuningSettings(mode="head"))) == head
    assert trainable(apply_tuning(build(), TuningSettings(mode="none"))) == {}
    assert trainable(apply_tuning(build(), TuningSettings())) == {n: p.numel() for n, p in build().named_parameters()}

    adapted = trainable(apply_tuning(build(), TuningSettings(mode="adaptformer", adapter_width=5)))
    sizes = {"down.weight": 120, "down.bias": 5, "up.weight": 120, "up.bias": 24}
    assert adapted == {f"blocks.{b}.mlp.{part}": size for b in range(3) for part, size in sizes.items()} | head

    lora = trainable(apply_tuning(build(), TuningSettings(mode="lora", lora_rank=4)))
    assert {name for name in lora if "lora" not in name} == set(head)
    assert sum(lora.values()) == 3 * (4 * 24 + 72 * 4) + 175


def test_both_heads_of_a_distilled_deit_are_trained():
    names = trainable(apply_tuning(build(distilled=True), TuningSettings(mode="head")))
    assert set(names) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_computes_at_the_start_what_it_computed_before(images, mode):
    model = build()
    before = model(images)
    assert torch.equal(apply_tuning(model, TuningSettings(mode=mode)).eval()(images), before)


@pytest.mark.parametrize("mode", ["head", "adaptformer", "lora"])
def test_a_training_step_changes_only_what_is_trained(images, mode):
    model = apply_tuning(build(), TuningSettings(mode=mode)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, images)
    step(model, images)  # the gradient of what comes before a zero matrix is zero in the first
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trainable(model))


def test_a_frozen_model_cannot_be_trained_by_mistake(images):
    with pytest.raises(RuntimeError, match="does not require grad"):
        step(apply_tuning(build(), TuningSettings(mode="none")), images)


def test_a_model_without_a_head_has_no_probe():
    with pytest.raises(TocomError, match="mode 'head' has nothing to train: .*; give it num_classes$"):
        apply_tuning(build(num_classes=0), TuningSettings(mode="head"))


@pytest.mark.parametrize("mode", ["adaptformer", "lora"])
def test_what_is_added_depends_on_torch_s_random_state_alone(mode):
    def added(seed):
        torch.manual_seed(seed)
        model = apply_tuning(build(), TuningSettings(mode=mode))
        names = [name for name in trainable(model) if "head" not in name]
        return torch.cat([model.get_parameter(name).flatten() for name in names])

    assert torch.equal(added(1), added(1))
    assert not torch.equal(added(1), added(2))


def test_planning_code_can_read_the_module_without_torch():
    code = "import sys, tocom.tuning; print(sorted({'torch', 'timm', 'peft'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- AdaptFormer ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adaptformer_adds_a_scaled_bottleneck_beside_the_mlp(images):
    """Against a loop over blocks in which the bottleneck is written out (arXiv 2205.13535, section 3.2)."""
    model = build()
    settings = TuningSettings(mode="adaptformer", adapter_width=5, adapter_scale=0.3)
    tuned = randomise(apply_tuning(build(), settings), seed=7).eval()
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


def test_the_bottleneck_has_dropout_in_training_only(images):
    model = randomise(apply_tuning(build(), TuningSettings(mode="adaptformer", adapter_dropout=0.5)), seed=7)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


def test_adapters_are_in_the_mode_and_type_of_the_model_they_join():
    for model in (build().eval(), build().train().float()):
        tuned = apply_tuning(model, TuningSettings(mode="adaptformer"))
        assert {module.training for module in tuned.modules()} == {model.training}
        assert {parameter.dtype for parameter in tuned.parameters()} == {model.norm.weight.dtype}


def test_adapters_cannot_be_added_twice():
    model = apply_tuning(build(), TuningSettings(mode="adaptformer"))
    with pytest.raises(TocomError, match="already has AdaptFormer's adapters; start from its backbone"):
        apply_tuning(model, TuningSettings(mode="adaptformer"))


@torch.no_grad()
def test_a_compensator_folds_into_a_model_with_adapters(images, make_compensator):
    """Folded in and computed beside the weights it is the same, at each degree, and the weights come back."""
    model = randomise(apply_tuning(build(), TuningSettings(mode="adaptformer")), seed=7).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compensator = make_compensator(trained_scale=0.7)
    live, folded = CompressedViT(model), CompressedViT(model)
    plain = {degree: live.set_degree(degree)(images) for degree in (0, 3, 6)}
    beside = {}
    for degree in (3, 6):
        live.set_live_update(compensator, compensator.coefficients(0, degree))
        beside[degree] = live.set_degree(degree)(images)
    live.set_live_update(None)
    folded.attach(compensator)
    for degree in (3, 6):
        logits = folded.set_degree(degree)(images)
        torch.testing.assert_close(logits, beside[degree])
        assert (logits - plain[degree]).abs().max() > 1e-3
    assert torch.equal(folded.set_degree(0)(images), plain[0])
    folded.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- LoRA -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_adds_a_scaled_product_to_the_fused_weight_and_merges_into_it(images):
    model, tuned = build(), build()
    apply_tuning(tuned, TuningSettings(mode="lora", lora_rank=3, lora_alpha=6.0))
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
    merged = merge_tuning(tuned)
    torch.testing.assert_close(merged(images), expected)
    assert set(merged.state_dict()) == set(model.state_dict())
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert type(merged.blocks[0].attn.qkv) is torch.nn.Linear
    assert not hasattr(merged, "peft_config")


def test_lora_trains_compressed_and_is_merged_into_an_ordinary_checkpoint(tmp_path):
    model = apply_tuning(create(ARCHITECTURE, SMALL), TuningSettings(mode="lora", lora_rank=4)).train()
    images = torch.randn(4, 3, 32, 32)
    vit = CompressedViT(model, "tome", 4)
    for seed in range(3):
        step(vit, images, seed)
    with torch.no_grad():
        expected = vit.eval()(images)
        save_model(tmp_path / "m", merge_tuning(model), ARCHITECTURE, SMALL, tuning={"mode": "lora", "lora_rank": 4})
        loaded, meta = load_model(tmp_path / "m")
        torch.testing.assert_close(CompressedViT(loaded, "tome", 4)(images), expected)
    assert meta["tuning"]["mode"] == "lora"
    assert set(loaded.state_dict()) == set(create(ARCHITECTURE, SMALL).state_dict())


def test_merging_leaves_other_models_alone():
    for mode in ("full", "adaptformer"):
        model = apply_tuning(build(), TuningSettings(mode=mode))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert merge_tuning(model) is model
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lora_update_that_is_not_finite_is_refused():
    model = apply_tuning(build(), TuningSettings(mode="lora"))
    with torch.no_grad():
        model.blocks[1].attn.qkv.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(TocomError, match="LoRA's update of blocks.1.attn.qkv is not finite; lower the learning rate"):
        merge_tuning(model)


@torch.no_grad()
def test_lora_updates_the_layers_that_are_named(images):
    targets = ("attn.proj", "mlp.fc1")
    tuned = apply_tuning(build(), TuningSettings(mode="lora", lora_rank=2, lora_targets=targets))
    layers = {name.split(".lora_")[0] for name in trainable(tuned) if "lora" in name}
    assert layers == {f"blocks.{block}.{target}" for block in range(3) for target in targets}
    randomise(tuned, seed=7).eval()
    before = tuned(images)
    torch.testing.assert_close(merge_tuning(tuned)(images), before)
    with pytest.raises(TocomError, match="no linear layer 'attn.qvk' .did you mean 'attn.qkv'.*it has attn.proj, attn"):
        apply_tuning(build(), TuningSettings(mode="lora", lora_targets=("attn.qvk",)))


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TocomError, match="mode 'lora' needs peft; pip install peft"):
        apply_tuning(build(), TuningSettings(mode="lora"))


# --- checkpoints ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_come_back_with_a_checkpoint(tmp_path):
    settings = TuningSettings(mode="adaptformer", adapter_width=6, adapter_scale=0.2, adapter_dropout=0.3)
    model = randomise(apply_tuning(create(ARCHITECTURE, SMALL), settings), seed=7).eval()
    save_model(tmp_path / "m", model, ARCHITECTURE, SMALL)
    loaded, meta = load_model(tmp_path / "m")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    expected = {"mode": "adaptformer", "adapter_width": 6, "adapter_scale": 0.2, "adapter_dropout": 0.3}
    assert meta["tuning"] == describe_adapters(loaded) == expected
    assert not loaded.training
    fresh, _ = load_model(tmp_path / "m", num_classes=3)
    assert fresh(images).tolist() == [[0.0] * 3] * 2
    assert torch.equal(fresh.blocks[2].mlp.up.weight, model.blocks[2].mlp.up.weight)


def test_a_checkpoint_without_adapters_says_nothing_of_them(tmp_path):
    save_model(tmp_path / "m", create(ARCHITECTURE, SMALL), ARCHITECTURE, SMALL)
    assert "tuning" not in load_tensors(tmp_path / "m")[1]
    assert describe_adapters(load_model(tmp_path / "m")[0]) is None
