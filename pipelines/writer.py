"""Write episodes as a sharded Parquet dataset (LeRobot v3.0, images inside), atomically and resumably.

Two stages, because an episode's final place is known only when all episodes were looked at: a refused one
leaves no gap in `episode_index` and `index`, and a shard is cut by real sizes.

1. **Stage.** The source's units are cut into parts, a pure function of the listing. A worker reads one part
   and writes each good episode to its own Arrow file, `meta/_ingest/<part>-<episode>.arrow`, one record batch
   per row group, images already encoded; frames are encoded as they come, so memory holds one row group. Then
   `<part>.json` with what the dataset's metadata needs of each episode and every refusal; a part with that
   file is complete, and a re-run keeps it.
2. **Assemble.** With all parts known, the accepted episodes are numbered and laid into shards of about 100
   MB, a pure function of the parts. A worker copies the record batches of one shard into row groups, adding
   the numbers; nothing is encoded twice. It deletes the staged episodes after the shard stands under its
   final name.

Then `pipelines.sealing` writes `meta/`, `info.json` last, and removes `meta/_ingest`: a folder without
`info.json` is no dataset. So killing anything at any moment loses at most the parts and shards in flight, and
the bytes of the result depend on the source and the options alone: not on the number of workers, their order
or what was interrupted.

Half a shard can stand under its final name only on an object store (see `pipelines.files`), so a shard counts
as complete only if its footer has the planned rows.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import statistics
from pipelines.dataset import filesystem_of
from pipelines.files import atomic_stream, exists, read_json, write_json
from pipelines.images import SUFFIXES, decoded_image, encoded_image, encoded_kind, fitted_size, shrunk
from pipelines.sources import (
    DEFAULT_FEATURES,
    Episode,
    Feature,
    Listing,
    Refusal,
    RefusedEpisodeError,
    Unit,
    is_camera,
    is_number,
)

PART_FRAMES = 256
"""Frames a worker stages as one part, at least one unit: some seconds of work, so that all cores are busy to
the end and a kill loses little."""
CHUNK_FILES = 1000
"""Files in a data/chunk-XXX folder; LeRobot's chunks_size."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
STAGING = "meta/_ingest"

_PART_NAME = re.compile(r"\d+\.json")

Record = dict[str, Any]
"""JSON facts of one staged episode; made by `_stage_episode`."""
Outcome = dict[str, Any]
"""JSON facts of one part: its "episodes" (records), "refusals" and "warnings" (both as `Refusal`), and the
"histograms" of the cameras over its episodes."""


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """What the stored bytes depend on besides the source."""

    image_format: str = "jpeg"
    """jpeg, png, or as_is: the source hands over encoded images, and they are stored unchanged."""
    jpeg_quality: int = 95
    resize: tuple[int, int] | None = None
    """Box (width, height) in pixels that images are shrunk into, ratio kept; never enlarged, never padded."""
    row_group_frames: int = 16
    """Consecutive frames of one episode in a row group, the unit of reading."""
    shard_bytes: int = 100 * 1024**2
    """A data file is closed before the episode that would take it past this size."""

    def __post_init__(self) -> None:
        if self.image_format not in ("jpeg", "png", "as_is"):
            raise ValueError(f"image_format {self.image_format!r} is neither 'jpeg' nor 'png'")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality {self.jpeg_quality} is not within 1..100")
        if self.resize is not None and min(self.resize) < 1:
            raise ValueError(f"resize {self.resize[0]}x{self.resize[1]} has no pixels")
        for name in ("row_group_frames", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every worker needs to write into the same dataset."""

    uri: str
    fps: int
    features: dict[str, Feature]
    """As stored: cameras after the resize, the default features last."""
    options: WriterOptions


def layout_of(uri: str, listing: Listing, options: WriterOptions) -> Layout:
    features = {name: _stored_feature(feature, options) for name, feature in listing.features.items()}
    return Layout(uri=uri, fps=listing.fps, features=features | DEFAULT_FEATURES, options=options)


def _stored_feature(feature: Feature, options: WriterOptions) -> Feature:
    if not is_camera(feature):
        return feature
    height, width, _ = feature["shape"]
    stored = fitted_size(height, width, box=options.resize) if options.resize else (height, width)
    return {"dtype": "image", "shape": [*stored, 3], "names": ["height", "width", "channels"]}


# --- stage 1: units -> staged episodes ---


def parts_of(units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
    """Cut the units, in order, into parts of at most `PART_FRAMES` frames or a single unit."""
    parts: list[list[Unit]] = []
    frames = 0
    for unit in units:
        if not parts or frames + unit.num_frames > PART_FRAMES:
            parts.append([])
            frames = 0
        parts[-1].append(unit)
        frames += unit.num_frames
    return [tuple(part) for part in parts]


def staged_parts(uri: str) -> dict[int, Outcome]:
    """Return the outcomes of the parts that an earlier run completed."""
    filesystem, root = filesystem_of(uri)
    entries = filesystem.get_file_info(pafs.FileSelector(f"{root}/{STAGING}", allow_not_found=True))
    paths = {int(e.base_name[:-5]): e.path for e in entries if _PART_NAME.fullmatch(e.base_name)}
    with ThreadPoolExecutor(16) as threads:  # an object store answers slowly, but many at once
        outcomes = threads.map(lambda path: read_json(filesystem, path), paths.values())
        return dict(zip(paths, outcomes, strict=True))


def stage_part(episodes: Iterable[Episode | Refusal], layout: Layout, *, part: int) -> Outcome:
    """Write the episodes of one part and return its outcome."""
    filesystem, root = filesystem_of(layout.uri)
    cameras = [name for name, feature in layout.features.items() if is_camera(feature)]
    histograms = {name: np.zeros((3, 256), np.int64) for name in cameras}
    records: list[Record] = []
    refusals: list[Refusal] = []
    warnings: list[Refusal] = []
    for item in episodes:
        problems = [item] if isinstance(item, Refusal) else column_refusals(item, layout.features)
        if problems or isinstance(item, Refusal):
            refusals.extend(problems)
            continue
        path = f"{STAGING}/{part:06d}-{len(records):04d}.arrow"
        encoders = {name: CameraEncoder(name, item, layout) for name in cameras}
        try:
            with atomic_stream(filesystem, f"{root}/{path}") as stream:
                record = _stage_episode(item, layout, encoders, stream)
        except RefusedEpisodeError as refused:
            refusals.append(refused.refusal)
            continue
        records.append(record | {"path": path})
        warnings.extend(_episode_warnings(item, encoders))
        for name, encoder in encoders.items():
            histograms[name] += encoder.counter.histogram()
    outcome = {
        "episodes": records,
        "refusals": [asdict(refusal) for refusal in refusals],
        "warnings": [asdict(warning) for warning in warnings],
        "histograms": {name: histogram.tolist() for name, histogram in histograms.items()},
    }
    write_json(filesystem, f"{root}/{STAGING}/{part:06d}.json", outcome, indent=None)
    return outcome


def column_refusals(episode: Episode, features: Mapping[str, Feature]) -> list[Refusal]:
    """Check what every source must give: each declared column and camera, a value per frame, no NaN."""
    length = len(episode.tasks)
    if length == 0:
        return [Refusal(episode=episode.name, reason="empty", detail="the episode has no frames")]
    cameras = [name for name, feature in features.items() if is_camera(feature)]
    problems = [
        Refusal(episode=episode.name, reason="camera_missing", detail=f"{name} is missing", camera=name)
        for name in cameras
        if name not in episode.cameras and name not in episode.encoded_cameras
    ]
    for name in stored_columns(features):
        values = episode.columns.get(name)
        problem = _column_problem(values, width=width_of(features[name]), length=length)
        if problem:
            reason, detail, frame = problem
            problems.append(
                Refusal(episode=episode.name, reason=reason, detail=f"{name} {detail}", frame=frame)
            )
    return problems


def _column_problem(
    values: np.ndarray | None, *, width: int | None, length: int
) -> tuple[str, str, int | None] | None:
    """Return (reason, detail, frame) of what forbids a column."""
    if values is None:
        return "column_missing", "is missing", None
    expected = (length,) if width is None else (length, width)
    if values.shape != expected:
        return "wrong_width", f"has shape {values.shape}, expected {expected}", None
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        frame = int(np.flatnonzero(~np.isfinite(values).reshape(length, -1).all(axis=1))[0])
        return "not_finite", f"is {values[frame].tolist()} in frame {frame}", frame
    return None


def stored_columns(features: Mapping[str, Feature]) -> list[str]:
    """Return the columns a source gives: no camera, none of the defaults."""
    return [name for name, f in features.items() if not is_camera(f) and name not in DEFAULT_FEATURES]


def width_of(feature: Feature) -> int | None:
    """Return the width of a vector; None for a column of shape [1], which LeRobot stores as a scalar."""
    return None if feature["shape"] == [1] else feature["shape"][0]


def _stage_episode(
    episode: Episode, layout: Layout, cameras: "Mapping[str, CameraEncoder]", stream: BinaryIO
) -> Record:
    """Encode and write one episode; raises `RefusedEpisodeError` if a camera is not what it should be."""
    length = len(episode.tasks)
    columns = _columns(episode, layout, length=length)
    schema = pa.schema([field for field in arrow_schema(layout.features) if field.name not in _NUMBERS])
    num_bytes = 0
    with pa.ipc.new_file(stream, schema) as writer:
        for start in range(0, length, layout.options.row_group_frames):
            stop = min(start + layout.options.row_group_frames, length)
            rows = {name: values[start:stop] for name, values in columns.items()}
            rows |= {name: camera.encoded(start, stop) for name, camera in cameras.items()}
            batch = pa.record_batch([rows[field.name] for field in schema], schema=schema)
            writer.write_batch(batch)
            num_bytes += batch.nbytes
    for camera in cameras.values():
        camera.refuse_surplus(length)
    runs = [(task, len(list(frames))) for task, frames in itertools.groupby(episode.tasks)]
    digests = {name: _digest(values) for name, values in columns.items()}
    digests |= {name: camera.digest.hexdigest() for name, camera in cameras.items()}
    stats = {
        name: statistics.row_stats(rows_of(columns[name]))
        for name in stored_columns(layout.features)
        if is_number(layout.features[name])
    }
    for name, camera in cameras.items():
        stats[name] = statistics.camera_stats(camera.counter.histogram(), num_frames=length)
    return {
        "name": episode.name,
        "length": length,
        "task_runs": runs,
        "num_bytes": num_bytes,
        "sha256": hashlib.sha256(json.dumps([runs, sorted(digests.items())]).encode()).hexdigest(),
        "stats": {name: plain_stats(entry) for name, entry in stats.items()},
        "notes": dict(episode.notes),
    }


def plain_stats(entry: statistics.Stats) -> dict[str, Any]:
    """Return the lists that JSON and Arrow take; both keep every bit of a float64."""
    return {name: values.tolist() for name, values in entry.items()}


def _episode_warnings(episode: Episode, cameras: "Mapping[str, CameraEncoder]") -> Iterator[Refusal]:
    """Yield what no episode is refused for, and a person should look at."""
    length = len(episode.tasks)
    if length == 1:
        yield Refusal(episode=episode.name, reason="one_frame_episode", detail="the episode has one frame")
    blank = next((frame for frame, task in enumerate(episode.tasks) if not task.strip()), None)
    if blank is not None:
        yield Refusal(
            episode=episode.name, reason="empty_instruction", detail="the instruction is empty", frame=blank
        )
    for name, camera in cameras.items():
        detail = camera.why_dead(length)
        if detail:
            yield Refusal(episode=episode.name, reason="dead_camera", detail=detail, camera=name)


_NUMBERS = ("episode_index", "index", "task_index")
"""The columns that only the assembly knows."""


def _columns(episode: Episode, layout: Layout, *, length: int) -> dict[str, pa.Array]:
    frame_index = np.arange(length)
    made = {"frame_index": frame_index, "timestamp": (frame_index / layout.fps).astype(np.float32)}
    given = {name: episode.columns[name] for name in stored_columns(layout.features)}
    return {name: _arrow_column(values, layout.features[name]) for name, values in (given | made).items()}


def _arrow_column(values: np.ndarray, feature: Feature) -> pa.Array:
    flat = pa.array(values.reshape(-1), type=_arrow_scalar(feature["dtype"]))
    width = width_of(feature)
    return flat if width is None else pa.FixedSizeListArray.from_arrays(flat, width)


def rows_of(column: pa.Array) -> np.ndarray:
    """Return a column of numbers as (N, D), a scalar as (N, 1)."""
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _digest(column: pa.Array) -> str:
    if pa.types.is_string(column.type):
        return hashlib.sha256(json.dumps(column.to_pylist()).encode()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(rows_of(column))).hexdigest()


class CameraEncoder:
    """Turns the frames of one camera of one episode into stored images, counting what they hold.

    The pixels of a frame are counted as they go into the encoder, since decoding every image again would cost
    as much as encoding it. For PNG those are the stored ones, for JPEG they differ by the codec's rounding:
    measured on robot videos at quality 95, by 5e-4 in mean and 6e-4 in std of [0, 1], and by at most one of
    256 levels in a quantile.
    """

    def __init__(self, name: str, episode: Episode, layout: Layout) -> None:
        self.name = name
        self.episode_name = episode.name
        given = episode.cameras if name in episode.cameras else episode.encoded_cameras
        self.frames: Iterator[np.ndarray | bytes] = iter(given[name])
        height, width, _ = layout.features[name]["shape"]
        self.stored_size = (height, width)
        self.options = layout.options
        self.counter = statistics.PixelCounter(height, width)
        self.digest = hashlib.sha256()
        self.first = b""
        """The first stored image; emptied when another one differs from it."""
        self.is_flat = True
        """Whether each frame so far is of a single colour."""

    def encoded(self, start: int, stop: int) -> pa.StructArray:
        """Return frames [start, stop) as LeRobot's struct<bytes, path>."""
        images, paths = [], []
        for number in range(start, stop):
            frame = next(self.frames, None)
            if frame is None:
                self._refuse("frames_missing", f"{number} frames, the episode has more rows", number)
            image, suffix = self._image(frame, number)
            images.append(image)
            paths.append(f"frame-{number:06d}.{suffix}")
        return pa.StructArray.from_arrays(
            [pa.array(images, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
        )

    def refuse_surplus(self, length: int) -> None:
        if next(self.frames, None) is not None:
            self._refuse("frames_surplus", f"more frames than the {length} rows of the episode", length)

    def why_dead(self, length: int) -> str | None:
        """Say why the camera of a whole episode shows nothing; None: it shows something."""
        if self.is_flat:
            return f"each of the {length} frames is of a single colour"
        if self.first and length > 1:
            return f"all {length} frames are the same image"
        return None

    def _image(self, frame: np.ndarray | bytes, number: int) -> tuple[bytes, str]:
        """Return what is stored of a frame and its suffix."""
        if isinstance(frame, bytes):
            pixels, encoded, suffix = self._decoded(frame, number)
        else:
            pixels = shrunk(frame, size=self._fitted(frame.shape[0], frame.shape[1], number))
            encoded, suffix = None, ""
        if encoded is None:
            image_format, quality = self.options.image_format, self.options.jpeg_quality
            encoded = encoded_image(pixels, image_format=image_format, jpeg_quality=quality)
            suffix = SUFFIXES[image_format.upper()]
        self.counter.add(pixels)
        self.is_flat = self.is_flat and bool((pixels == pixels[0, 0]).all())
        if number == 0:
            self.first = encoded
        elif self.first and encoded != self.first:
            self.first = b""
        self.digest.update(len(encoded).to_bytes(8, "little"))
        self.digest.update(encoded)
        return encoded, suffix

    def _decoded(self, data: bytes, number: int) -> tuple[np.ndarray, bytes | None, str]:
        """Return (pixels, stored bytes, suffix) of an encoded image; no bytes if it had to be shrunk."""
        found = encoded_kind(data)
        if found is None:
            self._refuse("image_unreadable", "neither JPEG nor PNG", number)
        suffix, size = found
        fitted = self._fitted(*size, number)
        pixels = decoded_image(data)
        if pixels is None or pixels.shape[:2] != size:
            self._refuse("image_unreadable", f"the {suffix} cannot be decoded", number)
        return shrunk(pixels, size=fitted), data if fitted == size else None, suffix

    def _fitted(self, height: int, width: int, number: int) -> tuple[int, int]:
        """Return the size that a frame is stored with, which is the declared one."""
        box = self.options.resize
        size = fitted_size(height, width, box=box) if box else (height, width)
        if size != self.stored_size:
            declared = "x".join(map(str, self.stored_size))
            self._refuse("frame_size", f"a frame of {height}x{width} does not become {declared}", number)
        return size

    def _refuse(self, reason: str, detail: str, frame: int) -> NoReturn:
        raise RefusedEpisodeError(
            Refusal(episode=self.episode_name, camera=self.name, frame=frame, reason=reason, detail=detail)
        )


# --- the Parquet schema ---


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """Return the schema of a data file, with the Hugging Face features in its metadata, as LeRobot does."""
    fields = [pa.field(name, _arrow_type(feature)) for name, feature in features.items()]
    described = {name: _hugging_face_feature(feature) for name, feature in features.items()}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": described}})})


def _arrow_type(feature: Feature) -> pa.DataType:
    if is_camera(feature):
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    width = width_of(feature)
    scalar = _arrow_scalar(feature["dtype"])
    return scalar if width is None else pa.list_(scalar, width)


def _arrow_scalar(dtype: str) -> pa.DataType:
    return pa.string() if dtype == "string" else pa.from_numpy_dtype(np.dtype(dtype))


def _hugging_face_feature(feature: Feature) -> dict[str, Any]:
    if is_camera(feature):
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    width = width_of(feature)
    return value if width is None else {"feature": value, "length": width, "_type": "List"}


# --- stage 2: staged episodes -> shards ---


@dataclass(frozen=True, kw_only=True)
class PlacedEpisode:
    """A staged episode and its final numbers."""

    staged_path: str
    length: int
    episode_index: int
    first_index: int
    """`index` of its first frame."""
    task_runs: tuple[tuple[int, int], ...]
    """(task_index, frames) in order."""
    first_row_group: int

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """The columns that the staged file lacks, each int64 (L,)."""
        task_index = [np.full(frames, task) for task, frames in self.task_runs]
        return {
            "episode_index": np.full(self.length, self.episode_index),
            "index": np.arange(self.first_index, self.first_index + self.length),
            "task_index": np.concatenate(task_index),
        }


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One data file."""

    chunk_index: int
    file_index: int
    episodes: tuple[PlacedEpisode, ...]

    @property
    def path(self) -> str:
        return DATA_PATH.format(chunk_index=self.chunk_index, file_index=self.file_index)


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """The first free numbers; other than 0 when episodes are appended."""

    episode_index: int = 0
    index: int = 0
    data_file: int = 0


def all_tasks(known: Iterable[str], records: Sequence[Record]) -> list[str]:
    """Return the task table: the known instructions, then the others in the order of the episodes."""
    met = (task for record in records for task, _ in record["task_runs"])
    return list(dict.fromkeys(itertools.chain(known, met)))


def shards_of(
    records: Sequence[Record],
    tasks: Sequence[str],
    options: WriterOptions,
    *,
    first: Numbering = Numbering(),
) -> list[Shard]:
    """Number the accepted episodes and lay them, in order, into data files."""
    task_index = {task: index for index, task in enumerate(tasks)}
    files: list[list[PlacedEpisode]] = []
    size = next_row_group = 0
    next_index = first.index
    for episode_index, record in enumerate(records, start=first.episode_index):
        if not files or size + record["num_bytes"] > options.shard_bytes:
            files.append([])
            size = next_row_group = 0
        files[-1].append(
            PlacedEpisode(
                staged_path=record["path"],
                length=record["length"],
                episode_index=episode_index,
                first_index=next_index,
                task_runs=tuple((task_index[task], frames) for task, frames in record["task_runs"]),
                first_row_group=next_row_group,
            )
        )
        size += record["num_bytes"]
        next_index += record["length"]
        next_row_group += -(-record["length"] // options.row_group_frames)
    return [
        Shard(chunk_index=number // CHUNK_FILES, file_index=number % CHUNK_FILES, episodes=tuple(episodes))
        for number, episodes in enumerate(files, start=first.data_file)
    ]


def shard_is_complete(layout: Layout, shard: Shard) -> bool:
    """Whether the data file stands with all its rows."""
    filesystem, root = filesystem_of(layout.uri)
    path = f"{root}/{shard.path}"
    if not exists(filesystem, path):
        return False
    try:
        num_rows = pq.read_metadata(path, filesystem=filesystem).num_rows
    except pa.ArrowInvalid:  # half an upload has no footer
        return False
    return num_rows == sum(episode.length for episode in shard.episodes)


def assemble_shard(layout: Layout, shard: Shard) -> None:
    """Copy the staged episodes of a shard into its data file, then delete them; may be called again."""
    filesystem, root = filesystem_of(layout.uri)
    if not shard_is_complete(layout, shard):
        with atomic_stream(filesystem, f"{root}/{shard.path}") as stream:
            _write_shard(layout, shard, stream)
    for episode in shard.episodes:
        if exists(filesystem, f"{root}/{episode.staged_path}"):
            filesystem.delete_file(f"{root}/{episode.staged_path}")


def _write_shard(layout: Layout, shard: Shard, stream: BinaryIO) -> None:
    """Write one row group for every staged record batch."""
    filesystem, root = filesystem_of(layout.uri)
    schema = arrow_schema(layout.features)
    cameras = [name for name, feature in layout.features.items() if is_camera(feature)]
    leaves = [_leaf(field) for field in schema if field.name not in cameras]
    # JPEG and PNG do not shrink further, and a plain page is read without a copy
    compression = {f"{name}.{leaf}": "NONE" for name in cameras for leaf in ("bytes", "path")}
    compression |= dict.fromkeys(leaves, "SNAPPY")
    with pq.ParquetWriter(
        stream, schema, compression=compression, use_dictionary=False, write_statistics=leaves
    ) as writer:
        for episode in shard.episodes:
            numbers = episode.numbers
            start = 0
            for batch in _staged_batches(filesystem, f"{root}/{episode.staged_path}"):
                stop = start + len(batch)
                rows = {name: pa.array(values[start:stop]) for name, values in numbers.items()}
                rows |= {name: batch[name] for name in batch.schema.names}
                table = pa.table([rows[name] for name in schema.names], schema=schema)
                writer.write_table(table, row_group_size=len(batch))
                start = stop


def _leaf(field: pa.Field) -> str:
    """Return a column's name as Parquet's writer options want it."""
    return f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name


def _staged_batches(filesystem: pafs.FileSystem, path: str) -> Iterator[pa.RecordBatch]:
    with filesystem.open_input_file(path) as stream:
        reader = pa.ipc.open_file(stream)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
