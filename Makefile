# The words of this project, the same at the desk and in CI. `make help` lists them.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
N ?= 300
EXTRAS := service,worker,local,cli
TOOLS := $(VENV)/.tools
TOOL_EXTRAS := $(EXTRAS),playground,otel,docs,dev

.DEFAULT_GOAL := help
.PHONY: help run playground test check chaos bench openapi evaluate-embedded model clean docs docs-pictures

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Literal, so that a prompt or a folder may hold a dollar sign.
override export ONCE := $(value ONCE)
override export MODEL := $(value MODEL)
export PORT

run: $(INSTALLED) ## the whole local stack; PORT=8000 MODEL=<folder or hub id> ONCE="a prompt"
	@exec $(BIN)/python deploy/local/stack.py

playground: $(TOOLS) ## a page to try a service in that runs (make run), at http://127.0.0.1:7860
	@exec $(BIN)/python -m playground

test: $(TOOLS) ## the whole test suite; ARGS="-k word" goes to pytest
	$(BIN)/python -m pytest $(ARGS)

check: $(TOOLS) docs ## style, types, import rules, container files, the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/unasync.py --check
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

docs: $(TOOLS) ## the site, into .safelatent/site; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -d .safelatent/doctrees docs .safelatent/site

docs-pictures: $(INSTALLED) ## draw the docs' pictures anew, with the embedded model
	$(BIN)/python -m docs.pictures

bench: $(TOOLS) ## speed and memory against diffusers' own pipeline
	$(BIN)/python -m benchmarks $(ARGS)

openapi: $(INSTALLED) ## write docs/openapi.json anew; ARGS=--break although it breaks clients
	$(BIN)/python -m service.openapi $(ARGS)

chaos: $(TOOLS) ## a whole stack under seeded faults; N=300 requests, ARGS="--seed 7"
	$(BIN)/python -m chaos --n $(N) $(ARGS)

evaluate-embedded: $(INSTALLED) ## what safety does to the embedded model, by a service that runs (make run)
	$(BIN)/python -m evaluation.embedded $(ARGS)

model: $(INSTALLED) ## train models/emoji_scenes from nothing (hours; goes on where it was stopped)
	$(BIN)/python -m training $(ARGS)

clean: ## remove the environment, the local state and every cache, but no training
	@find .safelatent -mindepth 1 -maxdepth 1 ! -name training -exec rm -rf {} + 2>/dev/null || true
	rm -rf $(VENV) dist docs/reference docs/problems .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What pip was killed at has no RECORD, which pip would take for installed.
define install
if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
  echo "safelatent: $(VENV) was left half made; it is made anew" >&2; \
  $(PYTHON) -m venv --clear $(VENV) || exit 1; \
fi; \
for part in $(VENV)/lib/python*/site-packages/{~*,*.dist-info}; do \
  if [[ -e $$part && ! -e $$part/RECORD || $$part == */~* ]] && rm -r "$$part" 2>/dev/null; then \
    echo "safelatent: $${part##*/} was left half installed; it is installed again" >&2; \
  fi; \
done; \
echo "safelatent: installing [$(1)] into $(VENV)"; \
$(BIN)/python -m pip install --disable-pip-version-check -e ".[$(1)]" -c constraints.txt || { \
  echo "safelatent: not installed; pip says why above. Put that right, and say the same make again" >&2; \
  exit 1; \
}; \
touch $@
endef

# The environment follows pyproject.toml and constraints.txt, and nothing else re-installs it.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@$(call install,$(EXTRAS))

$(TOOLS): pyproject.toml constraints.txt $(INSTALLED)
	@$(call install,$(TOOL_EXTRAS))

# Its Python went away (an upgrade of the system's), or pip never came: nothing in it counts.
$(shell test -x $(BIN)/python || rm -f $(INSTALLED) $(TOOLS))

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "safelatent: there is no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "safelatent: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "safelatent: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
