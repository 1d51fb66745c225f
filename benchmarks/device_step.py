"""A training step and a chunk on one device, compiled and not: rate, memory, and what of the chip is used.

python benchmarks/device_step.py [--device cuda] [--quick]

bfloat16 computation over float32 weights, AdamW and clipping included. The matrix rate is measured beside, by
multiplying large bfloat16 matrices on the same device. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from published_policy import build_inputs, build_policy
from torch.utils.flop_counter import FlopCounterMode

from smolvla import SmolVLAPolicy
from smolvla.optimization import adamw, clip_gradients


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three repetitions instead of ten")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script itself")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    flags = parser.parse_args(arguments)
    device, repetitions = torch.device(flags.device), 3 if flags.quick else 10
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    figures: dict[str, Any] = {"device": name, "batch": flags.batch}
    figures["matrix_tflops"] = matrix_rate(device, size=512 if flags.tiny else 8192) / 1e12
    policy = build_policy(num_cameras=flags.cameras, tiny=flags.tiny).to(device)
    figures |= training(policy, batch=flags.batch, repetitions=repetitions, backend=flags.backend)
    figures["matrix_share"] = figures["compiled_tflops"] / figures["matrix_tflops"]
    policy = build_policy(num_cameras=flags.cameras, tiny=flags.tiny).to(device).eval()
    figures |= sampling(policy, repetitions=repetitions, backend=flags.backend)
    for key, value in figures.items():
        print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}")
    print(json.dumps(figures))


def training(policy: SmolVLAPolicy, *, batch: int, repetitions: int, backend: str) -> dict[str, float]:
    """Samples per second and FLOP rate of whole steps, the tower's share, and the peak memory."""
    device = policy.device
    inputs, noise, times = build_inputs(policy, batch=batch)
    noise, times = noise.to(device), times.to(device)
    optimizer = adamw(policy, policy.config)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = policy(**inputs, noise=noise, time=times)["loss"]
        loss.backward()
        clip_gradients(policy.parameters(), policy.config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def tower() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            policy.model._embed_images(inputs["images"])

    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    eager, vision = fastest(step, device, repetitions), fastest(tower, device, repetitions)
    figures = {"samples_per_s": batch / eager, "tflops": flops / eager / 1e12, "vision_share": vision / eager}
    if device.type == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    policy.compile_layers(backend=backend)
    compiled = fastest(step, device, repetitions)
    return figures | {
        "compiled_samples_per_s": batch / compiled,
        "compiled_tflops": flops / compiled / 1e12,
        "compile_speedup": eager / compiled,
    }


@torch.no_grad()
def sampling(policy: SmolVLAPolicy, *, repetitions: int, backend: str) -> dict[str, float]:
    """Latency of a chunk for one observation."""
    device = policy.device
    inputs, noise, _ = build_inputs(policy, batch=1)
    noise = noise.to(device)
    observed = {name: value for name, value in inputs.items() if name not in ("actions", "is_pad")}

    def chunk() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            policy.model.sample_actions(**observed, noise=noise)

    eager = fastest(chunk, device, repetitions)
    if backend == "inductor":
        policy.compile_sampling("max-autotune" if device.type == "cuda" else "default")
    compiled = fastest(chunk, device, repetitions)
    return {
        "chunk_latency_s": eager,
        "compiled_chunk_latency_s": compiled,
        "chunk_compile_speedup": eager / compiled,
    }


def matrix_rate(device: torch.device, *, size: int) -> float:
    """FLOP per second of multiplying square bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, device, 10 if device.type == "cuda" else 1)


def fastest(run: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Seconds of the fastest repetition, after two that are not counted."""
    seconds = []
    for _ in range(repetitions + 2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


if __name__ == "__main__":
    main()
