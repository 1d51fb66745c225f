"""Pure steps between a dataset and the model: images, task text, ALOHA joints, noise.

Shape letters: B batch, H chunk, A action width, T tasks, L tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- images -----------------------------------------------------------------------------------------------


def fitted_size(height: int, width: int, box: Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels after fitting an image inside `box` = (width, height), keeping its ratio.

    Both sides are truncated, as in LeRobot; a whole pixel of a very thin image is kept.
    """
    box_width, box_height = box
    ratio = max(width / box_width, height / box_height)
    return max(1, int(height / ratio)), max(1, int(width / ratio))


def resize_with_pad(images: Tensor, box: Sequence[int]) -> Tensor:
    """Fit float images (B, 3, h, w) inside `box` = (width, height) and fill with 0 on the left and on top."""
    box_width, box_height = box
    height, width = images.shape[-2:]
    if (height, width) == (box_height, box_width):
        return images
    size = fitted_size(height, width, box)
    if size != (height, width):
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return F.pad(images, (box_width - size[1], 0, box_height - size[0], 0))


# ---- task text --------------------------------------------------------------------------------------------


def tokenize_tasks(
    tasks: Sequence[str], tokenizer: str | Path | Any, *, max_length: int, padding: str = "longest"
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 (T, L) and mask bool (T, L) of instructions.

    A newline ends every instruction (added when missing), padding is on the right, and what is longer than
    `max_length` is cut on the side that the tokenizer's own configuration says. `tokenizer` is a folder, a
    hub id, or a loaded tokenizer; `padding` is to the "longest" of these tasks or to "max_length".
    """
    if padding not in ("longest", "max_length"):
        raise ValueError(f"padding is {padding!r}; it must be 'longest' or 'max_length'")
    callable_tokenizer: Any = tokenizer
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer  # processes that only decode do without its import

        callable_tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    encoded = callable_tokenizer(
        [task if task.endswith("\n") else f"{task}\n" for task in tasks],
        padding=padding,
        padding_side="right",
        truncation=True,
        max_length=max_length,
        return_tensors="np",
    )
    return encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(bool)


# ---- ALOHA joints -----------------------------------------------------------------------------------------

# ALOHA's 14 joints against the space that pi0's base weights were trained in: openpi's constants.
FLIPPED_JOINTS = [1, 2, 8, 9]
GRIPPERS = [6, 13]
GRIPPER_POSITION_M = (0.01844, 0.05800)
GRIPPER_ANGLE_RAD = (0.4, 1.5)
GRIPPER_COMMAND_RAD = (-0.6213, 1.4910)
GRIPPER_ARM_M = 0.036
GRIPPER_HORN_M = 0.022


def decode_aloha_state(state: Tensor) -> Tensor:
    """Robot state (..., 14) -> the model's space; the argument stays as it is."""
    state = flip_joints(state)
    position = from_unit(state[..., GRIPPERS], GRIPPER_POSITION_M)
    sine = (GRIPPER_HORN_M**2 + position**2 - GRIPPER_ARM_M**2) / (2 * GRIPPER_HORN_M * position)
    state[..., GRIPPERS] = to_unit(torch.arcsin(sine.clamp(-1, 1)), GRIPPER_ANGLE_RAD)
    return state


def encode_aloha_actions(actions: Tensor) -> Tensor:
    """The model's actions (..., 14) -> the robot's space; the argument stays as it is."""
    actions = flip_joints(actions)
    actions[..., GRIPPERS] = to_unit(
        from_unit(actions[..., GRIPPERS], GRIPPER_ANGLE_RAD), GRIPPER_COMMAND_RAD
    )
    return actions


def decode_aloha_actions(actions: Tensor) -> Tensor:
    """Recorded actions (..., 14) -> the model's space, the inverse of `encode_aloha_actions`."""
    actions = flip_joints(actions)
    actions[..., GRIPPERS] = to_unit(
        from_unit(actions[..., GRIPPERS], GRIPPER_COMMAND_RAD), GRIPPER_ANGLE_RAD
    )
    return actions


def flip_joints(values: Tensor) -> Tensor:
    values = values.clone()
    values[..., FLIPPED_JOINTS] *= -1
    return values


def to_unit(values: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return (values - low) / (high - low)


def from_unit(values: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return values * (high - low) + low


# ---- noise and time ---------------------------------------------------------------------------------------


def sample_noise(
    shape: Sequence[int], generator: torch.Generator | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Standard normal float32 noise; drawn where the generator lives, then moved to `device`."""
    origin = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=origin).to(device or origin)


def sample_time(
    batch_size: int, generator: torch.Generator | None = None, *, device: torch.device | None = None
) -> Tensor:
    """Times (B,) in [0.001, 1]: 0.001 + 0.999 * Beta(1.5, 1).

    By the inverse of its distribution, u ** (1 / 1.5): torch.distributions.Beta takes no generator, and a run
    must repeat from one seed.
    """
    origin = generator.device if generator is not None else device
    uniform = torch.rand(batch_size, generator=generator, device=origin).to(device or origin)
    return 0.999 * uniform ** (1 / 1.5) + 0.001


def sinusoidal_time(time: Tensor, width: int, *, min_period: float, max_period: float) -> Tensor:
    """Time (B,) -> float32 (B, width): sines then cosines of 2 pi t / period, periods spaced geometrically.

    Computed in float64, because at the shortest period, 4e-3, float32 phases lose three digits.
    """
    precision = torch.float32 if time.device.type == "mps" else torch.float64  # MPS has no float64
    steps = torch.linspace(0, 1, width // 2, dtype=precision, device=time.device)
    period = min_period * (max_period / min_period) ** steps
    phase = time[:, None].to(precision) * (2 * math.pi / period)
    return torch.cat((phase.sin(), phase.cos()), dim=1).float()
