"""The Ray part of ingestion: units of a source become staged parts, parts become shards, then it is sealed.

Workers only stage and assemble (see `pipelines.writer`); the driver lists, counts and writes `meta/`. A task
is bound to one CPU and can be run again at any time, so Ray's retries after a lost worker or node are safe.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import ray

from pipelines import output, sealing, writer
from pipelines.sources import Listing, Source, Unit

UNSEALED_PATH = f"{writer.STAGING}/refused.parquet"
"""Where refusals and warnings are listed when there are too many of them for a dataset."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the reading is."""

    episodes: int
    """Looked at so far, refused ones and those of an earlier run included."""
    total_episodes: int
    refused: int
    """In this run."""
    frames: int
    """Accepted in this run."""
    elapsed_s: float
    remaining_s: float


class TooManyRefusedError(Exception):
    """More episodes were refused than the user allows; `report` counts and lists them."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def ingest(
    source: Source,
    uri: str,
    *,
    options: writer.WriterOptions,
    max_refused: float,
    code_version: str | None,
    start_ray: Callable[[], None],
    on_progress: Callable[[Progress], None],
    on_begin: Callable[[Listing], None] | None = None,
    append: bool = False,
) -> dict[str, Any]:
    """Turn a source into an episode dataset at `uri` and return what its `meta/ingest.json` says.

    A complete output of the same source and options is returned as it is, an unfinished one is continued.

    Args:
        source: See `pipelines.sources`.
        uri: A local folder or an object store's URI.
        options: What the stored bytes depend on.
        max_refused: Share of refused episodes, 0..1, above which nothing is sealed.
        code_version: Git commit for the record.
        start_ray: Called once the input was found good, before the first task.
        on_progress: Called with every finished part.
        on_begin: Called behind `start_ray`, with what the source lists; the output is held, its plan written.
        append: Add the episodes to the complete dataset at `uri`; a source it has already is not added again.

    Raises:
        ValueError: the source or the output cannot be used; raised before `start_ray`.
        TooManyRefusedError: after all episodes were looked at.
    """
    if not 0 <= max_refused <= 1:
        raise ValueError(f"max_refused {max_refused} is not within 0..1")
    listing = source.listing()
    uri = output.absolute(uri)
    with output.exclusive(uri):
        output.settle(uri)
        target = output.opened(uri, listing, options, append=append)
        if target.report is not None:
            return target.report | {"already_complete": True}
        output.begin(target, listing)
        start_ray()
        if on_begin is not None:
            on_begin(listing)
        outcomes = _stage(source, listing, target.layout, on_progress=on_progress)
        _check_share(uri, listing, outcomes, max_refused=max_refused)
        records = [record for outcome in outcomes for record in outcome["episodes"]]
        tasks = writer.all_tasks((*target.base.tasks, *listing.tasks), records)
        shards = writer.shards_of(records, tasks, options, first=target.base.numbering)
        _assemble(target.layout, shards)
        report = sealing.seal(
            target, listing, outcomes=outcomes, shards=shards, tasks=tasks, code_version=code_version
        )
        return report | {"already_complete": False}


def _check_share(
    uri: str, listing: Listing, outcomes: Sequence[writer.Outcome], *, max_refused: float
) -> None:
    """Raise if too little is left; the list of what was refused is written first."""
    report = sealing.counts(outcomes)
    refused, accepted = report["refused_episodes"], report["episodes"]
    total = refused + accepted
    if refused <= max_refused * total and accepted:
        return
    noted = list(sealing.noted_rows(listing, outcomes))
    sealing.write_noted(uri, noted, path=UNSEALED_PATH)
    if not accepted:
        raise TooManyRefusedError(f"none of {total} episodes is left", report)
    raise TooManyRefusedError(
        f"{refused} of {total} episodes are refused, max_refused allows {max_refused:g} of them", report
    )


def _stage(
    source: Source, listing: Listing, layout: writer.Layout, *, on_progress: Callable[[Progress], None]
) -> list[writer.Outcome]:
    """Stage every part that no earlier run completed; return all outcomes in the order of the parts."""
    parts = writer.parts_of(listing.units)
    outcomes = writer.staged_parts(layout.uri)
    meter = _Meter(parts, outcomes, on_progress)
    source_ref, layout_ref = ray.put(source), ray.put(layout)
    task = _stage_part.options(runtime_env={"env_vars": dict(listing.worker_env)})
    todo = [part for part in range(len(parts)) if part not in outcomes]
    for part, outcome in _in_parallel(
        lambda part: task.remote(source_ref, parts[part], layout_ref, part), todo
    ):
        outcomes[part] = outcome
        meter.count(part, outcome)
    return [outcomes[part] for part in range(len(parts))]


def _assemble(layout: writer.Layout, shards: Sequence[writer.Shard]) -> None:
    layout_ref = ray.put(layout)
    todo = [shard for shard in shards if not writer.shard_is_complete(layout, shard)]
    for _ in _in_parallel(lambda shard: _assemble_shard.remote(layout_ref, shard), todo):
        pass


@ray.remote(num_cpus=1, max_retries=3)
def _stage_part(source: Source, units: Sequence[Unit], layout: writer.Layout, part: int) -> dict[str, Any]:
    cv2.setNumThreads(1)  # a task has one CPU
    return writer.stage_part(source.episodes(units), layout, part=part)


@ray.remote(num_cpus=1, max_retries=3)
def _assemble_shard(layout: writer.Layout, shard: writer.Shard) -> None:
    writer.assemble_shard(layout, shard)


def _in_parallel(submit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Run a task per item, two for every CPU of the cluster in flight; yield (item, result) as they come."""
    limit = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    waiting = iter(items)
    running: dict[Any, Any] = {submit(item): item for item in itertools.islice(waiting, limit)}
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(ready)
        running |= {submit(following): following for following in itertools.islice(waiting, 1)}
        yield item, ray.get(ready)


class _Meter:
    """Counts what was looked at and tells how long the rest will take."""

    def __init__(
        self, parts: Sequence[Sequence[Unit]], kept: Iterable[int], on_progress: Callable[[Progress], None]
    ) -> None:
        self.parts = parts
        self.on_progress = on_progress
        self.left = set(range(len(parts))) - set(kept)
        self.work = self._frames_left()
        self.start_s = time.monotonic()
        self.frames = self.refused = 0

    def count(self, part: int, outcome: dict[str, Any]) -> None:
        self.left.remove(part)
        self.frames += sum(record["length"] for record in outcome["episodes"])
        self.refused += len({refusal["episode"] for refusal in outcome["refusals"]})
        elapsed_s = time.monotonic() - self.start_s
        left = self._frames_left()
        total = sum(unit.num_episodes for units in self.parts for unit in units)
        episodes_left = sum(unit.num_episodes for part in self.left for unit in self.parts[part])
        self.on_progress(
            Progress(
                episodes=total - episodes_left,
                total_episodes=total,
                refused=self.refused,
                frames=self.frames,
                elapsed_s=elapsed_s,
                remaining_s=elapsed_s * left / max(self.work - left, 1),
            )
        )

    def _frames_left(self) -> int:
        return sum(unit.num_frames for part in self.left for unit in self.parts[part])
