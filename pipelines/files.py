"""Files of an output that appear whole or not at all, on a local disk or an object store.

On a local file system a file is written under a temporary name and renamed. On an object store a PUT is
atomic by itself, but closing a half-written stream also publishes it; whoever reads large files back must
check them.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

TEMPORARY = ".tmp"


@contextlib.contextmanager
def atomic_stream(filesystem: pafs.FileSystem, path: str) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when the block ends without an error."""
    folder, _, name = path.rpartition("/")
    filesystem.create_dir(folder, recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            yield cast(BinaryIO, stream)
        return
    # a name of its own for every attempt: a worker that was given up may still be writing
    temporary = Path(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(filesystem: pafs.FileSystem, root: str) -> None:
    """Delete what killed writers left below a folder, if there is one."""
    for entry in filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True)):
        if entry.base_name.startswith(".") and entry.base_name.endswith(TEMPORARY):
            filesystem.delete_file(entry.path)


def write_json(filesystem: pafs.FileSystem, path: str, content: Any, *, indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False).encode()
    with atomic_stream(filesystem, path) as stream:
        stream.write(text)


def read_json(filesystem: pafs.FileSystem, path: str) -> Any:
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())


def write_parquet(filesystem: pafs.FileSystem, path: str, table: pa.Table) -> None:
    with atomic_stream(filesystem, path) as stream:
        pq.write_table(table, stream)


def copy_file(filesystem: pafs.FileSystem, source: str, target: str) -> None:
    """Replace `target` in one step by what `source` holds; for small files."""
    with filesystem.open_input_stream(source) as content, atomic_stream(filesystem, target) as stream:
        stream.write(content.read())


def joined(uri: str, name: str) -> str:
    """The path or URI of something in a folder; a URI's options stay behind it."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def parted(uri: str) -> tuple[str, str]:
    """The folder that something is in, and its name there; the inverse of `joined`."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{folder}{mark}{options}", name


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return filesystem.get_file_info(path).type == pafs.FileType.File
