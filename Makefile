# Every target creates .venv and installs what it needs on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Without compiled files every process compiles torch and diffusers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint format bench clean

demo: $(READY)
	$(BIN)/diffalign demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m ''

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffalign trainers rewards samples

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.dpo_step

# uv resolves and installs in a fraction of pip's time; pip does it where uv cannot be had.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	($(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[test]') \
	  || $(BIN)/python -m pip install --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
