"""Toys that tests train on and watch with; importable in Ray workers."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.sources import Episode, Listing, Unit

LENGTHS = (17, 40, 33, 16, 1, 25, 48, 31, 12, 29, 37, 31)  # 320 frames: every boundary of a 16-row group
TASKS = ("push the red block", "open it")
NAMES = {"observation.state": ["x", "y", "gripper"], "action": ["dx", "dy", "grip", "stop"]}


@dataclass(frozen=True)
class ToySource:
    """Episodes of smooth motion whose pixels and actions tell episode and frame."""

    def listing(self) -> Listing:
        features = {
            f"observation.images.{name}": {
                "dtype": "image",
                "shape": [40, 56, 3],
                "names": ["height", "width", "channels"],
            }
            for name in ("top", "wrist")
        }
        features |= {
            name: {"dtype": "float32", "shape": [len(names)], "names": names} for name, names in NAMES.items()
        }
        units = tuple(
            Unit(name=f"episode {i}", num_episodes=1, num_frames=n, detail=i) for i, n in enumerate(LENGTHS)
        )
        return Listing(
            fps=10,
            robot_type="toy",
            features=features,
            tasks=TASKS,
            units=units,
            identity={"toy": 1},
            location="here",
        )

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode]:
        for unit in units:
            number, length = unit.detail, unit.num_frames
            t = np.arange(length)[:, None] / 10 + number
            columns = {
                "observation.state": np.sin(t * [1, 2, 3]).astype(np.float32),
                "action": np.cos(t * [1, 2, 3, 4]).astype(np.float32),
            }
            cameras = {
                f"observation.images.{n}": frames(number, length, tint)
                for n, tint in (("top", 0), ("wrist", 1))
            }
            tasks = [TASKS[number % 2]] * length
            yield Episode(name=str(number), tasks=tasks, columns=columns, cameras=cameras)


def frames(episode: int, length: int, tint: int) -> Iterator[np.ndarray]:
    """Smooth pictures that differ between episodes, frames and cameras."""
    for frame in range(length):
        image = np.zeros((40, 56, 3), dtype=np.uint8)
        image[..., 0] = np.linspace(0, 200, 56)[None] + frame % 50
        image[..., 1] = np.linspace(0, 200, 40)[:, None] + 4 * episode
        image[..., 2] = 120 * tint + frame
        yield image


@dataclass(frozen=True)
class FileWriter:
    """A `MetricWriter` that appends lines to a file."""

    path: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time(), **metrics}) + "\n")

    def flush(self) -> None:
        pass
