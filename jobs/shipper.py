"""The class of the actor that brings a run's points and pictures to MLflow, without what that takes.

Ray imports an actor's class wherever a handle of it arrives, so in every train worker: what needs MLflow and
matplotlib is in `jobs.delivery`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.predictions import Predictions
from pipelines.run_storage import RunStorage

if TYPE_CHECKING:
    from jobs.tracking import TrackedRun

Point = tuple[int, dict[str, float], int]
"""Step, values, time in ms."""


class Shipper:
    """A `jobs.delivery.Delivery` as an actor; its arguments and methods are those."""

    def __init__(self, run: "TrackedRun", storage: RunStorage, began_ms: int) -> None:
        from jobs.delivery import Delivery

        self._delivery = Delivery(run, storage, began_ms)

    def log(self, points: Sequence[Point]) -> None:
        self._delivery.log(points)

    def checkpoint(self, step: int, uri: str, measured: dict[str, float], timestamp_ms: int) -> None:
        self._delivery.checkpoint(step, uri, measured, timestamp_ms)

    def predictions(self, step: int, found: list[Predictions]) -> None:
        self._delivery.predictions(step, found)

    def tag(self, tags: dict[str, str]) -> None:
        self._delivery.tag(tags)

    def flush(self) -> None:
        self._delivery.flush()

    def latest(self) -> tuple[int, dict[str, float]]:
        return self._delivery.latest()

    def close(self, timeout_s: float) -> int:
        return self._delivery.close(timeout_s)
