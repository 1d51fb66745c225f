"""Turn a Zarr replay buffer (diffusion-policy, UMI) into an episode dataset.

python jobs/ingest_zarr.py --source <folder or zip> --output <folder> --fps 10 --task "push the T"

Runs the same under `ray job submit --working-dir . --`. Running the command again continues what was
interrupted.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed, refusals
from jobs.terminal import IngestTracking, run_ingestion
from pipelines.sources.mapping import read_mapping
from pipelines.sources.zarr_buffer import ZarrSource


@dataclass(frozen=True, kw_only=True)
class IngestZarr:
    """The flags of jobs/ingest_zarr.py."""

    source: str
    """Folder, URI (s3://bucket/path) or zip file (.zip) of the buffer."""
    output: str
    """Folder or URI of the episode dataset."""
    fps: int | None = None
    """Frames a second, which a buffer does not say; here or in the mapping."""
    task: str | None = None
    """The instruction of all episodes, which a buffer does not hold; here or in the mapping."""
    mapping: str = ""
    """YAML file that says what is state, action and camera; keys are names of arrays in data/
    (docs/data.md)."""
    missing_chunks: str = "refuse"
    """Of chunks that are not stored: refuse, or fill where the writer left out what is zero."""
    follow_links: bool = False
    """Read files that are links out of the folder."""
    resize: str | None = None
    """Shrink images once into this box: a side in pixels such as 512, or WIDTHxHEIGHT; never enlarged."""
    image_format: str = "jpeg"
    """jpeg, or png to lose nothing."""
    jpeg_quality: int = 95
    """1..100."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that may be refused before the job fails."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: IngestZarr) -> int:
    with refusals():
        mapping = read_mapping(job.mapping)
    source = ZarrSource(
        uri=job.source,
        fps=job.fps,
        task=job.task,
        mapping=mapping,
        missing_chunks=job.missing_chunks,
        follow_links=job.follow_links,
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
    sys.exit(main(parsed(IngestZarr, sys.argv[1:])))
