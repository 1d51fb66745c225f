"""What an episode dataset holds, told from `meta/` and a few of its frames; nothing is changed."""

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from pipelines.dataset import EpisodeDataset, data_sizes, filesystem_of, open_dataset
from pipelines.files import exists, read_json
from pipelines.sources import Feature

VECTORS = ("observation.state", "action")
"""What a policy reads and writes; their statistics normalise, so their flaws matter most."""
OUTLIER_SPANS = 5.0
"""A value is called an outlier this many widths of q01..q99 outside of them. The extremes of 10 million rows
lie 0.6 widths out where values are normal, 1.6 where their tails fall exponentially."""
NAMED = 5
"""Episodes and examples that are named; how many there are is always said."""
READERS = 4
"""Episodes that are read at once: on an object store the waiting overlaps."""


@dataclass(frozen=True, kw_only=True)
class TaskCount:
    """An instruction, and what of the dataset is under it."""

    task: str
    episodes: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the ingestion noted under one reason."""

    kind: str
    """"refused" or "warning"."""
    reason: str
    count: int
    examples: tuple[str, ...]
    """Where, and what it was: the first ones."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts of a dataset that its metadata tell."""

    dataset: EpisodeDataset
    num_bytes: int
    """Of the data files."""
    tasks: tuple[TaskCount, ...]
    """By task_index."""
    ingest: Mapping[str, Any]
    """`meta/ingest.json`; empty where others wrote the dataset."""
    recorded: tuple[Recorded, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Look:
    """One episode as its cameras saw it at a few moments."""

    episode: int
    """Its episode_index."""
    num_frames: int
    """Of the whole episode."""
    tasks: tuple[str, ...]
    frames: tuple[int, ...]
    images: Mapping[str, tuple[Image.Image | None, ...]]
    """For every camera one image a frame; None where there is none that can be shown."""
    warnings: tuple[str, ...]


def inspect(uri: str) -> Inspection:
    """Read `meta/` and, of episodes with several instructions, their column `task_index`.

    Raises:
        ValueError: there is no complete episode dataset, or its parts contradict each other.
    """
    dataset = open_dataset(uri)
    filesystem, root = filesystem_of(uri)
    num_bytes = sum(data_sizes(dataset))
    table = _episode_table(dataset)
    folder = f"{root}/{dataset.info.get('metadata_path', 'meta')}"  # appending writes a new one
    report = f"{folder}/ingest.json"
    ingest = read_json(filesystem, report) if exists(filesystem, report) else {}
    tasks = _task_counts(dataset, table)
    return Inspection(
        dataset=dataset,
        num_bytes=num_bytes,
        tasks=tasks,
        ingest=ingest,
        recorded=_recorded(filesystem, f"{folder}/refused.parquet", ingest),
        warnings=(
            *_vector_warnings(dataset, table),
            *_camera_warnings(dataset, table),
            *_length_warnings(dataset),
            *_task_warnings(tasks),
        ),
    )


def dimension_names(feature: Feature) -> list[str]:
    """Return a name for every number of a vector; LeRobot's `names` are a list, a mapping or nothing."""
    width, names = math.prod(feature["shape"]), feature.get("names")
    if isinstance(names, dict):  # {"motors": [...]}, or the names with their places
        listed = [name for value in names.values() if isinstance(value, list) for name in value]
        names = listed or list(names)
    if not names or len(names) != width:
        return [str(number) for number in range(width)]
    return [str(name) for name in names]


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def statistic(dataset: EpisodeDataset, feature: str, name: str) -> np.ndarray | None:
    """Return one statistic (D,) of a vector, None where `meta/stats.json` does not have it."""
    values = dataset.stats.get(feature, {}).get(name)
    if values is None:
        return None
    found, width = np.asarray(values, np.float64).reshape(-1), math.prod(dataset.features[feature]["shape"])
    if len(found) != width:
        raise ValueError(
            f"{dataset.uri}/meta/stats.json: {name} of {feature} has {len(found)} numbers, info.json "
            f"declares {width}"
        )
    return found


# --- metadata ---


def _episode_table(dataset: EpisodeDataset) -> pa.Table:
    """Read what is needed of `meta/episodes`, in the order of `EpisodeDataset.episode_index`."""
    filesystem, root = filesystem_of(dataset.uri)
    stats = [f"stats/{name}/{stat}" for name in (*VECTORS, *dataset.camera_names) for stat in ("min", "max")]
    selector = pafs.FileSelector(f"{root}/meta/episodes", recursive=True)
    tables = []
    for entry in filesystem.get_file_info(selector):
        if entry.extension == "parquet":
            with pq.ParquetFile(filesystem.open_input_file(entry.path)) as file:
                names = {"episode_index", "tasks", *stats} & set(file.schema_arrow.names)
                tables.append(file.read(columns=sorted(names)).replace_schema_metadata())
    table = pa.concat_tables(tables, promote_options="default").sort_by("episode_index")
    # an append that was interrupted leaves more than `info.json` counts
    return table.filter(pa.array(np.isin(table["episode_index"].to_numpy(), dataset.episode_index)))


def _task_counts(dataset: EpisodeDataset, table: pa.Table) -> tuple[TaskCount, ...]:
    """Count exactly: an episode with one instruction by its length, one with several by its rows."""
    number_of = {task: number for number, task in enumerate(dataset.tasks)}
    listed = table["tasks"].to_pylist() if "tasks" in table.column_names else [None] * len(table)
    episodes: Counter[int] = Counter()
    frames: Counter[int] = Counter()
    for row, tasks in enumerate(listed):
        if tasks is not None and len(tasks) == 1 and tasks[0] in number_of:
            per_task = {number_of[tasks[0]]: int(dataset.episode_length[row])}
        else:
            numbers = episode_columns(dataset, row, ["task_index"])["task_index"].ravel().tolist()
            tasks_of(dataset, row, numbers)  # or they are not in the table
            per_task = Counter(numbers)
        episodes.update(per_task.keys())
        frames.update(per_task)
    return tuple(
        TaskCount(task=task, episodes=episodes[number], frames=frames[number])
        for number, task in enumerate(dataset.tasks)
    )


def _recorded(filesystem: pafs.FileSystem, path: str, ingest: Mapping[str, Any]) -> tuple[Recorded, ...]:
    """Read what was noted from its table, or from `ingest.json`, where it stood before there was one."""
    if exists(filesystem, path):
        rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    else:
        rows = [row | {"kind": "refused"} for row in ingest.get("refusals", ())]
        rows += [
            {"kind": "warning", "reason": "source", "detail": text} for text in ingest.get("warnings", ())
        ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["reason"]), []).append(row)
    return tuple(
        Recorded(kind=kind, reason=reason, count=len(found), examples=tuple(map(_told, found[:NAMED])))
        for (kind, reason), found in sorted(groups.items())
    )


def _told(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {row[name]}" for name in ("episode", "camera", "frame") if row.get(name) is not None]
    return f"{', '.join(parts)}: {row['detail']}" if parts else row["detail"]


# --- warnings ---


def _vector_warnings(dataset: EpisodeDataset, table: pa.Table) -> Iterator[str]:
    for feature in VECTORS:
        low, high = statistic(dataset, feature, "min"), statistic(dataset, feature, "max")
        if low is None or high is None:
            yield f"{feature}: meta/stats.json has no min and max; constants and outliers were not looked for"
            continue
        names = dimension_names(dataset.features[feature])
        for number in np.flatnonzero(low == high):
            yield f"{feature}[{number}] {names[number]}: constant, always {low[number]:g}"
        for number in np.flatnonzero(~np.isfinite(low + high)):
            yield f"{feature}[{number}] {names[number]}: its statistics are not finite"
        yield from _outliers(dataset, table, feature)


def _outliers(dataset: EpisodeDataset, table: pa.Table, feature: str) -> Iterator[str]:
    q01, q99 = statistic(dataset, feature, "q01"), statistic(dataset, feature, "q99")
    if q01 is None or q99 is None:
        yield f"{feature}: meta/stats.json has no q01 and q99; outliers were not looked for"
        return
    names, span = dimension_names(dataset.features[feature]), q99 - q01
    for side, limit, sign in (("min", q01, -1), ("max", q99, 1)):
        extreme = statistic(dataset, feature, side)
        assert extreme is not None
        distance = sign * (extreme - limit)
        for number in np.flatnonzero((span > 0) & (distance > OUTLIER_SPANS * span)):
            yield (
                f"{feature}[{number}] {names[number]}: {side} {extreme[number]:g}"
                f"{_extreme_episode(table, feature, side, int(number), sign)} is an outlier, 98 % of the "
                f"values lie in {q01[number]:g} .. {q99[number]:g}"
            )


def _extreme_episode(table: pa.Table, feature: str, side: str, number: int, sign: int) -> str:
    """Say in which episode an extreme stands, if the episode table has statistics."""
    values = _episode_statistic(table, f"stats/{feature}/{side}")
    if values is None:
        return ""
    return f" in episode {table['episode_index'][int(np.argmax(sign * values[:, number]))]}"


def _camera_warnings(dataset: EpisodeDataset, table: pa.Table) -> Iterator[str]:
    """Find episodes in which a camera shows one colour only: covered, off or unplugged."""
    for camera in dataset.camera_names:
        low, high = (_episode_statistic(table, f"stats/{camera}/{side}") for side in ("min", "max"))
        if low is None or high is None:
            yield f"{camera}: meta/episodes has no statistics of it; blank episodes were not looked for"
            continue
        blank = dataset.episode_index[(low == high).all(axis=1)]
        if len(blank):
            yield f"{camera}: a single colour throughout {_episodes(blank)}"


def _episode_statistic(table: pa.Table, name: str) -> np.ndarray | None:
    """Return one statistic of every episode: (episodes, D); a camera's is nested as (3, 1, 1)."""
    if name not in table.column_names or table[name].null_count:
        return None
    column = table[name].combine_chunks()
    while pa.types.is_nested(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(len(table), -1)


def _length_warnings(dataset: EpisodeDataset) -> Iterator[str]:
    short = dataset.episode_index[dataset.episode_length == 1]
    if len(short):
        yield f"a single frame in {_episodes(short)}"


def _task_warnings(tasks: Sequence[TaskCount]) -> Iterator[str]:
    for number, found in enumerate(tasks):
        if not found.task.strip() and found.frames:
            yield f"task {number}: the instruction of {counted(found.frames, 'frame')} is empty"
        if not found.frames:
            yield f"task {number} {found.task!r}: no frame has it"


def _episodes(numbers: np.ndarray) -> str:
    listed = ", ".join(str(number) for number in numbers[:NAMED])
    more = ", ..." if len(numbers) > NAMED else ""
    return f"{counted(len(numbers), 'episode')} ({listed}{more})"


# --- frames and columns of single episodes ---


def spread(count: int, *, at_most: int) -> tuple[int, ...]:
    """Return up to `at_most` of 0..count-1, evenly spaced, first and last among them."""
    if at_most == 1:
        return (0,)
    return tuple(np.unique(np.linspace(0, count - 1, at_most).round().astype(int)).tolist())


def row_of(dataset: EpisodeDataset, episode: int) -> int:
    """Return the row of an episode_index in the dataset's tables."""
    rows = np.flatnonzero(dataset.episode_index == episode)
    if len(rows) == 0:
        first, last = dataset.episode_index[[0, -1]]
        raise ValueError(f"episode {episode}: {dataset.uri} has the episodes {first}..{last}")
    return int(rows[0])


def tasks_of(dataset: EpisodeDataset, row: int, numbers: Sequence[int]) -> tuple[str, ...]:
    """Return the instructions that an episode's column `task_index` names, each once."""
    if min(numbers) < 0 or max(numbers) >= len(dataset.tasks):
        raise ValueError(
            f"{dataset.uri}: episode {dataset.episode_index[row]} has task_index {min(numbers)}.."
            f"{max(numbers)}, meta/tasks.parquet has 0..{len(dataset.tasks) - 1}"
        )
    return tuple(dataset.tasks[number] for number in dict.fromkeys(numbers))


def looks(dataset: EpisodeDataset, *, episodes: int, moments: int) -> list[Look]:
    """Look at episodes spread over the dataset, at moments spread over each; reads only their row groups."""
    rows = spread(len(dataset.episode_index), at_most=episodes)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda row: _look(dataset, row, moments=moments), rows))


def _look(dataset: EpisodeDataset, row: int, *, moments: int) -> Look:
    frames = spread(int(dataset.episode_length[row]), at_most=moments)
    stored = _stored(dataset, row, np.array(frames), [*dataset.camera_names, "task_index"]).to_pylist()
    episode = int(dataset.episode_index[row])
    images: dict[str, tuple[Image.Image | None, ...]] = {}
    warnings = []
    for camera in dataset.camera_names:
        found = []
        for frame, item in zip(frames, stored, strict=True):
            image, problem = _image(item[camera], size=dataset.image_size(camera))
            found.append(image)
            if problem:
                warnings.append(f"{camera}: episode {episode}, frame {frame}: the image {problem}")
        images[camera] = tuple(found)
        if len(found) > 1 and None not in found and len({image.tobytes() for image in found}) == 1:
            warnings.append(
                f"{camera}: the same picture in all {len(found)} frames looked at of episode {episode}"
            )
    return Look(
        episode=episode,
        num_frames=int(dataset.episode_length[row]),
        tasks=tasks_of(dataset, row, [item["task_index"] for item in stored]),
        frames=frames,
        images=images,
        warnings=tuple(warnings),
    )


def _image(item: Mapping[str, Any] | None, *, size: tuple[int, int]) -> tuple[Image.Image | None, str | None]:
    """Return a stored image, or what is wrong with it; its size is compared before it is decoded."""
    data = item and item["bytes"]
    if not data:
        return None, "has no bytes in the Parquet file"
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if (image.height, image.width) != size:
                return None, f"is {image.height}x{image.width}, info.json declares {size[0]}x{size[1]}"
            return image.convert("RGB"), None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        return None, f"cannot be decoded: {error}"


def episode_columns(dataset: EpisodeDataset, row: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Read columns of numbers of one whole episode: (L, D), D = 1 for a scalar."""
    table = _stored(dataset, row, np.arange(dataset.episode_length[row]), columns)
    return {name: np.stack(table[name].to_numpy()).reshape(len(table), -1) for name in columns}


def _stored(dataset: EpisodeDataset, row: int, frames: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Read frames of an episode, in the order given; reads only the row groups that hold them.

    Raises:
        ValueError: the file is broken, or does not hold what the episode table says.
    """
    groups = dataset.row_groups
    first, end = dataset.groups_of_episode[row : row + 2]
    units = first + np.searchsorted(groups.first_frame[first:end], frames, side="right") - 1
    number, wanted = int(groups.file[first]), np.unique(groups.group[units])  # an episode lies in one file
    name = f"{dataset.uri}/{dataset.files[number]}"
    try:
        table, starts = _row_groups(dataset, number, wanted, [*columns, "episode_index", "frame_index"])
        start = starts[np.searchsorted(wanted, groups.group[units])]
        rows = table.take(start + groups.skip[units] + frames - groups.first_frame[units])
    except (pa.ArrowInvalid, OSError, LookupError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    episode = dataset.episode_index[row]
    is_other = (rows["episode_index"].to_numpy() != episode) | (rows["frame_index"].to_numpy() != frames)
    if is_other.any():
        raise ValueError(f"{name}: holds other rows than meta/episodes says of episode {episode}")
    return rows


def _row_groups(
    dataset: EpisodeDataset, number: int, wanted: np.ndarray, columns: Sequence[str]
) -> tuple[pa.Table, np.ndarray]:
    """Read row groups of a data file, and say at which row of the table each begins."""
    with dataset.open_file(number) as file:
        missing = set(columns) - set(file.schema_arrow.names)
        if missing:
            raise LookupError(f"column {min(missing)!r} is missing")
        if wanted[-1] >= file.num_row_groups:
            raise LookupError(f"has {file.num_row_groups} row groups, meta/episodes names {wanted[-1]}")
        sizes = np.array([file.metadata.row_group(group).num_rows for group in wanted.tolist()])
        return file.read_row_groups(wanted.tolist(), columns=list(columns)), np.cumsum(sizes) - sizes
