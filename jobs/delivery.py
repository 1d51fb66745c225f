"""How a run's points and pictures reach MLflow: none is lost, none twice, and training never waits.

Points go to an actor beside the driver, which appends them to a spool file in the run's folder and returns; a
thread ships the file in batches and remembers how far it came. The server may be away for as long as it
likes. A point is known by its step: after a restart the replayed steps have the same values (that is what the
plan is for), so the first writing of a step stays and later ones are dropped; no curve shows a step twice.
"""

import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from jobs.machines import Machines
from jobs.pictures import Pictures
from jobs.shipper import Point
from jobs.tracking import TrackedRun
from pipelines.dataset import filesystem_of
from pipelines.files import parted
from pipelines.metrics import SPOOL as SPOOL_LENGTH
from pipelines.metrics import HeldGauge
from pipelines.predictions import Predictions
from pipelines.run_storage import RunStorage

SPOOL = "metrics.jsonl"
WAITING = "metrics_waiting.jsonl"  # in an object store: what was not delivered at the last checkpoint
BATCH = 1000  # points; the REST API takes no more at once
SHIP_EVERY_S = 1.0
RETRY_AFTER_S = 5.0
LOOK_AT_MACHINES_EVERY_S = 10.0


class Spool:
    """An append-only file of records and the offset up to which the server has them."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset_path = path, path.with_suffix(".offset")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole = path.read_bytes()
        kept = whole.rfind(b"\n") + 1  # a writer that was killed may have left half a line
        self.last_step = 0
        for line in whole[:kept].splitlines():
            record = json.loads(line)
            if "metrics" in record:
                self.last_step = max(self.last_step, record["step"])
        self._file = path.open("ab")
        self._file.truncate(kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is with the operating system when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when the file is on the disk."""
        os.fsync(self._file.fileno())

    @property
    def offset(self) -> int:
        """Bytes that the server has."""
        return int(self._offset_path.read_text()) if self._offset_path.exists() else 0

    def pending(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` records that the server does not have, and the offset behind them."""
        offset = self.offset
        records = []
        with self.path.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if len(records) == limit or not line.endswith(b"\n"):
                    break
                records.append(json.loads(line))
                offset += len(line)
        return records, offset

    @property
    def waiting_bytes(self) -> int:
        """Bytes that the server does not have."""
        return self.path.stat().st_size - self.offset

    def shipped(self, offset: int) -> None:
        """Note what the server has."""
        partial = self._offset_path.with_suffix(".partial")
        partial.write_text(str(offset))
        partial.replace(self._offset_path)


class Delivery:
    """Holds the spool: takes points at once, delivers them when the server can be reached.

    Args:
        run: whose points they are.
        storage: where the spool lies.
        began_ms: when the run began, from which the seconds of the machines' metrics count.
    """

    def __init__(self, run: TrackedRun, storage: RunStorage, began_ms: int) -> None:
        self._run, self._storage, self._began_ms = run, storage, began_ms
        path = storage.folder / SPOOL
        moved = bool(storage.uri) and not path.exists()
        self._spool = Spool(path)
        if moved:
            self._take_over()
        self._latest: tuple[int, dict[str, float]] = (0, {})
        self._closing = threading.Event()
        self._pictures = Pictures(run, storage)
        self._waiting = HeldGauge(SPOOL_LENGTH, run=storage.name, rank="driver")
        self._thread = threading.Thread(target=self._ship, daemon=True)
        self._thread.start()
        threading.Thread(target=self._look_at_machines, daemon=True).start()

    def log(self, points: Sequence[Point]) -> None:
        for step, metrics, timestamp_ms in points:
            self._latest = (step, metrics)
            if step > self._spool.last_step:
                self._spool.last_step = step
                self._spool.append({"step": step, "timestamp": timestamp_ms, "metrics": metrics})

    def checkpoint(self, step: int, uri: str, measured: dict[str, float], timestamp_ms: int) -> None:
        self._spool.append({"step": step, "checkpoint": uri, "measured": measured, "timestamp": timestamp_ms})

    def predictions(self, step: int, found: list[Predictions]) -> None:
        self._pictures.add(step, found)

    def tag(self, tags: dict[str, str]) -> None:
        self._spool.append({"tags": tags})

    def flush(self) -> None:
        """Return when the points survive this process, and with an object store this node."""
        self._spool.sync()
        if self._storage.uri:
            waiting, _ = self._spool.pending(10**9)
            lines = "".join(json.dumps(record) + "\n" for record in waiting)
            self._storage.write(WAITING, lines.encode())

    def _take_over(self) -> None:
        """Go on from what the server has and what waited at the last checkpoint: the node before is lost."""
        spool = self._spool
        spool.last_step = last_step(self._run)
        if not self._storage.has(WAITING):
            return
        for line in self._storage.read(WAITING).splitlines():
            record = json.loads(line)
            if "metrics" not in record or record["step"] > spool.last_step:
                spool.append(record)
                spool.last_step = max(spool.last_step, record["step"] if "metrics" in record else 0)

    def latest(self) -> tuple[int, dict[str, float]]:
        """The newest point, for a progress line."""
        return self._latest

    def close(self, timeout_s: float) -> int:
        """Deliver what is left for up to `timeout_s`; returns how many records the server still lacks."""
        until = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        self._pictures.close(max(until - time.monotonic(), 0))
        return len(self._spool.pending(10**9)[0])

    def _look_at_machines(self) -> None:
        machines = Machines()
        while not self._closing.wait(LOOK_AT_MACHINES_EVERY_S):
            now_ms = int(time.time() * 1000)
            second = (now_ms - self._began_ms) // 1000
            self._spool.append({"second": second, "timestamp": now_ms, "machines": machines.sample()})

    def _ship(self) -> None:
        while True:
            self._waiting.set(self._spool.waiting_bytes)
            try:
                empty = not self._ship_some()
            except MlflowException as error:
                print(
                    f"tracking server {self._run.uri} is away, points wait in {self._spool.path}: {error}"[
                        :300
                    ]
                )
                self._closing.wait(RETRY_AFTER_S)
                time.sleep(SHIP_EVERY_S)
                continue
            if empty:
                if self._closing.is_set():
                    return
                self._closing.wait(SHIP_EVERY_S)

    def _ship_some(self) -> bool:
        """Deliver one batch; False when there was nothing to deliver."""
        records, offset = self._spool.pending(BATCH // 8)
        if not records:
            return False
        points = [point for record in records for point in _points(record)]
        client = self._run.client
        for start in range(0, len(points), BATCH):
            client.log_batch(self._run.run_id, metrics=points[start : start + BATCH])
        for record in records:
            if "checkpoint" in record:
                self._log_checkpoint(client, record)
            for name, value in record.get("tags", {}).items():
                client.set_tag(self._run.run_id, name, value)
        self._spool.shipped(offset)
        return True

    def _log_checkpoint(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        """The checkpoint by reference; those that retention removed from storage leave the list."""
        _, name = parted(record["checkpoint"])
        models = client.search_logged_models(
            [self._run.experiment_id], filter_string=f"source_run_id = '{self._run.run_id}'"
        )
        for model in models:
            filesystem, path = filesystem_of(model.params["checkpoint_uri"])
            if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
                client.delete_logged_model(model.model_id)
        if name in {model.name for model in models}:
            return
        model = client.create_logged_model(
            self._run.experiment_id,
            name=name,
            source_run_id=self._run.run_id,
            model_type="smolvla_checkpoint",
            params={"step": str(record["step"]), "checkpoint_uri": record["checkpoint"]},
            tags={"mlflow.model.is_external": "true"},
        )
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        client.log_outputs(self._run.run_id, models=[LoggedModelOutput(model.model_id, step=record["step"])])
        metrics = [
            Metric(key, value, record["timestamp"], record["step"], model_id=model.model_id)
            for key, value in record["measured"].items()
            if math.isfinite(value)
        ]
        client.log_batch(self._run.run_id, metrics=metrics)
        client.set_tag(self._run.run_id, "latest_checkpoint", record["checkpoint"])


def _points(record: Mapping[str, Any]) -> Iterator[Metric]:
    """Those of a training step, or of the machines at a second of the run."""
    for values, at in (("metrics", "step"), ("machines", "second")):
        for name, value in record.get(values, {}).items():
            yield Metric(name, value, record["timestamp"], record[at])


def last_step(run: TrackedRun) -> int:
    """The last step of which the server has a point; every point has a learning rate."""
    return max((point.step for point in run.client.get_metric_history(run.run_id, "train/lr")), default=0)


def delivery_of(run: TrackedRun, storage: RunStorage) -> Callable[[], Delivery]:
    """What an actor calls to deliver a run's points."""
    began_ms = run.client.get_run(run.run_id).info.start_time
    return functools.partial(Delivery, run, storage, began_ms)
