"""The local services: idempotent, on loopback, closed to whoever has no token."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/local/services.py"


def record():
    return json.loads((Path(os.environ["SMOLVLA_STATE"]) / "services.json").read_text())


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


def test_a_service_that_dies_while_it_starts_is_started_once_more(tmp_path):
    """On a very busy machine Ray ends itself while it starts."""
    environment = os.environ | {"SMOLVLA_STATE": str(tmp_path)}
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "ray_token")
    command = [sys.executable, SCRIPT]
    up = subprocess.Popen([*command, "up"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "services.json").exists():
            assert up.poll() is None
            time.sleep(0.05)
        first = json.loads((tmp_path / "services.json").read_text())["ray"]["pid"]
        psutil.Process(first).kill()
        said, _ = up.communicate(timeout=400)
        assert up.returncode == 0, said
        assert f"ray ended while it started, see {tmp_path / 'ray'}.log; trying once more" in said
        second = json.loads((tmp_path / "services.json").read_text())["ray"]
        assert second["pid"] != first
        assert psutil.pid_exists(second["pid"])
    finally:
        subprocess.run([*command, "down"], env=environment, check=True, timeout=120)


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
