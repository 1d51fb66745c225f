"""How much faster a chunk of actions is sampled than the same numbers computed plainly, on the CPU.

python benchmarks/inference.py [--quick] [--compile]

The last line is one JSON object. Times are the fastest of several alternating repetitions; the denoising
steps are measured with the observation encoded, the chunk from prepared inputs to actions.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_model import PlainModel
from published_policy import build_inputs, build_policy

from smolvla import SmolVLAPolicy


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions instead of five")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script itself")
    parser.add_argument("--compile", action="store_true", help="compile the package's side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch's default if absent")
    flags = parser.parse_args(arguments)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    policy = build_policy(num_cameras=flags.cameras, tiny=flags.tiny).eval()
    plain = PlainModel(policy)
    inputs = build_inputs(policy, batch=flags.batch)
    if flags.compile:
        policy.compile_sampling("default")
    results = measure(policy, plain, inputs, repetitions=2 if flags.quick else 5)
    print(f"{flags.batch} samples, {flags.cameras} cameras, float32, {torch.get_num_threads()} threads")
    print("no GPU measurement: this script runs on the CPU")
    for name, value in results.items():
        print(f"{name:28} {value:.3f}")
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


@torch.no_grad()
def measure(policy: SmolVLAPolicy, plain: PlainModel, inputs: Any, *, repetitions: int) -> dict[str, float]:
    batch, noise, _ = inputs
    observed = {name: value for name, value in batch.items() if name not in ("actions", "is_pad")}
    ours, theirs = policy.model.encode(**observed), plain.encode(batch)
    runs: dict[str, Callable[[], Any]] = {
        "denoise_s": lambda: steps(policy, noise, ours),
        "plain_denoise_s": lambda: plain.denoise(noise, theirs),
        "chunk_latency_s": lambda: policy.model.sample_actions(**observed, noise=noise),
        "plain_chunk_latency_s": lambda: plain.denoise(noise, plain.encode(batch)),
    }
    torch.testing.assert_close(runs["denoise_s"](), runs["plain_denoise_s"](), rtol=1e-3, atol=1e-3)
    seconds = fastest(runs, repetitions)
    speedup = seconds["plain_denoise_s"] / seconds["denoise_s"]
    chunk = seconds["plain_chunk_latency_s"] / seconds["chunk_latency_s"]
    return {"denoise_speedup": speedup, "chunk_speedup": chunk, **seconds}


def steps(policy: SmolVLAPolicy, noise: torch.Tensor, memory: Any) -> torch.Tensor:
    """The Euler steps of `sample_actions`."""
    num_steps, x_t = policy.config.num_steps, noise
    for step in range(num_steps):
        time_now = torch.full(noise.shape[:1], 1 - step / num_steps)
        x_t = x_t - policy.model.denoise(x_t, time_now, memory) / num_steps
    return x_t


def fastest(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Seconds of the fastest repetition of each, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
