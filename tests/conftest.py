"""One Ray cluster and one MLflow server for the session, started as a user starts them; toy episodes."""

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a process that dies in native code says where
# Most of a small run is the start of its processes: Ray keeps idle ones for the next run, and asks the
# workers more often than every 2 s what they have to say.
os.environ.setdefault("RAY_num_workers_soft_limit", "16")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# What is exported to Prometheus every 10 s else, and a small run may take less; a hundred idle processes that
# export every second keep half a core busy.
os.environ.setdefault("RAY_metrics_report_interval_ms", "4000")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "30000")  # statistics of every process of the node
# Ray looks for new log files ten times a second, in a folder with a thousand of them in the end.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "1")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "1")


def pytest_configure(config):
    """Choose the session's token before any test module imports Ray, which reads it once."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # of the shell: the ingestions of tests would be told there
    state = Path(tempfile.mkdtemp(prefix="smolvla-tests-"))
    token = state / "ray_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"SMOLVLA_STATE": str(state), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def pytest_unconfigure(config):
    from infra.local.services import RAY_FILES, STATE

    shutil.rmtree(RAY_FILES, ignore_errors=True)
    shutil.rmtree(STATE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def own_tracking():
    """No tracking server is told of the next module's ingestions: mlflow.set_tracking_uri lasts."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def services():
    """The record of a Ray head and an MLflow server that belong to this session; stopped at its end."""
    script = [sys.executable, str(ROOT / "infra/local/services.py")]
    try:
        subprocess.run([*script, "up"], check=True, timeout=480)
        yield json.loads((Path(os.environ["SMOLVLA_STATE"]) / "services.json").read_text())
    finally:
        subprocess.run([*script, "down"], check=True, timeout=120)


@pytest.fixture(scope="session")
def ray_session(services):
    """This process as a driver on the session's cluster, whose workers can import the tests' modules."""
    import ray

    address = services["ray"]["address"]
    variables = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *(str(ROOT / "tests" / name) for name in ("", "pipelines"))]
        ),
        "RAY_ADDRESS": address,  # a helper of Ray Train looks for a cluster by itself
    }
    ray.init(address=address, logging_level=logging.WARNING, runtime_env={"env_vars": variables})
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def episodes(ray_session, tmp_path_factory):
    """A dataset of 12 short toy episodes: two tasks, two cameras of 40 x 56 pixels, state and action."""
    from toys import ToySource, ingested

    return ingested(ToySource(), tmp_path_factory.mktemp("data") / "toy episodes")


@pytest.fixture(scope="session")
def other_episodes(ray_session, tmp_path_factory):
    """A dataset of 4 episodes, 96 frames: one camera in common, in another size, and other statistics."""
    from toys import ToySource, ingested

    source = ToySource(
        lengths=(20, 9, 35, 32), cameras=("top", "side"), size=(32, 40), scale=5.0, tasks=("wave slowly",)
    )
    return ingested(source, tmp_path_factory.mktemp("data") / "others")
