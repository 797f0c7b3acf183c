# Every target makes the environment first, if it is not there yet. Needs git, make and Python 3.11 or later.

PYTHON ?= python3
BIN := .venv/bin
NBVAL := $(BIN)/python -m pytest notebooks -p no:python -p no:cacheprovider --nbval --nbval-current-env \
	--nbval-sanitize-with notebooks/nbval_sanitize.cfg --nbval-cell-timeout 600 --timeout 600 --maxfail=1
CLEAN := $(BIN)/nbstripout --keep-output --keep-count \
	--extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"

# an interpreter that finds no compiled modules takes twice as long to import torch
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test stored-notebooks smoke-run e2e lab music bench record notebooks lock

demo: .venv/ready
	$(BIN)/python -m lib.pipeline --preset demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 -m "not jupyterlab"
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target stored-notebooks smoke-run

# beside each other: most of a small notebook's time is one core's
stored-notebooks:
	$(NBVAL)

# in a folder where notebook 05, which may run beside it, looks for no run
smoke-run:
	$(BIN)/python -m lib.pipeline --preset smoke --out outputs/test/smoke

# in a real browser, which must be there: the report page, and JupyterLab with notebooks 03, 04 and 05; about eight minutes.
# Leaves pictures of what it saw in outputs/e2e
e2e: .venv/ready
	NEED_BROWSER=1 $(BIN)/python -m pytest tests/e2e

# a server of its own would close the connection on uploads above 10 MB; kernels find modules of your own in this folder
lab: .venv/ready
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(BIN)/jupyter lab notebooks --ServerApp.tornado_settings='{"websocket_max_message_size": 500000000}'

# real, free music into data/music; data/README.md says how to train on it
music:
	data/fetch_music.sh data/music

# PARTS="cascade data" measures some of it
BENCH ?= outputs/bench
bench: .venv/ready
	$(BIN)/python tests/bench $(PARTS) --out $(BENCH)

# measure what the README quotes, in a clone of this commit, into outputs/record/; resumes on the same commit. About ten
# hours in all, six of them the explosion's; PARTS="fusion" measures some of it and keeps the rest
PRESET ?= demo
record: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group record
	$(BIN)/python tests/record --preset $(PRESET) $(if $(PARTS),--parts $(PARTS))

# execute the stored notebooks with the smoke preset and store their outputs
notebooks: .venv/ready
	TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace notebooks/*.ipynb
	$(CLEAN) notebooks/*.ipynb

lock: .venv/ready
	$(BIN)/uv pip compile --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		pyproject.toml -o requirements.lock

# The lock is installed by uv, whose version the lock pins too; pip alone would do, more slowly.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "making the environment in .venv (about 5 GB of packages)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
