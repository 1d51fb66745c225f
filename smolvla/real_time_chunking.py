"""Real-time chunking: a new chunk continues what the robot still executes of the one before.

Black et al. 2025, arXiv 2506.07339: sampling is guided towards the left-over of the previous chunk, as in
inpainting. Their time runs from 0 (noise) to 1 (actions); here it is the flow's, from 1 to 0.

Shape letters: B batch, H chunk, A padded action width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SCHEDULES = ("ZEROS", "ONES", "LINEAR", "EXP")
# LeRobot's RTCConfig: its defaults, and switches that change no number here.
DEFAULTS = {"prefix_attention_schedule": "LINEAR", "max_guidance_weight": 10.0, "execution_horizon": 10}
IGNORED = ("enabled", "debug", "debug_maxlen")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Pulls a chunk towards the left-over of the previous one."""

    left_over: Tensor
    """Unexecuted normalised actions (B, up to H, up to A) of the previous chunk, the next one first; zeros
    behind those of a row that has fewer."""
    inference_delay: Tensor
    """Steps (B,) that will have been executed when the new chunk is there: they are held fast."""
    execution_horizon: Tensor
    """Steps (B,) from which on the new chunk is free."""
    schedule: str
    """How the pull falls off between the two: one of ZEROS, ONES, LINEAR, EXP."""
    max_guidance_weight: float

    @classmethod
    def of(
        cls,
        left_over: Tensor | Sequence[Tensor],
        settings: Mapping[str, Any] | None,
        *,
        inference_delay: int | Sequence[int],
        execution_horizon: int | Sequence[int | None] | None = None,
    ) -> "Guidance":
        """Guidance by a configuration's `rtc_config`; a horizon given here replaces its own.

        Robots that are answered together each have their own: B left-overs (steps, width), delays, horizons.

        Raises:
            ValueError: names the setting and its value.
        """
        values = DEFAULTS | {k: v for k, v in (settings or {}).items() if k not in IGNORED}
        if set(values) != set(DEFAULTS):
            raise ValueError(f"rtc_config has unknown fields {sorted(set(values) - set(DEFAULTS))}")
        rows = list(left_over)
        if not rows or any(row.ndim != 2 for row in rows):
            shape = (
                tuple(left_over.shape) if isinstance(left_over, Tensor) else [tuple(r.shape) for r in rows]
            )
            raise ValueError(f"the left-over has shape {shape}; it must be (B, steps, width)")
        delays = _of_rows("inference_delay", inference_delay, len(rows))
        horizons = [
            values["execution_horizon"] if horizon is None else horizon
            for horizon in _of_rows("execution_horizon", execution_horizon, len(rows))
        ]
        schedule = str(values["prefix_attention_schedule"]).upper()
        if schedule not in SCHEDULES:
            raise ValueError(f"prefix_attention_schedule is {schedule!r}; it must be one of {SCHEDULES}")
        if not values["max_guidance_weight"] > 0:
            raise ValueError(f"max_guidance_weight is {values['max_guidance_weight']}; it must be positive")
        for delay, horizon in zip(delays, horizons, strict=True):
            if delay < 0 or horizon < 0:
                raise ValueError(f"inference_delay {delay} and execution_horizon {horizon} must be 0 or more")
        known = [min(horizon, len(row)) for horizon, row in zip(horizons, rows, strict=True)]
        return cls(
            left_over=pad_sequence(rows, batch_first=True),
            inference_delay=torch.tensor(delays),
            execution_horizon=torch.tensor(known),  # nothing is known after a left-over
            schedule=schedule,
            max_guidance_weight=values["max_guidance_weight"],
        )

    def velocity(self, denoise: Callable[[Tensor], Tensor], x_t: Tensor, time: float) -> Tensor:
        """The velocity (B, H, A) at `time`, bent so that the predicted actions approach the left-over.

        The correction is the gradient of the weighted squared error through the denoiser, as published.
        (LeRobot leaves the denoiser's Jacobian out and so corrects by the error itself.)
        """
        steps, width = x_t.shape[1:]
        missing = (0, width - self.left_over.shape[2], 0, steps - self.left_over.shape[1])
        if min(missing) < 0 or len(self.left_over) != len(x_t):
            raise ValueError(
                f"the left-over has shape {tuple(self.left_over.shape)}, the chunk {tuple(x_t.shape)}"
            )
        target = F.pad(self.left_over.to(x_t), missing)
        weights = prefix_weights(
            self.schedule,
            start=self.inference_delay[:, None],
            end=self.execution_horizon[:, None],
            total=steps,
        )
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            v_t = denoise(x_t)
            actions = x_t - time * v_t
            error = (target - actions).detach() * weights.to(x_t)[..., None]
            (correction,) = torch.autograd.grad(actions, x_t, error)
        return v_t.detach() - guidance_weight(time, self.max_guidance_weight) * correction


def _of_rows(name: str, given: Any, rows: int) -> list[Any]:
    """One value for each row; a single one is everybody's."""
    values = list(given) if isinstance(given, Sequence) else [given] * rows
    if len(values) != rows:
        raise ValueError(f"{name} has {len(values)} values; the left-over has {rows} rows")
    return values


def prefix_weights(schedule: str, *, start: int | Tensor, end: int | Tensor, total: int) -> Tensor:
    """Pull (..., total) on every step: 1 before `start`, falling towards `end`, 0 from there on.

    `start` and `end` are numbers, or (..., 1) for many left-overs.
    """
    end = torch.as_tensor(end)
    start = torch.minimum(torch.as_tensor(start), end)
    steps = torch.arange(total, dtype=torch.float32)
    if schedule == "ZEROS":
        return (steps < start).float()
    if schedule == "ONES":
        return (steps < end).float()
    weights = ((end - steps) / (end - start + 1)).clamp(0, 1)
    if schedule == "EXP":
        weights = weights * torch.expm1(weights) / (math.e - 1)
    return torch.where(steps < start, 1.0, weights)


def guidance_weight(time: float, maximum: float) -> float:
    """Strength of the correction: ((1-t)^2 + t^2) / (t (1-t)), at most `maximum`."""
    product = time * (1 - time)
    return min(maximum, ((1 - time) ** 2 + time**2) / product) if product > 0 else maximum
