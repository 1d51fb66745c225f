"""Which stage of the stream keeps the workers waiting, told from measured seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

WAIT_SHARE = 0.02
"""Below it nobody is starved."""
BUSY = 0.8
"""A stage that is busy for more of its capacity than this is what the others wait for."""
QUIET_S = 60.0
"""Between two lines about the same stage."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """The stream over an interval, as one worker saw it."""

    wait_share: float
    """Part of the interval that the worker waited for its next micro-batch."""
    rows_per_s: float
    """Of all workers."""
    read_s: float
    """Seconds a row that a task took to read it, compressed."""
    decode_s: float
    """Seconds a row that a task took to decode it."""
    unpack_share: float
    """Part of the interval that the worker took to make tensors of what had arrived."""
    cpus: float
    """CPUs that decode: those of the cluster that training does not take."""
    tower_s: float = 0.0
    """Seconds a row that an actor took to run the vision tower."""
    tower_actors: int = 0
    """Those of the stream."""


def bottleneck(flow: Flow) -> tuple[str, str]:
    """The slowest stage, and the numbers that say so."""
    decoding, reading = flow.rows_per_s * flow.decode_s, flow.rows_per_s * flow.read_s
    tower = flow.rows_per_s * flow.tower_s
    numbers = (
        f"decoding takes {1e3 * flow.decode_s:.1f} ms a row and {decoding:.1f} of {flow.cpus:g} CPUs, "
        f"reading {1e3 * flow.read_s:.2f} ms a row and {reading:.0%} of the task that reads"
    )
    if flow.tower_actors:
        numbers += (
            f", the tower {1e3 * flow.tower_s:.1f} ms a row and {tower:.1f} of {flow.tower_actors} actors"
        )
    if flow.unpack_share > BUSY:
        return "unpacking in the worker", f"it takes {flow.unpack_share:.0%} of the time; {numbers}"
    if flow.tower_actors and tower / flow.tower_actors > max(BUSY, decoding / flow.cpus, reading):
        return "the tower", f"{numbers}; more dataset.tower_actors, or GPUs for them, make it faster"
    # No CPU left: each decoding task is then as fast as it gets.
    if decoding > BUSY * flow.cpus and decoding / flow.cpus >= reading:
        return "decoding", f"{numbers}; more CPUs, or images stored smaller, make it faster"
    if reading > BUSY:
        return "reading", f"{numbers}; the storage answers too slowly"
    return "transport", f"{numbers}; neither is busy: the object store is full, or the network slow"


class StarvationLog:
    """Says at most once a minute, and whenever it is another one, which stage the workers wait for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._said_at = "", float("-inf")

    def line(self, flow: Flow) -> str | None:
        """What to log of an interval; None: nothing."""
        if flow.wait_share <= WAIT_SHARE:
            return None
        stage, why = bottleneck(flow)
        now = self._clock()
        if stage == self._stage and now < self._said_at + QUIET_S:
            return None
        self._stage, self._said_at = stage, now
        return f"waited {flow.wait_share:.0%} of the time for data; the bottleneck is {stage}: {why}"
