"""Evaluation: cells are what they say, scales are chosen on validation images alone."""

import numpy as np
import pytest
import torch

from tocom.compensator import Compensator
from tocom.data.registry import read
from tocom.errors import TocomError
from tocom.files import load_arrays, save_arrays
from tocom.models import load_model
from tocom.settings import EvaluateSettings, FinetuneSettings, ThroughputSettings, TuningSettings
from tocom.stages.evaluate import evaluate
from tocom.stages.finetune import finetune
from tocom.stages.throughput import throughput
from tocom.stages.transfer import NO_GAP, transfer
from tocom.training import normalise
from tocom.vit import CompressedViT

QUICK = FinetuneSettings(epochs=4, batch_size=16, lr=2e-3, device="cpu")
SETTINGS = EvaluateSettings(scales=(0, 0.5, 1), device="cpu")


@pytest.fixture(scope="module")
def checkpoints(backbone, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for degree in (0, 4, "random"):
        finetune(backbone, digits, folder / f"{degree}", degree, 0, max_degree=4, settings=QUICK)
    return folder


def run(checkpoints, digits, compensator, output, names=("0",), degrees=(0, 2, 4), settings=SETTINGS):
    outputs = [output / f"{name}.predictions" for name in names]
    named = {"tocom": compensator}
    cells = evaluate([checkpoints / name for name in names], digits, named, outputs, list(degrees), settings)
    return cells, [load_arrays(path) for path in outputs]


def test_predictions_of_a_cell_are_those_of_the_model_at_that_degree_and_scale(
    checkpoints, digits, compensator, tmp_path
):
    (cells,), ((arrays, meta),) = run(checkpoints, digits, compensator, tmp_path)
    images = torch.from_numpy(read(digits)[0]["test_images"])
    assert len(cells) == len(meta["cells"]) == 6
    for cell, predicted in zip(cells, arrays["predictions"], strict=True):
        vit = CompressedViT(load_model(checkpoints / "0")[0], "tome", 0).eval()
        if cell.compensated:
            vit.attach(Compensator.load(compensator), cell.scale)
        with torch.no_grad():
            expected = vit.set_degree(cell.infer_degree)(normalise(images, vit.model)).argmax(-1).numpy()
        assert np.array_equal(predicted, expected)


def test_the_choice_of_scale_ignores_the_test_images(checkpoints, digits, compensator, tmp_path):
    arrays, metadata = read(digits)
    arrays["test_images"], arrays["test_labels"] = arrays["test_images"][::-1] // 2, arrays["test_labels"][::-1]
    save_arrays(tmp_path / "other", arrays, metadata)
    first, _ = run(checkpoints, digits, compensator, tmp_path)
    second, _ = run(checkpoints, tmp_path / "other", compensator, tmp_path)
    assert [cell.scale for cell in first[0]] == [cell.scale for cell in second[0]]


@pytest.mark.parametrize("select_by", ["loss", "accuracy"])
def test_the_chosen_scale_is_the_best_on_validation_images(checkpoints, digits, compensator, tmp_path, select_by):
    settings = SETTINGS.model_copy(update={"select_by": select_by})
    (cells,), _ = run(checkpoints, digits, compensator, tmp_path, degrees=(4,), settings=settings)
    arrays, _ = read(digits)
    labels = torch.from_numpy(arrays["val_labels"])
    figures = {}
    for scale in SETTINGS.scales:
        vit = CompressedViT(load_model(checkpoints / "0")[0], "tome", 0).eval()
        vit.attach(Compensator.load(compensator), scale)
        with torch.no_grad():
            logits = vit.set_degree(4)(normalise(torch.from_numpy(arrays["val_images"]), vit.model))
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        accuracy = float((logits.argmax(-1) == labels).double().mean())
        figures[scale] = (accuracy, -loss) if select_by == "accuracy" else (-loss,)
    assert cells[1].scale == max(figures, key=figures.get)


def test_tocom_can_decline_and_then_changes_nothing(checkpoints, digits, compensator, tmp_path):
    only_zero = SETTINGS.model_copy(update={"scales": (0.0,)})
    (cells,), ((arrays, _),) = run(checkpoints, digits, compensator, tmp_path, settings=only_zero)
    assert {cell.scale for cell in cells} == {0.0}
    assert np.array_equal(arrays["predictions"][:3], arrays["predictions"][3:])


def test_at_its_own_degree_a_model_is_not_changed(checkpoints, digits, compensator, tmp_path):
    (cells,), ((arrays, _),) = run(checkpoints, digits, compensator, tmp_path, names=("4",))
    plain, ours = (next(i for i, c in enumerate(cells) if (c.infer_degree, c.compensated) == (4, k)) for k in (0, 1))
    assert np.array_equal(arrays["predictions"][plain], arrays["predictions"][ours])


def test_a_model_of_random_degrees_has_no_compensated_cells(checkpoints, digits, compensator, tmp_path):
    (cells,), _ = run(checkpoints, digits, compensator, tmp_path, names=("random",))
    assert [cell.compensated for cell in cells] == [False] * 3


def test_cells_do_not_depend_on_what_shares_their_job(checkpoints, digits, compensator, tmp_path):
    run(checkpoints, digits, compensator, tmp_path / "alone", names=("4",))
    run(checkpoints, digits, compensator, tmp_path / "together", names=("0", "random", "4"))
    alone, together = (tmp_path / name / "4.predictions" for name in ("alone", "together"))
    assert alone.read_bytes() == together.read_bytes()


def test_cost_falls_with_the_degree_and_not_with_tocom(checkpoints, digits, compensator, tmp_path):
    (cells,), _ = run(checkpoints, digits, compensator, tmp_path)
    costs = [cell.gflops for cell in cells]
    assert costs[0] > costs[1] > costs[2] > 0
    assert costs[:3] == costs[3:]


def test_a_checkpoint_of_another_task_is_refused(checkpoints, digits, compensator, tmp_path):
    arrays, metadata = read(digits)
    save_arrays(tmp_path / "other", arrays, metadata | {"task": "mnist5k"})
    with pytest.raises(TocomError, match="was fine-tuned for 'digits'"):
        run(checkpoints, tmp_path / "other", compensator, tmp_path)
    assert not (tmp_path / "0.predictions").exists()


def test_a_compensator_of_another_backbone_is_refused(checkpoints, digits, compensator, tmp_path):
    other = Compensator.load(compensator)
    other.metadata["backbone_sha256"] = "0" * 64
    other.save(tmp_path / "other")
    with pytest.raises(TocomError, match="from another backbone"):
        run(checkpoints, digits, tmp_path / "other", tmp_path)
    assert not (tmp_path / "0.predictions").exists()


@pytest.mark.parametrize(("name", "value"), [("proportional_attention", False), ("mean", [0.1, 0.2, 0.3])])
def test_a_compensator_of_a_backbone_run_in_another_way_is_refused(
    checkpoints, digits, compensator, tmp_path, name, value
):
    other = Compensator.load(compensator)
    assert other.metadata[name] != value
    other.metadata[name] = value
    other.save(tmp_path / "other")
    with pytest.raises(TocomError, match=f"is run with {name} .*; distil one for the backbone"):
        run(checkpoints, digits, tmp_path / "other", tmp_path)
    del other.metadata[name]  # as an older file
    other.save(tmp_path / "old")
    run(checkpoints, digits, tmp_path / "old", tmp_path)


def test_a_degree_beyond_the_compensator_is_refused_and_nothing_is_written(checkpoints, digits, compensator, tmp_path):
    with pytest.raises(TocomError, match="degree 5 is out of range"):
        run(checkpoints, digits, compensator, tmp_path, degrees=(0, 5))
    assert not (tmp_path / "0.predictions").exists()


def test_a_tasks_own_gap_gives_the_weights_of_the_high_degree(checkpoints, digits):
    paths = {("digits", 0): (str(checkpoints / "0"), str(checkpoints / "4"))}
    rows = transfer(paths, digits, SETTINGS)
    assert [row["source_task"] for row in rows] == [NO_GAP, "digits"]
    high, low = (load_model(checkpoints / name)[0] for name in ("4", "0"))
    high.head.load_state_dict(low.head.state_dict())
    arrays, _ = read(digits)
    with torch.no_grad():
        logits = CompressedViT(high, "tome", 4).eval()(normalise(torch.from_numpy(arrays["test_images"]), high))
    assert abs(rows[1]["correct"] - int((logits.argmax(-1).numpy() == arrays["test_labels"]).sum())) <= 1


@pytest.mark.parametrize("swapped", [False, True])
def test_a_gap_between_models_that_were_tuned_in_different_ways_is_refused(
    backbone, checkpoints, digits, tmp_path, swapped
):
    settings = QUICK.model_copy(update={"tuning": TuningSettings(mode="adaptformer", adapter_width=4), "epochs": 1})
    for degree in (0, 4):
        finetune(backbone, digits, tmp_path / f"{degree}", degree, 0, settings=settings)
    folders = {"digits": checkpoints, "other": tmp_path}
    if swapped:
        folders = {"digits": tmp_path, "other": checkpoints}
    paths = {(name, 0): (str(folder / "0"), str(folder / "4")) for name, folder in folders.items()}
    with pytest.raises(TocomError, match=r"'other' and 'digits' do not have the same weights.*same tuning") as caught:
        transfer(paths, digits, SETTINGS)
    assert "\n" not in str(caught.value)


def test_throughput_has_a_pair_of_rows_for_each_degree(backbone, compensator):
    settings = ThroughputSettings(batch_size=4, repeats=3, warmup=1, device="cpu")
    rows = throughput(backbone, compensator, [0, 4], settings=settings)
    assert [(row["infer_degree"], row["compensated"]) for row in rows] == [(0, False), (0, True), (4, False), (4, True)]
    assert all(row["images_per_second"] > 0 and row["memory_mb"] > 0 for row in rows)
    assert rows[2]["gflops"] == rows[3]["gflops"] < rows[0]["gflops"]
    assert rows[2]["memory_mb"] <= rows[0]["memory_mb"]


def test_throughput_is_measured_at_the_size_asked_for(backbone, compensator):
    settings = ThroughputSettings(batch_size=2, repeats=1, warmup=1, device="cpu")
    own, larger = (throughput(backbone, compensator, [0], settings=settings, image_size=size)[0] for size in (None, 64))
    assert (own["image_size"], larger["image_size"]) == (32, 64)
    assert larger["gflops"] > 3 * own["gflops"]
