"""Turn a LeRobot dataset (v2.0, v2.1, v3.0; video or images) into an episode dataset.

python jobs/ingest_lerobot.py --source <folder> --output <folder>

Runs the same under `ray job submit --working-dir . --`. Running the command again continues what was
interrupted.
"""

import sys
from dataclasses import dataclass

from jobs.command_line import parsed
from jobs.terminal import run_ingestion
from pipelines.sources.lerobot import LeRobotSource


@dataclass(frozen=True, kw_only=True)
class IngestLeRobot:
    """The flags of jobs/ingest_lerobot.py."""

    source: str
    """Folder or URI of the LeRobot dataset."""
    output: str
    """Folder or URI of the episode dataset."""
    resize: str | None = None
    """Shrink images once into this box: a side in pixels such as 512, or WIDTHxHEIGHT; never enlarged."""
    image_format: str = "jpeg"
    """jpeg, or png to lose nothing."""
    jpeg_quality: int = 95
    """1..100."""
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that may be refused before the job fails."""


def main(job: IngestLeRobot) -> int:
    return run_ingestion(
        LeRobotSource(uri=job.source, tolerance_s=job.tolerance_s),
        output=job.output,
        image_format=job.image_format,
        jpeg_quality=job.jpeg_quality,
        resize=job.resize,
        max_refused=job.max_refused,
    )


if __name__ == "__main__":
    sys.exit(main(parsed(IngestLeRobot, sys.argv[1:])))
