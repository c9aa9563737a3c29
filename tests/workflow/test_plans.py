"""Every config of config/, planned: all studies in one dry run, with as many jobs as the arithmetic says."""

import json
import re
import shlex
import subprocess

import pytest
import yaml

from tests.workflow.running import ROOT, TINY, jobs, planned, snakemake, workplace
from tocom.jobs import Plan
from tocom.plan import jobs_by_rule
from tocom.study import read_config, read_study

pytestmark = pytest.mark.dag
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
STUDIES = [path for path in CONFIGS if "study" in read_config(path)]


def test_all_studies_are_planned_as_one_dag_with_the_jobs_that_the_arithmetic_says(tmp_path):
    folder = workplace(tmp_path)
    words = ["--config", f"configs=[{','.join(f'config/{path.name}' for path in STUDIES)}]"]
    found = planned(folder, *words)
    plan = Plan({path.name: read_config(path) for path in STUDIES})
    assert found.pop("total") == sum(found.values())
    assert found == jobs_by_rule(plan)
    # Counted once more, from the studies: what is trained is not shared, what is learned and imported is.
    checkpoints = sum(
        len(study.backbones) * len(study.tasks) * len(study.batches(tuned))
        for study in plan.studies.values()
        for tuned in study.tuned
    )
    assert found["finetune"] == found["evaluate"] == checkpoints
    assert found["prepare"] == sum(len(study.tasks) for study in plan.studies.values())


def test_the_studies_that_make_studies_runs_are_the_papers(tmp_path):
    listed = {
        path.removeprefix("config/").removesuffix(".yaml")
        for path in read_config(ROOT / "config/studies.yaml")["configs"]
    }
    papers = {path.stem for path in STUDIES if read_study(path).paper} - {"full"}
    assert listed == {name for name in papers if not name.startswith("full")}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sedes", [0], "unknown key 'sedes' (did you mean 'seeds'?)"),
        ("infer_degrees", [0, 9], "degree 9 is out of range"),
        ("methods", {"mine": {"compressor": "tomee"}}, "unknown compressor 'tomee' (did you mean 'tome'?)"),
    ],
)
def test_a_mistake_in_a_config_stops_the_workflow_with_its_name(tmp_path, key, value, message):
    folder = workplace(tmp_path)
    config = {k: v for k, v in yaml.safe_load(TINY.read_text()).items() if k not in (key, "compare")}
    (folder / "bad.yaml").write_text(yaml.safe_dump(config | {key: value}, sort_keys=False))
    result = snakemake(folder, "--configfile", "bad.yaml", "--dry-run")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert not (folder / "results").exists()


def test_a_key_given_twice_is_refused_also_where_snakemake_reads_the_config(tmp_path):
    folder = workplace(tmp_path)
    (folder / "twice.yaml").write_text(TINY.read_text() + "\nseeds: [3]\n")
    result = snakemake(folder, "--configfile", "twice.yaml", "--dry-run")
    assert result.returncode != 0
    assert "'seeds' is given twice" in result.stdout + result.stderr


def test_data_are_looked_at_before_anything_long_starts():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    priorities = dict(re.findall(r"^rule (\w+):\n(?:    .*\n|\n)*?    priority: (\d+)$", rules, re.MULTILINE))
    assert max(priorities, key=lambda rule: int(priorities[rule])) == "prepare"
    assert "learn" in priorities


def test_braces_and_quotes_in_names_reach_the_commands_as_they_are(tmp_path):
    folder = workplace(tmp_path)
    pets = folder / "my {pets} & 'co"
    config = yaml.safe_load(TINY.read_text()) | {"tasks": [{"name": "pets", "folder": str(pets), "group": "{g} 'x'"}]}
    (folder / "braces.yaml").write_text(yaml.safe_dump(config | {"transfer": False}, sort_keys=False))
    result = snakemake(folder, "--configfile", "braces.yaml", "--dry-run", "--printshellcmds")
    assert result.returncode == 0, result.stdout + result.stderr
    (study,) = [line for line in (result.stdout + result.stderr).splitlines() if "tocom study" in line]
    words = shlex.split(study.partition(":")[2].partition(" > ")[0])
    (task,) = json.loads(words[2])["tasks"]
    assert (task["folder"], task["group"]) == (str(pets), "{g} 'x'")


@pytest.mark.parametrize("target", ["all", "verify"])
def test_committed_results_are_not_passed_off_as_a_fresh_run(tmp_path, target):
    folder = workplace(tmp_path)
    listed = ["git", "ls-files", "results/demo"]
    committed = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert committed
    for name in committed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    result = snakemake(folder, "--dry-run", "--quiet", "rules", "--", target)
    assert result.returncode == 0, result.stderr
    assert {"learn", "finetune", "evaluate", "cells", "compare"} <= set(jobs(result.stdout))


def test_the_committed_run_is_the_one_that_verify_compares_with():
    root = ROOT / "results" / "demo"
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", root / "cells.csv"], cwd=ROOT, check=False).returncode:
        pytest.skip(
            "the demo was run here with other results than the committed ones; `snakemake verify` compares them"
        )
    assert (root / "cells.csv").read_bytes() == (root / "reference" / "cells.csv").read_bytes()
