"""Running the real workflow in a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY, SCENES, LANGUAGE = (ROOT / "tests" / "configs" / f"{name}.yaml" for name in ("tiny", "scenes", "language"))
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def workplace(folder):
    """Copy what a run needs into an empty folder, so that runs do not see each other's results."""
    for name in ("Snakefile", "workflow", "profiles", "config"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def snakemake(folder, *words, cores=2, environment=None, timeout=1500):
    """Run Snakemake in a folder; return the finished process."""
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), *map(str, words)]
    env = ENVIRONMENT | (environment or {})
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def jobs(printed):
    """Return rule -> number of planned jobs, as a dry run prints them; the table may be printed twice."""
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", printed, re.MULTILINE)}


def planned(folder, *words):
    """Return the jobs of a dry run by rule, ``total`` among them."""
    result = snakemake(folder, *words, "--dry-run", "--quiet", "rules")
    assert result.returncode == 0, result.stdout + result.stderr
    return jobs(result.stdout)
