"""Backbones by name, and checkpoints that come back as they were saved."""

import pytest
import timm
import torch

from tocom.bundled import BUNDLED
from tocom.errors import TocomError
from tocom.files import load_tensors, save_arrays, save_tensors, sha256
from tocom.models import compressible, create, load_model, pick_device, save_model

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


def test_a_model_is_built_with_overrides():
    model = create("vit_tiny_patch16_224", SMALL)
    assert (len(model.blocks), model.embed_dim, model.num_classes) == (2, 24, 5)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_a_name_may_carry_the_tag_of_pretrained_weights():
    assert create("vit_tiny_patch16_224.augreg_in21k", SMALL).embed_dim == 24


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("vit_tinny_patch16_224", "vit_tiny_patch16_224"), ("deit_base_patch16_223", "deit_base_patch16_224")],
)
def test_an_unknown_architecture_suggests_the_one_meant(typo, meant):
    with pytest.raises(TocomError, match=f"timm has no model '{typo}' .did you mean '{meant}'"):
        create(typo)


def test_an_argument_that_timm_refuses_is_named():
    with pytest.raises(TocomError, match="could not build 'vit_tiny_patch16_224': .*'colour'") as caught:
        create("vit_tiny_patch16_224", SMALL | {"colour": "red"})
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nmany more lines")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(TocomError, match="could not build 'vit_tiny_patch16_224': no route to host$"):
        create("vit_tiny_patch16_224", pretrained=True)


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


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    model, architecture, path = saved
    save_model(tmp_path / "again", model, architecture, SMALL, accuracy={"0": 0.5}, seed=3)
    assert sha256(tmp_path / "again") == sha256(path)


def test_metadata_cannot_overwrite_what_the_model_is_built_from(tmp_path):
    save_model(tmp_path / "m", create(NAMES[0], SMALL), NAMES[0], SMALL, kind="poem", sha256="0")
    assert load_model(tmp_path / "m")[1]["kind"] == "model"


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


def test_a_new_head_does_not_touch_the_random_state(saved):
    torch.manual_seed(5)
    first, _ = load_model(saved[2], num_classes=3)
    torch.manual_seed(6)
    second, _ = load_model(saved[2], num_classes=3)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_an_override_reaches_the_constructor(saved):
    loaded, meta = load_model(saved[2], drop_path_rate=0.3)
    assert loaded.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert meta["kwargs"] == SMALL


def refusal(path, **settings):
    with pytest.raises(TocomError) as caught:
        load_model(path, **settings)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_tampered_weights_are_refused(saved):
    tensors, meta = load_tensors(saved[2])
    tensors["head.bias"][0] += 1e-3
    save_tensors(saved[2], tensors, meta)
    assert "weights do not match their hash" in refusal(saved[2])


def test_a_flipped_byte_is_found(saved):
    content = bytearray(saved[2].read_bytes())
    for place in (len(content) - 1, len(content) // 2):
        content[place] ^= 1
        saved[2].write_bytes(content)
        assert "weights do not match their hash" in refusal(saved[2])
        content[place] ^= 1


def test_weights_that_do_not_fit_the_architecture_are_refused(saved):
    assert "does not fit" in refusal(saved[2], embed_dim=32)
    assert "does not fit" in refusal(saved[2], depth=3)


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_arrays(tmp_path / "d", {}, {"kind": "data"})
    assert "holds data, not a model" in refusal(tmp_path / "d")
    save_tensors(tmp_path / "n", {"a": torch.zeros(1)})
    assert "holds something else, not a model" in refusal(tmp_path / "n")


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.safetensors")


def test_a_bundled_name_stands_for_its_file(saved, monkeypatch):
    monkeypatch.setitem(BUNDLED, "tiny", saved[2])
    assert load_model("tiny")[1]["architecture"] == saved[1]


# --- what there is --------------------------------------------------------------------------------------------


def test_models_that_can_be_compressed_are_found_by_pattern():
    found = dict(compressible("*tiny*patch16*"))
    assert found["vit_tiny_patch16_224"] == "vision_transformer"
    assert found["deit_tiny_distilled_patch16_224"] == "deit"
    assert not compressible("resnet*")


# --- devices --------------------------------------------------------------------------------------------------


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")


@pytest.mark.parametrize(("device", "cause"), [("cuda", "torch sees no GPU"), ("gpu", "unknown device 'gpu'")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, cause):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TocomError, match=cause) as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)
