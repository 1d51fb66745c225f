"""LeRobot datasets as a source: v2.0, v2.1 and v3.0, cameras as video files or as images inside the Parquet.

Paths always come from the templates in `info.json`. A unit is one episode; a worker reads a run of them and
passes over each video file once, seeking at most to where its run begins. Every frame is matched to its own
presentation time, so that neither a lost frame nor a gap in the episode numbers can shift a picture against
its row.

v2: a Parquet file and a video per camera for every episode, t_video = timestamp.
v3: files hold many episodes, t_video = from_timestamp + timestamp, the offsets stand in the episode table.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from pipelines.dataset import filesystem_of
from pipelines.sources import (
    DEFAULT_FEATURES,
    Episode,
    Feature,
    Listing,
    Refusal,
    RefusedEpisodeError,
    Unit,
    is_camera,
)

VERSIONS = ("v2.0", "v2.1", "v3.0")
CHECKED_COLUMNS = ("timestamp", "frame_index", "episode_index", "task_index")
"""Default columns that are compared with what they must be; `index` follows from them."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Where an episode lies in a video file."""

    path: str
    from_s: float
    to_s: float | None
    """None in v2, where the file is the episode."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What the episode table says of one episode; paths are relative to the dataset."""

    index: int
    length: int
    data_path: str
    clips: Mapping[str, Clip]


@dataclass(frozen=True, kw_only=True)
class LeRobotSource:
    """A LeRobot dataset in a local folder or an object store."""

    uri: str
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps; LeRobot's own default."""

    def listing(self) -> Listing:
        if self.tolerance_s < 0:
            raise ValueError(f"tolerance_s {self.tolerance_s} is negative")
        facts = self.facts
        recordings = _recordings(facts)
        sizes = _file_sizes(facts, recordings)
        _check_columns_exist(facts, recordings, sizes)
        warnings = list(facts.warnings)
        total = facts.info.get("total_episodes")
        if total != len(recordings):
            warnings.append(f"info.json: total_episodes is {total}, the episode table has {len(recordings)}")
        listed = [
            facts.info,
            sorted(facts.tasks.items()),
            [asdict(r) for r in recordings],
            sorted(sizes.items()),
        ]
        return Listing(
            fps=facts.fps,
            robot_type=facts.info.get("robot_type"),
            features=facts.features,
            tasks=tuple(dict.fromkeys(facts.tasks[index] for index in sorted(facts.tasks))),
            units=tuple(
                Unit(name=str(r.index), num_episodes=1, num_frames=r.length, detail=r) for r in recordings
            ),
            identity={
                "format": "lerobot",
                "codebase_version": facts.version,
                "tolerance_s": self.tolerance_s,
                "digest": hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest(),
            },
            location=self.uri,
            warnings=tuple(warnings),
        )

    @cached_property
    def facts(self) -> "Facts":
        """Read once, in the driver; workers receive it with the source."""
        return _facts(self.uri)

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        tables = _Tables(self.facts)
        videos = _Videos(self.facts)
        for unit in units:
            recording: Recording = unit.detail
            rows = _checked_rows(tables, recording, facts=self.facts, tolerance_s=self.tolerance_s)
            if isinstance(rows, list):
                yield from rows
                continue
            yield Episode(
                name=unit.name,
                tasks=[self.facts.tasks[index] for index in rows.columns["task_index"].tolist()],
                columns={name: rows.columns[name] for name in self.facts.given_columns},
                cameras={
                    name: videos.frames(name, recording, rows.columns["timestamp"])
                    if name in recording.clips
                    else _stored_frames(self.facts, recording, name, first_row=rows.first)
                    for name in self.facts.cameras
                },
            )
        videos.close()


# --- metadata ---


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The dataset-level metadata, checked."""

    uri: str
    """As the user wrote it, for messages."""
    place: tuple[pafs.FileSystem, str]
    """The file system, and the dataset's absolute path in it; a worker may stand in another folder."""
    info: dict[str, Any]
    version: str
    fps: int
    features: dict[str, Feature]
    videos: tuple[str, ...]
    """The cameras that are video files."""
    tasks: dict[int, str]
    warnings: tuple[str, ...]

    @property
    def cameras(self) -> list[str]:
        return [name for name, feature in self.features.items() if is_camera(feature)]

    @property
    def given_columns(self) -> list[str]:
        """Columns that are handed on, apart from the cameras."""
        return [name for name, feature in self.features.items() if not is_camera(feature)]


def _facts(uri: str) -> Facts:
    filesystem, root = filesystem_of(uri)
    where = f"{uri}/meta/info.json"
    try:
        info = _parsed_json(_read(filesystem, f"{root}/meta/info.json"), where=where)
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist, so {uri} is no LeRobot dataset") from None
    for field in ("codebase_version", "fps", "features", "data_path"):
        if field not in info:
            raise ValueError(f"{where}: field {field!r} is missing")
    version, fps = str(info["codebase_version"]), info["fps"]
    if version not in VERSIONS:
        raise ValueError(f"{where}: codebase_version {version!r} is none of {', '.join(VERSIONS)}")
    if not isinstance(fps, int | float) or fps <= 0 or fps != int(fps):
        raise ValueError(f"{where}: fps {fps!r} is not a positive whole number")
    features, warnings = _features(info["features"], where=where)
    videos = tuple(name for name in features if info["features"][name]["dtype"] == "video")
    if videos and not info.get("video_path"):
        raise ValueError(f"{where}: video_path is missing, but {videos[0]!r} is a video")
    return Facts(
        uri=uri,
        place=(filesystem, root),
        info=info,
        version=version,
        fps=int(fps),
        features=features,
        videos=videos,
        tasks=_tasks(filesystem, root, uri=uri, version=version),
        warnings=tuple(warnings),
    )


def _features(declared: dict[str, Any], *, where: str) -> tuple[dict[str, Feature], list[str]]:
    """Return the features that are taken, as in `Listing.features`, and a warning for every other one."""
    for name in ("observation.state", "action"):
        if name not in declared:
            raise ValueError(f"{where}: features has no {name!r}, it has {', '.join(declared)}")
    features: dict[str, Feature] = {}
    warnings = []
    for name, feature in declared.items():
        if name in DEFAULT_FEATURES:
            continue
        if not {"dtype", "shape"} <= feature.keys():
            raise ValueError(f"{where}: feature {name!r} has no dtype or no shape")
        reason = _unsupported(feature)
        if reason:
            warnings.append(f"feature {name!r} is left out: {reason}")
        elif feature["dtype"] in ("video", "image"):
            features[name] = _camera(name, feature, where=where)
        else:
            # float64 states and actions exist; training is float32, and so is LeRobot's own recording
            dtype = "float32" if name in ("observation.state", "action") else feature["dtype"]
            features[name] = {"dtype": dtype, "shape": list(feature["shape"]), "names": feature.get("names")}
    return features, warnings


def _unsupported(feature: dict[str, Any]) -> str | None:
    dtype, shape = feature["dtype"], feature["shape"]
    if dtype in ("video", "image"):
        info = feature.get("info") or feature.get("video_info") or {}
        return "it is a depth map" if info.get("video.is_depth_map") or info.get("is_depth_map") else None
    if dtype == "string":
        return None if list(shape) == [1] else f"strings of shape {shape}"
    if dtype != "bool" and not dtype.startswith(("float", "int", "uint")):
        return f"dtype {dtype!r}"
    return None if len(shape) == 1 else f"shape {shape} is neither a number nor a vector"


def _camera(name: str, feature: dict[str, Any], *, where: str) -> Feature:
    """Return height and width from either order of the axes; the names tell which, as in LeRobot."""
    shape = list(feature["shape"])
    if len(shape) != 3:
        raise ValueError(f"{where}: camera {name!r} has shape {shape}, not three axes")
    names = feature.get("names") or []
    channels_first = names[0].startswith("channel") if len(names) == 3 else shape[2] not in (1, 3)
    height, width = shape[1:] if channels_first else shape[:2]
    return {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def _tasks(filesystem: pafs.FileSystem, root: str, *, uri: str, version: str) -> dict[int, str]:
    name = "meta/tasks.parquet" if version == "v3.0" else "meta/tasks.jsonl"
    try:
        if version != "v3.0":
            rows = _json_lines(filesystem, root, name, uri=uri, fields=("task_index", "task"))
            return {row["task_index"]: row["task"] for row in rows}
        table = pq.read_table(f"{root}/{name}", filesystem=filesystem)
    except FileNotFoundError:
        raise ValueError(f"{uri}/{name} does not exist") from None
    # pandas names the column of an unnamed index so; many real datasets have it
    text = next((column for column in ("task", "__index_level_0__") if column in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise ValueError(f"{uri}/{name}: needs the columns task_index and task, it has {table.column_names}")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _recordings(facts: Facts) -> list[Recording]:
    rows = _v3_episodes(facts) if facts.version == "v3.0" else _v2_episodes(facts)
    recordings = sorted(rows, key=lambda recording: recording.index)
    if not recordings:
        raise ValueError(f"{facts.uri}: the episode table is empty")
    for before, after in itertools.pairwise(recordings):
        if before.index == after.index:
            raise ValueError(f"{facts.uri}: the episode table lists episode_index {after.index} twice")
    return recordings


def _v2_episodes(facts: Facts) -> Iterator[Recording]:
    filesystem, root = facts.place
    name = "meta/episodes.jsonl"
    try:
        rows = _json_lines(filesystem, root, name, uri=facts.uri, fields=("episode_index", "length"))
    except FileNotFoundError:
        raise ValueError(f"{facts.uri}/{name} does not exist") from None
    chunks_size = facts.info.get("chunks_size", 1000)
    for row in rows:
        index = row["episode_index"]
        keys = {"episode_chunk": index // chunks_size, "episode_index": index}
        yield Recording(
            index=index,
            length=row["length"],
            data_path=_path(facts, "data_path", **keys),
            clips={
                video: Clip(path=_path(facts, "video_path", video_key=video, **keys), from_s=0.0, to_s=None)
                for video in facts.videos
            },
        )


def _v3_episodes(facts: Facts) -> Iterator[Recording]:
    filesystem, root = facts.place
    selector = pafs.FileSelector(f"{root}/meta/episodes", recursive=True, allow_not_found=True)
    paths = sorted(entry.path for entry in filesystem.get_file_info(selector) if entry.extension == "parquet")
    if not paths:
        raise ValueError(f"{facts.uri}: no meta/episodes/*/*.parquet")
    clip_fields = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{video}/{field}" for video in facts.videos for field in clip_fields]
    for path in paths:
        missing = set(columns) - set(pq.read_schema(path, filesystem=filesystem).names)
        if missing:
            raise ValueError(
                f"{facts.uri}: {path.removeprefix(f'{root}/')}: column {min(missing)!r} is missing"
            )
        for row in pq.read_table(path, columns=columns, filesystem=filesystem).to_pylist():
            yield Recording(
                index=row["episode_index"],
                length=row["length"],
                data_path=_path(facts, "data_path", **_file_keys(row, "data")),
                clips={
                    video: Clip(
                        path=_path(
                            facts, "video_path", video_key=video, **_file_keys(row, f"videos/{video}")
                        ),
                        from_s=row[f"videos/{video}/from_timestamp"],
                        to_s=row[f"videos/{video}/to_timestamp"],
                    )
                    for video in facts.videos
                },
            )


def _file_keys(row: dict[str, Any], prefix: str) -> dict[str, int]:
    return {field: row[f"{prefix}/{field}"] for field in ("chunk_index", "file_index")}


def _path(facts: Facts, template: str, **keys: Any) -> str:
    """Fill in a template of info.json; the result stays within the dataset."""
    try:
        path = facts.info[template].format(**keys)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{facts.uri}/meta/info.json: {template} {facts.info[template]!r} cannot be filled in from "
            f"{', '.join(keys)}: {error}"
        ) from None
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{facts.uri}/meta/info.json: {template} leads out of the dataset: {path!r}")
    return path


def _file_sizes(facts: Facts, recordings: Sequence[Recording]) -> dict[str, int | None]:
    """Return the size of every file that is named, None where it does not exist.

    Raises:
        ValueError: of the data or of a camera not one file exists: a wrong template or an incomplete
        download.
    """
    filesystem, root = facts.place
    kinds = {"data": {recording.data_path for recording in recordings}}
    kinds |= {video: {recording.clips[video].path for recording in recordings} for video in facts.videos}
    sizes: dict[str, int | None] = {}
    for kind, paths in kinds.items():
        names = sorted(paths)
        entries = filesystem.get_file_info([f"{root}/{name}" for name in names])
        found = {name: entry.size for name, entry in zip(names, entries, strict=True)}
        if all(size is None for size in found.values()):
            what = "data" if kind == "data" else f"camera {kind!r}"
            raise ValueError(
                f"{facts.uri}: none of the {len(names)} files of {what} exists, such as {names[0]}"
            )
        sizes |= found
    return sizes


def _check_columns_exist(
    facts: Facts, recordings: Sequence[Recording], sizes: Mapping[str, int | None]
) -> None:
    """Refuse the dataset if its first, middle and last file lack a column; one file is an episode's fault."""
    filesystem, root = facts.place
    paths = [path for path in dict.fromkeys(r.data_path for r in recordings) if sizes[path] is not None]
    sample = {paths[0], paths[len(paths) // 2], paths[-1]}
    wanted = [*CHECKED_COLUMNS, *(name for name in facts.features if name not in facts.videos)]
    missing = set(wanted)
    for path in sorted(sample):
        try:
            missing &= set(wanted) - set(pq.read_schema(f"{root}/{path}", filesystem=filesystem).names)
        except pa.ArrowInvalid:
            continue
    if missing:
        name = next(name for name in wanted if name in missing)
        raise ValueError(f"{facts.uri}: the data files have no column {name!r}, such as {min(sample)}")


def _read(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def _parsed_json(text: bytes, *, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


def _json_lines(
    filesystem: pafs.FileSystem, root: str, name: str, *, uri: str, fields: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read(filesystem, f"{root}/{name}").splitlines(), start=1):
        if not line.strip():
            continue
        row = _parsed_json(line, where=f"{uri}/{name}:{number}")
        for field in fields:
            if field not in row:
                raise ValueError(f"{uri}/{name}:{number}: field {field!r} is missing")
        rows.append(row)
    return rows


# --- rows ---


class _Tables:
    """The columns of the data file used last, without images: episodes of one v3 file follow each other."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.path = ""
        self.table = pa.table({})

    def read(self, path: str) -> pa.Table:
        if path != self.path:
            filesystem, root = self.facts.place
            with pq.ParquetFile(filesystem.open_input_file(f"{root}/{path}")) as file:
                wanted = {*CHECKED_COLUMNS, *self.facts.given_columns}
                self.table = file.read(columns=[name for name in file.schema_arrow.names if name in wanted])
            self.path = path
        return self.table


@dataclass(frozen=True, kw_only=True)
class _Rows:
    columns: dict[str, np.ndarray]
    first: int
    """Row of the data file at which the episode begins."""


class _Problems:
    """Collects what is wrong with one episode."""

    def __init__(self, recording: Recording) -> None:
        self.episode = str(recording.index)
        self.found: list[Refusal] = []

    def add(self, reason: str, detail: str, *, frame: int | None = None, camera: str | None = None) -> None:
        self.found.append(
            Refusal(episode=self.episode, reason=reason, detail=detail, frame=frame, camera=camera)
        )


def _checked_rows(
    tables: _Tables, recording: Recording, *, facts: Facts, tolerance_s: float
) -> _Rows | list[Refusal]:
    """Return an episode's columns, or everything that is wrong with them."""
    problems = _Problems(recording)
    _check_clips(recording, facts=facts, problems=problems)
    table = _table_of(tables, recording, facts=facts, problems=problems)
    if table is None:
        return problems.found
    first = 0
    if facts.version == "v3.0":
        table, first = _rows_of(table, recording.index)
    columns = {}
    for name in table.column_names:
        feature = DEFAULT_FEATURES.get(name) or facts.features[name]
        values = _values(table[name].combine_chunks(), feature)
        if isinstance(values, np.ndarray):
            columns[name] = values
        else:
            reason, detail, frame = values
            problems.add(reason, f"{name}: {detail}", frame=frame)
    if columns.keys() >= set(CHECKED_COLUMNS):
        _check_numbering(columns, recording, facts=facts, tolerance_s=tolerance_s, problems=problems)
    return problems.found or _Rows(columns=columns, first=first)


def _table_of(tables: _Tables, recording: Recording, *, facts: Facts, problems: _Problems) -> pa.Table | None:
    """Return the data file with each wanted column once; None with the reason noted."""
    path = recording.data_path
    try:
        table = tables.read(path)
    except FileNotFoundError:
        problems.add("data_missing", f"{path} does not exist")
        return None
    except pa.ArrowInvalid as error:
        problems.add("data_unreadable", f"{path}: {error}")
        return None
    names = table.column_names
    flawed = [name for name in (*CHECKED_COLUMNS, *facts.given_columns) if names.count(name) != 1]
    for name in flawed:
        reason = "column_duplicated" if name in names else "column_missing"
        problems.add(reason, f"{path}: column {name!r}")
    return None if flawed else table


def _rows_of(table: pa.Table, episode_index: int) -> tuple[pa.Table, int]:
    """Return the rows of one episode and the first one's position; they are contiguous in a good file.

    Where they are not, the span from the first to the last is returned, and its episode_index shows the
    strangers.
    """
    (positions,) = np.nonzero(table["episode_index"].to_numpy() == episode_index)
    if len(positions) == 0:
        return table.slice(0, 0), 0
    first = int(positions[0])
    return table.slice(first, int(positions[-1]) - first + 1), first


def _values(column: pa.Array, feature: Feature) -> np.ndarray | tuple[str, str, int]:
    """Return a column as (L, D) or (L,) of its declared dtype, or (reason, detail, frame) of a flaw."""
    if column.null_count:
        frame = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        return "null_value", f"no value in frame {frame}", frame
    if feature["dtype"] == "string":
        return np.array(column.to_pylist(), dtype=object)
    width = None if feature["shape"] == [1] else feature["shape"][0]
    if _is_list(column.type):
        # LeRobot writes shape [1] as a number, others as a list of one
        lengths = pc.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != (width or 1))
        if len(wrong):
            frame = int(wrong[0])
            return "wrong_width", f"{lengths[frame]} values in frame {frame}, declared {width or 1}", frame
        column = column.flatten()
        if column.null_count:
            flat = column.is_null().to_numpy(zero_copy_only=False).reshape(-1, width or 1)
            frame = int(np.flatnonzero(flat.any(axis=1))[0])
            return "null_value", f"a value is missing in frame {frame}", frame
    elif width is not None:
        return "wrong_width", f"numbers, declared vectors of {width}", 0
    if not (
        pa.types.is_floating(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_boolean(column.type)
    ):
        return "wrong_dtype", f"{column.type}, declared {feature['dtype']}", 0
    values = column.to_numpy(zero_copy_only=False).astype(feature["dtype"])
    return values if width is None else values.reshape(-1, width)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _check_numbering(
    columns: Mapping[str, np.ndarray],
    recording: Recording,
    *,
    facts: Facts,
    tolerance_s: float,
    problems: _Problems,
) -> None:
    """Compare rows with what the episode table and the frame rate say."""
    num_rows = len(columns["frame_index"])
    if num_rows != recording.length:
        problems.add("row_count", f"{num_rows} rows, the episode table says {recording.length}")
    expected = np.arange(num_rows)
    due_s = expected / facts.fps
    # one float32 step on top of the tolerance: a timestamp cannot be written more exactly
    allowed_s = tolerance_s + np.spacing(due_s.astype(np.float32))
    known = np.isin(columns["task_index"], list(facts.tasks))
    checks = {
        "frame_index": ("frame_index", columns["frame_index"] != expected),
        "episode_index": ("episode_index", columns["episode_index"] != recording.index),
        # a NaN is not within the tolerance, either
        "timestamp": ("timestamp", ~(np.abs(columns["timestamp"].astype(np.float64) - due_s) <= allowed_s)),
        "unknown_task": ("task_index", ~known),
    }
    for reason, (name, wrong) in checks.items():
        if wrong.any():
            frame = int(np.flatnonzero(wrong)[0])
            problems.add(
                reason,
                f"{name} is {columns[name][frame]} in row {frame}, {wrong.sum()} rows are wrong",
                frame=frame,
            )


def _check_clips(recording: Recording, *, facts: Facts, problems: _Problems) -> None:
    for camera, clip in recording.clips.items():
        if clip.to_s is None:
            continue
        span = (clip.to_s - clip.from_s) * facts.fps
        if not abs(span - recording.length) <= 0.5:
            problems.add(
                "video_span",
                f"{clip.path}: a span of {span:.2f} frames for {recording.length} rows",
                camera=camera,
            )


# --- frames ---


class _MismatchError(Exception):
    """A video does not hold what its rows say."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Videos:
    """The open video file of every camera."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.open: dict[str, _VideoFile] = {}

    def frames(self, camera: str, recording: Recording, timestamps: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frame of every row of an episode; anything between or missing refuses the episode."""
        clip = recording.clips[camera]
        due_s = clip.from_s + timestamps.astype(np.float64)
        number = 0
        try:
            video = self._at(camera, clip.path, due_s[0])
            for image in video.matched(due_s, alone=clip.to_s is None):
                yield image
                number += 1
        except (_MismatchError, FileNotFoundError, FFmpegError) as error:
            self._drop(camera)
            reason, detail = _described(error)
            raise RefusedEpisodeError(
                Refusal(
                    episode=str(recording.index),
                    camera=camera,
                    frame=number,
                    reason=reason,
                    detail=f"{clip.path}: {detail}",
                )
            ) from None

    def _at(self, camera: str, path: str, start_s: float) -> "_VideoFile":
        """Return the camera's file at a position not after `start_s`."""
        video = self.open.get(camera)
        if video is None or video.path != path or video.time_s >= start_s:
            self._drop(camera)
            video = _VideoFile(self.facts, path, start_s=start_s)
            self.open[camera] = video
        return video

    def _drop(self, camera: str) -> None:
        if camera in self.open:
            self.open.pop(camera).close()

    def close(self) -> None:
        for camera in list(self.open):
            self._drop(camera)


def _described(error: Exception) -> tuple[str, str]:
    if isinstance(error, _MismatchError):
        return error.reason, error.detail
    if isinstance(error, FileNotFoundError):
        return "video_missing", "does not exist"
    return "video_unreadable", str(error)


class _VideoFile:
    """A video file that is passed over once, forwards."""

    def __init__(self, facts: Facts, path: str, *, start_s: float) -> None:
        self.facts = facts
        self.path = path
        self.half_s = 0.5 / facts.fps
        self.time_s = -np.inf
        """Presentation time of the frame decoded last."""
        self.held: av.VideoFrame | None = None
        """Decoded, but not looked at."""
        self._open()
        self._seek(start_s)

    def _open(self) -> None:
        filesystem, root = self.facts.place
        local = isinstance(filesystem, pafs.LocalFileSystem)
        name = f"{root}/{self.path}"
        self.container = av.open(name if local else filesystem.open_input_file(name))
        if not self.container.streams.video:
            raise _MismatchError("video_unreadable", "no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # a task has one CPU, and Ray runs one for each
        self.decoded = self.container.decode(self.stream)

    def _seek(self, start_s: float) -> None:
        """Go to a key frame not after `start_s`; where the file's index misleads, stay at the beginning."""
        time_base = self.stream.time_base
        if start_s <= self.half_s or time_base is None:
            return
        self.container.seek(int((start_s - self.half_s) / time_base), stream=self.stream, backward=True)
        self.held = next(self.decoded, None)
        if self.held is None or _time_s(self.held) > start_s + self.half_s:
            self.container.close()
            self.held = None
            self._open()

    def matched(self, due_s: np.ndarray, *, alone: bool) -> Iterator[np.ndarray]:
        """Yield the RGB frame of every time; unless `alone` in the file, others may precede and follow."""
        for number, frame_due_s in enumerate(due_s):
            yield self._frame_at(frame_due_s, skip_earlier=number == 0 and not alone)
        if alone and self._next() is not None:
            raise _MismatchError("frames_surplus", f"more frames than the {len(due_s)} rows")

    def _frame_at(self, due_s: float, *, skip_earlier: bool) -> np.ndarray:
        while True:
            frame = self._next()
            if frame is None:
                raise _MismatchError("frames_missing", f"ends before the frame at {due_s:.4f} s")
            if self.time_s >= due_s + self.half_s:
                raise _MismatchError(
                    "frames_missing", f"no frame at {due_s:.4f} s, the next is at {self.time_s:.4f} s"
                )
            if self.time_s > due_s - self.half_s:
                if frame.is_corrupt:
                    raise _MismatchError("frame_corrupt", f"the frame at {due_s:.4f} s is damaged")
                return frame.to_ndarray(format="rgb24")
            if not skip_earlier:
                raise _MismatchError("frames_surplus", f"the frame at {self.time_s:.4f} s has no row")

    def _next(self) -> av.VideoFrame | None:
        frame, self.held = (self.held or next(self.decoded, None)), None
        if frame is not None:
            self.time_s = _time_s(frame)
        return frame

    def close(self) -> None:
        self.container.close()


def _time_s(frame: av.VideoFrame) -> float:
    if frame.pts is None or frame.time_base is None:
        raise _MismatchError("video_unreadable", "a frame without a presentation time")
    return float(frame.pts * frame.time_base)


def _stored_frames(
    facts: Facts, recording: Recording, camera: str, *, first_row: int
) -> Iterator[np.ndarray]:
    """Yield the frames of a camera whose images lie in the data file."""
    height, width, _ = facts.features[camera]["shape"]

    def refused(reason: str, detail: str, frame: int) -> RefusedEpisodeError:
        return RefusedEpisodeError(
            Refusal(episode=str(recording.index), camera=camera, frame=frame, reason=reason, detail=detail)
        )

    images = _stored_images(facts, recording, camera, first_row=first_row)
    for number, data in enumerate(images):
        if not data:
            raise refused("image_unreadable", "no bytes in the Parquet", number)
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                if image.size != (width, height):  # known from the header, before anything is allocated
                    detail = f"{image.height}x{image.width}, declared {height}x{width}"
                    raise refused("frame_size", detail, number)
                yield np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise refused("image_unreadable", str(error), number) from None


def _stored_images(
    facts: Facts, recording: Recording, camera: str, *, first_row: int
) -> Iterator[bytes | None]:
    """Yield the encoded images of an episode, a few in memory at a time."""
    filesystem, root = facts.place
    with pq.ParquetFile(filesystem.open_input_file(f"{root}/{recording.data_path}")) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        starts = np.concatenate([[0], ends[:-1]])
        last_row = first_row + recording.length
        (groups,) = np.nonzero((starts < last_row) & (ends > first_row))
        if len(groups) == 0:
            return
        row = int(starts[groups[0]])
        for batch in file.iter_batches(batch_size=16, row_groups=groups.tolist(), columns=[camera]):
            for item in _taken(batch, first=first_row - row, stop=last_row - row).to_pylist():
                yield item["bytes"] if isinstance(item, dict) else item
            row += len(batch)


def _taken(batch: pa.RecordBatch, *, first: int, stop: int) -> pa.Array:
    first, stop = max(first, 0), min(stop, len(batch))
    return batch.column(0).slice(first, max(stop - first, 0))
