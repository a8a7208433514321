# `make run` and `make test` need Python 3.11 or newer with pip, and the package index.
PYTHON ?= python3
VENV := .venv

.PHONY: run test check lint docs site clean

run: $(VENV)/run-installed
	$(VENV)/bin/python main.py

test: $(VENV)/test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# The inner loop: lint, types and the core's tests.
check: $(VENV)/test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m fast

lint: $(VENV)/test-installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# config.yaml and the tables of the pages, from the schema and the records.
docs: $(VENV)/run-installed
	$(VENV)/bin/python -m lab.config.document

# The pages of docs/ as a site, docs/_build/index.html; a broken link, anchor or formula fails.
site: $(VENV)/site-installed
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run-installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test-installed: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/site-installed: requirements-docs.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@
