"""The DAG, for real, on a tiny config: whole, interrupted and resumed, twice, and with mistakes in it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from tocom.analysis.cells import COLUMNS
from tocom.config import read_study

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def workplace(folder):
    """Copy what a run needs into an empty folder, so that runs do not see each other's results."""
    for name in ("Snakefile", "workflow", "profiles", "config"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def snakemake(folder, *words, cores=2, **options):
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), *map(str, words)]
    settings = {"capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, **settings)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """The tiny study, run to its end once for all of xdist's workers, each of which has a copy."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "tiny"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            shared.mkdir()
            result = snakemake(workplace(shared), "--configfile", TINY)
            assert result.returncode == 0, result.stdout + result.stderr
    return shutil.copytree(shared, base / "finished")


def test_a_run_leaves_everything_that_the_config_asks_for(finished):
    root = finished / "results" / "tiny"
    study = read_study(TINY)
    cells = pd.read_csv(root / "cells.csv")
    assert tuple(cells.columns) == COLUMNS
    fixed = len(study.fixed_train_degrees) * 2 + 1  # plain and compensated, and the rival without ToCom
    assert len(cells) == len(study.tasks) * len(study.seeds) * len(study.infer_degrees) * fixed
    assert (cells.accuracy == cells.correct / cells.n).all()
    assert not cells.duplicated(["task", "seed", "train_degree", "infer_degree", "compensated"]).any()
    for name in study.csv_names:
        assert len(pd.read_csv(root / f"{name}.csv")) > 0
    for name in study.table_names:
        assert (root / "tables" / f"{name}.md").read_text().startswith("### ")
        assert "\\toprule" in (root / "tables" / f"{name}.tex").read_text()
    for name in study.figure_names:
        assert (root / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (root / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_nothing_is_left_to_do_after_a_run(finished):
    result = snakemake(finished, "--configfile", TINY, "--dry-run")
    assert "Nothing to be done" in result.stdout + result.stderr


def test_every_job_left_a_log_and_a_benchmark_and_no_temporary_file(finished):
    root = finished / "results" / "tiny"
    assert len(list((root / "logs").rglob("*.log"))) == len(list((root / "benchmarks").rglob("*.tsv")))
    assert [path for path in root.rglob(".*") if path.is_file()] == []


def test_a_change_of_one_setting_reruns_only_what_depends_on_it(finished, tmp_path):
    text = TINY.read_text().replace("scales: [0, 1]", "scales: [0, 1, 2]")
    (tmp_path / "changed.yaml").write_text(text)
    result = snakemake(finished, "--configfile", tmp_path / "changed.yaml", "--dry-run")
    planned = {line.split()[0] for line in result.stdout.splitlines() if line[:1].isalpha() and line[-1:].isdigit()}
    assert "evaluate_0" in planned
    assert not planned & {"finetune_0", "distil", "prepare", "pretrain_backbone"}


def test_killed_and_resumed_on_one_core_it_gives_identical_cells(finished, tmp_path):
    folder = workplace(tmp_path)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", str(TINY)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
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
        assert (folder / path).read_bytes() == (finished / path).read_bytes(), name


def test_verify_passes_on_the_same_cells_and_fails_on_others(finished):
    root = finished / "results" / "tiny"
    (root / "reference").mkdir(exist_ok=True)
    shutil.copy(root / "cells.csv", root / "reference" / "cells.csv")
    result = snakemake(finished, "--configfile", TINY, "--", "verify")
    assert result.returncode == 0
    assert "identical to the reference" in result.stdout + result.stderr
    cells = pd.read_csv(root / "cells.csv")
    cells.assign(accuracy=cells.accuracy + 0.2).to_csv(root / "reference" / "cells.csv", index=False)
    result = snakemake(finished, "--configfile", TINY, "--", "verify")
    assert result.returncode != 0
    assert "differs from the reference" in result.stdout + result.stderr


def test_snakemakes_report_shows_the_tables_and_figures(finished):
    result = snakemake(finished, "--configfile", TINY, "--report", "report.html")
    assert result.returncode == 0, result.stderr
    page = (finished / "report.html").read_text()
    for word in ("main.html", "gain_heatmap.png", "cells.csv", "Holm-corrected"):
        assert word in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sedes: [0]", "unknown key 'sedes' (did you mean 'seeds'?)"),
        ("infer_degrees: [0, 9]", "degree 9 is out of range"),
    ],
)
def test_a_mistake_in_a_config_stops_the_workflow_with_its_name(tmp_path, line, message):
    folder = workplace(tmp_path)
    key = line.split(":")[0]
    kept = [text for text in TINY.read_text().splitlines() if not text.startswith(key)]
    (folder / "bad.yaml").write_text("\n".join([*kept, line]))
    result = snakemake(folder, "--configfile", "bad.yaml", "--dry-run")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert not (folder / "results").exists()


def test_a_failing_job_leaves_no_output_and_its_reason_is_shown(finished, tmp_path):
    folder = workplace(tmp_path)
    shutil.copytree(finished / "results" / "tiny" / "data", folder / "results" / "tiny" / "data")
    shutil.copytree(finished / "results" / "tiny" / "backbones", folder / "results" / "tiny" / "backbones")
    backbone = next((folder / "results/tiny/backbones").glob("*.safetensors"))
    data = bytearray(backbone.read_bytes())
    data[-9] ^= 0xFF
    backbone.write_bytes(data)
    target = "results/tiny/compensators/tiny_vit/tome/tocom.safetensors"
    result = snakemake(folder, "--configfile", TINY, "--", target)
    assert result.returncode != 0
    assert "tocom: error:" in result.stdout + result.stderr
    assert "is corrupt" in result.stdout + result.stderr
    assert not (folder / target).exists()


def test_the_demo_plans_as_many_jobs_as_the_arithmetic_says(tmp_path):
    folder = workplace(tmp_path)
    study = read_study(folder / "config" / "demo.yaml")
    result = snakemake(folder, "--dry-run", "--quiet", "rules")
    total = next(int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("total"))
    for_each_task = ["prepare", *["finetune", "evaluate"] * len(study.batches)]
    once = [
        "distil",
        "transfer",
        "throughput",
        "gather_throughput",
        "gather_transfer",
        "cells",
        "significance",
        "tables",
        "figures",
    ]
    assert total == len(study.tasks) * len(for_each_task) + len([*once, "all"])


@pytest.mark.parametrize("target", ["all", "verify"])
def test_committed_results_are_not_passed_off_as_a_fresh_run(tmp_path, target):
    folder = workplace(tmp_path)
    committed = subprocess.run(
        ["git", "ls-files", "results/demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert committed
    for name in committed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    result = snakemake(folder, "--dry-run", "--quiet", "rules", "--", target)
    assert result.returncode == 0, result.stderr
    for rule in ("distil", "finetune_0", "evaluate_0", "cells", "significance"):
        assert f"{rule} " in result.stdout


def test_the_committed_run_is_the_one_that_verify_compares_with():
    root = ROOT / "results" / "demo"
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", root / "cells.csv"], cwd=ROOT, check=False).returncode:
        pytest.skip(
            "the demo was run here with other results than the committed ones; `snakemake verify` compares them"
        )
    assert (root / "cells.csv").read_bytes() == (root / "reference" / "cells.csv").read_bytes()
