"""The exponential moving average of the weights that train (EMA), sharded as they are, without a wait."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """After update n the average is d * average + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)).

    It begins as the weights of step 0. The smaller d of the first updates keeps these from weighing on it:
    with decay 0.999 it counts up to update 8,990, so a shorter run averages over about its last ninth.

    Args:
        policy: its trainable parameters are averaged, in float32, where they are.
        decay: in (0, 1).
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.weights: Mapping[str, Tensor] = {name: p.detach().clone() for name, p in self._trained.items()}
        """By parameter name; loading a checkpoint writes into them."""

    @torch.no_grad()
    def update(self, *, num_updates: Tensor, kept: Tensor) -> None:
        """Take in the weights after an optimiser step; both are read on the device.

        Args:
            num_updates: n, the optimiser's steps so far; skipped ones do not count.
            kept: False leaves the average as it is.
        """
        decay = ((1 + num_updates) / (10 + num_updates)).clamp(max=self.decay)
        share = (1 - decay).to(kept.device) * kept
        for name, parameter in self._trained.items():
            local(self.weights[name]).lerp_(local(parameter), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy has the averaged weights inside this context, and its own again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            own = local(parameter).clone()
            local(parameter).copy_(local(self.weights[name]))
            local(self.weights[name]).copy_(own)


def local(tensor: Tensor) -> Tensor:
    """This worker's share of a sharded tensor, or the tensor; both are the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
