"""End the MLflow runs whose Ray job is gone: a driver that is killed cannot say that it is.

    ray job submit --working-dir . -- python jobs/reap_runs.py --tracking.uri http://mlflow:5000

A run whose job was stopped becomes KILLED, any other whose job ended FAILED; the tag `reaped` says why. Runs
of jobs that this cluster does not know may belong to another one: they are listed, and ended with
`--unknown true`. The last line is JSON.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import tracking
from jobs.command_line import parsed, refusals
from jobs.tracking import TrackingOptions

PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class ReapRuns:
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """All experiments of the server are looked at."""
    cluster: str = ""
    """Address of its dashboard, http://head:8265; empty: RAY_API_SERVER_ADDRESS, or in a job its own."""
    unknown: bool = False
    """Whether runs of jobs that the cluster does not know are ended too."""


def main(job: ReapRuns) -> None:
    """Look at every run that says it is running."""
    with refusals():
        uri = job.tracking.completed().uri
        tracking.check_reachable(uri)
        jobs = jobs_of(job.cluster)
    client, ended, unknown = tracking.client_of(uri), [], []
    for run in running(client):
        submission = run.data.tags.get("ray_job_id")
        if submission is None:
            print(f"{run.info.run_id} {run.info.run_name}: has no tag ray_job_id, left alone")
            continue
        status = jobs.get(submission)
        if status is None:
            unknown.append(run.info.run_id)
            print(f"{run.info.run_id} {run.info.run_name}: the cluster does not know its job {submission}")
        if verdict := verdict_of(status, unknown=job.unknown):
            why = f"job {submission} is {status.value if status else 'unknown to the cluster'}"
            client.set_tag(run.info.run_id, "reaped", why)
            client.set_terminated(run.info.run_id, verdict)
            ended.append({"run_id": run.info.run_id, "name": run.info.run_name, "status": verdict})
            print(f"{run.info.run_id} {run.info.run_name}: {verdict}, {why}")
    print(json.dumps({"ended": ended, "unknown": unknown}), flush=True)


def jobs_of(address: str) -> Mapping[str, JobStatus]:
    """Submission id -> status of the jobs that a cluster knows.

    Raises:
        ValueError: the cluster does not answer.
    """
    try:
        known = JobSubmissionClient(address or None).list_jobs()
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"cluster {address!r}: no Ray cluster answers: {error}") from None
    return {details.submission_id: details.status for details in known if details.submission_id}


def running(client: MlflowClient) -> list[Run]:
    """All runs of the server that say RUNNING."""
    experiments = [entry.experiment_id for entry in client.search_experiments(max_results=PAGE)]
    token = None
    found = []
    while True:
        page = client.search_runs(
            experiments, "attributes.status = 'RUNNING'", max_results=PAGE, page_token=token
        )
        found += page  # all of them before the first one is ended: pages count from the front
        token = page.token
        if not token:
            return found


def verdict_of(status: JobStatus | None, *, unknown: bool) -> str | None:
    """How a run ended whose driver did not say it; None: it may still be going on."""
    if status is None:
        return RunStatus.to_string(RunStatus.FAILED) if unknown else None
    if not status.is_terminal():
        return None
    return RunStatus.to_string(RunStatus.KILLED if status == JobStatus.STOPPED else RunStatus.FAILED)


if __name__ == "__main__":
    main(parsed(ReapRuns, sys.argv[1:]))
