"""What train workers and Ray Train's controller hold of the tracking: they hand on to an actor, and go on.

Neither MLflow nor matplotlib is imported here: each of these processes would take three seconds for it.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import Checkpoint, UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.environment import MLFLOW_CLIENT
from jobs.shipper import Point, Shipper
from pipelines.predictions import Predictions
from pipelines.run_storage import RunStorage

MEASURED = {"train/loss": "checkpoint/train_loss", "val/loss": "checkpoint/val_loss"}
"""Of what is reported with a checkpoint, the metrics of its model. MLflow shows them at the run too, so they
must not have the names of its curves."""
SEND_EVERY_S = 0.2


class RunWriter:
    """What the train workers hold of the tracking: implements `pipelines.run.MetricWriter`.

    A point waits in this process until a thread sends it, with all that came meanwhile: a call of an actor
    costs a step a millisecond, this costs it microseconds. What dies with the process are points of steps
    that will be computed again, because `flush` comes before a checkpoint counts.

    Args:
        actor: handle of a `jobs.shipper.Shipper`; Ray's types lose its methods.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._waiting: list[Point] = []
        self._filled, self._sending = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["RunWriter"], tuple[Any]]:
        return RunWriter, (self.actor,)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's values and return."""
        self._waiting.append((step, dict(metrics), int(time.time() * 1000)))
        self._filled.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_always, daemon=True)
            self._thread.start()

    def _send_always(self) -> None:
        while self._filled.wait():
            self._send()
            time.sleep(SEND_EVERY_S)

    def _send(self) -> None:
        with self._sending:  # one after the other, so that no later point overtakes
            self._filled.clear()
            count = len(self._waiting)
            points, self._waiting[:count] = self._waiting[:count], []
            if points:
                self.actor.log.remote(points)

    def predictions(self, step: int, found: Sequence[Predictions]) -> None:
        """Send what the policy would do, and return at once."""
        self.actor.predictions.remote(step, list(found))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, and return at once."""
        self.actor.tag.remote(dict(tags))

    def flush(self) -> None:
        """Return when all points taken so far are on disk."""
        self._send()
        ray.get(self.actor.flush.remote())

    def latest(self) -> tuple[int, dict[str, float]]:
        """The newest point."""
        step, metrics = ray.get(self.actor.latest.remote())
        return step, metrics

    def close(self, timeout_s: float) -> int:
        """Deliver the rest; returns how many records are still only in the spool."""
        return int(ray.get(self.actor.close.remote(timeout_s)))


def run_writer(make_delivery: Callable[[], Any]) -> RunWriter:
    """Start the actor that ships a run's points, on this process's node, where its spool is.

    Args:
        make_delivery: of `jobs.delivery.delivery_of`; called in the actor.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Shipper).options(
        num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": MLFLOW_CLIENT}
    )
    return RunWriter(actor.remote(make_delivery))


class CheckpointsInMlflow(UserCallback):
    """Tells the writer of every registered checkpoint. Runs in Ray Train's controller: it must not fail."""

    def __init__(self, writer: RunWriter, storage: RunStorage) -> None:
        self._writer, self._storage = writer, storage

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        if checkpoint is not None:
            uri = self._storage.address(Path(checkpoint.path).name)
            measured = {MEASURED[name]: value for name, value in metrics[0].items() if name in MEASURED}
            self._writer.actor.checkpoint.remote(metrics[0]["step"], uri, measured, int(time.time() * 1000))
