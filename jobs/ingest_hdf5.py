"""Turn HDF5 demonstrations (ALOHA/ACT, robomimic, LIBERO, Isaac Lab) into an episode dataset.

python jobs/ingest_hdf5.py --source <file or folder> --output <folder> --fps 50 --task "move the cube"

Runs the same under `ray job submit --working-dir . --`. It prints what it found and what it takes of it; with
names of another kind, `--mapping` says so (docs/data.md). Running the command again continues what was
interrupted.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed, refusals
from jobs.terminal import IngestTracking, run_ingestion
from pipelines.sources.hdf5 import Hdf5Source
from pipelines.sources.mapping import read_mapping


@dataclass(frozen=True, kw_only=True)
class IngestHdf5:
    """The flags of jobs/ingest_hdf5.py."""

    source: str
    """An HDF5 file, or a folder or URI with .hdf5 and .h5 files anywhere below."""
    output: str
    """Folder or URI of the episode dataset."""
    layout: str | None = None
    """aloha, robomimic, libero or isaaclab; told from the files unless given."""
    mapping: str = ""
    """YAML file that says what becomes state, action and cameras (docs/data.md)."""
    fps: int | None = None
    """Frames a second; needed where the files do not tell, as ALOHA's."""
    task: str | None = None
    """The instruction of all episodes; needed where the files do not tell. May be empty: --task ''."""
    filter_key: str | None = None
    """Take only the demos that mask/<filter_key> lists, such as train."""
    channel_order: str = "rgb"
    """rgb, or bgr where the recorder stored OpenCV's order."""
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


def main(job: IngestHdf5) -> int:
    with refusals():
        source = Hdf5Source(
            uri=job.source,
            layout=job.layout,
            mapping=read_mapping(job.mapping),
            fps=job.fps,
            task=job.task,
            filter_key=job.filter_key,
            channel_order=job.channel_order,
            follow_links=job.follow_links,
        )
        print(*source.choices(), sep="\n", flush=True)
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
    sys.exit(main(parsed(IngestHdf5, sys.argv[1:])))
