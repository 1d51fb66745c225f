"""A caching of features as an MLflow run: begun with its first task, ended as it ended.

Whatever the server does, the caching goes on: what cannot be told is a warning.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from jobs import lineage, tracking
from jobs.ending import noticed
from jobs.tracking import TrackedRun
from pipelines.dataset import EpisodeDataset
from pipelines.files import parted

FAILURE_CHARS = 500
Tell = Callable[[Mapping[str, float]], None]


@contextlib.contextmanager
def caching_run(
    server: str,
    dataset: EpisodeDataset,
    *,
    experiment: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> Iterator[Tell]:
    """Around the work; yields a function that takes its metrics."""
    run = None
    with _forgiving():
        run = _started(server, dataset, experiment=experiment, params=params, tags=tags)
        print(f"MLflow run: {run.link}", flush=True)
    if run is None:
        yield lambda values: None
        return
    with noticed(lambda _: _killed(run)) as hand_over:
        try:
            yield lambda values: _log(run, values)
        except BaseException as error:
            hand_over()
            with _forgiving():
                run.client.set_tag(run.run_id, "failure", f"{type(error).__name__}: {error}"[:FAILURE_CHARS])
                run.finish("FAILED")
            raise
        hand_over()
        with _forgiving():
            run.finish("FINISHED")


def _started(
    server: str,
    dataset: EpisodeDataset,
    *,
    experiment: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> TrackedRun:
    origin = lineage.origin(dataset)
    told = tracking.source_tags("jobs/cache_features.py") | lineage.tags([dataset], [origin])
    name = f"features of {parted(dataset.uri)[1]}"
    told |= {"kind": "caching", "dataset_uri": dataset.uri, **tags}
    run = tracking.start_run(server, experiment=experiment, name=name, params=params, tags=told)
    tracking.log_dataset(run, dataset, origin=origin, context="caching")
    return run


def _killed(run: TrackedRun) -> None:
    with contextlib.suppress(MlflowException):
        run.finish("KILLED")
    print("told to stop: the same command goes on with the files that are missing", flush=True)


def _log(run: TrackedRun, values: Mapping[str, float]) -> None:
    now_ms = int(time.time() * 1000)
    with _forgiving():
        run.client.log_batch(run.run_id, [Metric(name, value, now_ms, 0) for name, value in values.items()])


@contextlib.contextmanager
def _forgiving() -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError, ValueError) as error:
        told = " ".join(str(error).split())[:FAILURE_CHARS]
        print(f"warning: MLflow: {told}; the caching goes on", file=sys.stderr, flush=True)
