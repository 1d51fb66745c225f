"""The job as users meet it: submitted to a real cluster, killed, stopped, reviewed in a real MLflow."""

import base64
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import draccus
import mlflow
import numpy as np
import psutil
import pytest
import ray
from exporters import exported_lines
from mlflow import MlflowClient
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient
from runs import VLM
from test_ingest_s3 import SECRETS, bucket, server
from toy_environment import GOAL_STEPS
from toys import with_cut_image
from waiting import wait_until

from jobs import command_line, policies, reap_runs, train_smolvla
from jobs.tracking import TrackingOptions
from jobs.train_smolvla import TrainJob
from pipelines.dataset import filesystem_of
from pipelines.files import exists, joined
from pipelines.metrics import OF_POINTS, REPORT_INTERVAL, SPOOL
from pipelines.run_storage import RunStorage
from smolvla import SmolVLAPolicy
from smolvla.configuration import SmolVLAConfig

assert bucket, server  # fixtures

ROOT = Path(__file__).parents[2]
CHANGES = "# untracked: notes.txt\n"
PACKED = base64.b64encode(gzip.compress(CHANGES.encode())).decode()
STEPS = 40  # enough that a stop finds the run unfinished


class Jobs:
    """Submits the training job and waits for what it does."""

    def __init__(self, services, storage, policy):
        self.url, self.policy = services["ray"]["url"], policy
        self.client = JobSubmissionClient(self.url)
        self.mlflow_uri, self.storage = services["mlflow"]["url"], storage
        self.mlflow = MlflowClient(self.mlflow_uri)
        self.scraped = defaultdict(set)
        """(metric of ours, run, rank) -> its values, as Prometheus would have got them."""

    def flags(self, name, dataset, **changes):
        flags = {
            "config": "configs/train/demo.yaml",
            "policy.path": f'"{self.policy}"',
            "dataset.path": f'"{dataset}"',
            "storage_path": f'"{self.storage}"',
            "run_name": name,
            "tracking.uri": self.mlflow_uri,
            "tracking.experiment": "tests",
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch": 4,
            "mixing_rows": 64,
            "log_every": 1,
            "checkpoint.every": 10,
            "max_failures": 0,
        } | changes
        return " ".join(f"--{flag} {value}" for flag, value in flags.items())

    def submit(self, name, dataset, variables=(), **changes):
        environment = {
            "working_dir": str(ROOT),
            "excludes": ["tests", ".local", "data", ".git"],
            "env_vars": SECRETS
            | {"SMOLVLA_GIT_COMMIT": "c0ffee", "SMOLVLA_GIT_CHANGES": PACKED, "OMP_NUM_THREADS": "1"}
            | dict(variables),
        }
        command = f"python jobs/train_smolvla.py {self.flags(name, dataset, **changes)}"
        return self.client.submit_job(entrypoint=command, runtime_env=environment)

    def scrape(self, run):
        """Ask every node's exporter once for a run's metrics, found as Prometheus finds them."""
        for name, tags, value in re.findall(
            r"^ray_(smolvla_\w+)\{(.*)\} (\S+)$", "\n".join(exported_lines()), re.MULTILINE
        ):
            tag = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            if tag.get("run") == run:  # what another test exported may still be there
                self.scraped[name, run, tag["rank"]].add(float(value))

    def wait(self, job, timeout_s=500, meanwhile=lambda: None):
        deadline = time.monotonic() + timeout_s
        while not (status := self.client.get_job_status(job)).is_terminal():
            meanwhile()
            assert time.monotonic() < deadline, self.client.get_job_logs(job)[-4000:]
            time.sleep(0.5)
        return status

    def wait_for_step(self, name, job, step, timeout_s=400, folder=None):
        deadline = time.monotonic() + timeout_s
        while not any(
            int(found) >= step
            for spool in (folder or self.storage).glob(f"{name}*/metrics.jsonl")
            for found in re.findall(r'"step": (\d+),', spool.read_text())
        ):
            status = self.client.get_job_status(job)
            assert not status.is_terminal(), f"{status}: {self.client.get_job_logs(job)[-4000:]}"
            assert time.monotonic() < deadline, self.client.get_job_logs(job)[-4000:]
            time.sleep(0.05)

    def wait_for_file(self, uri, job, timeout_s=200):
        filesystem, path = filesystem_of(uri)
        deadline = time.monotonic() + timeout_s
        while not exists(filesystem, path):
            assert not self.client.get_job_status(job).is_terminal(), self.client.get_job_logs(job)[-4000:]
            assert time.monotonic() < deadline, self.client.get_job_logs(job)[-4000:]
            time.sleep(0.05)

    def run_of(self, name, storage=None):
        storage = storage or RunStorage(folder=self.storage / name)
        return self.mlflow.get_run(storage.read_json("run.json")["mlflow_run_id"])

    def artifacts(self, name, folder=None):
        """Paths of all files that MLflow has of a run."""
        run_id = self.run_of(name).info.run_id
        for entry in self.mlflow.list_artifacts(run_id, folder):
            if entry.is_dir:
                yield from self.artifacts(name, entry.path)
            else:
                yield entry.path

    def artifact(self, name, path):
        """The text of one of them."""
        run_id = self.run_of(name).info.run_id
        place = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, tracking_uri=self.mlflow_uri
        )
        return Path(place).read_text()

    def curve(self, name, storage=None, metric="train/loss"):
        """step -> value as MLflow has it; each step must be there once."""
        run_id = self.run_of(name, storage).info.run_id
        points = self.mlflow.get_metric_history(run_id, metric)
        curve = {point.step: point.value for point in points}
        assert len(curve) == len(points), "a step was logged twice"
        return curve


@pytest.fixture(scope="module")
def jobs(services, tmp_path_factory):
    folder = tmp_path_factory.mktemp("my runs")
    return Jobs(services, folder, smaller_policy(folder.with_name("smaller policy")))


def smaller_policy(folder):
    """The demo's, with LeRobot's tiny VLM instead of its own: most of a step's time is the tower's."""
    config = SmolVLAConfig.from_pretrained(ROOT / "configs/policy/tiny")
    config.changed(vlm_model_name=str(VLM), resize_imgs_with_padding=(64, 64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(jobs, episodes):
    often = {REPORT_INTERVAL: "500"}  # the run may end before what it exported every 4 s was asked for
    job = jobs.submit("uninterrupted", episodes, often, record_rows="true")
    status = jobs.wait(job, meanwhile=lambda: jobs.scrape("uninterrupted"))
    logs = jobs.client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs[-4000:]
    return logs


def test_a_submitted_run_is_reviewable_in_mlflow(uninterrupted, jobs, services, episodes):
    run = jobs.run_of("uninterrupted")
    assert run.info.status == "FINISHED"
    assert sorted(jobs.curve("uninterrupted")) == list(range(1, STEPS + 1))
    assert {
        "train/lr",
        "train/grad_norm",
        "data/wait_share",
        "data/samples_per_s",
        "val/action_mae/1",
        "val/action_mae/all",
        f"system/{services['ray']['address'].partition(':')[0]}/cpu_utilization_percentage",
    } <= run.data.metrics.keys()
    assert len(run.data.params) <= 20
    assert run.data.params["steps"] == str(STEPS)
    fingerprint = json.loads((episodes / "meta/ingest.json").read_text())["fingerprint"]
    assert run.data.tags["dataset_fingerprint"] == fingerprint
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.digest == fingerprint[:32]
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training", "share": "1"}
    assert run.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert run.data.tags["ray_job_id"].startswith("raysubmit_")
    assert {
        "config/identity.json",
        "config/job.yaml",
        "config/policy.json",
        "environment/changes.patch",
        "environment/machine.json",
        "environment/packages.txt",
        "plan.json",
        f"data/{episodes.name}/report.txt",
        f"data/{episodes.name}/contact_sheet.png",
        f"data/{episodes.name}/normalization.png",
        "plots/curves.png",
        *(f"plots/actions/{episodes.name}/step_{step:09}.png" for step in range(10, STEPS + 1, 10)),
    } <= set(jobs.artifacts("uninterrupted"))
    assert len({path for path in jobs.artifacts("uninterrupted") if re.search(r"samples.*\.png$", path)}) == 8
    assert jobs.artifact("uninterrupted", "environment/changes.patch") == CHANGES
    assert f"ray=={ray.__version__}" in jobs.artifact("uninterrupted", "environment/packages.txt")
    plan = json.loads(jobs.artifact("uninterrupted", "plan.json"))
    assert plan["first_rows"] == trained_rows(jobs.storage / "uninterrupted", step=1)
    assert [entry["fingerprint"] for entry in plan["datasets"]] == [fingerprint]
    folders = sorted(str(path) for path in (jobs.storage / "uninterrupted").glob("step_*"))
    models = jobs.mlflow.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
    )
    assert sorted(model.params["checkpoint_uri"] for model in models) == folders
    losses, validated = jobs.curve("uninterrupted"), jobs.curve("uninterrupted", metric="val/loss")
    for model in models:
        step = int(model.params["step"])
        assert {metric.key: metric.value for metric in model.metrics} == {
            "checkpoint/train_loss": losses[step],
            "checkpoint/val_loss": validated[step],
        }
    assert run.data.tags["latest_checkpoint"] == folders[-1]


def trained_rows(folder, *, step):
    """[source, episode, frame] of the rows that the workers noted in a step, in the order of the plan."""
    lines = [
        json.loads(line) for file in (folder / "rows").iterdir() for line in file.read_text().splitlines()
    ]
    found = sorted((line for line in lines if line["step"] == step), key=lambda line: line["micro_batch"])
    names = ("source", "episode_index", "frame_index")
    return [list(row) for line in found for row in zip(*(line[name] for name in names), strict=True)]


def test_prometheus_sees_the_run(uninterrupted, jobs):
    of_points = {(exported.name, "uninterrupted", rank) for exported in OF_POINTS.values() for rank in "01"}
    assert set(jobs.scraped) == {*of_points, (SPOOL.name, "uninterrupted", "driver")}
    for key, exported in OF_POINTS.items():
        told = set(jobs.curve("uninterrupted", metric=key).values())
        first, second = (jobs.scraped[exported.name, "uninterrupted", rank] for rank in "01")
        if key in ("data/wait_share", "data/queued_micro_batches"):  # a point has those of the slower one
            assert (first | second) & told, key
        else:
            assert first <= told, key


def test_the_terminal_shows_the_config_the_link_and_the_progress(uninterrupted, jobs):
    run = jobs.run_of("uninterrupted")
    link = (
        f"{jobs.mlflow_uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        "?workflowType=machine_learning"
    )
    assert f"MLflow run: {link}" in uninterrupted
    assert "micro_batch: 4" in uninterrupted
    assert f"/{STEPS}  loss " in uninterrupted
    reports = [json.loads(line) for line in uninterrupted.splitlines() if line.startswith("{")]
    assert reports[-1]["step"] == STEPS
    assert reports[-1]["undelivered_records"] == 0


def test_a_job_is_stopped_then_its_driver_and_its_node_are_lost_and_the_run_goes_on_with_other_workers(
    uninterrupted, jobs, services, episodes, bucket, tmp_path
):
    """Two workers that share the policy are told to stop and save before they do; one goes on until its
    driver is killed, what its node held is lost and its newest checkpoint is damaged; two bring it home, of
    which one is killed while MLflow's server is away."""
    work = tmp_path / "work"
    uri = bucket("runs")
    place = {"storage_path": f"'{uri}'", "work_path": f"'{work}'", "checkpoint.every": 20}
    job = jobs.submit("stored", episodes, parallel="fsdp", **place)
    jobs.wait_for_step("stored", job, 5, folder=work)
    jobs.client.stop_job(job)
    assert jobs.wait(job) == JobStatus.STOPPED
    (folder,) = work.iterdir()
    run = RunStorage(folder=folder, uri=joined(uri, "stored"))
    first_run = jobs.run_of("stored", run).info
    assert first_run.status == "KILLED"
    (saved,) = re.findall(r"stopped, saved at step (\d+)", jobs.client.get_job_logs(job))
    assert 5 < int(saved) < 20

    job = jobs.submit("stored", episodes, num_workers=1, **place)
    jobs.wait_for_file(run.address("step_000000020/MANIFEST.json"), job)
    os.kill(int(jobs.client.get_job_info(job).driver_info.pid), signal.SIGKILL)
    assert jobs.wait(job) == JobStatus.FAILED
    assert jobs.run_of("stored", run).info.status == "RUNNING"  # nobody was left to say it
    shutil.rmtree(work)
    reap(jobs)
    assert jobs.run_of("stored", run).info.status == "FAILED"
    assert jobs.run_of("stored", run).data.tags["reaped"] == f"job {job} is FAILED"
    damaged = [name for name in run.checkpoints() if int(name.removeprefix("step_")) >= 20]
    filesystem, root = run.place()
    for name in damaged:
        with filesystem.open_output_stream(f"{root}/{name}/pretrained_model/config.json") as stream:
            stream.write(b"{}")

    job = jobs.submit("stored", episodes, max_failures=1, **place)
    jobs.wait_for_step("stored", job, 25, folder=work)
    with server_away(services):
        kill_a_worker(services)
        wait_until(lambda: "points wait in" in jobs.client.get_job_logs(job), within_s=200)
        jobs.wait_for_file(run.address(f"step_{STEPS:09d}/MANIFEST.json"), job)
    assert jobs.wait(job) == JobStatus.SUCCEEDED, jobs.client.get_job_logs(job)[-4000:]
    assert "step_000000020 is skipped: pretrained_model/config.json" in jobs.client.get_job_logs(job)
    assert jobs.curve("stored", run) == pytest.approx(jobs.curve("uninterrupted"), rel=1e-5)
    ended = jobs.run_of("stored", run)
    assert (ended.info.run_id, ended.info.status) == (first_run.run_id, "FINISHED")
    assert ended.data.tags["resumed_from_step"] == saved
    assert "checkpoint/stall_s" in ended.data.metrics
    newest = run.newest()
    assert newest is not None
    assert newest.name == f"step_{STEPS:09d}"
    registered = policies.verified(ended.data.tags["latest_checkpoint"], tmp_path / "registered")
    SmolVLAPolicy.from_pretrained(registered / "pretrained_model")
    models = jobs.mlflow.search_logged_models([ended.info.experiment_id], f"name = '{newest.name}'")
    assert run.address(newest.name) in {model.params["checkpoint_uri"] for model in models}
    assert not list(folder.glob("staging/*/*"))


@contextlib.contextmanager
def server_away(services):
    """MLflow's server is killed, and comes back afterwards."""
    server = psutil.Process(services["mlflow"]["pid"])
    for process in (server, *server.children(recursive=True)):
        process.kill()
    try:
        yield
    finally:
        subprocess.run([sys.executable, str(ROOT / "infra/local/services.py"), "up"], check=True, timeout=240)


def kill_a_worker(services):
    for process in psutil.Process(services["ray"]["pid"]).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends idle ones meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                return
    raise AssertionError("no train worker is there")


def reap(jobs):
    """As an administrator does it from outside."""
    options = TrackingOptions(uri=jobs.mlflow_uri)
    reap_runs.main(reap_runs.ReapRuns(tracking=options, cluster=jobs.url))


def test_a_complete_run_started_again_has_nothing_to_do(uninterrupted, jobs, episodes, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(jobs.flags("uninterrupted", episodes))
    job = train_smolvla.completed(command_line.parsed(TrainJob, words))
    train_smolvla.train(job, train_smolvla.prepare(job))
    assert f"complete at step {STEPS}" in capsys.readouterr().out
    assert jobs.run_of("uninterrupted").info.status == "FINISHED"


BESIDE = {
    "eval.every": 20,
    "eval.env": "toy_environment:TroubledEnvironment",
    "eval.tasks": "wave open",
    "eval.episodes": 3,
    "eval.n_action_steps": 5,
    "eval.num_environments": 1,
    "eval.size": 40,
    "eval.videos": 1,
    "eval.cpus_per_policy": 0.5,
}
IMPORTS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


@pytest.fixture(scope="module")
def beside(uninterrupted, jobs, episodes):
    """The uninterrupted run again, with evaluations in a world that falls apart."""
    variables = IMPORTS | {"TOY_TROUBLE": "crash"}
    flags = BESIDE | {"eval.dataset.path": f'"{episodes}"'}
    job = jobs.submit("beside", episodes, variables, **flags)
    status, logs = jobs.wait(job), jobs.client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs[-4000:]
    return logs


def records(jobs):
    """step, status and reason of every evaluation of it."""
    lines = (jobs.storage / "beside/evaluations.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in ("step", "status", "reason")) for line in lines]


def evaluations_of(jobs, status):
    run = jobs.run_of("beside").info
    return jobs.mlflow.search_runs(
        [run.experiment_id],
        f"tags.mlflow.parentRunId = '{run.run_id}' and attributes.status = '{status}'",
    )


def episode_table(jobs, run):
    table = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="episodes.json", tracking_uri=jobs.mlflow_uri
    )
    found = json.loads(Path(table).read_text())
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def test_evaluations_that_crash_leave_the_training_as_it_is_to_the_last_bit(beside, jobs):
    for metric in ("train/loss", "train/grad_norm", "val/loss"):
        assert jobs.curve("beside", metric=metric) == jobs.curve("uninterrupted", metric=metric)
    run = jobs.run_of("beside")
    assert run.info.status == "FINISHED"
    found = records(jobs)
    assert sorted(step for step, _, _ in found) == [20, 40]  # each is accounted for, and once
    assert {status for _, status, _ in found} <= {"failed", "skipped"}
    failed = [(step, reason) for step, status, reason in found if status == "failed"]
    assert failed[-1][0] == STEPS
    for step, reason in failed:
        assert "RuntimeError: the world fell apart" in reason
        assert f"warning: evaluation of step {step}: failed, exit code 1: " in beside
    assert run.data.metrics["eval/failed"] == len(failed)
    assert not [name for name in run.data.metrics if name.startswith("eval/success_rate")]


def test_an_evaluation_that_crashes_keeps_the_episodes_that_had_ended(beside, jobs):
    for run in evaluations_of(jobs, "FAILED"):
        assert [row["task"] for row in episode_table(jobs, run)] == ["wave"] * 3
        assert run.data.metrics["eval/episodes/wave/n5"] == 3


@pytest.fixture(scope="module")
def goes_on(beside, jobs, episodes):
    """Starts the complete run again, with other flags and another trouble; returns the job's figures."""

    def again(trouble, **changes):
        flags = BESIDE | {"eval.dataset.path": f'"{episodes}"'} | changes
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            variables = {"env_vars": IMPORTS | {"OMP_NUM_THREADS": "1"}}
            patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": variables}))
            for name, value in (IMPORTS | {"TOY_TROUBLE": trouble}).items():
                patch.setenv(name, value)
            words = shlex.split(jobs.flags("beside", episodes, **flags))
            job = train_smolvla.completed(command_line.parsed(TrainJob, words))
            return train_smolvla.train(job, train_smolvla.prepare(job))

    return again


def test_an_evaluation_that_hangs_is_ended_with_its_actors(goes_on, jobs):
    limit = 180  # an evaluation was at its worlds after 25 to 90 s
    changes = {"eval.timeout_s": limit, "eval.dataset.path": '""'}
    assert goes_on("hang", **changes)["evaluations"] == {"failed": 1}
    assert records(jobs)[-1] == (STEPS, "failed", f"it took longer than eval.timeout_s {limit}")
    log = (jobs.storage / f"beside/evaluations/step_{STEPS:09}.log").read_text()
    (hung,) = re.findall(r"process (\d+) hangs", log)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(hung)).wait(timeout=30)
    (killed,) = evaluations_of(jobs, "KILLED")
    assert [row["task"] for row in episode_table(jobs, killed)] == ["wave"] * 3
    assert jobs.run_of("beside").info.status == "FINISHED"
    assert not list((jobs.storage / "beside/evaluating").glob("*"))


@pytest.fixture(scope="module")
def evaluated(goes_on, jobs):
    """What the evaluation of the last checkpoint found when its world was mended."""
    assert goes_on("")["evaluations"] == {"done": 1}
    log = (jobs.storage / f"beside/evaluations/step_{STEPS:09}.log").read_text()
    return json.loads([line for line in log.splitlines() if line.startswith("{")][-1])


def test_an_evaluation_measures_the_loss_that_the_training_did_and_stands_below_it(evaluated, jobs):
    training = jobs.run_of("beside")
    assert evaluated["offline"]["loss"] == pytest.approx(training.data.metrics["val/loss"], rel=1e-5)
    (run,) = evaluations_of(jobs, "FINISHED")
    assert run.data.tags["kind"] == "evaluation"
    assert run.data.tags["checkpoint_uri"] == str(jobs.storage / f"beside/step_{STEPS:09}")
    assert run.data.tags["checkpoint_step"] == str(STEPS)
    assert run.data.tags["dataset_fingerprint"] == training.data.tags["dataset_fingerprint"]
    curve = jobs.mlflow.get_metric_history(training.info.run_id, "eval/success_rate/wave/n5")
    assert [(point.step, point.value) for point in curve] == [
        (STEPS, evaluated["closed_loop"]["success_rate"]["wave n5"])
    ]


def test_an_evaluation_keeps_every_episode_and_films(evaluated, jobs):
    (run,) = evaluations_of(jobs, "FINISHED")
    rows = episode_table(jobs, run)
    assert len(rows) == 6
    for row in rows:
        goal = row["seed"] % GOAL_STEPS + 12
        assert (row["success"], row["actions"]) == (goal <= 20, min(goal, 20))
    names = {entry.path for entry in jobs.mlflow.list_artifacts(run.info.run_id)}
    assert {"episodes.json", "offline.json", "offline.txt", "success.txt", "plots", "videos"} <= names
    films = jobs.mlflow.list_artifacts(run.info.run_id, "videos/wave/n_action_steps_5")
    assert {Path(film.path).suffix for film in films} == {".mp4"}


def test_what_was_evaluated_is_not_evaluated_again(evaluated, goes_on, jobs):
    before = records(jobs)
    assert goes_on("crash")["evaluations"] == {}
    assert records(jobs) == before


@pytest.fixture(scope="module")
def broken(episodes, tmp_path_factory):
    """A dataset with one image cut off."""
    folder = tmp_path_factory.mktemp("data") / "broken"
    with_cut_image(episodes, folder, episode=2, frame=5, camera="observation.images.wrist")
    return folder


def test_an_image_cut_off_in_a_shard_fails_the_run_by_name(jobs, broken):
    """And at once: however often workers may be started again, these rows stay as they are."""
    job = jobs.submit("broken", broken, steps=40, log_every=10, max_failures=3)
    assert jobs.wait(job) == JobStatus.FAILED
    assert jobs.run_of("broken").info.status == "FAILED"
    logs = jobs.client.get_job_logs(job)
    said = "1 rows have images that cannot be used, max_bad_rows allows 0; the first: "
    (line,) = (line for line in logs.splitlines() if line.startswith("train_smolvla.py: "))
    assert line.startswith(f"train_smolvla.py: {said}"), line
    assert "episode 2 frame 5: ['observation.images.wrist']" in line
    assert logs.count(said) == 1
    assert logs.count("Started training worker group") == 1
    assert "TrainingFailedError" not in logs


def test_a_checkpoint_is_fine_tuned_on_other_cameras_several_draws_a_sample_and_a_row_that_is_borne(
    jobs, broken
):
    rename = {"observation.images.top": "observation.images.camera2"}
    rename["observation.images.wrist"] = "observation.images.camera1"
    settings = {"rename": f"'{json.dumps(rename)}'", "repeated_noise": 2, "steps": 40, "log_every": 10}
    settings |= {"policy.path": f'"{ROOT}/tests/golden/default"', "dataset.max_bad_rows": 1}
    settings |= {"validation.fraction": 0, "validation.episodes": "3 7", "ema_decay": 0.9, "lora.rank": 2}
    settings |= {"lora.train_fully": "action_in_proj action_out_proj"}
    job = jobs.submit("fine-tuned", broken, **settings, **{"checkpoint.every": 40})
    assert jobs.wait(job) == JobStatus.SUCCEEDED, jobs.client.get_job_logs(job)[-4000:]
    run, folder = jobs.run_of("fine-tuned"), jobs.storage / "fine-tuned"
    assert (run.data.params["repeated_noise"], run.data.metrics["data/bad_rows"]) == ("2", 1)
    named = json.loads((folder / "bad_rows.json").read_text())
    cameras = ["observation.images.wrist"]
    assert json.loads(jobs.artifact("fine-tuned", "bad_rows.json")) == named
    assert run.data.metrics.keys() >= {"val/loss", "val/loss_ema", "val/frames"}
    assert run.data.tags["best_checkpoint"] == str(folder / "step_000000040")
    (model,) = jobs.mlflow.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
    )
    measured = {metric.key: metric.value for metric in model.metrics}
    assert measured["checkpoint/val_loss"] == pytest.approx(run.data.metrics["val/loss"], rel=1e-6)
    assert float(run.data.tags["best_val_loss"]) == pytest.approx(run.data.metrics["val/loss"], rel=1e-5)
    assert {path.name for path in (folder / "step_000000040").glob("adapter*")} == {"adapter", "adapter_ema"}
    assert named == [{"dataset": str(broken), "episode": 2, "frame": 5, "cameras": cameras}]
    position = json.loads((folder / "step_000000040/training_state/trainer.json").read_text())
    assert position["bad_rows"] == [[0, 2, 5, 2]]

    tuned = SmolVLAPolicy.from_pretrained(folder / "step_000000040/pretrained_model")
    assert tuned.config.camera_names == ["observation.images.camera1", "observation.images.camera2"]
    assert tuned.processor.files.rename == rename
    assert set(tuned.config.camera_names) < set(tuned.processor.stats)
    # the robot's own column names are understood, and the actions are in its units
    image = np.zeros((1, 3, 40, 56), dtype=np.uint8)
    obs = dict.fromkeys(rename, image) | {"observation.state": np.zeros((1, 3)), "task": "open it"}
    assert tuned.select_action(obs).shape == (1, 4)


def parsed(flags):
    return draccus.parse(
        TrainJob, args=[f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    )


def prepared(flags):
    return train_smolvla.prepare(train_smolvla.completed(parsed(flags)))


def refusal(**flags):
    """What parsing or `prepare` says about a job, without what draccus wraps around it."""
    with pytest.raises((ValueError, draccus.ParsingError)) as caught:
        prepared(flags)
    error: BaseException = caught.value
    while str(error).startswith("Couldn't instantiate") and error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@pytest.fixture
def good(episodes, tmp_path):
    return {
        "dataset__path": episodes,
        "policy__path": ROOT / "configs/policy/tiny",
        "policy__allow_random_weights": "true",
        "run_name": "checked",
        "storage_path": tmp_path,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 is below 1"),
        ({"batch_size": 60}, "batch_size 60 is not a multiple of micro_batch 8"),
        ({"mixing_rows": 100}, "mixing_rows 100 is not a multiple of micro_batch 8"),
        (
            {"num_workers": 9},
            "num_workers 9: batch_size 64 is 8 micro-batches of 8, and every",
        ),
        ({"num_workers": "0-2"}, "num_workers '0-2': need a count from 1 on"),
        ({"num_workers": "many"}, "num_workers 'many': need a count from 1 on"),
        ({"num_workers": "2-4", "parallel": "hsdp", "shard_workers": 2}, "num_workers 2-4: the groups of"),
        ({"dataset__path": ""}, "dataset.path is missing"),
        ({"policy__path": ""}, "policy.path is missing"),
        ({"run_name": "a/b"}, "run_name 'a/b'"),
        ({"storage_path": "runs"}, "storage_path 'runs' is relative"),
        ({"storage_path": "/proc/nowhere"}, "storage_path /proc/nowhere: cannot be written"),
        ({"dataset__path": "/nowhere"}, "dataset.path '/nowhere' does not exist"),
        ({"policy__path": "/nowhere"}, "policy.path '/nowhere' does not exist"),
        ({"policy__path": "/tmp"}, "policy.path /tmp: no config.json"),
        ({"policy__allow_random_weights": "false"}, "no model.safetensors, so the model would be random"),
        (
            {"policy__path": ROOT / "tests/golden/default"},
            "it knows the cameras ['observation.images.camera1', 'observation.images.camera2'], the dataset "
            "has ['observation.images.top', 'observation.images.wrist']; say with --rename which is which",
        ),
        ({"rename": {"top": "camera1"}}, "rename: 'top' is no camera of the dataset"),
        (
            {"rename": {"observation.images.top": "observation.images.wrist"}},
            "rename: several columns become ['observation.images.wrist']",
        ),
        (
            {
                "policy__path": ROOT / "tests/golden/default",
                "rename": {"observation.images.top": "observation.images.camera3"},
            },
            "rename: 'observation.images.camera3' is no camera of the policy",
        ),
        ({"validation__fraction": 1.0}, "validation.fraction 1.0 is not in [0, 1)"),
        ({"validation__fraction": 0.99}, "12 of the 12 episodes of"),
        ({"validation__episodes": "[3, 12]"}, "has no episode 12, it has 0 to 11"),
        (
            {"validation__fraction": 0.1, "validation__episodes": "[3]"},
            "validation.fraction and validation.episodes are both given; take one",
        ),
        ({"validation__path": "/nowhere"}, "validation.path '/nowhere' does not exist"),
        ({"validation__every": 0}, "validation.every 0 is below 1"),
        ({"ema_decay": 1.0}, "ema_decay 1.0 is not between 0 and 1"),
        ({"lora__rank": 2, "lora__targets": "[query]"}, "lora.targets: 'query' is none of q_proj"),
        ({"checkpoint__keep_best": -1}, "checkpoint.keep_best -1 is negative"),
        ({"repeated_noise": 0}, "repeated_noise 0 is below 1"),
        ({"optimizer__lr": -1}, "optimizer.lr -1.0 is not positive"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"eval__every": 1000}, "eval.every 1000: nothing to evaluate on; eval.env names an environment"),
        (
            {"eval__every": 1500, "eval__env": "toy_environment:ToyEnvironment", "eval__tasks": "[wave]"},
            "eval.every 1500 is not a multiple of checkpoint.every 1000",
        ),
        (
            {"eval__every": 1000, "eval__env": "toy_environment:ToyEnvironment", "eval__tasks": "[fly]"},
            "eval.tasks: 'fly' is no toy",
        ),
        (
            {"eval__every": 1000, "eval__env": "nowhere:World", "eval__tasks": "[fly]"},
            "eval.env 'nowhere:World': No module named 'nowhere'",
        ),
        (
            {
                "eval__every": 1000,
                "eval__env": "toy_environment:ToyEnvironment",
                "eval__tasks": "[wave]",
                "eval__n_action_steps": "[11]",
            },
            "eval.n_action_steps 11 is not within 1..10, the policy's chunk",
        ),
        ({"eval__every": 1000, "eval__dataset__path": "/nowhere"}, "eval.dataset.path '/nowhere' does not"),
        (
            {"eval__every": 1000, "eval__dataset__path": "/nowhere", "eval__episodes": 0},
            "eval.episodes 0 is below 1",
        ),
        (
            {"eval__every": 1000, "eval__dataset__path": "/nowhere", "eval__ema": "true"},
            "eval.ema: there is no average of the weights without ema_decay",
        ),
        ({"eval__timeout_s": 0}, "eval.timeout_s 0.0 is not positive"),
        ({"checkpoint__every": 0}, "checkpoint.every 0 is below 1"),
        ({"log_every": 0}, "log_every 0 is below 1"),
    ],
)
def test_a_wrong_flag_is_refused_by_name_and_value_before_anything_starts(good, change, message):
    assert message in refusal(**(good | change))


def test_renamed_cameras_take_the_policys_order_and_its_weights(good):
    top, wrist = "observation.images.top", "observation.images.wrist"
    first, second = "observation.images.camera1", "observation.images.camera2"
    known = prepared(
        good | {"policy__path": ROOT / "tests/golden/default", "rename": {top: second, wrist: first}}
    )
    assert known.policy_config.camera_names == [first, second]
    columns = known.reader.sources[0].camera_columns
    assert columns == {first: wrist, second: top}
    other = prepared(
        good
        | {
            "policy__path": ROOT / "tests/golden/default",
            "run_name": "other",
            "rename": {top: second},
        }
    )
    assert other.policy_config.camera_names == [second, wrist]


def test_a_run_is_not_continued_as_something_else(good, tmp_path):
    identity = prepared(good).identity
    (tmp_path / "checked/run.json").write_text(json.dumps({"mlflow_run_id": "x", "identity": identity}))
    assert prepared(good | {"num_workers": 2, "log_every": 3}).identity == identity
    assert "this run has seed 1000, now 7" in refusal(**good, seed=7)
    assert "steps 20000, now 30" in refusal(**good, steps=30)
    assert "this run has validation None, now {'episodes': [[5]]" in refusal(**good, validation__episodes=[5])
    assert "this run has ema_decay None, now 0.9" in refusal(**good, ema_decay=0.9)
    assert "this run has repeated_noise 1, now 4" in refusal(**good, repeated_noise=4)


def test_what_is_held_out_is_not_trained_on(good, episodes):
    chosen = prepared(good | {"run_name": "chosen", "validation__episodes": [3, 7]})
    assert chosen.held_out is not None
    assert chosen.held_out.reader.sources[0].dataset.episode_index.tolist() == [3, 7]
    assert chosen.held_out.config.every == 1000  # at every checkpoint
    assert chosen.reader.sources[0].dataset.episode_index.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    other = prepared(good | {"run_name": "other", "validation__path": episodes, "validation__every": 5})
    assert other.held_out is not None
    assert len(other.reader.sources[0].dataset.episode_index) == 12
    assert len(other.held_out.reader.sources[0].dataset.episode_index) == 12
    assert other.held_out.config.every == 5


def test_a_run_without_a_name_is_named_by_policy_and_dataset(good, episodes):
    assert prepared(good | {"run_name": ""}).folder.name == f"tiny-{episodes.name}"


def test_a_vlm_that_cannot_be_had_is_refused_by_its_name(good, tmp_path):
    """A hub id without a network: one line, not transformers' page."""
    import shutil

    folder = tmp_path / "policy"
    shutil.copytree(ROOT / "configs/policy/tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vlm_model_name": "nobody/nothing"}))
    message = refusal(**(good | {"policy__path": folder}))
    assert message.startswith("vlm_model_name 'nobody/nothing' of the policy: ")
    assert "\n" not in message


def test_the_command_line_answers_a_mistake_with_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "jobs/train_smolvla.py", "--stps", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line == "train_smolvla.py: unknown flag --stps; did you mean --steps?"


def test_a_tracking_server_that_does_not_answer_is_refused_before_ray_starts(good):
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in good.items()]
    done = subprocess.run(
        [sys.executable, "jobs/train_smolvla.py", *flags, "--tracking.uri=http://127.0.0.1:9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "tracking.uri http://127.0.0.1:9: no MLflow server answers" in done.stderr.splitlines()[-1]


def test_the_list_of_runs_leads_to_the_run_by_its_name(uninterrupted, jobs, pages):
    run = jobs.run_of("uninterrupted").info
    address = pages.open_runs(run.experiment_id, run_name="uninterrupted")
    assert address == f"#/experiments/{run.experiment_id}/runs/{run.run_id}"


def test_the_charts_draw_exactly_the_points_of_the_loss_and_the_slider_the_samples(
    uninterrupted, jobs, pages
):
    run = jobs.run_of("uninterrupted").info
    pages.open_charts(run.experiment_id, run.run_id, pattern="^train/loss$|^samples$")
    drawn = pages.curve("train/loss")
    logged = jobs.curve("uninterrupted")
    assert drawn.steps == sorted(logged)
    assert drawn.values == pytest.approx([logged[step] for step in drawn.steps], rel=1e-6)
    for step in (0, 7):
        shown = pages.slider_image("samples", step=step)
        assert (shown.step, shown.width_px > 0) == (step, True)
        assert shown.path.startswith(f"images/samples+step+{step}+")


def test_the_contact_sheet_opens_among_the_artifacts(uninterrupted, jobs, episodes, pages):
    run = jobs.run_of("uninterrupted").info
    path = f"data/{episodes.name}/contact_sheet.png"
    image = pages.open_artifact_image(run.experiment_id, run.run_id, path=path)
    file = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, artifact_path=path, tracking_uri=jobs.mlflow_uri
    )
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(Image.open(file).size)
