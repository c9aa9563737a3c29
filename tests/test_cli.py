"""The command line: every stage as a command, one-line errors with status 1, nothing half-written, help that helps."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.data.disk import file_limit
from tests.small import ARCHITECTURE, KWARGS, LEARN, QUICK, tune
from tocom import cli
from tocom.files import load_arrays, load_tensors
from tocom.methods import PARTS

COMMANDS = ["prepare", "backbone", "pretrain", "learn", "finetune", "evaluate", "transfer", "throughput", "benchmark",
            "import", "info", "models", "methods", "tasks", "settings", "check", "schema", "study", "plan", "data",
            "analyse", "init", "serve-bench", "export"]  # fmt: skip
TUNE = json.dumps({"settings": QUICK, "max_degree": 4})


def tocom(*words):
    """Run the program in this process; return its exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tocom", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), err.getvalue()


def works(*words):
    status, out, err = tocom(*words)
    assert status == 0, err
    return out


def fails(*words):
    """Return the one line that the program ends with."""
    status, out, err = tocom(*words)
    lines = [line for line in err.splitlines() if line.startswith("tocom: error: ")]
    assert (status, len(lines), err.splitlines()[-1]) == (1, 1, lines[-1]), err
    return lines[0]


def finetune(backbone, data, output, *more):
    return ["finetune", TUNE, "--backbone", backbone, "--data", data, "-o", output, *more]


def test_an_error_of_the_real_program_is_one_line_without_a_traceback(tmp_path):
    (tmp_path / "c.yaml").write_text("study: c\nsedes: [1]\n")
    command = [sys.executable, "-m", "tocom.cli", "check", tmp_path / "c.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("tocom: error: ")
    assert "unknown key 'sedes' (did you mean 'seeds'?)" in result.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys, tocom.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the stages, one after another ------------------------------------------------------------------------------------


def test_a_study_by_hand_from_images_to_cells(backbone, tmp_path):
    data, models, part, cells = (tmp_path / name for name in ("digits", "models", "part", "cells"))
    sizes = [f"--set=data.{split}={n}" for split, n in (("train", 64), ("val", 32), ("test", 40))]
    works("prepare", '{"task": "digits"}', "-o", data, *sizes)
    works("learn", json.dumps({"max_degree": 4, "settings": LEARN}), "--backbone", backbone, "-o", part)
    checkpoints = "--set=checkpoints=" + json.dumps([["0", 0], ["4", 0]])
    works(*finetune(backbone, data, models, checkpoints))
    job = {"settings": {"device": "cpu", "scales": [0, 1]}}
    job["methods"] = {"tome": {"infer_degrees": [0, 4]}, "tocom": {"infer_degrees": [4], "compensated": True}}
    added = ["--compensator", f"tocom={part}"]
    works("evaluate", json.dumps(job), "--checkpoint", models, "--data", data, *added, "-o", cells)
    predicted = load_arrays(cells)[1]["cells"]
    assert [(c["train_degree"], c["method"], c["infer_degree"]) for c in predicted] == [
        (label, *cell) for label in "04" for cell in (("tome", 0), ("tome", 4), ("tocom", 4))
    ]
    gap = json.dumps({"low": "0", "high": "4", "seeds": [0], "settings": {"device": "cpu"}})
    works("transfer", gap, "--data", f"digits={data}", "--checkpoints", f"digits={models}", "-o", tmp_path / "t.csv")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3
    speed = {"settings": {"device": "cpu", "batch_size": 2, "repeats": 2, "warmup": 1}, "degrees": [4]}
    speed = json.dumps(speed | {"methods": {"tome": False, "tocom": True}})
    works("throughput", speed, "--backbone", backbone, *added, "-o", tmp_path / "s.csv")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 3
    assert "--compensator tocom=FILE" in fails("throughput", speed, "--backbone", backbone, "-o", tmp_path / "no")
    works(
        "learn", json.dumps({"max_degree": 4, "seed": 1, "settings": LEARN}), "--backbone", backbone, "-o", f"{part}1"
    )
    both = [*added, "--compensator", f"tocom={part}1"]
    works("evaluate", json.dumps(job), "--checkpoint", models, "--data", data, *both, "-o", cells)
    assert {c["compensator_seed"] for c in load_arrays(cells)[1]["cells"] if c["compensated"]} == {0}
    assert "give one" in fails("throughput", speed, "--backbone", backbone, *both, "-o", tmp_path / "no")
    assert "write NAME=VALUE" in fails("throughput", speed, "--backbone", backbone, "-o", "no", "--compensator", part)
    assert "no checkpoint train-0_seed-0" in fails(
        "transfer", gap, "--data", f"digits={data}", "--checkpoints", f"digits={tmp_path}", "-o", tmp_path / "no"
    )
    above = "--set=methods.tocom.infer_degrees=[5]"
    files = ["--checkpoint", models, "--data", data, *added, "-o", tmp_path / "no"]
    assert "degree 5 is out of range" in fails("evaluate", json.dumps(job), above, *files)
    assert not (tmp_path / "no").exists()
    assert "train_degree" in works("info", models / "train-4_seed-0.safetensors")


def test_a_model_is_served_and_exported(backbone, digits, compensator, tmp_path):
    model, _ = tune(backbone, digits, tmp_path)
    curve, out = tmp_path / "curve.csv", tmp_path / "serving"
    curve.write_text("degree,batch_size,seconds\n0,4,0.4\n4,4,0.2\n")
    files = ["--checkpoint", model, "--data", digits, "--compensator", f"tocom={compensator}", "--curve", curve]
    sets = ["--set=degrees=[0,4]", "--set=evaluate.device=cpu", "--set=settings.phases=[[9,0.5],[9,1.5]]"]
    printed = works("serve-bench", *files, *sets, "--set=settings.batch_size=4", "-o", out)
    assert printed.rstrip("\n") == (out / "serving.md").read_text().rstrip("\n")
    assert "unknown key 'settings.phase'" in fails(
        "serve-bench", *files, "--set=settings.phase=1", "-o", tmp_path / "no"
    )
    export = ["export", model, "--compensator", compensator, "--degree"]
    status, _, said = tocom(*export, 4, "-o", tmp_path / "model.pt2")
    assert status == 0
    assert "degree 4, largest difference" in said
    assert "degree 5 is out of range" in fails(*export, 5, "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_backbones_are_imported_and_pre_trained(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    job = {"architecture": f"{ARCHITECTURE}.augreg_in21k", "kwargs": KWARGS, "weights": str(tmp_path / "w.pth")}
    assert "does not fit" in fails("backbone", json.dumps(job), "-o", tmp_path / "b")
    quick = {"epochs": 1, "images": 16, "held_out": 8, "batch_size": 8, "threads": 1, "device": "cpu"}
    quick["warmup_epochs"] = 0
    job = {"architecture": ARCHITECTURE, "kwargs": KWARGS, "settings": quick}
    works("pretrain", json.dumps(job), "-o", tmp_path / "p")
    assert load_tensors(tmp_path / "p")[1]["kind"] == "model"


def test_a_public_compensator_is_imported(make_compensator, tmp_path):
    torch.save({"model": make_compensator(dim=4).float().to_public()}, tmp_path / "p.pth")
    assert "compensator" in works("import", tmp_path / "p.pth", "-o", tmp_path / "c", "--steps", 6)
    assert "not a multiple of 5 steps" in fails("import", tmp_path / "p.pth", "-o", tmp_path / "d", "--steps", 5)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_degree_or_a_setting_out_of_range(backbone, digits, tmp_path):
    command = finetune(backbone, digits, tmp_path / "x")
    assert "train degree -1 is out of range" in fails(*command, '--set=checkpoints=[["-1", 0]]')
    assert "unknown key 'epoch' (did you mean 'epochs'?)" in fails(*command, "--set=settings.epoch=3")
    assert "unknown key 'ranks' (did you mean 'rank'?)" in fails(*command, '--set=tuning={"kind": "lora", "ranks": 1}')
    assert "did you mean 'evit'" in fails(*command, "--set=compressor=evitt")
    assert "is no JSON" in fails("finetune", "{", *command[2:])
    assert not (tmp_path / "x").exists()


def test_a_corrupt_checkpoint_a_pickle_and_files_of_the_wrong_kind(backbone, digits, tmp_path):
    data = bytearray(backbone.read_bytes())
    (tmp_path / "short").write_bytes(data[:500])
    data[-5] ^= 0xFF
    (tmp_path / "flipped").write_bytes(data)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pth")
    for wrong, cause in (("flipped", "corrupt"), ("short", "corrupt"), ("model.pth", "pickles can run code"),
                         ("none", "no such file"), (digits, "not a model")):  # fmt: skip
        assert cause in fails(*finetune(tmp_path / wrong, digits, tmp_path / "out"))
    assert "not a prepared task" in fails(*finetune(backbone, backbone, tmp_path / "out"))
    assert "is a task to classify, the job is one to segment" in fails(
        "finetune", '{"task_kind": "segment"}', *finetune(backbone, digits, tmp_path / "out")[2:]
    )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_turns_nan(backbone, digits, tmp_path):
    message = fails(*finetune(backbone, digits, tmp_path / "x", "--set=settings.lr=1e30", "--set=settings.epochs=5"))
    assert "became nan" in message
    assert "lower the learning rate" in message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_no_room_for_the_output(tmp_path):
    with file_limit(100_000):
        message = fails("prepare", '{"task": "digits"}', "-o", tmp_path / "x")
    assert "cannot write" in message
    assert "free some space" in message
    assert list(tmp_path.iterdir()) == []


# --- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command):
    assert len(works(*command.split(), "--help")) > 200


def test_lists_name_what_there_is():
    assert "mnist5k" in works("tasks")
    assert "deit_base_patch16_224" in works("models", "deit_base*")
    listed = works("methods")
    assert all(name in listed for names in PARTS.values() for name in names)
    assert "trained_scale" in works("settings")
    assert "trained_scale" in works("settings", "compensator.tocom")
    assert "did you mean 'finetune'" in fails("settings", "finetun")


def test_configs_are_checked_and_written_as_a_study(tmp_path):
    demo = yaml.safe_load((Path(__file__).parents[1] / "config" / "demo.yaml").read_text())
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo, sort_keys=False))
    assert "study 'demo' is valid: 4 methods, 20 checkpoints" in tocom("check", tmp_path / "demo.yaml")[2]
    works("study", json.dumps(demo), "-o", tmp_path / "study.json")
    assert json.loads((tmp_path / "study.json").read_text())["study"] == "demo"
    works("schema", "-o", tmp_path / "schema.json")
    assert "like" in (tmp_path / "schema.json").read_text()


def test_a_checkpoint_says_how_it_was_tuned(backbone, digits, tmp_path):
    path, _ = tune(backbone, digits, tmp_path / "x", "2", tuning="head")
    assert "head" in works("info", path)


@pytest.mark.parametrize(("after", "warns"), [(0.0091, True), (0.0059, True), (0.0012, False)])
def test_learning_that_ends_no_better_than_without_is_said_loudly(monkeypatch, after, warns):
    about = {"held_out_kl_without": 0.0059, "held_out_kl": after, "best_epoch": 1}
    monkeypatch.setattr("tocom.stages.learn.learn", lambda *_: about)
    _, _, said = tocom("learn", '{"max_degree": 4}', "--backbone", "glyph_vit", "--output", "unused")
    assert ("WARNING: it is no better than without" in said) == warns
