# Everything runs in .venv beside this file; all it needs is python3 (3.11 or newer) and make.

PYTHON ?= python3
UV ?= uv
BIN := .venv/bin
STAMP := .venv/.installed

# Nothing that the caller's shell happens to hold changes what happens here, or costs money.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE VIRTUAL_ENV
unexport PYTEST_ADDOPTS PYTEST_PLUGINS
# Of pip's options only how it gets at packages: others (PIP_TARGET, PIP_DRY_RUN) change what it does.
unexport $(filter-out PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_NO_INDEX PIP_FIND_LINKS PIP_TRUSTED_HOST \
	PIP_CERT PIP_CLIENT_CERT PIP_PROXY PIP_KEYRING_PROVIDER PIP_TIMEOUT PIP_DEFAULT_TIMEOUT PIP_RETRIES \
	PIP_CACHE_DIR PIP_NO_CACHE_DIR PIP_CONFIG_FILE,$(filter PIP_%,$(.VARIABLES)))
unexport GEMINI_API_KEY GOOGLE_API_KEY GOOGLE_GEMINI_BASE_URL OPENAI_API_KEY OPENAI_BASE_URL
unexport ANTHROPIC_API_KEY
unexport $(filter BATCHLLM_%,$(.VARIABLES))
export PYTHONNOUSERSITE := 1
# Servers on this machine, which tests start, are not behind the shell's proxy.
export NO_PROXY := $(NO_PROXY),$(no_proxy),127.0.0.1,localhost,::1
export no_proxy := $(NO_PROXY)

# A venv works in the folder it was made in only: in a copied tree it is set up anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help setup demo test test-server check format bench boundary congestion chaos wheel dist check-wheel lock clean

help:
	@echo "make demo    the main job on real text, with the simulated provider: demo/results.jsonl"
	@echo "make test    all tests (a real Valkey, real workers)"
	@echo "make test-server SERVER=/path/to/redis-server  ledger, limiter and main job on it"
	@echo "make check   format, lint, types, import rules"
	@echo "make bench   prints the figures"
	@echo "make boundary  thousands of generated cases; SEED=... others, CASES=AREA:NUMBER one again"
	@echo "make congestion  the limiter before servers without a quota, in virtual time"
	@echo "make chaos   kills, freezes and starves for minutes"
	@echo "make format  puts the code in order"
	@echo "make lock    pins requirements.lock anew (needs uv)"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batchllm-celery needs Python 3.11 or newer, not " + sys.version.split()[0])'
	@test "$$(cat $@ 2>/dev/null || echo $(CURDIR))" = "$(CURDIR)" || rm -rf .venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || rm -rf .venv
	@test -d .venv || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		$(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo $(CURDIR) > $@

demo: $(STAMP)
	@mkdir -p demo
	BATCHLLM_STATE_DIR=demo/state $(BIN)/batchllm run examples/data/docstrings.jsonl \
		--prompt "Say in one sentence what this does: {text}" --model simulated --rpm 3000 \
		--workers 2 --overwrite -o demo/results.jsonl

# More processes than cores: most tests wait for processes of their own. The longest come first.
SPREAD := -n 4 --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python -m pytest -q $(SPREAD)

# The ledger, the limiter and the main job on another server: make test-server SERVER=/path/to/it
test-server: $(STAMP)
	BATCHLLM_TEST_SERVER="$(SERVER)" $(BIN)/python -m pytest -q $(SPREAD) \
		tests/integration/test_connection.py tests/integration/test_ledger.py \
		tests/integration/test_ledger_model.py tests/integration/test_limiter_fleet.py \
		tests/integration/test_limiter_model.py tests/integration/test_worker_runtime.py \
		tests/integration/test_gemini_cache.py \
		tests/acceptance/test_main_job.py tests/acceptance/test_ledger_promises.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Odd answers, calls and rows by the thousands. What fails prints the line that runs it again.
SEED ?= $(shell date +%s)
boundary: SEED := $(SEED)
boundary: $(STAMP)
	BOUNDARY_SEED=$(SEED) BOUNDARY_COUNT=$(COUNT) BOUNDARY_CASES=$(CASES) \
		$(BIN)/python -m pytest -q -m boundary -n 2 tests/boundary
	@echo "Seed $(SEED)"

congestion: $(STAMP)
	$(BIN)/python -m benchmarks.congestion

chaos: $(STAMP)
	$(BIN)/python -m pytest -q -s -m chaos

wheel: $(STAMP)
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

dist: $(STAMP)
	rm -rf dist
	$(BIN)/hatchling build -d dist

# The wheel of dist/ alone, in a bare environment: the command is there and answers rows.
check-wheel:
	rm -rf build/bare && mkdir -p build
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install -q --disable-pip-version-check dist/*.whl
	build/bare/bin/python -m pip check
	build/bare/bin/batchllm --version
	cd build/bare && BATCHLLM_STATE_DIR=state bin/batchllm run ../../examples/data/docstrings.jsonl \
		--prompt "Say in one sentence what this does: {text}" --model simulated --rpm 30000 \
		--overwrite -o results.jsonl

lock:
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --all-extras --no-strip-extras --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf demo dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
