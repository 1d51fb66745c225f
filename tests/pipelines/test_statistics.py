"""Statistics against numpy on the concatenation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines import statistics

PARTS = st.lists(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.just(3)),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    min_size=1,
    max_size=8,
)


def merged(parts):
    found = [statistics.moments(part) for part in parts]
    return statistics.merged(
        count=np.array([part.count for part in found]),
        **{
            name: np.stack([getattr(part, field) for part in found])
            for name, field in {"low": "min", "high": "max", "mean": "mean", "std": "std"}.items()
        },
    )


@settings(deadline=None)
@given(parts=PARTS, seed=st.integers(0, 1000))
def test_moments_merged_in_any_order_equal_numpy_on_the_concatenation(parts, seed):
    rows = np.concatenate(parts).astype(np.float64)
    found = merged([parts[i] for i in np.random.default_rng(seed).permutation(len(parts))])
    assert found.count == len(rows)
    np.testing.assert_array_equal(found.min, rows.min(axis=0))
    np.testing.assert_array_equal(found.max, rows.max(axis=0))
    # float64 sums of a few hundred values: some hundred roundings of 1e-16 of the largest magnitude
    scale = np.abs(rows).max() + 1e-300
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(
        found.m2, ((rows - rows.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-9, atol=1e-13 * scale**2
    )


def test_the_standard_deviation_is_the_population_one():
    assert statistics.moments(np.array([[1.0], [3.0]])).std == pytest.approx([1.0])


def test_a_large_common_offset_does_not_spoil_the_variance():
    rows = 1e8 + np.random.default_rng(0).standard_normal((10_000, 1))
    found = merged(np.array_split(rows, 97))
    np.testing.assert_allclose(found.std, rows.std(axis=0), rtol=1e-7)  # 1e-16 * (1e8 / 1)


def test_statistics_survive_json_bit_for_bit():
    found = statistics.moments(np.random.default_rng(0).standard_normal((7, 2)))
    assert np.array_equal(np.array(json.loads(json.dumps(found.std.tolist()))), found.std)


@settings(deadline=None)
@given(first=st.integers(0, 10**9), length=st.integers(1, 3000))
def test_the_statistics_of_counting_are_known_without_counting(first, length):
    found = statistics.counting_stats(first, length)
    expected = statistics.row_stats(np.arange(first, first + length)[:, None])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def histogram_of(frames):
    counter = statistics.PixelCounter(*frames[0].shape[:2])
    for frame in frames:
        counter.add(frame)
    return counter.histogram()


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    num_frames=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_pixels_are_counted_exactly_whatever_the_size_and_the_number_of_frames(size, num_frames, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)
    expected = [np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)]
    np.testing.assert_array_equal(histogram_of(list(frames)), expected)


def test_every_second_row_of_a_frame_can_be_counted_in_place():
    frame = np.random.default_rng(0).integers(0, 256, (10, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(histogram_of([frame[1::2]]), histogram_of([frame[1::2].copy()]))


def test_a_histogram_may_be_asked_for_at_any_time():
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 3, 5, 3), dtype=np.uint8))
    counter = statistics.PixelCounter(3, 5)
    for number, frame in enumerate(frames, start=1):
        counter.add(frame)
        np.testing.assert_array_equal(counter.histogram(), histogram_of(frames[:number]))


@settings(deadline=None)
@given(
    frames=st.lists(
        hnp.arrays(np.uint8, st.just((4, 5, 3))),
        min_size=1,
        max_size=5,
    )
)
def test_camera_statistics_from_histograms_equal_numpy_on_all_pixels(frames):
    histogram = histogram_of(frames)
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames]) / 255.0
    stats = statistics.camera_stats(histogram, num_frames=len(frames))
    expected = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
    expected |= {name: np.quantile(pixels, q, axis=0) for name, q in statistics.QUANTILES.items()}
    for name, values in expected.items():
        assert stats[name].shape == (3, 1, 1)
        np.testing.assert_allclose(stats[name].reshape(3), values, rtol=1e-12, atol=1e-12, err_msg=name)
    assert stats["count"].tolist() == [len(frames)]


def test_quantiles_of_a_vector_are_numpys_of_the_float64_values():
    values = np.random.default_rng(0).standard_normal((101, 2)).astype(np.float32)
    found = statistics.quantiles(values)
    np.testing.assert_array_equal(found["q50"], np.median(values.astype(np.float64), axis=0))
    assert list(found) == ["q01", "q10", "q50", "q90", "q99"]
