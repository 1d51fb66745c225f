"""One optimiser step on any number of workers, replicated (DDP) or sharded (FSDP2, HSDP): the same numbers.

The mathematics does not know how many workers there are. The global batch is fixed in samples: a step is
batch_size / b micro-batches, dealt to any number of workers up to that many; noise and time of micro-batch m
come from a generator seeded by (seed, m); gradients are sums over valid action entries, divided once by the
global count of them.

A step whose loss or gradient is not finite, or whose gradient is absurd, changes nothing: the optimiser's
kernel skips it on the device, so no step waits for the host to look.

Shape letters: b micro-batch, W workers, m number of a micro-batch.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from pipelines.averaging import WeightAverage, local
from pipelines.plan import ADAPTERS, generator_seed, noise_seed
from pipelines.train_config import TrainConfig
from smolvla.data_utils import sample_noise, sample_time
from smolvla.features import ACTION
from smolvla.lora import add_adapters
from smolvla.optimization import adamw, clip_gradients, lr_factor

if TYPE_CHECKING:
    from smolvla.modeling import SmolVLAPolicy

LOG = logging.getLogger(__name__)

Draw = Callable[[int, tuple[int, ...]], tuple[Tensor, Tensor]]
KEPT_WORDS_BYTES = 64_000_000
"""Most that the embeddings of a run's words may take of each worker's memory: 16,000 words of the published
width, a third of its whole vocabulary."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, on the device."""

    loss: Tensor
    """Mean over the valid action entries of the global batch."""
    grad_norm: Tensor
    """Before clipping."""
    skipped: Tensor
    """Whether the step changed nothing."""
    lr: float


class Engine:
    """A policy and its optimiser on this worker; `torch.distributed` must be initialised.

    Args:
        policy: whole, on its device, the same on every worker; it gets adapters and is sharded in place if
            `train` says so.
        train: what is computed.
        draw: noise (R, H, A) and times (R,) for micro-batch m and that shape of noise; by default from a
            generator seeded by (seed, m).
        words: ids of all tokens that the policy will be given, each once, where they are known.
    """

    def __init__(
        self,
        policy: "SmolVLAPolicy",
        train: TrainConfig,
        *,
        draw: Draw | None = None,
        words: NDArray[np.int64] | None = None,
    ) -> None:
        self.policy, self.train, self.device = policy, train, policy.device
        self._draw = draw or self._seeded_draw
        self.num_workers = dist.get_world_size()
        self._most = -(-train.micro_batches // self.num_workers)  # micro-batches that a worker may have
        if train.lora:
            add_adapters(policy, train.lora, seed=generator_seed(ADAPTERS, train.seed))
        if train.activation_checkpointing:
            policy.gradient_checkpointing_enable()
        if self.sharded:
            self._shard(words)
        if train.compile:
            policy.compile_layers()
        # FSDP2 computes in bfloat16 by itself; here autocast does.
        self._autocast = not self.sharded and train.precision == "bfloat16"
        replicate = not self.sharded and self.num_workers > 1
        self._model = DistributedDataParallel(policy) if replicate else policy
        self.optimizer = adamw(policy, policy.config)
        self.average = WeightAverage(policy, train.ema_decay) if train.ema_decay else None

    @property
    def sharded(self) -> bool:
        """Whether the workers must run the policy together."""
        return self.train.parallel != "ddp"

    def _shard(self, words: NDArray[np.int64] | None) -> None:
        settings: dict[str, Any] = {}
        if self.train.precision == "bfloat16":
            settings["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        shape, names = (self.num_workers,), ("shard",)
        if self.train.parallel == "hsdp":
            groups = self.num_workers // self.train.shard_workers
            shape, names = (groups, self.train.shard_workers), ("replicate", "shard")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.policy.shard(mesh=mesh, words=self._kept(words), **settings)

    def _kept(self, words: NDArray[np.int64] | None) -> Tensor | None:
        """The words whose embeddings every worker keeps, so that no pass gathers the whole embedding.

        None where that embedding trains, or where so many are needed that keeping them is dearer.
        """
        embedding = self.policy.word_embedding
        if words is None or embedding.requires_grad:
            return None
        size = len(words) * embedding.shape[1] * embedding.element_size()
        if size > KEPT_WORDS_BYTES:
            LOG.warning(
                "%d different tokens in the tasks: their embeddings take %.0f MB, above %.0f MB, so every "
                "pass gathers the whole embedding",
                len(words),
                size / 1e6,
                KEPT_WORDS_BYTES / 1e6,
            )
            return None
        return torch.from_numpy(words).to(self.device)

    def step(
        self, step: int, micro_batches: Iterable[tuple[int, dict[str, Tensor]]], *, count: int
    ) -> StepResult:
        """Train on this worker's `count` micro-batches (m, columns) of optimiser step `step`.

        All workers together bring `TrainConfig.micro_batches`; at least one each, and one more or less.
        """
        assert 0 < count <= self._most, f"{count} micro-batches of step {step} for one worker"
        totals = torch.zeros(2, device=self.device)
        for i, (number, batch) in enumerate(self._in_step(micro_batches, count)):
            with self._gradients_synchronised(i, count):
                totals += self._backward(number, batch)
        dist.all_reduce(totals)
        return self._update(step, loss_sum=totals[0], num_valid=totals[1])

    def _in_step(
        self, micro_batches: Iterable[tuple[int, dict[str, Tensor]]], count: int
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The micro-batches; under FSDP2 with one that counts nothing where others have one more.

        Each pass through a sharded policy gathers its weights from everybody.
        """
        number, batch = 0, {}
        for number, batch in micro_batches:
            yield number, batch
        if self.sharded and count < self._most:
            padded = torch.ones(batch[ACTION].shape[:2], dtype=torch.bool, device=self.device)
            yield number, batch | {"action_is_pad": padded}

    @contextlib.contextmanager
    def _gradients_synchronised(self, i: int, count: int) -> Iterator[None]:
        """Around pass i of this worker: gradients go to the others with the last one."""
        if isinstance(self._model, DistributedDataParallel):
            with contextlib.nullcontext() if i == count - 1 else self._model.no_sync():
                yield
            return
        if self.sharded:
            last = i == self._most - 1
            self.policy.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue] - FSDP2's method
        yield

    def _backward(self, number: int, batch: dict[str, Tensor]) -> Tensor:
        """Add to the gradients; returns (loss sum, valid entries)."""
        train = self.train
        inputs = self.policy.prepare_inputs(batch)
        samples, *chunk = inputs["actions"].shape
        noise, times = self._draw(number, (samples * train.repeated_noise, *chunk))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            out = self._model(
                **inputs,
                noise=noise.to(self.device, non_blocking=True),
                time=times.to(self.device, non_blocking=True),
                repeated_noise=train.repeated_noise,
            )
        out["loss_sum"].backward()
        return torch.stack([out["loss_sum"].detach(), out["num_valid"].float()])

    def _seeded_draw(self, number: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """On the CPU: the same on any device."""
        generator = torch.Generator().manual_seed(noise_seed(self.train.seed, number))
        return sample_noise(shape, generator), sample_time(shape[0], generator)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The policy in eval mode."""
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train()

    @torch.no_grad()
    def row_losses(self, batch: Mapping[str, Tensor], *, noise: Tensor, time: Tensor, draws: int) -> Tensor:
        """Mean error (b,) of each row over its valid action entries and its draws; nothing is trained.

        Without DDP's wrapper, which is there for gradients; FSDP2 needs all of its workers.
        """
        inputs = self.policy.prepare_inputs(batch)
        noise, time = noise.to(self.device), time.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.policy(**inputs, noise=noise, time=time, repeated_noise=draws)[
                "per_sample_loss"
            ].cpu()

    @torch.no_grad()
    def predicted(self, batch: Mapping[str, Tensor], *, noise: Tensor) -> Tensor:
        """Normalised actions (b, H, D) for each row, on the CPU; FSDP2 needs all of its workers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.policy.predict_action_chunk(batch, noise).float().cpu()

    def _update(self, step: int, *, loss_sum: Tensor, num_valid: Tensor) -> StepResult:
        config, train = self.policy.config, self.train
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        # DDP and FSDP2 averaged over the workers what should be summed and divided by the global count.
        torch._foreach_mul_(gradients, self.num_workers / num_valid)  # pyright: ignore[reportCallIssue] - a tensor is taken
        grad_norm = clip_gradients(parameters, config.optimizer_grad_clip_norm)
        loss = loss_sum / num_valid
        good = torch.isfinite(loss) & (grad_norm <= train.grad_norm_limit)  # False where the norm is NaN
        lr = config.optimizer_lr * lr_factor(
            step - 1,
            warmup_steps=config.scheduler_warmup_steps,
            decay_steps=train.decay_steps,
            total_steps=train.steps,
            peak_lr=config.optimizer_lr,
            decay_lr=config.scheduler_decay_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What a gradient scaler would set: the fused kernel leaves weights, moments and count as they are.
        self.optimizer.found_inf = (~good).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        if self.average is not None:
            counts = next(iter(self.optimizer.state.values()))
            self.average.update(num_updates=counts["step"], kept=good)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, grad_norm=grad_norm, skipped=~good, lr=lr)
