"""Fine-tuning: repeats, resumes only what is its own, takes over models as they are, refuses what cannot work."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.small import ARCHITECTURE, KWARGS, QUICK, refusal, steps_of, tune
from tocom.data.registry import prepare
from tocom.files import load_tensors
from tocom.jobs import FinetuneJob
from tocom.models import create, load_model, save_model
from tocom.parts import Shape, make_part, save_part
from tocom.seeds import derive_seed
from tocom.stages.finetune import finetune
from tocom.tasks import classify
from tocom.training import random_shift
from tocom.vit import CompressedViT

RANDOM = {"kind": "full", "degree": "random"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(backbone, digits, tmp_path):
    runs = {"first": 0, "again": 0, "other": 1}
    first, again, other = (tune(backbone, digits, tmp_path / name, "2", seed)[0] for name, seed in runs.items())
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_checkpoints_of_one_job_are_those_of_jobs_of_their_own_and_survive_a_kill(backbone, digits, tmp_path):
    points = (("0", 1), ("4", 0))
    job = {"settings": QUICK}

    def run(name, points=points):
        finetune(FinetuneJob.model_validate(job | {"checkpoints": points}), backbone, digits, tmp_path / name)

    for point in points:
        run("alone", (point,))
    steps_of(lambda: run("together"), kill_at=10)  # of the second
    assert steps_of(lambda: run("together")) == 16 - 9
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("alone", "together")]
    assert [path.name for path in files[1]] == ["train-0_seed-1.safetensors", "train-4_seed-0.safetensors"]
    assert [a.read_bytes() for a in files[0]] == [b.read_bytes() for b in files[1]]
    curves = [[pd.read_csv(path.with_suffix(".csv")).drop(columns="seconds") for path in folder] for folder in files]
    assert all(a.equals(b) and len(a) == 2 for a, b in zip(*curves, strict=True))


def test_a_model_starts_from_the_compressor_that_was_learned_with_its_seed(backbone, digits, tmp_path):
    gate = {"kind": "tests.own_parts:Gate", "strength": 1.0}
    for seed in (0, 1):
        torch.manual_seed(seed)
        part = make_part("compressor", gate, Shape.of(load_model(backbone)[0]), 4)
        part.metadata = {"seed": seed}
        save_part(tmp_path / f"{seed}", part)
    both = [tmp_path / "1", tmp_path / "0"]

    def run(name, learned, seed):
        return tune(backbone, digits, tmp_path / name, "2", seed, learned, compressor=gate)[0].read_bytes()

    for seed in (0, 1):
        assert run("both", both, seed) == run("one", tmp_path / f"{seed}", seed) != run("x", tmp_path / "0", 1 - seed)
    assert "learned with seed 2, that of a model" in refusal(run, "none", both, 2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [{"among": [0, 4]}, {"lowest": 1, "highest": 3}, {}], ids=["set", "range", "all"])
def test_degrees_of_a_range_or_set_are_drawn_and_a_killed_run_resumes_to_the_same_bytes(
    backbone, digits, tmp_path, monkeypatch, options
):
    drawn, set_degree = [], CompressedViT.set_degree

    def counted(vit, degree, scale=None):
        drawn.extend([degree] if vit.training else [])  # scores are of a model in eval mode
        return set_degree(vit, degree, scale)

    monkeypatch.setattr(CompressedViT, "set_degree", counted)

    def run(name):
        return lambda: tune(backbone, digits, tmp_path / name, "random", tuning=RANDOM | options)

    assert steps_of(run("whole")) == 8
    assert len(drawn) == 8
    assert set(drawn) <= set(options.get("among", range(options.get("lowest", 0), options.get("highest", 4) + 1)))
    whole = list(drawn)
    drawn.clear()
    steps_of(run("killed"), kill_at=6)
    assert drawn == whole[:6]
    assert steps_of(run("killed")) == 3
    assert drawn[6:] == whole[5:]
    file = "train-random_seed-0.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("change", ["backbone", "attention", "data", "max_degree", "garbage"])
def test_a_state_that_other_inputs_left_is_not_resumed(backbone, digits, tmp_path, monkeypatch, change):
    model, meta = load_model(backbone)
    described = {"proportional_attention": False} if change == "attention" else {}  # the same weights, run otherwise
    model.cls_token.data += change == "backbone"
    save_model(tmp_path / "backbone", model, meta["architecture"], meta["kwargs"], **described)
    prepare("digits", tmp_path / "data", {"train": 64, "val": 32, "test": 39})
    usual = {"backbone": backbone, "data": digits, "max_degree": 4}
    other = {"backbone": {"backbone": tmp_path / "backbone"}, "attention": {"backbone": tmp_path / "backbone"},
             "data": {"data": tmp_path / "data"}, "max_degree": {"max_degree": 3}, "garbage": {}}[change]  # fmt: skip

    def run(name, changes):
        return tune(folder=tmp_path / name, label="random", tuning=RANDOM, **usual | changes)[0]

    with monkeypatch.context() as patch:
        patch.setattr("tocom.stages.finetune.forget", lambda output: None)  # as if killed before they were removed
        run("x", {})
    (state,) = tmp_path.glob(".x.*resume")
    if change == "garbage":
        state.write_bytes(b"not a state")
    assert run("x", other).read_bytes() == run("clean", other).read_bytes()
    assert not state.exists()


def test_a_held_out_figure_that_turns_nan_leaves_no_output(backbone, digits, tmp_path, monkeypatch):
    predict = classify.predict
    monkeypatch.setattr(classify, "predict", lambda *args: predict(*args) * float("nan"))
    assert "held-out figure became nan" in refusal(tune, backbone, digits, tmp_path / "nan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("label", "job", "message"),
    [
        ("random", {}, "'random' does not go with the tuning"),
        ("2", {"tuning": RANDOM}, "give random"),
        ("random", {"tuning": RANDOM, "max_degree": 0}, "give max_degree"),
        ("random", {"tuning": RANDOM | {"among": [0, 5]}}, "random degree 5 is out of range: max_degree is 4"),
        ("-1", {}, "train degree -1 is out of range"),
        ("0", {"fine_tuned": "x"}, "fine_tuned goes with a tuning that trains nothing"),
    ],
)
def test_what_would_be_trained_under_another_name_is_refused(label, job, message, tmp_path):
    assert message in refusal(tune, "backbone", "data", tmp_path / "x", label, **job)


def test_a_model_that_is_used_as_it_is_is_only_scored_and_described(backbone, digits, tmp_path):
    elsewhere, trained = tune(backbone, digits, tmp_path / "elsewhere", "2")

    def take(label, **job):
        return tune(backbone, digits, tmp_path / "x", label, tuning="none", **job)

    path, about = take("2", fine_tuned=str(elsewhere))
    before, after = load_tensors(elsewhere), load_tensors(path)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert about["val_score"] == pytest.approx(trained["val_score"])
    assert after[1]["backbone_sha256"] == before[1]["backbone_sha256"]
    assert "was trained with train_degree 2, not 0" in refusal(take, "0", fine_tuned=str(elsewhere))
    assert "was trained with compressor" in refusal(take, "2", fine_tuned=str(elsewhere), compressor="evit")
    assert "classifier for 41 classes, the task has 10" in refusal(take, "0")
    assert "trained at one degree; name it" in refusal(take, "random", fine_tuned=str(elsewhere))


@pytest.mark.parametrize("storage", ["files", "arrays"])
def test_augmentation_by_timm_does_not_depend_on_the_number_of_workers(backbone, tmp_path, storage):
    rng = np.random.default_rng(0)
    if storage == "files":
        for split, number in (("train", 12), ("test", 4)):
            for name in ("cat", "dog"):
                (tmp_path / "pets" / split / name).mkdir(parents=True)
                for index in range(number):
                    pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{index}.png")
        prepare("pets", tmp_path / "data", {"val": 8}, 32, {"folder": str(tmp_path / "pets")}, decode_train=False)
    else:
        prepare("digits", tmp_path / "data", {"train": 16, "val": 10, "test": 10}, decode_train=False)
    strong = {"augmentation": "timm", "mixup": 0.8, "cutmix": 1.0, "batch_size": 8}
    paths = [tune(backbone, tmp_path / "data", tmp_path / f"{n}", "2", workers=n, settings=strong)[0] for n in (0, 2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_operation_whose_result_varies_is_refused_unless_the_settings_allow_it(
    backbone, digits, tmp_path, monkeypatch
):
    def shift(images, pixels):  # a shift with an operation that torch refuses on every device
        images.float().put_(torch.tensor([0]), torch.ones(1))
        return random_shift(images, pixels)

    monkeypatch.setattr(classify, "random_shift", shift)
    assert refusal(tune, backbone, digits, tmp_path / "x").startswith("put_ gives results that vary")
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        _, about = tune(backbone, digits, tmp_path / "x", settings={"deterministic": False})
    assert about["recipe"]["deterministic"] is False


def test_the_best_epoch_is_the_one_that_is_kept(backbone, digits, tmp_path, monkeypatch):
    scores, weights = iter([0.2, 0.9, 0.4]), []

    def validate(self, module, *args):
        weights.append(module.model.head.weight.detach().clone())
        return next(scores), 0.0

    monkeypatch.setattr(classify.Classification, "validate", validate)
    path, about = tune(backbone, digits, tmp_path / "best", settings={"epochs": 3})
    assert (about["best_epoch"], about["val_score"], about["train_degree"]) == (2, 0.9, "0")
    assert torch.equal(load_tensors(path)[0]["head.weight"], weights[1])


def test_what_cannot_work_is_refused(backbone, digits, tmp_path):
    kwargs = KWARGS | {"img_size": 48}
    save_model(tmp_path / "b", create(ARCHITECTURE, kwargs), ARCHITECTURE, kwargs)
    message = refusal(tune, tmp_path / "b", digits, tmp_path / "x")
    assert "have 32 x 32 pixels, the model takes 48 x 48" in message
    odd = {"mixup": 0.8, "augmentation": "timm", "batch_size": 15}
    assert "mix pairs" in refusal(tune, backbone, digits, tmp_path / "x", settings=odd)
    assert not (tmp_path / "x").exists()


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
