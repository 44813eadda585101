# The same few commands everywhere. `make test` on a fresh clone makes .venv, installs what is pinned, and runs.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One thread a process: two test workers on two cores, and latencies that can be compared.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install test test-all check format demo bench coverage-all clean

help:
	@echo "make install       create $(VENV) and install what constraints.txt pins (done once)"
	@echo "make test          the test suite, two workers"
	@echo "make test-all      the test suite with the slow tests"
	@echo "make check         ruff, ruff format, mypy --strict"
	@echo "make demo          train, prune, fine-tune and export a network on real images"
	@echo "make bench         time and memory of every stage, beside Torch-Pruning"
	@echo "make coverage-all  prune one network of every family in timm and torchvision"

install: $(STAMP)

# torch goes first and alone: its exact pin decides which build everything else is resolved against.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[all,dev]'
	touch $@

test: $(STAMP)
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal

test-all: $(STAMP)
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal -m ''

check: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

demo: $(STAMP)
	$(PY) -m secateur demo

bench: $(STAMP)
	$(ONE_THREAD) $(PY) benchmarks/speed.py

coverage-all: $(STAMP)
	$(PY) benchmarks/coverage.py --all

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
