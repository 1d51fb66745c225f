"""Which frames of an episode a sample takes, when the policy's frame rate is not the data's."""

import functools
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@functools.lru_cache(maxsize=64)
def frame_steps(count: int, *, data_fps: float, policy_fps: float) -> Int64:
    """(count,): how many frames of the data lie between a moment and the policy's k-th frame after it.

    The frame nearest to k / policy_fps seconds, the later one of two: exact where the data's rate is a
    multiple of the policy's, else off by up to half a frame of the data.

    Raises:
        ValueError: the policy's rate is above the data's, so that it would see frames twice.
    """
    if policy_fps > data_fps:
        raise ValueError(f"fps {policy_fps} is above the {data_fps} frames a second of the data")
    ratio = Fraction(str(data_fps)) / Fraction(str(policy_fps))
    steps = np.array([(k * ratio + Fraction(1, 2)).__floor__() for k in range(count)], dtype=np.int64)
    steps.setflags(write=False)  # it is kept: the stream asks for each row group
    return steps
