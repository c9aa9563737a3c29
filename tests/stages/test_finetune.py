"""Fine-tuning: learns, repeats, resumes exactly, and refuses what cannot work."""

import numpy as np
import pytest
import torch
from PIL import Image

import tocom.stages.finetune
import tocom.training
from tests.small import ARCHITECTURE, KWARGS, QUICK
from tocom.data.own import OwnSource
from tocom.data.registry import prepare
from tocom.errors import TocomError
from tocom.files import load_tensors
from tocom.models import create, load_model, save_model
from tocom.seeds import derive_seed
from tocom.settings import TuningSettings
from tocom.stages.common import compressed
from tocom.stages.finetune import finetune
from tocom.training import random_shift, resume_path

ALL = {"train": None, "val": None, "test": None}


def train(backbone, digits, path, degree=2, **changes):
    return finetune(backbone, digits, path, degree, 0, max_degree=4, settings=QUICK.model_copy(update=changes))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(backbone, digits, tmp_path):
    for name in "ab":
        train(backbone, digits, tmp_path / name)
    finetune(backbone, digits, tmp_path / "c", 2, seed=1, settings=QUICK)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("degree", [0, 4, "random"])
def test_a_killed_run_resumes_to_the_same_weights(backbone, digits, tmp_path, monkeypatch, degree):
    train(backbone, digits, tmp_path / "whole", degree, epochs=3)
    calls = 0

    def stop_in_the_second_epoch(images, pixels):
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return random_shift(images, pixels)

    monkeypatch.setattr("tocom.stages.finetune.random_shift", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(backbone, digits, tmp_path / "resumed", degree, epochs=3)
    assert not (tmp_path / "resumed").exists()
    assert resume_path(tmp_path / "resumed").exists()
    epochs = []
    monkeypatch.setattr("tocom.stages.finetune.random_shift", random_shift)
    real = tocom.training.seed_everything
    monkeypatch.setattr("tocom.training.seed_everything", lambda *parts: epochs.append(parts[-1]) or real(*parts))
    train(backbone, digits, tmp_path / "resumed", degree, epochs=3)
    assert epochs == [1, 2]
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not resume_path(tmp_path / "resumed").exists()


def test_a_state_of_other_settings_or_of_garbage_is_not_resumed(backbone, digits, tmp_path):
    train(backbone, digits, tmp_path / "fresh")
    resume_path(tmp_path / "dirty").write_bytes(b"not a state")
    train(backbone, digits, tmp_path / "dirty")
    assert (tmp_path / "fresh").read_bytes() == (tmp_path / "dirty").read_bytes()


def test_a_loss_that_turns_nan_is_one_line_and_leaves_no_output(backbone, digits, tmp_path):
    with pytest.raises(TocomError, match="the loss became nan") as error:
        train(backbone, digits, tmp_path / "nan", lr=1e30, epochs=4)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_held_out_figure_that_turns_nan_leaves_no_output(backbone, digits, tmp_path, monkeypatch):
    predict = tocom.stages.finetune.predict
    monkeypatch.setattr("tocom.stages.finetune.predict", lambda *args: predict(*args) * float("nan"))
    with pytest.raises(TocomError, match="held-out figure became nan"):
        train(backbone, digits, tmp_path / "nan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["backbone", "attention", "data", "max_degree"])
def test_a_state_that_other_inputs_left_is_not_resumed(backbone, digits, tmp_path, monkeypatch, change):
    model, meta = load_model(backbone)
    model.cls_token.data += 1
    save_model(tmp_path / "backbone", model, meta["architecture"], meta["kwargs"])
    described = {"proportional_attention": False}  # the same weights, run in another way
    save_model(tmp_path / "attention", load_model(backbone)[0], meta["architecture"], meta["kwargs"], **described)
    prepare("digits", tmp_path / "data", {"train": 64, "val": 32, "test": 39})
    other = {
        "backbone": {"backbone": tmp_path / "backbone"},
        "attention": {"backbone": tmp_path / "attention"},
        "data": {"data": tmp_path / "data"},
        "max_degree": {"max_degree": 3},
    }[change]
    usual = {"backbone": backbone, "data": digits, "max_degree": 4}

    def run(name, changes, keep_state=False):
        finetune(output=tmp_path / name, train_degree="random", seed=0, settings=QUICK, keep_state=keep_state,
                 **usual | changes)  # fmt: skip

    run("clean", other)
    run("x", {}, keep_state=True)
    assert resume_path(tmp_path / "x").exists()
    run("x", other)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()


def test_a_finished_run_whose_state_was_kept_is_made_again_without_training(backbone, digits, tmp_path, monkeypatch):
    finetune(backbone, digits, tmp_path / "x", 2, 0, settings=QUICK, keep_state=True)
    first = (tmp_path / "x").read_bytes()
    (tmp_path / "x").unlink()
    monkeypatch.setattr("tocom.stages.finetune.random_shift", None)  # a step of training would fail
    finetune(backbone, digits, tmp_path / "x", 2, 0, settings=QUICK)
    assert (tmp_path / "x").read_bytes() == first


def test_a_model_that_is_used_as_it_is_is_only_scored_and_described(backbone, digits, tmp_path):
    trained = train(backbone, digits, tmp_path / "elsewhere.safetensors", 2)
    as_it_is = QUICK.model_copy(update={"tuning": TuningSettings(mode="none")})
    about = finetune(
        backbone, digits, tmp_path / "x", 2, 0, settings=as_it_is, fine_tuned=tmp_path / "elsewhere.safetensors"
    )
    before, after = (load_tensors(tmp_path / name) for name in ("elsewhere.safetensors", "x"))
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert about["val_accuracy"] == pytest.approx(trained["val_accuracy"])
    assert after[1]["backbone_sha256"] == before[1]["backbone_sha256"]
    with pytest.raises(TocomError, match="was trained with train_degree 2, not 0"):
        finetune(
            backbone, digits, tmp_path / "y", 0, 0, settings=as_it_is, fine_tuned=tmp_path / "elsewhere.safetensors"
        )
    with pytest.raises(TocomError, match="classifier for 41 classes, the task has 10"):
        finetune(backbone, digits, tmp_path / "y", 0, 0, settings=as_it_is)
    with pytest.raises(TocomError, match=r"set finetune\.tuning\.mode"):
        finetune(backbone, digits, tmp_path / "y", 2, 0, settings=QUICK, fine_tuned=tmp_path / "elsewhere.safetensors")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("mode", ["head", "adaptformer", "lora"])
def test_tuned_models_learn_and_can_be_loaded_and_run_at_other_degrees(backbone, digits, tmp_path, mode):
    settings = QUICK.model_copy(update={"tuning": TuningSettings(mode=mode, adapter_width=4, lora_rank=2), "lr": 5e-3})
    finetune(backbone, digits, tmp_path / "x", 2, 0, settings=settings)
    (original, _), (tuned, meta) = load_model(backbone), load_model(tmp_path / "x")
    changed = {
        name.replace(".mlp.mlp.", ".mlp.")
        for name, value in tuned.state_dict().items()
        if name not in original.state_dict() or not torch.equal(value, original.state_dict()[name])
    }
    frozen = {name for name in changed if "norm" in name or "embed" in name or "token" in name or "proj" in name}
    assert not frozen
    assert any(name.startswith("head.") for name in changed)
    assert any("blocks" in name for name in changed) == (mode != "head")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = [compressed(tuned, meta, "tome", 0).eval().set_degree(degree)(images) for degree in (0, 4)]
    assert logits[0].shape == (2, 10)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("storage", ["files", "arrays"])
def test_augmentation_by_timm_does_not_depend_on_the_number_of_workers(backbone, tmp_path, storage):
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{index}.png")
    if storage == "files":
        source = OwnSource(folder=str(tmp_path / "pets"))
        prepare("pets", tmp_path / "data", ALL | {"val": 8}, 32, source, decode_train=False)
    else:
        prepare("digits", tmp_path / "data", {"train": 16, "val": 10, "test": 10}, decode_train=False)
    strong = {"augmentation": "timm", "mixup": 0.8, "cutmix": 1.0, "batch_size": 8}
    for workers in (0, 2):
        settings = QUICK.model_copy(update=strong | {"workers": workers})
        finetune(backbone, tmp_path / "data", tmp_path / f"{workers}", 2, 0, settings=settings)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "2").read_bytes()


def test_an_operation_whose_result_varies_is_refused_unless_the_settings_allow_it(
    backbone, digits, tmp_path, monkeypatch
):
    def shift(images, pixels):  # a shift with an operation that torch refuses on every device
        images.float().put_(torch.tensor([0]), torch.ones(1))
        return random_shift(images, pixels)

    monkeypatch.setattr("tocom.stages.finetune.random_shift", shift)
    with pytest.raises(TocomError, match=r"^put_ gives results that vary .*--set deterministic=false"):
        train(backbone, digits, tmp_path / "x")
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        train(backbone, digits, tmp_path / "x", deterministic=False)
    assert load_tensors(tmp_path / "x")[1]["recipe"]["deterministic"] is False


def test_mixing_needs_batches_that_pair_off(backbone, digits, tmp_path):
    with pytest.raises(TocomError, match="mix pairs"):
        train(backbone, digits, tmp_path / "x", mixup=0.8, augmentation="timm", batch_size=15)


def test_images_of_another_size_are_refused(digits, tmp_path):
    kwargs = KWARGS | {"img_size": 48}
    save_model(tmp_path / "b", create(ARCHITECTURE, kwargs), ARCHITECTURE, kwargs)
    with pytest.raises(TocomError, match="have 32 x 32 pixels, the model takes 48 x 48"):
        finetune(tmp_path / "b", digits, tmp_path / "x", 0, 0, settings=QUICK)


def test_the_best_epoch_is_the_one_that_is_kept(backbone, digits, tmp_path):
    about = train(backbone, digits, tmp_path / "best", epochs=4)
    weights, meta = load_tensors(tmp_path / "best")
    assert 1 <= about["best_epoch"] <= 4
    assert meta["train_degree"] == 2
    assert weights["head.weight"].shape[0] == 10


@pytest.mark.parametrize(
    ("degree", "message"), [(-1, "out of range"), ("often", "out of range"), (1.5, "out of range")]
)
def test_a_wrong_train_degree_is_refused(backbone, digits, tmp_path, degree, message):
    with pytest.raises(TocomError, match=message):
        finetune(backbone, digits, tmp_path / "x", degree, 0, settings=QUICK)


def test_random_needs_to_know_how_far_to_draw(backbone, digits, tmp_path):
    with pytest.raises(TocomError, match="max_degree"):
        finetune(backbone, digits, tmp_path / "x", "random", 0, settings=QUICK)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1)
    assert len({derive_seed(a, "epoch", b) for a in range(10) for b in range(10)}) == 100


def test_a_shift_moves_pixels_and_repeats_the_edge():
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    torch.manual_seed(0)
    shifted = random_shift(images, 1)
    padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").byte()
    for image, moved in zip(padded, shifted, strict=True):
        windows = [image[:, y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
        assert sum(torch.equal(moved, window) for window in windows) == 1
    assert torch.equal(random_shift(images, 0), images)
