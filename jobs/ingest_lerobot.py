"""Turn a LeRobot dataset (v2.0, v2.1, v3.0; video or images) into an episode dataset.

python jobs/ingest_lerobot.py --source <folder> --output <folder>

Runs the same under `ray job submit --working-dir . --`. Running the command again continues what was
interrupted.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed, refusals
from jobs.terminal import IngestTracking, run_ingestion
from pipelines.sources.lerobot import LeRobotSource
from pipelines.sources.mapping import read_mapping


@dataclass(frozen=True, kw_only=True)
class IngestLeRobot:
    """The flags of jobs/ingest_lerobot.py."""

    source: str
    """Folder, URI (s3://bucket/path) or Hub id (org/name, org/name@revision) of the LeRobot dataset."""
    output: str
    """Folder or URI of the episode dataset."""
    mapping: str = ""
    """YAML file, or GR00T's modality.json, that says what is state, action, camera and instruction in a
    dataset with names of its own (pipelines/sources/mapping.py)."""
    resize: str | None = None
    """Shrink images once into this box: a side in pixels such as 512, or WIDTHxHEIGHT; never enlarged."""
    image_format: str = "jpeg"
    """jpeg, or png to lose nothing."""
    jpeg_quality: int = 95
    """1..100."""
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps, and a video's frame from where its first frame puts
    it."""
    follow_links: bool = False
    """Read files to which symbolic links lead out of a local dataset."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that may be refused before the job fails."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: IngestLeRobot) -> int:
    with refusals():
        mapping = read_mapping(job.mapping)
    source = LeRobotSource(
        uri=job.source, mapping=mapping, tolerance_s=job.tolerance_s, follow_links=job.follow_links
    )
    return run_ingestion(
        source,
        output=job.output,
        image_format=job.image_format,
        jpeg_quality=job.jpeg_quality,
        resize=job.resize,
        max_refused=job.max_refused,
        tracking=job.tracking,
    )


if __name__ == "__main__":
    sys.exit(main(parsed(IngestLeRobot, sys.argv[1:])))
