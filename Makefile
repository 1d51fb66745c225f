# The two commands of the README are `make train` and `make test`; `make down` ends what `make train` started.
.DELETE_ON_ERROR:
PYTHON ?= python3
ROOT := $(shell infra/local/root.sh)
PY := "$(ROOT)/.venv/bin/python"
STATE := $(CURDIR)/.local
# Ray warns of each folder that it leaves out by default; ours are named instead.
SUBMIT = . "$(STATE)/env" && RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES= \
	$(PY) -m ray.scripts.scripts job submit --working-dir . \
	--runtime-env-json "$$($(PY) -m jobs.environment)" --

DATASET ?= $(STATE)/data/metaworld
ifndef RUN
RUN := demo-$(shell date +%Y%m%d-%H%M%S)
endif

.PHONY: train test check up down status screenshots install
train: up
	@echo "== collecting Meta-World episodes with the scripted experts"
	$(SUBMIT) python jobs/ingest_metaworld.py --tasks reach-v3 button-press-topdown-v3 --episodes 20 \
		--output "$(DATASET)" --tracking.uri $$MLFLOW_TRACKING_URI
	@echo "== training"
	$(SUBMIT) python jobs/train_smolvla.py --config configs/train/demo.yaml \
		--dataset.path "$(DATASET)" --storage_path "$(STATE)/runs" --run_name $(RUN) \
		--tracking.uri $$MLFLOW_TRACKING_URI
	@$(PY) -c 'import json, sys; print("\nThe run in MLflow:", json.load(open(sys.argv[1]))["link"])' "$(STATE)/runs/$(RUN)/run.json"

# Two at a time, each with a Ray and an MLflow of its own: one at a time leaves some of two cores idle.
TEST = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install
	@infra/local/chromium.sh
	$(TEST)

check: install
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	@infra/local/chromium.sh
	$(TEST)

up: install
	@$(PY) infra/local/services.py up

down:
	@if [ -f .venv/.installed ]; then $(PY) infra/local/services.py down; fi

status: install
	@$(PY) infra/local/services.py status

# The README's pictures: RUN_ID=<MLflow run>, MODEL=<registered model> if there is one; of the server of `make up`.
IMAGES ?= docs/images
screenshots: install
	@test -n "$(RUN_ID)" || { echo "RUN_ID=... names the MLflow run"; exit 2; }
	@infra/local/chromium.sh
	. "$(STATE)/env" && $(PY) infra/local/screenshots.py --uri "$$MLFLOW_TRACKING_URI" \
		--run_id "$(RUN_ID)" --model "$(MODEL)" --output "$(IMAGES)"

install: .venv/.installed
.venv/.installed: pyproject.toml
	infra/local/osmesa.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/python -m uv pip install --system-certs --python .venv/bin/python --compile-bytecode --editable '.[dev]'
	touch .venv/.installed
