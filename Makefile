# `make quickstart` and `make test` need Python 3.11+ and nothing installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The wheel or version of PyTorch. The pinned one is enough for a CPU; owners of a GPU give theirs: make env TORCH=torch==2.13.0
TORCH ?= torch==2.13.0

# TRL stands in an environment of its own, which sees .venv's packages; and its last release with PPO in a folder there.
PARITY := .venv-parity
TRL := trl==1.16.0 accelerate==1.15.0
TRL_PPO := trl==1.12.0

# Playwright stands in a folder of its own; the browser is the machine's (Debian: apt-get install chromium).
BROWSER := .venv-browser

.PHONY: env quickstart test test-slow test-parity test-browser lint clean

env: $(VENV)/.ready

# PyTorch goes first and alone, so that the constraint on it decides which build is taken.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	if $(BIN)/python -c 'import triton' 2> /dev/null; then sed -i '/^triton==/d' $(VENV)/constraints.txt; fi # a CUDA build's own
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(VENV)/constraints.txt
	touch $@

quickstart: env
	$(BIN)/python -m lightning_align pipeline --config configs/playground/quickstart.yaml

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 8 --dist loadfile

test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

$(PARITY)/.ready: $(VENV)/.ready
	$(BIN)/python -m venv --clear --without-pip $(PARITY)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(PARITY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	$(BIN)/python -m pip --python $(PARITY) install --quiet --disable-pip-version-check $(TRL) -c $(VENV)/constraints.txt
	$(BIN)/python -m pip --python $(PARITY) install --quiet --disable-pip-version-check --no-deps \
		--target $(PARITY)/ppo $(TRL_PPO)
	touch $@

test-parity: $(PARITY)/.ready
	OMP_NUM_THREADS=1 $(PARITY)/bin/python -m pytest tests/parity --ignore tests/parity/ppo
	OMP_NUM_THREADS=1 PYTHONPATH=$(PARITY)/ppo $(PARITY)/bin/python -m pytest tests/parity/ppo

$(BROWSER)/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(BROWSER) 'playwright>=1.50'
	touch $@

test-browser: $(BROWSER)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(BROWSER) $(BIN)/python -m pytest tests/browser

clean:
	rm -rf $(VENV) $(PARITY) $(BROWSER)
