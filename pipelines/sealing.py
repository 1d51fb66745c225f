"""Seal a dataset whose shards all stand: write its `meta/`, `info.json` last."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from pipelines import statistics
from pipelines.dataset import filesystem_of
from pipelines.files import remove_temporaries, write_json, write_parquet
from pipelines.sources import DEFAULT_FEATURES, Listing, is_camera, is_number
from pipelines.writer import (
    CHUNK_FILES,
    DATA_PATH,
    STAGING,
    Layout,
    PlacedEpisode,
    Record,
    Shard,
    provenance,
    rows_of,
)


def seal(
    layout: Layout,
    listing: Listing,
    *,
    records: Sequence[Record],
    refusals: Sequence[dict[str, Any]],
    shards: Sequence[Shard],
    tasks: Sequence[str],
    code_version: str | None,
) -> dict[str, Any]:
    """Write `meta/`, `info.json` last, and return what `ingest.json` says. All shards must stand."""
    filesystem, root = filesystem_of(layout.uri)
    remove_temporaries(filesystem, root)
    placed = [(shard, episode) for shard in shards for episode in shard.episodes]
    write_json(filesystem, f"{root}/meta/stats.json", _dataset_stats(layout, records, shards))
    write_parquet(filesystem, f"{root}/meta/tasks.parquet", _tasks_table(tasks))
    write_parquet(
        filesystem,
        f"{root}/meta/episodes/chunk-000/file-000.parquet",
        _episodes_table(layout, records, placed),
    )
    report = provenance(listing, layout.options) | {
        "source_location": listing.location,
        "code_version": code_version,
        "tasks": len(tasks),
        "warnings": list(listing.warnings),
        "notes": {record["name"]: record["notes"] for record in records if record["notes"]},
        "fingerprint": fingerprint(layout, records),
    }
    report |= counts(records, refusals)
    write_json(filesystem, f"{root}/meta/ingest.json", report)
    write_json(filesystem, f"{root}/meta/info.json", _info(layout, listing, records, tasks))
    clear_staging(layout.uri)
    return report


def counts(records: Sequence[Record], refusals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what was accepted and what was refused, by reason; an episode may be refused for several."""
    return {
        "episodes": len(records),
        "frames": sum(record["length"] for record in records),
        "refused_episodes": len({refusal["episode"] for refusal in refusals}),
        "refused": dict(sorted(Counter(refusal["reason"] for refusal in refusals).items())),
        "refusals": list(refusals),
    }


def clear_staging(uri: str) -> None:
    """Remove what only an unfinished output needs."""
    filesystem, root = filesystem_of(uri)
    if filesystem.get_file_info(f"{root}/{STAGING}").type == pafs.FileType.Directory:
        filesystem.delete_dir(f"{root}/{STAGING}")


def fingerprint(layout: Layout, records: Sequence[Record]) -> str:
    """Hash the content: features, rate, and the instructions, values and images of every episode in order."""
    content = [layout.fps, layout.features, [record["sha256"] for record in records]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _info(
    layout: Layout, listing: Listing, records: Sequence[Record], tasks: Sequence[str]
) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0",
        "robot_type": listing.robot_type,
        "total_episodes": len(records),
        "total_frames": sum(record["length"] for record in records),
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": layout.fps,
        "splits": {"train": f"0:{len(records)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": layout.features,
        "row_group_frames": layout.options.row_group_frames,
    }


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    index = pd.Index(list(tasks), name="task")  # LeRobot looks tasks up through the pandas index
    return pa.Table.from_pandas(pd.DataFrame({"task_index": np.arange(len(tasks))}, index=index))


def _dataset_stats(layout: Layout, records: Sequence[Record], shards: Sequence[Shard]) -> dict[str, Any]:
    stats = {}
    for name, feature in layout.features.items():
        if is_camera(feature):
            histogram = np.sum([record["histograms"][name] for record in records], axis=0)
            num_frames = sum(record["length"] for record in records)
            stats[name] = statistics.camera_stats(histogram, num_frames=num_frames)
        elif is_number(feature):
            values = _stored_values(layout, shards, name)
            if name in DEFAULT_FEATURES:
                column = statistics.moments(values)
            else:
                column = statistics.merged_all([_moments(record["moments"][name]) for record in records])
            stats[name] = statistics.vector_stats(column, statistics.quantiles(values))
    return {name: _plain(entry) for name, entry in stats.items()}


def _stored_values(layout: Layout, shards: Sequence[Shard], name: str) -> np.ndarray:
    """Read one column of numbers of the whole dataset: (N, D)."""
    filesystem, root = filesystem_of(layout.uri)
    paths = [f"{root}/{shard.path}" for shard in shards]
    column = pads.dataset(paths, filesystem=filesystem, format="parquet").to_table(columns=[name])[name]
    return np.concatenate([rows_of(chunk) for chunk in column.chunks])


def _moments(found: dict[str, Any]) -> statistics.Moments:
    arrays = [np.array(found[name]) for name in ("min", "max", "mean", "m2")]
    return statistics.Moments(found["count"], *arrays)


def _plain(entry: statistics.Stats) -> dict[str, Any]:
    return {name: values.tolist() for name, values in entry.items()}


def _episodes_table(
    layout: Layout, records: Sequence[Record], placed: Sequence[tuple[Shard, PlacedEpisode]]
) -> pa.Table:
    rows = []
    for record, (shard, episode) in zip(records, placed, strict=True):
        row = {
            "episode_index": episode.episode_index,
            "tasks": list(dict.fromkeys(task for task, _ in record["task_runs"])),
            "length": episode.length,
            "data/chunk_index": shard.chunk_index,
            "data/file_index": shard.file_index,
            "data/row_group_index": episode.first_row_group,
            "dataset_from_index": episode.first_index,
            "dataset_to_index": episode.first_index + episode.length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "source_episode": record["name"],
        }
        for name, entry in _episode_stats(layout, record, episode).items():
            row |= {f"stats/{name}/{stat}": values for stat, values in _plain(entry).items()}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _episode_stats(layout: Layout, record: Record, episode: PlacedEpisode) -> dict[str, statistics.Stats]:
    stats = {}
    frame_index = np.arange(episode.length)
    made = episode.numbers | {
        "frame_index": frame_index,
        "timestamp": (frame_index / layout.fps).astype(np.float32),
    }
    for name, feature in layout.features.items():
        if is_camera(feature):
            histogram = np.array(record["histograms"][name])
            stats[name] = statistics.camera_stats(histogram, num_frames=episode.length)
        elif name in made:
            values = made[name][:, None]
            stats[name] = statistics.vector_stats(statistics.moments(values), statistics.quantiles(values))
        elif is_number(feature):
            found = record["moments"][name]
            known = {q: np.array(found[q]) for q in statistics.QUANTILES}
            stats[name] = statistics.vector_stats(_moments(found), known)
    return stats
