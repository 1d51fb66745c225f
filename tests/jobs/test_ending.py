"""How jobs end: with whoever holds their standard input open, or on a notice, with what is left done."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, threading
from jobs.ending import end_with_input, noticed
end_with_input()
with noticed(lambda _: print("told", flush=True)):
    print("ready", flush=True)
    if sys.argv[1] == "waits":
        threading.Event().wait(60)
sys.exit(3)
"""


def started(behaviour):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, behaviour],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_says_farewell_when_its_input_is_closed_and_keeps_its_exit_code_when_it_is_not():
    orphan, heard = started("waits"), started("ends")
    assert orphan.stdin is not None
    assert orphan.stdout is not None
    assert heard.stderr is not None
    assert orphan.stdout.readline() == "ready\n"
    orphan.stdin.close()  # as when its parent is killed
    assert orphan.wait(timeout=60) == 128 + 15
    assert orphan.stdout.read() == "told\n"
    assert heard.wait(timeout=60) == 3
    assert heard.stderr.read() == ""


STOPPED = """
import os, signal, sys, threading, time
import ray
from jobs.ending import truthful_end
from jobs.tracking import TrackedRun
from pipelines.board import Beat, Wish, start_board

ray.init(address="auto", log_to_driver=False)
board = start_board()
ray.get([board.note_saved.remote(10), board.beat.remote(Beat(rank=0, node="here", pid=1, step=25))])

def works():
    while ray.get(board.beat.remote(Beat(rank=0, node="here", pid=1, step=25))) != Wish.SAVE_AND_STOP:
        time.sleep(0.05)
    print("wished", flush=True)
    for step in (20, 26):  # the save that was under way, then the one that was wished for
        time.sleep(2)
        board.note_saved.remote(step)

with truthful_end(TrackedRun(sys.argv[1], "0" * 32, "0"), board):
    threading.Thread(target=works, daemon=True).start()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
"""


def test_a_job_that_is_told_to_stop_asks_for_the_save_before_mlflow_and_waits_for_that_one(services):
    """MLflow's server takes connections and never answers; another save is under way."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = {"RAY_ADDRESS": services["ray"]["address"]}
        variables |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        done = subprocess.run(
            [sys.executable, "-c", STOPPED, f"http://127.0.0.1:{silent.getsockname()[1]}"],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 128 + 15, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "wished",
        "told to stop: saving first",
        "stopped, saved at step 26; the same command continues the run",
    ]
