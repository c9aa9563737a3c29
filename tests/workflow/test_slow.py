"""What is slow by nature (`make slow`): the workflow killed and resumed, all studies at once, Slurm, two processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.data.layouts import make_catalogue
from tests.workflow.running import ENVIRONMENT, ROOT, SCENES, TINY, snakemake, workplace
from tests.workflow.shrink import shrink
from tocom.study import read_config, read_study

pytestmark = pytest.mark.slow


def test_killed_and_resumed_on_one_core_it_gives_identical_cells(tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    for place in (undisturbed, folder):
        place.mkdir()
        workplace(place)
    result = snakemake(undisturbed, "--configfile", TINY)
    assert result.returncode == 0, result.stdout + result.stderr
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", str(TINY)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **silent)
    deadline = time.monotonic() + 300
    while not list(folder.glob("results/tiny/checkpoints/**/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("results/tiny/checkpoints/**/*.safetensors")), "nothing was made before the deadline"
    assert not (folder / "results/tiny/cells.csv").exists()
    snakemake(folder, "--configfile", TINY, "--unlock")
    result = snakemake(folder, "--configfile", TINY, cores=1)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("cells.csv", "significance.csv", "transfer.csv", "tables/main.md", "figures/gain_heatmap.png"):
        path = Path("results", "tiny", name)
        assert (folder / path).read_bytes() == (undisturbed / path).read_bytes(), name


def test_a_tiny_run_of_every_study_makes_a_complete_set_of_tables(tmp_path):
    folder = workplace(tmp_path)
    (tmp_path / "mirror").mkdir()
    catalogue = make_catalogue(tmp_path / "mirror", (tmp_path / "mirror").as_uri())
    names = [Path(path).name for path in read_config(ROOT / "config" / "studies.yaml")["configs"]]
    configs = []
    for name in names:
        if read_study(ROOT / "config" / name).task_kind == "classify":
            configs.append(folder / name)
            configs[-1].write_text(yaml.safe_dump(shrink(ROOT / "config" / name, tmp_path / "data"), sort_keys=False))
    configs.append(SCENES)  # stands in for the study of ADE20k
    listed = f"configs=[{','.join(map(str, configs))}]"
    result = snakemake(folder, "all", "overview", "--config", listed, environment={"TOCOM_CATALOGUE": str(catalogue)})
    assert result.returncode == 0, result.stdout + result.stderr
    for config in configs:
        study, root = read_study(config), folder / "results" / config.stem
        for table in ("main", "tasks", "significance", "costs", "throughput", "paper"):
            for kind in ("md", "tex", "html"):
                assert (root / "tables" / f"{table}.{kind}").stat().st_size > 0
        # Matched models are run only at the degrees that a study trains at.
        lines = (root / "tables" / "paper.md").read_text().splitlines()
        assert not [line for line in lines if "not run" in line and not line.startswith("| matched")], config.stem
        cells = pd.read_csv(root / "cells.csv", keep_default_na=False)
        assert set(cells.method) == set(study.methods)
        assert set(cells.backbone) == {backbone.name for backbone in study.backbones}
        assert set(cells.task) == set(study.task_names)
        assert cells.score.between(0, 1).all()
    overview = (folder / "results" / "overview.md").read_text()
    assert all(f"| {config.stem} " in overview for config in configs)
    assert "not run" not in overview


@pytest.mark.parametrize("script", ["two_processes.sh", "slurm.sh"])
def test_several_processes_and_a_real_slurm_give_the_same_cells(script):
    if script == "slurm.sh" and os.environ.get("TOCOM_TEST_SLURM") != "1":
        pytest.skip("TOCOM_TEST_SLURM=1 runs a real Slurm, which needs root")
    command = ["bash", ROOT / "scripts" / script]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"the cells are identical \(\d+ of them\)", result.stdout)
