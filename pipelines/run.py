"""What a training run is: all that its workers need, and where their metrics go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.predictions import Predictions
from pipelines.retention import Retention
from pipelines.run_storage import RunStorage
from pipelines.samples import SampleReader
from pipelines.tower import StreamedTower
from pipelines.train_config import TrainConfig
from pipelines.validation import HeldOut

PATIENT_S = 300.0  # at least, where workers may have differently much to do


class MetricWriter(Protocol):
    """Where rank 0 sends metrics; it must return at once, whatever state the tracking server is in."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the values of one step."""
        ...

    def tag(self, tags: Mapping[str, str]) -> None:
        """Take what is said of the whole run; a later value of a name replaces the one before."""
        ...

    def predictions(self, step: int, found: Sequence[Predictions]) -> None:
        """Take what the policy would do at a step on held-out frames, for each dataset."""
        ...

    def flush(self) -> None:
        """Return when everything logged so far would survive this process."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainedDataset:
    """A dataset of the run, as metrics and messages speak of it."""

    name: str
    uri: str
    num_frames: int
    """Rows of an epoch."""
    share: float
    """Of the run's rows."""
    cameras: tuple[str, ...]
    """Its column for each camera of the stream, in their order; for one that it lacks, the camera's name."""


def trained_datasets(reader: SampleReader) -> tuple[TrainedDataset, ...]:
    """The datasets of a stream, by number of the source."""
    return tuple(
        TrainedDataset(
            name=source.title,
            uri=source.dataset.uri,
            num_frames=source.dataset.num_frames,
            share=reader.plan.share(number),
            cameras=tuple(source.camera_columns.get(name, name) for name in reader.camera_names),
        )
        for number, source in enumerate(reader.sources)
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a worker needs; small enough to be sent to each."""

    folder: Path
    """The run's folder, which every node must see; with `uri`, a work folder of each node's own."""
    uri: str = ""
    """The run in an object store."""
    train: TrainConfig
    identity: Mapping[str, Any]
    """What the run is, written into each checkpoint."""
    datasets: tuple[TrainedDataset, ...]
    """By number of the source."""
    max_bad_rows: int
    """Different rows with unusable images that the run bears, masked out of the loss."""
    writer: MetricWriter
    keep: Retention = field(default_factory=Retention)
    """The checkpoints that stay."""
    validation: HeldOut | None = None
    """What is measured beside the training; its episodes are not trained on."""
    decoder: SampleReader | None = None
    """What the workers decode with, in threads; None: tasks of the stream decode."""
    tower: StreamedTower | None = None
    """Actors of the stream that run the frozen vision tower while the workers train."""
    words: NDArray[np.int64] | None = None
    """Ids of all tokens that the policy will see, each once; `fit` finds them."""
    collective_timeout_s: float = 600.0
    """How long workers wait for each other before the step fails."""
    board: Any = None
    """Handle of the `pipelines.board.Board` where the workers say where they are; None: `fit` starts one."""

    @property
    def exchange_timeout_s(self) -> float:
        """How long outside of a step: one may have more of a validation to do than another."""
        return max(self.collective_timeout_s, PATIENT_S)

    @property
    def storage(self) -> RunStorage:
        """Where the run is kept."""
        return RunStorage(folder=self.folder, uri=self.uri)
