"""Evaluation: cells are what they say, scales are chosen on validation images alone; gaps and throughput."""

import numpy as np
import pytest
import torch

from tests.small import refusal, tune
from tocom.data.registry import read
from tocom.files import load_arrays, save_arrays
from tocom.jobs import EvaluateJob, ThroughputJob, TransferJob
from tocom.models import load_model
from tocom.parts import load_part, save_part
from tocom.stages.evaluate import evaluate
from tocom.stages.throughput import throughput
from tocom.stages.transfer import transfer
from tocom.training import normalise
from tocom.vit import CompressedViT

SETTINGS = {"scales": (0, 0.5, 1), "device": "cpu"}
FILES = {label: f"train-{label}_seed-0.safetensors" for label in ("0", "4", "random")}


@pytest.fixture(scope="module")
def checkpoints(backbone, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for label in FILES:
        degree = "random" if label == "random" else "fixed"
        tune(backbone, digits, folder, label, settings={"epochs": 4}, tuning={"kind": "full", "degree": degree})
    return folder


def run(checkpoints, digits, compensator, output, labels=("0",), degrees=(0, 2, 4), methods=None, **settings):
    """Return the cells of some checkpoints, and what is predicted in each."""
    plain = {"infer_degrees": degrees}
    job = {"methods": {"tocom": plain | {"compensated": True}, "tome": plain} | (methods or {})}
    job = EvaluateJob.model_validate(job | {"backbone": "tiny", "settings": SETTINGS | settings})
    files = [checkpoints / FILES[label] for label in labels]
    added = {name: compensator for name, how in job.methods.items() if how.compensated}
    cells = evaluate(job, files, digits, added, output / "predictions")
    arrays, about = load_arrays(output / "predictions")
    assert about["cells"] == cells
    assert (about["kind"], about["task"], about["backbone"], about["metric"]) == (
        "predictions", "digits", "tiny", "accuracy")  # fmt: skip
    assert np.array_equal(arrays["labels"], read(digits)[0]["test_labels"])
    assert (arrays["predictions"].shape, arrays["predictions"].dtype) == ((len(cells), 40), np.int16)
    return cells, arrays["predictions"]


@torch.no_grad()
def logits_of(path, compensator, degree, scale, images):
    model, meta = load_model(path)
    vit = CompressedViT(model, "tome", int(meta["train_degree"]))
    if scale is not None:
        vit.attach(load_part(compensator, "compensator"), scale)
    return vit.set_degree(degree)(normalise(torch.from_numpy(images), model))


def test_predictions_of_a_cell_are_those_of_the_model_at_that_degree_and_scale(
    checkpoints, digits, compensator, tmp_path
):
    cells, predictions = run(checkpoints, digits, compensator, tmp_path, ("0", "4"))
    images = read(digits)[0]["test_images"]
    for cell, predicted in zip(cells, predictions, strict=True):
        path, scale = checkpoints / FILES[cell["train_degree"]], cell["scale"] if cell["compensated"] else None
        expected = logits_of(path, compensator, cell["infer_degree"], scale, images).argmax(-1).numpy()
        assert np.array_equal(predicted, expected)
    # Plain methods come first, checkpoints one after another; at its own degree nothing is compensated.
    grid = [(label, method, d) for label in "04" for method in ("tome", "tocom") for d in (0, 2, 4)]
    assert [(c["train_degree"], c["method"], c["infer_degree"]) for c in cells] == grid
    assert all((c["compensator"], c["compressor"]) == ("tocom" if c["compensated"] else "none", "tome") for c in cells)
    assert all(c["scale"] == 0 for c in cells if int(c["train_degree"]) == c["infer_degree"])
    costs = [cell["gflops"] for cell in cells]
    assert costs[0] > costs[1] > costs[2] > 0
    assert costs == costs[:3] * 4


def test_the_choice_of_scale_ignores_the_test_images(checkpoints, digits, compensator, tmp_path):
    arrays, metadata = read(digits)
    arrays["test_images"] = arrays["test_images"][::-1] // 2
    save_arrays(tmp_path / "other", arrays, metadata)
    first, _ = run(checkpoints, digits, compensator, tmp_path)
    second, _ = run(checkpoints, tmp_path / "other", compensator, tmp_path)
    assert [cell["scale"] for cell in first] == [cell["scale"] for cell in second]


@pytest.mark.parametrize("select_by", ["loss", "score"])
def test_the_chosen_scale_is_the_best_on_validation_images(checkpoints, digits, compensator, tmp_path, select_by):
    cells, _ = run(checkpoints, digits, compensator, tmp_path, degrees=(4,), select_by=select_by)
    arrays, _ = read(digits)
    labels, figures = torch.from_numpy(arrays["val_labels"]), {}
    for scale in SETTINGS["scales"]:
        logits = logits_of(checkpoints / FILES["0"], compensator, 4, scale, arrays["val_images"])
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        accuracy = float((logits.argmax(-1) == labels).double().mean())
        figures[scale] = (accuracy, -loss) if select_by == "score" else (-loss,)
    assert cells[1]["scale"] == max(figures, key=figures.get)


def test_a_compensator_can_decline_and_a_method_can_have_scales_of_its_own(checkpoints, digits, compensator, tmp_path):
    own = {"fixed": {"infer_degrees": (4,), "compensated": True, "scales": (1.25,)}}
    cells, predictions = run(checkpoints, digits, compensator, tmp_path, degrees=(4,), methods=own, scales=(0.0,))
    assert {cell["method"]: cell["scale"] for cell in cells} == {"tome": 0, "tocom": 0, "fixed": 1.25}
    assert np.array_equal(predictions[0], predictions[1])


def test_a_model_of_random_degrees_has_no_compensated_cells(checkpoints, digits, compensator, tmp_path):
    cells, _ = run(checkpoints, digits, compensator, tmp_path, ("random",))
    assert [(cell["train_degree"], cell["compensated"]) for cell in cells] == [("random", False)] * 3


def test_cells_do_not_depend_on_what_shares_their_job(checkpoints, digits, compensator, tmp_path):
    alone, together = (
        run(checkpoints, digits, compensator, tmp_path, labels) for labels in (("4",), ("0", "random", "4"))
    )
    assert alone[0] == together[0][-6:]
    assert np.array_equal(alone[1], together[1][-6:])


def test_what_does_not_belong_together_is_refused_and_nothing_is_written(checkpoints, digits, compensator, tmp_path):
    arrays, metadata = read(digits)
    save_arrays(tmp_path / "other", arrays, metadata | {"task": "mnist5k"})
    assert "was fine-tuned for 'digits'" in refusal(run, checkpoints, tmp_path / "other", compensator, tmp_path)
    assert "degree 5 is out of range" in refusal(run, checkpoints, digits, compensator, tmp_path, degrees=(0, 5))
    part = load_part(compensator, "compensator")
    wrong = {"backbone_sha256": ("0" * 64, "from another backbone"), "mean": ([0.1, 0.2, 0.3], "is run with mean")}
    for name, (value, message) in (wrong | {"proportional_attention": (False, "is run with proportional")}).items():
        known = part.metadata[name]
        part.metadata[name] = value
        save_part(tmp_path / "part", part)
        assert message in refusal(run, checkpoints, digits, tmp_path / "part", tmp_path)
        part.metadata[name] = known
    assert not (tmp_path / "predictions").exists()
    part.metadata = {}  # what a foreign file does not say is not checked
    save_part(tmp_path / "part", part)
    run(checkpoints, digits, tmp_path / "part", tmp_path)


# --- gaps -------------------------------------------------------------------------------------------------------------


def carried(data, folders):
    return transfer(TransferJob(method="tome", low="0", high="4", seeds=(0,), settings=SETTINGS), data, folders)


def test_a_tasks_own_gap_gives_the_weights_of_the_high_degree(checkpoints, digits):
    rows = carried({"digits": digits}, {"digits": [checkpoints]})
    assert [row["source_task"] for row in rows] == ["none", "digits"]
    high, low = (load_model(checkpoints / FILES[label])[0] for label in ("4", "0"))
    high.head.load_state_dict(low.head.state_dict())
    arrays, _ = read(digits)
    with torch.no_grad():
        logits = CompressedViT(high, "tome", 4).eval()(normalise(torch.from_numpy(arrays["test_images"]), high))
    assert abs(rows[1]["correct"] - int((logits.argmax(-1).numpy() == arrays["test_labels"]).sum())) <= 1


def test_a_gap_between_models_that_were_tuned_in_different_ways_is_refused(backbone, checkpoints, digits, tmp_path):
    for label in ("0", "4"):
        tune(backbone, digits, tmp_path, label, tuning={"kind": "adaptformer", "width": 4}, settings={"epochs": 1})
    data = {"digits": digits, "other": digits}
    for folders in ({"digits": [checkpoints], "other": [tmp_path]}, {"digits": [tmp_path], "other": [checkpoints]}):
        message = refusal(carried, data, folders)
        assert "'other' and 'digits' do not have the same weights" in message
    assert "no checkpoint" in refusal(carried, data, {"digits": [checkpoints]})


# --- throughput -------------------------------------------------------------------------------------------------------


def test_throughput_has_a_row_for_each_degree_and_method(backbone, compensator):
    settings = {"batch_size": 4, "repeats": 3, "warmup": 1, "device": "cpu", "training": True}
    job = ThroughputJob(methods={"tome": False, "tocom": True}, degrees=(0, 4), settings=settings)
    rows = throughput(job, backbone, {"tocom": compensator})
    assert [(row["infer_degree"], row["method"], row["compensated"]) for row in rows] == [
        (degree, *method) for degree in (0, 4) for method in (("tome", False), ("tocom", True))
    ]
    assert all(row["images_per_second"] > 0 and row["memory_mb"] > 0 and row["train_speedup"] > 0 for row in rows)
    assert all(row["ratio"] == 1 for row in rows if not row["compensated"])
    assert rows[2]["gflops"] == rows[3]["gflops"] < rows[0]["gflops"]
    larger = job.model_copy(update={"image_size": 64, "degrees": (0,), "methods": {"tome": False}})
    (row,) = throughput(larger, backbone, {})
    assert (rows[0]["image_size"], row["image_size"]) == (32, 64)
    assert row["gflops"] > 3 * rows[0]["gflops"]
    assert "name its file" in refusal(throughput, job, backbone, {})
