# `make` lists the targets. Setup prints to stderr only, so `make demo ARGS="--once --json" | jq .` works
# (from another folder use `make -s -C ...`, or make itself prints the folder's name).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(PYTHON) deploy/environment/setup_env.py --venv $(VENV)
TOOLS := $(PYTHON) deploy/environment/setup_tools.py --into $(VENV)/tools
UV = "$$(command -v uv || echo $(BIN)/uv)"
LOCK := deploy/environment/cpu-lock.txt
# The test order is seeded by the commit: it changes with every commit, but a failed run can be repeated.
SEED := $(shell git rev-list --count HEAD 2>/dev/null || echo 1)
NOT_LOCKED := torch torchvision torchaudio torchcodec triton
# Questions per task, so that the matrix takes less than an hour on a slow day: most for PromPrune and the controls. Methods that
# use the question are asked as many as others: the worker keeps an image's features (PROMPRUNE_FEATURE_CACHE_GB), so they select
# again for each question without encoding again. Single shapes and their colors have little weight.
EVAL_OUT := eval
GPU_OUT := gpu
EVAL_METHODS := promprune:160,random:160,uniform:160,downsample:160
EVAL_METHODS := $(EVAL_METHODS),split-0:80,split-25:80,split-50:80,split-75:80,fastervlm:80
EVAL_METHODS := $(EVAL_METHODS),*:60
EVAL_TASKS := scattered,plate,big-shape:100,big-colour:100
EVAL_AT_64 := promprune:500,random:500,uniform:500,downsample:500,split-0:500

.DEFAULT_GOAL := help
.PHONY: help setup tools demo test test-release test-families coverage docs eval eval-at-64 soak gpu compatibility seams seams-issue vllm-tests audit lint check dist lock clean

help: ## list all targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## create or update the CPU environment in .venv (PYTHON=python3.12 selects the Python)
	@$(SETUP)

tools: setup ## install a container engine and other tools for tests (needs Debian and root; else those tests are skipped)
	@$(TOOLS)

demo: setup ## run the demo; ARGS="--once --json" for one run with machine-readable results
	@$(BIN)/promprune demo $(ARGS)

test: tools ## run the tests of each commit; with ARGS (for pytest), only what they select
	@$(SETUP) --triton
	@$(BIN)/python $(if $(ARGS),-m pytest,deploy/environment/whole_suite.py) --randomly-seed=$(SEED) $(ARGS)

test-release: tools ## run the long tests, marked "release": Docker, a fresh clone, 1,500 generated bodies, ...
	@$(SETUP) --triton --lmms --litellm
	@$(BIN)/python $(if $(ARGS),-m pytest,deploy/environment/whole_suite.py) -mrelease --randomly-seed=$(SEED) $(ARGS)

test-families: tools ## run the families that `make test` leaves out, and on Model Runner V1 what reaches into it
	@$(SETUP) --triton
	@$(BIN)/python deploy/environment/whole_suite.py --left-out --randomly-seed=$(SEED) $(ARGS)

coverage: tools ## run the tests of each commit and check how much of the package they run; takes half as long again
	@$(SETUP) --triton
	@$(BIN)/python deploy/environment/whole_suite.py --coverage --randomly-seed=$(SEED) $(ARGS)

docs: setup ## update the generated tables in README.md and docs/; prints what changed; ARGS="--gpu DIR" or "--eval DIR" shows a run
	@$(BIN)/python -m deploy.documents $(ARGS)

eval: setup ## measure accuracy of every method and budget; 20 to 35 minutes on two cores, resumes if interrupted
	@$(BIN)/promprune eval --out $(EVAL_OUT) --methods '$(EVAL_METHODS)' --tasks $(EVAL_TASKS) $(ARGS)

eval-at-64: setup ## measure one budget with standard errors below a point; 15 minutes, shows which differences are real
	@$(BIN)/promprune eval --out $(EVAL_OUT)/at-64 --methods $(EVAL_AT_64) --budgets 64 --tasks $(EVAL_TASKS) $(ARGS)

soak: setup ## send mixed traffic for an hour, compare every answer, check for leaks; ARGS="--minutes 480" for a night
	@$(BIN)/promprune bench soak --minutes 60 --requests 1000000 $(ARGS)

gpu: ## measure all that a GPU can show, in 8 minutes, into gpu/, with the packages of PYTHON; ARGS="--minutes 4 --only kernels"
	@$(PYTHON) -m promprune_vllm bench gpu --out $(GPU_OUT) $(ARGS)

compatibility: ## run the tests that touch vLLM with each minor, in .venv-compat; ARGS="--minors 0.31" for one minor
	@$(PYTHON) deploy/environment/compatibility.py $(ARGS)

seams: setup ## print what the newest vLLM wheel has changed of what the plugin depends on; ARGS="--version 0.34.0 --write"
	@$(BIN)/python deploy/environment/seams.py $(ARGS)

seams-issue: setup ## open an issue on GitHub with what the newest vLLM wheel has changed, unless it was tested; runs every night
	@$(BIN)/python deploy/environment/seams.py --issue

vllm-tests: setup ## run vLLM's own tests with and without the plugin, and compare; half an hour; ARGS="--only v1/core"
	@$(PYTHON) deploy/environment/vllm_tests.py $(ARGS)

audit: ## check every locked package against advisory databases (needs internet access)
	@$(UV) tool run pip-audit --strict --disable-pip --no-deps --requirement $(LOCK) $(ARGS)

lint: setup ## check lint, formatting and types; pre-commit runs this
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint ## run lint and the unit tests; run this before each commit
	@$(BIN)/python -m pytest tests/unit $(ARGS)

dist: setup ## build wheel and sdist in dist/, and check them as the package index does
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

lock: ## recompile the lock, keeping versions that still fit; ARGS=--upgrade updates them
	@links="$${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)}"; \
	torch="$$(for link in $$links; do echo "--find-links=$$link"; done)"; \
	$(UV) pip compile --quiet --no-header --no-annotate --extra cpu --extra dev pyproject.toml \
	  --override deploy/environment/overrides.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  $(NOT_LOCKED:%=--no-emit-package=%) $${torch:---torch-backend=cpu} $(ARGS) --output-file $(LOCK)
	@sed -i -E -e 's/^(intel-[^ ]+)$$/\1 ; platform_machine == "x86_64"/' \
	  -e '1i # What a CPU install needs besides torch and torchvision, which setup_env.py installs first.' \
	  -e '1i # Install with --no-deps. `make lock` compiles it from pyproject.toml (extras cpu, dev) and overrides.txt.' \
	  $(LOCK)

clean: ## remove .venv, .venv-compat, caches and build output
	@rm -rf $(VENV) .venv-compat dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
