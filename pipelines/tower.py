"""The frozen vision tower in a Ray actor: images in, packed features out.

Importing this needs no torch, and building an actor's arguments needs no model.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.run_storage import START, RunStorage
from pipelines.samples import STAGE_SECONDS
from smolvla.features import IMAGE_FEATURES, FeatureDtype

if TYPE_CHECKING:
    from smolvla.configuration import SmolVLAConfig

Embed = Callable[[NDArray[np.uint8]], NDArray[Any]]
Precision = Literal["float32", "bfloat16"]


def embedder(
    policy_path: str | Path,
    config: "SmolVLAConfig",
    *,
    dtype: FeatureDtype,
    precision: Precision,
    use_gpu: bool,
) -> Embed:
    """A function of images (n, h, w, 3) that gives their packed features (n, tokens, entries)."""
    import torch

    from smolvla.image_features import packed
    from smolvla.modeling import SmolVLAPolicy

    device = "cuda" if use_gpu else "cpu"
    policy = SmolVLAPolicy.tower_from_pretrained(policy_path, config, device=device)

    def embed(images: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.tensor(images, device=device).movedim(-1, -3)
        reduced = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
        with torch.inference_mode(), reduced:
            return packed(policy.image_features("images", pixels), dtype).cpu().numpy()

    return embed


@dataclass(frozen=True, kw_only=True)
class StreamedTower:
    """Actors of the stream that run the tower while the workers train."""

    storage: RunStorage
    """Of the run, whose first policy has the weights."""
    dtype: FeatureDtype
    """Of what goes to the workers."""
    precision: Precision
    actors: int
    cpus: float
    """Of an actor."""
    gpus: float


class BlockEmbedder:
    """Replaces the images of a block of micro-batches by their features; what a Ray actor holds.

    Args:
        tower: where the weights are, and what is computed.
        cameras: whose images they are.
        batch_size: images that go through the tower at once.
    """

    def __init__(self, tower: StreamedTower, cameras: list[str], batch_size: int) -> None:
        from smolvla.configuration import SmolVLAConfig

        folder = tower.storage.fetched(START)
        config = SmolVLAConfig.from_pretrained(folder)
        self._cameras, self._size = cameras, batch_size
        self._embed = embedder(
            folder, config, dtype=tower.dtype, precision=tower.precision, use_gpu=tower.gpus > 0
        )

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A block is one row: images (1, rows, [moments,] h, w, 3)."""
        if self._cameras[0] not in block:  # one of the empty blocks that start the processes
            return block
        started = time.perf_counter()
        out = {name: values for name, values in block.items() if name not in self._cameras}
        for camera in self._cameras:
            images = block[camera][0]
            images = images[:, -1] if images.ndim == 5 else images
            parts = range(0, len(images), self._size)
            features = np.concatenate([self._embed(images[i : i + self._size]) for i in parts])
            out[IMAGE_FEATURES.format(camera)] = features[None]
        seconds = out[STAGE_SECONDS] = block[STAGE_SECONDS].copy()
        seconds[..., 2] = (time.perf_counter() - started) / seconds.shape[1]
        return out
