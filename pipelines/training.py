"""The Ray Train side of a run: data from the right position, training, checkpoints, life after any death.

The mathematics of a step is in `pipelines.engine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from pipelines import checkpoint
from pipelines.checkpoint import Progress
from pipelines.engine import Engine
from pipelines.feed import Feed
from pipelines.meter import Meter
from pipelines.retention import FolderStore, retain
from pipelines.run import Run
from pipelines.stream import SampleReader, micro_batches
from pipelines.validation import Validation


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What of the cluster a run takes, and how often it may lose it."""

    num_workers: int | tuple[int, int]
    """How many, or the fewest and the most: then the run takes what the cluster has, and goes on with fewer
    when a node is lost."""
    use_gpu: bool
    cpus_per_worker: float
    max_failures: int
    """Restarts of the workers before the run fails; -1: no limit."""


def fit(
    run: Run, reader: SampleReader, cluster: Cluster, *, callbacks: list[UserCallback] | None = None
) -> Result:
    """Train to the last step, from the newest good checkpoint in the run's folder.

    Raises:
        ray.train.TrainingFailedError: the workers failed more than `cluster.max_failures` times.
    """
    # Ray's list of the checkpoints that it registered. Nothing here reads it, and Ray refuses to start when a
    # folder that it names is gone.
    (run.folder / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
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
            checkpoint_config=CheckpointConfig(num_to_keep=None),  # the run deletes by itself
            callbacks=list(callbacks or []),
        ),
        torch_config=TorchConfig(
            timeout_s=600
        ),  # a dead peer should end the step in minutes, not in half an hour
        datasets={"train": _dataset_at_position(run, reader, cluster)},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    return trainer.fit()


def position(run_folder: Path) -> Progress:
    """Where a run would go on: at its newest good checkpoint, or at the start."""
    folder = checkpoint.latest(run_folder)
    return checkpoint.progress(folder) if folder else Progress(step=0, samples_seen=0)


def _dataset_at_position(run: Run, reader: SampleReader, cluster: Cluster) -> Callable[[], Dataset]:
    """Ray Train calls the function in its controller whenever it (re)starts the workers."""
    workers = cluster.num_workers
    most = workers if isinstance(workers, int) else workers[1]

    def build() -> Dataset:
        start = position(run.folder).samples_seen // run.train.micro_batch
        # Ray cuts the last blocks up so that all workers get the same number of rows, which nobody may need.
        stop = run.train.steps * run.train.micro_batches + 2 * most
        return micro_batches(reader, start=start, stop=stop)

    return build


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    run: Run = config["run"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    feed = Feed(run, rank=rank, num_workers=num_workers, device=device)
    if feed.samples_seen == run.train.steps * run.train.batch_size:
        return  # the workers died after the last checkpoint and before they could say so
    engine, at = _restored(run, feed.samples_seen, device)
    saver = dist.new_group(backend="gloo")
    meter = Meter(run, rank=rank, feed=feed, known_bad_rows=at.bad_rows)
    validation = Validation.of(run.validation, last_step=run.train.steps, folder=run.folder)
    for step in range(at.step + 1, run.train.steps + 1):
        count, micro_batches_of_step = feed.of_step(step)
        result = engine.step(step, micro_batches_of_step, count=count)
        saves = step % run.train.checkpoint_every == 0 or step == run.train.steps
        with meter.paused():
            found = validation.at(step, engine) if validation else {}
        # written with the step's own values, because a step has one point
        meter.step(step, result, log=saves or bool(found), measured=lambda found=found: found)
        if saves:
            done = Progress(
                step=step,
                samples_seen=step * run.train.batch_size,
                bad_rows=tuple(sorted(meter.bad_rows)),
                val_loss=found.get("val/loss"),
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
    # what is saved of a policy with adapters has them merged into its weights
    source = folder / checkpoint.PRETRAINED if step and not run.train.lora else run.start_folder
    policy = SmolVLAPolicy.from_pretrained(source)
    policy.processor = SmolVLAProcessor.from_pretrained(source, policy.config)  # before retention deletes it
    engine = Engine(policy.to(device).train(), run.train)
    at = Progress(step=0, samples_seen=0)
    if step:
        at = checkpoint.load(folder, policy, engine.optimizer, engine.average)
    assert (at.step, at.samples_seen) == (step, samples_seen), f"{folder} is at {at}, the stream at {step}"
    return engine, at


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
        run.folder / name,
        engine.policy,
        engine.optimizer,
        at=at,
        identity=run.identity,
        group=group,
        average=engine.average,
        base=str(run.start_folder),
    )
    rank = dist.get_rank()

    def complete(reported: Checkpoint, _: str) -> Checkpoint:
        if rank == 0:
            run.writer.flush()  # the points of these steps will not be computed again
        finish()
        if rank == 0:
            _retain(run, newest=name)
        return reported

    ray.train.report(
        {"step": at.step, "samples_seen": at.samples_seen, "train/loss": loss},
        checkpoint=Checkpoint.from_directory(str(run.folder / name)),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=complete,
    )


def _retain(run: Run, *, newest: str) -> None:
    best = retain(FolderStore(run.folder), run.keep, newest=newest)
    if best is not None:
        run.writer.tag(
            {
                "best_checkpoint": str(run.folder / best["checkpoint"]),
                "best_step": str(best["step"]),
                "best_val_loss": f"{best['val/loss']:.6g}",
            }
        )
