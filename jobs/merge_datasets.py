"""Lay episode datasets with the same features and frame rate one after the other, as a new dataset.

python jobs/merge_datasets.py --sources <folder> <folder> --output <folder>

A source is an episode dataset, or any LeRobot v3.0 dataset whose cameras are images. Encoded images are
copied bit for bit; numbers are given anew, instructions unified, statistics computed over all frames. Runs
the same under `ray job submit --working-dir . --`, and again to continue what was interrupted.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed
from jobs.terminal import IngestTracking, run_with_options
from pipelines.sources.episodes import EpisodeDatasetSource
from pipelines.writer import WriterOptions


@dataclass(frozen=True, kw_only=True)
class MergeDatasets:
    """The flags of jobs/merge_datasets.py."""

    sources: tuple[str, ...]
    """Folders or URIs, in the order of their episodes."""
    output: str
    """Folder or URI of the new dataset."""
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that may be refused before the job fails."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: MergeDatasets) -> int:
    return run_with_options(
        EpisodeDatasetSource(uris=job.sources, tolerance_s=job.tolerance_s),
        output=job.output,
        options=WriterOptions(image_format="as_is"),
        max_refused=job.max_refused,
        append=False,
        tracking=job.tracking,
    )


if __name__ == "__main__":
    sys.exit(main(parsed(MergeDatasets, sys.argv[1:])))
