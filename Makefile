# Every target does its own set-up; a second call does no work twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev$(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,cuda)
# nothing is compiled by surprise; a CPU-only machine tells DeepSpeed so before it is imported
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TRITON := .triton

.PHONY: help setup demo test test-fast test-kernels lint format bench clean

help:
	@echo "make demo    generated videos -> shards -> trained model, score table, pictures in runs/demo"
	@echo "make test    every test that this machine can run; what was skipped is printed last"
	@echo "make test-kernels    the Triton kernels in Triton's interpreter, no GPU needed (downloads Triton, 1 GB on disk)"
	@echo "make lint    ruff and mypy        make format  write the formatting"
	@echo "make bench   the figures of benchmarks/ as one table"
	@echo "make setup   only the virtual environment ($(VENV))"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is `$(PYTHON) --version 2>&1`; Python 3.10 to 3.13 is needed; call make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment; on Debian install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	# DeepSpeed is built from source and imports torch while it is: torch comes first, and without build isolation
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# make demo SEED=1 is another run folder on the same clips; DEMO_ARGS goes to the trainer. source.seed=1: no setting was chosen on
# these clips
SEED := 0
DEMO_NAME := $(if $(filter-out 0,$(SEED)),demo_seed$(SEED),demo)
DEMO_ARGS :=
demo: $(STAMP)
	$(BIN)/python -m data_pipeline.build source=synthetic features=patch out=data/synthetic source.seed=1
	$(BIN)/python cluster/launch.py --nodes 1 --ranks-per-node 2 experiment=demo name=$(DEMO_NAME) seed=$(SEED) $(DEMO_ARGS)

# two workers; the tests of one file stay together, because they share runs
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/golden

# Triton takes a gigabyte and its import changes what DeepSpeed does: it lies in a folder of its own, for these tests alone
test-kernels: $(STAMP) $(TRITON)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q tests/unit/test_ssync_triton.py

$(TRITON)/.installed: constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(TRITON) 'triton==3.9.0'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(TRITON) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
