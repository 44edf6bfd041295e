# `make` lists the targets. Each sets itself up: .venv from requirements.lock, again only when the lock has changed.

PYTHON ?= python3
ARGS   ?=
PORT   ?= 5001

BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test soak lint bench gpu ui serve stack deploy lock setup clean

# The caller's own environments must not leak in; tools neither phone home nor look for updates.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export AWS_EC2_METADATA_DISABLED := true
export OMP_WAIT_POLICY ?= PASSIVE

# uv does not read pip's settings. Where wheels are local (a CPU build of torch, say) it has to be told as well.
comma := ,
empty :=
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
# An index beside the usual one (PyTorch's for CPU builds, say) carries some packages only; take each where it is.
export UV_INDEX_STRATEGY ?= unsafe-best-match
UV := $(BIN)/uv pip

help:
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-9s %s\n' "$$name" "$$text"; done

run: setup  ## reproduce the pipeline, register the model, promote it if the gate lets it pass
	@$(RUN) python -m flows.retrain $(ARGS)

test: lint  ## all checks: lint, types, tests (ARGS="-k digest" picks some)
	@$(RUN) python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup  ## what takes too long for every change, an hour or two: the gate on noisy copies, a hundred kills, servers that are down
	@$(RUN) python -m pytest -m soak -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup  ## ruff and mypy; repair what can be repaired with: ruff check --fix . && ruff format .
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy -n auto

bench: setup .venv/bench/installed  ## time sampling and training beside two other libraries (ARGS=--write keeps the results)
	@$(RUN) python -m benchmarks.sampling $(ARGS)
	@$(RUN) python -m benchmarks.training $(ARGS)

gpu: setup  ## on a GPU: its tests, speeds, recipes and one table in eight minutes (ARGS=--rehearse: on the CPU, a toy)
	@$(RUN) python -m benchmarks.gpu $(ARGS)

.venv/bench/installed: benchmarks/requirements.txt .venv/installed
	@$(UV) install --quiet --python $(BIN)/python --no-deps --target .venv/bench -r benchmarks/requirements.txt
	@touch $@

ui: setup  ## look at runs, curves and models in the browser: MLflow at http://127.0.0.1:5000
	@uri=$$($(RUN) python -m flows.champion tracking-uri); \
	case "$$uri" in http*) echo "The tracking server has the pages: $$uri"; exit 0;; esac; \
	MLFLOW_BACKEND_STORE_URI="$$uri" $(RUN) exec python -m flows.stack.mlflow_server --workers 1 $(ARGS)

serve: setup  ## answer requests with the champion: http://127.0.0.1:5001/invocations (PORT=5001)
	@MLFLOW_TRACKING_URI=$$($(RUN) python -m flows.champion tracking-uri); export MLFLOW_TRACKING_URI; \
	model=$$($(RUN) python -m flows.champion model-uri); \
	$(RUN) exec mlflow models serve --model-uri "$$model" --env-manager local --port $(PORT) --timeout 600 $(ARGS)

stack: setup  ## PostgreSQL, MLflow, Prefect, a test S3 and a worker on this machine, until Ctrl-C
	@$(RUN) exec python -m flows.stack $(ARGS)

deploy: setup  ## set up the Prefect server at PREFECT_API_URL: pool, limit, automations, deployments
	@$(RUN) exec python -m flows.deploy $(ARGS)

lock: setup  ## resolve pyproject.toml into requirements.lock (ARGS=--upgrade takes newer versions)
	@cp requirements.lock .venv/resolved.txt
	@$(UV) compile --quiet pyproject.toml --extra dev --python-version 3.11 --python $(BIN)/python \
	    --no-annotate --no-header --output-file .venv/resolved.txt $(ARGS)
	@{ echo "# Every version of the stack and of the test tools, for Python 3.11 and 3.12. Made by: make lock"; \
	   echo "# Without the CUDA packages and local labels such as +cpu: the torch build of a machine brings what it needs."; \
	   sed -E -e '/^(#|cuda-|nvidia-|triton==)/d' -e 's/\+[a-z0-9.]+$$//' .venv/resolved.txt; } > .venv/requirements.new
	@mv .venv/requirements.new requirements.lock

setup: .venv/installed  ## create .venv and install requirements.lock; the other targets do this too
	@:

# The stamp comes last: an interrupted set-up is carried on with by the next make.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: expected Python 3.11 or later, found $$($(PYTHON) --version 2>&1 | head -n 1): try make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing requirements.lock into .venv; the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	@$(UV) install --quiet --python $(BIN)/python -r requirements.lock || { \
	    echo "make: uv could not install the lock; trying with pip, which has settings of its own" >&2; \
	    $(BIN)/python -m pip install --quiet -r requirements.lock; }
	@$(UV) install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@$(RUN) python -m flows.offline_plots
	@touch $@

clean:  ## start over: forget outputs, caches, runs and the local registry (asks; FORCE=1 does not)
	@test -n "$${FORCE-}" || { read -r -p "Forget every model, run and registered version of this checkout? [y/N] " answer; test "$$answer" = y; }
	@rm -rf .darkroom .dvc/cache .dvc/tmp data/prepared data/samples models/* reports dvc_plots \
	    .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
