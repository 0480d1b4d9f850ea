# Each target sets itself up: a fresh machine needs Python 3.11 or newer, git and make.
#
#   make demo         install into .venv, then `limbeck demo`: a teacher, a student, a verdict, an ONNX file, a report
#   make test         install into .venv, then ruff, mypy --strict, the import rules and the tests (minutes)
#   make test-long    the tests that are whole runs: stopped, damaged, on several ranks, served (half an hour)
#   make test-oldest  both with PyTorch 2.6, the oldest that is supported
#   make gpu          the tests that need a CUDA device (those of several devices are skipped where there is one)
#   make mutants      break the code on purpose in known ways; at least one test must go red for each
#   make faults       stop runs in every way and at every instant; the table in docs/reliability.md (hours; one row: make faults ROWS=R4)
#   make cifar-pair   fetch CIFAR-10, train a teacher, distil it, 3 seeds (about two hours on 2 cores, in the foreground)
#   make r8           fetch R8 and MiniLM, fine-tune it, distil it into 2 layers, 3 seeds
#   make bench        measure speed against a plain loop and other libraries; docs/benchmarks.md (P10 alone: make bench ROWS=P10)
#   make image-check  build the images of docker/Dockerfile and try what is promised of them (Linux, root, apt, 40 GB of disk; an hour or two)
#   make clean        remove .venv and caches; runs/ and data/ stay
#
# TORCH chooses the PyTorch to install, e.g.  make test TORCH="torch==2.6.0 torchvision==0.21.0"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch torchvision
BIN     = $(VENV)/bin
# The ci image sets INSTALLED: everything is there, and nothing is installed.
STAMP   = $(if $(INSTALLED),,$(VENV)/.installed)
RUNS   ?= runs

.PHONY: demo test test-long test-oldest lint gpu mutants faults cifar-pair r8 bench image-check clean help

help:
	@sed -n '3,16p' Makefile | sed 's/^# *//'

# torch and torchvision are installed together and first: installed apart they need not fit each other.
$(VENV)/.installed: pyproject.toml
	@echo "== installing into $(VENV) (once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@echo "== limbeck demo (about a minute)"
	$(BIN)/limbeck demo

lint: $(STAMP)
	@echo "== ruff"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "== mypy --strict"
	@case "$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')" in \
	2.[6-9].*) echo "left out: the annotations of this PyTorch are not those of the newest, against which types are checked" ;; \
	*) $(BIN)/mypy ;; esac
	@echo "== import rules"
	$(BIN)/lint-imports

test: lint
	@echo "== pytest"
	$(BIN)/python -m pytest -m "not long"

test-long: $(STAMP)
	@echo "== pytest, whole runs"
	$(BIN)/python -m pytest -m long

# The oldest PyTorch that is supported, in an environment of its own.
test-oldest:
	$(MAKE) test test-long VENV=.venv-oldest TORCH="torch==2.6.0 torchvision==0.21.0"

gpu: $(STAMP)
	@echo "== $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') CUDA devices"
	$(BIN)/python -m pytest -m gpu -rs tests

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

faults: $(STAMP)
	$(BIN)/python tests/faults/run.py $(ROWS)

cifar-pair: $(STAMP)
	$(BIN)/python benchmarks/fetch.py cifar10
	test -f $(RUNS)/cifar10-teacher/metrics.json || $(BIN)/limbeck train examples/cifar10-teacher.yaml --out $(RUNS)/cifar10-teacher --resume
	$(BIN)/limbeck distill examples/cifar10.yaml --seeds 3 --out $(RUNS)/cifar10 --resume
	$(BIN)/python benchmarks/collect.py cifar-pair $(RUNS)/cifar10-teacher $(RUNS)/cifar10
	$(BIN)/python benchmarks/tables.py

r8: $(STAMP)
	$(BIN)/python benchmarks/fetch.py r8 minilm
	test -f $(RUNS)/r8-teacher/metrics.json || $(BIN)/limbeck train examples/r8-teacher.yaml --out $(RUNS)/r8-teacher --resume
	$(BIN)/limbeck distill examples/r8.yaml --seeds 3 --out $(RUNS)/r8 --resume
	$(BIN)/python benchmarks/collect.py r8 $(RUNS)/r8-teacher $(RUNS)/r8
	$(BIN)/python benchmarks/tables.py

# One row alone, e.g.  make bench ROWS="P1 P3"
bench: $(STAMP)
	$(BIN)/python benchmarks/fetch.py cifar10 r8 imdb minilm
	$(BIN)/python benchmarks/bench.py --peers
	$(BIN)/python benchmarks/bench.py $(ROWS)

image-check:
	docker/check.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
