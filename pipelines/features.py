"""Image features stored beside a dataset: where they lie, what they are of, which of its files they cover.

    features/<fingerprint>/data/chunk-000/file-000.parquet   the rows and row groups of that data file
    features/<fingerprint>/info.json                         written last

A camera is a column of fixed-size binaries, the packed features of each row (smolvla/image_features.py), null
where the image cannot be used; `episode_index` and `frame_index` stand beside it. Nothing is compressed, so
reading is copying. The fingerprint is of the recipe, not of the dataset: every file carries the digest of the
data file that it was computed from, so what was computed stays valid when episodes are appended.

Knows no torch: the processes that read need none.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.columns import whole
from pipelines.dataset import EpisodeDataset, file_digests, filesystem_of
from pipelines.files import exists, joined, read_json, write_json
from smolvla.features import SCALE_BYTES, FeatureDtype

FOLDER = "features"
INFO = "info.json"
FORMAT = 1
"""Raised when the files change, so that a newer reader does not take an older one's."""
DIGEST = b"smolvla.data_digest"
FRAME = ("episode_index", "frame_index")
ARRAYS = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2"), "int8": np.dtype("i1")}
"""numpy's type of packed features; it has no bfloat16."""
BEST_FIRST = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
BEST_FIRST += [("bfloat16", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16")]
"""(dtype, precision), the nearest to what the tower gives first."""
FOOTER_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What features are a function of, beside the image."""

    weights: str
    """Digest of the frozen weights, `smolvla.image_features.weights_digest`."""
    image_box: tuple[int, int] | None
    """(width, height) in pixels that images are fitted into, as the policy's config says."""
    dtype: FeatureDtype
    """As stored."""
    precision: Literal["float32", "bfloat16"]
    """Of the computation."""

    @property
    def fingerprint(self) -> str:
        """Name of the folder."""
        content = json.dumps(asdict(self) | {"format": FORMAT}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Recipe":
        """As `info.json` says it."""
        told = dict(info["recipe"])
        return cls(**told | {"image_box": tuple(told["image_box"]) if told["image_box"] else None})


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """The features of one dataset in one folder; small and picklable."""

    uri: str
    """Of the folder."""
    recipe: Recipe
    tokens: Mapping[str, int]
    """Camera column of the dataset -> tokens of an image."""
    width: int
    """D, numbers of a token."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays that `arrays` gives."""
        return ARRAYS[self.recipe.dtype]

    def shape(self, camera: str) -> tuple[int, int]:
        """(tokens, entries of a token as packed)."""
        return self.tokens[camera], self.width + (SCALE_BYTES if self.recipe.dtype == "int8" else 0)

    def row_bytes(self, camera: str) -> int:
        """Of one image."""
        return int(np.prod(self.shape(camera))) * self.dtype.itemsize

    def path(self, file: str) -> str:
        """Of the features of a data file, both relative to their folders; within the file system."""
        return f"{filesystem_of(self.uri)[1]}/{file}"

    def open_file(self, file: str) -> pq.ParquetFile:
        """The features of a data file, the footer parsed."""
        filesystem = filesystem_of(self.uri)[0]
        remote = not isinstance(filesystem, pafs.LocalFileSystem)
        return pq.ParquetFile(filesystem.open_input_file(self.path(file)), pre_buffer=remote)

    def schema(self, digest: str) -> pa.Schema:
        """Of the file that covers a data file of this digest."""
        cameras = [(name, pa.binary(self.row_bytes(name))) for name in self.tokens]
        columns = [*((name, pa.int64()) for name in FRAME), *cameras]
        return pa.schema(columns, metadata={DIGEST: digest.encode()})


def folder_of(dataset: EpisodeDataset, fingerprint: str) -> str:
    """URI of the folder with the features of a recipe."""
    return joined(dataset.uri, f"{FOLDER}/{fingerprint}")


# ---- what is there -----------------------------------------------------------------------------------------


def missing_files(features: StoredFeatures, dataset: EpisodeDataset) -> list[int]:
    """Numbers of the data files whose features are not there, whole and computed from what they hold now."""
    filesystem, root = filesystem_of(features.uri)
    known = _info(features.uri).get("files", {})
    selector = pafs.FileSelector(f"{root}/data", recursive=True, allow_not_found=True)
    sizes = {entry.path: entry.size for entry in filesystem.get_file_info(selector)}

    def is_there(numbered: tuple[int, str]) -> bool:
        number, digest = numbered
        name = dataset.files[number]
        path = features.path(name)
        if path not in sizes:
            return False
        if known.get(name) == {"digest": digest, "bytes": sizes[path]}:
            return True
        return _digest_in(filesystem, path) == digest.encode()

    digests = list(enumerate(file_digests(dataset)))
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return [n for (n, _), there in zip(digests, pool.map(is_there, digests), strict=True) if not there]


def _digest_in(filesystem: pafs.FileSystem, path: str) -> bytes | None:
    """What a whole file says; None of one that a killed writer left cut off in an object store."""
    try:
        return (pq.read_metadata(path, filesystem=filesystem).metadata or {}).get(DIGEST)
    except pa.ArrowInvalid:
        return None


def _info(uri: str) -> dict[str, Any]:
    filesystem, root = filesystem_of(uri)
    return read_json(filesystem, f"{root}/{INFO}") if exists(filesystem, f"{root}/{INFO}") else {}


def is_sealed(features: StoredFeatures, dataset: EpisodeDataset) -> bool:
    """Whether `info.json` is of the dataset as it is."""
    return _info(features.uri).get("dataset_fingerprint") == dataset.fingerprint


def seal(features: StoredFeatures, dataset: EpisodeDataset, told: Mapping[str, Any]) -> dict[str, Any]:
    """Write `info.json` over files that are all there; `told` is what else it says."""
    filesystem, _ = filesystem_of(features.uri)
    entries = filesystem.get_file_info([features.path(name) for name in dataset.files])
    files = {
        name: {"digest": digest, "bytes": entry.size}
        for name, digest, entry in zip(dataset.files, file_digests(dataset), entries, strict=True)
    }
    info = {
        "format": FORMAT,
        "recipe": asdict(features.recipe),
        "tokens": dict(features.tokens),
        "width": features.width,
        "dataset_fingerprint": dataset.fingerprint,
        "frames": dataset.num_frames,
        **told,
        "files": files,
    }
    write_json(filesystem, f"{filesystem_of(features.uri)[1]}/{INFO}", info)
    return info


def has_any(dataset: EpisodeDataset) -> bool:
    """Whether anything is stored, fitting or not."""
    return bool(_names(dataset))


def _names(dataset: EpisodeDataset) -> list[str]:
    filesystem, root = filesystem_of(joined(dataset.uri, FOLDER))
    selector = pafs.FileSelector(root, allow_not_found=True)
    return sorted(entry.base_name for entry in filesystem.get_file_info(selector))


def found(
    dataset: EpisodeDataset, *, weights: str, image_box: Sequence[int] | None, only: str | None = None
) -> tuple[list[StoredFeatures], str]:
    """The features of a dataset that a policy can train from, the most exact first; why there are none.

    Args:
        dataset: whole.
        weights: digest of the policy's, as in `Recipe`.
        image_box: of the policy.
        only: the fingerprint that it must be.
    """
    names = [name for name in _names(dataset) if only in (None, name)]
    if not names:
        which = f"no features {only}" if only else "no features"
        return [], f"{dataset.uri} has {which}; jobs/cache_features.py computes them"
    fitting, reasons = [], []
    for name in names:
        features, difference = _difference(
            dataset, name, weights=weights, image_box=tuple(image_box) if image_box else None
        )
        if features is not None and not difference:
            fitting.append(features)
        reasons.append(f"{dataset.uri}/{FOLDER}/{name} {difference}")
    if not fitting:
        return [], "; ".join(reasons)
    return sorted(fitting, key=lambda f: BEST_FIRST.index((f.recipe.dtype, f.recipe.precision))), ""


def _difference(
    dataset: EpisodeDataset, name: str, *, weights: str, image_box: tuple[int, ...] | None
) -> tuple[StoredFeatures | None, str]:
    info = _info(folder_of(dataset, name))
    if not info:
        return None, "is not finished; the same jobs/cache_features.py goes on"
    if info.get("format") != FORMAT:
        return None, f"has format {info.get('format')}, this program reads {FORMAT}"
    recipe = Recipe.of(info)
    features = StoredFeatures(
        uri=folder_of(dataset, name), recipe=recipe, tokens=info["tokens"], width=info["width"]
    )
    if recipe.weights != weights:
        return features, (
            f"is of another checkpoint: vision weights {recipe.weights[:12]}, the policy's are {weights[:12]}"
        )
    if recipe.image_box != image_box:
        return (
            features,
            f"is of images in {recipe.image_box}, the policy's resize_imgs_with_padding is {image_box}",
        )
    missing = missing_files(features, dataset)
    if missing:
        return features, (
            f"lacks {len(missing)} of {len(dataset.files)} data files as they are now, "
            f"{dataset.files[missing[0]]} first; jobs/cache_features.py adds them"
        )
    return features, ""


# ---- rows --------------------------------------------------------------------------------------------------


class PackedRows:
    """Columns of packed features, from which rows are put together."""

    def __init__(self, columns: Sequence[pa.ChunkedArray]) -> None:
        arrays = [whole(column) for column in columns]
        self._kind = arrays[0].type
        size = self._kind.byte_width
        self._data = [
            np.frombuffer(a.buffers()[1], np.uint8)[a.offset * size : (a.offset + len(a)) * size].reshape(
                -1, size
            )
            for a in arrays
        ]
        self._real = None
        if any(a.null_count for a in arrays):
            self._real = [a.is_valid().to_numpy(zero_copy_only=False) for a in arrays]

    def taken(self, number: NDArray[np.int64], row: NDArray[np.int64]) -> pa.Array:
        """Entry row[i] of column number[i] for each i; copied once."""
        places = list(zip(number.tolist(), row.tolist(), strict=True))
        out = np.empty((len(places), self._kind.byte_width), dtype=np.uint8)
        for i, (a, r) in enumerate(places):
            out[i] = self._data[a][r]
        valid = None
        if self._real is not None:
            valid = pa.array([bool(self._real[a][r]) for a, r in places]).buffers()[1]
        return pa.FixedSizeBinaryArray.from_buffers(
            self._kind, len(places), [valid, pa.py_buffer(out.reshape(-1))]
        )


def unpacked_rows(column: pa.ChunkedArray, features: StoredFeatures, camera: str) -> tuple[Any, Any]:
    """(rows, tokens, entries) of a column without copying it, zeros where it is null, and which rows are."""
    array = whole(column)
    size = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], np.uint8)[
        array.offset * size : (array.offset + len(array)) * size
    ]
    values = flat.view(features.dtype).reshape(len(array), *features.shape(camera))
    if not array.null_count:
        return values, np.zeros(len(array), dtype=bool)
    missing = ~array.is_valid().to_numpy(zero_copy_only=False)
    values = values.copy()
    values[missing] = 0
    return values, missing
