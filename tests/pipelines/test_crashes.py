"""Whatever dies, hangs or is taken away, the run draws the curve of the run that nothing happened to."""

import os
import re
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import ray
import ray.train
from test_training import CLUSTER, losses, new_run, points, recorded_rows, toy, uninterrupted

from pipelines import training
from pipelines.board import start_board

assert toy, uninterrupted  # fixtures

READY_WITHIN_S = 120


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
