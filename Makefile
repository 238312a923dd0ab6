# `make lab` opens the course, `make test` checks it. Each builds .venv first; a second call finds it ready.
# Recipes use relative paths and `.venv/bin/python -m …`, which work from a folder with spaces in its name.
SHELL := bash
PYTHON ?=
PORT ?= 8888
LABFLAGS ?=
export PYTHON PORT
export TOKENIZERS_PARALLELISM = false

.PHONY: help lab test notebooks

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=/path/to/python3.11, PORT=8890, LABFLAGS=--no-browser"

# JupyterLab refuses to run as root, the only user that many containers have, unless it is told to.
lab: ## open the course in JupyterLab
	@bash tools/setup.sh --port "$$PORT"
	@bash tools/setup.sh real
	PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python -m jupyterlab --ServerApp.root_dir="$$PWD" --ServerApp.port="$$PORT" \
		--ServerApp.port_retries=0 $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LABFLAGS) notebooks/00_start_here.ipynb

test: ## lint, tests, and every lesson executed and compared with its committed outputs
	@bash tools/setup.sh real,test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m pytest -rs -n 2 --dist loadfile tests
	.venv/bin/python -m pytest -rs --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg \
		--nbval-cell-timeout 300 notebooks/

notebooks: ## execute every lesson again and normalise the files
	@bash tools/setup.sh real
	.venv/bin/python -m minipeft.course.notebooks
