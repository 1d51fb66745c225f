"""Seconds a step and memory a worker of DDP and FSDP at the published size: two gloo workers on the CPU.

python benchmarks/engine.py [--quick] [--tiny [--all_words]] [--only <case> ...]

float32, one thread a worker, new processes for every case. Nothing else should run: a worker waits for the
other in every step. The last line is one JSON object:

<case>_step_s    median seconds of an optimiser step, after one that is not counted.
<case>_peak_gb   most memory (resident) of a worker in a step, of the worse of the two.
<case>_start_gb  the same before the first step, when every worker builds the whole policy.
<case>_lookup_ms median milliseconds of the instructions' embedding alone, which is a part of a step.
Cases: single (one worker), ddp, fsdp, fsdp_checkpointing (activation checkpointing), fsdp_gathering_words
(every pass gathers the word embedding, as where it trains).
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from published_policy import build_columns, build_policy  # noqa: E402

from pipelines.engine import Engine  # noqa: E402
from pipelines.train_config import Parallel, TrainConfig  # noqa: E402
from smolvla import SmolVLAPolicy  # noqa: E402
from smolvla.processing import TOKENS  # noqa: E402

NEEDED_GB = 10
"""For two workers that hold the whole policy, gradients and moments of the trained part, and activations."""
LOOKUPS = 10


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    num_workers: int
    parallel: Parallel
    activation_checkpointing: bool = False
    words_known: bool = True


CASES = {
    "single": Case(num_workers=1, parallel="ddp"),
    "ddp": Case(num_workers=2, parallel="ddp"),
    "fsdp": Case(num_workers=2, parallel="fsdp"),
    "fsdp_checkpointing": Case(num_workers=2, parallel="fsdp", activation_checkpointing=True),
    "fsdp_gathering_words": Case(num_workers=2, parallel="fsdp", words_known=False),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two steps of each case instead of five")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script itself")
    parser.add_argument(
        "--all_words", action="store_true", help="the toy with the published word embedding, for lookup_ms"
    )
    parser.add_argument("--batch", type=int, default=1, help="samples of a worker in a step")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    flags = parser.parse_args(arguments)
    free_gb = psutil.virtual_memory().available / 1e9
    if not flags.tiny and free_gb < NEEDED_GB:
        raise SystemExit(f"{free_gb:.1f} GB of memory are free, two workers need {NEEDED_GB}")
    results: dict[str, float] = {}
    for name in flags.only:
        case = CASES[name]
        load = os.getloadavg()[0]
        found = measured(case, flags, steps=2 if flags.quick else 5)
        print(f"{name:20} {found}, load before {load:.1f}", flush=True)
        results |= {f"{name}_{key}": value for key, value in found.items()}
    for parallel in ("ddp", "fsdp"):
        if {"single", parallel} <= set(flags.only):
            results[f"{parallel}_scaling"] = 2 * results["single_step_s"] / results[f"{parallel}_step_s"]
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


def measured(case: Case, flags: argparse.Namespace, *, steps: int) -> dict[str, float]:
    """Run the case in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    with context.Pool(case.num_workers) as pool:
        jobs = [
            (case, rank, address, steps, flags.batch, flags.cameras, flags.tiny, flags.all_words)
            for rank in range(case.num_workers)
        ]
        found = pool.starmap(worker, jobs, chunksize=1)
    return {
        "step_s": max(statistics.median(one["steps_s"]) for one in found),
        "peak_gb": max(one["peak_gb"] for one in found),
        "start_gb": max(one["start_gb"] for one in found),
        "lookup_ms": max(statistics.median(one["lookups_s"]) for one in found) * 1e3,
    }


def worker(
    case: Case,
    rank: int,
    address: str,
    steps: int,
    batch: int,
    cameras: int,
    tiny: bool,  # noqa: FBT001
    all_words: bool,  # noqa: FBT001
) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=case.num_workers)
    policy = build_policy(num_cameras=cameras, tiny=tiny, all_words=all_words)
    columns = build_columns(policy, batch=batch)
    words = columns[TOKENS].unique().numpy() if case.words_known else None
    engine = Engine(policy.train(), train_config(case, steps=steps, batch=batch), words=words)
    start = peak_gb(forget=True)
    steps_s = []
    for step in range(1, steps + 2):
        dist.barrier()
        started = time.perf_counter()
        result = engine.step(step, [((step - 1) * case.num_workers + rank, columns)], count=1)
        steps_s.append(time.perf_counter() - started)
        assert torch.isfinite(result.loss), result
        assert not result.skipped, result
    peak = peak_gb()
    lookups_s = lookup_seconds(policy, columns[TOKENS])
    dist.destroy_process_group()
    return {"steps_s": steps_s[1:], "peak_gb": peak, "start_gb": start, "lookups_s": lookups_s}


@torch.no_grad()
def lookup_seconds(policy: SmolVLAPolicy, tokens: Tensor) -> list[float]:
    """Of embedding a micro-batch's instructions, which all workers begin together."""
    seconds = []
    for _ in range(1 + LOOKUPS):
        dist.barrier()
        started = time.perf_counter()
        policy.model.vlm_with_expert.embed_language_tokens(tokens)
        seconds.append(time.perf_counter() - started)
    dist.barrier()
    return seconds[1:]


def peak_gb(*, forget: bool = False) -> float:
    """Most resident memory of this process since it was last forgotten."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024 / 1e9


def train_config(case: Case, *, steps: int, batch: int) -> TrainConfig:
    return TrainConfig(
        steps=steps + 1,
        batch_size=batch * case.num_workers,
        micro_batch=batch,
        seed=0,
        decay_steps=None,
        precision="float32",
        log_every=1,
        checkpoint_every=1,
        record_rows=False,
        parallel=case.parallel,
        activation_checkpointing=case.activation_checkpointing,
    )


if __name__ == "__main__":
    main()
