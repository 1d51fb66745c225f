"""Augmentation: a function of (seed, micro-batch, row, camera), and of nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import TOP, WRIST, reader_of

from pipelines.augmentation import AugmentationConfig, augmented, draws
from pipelines.plan import Rows

ALL = AugmentationConfig(
    crop_probability=1, color_probability=1, hue=0.1, blur_probability=1, jpeg_probability=1
)
HALF = AugmentationConfig(
    crop_probability=0.5, color_probability=0.5, blur_probability=0.5, jpeg_probability=0.5
)


def picture(height=40, width=56):
    """Smooth, with an edge; a float ramp in every channel."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(20, 200, width)[None]
    image[..., 1] = np.linspace(200, 20, height)[:, None]
    image[height // 2 :, width // 2 :, 2] = 180
    return image


def some(*numbers):
    """Draws whose given places are set; 0.5 elsewhere."""
    u = np.full(16, 0.5)
    for place, value in numbers:
        u[place] = value
    return u


def test_without_probabilities_an_image_is_handed_on_as_it_is():
    image = picture()
    assert not AugmentationConfig().is_on
    assert augmented(image, AugmentationConfig(), draws(0, micro_batch=0, row=0, camera=0)) is image


def test_brightness_multiplies_and_contrast_pulls_to_the_mean_of_grey():
    still = AugmentationConfig(color_probability=1, brightness=0, contrast=0, saturation=0)
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    image[:4] = 60
    brighter = augmented(image, replace(still, brightness=0.5), some((5, 1.0)))
    assert set(np.unique(brighter)) == {90, 150}  # 1.5 times
    flatter = augmented(image, replace(still, contrast=0.5), some((6, 0.0)))
    assert set(np.unique(flatter)) == {69, 89}  # half way to the mean, whose grey torchvision cuts to 79
    same = augmented(image, replace(still, brightness=0.5), some((5, 0.5)))
    np.testing.assert_array_equal(same, image)


def test_a_crop_keeps_its_share_of_both_sides_and_is_enlarged_to_the_image():
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:20, :40] = 200
    config = AugmentationConfig(crop_probability=1, crop_min_side=0.5)
    corner = augmented(image, config, some((1, 0.0), (2, 0.0), (3, 0.0)))
    assert corner.shape == image.shape
    assert (corner == 200).all()  # the upper left quarter
    other = augmented(image, config, some((1, 0.0), (2, 0.999), (3, 0.999)))
    assert (other == 0).all()
    whole = augmented(image, config, some((1, 1.0)))
    np.testing.assert_array_equal(whole, image)


def test_effects_have_draws_of_their_own_so_one_more_leaves_the_others_as_they_were():
    u = draws(5, micro_batch=3, row=1, camera=0)
    crop, jpeg = AugmentationConfig(crop_probability=1), AugmentationConfig(jpeg_probability=1)
    both = augmented(picture(), replace(crop, jpeg_probability=1), u)
    np.testing.assert_array_equal(both, augmented(augmented(picture(), crop, u), jpeg, u))
    assert not np.array_equal(both, augmented(picture(), crop, u))


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 30), width=st.integers(1, 30), row=st.integers(0, 10**6))
def test_images_of_any_size_keep_it(height, width, row):
    image = picture(height, width)
    before = image.copy()
    found = augmented(image, ALL, draws(0, micro_batch=0, row=row, camera=0))
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)


def test_an_effect_happens_as_often_as_its_probability_says():
    count, probability = 4000, 0.3
    found = np.array([draws(7, micro_batch=m, row=r, camera=0) for m in range(500) for r in range(8)])
    assert 0 <= found.min() < found.max() < 1
    bound = 4 * np.sqrt(count * probability * (1 - probability))
    for place in (0, 4, 9, 11):
        assert abs((found[:, place] < probability).sum() - count * probability) < bound
    assert np.abs(found.mean(axis=0) - 0.5).max() < 4 * np.sqrt(1 / 12 / count)


def test_the_draws_are_pinned_to_known_numbers():
    """Changed draws would silently change every resumed run: these may never move."""
    found = draws(1000, micro_batch=7, row=2, camera=1)[:3]
    assert found.tolist() == [0.3504276875769946, 0.4614277461707067, 0.7644914130643472]


@pytest.fixture(scope="module")
def readers(episodes):
    """(as stored, augmented) readers of the same rows."""
    plain = reader_of(episodes)[1]
    return plain, replace(plain, augmentation=HALF)


def images(reader, group, *, first=0):
    batches = [reader.decoded(encoded) for encoded in reader.encoded(group, first=first)]
    return [{name: batch[name] for name in (TOP, WRIST)} for batch in batches]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name, pixels in one.items():
            np.testing.assert_array_equal(pixels, other[name])


def test_a_stream_augments_the_same_way_again_and_when_it_goes_on_in_the_middle(readers):
    _, reader = readers
    whole = images(reader, 2)
    assert_same(images(reader, 2), whole)
    assert_same(images(replace(reader), 2, first=2), whole[2:])


def test_augmentation_that_is_off_changes_no_byte_of_a_batch(readers):
    plain, _ = readers
    off = replace(plain, augmentation=AugmentationConfig())
    for encoded in plain.encoded(1):
        expected, found = plain.decoded(encoded), off.decoded(encoded)
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_rows_cameras_micro_batches_and_seeds_are_augmented_independently(readers):
    """One picture for all: what differs is the augmentation."""
    _, reader = readers
    encoded = next(reader.encoded(0))
    alike = encoded.take([0] * len(encoded))
    for camera in (TOP, WRIST):
        alike = alike.set_column(alike.schema.get_field_index(camera), camera, alike[TOP])
    everything = replace(reader, augmentation=ALL)

    def pictures(reader, micro_batch):
        place = alike.schema.get_field_index("micro_batch")
        table = alike.set_column(place, "micro_batch", [[micro_batch] * len(alike)])
        batch = reader.decoded(table)
        return [image.tobytes() for name in (TOP, WRIST) for image in batch[name]]

    other = replace(everything, config=replace(everything.config, seed=4))
    found = pictures(everything, 0) + pictures(everything, 1) + pictures(other, 0)
    assert len(set(found)) == len(found) == 48


def test_only_images_change_and_only_where_the_draws_say_so(readers):
    plain, reader = readers
    changed = 0
    for before, encoded in zip(plain.encoded(3), reader.encoded(3), strict=True):
        expected, found = plain.decoded(before), reader.decoded(encoded)
        for name in expected.keys() - {TOP, WRIST}:
            np.testing.assert_array_equal(found[name], expected[name])
        for number, camera in enumerate((TOP, WRIST)):
            for row in range(8):
                u = draws(3, micro_batch=int(found["micro_batch"][0]), row=row, camera=number)
                same = np.array_equal(found[camera][row], expected[camera][row])
                assert same or (u[[0, 4, 9, 11]] < 0.5).any()  # a crop of nearly all may change nothing
                changed += not same
    assert 32 < changed < 64


def test_the_moments_of_a_history_are_augmented_alike(episodes):
    _, reader = reader_of(episodes, num_observations=2)
    reader = replace(reader, augmentation=replace(ALL, jpeg_probability=0))
    first_frames = Rows(*(np.zeros(8, dtype=np.int64) for _ in range(4)))  # of an episode: both moments
    table = reader.encoded_rows(first_frames).append_column("micro_batch", [[5] * 8])
    batch = reader.decoded(table)
    np.testing.assert_array_equal(batch[TOP][:, 0], batch[TOP][:, 1])
    assert len({image.tobytes() for image in batch[TOP][:, 0]}) == 8


def test_rows_of_no_micro_batch_are_not_augmented(readers):
    """Those that validation measures."""
    plain, reader = readers
    rows = plain.plan.micro_batch_rows(0)
    expected, found = (r.decoded(r.encoded_rows(rows)) for r in (plain, reader))
    np.testing.assert_array_equal(found[TOP], expected[TOP])


def test_nobody_elses_random_state_is_touched(readers):
    _, reader = readers
    torch.manual_seed(0)
    before = torch.get_rng_state(), str(np.random.get_state())
    reader = replace(reader, augmentation=ALL)
    reader.decoded(next(reader.encoded(0)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_probability": 1.5}, "augmentation.crop_probability 1.5 is not from 0 to 1"),
        ({"jpeg_probability": -0.1}, "augmentation.jpeg_probability -0.1 is not from 0 to 1"),
        ({"crop_min_side": 0}, "augmentation.crop_min_side 0 is not above 0, up to 1"),
        ({"brightness": 2}, "augmentation.brightness 2 is not from 0 to 1"),
        ({"hue": 0.6}, "augmentation.hue 0.6 is not from 0 to 0.5"),
        ({"blur_max_sigma_px": 0}, "augmentation.blur_max_sigma_px 0 is not 0.1 or more"),
        ({"jpeg_min_quality": 0}, "augmentation.jpeg_min_quality 0 is not from 1 to 100"),
        ({"contrast": float("nan")}, "augmentation.contrast nan is not from 0 to 1"),
    ],
)
def test_a_wrong_strength_is_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**change)
