"""Add the episodes of one episode dataset to another one, in place.

python jobs/append_episodes.py --source <folder> --output <folder>

The output stays readable: it is the old dataset until the last step and the new one after it, also when this
job is killed. Encoded images are copied bit for bit, existing data files are not touched. A source that was
appended already is recognised. Runs the same under `ray job submit --working-dir . --`.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed, refusals
from jobs.terminal import IngestTracking, run_with_options
from pipelines.output import options_of
from pipelines.sources.episodes import EpisodeDatasetSource


@dataclass(frozen=True, kw_only=True)
class AppendEpisodes:
    """The flags of jobs/append_episodes.py."""

    source: str
    """Folder or URI of an episode dataset, or of a LeRobot v3.0 dataset whose cameras are images."""
    output: str
    """Folder or URI of the dataset that grows; written by one of the ingestion jobs."""
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps."""
    max_refused: float = 0.0
    """Share of the source's episodes, 0..1, that may be refused before the job fails."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: AppendEpisodes) -> int:
    with refusals():
        options = options_of(job.output)
    return run_with_options(
        EpisodeDatasetSource(uris=(job.source,), tolerance_s=job.tolerance_s),
        output=job.output,
        options=options,
        max_refused=job.max_refused,
        append=True,
        tracking=job.tracking,
    )


if __name__ == "__main__":
    sys.exit(main(parsed(AppendEpisodes, sys.argv[1:])))
