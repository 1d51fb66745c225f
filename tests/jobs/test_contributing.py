"""The example of CONTRIBUTING.md is code: it passes ruff and its own test, and its job ingests."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.dataset import open_dataset

ROOT = Path(__file__).parents[2]
READER = "pipelines/sources/npy_folder.py"
TEST = "tests/pipelines/test_source_npy_folder.py"
JOB = "jobs/ingest_npy_folder.py"
CAMERA = "observation.images.front"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project's code with the files of the page added, as a contributor would add them."""
    tree = tmp_path_factory.mktemp("contribution") / "tree"
    for name in ("jobs", "pipelines", "smolvla"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "tests/pipelines").mkdir(parents=True)
    blocks = re.findall(
        r"^\*\*`([^`]+)`\*\*.*?^```python\n(.*?)^```",
        (ROOT / "CONTRIBUTING.md").read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    assert [path for path, _ in blocks] == [READER, TEST, JOB]
    for path, code in blocks:
        assert not (tree / path).exists()
        (tree / path).write_text(code)
    return tree


def run(tree, *words):
    """Run a Python program in the tree; the copy comes before the installed packages."""
    job = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout.splitlines()


def submitted(tree, client, *words):
    """Submit a job of the tree as `ray job submit --working-dir .` does; return its output."""
    job = client.submit_job(
        entrypoint=shlex.join(["python", *words]),
        runtime_env={"working_dir": str(tree), "excludes": ["tests"]},
    )
    deadline_s = time.monotonic() + 300
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline_s, client.get_job_logs(job)
        time.sleep(0.2)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(job)
    return client.get_job_logs(job).splitlines()


def test_the_example_is_written_as_the_project_is(tree):
    run(tree, "-m", "ruff", "format", "--check", READER, TEST, JOB)
    run(tree, "-m", "ruff", "check", READER, TEST, JOB)


def test_the_examples_own_test_passes(tree):
    assert run(tree, "-m", "pytest", "-q", TEST)[-1].startswith("3 passed")


def test_the_examples_job_ingests_what_the_folder_holds_and_refuses_the_rest(
    ray_session, services, tree, tmp_path
):
    lengths = {"a": 20, "b": 7, "c": 4}
    source, output = tmp_path / "source", tmp_path / "output"
    program = (
        "import pathlib, sys; sys.path.insert(0, 'tests/pipelines')\n"
        "from test_source_npy_folder import write_folder\n"
        f"write_folder(pathlib.Path(sys.argv[1]), lengths={lengths})"
    )
    run(tree, "-c", program, str(source))
    (source / "c/action.npy").unlink()

    client = JobSubmissionClient(services["ray"]["url"])
    flags = [
        "--source",
        str(source),
        "--output",
        str(output),
        "--image_format",
        "png",
        "--max_refused",
        "0.5",
    ]
    report = json.loads(submitted(tree, client, JOB, *flags)[-1])
    assert (report["episodes"], report["frames"], report["refused"]) == (2, 27, {"data_unreadable": 1})
    dataset = open_dataset(str(output))
    assert (dataset.fps, dataset.tasks, dataset.episode_length.tolist()) == (10, ("lift",), [20, 7])
    table = pq.read_table(output / dataset.files[0])
    for key, column in (("state", "observation.state"), ("action", "action")):
        expected = np.concatenate([np.load(source / name / f"{key}.npy") for name in "ab"])
        found = np.stack(table[column].to_numpy()).reshape(len(expected), -1)
        np.testing.assert_array_equal(found, expected)
    images = np.concatenate([np.load(source / name / "images.npy") for name in "ab"])
    for stored, expected in zip(table[CAMERA].to_pylist(), images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored["bytes"]))), expected)
