"""Plan -> Ray Data -> model-ready micro-batches.

One Ray Data dataset a run. A read task is one mixing group of the plan: it reads the row groups, cuts the
action windows, shuffles the rows while they are still compressed, and hands them on in blocks; a second step
decodes, shrinks, normalises and looks up the task's tokens. A block holds whole micro-batches of one worker
and the order of blocks is preserved, so worker r of W receives the micro-batches m with (m - start) % W == r.
The worker checks that instead of believing it.

Shape letter: b micro-batch.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, DataIterator, Dataset, Datasource, ExecutionOptions, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from pipelines.progress import position
from pipelines.run_storage import RunStorage
from pipelines.samples import Batch, SampleReader

READ_TASKS = 4
"""Mixing groups read at once; they count as no CPUs: one that waits must not keep a CPU from decoding."""
NUM_WORKERS = "smolvla.num_workers"  # in the dataset's context, which travels with its tasks
STAGE_SECONDS = "stage_seconds"  # of each row: (b, 2), what a task took to read it and to decode it


class SpanDatasource(Datasource):
    """The numbers of the micro-batches [start, stop), one row a mixing group, made while they are asked for.

    A read task for each mixing group would cost the start of a long run minutes.
    """

    def __init__(self, batches_per_group: int, *, start: int, stop: int) -> None:
        super().__init__()
        self._per_group, self._start, self._stop = batches_per_group, start, stop

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        read = functools.partial(_spans, self._per_group, self._start, self._stop)
        return [ReadTask(read, metadata, per_task_row_limit=per_task_row_limit)]


def _spans(per_group: int, start: int, stop: int) -> Iterator[pa.Table]:
    for group in range(start // per_group, -(-stop // per_group)):
        first, last = max(start, group * per_group), min(stop, (group + 1) * per_group)
        yield pa.table({"group": [group], "first": [first], "last": [last]})


@functools.lru_cache(maxsize=4)
def _local(reader: "ray.ObjectRef[SampleReader]") -> SampleReader:
    """The reader, kept by each worker process with its open files and permuted epochs."""
    cv2.setNumThreads(1)  # Ray gives a task its cores
    return ray.get(reader)


def shares(first: int, last: int, *, start: int, num_workers: int, size: int) -> Iterator[list[int]]:
    """Deal the micro-batches [first, last) to workers: worker r takes those with (m - start) % W == r.

    The lists, of at most `size`, come in rounds, one for each worker in turn: list i belongs to worker i % W.
    Some are empty where there are fewer micro-batches than workers.
    """
    dealt = [range(first + (start + r - first) % num_workers, last, num_workers) for r in range(num_workers)]
    rounds = -(-max(map(len, dealt)) // size)
    for i in range(rounds):
        for mine in dealt:
            yield list(mine[i * len(mine) // rounds : (i + 1) * len(mine) // rounds])


def micro_batches(reader: SampleReader, *, start: int, stop: int) -> Dataset:
    """The micro-batches [start, stop) as a Ray dataset: a block each, or after `deal` several a block.

    A block is one row, so that nothing on the way cuts or joins it; `ToTorch` takes its rows out. With the
    execution option `preserve_order` Ray hands block i to worker i % W.

    Args:
        reader: what to read and how.
        start: first micro-batch: samples seen / micro-batch.
        stop: one past the last.
    """
    ref = ray.put(reader)  # once, however many tasks there are
    b, size = reader.config.micro_batch, reader.batches_per_block

    def read(span: pa.Table) -> Iterator[pa.Table]:
        group, first, last = (span[name][0].as_py() for name in ("group", "first", "last"))
        blocks = [[m] for m in range(first, last)]
        if num_workers := DataContext.get_current().get_config(NUM_WORKERS):
            blocks = list(shares(first, last, start=start, num_workers=num_workers, size=size))
        started, read_s = time.perf_counter(), 0.0
        for i, encoded in enumerate(_local(ref).encoded_blocks(group, blocks)):
            if i == 0:  # all were read for the first
                read_s = (time.perf_counter() - started) / ((last - first) * b)
            yield pa.table({"rows": _packed(encoded), "read_s": [read_s]})

    def decode(block: pa.Table) -> Batch:
        started = time.perf_counter()
        with pa.ipc.open_stream(block["rows"][0].as_buffer()) as stream:
            rows = stream.read_all()
        if not len(rows):
            return {"micro_batch": np.empty((1, 0), dtype=np.int64)}
        batch = _local(ref).decoded(rows)
        seconds = [block["read_s"][0].as_py(), (time.perf_counter() - started) / len(rows)]
        batch[STAGE_SECONDS] = np.tile(np.array(seconds, dtype=np.float32), (len(rows), 1))
        return {name: values[None] for name, values in batch.items()}

    spans = ray.data.read_datasource(
        SpanDatasource(reader.config.mixing_rows // b, start=start, stop=stop),
        override_num_blocks=1,
        num_cpus=0,
    )
    settings: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    encoded = spans.map_batches(read, num_cpus=0, compute=TaskPoolStrategy(READ_TASKS), **settings)
    blocks = encoded.map_batches(decode, num_cpus=1, **settings)
    blocks.context.target_max_block_size = 1  # any row is larger, so each becomes a block at once
    return blocks


def deal(dataset: Dataset, *, num_workers: int) -> None:
    """Let blocks of `micro_batches` hold several of one worker's; `unpacked` takes them out.

    Worker r of W has the m with (m - start) % W == r.
    """
    dataset.context.set_config(NUM_WORKERS, num_workers)


class DealtToWorkers(DataConfig):
    """Ray Train's split of the stream: in order, and dealt to as many workers as there are at this start."""

    def __init__(self) -> None:
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        for dataset in datasets.values():
            deal(dataset, num_workers=world_size)
        return super().configure(datasets, world_size, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class StreamFromCheckpoint:
    """What Ray Train calls in its controller whenever it (re)starts the workers: the stream from there on."""

    reader: SampleReader
    storage: RunStorage
    """Of the run."""
    board: Any
    """The actor that is told that new workers begin."""
    num_micro_batches: int
    """Of the whole run."""
    most_workers: int

    def __call__(self) -> Dataset:
        ray.get(self.board.begin.remote())
        start = position(self.storage).samples_seen // self.reader.config.micro_batch
        # One more for each worker, whose first one says where the stream starts: also when no step is left.
        return micro_batches(self.reader, start=start, stop=self.num_micro_batches + self.most_workers)


def _packed(table: pa.Table) -> pa.Array:
    """A table as one value."""
    counted = pa.MockOutputStream()  # the buffer of a sink that grows is copied again and again
    _write(table, counted)
    data = pa.allocate_buffer(counted.size())
    _write(table, pa.FixedSizeBufferWriter(data))
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
