"""Turn an RLDS dataset (TFRecord files of TensorFlow Datasets) into an episode dataset.

python jobs/ingest_rlds.py --source <folder> --output <folder> --fps 5

Runs the same under `ray job submit --working-dir . --`. Running the command again continues what was
interrupted.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed, refusals
from jobs.terminal import IngestTracking, run_ingestion
from pipelines.sources.mapping import read_mapping
from pipelines.sources.rlds import RldsSource


@dataclass(frozen=True, kw_only=True)
class IngestRlds:
    """The flags of jobs/ingest_rlds.py."""

    source: str
    """Folder, URI (s3://, gs://) or Hub id with dataset_info.json in it, or in one folder below."""
    output: str
    """Folder or URI of the episode dataset."""
    fps: int | None = None
    """Steps a second, which RLDS does not say; here or in the mapping."""
    split: str = ""
    """train, or several as train,val; empty: all."""
    task: str | None = None
    """One instruction instead of each step's own."""
    mapping: str = ""
    """YAML file that says what is state, action, camera and instruction; keys are paths within a step, such
    as observation/state or action/world_vector (docs/data.md)."""
    follow_links: bool = False
    """Read files that are links out of the folder."""
    resize: str | None = None
    """Shrink images once into this box: a side in pixels such as 512, or WIDTHxHEIGHT; never enlarged."""
    image_format: str = "jpeg"
    """jpeg, or png to lose nothing; of images that are shrunk or no files yet, others stay as they are."""
    jpeg_quality: int = 95
    """1..100."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that may be refused before the job fails."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: IngestRlds) -> int:
    with refusals():
        mapping = read_mapping(job.mapping)
    source = RldsSource(
        uri=job.source,
        splits=tuple(name for name in job.split.split(",") if name),
        fps=job.fps,
        task=job.task,
        mapping=mapping,
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
    sys.exit(main(parsed(IngestRlds, sys.argv[1:])))
