"""What stored features change of a policy's loss and actions, measured on a few frames of their dataset."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from pipelines.inspection import spread
from pipelines.plan import Rows
from pipelines.samples import SampleReader
from pipelines.tensors import ToTorch
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import sample_noise, sample_time
from smolvla.modeling import SmolVLAPolicy

FRAMES = 16
SEED = 0


@dataclass(frozen=True, kw_only=True)
class FeatureError:
    """From features against from images, with the same noise and times, in float32."""

    frames: int
    loss: float
    """Mean over the frames, from images."""
    loss_error: float
    """Of the mean, relative."""
    frame_loss_error: float
    """Largest of one frame, relative."""
    action_error: float
    """Mean absolute difference of predicted actions, in normalised units."""
    largest_action_error: float

    def __str__(self) -> str:
        return (
            f"on {self.frames} frames the loss {self.loss:.4g} changes by {self.loss_error:.1e}, that of one "
            f"frame by up to {self.frame_loss_error:.1e}; predicted actions by {self.action_error:.1e}, at "
            f"most {self.largest_action_error:.1e} (normalised)"
        )


def measured(
    reader: SampleReader, policy_path: str, config: SmolVLAConfig, *, device: str
) -> dict[str, float]:
    """A `FeatureError` as a dictionary.

    Args:
        reader: of one dataset, with its features.
        policy_path: the whole policy.
        config: fitted to the dataset.
        device: where it is computed.
    """
    policy = SmolVLAPolicy.from_pretrained(policy_path, config).to(device).eval()
    (from_images, acted), (from_features, acted_too) = (
        _answers(policy, one) for one in (reader.from_images, reader)
    )
    difference = (acted_too - acted).abs()
    error = FeatureError(
        frames=len(from_images),
        loss=from_images.mean().item(),
        loss_error=abs(from_features.mean().item() / from_images.mean().item() - 1),
        frame_loss_error=(from_features / from_images - 1).abs().max().item(),
        action_error=difference.mean().item(),
        largest_action_error=difference.max().item(),
    )
    return asdict(error)


@torch.no_grad()
def _answers(policy: SmolVLAPolicy, reader: SampleReader) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (frames,) and chunks of evenly spaced frames, one at a time."""
    sizes = reader.sources[0].dataset.row_groups.rows
    ends = np.cumsum(sizes)
    losses, chunks = [], []
    for place in spread(int(ends[-1]), at_most=FRAMES):
        unit = np.searchsorted(ends, [place], side="right")
        zero = np.zeros(1, dtype=np.int64)
        rows = Rows(zero, zero, unit, place - (ends - sizes)[unit])
        batch = ToTorch()(reader.decoded(reader.encoded_rows(rows)))
        if bool(batch["action_is_pad"].all()):  # an image that cannot be used
            continue
        generator = torch.Generator().manual_seed(SEED + place)
        shape = (1, policy.config.chunk_size, policy.config.max_action_dim)
        noise, time = sample_noise(shape, generator), sample_time(1, generator)
        inputs = policy.prepare_inputs(batch)
        drawn = {"noise": noise.to(policy.device), "time": time.to(policy.device)}
        losses.append(policy(**inputs, **drawn)["loss"].cpu())
        chunks.append(policy.predict_action_chunk(batch, noise).cpu())
    return torch.stack(losses), torch.cat(chunks)
