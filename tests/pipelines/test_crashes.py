"""Whatever dies, hangs or is taken away, the run draws the curve of the run that nothing happened to."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import psutil
import pytest
import ray
import ray.train
from test_training import CLUSTER, losses, new_run, points, recorded_rows, toy, uninterrupted

from pipelines import training
from pipelines.board import start_board
from pipelines.stream import SampleReader

assert toy, uninterrupted  # fixtures

READY_WITHIN_S = 120
PACE_S = 0.2  # a micro-batch of `PacedReader`: 40 steps take 16 s, so that there is a middle


@dataclass(frozen=True)
class PacedReader(SampleReader):
    """Decodes slowly, in processes that can be found by name."""

    def decoded(self, batch):
        time.sleep(PACE_S)
        return super().decoded(batch)


def paced(reader):
    return PacedReader(**{name: getattr(reader, name) for name in reader.__dataclass_fields__})


def when(run, step, act):
    """Do something in a thread as soon as a step is logged."""

    def watch():
        while not any(point["step"] >= step for point in points(run)):
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


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
    run = replace(new_run(tmp_path / "hung", toy), board=start_board(), collective_timeout_s=15)
    stopped = []

    def stop():
        stopped.append(pid_of(run, rank=1))
        os.kill(stopped[0], signal.SIGSTOP)

    watcher = when(run, 12, stop)
    with pytest.raises(ray.train.TrainingFailedError) as caught:
        training.fit(run, toy[2], replace(CLUSTER, max_failures=0))
    watcher.join()
    (pid,) = stopped
    named = (
        rf"waited in vain in step \d+ for rank 1 \(node [0-9.]+, pid {pid}\): silent for \d+ s, last known: "
    )
    assert re.search(named, str(caught.value)), str(caught.value)
    wait_until(lambda: not psutil.pid_exists(pid))
    training.fit(run, toy[2], replace(CLUSTER, num_workers=1))
    assert_same_curve(run, uninterrupted)


def assert_same_curve(run, other):
    """Also where a step was computed twice by different numbers of workers."""
    expected = losses(other)
    assert {point["step"] for point in points(run)} == set(expected)
    for point in points(run):
        assert point["train/loss"] == pytest.approx(expected[point["step"]], rel=1e-5), point
    assert recorded_rows(run) == recorded_rows(other)


@pytest.fixture
def second_node(services, ray_session):
    """A raylet with room for one worker; whoever is left of its family is ended."""
    before = {node["NodeID"] for node in ray.nodes()}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "3"]
    command += ["--address", services["ray"]["address"], "--node-ip-address", "127.0.0.1"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    new: list[str] = []
    wait_until(
        lambda: (
            new.extend(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in before) or new
        )
    )
    yield new[0], process
    family = [*process.children(recursive=True), process]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def test_a_data_process_dies_a_node_is_drained_and_goes_and_the_run_continues_with_fewer_workers(
    uninterrupted, second_node, services, toy, tmp_path
):
    """Ray says beforehand that the node will go: the workers save at the next step, not at the 30th."""
    node_id, node = second_node
    run = replace(new_run(tmp_path / "nodes", toy, checkpoint_every=30), board=start_board())
    saved = []

    def kill_data_process():
        tasks = [p for p in family(services["ray"]["pid"]) if "MapBatches" in p or "Read" in p]
        os.kill(family(services["ray"]["pid"])[tasks[0]], signal.SIGKILL)
        drain = ["drain-node", "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "test", "--deadline-remaining-seconds", "30"]
        address = ["--address", services["ray"]["address"]]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain, *address], check=True)
        wait_until(lambda: ray.get(run.board.saved_step.remote()))
        saved.append(ray.get(run.board.saved_step.remote()))
        (raylet,) = (p for p in node.children(recursive=True) if p.name() == "raylet")
        raylet.kill()

    watcher = when(run, 5, kill_data_process)
    cluster = replace(CLUSTER, num_workers=(1, 2), cpus_per_worker=3)
    training.fit(run, paced(toy[2]), cluster)
    watcher.join()
    assert_same_curve(run, uninterrupted)
    first, again = dict.fromkeys(point["pid"] for point in points(run))
    assert next(p["step"] for p in points(run) if p["pid"] == again) == saved[0] + 1
    assert 5 < saved[0] < 30
    assert first != again


def family(pid):
    """Title -> pid of all processes below one; Ray titles them after what they run."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            found[process.cmdline()[0]] = process.pid
        except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            continue
    return found
