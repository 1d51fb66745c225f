"""Start, find and stop the local services on loopback: a Ray head with token authentication, an MLflow.

python infra/local/services.py up|down|status

Everything lives in `.local/` (or where SMOLVLA_STATE says): what was started (services.json), the variables
that clients need (env, to be sourced), the token, the logs, MLflow's database and artifacts. `down` ends only
the processes that `up` started.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).absolute().parents[2]
STATE = Path(os.environ.get("SMOLVLA_STATE", ROOT / ".local")).absolute()
RECORD = STATE / "services.json"
TOKEN = STATE / "ray_token"
# Unix sockets allow 107 characters and Ray's workers no space, so Ray's files cannot live in the project.
RAY_FILES = Path("/tmp") / f"smolvla-{os.getuid()}-{hashlib.sha256(str(STATE).encode()).hexdigest()[:8]}"
RAY_ADDRESS = RAY_FILES / "ray_current_cluster"  # Ray writes it when the head is up
READY_WITHIN_S = 120
TRIES = 3  # Ray gives its own processes 15 s, too few on a very busy machine
STOP_WITHIN_S = 6  # orderly; nothing that they keep is lost when they are killed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["up", "down", "status"])
    {"up": up, "down": down, "status": status}[parser.parse_args().action]()


def up() -> None:
    """Start what is not running yet; may be called as often as one likes."""
    if " " in sys.executable:
        sys.exit(f"{sys.executable}: Ray's workers cannot start from a path with a space; use `make up`")
    STATE.mkdir(exist_ok=True)
    if not TOKEN.exists():
        TOKEN.touch(mode=0o600)
        TOKEN.write_text(secrets.token_hex(32))
    with _alone():
        record = _record()
        for name in STARTS:
            if _process(record.get(name)) is None:
                _start(name, record)
        for name in STARTS:
            tries = 1
            while not _becomes_ready(name, record[name]):
                if tries == TRIES:
                    _give_up(name)
                print(f"{name} ended while it started, see {STATE / name}.log; trying once more")
                _start(name, record)
                tries += 1
    record["ray"]["address"] = RAY_ADDRESS.read_text().strip()  # for ray.init; `url` is for jobs
    RECORD.write_text(json.dumps(record, indent=1))
    _write_env(record)
    status()


def _start(name: str, record: dict[str, Any]) -> None:
    record[name] = STARTS[name]()
    RECORD.write_text(json.dumps(record, indent=1))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other `up` of this user chooses ports meanwhile."""
    with (Path("/tmp") / f"smolvla-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def down() -> None:
    """End what `up` started: the recorded processes and their descendants, nothing else."""
    for name, service in _record().items():
        process = _process(service)
        if process is None:
            print(f"{name}: not running")
            continue
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for survivor in _left_of(family, STOP_WITHIN_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        _left_of(family, STOP_WITHIN_S)
        print(f"{name}: stopped")
    RECORD.unlink(missing_ok=True)


def _left_of(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still running after up to so long; where nothing reaps, ended ones stay as zombies."""
    deadline = time.monotonic() + timeout_s
    while True:
        _, found = psutil.wait_procs(processes, timeout=0.1)
        found = [process for process in found if _runs(process)]
        if not found or time.monotonic() > deadline:
            return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def status() -> None:
    """Say what runs where."""
    record = _record()
    for name in ("ray", "mlflow"):
        running = _process(record.get(name)) is not None
        print(
            f"{name}: {record[name]['url']} (pid {record[name]['pid']})"
            if running
            else f"{name}: not running"
        )
    if record:
        print(f"clients: source {STATE / 'env'}")


def _record() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _process(service: dict[str, Any] | None) -> psutil.Process | None:
    """The recorded process, if it still is that process: ids are used again, start times are not."""
    if service is None:
        return None
    try:
        process = psutil.Process(service["pid"])
        known = abs(process.create_time() - service["started"]) < 1
        return process if known and _runs(process) else None
    except psutil.NoSuchProcess:
        return None


def _start_ray() -> dict[str, Any]:
    port, dashboard = _free_port(6379), _free_port(8265)
    RAY_FILES.mkdir(mode=0o700, exist_ok=True)
    if RAY_FILES.stat().st_uid != os.getuid():
        sys.exit(f"{RAY_FILES} belongs to somebody else")
    RAY_ADDRESS.unlink(missing_ok=True)
    # On a small machine the train workers and the data tasks share the cores; Ray waits for ever for a CPU it
    # lacks.
    num_cpus = max(os.cpu_count() or 1, 4)
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", str(num_cpus)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", str(_free_port(52365)), "--temp-dir", str(RAY_FILES)]
    environment = _client_environment() | {
        "RAY_JOB_STOP_WAIT_TIME_S": "30",  # a stopped job ends its MLflow run; 3 s can be too short
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # Fixed else: of two clusters, Prometheus would be sent to the first one's exporters twice.
        "AUTOSCALER_METRIC_PORT": str(_free_port(44217)),
        "DASHBOARD_METRIC_PORT": str(_free_port(44227)),
    }
    return _started("ray", command, environment, url=f"http://127.0.0.1:{dashboard}")


def _start_mlflow() -> dict[str, Any]:
    # One that ended comes back where its clients know it.
    port = _free_port(urllib.parse.urlsplit(_record().get("mlflow", {}).get("url", "")).port or 5000)
    folder = STATE / "mlflow"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    # One process: with more, each request waits 40 ms (uvicorn#3149), and sqlite has one writer anyway.
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"
    }  # its consumers are for GenAI and take 1.5 GB
    return _started("mlflow", command, environment, url=f"http://127.0.0.1:{port}")


STARTS = {"ray": _start_ray, "mlflow": _start_mlflow}


def _client_environment() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}


def _started(name: str, command: list[str], environment: dict[str, str], *, url: str) -> dict[str, Any]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` in a job's command is this one
    with (STATE / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment | {"PATH": path},
            start_new_session=True,  # Ctrl-C of the terminal that started it should not end it
        )
    return {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "url": url}


def _free_port(wanted: int) -> int:
    """The wanted port, or the next one that nobody listens on."""
    for port in range(wanted, wanted + 100):
        with socket.socket() as probe:
            somebody_listens = probe.connect_ex(("127.0.0.1", port)) == 0
        if somebody_listens:
            continue
        with contextlib.suppress(OSError), socket.socket() as binder:
            binder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            binder.bind(("127.0.0.1", port))
            return port
    sys.exit(f"no free port between {wanted} and {wanted + 99}")


def _becomes_ready(name: str, service: dict[str, Any]) -> bool:
    """Whether it answers in time; False if it ended before."""
    answers = {"ray": _ray_answers, "mlflow": _mlflow_answers}[name]
    deadline = time.monotonic() + READY_WITHIN_S
    while not _answers(answers, service["url"]):
        if _process(service) is None:
            return False
        if time.monotonic() > deadline:
            _give_up(name)
        time.sleep(0.5)
    return True


def _give_up(name: str) -> NoReturn:
    log = STATE / f"{name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    sys.exit(f"{name} did not start; the end of {log}:\n{tail}")


def _answers(ask: Callable[[str], None], url: str) -> bool:
    try:
        ask(url)
    except (urllib.error.URLError, OSError):
        return False
    return True


def _ray_answers(url: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN.read_text()}"}
    RAY_ADDRESS.stat()
    # The job API answers only when the agent that starts jobs is there.
    urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=5).read()


def _mlflow_answers(url: str) -> None:
    urllib.request.urlopen(f"{url}/health", timeout=5).read()


def _write_env(record: dict[str, dict[str, Any]]) -> None:
    values = _client_environment() | {
        "RAY_API_SERVER_ADDRESS": record["ray"]["url"],
        "MLFLOW_TRACKING_URI": record["mlflow"]["url"],
    }
    (STATE / "env").write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    )


if __name__ == "__main__":
    main()
