"""Random kills: workers, tasks and drivers of an ingestion end by SIGKILL until it is done all the same."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from lerobot_toy import write_v21
from test_ingest import ROOT, ingested, own_ray, snapshot

NUM_KILLS = 20
NUM_EPISODES = 44
TASKS = ("ray::_stage_part", "ray::_assemble_shard")


def started(source, output, address):
    return subprocess.Popen(
        [sys.executable, "jobs/ingest_lerobot.py", "--source", str(source), "--output", str(output)],
        cwd=ROOT,
        env=own_ray() | {"RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def workers_of(head):
    """The processes that run our tasks now; Ray titles them after the task."""
    found = []
    for process in psutil.Process(head).children(recursive=True):
        try:
            if process.cmdline()[0].startswith(TASKS):
                found.append(process.pid)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


def wait_for_parts(output, number, job):
    """Wait until so many parts are staged; False if the job has ended."""
    while job.poll() is None and len(list(output.glob("meta/_ingest/0*.json"))) < number:
        time.sleep(0.01)
    return job.poll() is None


def killed(job, head, rng, *, driver):
    """Kill the driver, or a worker that runs one of its tasks; whether there was something to kill."""
    if driver:
        job.kill()
        job.wait()
        return True
    workers = workers_of(head)
    if workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    return bool(workers)


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(ray_session, services, tmp_path):
    rng = random.Random(0)
    source = write_v21(tmp_path / "source", dict.fromkeys(range(NUM_EPISODES), 260))  # a part each
    ingested(source, tmp_path / "whole")
    output, head = tmp_path / "killed", services["ray"]["pid"]
    targets = [True] * 6 + [False] * (NUM_KILLS - 6)  # drivers, and workers for the others
    rng.shuffle(targets)
    job = started(source, output, services["ray"]["address"])
    deadline_s = time.monotonic() + 900
    done = 0
    while done < NUM_KILLS:
        assert time.monotonic() < deadline_s, f"{done} kills only"
        assert not (output / "meta/info.json").exists(), f"complete after {done} kills"
        if not wait_for_parts(output, done * 2, job):
            job = started(source, output, services["ray"]["address"])
            continue
        time.sleep(rng.uniform(0, 0.1))
        done += killed(job, head, rng, driver=targets[done])
    job.wait(timeout=120)
    for _ in range(
        3
    ):  # a task whose workers were killed too often ends its job, as a kill of the driver does
        if started(source, output, services["ray"]["address"]).wait(timeout=120) == 0:
            break
    assert snapshot(output) == snapshot(tmp_path / "whole")
    left = [path for path in output.rglob("*") if path.name.startswith((".", "_"))]
    assert left == []
