# Two commands: `make demo` and `make test`. Both set up what they need in .venv.

PYTHON ?= python3
SEED ?= 1
VENV := .venv
BIN := $(VENV)/bin

# What is not started by `pagedkv` or pytest, and imports MLX first: the OpenBLAS that they make.
PRELOAD = LD_PRELOAD="$$($(BIN)/python -c 'from pagedkv import blas; print(blas.path or "")')"
# Two thirds of a long prefill on Linux went into the kernel, handing pages out and taking them
# back for every large temporary: let glibc keep them.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592

.PHONY: help demo test check lint unit wheel releases placement faults fuzz kills machine \
	interruptions clients requests ends protocols threads models benchmark format clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

DOCUMENT ?= 6100

demo: $(VENV)/lm  ## fetch a small model and answer a question about a long document
	$(KEEP_MEMORY) $(BIN)/pagedkv generate --model demo --demo-document $(DOCUMENT) --max-tokens 32 \
		--hot-tokens 512 --sink-tokens 64 --kv K4V4 --warm 8MB --cold 256MB --format table

test: lint unit releases wheel  ## everything CI runs

lint: $(VENV)/test  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/test  ## pytest, in parallel
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

releases: $(VENV)/test  ## the suite's core with the oldest MLX and mlx-lm, and with the newest
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.check_releases

wheel: $(VENV)/test  ## build the wheel and look inside
	$(BIN)/python tests/check_wheel.py

placement: $(VENV)/test  ## the placement property, 2,100 examples
	OPENBLAS_NUM_THREADS=1 PLACEMENT_EXAMPLES=300 \
		$(BIN)/python -m pytest -n auto tests/test_placement.py

faults: $(VENV)/test  ## 100,000 faults of the disk against the cold store
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.fault_campaign --faults 100000 --seed 1

fuzz: $(VENV)/test  ## 1,000,000 malformed checkpoints
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_checkpoint --inputs 1000000 --seed 1

kills: $(VENV)/test  ## 1,000 processes killed while they use a store
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.kill_campaign --kills 1000 --seed 1

machine: $(VENV)/test  ## 1,000,000 random steps of the store and the cache
	OPENBLAS_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m tests.machine_campaign --steps 1000000 \
		--seed $(SEED) --processes 2

threads: $(VENV)/test  ## 8,000 requests from four threads, each answer checked
	OPENBLAS_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m tests.thread_campaign --requests 200 --runs 10

interruptions: $(VENV)/test  ## interrupt operations at every function that they enter
	OPENBLAS_NUM_THREADS=1 INTERRUPTIONS=all $(PRELOAD) $(BIN)/python -m pytest -n auto \
		tests/test_interruption.py

models: $(VENV)/test  ## try every model type of mlx-lm and mlx-vlm, write docs/models.md
	OPENBLAS_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m tests.model_table

clients: $(VENV)/test  ## 2,000 requests to the server, each answer checked
	OPENBLAS_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m tests.server_campaign --requests 2000 --seed $(SEED)

requests: $(VENV)/test  ## 20,000 requests of every kind to `serve`, beside clients with known answers
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.request_fuzz --requests 20000 --seed $(SEED)

ends: $(VENV)/test  ## 200 servers told to stop, interrupted or killed under load
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.server_kills --times 200 --seed $(SEED)

protocols: $(VENV)/test  ## OpenAI's clients, litellm: MODEL=FOLDER served by us and by mlx_lm.server
	$(BIN)/python -m pip install --quiet --target .protocols openai litellm requests
	npm install --silent --prefix .protocols openai
	OPENBLAS_NUM_THREADS=1 $(PRELOAD) PYTHONPATH=.protocols $(BIN)/python -m tests.client_campaign \
		--model $(MODEL) --node .protocols

benchmark: $(VENV)/test  ## attention, decode and prefill, small, on this machine
	$(BIN)/pagedkv bench all --quick --cold-rows --format table

format: $(VENV)/test  ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and build products
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info

$(VENV)/lm: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[lm]"
	touch $@

$(VENV)/test: pyproject.toml tests/mlx_vlm.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/mlx_vlm.txt
	touch $@ $(VENV)/lm

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pagedkv needs Python 3.11 or newer: make PYTHON=python3.13"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no venv module: sudo apt install python3-venv"; exit 1; }
