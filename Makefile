# make demo: the whole pipeline on the fictional corpus.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs

.PHONY: setup demo test soak quality style clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python scripts/system.py systems/demo.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 -q

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -q -s

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(OUT) .pytest_cache .ruff_cache
