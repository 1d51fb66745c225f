"""A process that watches its standard input ends with the one that holds it open, and else as it likes."""

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
