"""What every worker said it is doing, the wish to save, why a run was given up: an actor keeps it.

It is on the driver's node. Without torch: it must be there before the workers are, and its import takes
seconds.
"""

import time
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SILENT_S = 5.0  # beats are late on busy cores, but not by this much


class Wish(IntEnum):
    """What the workers are asked for; of several the greatest holds."""

    NONE = 0
    SAVE = 1
    SAVE_AND_STOP = 2


@dataclass(frozen=True)
class Beat:
    """Where a worker is."""

    rank: int
    node: str
    pid: int
    step: int = 0
    doing: str = "starting"
    for_s: float = 0.0
    """Seconds that it has been doing this."""
    silent_s: float = 0.0
    """Seconds since it said so."""

    def __str__(self) -> str:
        silent = f"silent for {self.silent_s:.0f} s, " if self.silent_s > SILENT_S else ""
        doing = f"{self.doing}, step {self.step}, for {self.for_s + self.silent_s:.0f} s"
        return f"rank {self.rank} (node {self.node}, pid {self.pid}): {silent}last known: {doing}"


class GivenUpError(Exception):
    """The run cannot go on, and would come to the same end if its workers started again."""


class Board:
    """The actor: each worker's last beat, the wish, the last step that was saved, why the workers gave up."""

    def __init__(self) -> None:
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._wish, self._saved_step = Wish.NONE, 0
        self._given_up: str | None = None

    def begin(self) -> None:
        """New workers are about to start, none of the old ones is left."""
        self._beats, self._given_up = {}, None

    def beat(self, beat: Beat) -> Wish:
        self._beats[beat.rank] = time.monotonic(), beat
        return self._wish

    def beats(self) -> list[Beat]:
        now = time.monotonic()
        return [replace(beat, silent_s=now - at) for at, beat in self._beats.values()]

    def want(self, wish: Wish) -> None:
        self._wish = max(self._wish, wish)

    def note_saved(self, step: int) -> None:
        self._saved_step = step

    def saved_step(self) -> int:
        return self._saved_step

    def give_up(self, reason: str) -> None:
        self._given_up = reason

    def given_up(self) -> str | None:
        """Why the workers ended before the last step, if they gave up."""
        return self._given_up


def start_board() -> Any:
    """Start the actor beside this process; its methods are remote."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
