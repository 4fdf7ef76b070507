# make demo: the whole pipeline on the fictional corpus.  make test: the tests.  Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs
DEMO := data/demo/train.json
DEMO_TEST := data/demo/test.json
GUIDE := data/demo/label_guide.yaml

.PHONY: setup demo test soak quality style clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python augment.py --label_guide $(GUIDE) --train_file $(DEMO) --labels 2 5 8 --k 2 --output_file $(OUT)/demo-augmented.jsonl
	$(BIN)/python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
	    --label_guide $(GUIDE) --train_file $(DEMO) --test_file $(DEMO_TEST) --output_dir $(OUT)/demo-probe
	JOBS=2 scripts/launch_folds.sh recipes/minilm/demo.yaml --augmented_file $(OUT)/demo-augmented.jsonl
	JOBS=2 scripts/launch_folds.sh recipes/smollm2-135m/demo.yaml --augmented_file $(OUT)/demo-augmented.jsonl \
	    --model_name_or_path "$$($(BIN)/python scripts/packaged_model.py smollm2-135m)"
	$(BIN)/python calibrate.py --run $(OUT)/demo-minilm --output $(OUT)/demo-decision.json
	$(BIN)/python ensemble.py --runs $(OUT)/demo-probe $(OUT)/demo-minilm $(OUT)/demo-smollm2 --weights 0.4 0.3 0.3 \
	    --test_file $(DEMO_TEST) --output_dir $(OUT)/demo

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
