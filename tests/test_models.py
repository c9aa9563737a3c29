"""Backbones by name, and checkpoints that come back as they were saved."""

import argparse
import re
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import timm
import torch

from tests.conftest import randomise
from tests.small import refusal as refused_line
from tocom.errors import TocomError
from tocom.files import load_tensors, save_tensors, sha256
from tocom.models import (
    PAPER_BACKBONES,
    check_classifier,
    create,
    default_proportional_attention,
    import_backbone,
    load_fine_tuned,
    load_model,
    pick_device,
    save_model,
)
from tocom.parts import describe, make_part

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]


@pytest.fixture(params=NAMES)
def saved(request, tmp_path):
    """A model, its architecture and its checkpoint."""
    torch.manual_seed(0)
    model = create(request.param, SMALL)
    path = tmp_path / "m.safetensors"
    save_model(path, model, request.param, SMALL, seed=3, accuracy={"0": 0.5})
    return model, request.param, path


# --- create ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("vit_tinny_patch16_224", "vit_tiny_patch16_224"), ("deit_base_patch16_223", "deit_base_patch16_224")],
)
def test_an_unknown_architecture_suggests_the_one_meant(typo, meant):
    with pytest.raises(TocomError, match=f"timm has no model '{typo}' .did you mean '{meant}'"):
        create(typo)


# --- save and load --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_comes_back_from_its_checkpoint_with_its_metadata(saved):
    model, architecture, path = saved
    loaded, meta = load_model(path)
    images = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    assert torch.equal(loaded(images), model.eval()(images))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert (meta["seed"], meta["accuracy"]) == (3, {"0": 0.5})
    assert (meta["kind"], meta["architecture"], meta["kwargs"]) == ("model", architecture, SMALL)


@pytest.mark.parametrize("num_classes", [5, 11])
@torch.no_grad()
def test_a_new_head_is_zero_and_the_rest_is_kept(saved, num_classes):
    model, architecture, path = saved
    loaded, _ = load_model(path, num_classes=num_classes)
    heads = [name for name, _ in loaded.named_parameters() if name.startswith("head")]
    assert heads == [
        f"{head}.{part}" for head in ("head", "head_dist")[: len(heads) // 2] for part in ("weight", "bias")
    ]
    assert ("head_dist.weight" in heads) == ("distilled" in architecture)
    for name, value in loaded.state_dict().items():
        if name in heads:
            assert len(value) == num_classes
            assert not value.any(), name
        else:
            assert torch.equal(value, model.state_dict()[name]), name
    assert loaded(torch.randn(1, 3, 32, 32)).tolist() == [[0.0] * num_classes]
    assert not loaded.training


def refusal(path, **settings):
    message = refused_line(load_model, path, **settings)
    assert str(path) in message
    return message


def test_tampered_weights_are_refused(saved):
    tensors, meta = load_tensors(saved[2])
    tensors["head.bias"][0] += 1e-3
    save_tensors(saved[2], tensors, meta)
    assert "weights do not match their hash" in refusal(saved[2])


# --- devices --------------------------------------------------------------------------------------------------


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "cause"),
    [
        ("cuda", "torch sees no GPU"),
        ("gpu", "unknown device 'gpu'"),
        ("mps", "unknown device 'mps'; use auto, cpu, cuda"),
        ("meta", "unknown device 'meta'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, cause):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TocomError, match=cause) as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)


# --- foreign weights ------------------------------------------------------------------------------------------------

NATIVE = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def weights_of(architecture=TINY, seed=0, **kwargs):
    """A small model with random weights that are all different, and its state."""
    model = randomise(create(architecture, NATIVE | {"img_size": 32, "num_classes": 5} | kwargs), seed).eval()
    return model, model.state_dict()


def bring(tmp_path, weights, architecture=TINY, **settings):
    """Import weights for the small architecture; return model and metadata as loaded from the result."""
    settings = {"image_size": 32, "kwargs": NATIVE} | settings
    stored = import_backbone(tmp_path / "b.safetensors", architecture, weights=weights, **settings)
    model, meta = load_model(tmp_path / "b.safetensors")
    assert stored.items() <= meta.items()
    return model, meta


def refused(tmp_path, weights, architecture=TINY, **settings):
    """Return the one line with which an import is refused; check that nothing is left behind."""
    before = sorted(tmp_path.iterdir())
    message = refused_line(bring, tmp_path, weights, architecture, **settings)
    assert sorted(tmp_path.iterdir()) == before
    return message


def save_as(kind, state, path):
    """Write a state in one of the layouts that people share; return the file."""
    layouts = {
        "plain.pth": state,
        "deit.pth": {"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3},
        "timm.pth.tar": {"state_dict": state, "epoch": 3},
        "ddp.pt": {f"module.{name}": value for name, value in state.items()},
        "wrapped.bin": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    }
    path = path / kind
    if kind.endswith(".safetensors"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(layouts[kind], path)
    return path


@pytest.mark.parametrize(
    "kind", ["plain.pth", "deit.pth", "timm.pth.tar", "ddp.pt", "wrapped.bin", "plain.safetensors"]
)
@torch.no_grad()
def test_a_local_file_gives_the_model_it_was_saved_from(tmp_path, kind):
    model, state = weights_of()
    path = save_as(kind, state, tmp_path)
    loaded, meta = bring(tmp_path, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert (meta["architecture"], meta["weights"], meta["weights_sha256"]) == (TINY, kind, sha256(path))
    assert meta["kwargs"] == NATIVE | {"img_size": 32, "num_classes": 5, "global_pool": "token"}
    assert meta["proportional_attention"] is True
    assert meta["revision"] is None


def test_averaged_weights_the_default_tag_and_a_tag_s_normalisation_are_taken(tmp_path):
    (_, state), (_, averaged) = weights_of(seed=1), weights_of(seed=2)
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "w.pth")
    loaded, meta = bring(tmp_path, tmp_path / "w.pth", "vit_tiny_patch16_224")
    assert torch.equal(loaded.norm.weight, state["norm.weight"])
    assert (meta["architecture"], loaded.pretrained_cfg["mean"]) == (TINY, (0.5, 0.5, 0.5))
    loaded, _ = bring(tmp_path, tmp_path / "w.pth", "deit_tiny_patch16_224.fb_in1k", ema=True)
    assert torch.equal(loaded.norm.weight, averaged["norm.weight"])
    assert loaded.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_one_s_own_mean_and_std_come_back_with_the_checkpoint(tmp_path):
    path = save_as("plain.pth", weights_of()[1], tmp_path)
    own = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    loaded, meta = bring(tmp_path, path, kwargs=NATIVE | {"pretrained_cfg_overlay": own})
    assert list(loaded.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert meta["kwargs"]["pretrained_cfg_overlay"] == own


# --- classifiers


def test_a_file_without_a_classifier_gives_a_model_without_one(tmp_path):
    _, state = weights_of(num_classes=0)
    loaded, meta = bring(tmp_path, save_as("plain.pth", state, tmp_path))
    assert (loaded.num_classes, meta["kwargs"]["num_classes"]) == (0, 0)
    with pytest.raises(TocomError, match="has no classifier, so there are no logits to distil; import weights with"):
        check_classifier(loaded, "b.safetensors")
    check_classifier(weights_of()[0], "b.safetensors")


def test_a_classifier_can_be_dropped(tmp_path):
    model, state = weights_of()
    loaded, meta = bring(tmp_path, save_as("plain.pth", state, tmp_path), num_classes=0)
    images = torch.randn(1, 3, 32, 32)
    assert meta["kwargs"]["num_classes"] == 0
    assert torch.equal(loaded(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_a_classifier_that_the_file_lacks_is_not_made_up(tmp_path):
    path = save_as("plain.pth", weights_of()[1], tmp_path)
    assert "has a classifier for 5 classes, not one for 7; leave num_classes out" in refused(
        tmp_path, path, num_classes=7
    )
    path = save_as("plain.pth", weights_of(num_classes=0)[1], tmp_path)
    assert "has no classifier, not one for 7" in refused(tmp_path, path, num_classes=7)


def test_mae_s_fine_tuned_layout_fits_with_average_pooling(tmp_path):
    """The published file has fc_norm, no norm, and the tag's weights have no classifier."""
    name = "vit_base_patch16_224.mae"
    model, state = weights_of(name, global_pool="avg")
    assert "fc_norm.weight" in state
    assert "norm.weight" not in state
    torch.save({"model": state}, tmp_path / "mae_finetuned.pth")
    kwargs = NATIVE | {"global_pool": "avg"}
    loaded, meta = bring(tmp_path, tmp_path / "mae_finetuned.pth", name, kwargs=kwargs)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert meta["kwargs"]["num_classes"] == 5
    assert meta["proportional_attention"] is False


# --- input size


def resampled(embedding, prefix, old, new):
    """Resample a position embedding [1, prefix + old * old, D] as ViTs do: the prefix stays, the grid is bicubic."""
    grid = embedding[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.mark.parametrize(
    ("name", "prefix"), [(TINY, 1), ("deit_tiny_distilled_patch16_224.fb_in1k", 2)], ids=["vit", "distilled"]
)
@pytest.mark.parametrize("size", [48, 24])
@torch.no_grad()
def test_position_embeddings_are_resampled_for_another_input_size(tmp_path, name, prefix, size):
    model, state = weights_of(name)
    path = save_as("plain.pth", state, tmp_path)
    loaded, meta = bring(tmp_path, path, name, image_size=size)
    expected = resampled(model.pos_embed, prefix, 4, size // 8)
    assert loaded.pos_embed.shape == (1, prefix + (size // 8) ** 2, 24)
    torch.testing.assert_close(loaded.pos_embed, expected)
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert loaded(torch.zeros(1, 3, size, size)).shape == (1, 5)
    assert meta["kwargs"]["img_size"] == size


def test_a_size_that_the_patches_do_not_tile_is_refused(tmp_path):
    path = save_as("plain.pth", weights_of()[1], tmp_path)
    assert "image size 36 is no multiple of the 8-pixel patches; use 32" in refused(tmp_path, path, image_size=36)
    assert "230 is no multiple of the 16-pixel patches; use 224" in refused(tmp_path, path, image_size=230, kwargs=None)


def test_a_file_of_numpy_arrays_is_read_by_timm(tmp_path):
    """AugReg's own layout (google-research/vision_transformer): kernels [in, out], heads apart."""
    model, state = weights_of()
    numpy.savez(tmp_path / "a.npz", **augreg_layout(state, heads=2))
    loaded, meta = bring(tmp_path, tmp_path / "a.npz")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert meta["kwargs"]["num_classes"] == 5
    larger, _ = bring(tmp_path, tmp_path / "a.npz", image_size=48)
    assert larger.pos_embed.shape == (1, 1 + 36, 24)
    assert bring(tmp_path, tmp_path / "a.npz", num_classes=0)[1]["kwargs"]["num_classes"] == 0


def augreg_layout(state, heads):
    """Rename and transpose a timm state into the names and axes of the JAX code."""
    dim = state["cls_token"].shape[-1]
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for block in range(2):
        here, there = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = f"{there}MultiHeadDotProductAttention_1/"
        for part, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{here}attn.qkv.weight"].chunk(3),
            state[f"{here}attn.qkv.bias"].chunk(3),
            strict=True,
        ):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(dim, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{here}attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{attention}out/bias"] = state[f"{here}attn.proj.bias"]
        for number, layer in ((0, "norm1"), (2, "norm2")):
            arrays[f"{there}LayerNorm_{number}/scale"] = state[f"{here}{layer}.weight"]
            arrays[f"{there}LayerNorm_{number}/bias"] = state[f"{here}{layer}.bias"]
        for number in (0, 1):
            arrays[f"{there}MlpBlock_3/Dense_{number}/kernel"] = state[f"{here}mlp.fc{number + 1}.weight"].T
            arrays[f"{there}MlpBlock_3/Dense_{number}/bias"] = state[f"{here}mlp.fc{number + 1}.bias"]
    return {name: value.numpy() for name, value in arrays.items()}


# --- refusals


def test_missing_and_unexpected_weights_are_named(tmp_path):
    _, state = weights_of()
    lacking = {name: value for name, value in state.items() if name != "blocks.1.norm2.bias"}
    message = refused(tmp_path, save_as("plain.pth", lacking, tmp_path))
    assert 'Missing key(s) in state_dict: "blocks.1.norm2.bias"; check the architecture and its kwargs' in message
    message = refused(tmp_path, save_as("plain.pth", state | {"decoder.weight": torch.ones(1)}, tmp_path))
    assert 'Unexpected key(s) in state_dict: "decoder.weight"' in message
    arrays = augreg_layout(state, heads=2)
    del arrays["Transformer/encoder_norm/scale"]
    numpy.savez(tmp_path / "a.npz", **arrays)
    assert "it lacks 'Transformer/encoder_norm/scale" in refused(tmp_path, tmp_path / "a.npz")


class Harmful:
    """What a pickle that runs code looks like."""

    def __reduce__(self):
        return print, ("this code ran",)


def test_a_file_that_holds_code_is_refused_and_does_not_run_it(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "bad.pth")
    assert "cannot be read as tensors alone and is refused" in refused(tmp_path, tmp_path / "bad.pth")
    numpy.savez(tmp_path / "bad.npz", **{"head/bias": numpy.array([Harmful()], dtype=object)})
    assert "cannot be read as arrays alone and is refused" in refused(tmp_path, tmp_path / "bad.npz")
    assert "this code ran" not in capsys.readouterr().out


def test_a_corrupt_or_missing_file_is_refused(tmp_path):
    for name in ("w.safetensors", "w.pth", "w.npz"):
        (tmp_path / name).write_bytes(b"not weights at all")
        assert "is refused" in refused(tmp_path, tmp_path / name)
    assert "no such file" in refused(tmp_path, tmp_path / "none.pth")


def test_a_file_with_another_hash_is_refused(tmp_path):
    path = save_as("plain.pth", weights_of()[1], tmp_path)
    assert f"has SHA-256 {sha256(path)}, not 00" in refused(tmp_path, path, sha256="00")
    assert bring(tmp_path, path, sha256=sha256(path).upper())[1]["weights_sha256"] == sha256(path)


def test_wrong_names_and_arguments_are_refused(tmp_path):
    path = save_as("plain.pth", weights_of()[1], tmp_path)
    assert "timm has no model 'vit_tinny_patch16_224'" in refused(tmp_path, path, "vit_tinny_patch16_224")
    message = refused(tmp_path, path, "deit_base_patch16_224.fb_in1kk")
    assert (
        "no weights 'fb_in1kk' for 'deit_base_patch16_224' (did you mean 'deit_base_patch16_224.fb_in1k'?)" in message
    )
    assert "give either weights or revision" in refused(tmp_path, path, revision="main")
    assert "'colour'" in refused(tmp_path, path, kwargs=NATIVE | {"colour": 1})


def test_a_model_that_cannot_be_compressed_is_refused_at_once(tmp_path):
    _, state = weights_of(patch_drop_rate=0.5)
    path = save_as("plain.pth", state, tmp_path)
    assert "patch dropout" in refused(tmp_path, path, kwargs=NATIVE | {"patch_drop_rate": 0.5})


# --- the Hub


@torch.no_grad()
def test_published_weights_come_from_the_hub_at_the_pinned_revision(tmp_path, hub):
    old, new = weights_of(seed=1), weights_of(seed=2)
    (tmp_path / "hub").mkdir()
    for commit, (_, state) in (("b" * 40, old), ("a" * 40, new)):
        safetensors.torch.save_file(state, tmp_path / "hub" / commit)
        hub.files[commit, "model.safetensors"] = tmp_path / "hub" / commit
    images = torch.randn(1, 3, 32, 32)
    loaded, meta = bring(tmp_path, None, revision="b" * 40)
    assert torch.equal(loaded(images), old[0](images))
    assert (meta["revision"], meta["weights"]) == ("b" * 40, "model.safetensors")
    assert meta["weights_sha256"] == sha256(tmp_path / "hub" / ("b" * 40))
    loaded, meta = bring(tmp_path, None)
    assert torch.equal(loaded(images), new[0](images))
    assert meta["revision"] == "a" * 40  # the commit that "main" was, not the word
    assert {repository for _, repository, _, _ in hub.asked} == {f"timm/{TINY}"}


def test_what_the_hub_does_not_have_is_refused_on_one_line(tmp_path, hub):
    (tmp_path / "cache").mkdir()
    for revision in ("c" * 40, None):
        with pytest.raises(TocomError, match="cannot be fetched from the Hub .*; check the network and") as caught:
            bring(tmp_path, None, revision=revision)
        assert "\n" not in str(caught.value)
        assert f"timm/{TINY} (revision {revision or 'main'})" in str(caught.value)
    assert not (tmp_path / "b.safetensors").exists()


# --- off the shelf


@pytest.fixture
def backbone(tmp_path):
    """The checkpoint of a backbone that was imported without proportional attention."""
    path = save_as("plain.pth", weights_of(seed=3)[1], tmp_path)
    bring(tmp_path, path, proportional_attention=False)
    return tmp_path / "b.safetensors"


@torch.no_grad()
def test_a_model_fine_tuned_elsewhere_is_taken_as_it_is(tmp_path, backbone):
    tuned, state = weights_of(seed=4, num_classes=7)
    path = save_as("deit.pth", state, tmp_path)
    loaded, meta = load_fine_tuned(path, backbone, 7)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), tuned(images))
    reference = load_model(backbone)[1]
    assert (meta["sha256"], meta["proportional_attention"]) == (reference["sha256"], False)
    assert meta["kwargs"] == reference["kwargs"] | {"num_classes": 7}
    assert meta["fine_tuned"] == {"file": "deit.pth", "sha256": sha256(path)}


@torch.no_grad()
def test_a_fine_tuned_checkpoint_of_this_project_is_taken_with_its_adapters(tmp_path, backbone):
    tuned, _ = load_model(backbone, num_classes=3)
    tuning = make_part("tuning", {"kind": "adaptformer", "width": 4})
    tuning.prepare(tuned)
    randomise(tuned, seed=5)
    _, about = load_model(backbone)
    kwargs = about["kwargs"] | {"num_classes": 3}
    save_model(tmp_path / "t.safetensors", tuned, about["architecture"], kwargs, tuning=describe(tuning))
    loaded, meta = load_fine_tuned(tmp_path / "t.safetensors", backbone, 3)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), tuned.eval()(images))
    assert meta["tuning"]["width"] == 4
    assert meta["sha256"] == about["sha256"]
    save_model(tmp_path / "again.safetensors", loaded, meta["architecture"], meta["kwargs"], tuning=meta["tuning"])
    assert torch.equal(load_model(tmp_path / "again.safetensors")[0](images), loaded(images))
    _, state = weights_of(seed=4)  # what the backbone is tuned with is not claimed for a model without it
    assert "tuning" not in load_fine_tuned(save_as("plain.pth", state, tmp_path), tmp_path / "again.safetensors")[1]


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({}, None),
        ({"backbone_sha256": "0" * 64}, "trained with backbone_sha256 0000"),
        ({"train_degree": "4"}, "trained with train_degree 4, not 2"),
        ({"train_degree": "random"}, "trained with train_degree random, not 2"),
        ({"compressor": {"kind": "evit"}}, "trained with compressor .*evit.*, not .*tome"),
        ({"proportional_attention": True}, "trained with proportional_attention True, not False"),
    ],
)
def test_a_checkpoint_that_says_it_was_trained_otherwise_is_refused(tmp_path, backbone, says, message):
    tuned, about = load_model(backbone, num_classes=3)
    told = {"backbone_sha256": about["sha256"], "train_degree": "2", "compressor": {"kind": "tome"}}
    told |= {"proportional_attention": False} | says
    save_model(tmp_path / "t.safetensors", tuned, about["architecture"], about["kwargs"] | {"num_classes": 3}, **told)
    if message is None:
        assert load_fine_tuned(tmp_path / "t.safetensors", backbone, 3, "2", {"kind": "tome"})[0].num_classes == 3
        return
    with pytest.raises(TocomError, match=message) as caught:
        load_fine_tuned(tmp_path / "t.safetensors", backbone, 3, "2", {"kind": "tome"})
    assert "\n" not in str(caught.value)


def test_a_checkpoint_trained_without_compression_goes_with_any_compressor_and_a_backbone_with_itself(
    tmp_path, backbone
):
    tuned, about = load_model(backbone)
    told = {"backbone_sha256": "0" * 64, "train_degree": "0", "compressor": {"kind": "tome"}}
    save_model(tmp_path / "t.safetensors", tuned, about["architecture"], about["kwargs"], **told)
    assert load_fine_tuned(tmp_path / "t.safetensors", tmp_path / "t.safetensors", None, "0", {"kind": "evit"})


def test_a_fine_tuned_model_that_does_not_fit_is_refused(tmp_path, backbone):
    path = save_as("plain.pth", weights_of(seed=4, num_classes=7)[1], tmp_path)
    with pytest.raises(TocomError, match="a classifier for 7 classes, the task has 9"):
        load_fine_tuned(path, backbone, 9)
    other = create(TINY, NATIVE | {"img_size": 32, "depth": 3})
    save_model(tmp_path / "o.safetensors", other, TINY, NATIVE | {"img_size": 32, "depth": 3})
    with pytest.raises(TocomError, match="is no fine-tuned .*name the backbone that it was fine-tuned from") as caught:
        load_fine_tuned(tmp_path / "o.safetensors", backbone)
    assert "\n" not in str(caught.value)


# --- the paper's backbones


@pytest.mark.parametrize("backbone", PAPER_BACKBONES.values(), ids=PAPER_BACKBONES)
def test_timm_has_the_paper_s_backbones_and_their_weights(backbone):
    cfg = timm.models.get_pretrained_cfg(backbone.architecture)
    assert cfg.hf_hub_id == f"timm/{backbone.architecture}"
    assert cfg.input_size == (3, 224, 224)
    assert re.fullmatch("[0-9a-f]{40}", backbone.revision)
    assert (cfg.num_classes == 1000) == ("no classifier" not in backbone.note)
    assert default_proportional_attention(backbone.architecture) == backbone.proportional_attention


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit_large_patch16_224.mae", False), ("deit_base_patch16_224", True), ("vit_base_patch16_224.dino", True)],
)
def test_proportional_attention_is_off_for_mae_only(name, expected):
    assert default_proportional_attention(name) is expected


# --- the page on own models

PAGE = Path(__file__).parent.parent / "docs" / "own_model.md"


def test_the_page_s_table_is_that_of_the_code():
    rows = re.findall(r"\| `(\S+)` \| `([0-9a-f]{40})` \| (on|off) \|", PAGE.read_text(encoding="utf-8"))
    code = PAPER_BACKBONES.values()
    assert rows == [(b.architecture, b.revision, "on" if b.proportional_attention else "off") for b in code]
