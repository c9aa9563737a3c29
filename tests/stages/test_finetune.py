"""Fine-tuning: learns, repeats, resumes exactly, and refuses what cannot work."""

import pytest
import torch

import tocom.stages.finetune
import tocom.training
from tests.small import ARCHITECTURE, KWARGS, QUICK
from tocom.data.registry import prepare
from tocom.errors import TocomError
from tocom.files import load_tensors
from tocom.models import create, load_model, save_model
from tocom.stages.finetune import finetune
from tocom.training import derive_seed, random_shift, resume_path


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
    real = tocom.training.derive_seed
    monkeypatch.setattr("tocom.training.derive_seed", lambda *parts: epochs.append(parts[-1]) or real(*parts))
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


@pytest.mark.parametrize("change", ["backbone", "data", "max_degree"])
def test_a_state_that_other_inputs_left_is_not_resumed(backbone, digits, tmp_path, monkeypatch, change):
    model, meta = load_model(backbone)
    model.cls_token.data += 1
    save_model(tmp_path / "backbone", model, meta["architecture"], meta["kwargs"])
    prepare("digits", tmp_path / "data", {"train": 64, "val": 32, "test": 39})
    other = {"backbone": tmp_path / "backbone", "data": tmp_path / "data", "max_degree": 3}
    usual = {"backbone": backbone, "data": digits, "max_degree": 4}

    def run(name, changes, keep_state=False):
        finetune(output=tmp_path / name, train_degree="random", seed=0, settings=QUICK, keep_state=keep_state,
                 **usual | changes)  # fmt: skip

    run("clean", {change: other[change]})
    run("x", {}, keep_state=True)
    assert resume_path(tmp_path / "x").exists()
    run("x", {change: other[change]})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "clean").read_bytes()


def test_a_finished_run_whose_state_was_kept_is_made_again_without_training(backbone, digits, tmp_path, monkeypatch):
    finetune(backbone, digits, tmp_path / "x", 2, 0, settings=QUICK, keep_state=True)
    first = (tmp_path / "x").read_bytes()
    (tmp_path / "x").unlink()
    monkeypatch.setattr("tocom.stages.finetune.random_shift", None)  # a step of training would fail
    finetune(backbone, digits, tmp_path / "x", 2, 0, settings=QUICK)
    assert (tmp_path / "x").read_bytes() == first


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
