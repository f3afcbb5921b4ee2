# The two commands of the README are `make demo` and `make test`; the rest are a developer's habits. `make test-all` is
# for the night: every case of what `make test` draws a sample of, and the planted defects one after another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One stamp a set of packages: the demo does not wait for the developer's tools.
RUNNING := $(VENV)/.installed-server
TESTING := $(VENV)/.installed-dev
# What benchmarks compare with, in an environment of its own.
PEERS := $(VENV)-peers/.installed

WORKERS ?= 2

.PHONY: demo test test-all check proto generated docs serve bench peers numbers clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUNNING): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the server into $(VENV) (a few minutes, mostly downloads)"
	$(PIP) install --progress-bar on -c constraints.txt -e '.[server]'
	touch $@

$(TESTING): $(RUNNING) .ci/prometheus
	@echo "installing the developer's tools into $(VENV)"
	$(PIP) install --progress-bar on -c constraints.txt -e '.[server,dev]'
	bash .ci/prometheus $(VENV)
	touch $@

# llama.cpp is compiled here, for this machine's processor: some minutes.
$(PEERS):
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install llama-cpp-python==0.3.36
	touch $@

demo: $(RUNNING)
	$(BIN)/python benchmarks/demo

test: $(TESTING)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(TESTING)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --all
	$(BIN)/python tests/mutants.py
	$(BIN)/python tests/kernels/mutate.py

check: $(TESTING)
	PATH="$(abspath $(BIN)):$$PATH" bash .ci/check

proto: $(TESTING)
	PATH="$(abspath $(BIN)):$$PATH" bash proto/generate.sh clients/python

generated: proto
	$(BIN)/python clients/python/generate_sync.py

docs: $(TESTING)
	$(BIN)/python docs/build.py

serve: $(RUNNING)
	$(BIN)/patchclamp serve

bench: $(RUNNING) $(PEERS)
	$(BIN)/python benchmarks/cpu.py --llama-cpp $(VENV)-peers/bin/python
	$(BIN)/python benchmarks/readme.py

peers: $(RUNNING)
	$(BIN)/python benchmarks/peers
	$(BIN)/python benchmarks/readme.py

numbers: $(RUNNING)
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) $(VENV)-peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
