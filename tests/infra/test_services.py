"""The local services: idempotent, on loopback, closed to whoever has no token."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/local/services.py"


def record(state=None):
    return json.loads((Path(state or os.environ["SMOLVLA_STATE"]) / "services.json").read_text())


def test_starting_twice_keeps_what_runs(services):
    before = record()
    subprocess.run([sys.executable, SCRIPT, "up"], check=True, timeout=120)
    assert {name: service["pid"] for name, service in record().items()} == {
        name: service["pid"] for name, service in before.items()
    }


def test_the_job_api_answers_nobody_without_the_token(services):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{services['ray']['url']}/api/jobs/", timeout=10)


def test_the_token_can_be_read_by_its_owner_alone(services):
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0


def test_dashboard_and_tracking_server_listen_on_loopback_only(services):
    ports = {int(service["url"].rsplit(":", 1)[1]) for service in services.values()}
    listening = {tuple(c.laddr) for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    ours = {(ip, port) for ip, port in listening if port in ports}
    assert {port for _, port in ours} == ports
    assert {ip for ip, _ in ours} <= {"127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def others(services, tmp_path_factory):
    """Other services of the same user beside the session's, whose Ray was killed while it started: on a very
    busy machine Ray ends itself. Their folder, what `up` said, the process that was killed."""
    folder = tmp_path_factory.mktemp("others")
    environment = os.environ | {
        "SMOLVLA_STATE": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "ray_token"),
    }
    command = [sys.executable, SCRIPT]
    up = subprocess.Popen([*command, "up"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not (folder / "services.json").exists():
            assert up.poll() is None
            time.sleep(0.05)
        killed = record(folder)["ray"]["pid"]
        psutil.Process(killed).kill()
        said, _ = up.communicate(timeout=400)
        assert up.returncode == 0, said
        yield SimpleNamespace(folder=folder, said=said, killed=killed)
        ray_files = ray_folder(record(folder)["ray"])
    finally:
        subprocess.run([*command, "down"], env=environment, check=True, timeout=120)
    shutil.rmtree(ray_files)


def test_a_service_that_dies_while_it_starts_is_started_once_more(others):
    assert f"ray ended while it started, see {others.folder / 'ray'}.log; trying once more" in others.said
    second = record(others.folder)["ray"]
    assert second["pid"] != others.killed
    assert psutil.pid_exists(second["pid"])


def test_prometheus_is_sent_to_each_clusters_own_exporters(services, others):
    ours, theirs = (targets(ray) for ray in (services["ray"], record(others.folder)["ray"]))
    assert not ours & theirs


def targets(ray):
    """Once the node, its autoscaler and its dashboard are there."""
    file = ray_folder(ray) / "prom_metrics_service_discovery.json"
    deadline = time.monotonic() + 60
    while True:
        found = json.loads(file.read_text()) if file.exists() else []
        addresses = {target for entry in found for target in entry["targets"]}
        if len(addresses) == 3:
            return addresses
        assert time.monotonic() < deadline, addresses
        time.sleep(0.2)


def ray_folder(ray):
    command = psutil.Process(ray["pid"]).cmdline()
    return Path(command[command.index("--temp-dir") + 1])


def test_stopping_ends_only_the_processes_that_were_started(tmp_path):
    """A recorded id that belongs to another process by now is left alone."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        entry = {
            "pid": bystander.pid,
            "started": psutil.Process(bystander.pid).create_time() - 100,
            "url": "",
        }
        (tmp_path / "services.json").write_text(json.dumps({"ray": entry}))
        environment = os.environ | {"SMOLVLA_STATE": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, SCRIPT, "down"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "ray: not running" in done.stdout
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
