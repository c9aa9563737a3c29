"""Two at once, with real processes: the same study, studies that share a store, a training, a reader during a write."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.small import LEARN
from tests.workflow.running import ENVIRONMENT, ROOT, TINY, snakemake, workplace
from tocom.files import load_arrays, load_tensors, save_arrays
from tocom.study import read_study

BACKBONE = "backbones/tiny_vit.safetensors"


def start(folder, *words):
    """Start Snakemake in a folder."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)


@contextlib.contextmanager
def held(process, lock):
    """Wait until a process holds a lock, and stop it for the block, so that it does not end before others have come."""
    deadline = time.monotonic() + 600
    while not lock.exists():
        assert time.monotonic() < deadline, process.communicate()[0]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.dag
def test_a_second_run_of_a_study_is_told_so_in_one_line_and_disturbs_nothing(tmp_path):
    folder = workplace(tmp_path)
    words = ["--configfile", TINY, "--", f"results/tiny/{BACKBONE}"]
    first = start(folder, *words)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    workplace(elsewhere)
    (elsewhere / "results").symlink_to(folder / "results")  # another folder, the same results
    with held(first, folder / "results/tiny/.lock"):
        second = snakemake(folder, *words)
        third = snakemake(elsewhere, "--force", *words)  # the job of the first may be done by now
    assert first.wait(600) == 0, first.stdout.read()
    assert second.returncode != 0
    (line,) = [line for line in (second.stdout + second.stderr).splitlines() if "error" in line.lower()]
    assert line.startswith("tocom: error: another run in this folder makes the same files; wait for it")
    assert "--unlock" in line
    said = third.stdout + third.stderr
    assert third.returncode != 0
    assert said.count("tocom: error: another run makes files in results/tiny; start this one again") == 1
    assert load_tensors(folder / "results/tiny" / BACKBONE)[1]["kind"] == "model"
    assert list((folder / "results").rglob(".*")) == []
    again = snakemake(elsewhere, *words)  # what was refused left nothing in the way
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing to be done" in again.stdout + again.stderr


@pytest.mark.dag
def test_studies_in_two_folders_that_share_a_store_make_each_part_of_it_once(tmp_path):
    store, config = tmp_path / "store", yaml.safe_load(TINY.read_text())
    store.mkdir()
    folders, targets = {}, {}
    for name in ("one", "two"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        workplace(folders[name])
        (folders[name] / "store").symlink_to(store)
        (folders[name] / "mine.yaml").write_text(
            yaml.safe_dump(config | {"study": name, "store": "store"}, sort_keys=False)
        )
        study = read_study(folders[name] / "mine.yaml")
        targets[name] = study.learned_file("tiny_vit", "tocom", 0)
    assert targets["one"] == targets["two"]
    words = ["--configfile", "mine.yaml", "--", targets["one"]]
    first = start(folders["one"], *words)
    with held(first, store / ".lock"):
        second = snakemake(folders["two"], "--force", *words)
    assert second.returncode != 0
    said = second.stdout + second.stderr
    assert said.count("tocom: error: another run makes files in store; start this one again when it has ended") == 1
    assert "configs=[ONE.yaml,OTHER.yaml]" in said
    assert first.wait(600) == 0, first.stdout.read()
    made = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    again = snakemake(folders["two"], *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")} == made
    assert len(made) == 2
    other = yaml.safe_load((folders["two"] / "mine.yaml").read_text())
    other["pretrain"] = {**other.get("pretrain", {}), "weight_decay": 0.04}
    (folders["two"] / "other.yaml").write_text(yaml.safe_dump(other | {"study": "other"}, sort_keys=False))
    target = "results/other/checkpoints/tiny_vit/tome/digits/batch-0"
    third = snakemake(folders["two"], "--rerun-triggers", "mtime", "--configfile", "other.yaml", "--", target)
    assert third.returncode != 0
    said = third.stdout + third.stderr
    assert "tiny_vit.safetensors is of another config than other's: settings.weight_decay is 0.05, not 0.04" in said


@pytest.mark.dag
def test_names_of_folders_and_files_reach_no_shell(tmp_path):
    """A working folder, a checkpoint and a folder of data sets with all that a shell takes for more than a name."""
    folder = tmp_path / "a b'$(touch one)\"; -x `touch two`"
    folder.mkdir()
    workplace(folder)
    shutil.copy(ROOT / "tocom/assets/glyph_vit.safetensors", folder / "g $(touch three) 'q'.safetensors")
    backbone = {"name": "g", "checkpoint": "g $(touch three) 'q'.safetensors", "image_size": 32, "patch_size": 4}
    config = yaml.safe_load(TINY.read_text()) | {"backbones": [backbone], "tasks": ["digits", "cifar100"]}
    config |= {
        "methods": {"tome": {}},
        "compare": [],
        "data": {"root": "d $(touch four) 'q'; x", "val": 32, "train": 64, "test": 60},
        "transfer": False,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = {path.name for path in folder.iterdir()}
    result = snakemake(folder, "--configfile", "mine.yaml", "--", "results/tiny/throughput/g/tome.csv")
    assert result.returncode == 0, result.stdout + result.stderr
    mirror, target = {"TOCOM_MIRROR": "ftp://none"}, "results/tiny/data/cifar100.safetensors"  # refused at once
    result = snakemake(folder, "--configfile", "mine.yaml", "--", target, environment=mirror)
    assert result.returncode != 0
    assert "the mirror 'ftp://none' is not a URL" in result.stdout + result.stderr
    assert {path.name for path in folder.iterdir()} - before <= {".snakemake", "results", "d $(touch four) 'q'; x"}
    assert not {"one", "two", "three", "four"} & {path.name for path in tmp_path.rglob("*")}


@pytest.mark.dag
def test_a_folder_with_braces_in_its_name_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "a{b}"
    folder.mkdir()
    result = snakemake(workplace(folder), "--configfile", TINY, "--dry-run")
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "has braces in its path, which Snakemake takes for wildcards; rename it" in said
    assert "Traceback" not in said


def test_two_trainings_into_one_file_give_what_one_gives(backbone, tmp_path):
    """The second waits, goes on from the states of the first, or starts anew: the same numbers."""
    code = (
        "import json, sys; from tocom.jobs import LearnJob; from tocom.stages.learn import learn;"
        "learn(LearnJob(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])"
    )
    job = yaml.safe_dump({"max_degree": 4, "settings": LEARN}, default_flow_style=True, width=10**6)
    job = str(yaml.safe_load(job)).replace("'", '"')

    def run(output):
        command = [sys.executable, "-c", code, job, str(backbone), str(output)]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)

    alone, both = run(tmp_path / "alone"), [run(tmp_path / "both") for _ in range(2)]
    for process in (alone, *both):
        errors = process.communicate(timeout=1000)[1]
        assert process.returncode == 0, errors
    wanted, found = (load_tensors(tmp_path / name) for name in ("alone", "both"))
    assert wanted[1]["sha256"] == found[1]["sha256"]
    left = [f"{name}{ending}" for name in ("alone", "both") for ending in ("", ".csv", ".sha256")]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_reader_during_writes_sees_one_whole_file_or_the_other(tmp_path):
    import numpy as np

    path = tmp_path / "x.safetensors"
    code = (
        "import sys, numpy as np; from tocom.files import save_arrays\n"
        "for n in range(300): save_arrays(sys.argv[1], {'x': np.full(100_000, n % 2)}, {'n': n % 2})"
    )
    save_arrays(path, {"x": np.zeros(100_000)}, {"n": 0})
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    seen = set()
    while writer.poll() is None:
        arrays, about = load_arrays(path)
        assert (arrays["x"] == about["n"]).all()
        seen.add(about["n"])
    assert writer.returncode == 0
    assert seen == {0, 1}
    assert list(tmp_path.iterdir()) == [path]
