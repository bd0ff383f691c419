# `make` lists the targets. Set-up talks on stderr only, so `make demo ARGS="--once --json" | jq .` works
# (from another folder: `make -s -C ...`, else make itself prints the folder's name).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(PYTHON) deploy/environment/setup_env.py --venv $(VENV)
TOOLS := $(PYTHON) deploy/environment/setup_tools.py --into $(VENV)/tools
UV = "$$(command -v uv || echo $(BIN)/uv)"
LOCK := deploy/environment/cpu-lock.txt
# Tests run in an order of the commit's own: another one with the next, and the same where a red run is run again.
SEED := $(shell git rev-list --count HEAD 2>/dev/null || echo 1)
NOT_LOCKED := torch torchvision torchaudio torchcodec triton
# Questions of each task, so that the matrix fits into an hour on a slow day: most for PromPrune and the controls, least for methods
# that read the question, since they encode the image anew for each. A lone shape and its colour weigh little.
EVAL_OUT := eval
EVAL_METHODS := promprune:160,random:160,uniform:160
EVAL_METHODS := $(EVAL_METHODS),split-0:80,split-25:80,split-50:80,split-75:80,fastervlm:80
EVAL_METHODS := $(EVAL_METHODS),cdpruner:20,fsr:20,sppruner:20,*:60
EVAL_TASKS := scattered,plate,big-shape:100,big-colour:100
EVAL_AT_64 := promprune:500,random:500,uniform:500,split-0:500

.DEFAULT_GOAL := help
.PHONY: help setup tools demo test test-release docs eval eval-at-64 soak compatibility vllm-tests audit lint check dist lock clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## make the CPU environment in .venv, or bring it up to date (PYTHON=python3.12 to choose the Python)
	@$(SETUP)

tools: setup ## a container engine and more for the tests of deploy/ (Debian and root; elsewhere these are skipped)
	@$(TOOLS)

demo: setup ## start the demo; ARGS="--once --json" for one run with machine-readable results
	@$(BIN)/promprune demo $(ARGS)

test: tools ## run the tests of each commit and check their coverage; with ARGS for pytest, what they select, without that
	@$(SETUP) --triton
	@$(BIN)/python $(if $(ARGS),-m pytest,deploy/environment/whole_suite.py) --randomly-seed=$(SEED) $(ARGS)

test-release: tools ## run the tests that take long, those marked "release": Docker, a fresh clone, 5,000 bodies, ...
	@$(SETUP) --lmms
	@$(BIN)/python $(if $(ARGS),-m pytest,deploy/environment/whole_suite.py) -mrelease --randomly-seed=$(SEED) $(ARGS)

docs: setup ## write the generated tables of README.md and docs/ from the code; prints the pages that changed
	@$(BIN)/python -m deploy.documents

eval: setup ## measure what pruning costs: every method and budget, 35 minutes on two cores; goes on if interrupted
	@$(BIN)/promprune eval --out $(EVAL_OUT) --methods '$(EVAL_METHODS)' --tasks $(EVAL_TASKS) $(ARGS)

eval-at-64: setup ## one budget with standard errors below a point, a quarter of an hour: which differences are real
	@$(BIN)/promprune eval --out $(EVAL_OUT)/at-64 --methods $(EVAL_AT_64) --budgets 64 --tasks $(EVAL_TASKS) $(ARGS)

soak: setup ## an hour of mixed traffic: every answer compared, nothing may grow; ARGS="--minutes 480" for a night
	@$(BIN)/promprune bench soak --minutes 60 --requests 1000000 $(ARGS)

compatibility: ## the tests that touch vLLM with each minor, in .venv-compat; ARGS="--minors 0.31" for one of them
	@$(PYTHON) deploy/environment/compatibility.py $(ARGS)

vllm-tests: setup ## vLLM's own tests with the plugin and without: what differs, half an hour; ARGS="--only v1/core"
	@$(PYTHON) deploy/environment/vllm_tests.py $(ARGS)

audit: ## look up every locked package in the advisory databases (needs the internet)
	@$(UV) tool run pip-audit --strict --disable-pip --no-deps --requirement $(LOCK) $(ARGS)

lint: setup ## lint, formatting, types; what pre-commit runs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint ## lint, formatting, types and unit tests: before each commit
	@$(BIN)/python -m pytest tests/unit $(ARGS)

dist: setup ## wheel and sdist in dist/, checked as the package index checks them
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

lock: ## compile the lock anew, keeping its versions where they still fit; ARGS=--upgrade moves them
	@links="$${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)}"; \
	torch="$$(for link in $$links; do echo "--find-links=$$link"; done)"; \
	$(UV) pip compile --quiet --no-header --no-annotate --extra cpu --extra dev pyproject.toml \
	  --override deploy/environment/overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  $(NOT_LOCKED:%=--no-emit-package=%) $${torch:---torch-backend=cpu} $(ARGS) --output-file $(LOCK)
	@sed -i -E -e 's/^(intel-[^ ]+)$$/\1 ; platform_machine == "x86_64"/' \
	  -e '1i # What a CPU install needs beside torch and torchvision, which setup_env.py takes first.' \
	  -e '1i # Install with --no-deps. `make lock` compiles it from pyproject.toml (extras cpu, dev) and overrides.txt.' \
	  $(LOCK)

clean: ## remove .venv, .venv-compat, caches and build output
	@rm -rf $(VENV) .venv-compat dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
