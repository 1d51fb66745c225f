"""What a Ray Train worker does: restore, train step by step, validate, save; stop when it is asked to.

The mathematics of a step is in `pipelines.engine`.
"""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from pipelines import checkpoint
from pipelines.board import GivenUpError, Wish
from pipelines.engine import Engine
from pipelines.feed import Feed
from pipelines.meter import Meter
from pipelines.progress import Progress, folder_name
from pipelines.run import Run
from pipelines.run_storage import PRETRAINED, START
from pipelines.saver import Saver
from pipelines.validation import Validation
from pipelines.watch import IN_STEP, WAITING, Agreement, Watch
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy
from smolvla.processing import SmolVLAProcessor


def train(run: Run) -> None:
    """From the position that the stream was built for to the end of the run; every worker calls it."""
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
    except GivenUpError as error:  # at the same step on all; an error would have Ray start them again
        watch.give_up(str(error))
    finally:
        if rank == 0:
            run.writer.flush()  # if the run ends here, its last points say why
    watch.close()


def _train(run: Run, engine: Engine, feed: Feed, at: Progress, watch: Watch) -> None:
    """From where the policy stands to the last step, or to where the driver wants to stop."""
    saver = Saver(run, watch)
    decoding_cpus = functools.partial(_decoding_cpus, run, feed)
    meter = Meter(run, rank=dist.get_rank(), feed=feed, at=at, decoding_cpus=decoding_cpus)
    validation = run.validation and Validation(
        run.validation,
        last_step=run.train.steps,
        folder=run.folder,
        show=run.writer.predictions,
        timeout_s=run.exchange_timeout_s,
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
        skipped_in_a_row=meter.skipped_in_a_row,
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
    step, rest = divmod(samples_seen, run.train.batch_size)
    assert rest == 0, f"the stream starts at sample {samples_seen}, inside a step of {run.train.batch_size}"
    start = run.storage.fetched(START)
    folder = run.storage.fetched(folder_name(step)) if step else start
    # what is saved of a policy with adapters has them merged into its weights
    source = folder / PRETRAINED if step and not run.train.lora else start
    # Retention will delete the checkpoint: what is read later must come from start/, as the VLM's files do.
    policy = SmolVLAPolicy.from_pretrained(source, SmolVLAConfig.from_pretrained(start))
    policy.processor = SmolVLAProcessor.from_pretrained(source, policy.config)
    engine = Engine(policy.to(device).train(), run.train, words=run.words)
    at = Progress(step=0, samples_seen=0)
    if step:
        at = checkpoint.load(folder, policy, engine.optimizer, engine.average)
    assert (at.step, at.samples_seen) == (step, samples_seen), f"{folder} is at {at}, the stream at {step}"
    return engine, at
