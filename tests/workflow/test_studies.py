"""Every study of config/: its plan has as many jobs as the arithmetic says, and a tiny run makes all of its tables."""

import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.data.layouts import make_catalogue
from tests.workflow.shrink import shrink
from tests.workflow.test_workflow import ENVIRONMENT, snakemake, workplace
from tocom import plan
from tocom.config import read_study
from tocom.data.catalogue import read_catalogue

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "tests" / "configs" / "scenes.yaml"
#: Study -> data sets that are downloaded, ImageNet-1k to distil on included.
DOWNLOADS = {
    "cifar100": 2,
    "fgvc": 5,
    "vtab1k": 2,
    "backbones": 2,
    "compressors": 2,
    "speedup": 2,
    "ablations": 3,
    "gap_transfer": 6,
    "full": 7,
}


def planned(folder, name):
    """Return the jobs of a dry run by rule, numbered rules summed, and their total."""
    result = snakemake(folder, "--configfile", f"config/{name}.yaml", "--dry-run", "--quiet", "rules")
    assert result.returncode == 0, result.stdout + result.stderr
    counts = Counter()
    # The table is printed twice.
    for rule, count in dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE)).items():
        counts[re.sub(r"_\d+$", "", rule)] += int(count)
    return counts


def check_jobs(jobs, name, total):
    """Compare a dry run with the arithmetic of this file and, rule by rule, with that of `tocom plan`."""
    assert jobs.pop("total") == total
    assert jobs == plan.jobs(read_study(ROOT / "config" / f"{name}.yaml"), read_catalogue())


def expected(name):
    """Count a study's jobs from its raw config."""
    config = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    models = len(config["backbones"]) * len(config.get("compressors", ["tome"]))
    variants = config.get("compensators", {"tocom": {}})
    distilled = len({str(sorted((k, v) for k, v in changes.items() if k != "scales")) for changes in variants.values()})
    checkpoints = len(config["train_degrees"]) * len(config["seeds"]) * len(config["tasks"]) * models
    transfer = config.get("transfer", False)
    once = (
        "gather_throughput",
        *["gather_transfer"] * transfer,
        "cells",
        "significance",
        "tables",
        "paper_table",
        "figures",
        "all",
    )
    return (
        DOWNLOADS[name]
        + len(config["tasks"])
        + len(config["backbones"])
        + models * distilled
        + 2 * checkpoints
        + models * (2 if transfer else 1)  # throughput and transfer
        + len(once)
    )


@pytest.mark.parametrize("name", [name for name in DOWNLOADS if name != "full"])
def test_a_study_plans_as_many_jobs_as_the_arithmetic_says(tmp_path, name):
    check_jobs(planned(workplace(tmp_path), name), name, expected(name))


def test_the_segmentation_study_plans_its_jobs(tmp_path):
    config = yaml.safe_load((ROOT / "config" / "ade20k.yaml").read_text())
    runs = len(config["train_degrees"]) * len(config["seeds"])
    once = ("import_backbone", "distil", "segment_prepare", "segment_table", "throughput", "gather_throughput", "all")
    check_jobs(planned(workplace(tmp_path), "ade20k"), "ade20k", 2 + 2 * runs + len(once))


def test_the_largest_study_is_planned_within_a_minute_and_two_gigabytes(tmp_path):
    folder = workplace(tmp_path)
    study = read_study(folder / "config" / "full.yaml")
    assert (len(study.tasks), len(study.train_degrees), len(study.seeds)) == (24, 17, 3)
    start = time.monotonic()
    jobs = planned(folder, "full")
    elapsed = time.monotonic() - start
    largest_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    assert expected("full") == 24 * 17 * 3 * 2 + 24 + 7 + 10
    check_jobs(jobs, "full", expected("full"))
    assert elapsed < 60
    assert largest_mb < 2000


def joint(folder, configs, *words, **environment):
    """Run the DAG of several studies."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/joint.smk", "--cores", "2", *words]
    if configs:
        command += ["--config", f"configs=[{','.join(map(str, configs))}]"]
    settings = {"capture_output": True, "text": True, "timeout": 1500}
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, **settings)


def test_the_joint_target_plans_every_study_once(tmp_path):
    result = joint(workplace(tmp_path), [], "--dry-run", "--quiet", "rules")
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE)}
    joined = set(DOWNLOADS) - {"full"} | {"ade20k"}
    studies = {name: yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()) for name in joined}
    others = {path.stem for path in (ROOT / "config").glob("*.yaml")} - joined
    assert all(f"{name}_throughput" in counts for name in joined)
    assert not any(f"{name}_throughput" in counts for name in others)
    made = {backbone["name"] for name in joined for backbone in studies[name]["backbones"]}
    assert sum(n for rule, n in counts.items() if rule.endswith("_import_backbone")) == len(made)
    # cifar100, four of FGVC, VTAB-1k, ImageNet-1k and ADE20k.
    assert sum(n for rule, n in counts.items() if rule.endswith("_fetch")) == 8
    checkpoints = {
        name: len(c["train_degrees"])
        * len(c["seeds"])
        * len(c.get("tasks", [0]))
        * len(c["backbones"])
        * len(c.get("compressors", [0]))
        for name, c in studies.items()
    }
    trained = {rule: n for rule, n in counts.items() if re.search(r"_finetune_\d+$|_segment_train$", rule)}
    assert sum(trained.values()) == sum(checkpoints[name] for name in joined)


def test_a_tiny_run_of_every_study_makes_a_complete_set_of_tables(tmp_path):
    folder = workplace(tmp_path)
    (tmp_path / "mirror").mkdir()
    catalogue = make_catalogue(tmp_path / "mirror", (tmp_path / "mirror").as_uri())
    configs = [folder / f"{name}.yaml" for name in DOWNLOADS if name != "full"]
    for config in configs:
        # In the order of the study's own config: the first variant of ToCom is the main one.
        config.write_text(yaml.safe_dump(shrink(ROOT / "config" / config.name, tmp_path / "data"), sort_keys=False))
    result = joint(folder, [*configs, SCENES], TOCOM_CATALOGUE=str(catalogue))
    assert result.returncode == 0, result.stdout + result.stderr
    for config in (*configs, SCENES):
        study, root = read_study(config), folder / "results" / config.stem
        assert len(study.table_names) > 0
        for table in study.table_names:
            for kind in ("md", "tex", "html"):
                assert (root / "tables" / f"{table}.{kind}").stat().st_size > 0
        paper = root / "tables" / ("segmentation.md" if study.segmentation else "paper.md")
        assert "not run" not in paper.read_text().replace("not run here", ""), config.stem
    for config in configs:
        study, root = read_study(config), folder / "results" / config.stem
        cells = pd.read_csv(root / "cells.csv", keep_default_na=False)
        assert set(cells.compensator) == {"none", *study.variants}
        assert study.variants[0] == "tocom"
        assert set(cells.backbone) == {backbone.name for backbone in study.backbones}
        assert set(cells.compressor) == set(study.compressors)
        assert set(cells.task) == set(study.task_names)
    check_scenes(folder / "results" / "scenes")
    overview = (folder / "results" / "overview.md").read_text()
    assert all(f"| {config.stem} " in overview for config in (*configs, SCENES))
    assert "not run" not in overview


def check_scenes(root):
    """Check the cells and the tables of the segmentation study."""
    study = read_study(SCENES)
    cells = pd.read_csv(root / "segmentation.csv", keep_default_na=False)
    assert len(cells) == len(study.seeds) * len(study.train_degrees) * len(study.infer_degrees) * 2  # with, without
    assert cells.miou.between(0, 100).all()
    assert (cells.miou_low <= cells.miou).all()
    assert (cells.miou <= cells.miou_high).all()
    assert "\\toprule" in (root / "tables" / "segmentation.tex").read_text()
    speed = pd.read_csv(root / "throughput.csv")
    assert set(speed.infer_degree) == {0, *study.infer_degrees}
