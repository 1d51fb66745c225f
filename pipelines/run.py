"""What a training run is: all that its workers need, and where their metrics go."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.engine import TrainConfig


class MetricWriter(Protocol):
    """Where rank 0 sends metrics; it must return at once, whatever state the tracking server is in."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the values of one step."""
        ...

    def flush(self) -> None:
        """Return when everything logged so far would survive this process."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a worker needs; small enough to be sent to each."""

    folder: Path
    """The run's folder; every node must see it."""
    train: TrainConfig
    identity: Mapping[str, Any]
    """What the run is, written into each checkpoint."""
    num_frames: int
    """Rows of an epoch."""
    dataset_uris: tuple[str, ...]
    """By number of the source; with the cameras, to name a row."""
    camera_columns: tuple[str, ...]
    max_bad_rows: int
    """Different rows with unusable images that the run bears, masked out of the loss."""
    writer: MetricWriter

    @property
    def start_folder(self) -> Path:
        """The policy as it was before the first step, with the statistics that are exported with it."""
        return self.folder / "start"
