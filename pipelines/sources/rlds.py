"""RLDS datasets as a source: the TFRecord files that TensorFlow Datasets writes, read without TensorFlow.

A record is an episode, a tf.Example in which every feature of a step lies as one flat list over all steps.
A unit is a record: the listing walks over the 12 bytes before each, so a worker reads its own records alone,
one at a time, whatever the size of the file. Both checksums of a record are checked before it is parsed.
JPEG and PNG images are handed over as they are stored.

RLDS does not say how fast its steps follow each other; the user does.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from pipelines.sources import Episode, Feature, Listing, Refusal, RefusedEpisodeError, Unit
from pipelines.sources.mapping import SourceMapping
from pipelines.sources.storage import Folder
from pipelines.sources.tfds import Leaf, Shard, Version, open_version
from pipelines.sources.tfrecord import RecordError, Span, example, numbers, record, spans, strings
from pipelines.sources.vectors import (
    Vectors,
    chosen_cameras,
    chosen_vectors,
    keys_of,
    require_key,
    vector_columns,
    vector_features,
)

USUAL_VECTORS = {"observation.state": ("observation/state", "observation/proprio"), "action": ("action",)}
USUAL_TASKS = (
    "language_instruction",
    "natural_language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
)
BOUNDARY_FLAGS = ("is_first", "is_last")
WALKERS = 16
"""Files whose record headers are read at the same time; on an object store each read is a round trip."""
PROBED_RECORDS = 20
"""Records from the beginning that are tried for a first look; if all are broken, so is the dataset."""
ORIENTATION = 0x0112
"""EXIF's tag."""
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError)
"""What PIL raises for a damaged file."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an episode lies, or why it cannot be found."""

    path: str
    span: Span | None
    flaw: tuple[str, str] | None = None
    """(reason, detail) where there is no span."""


@dataclass(frozen=True, kw_only=True)
class RldsSource:
    """An RLDS dataset in a local folder or an object store."""

    uri: str
    """The version folder (with dataset_info.json), or one above it that holds no other."""
    splits: tuple[str, ...] = ()
    """Empty: all."""
    fps: int | None = None
    """Steps a second; None: the mapping says it."""
    task: str | None = None
    """One instruction for all steps; None: the mapping's, else each step's own."""
    mapping: SourceMapping = field(default_factory=SourceMapping)
    """Keys are paths within a step, such as `observation/state`."""
    follow_links: bool = False
    """Read links that lead out of the folder."""

    def listing(self) -> Listing:
        facts = self.facts
        with ThreadPoolExecutor(WALKERS) as pool:
            walked = list(pool.map(lambda shard: _places(facts.version, shard), facts.version.shards))
        units, warnings = [], list(facts.warnings)
        for shard, places in zip(facts.version.shards, walked, strict=True):
            units += [_unit(shard, number, place, facts) for number, place in enumerate(places)]
            if len(places) > shard.num_records:
                declared = f"dataset_info.json says {shard.num_records}"
                warnings.append(f"{shard.path}: {len(places)} records, {declared}; all are read")
        listed = [
            facts.version.info,
            facts.version.features,
            [[asdict(p) for p in places] for places in walked],
        ]
        return Listing(
            fps=facts.fps,
            robot_type=self.mapping.robot_type,
            features=facts.features,
            tasks=() if facts.task is None else (facts.task,),
            units=tuple(units),
            identity={
                "format": "rlds",
                "splits": facts.version.splits,
                "fps": facts.fps,
                "task": facts.task,
                "mapping": self.mapping.as_json(),
                "digest": hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest(),
            },
            location=facts.version.folder.uri,
            warnings=tuple(warnings),
        )

    @cached_property
    def facts(self) -> "Facts":
        """Read once, in the driver; workers receive it with the source."""
        return _facts(self)

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        with contextlib.closing(_Files(self.facts.version.folder)) as files:
            for unit in units:
                yield self._episode(files, unit)

    def _episode(self, files: "_Files", unit: Unit) -> Episode | Refusal:
        place: Place = unit.detail
        try:
            if place.span is None:
                raise RecordError(*cast(tuple[str, str], place.flaw))
            data = record(files.stream(place.path), place.span)
            return _episode(self.facts, unit.name, example(data))
        except RecordError as error:
            detail = f"{place.path}: {error.detail}"
            return Refusal(episode=unit.name, reason=error.reason, detail=detail, frame=error.frame)


# --- what is read ---


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The dataset as it will be read."""

    version: Version
    fps: int
    vectors: Vectors
    cameras: dict[str, str]
    """`observation.images.<camera>` -> key."""
    features: dict[str, Feature]
    """As in `Listing.features`."""
    task: str | None
    task_key: str | None
    """Where the instruction stands, unless there is one `task`."""
    frames_per_byte: float
    """Of a record; balances the work."""
    warnings: tuple[str, ...]


def _facts(source: RldsSource) -> Facts:
    fps = source.fps if source.fps is not None else source.mapping.fps
    if fps is None or fps < 1:
        raise ValueError(
            f"fps {fps!r}: RLDS does not say how many steps a second has; give --fps (bridge has 5, most "
            "datasets have 3 to 20)"
        )
    version = open_version(source.uri, splits=source.splits, follow_links=source.follow_links)
    try:
        vectors = chosen_vectors(source.mapping, _widths(version.steps), usual=USUAL_VECTORS)
        cameras = chosen_cameras(source.mapping, _camera_keys(version.steps, source.mapping))
        if not cameras:
            raise ValueError(f"no camera among the features of a step: {_described(version.steps)}")
        task = source.task if source.task is not None else source.mapping.task
        task_key = None if task is not None else _task_key(source.mapping, version.steps)
    except ValueError as error:
        raise ValueError(f"{version.folder.uri}/features.json: {error}") from None
    sizes, frames_per_byte = _probed(version, cameras, vectors)
    images: dict[str, Feature] = {
        name: {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for name, size in sizes.items()
    }
    return Facts(
        version=version,
        fps=fps,
        vectors=vectors,
        cameras=cameras,
        features=images | vector_features(vectors, _widths(version.steps)),
        task=task,
        task_key=task_key,
        frames_per_byte=frames_per_byte,
        warnings=tuple(_warnings(source, version, used={*keys_of(vectors), *cameras.values(), task_key})),
    )


def _widths(steps: Mapping[str, Leaf]) -> dict[str, int]:
    """Return the numbers in a step, for every feature of a fixed number of them."""
    return {
        key: math.prod(cast(tuple[int, ...], leaf.shape)) for key, leaf in steps.items() if _is_numeric(leaf)
    }


def _is_numeric(leaf: Leaf) -> bool:
    if leaf.kind != "tensor" or leaf.encoding not in ("none", "bytes", "zlib"):
        return False
    try:
        kind = np.dtype(leaf.dtype).kind
    except TypeError:  # bfloat16, string
        return False
    return kind in "fiub" and None not in leaf.shape and 0 not in leaf.shape


def _is_camera(leaf: Leaf) -> bool:
    if leaf.dtype != "uint8" or len(leaf.shape) != 3 or leaf.shape[2] != 3:
        return False
    return leaf.kind == "image" or _is_numeric(leaf)


def _camera_keys(steps: Mapping[str, Leaf], mapping: SourceMapping) -> list[str]:
    """Return what may be a camera: what a mapping names may lie anywhere, else it is an observation."""
    where = "" if mapping.cameras else "observation/"
    return sorted(key for key, leaf in steps.items() if key.startswith(where) and _is_camera(leaf))


def _task_key(mapping: SourceMapping, steps: Mapping[str, Leaf]) -> str:
    texts = [key for key, leaf in steps.items() if leaf.kind == "text"]
    if mapping.task_key is not None:
        require_key(mapping.task_key, texts)
        return mapping.task_key
    key = next((key for key in USUAL_TASKS if key in texts), None)
    if key is None:
        raise ValueError(
            f"no instruction: no text {' or '.join(map(repr, USUAL_TASKS))}; give --task, or task_key in a "
            f"mapping; texts are {', '.join(texts) or 'none'}"
        )
    return key


def _warnings(source: RldsSource, version: Version, *, used: set[str | None]) -> Iterator[str]:
    if not source.splits and len(version.splits) > 1:
        yield f"splits {', '.join(version.splits)} are read as one dataset; --split chooses"
    left_out = {key: leaf for key, leaf in version.steps.items() if key not in {*used, *BOUNDARY_FLAGS}}
    if left_out:
        yield f"left out of every step: {_described(left_out)}"


def _described(steps: Mapping[str, Leaf]) -> str:
    return ", ".join(f"{key} ({leaf})" for key, leaf in steps.items())


def _probed(
    version: Version, cameras: Mapping[str, str], vectors: Vectors
) -> tuple[dict[str, tuple[int, int]], float]:
    """Return each camera's (height, width), and frames per byte of a record, from the first good record.

    The declared size holds; where none is declared, the first image's does for all.
    """
    declared = {name: version.steps[key].shape[:2] for name, key in cameras.items()}
    flaw: object = "there is none"
    for stream, span in itertools.islice(_beginning(version), PROBED_RECORDS):
        try:
            stored = example(record(stream, span))
            length = len(_values(version.steps, stored, keys_of(vectors)[-1]))
            if length == 0:
                raise RecordError("empty", "the episode has no frames")
            sizes = {
                name: cast(tuple[int, int], size) if None not in size else _first_size(stored, cameras[name])
                for name, size in declared.items()
            }
        except (RecordError, *IMAGE_ERRORS) as error:
            flaw = error
            continue
        return sizes, length / span.length
    raise ValueError(f"{version.folder.uri}: of the first {PROBED_RECORDS} records none can be read: {flaw}")


def _beginning(version: Version) -> Iterator[tuple[BinaryIO, Span]]:
    """Yield the records from the beginning of the dataset, as far as they are found."""
    for shard in version.shards:
        size = version.folder.size(shard.path)
        if size is None:
            continue
        with version.folder.open(shard.path) as stream, contextlib.suppress(RecordError):
            for span in spans(stream, size=size):
                yield stream, span


def _first_size(stored: Mapping[str, Any], key: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(_strings(stored, key)[0]), formats=("PNG", "JPEG")) as image:
        return image.height, image.width


# --- records ---


def _places(version: Version, shard: Shard) -> list[Place]:
    """Return a place for every record that the file holds or should hold."""
    size = version.folder.size(shard.path)
    if size is None:
        lost = Place(path=shard.path, span=None, flaw=("data_missing", "does not exist"))
        return [lost] * shard.num_records
    places: list[Place] = []
    missing = ("record_missing", f"is not there, dataset_info.json says {shard.num_records} records")
    with version.folder.open(shard.path) as stream:
        try:
            for span in spans(stream, size=size):
                places.append(Place(path=shard.path, span=span))  # noqa: PERF401 - kept when the walk fails
        except RecordError as error:
            missing = ("record_unreachable", f"lies behind record {len(places)}: {error.detail}")
            places.append(Place(path=shard.path, span=None, flaw=(error.reason, error.detail)))
    lost = Place(path=shard.path, span=None, flaw=missing)
    return places + [lost] * (shard.num_records - len(places))


def _unit(shard: Shard, number: int, place: Place, facts: Facts) -> Unit:
    num_bytes = place.span.length if place.span else 0
    return Unit(
        name=f"{shard.split}/{shard.first_record + number}",
        num_episodes=1,
        num_frames=max(round(num_bytes * facts.frames_per_byte), 1),
        detail=place,
    )


class _Files:
    """The file used last, open: records of one file follow each other."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.path = ""
        self.file: BinaryIO | None = None

    def stream(self, path: str) -> BinaryIO:
        if self.file is None or path != self.path:
            self.close()
            try:
                self.file = self.folder.open(path)
            except FileNotFoundError:
                raise RecordError("data_missing", "does not exist") from None
            self.path = path
        return self.file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None


# --- episodes ---


def _episode(facts: Facts, name: str, stored: Mapping[str, Any]) -> Episode:
    """Turn a record into an episode.

    Raises:
        RecordError: why it is refused.
    """
    steps = facts.version.steps
    arrays = {key: _values(steps, stored, key) for key in keys_of(facts.vectors)}
    flags = {key: _values(steps, stored, key) for key in BOUNDARY_FLAGS if key in steps}
    texts = None if facts.task_key is None else _strings(stored, facts.task_key)
    counts = {key: len(values) for key, values in (arrays | flags).items()}
    if texts is not None:
        counts[str(facts.task_key)] = len(texts)
    if len(set(counts.values())) > 1:
        raise RecordError("row_count", f"features of different lengths: {_pairs(counts)}")
    length = next(iter(counts.values()))
    if length == 0:
        raise RecordError("empty", "the episode has no frames")
    _check_boundaries(flags)
    cameras = {camera: _camera(facts, name, camera, stored) for camera in facts.cameras}
    return Episode(
        name=name,
        tasks=[str(facts.task)] * length if texts is None else _decoded(texts, str(facts.task_key)),
        columns=vector_columns(facts.vectors, arrays),
        cameras={camera: images for camera, images in cameras.items() if _is_tensor(facts, camera)},
        encoded_cameras={c: images for c, images in cameras.items() if not _is_tensor(facts, c)},
        notes=_notes(flags),
    )


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {count}" for key, count in counts.items())


def _values(steps: Mapping[str, Leaf], stored: Mapping[str, Any], key: str) -> np.ndarray:
    """Return a feature of numbers as (L, *shape)."""
    leaf = steps[key]
    shape = cast(tuple[int, ...], leaf.shape)
    if leaf.encoding != "none":
        items = [_unpacked(leaf, item, key) for item in _strings(stored, key)]
        return np.stack(items) if items else np.zeros((0, *shape))
    flat = numbers(_feature(stored, key))
    if flat.size % math.prod(shape):
        raise RecordError("wrong_width", f"{key}: {flat.size} numbers are no multiple of {math.prod(shape)}")
    return flat.reshape(-1, *shape).astype(leaf.dtype)


def _unpacked(leaf: Leaf, item: bytes, key: str) -> np.ndarray:
    """Return one step of a tensor that is stored as bytes."""
    shape = cast(tuple[int, ...], leaf.shape)
    dtype = np.dtype(leaf.dtype).newbyteorder("<")
    num_bytes = math.prod(shape) * dtype.itemsize
    if leaf.encoding == "zlib":
        try:
            item = zlib.decompressobj().decompress(item, num_bytes + 1)
        except zlib.error as error:
            raise RecordError("value_unreadable", f"{key}: {error}") from None
    if len(item) != num_bytes:
        raise RecordError("wrong_width", f"{key}: {len(item)} bytes, {leaf} takes {num_bytes}")
    return np.frombuffer(item, dtype).reshape(shape)


def _strings(stored: Mapping[str, Any], key: str) -> list[bytes]:
    return strings(_feature(stored, key))


def _feature(stored: Mapping[str, Any], key: str) -> Any:
    name = f"steps/{key}"
    if name not in stored:
        raise RecordError("column_missing", f"the record has no feature {name!r}")
    return stored[name]


def _decoded(texts: Sequence[bytes], key: str) -> list[str]:
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError as error:
        raise RecordError("task_unreadable", f"{key}: {error}") from None


def _check_boundaries(flags: Mapping[str, np.ndarray]) -> None:
    """Refuse what is not one whole episode in order: a beginning elsewhere than at 0, an end within."""
    if "is_first" in flags:
        expected = np.arange(len(flags["is_first"])) == 0
        wrong = np.flatnonzero(flags["is_first"] != expected)
        if len(wrong):
            frame = int(wrong[0])
            raise RecordError(
                "boundary_flags", f"is_first is {not expected[frame]} in step {frame}", frame=frame
            )
    ends = np.flatnonzero(flags["is_last"][:-1]) if "is_last" in flags else []
    if len(ends):
        frame = int(ends[0])
        last = len(flags["is_last"]) - 1
        raise RecordError("boundary_flags", f"is_last in step {frame}, the last is {last}", frame=frame)


def _notes(flags: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Say which episodes were cut before their end: what there is of them is good."""
    whole = "is_last" not in flags or flags["is_last"][-1:].any()
    return {} if whole else {"cut": "is_last is not set in the last step"}


def _camera(facts: Facts, episode: str, camera: str, stored: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the images of a camera, or the frames of a tensor; a bad one refuses the episode."""
    key = facts.cameras[camera]
    height, width, _ = facts.features[camera]["shape"]
    number = 0
    try:
        if _is_tensor(facts, camera):
            yield from _values(facts.version.steps, stored, key)
            return
        for data in _strings(stored, key):
            yield _rgb_image(data, height=height, width=width)
            number += 1
    except RecordError as error:
        raise RefusedEpisodeError(
            Refusal(episode=episode, camera=camera, frame=number, reason=error.reason, detail=error.detail)
        ) from None


def _is_tensor(facts: Facts, camera: str) -> bool:
    return facts.version.steps[facts.cameras[camera]].kind == "tensor"


def _rgb_image(data: bytes, *, height: int, width: int) -> bytes:
    """Return a stored image as it is; if readers would not see its RGB pixels in it, as a PNG of them.

    That is grey or a palette, an alpha channel, or an orientation, which TFDS does not apply. Whether the
    image is whole and of the right size is for the writer to see.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            plain = image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
            if plain or image.size != (width, height):
                return data
            if image.mode.startswith(("I", "F")):
                raise RecordError("wrong_dtype", f"{image.mode} pixels, not 8 bits a channel")
            out = io.BytesIO()
            Image.fromarray(np.asarray(image.convert("RGB"))).save(out, "PNG")
            return out.getvalue()
    except IMAGE_ERRORS as error:
        raise RecordError("image_unreadable", str(error)) from None
