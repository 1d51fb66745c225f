"""The Ray Train side of a run: data from the right position, training, checkpoints, life after any death.

The mathematics does not know how many workers there are. The global batch is fixed in samples; b * W * k =
batch_size gives each worker k micro-batches a step; noise and time of micro-batch m come from a generator
seeded by (seed, m); gradients are sums over valid action entries, divided once by the global count of them.

Shape letters: b micro-batch, W workers, k accumulation, m number of a micro-batch.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

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
from torch.nn.parallel import DistributedDataParallel

from pipelines import checkpoint
from pipelines.checkpoint import Progress
from pipelines.plan import noise_seed
from pipelines.stream import ROW_IDS, SampleReader, ToTorch, micro_batches
from smolvla.data_utils import sample_noise, sample_time
from smolvla.optimization import adamw, clip_gradients, lr_factor

if TYPE_CHECKING:
    from smolvla.modeling import SmolVLAPolicy


class MetricWriter(Protocol):
    """Where rank 0 sends metrics; it must return at once, whatever state the tracking server is in."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the values of one step."""
        ...

    def flush(self) -> None:
        """Return when everything logged so far would survive this process."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run computes; together with the data, the policy and the seed it fixes every number."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples a step, over all workers."""
    micro_batch: int
    seed: int
    decay_steps: int | None
    """Steps of the cosine decay; None: those of the run. The other presets are in the policy's config."""
    precision: Literal["float32", "bfloat16"]
    """Of the computation; master weights are always float32."""
    log_every: int
    """Steps between two points of a curve; a point is the mean over them."""
    checkpoint_every: int
    """Steps."""
    record_rows: bool
    """Whether every worker writes the ids of the rows it trained on to <run>/rows/."""
    repeated_noise: int = 1
    """Draws of noise and time for each sample; they share the computation of its observation."""
    compile: bool = False
    """Whether the layers are compiled, which changes no number beyond rounding."""


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
    """This worker's micro-batches in order, and the time spent waiting for them."""

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
        self._rows_path = run.folder / "rows" / f"rank_{rank}.jsonl" if run.train.record_rows else None
        if self._rows_path is not None:
            self._rows_path.parent.mkdir(exist_ok=True)

    def take(self, step: int) -> tuple[int, dict[str, Tensor]]:
        """(m, the micro-batch on the device)."""
        started = time.perf_counter()
        batch = self._first or next(self._batches, None)
        self.waited_s += time.perf_counter() - started
        index, self._first, self.next_index = self.next_index, None, self.next_index + self._stride
        assert batch is not None, f"the stream ended before step {step}"
        numbers = batch["micro_batch"]
        assert bool((numbers == index).all()), f"expected micro-batch {index}, got {numbers.tolist()}"
        if self._rows_path is not None:
            self._record(step, batch)
        tensors = {n: t.to(self.device, non_blocking=True) for n, t in batch.items() if n not in ROW_IDS}
        return index, tensors

    def _record(self, step: int, batch: Mapping[str, Tensor]) -> None:
        assert self._rows_path is not None
        line = {"step": step} | {name: batch[name].tolist() for name in ROW_IDS}
        with self._rows_path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    run: Run = config["run"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    stream = Stream(run, rank=rank, num_workers=num_workers, device=device)
    if stream.empty:  # the workers died after the last checkpoint and before they could say so
        return
    policy, optimizer, at = _restored(run, stream.samples_seen, device)
    if run.train.compile:
        policy.compile_layers()
    model = DistributedDataParallel(policy) if num_workers > 1 else policy
    saver = dist.new_group(backend="gloo")
    meter = Meter(run, rank=rank, stream=stream)
    accumulation = run.train.batch_size // (run.train.micro_batch * num_workers)
    for step in range(at.step + 1, run.train.steps + 1):
        totals = _accumulate(model, policy, stream, run.train, step=step, accumulation=accumulation)
        grad_norm, lr = _update(policy, optimizer, totals, run.train, step=step, num_workers=num_workers)
        saves = step % run.train.checkpoint_every == 0 or step == run.train.steps
        meter.step(step, loss=totals[0] / totals[1], grad_norm=grad_norm, lr=lr, log=saves)
        if saves:
            done = Progress(step=step, samples_seen=step * run.train.batch_size)
            _save(run, policy, optimizer, done, group=saver, loss=meter.last_loss)


def _restored(
    run: Run, samples_seen: int, device: torch.device
) -> tuple["SmolVLAPolicy", torch.optim.AdamW, Progress]:
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
    policy.to(device).train()
    optimizer = adamw(policy, policy.config)
    at = checkpoint.load(folder, policy, optimizer) if step else Progress(step=0, samples_seen=0)
    assert at == Progress(step=step, samples_seen=samples_seen), (
        f"{folder} is at {at}, the stream at step {step}"
    )
    return policy, optimizer, at


def _accumulate(
    model: torch.nn.Module,
    policy: "SmolVLAPolicy",
    stream: Stream,
    train: TrainConfig,
    *,
    step: int,
    accumulation: int,
) -> Tensor:
    """Gradients of one step's summed loss; returns (loss sum, valid entries) of all workers, on device."""
    totals = torch.zeros(2, device=stream.device)
    for i in range(accumulation):
        index, batch = stream.take(step)
        inputs = policy.prepare_inputs(batch)
        generator = torch.Generator().manual_seed(
            noise_seed(train.seed, index)
        )  # on the CPU: the same on any device
        samples, *chunk = inputs["actions"].shape
        draws = (samples * train.repeated_noise, *chunk)
        noise = sample_noise(draws, generator).to(stream.device, non_blocking=True)
        times = sample_time(len(noise), generator).to(stream.device, non_blocking=True)
        last = i == accumulation - 1
        ddp = isinstance(model, DistributedDataParallel)
        with model.no_sync() if ddp and not last else contextlib.nullcontext():
            with torch.autocast(stream.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
                out = model(**inputs, noise=noise, time=times, repeated_noise=train.repeated_noise)
            out["loss_sum"].backward()
        totals += torch.stack([out["loss_sum"].detach(), out["num_valid"].to(totals.dtype)])
    dist.all_reduce(totals)
    return totals


def _update(
    policy: "SmolVLAPolicy",
    optimizer: torch.optim.AdamW,
    totals: Tensor,
    train: TrainConfig,
    *,
    step: int,
    num_workers: int,
) -> tuple[Tensor, float]:
    """One optimiser step; returns the gradient's norm before clipping, on device, and the learning rate."""
    config = policy.config
    parameters = [p for p in policy.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    # DDP averaged over the workers what should have been summed over them and divided by the global count.
    torch._foreach_mul_(gradients, num_workers / totals[1])  # pyright: ignore[reportCallIssue] - a tensor is taken
    grad_norm = clip_gradients(parameters, config.optimizer_grad_clip_norm)
    lr = config.optimizer_lr * lr_factor(
        step - 1,
        warmup_steps=config.scheduler_warmup_steps,
        decay_steps=train.decay_steps,
        total_steps=train.steps,
        peak_lr=config.optimizer_lr,
        decay_lr=config.scheduler_decay_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, lr


class Meter:
    """Collects what happened on the device and reads it back once an interval; rank 0 writes it."""

    def __init__(self, run: Run, *, rank: int, stream: Stream) -> None:
        self._run, self._rank, self._stream = run, rank, stream
        self.last_loss = float("nan")
        self._restart()

    def _restart(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._started, self._waited = time.perf_counter(), self._stream.waited_s

    def step(self, step: int, *, loss: Tensor, grad_norm: Tensor, lr: float, log: bool) -> None:
        """Note one step; every `log_every` steps, and when `log` says so, write the means since then.

        Checkpoints always write, so that a run that goes on from one draws the same points.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, which no later step would repair.
        """
        self._losses.append(loss)
        self._norms.append(grad_norm)
        if not log and step % self._run.train.log_every:
            return
        losses, norms = torch.stack(self._losses), torch.stack(self._norms)
        self.last_loss, norm = float(losses.mean()), float(norms.mean())
        seconds = time.perf_counter() - self._started
        if not (torch.isfinite(losses).all() and torch.isfinite(norms).all()):
            raise FloatingPointError(
                f"loss {losses.tolist()} or gradient norm {norms.tolist()} at step {step}"
            )
        if self._rank == 0:
            samples = step * self._run.train.batch_size
            values = {
                "train/loss": self.last_loss,
                "train/grad_norm": norm,
                "train/lr": lr,
                "train/epoch": samples / self._run.num_frames,
                "data/wait_share": (self._stream.waited_s - self._waited) / seconds,
                "data/samples_per_s": len(self._losses) * self._run.train.batch_size / seconds,
            }
            self._run.writer.log(step, values)
        self._restart()


def _save(
    run: Run,
    policy: "SmolVLAPolicy",
    optimizer: torch.optim.AdamW,
    at: Progress,
    *,
    group: dist.ProcessGroup,
    loss: float,
) -> None:
    """Start a checkpoint; Ray's upload thread completes it and the controller registers it."""
    name = checkpoint.folder_name(at.step)
    finish = checkpoint.save(run.folder / name, policy, optimizer, at=at, identity=run.identity, group=group)
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
