"""jobs/evaluate_smolvla.py as a process beside this one: started, watched, ended, understood.

A process, so that nothing that goes wrong in it can go wrong here; in a session of its own, so that all of it
can be ended; joined to this process's Ray cluster as a driver of its own, so that its actors end with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import yaml

from jobs import evaluate_smolvla
from jobs.ending import FAREWELL_S
from jobs.evaluate_smolvla import EvaluateSmolVLA

REASON_CHARS = 300


class EvaluationProcess:
    """One evaluation, from its start on.

    Args:
        job: what is evaluated; it ends with this process.
        path: of its flags (.yaml) and of what it prints (.log), without the ending.
    """

    def __init__(self, job: EvaluateSmolVLA, *, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags, self._log = path.with_suffix(".yaml"), path.with_suffix(".log")
        flags.write_text(yaml.safe_dump(asdict(job), sort_keys=False))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, evaluate_smolvla.__file__, "--config", str(flags)],
                stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                # of a submitted job it has the runtime environment, too: it is in a variable
                env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
                start_new_session=True,
            )
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    @property
    def has_ended(self) -> bool:
        """By itself or by `end`."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End all its processes: it may tell MLflow first, if it can."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.has_ended:
                break
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(FAREWELL_S)

    def figures(self) -> dict[str, Any] | None:
        """What it found, once it has ended; None if it failed."""
        if self._process.returncode != 0:
            return None
        lines = [line for line in self._lines() if line.startswith("{")]
        return json.loads(lines[-1])

    def reason(self) -> str:
        """Why it failed, as it said it last."""
        # what begins with "(" are its actors' words
        said = [line for line in self._lines() if line.strip() and not line.startswith("(")]
        last = said[-1].strip()[:REASON_CHARS] if said else "it said nothing"
        return f"exit code {self._process.returncode}: {last} ({self._log})"

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()
