"""Whatever dies, hangs or is taken away, the run draws the curve of the run that nothing happened to."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import psutil
import pytest
import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from runs import CLUSTER, losses, new_run, points, recorded_rows, when
from toys import ExceptionWriter, HeldUpReader, PacedWriter

from pipelines import training
from pipelines.board import start_board

READY_WITHIN_S = 120


def pid_of(run, rank):
    (pid,) = (beat.pid for beat in ray.get(run.board.beats.remote()) if beat.rank == rank)
    return pid


def wait_until(true):
    deadline = time.monotonic() + READY_WITHIN_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_that_hangs_is_named_and_ended_and_the_run_goes_on_without_it(
    uninterrupted, ray_session, toy, tmp_path
):
    writer = PacedWriter(tmp_path / "hung/points.jsonl")
    run = replace(new_run(tmp_path / "hung", toy), board=start_board(), collective_timeout_s=8, writer=writer)
    stopped = []

    def stop():
        stopped.append(pid_of(run, rank=1))
        os.kill(stopped[0], signal.SIGSTOP)

    said = ExceptionWriter(tmp_path / "said")
    watcher = when(run, 12, stop)
    training.fit(run, toy[2], CLUSTER, callbacks=[said])
    watcher.join()
    (pid,) = stopped
    named = (
        rf"waited in vain in step \d+ for rank 1 \(node [0-9.]+, pid {pid}\): silent for \d+ s, last known: "
    )
    assert re.search(named, said.path.read_text()), said.path.read_text()
    assert not psutil.pid_exists(pid)
    assert_same_curve(run, uninterrupted)


def assert_same_curve(run, other):
    """Also where a step was computed twice by different numbers of workers."""
    expected = losses(other)
    assert {point["step"] for point in points(run)} == set(expected)
    for point in points(run):
        assert point["train/loss"] == pytest.approx(expected[point["step"]], rel=1e-5), point
    assert recorded_rows(run) == recorded_rows(other)


@pytest.fixture
def further_nodes(services, ray_session):
    """Two raylets with room for one worker each, as (node id, process); what is left of them is ended."""
    found, started = [], []
    for _ in range(2):
        before = {node["NodeID"] for node in ray.nodes()}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "3"]
        command += ["--address", services["ray"]["address"], "--node-ip-address", "127.0.0.1"]
        started.append(psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_until(lambda before=before: new_nodes(before))
        found.append((new_nodes(before)[0], started[-1]))
    wait_until(lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"])
    coordinator: Any = get_or_create_autoscaling_coordinator()
    ray.get(coordinator._tick.remote())  # it looks every 20 s by itself
    yield found
    family = [child for process in started for child in (*process.children(recursive=True), process)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def new_nodes(before):
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in before]


def kill_raylet(process):
    (raylet,) = (child for child in process.children(recursive=True) if child.name() == "raylet")
    raylet.kill()


def test_a_data_process_dies_one_node_goes_with_notice_and_one_without_and_fewer_workers_go_on(
    uninterrupted, further_nodes, services, toy, tmp_path
):
    """Where Ray says beforehand that the node will go, the workers save at once, not at the 30th step."""
    (drained, drained_process), (_, lost_process) = further_nodes
    writer = PacedWriter(tmp_path / "nodes/points.jsonl")
    run = new_run(tmp_path / "nodes", toy, checkpoint_every=30)
    run = replace(run, board=start_board(), writer=writer)
    reader = HeldUpReader(
        **{f.name: getattr(toy[2], f.name) for f in fields(toy[2])}, pid_file=tmp_path / "decoding"
    )
    saved = []

    def kill_decoding_process():
        while not reader.pid_file.exists():
            time.sleep(0.1)
        os.kill(int(reader.pid_file.read_text()), signal.SIGKILL)

    def lose_nodes():
        command = ["drain-node", "--node-id", drained, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "test", "--deadline-remaining-seconds", "30"]
        address = ["--address", services["ray"]["address"]]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command, *address], check=True)
        wait_until(lambda: ray.get(run.board.saved_step.remote()))
        saved.append(ray.get(run.board.saved_step.remote()))
        kill_raylet(drained_process)
        wait_until(lambda: len(attempts(run)) == 2 and len(attempts(run)[1]) > 3)
        kill_raylet(lost_process)

    watchers = [threading.Thread(target=kill_decoding_process, daemon=True), when(run, 2, lose_nodes)]
    watchers[0].start()
    training.fit(run, reader, replace(CLUSTER, num_workers=(1, 3), cpus_per_worker=3, max_failures=4))
    for watcher in watchers:
        watcher.join()
    assert_same_curve(run, uninterrupted)
    _, again, last = attempts(run)
    assert 2 <= saved[0] < 30
    assert again[0] == last[0]
    assert saved[0] < again[0] <= 30
    assert last[-1] == 40
    assert (workers_by_step(run)[1], workers_by_step(run)[40]) == (3, 1)


def attempts(run):
    """The steps that each rank 0 logged, one after the other."""
    found = {}
    for point in points(run):
        found.setdefault(point["pid"], []).append(point["step"])
    return list(found.values())


def workers_by_step(run):
    """How many workers took rows in a step, over all attempts."""
    found = Counter()
    for file in (run.folder / "rows").iterdir():
        found.update({json.loads(line)["step"] for line in file.read_text().splitlines()})
    return found
