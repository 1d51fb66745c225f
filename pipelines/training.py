"""The Ray Train side of a run: data from the right position, workers, life after any death.

What a worker does is in `pipelines.train_worker`, the mathematics of a step in `pipelines.engine`.
"""

import contextlib
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.board import GivenUpError, start_board
from pipelines.run import Run
from pipelines.samples import SampleReader
from pipelines.stream import DealtToWorkers, StreamFromCheckpoint, execution_options

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
        GivenUpError: too many rows cannot be used, or too many steps were skipped; nothing is tried again.
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
    result = trainer.fit()
    if reason := ray.get(run.board.given_up.remote()):
        raise GivenUpError(reason)
    return result


def train_worker(run: Run) -> None:
    """What each Ray Train worker runs."""
    # Here and not above: the driver imports this module too, and has no use for model and engine.
    from pipelines.train_worker import train

    train(run)
