"""Episode datasets as a source: one after the other, images copied bit for bit.

Read is what `open_dataset` opens: datasets of this program and any LeRobot v3.0 dataset whose cameras are
images. A unit is one episode; its images are read a few at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.dataset import EpisodeDataset, filesystem_of, open_dataset
from pipelines.sources import (
    DEFAULT_FEATURES,
    Episode,
    Feature,
    Listing,
    Refusal,
    Unit,
    feature_difference,
    is_camera,
)

CHECKED_COLUMNS = ("timestamp", "frame_index", "episode_index", "task_index")
IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class EpisodeDatasetSource:
    """One or more datasets with the same features and frame rate."""

    uris: tuple[str, ...]
    tolerance_s: float = 1e-4
    """How far a timestamp may lie from frame_index / fps; LeRobot's own default."""

    def listing(self) -> Listing:
        if not self.uris:
            raise ValueError("sources is empty; name at least one episode dataset")
        datasets = self.datasets
        first = datasets[0]
        features = _features(first)
        for other in datasets[1:]:
            difference = feature_difference(features, _features(other))
            if other.fps != first.fps:
                difference = f"fps {first.fps} and not {other.fps}"
            if difference:
                raise ValueError(f"{first.uri} has {difference}, unlike {other.uri}")
        robots = list(dict.fromkeys(dataset.info.get("robot_type") for dataset in datasets))
        warnings = () if len(robots) == 1 else (f"the robots differ, so robot_type is left open: {robots}",)
        return Listing(
            fps=int(first.fps),
            robot_type=robots[0] if len(robots) == 1 else None,
            features=features,
            tasks=tuple(dict.fromkeys(task for dataset in datasets for task in dataset.tasks)),
            units=tuple(self._units()),
            identity={
                "format": "episodes",
                "tolerance_s": self.tolerance_s,
                "fingerprints": [dataset.fingerprint for dataset in datasets],
            },
            location=" ".join(self.uris),
            warnings=warnings,
        )

    @cached_property
    def datasets(self) -> tuple[EpisodeDataset, ...]:
        """Opened once, in the driver; workers receive them with the source, under absolute paths."""
        return tuple(open_dataset(_absolute(uri)) for uri in self.uris)

    def _units(self) -> Iterator[Unit]:
        labels = _labels(self.uris)
        for number, dataset in enumerate(self.datasets):
            names = _episode_names(dataset)
            for row, (name, length) in enumerate(zip(names, dataset.episode_length.tolist(), strict=True)):
                yield Unit(
                    name=f"{labels[number]}/{name}", num_episodes=1, num_frames=length, detail=(number, row)
                )

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        for unit in units:
            number, row = unit.detail
            dataset = self.datasets[number]
            features = _features(dataset)
            pieces = _pieces(dataset, row)
            columns = _columns(dataset, pieces, features)
            problem = _problem(dataset, row, columns, tolerance_s=self.tolerance_s)
            if problem:
                reason, detail, frame = problem
                yield Refusal(episode=unit.name, reason=reason, detail=detail, frame=frame)
                continue
            cameras = [name for name, feature in features.items() if is_camera(feature)]
            yield Episode(
                name=unit.name,
                tasks=[dataset.tasks[index] for index in columns["task_index"].tolist()],
                columns={name: columns[name] for name in features if name not in cameras},
                cameras={},
                encoded_cameras={name: _images(dataset, pieces, name) for name in cameras},
            )


def _absolute(uri: str) -> str:
    """Return a folder's absolute path: a worker may stand in another folder."""
    filesystem, root = filesystem_of(uri)
    return root if isinstance(filesystem, pafs.LocalFileSystem) else uri


def _labels(uris: Sequence[str]) -> list[str]:
    """Name each dataset by its folder; of equal names all but the first get a number."""
    names = [PurePosixPath(uri.rstrip("/")).name for uri in uris]
    return [
        name if names.index(name) == place else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _features(dataset: EpisodeDataset) -> dict[str, Feature]:
    """Return the features as `Listing.features` has them."""
    features: dict[str, Feature] = {}
    for name, feature in dataset.features.items():
        if name in DEFAULT_FEATURES:
            continue
        shape = list(feature["shape"])
        if is_camera(feature):
            height, width = dataset.image_size(name)
            names: Any = ["height", "width", "channels"]
            features[name] = {"dtype": "image", "shape": [height, width, 3], "names": names}
            continue
        if len(shape) != 1:
            raise ValueError(f"{dataset.uri}: feature {name!r} of shape {shape} is neither number nor vector")
        features[name] = {"dtype": feature["dtype"], "shape": shape, "names": feature.get("names")}
    return features


def _episode_names(dataset: EpisodeDataset) -> list[str]:
    """Return what each episode was called where it came from, else its number."""
    filesystem, root = filesystem_of(dataset.uri)
    selector = pafs.FileSelector(f"{root}/meta/episodes", recursive=True)
    known: dict[int, str] = {}
    for entry in filesystem.get_file_info(selector):
        if entry.extension != "parquet":
            continue
        if "source_episode" in pq.read_schema(entry.path, filesystem=filesystem).names:
            columns = ["episode_index", "source_episode"]
            table = pq.read_table(entry.path, columns=columns, filesystem=filesystem)
            known |= dict(zip(*(table[name].to_pylist() for name in columns), strict=True))
    return [known.get(index, str(index)) for index in dataset.episode_index.tolist()]


# --- rows ---


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a row group."""

    file: int
    group: int
    start: int
    stop: int


def _pieces(dataset: EpisodeDataset, row: int) -> list[_Piece]:
    groups = dataset.row_groups
    first, stop = dataset.groups_of_episode[row], dataset.groups_of_episode[row + 1]
    return [
        _Piece(
            file=int(groups.file[unit]),
            group=int(groups.group[unit]),
            start=int(groups.skip[unit]),
            stop=int(groups.skip[unit] + groups.rows[unit]),
        )
        for unit in range(first, stop)
    ]


def _columns(
    dataset: EpisodeDataset, pieces: Sequence[_Piece], features: dict[str, Feature]
) -> dict[str, np.ndarray]:
    """Read everything but the images of an episode."""
    names = [*CHECKED_COLUMNS, *(name for name, feature in features.items() if not is_camera(feature))]
    tables = []
    for file in dict.fromkeys(piece.file for piece in pieces):
        with dataset.open_file(file) as opened:
            tables += [
                opened.read_row_group(piece.group, columns=names).slice(piece.start, piece.stop - piece.start)
                for piece in pieces
                if piece.file == file
            ]
    table = pa.concat_tables(tables).combine_chunks()
    return {name: _values(table[name].combine_chunks()) for name in names}


def _values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return (L,) or (L, D); the writer looks at width and finiteness."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    if pa.types.is_nested(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return column.to_numpy(zero_copy_only=False)


def _problem(
    dataset: EpisodeDataset, row: int, columns: dict[str, np.ndarray], *, tolerance_s: float
) -> tuple[str, str, int | None] | None:
    """Return (reason, detail, frame) of the first thing that is not as the episode table says."""
    length = int(dataset.episode_length[row])
    num_rows = len(columns["frame_index"])
    if num_rows != length:
        return "row_count", f"{num_rows} rows, the episode table says {length}", None
    due_s = np.arange(length) / dataset.fps
    allowed_s = tolerance_s + np.spacing(due_s.astype(np.float32))
    checks = {
        "frame_index": ("frame_index", columns["frame_index"] != np.arange(length)),
        "episode_index": ("episode_index", columns["episode_index"] != dataset.episode_index[row]),
        "timestamp": ("timestamp", ~(np.abs(columns["timestamp"].astype(np.float64) - due_s) <= allowed_s)),
        "unknown_task": ("task_index", ~np.isin(columns["task_index"], np.arange(len(dataset.tasks)))),
    }
    for reason, (name, wrong) in checks.items():
        if wrong.any():
            frame = int(np.flatnonzero(wrong)[0])
            return reason, f"{name} is {columns[name][frame]} in row {frame}", frame
    return None


def _images(dataset: EpisodeDataset, pieces: Sequence[_Piece], camera: str) -> Iterator[bytes]:
    """Yield the encoded images of an episode; no bytes where there is no image."""
    for file in dict.fromkeys(piece.file for piece in pieces):
        with dataset.open_file(file) as opened:
            for piece in pieces:
                if piece.file == file:
                    yield from _images_of_piece(opened, piece, camera)


def _images_of_piece(file: pq.ParquetFile, piece: _Piece, camera: str) -> Iterator[bytes]:
    row = 0
    for batch in file.iter_batches(batch_size=IMAGES_AT_ONCE, row_groups=[piece.group], columns=[camera]):
        first, stop = max(piece.start - row, 0), min(piece.stop - row, len(batch))
        if first < stop:
            for item in batch.column(0).slice(first, stop - first).to_pylist():
                yield (item or {}).get("bytes") or b""
        row += len(batch)
        if row >= piece.stop:
            return
