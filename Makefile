# make image PROMPT="a raccoon astronaut"   set up what is missing and draw a picture
# make test                                 set up what is missing and run the tests
# make test-all                             the tests that take minutes too
# make check                                what CI runs: lint, format, types, tests
# make format                               format the code and mend what the linter can mend
# make clean                                remove .venv, builds and caches
#
# Variables: PROMPT, SEED, OUT (the file), UPSCALE (4: the bundled model draws 128 pixels, shown at 512),
# FAST (1: in four steps), ARGS (more options of scripts/generate.py), PYTHON, JOBS.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help image test test-all check format clean

PROMPT ?= a raccoon astronaut
SEED ?= 0
UPSCALE ?= 4
OUT ?= outputs/image.png
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The first python that is new enough; empty if there is none.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# A prompt goes to the program through the environment, unread by make and by the shell: quotes,
# apostrophes, spaces and dollars survive. $(value ...) is the text before make expands it.
unexport PROMPT SEED OUT UPSCALE
export IMAGE_PROMPT := $(value PROMPT)
export IMAGE_SEED := $(value SEED)
export IMAGE_OUT := $(value OUT)
export IMAGE_UPSCALE := $(value UPSCALE)

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

image: $(VENV)/.installed
	@mkdir -p "$$(dirname "$$IMAGE_OUT")"
	@$(BIN)/python scripts/generate.py --seed "$$IMAGE_SEED" --out "$$IMAGE_OUT" --upscale "$$IMAGE_UPSCALE" $(if $(filter-out 0 no off false,$(FAST)),--fast) $(value ARGS) -- "$$IMAGE_PROMPT"
	@echo "The picture is in $$IMAGE_OUT"

# One thread a worker: JOBS workers with torch's own thread pools would fight for the cores.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=10

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	@$(MAKE) --no-print-directory test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
	find ldm pipelines scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than 3.11: name a newer one with PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
