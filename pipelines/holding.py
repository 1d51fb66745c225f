"""A checkpoint's policy, held under another name: retention may delete the checkpoint while it is evaluated.

evaluating/step_000000200/
    pretrained_model/   links to the checkpoint's files; copies where there are no links, as in a store
    MANIFEST.json       their entries of the checkpoint's own, written last: what is held is as it was sealed
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.manifest import MANIFEST, declared, text
from pipelines.run_storage import RunStorage

EVALUATING = "evaluating"


def hold(storage: RunStorage, name: str, *, parts: Collection[str]) -> str | None:
    """Hold folders of a checkpoint; returns where it is held, or None if the checkpoint is gone.

    Args:
        storage: of the run.
        name: of the checkpoint.
        parts: its folders that are held, such as pretrained_model.
    """
    copy = f"{EVALUATING}/{name}"
    if storage.has(f"{copy}/{MANIFEST}"):
        return storage.address(copy)
    filesystem, root = storage.place()
    try:
        sealed = declared(storage.read(f"{name}/{MANIFEST}"))
        mine = {file: entry for file, entry in sealed.items() if file.partition("/")[0] in parts}
        for file in mine:
            _linked(filesystem, f"{root}/{name}/{file}", f"{root}/{copy}/{file}")
    except OSError:
        release(storage, name)
        if storage.has(f"{name}/{MANIFEST}"):
            raise
        return None
    storage.write(f"{copy}/{MANIFEST}", text(mine).encode())
    return storage.address(copy)


def held(storage: RunStorage) -> list[str]:
    """Names of the checkpoints that are held, whole or not."""
    files = storage.files_below(EVALUATING)
    return sorted({file.split("/")[1] for file in files if file.count("/") > 1})


def release(storage: RunStorage, name: str) -> None:
    """Let go of a checkpoint."""
    storage.delete(f"{EVALUATING}/{name}")


def _linked(filesystem: pafs.FileSystem, path: str, to: str) -> None:
    filesystem.create_dir(str(Path(to).parent), recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.copy_file(path, to)  # the store copies by itself
        return
    Path(to).unlink(missing_ok=True)  # of a job that was killed here
    try:
        os.link(path, to)
    except FileNotFoundError:
        raise
    except OSError:  # some file systems have no links
        shutil.copy2(path, to)
