# `make` lists the targets. Each makes what it needs; none needs another to have run.
#
# TORCH_INDEX: a package index with CPU builds of torch, for machines whose default index brings CUDA packages, e.g.
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
QUESTION ?= What is agentmesh, and what does it promise?
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
BIN = $(VENV)/bin
TORCH_FROM = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

.PHONY: help demo ask test check fix docs docs-serve bench transformers lowest clean
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.local  ## run a crew over docs/ with the bundled local model: no key, no server, no GPU
	$(BIN)/agentmesh models pull smollm2
	$(BIN)/agentmesh run docs/examples/briefing.py "$(QUESTION)"

ask: QUESTION = What happens to a run when a worker dies?
ask: $(VENV)/.dev  ## ask the project's own docs, answered with quotes: no key, no server, no GPU
	$(BIN)/agentmesh models pull smollm2
	$(BIN)/agentmesh run docs/examples/ask_docs.py "$(QUESTION)"

test: $(VENV)/.dev  ## pass every test
	$(BIN)/agentmesh models pull smollm2
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: $(VENV)/.dev  ## lint, format, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/house

fix: $(VENV)/.dev  ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## build the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet -f docs/site/mkdocs.yml

docs-serve: $(VENV)/.dev  ## show the documentation while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve -f docs/site/mkdocs.yml

bench: $(VENV)/.dev  ## print the figures: ratios beside a bare loop and plain Celery
	$(BIN)/python bench/start.py
	$(BIN)/python bench/steps.py
	$(BIN)/python bench/rounds.py
	$(BIN)/python bench/fanout.py
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/gpu_batch.py
	$(BIN)/python bench/gpu_prefix.py
	$(BIN)/python bench/gpu_embed.py

TRANSFORMERS ?= 5.22.0 5.24.0
transformers: $(TRANSFORMERS:%=$(VENV)/.transformers-%)  ## pass the local engine's tests on both ends of the range of transformers
	for release in $(TRANSFORMERS); do $(VENV)/transformers-$$release/bin/python -m pytest -q tests/gpu || exit 1; done

lowest: $(VENV)/.lowest  ## pass the tests that need no torch with the oldest packages that pyproject.toml allows
	$(VENV)/lowest/bin/python -m pytest -q -p no:anyio tests/unit tests/contract -k "not torch" --deselect tests/unit/test_doctor.py::test_the_command

clean:  ## remove what the targets made
	rm -rf $(VENV) .agentmesh build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.local: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) $(TORCH_FROM) torch
	$(PIP) -e '.[local]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) $(TORCH_FROM) torch
	$(PIP) -e '.[local,rag,langchain,notebook,dev]'
	touch $@ $(VENV)/.local

# another transformers in front of the packages that are installed here
$(VENV)/.transformers-%: | $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip $(VENV)/transformers-$*
	$(BIN)/python -m pip --disable-pip-version-check --python $(VENV)/transformers-$* install --no-deps transformers==$*
	$(BIN)/python -c "import sysconfig as s; print('import site; site.addsitedir(%r)' % s.get_path('purelib'))" \
		> `$(VENV)/transformers-$*/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))"`/installed_here.pth
	touch $@

$(VENV)/.lowest: pyproject.toml | $(VENV)/bin/python
	$(PIP) uv
	$(BIN)/uv venv --clear --seed --python $(BIN)/python $(VENV)/lowest
	$(BIN)/uv pip install --python $(VENV)/lowest/bin/python --resolution lowest-direct -e '.[rag,langchain,otel,metrics,serve]'
	$(BIN)/uv pip install --python $(VENV)/lowest/bin/python hypothesis huggingface_hub openai pytest pytest-randomly pytest-timeout \
		pytest-xdist ruff sqlalchemy
	touch $@
