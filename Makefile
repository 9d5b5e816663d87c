# make install   .venv with everything that the other targets need
# make demo      adapt the bundled model to ICU-like vitals with every adapter; report in runs/demo/report.html
# make check     lint, types and import contracts
# make test      the checks and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
JOBS ?= 2

.PHONY: install demo test slow attack check fix quick bench

install: .venv/.complete

PLUGINS := $(wildcard plugins/*/pyproject.toml)

.venv/.complete: setup.cfg pyproject.toml constraints.txt $(PLUGINS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,ray,baselines]" $(PLUGINS:%/pyproject.toml=--editable %)
	touch $@

demo: install
	$(BIN)/gluonts-peft demo --out $(OUT) --jobs $(JOBS) $(if $(DATA),--data $(DATA)) $(if $(PATIENTS),--patients $(PATIENTS))

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90 -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q --ignore tests/test_matrix.py

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -q

attack: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/attack.py

bench: install
	$(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/bench_heads.py
	$(BIN)/python tests/benchmarks/bench_search.py
	$(BIN)/python tests/benchmarks/bench_vitals.py
