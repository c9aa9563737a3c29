"""The command line: errors of one line, nothing half-written, help that helps."""

import subprocess
import sys

import pytest
import torch

from tests.small import KWARGS
from tocom.cli import _json
from tocom.errors import TocomError
from tocom.models import create, save_model


def tocom(*words, **options):
    command = [sys.executable, "-m", "tocom.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def assert_one_line_error(result, *parts):
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert result.returncode == 1
    assert lines[-1].startswith("tocom: error: ")
    assert "Traceback" not in result.stderr
    assert len([line for line in lines if line.startswith("tocom: error: ")]) == 1
    for part in parts:
        assert part in lines[-1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_model(path, create("vit_tiny_patch16_224", KWARGS), "vit_tiny_patch16_224", KWARGS)
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    result = tocom("prepare", "digits", "--train", 32, "--val", 16, "--test", 16, "-o", path)
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "is no JSON object"), ("3", "is no JSON object"), ("{", "is not JSON")]
)
def test_kwargs_that_are_no_object(text, message):
    with pytest.raises(TocomError, match=message) as caught:
        _json(text, "--kwargs")
    assert "\n" not in str(caught.value)
    assert _json('{"depth": 2}', "--kwargs") == {"depth": 2}


def finetune(backbone, data, output, *more):
    quick = ["--set", "epochs=2", "--set", "device=cpu"]
    return tocom("finetune", backbone, data, "-o", output, *quick, *(more or ("--at", "0:0")))


def test_an_unknown_key_in_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("study: c\nsedes: [1]\n")
    assert_one_line_error(tocom("check", tmp_path / "c.yaml"), "unknown key 'sedes'", "'seeds'")


def test_a_degree_out_of_range(backbone, digits, tmp_path):
    assert_one_line_error(finetune(backbone, digits, tmp_path / "x", "--at", "often:0"), "--at 'often:0'")
    distilled = tmp_path / "c"
    quick = ["--set", "epochs=1", "--set", "images=32", "--set", "held_out=16", "--set", "device=cpu"]
    assert tocom("distil", backbone, "-o", distilled, "--max-degree", 2, *quick).returncode == 0
    assert finetune(backbone, digits, tmp_path / "m").returncode == 0
    paths = ["--checkpoint", tmp_path / "m", "--compensator", distilled, "-o", tmp_path / "p"]
    assert_one_line_error(tocom("evaluate", digits, *paths, "--degree", 3), "degree 3 is out of range", "0 to 2")
    assert not (tmp_path / "p").exists()


def test_a_corrupt_checkpoint(backbone, digits, tmp_path):
    data = bytearray(backbone.read_bytes())
    data[-5] ^= 0xFF
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:500])
    for name in ("flipped", "short"):
        assert_one_line_error(finetune(tmp_path / name, digits, tmp_path / "out" / "x"), "corrupt")
    assert not (tmp_path / "out").exists()


def test_a_pickle_in_place_of_a_checkpoint(digits, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pth")
    assert_one_line_error(finetune(tmp_path / "model.pth", digits, tmp_path / "out" / "x"), "pickles can run code")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_turns_nan(backbone, digits, tmp_path):
    result = finetune(backbone, digits, tmp_path / "x", "--at", "0:0", "--set", "lr=1e30", "--set", "epochs=5")
    assert_one_line_error(result, "became nan", "lower the learning rate")
    assert not (tmp_path / "x").exists()


def test_a_disk_with_no_room_for_the_output(tmp_path):
    # A limit on the size of files makes the write itself fail, half way through.
    code = (
        "import resource, signal, sys, tocom.cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"sys.argv = ['tocom', 'prepare', 'digits', '-o', {str(tmp_path / 'x')!r}]\n"
        "tocom.cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert_one_line_error(result, "cannot write", "free some space")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_file_of_the_wrong_kind(backbone, digits, tmp_path):
    assert_one_line_error(finetune(tmp_path / "none", digits, tmp_path / "x"), "no such file")
    assert_one_line_error(finetune(digits, digits, tmp_path / "x"), "not a model")
    assert_one_line_error(finetune(backbone, backbone, tmp_path / "x"), "not a prepared task")


@pytest.mark.parametrize("output", ["{name}.safetensors", "same.safetensors"])
def test_an_output_that_cannot_hold_every_run(backbone, digits, tmp_path, output):
    assert_one_line_error(finetune(backbone, digits, tmp_path / output, "--at", "0:0", "--at", "0:1"), "--output")


def test_a_finetuned_model_can_be_inspected(backbone, digits, tmp_path):
    assert finetune(backbone, digits, tmp_path / "{degree}-{seed}", "--at", "0:0", "--at", "2:1").returncode == 0
    result = tocom("info", tmp_path / "2-1")
    assert result.returncode == 0
    assert "train_degree" in result.stdout


@pytest.mark.parametrize(
    "command", ["", "prepare", "pretrain", "finetune", "distil", "evaluate", "transfer", "throughput", "info", "models",
                "tasks", "settings", "check", "schema", "import", "card", "analyse"]
)  # fmt: skip
def test_every_command_has_help(command):
    from typer.testing import CliRunner

    from tocom.cli import app

    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert len(result.stdout) > 200


def test_help_and_the_list_of_tasks_do_not_wait_for_torch():
    code = "import sys, tocom.cli, tocom.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "mnist5k" in tocom("tasks").stdout
    assert "deit_base_patch16_224" in tocom("models", "deit_base*").stdout
    assert "trained_scale" in tocom("settings").stdout
