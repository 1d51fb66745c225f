"""A run's pictures beside its curves, drawn and sent by a thread while it trains.

    plots/curves.png                        loss, error, learning rate, speed, waiting: the run at a glance
    plots/actions/<dataset>/step_*.png      predicted against true chunks, the error at each step of the chunk
    bad_rows.json                           every row whose images could not be used, as soon as there is one

What the policy did lies in the run's folder, predictions/step_*/<dataset>.npz. A picture that is not at the
server is drawn from it, now or when the run goes on.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException

from jobs.tracking import TrackedRun
from pipelines import drawing
from pipelines.predictions import Predictions
from pipelines.progress import folder_name
from pipelines.run_storage import RunStorage

DATA, PICTURES, CURVES, BAD_ROWS = "predictions", "plots/actions", "plots/curves.png", "bad_rows.json"
LOOK_EVERY_S = 2.0
CURVES_EVERY_S = 60.0


class Pictures:
    """Those of one run."""

    def __init__(self, run: TrackedRun, storage: RunStorage) -> None:
        self._run, self._storage = run, storage
        self._curves_at, self._bad_rows = time.monotonic(), b""
        self._new, self._closing = threading.Event(), threading.Event()
        self._new.set()  # what an earlier job did not send
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, step: int, found: Sequence[Predictions]) -> None:
        """Keep what the policy did, to be drawn."""
        for one in found:
            self._storage.write(f"{DATA}/{folder_name(step)}/{one.dataset}.npz", one.to_bytes())
        self._new.set()

    def close(self, timeout_s: float) -> None:
        """Send the rest."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            print(f"the pictures were not complete after {timeout_s:.0f} s", flush=True)

    def _work(self) -> None:
        while True:
            closing = self._closing.wait(LOOK_EVERY_S)
            try:
                if self._new.is_set():
                    self._new.clear()
                    self._send_actions()
                if closing or time.monotonic() > self._curves_at + CURVES_EVERY_S:
                    self._send_curves()
                    self._send_bad_rows()
            except (MlflowException, OSError) as error:
                print(f"pictures wait: {str(error)[:300]}", flush=True)
                self._new.set()
                time.sleep(LOOK_EVERY_S)
            else:
                if closing:
                    return

    def _send_actions(self) -> None:
        sent = self._sent()
        for path in self._storage.files_below(DATA):
            _, step, name = path.split("/")
            dataset = Path(name).stem
            target = f"{PICTURES}/{dataset}/{step}.png"
            if target not in sent:
                found = Predictions.from_bytes(self._storage.read(path))
                number = int(step.rpartition("_")[2])
                title = f"{dataset}, step {number:,}: {len(found.frame)} held-out frames, dataset's units"
                picture = drawing.action_chunks(found, title=title)
                self._run.client.log_figure(self._run.run_id, picture, target)

    def _sent(self) -> set[str]:
        client, run_id = self._run.client, self._run.run_id
        folders = client.list_artifacts(run_id, PICTURES)
        return {entry.path for folder in folders for entry in client.list_artifacts(run_id, folder.path)}

    def _send_curves(self) -> None:
        client, run_id = self._run.client, self._run.run_id
        points = {}
        for name in (name for names in drawing.RUN_PANELS.values() for name in names):
            if history := client.get_metric_history(run_id, name):
                steps, values = zip(*sorted((point.step, point.value) for point in history), strict=True)
                points[name] = np.array(steps), np.array(values)
        if points:
            picture = drawing.training_curves(points, title=self._storage.name)
            client.log_figure(run_id, picture, CURVES)
        self._curves_at = time.monotonic()

    def _send_bad_rows(self) -> None:
        if not self._storage.has(BAD_ROWS):
            return
        named = self._storage.read(BAD_ROWS)
        if named != self._bad_rows:
            self._run.client.log_text(self._run.run_id, named.decode(), BAD_ROWS)
            self._bad_rows = named
