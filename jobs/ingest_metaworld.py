"""Film Meta-World's scripted experts solving tasks, as an episode dataset.

python jobs/ingest_metaworld.py --tasks reach-v3 button-press-topdown-v3 --episodes 20 --output
outputs/metaworld

Runs the same under `ray job submit --working-dir . --`. The episodes depend on the flags alone, and running
the command again continues what was interrupted. Needs the extra `sim` and the system package libosmesa6.
"""

import sys
from dataclasses import dataclass, field

from jobs.command_line import parsed
from jobs.terminal import IngestTracking, run_ingestion
from pipelines.sources.metaworld import MetaWorldSource


@dataclass(frozen=True, kw_only=True)
class IngestMetaWorld:
    """The flags of jobs/ingest_metaworld.py."""

    tasks: tuple[str, ...]
    """Meta-World's names, separated by spaces."""
    episodes: tuple[int, ...] = (20,)
    """Successful episodes of each task: one number for all, or one per task in the order of `tasks`."""
    output: str
    """Folder or URI of the dataset."""
    seed: int = 0
    """Other seeds give other episodes."""
    size: int = 96
    """Height and width of the pictures in pixels."""
    cameras: tuple[str, ...] = ("corner2",)
    """Meta-World's, separated by spaces: corner2 as LeRobot's, behindGripper, gripperPOV, topview, corner,
    corner3, corner4."""
    action_noise: float = 0.0
    """Standard deviation of the noise on executed actions (range -1..1); the expert's own are recorded."""
    noise_correlation: float = 0.0
    """0..0.999, of one step's noise with the next one's: what leads the robot away from the expert's way and
    makes it show the way back."""
    image_format: str = "jpeg"
    """jpeg or png."""
    jpeg_quality: int = 95
    """1..100."""
    max_refused: float = 0.0
    """Share of episodes, 0..1, that the expert may give up on."""
    tracking: IngestTracking = field(default_factory=IngestTracking)


def main(job: IngestMetaWorld) -> int:
    source = MetaWorldSource(
        tasks=job.tasks,
        num_episodes=job.episodes,
        seed=job.seed,
        size_px=job.size,
        cameras=job.cameras,
        action_noise=job.action_noise,
        noise_correlation=job.noise_correlation,
    )
    return run_ingestion(
        source,
        output=job.output,
        image_format=job.image_format,
        jpeg_quality=job.jpeg_quality,
        resize=None,
        max_refused=job.max_refused,
        tracking=job.tracking,
    )


if __name__ == "__main__":
    sys.exit(main(parsed(IngestMetaWorld, sys.argv[1:])))
