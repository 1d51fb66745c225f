"""LeRobot datasets as a source: v2.0, v2.1 and v3.0, cameras as video files or as images inside the Parquet.

A unit is one episode; a worker reads a run of them and passes over each video file once, seeking at most to
where its run begins. Every frame is matched to its own presentation time, so that neither a lost frame nor a
gap in the episode numbers can shift a picture against its row. `L` frames of an episode.

v2: a Parquet file and a video per camera for every episode, t_video = timestamp.
v3: files hold many episodes, t_video = from_timestamp + timestamp, the offsets stand in the episode table.

`lerobot_metadata` reads `meta/`, `lerobot_video` the videos, `lerobot_images` the images in the data files;
here the rows are read and compared with what the metadata says.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.sources import DEFAULT_FEATURES, Episode, Feature, Listing, Refusal, Unit
from pipelines.sources.lerobot_images import stored_frames
from pipelines.sources.lerobot_metadata import (
    Clip,
    Facts,
    FlawError,
    Recording,
    read_facts,
    read_recordings,
    shared_footage,
)
from pipelines.sources.lerobot_video import Videos
from pipelines.sources.mapping import SourceMapping
from pipelines.sources.storage import StorageError
from pipelines.sources.vectors import keys_of, vector_columns

MAX_VALUES = 128_000_000
"""Numbers read at once, 1 GB as float64: those of one v2 file, or of the row groups around a v3 episode."""

OPTIONAL = ("frame_index",)
"""Checked where it is there, needed where it is declared."""


@dataclass(frozen=True, kw_only=True)
class LeRobotSource:
    """A LeRobot dataset in a local folder, an object store or on the Hub."""

    uri: str
    """Folder, URI or Hub id, see `storage.folder_of`."""
    mapping: SourceMapping = field(default_factory=SourceMapping)
    """What is state, action, camera and instruction in a dataset with names of its own."""
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps, and a frame of a video from where the first frame
    puts it; LeRobot's own default."""
    follow_links: bool = False
    """Whether links may lead out of a local dataset."""

    def listing(self) -> Listing:
        if not 0 <= self.tolerance_s < float("inf"):
            raise ValueError(f"tolerance_s {self.tolerance_s} is not a number of seconds from 0 on")
        try:
            return self._listing()
        except StorageError as error:
            raise ValueError(str(error)) from None

    def _listing(self) -> Listing:
        facts = self.facts
        recordings = read_recordings(facts)
        sizes = _file_sizes(facts, recordings)
        _check_columns_exist(facts, recordings, sizes)
        listed = [
            facts.info,
            sorted(facts.tasks.items()),
            [asdict(recording) for recording in recordings],
            sorted(sizes.items()),
        ]
        given_task = () if facts.task is None else (facts.task,)
        return Listing(
            fps=facts.fps,
            robot_type=facts.robot_type,
            features=facts.features,
            tasks=given_task or tuple(dict.fromkeys(facts.tasks[index] for index in sorted(facts.tasks))),
            units=tuple(
                Unit(name=str(r.index), num_episodes=1, num_frames=r.length, detail=r) for r in recordings
            ),
            identity={
                "format": "lerobot",
                "codebase_version": facts.version,
                "tolerance_s": self.tolerance_s,
                "mapping": self.mapping.as_json(),
                "digest": hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest(),
            },
            location=self.uri,
            warnings=(
                *facts.warnings,
                *_wrong_totals(facts, recordings),
                *shared_footage(recordings, fps=facts.fps),
            ),
        )

    @cached_property
    def facts(self) -> Facts:
        """Read once, in the driver; workers receive it with the source."""
        return read_facts(self.uri, self.mapping, follow_links=self.follow_links)

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        with (
            contextlib.closing(_Tables(self.facts)) as tables,
            contextlib.closing(Videos(self.facts, tolerance_s=self.tolerance_s)) as videos,
        ):
            for unit in units:
                rows = _checked_rows(tables, unit.detail, facts=self.facts, tolerance_s=self.tolerance_s)
                if isinstance(rows, list):
                    yield from rows
                else:
                    yield self._episode(unit.detail, rows, videos)

    def _episode(self, recording: Recording, rows: "_Rows", videos: Videos) -> Episode:
        facts = self.facts
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which the writer refuses
            vectors = vector_columns(facts.vectors, rows.columns)
        return Episode(
            name=str(recording.index),
            tasks=_instructions(facts, rows),
            columns=vectors | {name: rows.columns[name] for name in facts.kept},
            cameras={
                camera: videos.frames(camera, recording, rows.columns["timestamp"])
                if key in recording.clips
                else stored_frames(facts, recording, camera, first_row=rows.first)
                for camera, key in facts.cameras.items()
            },
        )


def _instructions(facts: Facts, rows: "_Rows") -> list[str]:
    if facts.task is not None:
        return [facts.task] * rows.length
    found = rows.columns[facts.task_key].tolist()
    return [facts.tasks[index] for index in found] if facts.tasks_are_numbered else found


# --- what the listing checks beside the metadata ---


def _file_sizes(facts: Facts, recordings: Sequence[Recording]) -> dict[str, int | None]:
    """Return the size of every file that is named, None where it does not exist.

    Raises:
        ValueError: of the data or of a camera not one file exists: a wrong template or an incomplete
        download.
    """
    kinds = {"data": {recording.data_path for recording in recordings}}
    kinds |= {video: {clip.path for clip in _clips_of(video, recordings)} for video in facts.videos}
    sizes = facts.folder.sizes(sorted(set().union(*kinds.values())))
    for kind, paths in kinds.items():
        if all(sizes[path] is None for path in paths):
            what = "data" if kind == "data" else f"camera {kind!r}"
            such_as = f", such as {min(paths)}" if paths else ""
            hint = "" if kind == "data" else "; --mapping takes other cameras"
            raise ValueError(
                f"{facts.folder.uri}: none of the {len(paths)} files of {what} exists{such_as}{hint}"
            )
    return sizes


def _clips_of(video: str, recordings: Sequence[Recording]) -> Iterator[Clip]:
    return (clip for recording in recordings if (clip := recording.clips[video]) is not None)


def _check_columns_exist(
    facts: Facts, recordings: Sequence[Recording], sizes: Mapping[str, int | None]
) -> None:
    """Refuse the dataset if its first, middle and last file lack a column; one file is an episode's fault."""
    paths = [path for path in dict.fromkeys(r.data_path for r in recordings) if sizes[path] is not None]
    sample = {paths[0], paths[len(paths) // 2], paths[-1]}
    wanted = [*facts.columns, *facts.images]
    missing = set(wanted)
    for path in sorted(sample):
        try:
            with pq.ParquetFile(facts.folder.open(path)) as file:
                missing &= set(wanted) - set(file.schema_arrow.names)
        except (pa.ArrowException, OSError):
            continue  # its episodes will be refused
    if missing:
        name = next(name for name in wanted if name in missing)
        raise ValueError(f"{facts.folder.uri}: the data files have no column {name!r}, such as {min(sample)}")


def _wrong_totals(facts: Facts, recordings: Sequence[Recording]) -> Iterator[str]:
    counted = {
        "total_episodes": len(recordings),
        "total_frames": sum(recording.length for recording in recordings),
    }
    for name, number in counted.items():
        if name in facts.info and facts.info[name] != number:
            yield f"info.json: {name} is {facts.info[name]}, the episode table has {number}"


# --- rows ---


class _Problems:
    """Collects what is wrong with one episode."""

    def __init__(self, recording: Recording) -> None:
        self.episode = str(recording.index)
        self.found: list[Refusal] = []

    def add(self, reason: str, detail: str, *, frame: int | None = None, camera: str | None = None) -> None:
        self.found.append(
            Refusal(episode=self.episode, reason=reason, detail=detail, frame=frame, camera=camera)
        )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    columns: dict[str, np.ndarray]
    length: int
    first: int
    """Row of the data file at which the episode begins."""


class _Tables:
    """The data file that is open, and the rows read last: episodes of one v3 file follow each other."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.path = ""
        self.file: pq.ParquetFile | None = None
        self.groups: range | None = None
        """Row groups that `table` holds."""
        self.table = pa.table({})

    def open(self, path: str) -> pq.ParquetFile:
        if self.file is None or path != self.path:
            self.close()
            stream = self.facts.folder.open(path)
            metadata = pq.read_metadata(stream)
            texts = [name for name in self.facts.columns if self.facts.declared[name]["dtype"] == "string"]
            self.file = pq.ParquetFile(
                stream,
                metadata=metadata,
                pre_buffer=True,
                page_checksum_verification=True,
                # a few bytes can stand for a long text repeated millions of times
                read_dictionary=[metadata.schema.column(leaf).path for leaf in _leaves(metadata, texts)],
            )
            self.path = path
        return self.file

    def rows(self, recording: Recording) -> tuple[pa.Table, int]:
        """Return the rows of an episode, images left out, and the first one's position in the file.

        Where they are not contiguous, the span from the first to the last is returned, and its episode_index
        shows the strangers.
        """
        file = self.open(recording.data_path)
        if self.facts.version != "v3.0":
            if file.metadata.num_rows != recording.length:
                raise FlawError("row_count", _wrong_length(file.metadata.num_rows, recording))
            return self._read(file, range(file.num_row_groups)), 0
        groups = _row_groups(file.metadata, recording.index)
        table = self._read(file, groups)
        index = _values(table["episode_index"].combine_chunks(), DEFAULT_FEATURES["episode_index"])
        (positions,) = np.nonzero(index == recording.index)
        if len(positions) == 0:
            return table.slice(0, 0), 0
        start, stop = int(positions[0]), int(positions[-1]) + 1
        before = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        return table.slice(start, stop - start), before + start

    def _read(self, file: pq.ParquetFile, groups: range) -> pa.Table:
        if groups != self.groups:
            self.groups = None  # should reading fail
            wanted = list(self.facts.columns)
            wanted += [name for name in OPTIONAL if name in file.schema_arrow.names and name not in wanted]
            num_values = _num_values(file.metadata, groups, wanted)
            if num_values > MAX_VALUES:
                raise FlawError("data_too_large", f"{num_values} values at once, at most {MAX_VALUES}")
            self.table = file.read_row_groups(list(groups), columns=wanted).select(wanted)
            self.groups = groups
        return self.table

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = self.groups = None


def _num_values(metadata: pq.FileMetaData, groups: range, names: Sequence[str]) -> int:
    leaves = _leaves(metadata, names)
    return sum(metadata.row_group(group).column(leaf).num_values for group in groups for leaf in leaves)


def _row_groups(metadata: pq.FileMetaData, episode_index: int) -> range:
    """Return the row groups between which the rows of an episode must lie, as far as statistics tell."""
    (leaf, *_) = _leaves(metadata, ["episode_index"])
    found = []
    for group in range(metadata.num_row_groups):
        known = metadata.row_group(group).column(leaf).statistics
        if known is None or not known.has_min_max or _within(episode_index, known.min, known.max):
            found.append(group)
    return range(found[0], found[-1] + 1) if found else range(0)


def _within(number: int, least: object, most: object) -> bool:
    """Whether a number may lie within the limits; those of a column of texts tell nothing."""
    return not (isinstance(least, int) and isinstance(most, int)) or least <= number <= most


def _leaves(metadata: pq.FileMetaData, names: Sequence[str]) -> list[int]:
    """Return the Parquet columns that belong to columns of the table, whose names may hold dots."""
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    return [
        leaf
        for leaf, path in enumerate(paths)
        if any(path == name or path.startswith(f"{name}.") for name in names)
    ]


def _wrong_length(num_rows: int, recording: Recording) -> str:
    return f"{num_rows} rows, the episode table says {recording.length}"


def _checked_rows(
    tables: _Tables, recording: Recording, *, facts: Facts, tolerance_s: float
) -> _Rows | list[Refusal]:
    """Return an episode's columns, or everything that is wrong with them."""
    problems = _Problems(recording)
    _check_clips(recording, facts=facts, problems=problems)
    try:
        if not _has_columns(tables, recording, facts=facts, problems=problems):
            return problems.found
        table, first = tables.rows(recording)
    except FlawError as flaw:
        problems.add(flaw.reason, f"{recording.data_path}: {flaw.detail}")
        return problems.found
    except FileNotFoundError:
        problems.add("data_missing", f"{recording.data_path} does not exist")
        return problems.found
    except (pa.ArrowException, OSError) as error:
        problems.add("data_unreadable", f"{recording.data_path}: {error}")
        return problems.found
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = _values(table[name].combine_chunks(), _as_read(name, facts))
        except FlawError as flaw:
            problems.add(flaw.reason, f"{name}: {flaw.detail}", frame=flaw.frame)
    _check_numbering(columns, len(table), recording, facts=facts, tolerance_s=tolerance_s, problems=problems)
    return problems.found or _Rows(columns=columns, length=len(table), first=first)


def _has_columns(tables: _Tables, recording: Recording, *, facts: Facts, problems: _Problems) -> bool:
    """Note every column that is missing, is there twice, or holds no images where images are declared."""
    schema = tables.open(recording.data_path).schema_arrow
    before = len(problems.found)
    for name in (*facts.columns, *facts.images):
        camera = next((camera for camera, key in facts.cameras.items() if key == name), None)
        detail = f"{recording.data_path}: column {name!r}"
        if schema.names.count(name) != 1:
            reason = "column_duplicated" if name in schema.names else "column_missing"
            problems.add(reason, detail, camera=camera)
        elif camera and not _holds_images(schema.field(name).type):
            problems.add("wrong_dtype", f"{detail} is {schema.field(name).type}", camera=camera)
    return len(problems.found) == before


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _as_read(name: str, facts: Facts) -> Feature:
    """Return what a column must hold; parts of state and action become float32, whatever is declared."""
    declared = facts.declared[name]
    return declared | {"dtype": "float64"} if name in keys_of(facts.vectors) else declared


def _values(column: pa.Array, feature: Feature) -> np.ndarray:
    """Return a column as (L, D), or (L,) of a number or a text, in its declared dtype."""
    width = None if feature["shape"] == [1] else feature["shape"][0]
    flat = _flat(column, width)
    if feature["dtype"] == "string":
        return _texts(flat)
    values = _numbers(flat, np.dtype(feature["dtype"]))
    return values if width is None else values.reshape(-1, width)


def _flat(column: pa.Array, width: int | None) -> pa.Array:
    """Return all values one after the other; LeRobot writes shape [1] as numbers, others as lists of one."""
    _refuse_nulls(column, 1)
    if not _is_list(column.type):
        if width is not None:
            raise FlawError("wrong_width", f"{column.type}, declared vectors of {width}", 0)
        return column
    lengths = pc.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != (width or 1))
    if len(wrong):
        frame = int(wrong[0])
        raise FlawError(
            "wrong_width", f"{lengths[frame]} values in frame {frame}, declared {width or 1}", frame
        )
    flat = column.flatten()
    _refuse_nulls(flat, width or 1)
    return flat


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _refuse_nulls(flat: pa.Array, width: int) -> None:
    if flat.null_count:
        frame = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise FlawError("null_value", f"a value is missing in frame {frame}", frame)


def _texts(flat: pa.Array) -> np.ndarray:
    if not pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_encode()
    kind = flat.type.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise FlawError("wrong_dtype", f"{kind}, declared string", 0)
    texts = np.array(flat.dictionary.to_pylist(), dtype=object)
    return texts[flat.indices.to_numpy(zero_copy_only=False)]  # each text once in memory


def _numbers(flat: pa.Array, dtype: np.dtype) -> np.ndarray:
    """Convert; a float may be rounded to a shorter one, everything else must keep its value."""
    kind = flat.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise FlawError("wrong_dtype", f"{kind}, declared {dtype}", 0)
    given = flat.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite and changed values are refused by name
        values = given.astype(dtype)
    if dtype.kind != "f" and (values != given).any():
        frame = int(np.flatnonzero(values != given)[0])
        raise FlawError("wrong_dtype", f"{given[frame]} in frame {frame} is no {dtype}", frame)
    return values


def _check_numbering(
    columns: Mapping[str, np.ndarray],
    num_rows: int,
    recording: Recording,
    *,
    facts: Facts,
    tolerance_s: float,
    problems: _Problems,
) -> None:
    """Compare rows with what the episode table and the frame rate say."""
    if num_rows == recording.length == 0:
        problems.add("empty", "the episode has no frames")
    if num_rows != recording.length:
        problems.add("row_count", _wrong_length(num_rows, recording))
    frames = np.arange(num_rows)
    due_s = frames / facts.fps
    # one float32 step on top of the tolerance: a timestamp cannot be written more exactly
    allowed_s = tolerance_s + np.spacing(due_s.astype(np.float32))
    checks = {
        "frame_index": ("frame_index_gap", lambda values: values != frames),
        "episode_index": ("episode_index_wrong", lambda values: values != recording.index),
        # a NaN is not within the tolerance, either
        "timestamp": (
            "timestamp_off_fps",
            lambda values: ~(np.abs(values.astype(np.float64) - due_s) <= allowed_s),
        ),
    }
    if facts.tasks_are_numbered:
        known = list(facts.tasks)
        checks[facts.task_key] = ("task_unknown", lambda values: ~np.isin(values, known))
    for name, (reason, is_wrong) in checks.items():
        if name not in columns:
            continue  # refused already, or not there and not needed
        wrong = is_wrong(columns[name])
        if wrong.any():
            frame = int(np.flatnonzero(wrong)[0])
            problems.add(
                reason,
                f"{name} is {columns[name][frame]} in row {frame}, {wrong.sum()} rows are wrong",
                frame=frame,
            )


def _check_clips(recording: Recording, *, facts: Facts, problems: _Problems) -> None:
    for camera, key in facts.cameras.items():
        if key not in recording.clips:
            continue
        clip = recording.clips[key]
        if clip is None:
            problems.add("video_missing", "the episode table has no place for it", camera=camera)
        elif clip.to_s is not None:
            span = (clip.to_s - clip.from_s) * facts.fps
            if not abs(span - recording.length) <= 0.5:
                problems.add(
                    "video_span",
                    f"{clip.path}: a span of {span:.2f} frames for {recording.length} rows",
                    camera=camera,
                )
