# The two commands: `make reproduce` and `make test`. Both need only Python 3.11 or newer, pip and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
CORES ?= all
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: reproduce studies test check lock reference backbone clean help
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
	start=$$(date +%s); \
	snakemake --cores $(CORES); \
	end=$$(date +%s); \
	snakemake --cores 1 --quiet all --report results/demo/report.html; \
	tocom analyse show results/demo; \
	tocom analyse split results/demo --since $$start --until $$end --cores $(CORES)

test: $(VENV)/.test  ## Run every check and every test
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint
	pytest -n 2 --dist worksteal

lock:  ## Pin the newest versions that requirements/*.in allow
	for name in bootstrap run test; do \
	  uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
	    requirements/$$name.in -o requirements/$$name.txt; \
	done

STUDIES := cifar100 fgvc vtab1k backbones compressors speedup ablations gap_transfer ade20k
PROFILE ?= profiles/default

studies: $(VENV)/.run  ## Run every study of the paper as one DAG (PROFILE=profiles/slurm on a cluster)
	status=0; \
	snakemake --snakefile workflow/joint.smk --workflow-profile $(PROFILE) || status=$$?; \
	tocom analyse overview $(STUDIES:%=config/%.yaml) --output results/overview; \
	exit $$status

reference:  ## Make the present run the one that `snakemake verify` compares with
	mkdir -p results/demo/reference
	cp results/demo/cells.csv results/demo/reference/cells.csv

backbone:  ## Pre-train the bundled backbone again, by the workflow, and put it in its place
	snakemake --cores $(CORES) --configfile config/pretrain.yaml -- pretrain
	cp results/pretrain/backbones/glyph_vit.safetensors tocom/assets/glyph_vit.safetensors
	tocom card tocom/assets/glyph_vit.safetensors --output tocom/assets/glyph_vit.md

clean:  ## Remove everything that a run makes, the committed results excepted
	git clean -fdXq results .snakemake
