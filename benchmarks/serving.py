"""How long a robot waits for its chunk from jobs/serve_policy.py, alone and beside seven others.

python benchmarks/serving.py [--quick] [--published]

Starts the job as a user does, with batches and without (`--max_batch 1`), and asks it through RobotClient, on
this machine; each robot asks again as soon as it is answered. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from published_policy import ACTION_DIM, STATE_DIM, VLM, build_policy

from smolvla import SmolVLAConfig, SmolVLAPolicy
from smolvla.client import RobotClient

ROOT = Path(__file__).absolute().parents[1]
TINY = ROOT / "configs/policy/tiny"
CLIENTS = 8
READY_WITHIN_S = 240


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 s for each figure instead of 30")
    parser.add_argument("--published", action="store_true", help="the 450M size with random weights")
    one_less = max((os.cpu_count() or 2) - 1, 1)  # the gateway needs a part of one
    parser.add_argument("--cpus", type=int, default=one_less, help="threads of the policy")
    flags = parser.parse_args(arguments)
    seconds = 5.0 if flags.quick else 30.0
    figures: dict[str, Any] = {"size": "published" if flags.published else "tiny", "cpus": flags.cpus}
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        folder = policy_folder(Path(work) / "policy", published=flags.published)
        for name, max_batch in (("batched", CLIENTS), ("unbatched", 1)):
            with served(folder, max_batch=max_batch, cpus=flags.cpus) as url:
                counts = (1, CLIENTS) if name == "batched" else (CLIENTS,)
                for clients in counts:
                    figures |= measured(url, clients, seconds, prefix=f"{name}_{clients}")
    ratio = figures[f"batched_{CLIENTS}_per_s"] / figures[f"unbatched_{CLIENTS}_per_s"]
    figures["batched_vs_unbatched"] = ratio
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")
    print(json.dumps(figures))


def policy_folder(folder: Path, *, published: bool) -> Path:
    """A policy of random weights: two cameras of 480 x 640 pixels at the published size, of 96 x 96 else."""
    if published:
        policy = build_policy(num_cameras=2, tiny=False)
        vlm = folder.parent / "vlm"
        shutil.copytree(TINY / "vlm", vlm)  # for its tokenizer: a byte is a token
        (vlm / "config.json").write_text(json.dumps(VLM))
        policy.vlm_source = str(vlm)
    else:
        shape = {"type": "VISUAL", "shape": [3, 96, 96]}
        inputs = {f"observation.images.camera{i}": shape for i in range(2)}
        inputs |= {"observation.state": {"type": "STATE", "shape": [STATE_DIM]}}
        outputs = {"action": {"type": "ACTION", "shape": [ACTION_DIM]}}
        config = SmolVLAConfig.from_pretrained(TINY).with_features(inputs, outputs)
        policy = SmolVLAPolicy(config, allow_random_vlm=True)
    widths = {"observation.state": STATE_DIM, "action": ACTION_DIM}
    stats = {name: {"mean": [0.0] * width, "std": [1.0] * width} for name, width in widths.items()}
    policy.save_pretrained(folder, stats=stats)
    return folder


@contextmanager
def served(folder: Path, *, max_batch: int, cpus: int) -> Iterator[str]:
    """The address of a server that ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "jobs/serve_policy.py", "--policy.path", str(folder), "--port", str(port)]
    command += ["--max_batch", str(max_batch), "--cpus_per_replica", str(cpus)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen, log: Any) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            RobotClient(url).metadata()
        except ConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                sys.exit(f"the server did not start:\n{log.read()[-3000:]}")
            time.sleep(0.5)
        else:
            return


def measured(url: str, clients: int, seconds: float, *, prefix: str) -> dict[str, Any]:
    """Milliseconds a chunk, chunks a second of so many robots; the first chunk of each is not counted."""
    start = threading.Barrier(clients)

    def robot(number: int) -> tuple[list[float], list[int], float]:
        waited, batches = [], []
        with RobotClient(url, timeout_s=120) as policy:
            observation = seen(policy.metadata(), number)
            policy.act(observation)
            start.wait()
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                asked = time.perf_counter()
                policy.act(observation)
                waited.append(time.perf_counter() - asked)
                batches.append(policy.answer["batch"])
            return waited, batches, time.perf_counter() - began

    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(robot, range(clients)))
    waited = np.array([value for values, _, _ in found for value in values])
    batches = np.array([value for _, values, _ in found for value in values])
    return {
        f"{prefix}_p50_ms": 1000 * float(np.percentile(waited, 50)),
        f"{prefix}_p99_ms": 1000 * float(np.percentile(waited, 99)),
        f"{prefix}_per_s": sum(len(values) / took for values, _, took in found),
        f"{prefix}_mean_batch": float(len(batches) / np.sum(1 / batches)),
        f"{prefix}_chunks": len(waited),
    }


def seen(metadata: dict[str, Any], number: int) -> dict[str, Any]:
    """An observation of noise."""
    rng = np.random.default_rng(number)
    images = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in metadata["cameras"].items()}
    state = rng.normal(size=metadata["state"]["width"])
    return images | {"observation.state": state, "task": "put the red block into the box"}


def environment() -> dict[str, str]:
    """Without a cluster that the shell may know of."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
