"""Zarr replay buffers as a source: what diffusion-policy, UMI and their successors record.

`data/<key>` are arrays over the frames of all episodes, `meta/episode_ends` says behind which frame each one
ends. A unit is an episode; a worker keeps the last chunk of every array, because episodes end within chunks.

A chunk that is not stored reads as the fill value. That is how Zarr leaves out what is zero, and also what
an incomplete copy looks like, so the user decides.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import zarr

from pipelines.sources import Episode, Feature, Listing, Refusal, RefusedEpisodeError, Unit
from pipelines.sources.mapping import SourceMapping
from pipelines.sources.vectors import (
    Vectors,
    chosen_cameras,
    chosen_vectors,
    keys_of,
    vector_columns,
    vector_features,
)
from pipelines.sources.zarr_arrays import (
    CHUNK_ERRORS,
    Declared,
    Group,
    Place,
    check_readable,
    first_missing,
    place_of,
    stored_rows,
)

USUAL_VECTORS = {"observation.state": ("state", "robot_eef_pose"), "action": ("action",)}
EPISODE_ENDS = "meta/episode_ends"
MISSING_CHUNKS = ("refuse", "fill")
MAX_COLUMN_BYTES = 256 * 1024**2
"""Of one array of one episode that is no camera, as float64."""
MAX_EPISODES = 10_000_000
LOOKED_AT_FRAMES = 16
"""Frames at the beginning, the middle and the end of a camera of floats that tell its range."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The frames of an episode."""

    start: int
    stop: int
    missing: tuple[str, int] | None
    """An array, and the first frame of the episode that it does not store."""


@dataclass(frozen=True, kw_only=True)
class ZarrSource:
    """A replay buffer in a local folder, an object store or a zip file."""

    uri: str
    fps: int | None = None
    """Frames a second; None: the mapping says it."""
    task: str | None = None
    """The instruction of all episodes; None: the mapping says it."""
    mapping: SourceMapping = field(default_factory=SourceMapping)
    """Keys are names of arrays in `data`."""
    missing_chunks: str = "refuse"
    """refuse: an episode with a chunk that is not stored is incomplete; fill: it holds the fill value."""
    follow_links: bool = False
    """Read links that lead out of the folder."""

    def listing(self) -> Listing:
        facts = self.facts
        with _about(self.uri):
            buffer = Group(facts.place)
            files = buffer.files()
            stored = {key: stored_rows(array, files) for key, array in facts.arrays.items()}
            ends = _episode_ends(buffer)
            _check_lengths(facts, ends)
        stretches = [
            Stretch(start=start, stop=stop, missing=self._missing(facts, stored, start, stop))
            for start, stop in itertools.pairwise([0, *ends])
        ]
        used = tuple(f"{array.key}/" for array in facts.arrays.values())
        listed = [sorted(item for item in files.items() if item[0].startswith(used)), ends]
        return Listing(
            fps=facts.fps,
            robot_type=self.mapping.robot_type,
            features=facts.features,
            tasks=(facts.task,),
            units=tuple(
                Unit(name=str(number), num_episodes=1, num_frames=s.stop - s.start, detail=s)
                for number, s in enumerate(stretches)
            ),
            identity={
                "format": "zarr",
                "fps": facts.fps,
                "task": facts.task,
                "mapping": self.mapping.as_json(),
                "missing_chunks": self.missing_chunks,
                "digest": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            },
            location=self.uri,
            warnings=facts.warnings,
        )

    def _missing(
        self, facts: "Facts", stored: Mapping[str, Mapping[int, int]], start: int, stop: int
    ) -> tuple[str, int] | None:
        if self.missing_chunks == "fill":
            return None
        found = ((key, first_missing(facts.arrays[key], rows, start, stop)) for key, rows in stored.items())
        return next(((key, frame - start) for key, frame in found if frame is not None), None)

    @cached_property
    def facts(self) -> "Facts":
        """Read once, in the driver; workers receive it with the source."""
        return _facts(self)

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        rows = _Rows(Group(self.facts.place), self.facts)
        for unit in units:
            stretch: Stretch = unit.detail
            try:
                episode = _episode(self.facts, rows, unit.name, stretch)
            except _ChunkError as error:
                yield Refusal(episode=unit.name, reason=error.reason, detail=error.detail, frame=error.frame)
                continue
            yield episode


# --- what is read ---


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The buffer as it will be read."""

    place: Place
    fps: int
    task: str
    vectors: Vectors
    cameras: dict[str, str]
    """`observation.images.<camera>` -> key."""
    arrays: dict[str, Declared]
    """The arrays of both, by their key."""
    scales: dict[str, float]
    """For a camera of floats what its values are multiplied with: 1 or 255."""
    features: dict[str, Feature]
    """As in `Listing.features`."""
    warnings: tuple[str, ...]


@contextlib.contextmanager
def _about(uri: str) -> Iterator[None]:
    """Put what it is about before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from None


def _facts(source: ZarrSource) -> Facts:
    fps, task = _given(source)
    place = place_of(source.uri, follow_links=source.follow_links)
    with _about(source.uri):
        buffer = Group(place)
        declared = buffer.declared("data")
        widths = {key: array.width for key, array in declared.items()}
        vectors = chosen_vectors(source.mapping, widths, usual=USUAL_VECTORS)
        cameras = chosen_cameras(source.mapping, [key for key, array in declared.items() if array.is_camera])
        if not cameras:
            raise ValueError(f"no camera, that is frames x height x width x 3, among {_listed(declared)}")
        arrays = {key: declared[key] for key in (*keys_of(vectors), *cameras.values())}
        for array in arrays.values():
            check_readable(array)
        opened = {key: buffer.opened(array) for key, array in arrays.items()}
        scales = {k: _scale(opened[k], arrays[k]) for k in cameras.values() if arrays[k].has_floats}
    images: dict[str, Feature] = {
        name: {
            "dtype": "image",
            "shape": list(arrays[key].shape[1:]),
            "names": ["height", "width", "channels"],
        }
        for name, key in cameras.items()
    }
    left_out = {key: array for key, array in declared.items() if key not in arrays}
    warnings = [f"left out: {_listed(left_out)}"] if left_out else []
    warnings += [
        f"{arrays[key]} is stored in 8 bits: {'its whole numbers' if scale == 1 else 'round(255 x)'}"
        for key, scale in scales.items()
    ]
    return Facts(
        place=place,
        fps=fps,
        task=task,
        vectors=vectors,
        cameras=cameras,
        arrays=arrays,
        scales=scales,
        features=images | vector_features(vectors, widths),
        warnings=tuple(warnings),
    )


def _given(source: ZarrSource) -> tuple[int, str]:
    """Return the rate and the instruction, which a buffer does not hold."""
    fps = source.fps if source.fps is not None else source.mapping.fps
    if fps is None or fps < 1:
        raise ValueError(f"fps {fps!r}: a replay buffer does not say its rate; give --fps (pusht has 10)")
    task = source.task if source.task is not None else source.mapping.task
    if task is None:
        raise ValueError(
            "a replay buffer holds no instruction; give --task, such as 'push the T onto its mark'"
        )
    if source.missing_chunks not in MISSING_CHUNKS:
        raise ValueError(f"missing_chunks {source.missing_chunks!r} is none of {', '.join(MISSING_CHUNKS)}")
    return fps, task


def _listed(arrays: Mapping[str, Declared]) -> str:
    return ", ".join(map(str, arrays.values())) or "no arrays"


def _scale(opened: zarr.Array, array: Declared) -> float:
    """Return what the values of a camera of floats are multiplied with, judged by some of its frames.

    Raises:
        ValueError: they are neither whole numbers in 0..255 nor within 0..1, or could be both.
    """
    num_frames = array.shape[0]
    seen: list[np.ndarray] = []
    for start in (0, num_frames // 2, max(num_frames - LOOKED_AT_FRAMES, 0)):
        try:
            seen.append(np.unique(np.asarray(opened[start : start + LOOKED_AT_FRAMES])))
        except CHUNK_ERRORS:
            continue  # the episode of this chunk is refused when it is read
    if not seen:
        raise ValueError(f"camera {array}: none of the frames looked at can be read")
    values = np.unique(np.concatenate(seen))
    whole, unit = _in_range(values, 1), _in_range(values, 255)
    if whole != unit:
        return 1 if whole else 255
    why = "only 0 and 1, which may mean either" if whole else "neither"
    raise ValueError(
        f"camera {array} holds {values[0]:g}..{values[-1]:g} in the frames looked at; whole numbers in "
        f"0..255 or numbers in 0..1 are read, and these are {why}"
    )


def _in_range(values: np.ndarray, scale: float) -> bool:
    """Whether floats are pixels of a scale: whole numbers in 0..255 for 1, anything in 0..1 for 255."""
    limit = 255 / scale
    return bool(
        ((values >= 0) & (values <= limit)).all() and (scale != 1 or (values == np.rint(values)).all())
    )


def _episode_ends(buffer: Group) -> list[int]:
    array = buffer.declared_array(EPISODE_ENDS)
    if array is None:
        raise ValueError(f"no {EPISODE_ENDS}, so this is no replay buffer")
    check_readable(array)
    if (
        len(array.shape) != 1
        or np.dtype(array.dtype).kind not in "iu"
        or not 0 < array.shape[0] <= MAX_EPISODES
    ):
        raise ValueError(f"{array} is no list of 1 to {MAX_EPISODES} whole numbers")
    try:
        ends = [0, *np.asarray(buffer.opened(array)[:]).tolist()]
    except CHUNK_ERRORS as error:
        raise ValueError(f"{EPISODE_ENDS} cannot be read: {error}") from None
    for number, (before, after) in enumerate(itertools.pairwise(ends)):
        if after <= before:
            raise ValueError(f"{EPISODE_ENDS} is not increasing: entry {number} is {after} after {before}")
    return ends[1:]


def _check_lengths(facts: Facts, ends: Sequence[int]) -> None:
    for array in facts.arrays.values():
        if array.shape[0] != ends[-1]:
            raise ValueError(f"{EPISODE_ENDS} ends with {ends[-1]}, {array.key} has {array.shape[0]} frames")


# --- episodes ---


class _ChunkError(Exception):
    """Frames that cannot be read, or are not what they should be."""

    def __init__(self, reason: str, detail: str, *, frame: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.frame = frame


def _episode(facts: Facts, rows: "_Rows", name: str, stretch: Stretch) -> Episode:
    """Read an episode's vectors; its frames follow when they are asked for.

    Raises:
        _ChunkError: why it is refused.
    """
    length = stretch.stop - stretch.start
    if stretch.missing is not None:
        key, frame = stretch.missing
        raise _ChunkError(
            "chunk_missing",
            f"{facts.arrays[key].key} does not store frame {frame}; if its writer left out what is zero, "
            "--missing_chunks fill",
            frame=frame,
        )
    for key in keys_of(facts.vectors):
        num_bytes = length * facts.arrays[key].width * 8
        if num_bytes > MAX_COLUMN_BYTES:
            raise _ChunkError(
                "too_large", f"{key} takes {num_bytes} bytes, at most {MAX_COLUMN_BYTES} are read"
            )
    columns = {key: np.stack(list(rows.between(key, stretch))) for key in keys_of(facts.vectors)}
    return Episode(
        name=name,
        tasks=[facts.task] * length,
        columns=vector_columns(facts.vectors, columns),
        cameras={camera: _frames(facts, rows, name, camera, stretch) for camera in facts.cameras},
    )


def _frames(facts: Facts, rows: "_Rows", episode: str, camera: str, stretch: Stretch) -> Iterator[np.ndarray]:
    key = facts.cameras[camera]
    scale = facts.scales.get(key)
    number = 0
    try:
        for frame in rows.between(key, stretch):
            yield frame if scale is None else _pixels(frame, scale=scale)
            number += 1
    except _ChunkError as error:
        raise RefusedEpisodeError(
            Refusal(episode=episode, camera=camera, frame=number, reason=error.reason, detail=error.detail)
        ) from None


def _pixels(frame: np.ndarray, *, scale: float) -> np.ndarray:
    """Return a frame of floats in 8 bits."""
    if not _in_range(frame, scale):
        expected = "whole numbers in 0..255" if scale == 1 else "numbers in 0..1"
        raise _ChunkError("pixel_values", f"{frame.min():g}..{frame.max():g} in a camera of {expected}")
    return np.rint(frame * scale).astype(np.uint8)


class _Rows:
    """The arrays of a buffer, each with the chunk that was read last."""

    def __init__(self, buffer: Group, facts: Facts) -> None:
        self.arrays = facts.arrays
        self.opened = {key: buffer.opened(array) for key, array in facts.arrays.items()}
        self.last: dict[str, tuple[int, np.ndarray]] = {}

    def between(self, key: str, stretch: Stretch) -> Iterator[np.ndarray]:
        """Yield what an array holds for each frame of an episode."""
        cut = self.arrays[key].chunks[0]
        for row in range(stretch.start // cut, -(-stretch.stop // cut)):
            first = row * cut
            yield from self._chunk(key, row)[max(stretch.start - first, 0) : stretch.stop - first]

    def _chunk(self, key: str, row: int) -> np.ndarray:
        if key not in self.last or self.last[key][0] != row:
            self.last.pop(key, None)  # before the next one takes its memory
            cut = self.arrays[key].chunks[0]
            try:
                values = np.ascontiguousarray(self.opened[key][row * cut : (row + 1) * cut])
            except CHUNK_ERRORS as error:
                where = f"{self.arrays[key].key} from frame {row * cut} of the buffer"
                raise _ChunkError("chunk_unreadable", f"{where}: {type(error).__name__} {error}") from None
            self.last[key] = row, values
        return self.last[key][1]
