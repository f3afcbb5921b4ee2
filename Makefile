# The two commands of the README are `make demo` and `make test`; the rest are a developer's habits.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check proto serve bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[server,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash .ci/check

proto: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash proto/generate.sh clients/python

serve: $(INSTALLED)
	$(BIN)/patchclamp serve

bench: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
