# make run: everything from nothing, ending in the demo.  make test: everything that must hold.  make bench: how fast it is here.
# JOBS: how many test files run side by side (a test waits more than it computes).
# make test-gpu: on a machine with an NVIDIA GPU.
# make model-check: the queues' protocol, by SPIN, and the core's memory orders.  make sanitize: the tests of the compiled parts, built with GCC's sanitizers, some
# minutes; too long for make test.
PYTHON ?= python3
VENV := .venv
DURATION ?= 600
TRUST ?= plain
SEED ?= 1
MINUTES ?= 10
KILLS ?= 20
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: run test test-gpu lint types unit bench hostile kill-matrix chaos soak fleet-kills model-check sanitize clean
.DELETE_ON_ERROR:

run: $(VENV)/ready
	@echo "3 of 3: the demo, which fetches a small model, once"
	@$(BIN)/shmbroker demo

test: lint types unit

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ray
	$(BIN)/mypy

unit: $(VENV)/ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda]'
	$(BIN)/python -m pytest -rs tests/gpu_hardware tests/gpu_worker

$(VENV)/ready: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard shmbroker/*/*.c shmbroker/*/*.h shmbroker/*/*/*.h)
	@echo "1 of 3: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2 of 3: what the project needs, torch among it: some minutes, once"
	@$(PYTHON) install.py $(BIN)/python --constraint constraints.txt --editable '.[gguf,serve,test]'
	@touch $@

$(VENV)/ray: $(VENV)/ready
	@echo "Ray, which the tests of fleets start clusters of: some minutes, once"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	@touch $@

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks

$(VENV)/bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

hostile: $(VENV)/ready
	HOSTILE_FRAMES=1000000 $(BIN)/python -m pytest tests/hostile

kill-matrix: $(VENV)/ready
	TRUST=$(TRUST) $(BIN)/python -m tests.faults.matrix

chaos: $(VENV)/ready
	$(BIN)/python -m tests.faults.chaos $(DURATION) $(SEED)

soak: $(VENV)/ready
	$(BIN)/python -m tests.faults.soak $(MINUTES)

fleet-kills: $(VENV)/ray
	$(BIN)/python -m tests.faults.fleet $(KILLS) $(SEED)

model-check:
	docs/protocol/check.sh
	$(PYTHON) docs/protocol/weak_memory.py

sanitize: $(VENV)/ready
	$(BIN)/python -m tests.sanitize

clean:
	rm -rf $(VENV) *.egg-info build dist shmbroker/*/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
