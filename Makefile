.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
PYTEST ?= --numprocesses 2 --dist loadfile
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup setup-test setup-system up demo check fmt test chaos arq-suite gallery bench bench-animatic bench-queue bench-sweep bench-sse bench-engine bench-gpu bench-deliver constraints clean ci

help:           ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ -/' | sort | awk -F' - ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.setup  ## The light environment in .venv: no torch, with speech

setup-test: .venv/.setup-test  ## The whole environment: torch, linters and every test server

.venv/.pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "movieq needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1,<27'
	@touch $@

.venv/.setup: pyproject.toml constraints.txt | .venv/.pip
	$(PIP) --editable '.[speech]'
	@touch $@

# torch by its exact version and first: a bare `torch` of a dependency would bring gigabytes of CUDA
.venv/.setup-test: pyproject.toml constraints.txt | .venv/.pip
	$(PIP) torch==2.13.0
	$(PIP) --group test --editable '.[speech,gpu,c2pa]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary arq --dest .cache/arq "arq==$$($(BIN)/python -c 'import arq; print(arq.VERSION)')"
	@touch $@ .venv/.setup

.venv/.setup-browser: tests/browser/node/package.json | .venv/.pip
	npm install --prefix tests/browser/node --no-package-lock --no-audit --no-fund --silent
	@touch $@

.venv/.setup-payload: deploy/payload/package.json deploy/payload/plugin/package.json deploy/payload/example/package.json | .venv/.pip
	npm install --prefix deploy/payload --no-package-lock --ignore-scripts --no-audit --no-fund --silent
	@touch $@

.venv/.setup-cms: tests/payload/package.json | .venv/.pip
	npm install --prefix tests/payload --no-package-lock --no-audit --no-fund --silent --ignore-scripts
	@touch $@

setup-system:   ## Install the programs that tests of browsers and proxies run (Debian, as root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium curl nginx-light

up: setup       ## Run the queue, the API and one worker on this machine
	$(BIN)/movieq up

demo: setup     ## Turn a storyboard into a clip, with everything that this takes
	$(BIN)/movieq demo

fmt: setup-test  ## Format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup-test  ## Lint and type-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup-test .venv/.setup-browser .venv/.setup-payload .venv/.setup-cms  ## Run the tests; PYTEST='-m slow' for the long ones
	$(BIN)/python -m pytest $(PYTEST)

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

constraints: setup-test  ## Write constraints.txt anew from what is installed
	(echo '# Versions that the tests run with; made by `make constraints`.'; \
	  $(BIN)/python -m pip freeze | grep -v '^movieq\|^-e\|^#' | sed 's/+cpu//') > constraints.new && mv constraints.new constraints.txt

clean:          ## Remove what was built and made here
	rm -rf .venv .movieq demo-out gallery build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

ci: check test  ## What CI runs
