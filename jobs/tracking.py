"""The only module that talks to MLflow: one run a job, metrics that survive, a status that is true."""

import getpass
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from jobs.environment import MLFLOW_CLIENT, git_commit
from pipelines.dataset import EpisodeDataset
from pipelines.files import parted


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where MLflow is."""

    uri: str = ""
    """Of the server; empty: what MLFLOW_TRACKING_URI says, else http://127.0.0.1:5000."""
    experiment: str = "smolvla"

    def completed(self) -> "TrackingOptions":
        """The same with the server's address."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or "http://127.0.0.1:5000"
        return replace(self, uri=uri)


def check_reachable(uri: str, *, given_by: str = "tracking.uri") -> None:
    """Refuse a tracking server that does not answer, or not to this user.

    Raises:
        ValueError: names the flag and the address.
    """
    if not uri.startswith(("http://", "https://")):
        raise ValueError(
            f"{given_by} {uri!r}: need the http address of an MLflow server; `make up` starts one"
        )
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=10) as response:
            response.read()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise ValueError(
            f"{given_by} {uri}: no MLflow server answers ({error}); `make up` starts one"
        ) from None
    try:  # /health answers everybody
        client_of(uri).search_experiments(max_results=1)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{given_by} {uri}: the server refuses this user, see MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN: {reason}"
        ) from None


def client_of(uri: str) -> MlflowClient:
    """A client that gives up soon."""
    os.environ.update(MLFLOW_CLIENT)
    return MlflowClient(uri)


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run, by name of its server."""

    uri: str
    run_id: str
    experiment_id: str

    @property
    def link(self) -> str:
        """Opens on the run; without the parameter a fresh browser lands in MLflow's GenAI view."""
        return (
            f"{self.uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        )

    @property
    def client(self) -> MlflowClient:
        return client_of(self.uri)

    def finish(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def start_run(
    uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> TrackedRun:
    """Create a run. `params` should be few and short: the UI prints all of them on every image card."""
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in params.items()])
    return TrackedRun(uri, run.info.run_id, experiment_id)


def continue_run(uri: str, run_id: str, *, tags: Mapping[str, str]) -> TrackedRun:
    """Set a run that was interrupted to RUNNING again."""
    client = client_of(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"tracking.uri {uri}: the server does not know MLflow run {run_id}: {error}"
        ) from None
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return TrackedRun(uri, run_id, run.info.experiment_id)


def log_dataset(
    run: TrackedRun,
    dataset: EpisodeDataset,
    *,
    origin: Mapping[str, str],
    context: str,
    share: float | None = None,
) -> None:
    """The dataset as an input of the run, with its content's fingerprint as digest.

    An experiment keeps what was first said of a name and digest, for all its runs; what is this run's own
    goes into the input's tags: what it does with the dataset (`context`), the run that wrote it (in `origin`,
    which is `jobs.lineage.origin` of the dataset), and its share of the samples.
    """
    tags = {"mlflow.data.context": context}
    if "ingest_run_id" in origin:
        tags["ingest_run_id"] = origin["ingest_run_id"]
    if share is not None:
        tags["share"] = f"{share:.6g}"
    counts = {
        "episodes": len(dataset.episode_index),
        "frames": dataset.num_frames,
        "tasks": len(dataset.tasks),
    }
    entity = Dataset(
        name=parted(dataset.uri)[1][-500:],
        digest=dataset.fingerprint[:32],  # MLflow's column takes 36
        source_type="episode_dataset",
        source=json.dumps({"uri": dataset.uri, "fingerprint": dataset.fingerprint} | dict(origin)),
        schema=json.dumps({"features": dataset.features})[:60_000],
        profile=json.dumps(counts),
    )
    inputs = [DatasetInput(entity, [InputTag(key, value) for key, value in tags.items()])]
    run.client.log_inputs(run.run_id, datasets=inputs)


def source_tags(program: str) -> dict[str, str]:
    """Who and what: user, program, git commit, Ray job."""
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": program,
        "mlflow.source.type": "JOB",
    }
    if commit := git_commit():
        tags |= {"mlflow.source.git.commit": commit, "git_commit": commit}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    if "job_submission_id" in job:
        tags["ray_job_id"] = job["job_submission_id"]
    return tags
