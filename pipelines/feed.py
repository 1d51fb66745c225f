"""A train worker's micro-batches in order, checked, with the time spent waiting for them."""

import itertools
import json
import os
import time
from collections.abc import Iterator

import torch
from ray.data import DataIterator
from ray.train import get_context
from torch import Tensor

from pipelines.progress import BadRow
from pipelines.run import Run
from pipelines.samples import ROW_IDS, STAGE_SECONDS
from pipelines.tensors import Decoded, Unpacked

MOST_THREADS = 16
"""That decode in one worker: they share the interpreter with the training."""


class Feed:
    """The micro-batches m of the stream with (m - start) % W == rank.

    A step is `TrainConfig.micro_batches` of them, so where W is no divisor of that number the workers take
    turns in having one more.

    Args:
        run: what is trained.
        shard: this worker's blocks of the stream.
        rank: of this worker.
        num_workers: W.
        device: where the columns go.
    """

    def __init__(
        self, run: Run, shard: DataIterator, *, rank: int, num_workers: int, device: torch.device
    ) -> None:
        self._arrived = _arrived(run, shard, pin_memory=device.type == "cuda")
        self._batches = iter(self._arrived)
        # The first batch says where the controller built the dataset to start: its word counts, for all
        # workers.
        self._first: dict[str, Tensor] | None = next(self._batches)
        self._run, self._num_workers, self.device = run, num_workers, device
        self.waited_s = 0.0
        self.rows_taken = 0
        self.stage_s = torch.zeros(3)
        """Seconds that tasks took to read and to decode these rows, and actors to run the tower on them."""
        self._next = int(self._first["micro_batch"][0])
        self.samples_seen = (self._next - rank) * run.train.micro_batch
        self.rows: dict[int, list[dict[str, list[int]]]] = {}
        """Row ids of the steps since `forget_rows`, for whoever must name them."""
        self.bad_rows: set[BadRow] = set()
        """Those met so far by this worker."""
        self._rows_path = run.folder / "rows" / f"rank_{rank}.jsonl" if run.train.record_rows else None
        if self._rows_path is not None:
            self._rows_path.parent.mkdir(parents=True, exist_ok=True)

    def of_step(self, step: int) -> tuple[int, Iterator[tuple[int, dict[str, Tensor]]]]:
        """How many micro-batches of a step are this worker's, and each: (m, columns on the device)."""
        end = step * self._run.train.micro_batches
        count = len(range(self._next, end, self._num_workers))
        return count, (self._take(step) for _ in range(count))

    def _take(self, step: int) -> tuple[int, dict[str, Tensor]]:
        started = time.perf_counter()
        batch = self._first or next(self._batches, None)
        self.waited_s += time.perf_counter() - started
        index, self._first, self._next = self._next, None, self._next + self._num_workers
        assert batch is not None, f"the stream ended before step {step}"
        numbers = batch["micro_batch"]
        assert bool((numbers == index).all()), f"expected micro-batch {index}, got {numbers.tolist()}"
        self.rows_taken += len(numbers)
        self.stage_s += batch[STAGE_SECONDS].sum(dim=0)
        self._note(step, {name: batch[name].tolist() for name in ROW_IDS})
        columns = {n: t for n, t in batch.items() if n not in (*ROW_IDS, STAGE_SECONDS)}
        tensors = {n: t.to(self.device, non_blocking=True) for n, t in columns.items()}
        return index, tensors

    def _note(self, step: int, ids: dict[str, list[int]]) -> None:
        self.rows.setdefault(step, []).append(ids)
        rows = zip(*(ids[name] for name in BadRow._fields), strict=True)
        self.bad_rows |= {row for row in itertools.starmap(BadRow, rows) if row.bad_cameras}
        if self._rows_path is not None:
            with self._rows_path.open("a") as stream:
                stream.write(json.dumps({"step": step} | ids) + "\n")

    @property
    def unpacked_s(self) -> float:
        """Seconds that this worker took to make tensors of what had arrived."""
        return self._arrived.unpacking_s

    @property
    def decoding_threads(self) -> int:
        """Threads of this worker that decode; 0: tasks of the stream do."""
        return self._arrived.threads

    @property
    def queued_micro_batches(self) -> int:
        """Those that lie ready for this worker: it waits for data when there are none."""
        return (self._arrived.rows_ready - self.rows_taken) // self._run.train.micro_batch

    def forget_rows(self) -> None:
        """Drop the ids of past steps."""
        self.rows = {}


def _arrived(run: Run, shard: DataIterator, *, pin_memory: bool) -> Decoded | Unpacked:
    """The micro-batches of this worker's blocks, as tensors of the CPU."""
    if run.decoder is None:
        return Unpacked(shard, run.train.micro_batch, pin_memory=pin_memory)
    blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    threads = len(os.sched_getaffinity(0)) // get_context().get_local_world_size()
    threads = min(max(threads, 1), MOST_THREADS)
    return Decoded(run.decoder, blocks, threads=threads, pin_memory=pin_memory)
