"""What Prometheus is told of a run: gauges that Ray exports on every node, `ray_` before their names.

A value is set where the code knows it, once an interval of the log, and costs the process microseconds; Ray
collects it every 10 s (`RAY_metrics_report_interval_ms`). Two tags: run, and rank of the worker or "driver".
"""

from collections.abc import Mapping
from typing import NamedTuple

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


class PointGauges:
    """What a worker exports of its points."""

    def __init__(self, run: str, *, rank: int) -> None:
        self._gauges = {key: gauge(exported, run, str(rank)) for key, exported in OF_POINTS.items()}

    def show(self, values: Mapping[str, float]) -> None:
        """Export a point's values from now on."""
        for key, exported in self._gauges.items():
            exported.set(values[key])


def gauge(exported: Exported, run: str, rank: str) -> Gauge:
    """A gauge of one process for one run."""
    found = Gauge(exported.name, exported.description, tag_keys=("run", "rank"))
    found.set_default_tags({"run": run, "rank": rank})
    return found
