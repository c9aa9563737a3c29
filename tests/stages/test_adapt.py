"""Adapting a compensator to fine-tuned models: no label is used, the model stays what it was, whose file is whose."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.small import refusal, steps_of, teach, tune
from tocom.data.registry import prepare, read
from tocom.distillation import distillation_loss
from tocom.files import load_tensors, save_arrays
from tocom.jobs import AdaptJob, EvaluateJob
from tocom.models import load_model
from tocom.parts import load_part
from tocom.stages.adapt import adapt
from tocom.stages.evaluate import evaluate
from tocom.training import normalise
from tocom.vit import CompressedViT

WHOLE = {"kind": "widecom", "sources": "any"}
SETTINGS = {"epochs": 3, "batch_size": 16, "lr": 3e-3, "pairs": 4, "device": "cpu", "start": "zero"}
FILE, OTHER = "train-0_seed-0.safetensors", "train-4_seed-0.safetensors"


@pytest.fixture(scope="module")
def checkpoints(backbone, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for label, degree in (("0", "fixed"), ("4", "fixed"), ("random", "random")):
        tune(backbone, digits, folder, label, settings={"epochs": 4}, tuning={"kind": "full", "degree": degree})
    return folder


def run(checkpoints, data, output, learned=None, compensator=WHOLE, **settings):
    job = AdaptJob.model_validate({"compensator": compensator, "max_degree": 4, "settings": SETTINGS | settings})
    return adapt(job, checkpoints, data, output, learned)


@pytest.fixture(scope="module")
def adapted(checkpoints, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "all"
    return folder, run(checkpoints, digits, folder, epochs=8)


def test_each_model_of_one_degree_gets_a_file_of_its_own_with_what_it_is_about(checkpoints, adapted):
    folder, about = adapted
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["SHA256SUMS", FILE, FILE.replace("safetensors", "csv"), OTHER, OTHER.replace("safetensors", "csv")]
    )
    assert [entry["train_degree"] for entry in about] == ["0", "4"]
    for entry, name in zip(about, (FILE, OTHER), strict=True):
        part = load_part(folder / name, "compensator")
        assert part.metadata["adapted_to"] == entry["adapted_to"]
        assert len(pd.read_csv((folder / name).with_suffix(".csv"))) == 8
    assert not [path for path in folder.parent.iterdir() if path != folder]  # no state is left


def test_a_model_stays_what_it_was_at_its_own_degree_and_comes_closer_to_it_at_others(digits, tmp_path):
    path, _ = tune("glyph_vit", digits, tmp_path / "tuned", settings={"epochs": 6, "lr": 1e-3}, max_degree=14)
    job = AdaptJob(compensator="widecom", max_degree=14, settings=SETTINGS | {"epochs": 4, "lr": 1e-3})
    (about,) = adapt(job, path, digits, tmp_path / "adapted")
    assert about["held_out_kl"] < 0.9 * about["held_out_kl_without"]
    model, _ = load_model(path)
    vit, images = CompressedViT(model.eval()), normalise(torch.from_numpy(read(digits)[0]["test_images"]), model)
    with torch.no_grad():
        own, before = vit(images), vit.set_degree(14)(images)
        vit.set_degree(0).attach(load_part(tmp_path / "adapted" / path.name, "compensator"))
        assert torch.equal(vit(images), own)
        after = vit.set_degree(14)(images)
    assert distillation_loss(own, after) < 0.9 * distillation_loss(own, before)


def test_no_label_is_looked_at(checkpoints, digits, tmp_path):
    arrays, about = read(digits)
    shuffled = {name: np.roll(array, 7) if name.endswith("labels") else array for name, array in arrays.items()}
    save_arrays(tmp_path / "shuffled", shuffled, about)
    for name, data in (("a", digits), ("b", tmp_path / "shuffled")):
        run(checkpoints / FILE, data, tmp_path / name)
    one, other = (load_tensors(tmp_path / name / FILE)[0] for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_resumes_exactly(checkpoints, digits, tmp_path):
    total = steps_of(lambda: run(checkpoints / FILE, digits, tmp_path / "whole"))
    steps_of(lambda: run(checkpoints / FILE, digits, tmp_path / "again"), kill_at=total - 2)
    left = steps_of(lambda: run(checkpoints / FILE, digits, tmp_path / "again"))
    assert 0 < left < total
    whole, again = ((tmp_path / name / FILE).read_bytes() for name in ("whole", "again"))
    assert whole == again


def test_it_starts_from_what_was_learned_with_the_models_seed(backbone, checkpoints, digits, tmp_path):
    spec = {"kind": "widecom", "rank": 2, "step": 1}
    for seed in (0, 1):
        teach(backbone, tmp_path / f"learned-{seed}", compensator=spec, seed=seed)
    files = [tmp_path / f"learned-{seed}" for seed in (1, 0)]
    still = {"compensator": spec, "start": "learned", "lr": 1e-12, "min_lr": 0}
    run(checkpoints / FILE, digits, tmp_path / "a", files, **still)
    start, result = (load_part(path, "compensator") for path in (files[1], tmp_path / "a" / FILE))
    for name, value in start.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=0, atol=1e-9)
    message = refusal(run, checkpoints / FILE, digits, tmp_path / "b", files, **still | {"compensator": WHOLE})
    assert "the job is about" in message
    assert not list((tmp_path / "b").iterdir())
    assert "start: zero, not both" in refusal(run, checkpoints / FILE, digits, tmp_path / "b", files)
    assert "start: zero, not both" in refusal(run, checkpoints / FILE, digits, tmp_path / "b", start="learned")


def test_evaluation_takes_the_file_of_each_model_and_no_other(checkpoints, digits, adapted, tmp_path):
    how = {"adapted": {"compensated": True, "infer_degrees": [0, 4]}, "tome": {"infer_degrees": [0, 4]}}
    job = EvaluateJob.model_validate({"methods": how, "settings": {"scales": [0, 1], "device": "cpu"}})
    cells = evaluate(job, checkpoints, digits, {"adapted": [adapted[0]]}, tmp_path / "predictions")
    there = [(cell["train_degree"], cell["method"]) for cell in cells]
    assert set(there) == {(t, m) for t in ("0", "4") for m in how} | {("random", "tome")}
    assert {cell["compensator_seed"] for cell in cells if cell["compensated"]} == {0}
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / FILE).write_bytes((adapted[0] / OTHER).read_bytes())
    message = refusal(evaluate, job, checkpoints / FILE, digits, {"adapted": [swapped]}, tmp_path / "p")
    assert "is not the model that this compensator was adapted to" in message


def test_tasks_to_segment_are_refused(checkpoints, tmp_path):
    prepare("scenes", tmp_path / "scenes", {"train": 8, "val": 4, "test": 4}, image_size=32)
    assert "leave adapt out" in refusal(run, checkpoints / FILE, tmp_path / "scenes", tmp_path / "a")
