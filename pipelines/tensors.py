"""Rows and arrays of the stream -> tensors that share their memory."""

import os
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import cv2
import pyarrow as pa
import torch
from ray.data import DataIterator
from ray.data.collate_fn import NumpyBatchCollateFn

from pipelines.samples import STAGE_SECONDS, Batch, SampleReader
from pipelines.stream import all_rows, stage_seconds

AHEAD_A_THREAD = 2  # micro-batches
DECODERS_NICER = 5  # than the process

# Blocks lie read-only in the object store, and nothing here writes to them. Once and for all: threads that
# change the filters around each call would restore each other's.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class ToTorch(NumpyBatchCollateFn):
    """A batch or a block of them -> tensors that share its memory; images become (.., 3, h, w) views."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.rows_ready = 0
        """Rows that were made tensors so far."""
        self._counting = threading.Lock()  # Ray calls from several threads

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if "micro_batch" in batch and batch["micro_batch"].ndim == 2:
            batch = {name: values[0] for name, values in batch.items()}  # a block is one row
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        # (..., h, w, 3) -> (..., 3, h, w)
        tensors = {name: t.movedim(-1, -3) if t.dim() > 3 else t for name, t in tensors.items()}
        with self._counting:
            self.busy_s += time.perf_counter() - started
            self.rows_ready += len(next(iter(tensors.values())))
        return tensors


def unpacked(
    blocks: Iterable[dict[str, torch.Tensor]], micro_batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of blocks, as views."""
    for block in blocks:
        for first in range(0, len(block["micro_batch"]), micro_batch):
            yield {name: rows[first : first + micro_batch] for name, rows in block.items()}


class Unpacked:
    """The micro-batches of blocks that tasks of the stream decoded.

    Args:
        shard: one worker's blocks.
        micro_batch: rows.
        pin_memory: whether the tensors can be copied to a GPU without waiting.
    """

    threads = 0
    """Of this process that decode."""

    def __init__(self, shard: DataIterator, micro_batch: int, *, pin_memory: bool) -> None:
        self._to_torch, self._micro_batch = ToTorch(), micro_batch
        self._blocks = shard.iter_torch_batches(
            batch_size=None,
            prefetch_batches=2,
            collate_fn=self._to_torch,
            device="cpu",
            pin_memory=pin_memory,
        )

    @property
    def rows_ready(self) -> int:
        """Rows that were made tensors so far."""
        return self._to_torch.rows_ready

    @property
    def unpacking_s(self) -> float:
        """Seconds that making tensors took."""
        return self._to_torch.busy_s

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return unpacked(self._blocks, self._micro_batch)


class Decoded:
    """The micro-batches of blocks with encoded rows: threads of this process decode some ahead, in order.

    Decoded images never pass through the object store: copying them there and back costs (README).

    Args:
        reader: knows how.
        blocks: of one worker, each one row.
        threads: that decode; OpenCV and NumPy release the interpreter's lock meanwhile.
        pin_memory: whether the tensors can be copied to a GPU without waiting.
    """

    unpacking_s = 0.0
    """Seconds that the training waited for tensors to be made of what had arrived: threads do it."""

    def __init__(
        self, reader: SampleReader, blocks: Iterable[pa.Table], *, threads: int, pin_memory: bool = False
    ) -> None:
        self._reader, self._blocks, self._pin = reader, blocks, pin_memory
        self.threads = threads
        self._own = threading.local()  # memory that a reader uses again is for one thread
        self._to_torch = ToTorch()

    @property
    def rows_ready(self) -> int:
        """Rows that were decoded so far."""
        return self._to_torch.rows_ready

    def __iter__(self) -> Generator[dict[str, torch.Tensor], None, None]:
        cv2.setNumThreads(1)  # an image a thread is cheaper than an image by several
        room, over = threading.Semaphore(AHEAD_A_THREAD * self.threads), threading.Event()
        ahead: SimpleQueue[Future[dict[str, torch.Tensor]] | None] = SimpleQueue()
        with ThreadPoolExecutor(self.threads, "decode", initializer=_step_aside) as decoders:
            # Nobody waits for this thread: the block that it waits for may be one that never comes.
            arguments = (decoders, ahead, room, over)
            threading.Thread(target=self._take, args=arguments, daemon=True, name="blocks").start()
            try:
                while (found := ahead.get()) is not None:
                    room.release()
                    yield found.result()
            finally:
                over.set()
                room.release()

    def _take(
        self,
        decoders: ThreadPoolExecutor,
        ahead: "SimpleQueue[Future[dict[str, torch.Tensor]] | None]",
        room: threading.Semaphore,
        over: threading.Event,
    ) -> None:
        """Hand the blocks' micro-batches to the threads that decode: who trains only takes what is ready."""
        b = self._reader.config.micro_batch
        try:
            for block in self._blocks:
                rows = all_rows(block)
                small = self._without_images(rows) if len(rows) else {}
                for first in range(0, len(rows), b):
                    room.acquire()
                    if over.is_set():
                        return
                    part = {name: values[first : first + b] for name, values in small.items()}
                    ahead.put(decoders.submit(self._one, part, rows.slice(first, b)))
            ahead.put(None)
        except BaseException as error:  # noqa: BLE001 for who trains, not for this thread
            failed: Future[dict[str, torch.Tensor]] = Future()
            failed.set_exception(error)
            ahead.put(failed)

    def _without_images(self, rows: pa.Table) -> Batch:
        started = time.perf_counter()
        small = self._reader.without_images(rows) | {STAGE_SECONDS: stage_seconds(rows)}
        small[STAGE_SECONDS][:, 1] = (time.perf_counter() - started) / len(rows)
        return small

    def _one(self, part: Batch, rows: pa.Table) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if not hasattr(self._own, "reader"):
            self._own.reader = replace(self._reader)
        batch = self._own.reader.with_images(part, rows)
        batch[STAGE_SECONDS][:, 1] += (time.perf_counter() - started) / len(rows)
        tensors = self._to_torch(batch)
        return {name: t.pin_memory() for name, t in tensors.items()} if self._pin else tensors


def _step_aside() -> None:
    """Let the thread that trains have a core at once when all are busy: it needs one for moments only."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        # 0 is the calling thread, which has what Ray gave its process; 19 is the most that there is
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + DECODERS_NICER)
