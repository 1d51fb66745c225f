"""The class of the actor that brings a run's points and pictures to MLflow, without what that takes.

Ray imports an actor's class wherever a handle of it arrives, so in every train worker: what needs MLflow and
matplotlib is in `jobs.delivery`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.predictions import Predictions

Point = tuple[int, dict[str, float], int]
"""Step, values, time in ms."""


class Shipper:
    """A `jobs.delivery.Delivery` as an actor, made in its process; its methods are those."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._delivery = make()

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
