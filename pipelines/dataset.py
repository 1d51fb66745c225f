"""An episode dataset on disk or in an object store: open it, check it, name it by its content.

The layout is LeRobot v3.0 with the images inside the Parquet files (docs/dataset.md). Opening reads `meta/`
only, never the data files, when our writer made the dataset: it notes each episode's first row group. A
dataset written by others has its Parquet footers read once instead.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

METADATA_PATH = re.compile(r"meta(/appended/\d+)?")
ROW_COLUMNS = (
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)  # LeRobot's five default features


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a folder given as a path or a URI (s3://...), and the folder's path in it."""
    if "://" in uri:
        return pafs.FileSystem.from_uri(uri)
    return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


@dataclass(frozen=True)
class RowGroups:
    """The row groups of a dataset as units of reading: each holds consecutive frames of one episode."""

    file: Int64
    """Number of the data file in `EpisodeDataset.files`."""
    group: Int64
    """Row group within the file."""
    skip: Int64
    """Rows of the row group before this unit; 0 unless others wrote several episodes into a group."""
    rows: Int64
    episode: Int64
    """Row of `EpisodeDataset.episode_*`."""
    first_frame: Int64
    """frame_index of the first row."""

    def __len__(self) -> int:
        return len(self.file)


@dataclass(frozen=True)
class EpisodeDataset:
    """The metadata of an episode dataset: small, picklable, checked."""

    uri: str
    info: dict[str, Any]
    stats: dict[str, dict[str, Any]]
    tasks: tuple[str, ...]
    """Task strings by task_index."""
    files: tuple[str, ...]
    """Data files relative to the dataset."""
    episode_index: Int64
    episode_length: Int64
    row_groups: RowGroups
    fingerprint: str
    """Hex digest of the content: what a run was trained on."""

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """LeRobot's feature table: name -> dtype, shape, names."""
        return self.info["features"]

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.info["fps"]

    @property
    def camera_names(self) -> list[str]:
        """Columns that hold images, in declared order."""
        return [name for name, feature in self.features.items() if feature["dtype"] == "image"]

    @property
    def num_frames(self) -> int:
        """Rows of all episodes."""
        return int(self.episode_length.sum())

    def with_episodes(self, places: Int64) -> "EpisodeDataset":
        """The dataset with some of its episodes only, given by their rows of `episode_*`.

        Statistics, tasks and fingerprint stay those of the whole.
        """
        places = np.unique(places)
        groups = self.row_groups
        kept = np.isin(groups.episode, places)
        columns = {f.name: getattr(groups, f.name)[kept] for f in fields(groups)}
        columns["episode"] = np.searchsorted(places, columns["episode"])
        return replace(
            self,
            episode_index=self.episode_index[places],
            episode_length=self.episode_length[places],
            row_groups=RowGroups(**columns),
        )

    def open_file(self, number: int) -> pq.ParquetFile:
        """A data file, its footer parsed."""
        filesystem, root = filesystem_of(self.uri)
        remote = not isinstance(filesystem, pafs.LocalFileSystem)  # there, few large requests are cheaper
        return pq.ParquetFile(filesystem.open_input_file(f"{root}/{self.files[number]}"), pre_buffer=remote)

    @functools.cached_property
    def groups_of_episode(self) -> Int64:
        """For each episode the number of its first unit in `row_groups`, and one entry for the end."""
        return np.searchsorted(self.row_groups.episode, np.arange(len(self.episode_index) + 1))

    def policy_features(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(input_features, output_features) in LeRobot's form; camera shapes are [3, H, W]."""
        inputs: dict[str, Any] = {}
        for name in self.camera_names:
            height, width = self.image_size(name)
            inputs[name] = {"type": "VISUAL", "shape": [3, height, width]}
        inputs["observation.state"] = {
            "type": "STATE",
            "shape": list(self.features["observation.state"]["shape"]),
        }
        return inputs, {"action": {"type": "ACTION", "shape": list(self.features["action"]["shape"])}}

    def image_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of a camera; LeRobot writes [H, W, 3] or [3, H, W] and tells by the names."""
        feature = self.features[camera]
        shape, names = feature["shape"], feature.get("names") or ["height", "width", "channels"]
        if names[0] in {"channel", "channels"}:
            return shape[1], shape[2]
        return shape[0], shape[1]


def open_dataset(uri: str) -> EpisodeDataset:
    """Read and check `meta/`.

    Raises:
        ValueError: the folder is no complete episode dataset, or lacks what training needs; names file and
        field.
    """
    filesystem, root = filesystem_of(uri)
    info = _json(filesystem, root, "meta/info.json", uri=uri)
    _check_info(info, uri=uri)
    # after an append the newest statistics and report lie where info.json says (pipelines/output.py)
    metadata = info.get("metadata_path", "meta")
    if not METADATA_PATH.fullmatch(str(metadata)):
        raise ValueError(f"{uri}/meta/info.json: metadata_path {metadata!r} is not below meta/appended")
    stats = _json(filesystem, root, f"{metadata}/stats.json", uri=uri)
    episodes = _episodes(filesystem, root, uri=uri)
    # an append that is under way has written rows that info.json does not count yet
    episodes = episodes.slice(0, info.get("total_episodes", len(episodes)))
    length = episodes["length"].to_numpy()
    if len(length) == 0 or length.min() < 1:
        raise ValueError(
            f"{uri}/meta/episodes: a dataset needs at least one episode, and each at least one frame"
        )
    if int(length.sum()) != info["total_frames"]:
        raise ValueError(
            f"{uri}/meta/info.json: total_frames {info['total_frames']}, the episodes hold {length.sum()}"
        )
    files, file_of_episode = _data_files(info, episodes)
    if "data/row_group_index" in episodes.column_names and "row_group_frames" in info:
        row_groups = _declared_row_groups(episodes, file_of_episode, frames=info["row_group_frames"])
    else:
        row_groups = _footer_row_groups(filesystem, root, files, file_of_episode, length)
    return EpisodeDataset(
        uri=uri,
        info=info,
        stats=stats,
        tasks=_tasks(filesystem, root, uri=uri)[: info.get("total_tasks")],
        files=tuple(files),
        episode_index=episodes["episode_index"].to_numpy(),
        episode_length=length,
        row_groups=row_groups,
        fingerprint=_fingerprint(filesystem, root, files, metadata=metadata),
    )


def _json(filesystem: pafs.FileSystem, root: str, name: str, *, uri: str) -> dict[str, Any]:
    try:
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            return json.loads(stream.read())
    except FileNotFoundError:
        raise ValueError(f"{uri}: no {name}, so this is not a complete episode dataset") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{uri}/{name}: not JSON: {error}") from None


def _check_info(info: Mapping[str, Any], *, uri: str) -> None:
    where = f"{uri}/meta/info.json"
    for field in ("codebase_version", "fps", "features", "data_path", "total_frames"):
        if field not in info:
            raise ValueError(f"{where}: field {field!r} is missing")
    if not str(info["codebase_version"]).startswith("v3."):
        raise ValueError(
            f"{where}: codebase_version {info['codebase_version']!r}, need v3.x; "
            "jobs/ingest_lerobot.py converts it"
        )
    features = info["features"]
    for name in ("observation.state", "action", *ROW_COLUMNS):
        if name not in features:
            raise ValueError(f"{where}: features has no {name!r}")
    videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
    if videos:
        raise ValueError(
            f"{where}: {videos[0]!r} has dtype 'video'; jobs/ingest_lerobot.py turns videos into images"
        )
    if not any(feature["dtype"] == "image" for feature in features.values()):
        raise ValueError(f"{where}: no feature has dtype 'image', and a policy needs a camera")


def _episodes(filesystem: pafs.FileSystem, root: str, *, uri: str) -> pa.Table:
    selector = pafs.FileSelector(f"{root}/meta/episodes", recursive=True, allow_not_found=True)
    paths = sorted(f.path for f in filesystem.get_file_info(selector) if f.path.endswith(".parquet"))
    if not paths:
        raise ValueError(f"{uri}: no meta/episodes/*/*.parquet")
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    tables = []
    for path in paths:
        schema = pq.read_schema(path, filesystem=filesystem)
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise ValueError(f"{uri}: {path.removeprefix(root)}: column {missing[0]!r} is missing")
        columns = needed + [name for name in ("data/row_group_index",) if name in schema.names]
        tables.append(pq.read_table(path, filesystem=filesystem, columns=columns))
    return pa.concat_tables(tables).sort_by("episode_index")


def _tasks(filesystem: pafs.FileSystem, root: str, *, uri: str) -> tuple[str, ...]:
    try:
        table = pq.read_table(f"{root}/meta/tasks.parquet", filesystem=filesystem)
    except FileNotFoundError:
        raise ValueError(f"{uri}: no meta/tasks.parquet") from None
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise ValueError(
            f"{uri}/meta/tasks.parquet: needs the columns task_index and task, has {table.column_names}"
        )
    by_index = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"{uri}/meta/tasks.parquet: task_index is not 0..{len(by_index) - 1}")
    return tuple(by_index[i] for i in range(len(by_index)))


def _data_files(info: Mapping[str, Any], episodes: pa.Table) -> tuple[list[str], Int64]:
    """The data files in the order of their numbers, and the file of each episode."""
    keys = np.stack([episodes["data/chunk_index"].to_numpy(), episodes["data/file_index"].to_numpy()], axis=1)
    unique, file_of_episode = np.unique(keys, axis=0, return_inverse=True)
    files = [info["data_path"].format(chunk_index=int(chunk), file_index=int(file)) for chunk, file in unique]
    return files, file_of_episode.reshape(-1)


def _declared_row_groups(episodes: pa.Table, file_of_episode: Int64, *, frames: int) -> RowGroups:
    """Row groups from our writer's notes: each episode is cut every `frames` frames, from its first group."""
    length = episodes["length"].to_numpy()
    first_group = episodes["data/row_group_index"].to_numpy()
    per_episode = -(-length // frames)
    episode = np.repeat(np.arange(len(length)), per_episode)
    within = np.arange(len(episode)) - np.repeat(np.cumsum(per_episode) - per_episode, per_episode)
    first_frame = within * frames
    return RowGroups(
        file=file_of_episode[episode],
        group=first_group[episode] + within,
        skip=np.zeros_like(episode),
        rows=np.minimum(frames, length[episode] - first_frame),
        episode=episode,
        first_frame=first_frame,
    )


def _footer_row_groups(
    filesystem: pafs.FileSystem, root: str, files: list[str], file_of_episode: Int64, length: Int64
) -> RowGroups:
    """Row groups of others' data: each footer is read, each row group is cut at episode ends."""
    units: list[tuple[int, int, int, int, int, int]] = []
    for number, name in enumerate(files):
        metadata = pq.read_metadata(f"{root}/{name}", filesystem=filesystem)
        ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
        episodes = np.flatnonzero(file_of_episode == number)
        if int(length[episodes].sum()) != metadata.num_rows:
            raise ValueError(
                f"{name}: {metadata.num_rows} rows, its episodes have {length[episodes].sum()} frames"
            )
        episode_ends = np.cumsum(length[episodes])
        cuts = np.union1d(ends, episode_ends)
        for start, stop in zip(np.concatenate([[0], cuts[:-1]]), cuts, strict=True):
            group = int(np.searchsorted(ends, start, side="right"))
            place = int(np.searchsorted(episode_ends, start, side="right"))
            group_start = int(ends[group] - metadata.row_group(group).num_rows)
            episode_start = int(episode_ends[place] - length[episodes[place]])
            units.append(
                (
                    number,
                    group,
                    start - group_start,
                    stop - start,
                    int(episodes[place]),
                    start - episode_start,
                )
            )
    # Units of one episode stand together, in the order of its frames, whatever the order of the files.
    columns = np.array(sorted(units, key=lambda unit: (unit[4], unit[5])), dtype=np.int64).T
    return RowGroups(*columns)


def data_sizes(dataset: EpisodeDataset) -> list[int]:
    """Bytes of each data file, from one listing, however many there are.

    Raises:
        ValueError: names the first file that is missing or empty.
    """
    filesystem, root = filesystem_of(dataset.uri)
    folder = dataset.info["data_path"].partition("{")[0].rpartition("/")[0]
    selector = pafs.FileSelector(f"{root}/{folder}".rstrip("/"), recursive=True, allow_not_found=True)
    sizes = {entry.path: entry.size for entry in filesystem.get_file_info(selector) if entry.is_file}
    found = [sizes.get(f"{root}/{name}") for name in dataset.files]
    for name, size in zip(dataset.files, found, strict=True):
        if not size:
            state = "missing" if size is None else "empty"
            raise ValueError(f"{dataset.uri}/{name}: the episode table names this file and it is {state}")
    return [size or 0 for size in found]


def file_digests(dataset: EpisodeDataset) -> list[str]:
    """For each data file what it holds, in short: whatever was computed from it is valid while this stays.

    Of our own datasets the digests of its episodes, of others' its name and size; and how its rows lie.
    Appending leaves them as they are. The dataset must be whole.
    """
    filesystem, root = filesystem_of(dataset.uri)
    content = _episode_digests(filesystem, root, count=len(dataset.episode_index))
    groups = dataset.row_groups
    entries = filesystem.get_file_info([f"{root}/{name}" for name in dataset.files])
    by_file = np.argsort(groups.file, kind="stable")
    ends = np.cumsum(np.bincount(groups.file, minlength=len(dataset.files)))
    found = []
    for entry, mine in zip(entries, np.split(by_file, ends[:-1]), strict=True):
        rows = np.stack([groups.group[mine], groups.skip[mine], groups.rows[mine]])
        episodes = np.unique(groups.episode[mine])
        held = [content[i] for i in episodes] if content else [f"{entry.base_name} {entry.size}"]
        told = [*held, dataset.episode_index[episodes].tolist(), rows.tolist()]
        found.append(hashlib.sha256(json.dumps(told).encode()).hexdigest())
    return found


def _episode_digests(filesystem: pafs.FileSystem, root: str, *, count: int) -> list[str] | None:
    """SHA-256 of each episode's content as our writer noted it; None where others wrote the dataset."""
    selector = pafs.FileSelector(f"{root}/meta/episodes", recursive=True)
    paths = sorted(f.path for f in filesystem.get_file_info(selector) if f.path.endswith(".parquet"))
    if any("sha256" not in pq.read_schema(path, filesystem=filesystem).names for path in paths):
        return None
    columns = ["episode_index", "sha256"]
    tables = [pq.read_table(path, filesystem=filesystem, columns=columns) for path in paths]
    return pa.concat_tables(tables).sort_by("episode_index")["sha256"].to_pylist()[:count]


def _fingerprint(filesystem: pafs.FileSystem, root: str, files: list[str], *, metadata: str) -> str:
    """Our ingestion's digest of the content; for others' datasets one of metadata and file sizes."""
    report = f"{root}/{metadata}/ingest.json"
    if filesystem.get_file_info(report).type == pafs.FileType.File:
        with filesystem.open_input_stream(report) as stream:
            return json.loads(stream.read())["fingerprint"]
    digest = hashlib.sha256()
    for name in ("meta/info.json", "meta/stats.json"):
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            digest.update(stream.read())
    for entry in filesystem.get_file_info([f"{root}/{name}" for name in files]):
        digest.update(f"{entry.base_name} {entry.size}".encode())
    return digest.hexdigest()
