#!/usr/bin/env bash
# Make the cells of the small study twice, with one process a training and with two that train together (torchrun,
# gloo), and compare them byte for byte. Everything that it writes is gone afterwards.
#
#   bash scripts/two_processes.sh
#
# It needs the project's environment: an active one, or .venv.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cells=results/tiny/cells.csv
folder=$(mktemp -d "${TMPDIR:-/tmp}/tocom-processes.XXXXXX")
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

# Say what went wrong in one line, and leave.
fail() {
  echo "two_processes.sh: error: $*" >&2
  exit 1
}

# Print the small study with so many processes a training. The micro-batches are the same in both runs: they, not the
# processes, have the random states.
study() {
  python - "$project/tests/configs/tiny.yaml" "$1" <<'PYTHON'
import sys

import yaml

with open(sys.argv[1]) as stream:
    config = yaml.safe_load(stream)
config["resources"] = {}
for stage in ("distil", "finetune"):
    config[stage]["micro_batch_size"] = config[stage]["batch_size"] // 2
    config["resources"][stage] = {"mem_mb": 4000, "runtime": 60, "processes": int(sys.argv[2])}
yaml.safe_dump(config, sys.stdout)
PYTHON
}

# Make the cells in a folder of their own, and say how far it is and how long it took: run PROCESSES
run() {
  local place=$folder/$1 began=$SECONDS
  echo "trainings of $1 process(es):"
  mkdir "$place"
  cp -r "$project"/{Snakefile,workflow,profiles,config} "$place"
  study "$1" > "$place/study.yaml"
  (cd "$place" && snakemake --cores 2 --configfile study.yaml -- "$cells") 2>&1 | tee "$place/run.log" |
    grep --line-buffered -E '^[0-9]+ of [0-9]+ steps' || {
    tail -n 40 "$place/run.log" >&2
    fail "the run with $1 process(es) failed; its last lines are above"
  }
  echo "$((SECONDS - began)) s"
}

# Print how many jobs of a run were started by torchrun: together PROCESSES
together() {
  grep -c "^Shell command: torchrun .*--nproc-per-node $1 " "$folder/$1/run.log" || true
}

[[ ! -d $project/.venv/bin ]] || type -P tocom > /dev/null || export PATH="$project/.venv/bin:$PATH"
type -P snakemake tocom torchrun > /dev/null ||
  fail "snakemake, tocom or torchrun is not on PATH; run 'make test' once, or activate its environment"

run 1
run 2
trainings=$(together 2)
((trainings > 0)) || fail "no training of the second run was started by torchrun"
cmp "$folder/1/$cells" "$folder/2/$cells" || {
  diff "$folder/1/$cells" "$folder/2/$cells" >&2 || true
  fail "the cells of one and of two processes differ, as shown above"
}
echo "$trainings trainings had two processes; the cells are identical ($(($(wc -l < "$folder/2/$cells") - 1)) of them)"
