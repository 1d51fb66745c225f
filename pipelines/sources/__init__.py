"""The reader interface: what a source of robot episodes tells the ingestion, and how it hands them over.

A source is any picklable object with the two methods of `Source`; there is nothing to inherit and nowhere to
register. Adding a format is one file here, one job in `jobs/` and one test:

1. `listing()` runs once, in the driver. It opens metadata only, raises one `ValueError` for whatever makes
   the whole dataset unusable, and cuts the dataset into `Unit`s, the smallest pieces a worker can read by
   itself: an episode where the format allows it, else the file that holds several.
2. `episodes(units)` runs in a worker, on a few consecutive units at a time, so that a video decoder or a
   simulator can stay open from one to the next. It yields an `Episode` for everything good and a `Refusal`
   for everything bad; it never skips and never repairs. An episode may depend on its unit alone, not on its
   neighbours, and is consumed before the next one is asked for.
3. Cameras are iterators. Frames are pulled a few at a time and encoded at once, so an episode never lies in
   memory whole. A camera that turns out broken halfway raises `RefusedEpisodeError`; the writer then drops
   what it had. A source whose images are JPEG or PNG files already may hand over their bytes instead
   (`encoded_cameras`), and they are stored as they are.

The writer checks what is common to all sources (widths, dtypes, finite values, frame sizes, frames == rows)
and makes the default columns itself: `timestamp`, `frame_index`, `episode_index`, `index`, `task_index`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Feature = dict[str, Any]
"""LeRobot's description of a column: {"dtype": ..., "shape": [...], "names": [...]}; "image" is a camera."""

DEFAULT_FEATURES: dict[str, Feature] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""The columns of every LeRobot dataset; made by the writer, so a source neither lists nor yields them."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of a source that can be read by itself."""

    name: str
    """What a person calls it: "episode 12", "demo_3", "reach-v3/0"."""
    num_episodes: int
    num_frames: int
    """Exact or estimated; only balances the work and the progress line."""
    detail: Any
    """Whatever the source's `episodes` needs to find it; picklable."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The facts of a dataset that are known before any frame is read."""

    fps: int
    robot_type: str | None
    features: dict[str, Feature]
    """Columns and cameras in order, without `DEFAULT_FEATURES`; cameras as the source has them."""
    tasks: tuple[str, ...]
    """Known instructions in the order of their task_index; those met later are numbered after these."""
    units: tuple[Unit, ...]
    identity: dict[str, Any]
    """JSON facts that tell this source from another. A re-run may only continue the output of an equal
    identity, so it holds a digest of what was listed and no path."""
    location: str
    """Where the source was found, for the record only."""
    warnings: tuple[str, ...] = ()
    """What a user should know and no episode is refused for, such as a column that is left out."""
    worker_env: Mapping[str, str] = field(default_factory=dict)
    """Environment that must be set before the source's libraries are imported in a worker."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of L frames."""

    name: str
    """Its number or name in the source."""
    tasks: Sequence[str]
    """The instruction of every frame (L)."""
    columns: Mapping[str, np.ndarray]
    """Everything but cameras: (L, D) for a vector of width D, (L,) for a scalar or a string."""
    cameras: Mapping[str, Iterator[np.ndarray]]
    """For every camera its L frames in order, uint8 (H, W, 3) RGB. Different cameras are pulled in turn."""
    encoded_cameras: Mapping[str, Iterator[bytes]] = field(default_factory=dict)
    """Cameras whose L images are JPEG or PNG files: the writer decodes them for the statistics and stores the
    bytes unchanged, unless they must be shrunk. A camera stands here or in `cameras`."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts worth keeping in `meta/ingest.json`, such as the attempts a simulator needed."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why an episode is not taken."""

    episode: str
    reason: str
    """A short constant such as "frame_missing": refusals are counted by it."""
    detail: str
    """One sentence with the values."""
    camera: str | None = None
    frame: int | None = None
    """The first frame concerned, counted from 0 within the episode."""


class RefusedEpisodeError(Exception):
    """Raised where an episode turns out bad while its frames are read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Source(Protocol):
    """What the ingestion needs of a format; see the module's docstring."""

    def listing(self) -> Listing: ...

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]: ...


def is_camera(feature: Feature) -> bool:
    return feature["dtype"] == "image"


def is_number(feature: Feature) -> bool:
    return feature["dtype"] not in ("image", "string")


def feature_difference(one: Mapping[str, Feature], other: Mapping[str, Feature]) -> str | None:
    """Say what one table of features has and the other has not; None: they describe the same columns."""
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other:
            return f"feature {name!r}" if name in one else f"no feature {name!r}"
        for key in ("dtype", "shape", "names"):
            if one[name].get(key) != other[name].get(key):
                return f"feature {name!r} with {key} {one[name].get(key)} and not {other[name].get(key)}"
    return None
