"""The loss on held-out episodes: the same number for the same weights, on any number of workers.

Which frames are measured, how they are cut into micro-batches, and each frame's noise and times depend on the
data and `ValidationConfig` only. The micro-batches are dealt to the workers, every frame's mean error comes
back to all of them, and the sums over frames are exact. So a value changes only when the weights do.

Shape letters: b micro-batch, H chunk, A padded action width.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.dataset import EpisodeDataset, Int64
from pipelines.files import atomic_stream
from pipelines.inspection import dimension_names, spread
from pipelines.plan import (
    HELD_OUT,
    PREDICTION_NOISE,
    VALIDATION_NOISE,
    Rows,
    generator_seed,
    random_order,
)
from pipelines.predictions import Predictions, error_curves
from pipelines.samples import Batch, SampleReader, Source
from pipelines.tensors import ToTorch
from smolvla.data_utils import sample_noise, sample_time

if TYPE_CHECKING:
    from pipelines.engine import Engine

DRAWS = 4
"""Noises and times a frame; they share the computation of its observation."""
READ_AHEAD = 2
MAX_TASK_METRICS = 50
"""Tasks that get a curve of their own; validation.jsonl has all."""
PREDICTED_FRAMES = 256
"""On which the policy acts besides; fewer if fewer are measured."""
FRAME = ("episode_index", "frame_index")
COLUMNS = ("loss", "entries", "task", *FRAME, "bad_cameras")
"""What a worker finds out about a frame: mean error over its valid action entries, how many these are, ..."""
RESULTS = "validation.jsonl"
Show = Callable[[int, Sequence[Predictions]], None]


# ---- which episodes ---------------------------------------------------------------------------------------


def held_out_share(
    datasets: Sequence[EpisodeDataset], *, fraction: float, seed: int, flag: str
) -> list[Int64]:
    """For each dataset the rows of `episode_*` that training must not see: a share of it, at least one.

    Raises:
        ValueError: a dataset would have nothing left to train on.
    """
    found = []
    for number, dataset in enumerate(datasets):
        count = len(dataset.episode_index)
        wanted = max(1, round(fraction * count))
        if wanted >= count:
            raise ValueError(
                f"{flag} {fraction}: {wanted} of the {count} episodes of {dataset.uri} would be held out, "
                "and nothing left to train on"
            )
        found.append(np.sort(random_order(count, HELD_OUT, seed, number)[:wanted]))
    return found


def held_out_named(dataset: EpisodeDataset, episodes: Sequence[int], *, flag: str) -> Int64:
    """The rows of `episode_*` that hold the episodes of these numbers.

    Raises:
        ValueError: there is no such episode, or nothing would be left to train on.
    """
    places = np.flatnonzero(np.isin(dataset.episode_index, episodes))
    unknown = sorted(set(episodes) - set(dataset.episode_index[places].tolist()))
    if unknown:
        first, last = dataset.episode_index[[0, -1]].tolist()
        raise ValueError(f"{flag}: {dataset.uri} has no episode {unknown[0]}, it has {first} to {last}")
    if len(places) == len(dataset.episode_index):
        raise ValueError(f"{flag}: all episodes of {dataset.uri} are held out, and nothing left to train on")
    return places


def split(source: Source, places: Int64) -> tuple[Source, Source]:
    """(to train on, held out), given the rows of `episode_*` that are held out."""
    rest = np.setdiff1d(np.arange(len(source.dataset.episode_index)), places)
    return (
        replace(source, dataset=source.dataset.with_episodes(rest)),
        replace(source, dataset=source.dataset.with_episodes(places)),
    )


# ---- which frames -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured, and when; all but `every` fixes the numbers."""

    every: int
    """Steps between two measurements; the last step always has one."""
    max_frames: int
    """Frames to measure, evenly spaced over the held-out episodes; fewer if these have fewer."""
    seed: int
    """Of noise and times; that of the training has no part in them."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What each worker needs to measure."""

    reader: SampleReader
    """Of the held-out episodes; its plan is not used, its micro-batch is."""
    config: ValidationConfig

    @property
    def frames(self) -> Rows:
        """The rows to measure, evenly spaced."""
        sizes = [source.dataset.row_groups.rows for source in self.reader.sources]
        total = sum(int(rows.sum()) for rows in sizes)
        count = min(total, self.config.max_frames)
        place = np.arange(count) * total // count
        parts, first = [], 0
        for number, rows in enumerate(sizes):
            ends = np.cumsum(rows)
            mine = place[(place >= first) & (place < first + ends[-1])] - first
            unit = np.searchsorted(ends, mine, side="right")
            constant = np.full_like(mine, number), np.zeros_like(mine)
            parts.append((*constant, unit, mine - (ends - rows)[unit]))
            first += int(ends[-1])
        return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @property
    def tasks(self) -> list[str]:
        """Instructions of all sources, each once."""
        return list(dict.fromkeys(task for source in self.reader.sources for task in source.dataset.tasks))

    def batch(self, rows: Rows) -> tuple[Batch, Int64]:
        """Some rows as arrays, and the number of each one's task in `tasks`."""
        encoded = self.reader.encoded_rows(rows)
        number_of = {task: number for number, task in enumerate(self.tasks)}
        sources = self.reader.sources
        index = encoded["task_index"].to_numpy()
        task = [number_of[sources[s].dataset.tasks[i]] for s, i in zip(rows.source, index, strict=True)]
        return self.reader.decoded(encoded), np.array(task, dtype=np.int64)


# ---- measuring --------------------------------------------------------------------------------------------


class Validation:
    """This worker's part in measuring; every worker must call it at the same steps.

    Args:
        held_out: what is measured.
        last_step: of the run, which always is measured.
        folder: of the run, for validation.jsonl.
        show: takes, on rank 0, what the policy would do on a few of the frames.
        timeout_s: how long workers wait for each other's part.
    """

    def __init__(
        self, held_out: HeldOut, *, last_step: int, folder: Path, show: Show, timeout_s: float
    ) -> None:
        self._held_out, self._last_step, self._show = held_out, last_step, show
        self._frames = held_out.frames
        self._few = self._frames[np.array(spread(len(self._frames), at_most=PREDICTED_FRAMES))]
        self._rank, self._num_workers = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._path = folder / RESULTS

    def at(self, step: int, engine: "Engine") -> dict[str, float]:
        """The curves' values at a step, the same on every worker; empty at a step that is not measured.

        Rank 0 adds them to validation.jsonl.
        """
        if step % self._held_out.config.every and step != self._last_step:
            return {}
        started = time.perf_counter()
        found = Summary(self._held_out, self._frames, self._table(engine))
        values, record = found.metrics(), found.record()
        if engine.average is not None:
            with engine.average.in_place():
                averaged = Summary(self._held_out, self._frames, self._table(engine))
            values["val/loss_ema"] = record["loss_ema"] = averaged.whole.loss
        values |= self._shown(step, engine)
        if self._rank == 0:
            self._write(step, record)
        return values | {"val/seconds": time.perf_counter() - started}

    def _write(self, step: int, record: Mapping[str, Any]) -> None:
        """A step that is computed again after a crash has the same values: it stands there once."""
        text = self._path.read_text() if self._path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line that was cut off by a crash goes
        if all(json.loads(line)["step"] < step for line in lines[-1:]):
            lines.append(json.dumps({"step": step, **record}))
            with atomic_stream(pafs.LocalFileSystem(), str(self._path)) as stream:
                stream.write("".join(f"{line}\n" for line in lines).encode())

    def _table(self, engine: "Engine") -> Tensor:
        """(frames, COLUMNS)."""

        def measured(sources: Int64, batch: Batch, task: Int64) -> Tensor:
            loss = self._losses(engine, sources, batch)
            entries = (~batch["action_is_pad"]).sum(axis=1) * batch["action"].shape[2]
            columns = (loss, entries, task, *(batch[name] for name in COLUMNS[3:]))
            return torch.stack([torch.as_tensor(column).double() for column in columns], dim=1)

        return self._dealt(engine, self._frames, (len(COLUMNS),), measured)

    def _shown(self, step: int, engine: "Engine") -> dict[str, float]:
        """Let the policy act on a few of the frames; returns the curves of its error."""
        config = engine.policy.config
        h, d, seed = config.chunk_size, config.action_dim, self._held_out.config.seed

        def acted(sources: Int64, batch: Batch, _: Int64) -> Tensor:
            shape = 1, h, config.max_action_dim
            drawn = frame_generators(PREDICTION_NOISE, seed=seed, sources=sources, batch=batch)
            noise = [sample_noise(shape, generator) for generator in drawn]
            chunks = engine.predicted(ToTorch()(batch), noise=torch.cat(noise))
            columns = (chunks, batch["action"], ~batch["action_is_pad"], *(batch[name] for name in FRAME))
            return torch.cat([torch.as_tensor(c).double().reshape(len(c), -1) for c in columns], dim=1)

        table = self._dealt(engine, self._few, (2 * h * d + h + len(FRAME),), acted).numpy()
        predicted, true, valid, frames = np.split(table, np.cumsum([h * d, h * d, h]), axis=1)
        predicted, true = predicted.reshape(-1, h, d), true.reshape(-1, h, d)
        if self._rank == 0:
            self._show(step, self._in_units(predicted, true, valid > 0, frames.astype(np.int64)))
        return error_curves(predicted, true, valid > 0)

    def _in_units(
        self, predicted: np.ndarray, true: np.ndarray, valid: np.ndarray, frames: Int64
    ) -> list[Predictions]:
        """By dataset: each has its own normalisation, and its own names of what is moved."""
        found = []
        for number, source in enumerate(self._held_out.reader.sources):
            mine = self._few.source == number
            if not valid[mine].any():
                continue
            back = [source.normalizer.unnormalize("action", chunks[mine]) for chunks in (predicted, true)]
            found.append(
                Predictions(
                    dataset=np.array(source.title),
                    names=np.array(dimension_names(source.dataset.features["action"])),
                    episode=frames[mine, 0],
                    frame=frames[mine, 1],
                    predicted=back[0].astype(np.float32),
                    true=back[1].astype(np.float32),
                    valid=valid[mine],
                )
            )
        return found

    def _dealt(
        self,
        engine: "Engine",
        rows: Rows,
        shape: tuple[int, ...],
        compute: Callable[[Int64, Batch, Int64], Tensor],
    ) -> Tensor:
        """(rows, *shape) in float64: what `compute(sources, batch, tasks)` says of each row, on every worker.

        An entry is of one worker and 0 on the others: the sum is exact.
        """
        table = torch.zeros(len(rows), *shape, dtype=torch.float64)
        with engine.evaluating():
            for places, counted, (batch, task) in self._batches(rows, sharded=engine.sharded):
                table[places[:counted]] = compute(rows.source[places], batch, task)[:counted].double()
        dist.all_reduce(table, group=self._group)
        return table

    def _batches(self, rows: Rows, *, sharded: bool) -> Iterator[tuple[Int64, int, tuple[Batch, Int64]]]:
        """(places in `rows`, how many of them count, arrays) of this worker's micro-batches, read ahead.

        The last micro-batch is filled up, so that all have one shape. Workers that share the policy must all
        run it equally often: one that has none left runs one of another worker's, which does not count.
        """
        b, total = self._held_out.reader.config.micro_batch, len(rows)
        num_batches = -(-total // b)
        last = -(-num_batches // self._num_workers) * self._num_workers if sharded else num_batches
        numbers = range(self._rank, last, self._num_workers)
        with ThreadPoolExecutor(1) as pool:
            ahead = []
            for number in numbers:
                first = number % num_batches * b
                places = np.minimum(np.arange(first, first + b), total - 1)
                counted = min(b, total - first) if number < num_batches else 0
                ahead.append((places, counted, pool.submit(self._held_out.batch, rows[places])))
                if len(ahead) > READ_AHEAD:
                    yield _taken(ahead)
            while ahead:
                yield _taken(ahead)

    def _losses(self, engine: "Engine", sources: Int64, batch: Batch) -> Tensor:
        """(b,) mean error of each row over its draws; the draws depend on the seed and the frame only."""
        seed, config = self._held_out.config.seed, engine.policy.config
        noise, times = loss_draws(seed, sources, batch, action_dim=config.max_action_dim)
        tensors = ToTorch()(batch)
        return engine.row_losses(tensors, noise=noise, time=times, draws=DRAWS)


def loss_draws(seed: int, sources: Int64, batch: Batch, *, action_dim: int) -> tuple[Tensor, Tensor]:
    """Noise (b * DRAWS, H, A) and times (b * DRAWS,) that a batch's loss is measured with."""
    noise, times = [], []
    shape = (DRAWS, batch["action"].shape[1], action_dim)
    for generator in frame_generators(VALIDATION_NOISE, seed=seed, sources=sources, batch=batch):
        noise.append(sample_noise(shape, generator))
        times.append(sample_time(DRAWS, generator))
    return torch.cat(noise), torch.cat(times)


def frame_generators(purpose: int, *, seed: int, sources: Int64, batch: Batch) -> Iterator[torch.Generator]:
    """One for each row of a batch; its seed depends on the purpose, the seed and the frame only."""
    for frame in zip(sources, *(batch[name] for name in FRAME), strict=True):
        yield torch.Generator().manual_seed(generator_seed(purpose, seed, *map(int, frame)))


def _taken(ahead: list[tuple[Int64, int, Any]]) -> tuple[Int64, int, tuple[Batch, Int64]]:
    places, counted, batch = ahead.pop(0)
    return places, counted, batch.result()


# ---- results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Frames that belong together."""

    name: str
    frames: int
    loss: float


class Summary:
    """Means over frames, by task and by dataset; frames without a usable entry are left out and named."""

    def __init__(self, held_out: HeldOut, frames: Rows, table: Tensor) -> None:
        self._reader = held_out.reader
        columns = dict(zip(COLUMNS, table.numpy().T, strict=True))
        self._columns, self._source = columns, frames.source
        self.whole = self._part("all", np.ones(len(frames), dtype=bool))
        task = columns["task"]
        self.tasks = {
            i: self._part(held_out.tasks[i], task == i) for i in np.unique(task).astype(int).tolist()
        }
        names = [source.title for source in held_out.reader.sources]
        self.datasets = {i: self._part(name, frames.source == i) for i, name in enumerate(names)}

    def _part(self, name: str, chosen: Any) -> Part:
        loss, entries = self._columns["loss"][chosen], self._columns["entries"][chosen]
        used = entries > 0
        # fsum rounds once, so the order of frames is of no account
        total = math.fsum(entries[used])
        mean = math.fsum(loss[used] * entries[used]) / total if total else math.nan
        return Part(name, int(used.sum()), mean)

    def metrics(self) -> dict[str, float]:
        """Curves; a mixture has one for each dataset."""
        values = {"val/loss": self.whole.loss, "val/frames": float(self.whole.frames)}
        values["val/bad_rows"] = float((self._columns["bad_cameras"] > 0).sum())
        for number, part in list(self.tasks.items())[:MAX_TASK_METRICS]:
            values[f"val/loss/task_{number}_{slug(part.name)}"] = part.loss
        if len(self.datasets) > 1:
            values |= {f"val/loss/dataset_{part.name}": part.loss for part in self.datasets.values()}
        return values

    def record(self) -> dict[str, Any]:
        """What validation.jsonl says: every task's text, and the rows that could not be used."""
        return {
            "loss": self.whole.loss,
            "frames": self.whole.frames,
            "tasks": [asdict(part) for part in self.tasks.values()],
            "datasets": [asdict(part) for part in self.datasets.values()],
            "bad_rows": [self._named(row) for row in np.flatnonzero(self._columns["bad_cameras"])],
        }

    def _named(self, row: int) -> dict[str, Any]:
        source = self._reader.sources[self._source[row]]
        bad = int(self._columns["bad_cameras"][row])
        columns = [source.camera_columns.get(name, name) for name in self._reader.camera_names]
        return {
            "dataset": source.dataset.uri,
            "episode": int(self._columns["episode_index"][row]),
            "frame": int(self._columns["frame_index"][row]),
            "cameras": [column for i, column in enumerate(columns) if bad >> i & 1],
        }


def slug(text: str) -> str:
    """A text as part of a metric's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40].rstrip("_") or "unnamed"
