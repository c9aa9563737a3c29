#!/usr/bin/env bash
# Start a real Slurm of one node on this machine, run the small study both locally and through profiles/slurm, and
# compare the cells and everything that was trained byte for byte. Everything that it starts or writes is gone afterwards,
# installed packages excepted.
#
#   bash scripts/slurm.sh
#
# It needs root only to install Debian's packages, and the project's environment: an active one, or .venv.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
study=tests/configs/tiny.yaml
results=results/tiny
cpus=2
folder=$(mktemp -d "${TMPDIR:-/tmp}/tocom-slurm.XXXXXX")
# shellcheck source=scripts/slurm/cluster.sh
source "$project/scripts/slurm/cluster.sh"

finish() {
  local status=$?
  trap - EXIT INT TERM
  stop_cluster
  ((status == 0)) || show_logs >&2
  rm -rf "$folder"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Copy what the workflow needs to an empty folder, so that a run sees nobody's results: workplace NAME
workplace() {
  mkdir -p "$folder/$1/tests"
  cp -r "$project"/{Snakefile,workflow,profiles,config} "$folder/$1"
  cp -r "$project/tests/configs" "$folder/$1/tests"
}

# Run the study in a workplace and say how long it took: run NAME SNAKEMAKE-OPTIONS...
run() {
  local name=$1 began=$SECONDS
  shift
  workplace "$name"
  (cd "$folder/$name" && snakemake --configfile "$study" "$@") > "$folder/$name.log" 2>&1 || {
    tail -n 40 "$folder/$name.log" >&2
    fail "the $name run failed; its last lines are above"
  }
  echo "$name run: $((SECONDS - began)) s"
}

[[ ! -d $project/.venv/bin ]] || type -P tocom > /dev/null || export PATH="$project/.venv/bin:$PATH"
type -P snakemake tocom > /dev/null || fail "snakemake or tocom is not on PATH; run 'make test' once, or activate its environment"
python -c 'import snakemake_executor_plugin_slurm' 2> /dev/null ||
  fail "the Slurm plugin is missing; run: pip install snakemake-executor-plugin-slurm"
refuse_second_slurm
need_packages
start_cluster 1 "$cpus"
echo "$(sinfo --version): one node, $cpus CPUs"

run local --cores "$cpus"
# What differs from a real cluster: its name for a partition, no accounts, and jobs of seconds, so ask after them often.
# And the study is small: no job needs what the profile sets for the paper's. Of its kinds of values each is here once.
run slurm --workflow-profile profiles/slurm --default-resources slurm_partition=local --latency-wait 5 \
  --slurm-status-command squeue --slurm-init-seconds-before-status-checks 2 \
  --set-threads finetune=2 --set-resources finetune:workers=1 "throughput:slurm_extra='--exclusive'" \
  'evaluate:mem_mb=(1500 if wildcards.study == "tiny" else 3000) * attempt'

submitted=$(cat "$folder"/slurm/.snakemake/log/*.log | grep -c 'has been submitted with SLURM jobid') || fail "nothing was submitted to Slurm"
# The CSVs beside models hold seconds.
for part in learned checkpoints cells.csv; do
  diff -r --exclude='*.csv' "$folder/local/$results/$part" "$folder/slurm/$results/$part" >&2 ||
    fail "$part of the two runs differ, as shown above"
done
cells=$(($(wc -l < "$folder/slurm/$results/cells.csv") - 1))
echo "$submitted jobs went through Slurm; the models and the cells are identical ($cells of them)"
