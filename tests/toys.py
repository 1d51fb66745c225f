"""Toys that tests train on and watch with; importable in Ray workers, of which many have no torch."""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.train import UserCallback, get_context

from pipelines.predictions import Predictions
from pipelines.samples import Batch, SampleReader
from pipelines.sources import Episode, Listing, Unit

LENGTHS = (17, 40, 33, 16, 1, 25, 48, 31, 12, 29, 37, 31)  # 320 frames: every boundary of a 16-row group
TASKS = ("push the red block", "open it")
NAMES = {"observation.state": ["x", "y", "gripper"], "action": ["dx", "dy", "grip", "stop"]}


@dataclass(frozen=True)
class ToySource:
    """Episodes of smooth motion whose pixels and actions tell episode and frame."""

    lengths: tuple[int, ...] = LENGTHS
    cameras: tuple[str, ...] = ("top", "wrist")
    size: tuple[int, int] = (40, 56)
    """(height, width) of the images."""
    fps: int = 10
    scale: float = 1.0
    """Of state and action, so that statistics differ between toys."""
    tasks: tuple[str, ...] = TASKS
    number: int = 1
    """Of the toy, so that one can be appended to another."""

    def listing(self) -> Listing:
        features = {
            f"observation.images.{name}": {
                "dtype": "image",
                "shape": [*self.size, 3],
                "names": ["height", "width", "channels"],
            }
            for name in self.cameras
        }
        features |= {
            name: {"dtype": "float32", "shape": [len(names)], "names": names} for name, names in NAMES.items()
        }
        units = tuple(
            Unit(name=f"episode {i}", num_episodes=1, num_frames=n, detail=i)
            for i, n in enumerate(self.lengths)
        )
        return Listing(
            fps=self.fps,
            robot_type="toy",
            features=features,
            tasks=self.tasks,
            units=units,
            identity={"toy": self.number},
            location="here",
        )

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode]:
        for unit in units:
            number, length = unit.detail, unit.num_frames
            t = np.arange(length)[:, None] / 10 + number
            columns = {
                "observation.state": (self.scale * np.sin(t * [1, 2, 3])).astype(np.float32),
                "action": (self.scale * np.cos(t * [1, 2, 3, 4])).astype(np.float32),
            }
            cameras = {
                f"observation.images.{name}": frames(number, length, tint, self.size)
                for tint, name in enumerate(self.cameras)
            }
            tasks = [self.tasks[number % len(self.tasks)]] * length
            yield Episode(name=str(number), tasks=tasks, columns=columns, cameras=cameras)


def frames(episode: int, length: int, tint: int, size: tuple[int, int] = (40, 56)) -> Iterator[np.ndarray]:
    """Smooth pictures that differ between episodes, frames and cameras."""
    height, width = size
    for frame in range(length):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[..., 0] = np.linspace(0, 200, width)[None] + frame % 50
        image[..., 1] = np.linspace(0, 200, height)[:, None] + 4 * episode
        image[..., 2] = 120 * tint + frame
        yield image


def ingested(source: ToySource, folder: Path, *, append: bool = False, **options: Any) -> Path:
    """The toy as an episode dataset, or appended to one; needs Ray."""
    from pipelines.ingestion import ingest
    from pipelines.writer import WriterOptions

    ingest(
        source,
        str(folder),
        options=WriterOptions(**{"image_format": "jpeg", "jpeg_quality": 95, **options}),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
        append=append,
    )
    return folder


@dataclass(frozen=True)
class FileWriter:
    """A `MetricWriter` that appends lines to a file."""

    path: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time(), **metrics}) + "\n")

    def tag(self, tags: Mapping[str, str]) -> None:
        with self.path.with_name("tags.jsonl").open("a") as stream:
            stream.write(json.dumps(tags) + "\n")

    def predictions(self, step: int, found: Sequence[Predictions]) -> None:
        for number, one in enumerate(found):
            self.path.with_name(f"predictions_{step}_{number}.npz").write_bytes(one.to_bytes())

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class PacedWriter(FileWriter):
    """Holds every step up, so that a run has a middle."""

    pace_s: float = 0.2

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        time.sleep(self.pace_s)


@dataclass(frozen=True)
class HeldUpReader(SampleReader):
    """The first process that decodes a late micro-batch writes its pid down and waits for its death."""

    pid_file: Path = Path()
    late: int = 100

    def decoded(self, batch: pa.Table) -> Batch:
        if max(batch["micro_batch"].to_pylist()) >= self.late and not self.pid_file.exists():
            partial = self.pid_file.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(self.pid_file)
            time.sleep(600)
        return super().decoded(batch)


@dataclass(frozen=True)
class SlowReader(SampleReader):
    """In the worker of rank 1 decoding a micro-batch takes long."""

    pause_s: ClassVar[float] = 0.5

    def with_images(self, batch: Batch, encoded: pa.Table) -> Batch:
        if get_context().get_world_rank() == 1:
            time.sleep(self.pause_s)
        return super().with_images(batch, encoded)


@dataclass(frozen=True)
class ExceptionWriter(UserCallback):
    """Writes down what workers failed of, from Ray's controller."""

    path: Path

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        with self.path.open("a") as stream:
            stream.writelines(f"{error}\n" for error in worker_exceptions.values())


def with_cut_image(source: Path, target: Path, *, episode: int, frame: int, camera: str) -> None:
    """Copy a dataset; of one image only the first half stays, as a broken disk or transfer leaves it."""

    def cut(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for row in rows:
            if (row["episode_index"], row["frame_index"]) == (episode, frame):
                row[camera]["bytes"] = row[camera]["bytes"][: len(row[camera]["bytes"]) // 2]
        return pa.Table.from_pylist(rows, schema=table.schema)

    copied(source, target, change=cut)


def copied(source: Path, target: Path, *, change: Callable[[pa.Table], pa.Table]) -> None:
    """Copy a dataset with every row group changed."""
    shutil.copytree(source, target)
    for path in (target / "data").rglob("*.parquet"):
        file = pq.ParquetFile(path)
        groups = [change(file.read_row_group(number)) for number in range(file.num_row_groups)]
        with pq.ParquetWriter(path, groups[0].schema, compression="NONE") as writer:
            for table in groups:
                writer.write_table(table)


def golden_rows(micro_batch: int, *, shift: float = 0.01) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """LeRobot's golden policy, and its batch's rows as micro-batch m, shifted by m so that they differ."""
    from safetensors.torch import load_file

    from smolvla import SmolVLAPolicy

    folder = Path(__file__).parent / "golden/default"
    tensors = load_file(folder / "example.safetensors")
    batch = {name.removeprefix("batch/"): t for name, t in tensors.items() if name.startswith("batch/")}
    size = len(batch["action"])

    def rows(m: int) -> dict[str, Any]:
        taken = [(m * micro_batch + i) % size for i in range(micro_batch)]
        columns = {name: column[taken].clone() for name, column in batch.items()}
        columns["action"] += m * shift
        return columns

    return SmolVLAPolicy.from_pretrained(folder), rows


def spawned(worker: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Run worker(rank, meeting, *arguments) in processes of their own.

    They meet with `init_method=f"{meeting}_<which group>"`, in files: a port that is free now may be taken by
    the time it is used.
    """
    import torch.multiprocessing as mp

    # Its children find imported what each would take seconds to import.
    multiprocessing.set_forkserver_preload(
        ["pipelines.checkpoint", "pipelines.validation", "smolvla.modeling"]
    )
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/group"
        mp.start_processes(worker, (meeting, *arguments), nprocs=processes, start_method="forkserver")
