"""The evaluations of a run while it trains, on what of the cluster the training leaves.

A thread of the driver looks which checkpoints are sealed, holds the newest that is to be evaluated, and
starts a process for it (jobs/evaluation_process.py) when there is room: one at a time, and of those that wait
the newest. Nothing that happens to an evaluation reaches the training; it is noted in
<run>/evaluations.jsonl, in the log and in MLflow.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from jobs import evaluate_smolvla
from jobs.ending import noticed
from jobs.evaluate_smolvla import JudgedPolicy
from jobs.evaluated_beside import EvalOptions
from jobs.evaluation_process import EvaluationProcess
from jobs.tracking import TrackedRun, TrackingOptions
from pipelines.board import Beat
from pipelines.holding import EVALUATING, held, hold, release
from pipelines.manifest import MANIFEST
from pipelines.progress import folder_name
from pipelines.run_storage import PRETRAINED, STEPS, DamagedError, RunStorage

RECORDS = "evaluations.jsonl"
FLAGS = "evaluations"  # folder of the evaluations' flags and logs, on the driver's node
LOOK_EVERY_S = 1.0
LOOKS = 5  # whose mean says what is free: data tasks take a CPU for a moment and give it back
AWAY_S = 15.0  # of all workers at once: they are being started anew
ANSWER_WITHIN_S = 30.0
Resources = Mapping[str, float]
"""CPU and GPU -> how many."""


class Evaluations:
    """The thread, from the start of the training to the last evaluation.

    Args:
        options: what is evaluated, and when.
        storage: of the run.
        run: of the training, in MLflow.
        tracking: where that is.
        steps: of the whole run.
        training: what the training may hold, its data included.
        board: handle of the `pipelines.board.Board` of the workers.
    """

    def __init__(
        self,
        options: EvalOptions,
        storage: RunStorage,
        run: TrackedRun,
        *,
        tracking: TrackingOptions,
        steps: int,
        training: Resources,
        board: Any,
    ) -> None:
        self._options, self._storage, self._run = options, storage, run
        self._tracking, self._steps, self._training, self._board = tracking, steps, training, board
        need = evaluate_smolvla.needs(options.evaluation(JudgedPolicy(), tracking))
        self._need = {name: amount for name, amount in need.items() if amount}
        self._saved = 0
        self._waiting: int | None = None
        self._running: tuple[int, EvaluationProcess] | None = None
        self._free: deque[Resources] = deque(maxlen=LOOKS)
        self._said = ""
        self._trains, self._closing = threading.Event(), threading.Event()
        self._trains.set()
        self._waits_since = time.monotonic()
        self.counts: dict[str, int] = {}
        """How many ended how in this job."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="evaluations")
        self._thread.start()

    def training_ended(self) -> None:
        """What the training held is free."""
        self._trains.clear()

    def finish(self) -> None:
        """With `at_end` return when the last evaluation has ended, else end what runs."""
        if not self._options.at_end:
            self.close()
            return
        with noticed(lambda _: self.close()) as hand_over:
            self._thread.join()
            hand_over()

    def close(self) -> None:
        """End what runs; it is begun again when the run goes on."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        self._told(self._begin)
        while not self._closing.wait(LOOK_EVERY_S):
            trains = self._trains.is_set()
            for act in (self._attend, self._note_saved, self._begin_waiting):
                self._told(act)
            if not trains and self._waiting is None and self._running is None:
                return
        if self._running:
            step, process = self._running
            process.end()
            self._told(lambda: self._note(step, "stopped", "the job ended"))

    def _told(self, act: Callable[[], None]) -> None:
        """Do something; what goes wrong is said, and tried again at the next look."""
        try:
            act()
        except (OSError, ValueError, DamagedError, ray.exceptions.RayError) as error:
            self._say(f"evaluations beside the training: {type(error).__name__}: {str(error)[:300]}")

    def _say(self, text: str) -> None:
        """Print it, but not again and again."""
        if text != self._said:
            self._said = text
            print(text, flush=True)

    # ---- which checkpoint ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Where an earlier job of the run left off: its newest checkpoint is evaluated if it was not yet."""
        done = max((line["step"] for line in self._records() if line["status"] == "done"), default=0)
        self._saved = done
        there = {step_of(name) for name in (*self._sealed(), *self._held())}
        if due := [step for step in there if self._is_due(step) and step > done]:
            self._saved = max(due)
            self._wait_for(max(due))
        for name in held(self._storage):
            if step_of(name) != self._waiting:
                release(self._storage, name)

    def _is_due(self, step: int) -> bool:
        return step % self._options.every == 0 or step == self._steps

    def _sealed(self) -> list[str]:
        names = self._storage.checkpoints()
        return [name for name in names if self._storage.has(f"{name}/{MANIFEST}")]

    def _held(self) -> list[str]:
        return [name for name in held(self._storage) if self._storage.has(f"{EVALUATING}/{name}/{MANIFEST}")]

    def _note_saved(self) -> None:
        """Take the newest of what was sealed since the last look."""
        saved: Any = ray.get(self._board.saved_step.remote(), timeout=ANSWER_WITHIN_S)
        due = [step for step in range(self._saved + 1, saved + 1) if self._is_due(step)]
        self._saved = max(self._saved, saved)
        for step in due:
            self._wait_for(step)

    def _wait_for(self, step: int) -> None:
        older, self._waiting = self._waiting, step
        if older is not None:
            release(self._storage, folder_name(older))
            self._note(older, "skipped", f"step {step} is newer")
        if not self._storage.uri:  # links cost nothing; a store would copy gigabytes, perhaps in vain
            self._hold(step)

    def _hold(self, step: int) -> str | None:
        parts = [PRETRAINED, f"{PRETRAINED}_ema"] if self._options.ema else [PRETRAINED]
        place = hold(self._storage, folder_name(step), parts=parts)
        if place is None:
            self._waiting = None
            self._note(step, "gone", "the checkpoint was deleted before; checkpoint.keep keeps more of them")
        return place

    # ---- when ----------------------------------------------------------------------------------------------

    def _begin_waiting(self) -> None:
        if self._running or self._trains.is_set():  # it could not begin
            self._waits_since = time.monotonic()
        if self._running is None and self._waiting is not None and self._has_room(self._waiting):
            self._start(self._waiting)

    def _has_room(self, step: int) -> bool:
        if time.monotonic() - self._waits_since > self._options.timeout_s:
            self._waiting = None
            self._note(step, "failed", f"no room within eval.timeout_s {self._options.timeout_s:g}")
            return False
        reason = self._crowded()
        if reason:
            self._free.clear()
        elif not self._options.resource:
            self._free.append(ray.available_resources())
            if len(self._free) < LOOKS:
                return False
            reason = lacking(self._need, mean(self._free), what="are free on average")
        if reason:
            self._say(f"the evaluation of step {step} waits: {reason}")
        return not reason

    def _crowded(self) -> str:
        """Why nothing may be held beside the training now; empty: something may."""
        if self._options.resource or not self._trains.is_set():
            return ""
        beats: list[Beat] = ray.get(self._board.beats.remote(), timeout=ANSWER_WITHIN_S)
        if all(beat.silent_s > AWAY_S for beat in beats):  # also if there are none
            return "the training's workers are being started"
        have = ray.cluster_resources()
        left = {name: have.get(name, 0.0) - self._training.get(name, 0.0) for name in self._need}
        end = "at the end" if self._options.at_end else "when the run is started again"
        reason = lacking(self._need, left, what="are left by training and data")
        return f"{reason}; if that stays so, the last checkpoint is evaluated {end}" if reason else ""

    def _start(self, step: int) -> None:
        place = self._hold(step)
        if place is None:
            return
        policy = JudgedPolicy(
            path=place, ema=self._options.ema, checkpoint=self._storage.address(folder_name(step))
        )
        job = self._options.evaluation(policy, self._tracking)
        path = self._storage.folder / FLAGS / folder_name(step)
        self._running, self._waiting = (step, EvaluationProcess(job, path=path)), None
        self._free.clear()
        self._say(f"the evaluation of step {step} begins, its log is {path}.log")

    def _attend(self) -> None:
        """Look after what runs."""
        if self._running is None:
            return
        step, process = self._running
        if process.has_ended:
            figures = process.figures()
            if figures is None:
                self._ended(step, "failed", process.reason())
            else:
                self._ended(step, "done", told(figures))
        elif process.seconds > self._options.timeout_s:
            process.end()
            self._ended(step, "failed", f"it took longer than eval.timeout_s {self._options.timeout_s:g}")
        elif reason := self._crowded():
            process.end()
            if self._waiting is None:
                self._waiting = step
            self._ended(step, "stopped", f"it makes room: {reason}")

    def _ended(self, step: int, status: str, reason: str) -> None:
        assert self._running is not None
        seconds, self._running = self._running[1].seconds, None
        if step != self._waiting:
            release(self._storage, folder_name(step))
        self._note(step, status, reason, seconds=seconds)
        if status != "done":
            self._end_in_mlflow(step, status)

    # ---- what is said of it --------------------------------------------------------------------------------

    def _records(self) -> list[dict[str, Any]]:
        if not self._storage.has(RECORDS):
            return []
        return [json.loads(line) for line in self._storage.read(RECORDS).splitlines()]

    def _note(self, step: int, status: str, reason: str, *, seconds: float = 0.0) -> None:
        """Say how one ended, in the log, in the run's folder and in MLflow."""
        self.counts[status] = self.counts.get(status, 0) + 1
        warning = "warning: " if status in ("failed", "gone") else ""
        self._say(f"{warning}evaluation of step {step}: {status}, {reason}")
        record = {"step": step, "status": status, "reason": reason, "seconds": round(seconds, 1)}
        record["time"] = int(time.time() * 1000)
        records = [*self._records(), record]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records)
        self._storage.write(RECORDS, text.encode())
        totals = {name: sum(line["status"] == name for line in records) for name in {status, "failed"}}
        metrics = [
            Metric(f"eval/{name}", float(total), record["time"], step) for name, total in totals.items()
        ]
        try:
            self._run.client.log_batch(self._run.run_id, metrics=metrics)
        except MlflowException as error:
            print(f"MLflow was not told of it: {str(error)[:300]}", flush=True)

    def _end_in_mlflow(self, step: int, status: str) -> None:
        """An evaluation that was killed could not say so."""
        client = self._run.client
        chosen = f"tags.training_run_id = '{self._run.run_id}' and tags.checkpoint_step = '{step}'"
        try:
            for left in client.search_runs(
                [self._run.experiment_id], f"{chosen} and attributes.status = 'RUNNING'"
            ):
                client.set_terminated(left.info.run_id, "KILLED" if status == "stopped" else "FAILED")
        except MlflowException as error:
            print(f"MLflow was not told that it ended: {str(error)[:300]}", flush=True)


def step_of(name: str) -> int:
    """Of a checkpoint's folder."""
    return int(name.removeprefix(STEPS))


def lacking(need: Resources, have: Resources, *, what: str) -> str:
    """What is missing, in words; empty: nothing."""
    for name, amount in need.items():
        if have.get(name, 0.0) < amount:
            return f"it needs {amount:g} {name}s, {max(have.get(name, 0.0), 0.0):.3g} {what}"
    return ""


def mean(found: Sequence[Resources]) -> Resources:
    """Of several looks."""
    names = {name for resources in found for name in resources}
    return {name: sum(each.get(name, 0.0) for each in found) / len(found) for name in names}


def told(figures: Mapping[str, Any]) -> str:
    """What an evaluation found, in a line."""
    parts = []
    if offline := figures.get("offline"):
        parts.append(f"loss {offline['loss']:.4f} on {offline['frames']} frames")
    rates = figures.get("closed_loop", {}).get("success_rate", {})
    parts += [f"{name} {rate:.1%}" for name, rate in rates.items()]
    return ", ".join([*parts, str(figures["mlflow"])])
