"""docs/tutorial.md as its reader meets it: every block in one shell, in order, then what came out of it.

The services are the session's: `make up` finds them running, because the copy of the tree in which the page
is run has the session's state as its `.local`. The block for LeRobot runs where LEROBOT_PYTHON names one.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_toy import write_v30
from mlflow import MlflowClient
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.dataset import open_dataset
from smolvla import SmolVLAPolicy
from smolvla.data_utils import sample_noise

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/data/lerobot_v30_franka"
TREE = ("jobs", "pipelines", "smolvla", "configs", "infra")
NEEDS_LEROBOT = "needs LEROBOT_PYTHON"
WITHIN_S = 900  # 560 s on two cores under a load of 13
STEPS, LOG_EVERY, CHECKPOINT_EVERY = 400, 5, 200  # as the page says


def blocks():
    """[(what its fence says beside `bash`, commands)] of the page."""
    page = (ROOT / "docs/tutorial.md").read_text()
    found = re.findall(r"^```(\w*) ?([^\n]*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert {language for language, _, _ in found} == {"bash"}
    return [(mark, commands) for _, mark, commands in found]


def test_only_the_block_for_lerobot_is_left_out_and_the_page_says_so():
    left_out = [commands for mark, commands in blocks() if mark]
    assert [mark for mark, _ in blocks() if mark] == [NEEDS_LEROBOT]
    assert "$LEROBOT_PYTHON" in left_out[0]
    before, _, _ = (ROOT / "docs/tutorial.md").read_text().partition(f"```bash {NEEDS_LEROBOT}")
    assert "This block needs LeRobot" in before.rstrip().rpartition("\n\n")[2]


class Followed:
    """What is there after the page."""

    def __init__(self, services, dataset, work, output):
        self.services, self.dataset, self.work, self.output = services, dataset, work, output
        self.client = MlflowClient(services["mlflow"]["url"])
        self.record = self.json("runs/first/run.json")

    def json(self, name):
        return json.loads((self.work / name).read_text())

    def run(self):
        return self.client.get_run(self.record["mlflow_run_id"])

    def checkpoint(self):
        return self.work / "runs/first" / self.json("runs/first/best.json")["checkpoint"]


@pytest.fixture(
    scope="module",
    params=[REAL.name if REAL.is_dir() else "toy"],  # which dataset it was stands in the tests' names
)
def followed(request, services, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial")
    dataset = REAL
    if request.param == "toy":
        dataset = write_v30(folder / "toy", dict(enumerate((90, 81, 75, 94, 88))))
    run_blocks = [commands for mark, commands in blocks() if not mark or "LEROBOT_PYTHON" in os.environ]
    script = "set -euo pipefail\n" + "\n".join(
        f"echo '== block {number}' at $SECONDS s\n{commands}" for number, commands in enumerate(run_blocks, 1)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = folder / "work"
    prelude = {"DATASET": str(dataset), "WORK": str(work), "PORT": str(port)}
    log = folder / "output.txt"
    with log.open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=clone(folder / "clone"),
            env=os.environ | prelude,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        code = shell.wait(WITHIN_S)
    except subprocess.TimeoutExpired:
        code = "none yet"
    finally:
        with contextlib.suppress(ProcessLookupError):  # of what it left in the background
            os.killpg(shell.pid, signal.SIGTERM)
    assert code == 0, f"exit code {code}\n{log.read_text()[-6000:]}"
    return Followed(services, dataset, work, log.read_text())


def clone(folder):
    """The tree as a user has it, with the session's services as those of its `make up`."""
    for name in TREE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", ".gitignore"):
        shutil.copy2(ROOT / name, folder)  # an installation that was newer stays newer
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".local").symlink_to(os.environ["SMOLVLA_STATE"])
    return folder


def test_the_dataset_has_every_frame_of_the_source(followed):
    files = (followed.dataset / "data").rglob("*.parquet")
    frames = sum(pq.read_metadata(file).num_rows for file in files)
    dataset = open_dataset(str(followed.work / "episodes"))
    assert dataset.num_frames == frames
    assert f'"frames": {frames}' in followed.output
    assert len(list((followed.work / "look").rglob("*.png"))) == 2


def test_the_run_was_stopped_went_on_and_has_every_point_once(followed):
    # Ray keeps the first token that its process reads: another test module may have had another cluster
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    client = JobSubmissionClient(followed.services["ray"]["url"], headers=headers)
    assert client.get_job_status("first-1") == JobStatus.STOPPED
    run = followed.run()
    assert run.info.status == "FINISHED"
    assert 0 < int(run.data.tags["resumed_from_step"]) < STEPS
    losses = followed.client.get_metric_history(run.info.run_id, "train/loss")
    steps = [point.step for point in losses]
    assert len(set(steps)) == len(steps)
    assert set(range(LOG_EVERY, STEPS + 1, LOG_EVERY)) <= set(steps)
    assert np.isfinite([point.value for point in losses]).all()
    validated = {point.step for point in followed.client.get_metric_history(run.info.run_id, "val/loss")}
    assert {CHECKPOINT_EVERY, STEPS} <= validated
    assert f"features/{run.data.tags['features_fingerprint']}" in "".join(
        str(path) for path in (followed.work / "episodes/features").iterdir()
    )


def test_the_evaluation_is_a_run_below_the_trainings_with_both_baselines(followed):
    parent = followed.run()
    (child,) = followed.client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert child.info.status == "FINISHED"
    assert child.data.tags["checkpoint_uri"] == str(followed.checkpoint())
    path = mlflow.artifacts.download_artifacts(
        run_id=child.info.run_id,
        artifact_path="offline.json",
        tracking_uri=followed.services["mlflow"]["url"],
    )
    report = json.loads(Path(path).read_text())["all"]
    assert report["frames"] == 64
    sides = [report[side]["mae"]["all"] for side in ("policy", "mean_action", "hold_last")]
    assert np.isfinite(sides).all()
    ratio = np.mean(np.array(sides[0]) / np.array(sides[1]))
    assert child.data.metrics["eval/relative_mae/all"] == pytest.approx(ratio)
    assert parent.data.metrics["eval/loss"] == child.data.metrics["eval/loss"]


def test_loaded_served_and_plain_the_champion_answers_as_predict_actions(followed):
    version = followed.client.get_model_version_by_alias("tutorial", "champion")
    assert version.tags["training_run_id"] == followed.run().info.run_id
    assert version.tags["checkpoint_uri"] == str(followed.checkpoint())
    expected = answer(followed)
    answers = {
        "loaded": followed.json("loaded.json"),
        "served": followed.json("served.json")["predictions"][0]["action"],
        "plain": followed.json("plain.json"),
    }
    if "LEROBOT_PYTHON" in os.environ:
        answers["lerobot"] = followed.json("lerobot.json")
    for name, actions in answers.items():
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def answer(followed):
    """Five actions of the checkpoint for the dataset's first frame, decoded and asked by hand."""
    dataset = open_dataset(str(followed.work / "episodes"))
    table = pq.read_table(followed.work / "episodes" / dataset.files[0])
    row = {name: table[name][0].as_py() for name in table.column_names}
    batch = {
        camera: torch.tensor(np.asarray(Image.open(io.BytesIO(row[camera]["bytes"])))).permute(2, 0, 1)[None]
        for camera in dataset.camera_names
    }
    batch |= {"observation.state": torch.tensor([row["observation.state"]])}
    policy = SmolVLAPolicy.from_pretrained(followed.checkpoint() / "pretrained_model").eval()
    shape = (1, policy.config.chunk_size, policy.config.max_action_dim)
    noise = sample_noise(shape, torch.Generator().manual_seed(0))
    return policy.predict_actions(batch | {"task": dataset.tasks[row["task_index"]]}, noise)[0, :5].numpy()
