"""What a step pays for its point in MLflow: ours beside MLflow's own calls, and with the server away.

python benchmarks/tracking.py [--quick]

A real Ray cluster and a real MLflow server (sqlite, one process) are started and ended; the writers take
turns, 8 metrics a step, 5 ms of other work between steps. The last line is one JSON object:

ours_ms, ours_p99_ms  milliseconds a step stands still for its point, mean and 99th percentile.
away_ms               the mean while the server is killed.
sync_vs_ours          mean of `MlflowClient.log_batch` over ours; async_vs_ours the same of MLflow's queue.
delivered_share       points of ours that the server has at the end, of those given, away time included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SERVICES = [sys.executable, str(ROOT / "infra/local/services.py")]
METRICS = [f"train/metric_{number}" for number in range(7)] + ["train/lr"]
WORK_S = 0.005
CLOSE_WITHIN_S = 120.0

Log = Callable[[int, dict[str, float]], object]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps; within two minutes")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tracking-benchmark-") as folder:
        os.environ["SMOLVLA_STATE"] = folder
        try:
            subprocess.run([*SERVICES, "up"], check=True)
            results = measure(Path(folder), steps=100 if flags.quick else 500)
        finally:
            subprocess.run([*SERVICES, "down"], check=True)
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


def measure(folder: Path, *, steps: int) -> dict[str, float]:
    services = json.loads((folder / "services.json").read_text())
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "ray_token")}
    import ray  # reads the token once

    from jobs import tracking
    from jobs.delivery import delivery_of
    from jobs.points import run_writer
    from pipelines.run_storage import RunStorage

    ray.init(address=services["ray"]["address"], log_to_driver=False)
    uri = services["mlflow"]["url"]
    run = tracking.start_run(uri, experiment="benchmark", name="ours", params={}, tags={})
    theirs = tracking.start_run(uri, experiment="benchmark", name="theirs", params={}, tags={})
    storage = RunStorage(folder=folder / "run")
    writer = run_writer(delivery_of(run, storage))
    client = theirs.client
    points = {
        "ours": writer.log,
        "sync": lambda step, values: client.log_batch(theirs.run_id, metrics=entities(step, values)),
        "async": lambda step, values: client.log_batch(
            theirs.run_id, metrics=entities(step, values), synchronous=False
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for name, log in points.items():
        timed(log, range(-20, 0) if name != "ours" else range(1, 21))  # warms up
    for turn in range(3):
        for name, log in points.items():
            first = 21 + turn * steps
            seconds[name] += timed(log, range(first, first + steps))
    import psutil

    server = psutil.Process(services["mlflow"]["pid"])
    for process in (server, *server.children(recursive=True)):
        process.kill()
    first = 21 + 3 * steps
    away = timed(writer.log, range(first, first + steps))
    subprocess.run([*SERVICES, "up"], check=True)
    undelivered = writer.close(CLOSE_WITHIN_S)
    found = sum(len(run.client.get_metric_history(run.run_id, name)) for name in METRICS)
    ray.shutdown()
    mean = {name: 1000 * float(np.mean(values)) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:6} mean {mean[name]:7.3f} ms, p99 {1000 * np.quantile(values, 0.99):7.3f} ms")
    print(f"server away: mean {1000 * np.mean(away):.3f} ms; not delivered at the end: {undelivered} records")
    return {
        "ours_ms": mean["ours"],
        "ours_p99_ms": 1000 * float(np.quantile(seconds["ours"], 0.99)),
        "away_ms": 1000 * float(np.mean(away)),
        "sync_vs_ours": mean["sync"] / mean["ours"],
        "async_vs_ours": mean["async"] / mean["ours"],
        "delivered_share": found / (len(METRICS) * (20 + 4 * steps)),
    }


def entities(step: int, values: dict[str, float]) -> list:
    """The values as MLflow's own client takes them."""
    from mlflow.entities import Metric

    return [Metric(name, value, int(time.time() * 1000), step) for name, value in values.items()]


def timed(log: Log, steps: range) -> list[float]:
    """Seconds that each call takes."""
    found = []
    for step in steps:
        values = {name: step + number / 8 for number, name in enumerate(METRICS)}
        started = time.perf_counter()
        log(step, values)
        found.append(time.perf_counter() - started)
        time.sleep(WORK_S)
    return found


if __name__ == "__main__":
    main()
