"""The rule `fetch` of the workflow: a forced run keeps data sets that are there."""

import subprocess
import sys

from tests.data.layouts import make_catalogue
from tests.workflow.test_workflow import ENVIRONMENT, TINY, workplace
from tocom.data.fetch import fetch, folder_of, status


def test_a_forced_run_keeps_what_was_fetched_and_what_is_registered(tmp_path):
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
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", TINY, "--forceall", *targets]
    environment = ENVIRONMENT | {"TOCOM_CATALOGUE": str(catalogue)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "localrule fetch:" in result.stderr or "rule fetch:" in result.stderr
    assert [(folder / target).read_bytes() for target in targets] == records
    assert [status(name, folder / "data", catalogue) for name in names] == ["fetched", "registered"]
    assert folder_of("cifar100", folder / "data", catalogue) == mine
