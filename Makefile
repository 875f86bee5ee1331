# make serve    install (once) and serve the demo checkpoint at http://127.0.0.1:8000
# make test     install (once) and run the tests that need no GPU, no network and no weights
# make test-clients   real coding agents against a server process; installs them from npm, about 0.9 GB
# make fuzz     the fuzz targets; make test-all: everything that runs without a GPU, kernels compiled for all GPU families
# make check    style, types, and the architecture: layers, cycles, sizes, imports free of torch
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: serve test test-clients test-all fuzz check install install-test

install:
	@$(PYTHON) scripts/bootstrap.py

install-test:
	@$(PYTHON) scripts/bootstrap.py --extras test,check

serve: install
	@$(BIN)/saddle serve --host 127.0.0.1 $(ARGS)

test: install-test
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/serve

test-clients: install-test
	$(BIN)/python -m pytest tests/clients -rs

fuzz: install-test
	$(BIN)/python -m pytest tests/fuzz

test-all: test fuzz test-clients
	SADDLE_TEST_FAMILIES=all $(BIN)/python -m pytest tests/unit/kernels/test_compile.py

check: install-test
	$(BIN)/ruff check src tests scripts demo
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests demo
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py
