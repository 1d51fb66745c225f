"""Where a run is kept: a folder that all nodes see, or an object store with a work folder on each node.

What is in the run's folder either way: start/, step_*/, run.json, bad_rows.json. What is appended to (rows/,
skipped/, metrics.jsonl) stays in the work folder of the node that writes it.
"""

import contextlib
import fcntl
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipelines import files, manifest
from pipelines.dataset import filesystem_of
from pipelines.manifest import MANIFEST, Entries

START = "start"  # the policy before the first step, with the statistics that are exported with it
STEPS = "step_"
PRETRAINED, ADAPTER = "pretrained_model", "adapter"  # of a checkpoint; of averaged weights with _ema behind
CHUNK_BYTES = 64 * 2**20
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunStorage:
    """The folders and small files of one run."""

    folder: Path
    """The run's folder; if `uri` is given, the work folder, which every node has of its own."""
    uri: str = ""
    """The run in an object store."""

    def __str__(self) -> str:
        return self.uri.partition("?")[0] or str(self.folder)

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self).rpartition("/")[2]

    def address(self, name: str) -> str:
        """The path or URI of something in the run's folder."""
        return files.joined(self.uri or str(self.folder), name)

    def place(self) -> tuple[pafs.FileSystem, str]:
        """The file system that keeps the run, and the run's folder there."""
        return filesystem_of(self.uri or str(self.folder))

    def checkpoints(self) -> list[str]:
        """Names of all checkpoint folders, good or not, the newest first."""
        filesystem, root = self.place()
        found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        folders = (entry.base_name for entry in found if entry.type == pafs.FileType.Directory)
        # others (step_000000200.partial, say) are not ours to judge
        return sorted((name for name in folders if re.fullmatch(f"{STEPS}\\d+", name)), reverse=True)

    def newest(self) -> Path | None:
        """The newest good checkpoint, as a folder on this node; the log names those that are not good."""
        for name in self.checkpoints():
            reason = self.problem(name)
            if reason is None:
                return self.folder / name
            LOG.warning("checkpoint %s/%s is skipped: %s", self, name, reason)
        return None

    def problem(self, name: str) -> str | None:
        """Why a sealed folder is not good, or None if it is, and lies on this node."""
        try:
            reason = manifest.problem(self.fetched(name))
            if reason and self.uri:  # of what was fetched earlier; what is fetched now is verified
                shutil.rmtree(self.folder / name)
                reason = manifest.problem(self.fetched(name))
            return reason
        except DamagedError as error:
            return str(error)

    def fetched(self, name: str) -> Path:
        """A sealed folder of the run on this node; what comes from an object store is verified.

        Raises:
            DamagedError: the store does not hold what its manifest says.
        """
        if not self.uri:
            return self.folder / name
        with _one_process(self.folder / ".fetching"):  # workers of one node want the same files
            return self._fetched(name)

    def _fetched(self, name: str) -> Path:
        filesystem, root = self.place()
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        try:
            sealed = self.read(f"{name}/{MANIFEST}")
        except FileNotFoundError:
            raise DamagedError(f"no {MANIFEST}: it was not finished") from None
        fetched_before = (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == sealed
        if fetched_before and manifest.problem(target, read_files=False) is None:
            return target
        older = self.folder.glob(f"{STEPS}*") if name.startswith(STEPS) else ()
        for left in (*older, partial, target):
            shutil.rmtree(left, ignore_errors=True)
        for file in _declared(sealed):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            _copy(filesystem, f"{root}/{name}/{file}", pafs.LocalFileSystem(), str(partial / file))
        (partial / MANIFEST).write_bytes(sealed)
        if reason := manifest.problem(partial):
            raise DamagedError(reason)
        partial.rename(target)
        return target

    def staging(self, name: str, *, rank: int) -> Path:
        """Where a rank writes its files of a folder: the folder itself if all see it."""
        return self.folder / "staging" / f"rank_{rank}" / name if self.uri else self.folder / name

    def delete(self, name: str) -> None:
        """Remove a folder of the run, its manifest first: what is half deleted must not count."""
        filesystem, root = self.place()
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(f"{root}/{name}")

    def upload(self, staged: Path, name: str) -> Entries:
        """Copy the files of a staged folder into the store; returns what its manifest must list of them."""
        filesystem, root = self.place()
        listed = manifest.entries(staged)
        for file in listed:
            filesystem.create_dir(str(Path(root, name, file).parent), recursive=True)
            _copy(pafs.LocalFileSystem(), str(staged / file), filesystem, f"{root}/{name}/{file}")
        return listed

    def seal(self, name: str, parts: Iterable[Entries]) -> None:
        """Write the manifest of a folder that is uploaded: now it counts."""
        listed = {file: entry for part in parts for file, entry in part.items()}
        self.write(f"{name}/{MANIFEST}", manifest.text(listed).encode())

    def files_below(self, name: str) -> list[str]:
        """Paths, from the run's folder on, of the files in a folder of it, sorted; none if there is none."""
        filesystem, root = self.place()
        selector = pafs.FileSelector(f"{root}/{name}", allow_not_found=True, recursive=True)
        found = (entry.path for entry in filesystem.get_file_info(selector) if entry.is_file)
        return sorted(f"{name}/{path.rpartition(f'/{name}/')[2]}" for path in found)

    def has(self, name: str) -> bool:
        """Whether the run has this file."""
        filesystem, root = self.place()
        return files.exists(filesystem, f"{root}/{name}")

    def read(self, name: str) -> bytes:
        """A small file of the run's folder."""
        filesystem, root = self.place()
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Put a small file into the run's folder, whole or not at all."""
        filesystem, root = self.place()
        with files.atomic_stream(filesystem, f"{root}/{name}") as stream:
            stream.write(content)

    def delete_file(self, name: str) -> None:
        filesystem, root = self.place()
        filesystem.delete_file(f"{root}/{name}")

    def write_json(self, name: str, content: Any) -> None:
        filesystem, root = self.place()
        files.write_json(filesystem, f"{root}/{name}", content, indent=1)

    def read_json(self, name: str) -> Any:
        filesystem, root = self.place()
        return files.read_json(filesystem, f"{root}/{name}")


class DamagedError(Exception):
    """A folder of an object store does not hold what its manifest says."""


def _declared(sealed: bytes) -> Entries:
    try:
        return manifest.declared(sealed)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _copy(source: pafs.FileSystem, path: str, target: pafs.FileSystem, to: str) -> None:
    try:
        # Arrow's threaded upload can hang (arrow#32372).
        pafs.copy_files(path, to, source, target, chunk_size=CHUNK_BYTES, use_threads=False)
    except FileNotFoundError:
        raise DamagedError(f"{Path(path).name} is missing") from None


@contextlib.contextmanager
def _one_process(lock_path: Path) -> Iterator[None]:
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
