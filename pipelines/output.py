"""The output of an ingestion: held by one run, which finds it empty, unfinished, complete or to be extended.

A folder without `meta/info.json` is no dataset; `meta/_ingest` holds what only an unfinished output needs.

**Appending** leaves every file alone that the dataset consists of: new data files and one new episode file
get names of their own, everything else is written into `meta/appended/<generation>`. Then `info.json` is
replaced, in one step; it tells how many episodes count and where statistics and report lie
(`metadata_path`). Before that step a reader sees the old dataset, after it the new one. At last the copies
in `meta/` that other programs read are replaced, too; a run that was killed there is finished by its re-run.
`tasks.parquet` grows at its end, before the step.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.dataset import filesystem_of
from pipelines.files import copy_file, exists, read_json, write_json
from pipelines.sources import Listing, feature_difference
from pipelines.writer import PART_FRAMES, STAGING, Layout, Numbering, WriterOptions, layout_of

STAGING_FORMAT = 2
"""Raised when the staged files change, so that a newer writer does not continue an older one's output."""
EPISODES_PATH = "meta/episodes/chunk-000/file-{generation:03d}.parquet"
COPIED = ("stats.json", "ingest.json", "refused.parquet", "camera_histograms.json")
"""What each generation has of its own; `meta/` has copies of the newest."""
LEASE = "meta/ingest.lock"
BEAT_S = 4.0
SILENT_S = 12.0
"""A lease that did not beat for so long is nobody's."""
SETTLE_S = 1.0
"""Longer than it takes to look for a lease and write one."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What stands already where episodes are added; empty for a new dataset."""

    generation: int = 0
    """Of the dataset to be written: 0 for a new one, 1 after the first append."""
    info: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    episodes: pa.Table | None = None
    """The episode table, in order."""
    histograms: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    noted: tuple[dict[str, Any], ...] = ()
    """The rows of `refused.parquet`."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every source that was taken in, oldest first."""
        return list(self.report.get("history", ()))

    @property
    def numbering(self) -> Numbering:
        """Where the new episodes go on."""
        if self.episodes is None:
            return Numbering()
        return Numbering(
            episode_index=self.info["total_episodes"],
            index=self.info["total_frames"],
            data_file=len(self.data_files),
        )

    @property
    def data_files(self) -> list[str]:
        """The data files in order, relative to the dataset."""
        if self.episodes is None:
            return []
        keys = zip(
            self.episodes["data/chunk_index"].to_pylist(),
            self.episodes["data/file_index"].to_pylist(),
            strict=True,
        )
        return [
            self.info["data_path"].format(chunk_index=chunk, file_index=number)
            for chunk, number in dict.fromkeys(keys)
        ]


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output that this run may write into, or that is complete."""

    layout: Layout
    base: Base
    report: dict[str, Any] | None
    """`ingest.json` of an output that has this source already; None: there is work to do."""


def absolute(uri: str) -> str:
    """Return the URI as every worker understands it, whatever folder it stands in.

    Raises:
        ValueError: there is no such place, or no right to it.
    """
    try:
        filesystem, root = filesystem_of(uri)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"output {uri}: {_first_line(error)}") from None
    return root if isinstance(filesystem, pafs.LocalFileSystem) else uri


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# --- one run at a time ---


@contextlib.contextmanager
def exclusive(uri: str, *, what: str = "output", owner: str = "another ingestion") -> Iterator[None]:
    """Hold the output for this process, so that two runs do not mix.

    `what` and `owner` name both in messages.

    A local folder is locked by the kernel, which lets go when the process ends, however it does. An object
    store has no locks: there the run leaves a lease that changes every few seconds, and whoever finds one
    watches whether it still changes. Two runs that start in the same second see each other after
    `SETTLE_S`; a run that was cut off from the store for longer than `SILENT_S` may lose its lease without
    noticing. Even then only whole files are written, with the same bytes if the source is the same.

    Raises:
        ValueError: another run holds the output, or it cannot be written.
    """
    filesystem, root = filesystem_of(uri)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    name = f"{what} {uri}"
    busy = f"{name}: {owner} is writing into it"
    with _locked(root, name, busy) if local else _leased(filesystem, f"{root}/{LEASE}", name, busy):
        yield


@contextlib.contextmanager
def _locked(root: str, name: str, busy: str) -> Iterator[None]:
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def _leased(filesystem: pafs.FileSystem, path: str, name: str, busy: str) -> Iterator[None]:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}
    try:
        if _is_held(filesystem, path, name):
            raise ValueError(busy)
        write_json(filesystem, path, owner | {"beat": 0})
        time.sleep(SETTLE_S)  # whoever looked before we wrote has written by now, and the last writer stays
        if _lease(filesystem, path).get("run") != owner["run"]:
            raise ValueError(busy)
    except OSError as error:
        raise ValueError(f"{name}: cannot be written: {_first_line(error)}") from None
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(filesystem, path, owner, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        filesystem.delete_file(path)


def _beat(filesystem: pafs.FileSystem, path: str, owner: dict[str, Any], stop: threading.Event) -> None:
    number = 0
    while not stop.wait(BEAT_S):
        number += 1
        try:
            write_json(filesystem, path, owner | {"beat": number})
        except OSError as error:  # the run itself will meet the same trouble and say so
            log.warning("the lease %s could not be renewed: %s", path, _first_line(error))


def _is_held(filesystem: pafs.FileSystem, path: str, name: str) -> bool:
    """Watch a lease for as long as its owner may be silent; no clocks are compared."""
    found = _lease(filesystem, path)
    if not found or (found["host"] == socket.gethostname() and not psutil.pid_exists(found["pid"])):
        return False
    log.warning("%s: a run on %s left a lease; watching it for %.0f s", name, found["host"], SILENT_S)
    deadline_s = time.monotonic() + SILENT_S
    while time.monotonic() < deadline_s:
        time.sleep(0.5)
        now = _lease(filesystem, path)
        if now != found:
            return bool(now)
    return False


def _lease(filesystem: pafs.FileSystem, path: str) -> dict[str, Any]:
    try:
        return read_json(filesystem, path)
    except FileNotFoundError:
        return {}


# --- what is there ---


def opened(uri: str, listing: Listing, options: WriterOptions, *, append: bool) -> Output:
    """Look at what the output holds.

    Raises:
        ValueError: it holds something else, whole or in part; the message names the first difference.
    """
    filesystem, root = filesystem_of(uri)
    layout = layout_of(uri, listing, options)
    if not exists(filesystem, f"{root}/meta/info.json"):
        if append:
            raise ValueError(
                f"output {uri}: no meta/info.json, and only a complete dataset can be appended to"
            )
        _check_unfinished(uri, provenance(listing, options) | _staging(generation=0))
        return Output(layout=layout, base=Base(), report=None)
    wanted = provenance(listing, options)
    if not append:
        report = _report(uri)
        _refuse_difference(report, wanted, uri=uri, kind="a complete dataset")
        return Output(layout=layout, base=Base(), report=report)
    base = _base(uri)
    given = {"options": wanted["options"]}
    _refuse_difference(base.report, given, uri=uri, kind="a dataset", remedy="append with the same")
    difference = feature_difference(base.info["features"], layout.features)
    if base.info["fps"] != layout.fps:
        difference = f"fps {base.info['fps']} and not {layout.fps}"
    if difference:
        raise ValueError(f"output {uri}: the dataset has {difference}, unlike the source")
    if any(entry["source"] == wanted["source"] for entry in base.history):
        return Output(layout=layout, base=base, report=dict(base.report))
    _check_unfinished(uri, wanted | _staging(generation=base.generation))
    return Output(layout=layout, base=base, report=None)


def begin(output: Output, listing: Listing) -> None:
    """Note what is being made, before the first part is written; clear what a given-up append left."""
    layout = output.layout
    filesystem, root = filesystem_of(layout.uri)
    plan = f"{root}/{STAGING}/plan.json"
    if not exists(filesystem, plan):
        _clear_staging(filesystem, root)  # the rest of one whose removal was interrupted
        if output.base.generation:
            _remove_unlisted(output, filesystem, root)
    content = provenance(listing, layout.options) | _staging(generation=output.base.generation)
    write_json(filesystem, plan, content)


def plan_of(uri: str) -> dict[str, Any]:
    """What an unfinished output is made of: its source, options, and under `staging` its generation."""
    filesystem, root = filesystem_of(uri)
    return read_json(filesystem, f"{root}/{STAGING}/plan.json")


def _remove_unlisted(output: Output, filesystem: pafs.FileSystem, root: str) -> None:
    """Delete data and episode files that the dataset does not consist of."""
    kept = set(output.base.data_files)
    kept |= {EPISODES_PATH.format(generation=number) for number in range(output.base.generation)}
    for folder in ("data", "meta/episodes"):
        for entry in filesystem.get_file_info(pafs.FileSelector(f"{root}/{folder}", recursive=True)):
            if entry.type == pafs.FileType.File and entry.path.removeprefix(f"{root}/") not in kept:
                filesystem.delete_file(entry.path)


def settle(uri: str) -> None:
    """Do what follows the writing of `info.json`; a run that was killed there is finished by the next one.

    The staging of an append that is under way stays.
    """
    filesystem, root = filesystem_of(uri)
    if not exists(filesystem, f"{root}/meta/info.json"):
        return
    folder = metadata_path(read_json(filesystem, f"{root}/meta/info.json"))
    if folder != "meta":
        for name in COPIED:
            copy_file(filesystem, f"{root}/{folder}/{name}", f"{root}/meta/{name}")
    plan = f"{root}/{STAGING}/plan.json"
    if exists(filesystem, plan):
        staged = read_json(filesystem, plan)["staging"].get("generation", 0)
        if staged > _generation_of(folder):
            return
    _clear_staging(filesystem, root)


def _clear_staging(filesystem: pafs.FileSystem, root: str) -> None:
    if filesystem.get_file_info(f"{root}/{STAGING}").type == pafs.FileType.Directory:
        filesystem.delete_dir(f"{root}/{STAGING}")


def metadata_folder(generation: int) -> str:
    """Return where a generation has its statistics and its report."""
    return "meta" if generation == 0 else f"meta/appended/{generation:05d}"


def metadata_path(info: Mapping[str, Any]) -> str:
    """Return where the statistics and the report of the dataset lie, as `info.json` says."""
    path = info.get("metadata_path", "meta")
    if not re.fullmatch(r"meta(/appended/\d+)?", path):
        raise ValueError(f"meta/info.json: metadata_path {path!r} is none that this program writes")
    return path


def _generation_of(folder: str) -> int:
    return 0 if folder == "meta" else int(folder.rpartition("/")[2])


def provenance(listing: Listing, options: WriterOptions) -> dict[str, Any]:
    """Return what the dataset is made of, as it will be read back from JSON: tuples become lists."""
    return json.loads(json.dumps({"source": listing.identity, "options": asdict(options)}))


def _staging(*, generation: int) -> dict[str, Any]:
    """Return what a run must have in common with the one it continues, besides source and options."""
    return {"staging": {"format": STAGING_FORMAT, "part_frames": PART_FRAMES, "generation": generation}}


def _check_unfinished(uri: str, wanted: dict[str, Any]) -> None:
    filesystem, root = filesystem_of(uri)
    plan = f"{root}/{STAGING}/plan.json"
    appending = wanted["staging"]["generation"] > 0
    if exists(filesystem, plan):
        kind = "an unfinished append" if appending else "an unfinished ingestion"
        remedy = "run that command again, or remove "
        remedy += f"{STAGING} from the dataset" if appending else "the output"
        _refuse_difference(read_json(filesystem, plan), wanted, uri=uri, kind=kind, remedy=remedy)
    if appending or exists(filesystem, plan):
        return
    entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
    if any(entry.type == pafs.FileType.File and entry.path != f"{root}/{LEASE}" for entry in entries):
        raise ValueError(f"output {uri}: is not empty and holds no ingestion that could be continued")


def _refuse_difference(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    uri: str,
    kind: str,
    remedy: str = "give another output or remove it",
) -> None:
    for group in wanted:
        for name in sorted(found[group].keys() | wanted[group].keys()):
            there, here = found[group].get(name), wanted[group].get(name)
            if there != here:
                raise ValueError(
                    f"output {uri}: holds {kind} with {name} {there!r}, this run has {here!r}; {remedy}"
                )


def _report(uri: str) -> dict[str, Any]:
    """Return what `ingest.json` says of a complete dataset that this program wrote."""
    filesystem, root = filesystem_of(uri)
    path = f"{root}/{metadata_path(read_json(filesystem, f'{root}/meta/info.json'))}/ingest.json"
    if not exists(filesystem, path):
        raise ValueError(f"output {uri}: holds a dataset that this program did not write")
    return read_json(filesystem, path)


def options_of(uri: str) -> WriterOptions:
    """Return the options that a complete dataset was written with.

    Raises:
        ValueError: there is none, or not of this program.
    """
    filesystem, root = filesystem_of(uri)
    if not exists(filesystem, f"{root}/meta/info.json"):
        raise ValueError(f"output {uri}: no meta/info.json; only a complete dataset is appended to")
    options = _report(uri)["options"]
    if options["resize"] is not None:
        options["resize"] = tuple(options["resize"])
    return WriterOptions(**options)


def _base(uri: str) -> Base:
    filesystem, root = filesystem_of(uri)
    info, report = read_json(filesystem, f"{root}/meta/info.json"), _report(uri)
    if "history" not in report:
        raise ValueError(f"output {uri}: was written by an older version; merge it into a new dataset")
    folder, generation = f"{root}/{metadata_path(info)}", len(report["history"])
    paths = [f"{root}/{EPISODES_PATH.format(generation=number)}" for number in range(generation)]
    tasks = pq.read_table(f"{root}/meta/tasks.parquet", filesystem=filesystem)
    return Base(
        generation=generation,
        info=info,
        report=report,
        tasks=tuple(tasks.sort_by("task_index")["task"].to_pylist()[: info["total_tasks"]]),
        episodes=pa.concat_tables([pq.read_table(path, filesystem=filesystem) for path in paths]),
        histograms=read_json(filesystem, f"{folder}/camera_histograms.json"),
        noted=tuple(pq.read_table(f"{folder}/refused.parquet", filesystem=filesystem).to_pylist()),
    )
