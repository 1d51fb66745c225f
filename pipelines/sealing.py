"""Seal a dataset whose shards all stand: write its `meta/`, `info.json` last."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from pipelines import statistics
from pipelines.dataset import filesystem_of
from pipelines.files import remove_temporaries, write_json, write_parquet
from pipelines.output import EPISODES_PATH, Output, metadata_folder, provenance, settle
from pipelines.sources import DEFAULT_FEATURES, Feature, Listing, is_camera, is_number
from pipelines.writer import (
    CHUNK_FILES,
    DATA_PATH,
    Layout,
    Outcome,
    PlacedEpisode,
    Record,
    Shard,
    plain_stats,
    rows_of,
)

REFUSED_PATH = "meta/refused.parquet"
NOTED_SCHEMA = pa.schema(
    {
        "episode": pa.string(),
        "camera": pa.string(),
        "frame": pa.int64(),
        "reason": pa.string(),
        "detail": pa.string(),
        "kind": pa.string(),
    }
)
"""Of `refused.parquet`: `kind` is "refused" or "warning"; an episode of null is the whole dataset."""


def seal(
    output: Output,
    listing: Listing,
    *,
    outcomes: Sequence[Outcome],
    shards: Sequence[Shard],
    tasks: Sequence[str],
    code_version: str | None,
) -> dict[str, Any]:
    """Write `meta/`, `info.json` last, and return what `ingest.json` says. All shards must stand."""
    layout, base = output.layout, output.base
    filesystem, root = filesystem_of(layout.uri)
    for own in ("data", "meta"):  # in features/ another job may be writing
        remove_temporaries(filesystem, f"{root}/{own}")
    records = [record for outcome in outcomes for record in outcome["episodes"]]
    added = _episodes_table(layout, records, shards, generation=base.generation)
    episodes = added if base.episodes is None else pa.concat_tables([base.episodes, added])
    histograms = _histograms(layout, [base.histograms, *(outcome["histograms"] for outcome in outcomes)])
    files = base.data_files + [shard.path for shard in shards]
    stats, constant = _dataset_stats(layout, episodes, histograms, files)
    noted = [*_without_dataset(base.noted), *noted_rows(listing, outcomes), *constant]
    report = _report(output, listing, outcomes, episodes=episodes, noted=noted, code_version=code_version)

    folder = metadata_folder(base.generation)
    write_json(filesystem, f"{root}/{folder}/stats.json", stats)
    write_noted(layout.uri, noted, path=f"{folder}/refused.parquet")
    write_json(filesystem, f"{root}/{folder}/camera_histograms.json", histograms, indent=None)
    write_json(filesystem, f"{root}/{folder}/ingest.json", report)
    write_parquet(filesystem, f"{root}/meta/tasks.parquet", _tasks_table(tasks))
    write_parquet(filesystem, f"{root}/{EPISODES_PATH.format(generation=base.generation)}", added)
    info = _info(output, listing, report, tasks, folder=folder)
    write_json(filesystem, f"{root}/meta/info.json", info)
    settle(layout.uri)
    return report


# --- what is told ---


def noted_rows(listing: Listing, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yield the rows of `refused.parquet` that are known before the statistics are."""
    for sentence in listing.warnings:
        yield _dataset_warning("source", sentence)
    for outcome in outcomes:
        yield from (refusal | {"kind": "refused"} for refusal in outcome["refusals"])
        yield from (warning | {"kind": "warning"} for warning in outcome["warnings"])


def write_noted(uri: str, noted: Sequence[Mapping[str, Any]], *, path: str = REFUSED_PATH) -> None:
    """Write every refusal and warning as a table."""
    filesystem, root = filesystem_of(uri)
    write_parquet(filesystem, f"{root}/{path}", pa.Table.from_pylist(list(noted), schema=NOTED_SCHEMA))


def counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count what was accepted and what was refused, by reason; an episode may be refused for several."""
    records = [record for outcome in outcomes for record in outcome["episodes"]]
    refusals = [refusal for outcome in outcomes for refusal in outcome["refusals"]]
    return {
        "episodes": len(records),
        "frames": sum(record["length"] for record in records),
        "refused_episodes": len({refusal["episode"] for refusal in refusals}),
        "refused": _by_reason(refusals),
        "refusals": refusals,
    }


def _by_reason(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(row["reason"] for row in rows).items()))


def _dataset_warning(reason: str, detail: str) -> dict[str, Any]:
    return {
        "episode": None,
        "camera": None,
        "frame": None,
        "reason": reason,
        "detail": detail,
        "kind": "warning",
    }


def _without_dataset(noted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what was said of all frames: there are more of them now."""
    return [row for row in noted if row["reason"] != "zero_variance"]


def _report(
    output: Output,
    listing: Listing,
    outcomes: Sequence[Outcome],
    *,
    episodes: pa.Table,
    noted: Sequence[dict[str, Any]],
    code_version: str | None,
) -> dict[str, Any]:
    """Return `ingest.json`: counts are of the whole dataset, `history` has what each source brought."""
    records = [record for outcome in outcomes for record in outcome["episodes"]]
    before = output.base.report
    here = provenance(listing, output.layout.options)
    fingerprint = _fingerprint(output.layout, episodes)
    added = counts(outcomes)
    entry = {
        "source": here["source"],
        "source_location": listing.location,
        "code_version": code_version,
        "episodes": added["episodes"],
        "frames": added["frames"],
        "refused_episodes": added["refused_episodes"],
        "fingerprint": fingerprint,
    }
    refusals = [*before.get("refusals", ()), *added["refusals"]]
    notes = {record["name"]: record["notes"] for record in records if record["notes"]}
    return {
        "source": before.get("source", here["source"]),
        "options": here["options"],
        "source_location": before.get("source_location", listing.location),
        "code_version": code_version,
        "warnings": [*before.get("warnings", ()), *listing.warnings],
        "warned": _by_reason([row for row in noted if row["kind"] == "warning"]),
        "notes": before.get("notes", {}) | notes,
        "fingerprint": fingerprint,
        "episodes": len(episodes),
        "frames": int(sum(episodes["length"].to_pylist())),
        "refused_episodes": before.get("refused_episodes", 0) + added["refused_episodes"],
        "refused": _by_reason(refusals),
        "refusals": refusals,
        "history": [*output.base.history, entry],
    }


def _fingerprint(layout: Layout, episodes: pa.Table) -> str:
    """Hash the content: features, rate, and the instructions, values and images of every episode in order."""
    content = [layout.fps, layout.features, episodes["sha256"].to_pylist()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _info(
    output: Output, listing: Listing, report: Mapping[str, Any], tasks: Sequence[str], *, folder: str
) -> dict[str, Any]:
    info = {
        "codebase_version": "v3.0",
        "robot_type": listing.robot_type if not output.base.info else output.base.info["robot_type"],
        "total_episodes": report["episodes"],
        "total_frames": report["frames"],
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": output.layout.fps,
        "splits": {"train": f"0:{report['episodes']}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": output.layout.features,
        "row_group_frames": output.layout.options.row_group_frames,
    }
    return info if folder == "meta" else info | {"metadata_path": folder}


def _tasks_table(tasks: Sequence[str]) -> pa.Table:
    index = pd.Index(list(tasks), name="task")  # LeRobot looks tasks up through the pandas index
    return pa.Table.from_pandas(pd.DataFrame({"task_index": np.arange(len(tasks))}, index=index))


# --- statistics ---


def _histograms(layout: Layout, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cameras = [name for name, feature in layout.features.items() if is_camera(feature)]
    return {name: np.sum([part[name] for part in parts if name in part], axis=0).tolist() for name in cameras}


def _dataset_stats(
    layout: Layout, episodes: pa.Table, histograms: Mapping[str, Any], files: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return `stats.json`, merged from the episodes' own, and a warning for what never changes."""
    stats, constant = {}, []
    num_frames = sum(episodes["length"].to_pylist())
    for name, feature in layout.features.items():
        if is_camera(feature):
            entry = statistics.camera_stats(np.array(histograms[name]), num_frames=num_frames)
        elif is_number(feature):
            column = _merged_moments(episodes, name)
            entry = statistics.vector_stats(column, statistics.quantiles(_stored_values(layout, files, name)))
            if name in ("observation.state", "action"):
                constant += [
                    _dataset_warning("zero_variance", f"{name}{place} is {value:g} in every frame")
                    for place, value in _constant_dimensions(column, feature)
                ]
        else:
            continue
        stats[name] = plain_stats(entry)
    return stats, constant


def _constant_dimensions(column: statistics.Moments, feature: Feature) -> Iterator[tuple[str, float]]:
    names = feature.get("names")
    labels = names if isinstance(names, list) and len(names) == len(column.min) else None
    for place in np.flatnonzero(column.min == column.max):
        label = f" ({labels[place]})" if labels else ""
        yield f"[{place}]{label}", float(column.min[place]) + 0.0  # no "-0"


def _merged_moments(episodes: pa.Table, name: str) -> statistics.Moments:
    def stacked(stat: str) -> np.ndarray:
        values = episodes[f"stats/{name}/{stat}"].combine_chunks()
        return values.flatten().to_numpy().reshape(len(values), -1)

    return statistics.merged(
        count=stacked("count")[:, 0],
        low=stacked("min"),
        high=stacked("max"),
        mean=stacked("mean"),
        std=stacked("std"),
    )


def _stored_values(layout: Layout, files: Sequence[str], name: str) -> np.ndarray:
    """Read one column of numbers of the whole dataset: (N, D)."""
    filesystem, root = filesystem_of(layout.uri)
    paths = [f"{root}/{path}" for path in files]
    column = pads.dataset(paths, filesystem=filesystem, format="parquet").to_table(columns=[name])[name]
    return np.concatenate([rows_of(chunk) for chunk in column.chunks])


def _episodes_table(
    layout: Layout, records: Sequence[Record], shards: Sequence[Shard], *, generation: int
) -> pa.Table:
    placed = [(shard, episode) for shard in shards for episode in shard.episodes]
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
            "meta/episodes/file_index": generation,
            "source_episode": record["name"],
            "sha256": record["sha256"],
        }
        made = _default_stats(episode, layout.fps)
        for name, feature in layout.features.items():
            if is_camera(feature) or is_number(feature):
                entry = made[name] if name in DEFAULT_FEATURES else record["stats"][name]
                row |= {f"stats/{name}/{stat}": values for stat, values in entry.items()}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _default_stats(episode: PlacedEpisode, fps: int) -> dict[str, dict[str, Any]]:
    """Return the statistics of the columns that the writer made."""
    task_index = np.repeat(*np.array(episode.task_runs).T)[:, None]
    length = episode.length
    stats = {
        "frame_index": statistics.counting_stats(0, length),
        "index": statistics.counting_stats(episode.first_index, length),
        "episode_index": statistics.row_stats(np.array([[episode.episode_index]]))
        | {"count": np.array([length])},
        "task_index": statistics.row_stats(task_index),
        "timestamp": _timestamp_stats(length, fps),
    }
    return {name: plain_stats(entry) for name, entry in stats.items()}


@functools.lru_cache(maxsize=10_000)
def _timestamp_stats(length: int, fps: int) -> statistics.Stats:
    return statistics.row_stats((np.arange(length) / fps).astype(np.float32)[:, None])
