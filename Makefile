# make reproduce   run the notebooks, regenerate every figure and table
# make test        lint, unit tests, the notebooks against their stored outputs, and in a browser
# make test-fast   lint, and the tests of the mathematics
# make book        the executed notebooks as pages that open from disk, in build/book/;
#                  SOLUTIONS=1 adds the worked solutions
# make fuzz        thousands of bad inputs of every kind: docs/robustness.md
# make faults      runs killed at random moments, full disks, ...: the same
# make lab         open the notebooks in JupyterLab
# make bench       measure speed, beside deepinv and torchdeq: benchmarks/README.md
# make slides      one lecture of docs/teaching.md as slides, build/slides/lesson.html
# make address     write the repository's address, of pyproject.toml, wherever it is named
# make lock        renew requirements.lock
# make publish     after a clean run: its outputs into figures/published, the notebooks, README.md

PYTHON ?= python3
PROFILE ?= quick
DATA ?=
WEIGHTS ?=
ARGS ?=

VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
INSTALLED := $(VENV)/.installed
# Libraries are compiled when first imported, and kept, even where the environment forbids it: the
# tests start a hundred processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: reproduce test test-fast lint book slides fuzz faults lab bench address lock publish

reproduce: $(INSTALLED)
	$(BIN)/jfbnb reproduce --profile $(PROFILE) $(if $(DATA),--data "$(DATA)") \
	  $(if $(WEIGHTS),--weights "$(WEIGHTS)")

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/lint-imports

test-fast: lint
	$(BIN)/python -m pytest --numprocesses 2 tests/mathematics

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# On a copy, with runs/ and figures/ of its own, trained networks, and few images.
	rm -rf build/nbval
	mkdir -p build/nbval
	cp -r notebooks docs build/nbval/
	for notebook in build/nbval/notebooks/0[3456]_*.ipynb; do $(BIN)/papermill --prepare-only \
	  --log-level ERROR -p weights data/weights/quick -p n_test 4 -p condition_images 1 \
	  -p own_epochs 1 -p problem_images 1 -p checked_images 1 "$$notebook" "$$notebook" || exit 1; \
	done
	JFBNB_WORK=build/nbval OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 \
	  --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 900 build/nbval
	$(BIN)/python -m pytest tests/tables

book: $(INSTALLED)
	$(BIN)/python tools/book.py $(if $(SOLUTIONS),--solutions)

slides: $(INSTALLED)
	$(BIN)/python tools/slides.py

fuzz: $(INSTALLED)
	JFBNB_FUZZ=$${JFBNB_FUZZ:-1000} $(BIN)/python -m pytest tests/test_fuzz.py \
	  --hypothesis-show-statistics --junitxml build/fuzz.xml $(ARGS)

faults: $(INSTALLED)
	JFBNB_KILLS=$${JFBNB_KILLS:-75} $(BIN)/python -m pytest tests/test_faults.py \
	  --junitxml build/faults.xml $(ARGS)

lab: $(INSTALLED)
	$(BIN)/jfbnb lab

# The lock has the peers; the first command is for an environment made in another way.
bench: $(INSTALLED)
	@$(BIN)/python -c 'import sys; from importlib.util import find_spec as f; \
	  sys.exit(not (f("deepinv") and f("torchdeq")))' || \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench]' || true
	$(BIN)/python benchmarks $(ARGS)

address:
	$(PYTHON) tools/address.py

lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --extra notebooks --extra test --output-file requirements.lock pyproject.toml

publish: $(INSTALLED)
	$(BIN)/python tools/publish.py $(PROFILE)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jfbnb needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
