# The two commands: `make reproduce` and `make test`. Both need only Python 3.11 or newer, pip and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
CORES ?= all
FUZZ ?= 400
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: reproduce console check test slow gpu fuzz faults bench studies lock reference backbone clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# Pinned versions with hashes; the project itself is linked, not copied.
$(VENV)/.run: requirements/bootstrap.txt requirements/run.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	$(UV) --require-hashes -r requirements/run.txt
	$(UV) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run requirements/test.txt
	$(UV) --require-hashes -r requirements/test.txt
	touch $@

reproduce: $(VENV)/.run  ## Run the demo study and print its main table
	snakemake --cores $(CORES)
	snakemake --cores 1 --quiet all --report results/demo/report.html
	tocom analyse show results/demo

console: $(VENV)/.run  ## Record what `make reproduce` shows in a terminal, in docs/console.md
	python scripts/console.py

check: $(VENV)/.test  ## Run every linter and the unit tests
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint
	pytest -n 2 --dist worksteal -m "not dag and not slow and not gpu"

test: check  ## Run every check and every test but the slow ones: check, and the real workflow on small studies
	pytest -n 2 --dist worksteal -m dag

slow: $(VENV)/.test  ## Run what is slow by nature: kills of the workflow, a real Slurm, a fake Kubernetes
	pytest -m slow

gpu: $(VENV)/.test  ## Run what needs a GPU: every part and every stage on one
	pytest -m gpu

fuzz: $(VENV)/.test  ## Try FUZZ new inputs on every reader of files; the table is results/fuzz/fuzz.md
	FUZZ=$(FUZZ) pytest -s tests/test_fuzz.py

faults: $(VENV)/.test  ## Run the demo, scaled down, through some 60 faults, and compare with an undisturbed run
	python -m tests.workflow.faults --output results/faults

# Of a GPU: tocom benchmark, without any of these.
BENCH ?= --device cpu --training deit_small_patch16_224 --set batch_size=8 --set seconds=20 --set threads=2

bench: $(VENV)/.run  ## Measure speed and memory beside an eager reference, some 15 minutes on two quiet cores
	tocom benchmark $(BENCH)

lock:  ## Pin the newest versions that requirements/*.in allow
	for name in bootstrap run test; do \
	  uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
	    requirements/$$name.in -o requirements/$$name.txt; \
	done

PROFILE ?= profiles/default

studies: $(VENV)/.run  ## Run every study of the paper as one DAG (PROFILE=profiles/slurm on a cluster)
	status=0; \
	snakemake --configfile config/studies.yaml --workflow-profile $(PROFILE) || status=$$?; \
	tocom analyse overview config/studies.yaml --output results/overview; \
	exit $$status

reference:  ## Make the present run the one that `snakemake verify` compares with
	mkdir -p results/demo/reference
	cp results/demo/cells.csv results/demo/study.json results/demo/reference/

backbone:  ## Pre-train the bundled backbone again, by the workflow, and put it in its place
	snakemake --cores $(CORES) --configfile config/pretrain.yaml -- pretrain
	cp results/pretrain/backbones/glyph_vit.safetensors tocom/assets/glyph_vit.safetensors

clean:  ## Remove everything that a run makes, the committed results excepted
	git clean -fdXq results .snakemake
