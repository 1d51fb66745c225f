"""Which checkpoints of a run stay: the newest, and those of the lowest validation loss.

Ray Train could keep by one of the two, and never deletes what it had not registered when a worker died. So
it keeps all, and the run deletes by itself, right after a checkpoint is sealed: what is neither new nor good,
and what interrupted saves left behind.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.manifest import MANIFEST
from pipelines.progress import TRAINING

BEST = "best.json"
LOG = logging.getLogger(__name__)


class Store(Protocol):
    """The run's folder, wherever it is; `pipelines.run_storage.RunStorage` is one."""

    def checkpoints(self) -> list[str]:
        """Names of all checkpoint folders, complete or not."""
        ...

    def has(self, name: str) -> bool:
        """Whether the run has this file."""
        ...

    def read_json(self, name: str) -> Any: ...

    def write_json(self, name: str, content: Any) -> None:
        """Put a small file in place, whole or not at all."""
        ...

    def delete(self, name: str) -> None:
        """Remove a checkpoint folder, its manifest first."""
        ...


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How many checkpoints stay."""

    newest: int = 3
    best: int = 0
    """Of the lowest validation loss, beside the newest; without validation there are none."""


def retain(store: Store, keep: Retention, *, newest: str) -> dict[str, Any] | None:
    """Delete what need not stay, and name the best checkpoint in best.json.

    Args:
        store: of the run.
        keep: how many stay.
        newest: the checkpoint that was just sealed. What is newer is being written, or was damaged.

    Returns:
        checkpoint, step and val/loss of the best one; None if none has a validation loss.
    """
    found = [name for name in store.checkpoints() if name <= newest]
    losses: dict[str, float] = {}
    steps: dict[str, int] = {}
    unread: set[str] = set()
    for name in found:
        if store.has(f"{name}/{MANIFEST}"):
            try:
                trainer = store.read_json(f"{name}/{TRAINING}/trainer.json")
                value, steps[name] = trainer.get("val_loss"), trainer["step"]
            except (OSError, ValueError, KeyError) as error:  # ends no run, and somebody may want it
                LOG.warning("checkpoint %s stays, its trainer.json cannot be read: %r", name, error)
                unread.add(name)
                continue
            losses[name] = math.inf if value is None or math.isnan(value) else value
    best = [name for name in ranked(losses) if losses[name] < math.inf]
    record = None
    if best:
        record = {"checkpoint": best[0], "step": steps[best[0]], "val/loss": losses[best[0]]}
        store.write_json(BEST, record)  # before anything goes: it names a checkpoint that is there
    stays = {*sorted(losses)[-keep.newest :], *best[: keep.best], *unread}
    for name in found:
        if name not in stays:
            store.delete(name)
    return record


def ranked(losses: Mapping[str, float]) -> list[str]:
    """Checkpoints by validation loss, the lowest first; of equals the newer first."""
    newest_first = sorted(losses, reverse=True)
    return sorted(newest_first, key=lambda name: losses[name])
