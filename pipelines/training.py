"""The Ray Train side of a run: data from the right position, training, checkpoints, life after any death.

The mathematics of a step is in `pipelines.engine`.
"""

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.data import Dataset, ExecutionOptions
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    DataConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from pipelines import checkpoint
from pipelines.checkpoint import BadRow, Progress
from pipelines.engine import Engine, StepResult, TrainConfig
from pipelines.stream import ROW_IDS, SampleReader, ToTorch, micro_batches


class MetricWriter(Protocol):
    """Where rank 0 sends metrics; it must return at once, whatever state the tracking server is in."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the values of one step."""
        ...

    def flush(self) -> None:
        """Return when everything logged so far would survive this process."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a worker needs; small enough to be sent to each."""

    folder: Path
    """The run's folder; every node must see it."""
    train: TrainConfig
    identity: Mapping[str, Any]
    """What the run is, written into each checkpoint."""
    num_frames: int
    """Rows of an epoch."""
    dataset_uris: tuple[str, ...]
    """By number of the source; with the cameras, to name a row."""
    camera_columns: tuple[str, ...]
    max_bad_rows: int
    """Different rows with unusable images that the run bears, masked out of the loss."""
    writer: MetricWriter

    @property
    def start_folder(self) -> Path:
        """The policy as it was before the first step, with the statistics that are exported with it."""
        return self.folder / "start"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What of the cluster a run takes, and how often it may lose it."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: float
    max_failures: int
    """Restarts of the workers before the run fails; -1: no limit."""
    keep_checkpoints: int
    """The newest checkpoints that stay."""


def fit(
    run: Run, reader: SampleReader, cluster: Cluster, *, callbacks: list[UserCallback] | None = None
) -> Result:
    """Train to the last step, from the newest good checkpoint in the run's folder.

    Raises:
        ray.train.TrainingFailedError: the workers failed more than `cluster.max_failures` times.
    """
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"run": run},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=run.folder.name,
            storage_path=str(run.folder.parent),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=cluster.keep_checkpoints),
            callbacks=list(callbacks or []),
        ),
        torch_config=TorchConfig(
            timeout_s=600
        ),  # a dead peer should end the step in minutes, not in half an hour
        datasets={"train": _dataset_at_position(run, reader)},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    return trainer.fit()


def position(run_folder: Path) -> Progress:
    """Where a run would go on: at its newest good checkpoint, or at the start."""
    folder = checkpoint.latest(run_folder)
    return checkpoint.progress(folder) if folder else Progress(step=0, samples_seen=0)


def _dataset_at_position(run: Run, reader: SampleReader) -> Callable[[], Dataset]:
    """Ray Train calls the function in its controller whenever it (re)starts the workers."""

    def build() -> Dataset:
        b = run.train.micro_batch
        start = position(run.folder).samples_seen // b
        return micro_batches(reader, start=start, stop=run.train.steps * run.train.batch_size // b)

    return build


class Stream:
    """This worker's micro-batches in order, the time spent waiting for them, and what was wrong with them."""

    def __init__(self, run: Run, *, rank: int, num_workers: int, device: torch.device) -> None:
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        batches = shard.iter_torch_batches(
            batch_size=None,
            prefetch_batches=2,
            collate_fn=ToTorch(),
            device="cpu",
            pin_memory=device.type == "cuda",
        )
        self._batches: Iterator[dict[str, Tensor]] = iter(batches)
        # The first batch says where the controller built the dataset to start: its word counts, for all
        # workers.
        self._first = next(self._batches, None)
        self._stride, self.device = num_workers, device
        self.waited_s = 0.0
        self.next_index = 0 if self._first is None else int(self._first["micro_batch"][0])
        self.samples_seen = (self.next_index - rank) * run.train.micro_batch
        self.empty = self._first is None
        self.rows: dict[int, list[dict[str, list[int]]]] = {}
        """Row ids of the steps since `forget_rows`, for whoever must name them."""
        self.bad_rows: set[BadRow] = set()
        """Those met so far by this worker."""
        self._rows_path = run.folder / "rows" / f"rank_{rank}.jsonl" if run.train.record_rows else None
        if self._rows_path is not None:
            self._rows_path.parent.mkdir(exist_ok=True)

    def of_step(self, step: int, count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This worker's `count` micro-batches of a step: (m, columns on the device)."""
        return (self._take(step) for _ in range(count))

    def _take(self, step: int) -> tuple[int, dict[str, Tensor]]:
        started = time.perf_counter()
        batch = self._first or next(self._batches, None)
        self.waited_s += time.perf_counter() - started
        index, self._first, self.next_index = self.next_index, None, self.next_index + self._stride
        assert batch is not None, f"the stream ended before step {step}"
        numbers = batch["micro_batch"]
        assert bool((numbers == index).all()), f"expected micro-batch {index}, got {numbers.tolist()}"
        self._note(step, {name: batch[name].tolist() for name in ROW_IDS})
        tensors = {n: t.to(self.device, non_blocking=True) for n, t in batch.items() if n not in ROW_IDS}
        return index, tensors

    def _note(self, step: int, ids: dict[str, list[int]]) -> None:
        self.rows.setdefault(step, []).append(ids)
        rows = zip(*(ids[name] for name in BadRow._fields), strict=True)
        self.bad_rows |= {row for row in itertools.starmap(BadRow, rows) if row.bad_cameras}
        if self._rows_path is not None:
            with self._rows_path.open("a") as stream:
                stream.write(json.dumps({"step": step} | ids) + "\n")

    def forget_rows(self) -> None:
        """Drop the ids of past steps."""
        self.rows = {}


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    run: Run = config["run"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    stream = Stream(run, rank=rank, num_workers=num_workers, device=device)
    if stream.empty:  # the workers died after the last checkpoint and before they could say so
        return
    engine, at = _restored(run, stream.samples_seen, device)
    saver = dist.new_group(backend="gloo")
    meter = Meter(run, rank=rank, stream=stream, known_bad_rows=at.bad_rows)
    for step in range(at.step + 1, run.train.steps + 1):
        result = engine.step(step, stream.of_step(step, engine.accumulation))
        saves = step % run.train.checkpoint_every == 0 or step == run.train.steps
        meter.step(step, result, log=saves)
        if saves:
            done = Progress(
                step=step, samples_seen=step * run.train.batch_size, bad_rows=tuple(sorted(meter.bad_rows))
            )
            _save(run, engine, done, group=saver, loss=meter.last_loss)


def _restored(run: Run, samples_seen: int, device: torch.device) -> tuple[Engine, Progress]:
    """Policy and optimiser at the position that the stream was built for."""
    # Here and not above: Ray's controller and data actors import this module too, and have no use for the
    # model.
    from smolvla.modeling import SmolVLAPolicy
    from smolvla.processing import SmolVLAProcessor

    step, rest = divmod(samples_seen, run.train.batch_size)
    assert rest == 0, f"the stream starts at sample {samples_seen}, inside a step of {run.train.batch_size}"
    folder = run.folder / checkpoint.folder_name(step)
    source = folder / checkpoint.PRETRAINED if step else run.start_folder
    policy = SmolVLAPolicy.from_pretrained(source)
    policy.processor = SmolVLAProcessor.from_pretrained(source, policy.config)  # before retention deletes it
    engine = Engine(policy.to(device).train(), run.train)
    at = Progress(step=0, samples_seen=0)
    if step:
        at = checkpoint.load(folder, policy, engine.optimizer)
    assert (at.step, at.samples_seen) == (step, samples_seen), f"{folder} is at {at}, the stream at {step}"
    return engine, at


class Meter:
    """Collects what happened on the device and reads it back once an interval; rank 0 writes it."""

    def __init__(self, run: Run, *, rank: int, stream: Stream, known_bad_rows: Iterable[BadRow]) -> None:
        self._run, self._rank, self._stream = run, rank, stream
        self.last_loss = float("nan")
        self.bad_rows = set(known_bad_rows)
        """Those of all workers; the same on each."""
        self._skipped_in_a_row = 0
        # A group of its own: checkpoints are written by another thread, through theirs.
        self._group = dist.new_group(backend="gloo")
        self._restart()

    def _restart(self) -> None:
        self._results: dict[int, StepResult] = {}
        self._started, self._waited = time.perf_counter(), self._stream.waited_s
        self._stream.forget_rows()

    def step(self, step: int, result: StepResult, *, log: bool) -> None:
        """Note one step; every `log_every` steps, and when `log` says so, write the means since then.

        Checkpoints always write, so that a run that goes on from one draws the same points.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
            BadRowsError: more rows of the data cannot be used than the user allows.
        """
        self._results[step] = result
        if not log and step % self._run.train.log_every:
            return
        results = self._results.values()
        found = torch.stack([torch.stack([r.loss, r.grad_norm, r.skipped.float()]) for r in results]).cpu()
        seconds = time.perf_counter() - self._started
        kept = found[found[:, 2] == 0]
        values = {
            "train/lr": result.lr,
            "train/epoch": step * self._run.train.batch_size / self._run.num_frames,
            "train/skipped_steps": float(len(found) - len(kept)),
            "data/wait_share": (self._stream.waited_s - self._waited) / seconds,
            "data/samples_per_s": len(found) * self._run.train.batch_size / seconds,
        }
        if len(kept):
            self.last_loss, norm = float(kept[:, 0].mean()), float(kept[:, 1].mean())
            values |= {"train/loss": self.last_loss, "train/grad_norm": norm}
        self._exchange_bad_rows()
        values["data/bad_rows"] = float(len(self.bad_rows))
        if self._rank == 0:
            self._run.writer.log(step, values)
        self._look_at_skips(found)
        if len(self.bad_rows) > self._run.max_bad_rows:
            raise BadRowsError(self._run, self.bad_rows)
        self._restart()

    def _look_at_skips(self, found: Tensor) -> None:
        """Name the rows of skipped steps in <run>/skipped/, and give up after too many in a row."""
        for step, (loss, norm, skipped) in zip(self._results, found.tolist(), strict=True):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if not skipped:
                continue
            line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": self._stream.rows[step]}
            folder = self._run.folder / "skipped"
            folder.mkdir(exist_ok=True)
            with (folder / f"rank_{self._rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if self._skipped_in_a_row >= self._run.train.max_skipped_in_a_row:
                raise FloatingPointError(
                    f"{self._skipped_in_a_row} steps in a row were skipped, the last is step {step} with "
                    f"loss {loss} and gradient norm {norm}; {folder} names their rows"
                )

    def _exchange_bad_rows(self) -> None:
        new = self._stream.bad_rows - self.bad_rows
        count = torch.tensor(len(new))
        dist.all_reduce(count, group=self._group)
        if not count:
            return
        everyone: list[set[BadRow]] = [set()] * dist.get_world_size()
        dist.all_gather_object(everyone, new, group=self._group)
        self.bad_rows |= set().union(*everyone)
        if self._rank == 0:
            names = [named(self._run, row) for row in sorted(self.bad_rows)]
            (self._run.folder / "bad_rows.json").write_text(json.dumps(names, indent=1))


def named(run: Run, row: BadRow) -> dict[str, Any]:
    """A bad row as a person finds it."""
    cameras = [name for i, name in enumerate(run.camera_columns) if row.bad_cameras >> i & 1]
    return {
        "dataset": run.dataset_uris[row.source],
        "episode": row.episode_index,
        "frame": row.frame_index,
        "cameras": cameras,
    }


class BadRowsError(Exception):
    """More rows of the data cannot be used than `max_bad_rows`."""

    def __init__(self, run: Run, rows: Collection[BadRow]) -> None:
        first = named(run, min(rows))
        where = f"{first['dataset']}: episode {first['episode']} frame {first['frame']}: {first['cameras']}"
        super().__init__(
            f"{len(rows)} rows have images that cannot be used, max_bad_rows allows {run.max_bad_rows}; "
            f"the first: {where}; all are in {run.folder / 'bad_rows.json'}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Exception, self.args  # Ray sends it to the driver, which needs its text only


def _save(
    run: Run,
    engine: Engine,
    at: Progress,
    *,
    group: dist.ProcessGroup,
    loss: float,
) -> None:
    """Start a checkpoint; Ray's upload thread completes it and the controller registers it."""
    name = checkpoint.folder_name(at.step)
    finish = checkpoint.save(
        run.folder / name, engine.policy, engine.optimizer, at=at, identity=run.identity, group=group
    )
    rank = dist.get_rank()

    def complete(reported: Checkpoint, _: str) -> Checkpoint:
        if rank == 0:
            run.writer.flush()  # the points of these steps will not be computed again
        finish()
        return reported

    ray.train.report(
        {"step": at.step, "samples_seen": at.samples_seen, "train/loss": loss},
        checkpoint=Checkpoint.from_directory(str(run.folder / name)),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=complete,
    )
