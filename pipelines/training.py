"""The Ray Train side of a run: data from the right position, training, checkpoints, life after any death.

The mathematics of a step is in `pipelines.engine`.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import checkpoint
from pipelines.board import Wish, start_board
from pipelines.engine import Engine
from pipelines.feed import Feed
from pipelines.meter import Meter
from pipelines.progress import Progress, folder_name
from pipelines.run import Run
from pipelines.run_storage import START
from pipelines.samples import SampleReader
from pipelines.saver import Saver
from pipelines.stream import DealtToWorkers, StreamFromCheckpoint, execution_options
from pipelines.validation import Validation
from pipelines.watch import IN_STEP, WAITING, Agreement, Watch

NAMED_WITHIN_S = 5.0  # that workers have to say for whom they waited in vain


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
    run: Run,
    reader: SampleReader,
    cluster: Cluster,
    *,
    callbacks: list[UserCallback] | None = None,
) -> Result:
    """Train to the last step, from the newest good checkpoint in the run's folder.

    Raises:
        ray.train.TrainingFailedError: the workers failed more than `cluster.max_failures` times.
    """
    # Ray Train reads these from the driver's environment. A process that is stopped answers no poll: the
    # others name it when their wait is over, and soon after that Ray kills it. A placement group that was
    # asked for just before a node was found dead is asked for again after the second.
    health_timeout_s = run.collective_timeout_s + NAMED_WITHIN_S
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(health_timeout_s)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    readers = [reader] if run.validation is None else [reader, run.validation.reader]
    words = np.unique(np.concatenate([one.words for one in readers]))
    run = replace(run, board=run.board or start_board(), words=words)
    filesystem, root = run.storage.place()
    # Ray's list of the checkpoints that it registered. Nothing here reads it, and Ray refuses to start when a
    # folder that it names is gone.
    with contextlib.suppress(FileNotFoundError):
        run.storage.delete_file("checkpoint_manager_snapshot.json")
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})
    workers = cluster.num_workers
    decoding = "workers" if run.decoder else "tasks"
    most_workers = workers if isinstance(workers, int) else workers[1]
    stream = StreamFromCheckpoint(
        reader=reader,
        storage=run.storage,
        board=run.board,
        num_micro_batches=run.train.steps * run.train.micro_batches,
        most_workers=most_workers,
        decoding=decoding,
        tower=run.tower,
    )
    trainer = TorchTrainer(
        functools.partial(train_worker, run),  # only the workers unpack it: the controller needs no model
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=Path(root).name,
            storage_path=str(Path(root).parent),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),  # the run deletes by itself
            callbacks=list(callbacks or []),
        ),
        torch_config=TorchConfig(timeout_s=int(run.collective_timeout_s)),
        datasets={"train": stream},
        dataset_config=DealtToWorkers(execution_options(decoding, num_workers=most_workers)),
    )
    return trainer.fit()


def train_worker(run: Run) -> None:
    """What each Ray Train worker runs."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    feed = Feed(run, ray.train.get_dataset_shard("train"), rank=rank, num_workers=num_workers, device=device)
    if feed.samples_seen == run.train.steps * run.train.batch_size:
        return  # the workers died after the last checkpoint and before they could say so
    engine, at = _restored(run, feed.samples_seen, device)
    watch = Watch(run.board, rank=rank, timeout_s=run.collective_timeout_s)
    gc.freeze()  # what is there now stays, and no collection needs to look at it again
    try:
        with watch.naming_the_missing():
            _train(run, engine, feed, at, watch)
    finally:
        if rank == 0:
            run.writer.flush()  # if the run ends here, its last points say why
    watch.close()


def _train(run: Run, engine: Engine, feed: Feed, at: Progress, watch: Watch) -> None:
    """From where the policy stands to the last step, or to where the driver wants to stop."""
    saver = Saver(run, watch)
    decoding_cpus = functools.partial(_decoding_cpus, run, feed)
    meter = Meter(run, rank=dist.get_rank(), feed=feed, at=at, decoding_cpus=decoding_cpus)
    validation = Validation.of(
        run.validation, last_step=run.train.steps, folder=run.folder, show=run.writer.predictions
    )
    agreement = Agreement(timeout_s=run.collective_timeout_s)
    for step in range(at.step + 1, run.train.steps + 1):
        count, batches = feed.of_step(step)
        result = engine.step(step, _told(watch, step, batches), count=count)
        wish = agreement.exchanged(watch.wish())
        planned = step % run.train.checkpoint_every == 0 or step == run.train.steps
        with meter.paused():
            found = validation.at(step, engine) if validation else {}
        # written with the step's own values, because a step has one point
        meter.step(
            step,
            result,
            log=planned or bool(found),
            measured=lambda found=found: {**found, **saver.measured()},
        )
        if planned or wish:
            done = _progress(run, step, meter, val_loss=found.get("val/loss"))
            saver.save(engine, done, loss=meter.last_loss)
        if wish == Wish.SAVE_AND_STOP:
            break
    agreement.settled()


def _decoding_cpus(run: Run, feed: Feed) -> float:
    """CPUs that decode: the workers' threads, or what neither workers nor tower take of the cluster."""
    if feed.decoding_threads:
        return float(feed.decoding_threads * dist.get_world_size())
    mine = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0)
    taken = mine * dist.get_world_size() + (run.tower.actors * run.tower.cpus if run.tower else 0.0)
    return max(ray.cluster_resources().get("CPU", 0.0) - taken, 1.0)


def _progress(run: Run, step: int, meter: Meter, *, val_loss: float | None) -> Progress:
    since_point = meter.since_point()
    return Progress(
        step=step,
        samples_seen=step * run.train.batch_size,
        bad_rows=tuple(sorted(meter.bad_rows)),
        val_loss=val_loss,
        since_point=since_point,
    )


def _told(watch: Watch, step: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The micro-batches of a step, the watch informed."""
    watch.now(step, WAITING)
    for batch in batches:
        watch.now(step, IN_STEP)
        yield batch
        watch.now(step, WAITING)
    watch.now(step, IN_STEP)


def _restored(run: Run, samples_seen: int, device: torch.device) -> tuple[Engine, Progress]:
    """Policy and optimiser at the position that the stream was built for."""
    # Here and not above: the driver imports this module too, and has no use for the model.
    from smolvla.configuration import SmolVLAConfig
    from smolvla.modeling import SmolVLAPolicy
    from smolvla.processing import SmolVLAProcessor

    step, rest = divmod(samples_seen, run.train.batch_size)
    assert rest == 0, f"the stream starts at sample {samples_seen}, inside a step of {run.train.batch_size}"
    start = run.storage.fetched(START)
    folder = run.storage.fetched(folder_name(step)) if step else start
    # what is saved of a policy with adapters has them merged into its weights
    source = folder / checkpoint.PRETRAINED if step and not run.train.lora else start
    # Retention will delete the checkpoint: what is read later must come from start/, as the VLM's files do.
    policy = SmolVLAPolicy.from_pretrained(source, SmolVLAConfig.from_pretrained(start))
    policy.processor = SmolVLAProcessor.from_pretrained(source, policy.config)
    engine = Engine(policy.to(device).train(), run.train, words=run.words)
    at = Progress(step=0, samples_seen=0)
    if step:
        at = checkpoint.load(folder, policy, engine.optimizer, engine.average)
    assert (at.step, at.samples_seen) == (step, samples_seen), f"{folder} is at {at}, the stream at {step}"
    return engine, at
