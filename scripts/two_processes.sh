#!/usr/bin/env bash
# Run the small DAG twice, with one process and with two that train together (torchrun, gloo), and compare the cells.
# Usage, in the activated environment: bash scripts/two_processes.sh
set -euo pipefail
project="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for processes in 1 2; do
  mkdir "$folder/$processes"
  cp -r "$project"/{Snakefile,workflow,profiles,config} "$folder/$processes"
  # The same micro-batches in both runs: they, not the processes, have the random states.
  python - "$project/tests/configs/tiny.yaml" "$processes" > "$folder/$processes/study.yaml" <<'PYTHON'
import sys

import yaml

with open(sys.argv[1]) as stream:
    config = yaml.safe_load(stream)
for stage in ("distil", "finetune"):
    config[stage]["micro_batch_size"] = 16
    config.setdefault("resources", {})[stage] = {"mem_mb": 4000, "runtime": 60, "processes": int(sys.argv[2])}
yaml.safe_dump(config, sys.stdout)
PYTHON
  echo "running with $processes process(es) ..."
  (cd "$folder/$processes" && snakemake --cores 2 --configfile study.yaml > run.log 2>&1) ||
    { tail -n 40 "$folder/$processes/run.log"; echo "the run with $processes process(es) failed"; exit 1; }
done
python - "$folder" <<'PYTHON'
import sys

import pandas as pd

one, two = (pd.read_csv(f"{sys.argv[1]}/{n}/results/tiny/cells.csv", keep_default_na=False) for n in (1, 2))
images = (one.correct - two.correct).abs()
print(f"{len(one)} cells; {int((images > 0).sum())} differ, by {int(images.max())} test images at most")
# Sums in another order may turn a prediction that hangs in the balance; nothing else may differ.
if list(one.columns) != list(two.columns) or len(one) != len(two) or images.max() > 1:
    sys.exit("the cells of one and of two processes differ")
print("the cells of one and of two processes are the same")
PYTHON
