"""`meta/` of a LeRobot dataset, v2.0, v2.1 or v3.0, checked: which columns, cameras and episodes there are.

v2: `episodes.jsonl` and `tasks.jsonl`; a data file and a video per camera for every episode.
v3: `episodes/*/*.parquet` and `tasks.parquet`; a file holds many episodes, the table says where each lies.

Paths come from the templates in `info.json` alone. Everything here was written by strangers, so types, sizes
and templates are checked before they are used.
"""

import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import DEFAULT_FEATURES, Feature
from pipelines.sources.mapping import Part, SourceMapping
from pipelines.sources.storage import Folder, folder_of
from pipelines.sources.vectors import Vectors, chosen_cameras, chosen_vectors, keys_of, require_key

VERSIONS = ("v2.0", "v2.1", "v3.0")
VECTORS = ("observation.state", "action")
CAMERAS = ("video", "image")
NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
CHANNELS = {"channel", "channels"}
"""How the third axis of an image is called, as in LeRobot."""

CLIP_FIELDS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")

MAX_METADATA_BYTES = 1024**3
"""A million episodes take about a fifth of it."""
MAX_ROWS = 10_000_000
"""Of one Parquet file of `meta/`."""
MAX_PIXELS = 2**26
"""8192 x 8192: what one decoded image may take."""
MAX_WIDTH = 1_000_000
"""Of a vector, and the side of an image."""
MAX_FPS = 10_000


class FlawError(Exception):
    """What is wrong with a file, a column or a video, found where the episode's name is not known."""

    def __init__(self, reason: str, detail: str, frame: int | None = None) -> None:
        super().__init__(reason, detail, frame)
        self.reason = reason
        self.detail = detail
        self.frame = frame


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
    clips: Mapping[str, Clip | None]
    """By the key of the video; None where the table has no place for it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The dataset-level metadata, checked."""

    folder: Folder
    info: dict[str, Any]
    version: str
    fps: int
    robot_type: str | None
    declared: dict[str, Feature]
    """Every usable feature under its own name, `DEFAULT_FEATURES` included; cameras as height, width, 3."""
    features: dict[str, Feature]
    """What is handed on: as in `Listing.features`."""
    vectors: Vectors
    """What state and action are laid together from."""
    cameras: dict[str, str]
    """Camera -> its key in the dataset."""
    task: str | None
    """The instruction of every frame; None: `task_key` tells."""
    task_key: str
    tasks: dict[int, str]
    """By their index, where the column of instructions holds indices."""
    warnings: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.folder.uri}/meta/info.json"

    @property
    def tasks_are_numbered(self) -> bool:
        """Whether the instruction of a frame is looked up in `tasks`."""
        return self.task is None and self.declared[self.task_key]["dtype"] != "string"

    @property
    def videos(self) -> list[str]:
        """Keys of the taken cameras that are video files."""
        return [key for key in dict.fromkeys(self.cameras.values()) if self.declared[key]["dtype"] == "video"]

    @property
    def images(self) -> list[str]:
        """Keys of the taken cameras that lie in the data files."""
        return [key for key in dict.fromkeys(self.cameras.values()) if self.declared[key]["dtype"] == "image"]

    @property
    def kept(self) -> list[str]:
        """Columns that are handed on as they are."""
        return [name for name in self.features if name not in VECTORS and name not in self.cameras]

    @property
    def columns(self) -> list[str]:
        """Columns without which an episode is refused, images not counted."""
        needed = ["timestamp", "episode_index", *keys_of(self.vectors), *self.kept]
        # GR00T's datasets do without frame_index: the timestamps tell the order, too
        needed += ["frame_index"] if "frame_index" in self.info["features"] else []
        needed += [self.task_key] if self.task is None else []
        return list(dict.fromkeys(needed))


def read_facts(uri: str, mapping: SourceMapping, *, follow_links: bool) -> Facts:
    folder = folder_of(uri, follow_links=follow_links)
    where = f"{folder.uri}/meta/info.json"
    try:
        info = _parsed_json(_read(folder, "meta/info.json"), where=where)
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist, so {uri} is no LeRobot dataset") from None
    version, fps = _version(info, where), _fps(info, mapping, where)
    _check_templates(info, version, where)
    declared, left_out = _declared(info["features"], where=where)
    vectors = _vectors(declared, left_out, mapping, folder=folder, where=where)
    cameras = _cameras(declared, mapping, where=where)
    videos = [key for key in cameras.values() if declared[key]["dtype"] == "video"]
    if videos and not info.get("video_path"):
        raise ValueError(f"{where}: video_path is missing, but {videos[0]!r} is a video")
    task_key = mapping.task_key or "task_index"
    _check_task_key(task_key, declared, where=where)
    indexed = mapping.task is None and declared[task_key]["dtype"] != "string"
    robot_type = mapping.robot_type or info.get("robot_type")
    if not isinstance(robot_type, str | None):
        raise ValueError(f"{where}: robot_type {robot_type!r} is not a text")
    warnings = [f"feature {name!r} is left out: {reason}" for name, reason in left_out.items()]
    warnings += _unused(declared, vectors, cameras)
    return Facts(
        folder=folder,
        info=info,
        version=version,
        fps=fps,
        robot_type=robot_type,
        declared=declared,
        features=_features(declared, vectors, cameras, mapping),
        vectors=vectors,
        cameras=cameras,
        task=mapping.task,
        task_key=task_key,
        tasks=_tasks(folder, version) if indexed else {},
        warnings=tuple(warnings),
    )


# --- info.json ---


def _version(info: Mapping[str, Any], where: str) -> str:
    for field in ("codebase_version", "features", "data_path"):
        if field not in info:
            raise ValueError(f"{where}: field {field!r} is missing")
    version = info["codebase_version"]
    if version not in VERSIONS:
        raise ValueError(f"{where}: codebase_version {version!r} is none of {', '.join(VERSIONS)}")
    return version


def _fps(info: Mapping[str, Any], mapping: SourceMapping, where: str) -> int:
    if mapping.fps is not None:
        return mapping.fps
    if "fps" not in info:
        raise ValueError(f"{where}: field 'fps' is missing")
    fps = info["fps"]
    if type(fps) not in (int, float) or not 1 <= fps <= MAX_FPS or fps != int(fps):
        raise ValueError(f"{where}: fps {fps!r} is not a whole number from 1 to {MAX_FPS}")
    return int(fps)


def _check_templates(info: Mapping[str, Any], version: str, where: str) -> None:
    """Let a template name the numbers of an episode and nothing else: format() can do far too much."""
    numbers = {"chunk_index", "file_index"} if version == "v3.0" else {"episode_chunk", "episode_index"}
    if version != "v3.0" and not _is_count(info.get("chunks_size", 1000), least=1):
        raise ValueError(f"{where}: chunks_size {info['chunks_size']!r} is not a positive whole number")
    templates = {"data_path": numbers, "video_path": numbers | {"video_key"}}
    for field, known in templates.items():
        template = info.get(field)
        if template is None and field == "video_path":
            continue
        if not isinstance(template, str) or not _can_be_filled_in(template, known):
            raise ValueError(
                f"{where}: {field} {template!r} cannot be filled in from {', '.join(sorted(known))}"
            )


def _can_be_filled_in(template: str, known: set[str]) -> bool:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        return False
    return all(
        name is None
        or (name in known and conversion is None and re.fullmatch(r"(0?\d{1,2}d?)?", layout or ""))
        for _, name, layout, conversion in pieces
    )


def _declared(features: Any, *, where: str) -> tuple[dict[str, Feature], dict[str, str]]:
    """Return the features that can be used, and why the others cannot."""
    if not isinstance(features, dict):
        raise ValueError(f"{where}: features is {type(features).__name__}, not an object")
    usable, left_out = dict(DEFAULT_FEATURES), {}
    for name, feature in features.items():
        if name in DEFAULT_FEATURES:
            continue
        _check_feature(name, feature, where=where)
        reason = _unsupported(feature)
        if reason:
            left_out[name] = reason
        elif feature["dtype"] in CAMERAS:
            usable[name] = _camera(name, feature, where=where)
        else:
            usable[name] = {key: feature.get(key) for key in ("dtype", "shape", "names")}
    return usable, left_out


def _check_feature(name: str, feature: Any, *, where: str) -> None:
    if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
        raise ValueError(f"{where}: feature {name!r} has no dtype or no shape")
    if not isinstance(feature["dtype"], str):
        raise ValueError(f"{where}: dtype {feature['dtype']!r} of feature {name!r} is not a text")
    shape = feature["shape"]
    if not isinstance(shape, list) or not all(_is_count(side, least=1, most=MAX_WIDTH) for side in shape):
        raise ValueError(
            f"{where}: shape {shape!r} of feature {name!r} is not a list of numbers from 1 to {MAX_WIDTH}"
        )


def _unsupported(feature: Mapping[str, Any]) -> str | None:
    dtype, shape = feature["dtype"], feature["shape"]
    if dtype in CAMERAS:
        info = feature.get("info") or feature.get("video_info") or {}
        depth = isinstance(info, dict) and (info.get("video.is_depth_map") or info.get("is_depth_map"))
        return "it is a depth map" if depth else None
    if dtype == "string":
        return None if shape == [1] else f"strings of shape {shape}"
    if dtype not in NUMBERS:
        return f"dtype {dtype!r}"
    return None if len(shape) == 1 else f"shape {shape} is neither a number nor a vector"


def _camera(name: str, feature: Mapping[str, Any], *, where: str) -> Feature:
    """Return height and width from either order of the axes; the names tell which, else the size does."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3:
        raise ValueError(f"{where}: camera {name!r} has shape {shape}, not three axes")
    named = names if isinstance(names, list) and len(names) == 3 else [None] * 3
    if named[0] in CHANNELS or (named[2] not in CHANNELS and shape[2] not in (1, 3)):
        shape = [shape[1], shape[2], shape[0]]
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"{where}: camera {name!r} has shape {feature['shape']}, not one or three channels")
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{where}: camera {name!r} has {height}x{width} pixels, at most {MAX_PIXELS} are read"
        )
    return {"dtype": feature["dtype"], "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def _is_count(value: Any, *, least: int, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


# --- what is taken ---


def _vectors(
    declared: Mapping[str, Feature],
    left_out: Mapping[str, str],
    mapping: SourceMapping,
    *,
    folder: Folder,
    where: str,
) -> Vectors:
    widths = {
        name: feature["shape"][0]
        for name, feature in declared.items()
        if feature["dtype"] in NUMBERS and name not in DEFAULT_FEATURES
    }
    try:
        return chosen_vectors(mapping, widths, usual={name: [name] for name in VECTORS})
    except ValueError as error:
        texts = {name: "dtype 'string'" for name in declared if declared[name]["dtype"] == "string"}
        reasons = "".join(
            f"; {key!r} cannot be used: {reason}"
            for key, reason in ({**texts, **left_out}).items()
            if key in VECTORS or key in keys_of(mapping.vectors)
        )
        raise ValueError(f"{where}: {error}{reasons}{_modality_hint(folder, mapping)}") from None


def _modality_hint(folder: Folder, mapping: SourceMapping) -> str:
    name = "meta/modality.json"
    if mapping.vectors or folder.size(name) is None:
        return ""
    path = f"{folder.root}/{name}" if folder.is_local else f"a copy of {folder.uri}/{name}"
    return f"; GR00T's mapping lies in the dataset: --mapping {path}"


def _cameras(declared: Mapping[str, Feature], mapping: SourceMapping, *, where: str) -> dict[str, str]:
    keys = [name for name, feature in declared.items() if feature["dtype"] in CAMERAS]
    if not keys:
        raise ValueError(
            f"{where}: no feature is a camera (dtype video or image), and a policy needs one; there are "
            f"{', '.join(name for name in declared if name not in DEFAULT_FEATURES)}"
        )
    if mapping.cameras is None:
        return {key: key for key in keys}
    try:
        return chosen_cameras(mapping, keys)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_task_key(key: str, declared: Mapping[str, Feature], *, where: str) -> None:
    try:
        require_key(key, declared)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    dtype, shape = declared[key]["dtype"], declared[key]["shape"]
    if shape != [1] or not (dtype == "string" or "int" in dtype):
        raise ValueError(
            f"{where}: mapping: task_key {key!r} is {dtype} of shape {shape}, "
            "neither a text nor an index into the tasks"
        )


def _features(
    declared: Mapping[str, Feature], vectors: Vectors, cameras: Mapping[str, str], mapping: SourceMapping
) -> dict[str, Feature]:
    """Describe what is handed on: in the dataset's order, then what the mapping gave a new name."""
    made = {name: declared[key] | {"dtype": "image"} for name, key in cameras.items()}
    for name, parts in vectors.items():
        names = _names(parts, declared) if name in mapping.vectors else declared[name]["names"]
        width = sum(len(_taken(part, declared)) for part in parts)
        # float64 states and actions exist; training is float32, and so is LeRobot's own recording
        made[name] = {"dtype": "float32", "shape": [width], "names": names}
    consumed = {*keys_of(dict(mapping.vectors)), mapping.task_key, *DEFAULT_FEATURES}
    own = {
        name: made.get(name, feature)
        for name, feature in declared.items()
        if name in made or (name not in consumed and feature["dtype"] not in CAMERAS)
    }
    return own | made


def _names(parts: Sequence[Part], declared: Mapping[str, Feature]) -> list[str]:
    """Name the assembled numbers as their columns do; where two are called alike, with the column's name."""
    short, long = [], []
    for part in parts:
        known = _known_names(declared[part.key])
        for place in _taken(part, declared):
            place_name = f"{part.key}[{place}]" if declared[part.key]["shape"] != [1] else part.key
            short.append(known[place] if known else place_name)
            long.append(f"{part.key}.{known[place]}" if known else place_name)
    return short if len(set(short)) == len(short) else long


def _known_names(feature: Feature) -> list[str] | None:
    """Return the name of every number; old datasets wrap the list as {"motors": [...]}."""
    names = feature.get("names")
    if isinstance(names, dict) and len(names) == 1:
        (names,) = names.values()
    if not isinstance(names, list) or len(names) != feature["shape"][0]:
        return None
    return names if all(isinstance(name, str) for name in names) else None


def _taken(part: Part, declared: Mapping[str, Feature]) -> list[int]:
    """Return which numbers of its column a part takes."""
    return part.of(np.arange(declared[part.key]["shape"][0])[None]).ravel().tolist()


def _unused(declared: Mapping[str, Feature], vectors: Vectors, cameras: Mapping[str, str]) -> Iterator[str]:
    """Name what of the cameras and of the columns that are laid together is not taken."""
    for name, feature in declared.items():
        if feature["dtype"] in CAMERAS and name not in cameras.values():
            yield f"camera {name!r} is left out: the mapping does not name it"
    for key in keys_of(vectors):
        parts = [part for parts in vectors.values() for part in parts if part.key == key]
        taken = {place for part in parts for place in _taken(part, declared)}
        width = declared[key]["shape"][0]
        if len(taken) < width:
            yield f"column {key!r}: the mapping takes {len(taken)} of its {width} numbers"


# --- tasks ---


def _tasks(folder: Folder, version: str) -> dict[int, str]:
    name = "meta/tasks.parquet" if version == "v3.0" else "meta/tasks.jsonl"
    try:
        pairs = list(_v3_tasks(folder, name) if version == "v3.0" else _v2_tasks(folder, name))
    except FileNotFoundError:
        raise ValueError(f"{folder.uri}/{name} does not exist") from None
    tasks: dict[int, str] = {}
    for index, text in pairs:
        if not _is_count(index, least=0) or not isinstance(text, str):
            raise ValueError(f"{folder.uri}/{name}: task_index {index!r} with task {text!r}")
        if tasks.setdefault(index, text) != text:
            raise ValueError(f"{folder.uri}/{name}: task_index {index} is both {tasks[index]!r} and {text!r}")
    return tasks


def _v2_tasks(folder: Folder, name: str) -> Iterator[tuple[Any, Any]]:
    for row, _ in _json_lines(folder, name, fields=("task_index", "task")):
        yield row["task_index"], row["task"]


def _v3_tasks(folder: Folder, name: str) -> Iterator[tuple[Any, Any]]:
    table = _table(folder, name)
    # pandas calls the column of an unnamed index __index_level_0__, as in many real datasets
    texts = [field.name for field in table.schema if field.type in (pa.string(), pa.large_string())]
    known = [column for column in ("task", "__index_level_0__") if column in texts] or texts
    if "task_index" not in table.column_names or not known or (len(known) > 1 and known[0] != "task"):
        raise ValueError(
            f"{folder.uri}/{name}: needs the columns task_index and task, it has {table.column_names}"
        )
    return zip(table["task_index"].to_pylist(), table[known[0]].to_pylist(), strict=True)


# --- episodes ---


def read_recordings(facts: Facts) -> list[Recording]:
    """Return the episode table in the order of episode_index, which may have gaps."""
    rows = _v3_episodes(facts) if facts.version == "v3.0" else _v2_episodes(facts)
    recordings = sorted(rows, key=lambda recording: recording.index)
    if not recordings:
        raise ValueError(f"{facts.folder.uri}: the episode table is empty")
    for before, after in itertools.pairwise(recordings):
        if before.index == after.index:
            raise ValueError(f"{facts.folder.uri}: the episode table lists episode_index {after.index} twice")
    return recordings


def _v2_episodes(facts: Facts) -> Iterator[Recording]:
    name = "meta/episodes.jsonl"
    try:
        rows = _json_lines(facts.folder, name, fields=("episode_index", "length"))
    except FileNotFoundError:
        raise ValueError(f"{facts.folder.uri}/{name} does not exist") from None
    chunks_size = facts.info.get("chunks_size", 1000)
    for row, where in rows:
        index = _count(row, "episode_index", where=where)
        keys = {"episode_chunk": index // chunks_size, "episode_index": index}
        yield Recording(
            index=index,
            length=_count(row, "length", where=where),
            data_path=_path(facts, "data_path", **keys),
            clips={
                video: Clip(path=_path(facts, "video_path", video_key=video, **keys), from_s=0.0, to_s=None)
                for video in facts.videos
            },
        )


def _v3_episodes(facts: Facts) -> Iterator[Recording]:
    names = facts.folder.names_below("meta/episodes", suffix=".parquet")
    if not names:
        raise ValueError(f"{facts.folder.uri}: no meta/episodes/*/*.parquet")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{video}/{field}" for video in facts.videos for field in CLIP_FIELDS]
    for name in names:
        for number, row in enumerate(_table(facts.folder, name, columns=columns).to_pylist()):
            where = f"{facts.folder.uri}/{name}: row {number}"
            yield Recording(
                index=_count(row, "episode_index", where=where),
                length=_count(row, "length", where=where),
                data_path=_path(
                    facts,
                    "data_path",
                    chunk_index=_count(row, "data/chunk_index", where=where),
                    file_index=_count(row, "data/file_index", where=where),
                ),
                clips={video: _v3_clip(facts, video, row, where=where) for video in facts.videos},
            )


def _v3_clip(facts: Facts, video: str, row: Mapping[str, Any], *, where: str) -> Clip | None:
    chunk, file, from_s, to_s = (f"videos/{video}/{field}" for field in CLIP_FIELDS)
    if None in (row[chunk], row[file], row[from_s], row[to_s]):
        return None
    keys = {"chunk_index": _count(row, chunk, where=where), "file_index": _count(row, file, where=where)}
    for field in (from_s, to_s):
        if type(row[field]) not in (int, float):
            raise ValueError(f"{where}: {field} {row[field]!r} is not a number")
    path = _path(facts, "video_path", video_key=video, **keys)
    return Clip(path=path, from_s=float(row[from_s]), to_s=float(row[to_s]))


def _count(row: Mapping[str, Any], field: str, *, where: str) -> int:
    value = row[field]
    if not _is_count(value, least=0):
        raise ValueError(f"{where}: {field} {value!r} is not a whole number from 0 on")
    return value


def _path(facts: Facts, template: str, **keys: Any) -> str:
    """Fill in a template of info.json; the result stays within the dataset."""
    path = facts.info[template].format(**keys)
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"{facts.where}: {template} leads out of the dataset: {path!r}")
    return path


def shared_footage(recordings: Sequence[Recording], *, fps: int) -> list[str]:
    """Say of each video how many episodes show footage that another one shows, too."""
    spans: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for recording in recordings:
        for video, clip in recording.clips.items():
            if clip is not None and clip.to_s is not None:
                spans.setdefault((video, clip.path), []).append((clip.from_s, clip.to_s, recording.index))
    shared: dict[str, list[int]] = {}
    for (video, _), clips in spans.items():
        for (_, end_s, _), (start_s, _, index) in itertools.pairwise(sorted(clips)):
            if start_s < end_s - 0.5 / fps:
                shared.setdefault(video, []).append(index)
    return [
        f"camera {video!r}: episodes that begin before the one before them in the video ends: "
        f"{len(indices)}, such as episode {min(indices)}"
        for video, indices in shared.items()
    ]


# --- files ---


def _read(folder: Folder, name: str) -> bytes:
    size = folder.size(name)
    if size is not None and size > MAX_METADATA_BYTES:
        raise ValueError(f"{folder.uri}/{name}: {size} bytes, at most {MAX_METADATA_BYTES} are read")
    with folder.open(name) as stream:
        return stream.read()


def _parsed_json(text: bytes, *, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not a JSON object")
    return content


def _json_lines(folder: Folder, name: str, *, fields: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """Return the objects of a file, each with the place it stands at; empty lines do not count."""
    rows = []
    for number, line in enumerate(_read(folder, name).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{folder.uri}/{name}:{number}"
        row = _parsed_json(line, where=where)
        for field in fields:
            if field not in row:
                raise ValueError(f"{where}: field {field!r} is missing")
        rows.append((row, where))
    return rows


def _table(folder: Folder, name: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table of `meta/`, each of the columns once."""
    where = f"{folder.uri}/{name}"
    try:
        with pq.ParquetFile(folder.open(name)) as file:
            found = file.schema_arrow.names
            flawed = [column for column in columns or () if found.count(column) != 1]
            if flawed:
                state = "there twice" if flawed[0] in found else "missing"
                raise ValueError(f"{where}: column {flawed[0]!r} is {state}")
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"{where}: {file.metadata.num_rows} rows, at most {MAX_ROWS} are read")
            table = file.read(columns=columns)
            return table if columns is None else table.select(columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable Parquet file: {error}") from None
