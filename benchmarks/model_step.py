"""How much faster a training step is than the same numbers computed plainly; ratios of one run, on the CPU.

python benchmarks/model_step.py [--quick]

The last line is one JSON object. Times are the fastest of several alternating repetitions of forward,
backward, clipping and optimiser. Activation memory is what forward keeps for backward, without parameters.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from plain_model import PlainModel
from published_policy import build_inputs, build_policy
from torch import Tensor

from smolvla import SmolVLAPolicy
from smolvla.optimization import adamw, clip_gradients

Loss = Callable[[], Tensor]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions instead of five")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script itself")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch's default if absent")
    flags = parser.parse_args(arguments)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    policy = build_policy(num_cameras=flags.cameras, tiny=flags.tiny)
    results = measure(policy, batch=flags.batch, repetitions=2 if flags.quick else 5)
    print(f"{flags.batch} samples, {flags.cameras} cameras, float32, {torch.get_num_threads()} threads")
    print("no GPU measurement: this script runs on the CPU")
    for name, value in results.items():
        print(f"{name:28} {value:.3f}")
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


def measure(policy: SmolVLAPolicy, *, batch: int, repetitions: int) -> dict[str, float]:
    inputs, noise, times = build_inputs(policy, batch=batch)
    repeated = {"noise": noise.repeat_interleave(4, dim=0), "time": times.repeat_interleave(4, dim=0)}
    plain = PlainModel(policy)
    losses: dict[str, Loss] = {
        "ours": lambda: policy(**inputs, noise=noise, time=times)["loss"],
        "plain": lambda: plain.loss(inputs, noise, times),
        "ours_noise_4": lambda: policy(**inputs, **repeated, repeated_noise=4)["loss"],
    }
    torch.testing.assert_close(losses["ours"](), losses["plain"](), rtol=1e-4, atol=0)
    step = fastest(policy, losses, repetitions)
    kept = {name: activation_bytes(policy, losses[name]) for name in ("ours", "plain")}

    # The tower's output given, only what comes after it is left.
    with torch.no_grad():
        features = list(policy.model._embed_images(inputs["images"]))
    setattr(policy.model, "_embed_images", lambda _images: features)  # noqa: B010 -- of one object only
    after = fastest(policy, {name: losses[name] for name in ("ours", "plain")}, repetitions)
    return {
        "step_speedup": step["plain"] / step["ours"],
        "after_vision_speedup": after["plain"] / after["ours"],
        "activation_memory_ratio": kept["ours"] / kept["plain"],
        "repeated_noise_4_cost": step["ours_noise_4"] / step["ours"],
        "step_s": step["ours"],
        "plain_step_s": step["plain"],
        "after_vision_s": after["ours"],
        "plain_after_vision_s": after["plain"],
        "activation_mib": kept["ours"] / 2**20,
        "plain_activation_mib": kept["plain"] / 2**20,
    }


def fastest(policy: SmolVLAPolicy, losses: dict[str, Loss], repetitions: int) -> dict[str, float]:
    """Seconds of the fastest step of each, after one that is not counted."""
    optimizer = adamw(policy, policy.config, lr=0.0)  # all steps compute with the same weights
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repetitions + 1):
        for name, loss in losses.items():
            started = time.perf_counter()
            loss().backward()
            clip_gradients(policy.parameters(), policy.config.optimizer_grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


def activation_bytes(policy: SmolVLAPolicy, loss: Loss) -> int:
    """Bytes of the distinct storages, parameters aside, that forward keeps for backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()  # alive until its storages are counted
    total = sum(kept.values())
    del value
    return total


if __name__ == "__main__":
    main()
