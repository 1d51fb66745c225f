"""Augmentation of images on the stream: a pure function of (seed, micro-batch, row, camera).

What happens to an image does not depend on the number of workers, on what ran before, or on torch's own
random state; a run that goes on from a checkpoint sees the same pictures. Every effect has draws of its own,
so switching one on leaves the others as they were.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.images import decoded_image, encoded_image
from pipelines.plan import AUGMENTATION

if TYPE_CHECKING:  # only runs that augment wait for the import of torch and torchvision
    from torch import Tensor

Image = NDArray[np.uint8]
NUM_DRAWS = 16  # 13 are used; a new effect takes the next ones
PROBABILITIES = ("crop_probability", "color_probability", "blur_probability", "jpeg_probability")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What happens to the images of training, in this order; with probabilities of 0 nothing does."""

    crop_probability: float = 0.0
    crop_min_side: float = 0.9
    """A crop keeps this share of both sides or more, lies anywhere, and is enlarged to the image's size."""
    color_probability: float = 0.0
    brightness: float = 0.2
    """Factor drawn from [1 - this, 1 + this]; so are those of contrast and saturation."""
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0
    """Shift of the hue drawn from [-this, this], as a share of its circle; up to 0.5. It takes longer
    than all the others together."""
    blur_probability: float = 0.0
    blur_max_sigma_px: float = 1.5
    """Width of the Gaussian, drawn from 0.1 to this, in pixels as the stream hands images on."""
    jpeg_probability: float = 0.0
    jpeg_min_quality: int = 50
    """Quality drawn from this to 100."""

    def __post_init__(self) -> None:
        for name in PROBABILITIES:
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            self._check(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._check("hue", 0 <= self.hue <= 0.5, "from 0 to 0.5")
        self._check("crop_min_side", 0 < self.crop_min_side <= 1, "above 0, up to 1")
        self._check("blur_max_sigma_px", 0.1 <= self.blur_max_sigma_px < math.inf, "0.1 or more")
        self._check("jpeg_min_quality", 1 <= self.jpeg_min_quality <= 100, "from 1 to 100")

    def _check(self, name: str, holds: bool, wanted: str) -> None:  # noqa: FBT001 -- reads as a sentence
        if not holds:
            raise ValueError(f"augmentation.{name} {getattr(self, name)} is not {wanted}")

    @property
    def is_on(self) -> bool:
        """Whether anything can happen."""
        return any(getattr(self, name) > 0 for name in PROBABILITIES)


def draws(seed: int, *, micro_batch: int, row: int, camera: int) -> NDArray[np.float64]:
    """The random numbers in [0, 1) of one camera of one row, the same on every machine and NumPy version."""
    words = np.random.SeedSequence((AUGMENTATION, seed, micro_batch, row, camera))
    return (np.random.PCG64(words).random_raw(NUM_DRAWS) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmented(image: Image, config: AugmentationConfig, u: NDArray[np.float64]) -> Image:
    """An image (h, w, 3) with the effects that its draws `u` choose; the argument stays as it is."""
    effects: list[Callable[[Tensor], Tensor]] = []
    if u[0] < config.crop_probability:
        effects.append(lambda pixels: _cropped(pixels, config, *u[1:4]))
    if u[4] < config.color_probability:
        effects.append(lambda pixels: _colored(pixels, config, *u[5:9]))
    if u[9] < config.blur_probability:
        effects.append(lambda pixels: _blurred(pixels, config, u[10]))
    if effects:
        pixels = _torch().from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        for effect in effects:
            pixels = effect(pixels)
        image = pixels.permute(1, 2, 0).numpy()
    return _compressed(image, config, u[12]) if u[11] < config.jpeg_probability else image


def _torch() -> Any:
    """Import it; Ray gives the task to another process where that cannot be done any more."""
    try:
        import torch
    except ImportError as error:
        if "once per process" not in str(error):
            raise
        # Ray cancelled a task of an earlier dataset in the middle of this import.
        os._exit(1)
    return torch


def _transforms() -> Any:
    import torchvision.transforms.v2.functional as functional

    return functional


def _cropped(
    pixels: "Tensor", config: AugmentationConfig, side: float, down: float, right: float
) -> "Tensor":
    """One share for both sides, so that the ratio stays."""
    height, width = pixels.shape[-2:]
    share = config.crop_min_side + side * (1 - config.crop_min_side)
    kept = max(1, round(share * height)), max(1, round(share * width))
    top, left = int(down * (height - kept[0] + 1)), int(right * (width - kept[1] + 1))
    return _transforms().resized_crop(pixels, top, left, *kept, size=[height, width], antialias=True)


def _colored(
    pixels: "Tensor",
    config: AugmentationConfig,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> "Tensor":
    """Always in this order; a strength of 0 is left out, as its arithmetic would round."""
    if config.brightness:
        pixels = _transforms().adjust_brightness(pixels, _factor(config.brightness, brightness))
    if config.contrast:
        pixels = _transforms().adjust_contrast(pixels, _factor(config.contrast, contrast))
    if config.saturation:
        pixels = _transforms().adjust_saturation(pixels, _factor(config.saturation, saturation))
    if config.hue:
        pixels = _transforms().adjust_hue(pixels, config.hue * (2 * hue - 1))
    return pixels


def _factor(strength: float, u: float) -> float:
    return 1 + strength * (2 * u - 1)


def _compressed(image: Image, config: AugmentationConfig, u: float) -> Image:
    """By OpenCV: torchvision's codec is deprecated since 0.29."""
    quality = config.jpeg_min_quality + int(u * (101 - config.jpeg_min_quality))
    data = encoded_image(np.ascontiguousarray(image), image_format="jpeg", jpeg_quality=quality)
    decoded = decoded_image(data)
    assert decoded is not None
    return decoded


def _blurred(pixels: "Tensor", config: AugmentationConfig, u: float) -> "Tensor":
    sigma = 0.1 + u * (config.blur_max_sigma_px - 0.1)
    reach = min(math.ceil(3 * sigma), min(pixels.shape[-2:]) - 1)  # what is reflected at the border is there
    return _transforms().gaussian_blur(pixels, [2 * reach + 1] * 2, [sigma, sigma])
