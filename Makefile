# Commands for developers. `make` alone lists the targets.
# With another interpreter or environment: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON  ?= python3
VENV    ?= .venv
PORT    ?= 5000
WORKERS ?= 3

BIN   := $(VENV)/bin
# One stamp file per interpreter, so that another PYTHON gets a clean environment.
STAMP := $(VENV)/.ready-$(notdir $(PYTHON))
# Workers share the cores, so each uses one thread. Telemetry is off.
# Three on two cores, because tests wait for processes and servers. Neighbours in a file share what they train.
# Compiled modules are kept, whatever the environment says: a third of the time to collect the tests.
TEST  := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow test-all test-rest test-real-parts test-container test-services image lint ci mlflow-ui mutants torture proof outdated tiny-base

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: $(STAMP)  ## create the environment .venv (the other targets do this if it is missing)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "$(PYTHON) is not Python 3.11 to 3.13: type make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): about 3 GB, some minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## teach the shipped tiny model the shipped subject, on CPU, in minutes
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m dreambooth.train

test: $(STAMP)  ## the fast tests: offline, at most 5 minutes on 2 cores
	@$(TEST) -m 'not slow and not container and not services'

test-slow: $(STAMP)  ## the tests that take longer: kills, data parallel, every plan, wheels
	@$(TEST) -m 'slow and not container and not services'

test-all:  ## what the CI runs: test, lint, test-slow, mutants, and beside them test-container, test-services
	@$(MAKE) --no-print-directory test lint
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-rest test-real-parts

test-rest:
	@$(MAKE) --no-print-directory test-slow
	@$(BIN)/python tests/mutants/run.py --seen-green

# These tests mostly wait for Docker, servers and schedulers. One after the other, because both install programs.
test-real-parts:
	@$(MAKE) --no-print-directory test-container
	@$(MAKE) --no-print-directory test-services

test-container: $(STAMP)  ## build the CPU image and run it as SageMaker does (installs Docker if it is missing)
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest -m container --durations=8

test-services: $(STAMP)  ## a team's MLflow on PostgreSQL and S3 in a browser, and a Slurm (installs missing programs)
	@OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest -m services --durations=8

image:  ## build the image for GPUs with Docker (see docs/container.md)
	@containers/build gpu

lint: $(STAMP)  ## ruff, and mypy (strict for dreambooth/)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

ci:  ## what the CI runs: .ci/run
	@.ci/run

mlflow-ui: $(STAMP)  ## every run side by side in a browser (PORT=5000)
	@test -e runs/mlflow.db || { echo "No runs yet in runs/mlflow.db: type make demo first." >&2; exit 1; }
	@echo "http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
	@echo "(the runs side by side; Ctrl-C stops the server)"
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port $(PORT) --workers 1

proof: $(STAMP)  ## run the long experiments and make torture, and write their pages in docs/
	@$(BIN)/python -m tools.proof
	@$(BIN)/python -m tools.proof.flow
	@$(BIN)/python -m tools.proof.concepts
	@$(BIN)/python -m tools.proof.s3
	@$(BIN)/python -m tools.proof.container_image
	@$(BIN)/python -m tools.proof.sweeps
	@$(BIN)/python -m tools.proof.search_comparison
	@$(BIN)/python -m tools.torture

torture: $(STAMP)  ## kill, damage, starve and stop short runs, as root in 20 minutes, and write docs/torture.md
	@$(BIN)/python -m tools.torture

outdated: $(STAMP)  ## list pinned packages with newer releases, and what holds them back (once a month; needs the index)
	@$(BIN)/python -m tools.outdated

tiny-base: $(STAMP)  ## train the shipped base models again (hours; needs npm)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[base]'
	@$(BIN)/python -m tools.tiny_base

mutants: $(STAMP)  ## insert each known bug into a copy of the code, one at a time: its test must fail
	@$(BIN)/python tests/mutants/run.py
