"""Exact statistics of a dataset, computed in pieces that can be merged in any grouping.

`D` width of a vector, `N` rows. Means and variances are float64 and merged pairwise (Chan, Golub and LeVeque
1979), so they agree with numpy on the concatenation to the last few bits; counts, minima, maxima and pixel
histograms merge without any rounding. Standard deviations are population ones, as LeRobot's.

Quantiles are exact and interpolated like `numpy.quantile`. A camera's follow from its 256-level histogram. A
vector's need its values: `quantiles` takes one column of the whole dataset at a time, which bounds the memory
at N * D * 12 bytes (the float32 values and one float64 copy): 1.7 GB for 10 million frames of a 14-wide
action.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import cv2
import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
"""LeRobot's names."""

Stats = dict[str, np.ndarray]
"""min, max, mean, std, q01 ... q99 float64 (D,) or (3, 1, 1) for a camera, and count int64 (1,)."""


@dataclass(frozen=True)
class Moments:
    """Count, extremes, mean and summed squared deviation of a column, each (D,) float64."""

    count: int
    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / self.count)


def moments(values: np.ndarray) -> Moments:
    """Return the moments of rows (N, D), N at least 1."""
    rows = values.astype(np.float64)
    mean = rows.mean(axis=0)
    return Moments(len(rows), rows.min(axis=0), rows.max(axis=0), mean, ((rows - mean) ** 2).sum(axis=0))


def merged(a: Moments, b: Moments) -> Moments:
    """Return the moments of the rows of both."""
    count = a.count + b.count
    delta = b.mean - a.mean
    return Moments(
        count,
        np.minimum(a.min, b.min),
        np.maximum(a.max, b.max),
        a.mean + delta * (b.count / count),
        a.m2 + b.m2 + delta**2 * (a.count * b.count / count),
    )


def merged_all(parts: Sequence[Moments]) -> Moments:
    """Merge neighbours until one is left, so that rounding grows with the logarithm of their number."""
    level = list(parts)
    while len(level) > 1:
        level = [reduce(merged, level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def quantiles(values: np.ndarray) -> Stats:
    """Return the exact quantiles of rows (N, D), interpolated linearly."""
    levels = np.quantile(values.astype(np.float64), list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, levels, strict=True))


def vector_stats(column: Moments, column_quantiles: Stats) -> Stats:
    """Return LeRobot's entry of `stats.json` for a column of numbers."""
    return {
        "min": column.min,
        "max": column.max,
        "mean": column.mean,
        "std": column.std,
        "count": np.array([column.count]),
    } | column_quantiles


def pixel_histogram(frame: np.ndarray) -> np.ndarray:
    """Count the levels of a uint8 frame (H, W, 3): int64 (3, 256). Histograms of more frames are sums."""
    counts = [cv2.calcHist([frame], [channel], None, [256], [0, 256]) for channel in range(3)]
    # OpenCV 4 returns (256, 1), OpenCV 5 (256,); its float32 counts are exact below 2**24 pixels a frame
    return np.stack(counts).reshape(3, 256).astype(np.int64)


def camera_stats(histogram: np.ndarray, *, num_frames: int) -> Stats:
    """Return LeRobot's entry for a camera: levels scaled to [0, 1], shape (3, 1, 1), count in frames.

    Args:
        histogram: int64 (3, 256), at least one pixel.
        num_frames: The frames it was summed over.
    """
    levels = np.arange(256)
    total = histogram[0].sum()
    mean = histogram @ levels / total
    variance = (histogram * (levels - mean[:, None]) ** 2).sum(axis=1) / total
    cumulative = histogram.cumsum(axis=1)
    stats = {
        "min": (histogram > 0).argmax(axis=1),
        "max": 255 - (histogram[:, ::-1] > 0).argmax(axis=1),
        "mean": mean,
        "std": np.sqrt(variance),
    } | {name: _histogram_quantile(cumulative, q) for name, q in QUANTILES.items()}
    scaled = {name: (values / 255.0).reshape(3, 1, 1) for name, values in stats.items()}
    return scaled | {"count": np.array([num_frames])}


def _histogram_quantile(cumulative: np.ndarray, q: float) -> np.ndarray:
    """Interpolate between the two order statistics around rank q * (n - 1), per channel."""
    rank = q * (cumulative[0, -1] - 1)
    below = np.floor(rank)
    # the value of rank r (from 0) is the first level whose cumulative count exceeds r
    low = (cumulative > below).argmax(axis=1)
    high = (cumulative > min(below + 1, cumulative[0, -1] - 1)).argmax(axis=1)
    return low + (high - low) * (rank - below)
