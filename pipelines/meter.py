"""What happened in the steps of an interval: read back from the device once, written, and judged."""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.board import GivenUpError
from pipelines.engine import StepResult
from pipelines.feed import Feed
from pipelines.metrics import PointGauges
from pipelines.progress import BadRow, Progress
from pipelines.run import Run
from pipelines.starvation import WAIT_SHARE, Flow, StarvationLog

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """How the stream served one worker over an interval."""

    wait_share: float
    """Part of the interval that it waited for its next micro-batch."""
    unpack_share: float
    """Part of the interval that it took to make tensors of what had arrived."""
    queued: float
    """Micro-batches that lie ready for it."""
    read_s: float
    """Seconds a row, as the next two."""
    decode_s: float
    tower_s: float


class Meter:
    """Collects what happened on the device and reads it back once an interval; rank 0 writes it.

    Args:
        run: what is trained.
        rank: of this worker.
        feed: its micro-batches.
        at: where it begins.
        decoding_cpus: tells how many CPUs of the cluster training leaves to the stream.
    """

    def __init__(
        self, run: Run, *, rank: int, feed: Feed, at: Progress, decoding_cpus: Callable[[], float]
    ) -> None:
        self._run, self._rank, self._feed, self._decoding_cpus = run, rank, feed, decoding_cpus
        self.last_loss = float("nan")
        self.bad_rows = set(at.bad_rows)
        """Those of all workers; the same on each."""
        self.skipped_in_a_row = at.skipped_in_a_row
        self._starvation = StarvationLog()
        self._gauges = PointGauges(run.storage.name, rank=rank)
        # A group of its own: checkpoints are written by another thread, through theirs.
        timeout = timedelta(seconds=run.exchange_timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._restart()
        self._before = torch.tensor(at.since_point).reshape(-1, 3)

    def _restart(self) -> None:
        self._before = torch.empty(0, 3)  # of the interval, what was computed before an interruption
        self._results: dict[int, StepResult] = {}
        self._judged = 0  # of these, by `_look_at_skips`
        feed = self._feed
        self._started, self._waited, self._unpacked = time.perf_counter(), feed.waited_s, feed.unpacked_s
        self._rows_taken, self._stage_s = feed.rows_taken, feed.stage_s.clone()
        self._feed.forget_rows()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training and must not count as such."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        log: bool,
        measured: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Note one step; every `log_every` steps, and when `log` says so, write the means since then.

        `measured` is asked for what else belongs to the point: a step has one point only.
        Checkpoints always write, so that a run that goes on from one draws the same points.

        Raises:
            GivenUpError: too many steps in a row were skipped, or more rows of the data cannot be used than
                the user allows.
        """
        self._results[step] = result
        if not log and step % self._run.train.log_every:
            return
        found = self._found()
        seconds = time.perf_counter() - self._started
        mine = self._served(seconds)
        slowest_rank, slowest = self._slowest(mine)
        kept = found[found[:, 2] == 0]
        values = {
            "train/lr": result.lr,
            **self._epochs(step * self._run.train.batch_size),
            "train/skipped_steps": float(len(found) - len(kept)),
            "data/samples_per_s": len(self._results) * self._run.train.batch_size / seconds,
            "data/wait_share": slowest.wait_share,
            "data/queued_micro_batches": slowest.queued,
            "data/read_s_per_row": slowest.read_s,
            "data/decode_s_per_row": slowest.decode_s,
        }
        if self._run.tower:
            values["data/tower_s_per_row"] = slowest.tower_s
        if len(kept):
            self.last_loss, norm = float(kept[:, 0].mean()), float(kept[:, 1].mean())
            values |= {"train/loss": self.last_loss, "train/grad_norm": norm}
        values |= self._exchange()
        values["data/bad_rows"] = float(len(self.bad_rows))
        own = {"data/wait_share": mine.wait_share, "data/queued_micro_batches": mine.queued}
        self._gauges.show(values | own)
        if self._rank == 0:
            self._run.writer.log(step, {**values, **measured()})
            self._warn_of_waiting(slowest_rank, slowest, rows_per_s=values["data/samples_per_s"])
        self._look_at_skips(found)
        if len(self.bad_rows) > self._run.max_bad_rows:
            raise GivenUpError(too_many(self._run, self.bad_rows))
        self._restart()

    def _served(self, seconds: float) -> Served:
        """This worker, over an interval of so many seconds."""
        feed = self._feed
        per_row = (feed.stage_s - self._stage_s) / (feed.rows_taken - self._rows_taken)
        waited, unpacked = feed.waited_s - self._waited, feed.unpacked_s - self._unpacked
        return Served(waited / seconds, unpacked / seconds, feed.queued_micro_batches, *per_row.tolist())

    def _slowest(self, mine: Served) -> tuple[int, Served]:
        """The rank that waited longest for data, and how it was served.

        The others wait for it in the step, where their own numbers do not show it.
        """
        everyone = torch.zeros(dist.get_world_size(), len(mine), dtype=torch.float64)
        everyone[self._rank] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(everyone, group=self._group)
        rank = int(everyone[:, 0].argmax())
        return rank, Served(*everyone[rank].tolist())

    def _warn_of_waiting(self, rank: int, served: Served, *, rows_per_s: float) -> None:
        """Say which stage of the stream is the bottleneck, if that rank waited for data."""
        if served.wait_share <= WAIT_SHARE:
            return
        flow = Flow(
            wait_share=served.wait_share,
            rows_per_s=rows_per_s,
            read_s=served.read_s,
            decode_s=served.decode_s,
            tower_s=served.tower_s,
            tower_actors=self._run.tower.actors if self._run.tower else 0,
            unpack_share=served.unpack_share,
            cpus=self._decoding_cpus(),
        )
        if line := self._starvation.line(flow):
            log.warning("rank %d %s", rank, line)

    def _found(self) -> Tensor:
        """(steps of the interval, 3): loss, gradient norm, skipped."""
        rows = [torch.stack([r.loss, r.grad_norm, r.skipped.float()]) for r in self._results.values()]
        return torch.cat([self._before, torch.stack(rows).cpu()]) if rows else self._before

    def since_point(self) -> tuple[tuple[float, float, float], ...]:
        """What a checkpoint within an interval must keep, so that the next point is the mean of all of it."""
        if self._results:  # else the point that was just written has told all workers
            self._exchange()
        found = self._found()
        self._look_at_skips(found)
        return tuple((loss, norm, skipped) for loss, norm, skipped in found.tolist())

    def _look_at_skips(self, found: Tensor) -> None:
        """Name the rows of skipped steps in <run>/skipped/, and give up after too many in a row."""
        news = list(zip(self._results, found[len(self._before) :].tolist(), strict=True))[self._judged :]
        self._judged = len(self._results)
        for step, (loss, norm, skipped) in news:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if not skipped:
                continue
            line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": self._feed.rows[step]}
            folder = self._run.folder / "skipped"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self._rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if self.skipped_in_a_row >= self._run.train.max_skipped_in_a_row:
                raise GivenUpError(
                    f"{self.skipped_in_a_row} steps in a row were skipped, the last is step {step} with "
                    f"loss {loss} and gradient norm {norm}; {folder} names their rows"
                )

    def _epochs(self, samples_seen: int) -> dict[str, float]:
        """How often the data was seen; a mixture has epochs of each dataset."""
        datasets = self._run.datasets
        values = {"train/epoch": samples_seen / sum(dataset.num_frames for dataset in datasets)}
        if len(datasets) > 1:
            for dataset in datasets:
                values[f"train/epoch/{dataset.name}"] = samples_seen * dataset.share / dataset.num_frames
        return values

    def _exchange(self) -> dict[str, float]:
        """Tell all workers of new bad rows; returns the datasets' shares in the interval, of a mixture."""
        new = self._feed.bad_rows - self.bad_rows
        counts = torch.zeros(1 + len(self._run.datasets), dtype=torch.int64)
        counts[0] = len(new)
        for ids in itertools.chain.from_iterable(self._feed.rows.values()):
            counts[1:] += torch.bincount(torch.tensor(ids["source"]), minlength=len(self._run.datasets))
        dist.all_reduce(counts, group=self._group)
        if counts[0]:
            self._exchange_bad_rows(new)
        if len(self._run.datasets) == 1:
            return {}
        shares = (counts[1:] / counts[1:].sum()).tolist()
        names = [dataset.name for dataset in self._run.datasets]
        return {f"data/share/{name}": share for name, share in zip(names, shares, strict=True)}

    def _exchange_bad_rows(self, new: set[BadRow]) -> None:
        everyone: list[set[BadRow]] = [set()] * dist.get_world_size()
        dist.all_gather_object(everyone, new, group=self._group)
        self.bad_rows |= set().union(*everyone)
        if self._rank == 0:
            names = [named(self._run, row) for row in sorted(self.bad_rows)]
            self._run.storage.write_json("bad_rows.json", names)


def named(run: Run, row: BadRow) -> dict[str, Any]:
    """A bad row as a person finds it."""
    dataset = run.datasets[row.source]
    cameras = [name for i, name in enumerate(dataset.cameras) if row.bad_cameras >> i & 1]
    return {
        "dataset": dataset.uri,
        "episode": row.episode_index,
        "frame": row.frame_index,
        "cameras": cameras,
    }


def too_many(run: Run, rows: Collection[BadRow]) -> str:
    """That more rows of the data cannot be used than `max_bad_rows`."""
    first = named(run, min(rows))
    where = f"{first['dataset']}: episode {first['episode']} frame {first['frame']}: {first['cameras']}"
    return (
        f"{len(rows)} rows have images that cannot be used, max_bad_rows allows {run.max_bad_rows}; "
        f"the first: {where}; all are in {run.storage.address('bad_rows.json')}"
    )
