# Everything runs in a virtual environment that the first target makes from the lock.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= videos
# Test processes, one thread each.
JOBS ?= 2

.PHONY: demo test vbench-env lint types check check-diffusers lock clean

demo: $(VENV)/.ready
	$(BIN)/dit-sparse generate examples/prompts.txt --out $(OUT)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# What the tests of VBench run in: its dimensions that need no weights, beside the torch of the environment above.
vbench-env: $(VENV)/.ready
	$(BIN)/dit-sparse vbench setup --light --folder $(VENV)-vbench

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

check: lint types test

# The guard tests on the oldest and the newest diffusers that pyproject admits, in throw-away environments.
check-diffusers: $(VENV)/.ready
	$(BIN)/python scripts/check_diffusers.py

# The marker is made last, so an interrupted set-up starts again.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Resolves pyproject's ranges afresh in a throw-away environment.
lock:
	$(PYTHON) scripts/lock.py requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-vbench build dist .pytest_cache .mypy_cache .ruff_cache
