"""What a training run computes, without what computes it: a driver reads this, too."""

from dataclasses import dataclass
from typing import Literal

from smolvla.lora import LoRA

Parallel = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run computes; together with the data, the policy and the seed it fixes every number."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples a step, over all workers."""
    micro_batch: int
    seed: int
    decay_steps: int | None
    """Steps of the cosine decay; None: those of the run. The other presets are in the policy's config."""
    precision: Literal["float32", "bfloat16"]
    """Of the computation; master weights are always float32."""
    log_every: int
    """Steps between two points of a curve; a point is the mean over them."""
    checkpoint_every: int
    """Steps."""
    record_rows: bool
    """Whether every worker writes the ids of the rows it trained on to <run>/rows/."""
    repeated_noise: int = 1
    """Draws of noise and time for each sample; they share the computation of its observation."""
    compile: bool = False
    """Whether the layers are compiled, which changes no number beyond rounding."""
    parallel: Parallel = "ddp"
    """Every worker holds the policy (ddp), a share of it (fsdp), or a share within its group (hsdp)."""
    shard_workers: int = 1
    """Workers of an hsdp group: those that share one copy."""
    activation_checkpointing: bool = False
    """Whether activations of the joint layers are computed again in the backward pass instead of kept."""
    grad_norm_limit: float = 1e4
    """A step with a larger gradient norm, or one that is not finite, is skipped."""
    max_skipped_in_a_row: int = 10
    """Skipped steps after which the run fails."""
    ema_decay: float | None = None
    """Of an average of the weights, which is saved and validated beside them; None: none is kept."""
    lora: LoRA | None = None
    """Adapters that train instead of the weights."""

    @property
    def micro_batches(self) -> int:
        """Of a step, over all workers."""
        return self.batch_size // self.micro_batch
