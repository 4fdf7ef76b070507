# make demo: the whole pipeline on the fictional corpus.  make app: a page over the demo's ensemble.  make test: the tests.
# make best DATA=FOLDER: PsyDefConv's train.json and test.json to predictions, on two cores.
# Each sets up .venv first.
PYTHON ?= python3
unexport PYTHON # what makes .venv; to the scripts it would be the interpreter to use in place of .venv's
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs

.PHONY: setup demo best app test soak quality style clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python scripts/system.py systems/demo.yaml

best: setup
	$(BIN)/python scripts/system.py systems/psydefconv-cpu.yaml

app: $(VENV)/.app $(OUT)/demo/ensemble.json
	$(BIN)/python app.py --bundle $(OUT)/demo --rows data/demo/train.json --compare $(OUT)/demo-probe

$(VENV)/.app: $(VENV)/.installed requirements-app.txt
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement requirements-app.txt
	touch $@

$(OUT)/demo/ensemble.json:
	$(MAKE) demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist worksteal -q

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
