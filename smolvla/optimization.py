"""SmolVLA's optimiser and learning-rate schedule: the presets of its configuration."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .configuration import SmolVLAConfig

FUSED_DEVICES = ("cpu", "cuda")
MAX_WARMUP_SHARE = 10
"""Where the decay follows the run, the warm-up takes at most a tenth of it: the preset's 1,000 steps would
otherwise be all of a short run."""


def optimizer_groups(policy: nn.Module) -> list[dict[str, Any]]:
    """One group of the trainable parameters, in the order of `named_parameters`."""
    return [{"params": [parameter for parameter in policy.parameters() if parameter.requires_grad]}]


def adamw(policy: nn.Module, config: SmolVLAConfig, *, lr: float | None = None) -> torch.optim.AdamW:
    """AdamW over the trainable parameters as the configuration says; `lr` is the peak, instead of its own.

    One kernel for the whole update where torch has it: on a CPU a step over 100M parameters takes a third of
    the time (benchmarks/model_step.py).
    """
    groups = optimizer_groups(policy)
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer_lr if lr is None else lr,
        betas=(config.optimizer_betas[0], config.optimizer_betas[1]),
        eps=config.optimizer_eps,
        weight_decay=config.optimizer_weight_decay,
        fused=all(parameter.device.type in FUSED_DEVICES for parameter in groups[0]["params"]),
    )


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place to a total norm of at most `max_norm`; returns the norm before.

    Of parameters that FSDP2 has sharded it is the norm over all shards; then every rank must call it.
    """
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, norm)
    return norm


def lr_factor(
    step: int,
    *,
    warmup_steps: int,
    decay_steps: int | None,
    total_steps: int,
    peak_lr: float,
    decay_lr: float,
) -> float:
    """Factor on the peak learning rate at optimiser step `step` (the first step is 0).

    Linear warm-up from 1 / (warmup_steps + 1), then a cosine of the absolute step down to decay_lr / peak_lr
    at `decay_steps`; a run shorter than that shrinks both by total_steps / decay_steps. With decay_steps None
    the cosine ends with the run. With a number, a longer run ends on a flat tail at `decay_lr`, which is
    LeRobot's trap for runs beyond the preset's 30,000 steps.
    """
    if decay_steps is None:
        decay_steps, warmup_steps = total_steps, min(warmup_steps, total_steps // MAX_WARMUP_SHARE)
    elif total_steps < decay_steps:
        decay_steps, warmup_steps = total_steps, int(warmup_steps * total_steps / decay_steps)
    if step < warmup_steps:
        return (1 / (warmup_steps + 1) - 1) * (1 - step / warmup_steps) + 1
    floor = decay_lr / peak_lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step, decay_steps) / decay_steps))
