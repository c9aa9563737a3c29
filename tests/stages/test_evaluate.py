"""Evaluation: cells are what they say, scales are chosen on validation images alone; gaps and throughput."""

from math import sqrt
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.small import refusal, teach, tune
from tocom.data.registry import read
from tocom.files import load_arrays, save_arrays
from tocom.jobs import EvaluateJob, ThroughputJob, TransferJob
from tocom.models import load_model
from tocom.parts import load_part, save_part
from tocom.stages.evaluate import chosen, evaluate
from tocom.stages.throughput import throughput
from tocom.stages.transfer import transfer
from tocom.tasks import Validated
from tocom.tasks.classify import Classification
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


def expected_scale(scores, losses, select_by, standard_errors):
    """Choose a scale from scale -> values by image, in plain Python."""
    values = scores if select_by == "score" else losses
    figures = {
        scale: (mean(scores[scale]), mean(losses[scale]), -scale)[0 if select_by == "score" else 1 :]
        for scale in scores
    }
    best = max(figures, key=figures.get)
    if standard_errors == 0 or 0 not in scores:
        return best
    gains = [after - before for after, before in zip(values[best], values[0], strict=True)]
    error = stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else float("inf")
    return best if mean(gains) > standard_errors * error else 0


@pytest.mark.parametrize("decline_within", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("select_by", ["loss", "score"])
def test_the_chosen_scale_is_clearly_the_best_on_validation_images(
    checkpoints, digits, compensator, tmp_path, select_by, decline_within
):
    how = {"select_by": select_by, "decline_within": decline_within}
    cells, _ = run(checkpoints, digits, compensator, tmp_path, degrees=(2, 4), **how)
    arrays, _ = read(digits)
    labels = torch.from_numpy(arrays["val_labels"])
    for cell in cells[2:]:
        scores, losses = {}, {}
        for scale in SETTINGS["scales"]:
            path, degree = checkpoints / FILES["0"], cell["infer_degree"]
            logits = logits_of(path, compensator, degree, scale, arrays["val_images"])
            losses[scale] = (-torch.nn.functional.cross_entropy(logits, labels, reduction="none")).tolist()
            scores[scale] = (logits.argmax(-1) == labels).double().tolist()
        assert cell["scale"] == expected_scale(scores, losses, select_by, decline_within)


@given(st.data(), st.integers(1, 12), st.sampled_from(["score", "loss"]), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_a_scale_is_chosen_as_it_would_be_by_hand(data, images, select_by, decline_within):
    # Sixteenths, whose sums are exact: ties are ties.
    values = st.lists(st.integers(-2, 2).map(lambda n: n / 16), min_size=images, max_size=images)
    scales = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=4, unique=True))
    scores, losses = ({scale: data.draw(values) for scale in scales} for _ in range(2))
    found = {
        scale: Validated(
            mean(scores[scale]),
            mean(losses[scale]),
            {"score": np.array(scores[scale]), "loss": np.array(losses[scale])},
        )
        for scale in scales
    }
    got = chosen(found, select_by, decline_within)
    assert got == expected_scale(scores, losses, select_by, decline_within)
    if decline_within == 0:  # ties in the score go to the lower loss, then to the smaller scale
        figures = {s: (one.score, one.loss) if select_by == "score" else (one.loss,) for s, one in found.items()}
        assert got == max(sorted(figures), key=figures.get)


def test_validation_images_are_looked_at_once_a_scale(checkpoints, digits, compensator, tmp_path, monkeypatch):
    real, seen = Classification.validate, []
    monkeypatch.setattr(Classification, "validate", lambda *args: seen.append(args) or real(*args))
    run(checkpoints, digits, compensator, tmp_path)
    assert len(seen) == 2 * len(SETTINGS["scales"])  # at degrees 2 and 4; at its own nothing is compensated
    one = real(*seen[-1])
    assert (one.by_image["score"].mean(), one.by_image["loss"].mean()) == pytest.approx((one.score, one.loss))
    assert {len(values) for values in one.by_image.values()} == {32}


@pytest.fixture(scope="module")
def compensators(backbone, tmp_path_factory):
    """Two compensators that were learned alike, with seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("compensators")
    for seed in (0, 1):
        teach(backbone, folder / f"{seed}", {"lr": 0.05}, seed=seed)
    return [folder / "0", folder / "1"]


def test_a_model_gets_the_compensator_that_was_learned_with_its_seed(
    backbone, digits, checkpoints, compensators, tmp_path
):
    files = [checkpoints / FILES["0"], tune(backbone, digits, tmp_path, "0", seed=1, settings={"epochs": 4})[0]]
    job = EvaluateJob(methods={"tocom": {"infer_degrees": (4,), "compensated": True, "scales": (100.0,)}})
    images = read(digits)[0]["test_images"]

    def predicted(parts, models=files):
        cells = evaluate(job, models, digits, {"tocom": parts}, tmp_path / "predictions")
        return [cell["compensator_seed"] for cell in cells], load_arrays(tmp_path / "predictions")[0]["predictions"]

    def expected(file, part):
        return logits_of(file, part, 4, 100.0, images).argmax(-1).numpy()

    by_hand = [[expected(file, part) for part in compensators] for file in files]
    assert not any(np.array_equal(*both) for both in by_hand)
    for several in (compensators, compensators[::-1]):  # the file says its seed, not its place
        seeds, found = predicted(several)
        assert seeds == [0, 1]
        assert np.array_equal(found, [by_hand[0][0], by_hand[1][1]])
    seeds, found = predicted(compensators[0])  # a single file is for all
    assert seeds == [0, 0]
    assert np.array_equal(found, [by_hand[0][0], by_hand[1][0]])
    part = load_part(compensators[0], "compensator")
    part.metadata = {}
    save_part(tmp_path / "foreign", part)
    assert predicted([tmp_path / "foreign"])[0] == [None, None]
    (tmp_path / "predictions").unlink()
    for several in ([compensators[0], tmp_path / "foreign"], [*compensators, compensators[1]]):
        assert "learned with seed 1, that of a model; give one for each seed" in refusal(predicted, several)
    assert not (tmp_path / "predictions").exists()
    assert predicted([compensators[0], tmp_path / "foreign"], files[:1])[0] == [0]


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
