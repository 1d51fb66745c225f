"""A source of five episodes, each with a flaw that is no reason to refuse it, and one that is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.ingestion import ingest
from pipelines.sources import Episode, Feature, Listing, Refusal, Unit
from pipelines.writer import WriterOptions

TOP, WRIST = "observation.images.top", "observation.images.wrist"
LIFT = "lift the cup"
ODD = "pay $5 \\foo $"
"""Not TeX, although it has dollars and a backslash."""
LENGTHS = (40, 1, 30, 50, 30)
SIZES = {TOP: (24, 32), WRIST: (20, 20)}


def camera(height: int, width: int) -> Feature:
    return {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def vector(*names: str) -> Feature:
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def colour_of(episode: int, frame: int) -> np.ndarray:
    return np.array([10 + 40 * episode, 4 * frame, 128], np.uint8)


def frames_of(episode: int, length: int, size: tuple[int, int]) -> np.ndarray:
    """One colour a frame that tells episode and frame, and a white corner."""
    images = np.empty((length, *size, 3), np.uint8)
    for frame in range(length):
        images[frame] = colour_of(episode, frame)
        images[frame, :4, :4] = 255
    return images


def episode(number: int) -> Episode:
    length = LENGTHS[number]
    t = np.arange(length)[:, None] / 10 + number
    state = np.sin(t * [1, 2, 0])  # the gripper never moves
    action = np.cos(t * [1, 2])
    tasks = [LIFT] * length
    images = {name: frames_of(number, length, size) for name, size in SIZES.items()}
    if number == 1:
        tasks = [" "]
    if number == 2:
        images[WRIST][:] = 0  # unplugged
    if number == 3:
        action[17, 1] = -500
        images[TOP][:] = images[TOP][0]  # frozen
    if number == 4:
        tasks = [LIFT] * 10 + [ODD] * 20
    return Episode(
        name=f"demo_{number}",
        tasks=tasks,
        columns={"observation.state": state, "action": action},
        cameras={name: iter(frames) for name, frames in images.items()},
    )


@dataclass(frozen=True)
class FlawedSource:
    """The six episodes, one a unit."""

    def listing(self) -> Listing:
        features = {name: camera(*size) for name, size in SIZES.items()}
        features |= {"observation.state": vector("x", "y", "gripper"), "action": vector("x", "dy")}
        return Listing(
            fps=10,
            robot_type="toy",
            features=features,
            tasks=(LIFT,),
            units=tuple(
                Unit(name=f"demo_{number}", num_episodes=1, num_frames=length, detail=number)
                for number, length in enumerate((*LENGTHS, 0))
            ),
            identity={"format": "flawed", "version": 3},
            location="memory",
        )

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        for unit in units:
            if unit.detail < len(LENGTHS):
                yield episode(unit.detail)
            else:
                yield Refusal(episode=unit.name, reason="video_missing", detail="does not exist", camera=TOP)


def ingested(source: Any, root: Path, **options: Any) -> dict[str, Any]:
    """Ingest on the session's Ray; lossless, so that pixels can be compared."""
    return ingest(
        source,
        str(root),
        options=WriterOptions(image_format="png", **options),
        max_refused=0.5,
        code_version="0123abc",
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )
