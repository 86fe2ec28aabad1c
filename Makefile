# The two commands of a newcomer: `make quickstart` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test check bench clean

quickstart: $(STAMP)
	$(VENV)/bin/draftkit quickstart --out runs/quickstart

test: $(STAMP)
	$(VENV)/bin/python -m pytest -m "not slow"

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

bench: $(STAMP)
	$(VENV)/bin/draftkit verify-lossless
	$(VENV)/bin/python -m checks.agreement runs/quickstart/drafter/best --prompts 60

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11 (or newer)"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	$(VENV)/bin/draftkit compile
	touch $@

clean:  # runs/ stays: it may hold hours of training
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
