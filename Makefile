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

.PHONY: train demo-policy test check up down status screenshots install lock licenses audit secrets
train: up
	@echo "== collecting Meta-World episodes with the scripted experts"
	$(SUBMIT) python jobs/ingest_metaworld.py --tasks reach-v3 button-press-topdown-v3 --episodes 20 \
		--output "$(DATASET)" --tracking.uri $$MLFLOW_TRACKING_URI
	@echo "== training"
	$(SUBMIT) python jobs/train_smolvla.py --config configs/train/demo.yaml \
		--dataset.path "$(DATASET)" --storage_path "$(STATE)/runs" --run_name $(RUN) \
		--tracking.uri $$MLFLOW_TRACKING_URI
	@$(PY) -c 'import json, sys; print("\nThe run in MLflow:", json.load(open(sys.argv[1]))["link"])' "$(STATE)/runs/$(RUN)/run.json"

# From nothing to a policy that solves three Meta-World tasks, and how often; under an hour on two cores.
# Reach has the most episodes: its goal is only seen. The camera moves with the hand, and the noise leads the hand
# away from the expert's way, so that its place does not tell where the goal is (docs/performance.md).
DEMO_TASKS = reach-v3 button-press-topdown-v3 window-close-v3
DEMO_EPISODES = 200 60 60
DEMO_DATASET = $(STATE)/data/demo_policy
EVALUATE = $(SUBMIT) python jobs/evaluate_smolvla.py \
	--policy.path "$(STATE)/runs/demo-policy/step_000003000" --policy.ema true \
	--tracking.uri $$MLFLOW_TRACKING_URI --n_action_steps 5 --seed 2026 --env metaworld
demo-policy: up
	@echo "== collecting episodes with the scripted experts"
	$(SUBMIT) python jobs/ingest_metaworld.py --tasks $(DEMO_TASKS) --episodes $(DEMO_EPISODES) --cameras behindGripper \
		--action_noise 0.5 --noise_correlation 0.8 --output "$(DEMO_DATASET)" --tracking.uri $$MLFLOW_TRACKING_URI
	@echo "== training"
	$(SUBMIT) python jobs/train_smolvla.py --config configs/train/demo_policy.yaml \
		--dataset.path "$(DEMO_DATASET)" --storage_path "$(STATE)/runs" --run_name demo-policy \
		--tracking.uri $$MLFLOW_TRACKING_URI
	@echo "== 50 unseen worlds of each task"
	$(EVALUATE) --tasks $(DEMO_TASKS) --dataset.path "$(DEMO_DATASET)"
	@echo "== the same policy with black pictures"
	$(EVALUATE) --tasks $(DEMO_TASKS) --blank_images true

# Two at a time, each with a Ray and an MLflow of its own: one at a time leaves some of two cores idle. The tests of several
# machines and of the tutorial come after the others, beside each other: on two cores, beside all of them, both took too
# long for their own limits.
ALONE = tests/infra/test_cluster.py tests/jobs/test_tutorial.py
TEST = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 $(ALONE:%=--ignore %) && \
	$(PY) -m pytest -n 2 --dist loadfile --durations 5 $(ALONE)

test: install
	@infra/local/chromium.sh
	$(TEST)

check: install
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PY) infra/checks.py
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

# What the images install, with hashes; to be made again when pyproject.toml changes. `make lock UPGRADE=--upgrade`
# takes newer versions.
LOCK := infra/docker/requirements.txt
lock: install
	$(PY) -m uv pip compile pyproject.toml --extra train --extra serve --extra sim --extra cluster --generate-hashes --only-binary :all: \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --system-certs --no-header --quiet \
		$(UPGRADE) --output-file $(LOCK)

# What the images hold, installed here from the lock file, and the licences of it all.
licenses: install
	$(PY) -m uv venv --quiet --clear "$(STATE)/locked"
	$(PY) -m uv pip install --quiet --system-certs --python "$(STATE)/locked/bin/python" --require-hashes \
		--no-deps --only-binary :all: --requirement $(LOCK)
	$(PY) infra/licenses/make_list.py --python "$(STATE)/locked/bin/python"

# Known vulnerabilities of what the images hold, asked of PyPI's database: 0 none, 1 some, other: it cannot be said.
audit: install
	@$(PY) infra/audit.py

# Of infra/docker/compose.yaml.
secrets:
	@$(PYTHON) infra/docker/make_secrets.py

install: .venv/.installed
.venv/.installed: pyproject.toml
	infra/local/osmesa.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/python -m uv pip install --system-certs --python .venv/bin/python --compile-bytecode --editable '.[dev]'
	touch .venv/.installed
