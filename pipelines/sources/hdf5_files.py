"""HDF5 files of strangers: opened, and followed to a dataset or an attribute, without believing anything.

Links are looked at one by one and never lead out of the file, values lie in the file itself, and sizes are
compared with the limits below before anything is allocated. What is wrong is a `FlawError`; a storage that
does not answer is a `StorageError` as everywhere, and no word about the file.
"""

import contextlib
import difflib
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import h5py
import numpy as np
from h5py import h5l, h5z  # pyright: ignore[reportAttributeAccessIssue]

from pipelines.sources import Refusal
from pipelines.sources.storage import Folder

MAX_FRAMES = 1_000_000
"""Rows of a dataset: five hours at 50 Hz."""
MAX_CHUNK_BYTES = 256 * 1024**2
"""HDF5 unpacks a chunk whole."""
MAX_ATTRIBUTE_BYTES = 1024**2
"""HDF5 itself allows 64 KB unless a file asks for more."""
MAX_OBJECTS = 2000
"""Datasets of one episode that are looked at."""
MAX_DEPTH = 8
"""Groups within groups, and links to links; more are a loop."""
CACHE_BYTES = 8 * 1024**2
"""HDF5's own cache of unpacked chunks, for each dataset."""
REMOTE_BYTES = 256 * 1024
"""Read at once from an object store: HDF5 asks for metadata in some hundred bytes."""

H5_ERRORS = (OSError, KeyError, RuntimeError, TypeError, ValueError)
"""What h5py raises on a damaged file; caught around single calls of h5py only."""


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """A `Refusal` of an episode whose name is not known here."""

    reason: str
    detail: str
    camera: str | None = None
    frame: int | None = None

    def refusal(self, episode: str) -> Refusal:
        return Refusal(
            episode=episode, reason=self.reason, detail=self.detail, camera=self.camera, frame=self.frame
        )


class FlawError(Exception):
    """What is wrong with an episode or a file, at least one thing."""

    def __init__(self, *flaws: Flaw) -> None:
        super().__init__(*flaws)
        self.flaws = flaws


def flaw(reason: str, detail: str, *, frame: int | None = None) -> FlawError:
    return FlawError(Flaw(reason=reason, detail=detail, frame=frame))


@contextlib.contextmanager
def collected(flaws: list[Flaw], *, camera: str | None = None) -> Iterator[None]:
    """Note what is wrong and go on, so that all of it is reported at once."""
    try:
        yield
    except FlawError as error:
        flaws += [replace(one, camera=camera) for one in error.flaws]


class OpenFile:
    """The file that is open; a run of episodes mostly stays in one."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.name: str | None = None
        self.file: h5py.File | None = None

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def at(self, name: str) -> h5py.File:
        if self.file is None or self.name != name:
            self._close()
            try:
                self.file, self.name = self._opened(name), name
            except H5_ERRORS as error:
                raise flaw("file_unreadable", f"{name}: {error}") from None
        return self.file

    def _opened(self, name: str) -> h5py.File:
        if self.folder.is_local:
            # a file that is still being recorded is locked; a disk that knows no locks must not matter
            path = self.folder.local_path(name)
            return h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES, locking="best-effort")
        stream = io.BufferedReader(cast(io.RawIOBase, self.folder.open(name)), REMOTE_BYTES)
        return h5py.File(stream, "r", rdcc_nbytes=CACHE_BYTES)

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


# --- groups and links ---


def found(group: h5py.Group, path: str, *, hops: int = MAX_DEPTH) -> Any:
    """Return the group or dataset at a path; None if there is none.

    Raises:
        FlawError: a link on the way leads out of the file, or the file is damaged.
    """
    node: Any = group.file if path.startswith("/") else group
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if not isinstance(node, h5py.Group):
            return None
        node = _child(node, name, hops=hops)
    return node


def _child(group: h5py.Group, name: str, *, hops: int) -> Any:
    where = f"{group.name}/{name}".lstrip("/")
    try:
        link = name.encode()
        if not group.id.links.exists(link):
            return None
        kind = group.id.links.get_info(link).type
        if kind == h5l.TYPE_HARD:
            return _readable(group[name])
        target = group.id.links.get_val(link) if kind == h5l.TYPE_SOFT else None
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"{where}: {error}") from None
    if target is None:
        raise flaw("external_link", f"{where} leads out of the file")
    if hops == 0:
        raise flaw("data_unreadable", f"{where}: links in a circle")
    return found(group, target.decode(errors="backslashreplace"), hops=hops - 1)


def _readable(node: Any) -> Any:
    """Ask a dataset for its type, once and where an error is expected: HDF5 has types that NumPy has not."""
    if isinstance(node, h5py.Dataset):
        assert node.dtype is not None
    return node


def found_quietly(group: h5py.Group, path: str) -> Any:
    """Look where nothing is read yet: whoever reads it will meet the flaw."""
    with contextlib.suppress(FlawError):
        return found(group, path)
    return None


def group_at(file: h5py.File, path: str) -> h5py.Group:
    group = found(file, path)
    if not isinstance(group, h5py.Group):
        raise flaw("data_unreadable", f"{path} is no group")
    return group


def names_in(group: h5py.Group) -> list[str]:
    """Return the names in a group; one that is no UTF-8 is spelled out, and leads nowhere."""
    try:
        names = cast("list[str | bytes]", list(group))
        return [n.decode(errors="backslashreplace") if isinstance(n, bytes) else n for n in names]
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"{group.name}: {error}") from None


def datasets_below(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Return every dataset by its path."""
    return dict(itertools.islice(_datasets(group, "", MAX_DEPTH), MAX_OBJECTS))


def _datasets(group: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, h5py.Dataset]]:
    for name in names_in(group):
        node = found_quietly(group, name)
        if isinstance(node, h5py.Dataset):
            yield f"{prefix}{name}", node
        elif isinstance(node, h5py.Group) and depth:
            yield from _datasets(node, f"{prefix}{name}/", depth - 1)


# --- datasets ---


def dataset_at(group: h5py.Group, key: str, *, known: Sequence[str] = ()) -> h5py.Dataset:
    """Return a dataset with rows, whose values lie in this file and can be unpacked.

    Args:
        group: Where to look.
        key: Path in the group.
        known: Keys that the group has, for a word about a missing one.

    Raises:
        FlawError: there is no such dataset.
    """
    dataset = found(group, key)
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and close[0] != key else ""
        raise flaw("column_missing", f"no dataset {key!r} with rows{hint}")
    try:
        problem = _storage_problem(dataset)
    except (OSError, RuntimeError, ValueError) as error:
        raise flaw("data_unreadable", f"{key}: {error}") from None
    if problem is not None:
        raise flaw(problem[0], f"{key}: {problem[1]}")
    return dataset


def row_bytes(dataset: h5py.Dataset) -> int:
    """Return the size of a row; of a row of its own length only its reference counts."""
    return math.prod(dataset.shape[1:]) * dataset.dtype.itemsize


def _storage_problem(dataset: h5py.Dataset) -> tuple[str, str] | None:
    """Return (reason, detail) of values that are not in the file, not there, or too many at once."""
    if dataset.is_virtual:
        return "virtual_dataset", "its values lie in other datasets"
    if dataset.external:
        return "external_storage", f"its values lie in {dataset.external[0][0]}"
    if dataset.shape[0] > MAX_FRAMES:
        return "too_large", f"{dataset.shape[0]} rows"
    problem = _filter_problem(dataset)
    if problem is None and dataset.chunks:
        return _chunk_problem(dataset, dataset.chunks)
    return problem or _block_problem(dataset)


def _filter_problem(dataset: h5py.Dataset) -> tuple[str, str] | None:
    settings = dataset.id.get_create_plist()
    for number in range(settings.get_nfilters()):
        code, _, _, name = settings.get_filter(number)
        if not h5z.filter_avail(code):
            return "filter_missing", f"packed by filter {code} ({name.decode(errors='replace')})"
    return None


def _chunk_problem(dataset: h5py.Dataset, chunks: tuple[int, ...]) -> tuple[str, str] | None:
    chunk_bytes = math.prod(chunks) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        return "too_large", f"chunks of {chunk_bytes} bytes"
    packed: list[int] = []
    dataset.id.chunk_iter(lambda chunk: packed.append(chunk.size))
    if max(packed, default=0) > 1.1 * chunk_bytes + 4096:  # HDF5 unpacks to the end, and gzip makes 1000 of 1
        return "too_large", f"a chunk of {chunk_bytes} bytes is packed into {max(packed)}"
    sides = [-(-side // chunk) for side, chunk in zip(dataset.shape, chunks, strict=True)]
    unwritten = math.prod(sides) - len(packed)
    if unwritten > 0:  # HDF5 would hand out zeros
        return "data_unwritten", f"{unwritten} of {math.prod(sides)} chunks were never written"
    return None


def _block_problem(dataset: h5py.Dataset) -> tuple[str, str] | None:
    if math.prod(dataset.shape) and not dataset.id.get_storage_size():
        return "data_unwritten", f"the values of {dataset.shape} were never written"
    return None


# --- texts and numbers ---


def attribute(node: h5py.Group, name: str) -> Any:
    """Return an attribute's value; None if there is none."""
    try:
        if name not in node.attrs:
            return None
        size = node.attrs.get_id(name).get_storage_size()
        value = node.attrs[name] if size <= MAX_ATTRIBUTE_BYTES else None
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"{node.name}: attribute {name}: {error}") from None
    if size > MAX_ATTRIBUTE_BYTES:
        raise flaw("too_large", f"{node.name}: attribute {name} of {size} bytes")
    return value


def json_attribute(node: h5py.Group, name: str) -> dict[str, Any]:
    """Return an attribute's JSON object; an empty one where there is none."""
    try:
        content = json.loads(text_of(attribute(node, name)) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def text_at(group: h5py.Group, key: str) -> str | None:
    """Return the text of a dataset that holds a single one."""
    dataset = found(group, key)
    if not isinstance(dataset, h5py.Dataset) or dataset.size != 1:
        return None
    if dataset.is_virtual or dataset.external or dataset.dtype.itemsize > MAX_ATTRIBUTE_BYTES:
        return None
    try:
        return text_of(dataset[...])
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"{key}: {error}") from None


def text_of(value: Any) -> str | None:
    """Return a text; None for what is none, or empty, or not UTF-8."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    try:
        # h5py marks bytes that are no UTF-8 by surrogates, which do not encode
        text = value.decode() if isinstance(value, bytes) else value
        return str(text) if isinstance(text, str) and text.encode().strip() else None
    except UnicodeError:
        return None


def number_of(value: Any) -> float | None:
    """Return a finite number; None for what is none."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any length
        return None
