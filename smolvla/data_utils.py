"""Pure steps between a dataset and the model: images, normalisation, task text, ALOHA joints, noise.

Shape letters: B batch, H chunk, A action width, T tasks, L tokens.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration import NORMALIZATION_MODES, Feature

Array = TypeVar("Array", np.ndarray, Tensor)

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


# ---- normalisation ----------------------------------------------------------------------------------------

# What an array is centred on and divided by, per mode: names of two statistics.
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
EPS = 1e-8


class Normalizer:
    """Normalises and un-normalises features by the statistics of a dataset, numpy arrays and tensors alike.

    MEAN_STD is (x - mean) / (std + 1e-8) and back x * std + mean, not quite inverse, as in LeRobot. The range
    modes map [low, high] to [-1, 1]; where high == low, the range counts as 1e-8.

    Args:
        stats: {feature: {statistic: value}} as in `meta/stats.json`.
        features: input and output features of a policy.
        mapping: normalisation mode of each feature type.

    Raises:
        ValueError: a feature needs a statistic that is missing or has another width.
    """

    def __init__(
        self, stats: Mapping[str, Any], features: Mapping[str, Feature], mapping: Mapping[str, str]
    ) -> None:
        self._modes: dict[str, str] = {}
        self._pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._tensors: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        for name, feature in features.items():
            mode = mapping.get(feature["type"])
            if mode not in NORMALIZATION_MODES:
                raise ValueError(
                    f"normalization_mapping[{feature['type']!r}] is {mode!r}, needed for {name!r}"
                )
            self._modes[name] = mode
            if mode != "IDENTITY":
                first, second = STATISTICS[mode]
                self._pairs[name] = (
                    statistic(stats, name, first, feature, mode),
                    statistic(stats, name, second, feature, mode),
                )

    def normalize(self, name: str, values: Array) -> Array:
        """Values (..., width) of feature `name` -> float32, normalised."""
        mode = self._mode(name)
        if mode == "IDENTITY":
            return values
        values, first, second = self._with_statistics(name, values)
        if mode == "MEAN_STD":
            return (values - first) / (second + EPS)
        return 2 * (values - first) / nonzero(second - first) - 1

    def unnormalize(self, name: str, values: Array) -> Array:
        """The way back, in the dataset's units."""
        mode = self._mode(name)
        if mode == "IDENTITY":
            return values
        values, first, second = self._with_statistics(name, values)
        if mode == "MEAN_STD":
            return values * second + first
        return (values + 1) / 2 * nonzero(second - first) + first

    def _mode(self, name: str) -> str:
        if name not in self._modes:
            raise ValueError(f"no feature {name!r} to normalise; there are {sorted(self._modes)}")
        return self._modes[name]

    def _with_statistics(self, name: str, values: Any) -> tuple[Any, Any, Any]:
        first, second = self._pairs[name]
        if isinstance(values, Tensor):
            key = (name, values.device)
            if key not in self._tensors:
                self._tensors[key] = (
                    torch.from_numpy(first).to(values.device),
                    torch.from_numpy(second).to(values.device),
                )
            return values.float(), *self._tensors[key]
        return np.asarray(values, dtype=np.float32), first, second


def statistic(stats: Mapping[str, Any], name: str, which: str, feature: Feature, mode: str) -> np.ndarray:
    """One statistic of one feature as float32, of the feature's width (a camera's has shape (3, 1, 1))."""
    if name not in stats or which not in stats[name]:
        known = sorted(stats[name]) if name in stats else sorted(stats)
        raise ValueError(f"{mode} needs the statistic {which!r} of {name!r}; the statistics have {known}")
    value = np.asarray(stats[name][which], dtype=np.float32)
    width = feature["shape"][0]
    if value.size != width:
        raise ValueError(
            f"the statistic {which!r} of {name!r} has {value.size} numbers; the feature has {width}"
        )
    return value.reshape(width, 1, 1) if feature["type"] == "VISUAL" else value.reshape(width)


def nonzero(span: Any) -> Any:
    return span + (span == 0) * EPS


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
