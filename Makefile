.DEFAULT_GOAL := help
.SILENT:
SHELL := /bin/bash
PYTHON ?= python3
# an environment beside the usual one for `make ... PYTHON=python3.12`
VENV := .venv$(if $(filter command,$(firstword $(origin PYTHON))),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# pip says what went wrong, and nothing else
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder
# no torch, no Node, about a minute on two cores
QUICK := tests/unit $(patsubst %,tests/contract/test_%.py,deliveries health_workers openapi queues status_cancel_retry submit uploads) \
  $(patsubst %,tests/integration/test_%.py,lanes order)
PACKAGE_JSONS := tests/browser/node/package.json tests/openapi/node/package.json tests/payload/package.json \
  deploy/payload/package.json deploy/payload/plugin/package.json deploy/payload/example/package.json

.PHONY: help setup setup-quick setup-test setup-system up demo check fmt quick unit test coverage chaos arq-suite gallery bench bench-animatic bench-queue bench-sweep bench-sse bench-engine bench-gpu bench-deliver bench-abuse constraints clean ci

help:           ## List the targets
	grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ -/' | sort | awk -F' - ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.setup  ## Install what `make up` and `make demo` need in .venv: no torch

setup-quick: $(VENV)/.setup-quick

setup-test: $(VENV)/.setup-test  ## Install what all tests need: torch, linters and the test servers

$(VENV)/.pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "movieq needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check 'pip>=25.1,<27'
	touch $@

$(VENV)/.setup: pyproject.toml constraints.txt | $(VENV)/.pip
	echo "Installing movieq in $(VENV) ..."
	$(PIP) --editable '.[speech]'
	touch $@

$(VENV)/.setup-quick: pyproject.toml constraints.txt | $(VENV)/.pip
	echo "Installing movieq and the quick tests in $(VENV) ..."
	$(PIP) --group quick --editable '.[speech,c2pa]'
	touch $@ $(VENV)/.setup

# torch by its exact version and first: a bare `torch` of a dependency would bring gigabytes of CUDA
$(VENV)/.setup-test: pyproject.toml constraints.txt | $(VENV)/.pip
	echo "Installing movieq, torch and the tests in $(VENV), which takes minutes ..."
	$(PIP) torch==2.13.0
	$(PIP) --group test --editable '.[speech,gpu,c2pa]'
	$(BIN)/python -m pip download --quiet --quiet --disable-pip-version-check --no-deps --no-binary arq --dest .cache/arq "arq==$$($(BIN)/python -c 'import arq; print(arq.VERSION)')"
	$(BIN)/python -m venv $(VENV)/openapi-python-client # its dependencies conflict with those above
	$(VENV)/openapi-python-client/bin/python -m pip install --quiet --quiet --disable-pip-version-check openapi-python-client==0.29.1
	touch $@ $(VENV)/.setup $(VENV)/.setup-quick

$(VENV)/.setup-npm: $(PACKAGE_JSONS) | $(VENV)/.pip
	if node -e 'process.exit(Number(parseInt(process.versions.node) < 20))' 2>/dev/null && command -v npm >/dev/null; then \
	  echo "Installing npm packages ..." && \
	  for folder in tests/browser/node tests/openapi/node tests/payload deploy/payload; do \
	    npm install --prefix $$folder --ignore-scripts --no-package-lock --no-audit --no-fund --silent || exit; \
	  done && touch $@; \
	else \
	  echo "Tests that need Node are skipped; to run them, install Node 20 or newer with npm" >&2; \
	fi

setup-system:   ## Install the programs that some tests run (chromium, curl, nginx), where apt may
	tests/install-programs.sh

up: setup       ## Run the queue, the API and one worker on this machine
	$(BIN)/movieq up

demo: setup     ## Turn a storyboard into a clip, with everything that this takes
	$(BIN)/movieq demo

fmt: setup-quick  ## Format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup-test  ## Lint and type-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quick: setup-quick  ## Lint, and run the tests of the inner loop: seconds, without torch and Node
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/python $(PYTEST) $(QUICK) $(ARGS)

unit: setup-quick  ## Run the unit tests
	$(BIN)/python $(PYTEST) tests/unit $(ARGS)

test: setup-test setup-system $(VENV)/.setup-npm  ## Run the tests; ARGS='-m slow' for the long ones, ARGS='-k lanes' for some
	$(BIN)/python $(PYTEST) $(ARGS)

coverage: setup-test setup-system $(VENV)/.setup-npm  ## Run the tests, and fail where they cover too little of movieq and workers
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

chaos: setup-test  ## Kill everything while N tasks run, and count what is lost
	$(BIN)/python -m tests.chaos.run $(or $(N),300) --per-second $(or $(RATE),5)

arq-suite: setup-test  ## Run arq's own tests of its worker on ours
	$(BIN)/python -m tests.arq_suite.run .cache/arq/arq-*.tar.gz

gallery: setup-test  ## Render a sheet of every camera, grade and card
	$(BIN)/python -m tests.gallery gallery

bench: setup-test bench-animatic  ## Measure: the animatic, submit, start
	$(BIN)/python -m tests.bench.bench_submit
	$(BIN)/python -m tests.bench.bench_start

bench-animatic: setup-test  ## Measure: seconds and memory of clips, cards and sound
	$(BIN)/python -m tests.bench.bench_animatic

bench-queue: setup-test  ## Measure: the queue beside arq, SAQ, Taskiq, Celery and BullMQ
	$(BIN)/python -m tests.bench.bench_queue

bench-sweep: setup-test  ## Measure: deleting 100,000 ended tasks and their files, and other requests meanwhile
	$(BIN)/python -m tests.bench.bench_sweep

bench-sse: setup-test  ## Measure: thousands of open streams, beside sse-starlette
	$(BIN)/python -m tests.bench.bench_sse

bench-engine: setup-test  ## Measure: what serving costs beside a bare pipeline, and what keeps a GPU busy
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.bench_engine
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.bench_economy

bench-gpu: setup-test  ## Measure, on a machine with a GPU: serving, batches, compiling, loading of models of real size
	$(BIN)/python -m tests.bench.bench_gpu

bench-deliver: setup-test  ## Measure: files to a bucket and back, beside aiobotocore and aws; webhooks
	$(BIN)/python -m tests.bench.bench_deliver
	$(BIN)/python -m tests.bench.bench_webhooks

bench-abuse: setup-test  ## Measure: what a client notices while another one attacks
	$(BIN)/python -m tests.bench.bench_abuse

constraints: setup-test  ## Write constraints.txt anew from what is installed
	(echo '# Versions that the tests run with; made by `make constraints`.'; \
	  $(BIN)/python -m pip freeze | grep -v '^movieq\|^-e\|^#' | sed 's/+cpu//') > constraints.new && mv constraints.new constraints.txt

clean:          ## Remove what was built and made here
	rm -rf .venv .venv-* .movieq demo-out gallery build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

ci: check coverage  ## What CI runs
