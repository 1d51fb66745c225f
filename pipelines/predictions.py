"""What the policy would do on some held-out frames, beside what was done there.

Shape letters: K frames, H chunk, D action width.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

STEPS_AHEAD = (1, 10)
"""Of the chunk, whose errors are curves, beside the mean over all."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Chunks of one dataset's frames, in its units."""

    dataset: NDArray[np.str_]
    """Its title."""
    names: NDArray[np.str_]
    """(D,) of the action's numbers."""
    episode: NDArray[np.int64]
    """(K,) episode_index."""
    frame: NDArray[np.int64]
    """(K,) frame_index, where the chunk begins."""
    predicted: NDArray[np.float32]
    """(K, H, D)."""
    true: NDArray[np.float32]
    """(K, H, D)."""
    valid: NDArray[np.bool_]
    """(K, H): False behind the end of the episode, and where the row could not be used."""

    def errors(self) -> NDArray[np.float64]:
        """(H, D) mean absolute error at each step of the chunk; NaN where no frame reaches that far."""
        return mean_over_frames(np.abs(self.predicted - self.true), self.valid)

    def errors_of_the_mean(self) -> NDArray[np.float64]:
        """(H, D) the same of an answer that is always the mean action of these frames."""
        mean = self.true[self.valid].mean(axis=0, dtype=np.float64)
        return mean_over_frames(np.abs(self.true - mean), self.valid)

    def to_bytes(self) -> bytes:
        """As an .npz file, an array a field."""
        stream = io.BytesIO()
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return cls(**{f.name: found[f.name] for f in fields(cls)})


def mean_over_frames(values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(H, D) of values (K, H, D) and (K, H)."""
    counts = valid.sum(axis=0)[:, None]
    total = np.where(valid[..., None], values, 0.0).sum(axis=0)
    return np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)


def error_curves(predicted: NDArray[Any], true: NDArray[Any], valid: NDArray[np.bool_]) -> dict[str, float]:
    """Mean absolute errors in normalised units, at a few steps of the chunk and over all of it."""
    errors = np.abs(predicted - true).mean(axis=2)
    ends: Sequence[tuple[str, slice]] = [
        *((str(ahead), slice(ahead - 1, ahead)) for ahead in STEPS_AHEAD if ahead <= valid.shape[1]),
        ("all", slice(None)),
    ]
    return {
        f"val/action_mae/{name}": float(errors[:, steps][valid[:, steps]].mean())
        for name, steps in ends
        if valid[:, steps].any()
    }
