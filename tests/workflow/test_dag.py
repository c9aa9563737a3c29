"""The workflow, for real, on the tiny study and the method of docs/add_a_method.md; then with mistakes in it."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from filelock import FileLock
from typer.testing import CliRunner

from tests.data.layouts import make_catalogue
from tests.small import refusal
from tests.workflow.faults import DAMAGES, Driver
from tests.workflow.running import LANGUAGE, ROOT, TINY, planned, snakemake, workplace
from tocom.analysis.cells import COLUMNS
from tocom.analysis.report import write_tables
from tocom.cli_analyse import app
from tocom.data.fetch import fetch
from tocom.data.store import folder_of, status
from tocom.errors import TocomError
from tocom.files import load_arrays, save_arrays
from tocom.study import read_study

pytestmark = pytest.mark.dag
EXAMPLE = (ROOT / "docs" / "add_a_method.md").read_text()


def analyse(*words):
    """Run `tocom analyse` in this process."""
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


def example(language):
    """Return the page's block of code in a language."""
    return re.search(rf"^```{language}\n(.*?)^```$", EXAMPLE, re.MULTILINE | re.DOTALL)[1]


def with_the_example(folder):
    """Put the page's file and entries where a user would; return the config."""
    (folder / re.search(r"`(\w+\.py)`", EXAMPLE)[1]).write_text(example("python"))
    config, added = yaml.safe_load(TINY.read_text()), yaml.safe_load(example("yaml"))
    config |= {"methods": config["methods"] | added["methods"], "compare": config["compare"] + added["compare"]}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "mine.yaml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """The tiny study with the example's method, run to its end once for all of xdist's workers; each has a copy."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "tiny"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            shared.mkdir()
            result = snakemake(workplace(shared), "--configfile", with_the_example(shared))
            assert result.returncode == 0, result.stdout + result.stderr
    return shutil.copytree(shared, base / "finished")


def test_a_run_leaves_every_cell_table_and_figure_of_its_methods(finished, monkeypatch):
    monkeypatch.chdir(finished)  # where the example's file is
    root, study = finished / "results" / "tiny", read_study(finished / "mine.yaml")
    cells = pd.read_csv(root / "cells.csv", dtype={"train_degree": str}, keep_default_na=False)
    assert tuple(cells.columns) == COLUMNS
    keys = ["method", "task", "seed", "train_degree", "infer_degree"]
    assert not cells.duplicated(keys).any()
    wanted = {
        (method, task, seed, train, infer)
        for method in study.methods
        for task in study.task_names
        for seed in study.seeds
        for train in study.train_degrees_of(method)
        for infer in study.infer_degrees_of(method)
    }
    assert set(cells[keys].itertuples(index=False, name=None)) == wanted
    assert (cells.score == cells.correct / cells.n).all()
    assert {"norm", "norm_tocom"} < set(cells.method)
    tests = pd.read_csv(root / "significance.csv")
    assert set(zip(tests.before, tests.after, strict=True)) == set(study.compare)
    costs = pd.read_csv(root / "costs.csv")
    assert set(costs[["method", "what"]].itertuples(index=False, name=None)) == {
        *((method, "finetune") for method in study.methods),
        *((method, "learn compensator") for method, entry in study.methods.items() if entry.compensator),
    }
    assert (costs.seeds == 2).all()
    assert "not run" not in (root / "tables" / "costs.md").read_text()
    for name in ("main", "tasks", "significance", "costs", "throughput"):
        assert (root / "tables" / f"{name}.md").read_text().startswith("### ")
        assert "\\toprule" in (root / "tables" / f"{name}.tex").read_text()
    assert "norm pruning" in (root / "tables" / "main.md").read_text()
    for name in ("accuracy_vs_gflops", "gain_heatmap", "gap_transfer"):
        assert (root / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (root / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_example_needs_no_change_of_the_package_or_the_workflow(finished):
    """They are those of the checkout; what the page adds is one file and one config."""
    for name in ("Snakefile", "workflow"):
        result = subprocess.run(["diff", "-r", "-x", "__pycache__", ROOT / name, finished / name], check=False)
        assert result.returncode == 0
    assert not any("norm_pruning" in path.read_text() for path in (ROOT / "tocom").rglob("*.py"))


def test_nothing_is_left_to_do_after_a_run_and_every_job_left_a_log(finished):
    result = snakemake(finished, "--configfile", "mine.yaml", "--dry-run")
    assert "Nothing to be done" in result.stdout + result.stderr
    root = finished / "results" / "tiny"
    assert len(list((root / "logs").rglob("*.log"))) == len(list((root / "benchmarks").rglob("*.tsv"))) > 10
    assert [path for path in root.rglob(".*") if path.is_file() and path.name != ".snakemake_timestamp"] == []


def test_language_models_go_through_the_same_workflow(tmp_path):
    result = snakemake(workplace(tmp_path), "--configfile", LANGUAGE)
    assert result.returncode == 0, result.stdout + result.stderr
    root = tmp_path / "results" / "language"
    cells = pd.read_csv(root / "cells.csv", keep_default_na=False)
    assert tuple(cells.columns) == (*COLUMNS, "cache_bytes")
    sizes = cells.groupby(["method", "infer_degree"]).cache_bytes.unique()
    assert sizes["lorc_tocom", 12].tolist() == [65536 // 4]
    table = (root / "tables" / "main.md").read_text()
    assert table.startswith("### Perplexity against bytes of cache, LoRC")
    assert "16,384 (25 %)" in table
    assert "bytes of cache" in (root / "tables" / "main.tex").read_text()


def test_a_change_of_one_setting_reruns_only_what_depends_on_it(finished):
    config = yaml.safe_load((finished / "mine.yaml").read_text())
    config["evaluate"]["scales"] = [0, 1, 2]
    (finished / "changed.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rules = planned(finished, "--configfile", "changed.yaml")
    assert "evaluate" in rules
    assert not set(rules) & {"finetune", "learn", "prepare", "pretrain_backbone"}


def test_verify_passes_on_the_same_cells_and_fails_on_others(finished):
    root = finished / "results" / "tiny"
    (root / "reference").mkdir(exist_ok=True)
    shutil.copy(root / "cells.csv", root / "reference" / "cells.csv")
    result = snakemake(finished, "--configfile", "mine.yaml", "--", "verify")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "identical to the reference" in result.stdout + result.stderr
    cells = pd.read_csv(root / "cells.csv", keep_default_na=False)
    changed = cells.assign(accuracy=cells.accuracy + 0.2, score=cells.score + 0.2)
    changed.to_csv(root / "reference" / "cells.csv", index=False)
    result = snakemake(finished, "--configfile", "mine.yaml", "--", "verify")
    assert result.returncode != 0
    assert "differs from the reference" in result.stdout + result.stderr


def test_snakemakes_report_shows_the_tables_and_figures(finished):
    result = snakemake(finished, "--configfile", "mine.yaml", "--report", "report.html")
    assert result.returncode == 0, result.stderr
    page = (finished / "report.html").read_text()
    for word in ("main.html", "gain_heatmap.png", "cells.csv", "Holm-corrected"):
        assert word in page


def test_a_forced_fetch_keeps_what_was_fetched_and_what_is_registered(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    workplace(folder)
    names = ("cub200", "cifar100")
    catalogue = make_catalogue(tmp_path / "mirror", (tmp_path / "mirror").as_uri(), names)
    fetch("cub200", folder / "data", catalogue)
    mine = fetch("cifar100", tmp_path / "mine", catalogue)
    fetch("cifar100", folder / "data", catalogue, source=mine)
    targets = [f"data/{name}/.complete.json" for name in names]
    records = [(folder / target).read_bytes() for target in targets]
    words = ["--configfile", TINY, "--forceall", *targets]
    result = snakemake(folder, *words, environment={"TOCOM_CATALOGUE": str(catalogue)})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fetch cub200" in result.stderr
    assert [(folder / target).read_bytes() for target in targets] == records
    assert [status(name, folder / "data", catalogue) for name in names] == ["fetched", "registered"]
    assert folder_of("cifar100", folder / "data", catalogue) == mine


def test_a_study_that_faults_have_hit_notices_every_one_and_ends_as_it_was(finished, tmp_path):
    """The short form of `make faults`: of what is made last, because all that depends on it is made again, too.

    On one core, where jobs come in another order than in the run that it is compared with.
    """
    folder = shutil.copytree(finished, tmp_path / "hit")
    driver = Driver(folder, folder / "mine.yaml", {}, random.Random(0), cores=1)
    for kind in DAMAGES:
        driver.damage(kind, "predictions|transfer/|cells|harm|significance|tables/(main|tasks)|figures")
    driver.kill_jobs(2)
    driver.stop_snakemake("Snakemake killed with its jobs")
    driver.finish()
    assert driver.judge(finished / "results" / "tiny") == []
    assert len(driver.faults) >= 4
    assert [fault for fault in driver.faults if not (fault.recovered and (fault.noticed or fault.unread))] == []


def test_what_was_made_from_other_files_or_changed_is_refused_on_the_way_to_tables(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "mixed"))
    root = Path("results", "tiny")
    harm = (root / "harm.csv").read_bytes()
    (root / "harm.csv").write_bytes(harm.replace(b"tome", b"tomf", 1))
    assert f"{root / 'harm.csv'} does not match the hash" in refusal(write_tables, root, root / "tables")
    (root / "harm.csv").write_bytes(harm)
    # cells of one more evaluation than the tests were made of
    predictions = next((root / "predictions" / "tiny_vit" / "tome").rglob("*.safetensors"))
    arrays, about = load_arrays(predictions)
    save_arrays(predictions, arrays, about | {"note": "another"})
    assert analyse("cells", root, "-o", root / "cells.csv").exit_code == 0
    message = refusal(write_tables, root, root / "tables")
    assert f"from two states of {predictions}" in message
    # predictions of another config
    about["made"]["job"]["settings"]["precision"] = "bf16"
    save_arrays(predictions, arrays, about)
    with pytest.raises(TocomError, match="settings.precision is .bf16., not"):
        analyse("cells", root, "-o", root / "cells.csv")


def test_a_failing_job_leaves_no_output_and_its_reason_is_shown(finished, tmp_path):
    folder = workplace(tmp_path)
    shutil.copytree(finished / "results" / "tiny" / "backbones", folder / "results" / "tiny" / "backbones")
    backbone = next((folder / "results/tiny/backbones").glob("*.safetensors"))
    data = bytearray(backbone.read_bytes())
    data[-9] ^= 0xFF
    backbone.write_bytes(data)
    study = read_study(TINY)
    target = study.learned_file(study.backbones[0].name, "tocom", 1)
    result = snakemake(folder, "--configfile", TINY, "--", target)
    assert result.returncode != 0
    assert "tocom: error:" in result.stdout + result.stderr
    assert "is corrupt" in result.stdout + result.stderr
    assert not (folder / target).exists()
