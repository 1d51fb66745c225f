"""The metadata of a TFDS folder: which files hold the records of a split, what `features.json` declares."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from pipelines.sources.storage import Folder, folder_of

INFO, FEATURES = "dataset_info.json", "features.json"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
SEARCHED_LEVELS = 3
"""Folders below the given one in which a version is looked for: dataset/config/version."""
MAX_METADATA_BYTES = 256 * 1024**2
"""Real ones take less than one."""
MAX_STEP_NUMBERS = 2**28
"""Of one feature: a protobuf message holds no more."""
MAX_RECORDS = 10_000_000
"""More are not listed: each becomes a unit of work."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of records, as declared."""

    split: str
    path: str
    """Relative to the version folder."""
    first_record: int
    """Number of its first record within the split."""
    num_records: int


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A feature that holds values, not other features."""

    kind: str
    """image, tensor or text; else the class TFDS has for it."""
    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    """None: differs from value to value."""
    encoding: str = "none"
    """Of a tensor: none (numbers of the tf.Example), bytes or zlib."""

    def __str__(self) -> str:
        shape = "x".join("?" if side is None else str(side) for side in self.shape)
        return " ".join(word for word in (self.kind, self.dtype, shape) if word)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A folder with `dataset_info.json` and `features.json`, both checked."""

    folder: Folder
    info: dict[str, Any]
    features: dict[str, Any]
    """`features.json` as it is."""
    steps: dict[str, Leaf]
    """Features of a step by their path, such as `observation/state`."""
    shards: tuple[Shard, ...]
    """Of the chosen splits, in order."""

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards))


def open_version(uri: str, *, splits: Sequence[str], follow_links: bool) -> Version:
    """Read the metadata; no `splits` takes all.

    Raises:
        ValueError: names the file, the field and the value.
    """
    folder = _version_folder(folder_of(uri, follow_links=follow_links))
    info = _json(folder, INFO)
    features = _json(folder, FEATURES)
    return Version(
        folder=folder,
        info=info,
        features=features,
        steps=_step_features(features, where=f"{folder.uri}/{FEATURES}"),
        shards=tuple(_shards(info, splits, where=f"{folder.uri}/{INFO}")),
    )


def _version_folder(given: Folder) -> Folder:
    """Return the given folder, or the one below it that holds a version."""
    level = [given.root]
    for _ in range(SEARCHED_LEVELS + 1):
        try:
            entries = [e for path in level for e in given.filesystem.get_file_info(pafs.FileSelector(path))]
        except OSError as error:
            raise ValueError(f"{given.uri}: cannot be listed: {error}") from None
        found = [entry.path.removesuffix(f"/{INFO}") for entry in entries if entry.base_name == INFO]
        if len(found) == 1:
            path, question, query = given.uri.partition("?")
            uri = path + found[0].removeprefix(given.root) + question + query
            return replace(given, uri=uri, root=found[0])
        if found:
            names = ", ".join(sorted(path.removeprefix(f"{given.root}/") for path in found))
            raise ValueError(f"{given.uri}: holds several datasets or versions, give one of them: {names}")
        level = [entry.path for entry in entries if entry.type == pafs.FileType.Directory]
    raise ValueError(
        f"{given.uri}: no {INFO} in it or up to {SEARCHED_LEVELS} folders below, so this is no TFDS dataset"
    )


def _json(folder: Folder, name: str) -> dict[str, Any]:
    size = folder.size(name)
    if size is None:
        raise ValueError(f"{folder.uri}/{name} does not exist")
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{folder.uri}/{name}: {size} bytes, at most {MAX_METADATA_BYTES} are read")
    with folder.open(name) as stream:
        try:
            content = json.loads(stream.read())
        except ValueError as error:
            raise ValueError(f"{folder.uri}/{name}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder.uri}/{name}: not a JSON object")
    return content


# --- splits ---


def _shards(info: Mapping[str, Any], chosen: Sequence[str], *, where: str) -> Iterator[Shard]:
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{where}: fileFormat {file_format!r}, only tfrecord is read")
    declared = {entry["name"]: entry for entry in _declared_splits(info, where=where)}
    for name in chosen:
        if name not in declared:
            raise ValueError(f"split {name!r} is none of {', '.join(declared)} in {where}")
    lengths = {name: _shard_lengths(declared[name], where=where) for name in chosen or declared}
    total = sum(sum(counts) for counts in lengths.values())
    if not 0 < total <= MAX_RECORDS:
        raise ValueError(f"{where}: {total} records in {', '.join(lengths)}, need 1..{MAX_RECORDS}")
    for split, counts in lengths.items():
        first = 0
        for number, num_records in enumerate(counts):
            path = _shard_path(info, declared[split], number=number, of=len(counts), where=where)
            yield Shard(split=split, path=path, first_record=first, num_records=num_records)
            first += num_records


def _declared_splits(info: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
    splits = info.get("splits")
    if not isinstance(splits, list) or not splits:
        raise ValueError(f"{where}: field 'splits' is missing or no list")
    for entry in splits:
        for field in ("name", "shardLengths"):
            if not isinstance(entry, dict) or field not in entry:
                raise ValueError(f"{where}: field {field!r} is missing in splits")
        if not isinstance(entry["name"], str):
            raise ValueError(f"{where}: the name of a split is {entry['name']!r}")
    return splits


def _shard_lengths(split: Mapping[str, Any], *, where: str) -> list[int]:
    """Return the records of each shard; protobuf writes int64 into JSON as text."""
    lengths = split["shardLengths"]
    try:
        counts = [int(length) for length in lengths]
    except (TypeError, ValueError):
        counts = [-1]
    if min(counts, default=0) < 0:
        raise ValueError(f"{where}: shardLengths {lengths!r} of split {split['name']!r} are no counts")
    return counts


def _shard_path(
    info: Mapping[str, Any], split: Mapping[str, Any], *, number: int, of: int, where: str
) -> str:
    template = split.get("filepathTemplate") or DEFAULT_TEMPLATE
    keys = {
        "DATASET": info.get("name"),
        "SPLIT": split["name"],
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": f"{number:05d}",
        "NUM_SHARDS": f"{of:05d}",
        "SHARD_X_OF_Y": f"{number:05d}-of-{of:05d}",
    }
    try:
        path = template.format(**keys)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: filepathTemplate {template!r} cannot be filled in: {error}") from None
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{where}: filepathTemplate leads out of the dataset: {path!r}")
    return path


# --- features ---


def _step_features(features: Mapping[str, Any], *, where: str) -> dict[str, Leaf]:
    """Return the features of a step: `steps` is a Dataset, whose features lie in every record as lists."""
    try:
        steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        leaves = dict(_leaves(steps, ""))
        _check(leaves)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}: declares no RLDS episodes, that is a Dataset `steps` with features: "
            f"{type(error).__name__} {error}"
        ) from None
    return leaves


def _check(leaves: Mapping[str, Leaf]) -> None:
    for key, leaf in leaves.items():
        if not isinstance(leaf.dtype, str) or not isinstance(leaf.encoding, str):
            raise ValueError(f"dtype {leaf.dtype!r} and encoding {leaf.encoding!r} of {key} are no texts")
        if math.prod(side or 1 for side in leaf.shape) > MAX_STEP_NUMBERS:
            raise ValueError(f"{key} declares more than {MAX_STEP_NUMBERS} numbers a step")


def _leaves(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Leaf]]:
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{path}/{name}" if path else name)
    else:
        yield path, _leaf(node)


def _leaf(node: Mapping[str, Any]) -> Leaf:
    if "image" in node:
        image = node["image"]
        # TFDS reads what does not say otherwise as RGB of any size
        shape = _shape(image) or (None, None, 3)
        return Leaf(kind="image", dtype=image.get("dtype") or "uint8", shape=shape)
    if "text" in node:
        return Leaf(kind="text")
    if "classLabel" in node:
        return Leaf(kind="tensor", dtype="int64")
    if "tensor" in node:
        tensor = node["tensor"]
        dtype, shape = tensor["dtype"], _shape(tensor)
        if dtype in ("string", "object", "str") and not shape:
            return Leaf(kind="text")
        return Leaf(kind="tensor", dtype=dtype, shape=shape, encoding=tensor.get("encoding") or "none")
    return Leaf(kind=node["pythonClassName"].rpartition(".")[2])


def _shape(node: Mapping[str, Any]) -> tuple[int | None, ...]:
    sides = [int(side) for side in node.get("shape", {}).get("dimensions", [])]
    return tuple(None if side < 0 else side for side in sides)
