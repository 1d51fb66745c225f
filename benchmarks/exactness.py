"""The same run with other numbers of workers, sharded, and killed: how far its curves lie from each other.

python benchmarks/exactness.py [--quick] [--plot docs/images/exactness.png]

Every run is the real job on a local Ray and MLflow that this script starts and stops; workers die by SIGKILL.
The last line is one JSON object: for each run the largest relative difference of a step's loss from that of
one worker (`<run>`), and whether every micro-batch held the same rows (`same_rows`).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import matplotlib as mpl
import psutil
from episode_data import write_dataset
from ingest import pictures

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.delivery import SPOOL  # noqa: E402
from jobs.summary import points  # noqa: E402

SIZE = (96, 128)
EPISODES, FRAMES = 24, 60
CHECKPOINT_EVERY = 10
RUNS = {  # flags of the job
    "one worker": {"num_workers": 1},
    "two workers": {"num_workers": 2},
    "three workers": {"num_workers": 3},
    "four workers": {"num_workers": 4},
    "two workers, FSDP2": {"num_workers": 2, "parallel": "fsdp"},
    "four workers, HSDP": {"num_workers": 4, "parallel": "hsdp", "shard_workers": 2},
}
KILLED = "two workers, killed five times"
RESUBMITTED = "one worker, job killed, then two with FSDP2"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="40 steps, two of the runs and the killed one")
    parser.add_argument("--plot", type=Path, help="write the curves as a picture")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="exactness-") as folder, Service(Path(folder)) as service:
        curves, rows = measure(service, Path(folder), quick=flags.quick)
    reference = curves["one worker"]
    found: dict[str, Any] = {name: deviation(curve, reference) for name, curve in curves.items()}
    for name, value in found.items():
        print(f"{name:45} {len(curves[name]):4d} steps, largest relative difference {value:.1e}")
    if flags.plot:
        draw(curves, flags.plot)
    found["same_rows"] = all(each == rows["one worker"] for each in rows.values())
    print(json.dumps(found))


def measure(service: "Service", folder: Path, *, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(step -> loss, micro-batch -> row ids) of every run."""
    shrunk = (cv2.resize(image, SIZE[::-1]) for image in pictures(64))
    images = [cv2.imencode(".jpg", image)[1].tobytes() for image in shrunk]
    dataset = write_dataset(folder / "data", images, size=SIZE, lengths=[FRAMES] * EPISODES, per_shard=6)
    steps = 40 if quick else 60
    runs = Runs(service, dataset, folder / "runs", steps)
    names = ["one worker", "two workers, FSDP2"] if quick else list(RUNS)
    for name in names:
        finished(runs.started(name, **RUNS[name]))
    runs.with_workers_killed(KILLED, times=2 if quick else 5)
    if not quick:
        runs.with_job_killed(RESUBMITTED)
        names.append(RESUBMITTED)
    names.append(KILLED)
    return {name: runs.curve(name) for name in names}, {name: runs.rows(name) for name in names}


class Service:
    """A Ray head and an MLflow server of its own, ended on leaving."""

    def __init__(self, folder: Path) -> None:
        self._environment = os.environ | {"SMOLVLA_STATE": str(folder / "state")}
        self._variables = folder / "state/env"
        self._record = folder / "state/services.json"

    def __enter__(self) -> "Service":
        self._services("up")
        return self

    def __exit__(self, *_: object) -> None:
        self._services("down")

    def _services(self, word: str) -> None:
        script = str(ROOT / "infra/local/services.py")
        subprocess.run([sys.executable, script, word], env=self._environment, check=True, timeout=300)

    def started(self, job: list[str], log: BinaryIO) -> "subprocess.Popen[bytes]":
        """Start a job as a driver on this Ray, as a submitted one is."""
        address = json.loads(self._record.read_text())["ray"]["address"]
        command = ["bash", "-c", '. "$0" && exec "$@"', str(self._variables), *job]
        environment = os.environ | {"RAY_ADDRESS": address}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def train_workers(self) -> list[psutil.Process]:
        """The train workers that run on it now."""
        ray = psutil.Process(json.loads(self._record.read_text())["ray"]["pid"])
        found = []
        for process in ray.children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found


class Runs:
    """Runs of the job with the same data, seed and numbers."""

    def __init__(self, service: Service, dataset: Path, storage: Path, steps: int) -> None:
        self._service, self._dataset, self._storage, self._steps = service, dataset, storage, steps
        storage.mkdir()

    def folder(self, name: str) -> Path:
        return self._storage / name.replace(" ", "_").replace(",", "")

    def started(self, name: str, **changes: Any) -> "subprocess.Popen[bytes]":
        flags = {
            "config": "configs/train/demo.yaml",
            "dataset.path": self._dataset,
            "storage_path": self._storage,
            "run_name": self.folder(name).name,
            "steps": self._steps,
            "batch_size": 16,
            "micro_batch": 4,
            "mixing_rows": 256,
            "log_every": 1,
            "checkpoint.every": CHECKPOINT_EVERY,
            "record_rows": "true",
            "cpus_per_worker": 0.25,
            "max_failures": -1,
        } | changes
        job = [sys.executable, "jobs/train_smolvla.py"]
        job += [f"--{flag}={value}" for flag, value in flags.items()]
        print(f"{name}: {time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}", flush=True)
        with (self._storage / f"{self.folder(name).name}.log").open("ab") as log:
            return self._service.started(job, log)

    def curve(self, name: str) -> dict[int, float]:
        """Step -> loss, as it goes to MLflow."""
        spool = self.folder(name) / SPOOL
        found = points(spool) if spool.exists() else ()
        return {step: metrics["train/loss"] for step, metrics in found if "train/loss" in metrics}

    def rows(self, name: str) -> dict[int, Any]:
        """Micro-batch -> its (episode, frame)s; when it was computed again, it must have held the same."""
        found: dict[int, Any] = {}
        for path in (self.folder(name) / "rows").iterdir():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                ids = list(zip(entry["episode_index"], entry["frame_index"], strict=True))
                assert found.setdefault(entry["micro_batch"][0], ids) == ids, f"{name}: {entry}"
        return found

    def with_workers_killed(self, name: str, *, times: int) -> None:
        """Somewhere in each `times`-th part of the run a train worker gets SIGKILL."""
        chance = random.Random(0)
        job = self.started(name, num_workers=2)
        for part in range(times):
            self._reach(name, int(self._steps * (part + chance.uniform(0.2, 0.8)) / times), job)
            worker = chance.choice(self._service.train_workers())
            print(f"    SIGKILL for {worker.pid} behind step {max(self.curve(name))}", flush=True)
            worker.kill()
        finished(job)

    def with_job_killed(self, name: str) -> None:
        """The driver gets SIGKILL; the job is started again with other workers."""
        job = self.started(name, num_workers=1)
        self._reach(name, self._steps // 2, job)
        job.kill()
        job.wait()
        finished(self.started(name, num_workers=2, parallel="fsdp"))

    def _reach(self, name: str, step: int, job: "subprocess.Popen[bytes]") -> None:
        while step not in self.curve(name):
            assert job.poll() is None, f"{name} ended before step {step}"
            time.sleep(0.1)


def finished(job: "subprocess.Popen[bytes]") -> None:
    """Wait for a run that must succeed."""
    if job.wait():
        raise SystemExit(f"{job.args} failed with exit code {job.returncode}")


def deviation(curve: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative difference of a step's loss; every step must be there."""
    assert curve.keys() == reference.keys(), "steps are missing"
    return max(abs(curve[step] / loss - 1) for step, loss in reference.items())


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """The losses over each other, and below how far they lie apart."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, figsize=(9, 7), sharex=True, height_ratios=(3, 2))
    reference = curves["one worker"]
    steps = sorted(reference)
    for number, (name, curve) in enumerate(curves.items()):
        width = 7.0 - 6.0 * number / max(len(curves) - 1, 1)  # thinner and thinner, or only the last is seen
        above.plot(steps, [curve[step] for step in steps], linewidth=width, label=name, alpha=0.8)
        if name != "one worker":
            apart = [max(abs(curve[step] / reference[step] - 1), 1e-9) for step in steps]
            below.semilogy(steps, apart, linewidth=1, color=f"C{number}", label=name)
    below.axhline(1e-5, color="black", linestyle=":", linewidth=1)
    below.text(steps[0], 1.2e-5, "1e-5", fontsize=8)
    above.set_ylabel("training loss")
    above.legend(fontsize=8)
    below.set(xlabel="step", ylabel="relative difference\nfrom one worker", ylim=(5e-10, 1e-4))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
