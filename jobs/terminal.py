"""How an ingestion job speaks with a terminal: progress and one JSON report line out, an exit code.

With a tracking server, the ingestion is an MLflow run, too (jobs/ingestion_run.py).

Exit codes: 0 the dataset stands (or stood already), 1 too many episodes were refused or a task failed, 2 bad
input.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError
from ray.experimental import tqdm_ray

from jobs.command_line import fail, refusals, start_ray
from jobs.environment import git_commit
from pipelines.ingestion import UNSEALED_PATH, Progress, TooManyRefusedError, ingest
from pipelines.sealing import REFUSED_PATH
from pipelines.sources import Source
from pipelines.writer import WriterOptions

LISTED_REFUSALS = 20
"""Refusals shown on stderr when there are too many; the report counts them all."""
LINE_EVERY_S = 5.0
"""Between progress lines in a log."""


@dataclass(frozen=True, kw_only=True)
class IngestTracking:
    """Where MLflow is, if it is to know of the ingestion."""

    uri: str = ""
    """Of the server, which has to answer. Empty: what MLFLOW_TRACKING_URI says, if it answers."""
    experiment: str = "smolvla"


ENVIRONMENT_ONLY = IngestTracking()


def run_ingestion(
    source: Source,
    *,
    output: str,
    image_format: str,
    jpeg_quality: int,
    resize: str | None,
    max_refused: float,
    tracking: IngestTracking = ENVIRONMENT_ONLY,
) -> int:
    """Ingest, telling a terminal how it goes; return the exit code."""
    try:
        if image_format == "as_is":
            raise ValueError("image_format 'as_is' is for datasets whose images are copied")
        options = WriterOptions(image_format=image_format, jpeg_quality=jpeg_quality, resize=box_of(resize))
    except ValueError as error:
        fail(error)
    return run_with_options(
        source, output=output, options=options, max_refused=max_refused, append=False, tracking=tracking
    )


def run_with_options(
    source: Source,
    *,
    output: str,
    options: WriterOptions,
    max_refused: float,
    append: bool,
    tracking: IngestTracking,
) -> int:
    """As `run_ingestion`, for a job that knows the writer's options."""
    start_s = time.monotonic()
    with refusals():
        ingest_there = _ingestion(tracking)
    progress = _ProgressBar() if sys.stderr.isatty() else _ProgressLines()
    try:
        report = ingest_there(
            source,
            output,
            options=options,
            max_refused=max_refused,
            code_version=git_commit(),
            start_ray=start_ray,
            on_progress=progress,
            append=append,
        )
    except RayTaskError:  # is also a ValueError when the task raised one, but no word about the input
        raise
    except ValueError as error:
        fail(error)
    except TooManyRefusedError as error:
        _print_refusals(error.report)
        print(f"all refusals and warnings: {output}/{UNSEALED_PATH}", file=sys.stderr)
        print(f"{error}; nothing was sealed, {output} keeps the good episodes for a re-run", file=sys.stderr)
        _print_report(error.report, output=output, start_s=start_s)
        return 1
    finally:
        progress.close()
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    _print_noted(report, output=output)
    if report["already_complete"]:
        print(f"{output} is already complete; nothing to do", flush=True)
    _print_report(report, output=output, start_s=start_s)
    return 0


def _ingestion(tracking: IngestTracking) -> Callable[..., dict[str, Any]]:
    """`ingest`, or the same with an MLflow run."""
    server = tracking_server(tracking, what="the ingestion")
    if server is None:
        return ingest
    from jobs import ingestion_run  # imports MLflow, which takes seconds

    return functools.partial(ingestion_run.ingest_tracked, server=server, experiment=tracking.experiment)


def tracking_server(tracking: IngestTracking, *, what: str) -> str | None:
    """The server that is to know of `what`; None: there is none, or the environment's does not answer.

    Raises:
        ValueError: the server that was given does not answer.
    """
    server = (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")).rstrip("/")
    if not server:
        return None
    from jobs.tracking import check_reachable

    given_by = "tracking.uri" if tracking.uri else "MLFLOW_TRACKING_URI"
    try:
        check_reachable(server, given_by=given_by)
    except ValueError as error:
        if tracking.uri:
            raise
        print(f"warning: {error}; {what} is not tracked", file=sys.stderr, flush=True)
        return None
    return server


def _print_refusals(report: dict[str, Any]) -> None:
    for refusal in report["refusals"][:LISTED_REFUSALS]:
        where = "".join(f", {key} {refusal[key]}" for key in ("camera", "frame") if refusal[key] is not None)
        print(
            f"refused {refusal['episode']}{where}: {refusal['reason']}: {refusal['detail']}", file=sys.stderr
        )


def _print_noted(report: dict[str, Any], *, output: str) -> None:
    """Say in two lines what was refused and what looks odd."""
    for kind, found in (("refused", report["refused"]), ("warnings", report.get("warned", {}))):
        if found:
            listed = ", ".join(f"{count} {reason}" for reason, count in found.items())
            print(f"{kind}: {listed}; listed in {output}/{REFUSED_PATH}", file=sys.stderr)


def _print_report(report: dict[str, Any], *, output: str, start_s: float) -> None:
    line = {name: report[name] for name in ("episodes", "frames", "refused_episodes", "refused")}
    line |= {
        "warned": report.get("warned", {}),
        "fingerprint": report.get("fingerprint"),
        "already_complete": report.get("already_complete", False),
        "seconds": round(time.monotonic() - start_s, 1),
        "path": output,
    }
    print(json.dumps(line), flush=True)


class _ProgressLines:
    """For logs: the first part, then one line in `LINE_EVERY_S`, and the last."""

    def __init__(self) -> None:
        self.printed_s = -LINE_EVERY_S

    def __call__(self, progress: Progress) -> None:
        last = progress.episodes == progress.total_episodes
        if not last and progress.elapsed_s - self.printed_s < LINE_EVERY_S:
            return
        self.printed_s = progress.elapsed_s
        print(f"episodes {progress.episodes}/{progress.total_episodes}{_rate(progress)}", flush=True)

    def close(self) -> None:
        pass


class _ProgressBar:
    """For a terminal: Ray's own bar, which keeps still while workers print."""

    def __init__(self) -> None:
        self.bar: tqdm_ray.tqdm | None = None
        self.shown = 0

    def __call__(self, progress: Progress) -> None:
        if self.bar is None:  # Ray runs by now
            self.bar = tqdm_ray.tqdm(total=progress.total_episodes, unit="episodes", flush_interval_s=0)
        self.bar.set_description(f"episodes{_rate(progress)}")
        self.bar.update(progress.episodes - self.shown)
        self.shown = progress.episodes

    def close(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


def _rate(progress: Progress) -> str:
    refused = f", {progress.refused} refused" if progress.refused else ""
    rate = progress.frames / max(progress.elapsed_s, 1e-3)
    return f"{refused}, {rate:.0f} frames/s, {progress.remaining_s:.0f} s left"


def box_of(resize: str | None) -> tuple[int, int] | None:
    """Read "512" or "640x480" as a box (width, height) in pixels."""
    if resize is None:
        return None
    sides = resize.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(
            f"resize {resize!r} is neither a side such as 512 nor a WIDTHxHEIGHT such as 640x480"
        )
    return int(sides[0]), int(sides[-1])
