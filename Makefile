# Baton from a clone. Python 3.11 to 3.14 and make are all it needs; `make help` says what there is.
#
#   ARGS="…"      goes on to the command: make serve ARGS="--port 8000", make test ARGS="-k stream"
#   PYTHON=…      the Python that .venv is made of; otherwise the first one found that is new enough
#   TORCH_INDEX=… the index that torch is taken from; otherwise the build that fits this machine

.DEFAULT_GOAL := help
.PHONY: help serve test test-clients check bench bench-peers chaos tiny lock clean tools static

BIN := .venv/bin
PYTHONS := $(or $(PYTHON),$(BIN)/python python3 python3.14 python3.13 python3.12 python3.11)
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))

# $(call install,FORM): brings .venv up to the form `serve`, or `test`, which holds the tools as well.
define install
@for python in $(PYTHONS); do \
    "$$python" -c '$(FITS)' 2>/dev/null && exec "$$python" deploy/install.py $(1); \
done; \
echo 'Baton needs Python 3.11, 3.12, 3.13 or 3.14, and $(or $(PYTHON),none on the PATH) is not one. Install one, then: PYTHON=python3.12 make $@' >&2; exit 1
endef

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

serve: ## a whole Baton on this machine: Redis, API, worker (ARGS: baton serve --help)
	$(call install,serve)
	@$(BIN)/baton serve $(ARGS)

test: tools static ## everything that is checked (ARGS: pytest's; -n 0 in one process)
	$(BIN)/python -m pytest -n auto $(ARGS)

test-clients: ## real clients: the SDKs for Python and node, two major versions of each (ARGS: pytest's)
	$(call install,test)
	BATON_TEST_CLIENTS=all $(BIN)/python -m pytest -n 0 -q tests/clients $(ARGS)

check: tools static ## what takes seconds: lint, types, compose, Dockerfiles, nginx
	$(BIN)/python -m pytest -q tests/deploy/test_files.py tests/deploy/test_proxy.py

bench: ## measure (ARGS: python -m tests.bench.run --help)
	$(call install,test)
	@$(BIN)/python -m tests.bench.run $(ARGS)

bench-peers: ## measure beside vLLM and transformers serve, in environments of their own (ARGS: python -m tests.bench.peers --help)
	$(call install,test)
	@$(BIN)/python -m tests.bench.peers $(ARGS)

chaos: ## streams under a seeded rain of faults, every answer judged (ARGS: python -m tests.chaos.run --help)
	$(call install,test)
	@$(BIN)/python -m tests.chaos.run $(ARGS)

tiny: ## train the built-in model again
	$(call install,serve)
	@$(BIN)/python -m worker.tiny.train $(ARGS)

lock: ## pin again what pyproject.toml asks for (ARGS=--upgrade: in the newest versions)
	@tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT && $(or $(PYTHON),python3) -m venv "$$tool" && \
	"$$tool/bin/pip" install --quiet --disable-pip-version-check uv && \
	"$$tool/bin/uv" pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	    --no-emit-index-url --no-emit-find-links --no-emit-package triton --custom-compile-command 'make lock' $(ARGS) \
	    pyproject.toml --output-file requirements.lock

clean: ## remove .venv and every cache
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where everything must be checked, the system's tools are installed; elsewhere a test names the tool that it missed.
tools:
	@if [ "$$BATON_TEST_REQUIRE" = all ]; then sh deploy/tools.sh; fi

static:
	$(call install,test)
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy
