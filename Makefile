# `make lab` opens the course, `make test` checks it. Each builds .venv first; a second call finds it ready.
# Recipes use relative paths and `.venv/bin/python -m …`, which work from a folder with spaces in its name.
SHELL := bash
PYTHON ?=
PORT ?= 8888
LABFLAGS ?=
SUBMISSIONS ?=
ASSIGNMENT ?=
OUT ?= graded
REVEAL ?=
UNSANDBOXED ?=
export PYTHON PORT SUBMISSIONS ASSIGNMENT OUT
export TOKENIZERS_PARALLELISM = false

.PHONY: help lab test check bench book ledger notebooks exercises grade grade-audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=/path/to/python3.11, PORT=8890, LABFLAGS=--no-browser;"
	@echo "for make grade: SUBMISSIONS=folder ASSIGNMENT=lora OUT=graded REVEAL=1 (show the hidden tests in the feedback)"
	@echo "  UNSANDBOXED=1 (grade although bubblewrap is not there)"

# JupyterLab refuses to run as root, the only user that many containers have, unless it is told to.
lab: ## open a copy of the course of your own, my/, in JupyterLab
	@bash tools/setup.sh --port "$$PORT"
	@bash tools/setup.sh real,serve,beyond
	.venv/bin/python -m minipeft.course.mine
	PATH="$$PWD/.venv/bin:$$PATH" .venv/bin/python -m jupyterlab --ServerApp.root_dir="$$PWD" --ServerApp.port="$$PORT" \
		--ServerApp.port_retries=0 --LabApp.default_url=/lab/tree/my/notebooks/00_start_here.ipynb \
		$$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LABFLAGS)

# Two processes, each with whole files and one thread: what takes long comes first, so that both end together. One that
# dies is started again, but not without end.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 2

test: ## lint, tests, and every lesson executed and compared with its committed outputs
	@bash tools/setup.sh real,test,classroom,book
	@(bash tools/setup.sh flower || echo "The test of Flower will be skipped.") & # ready long before its test
	.venv/bin/python -m ruff check .
	$(PYTEST) --durations 10 --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 600 \
		notebooks tests/grading tests

check: ## lint and the fast tests, for the habit of running them
	@bash tools/setup.sh real,test,classroom,book
	.venv/bin/python -m ruff check .
	$(PYTEST) -m "not slow" tests

book: ## build the book, a static site with sliders that need no kernel, into build/book
	@bash tools/setup.sh real,book
	.venv/bin/python book/make_book.py

bench: ## measure every benchmark, and write the tables of README.md and docs/benchmarks.md
	@bash tools/setup.sh real,test,classroom
	.venv/bin/python benchmarks/table.py

ledger: ## recompute every row of the claims ledger and print it (make ledger LEDGER=--write stores it)
	@bash tools/setup.sh real
	.venv/bin/python -m minipeft.course.claims $(LEDGER)

notebooks: ## execute every lesson again and normalise the files
	@bash tools/setup.sh real,serve,beyond
	.venv/bin/python -m minipeft.course.notebooks

exercises: ## build exercises/ from solutions/
	@bash tools/setup.sh real,classroom
	.venv/bin/python -m minipeft.course.assignments

grade: ## grade a class: make grade SUBMISSIONS=folder
	@bash tools/setup.sh real,classroom
	@[ -n "$$SUBMISSIONS" ] || { echo "Say which folder holds the submissions: make grade SUBMISSIONS=folder" >&2; exit 2; }
	.venv/bin/python -m minipeft.course.grade "$$SUBMISSIONS" --out "$$OUT" \
		$${ASSIGNMENT:+--assignment "$$ASSIGNMENT"} $(if $(REVEAL),--reveal) $(if $(UNSANDBOXED),--unsandboxed)

grade-audit: ## try the graders on answers whose worth is known
	@bash tools/setup.sh real,test,classroom
	.venv/bin/python tests/grading/audit.py
	.venv/bin/python tests/grading/mutants.py
