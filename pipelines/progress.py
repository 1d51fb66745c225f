"""Where a run stands, as its checkpoints say; without torch, for Ray's controller builds the stream by it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.run_storage import STEPS, RunStorage

TRAINING = "training_state"


class BadRow(NamedTuple):
    """A row of the data with images that cannot be used."""

    source: int
    episode_index: int
    frame_index: int
    bad_cameras: int
    """Bit i: the i-th camera of the stream."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: all that is needed to go on with the same samples and the same noise."""

    step: int
    """Optimiser steps done."""
    samples_seen: int
    """Position in the stream."""
    bad_rows: tuple[BadRow, ...] = ()
    """Rows met so far that could not be used."""
    skipped_in_a_row: int = 0
    """Steps up to this one that changed nothing."""
    val_loss: float | None = None
    """Of the held-out episodes, if this step was validated."""
    since_point: tuple[tuple[float, float, float], ...] = ()
    """Loss, gradient norm and whether it was skipped, of the steps since the last point of the curve."""


def folder_name(step: int) -> str:
    """Name of a checkpoint's folder; deterministic, so that a repeated save replaces instead of leaking."""
    return f"{STEPS}{step:09d}"


def progress(folder: Path) -> Progress:
    """Where the run was when a checkpoint was taken."""
    trainer = json.loads((folder / TRAINING / "trainer.json").read_text())
    rows = tuple(BadRow(*row) for row in trainer.get("bad_rows", []))
    since_point = tuple((loss, norm, skipped) for loss, norm, skipped in trainer.get("since_point", []))
    return Progress(
        step=trainer["step"],
        samples_seen=trainer["samples_seen"],
        bad_rows=rows,
        skipped_in_a_row=trainer.get("skipped_in_a_row", 0),
        val_loss=trainer.get("val_loss"),
        since_point=since_point,
    )


def position(storage: RunStorage) -> Progress:
    """Where a run would go on: at its newest good checkpoint, or at the start."""
    folder = storage.newest()
    return progress(folder) if folder else Progress(step=0, samples_seen=0)
