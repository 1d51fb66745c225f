"""What Prometheus is told of a run: gauges that Ray exports on every node, `ray_` before their names.

A value is set where the code knows it, once an interval of the log, and costs the process microseconds; Ray
collects it every 10 s (`REPORT_INTERVAL`), and drops a gauge that nobody set for two of these:
`HeldGauge` sets it again. Two tags: run, and rank of the worker or "driver".
"""

import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.util.metrics import Gauge


class Exported(NamedTuple):
    name: str
    description: str


OF_POINTS = {
    "data/samples_per_s": Exported("smolvla_samples_per_second", "Samples a second, of all workers together"),
    "data/wait_share": Exported("smolvla_data_wait_ratio", "Share of the time that a worker waited for data"),
    "data/queued_micro_batches": Exported(
        "smolvla_data_queue_micro_batches", "Micro-batches that lie ready for a worker"
    ),
    "data/bad_rows": Exported(
        "smolvla_bad_rows", "Different rows of the run so far whose images cannot be used"
    ),
}
"""By name of the value in a run's points; every worker exports its own."""
SPOOL = Exported("smolvla_spool_bytes", "What the tracking server does not have yet of a run's points")
EXPORTED = (*OF_POINTS.values(), SPOOL)
SERVED_SECONDS = Exported(
    "smolvla_served_seconds", "Seconds from a robot's request to its answer, in the server"
)
SERVED_BATCH = Exported("smolvla_served_batch_size", "Robots that a forward pass answered together")
SERVED_SESSIONS = Exported("smolvla_served_sessions", "Robots whose last chunk is kept")
SERVED = (SERVED_SECONDS, SERVED_BATCH, SERVED_SESSIONS)
"""Of a served policy, with the tag policy; the seconds also by transport and status, and `_count` of them is
the number of requests. Ray Serve's own are beside them."""


REPORT_INTERVAL = "RAY_metrics_report_interval_ms"
SET_AGAIN_EVERY_S = int(os.environ.get(REPORT_INTERVAL, "10000")) / 2000  # twice an interval


class HeldGauge(Gauge):
    """A gauge that keeps its last value for as long as it is there, however seldom it is set.

    Args:
        exported: name and description.
        tags: the only ones, the same for each value.
    """

    def __init__(self, exported: Exported, **tags: str) -> None:
        super().__init__(exported.name, exported.description, tag_keys=tuple(tags))
        self.set_default_tags(tags)
        self._value: float | None = None
        threading.Thread(target=_set_again, args=(weakref.ref(self),), daemon=True, name="gauge").start()

    def set(self, value: float | None, tags: dict[str, Any] | None = None) -> None:
        """Export this value from now on."""
        assert not tags, "a held gauge has one series"
        self._value = value
        super().set(value)

    def set_again(self) -> None:
        """Export the last value as if it were set now."""
        if self._value is not None:
            super().set(self._value)


def _set_again(reference: "weakref.ref[HeldGauge]") -> None:
    while True:
        time.sleep(SET_AGAIN_EVERY_S)
        held = reference()
        if held is None:
            return
        held.set_again()
        del held  # else the gauge would live as long as this thread


class PointGauges:
    """What a worker exports of its points."""

    def __init__(self, run: str, *, rank: int) -> None:
        self._gauges = {
            key: HeldGauge(exported, run=run, rank=str(rank)) for key, exported in OF_POINTS.items()
        }

    def show(self, values: Mapping[str, float]) -> None:
        """Export a point's values from now on."""
        for key, exported in self._gauges.items():
            exported.set(values[key])
