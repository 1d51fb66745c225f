"""The arrays of a Zarr group as they declare themselves, checked before Zarr opens them.

A group is a folder, in an object store as well, or a zip file; Zarr v2 and v3 are read. No codec here
unpickles, and no chunk becomes larger than `MAX_CHUNK_BYTES`.
"""

import importlib
import importlib.util
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.fs as pafs
import zarr
from fsspec import AbstractFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.zip import ZipFileSystem
from zarr.storage import FsspecStore

from pipelines.sources.storage import Folder, folder_of

COMPRESSORS = ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd")
FILTERS = ("astype", "bitround", "delta", "fixedscaleoffset", "packbits", "quantize", "shuffle")
CHECKSUMS = ("adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3")
CODECS = (*COMPRESSORS, *FILTERS, *CHECKSUMS, "bytes", "transpose")
"""What is decoded, and none of it unpickles; in Zarr v3 some have the prefix `numcodecs.`."""
IMAGE_CODECS = "imagecodecs_"
"""Prefix of the codecs of the package imagecodecs; UMI compresses frames with `imagecodecs_jpegxl`."""
CHUNK_ERRORS = (OSError, RuntimeError, ValueError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What the codecs raise for a damaged chunk."""
MAX_CHUNK_BYTES = 1024**3
"""Of one chunk, as it is stored and decoded."""
MAX_NUMBERS = 2**60
"""Of one array: sizes are multiplied without overflow."""
MAX_ITEM_BYTES = 8
BLOSC_HEADER = struct.Struct("<4xIII")
"""Bytes decoded, of a block, and stored, behind four that tell how."""
MAX_METADATA_BYTES = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What an array says of itself."""

    key: str
    """Relative to the buffer, such as "data/action"."""
    version: int
    """Of the Zarr format, 2 or 3."""
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    """As numpy calls it; what it does not know as the array has it."""
    codecs: tuple[str, ...]
    chunk_prefix: str
    """Of the names of the chunks: "c/" in most v3 arrays, "" in v2."""
    separator: str
    """Between the numbers in the name of a chunk."""

    def __str__(self) -> str:
        return f"{self.key.removeprefix('data/')} ({self.dtype} {'x'.join(map(str, self.shape))})"

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return math.prod(self.shape[1:])

    @property
    def is_numeric(self) -> bool:
        try:
            return np.dtype(self.dtype).kind in "fiub"
        except (TypeError, ValueError, SyntaxError):
            return False

    @property
    def is_camera(self) -> bool:
        return len(self.shape) == 4 and self.shape[3] == 3 and (self.dtype == "uint8" or self.has_floats)

    @property
    def has_floats(self) -> bool:
        return self.is_numeric and np.dtype(self.dtype).kind == "f"

    @property
    def chunk_bytes(self) -> int:
        """Of all chunks of the same frames, decoded."""
        sides = [max(pair) for pair in zip(self.shape[1:], self.chunks[1:], strict=True)]
        return self.chunks[0] * math.prod(sides) * np.dtype(self.dtype).itemsize

    def chunks_per_row(self) -> int:
        """Return the chunks that hold the same frames: more than one where the other axes are cut as well."""
        return math.prod(-(-side // cut) for side, cut in zip(self.shape[1:], self.chunks[1:], strict=True))

    def row_of(self, name: str) -> int | None:
        """Return the position along the first axis of the chunk stored as `name`; None: it is no chunk."""
        numbers = name.removeprefix(self.chunk_prefix).split(self.separator)
        is_chunk = name.startswith(self.chunk_prefix) and all(number.isdecimal() for number in numbers)
        return int(numbers[0]) if is_chunk and len(numbers) == len(self.shape) else None


def check_readable(array: Declared) -> None:
    """Refuse what would be unpickled, cannot be decoded here, or takes too much memory."""
    if not array.is_numeric:
        raise ValueError(f"{array.key} has dtype {array.dtype!r}, only numbers are read; objects are pickles")
    for codec in array.codecs:
        if codec.startswith(IMAGE_CODECS):
            if importlib.util.find_spec("imagecodecs") is None:
                raise ValueError(f"{array.key} is compressed with {codec!r}: pip install imagecodecs")
        elif codec.removeprefix("numcodecs.") not in CODECS:
            raise ValueError(f"{array.key} is compressed with {codec!r}, none of {', '.join(CODECS)}")
    if array.chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(
            f"{array.key}: a chunk of {array.chunks[0]} frames takes {array.chunk_bytes} bytes, at most "
            f"{MAX_CHUNK_BYTES} are read"
        )


def stored_rows(array: Declared, files: Mapping[str, int]) -> Counter[int]:
    """Count the chunks that are stored at each position along the first axis."""
    rows: Counter[int] = Counter()
    for name, size in files.items():
        row = array.row_of(name.removeprefix(f"{array.key}/")) if name.startswith(f"{array.key}/") else None
        if row is None:
            continue
        if size > MAX_CHUNK_BYTES:
            raise ValueError(f"{name}: {size} bytes, at most {MAX_CHUNK_BYTES} are read")
        rows[row] += 1
    return rows


def first_missing(array: Declared, rows: Mapping[int, int], start: int, stop: int) -> int | None:
    """Return the first frame of [start, stop) whose chunks are not all stored."""
    needed = array.chunks_per_row()
    for row in range(start // array.chunks[0], -(-stop // array.chunks[0])):
        if rows.get(row, 0) < needed:
            return max(row * array.chunks[0], start)
    return None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a group lies."""

    folder: Folder
    """The group, or the folder of its zip file."""
    archive: str | None
    """Name of the zip file."""


def place_of(uri: str, *, follow_links: bool) -> Place:
    path, question, query = uri.partition("?")
    if not path.endswith(".zip"):
        return Place(folder=folder_of(uri, follow_links=follow_links), archive=None)
    above, slash, name = path.rpartition("/")
    folder = folder_of((above or slash or ".") + question + query, follow_links=follow_links)
    return Place(folder=folder, archive=name)


class Group:
    """The files of a group.

    Every method raises a `ValueError` that names file and value where the group is not what it should be.
    """

    def __init__(self, place: Place) -> None:
        self.folder = place.folder
        self.archive: ZipFileSystem | None = None
        if place.archive is not None:
            try:
                self.archive = ZipFileSystem(self.folder.open(place.archive))
            except FileNotFoundError:
                raise ValueError("does not exist") from None
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"is no zip file: {error}") from None

    def opened(self, array: Declared) -> zarr.Array:
        """Open an array whose metadata were checked."""
        if any(codec.startswith(IMAGE_CODECS) for codec in array.codecs):
            importlib.import_module("imagecodecs.numcodecs").register_codecs(verbose=False)
        files = AsyncFileSystemWrapper(_ArrayFiles(self, array), asynchronous=True)
        store = FsspecStore(files, path="/", read_only=True)
        version: Any = array.version
        try:
            return zarr.open_array(store, path=array.key, mode="r", zarr_format=version)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{array.key} cannot be opened: {error}") from None

    def declared(self, group: str) -> dict[str, Declared]:
        """Return every array of a subgroup by its name."""
        arrays = {name: self.declared_array(f"{group}/{name}") for name in self._folders(group)}
        found = {name: array for name, array in arrays.items() if array is not None and array.shape}
        if not found:
            raise ValueError(f"no arrays in {group}/")
        return found

    def declared_array(self, key: str) -> Declared | None:
        """Return what the array says of itself; None: there is none."""
        for version, name in ((2, ".zarray"), (3, "zarr.json")):
            metadata = self._json(f"{key}/{name}")
            if metadata is not None and (version == 2 or metadata.get("node_type") == "array"):
                try:
                    return _declared_v2(key, metadata) if version == 2 else _declared_v3(key, metadata)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise ValueError(f"{key}/{name}: {type(error).__name__} {error}") from None
        return None

    def files(self) -> dict[str, int]:
        """Return the size of every file."""
        if self.archive is not None:
            found = cast(dict[str, Any], self.archive.find("", detail=True))
            return {name: entry["size"] for name, entry in found.items()}
        selector = pafs.FileSelector(self.folder.root, recursive=True)
        entries = self.folder.filesystem.get_file_info(selector)
        return {
            entry.path.removeprefix(f"{self.folder.root}/"): entry.size
            for entry in entries
            if entry.type == pafs.FileType.File
        }

    def _folders(self, key: str) -> list[str]:
        if self.archive is not None:
            found = self.archive.ls(key, detail=True) if self.archive.exists(key) else []
            return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in found if e["type"] == "directory")
        selector = pafs.FileSelector(f"{self.folder.root}/{key}", allow_not_found=True)
        entries = self.folder.filesystem.get_file_info(selector)
        return sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)

    def read(self, name: str, size: int | None = None) -> bytes:
        """Return a file, with `size` its beginning."""
        with self.folder.open(name) if self.archive is None else self.archive.open(name, "rb") as stream:
            return cast(bytes, stream.read() if size is None else stream.read(size))

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            content = json.loads(self.read(name, MAX_METADATA_BYTES))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{name}: not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{name}: not a JSON object")
        return content


class _ArrayFiles(AbstractFileSystem):
    """The files of one array as Zarr asks for them; fsspec's Arrow wrapper cannot be made asynchronous."""

    cachable = False

    def __init__(self, group: Group, array: Declared) -> None:
        super().__init__()
        self.group = group
        self.array = array

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        assert start is None, "only shards are read in part"
        assert end is None, "only shards are read in part"
        name = path.lstrip("/")
        data = self.group.read(name)
        is_chunk = self.array.row_of(name.removeprefix(f"{self.array.key}/")) is not None
        if is_chunk and self.array.codecs[-1:] in (("blosc",), ("numcodecs.blosc",)):
            _check_blosc(data, limit=math.prod(self.array.chunks) * MAX_ITEM_BYTES)
        return data


def _check_blosc(data: bytes, *, limit: int) -> None:
    """Refuse a chunk that is not as long as it says: c-blosc would return what lies behind its end."""
    if len(data) < BLOSC_HEADER.size:
        raise ValueError(f"{len(data)} bytes, less than a header of Blosc")
    decoded, _, stored = BLOSC_HEADER.unpack_from(data)
    if stored != len(data) or decoded > limit:
        raise ValueError(f"{len(data)} bytes that declare to be {stored}, and {decoded} decoded")


def _declared_v2(key: str, metadata: Mapping[str, Any]) -> Declared:
    shape = _sides(metadata["shape"])
    codecs = [*(metadata.get("filters") or []), metadata["compressor"]]
    return Declared(
        key=key,
        version=2,
        shape=shape,
        chunks=_cuts(metadata["chunks"], shape),
        dtype=_dtype(metadata["dtype"]),
        codecs=tuple(str(codec["id"]) for codec in codecs if codec is not None),
        chunk_prefix="",
        separator=_separator(metadata.get("dimension_separator", ".")),
    )


def _declared_v3(key: str, metadata: Mapping[str, Any]) -> Declared:
    shape = _sides(metadata["shape"])
    encoding = metadata["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = _separator(encoding.get("configuration", {}).get("separator", "/" if default else "."))
    return Declared(
        key=key,
        version=3,
        shape=shape,
        chunks=_cuts(metadata["chunk_grid"]["configuration"]["chunk_shape"], shape),
        dtype=_dtype(metadata["data_type"]),
        codecs=tuple(str(codec["name"]) for codec in metadata["codecs"]),
        chunk_prefix=f"c{separator}" if default else "",
        separator=separator,
    )


def _cuts(value: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    cuts = _sides(value)
    if len(cuts) != len(shape) or 0 in cuts:
        raise ValueError(f"chunks {value!r} do not fit the shape {shape}")
    return cuts


def _sides(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value):
        raise ValueError(f"{value!r} is no list of sizes")
    if math.prod(max(side, 1) for side in value) > MAX_NUMBERS:
        raise ValueError(f"{value!r} are more than {MAX_NUMBERS} numbers")
    return tuple(value)


def _separator(value: Any) -> str:
    if value not in (".", "/"):
        raise ValueError(f"{value!r} separates the numbers of a chunk, not '.' or '/'")
    return value


def _dtype(value: Any) -> str:
    try:
        return np.dtype(value).name
    except (TypeError, ValueError):
        return str(value)
