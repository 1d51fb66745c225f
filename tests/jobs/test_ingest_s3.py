"""Ingestion into an object store: a real HTTP S3 server, the real job, killed and continued."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from lerobot_toy import write_v21
from moto.server import ThreadedMotoServer

from pipelines import output
from pipelines.dataset import filesystem_of, open_dataset
from pipelines.files import exists, write_json
from pipelines.ingestion import ingest
from pipelines.sources.lerobot import LeRobotSource
from pipelines.writer import WriterOptions

ROOT = Path(__file__).parents[2]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """A function that writes the URI of a folder in a bucket of the test's own."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    host, port = server
    name = f"bucket{abs(hash(request.node.name)) % 10**8}"
    place = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    filesystem = pafs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    filesystem.create_dir(name)

    def uri(folder, bucket=name):
        query = "&".join(f"{key}={value}" for key, value in place.items())
        return f"s3://{bucket}/{folder}?{query}"

    return uri


def listed(uri):
    filesystem, root = filesystem_of(uri)
    entries = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    return sorted(e.path.removeprefix(f"{root}/") for e in entries if e.type == pafs.FileType.File)


def started(source, uri):
    """The job with a Ray of its own, whose workers have the credentials of its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "jobs/ingest_lerobot.py", "--source", str(source), "--output", uri]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | SECRETS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_job_killed_halfway_is_continued_in_the_store_and_gives_the_local_content(
    ray_session,  # for the local twin
    bucket,
    tmp_path,
):
    source = write_v21(tmp_path / "source", dict.fromkeys(range(8), 260))  # a part each
    uri = bucket("robots/killed")
    filesystem, root = filesystem_of(uri)
    job = started(source, uri)
    deadline_s = time.monotonic() + 120
    while job.poll() is None and time.monotonic() < deadline_s:
        if exists(filesystem, f"{root}/meta/_ingest/000000.json"):
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not exists(filesystem, f"{root}/meta/info.json")
    with pytest.raises(ValueError, match="not a complete episode dataset"):
        open_dataset(uri)

    again = started(source, uri)
    out, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    report = json.loads(out.splitlines()[-1])
    local = ingest(
        LeRobotSource(uri=str(source)),
        str(tmp_path / "local"),
        options=WriterOptions(),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )
    assert report["fingerprint"] == local["fingerprint"] == open_dataset(uri).fingerprint
    files = [str(path.relative_to(tmp_path / "local")) for path in (tmp_path / "local").rglob("*.*")]
    assert listed(uri) == sorted(name for name in files if (tmp_path / "local" / name).is_file())
    for name in ("data/chunk-000/file-000.parquet", "meta/stats.json"):
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            assert stream.read() == (tmp_path / "local" / name).read_bytes()


def test_two_runs_into_one_folder_of_a_store_refuse_each_other(bucket, monkeypatch):
    monkeypatch.setattr(output, "BEAT_S", 0.2)
    monkeypatch.setattr(output, "SILENT_S", 1.5)
    monkeypatch.setattr(output, "SETTLE_S", 0.1)
    monkeypatch.setattr(output.socket, "gethostname", lambda: "here")
    uri = bucket("held")
    with output.exclusive(uri):
        again = output.exclusive(uri)
        with pytest.raises(ValueError, match="another ingestion is writing into it"):
            again.__enter__()
    with output.exclusive(uri):
        pass  # free again
    assert listed(uri) == []


def test_a_lease_that_nobody_renews_is_taken_over_after_a_while(bucket, monkeypatch):
    monkeypatch.setattr(output, "SILENT_S", 1.0)
    monkeypatch.setattr(output, "SETTLE_S", 0.1)
    uri = bucket("left")
    filesystem, root = filesystem_of(uri)
    write_json(filesystem, f"{root}/{output.LEASE}", {"host": "gone", "pid": 1, "run": "a", "beat": 7})
    started_s = time.monotonic()
    with output.exclusive(uri):
        assert time.monotonic() - started_s > 1.0


def test_the_lease_of_a_process_that_died_here_is_free_at_once(bucket, monkeypatch):
    monkeypatch.setattr(output, "SILENT_S", 60.0)
    monkeypatch.setattr(output, "SETTLE_S", 0.1)
    uri = bucket("died")
    filesystem, root = filesystem_of(uri)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease = {"host": socket.gethostname(), "pid": dead.pid, "run": "a", "beat": 7}
    write_json(filesystem, f"{root}/{output.LEASE}", lease)
    started_s = time.monotonic()
    with output.exclusive(uri):
        assert time.monotonic() - started_s < 30


def test_a_bucket_that_does_not_exist_is_one_line(bucket, tmp_path):
    source = write_v21(tmp_path, {0: 5})
    job = started(source, bucket("out", bucket="no-such-bucket"))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith("ingest_lerobot.py: output s3://no-such-bucket/out")
    assert "cannot be written" in line
