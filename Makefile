# One word per job. The virtual environment in .venv is made on first use; set PYTHON to use another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Ranks of the demo; empty for what the deepspeed launcher finds (every GPU of the machine).
RANKS ?= $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || echo 2)

.PHONY: demo test lint bench fuzz soak gpu-check

demo: $(VENV)/.installed
	PATH=$(abspath $(BIN)):$$PATH deepspeed --quiet $(if $(RANKS),--num_accelerators $(RANKS)) \
		launch/pretrain.py --ds_config ds_configs/zero2.json --output runs/demo

# The tests of the launch scripts run last: they start processes of their own and measure limits. All are for the CPU, also
# where there is a GPU.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PATH=$(abspath $(BIN)):$$PATH $(BIN)/pytest -n auto --maxprocesses 8 --durations 10
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not e2e and not soak"
	$(PYTEST) -m "e2e and not soak" --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# 10,000 broken shards.
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -s tests/unit/test_fuzzed_shards.py

# A worker's memory over 50,000 samples; twenty failures of a run over two hosts, as root with openssh-server and iproute2.
soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PATH=$(abspath $(BIN)):$$PATH $(BIN)/pytest -m soak -v -s --durations 0 \
		--ignore tests/unit/test_fuzzed_shards.py

bench: $(VENV)/.installed-dev
	$(BIN)/pytest tests/kernel --benchmark-only -o python_files='bench_*.py'

# On a machine with a GPU: runs, the tests that need one, the cost of a step and of the kernels, in one report. OPTIONS="--minutes 30
# --compiled" gives it more time and times the kernels' references under torch.compile too.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m aclip.benchmarks.gpu_check $(OPTIONS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "aclip needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no module venv: install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python setup.py
	$(BIN)/pip install --quiet -e '.[dev,eval]'
	touch $@ $(VENV)/.installed
