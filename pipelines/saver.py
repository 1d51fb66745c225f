"""The checkpoints of a running loop: begun by it, finished behind it, one at a time, their cost measured."""

import logging
import threading
import time
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch.distributed.checkpoint import CheckpointException

from pipelines import checkpoint
from pipelines.engine import Engine
from pipelines.progress import Progress, folder_name
from pipelines.retention import retain
from pipelines.run import Run
from pipelines.run_storage import START
from pipelines.watch import SAVING, CollectiveError, Watch

LOG = logging.getLogger(__name__)
ENDS_WITHIN_S = 3600.0  # a save, however large and far away; one that hangs must not hold the run for ever


class Saver:
    """One worker's side of the run's checkpoints; every worker has one and saves at the same steps."""

    def __init__(self, run: Run, watch: Watch) -> None:
        self._run, self._watch, self._rank = run, watch, dist.get_rank()
        # A group of its own: Ray's upload thread talks through it.
        self._group = dist.new_group(backend="gloo")
        self._idle = threading.Event()
        self._idle.set()
        self._measured: dict[str, float] = {}

    def save(self, engine: Engine, at: Progress, *, loss: float) -> None:
        """Start a checkpoint; Ray's upload thread completes it and the controller registers it.

        The loop stands still for a copy of the weights, and for the rest of the save before, if that is not
        finished yet: two at once would need twice the memory.

        Raises:
            CollectiveError: the save before has not ended within an hour.
        """
        started = time.perf_counter()
        self._watch.now(at.step, SAVING)
        if not self._idle.wait(ENDS_WITHIN_S):
            raise CollectiveError(
                f"rank {self._rank}: the save before that of step {at.step} has not ended for "
                f"{ENDS_WITHIN_S:.0f} s: {self._run.storage} does not answer"
            )
        self._idle.clear()
        run, name = self._run, folder_name(at.step)
        finish = checkpoint.save(
            run.storage,
            engine.policy,
            engine.optimizer,
            at=at,
            identity=run.identity,
            group=self._group,
            average=engine.average,
            base=run.storage.address(START),
        )

        def complete(reported: Checkpoint, _: str) -> Checkpoint:
            try:
                if self._rank == 0:
                    run.writer.flush()  # the points of these steps will not be computed again
                with self._watch.naming_the_missing():
                    finish()
                if self._rank == 0:
                    self._watch.note_saved(at.step)
                    _retain(run, newest=name)
                self._measured["checkpoint/seconds"] = time.perf_counter() - started
            except CollectiveError:
                raise
            except (Exception, CheckpointException) as error:  # torch's is no Exception: Ray would not see it
                LOG.exception("rank %d", self._rank)
                raise SaveError(run.storage.address(name), error) from None
            finally:
                self._idle.set()
            return reported

        self._report(name, at, loss, complete)
        self._measured["checkpoint/stall_s"] = time.perf_counter() - started

    def _report(self, name: str, at: Progress, loss: float, complete: Any) -> None:
        filesystem, root = self._run.storage.place()
        measured = {"train/loss": loss} | ({} if at.val_loss is None else {"val/loss": at.val_loss})
        ray.train.report(
            {"step": at.step, "samples_seen": at.samples_seen, **measured},
            checkpoint=Checkpoint(f"{root}/{name}", filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=complete,
        )

    def measured(self) -> dict[str, float]:
        """What saving cost since the last call."""
        taken, self._measured = self._measured, {}
        return taken


class SaveError(Exception):
    """A checkpoint could not be written.

    Ray Train would call again, on this worker alone, after some errors of object stores, which it knows by
    their text: the other workers would wait for it elsewhere, so their text is another one here.
    """

    def __init__(self, address: str, error: BaseException) -> None:
        if isinstance(error, CheckpointException):  # of all ranks that failed, the first
            error, _ = next(iter(error.failures.values()))
        reason = f"{type(error).__name__}: {error}".replace("AWS Error", "S3 error")
        super().__init__(f"{address} could not be saved: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Exception, self.args  # Ray sends it to the driver, which needs its text only


def _retain(run: Run, *, newest: str) -> None:
    try:
        best = retain(run.storage, run.keep, newest=newest)
    except OSError as error:  # this checkpoint stands; the next one tries again
        LOG.warning("older checkpoints than %s stay for now: %s", newest, error)
        return
    if best is not None:
        run.writer.tag(
            {
                "best_checkpoint": run.storage.address(best["checkpoint"]),
                "best_step": str(best["step"]),
                "best_val_loss": f"{best['val/loss']:.6g}",
            }
        )
