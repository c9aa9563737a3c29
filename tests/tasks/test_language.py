"""Language models from pre-training to tables: they learn, resume, and every figure is that of its own predictions."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.nn import functional as F

from tests.small import refusal, steps_of, teach, tune
from tests.small_lm import KWARGS
from tests.workflow.running import LANGUAGE
from tocom.analysis.cells import gather
from tocom.analysis.perplexity import perplexity_tables
from tocom.analysis.run import Run
from tocom.analysis.scores import METRICS
from tocom.data.registry import prepare
from tocom.files import load_arrays, save_arrays
from tocom.jobs import EvaluateJob, PretrainJob, ThroughputJob
from tocom.models import compress, load_model
from tocom.parts import load_part
from tocom.stages.evaluate import evaluate
from tocom.stages.pretrain import pretrain
from tocom.stages.throughput import throughput
from tocom.study import parse_study
from tocom.tasks.language import scored

LORC = {"compressor": "lorc", "task_kind": "language", "max_degree": 15}
QUICK = {"batch_size": 8, "lr": 1e-2}
PRETRAIN = {"epochs": 2, "images": 96, "held_out": 16, "batch_size": 8, "lr": 1e-2, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "llama.safetensors"
    job = PretrainJob(architecture="llama", kwargs=KWARGS, compressor="lorc", degrees=(0, 8, 15), settings=PRETRAIN)
    return path, pretrain(job, path)


@pytest.fixture(scope="module")
def backbone(pretrained):
    return pretrained[0]


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "torch_headers.safetensors"
    prepare("torch_headers", path, {"train": 48, "val": 16, "test": 24})
    return path


@pytest.fixture(scope="module")
def cells(backbone, headers, tmp_path_factory):
    """Predictions of two seeds, with and without a compensator, and their cells."""
    folder = tmp_path_factory.mktemp("cells")
    paths = [tune(backbone, headers, folder / "x", "8", seed, settings=QUICK, **LORC)[0] for seed in (0, 1)]
    learn = {"images": 16, "held_out": 8, "batch_size": 8}
    teach(backbone, folder / "part", learn, compressor="lorc", compensator="tocom_lm", max_degree=15)
    methods = {"lorc": {"infer_degrees": [0, 8, 15]}}
    methods["lorc_tocom"] = {"infer_degrees": [0, 8, 15], "compensated": True, "scales": [1]}
    job = EvaluateJob(backbone="llama", methods=methods, settings={"device": "cpu", "batch_size": 7})
    found = evaluate(job, paths, headers, {"lorc_tocom": folder / "part"}, folder / "predictions.safetensors")
    return folder / "predictions.safetensors", found, paths, folder / "part"


def test_pretraining_saves_bits_and_says_what_it_read(pretrained):
    path, about = pretrained
    assert about["losses"][1] < about["losses"][0] < math.log(257)
    assert about["figure"] == "bits_saved"
    assert 0.1 < about["bits_saved"]["0"] < 1
    assert "Python source of pandas" in about["data"]
    assert "SHA-256" in about["data"]
    model, stored = load_model(path)
    assert stored["bits_saved"] == about["bits_saved"]
    # The bases are those of the trained weights, not of the first ones.
    lm = compress(model, stored, "lorc", 15)
    basis, _, _ = torch.linalg.svd(model.model.layers[1].self_attn.k_proj.weight.double())
    assert torch.allclose((basis.T @ lm.compressor.bases[1, 0].double()).abs(), torch.eye(16).double(), atol=1e-4)


def test_a_cell_holds_the_bits_of_its_model_and_a_compensator_is_folded_in(cells, headers):
    path, found, checkpoints, part = cells
    arrays, meta = load_arrays(path)
    assert meta["metric"] == "bits saved"
    assert [cell["cache_bytes"] for cell in found[:3]] == [65536, 32768, 4096]
    text = torch.from_numpy(load_arrays(headers)[0]["test_text"]).long()
    model, about = load_model(checkpoints[0])
    lm = compress(model, about, about["compressor"], 8).attach(load_part(part, "compensator"))
    tokens = torch.cat([torch.full((24, 1), 256), text[:, :-1]], dim=1)
    for number, cell in enumerate(found[:6]):
        with torch.no_grad():
            logits = lm.set_degree(cell["infer_degree"], cell["scale"])(tokens)
        bits = F.cross_entropy(logits.transpose(1, 2), text, reduction="none").sum(-1) / math.log(2)
        np.testing.assert_allclose(arrays["bits"][number], bits.numpy(), rtol=1e-5)
        assert arrays["foretold"][number].tolist() == (logits.argmax(-1) == text).sum(-1).tolist()
        assert (arrays["bytes"][number] == 256).all()
    assert not np.array_equal(arrays["bits"][2], arrays["bits"][5])
    assert np.array_equal(arrays["bits"][1], arrays["bits"][4])  # at the train degree there is nothing to compensate


def test_rows_and_values_are_shares_of_eight_bits(cells):
    rows = {(row["method"], row["seed"], row["infer_degree"]): row for row in gather("study", [cells[0]])}
    arrays, _ = load_arrays(cells[0])
    metric = METRICS["bits saved"]
    values = metric.values(metric.records(arrays))
    for cell, mean, bits in zip(cells[1], values.mean(axis=1), arrays["bits"], strict=True):
        row = rows[cell["method"], cell["seed"], cell["infer_degree"]]
        assert 100 * row["score"] == pytest.approx(mean)
        assert row["score"] == pytest.approx(1 - bits.sum() / (24 * 256) / 8)
        assert (row["n"], row["accuracy"]) == (24 * 256, row["correct"] / (24 * 256))
    validated = scored({name: values[0] for name, values in arrays.items()})
    assert (validated.score, validated.by_image["score"].shape) == (pytest.approx(values[0].mean()), (24,))
    assert -validated.loss == pytest.approx(math.log(2) * arrays["bits"][0].mean() / 256)


def test_the_table_turns_means_into_perplexity_beside_bytes(cells, headers, tmp_path):
    config = yaml.safe_load(LANGUAGE.read_text()) | {"tasks": ["torch_headers"], "compare": [["lorc", "lorc_tocom"]]}
    config["methods"] = {name: config["methods"][name] for name in ("lorc", "lorc_tocom")}
    config["backbones"][0]["name"] = "llama"
    study = parse_study(config | {"train_degrees": [8], "infer_degrees": [0, 8, 15]})
    rows = pd.DataFrame(gather("language", [cells[0]]))
    rows.to_csv(tmp_path / "cells.csv", index=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "torch_headers.safetensors").write_bytes(headers.read_bytes())
    run = Run(study, tmp_path)
    (table,) = perplexity_tables(run, run.scopes)
    assert table.header[2:] == ["0: 65,536 (100 %)", "8: 32,768 (50 %)", "15: 4,096 (6 %)"]
    bits = 8 * (1 - rows[(rows.method == "lorc") & (rows.infer_degree == 15)].score)
    assert table.rows[0][-1].text == f"{2 ** bits.mean():.3f} ({bits.mean():.3f} ± {bits.std():.3f})"
    assert re.search(r"torch_headers: C\+\+ headers of torch .* SHA-256", table.caption)
    assert run.cost("llama", "lorc", run.scopes[0], 8) == 32768
    empty = Run(study, tmp_path / "nothing")
    assert {cell.text for cell in perplexity_tables(empty, empty.scopes)[0].rows[0][2:]} == {"not run"}


def test_fine_tuning_learns_and_a_killed_one_resumes_to_the_same_bytes(backbone, headers, tmp_path):
    def run(name):
        return lambda: tune(backbone, headers, tmp_path / name, "8", settings=QUICK, **LORC)

    assert steps_of(run("whole")) == 12
    steps_of(run("killed"), kill_at=8)
    assert steps_of(run("killed")) == 5
    file = "train-8_seed-0.safetensors"
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    losses = pd.read_csv(tmp_path / "whole" / "train-8_seed-0.csv")
    assert losses.loss[1] < losses.loss[0]


@pytest.mark.parametrize(("compressor", "compensator"), [("beacon", None), ("lorc", "tocom_lm")])
def test_a_killed_learning_resumes_to_the_same_bytes(compressor, compensator, backbone, tmp_path):
    job = {"compressor": compressor, "compensator": compensator}

    def run(name):
        return lambda: teach(backbone, tmp_path / name, {"batch_size": 8, "images": 32, "held_out": 8}, **job)

    assert steps_of(run("whole")) == 8
    steps_of(run("killed"), kill_at=6)
    assert steps_of(run("killed")) == 3
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_beacons_that_were_learned_train_on_with_all_weights(backbone, headers, tmp_path):
    teach(
        backbone,
        tmp_path / "part",
        {"images": 16, "held_out": 8, "batch_size": 8},
        compressor="beacon",
        compensator=None,
    )
    part = load_part(tmp_path / "part", "compressor")
    job = LORC | {"compressor": "beacon", "max_degree": 4, "tuning": {"kind": "full", "degree": "random"}}
    path, about = tune(backbone, headers, tmp_path / "x", "random", learned=tmp_path / "part", settings=QUICK, **job)
    assert about["train_degree"] == "random"
    model, meta = load_model(path)
    lm, original = compress(model, meta, meta["compressor"], 2), load_model(backbone)[0]
    for name, value in part.state_dict().items():
        assert torch.equal(lm.compressor.state_dict()[name], value) == (name == "adapted"), name
    for name, value in original.named_parameters():
        assert not torch.equal(value, model.get_parameter(name)), name


def test_speed_is_measured_with_the_cost_that_cells_have(backbone, cells):
    settings = {"batch_size": 2, "repeats": 2, "warmup": 1, "device": "cpu", "training": True}
    job = ThroughputJob(
        methods={"lorc": False, "lorc_tocom": True}, compressor="lorc", degrees=(0, 8), settings=settings
    )
    rows = throughput(job, backbone, {"lorc_tocom": cells[3]})
    assert [row["image_size"] for row in rows] == [256] * 4
    assert all(row["train_images_per_second"] > 0 for row in rows)


def test_what_does_not_fit_is_refused(backbone, headers, digits, tmp_path):
    arrays, meta = load_arrays(headers)
    longer = {name: np.concatenate([text, text], axis=1) for name, text in arrays.items()}
    save_arrays(tmp_path / "longer", longer, meta)
    message = refusal(tune, backbone, tmp_path / "longer", tmp_path / "x", settings=QUICK, **LORC)
    assert "sequences of torch_headers have 512 bytes, the backbone's context 256" in message
    assert "does not read" in refusal(tune, "glyph_vit", headers, tmp_path / "x", settings=QUICK, **LORC)
    assert "is a task to classify" in refusal(tune, backbone, digits, tmp_path / "x", settings=QUICK, **LORC)
    for settings in ({"augmentation": "shift"}, {"source": str(tmp_path)}):
        message = refusal(teach, backbone, tmp_path / "part", settings, compressor="lorc", compensator="tocom_lm")
        assert "text is learned on as it is bundled" in message
    config = yaml.safe_load(LANGUAGE.read_text())
    config["methods"]["lorc"]["compressor"] = "tome"
    assert "tome is not for models that read text" in refusal(parse_study, config)
    config = yaml.safe_load(LANGUAGE.read_text()) | {"max_degree": 16}
    assert "goes up to 15" in refusal(parse_study, config)
