"""An ingestion as an MLflow run: begun with its first task, ended as it ended; the data come before MLflow.

Whatever the server does, the ingestion goes on: what cannot be told is a warning, and the same command again
tells it. It waits for the server at the beginning and at the end only, and gives up soon each time.
"""

import contextlib
import csv
import hashlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from ray.exceptions import RayTaskError

from jobs import inspect_dataset, lineage, tracking
from jobs.ending import noticed
from jobs.tracking import TrackedRun
from pipelines import output
from pipelines.dataset import EpisodeDataset, filesystem_of, open_dataset
from pipelines.files import exists, parted
from pipelines.ingestion import UNSEALED_PATH, Progress, TooManyRefusedError, ingest
from pipelines.inspection import inspect
from pipelines.sealing import NOTED_SCHEMA, REFUSED_PATH
from pipelines.sources import Listing, Source
from pipelines.sources.episodes import EpisodeDatasetSource
from pipelines.writer import WriterOptions

LISTED = 10_000
"""Lines of refused.csv; all are in meta/refused.parquet."""
PARAM_CHARS = 500
FAILURE_CHARS = 500


def ingest_tracked(
    source: Source,
    uri: str,
    *,
    server: str,
    experiment: str,
    options: WriterOptions,
    max_refused: float,
    code_version: str | None,
    start_ray: Callable[[], None],
    on_progress: Callable[[Progress], None],
    append: bool = False,
) -> dict[str, Any]:
    """As `pipelines.ingestion.ingest`, with a run on an MLflow server."""
    recorder = _Recorder(source, uri, server=server, experiment=experiment, append=append)

    def begin(listing: Listing) -> None:
        recorder.begin(listing, options, max_refused=max_refused)

    def watch(progress: Progress) -> None:
        recorder.progress = progress
        on_progress(progress)

    with recorder.truthful_end():
        report = ingest(
            source,
            uri,
            options=options,
            max_refused=max_refused,
            code_version=code_version,
            start_ray=start_ray,
            on_begin=begin,
            on_progress=watch,
            append=append,
        )
        recorder.complete(report)
    return report


class _Recorder:
    """What MLflow has of one ingestion; no method fails of MLflow."""

    def __init__(self, source: Source, uri: str, *, server: str, experiment: str, append: bool) -> None:
        self._source, self._uri, self._append = source, output.absolute(uri), append
        self._server, self._experiment = server, experiment
        self._run: TrackedRun | None = None
        self._signals = contextlib.ExitStack()
        self._hand_over: Callable[[], None] = lambda: None
        self._start_s = time.monotonic()
        self.progress: Progress | None = None

    # --- the beginning ---

    def begin(self, listing: Listing, options: WriterOptions, *, max_refused: float) -> None:
        """Continue the run of the ingestion that is continued, or start one; the output is held meanwhile."""
        with self._forgiving("the ingestion goes on"):
            plan = output.plan_of(self._uri)
            generation = plan["staging"]["generation"]
            digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
            link = lineage.link_of(self._uri, generation=generation)
            known = self._known(link["run_id"]) if link and link.get("plan") == digest else None
            if known:  # MLflow lets no parameter change, so the share that is allowed now becomes a tag
                self._continue(known, {"max_refused": f"{max_refused:g}"})
            else:
                params = self._params(listing, options) | {"max_refused": f"{max_refused:g}"}
                self._run = self._started(params)
                lineage.write_link(
                    self._uri,
                    run_id=self._run.run_id,
                    tracking_uri=self._server,
                    generation=generation,
                    plan=digest,
                )
        if self._run:
            print(f"MLflow run: {self._run.link}", flush=True)
            self._hand_over = self._signals.enter_context(noticed(self._killed))

    def _started(self, params: Mapping[str, str]) -> TrackedRun:
        return tracking.start_run(
            self._server,
            experiment=self._experiment,
            name=f"ingest {parted(self._uri)[1]}",
            params=params,
            tags={**self._tags(), **self._inputs(), "kind": "ingestion", "dataset_uri": self._uri},
        )

    def _known(self, run_id: str) -> Run | None:
        """The run if this server has it."""
        try:
            run = tracking.client_of(self._server).get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _continue(self, run: Run, tags: dict[str, str]) -> None:
        run_id = run.info.run_id
        self._run = tracking.continue_run(self._server, run_id, tags=self._tags() | tags)
        if "failure" in run.data.tags:
            self._run.client.delete_tag(run_id, "failure")

    def _tags(self) -> dict[str, str]:
        return tracking.source_tags(f"jobs/{Path(sys.argv[0]).name}")

    def _params(self, listing: Listing, options: WriterOptions) -> dict[str, str]:
        params = {
            "source": listing.location,
            "format": str(listing.identity.get("format", "unknown")),
            "output": self._uri,
            "image_format": options.image_format,
        }
        if options.image_format == "jpeg":
            params["jpeg_quality"] = str(options.jpeg_quality)
        if options.resize:
            params["resize"] = "{}x{}".format(*options.resize)
        return {name: value[:PARAM_CHARS] for name, value in params.items()}

    def _inputs(self) -> dict[str, str]:
        """Tags that name the episode datasets that this one is made of, and their runs."""
        datasets: list[EpisodeDataset] = [open_dataset(self._uri)] if self._append else []
        if isinstance(self._source, EpisodeDatasetSource):
            datasets += self._source.datasets
        names = ("input_fingerprints", "input_run_ids")
        return lineage.tags(datasets, [lineage.origin(dataset) for dataset in datasets], names=names)

    # --- the end ---

    @contextlib.contextmanager
    def truthful_end(self) -> Iterator[None]:
        """What ends the ingestion with an exception ends the run as FAILED, with the reason."""
        try:
            yield
        except BaseException as error:
            if self._run:
                self._hand_over()
                with self._forgiving("MLflow does not know that the ingestion failed"):
                    self._fail(self._run, error)
            raise
        finally:
            self._signals.close()

    def _killed(self, _: threading.Event) -> None:
        assert self._run
        with contextlib.suppress(MlflowException):
            self._run.finish("KILLED")
        print("told to stop: the same command continues the ingestion", flush=True)

    def _fail(self, run: TrackedRun, error: BaseException) -> None:
        run.client.set_tag(run.run_id, "failure", _one_line(error))
        run.finish("FAILED")
        if isinstance(error, TooManyRefusedError):
            counts = {name: error.report[name] for name in ("episodes", "frames", "refused_episodes")}
            self._log_metrics(run, counts)
            self._log_refused(run, UNSEALED_PATH)

    def complete(self, report: Mapping[str, Any]) -> None:
        """Tell all of the sealed dataset, also if an earlier command sealed it and could not tell."""
        with self._forgiving("the dataset is complete; the same command again completes its run"):
            if report["already_complete"]:
                self._take_up(report)
            if self._run:
                self._tell(self._run, report)
                self._hand_over()
                self._run.finish("FINISHED")

    def _take_up(self, report: Mapping[str, Any]) -> None:
        """Continue the run of a dataset that is complete, if it did not come to its end."""
        link = lineage.link_of(self._uri, generation=lineage.newest_generation(report))
        run = self._known(link["run_id"]) if link else None
        if run and run.info.status != "FINISHED":
            self._continue(run, {})

    def _tell(self, run: TrackedRun, report: Mapping[str, Any]) -> None:
        inspection = inspect(self._uri)
        dataset = inspection.dataset
        metrics = {name: report[name] for name in ("episodes", "frames", "refused_episodes")}
        if report["history"][1:]:
            brought = report["history"][-1]
            metrics |= {f"added_{name}": brought[name] for name in ("episodes", "frames")}
        self._log_metrics(run, metrics | {"bytes": inspection.num_bytes} | self._times(report))
        run.client.set_tag(run.run_id, "dataset_fingerprint", dataset.fingerprint)
        tracking.log_dataset(run, dataset, origin=lineage.origin(dataset), context="ingestion")
        with self._forgiving("its run lacks artifacts"):
            told = {name: value for name, value in report.items() if name != "already_complete"}
            run.client.log_text(run.run_id, json.dumps(told, indent=2, ensure_ascii=False), "ingest.json")
            self._log_refused(run, REFUSED_PATH)
            text, sheet = inspect_dataset.summary(inspection, dataset, name=parted(self._uri)[1])
            run.client.log_text(run.run_id, text, "report.txt")
            run.client.log_image(run.run_id, sheet, "contact_sheet.png")

    def _times(self, report: Mapping[str, Any]) -> dict[str, float]:
        """How long this command took; nothing of one that found all done."""
        if report["already_complete"]:
            return {}
        times = {"seconds": time.monotonic() - self._start_s}
        if self.progress:
            times["frames_per_s"] = self.progress.frames / max(self.progress.elapsed_s, 1e-3)
        return times

    def _log_metrics(self, run: TrackedRun, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        run.client.log_batch(run.run_id, [Metric(key, value, now_ms, 0) for key, value in values.items()])

    def _log_refused(self, run: TrackedRun, path: str) -> None:
        if listed := refused_csv(self._uri, path):
            run.client.log_text(run.run_id, listed, "refused.csv")

    @contextlib.contextmanager
    def _forgiving(self, meanwhile: str) -> Iterator[None]:
        """What goes wrong between us and MLflow is a warning."""
        try:
            yield
        except (MlflowException, OSError, ValueError) as error:
            print(f"warning: MLflow: {_one_line(error)}; {meanwhile}", file=sys.stderr, flush=True)


def refused_csv(uri: str, path: str) -> str:
    """What was refused or warned of, as text with commas; empty if nothing was."""
    filesystem, root = filesystem_of(uri)
    if not exists(filesystem, f"{root}/{path}"):
        return ""
    table = pq.read_table(f"{root}/{path}", filesystem=filesystem)
    if not len(table):
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, NOTED_SCHEMA.names)
    writer.writeheader()
    writer.writerows(table.slice(0, LISTED).to_pylist())
    if len(table) > LISTED:
        writer.writerow({"reason": "cut", "detail": f"{len(table) - LISTED} more in {path}"})
    return stream.getvalue()


def _one_line(error: BaseException) -> str:
    """What went wrong; of a task's failure its last line, the others are the way there."""
    lines = str(error).strip().splitlines() or [""]
    told = lines[-1] if isinstance(error, RayTaskError) else " ".join(lines)
    return f"{type(error).__name__}: {told}"[:FAILURE_CHARS]
