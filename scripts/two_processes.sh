#!/usr/bin/env bash
# Make the cells of the small study twice, with one process a training and with two that train together (torchrun,
# gloo), and compare them and everything that was trained byte for byte. Everything that it writes is gone afterwards.
#
#   bash scripts/two_processes.sh
#
# It needs the project's environment: an active one, or .venv.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=results/tiny
folder=$(mktemp -d "${TMPDIR:-/tmp}/tocom-processes.XXXXXX")
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

# Say what went wrong in one line, and leave.
fail() {
  echo "two_processes.sh: error: $*" >&2
  exit 1
}

# Print the small study with micro-batches of half a batch: they, not the processes, have the random states.
study() {
  sed -E '/^(learn|finetune):/s/batch_size: 32/&, micro_batch_size: 16/' "$project/tests/configs/tiny.yaml"
}

# Make the cells in a folder of their own, and say how far it is and how long it took: run PROCESSES
run() {
  local place=$folder/$1 began=$SECONDS
  echo "trainings of $1 process(es):"
  mkdir "$place"
  cp -r "$project"/{Snakefile,workflow,profiles,config} "$place"
  study > "$place/study.yaml"
  (cd "$place" && snakemake --cores 2 --configfile study.yaml --set-resources "learn:processes=$1" \
    "finetune:processes=$1" --set-threads "learn=$1" "finetune=$1" -- "$results/cells.csv") 2>&1 | tee "$place/run.log" |
    grep --line-buffered -E '^ *[0-9]+/[0-9]+ ' || {
    tail -n 40 "$place/run.log" >&2
    fail "the run with $1 process(es) failed; its last lines are above"
  }
  echo "$((SECONDS - began)) s"
}

# Print how many jobs of a run torchrun started with PROCESSES each, as it says itself: together PROCESSES
together() {
  { grep -rlE "nproc_per_node +: $1$" "$folder/$1/$results/logs" || true; } | wc -l
}

[[ ! -d $project/.venv/bin ]] || type -P tocom > /dev/null || export PATH="$project/.venv/bin:$PATH"
type -P snakemake tocom > /dev/null ||
  fail "snakemake or tocom is not on PATH; run 'make test' once, or activate its environment"
(($(study | grep -c micro_batch_size) == 2)) || fail "tests/configs/tiny.yaml states no batch size of learn or finetune"

run 1
LOGLEVEL=INFO run 2 # torchrun then writes its settings to the jobs' logs
trainings=$(together 2)
((trainings > 0)) || fail "torchrun started no training of the second run"
# The CSVs beside models hold seconds, and the lists of sums the hashes of those.
for part in learned checkpoints cells.csv; do
  diff -r --exclude='*.csv' --exclude='*.sha256' --exclude=SHA256SUMS "$folder/1/$results/$part" "$folder/2/$results/$part" >&2 ||
    fail "$part of one and of two processes differ, as shown above"
done
cells=$(($(wc -l < "$folder/2/$results/cells.csv") - 1))
echo "$trainings jobs trained with two processes; the models and the cells are identical ($cells of them)"
