"""The files of a source dataset, in a folder, an object store or a snapshot of the Hugging Face Hub.

Two kinds of trouble are kept apart: a file that is missing or broken is its episode's fault, and a refusal; a
storage that does not answer says nothing about the file, raises `StorageError` and stops the job, because
a refusal would outlive the outage in the output.

Object stores are read by ranged requests, nothing is downloaded to disk. Links inside a folder may not lead
out of it, except within the Hub's own cache, where every file of a snapshot is a link into `blobs/`.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
from huggingface_hub import snapshot_download

from pipelines.dataset import filesystem_of

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
BLOCK_BYTES = 4 * 1024**2
"""Read at once of a video or of a column of images, and one request where they lie in an object store."""


class StorageError(Exception):
    """The storage failed while a file was read."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A dataset's folder; file names are relative to it."""

    uri: str
    """As the user wrote it, for messages."""
    filesystem: pafs.FileSystem
    root: str
    """Its path in the file system, absolute: a worker may stand in another folder."""
    boundary: str | None
    """The local folder that links may not leave; None: they may."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def local_path(self, name: str) -> str:
        """Return the path of a local file, links resolved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a link leads out of the dataset.
        """
        try:
            real = Path(self.root, name).resolve(strict=True)
        except (NotADirectoryError, RuntimeError):  # RuntimeError: a link to itself
            raise FileNotFoundError(f"{name} does not exist") from None
        if not real.is_file():  # opening a named pipe would wait for ever
            raise FileNotFoundError(f"{name} is no file")
        if self.boundary is not None and not real.is_relative_to(self.boundary):
            raise ValueError(
                f"{self.uri}/{name} is a link out of the dataset, to {real}; --follow_links true reads it"
            )
        return str(real)

    def open(self, name: str) -> BinaryIO:
        """Open a file for random access.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the storage does not answer, now or at a later read.
        """
        if self.is_local:
            return cast(BinaryIO, self.filesystem.open_input_file(self.local_path(name)))
        try:
            stream = self.filesystem.open_input_file(f"{self.root}/{name}")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self.uri}/{name}: {error}") from None
        return cast(BinaryIO, _RemoteFile(stream, name=f"{self.uri}/{name}"))

    def open_ahead(self, name: str) -> BinaryIO:
        """Open a file of an object store for many small reads in about one direction."""
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, self.open(name)), BLOCK_BYTES))

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None where it does not exist."""
        return self.sizes([name])[name]

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the bytes of many files; None where one does not exist."""
        if self.is_local:
            return {name: self._local_size(name) for name in names}
        names = list(names)
        if len(names) == 1:
            entries = self._listed([f"{self.root}/{names[0]}"])
        else:  # one listing, where a request for every file would take minutes
            entries = self._listed(pafs.FileSelector(self.root, recursive=True, allow_not_found=True))
        found = {entry.path: entry.size for entry in entries if entry.type == pafs.FileType.File}
        return {name: found.get(f"{self.root}/{name}") for name in names}

    def _local_size(self, name: str) -> int | None:
        try:
            return Path(self.local_path(name)).stat().st_size
        except FileNotFoundError:
            return None

    def names_below(self, folder: str, *, suffix: str) -> list[str]:
        """Return the files in a folder and its folders, in order."""
        entries = self._listed(
            pafs.FileSelector(f"{self.root}/{folder}", recursive=True, allow_not_found=True)
        )
        return sorted(e.path.removeprefix(f"{self.root}/") for e in entries if e.path.endswith(suffix))

    def _listed(self, wanted: pafs.FileSelector | list[str]) -> list[pafs.FileInfo]:
        try:
            return self.filesystem.get_file_info(wanted)
        except OSError as error:
            raise StorageError(f"{self.uri}: {error}") from None


def folder_of(uri: str, *, follow_links: bool = False) -> Folder:
    """Find a dataset: a local folder, a URI such as s3://bucket/path, or a Hub id, `org/name[@revision]`.

    A local folder goes before a Hub id of the same form. A Hub dataset is downloaded into the cache of
    huggingface_hub; with HF_HUB_OFFLINE=1 only what is cached counts.

    Raises:
        ValueError: the Hub does not give it.
    """
    hub_id = HUB_ID.fullmatch(uri)
    if hub_id and not Path(uri).exists():
        filesystem, root = filesystem_of(_snapshot(hub_id))
    else:
        filesystem, root = filesystem_of(uri)
    root = root.rstrip("/")
    boundary = None
    if isinstance(filesystem, pafs.LocalFileSystem) and not follow_links:
        home = Path(root)
        # <cache>/datasets--org--name/snapshots/<commit>: its files are links to ../../blobs
        boundary = str(home.parent.parent if home.parent.name == "snapshots" else home)
    return Folder(uri=uri.rstrip("/"), filesystem=filesystem, root=root, boundary=boundary)


def _snapshot(hub_id: re.Match[str]) -> str:
    try:
        return snapshot_download(hub_id["repo"], repo_type="dataset", revision=hub_id["revision"])
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of them
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{hub_id[0]} is no folder here, and the Hub gives no such dataset: {reason}"
        ) from None


class _RemoteFile(io.RawIOBase):
    """A file of an object store whose failures are not mistaken for a broken file."""

    def __init__(self, stream: pa.NativeFile, *, name: str) -> None:
        self.stream = stream
        self.name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.stream.tell()

    def size(self) -> int:
        return self.stream.size()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        try:
            return self.stream.read(None if size is None or size < 0 else size)
        except OSError as error:
            raise StorageError(f"{self.name}: {error}") from None

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()
