"""Plan -> Ray Data -> model-ready micro-batches.

One Ray Data dataset a run. A read task takes mixing groups of the plan, one after the other: it reads the row
groups, cuts the action windows, shuffles the rows while they are still compressed, and hands them on in
blocks; a second step, in tasks or in the workers, decodes, shrinks, normalises and looks up the task's
tokens. A block holds whole micro-batches of one worker and the order of blocks is preserved, so worker r of W
receives the micro-batches m with (m - start) % W == r. The worker checks that instead of believing it.

One read task runs at a time. What others read meanwhile would come later in the order, fill the share of the
object store that Ray allows for encoded blocks, and leave none for the block that is waited for.

Shape letter: b micro-batch.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    DataIterator,
    Dataset,
    Datasource,
    ExecutionOptions,
    ExecutionResources,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from pipelines.columns import whole
from pipelines.progress import position
from pipelines.run_storage import RunStorage
from pipelines.samples import STAGE_SECONDS, Batch, SampleReader
from pipelines.tower import BlockEmbedder, StreamedTower

MOST_READ_TASKS = 256
"""Each costs Ray a millisecond or more before the first one starts."""
EMPTY = pa.table({"micro_batch": pa.array([[]], type=pa.large_list(pa.int64()))})
FIRST_DECODERS = 2
GROUPS_AHEAD = 2  # read while an earlier one is handed on
DECODE_CPUS = 0.66
"""Of a task that decodes; three for two cores, because Ray takes a while to follow one task by the next."""
MOST_BLOCK_BYTES = 64 * 2**20  # of decoded rows; a block costs Ray some 20 ms of CPU whatever is in it
COMPRESSED = 6  # times smaller than decoded are JPEG images, at least; PNG is about half
BLOCKS_AHEAD = 8
"""Of each worker, where the workers decode."""
BLOCKS_IN_STORE = 64
"""At least so many have room in the cluster's object store, of which Ray Data takes a half: some are being
written, some wait, and each worker holds those that it prefetches."""
NUM_WORKERS, BLOCK_BYTES = "smolvla.num_workers", "smolvla.block_bytes"
"""In the dataset's context, which travels with its tasks."""
NEVER = -1  # of jemalloc's decay


Decoding = Literal["tasks", "workers"]
"""Who decodes: tasks of Ray Data, on any node, or threads of the train workers, from their nodes' CPUs."""


class Unhurried(ExecutionCallback):
    """Lets Ray Data's executor rest after a look at its tasks that changed nothing.

    It waits for tasks that are ready, and blocks that are ready but may not be taken yet, because the workers
    have enough, never let it wait: it looked without a pause and took half a core from the training (2.60).
    """

    rest_s = 0.1
    """What it waits by itself for a task."""

    def __init__(self) -> None:
        self._before: list[tuple[int, int, int]] = []
        self._looked = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """Called by the executor after each look."""
        metrics = [operator.metrics for operator in executor._topology]
        now = [(m.num_tasks_submitted, m.num_task_outputs_generated, m.num_outputs_taken) for m in metrics]
        if now == self._before:
            time.sleep(max(self._looked + self.rest_s - time.monotonic(), 0.0))
        self._before, self._looked = now, time.monotonic()


class UnhurriedWithReading(Unhurried):
    """Where the workers decode: one task reads, and far ahead, so nothing has to follow sooner."""

    rest_s = 0.25


class MicroBatchSource(Datasource):
    """The micro-batches [start, stop), their images still compressed."""

    def __init__(
        self,
        reader: "ray.ObjectRef[SampleReader]",
        per_group: int,
        *,
        start: int,
        stop: int,
        decoding: Decoding,
    ) -> None:
        super().__init__()
        self._read = functools.partial(_encoded_blocks, reader, per_group, start, stop, decoding)
        groups = range(start // per_group, -(-stop // per_group))
        several = -(-len(groups) // MOST_READ_TASKS)
        self.spans = [groups[i : i + several] for i in range(0, len(groups), several)]
        """The mixing groups of each read task."""

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(self._read, span), metadata, per_task_row_limit=per_task_row_limit)
            for span in self.spans
        ]


def _encoded_blocks(
    ref: "ray.ObjectRef[SampleReader]",
    per_group: int,
    start: int,
    stop: int,
    decoding: Decoding,
    groups: range,
) -> Iterator[pa.Table]:
    """The blocks of some mixing groups, each one row."""
    reader, context = _local(ref), DataContext.get_current()

    def opened(group: int) -> Iterator[pa.Table]:
        first, last = max(start, group * per_group), min(stop, (group + 1) * per_group)
        blocks = [[m] for m in range(first, last)]
        if num_workers := context.get_config(NUM_WORKERS):
            compressed = decoding == "workers" and not reader.from_features
            size = reader.batches_per_block(
                context.get_config(BLOCK_BYTES) * (COMPRESSED if compressed else 1)
            )
            blocks = list(shares(first, last, start=start, num_workers=num_workers, size=size))
        started = time.perf_counter()
        tables = reader.encoded_blocks(group, blocks)
        tables = itertools.chain([next(tables)], tables)  # all rows were read for the first
        read_s = (time.perf_counter() - started) / ((last - first) * reader.config.micro_batch)
        return (_one_row(table.append_column("read_s", pa.array([read_s] * len(table)))) for table in tables)

    num_workers = context.get_config(NUM_WORKERS)
    if decoding == "tasks" and groups.start * per_group <= start and num_workers:
        # Empty blocks, whole rounds of them: the processes that decode start while the first rows are read.
        for _ in range(num_workers * -(-FIRST_DECODERS // num_workers)):
            yield EMPTY
    with ThreadPoolExecutor(1) as pool:  # an open file is for one thread
        ahead: deque[Future[Iterator[pa.Table]]] = deque()
        for group in groups:
            ahead.append(pool.submit(opened, group))
            if len(ahead) > GROUPS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


@functools.lru_cache(maxsize=4)
def _local(reader: "ray.ObjectRef[SampleReader]") -> SampleReader:
    """The reader, kept by each worker process with its open files and permuted epochs."""
    cv2.setNumThreads(1)  # Ray gives a task its cores
    keep_memory()
    return ray.get(reader)


def keep_memory() -> None:
    """Let Arrow use again what it read the last rows into, instead of asking the system for memory anew.

    Memory that is new to a process is zeroed page by page first: a third of what reading costs.
    """
    if "jemalloc" in pa.supported_memory_backends():
        pa.jemalloc_set_decay_ms(NEVER)
        pa.set_memory_pool(pa.jemalloc_memory_pool())


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


def micro_batches(
    reader: SampleReader,
    *,
    start: int,
    stop: int,
    decoding: Decoding = "tasks",
    tower: StreamedTower | None = None,
) -> Dataset:
    """The micro-batches [start, stop) as a Ray dataset: a block each, or after `deal` several a block.

    A block is one row, so that nothing on the way cuts or joins it; `ToTorch` takes its rows out. With the
    execution option `preserve_order` Ray hands block i to worker i % W.

    Args:
        reader: what to read and how.
        start: first micro-batch: samples seen / micro-batch.
        stop: one past the last.
        decoding: who turns encoded rows into arrays; the workers do it by `pipelines.tensors.Decoded`.
        tower: actors that turn the images into features on the way.
    """
    assert tower is None or decoding == "tasks"
    ref = ray.put(reader)  # once, however many tasks there are
    per_group = reader.plan.batches_per_group
    source = MicroBatchSource(ref, per_group, start=start, stop=stop, decoding=decoding)
    # It counts as no CPUs: while it waits it must not keep one from decoding.
    encoded = ray.data.read_datasource(
        source, override_num_blocks=len(source.spans), concurrency=1, num_cpus=0
    )
    blocks = encoded if decoding == "workers" else _decoded(encoded, reader, ref, tower)
    blocks.context.target_max_block_size = 1  # any row is larger, so each becomes a block at once
    unhurried = UnhurriedWithReading if decoding == "workers" else Unhurried
    blocks.context.custom_execution_callback_classes = [unhurried]
    return blocks


def stage_seconds(rows: pa.Table) -> NDArray[np.float32]:
    """`STAGE_SECONDS` (rows, 3) of a block's rows so far: who decodes adds its part."""
    seconds = np.zeros((len(rows), 3), dtype=np.float32)
    seconds[:, 0] = rows["read_s"][0].as_py()
    return seconds


def _decoded(
    encoded: Dataset, reader: SampleReader, ref: "ray.ObjectRef[SampleReader]", tower: StreamedTower | None
) -> Dataset:
    """Decoding in tasks, anywhere in the cluster, and the tower behind it if there is one."""

    def decode(block: pa.Table) -> Batch:
        started, rows = time.perf_counter(), all_rows(block)
        local = _local(ref)  # also for an empty block: the first of them are there to make it ready
        if not len(rows):
            return {"micro_batch": np.empty((1, 0), dtype=np.int64)}
        batch = local.decoded(rows) | {STAGE_SECONDS: stage_seconds(rows)}
        batch[STAGE_SECONDS][:, 1] = (time.perf_counter() - started) / len(rows)
        return {name: values[None] for name, values in batch.items()}

    blocks = encoded.map_batches(
        decode, num_cpus=DECODE_CPUS, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
    )
    if tower is not None:
        blocks = blocks.map_batches(
            BlockEmbedder,
            fn_constructor_args=(tower, reader.camera_names, reader.config.micro_batch),
            batch_size=None,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=tower.actors),
            num_cpus=tower.cpus,
            num_gpus=tower.gpus,
        )
    return blocks


def deal(dataset: Dataset, *, num_workers: int) -> None:
    """Let blocks of `micro_batches` hold several of one worker's; `unpacked` takes them out.

    Worker r of W has the m with (m - start) % W == r.
    """
    dataset.context.set_config(NUM_WORKERS, num_workers)
    dataset.context.set_config(BLOCK_BYTES, _block_bytes())


def _block_bytes() -> int:
    """Of decoded rows, that a block has at most."""
    store = int(ray.cluster_resources()["object_store_memory"])
    return min(store // BLOCKS_IN_STORE, MOST_BLOCK_BYTES)


def execution_options(decoding: Decoding, *, num_workers: int) -> ExecutionOptions:
    """In order, and not further ahead than is of use.

    Ray Data fills half of the object store: with rows that it would have read anyway, but memory that others
    could use. Where tasks decode, what they need ahead is for Ray to say.
    """
    options = ExecutionOptions(preserve_order=True)
    if decoding == "workers":
        ahead = num_workers * BLOCKS_AHEAD * _block_bytes()
        options.resource_limits = ExecutionResources.for_limits(object_store_memory=ahead)
    return options


class DealtToWorkers(DataConfig):
    """Ray Train's split of the stream: in order, and dealt to as many workers as there are at this start."""

    def __init__(self, options: ExecutionOptions) -> None:
        super().__init__(execution_options=options)

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
    decoding: Decoding = "tasks"
    tower: StreamedTower | None = None
    """Actors that turn images into features on the way."""

    def __call__(self) -> Dataset:
        ray.get(self.board.begin.remote())
        start = position(self.storage).samples_seen // self.reader.config.micro_batch
        # One more for each worker, whose first one says where the stream starts: also when no step is left.
        stop = self.num_micro_batches + self.most_workers
        return micro_batches(self.reader, start=start, stop=stop, decoding=self.decoding, tower=self.tower)


def _one_row(table: pa.Table) -> pa.Table:
    """A table as one row of lists; nothing is copied."""
    columns = {name: whole(table[name]) for name in table.column_names}
    offsets = pa.array([0, len(table)], type=pa.int64())
    return pa.table(
        {name: pa.LargeListArray.from_arrays(offsets, values) for name, values in columns.items()}
    )


def all_rows(block: pa.Table) -> pa.Table:
    """What `_one_row` made a row of."""
    return pa.table({name: whole(block[name]).flatten() for name in block.column_names})
