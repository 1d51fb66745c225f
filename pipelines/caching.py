"""The Ray part of image features: an actor pool computes those of each data file and writes them beside it.

An actor takes one data file after the other: a thread reads ahead and decodes, the tower runs over batches,
and a file appears under its name when it is whole. So a run that was killed goes on with the files that are
missing, and every file holds the same bytes whoever computed it.

Shape letters: n frames, (h, w) image after fitting.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipelines.columns import whole
from pipelines.dataset import EpisodeDataset, filesystem_of
from pipelines.features import FRAME, StoredFeatures
from pipelines.files import atomic_stream
from pipelines.images import fitted_size
from pipelines.samples import Fit, decoded_into
from pipelines.tower import embedder

if TYPE_CHECKING:
    from smolvla.configuration import SmolVLAConfig

GROUPS_AHEAD = 8
"""Row groups that an actor decodes ahead."""
FOOTER_BYTES = 300
"""Of a file for each of its row groups and columns, about."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the computation is."""

    frames: int
    """Computed in this run."""
    total_frames: int
    """To be computed in this run."""
    elapsed_s: float

    @property
    def remaining_s(self) -> float:
        """At the rate so far."""
        return self.elapsed_s * (self.total_frames - self.frames) / max(self.frames, 1)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Where an actor gets what it computes with."""

    policy_path: str
    """Folder with model.safetensors, which every node must see."""
    config: "SmolVLAConfig"
    use_gpu: bool


# ---- one data file -----------------------------------------------------------------------------------------


class FileEncoder:
    """Computes the features of data files; what a Ray actor holds.

    Args:
        dataset: whole.
        features: where they go, and in which form.
        digests: of the data files, by number.
        tower: the weights.
        batch_size: images that go through the tower at once.
        threads: that decode.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        features: StoredFeatures,
        digests: Sequence[str],
        tower: Tower,
        batch_size: int,
        threads: int,
    ) -> None:
        cv2.setNumThreads(1)  # a frame a thread is cheaper than a frame by several
        self._dataset, self._features, self._digests = dataset, features, digests
        self._batch_size, self._threads = batch_size, threads
        recipe = features.recipe
        self._embed = embedder(
            tower.policy_path,
            tower.config,
            dtype=recipe.dtype,
            precision=recipe.precision,
            use_gpu=tower.use_gpu,
        )
        box = features.recipe.image_box
        stored = {name: dataset.image_size(name) for name in features.tokens}
        self._fits = {
            name: Fit(size, fitted_size(*size, box=box) if box else size) for name, size in stored.items()
        }

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The number of a data file -> the frames that were done, some at a time."""
        for number in batch["file"].tolist():
            for frames in self.encode(int(number)):
                yield {"frames": np.array([frames])}

    def encode(self, number: int) -> Iterator[int]:
        """Write the features of a data file; yields how many frames were done since the last time."""
        features, name = self._features, self._dataset.files[number]
        schema = features.schema(self._digests[number])
        filesystem, _ = filesystem_of(features.uri)
        # Reading is to be copying; statistics of such values would make footers as large as the data.
        with (
            atomic_stream(filesystem, features.path(name)) as stream,
            pq.ParquetWriter(
                stream, schema, compression="NONE", use_dictionary=False, write_statistics=False
            ) as writer,
        ):
            for groups in self._batched(self._decoded_groups(number)):
                for table in self._tables(groups, schema):
                    writer.write_table(table, row_group_size=len(table))
                yield sum(len(frames) for frames, _ in groups)

    def _batched(self, groups: Iterator["_Group"]) -> Iterator[list["_Group"]]:
        """Row groups, as many at a time as fill a batch."""
        waiting: list[_Group] = []
        for group in groups:
            waiting.append(group)
            if sum(len(frames) for frames, _ in waiting) >= self._batch_size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _decoded_groups(self, number: int) -> Iterator["_Group"]:
        file, cameras = self._dataset.open_file(number), list(self._fits)
        with ThreadPoolExecutor(self._threads) as pool:
            ahead: deque[Future[_Group]] = deque()
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=[*FRAME, *cameras], use_threads=False)
                ahead.append(pool.submit(self._decoded, table))
                if len(ahead) > GROUPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _decoded(self, table: pa.Table) -> "_Group":
        images = {}
        for camera, fit in self._fits.items():
            stored = whole(table[camera]).field("bytes").to_pylist()
            pixels = np.zeros((len(stored), *fit.scaled, 3), dtype=np.uint8)
            images[camera] = pixels, np.array([decoded_into(pixels[i], x, fit) for i, x in enumerate(stored)])
        return table.select(list(FRAME)), images

    def _tables(self, groups: Sequence["_Group"], schema: pa.Schema) -> Iterator[pa.Table]:
        """A table for each of the row groups."""
        computed = {
            camera: self._computed(np.concatenate([images[camera][0] for _, images in groups]))
            for camera in self._fits
        }
        first = 0
        for frames, images in groups:
            columns = [whole(frames[name]) for name in FRAME]
            for camera in self._fits:
                rows = computed[camera][first : first + len(frames)]
                columns.append(_binaries(rows, images[camera][1], schema.field(camera).type))
            yield pa.Table.from_arrays(columns, schema=schema)
            first += len(frames)

    def _computed(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        size = self._batch_size
        return np.concatenate([self._embed(images[i : i + size]) for i in range(0, len(images), size)])


_Group = tuple[pa.Table, dict[str, tuple[NDArray[np.uint8], NDArray[np.bool_]]]]
"""Frames of a row group, and of each camera the images (n, h, w, 3) and which of them are good."""


def _binaries(rows: NDArray[Any], good: NDArray[np.bool_], kind: pa.DataType) -> pa.Array:
    valid = None if good.all() else pa.array(good).buffers()[1]
    return pa.Array.from_buffers(kind, len(rows), [valid, pa.py_buffer(np.ascontiguousarray(rows))])


# ---- all of them -------------------------------------------------------------------------------------------


def needed_bytes(dataset: EpisodeDataset, features: StoredFeatures, files: Sequence[int]) -> int:
    """What the features of some data files take."""
    groups = dataset.row_groups
    mine = np.isin(groups.file, files)
    row = sum(features.row_bytes(camera) for camera in features.tokens) + 8 * len(FRAME)
    footers = int(mine.sum()) * (len(features.tokens) + len(FRAME)) * FOOTER_BYTES
    return int(groups.rows[mine].sum()) * row + footers


def check_space(uri: str, needed: int) -> None:
    """Refuse what does not fit on a local disk; an object store does not say what it has.

    Raises:
        ValueError: names both sizes.
    """
    filesystem, root = filesystem_of(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    place = next(path for path in (Path(root), *Path(root).parents) if path.exists())
    free = psutil.disk_usage(str(place)).free
    if needed > free:
        raise ValueError(
            f"the features need {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free; "
            "--dtype int8 takes a quarter of float32, half of bfloat16"
        )


def compute(
    dataset: EpisodeDataset,
    features: StoredFeatures,
    tower: Tower,
    files: Sequence[int],
    digests: Sequence[str],
    *,
    actors: int,
    cpus_per_actor: float,
    batch_size: int,
    on_progress: Callable[[Progress], None],
) -> None:
    """Compute the features of some data files; `info.json` is for the caller to write.

    Args:
        dataset: whole.
        features: where they go, and in which form.
        tower: the weights; with `use_gpu` every actor takes a GPU.
        files: numbers of data files.
        digests: `pipelines.dataset.file_digests` of all of them.
        actors: how many at once.
        cpus_per_actor: of the cluster.
        batch_size: images that go through the tower at once.
        on_progress: called when frames were done.
    """
    total = int(dataset.row_groups.rows[np.isin(dataset.row_groups.file, files)].sum())
    started, done = time.monotonic(), 0
    items = ray.data.from_items([{"file": number} for number in files], override_num_blocks=len(files))
    results = items.map_batches(
        FileEncoder,
        fn_constructor_args=(
            dataset,
            features,
            list(digests),
            tower,
            batch_size,
            max(int(cpus_per_actor), 1),
        ),
        batch_size=1,
        # one file at a time: those that wait belong to whoever is free first
        compute=ActorPoolStrategy(size=min(actors, len(files)), max_tasks_in_flight_per_actor=1),
        num_cpus=cpus_per_actor,
        num_gpus=1 if tower.use_gpu else 0,
    )
    results.context.target_max_block_size = 1  # each answer is told at once
    for row in results.iter_rows():
        done += int(row["frames"])
        on_progress(Progress(frames=done, total_frames=total, elapsed_s=time.monotonic() - started))
