"""How an ingestion job speaks with a terminal: progress and one JSON report line out, an exit code.

Exit codes: 0 the dataset stands (or stood already), 1 too many episodes were refused or a task failed, 2 bad
input.
"""

import json
import sys
import time
from typing import Any

from ray.exceptions import RayTaskError

from jobs.command_line import fail, git_commit, start_ray
from pipelines.ingestion import Progress, TooManyRefusedError, ingest
from pipelines.sources import Source
from pipelines.writer import WriterOptions

LISTED_REFUSALS = 20
"""Refusals shown on stderr when there are too many; the report counts them all."""


def run_ingestion(
    source: Source,
    *,
    output: str,
    image_format: str,
    jpeg_quality: int,
    resize: str | None,
    max_refused: float,
) -> int:
    """Ingest, telling a terminal how it goes; return the exit code."""
    start_s = time.monotonic()
    report_progress = _ProgressLines()
    try:
        report = ingest(
            source,
            output,
            options=WriterOptions(
                image_format=image_format, jpeg_quality=jpeg_quality, resize=box_of(resize)
            ),
            max_refused=max_refused,
            code_version=git_commit(),
            start_ray=start_ray,
            on_progress=report_progress,
        )
    except RayTaskError:  # is also a ValueError when the task raised one, but no word about the input
        raise
    except ValueError as error:
        fail(error)
    except TooManyRefusedError as error:
        for refusal in error.report["refusals"][:LISTED_REFUSALS]:
            where = "".join(
                f", {key} {refusal[key]}" for key in ("camera", "frame") if refusal[key] is not None
            )
            print(
                f"refused {refusal['episode']}{where}: {refusal['reason']}: {refusal['detail']}",
                file=sys.stderr,
            )
        print(f"{error}; nothing was sealed, {output} keeps the good episodes for a re-run", file=sys.stderr)
        _print_report(error.report, output=output, start_s=start_s)
        return 1
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if report["already_complete"]:
        print(f"{output} is already complete; nothing to do", flush=True)
    _print_report(report, output=output, start_s=start_s)
    return 0


def _print_report(report: dict[str, Any], *, output: str, start_s: float) -> None:
    line = {name: report[name] for name in ("episodes", "frames", "refused_episodes", "refused")}
    line |= {
        "fingerprint": report.get("fingerprint"),
        "already_complete": report.get("already_complete", False),
        "seconds": round(time.monotonic() - start_s, 1),
        "path": output,
    }
    print(json.dumps(line), flush=True)


class _ProgressLines:
    """Prints at most one line a second, and the last one."""

    def __init__(self) -> None:
        self.printed_s = -1.0

    def __call__(self, progress: Progress) -> None:
        last = progress.episodes == progress.total_episodes
        if not last and progress.elapsed_s - self.printed_s < 1:
            return
        self.printed_s = progress.elapsed_s
        refused = f", {progress.refused} refused" if progress.refused else ""
        print(
            f"episodes {progress.episodes}/{progress.total_episodes}{refused}, "
            f"{progress.frames / max(progress.elapsed_s, 1e-3):.0f} frames/s, "
            f"{progress.remaining_s:.0f} s left",
            flush=True,
        )


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
