"""What every worker is doing, known outside of it, and the wish to save, followed by all at the same step.

A stopped or stuck worker cannot say that it is. So each has a thread that tells an actor on the driver's node
once a second where it is; when a collective fails, the others ask there who is missing. The answer to the
thread says whether the driver was told to end and wants the run saved first.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import ray.exceptions
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from pipelines.board import SILENT_S, Beat, Wish

BEAT_EVERY_S = 1.0
NAMED = 8  # workers of which an error speaks
IN_STEP, WAITING, SAVING = "in the step", "waiting for data", "saving"
LOG = logging.getLogger(__name__)


class Watch:
    """A worker's side: tells the board where it is, and knows who is missing."""

    def __init__(self, board: Any, *, rank: int, timeout_s: float) -> None:
        self._board, self._timeout_s = board, timeout_s
        self._wish: Wish = Wish.NONE
        self._at = time.monotonic(), Beat(rank, ray.util.get_node_ip_address(), os.getpid())
        self._notices: Any = None
        self._closed = threading.Event()
        threading.Thread(target=self._tell, daemon=True).start()

    def now(self, step: int, doing: str) -> None:
        """Note what begins."""
        self._at = time.monotonic(), replace(self._at[1], step=step, doing=doing)

    def wish(self) -> Wish:
        """What the driver asks for, or Ray, which gives notice before it takes a node away; once each."""
        # The public function is a barrier of all workers and takes milliseconds; this is what it reads.
        notice = get_train_context().preemption_context.preemption_info
        if notice is not None and notice != self._notices:
            self._notices = notice
            return max(self._wish, Wish.SAVE)
        return self._wish

    def note_saved(self, step: int) -> None:
        """Tell whoever waits for it that the manifest of a step stands."""
        self._board.note_saved.remote(step)

    def give_up(self, reason: str) -> None:
        """Tell the driver why the run ends here; it knows when this returns."""
        ray.get(self._board.give_up.remote(reason))

    def close(self) -> None:
        self._closed.set()

    @contextlib.contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """Say who is missing when a collective fails or takes too long.

        Raises:
            CollectiveError: names ranks, and what each was last known to do.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            # Not `from error`: Ray sends the cause along, and its classes cannot always be read back.
            raise CollectiveError(f"{self._diagnosis()}; {str(error).splitlines()[0]}") from None

    def _diagnosis(self) -> str:
        _, mine = self._at
        try:
            beats = ray.get(self._board.beats.remote(), timeout=10)
        except (ray.exceptions.RayError, TimeoutError) as error:
            return (
                f"rank {mine.rank} waited in vain in step {mine.step}, and nobody knows for whom: {error!r}"
            )
        missing = suspects(beats)
        named = "; ".join(str(beat) for beat in missing[:NAMED])
        more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        return f"rank {mine.rank} waited in vain in step {mine.step} for {named}{more}"

    def _tell(self) -> None:
        warned = 0.0
        while True:
            since, beat = self._at
            for_s = time.monotonic() - since
            try:
                self._wish = Wish(int(ray.get(self._board.beat.remote(replace(beat, for_s=for_s)))))
            except ray.exceptions.RayError:
                return  # the driver's node is gone, and with it the run
            # NCCL does not raise: its watchdog ends the process at the timeout, without a name.
            if for_s > 0.9 * self._timeout_s and since != warned:
                warned = since
                LOG.error("no step ended for %.0f s: %s", for_s, self._diagnosis())
            if self._closed.wait(BEAT_EVERY_S):
                return


def suspects(beats: list[Beat]) -> list[Beat]:
    """Those that the others may be waiting for: the silent ones, else those that are behind, else all."""
    silent = sorted((b for b in beats if b.silent_s > SILENT_S), key=lambda b: -b.silent_s)
    if silent:
        return silent
    furthest = max((b.step, b.doing == IN_STEP) for b in beats)
    behind = [b for b in beats if (b.step, b.doing == IN_STEP) < furthest]
    return sorted(behind or beats, key=lambda b: (b.step, b.rank))


class CollectiveError(Exception):
    """A worker waited in vain for others."""


class Agreement:
    """The same wish at the same step on all workers, of whom each learns of it when it likes.

    What the workers hand in at one step is exchanged behind the computation of the next: nobody waits for the
    device, and for another worker only if that is more than a step behind.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchanged(self, wish: Wish) -> Wish:
        """Hand in this worker's wish; returns what all agreed on of those handed in at the step before."""
        agreed = self.settled()
        value = torch.tensor(int(wish))
        work: Any = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, value
        return agreed

    def settled(self) -> Wish:
        """Wait for the exchange under way."""
        if self._pending is None:
            return Wish.NONE
        work, value = self._pending
        work.wait()
        self._pending = None
        return Wish(int(value))
