"""Tell what an episode dataset holds: counts, tasks, lengths, statistics, warnings, and two pictures.

python jobs/inspect_dataset.py <path> --output <folder>

Reads `meta/` and a few row groups, so it is quick however large the dataset is; needs no Ray. Exit codes: 0
the dataset was read, whatever the warnings say; 2 there is no complete dataset, or a flag is wrong.
"""

import io
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from jobs.command_line import fail, parsed, refusals
from pipelines import drawing
from pipelines.dataset import EpisodeDataset, filesystem_of
from pipelines.files import atomic_stream
from pipelines.inspection import (
    VECTORS,
    Inspection,
    Look,
    counted,
    dimension_names,
    episode_columns,
    inspect,
    looks,
    row_of,
    statistic,
    tasks_of,
)
from pipelines.sources import DEFAULT_FEATURES

LISTED = 20
"""Tasks and warnings that are printed; the JSON line has all warnings."""
SHEET_EPISODES, SHEET_MOMENTS = 6, 5
"""Of a contact sheet beside a run."""
SHOWN_STATISTICS = ("min", "q01", "mean", "std", "q99", "max")


@dataclass(frozen=True, kw_only=True)
class InspectDataset:
    """The flags of jobs/inspect_dataset.py."""

    path: str
    """Folder or URI of the episode dataset; may stand without its flag."""
    output: str | None = None
    """Folder or URI for the pictures; without it outputs/inspect/<name of the dataset>."""
    episode: int | None = None
    """episode_index whose curves are drawn; without it the first."""
    sheet_episodes: int = 6
    """Rows of the contact sheet, spread over the dataset."""
    sheet_moments: int = 6
    """Its columns, spread over each episode."""

    def __post_init__(self) -> None:
        for name in ("sheet_episodes", "sheet_moments"):
            if not 1 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} {getattr(self, name)} is not within 1..100")


def main(job: InspectDataset) -> int:
    start_s = time.monotonic()
    with refusals():
        try:
            line = report(job)
        except OSError as error:  # no permission, no such bucket, a server that does not answer
            fail(f"{job.path}: {' '.join(str(error).split())}")
    print(json.dumps(line | {"seconds": round(time.monotonic() - start_s, 1)}), flush=True)
    return 0


def report(job: InspectDataset) -> dict[str, Any]:
    """Print the facts, draw the pictures and return the JSON line."""
    inspection = inspect(job.path)
    dataset = inspection.dataset
    row = 0 if job.episode is None else row_of(dataset, job.episode)
    name = job.path.partition("?")[0].rstrip("/").rpartition("/")[2] or "dataset"
    output = job.output or f"outputs/inspect/{name}"
    seen = looks(dataset, episodes=job.sheet_episodes, moments=job.sheet_moments)
    for text in told(inspection, seen):
        print(text)
    pictures = {
        "contact_sheet": _png(contact_sheet(dataset, seen, name=name)),
        "curves": _png(_curves(dataset, row, name=name)),
    }
    paths = {kind: _written(output, f"{kind}.png", data) for kind, data in pictures.items()}
    recorded: dict[str, dict[str, int]] = {}
    for noted in inspection.recorded:
        recorded.setdefault(noted.kind, {})[noted.reason] = noted.count
    return {
        "path": job.path,
        "episodes": len(dataset.episode_index),
        "frames": dataset.num_frames,
        "hours": round(dataset.num_frames / dataset.fps / 3600, 4),
        "tasks": len(dataset.tasks),
        "cameras": dataset.camera_names,
        "fingerprint": dataset.fingerprint,
        "recorded": recorded,
        "warnings": warned(inspection, seen),
    } | paths


# --- text ---


def summary(inspection: Inspection, dataset: EpisodeDataset, *, name: str) -> tuple[str, Image.Image]:
    """The text and the contact sheet that lie beside a run in MLflow.

    Args:
        inspection: of the whole dataset.
        dataset: the same, or some of its episodes, to be shown.
        name: over the picture.
    """
    seen = looks(dataset, episodes=SHEET_EPISODES, moments=SHEET_MOMENTS)
    return "\n".join(told(inspection, seen)) + "\n", contact_sheet(dataset, seen, name=name)


def told(inspection: Inspection, seen: Sequence[Look]) -> Iterator[str]:
    """All that is said of a dataset, by line."""
    yield from facts(inspection)
    yield from statistics_table(inspection.dataset)
    yield from remarks(inspection, warned(inspection, seen))


def warned(inspection: Inspection, seen: Sequence[Look]) -> list[str]:
    """The warnings of the whole dataset and of what was looked at."""
    return [*inspection.warnings, *(warning for look in seen for warning in look.warnings)]


def facts(inspection: Inspection) -> Iterator[str]:
    """Say what the dataset is, before any statistics."""
    dataset = inspection.dataset
    seconds = dataset.num_frames / dataset.fps
    yield f"dataset      {dataset.uri}"
    yield f"episodes     {len(dataset.episode_index):,}"
    yield f"frames       {dataset.num_frames:,} at {dataset.fps:g} fps, {_duration(seconds)}"
    yield f"data         {inspection.num_bytes / 1e6:,.1f} MB in {counted(len(dataset.files), 'file')}"
    yield f"robot type   {dataset.info.get('robot_type') or 'not given'}"
    yield from _provenance(inspection)
    yield ""
    yield "features"
    for name, feature in dataset.features.items():
        if name not in DEFAULT_FEATURES:
            yield f"  {name:32} {_described(dataset, name, feature)}"
    yield ""
    yield f"tasks        {len(dataset.tasks):,}"
    for number, found in enumerate(inspection.tasks[:LISTED]):
        counts = f"{counted(found.episodes, 'episode'):>15} {counted(found.frames, 'frame'):>16}"
        yield f"  {number:4} {counts}  {found.task!r}"
    if len(inspection.tasks) > LISTED:
        yield f"  ... and {len(inspection.tasks) - LISTED} more in meta/tasks.parquet"
    yield ""
    yield from _lengths(dataset)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _provenance(inspection: Inspection) -> Iterator[str]:
    ingest = inspection.ingest
    yield f"fingerprint  {inspection.dataset.fingerprint}"
    if not ingest:
        yield "written by   others: there is no meta/ingest.json"
        return
    for entry in ingest.get("history") or [ingest]:
        source = dict(entry["source"])
        brought = f"{counted(entry['episodes'], 'episode')}, {counted(entry['frames'], 'frame')}"
        yield f"made from    {source.pop('format', 'unknown format')}: {entry['source_location']} ({brought})"
        yield f"  source     {_pairs(source)}".rstrip()
        yield f"  code       {entry['code_version'] or 'unknown commit'}"
    yield f"  options    {_pairs(ingest['options'])}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _described(dataset: EpisodeDataset, name: str, feature: dict[str, Any]) -> str:
    if feature["dtype"] == "image":
        height, width = dataset.image_size(name)
        return f"camera, {width} x {height} pixels"
    shape = "x".join(map(str, feature["shape"]))
    names = dimension_names(feature) if name in VECTORS and feature.get("names") else []
    return f"{feature['dtype']}[{shape}] {', '.join(names)}".rstrip()


def _lengths(dataset: EpisodeDataset) -> Iterator[str]:
    length = dataset.episode_length
    low, middle, high = int(length.min()), float(np.median(length)), int(length.max())
    yield (
        f"episode length  min {low}, median {middle:g}, max {high} frames "
        f"({low / dataset.fps:.1f}, {middle / dataset.fps:.1f}, {high / dataset.fps:.1f} s)"
    )
    edges = np.unique(np.linspace(low, high + 1, 11).round().astype(int))
    counts, _ = np.histogram(length, bins=edges)
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        yield f"  {start:7} ..{stop - 1:7}  {count:7,} {bar}".rstrip()


def statistics_table(dataset: EpisodeDataset) -> Iterator[str]:
    """Lay out the statistics of state and action, one line a number."""
    for feature in VECTORS:
        columns = {name: statistic(dataset, feature, name) for name in SHOWN_STATISTICS}
        yield ""
        yield f"{feature:24}" + "".join(f"{name:>11}" for name in columns)
        for number, name in enumerate(dimension_names(dataset.features[feature])):
            values = ["-" if column is None else f"{column[number]:.4g}" for column in columns.values()]
            yield f"{number:4} {name[:18]:19}" + "".join(f"{value:>11}" for value in values)


def remarks(inspection: Inspection, found: Sequence[str]) -> Iterator[str]:
    """List what the ingestion recorded and the warnings, what a person should look at."""
    yield ""
    if inspection.ingest:
        refused = inspection.ingest.get("refused_episodes", 0)
        yield f"ingestion    refused {counted(refused, 'episode')}; noted" + (
            "" if inspection.recorded else " nothing"
        )
    for noted in inspection.recorded:
        yield f"  {noted.kind} {noted.reason}, {counted(noted.count, 'time')}"
        yield from (f"    {example}" for example in noted.examples)
        if noted.count > len(noted.examples):
            yield f"    ... and {noted.count - len(noted.examples)} more in meta/refused.parquet"
    yield f"warnings     {len(found) or 'none'}, from statistics and the frames looked at"
    for warning in found[:LISTED]:
        yield f"  {warning}"
    if len(found) > LISTED:
        yield f"  ... and {len(found) - LISTED} more in the last line"
    yield ""


# --- pictures ---


def contact_sheet(dataset: EpisodeDataset, seen: Sequence[Look], *, name: str) -> Image.Image:
    """A few moments of a few episodes."""
    title = f"{name}: {len(seen)} of {len(dataset.episode_index)} episodes"
    return drawing.contact_sheet(seen, title=title, fps=dataset.fps)


def _curves(dataset: EpisodeDataset, row: int, *, name: str) -> Figure:
    columns = episode_columns(dataset, row, [*VECTORS, "task_index"])
    told = " | ".join(tasks_of(dataset, row, columns.pop("task_index").ravel().tolist()))
    length = len(columns["action"])
    return drawing.curves(
        columns,
        {vector: dimension_names(dataset.features[vector]) for vector in VECTORS},
        title=f"{name}, episode {dataset.episode_index[row]}: {length} frames, {length / dataset.fps:.1f} s\n"
        + told,
        fps=dataset.fps,
    )


def _png(picture: Image.Image | Figure) -> bytes:
    stream = io.BytesIO()
    if isinstance(picture, Figure):
        with warnings.catch_warnings():
            # matplotlib's font has no Chinese, for one: boxes in the picture, the words stand in the text
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            picture.savefig(stream, format="png")
    else:
        picture.save(stream, "PNG")
    return stream.getvalue()


def _written(folder: str, name: str, data: bytes) -> str:
    filesystem, root = filesystem_of(folder)
    with atomic_stream(filesystem, f"{root}/{name}") as stream:
        stream.write(data)
    return f"{folder.rstrip('/')}/{name}"


def with_path_flag(argv: Sequence[str]) -> list[str]:
    """Give a word that belongs to no flag the flag --path; every flag here takes one value."""
    words: list[str] = []
    is_value = False
    for word in argv:
        is_flag = word.startswith("--")
        if not is_flag and not is_value:
            words.append("--path")
        words.append(word)
        is_value = is_flag and "=" not in word
    if sum(word.partition("=")[0] == "--path" for word in words) > 1:
        fail("path is given twice")
    return words


if __name__ == "__main__":
    sys.exit(main(parsed(InspectDataset, with_path_flag(sys.argv[1:]))))
