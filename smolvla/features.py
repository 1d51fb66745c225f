"""What a policy takes and gives: the names of features, and their normalisation.

Without torch and transformers, for processes that only prepare data.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Array = TypeVar("Array", np.ndarray, Tensor)

Feature: TypeAlias = dict[str, Any]
"""One entry of `input_features` or `output_features`: {"type": "VISUAL", "shape": [3, 480, 640]}."""

STATE = "observation.state"
ACTION = "action"
CAMERA_PREFIX = (
    "observation.image"  # `observation.images.<camera>`; older checkpoints say `observation.image2`
)
EMPTY_CAMERA = "observation.images.empty_camera_{}"
FEATURE_TYPES = ("VISUAL", "STATE", "ACTION", "ENV", "LANGUAGE", "REWARD")
NORMALIZATION_MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
PADDING_MASK = "{}_padding_mask"
IMAGE_FEATURES = "{}_features"
"""What stands in a batch for a camera's images: their tokens, computed before (see image_features.py)."""
FeatureDtype = Literal["float32", "bfloat16", "int8"]
SCALE_BYTES = 4  # behind the int8 levels of a token

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

    def normalize(self, name: str, values: "Array") -> "Array":
        """Values (..., width) of feature `name` -> float32, normalised."""
        mode = self._mode(name)
        if mode == "IDENTITY":
            return values
        values, first, second = self._with_statistics(name, values)
        if mode == "MEAN_STD":
            return (values - first) / (second + EPS)
        return 2 * (values - first) / nonzero(second - first) - 1

    def unnormalize(self, name: str, values: "Array") -> "Array":
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
        if isinstance(values, np.ndarray):
            return np.asarray(values, dtype=np.float32), first, second
        values, key = values.float(), (name, values.device)
        if key not in self._tensors:
            self._tensors[key] = values.new_tensor(first), values.new_tensor(second)
        return values, *self._tensors[key]


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
