"""Machines for real: Ray in network namespaces, MLflow with users on PostgreSQL, an object store."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import psycopg
import pyarrow.fs as pafs
import pytest
from lerobot_toy import write_v21
from mlflow import MlflowClient
from ray.job_submission import JobStatus, JobSubmissionClient
from runs import losses_alone

from jobs import command_line, train_smolvla
from jobs.tracking import check_reachable
from jobs.train_smolvla import TrainJob
from pipelines.dataset import filesystem_of
from pipelines.run_storage import RunStorage

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/local/cluster.sh"
FAILS_FAST = {  # a node that is cut off is given up after seconds instead of a minute
    "RAY_health_check_initial_delay_ms": "20000",  # a node that starts on a busy machine is slow to answer
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
STEPS = 24
FLAGS = {"steps": STEPS, "batch_size": 8, "micro_batch": 4, "mixing_rows": 64, "log_every": 1}


def missing():
    """Why this machine cannot be several."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    probe = f"smolvla-probe-{os.getpid()}"  # every process of the tests looks
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this machine allows no network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return "" if list(Path("/usr/lib/postgresql").glob("*/bin/postgres")) else "no PostgreSQL"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Machines:
    """The cluster as somebody outside sees it."""

    def __init__(self):
        self.state = Path("/tmp") / f"smolvla-cluster-{os.getpid()}"
        self.environment = os.environ | FAILS_FAST | {"SMOLVLA_CLUSTER": str(self.state)}

    def call(self, *words):
        subprocess.run([SCRIPT, *words], check=True, timeout=600, env=self.environment)

    def variables(self):
        """What a client sources."""
        text = (self.state / "env").read_text()
        return dict(word.split("=", 1) for word in text.replace("export ", "").split())

    def secrets(self):
        return {file.name: file.read_text() for file in (self.state / "secrets").iterdir()}

    def processes(self):
        """Ids of all that runs in the machines."""
        names = ("services", "head", "worker1", "worker2")
        listed = [
            subprocess.check_output(["ip", "netns", "pids", f"smolvla-{name}"], text=True) for name in names
        ]
        return [pid for text in listed for pid in text.split() if Path(f"/proc/{pid}/cmdline").exists()]

    def logs(self):
        """Folders with all that was written into logs."""
        return [self.state / "log", *self.state.glob("*/ray/session_2*/logs")]

    def submitted(self, command, *, succeeds=True):
        """Run a job as users do and return what its terminal showed."""
        words = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."]
        done = subprocess.run(
            [*words, "--", *command], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )
        assert (done.returncode == 0) == succeeds, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def machines():
    found = Machines()
    try:
        found.call("up")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.variables().items():
                patch.setenv(name, value)
            yield found
    finally:
        found.call("down")


@pytest.fixture(scope="module")
def dataset(machines, tmp_path_factory):
    """An episode dataset in the object store, written by a tracked job."""
    source = tmp_path_factory.mktemp("cups") / "cups"
    write_v21(source, {0: 60, 1: 50, 2: 70, 3: 60, 4: 80})
    machines.submitted(
        ["python", "jobs/ingest_lerobot.py", "--source", str(source), "--output", "s3://robots/cups"]
    )
    return "s3://robots/cups"


def flags(dataset, **changes):
    given = {"config": "configs/train/demo.yaml", "dataset.path": dataset, **FLAGS} | changes
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(machines, dataset):
    """A run that lost a node in the middle, and what its terminal showed."""
    storage = RunStorage(folder=machines.state / "cut", uri="s3://runs/all/cut")
    client = JobSubmissionClient()
    settings = {"run_name": "cut", "storage_path": "s3://runs/all", "work_path": "/mnt/work"}
    # two of the three CPUs of a machine: each gets one worker
    settings |= {
        "num_workers": "1-2",
        "cpus_per_worker": 2,
        "checkpoint.every": 5,
        "collective_timeout_s": 10,
    }
    job = client.submit_job(
        entrypoint=" ".join(["python", "jobs/train_smolvla.py", *flags(dataset, **settings)]),
        runtime_env={"working_dir": str(ROOT), "excludes": ["tests", ".local", ".git", "docs"]},
    )
    wait_for(lambda: storage.has("step_000000010/MANIFEST.json"), client, job)
    machines.call("cut", "worker2")
    wait_for(lambda: client.get_job_status(job).is_terminal(), client, job)
    machines.call("heal", "worker2")
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs[-4000:]
    return MlflowClient().get_run(storage.read_json("run.json")["mlflow_run_id"]), logs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (  # of 6 CPUs in all
            {"cpus_per_worker": 4, "storage_path": "s3://runs/all"},
            r"num_workers 1 with cpus_per_worker 4\.0 and use_gpu False: a worker is on one node, and the "
            r"cluster's nodes have room for 0\n",
        ),
        (
            {"storage_path": "/mnt/runs"},
            r"storage_path: node 10\.213\.77\.1[12] has no /mnt/runs/refused/start/config\.json; every node "
            r"must see this folder, or take an object store \(s3://\.\.\.\)\n",
        ),
    ],
)
def test_what_no_node_can_hold_or_see_is_refused_before_a_worker_starts(machines, dataset, settings, said):
    """Before the tests that cut a machine off: Ray does not take that one back."""
    given = flags(dataset, run_name="refused", num_workers=1, work_path="/mnt/work", **settings)
    shown = machines.submitted(["python", "jobs/train_smolvla.py", *given], succeeds=False)
    assert re.search(r"train_smolvla\.py: " + said, shown), shown
    assert "Traceback" not in shown


def test_a_node_is_cut_off_in_the_middle_and_the_run_ends_exactly(finished, dataset, tmp_path):
    run, logs = finished
    assert run.info.status == "FINISHED"
    before, after = (
        set(re.findall(r"- \(ip=([\d.]+), pid", group))
        for group in logs.split("Started training worker group")[1::2]
    )
    assert before == {"10.213.77.11", "10.213.77.12"}
    assert after == {"10.213.77.11"}
    points = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    assert {point.step: point.value for point in points} == pytest.approx(
        reference(dataset, tmp_path), rel=1e-5
    )


def wait_for(condition, client, job, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-6000:]
        time.sleep(0.5)


def reference(dataset, folder):
    """step -> loss of the same run in this process alone."""
    words = flags(dataset, run_name="alone", storage_path=folder)
    job = train_smolvla.completed(command_line.parsed(TrainJob, words))
    prepared = train_smolvla.prepare(job)
    train_smolvla.write_start(prepared, job)
    return losses_alone(prepared.train, prepared.reader, prepared.folder / "start")


def test_the_data_name_the_run_that_wrote_them_and_the_store_that_they_came_into(finished, machines):
    run, _ = finished
    ingestion = MlflowClient().get_run(run.data.tags["ingest_run_id"])
    assert (ingestion.info.status, ingestion.data.tags["kind"]) == ("FINISHED", "ingestion")
    assert ingestion.data.tags["dataset_fingerprint"] == run.data.tags["dataset_fingerprint"]
    assert run.data.params["dataset"] == "s3://robots/cups"


def test_no_secret_is_in_parameters_artifacts_checkpoints_logs_or_on_a_command_line(
    finished, machines, tmp_path
):
    secrets = machines.secrets()
    secrets = {name: value for name, value in secrets.items() if not name.endswith(".ini")}
    assert len(secrets) == 5
    for run in MlflowClient().search_runs([finished[0].info.experiment_id]):
        folder = tmp_path / run.info.run_id
        mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(folder))
        (folder / "run.json").write_text(json.dumps(run.to_dictionary()))
    store = filesystem_of("s3://runs")[0]
    pafs.copy_files("runs", str(tmp_path), source_filesystem=store, use_threads=False)
    (tmp_path / "processes").write_bytes(
        b"\n".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in machines.processes())
    )
    (tmp_path / "jobs.json").write_text(authorized(f"{os.environ['RAY_API_SERVER_ADDRESS']}/api/jobs/"))
    read = {path: path.read_bytes() for folder in (tmp_path, *machines.logs()) for path in files_of(folder)}
    assert len(read) > 100
    for name, value in secrets.items():
        assert [path for path, content in read.items() if value.encode() in content] == [], name


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def authorized(url):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


@pytest.mark.parametrize(
    ("variable", "path", "host", "code"),
    [
        ("RAY_API_SERVER_ADDRESS", "/api/jobs/", None, 401),
        ("MLFLOW_TRACKING_URI", "/api/2.0/mlflow/experiments/search", None, 401),
        ("MLFLOW_TRACKING_URI", "/api/2.0/mlflow/experiments/search", "elsewhere.example", 403),
    ],
)
def test_nobody_without_a_name_is_answered(machines, variable, path, host, code):
    request = urllib.request.Request(os.environ[variable] + path, headers={"Host": host} if host else {})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == code


def test_the_database_wants_its_password(machines):
    place = "host=10.213.77.2 user=postgres dbname=postgres"
    password = machines.secrets()["postgres_password"]
    with psycopg.connect(place, password=password) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (2,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(place, password="guessed")


def test_a_wrong_password_of_mlflow_is_refused_before_anything_starts(machines, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "guessed")
    with pytest.raises(
        ValueError, match=r"tracking.uri http://10.213.77.2:5000: the server refuses this user"
    ):
        check_reachable(os.environ["MLFLOW_TRACKING_URI"])
