"""The pure steps before and after the model, against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import GOLDEN, TINY

from smolvla.data_utils import (
    decode_aloha_actions,
    decode_aloha_state,
    encode_aloha_actions,
    fitted_size,
    resize_with_pad,
    sample_noise,
    sample_time,
    sinusoidal_time,
    tokenize_tasks,
)
from smolvla.features import Normalizer

FEATURES = {
    "observation.images.top": {"type": "VISUAL", "shape": [3, 4, 4]},
    "observation.state": {"type": "STATE", "shape": [2]},
    "action": {"type": "ACTION", "shape": [2]},
}
STATS = {
    "observation.state": {
        "mean": [1.0, 0.0],
        "std": [2.0, 0.0],
        "min": [0.0, 3.0],
        "max": [4.0, 3.0],
        "q01": [1.0, -1.0],
        "q99": [3.0, 1.0],
        "q10": [1.5, -1.0],
        "q90": [2.5, 1.0],
    }
}
STATS["action"] = STATS["observation.state"]


def normalizer(mode):
    return Normalizer(STATS, FEATURES, {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("IDENTITY", [2.0, 3.0]),
        ("MEAN_STD", [0.5, 3e8]),  # a dead joint: (3 - 0) / (0 + 1e-8)
        ("MIN_MAX", [0.0, -1.0]),  # a dead joint: 2 * 0 / 1e-8 - 1
        ("QUANTILES", [0.0, 3.0]),
        ("QUANTILE10", [0.0, 3.0]),
    ],
)
def test_normalisation_gives_the_numbers_computed_by_hand(mode, expected):
    values = np.array([2.0, 3.0], dtype=np.float32)
    np.testing.assert_allclose(normalizer(mode).normalize("action", values), expected, rtol=1e-6)
    torch.testing.assert_close(
        normalizer(mode).normalize("action", torch.tensor(values)), torch.tensor(expected)
    )


@settings(deadline=None)  # the first call waits for torch
@given(
    mode=st.sampled_from(["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"]),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
)
def test_unnormalise_undoes_normalise_for_arrays_and_tensors(mode, values):
    steps = np.stack(
        [np.asarray(values, dtype=np.float32), np.full(len(values), 3, dtype=np.float32)], axis=-1
    )
    there = normalizer(mode).normalize("action", steps)
    back = normalizer(mode).unnormalize("action", there)
    live = slice(None) if mode != "MEAN_STD" else slice(1)  # std 0 comes back as the mean
    np.testing.assert_allclose(back[:, live], steps[:, live], rtol=1e-5, atol=1e-4)
    as_tensor = normalizer(mode).normalize("action", torch.from_numpy(steps))
    assert as_tensor.dtype == torch.float32
    np.testing.assert_allclose(as_tensor.numpy(), there, rtol=1e-6, atol=1e-6)


def test_mean_std_is_asymmetric_by_epsilon_as_in_lerobot():
    there = normalizer("MEAN_STD").normalize("action", np.array([3.0, 0.0]))
    assert normalizer("MEAN_STD").unnormalize("action", there)[0] == pytest.approx(3.0)
    assert normalizer("MEAN_STD").unnormalize("action", np.array([0.0, 5.0]))[1] == 0.0


def test_statistics_and_names_that_are_missing_are_refused():
    mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    with pytest.raises(ValueError, match=r"'mean' of 'observation\.state'"):
        Normalizer({}, FEATURES, mapping)
    with pytest.raises(ValueError, match=r"'std' of 'observation\.state'"):
        Normalizer({"observation.state": {"mean": [0, 0]}}, FEATURES, mapping)
    with pytest.raises(ValueError, match=r"'mean' of 'observation.state' has 3 numbers; the feature has 2"):
        Normalizer({"observation.state": {"mean": [0, 0, 0], "std": [1, 1, 1]}}, FEATURES, mapping)
    with pytest.raises(ValueError, match=r"normalization_mapping\['STATE'\] is None"):
        Normalizer(STATS, FEATURES, {"VISUAL": "IDENTITY"})
    with pytest.raises(ValueError, match="no feature 'acton'"):
        normalizer("MEAN_STD").normalize("acton", np.zeros(2))


def test_camera_statistics_apply_per_channel():
    features = {"observation.images.top": FEATURES["observation.images.top"]}
    stats = {
        "observation.images.top": {"mean": [[[0.5]], [[0.0]], [[1.0]]], "std": [[[0.5]], [[1.0]], [[2.0]]]}
    }
    image = torch.ones(2, 3, 4, 4)
    found = Normalizer(stats, features, {"VISUAL": "MEAN_STD"}).normalize("observation.images.top", image)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((480, 640), (512, 512), (384, 512)),
        ((60, 80), (64, 64), (48, 64)),
        ((512, 512), (512, 512), (512, 512)),
        ((479, 640), (512, 512), (383, 512)),  # 383.2, truncated
        ((100, 50), (40, 60), (60, 30)),
    ],
)
def test_images_are_fitted_with_truncated_sizes(size, box, expected):
    height, width = size
    assert fitted_size(height, width, box) == expected


@settings(deadline=None)
@given(height=st.integers(1, 1200), width=st.integers(1, 1200), side=st.sampled_from([64, 96, 384, 512]))
def test_a_fitted_image_is_not_resized_a_second_time(height, width, side):
    once = fitted_size(height, width, (side, side))
    assert max(once) == side
    assert fitted_size(once[0], once[1], (side, side)) == once


def test_padding_is_zero_on_the_left_and_on_top():
    wide = resize_with_pad(torch.ones(1, 3, 2, 4), (4, 4))
    assert wide[0, 0].tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    tall = resize_with_pad(torch.ones(1, 3, 4, 2), (4, 4))
    assert tall[0, 0].tolist() == [[0, 0, 1, 1]] * 4
    same = torch.rand(1, 3, 4, 4)
    assert resize_with_pad(same, (4, 4)) is same


def test_text_ends_with_one_newline_and_is_padded_on_the_right():
    tokens, mask = tokenize_tasks(["open it", "pick up the cube\n"], GOLDEN / "tiny_vlm", max_length=48)
    assert tokens.dtype == np.int64
    assert mask.dtype == np.bool_
    assert tokens.shape == mask.shape == (2, 17)
    assert mask.sum(axis=1).tolist() == [8, 17]
    assert not mask[0, 8:].any()
    newline = tokens[1, -1]
    assert tokens[0, 7] == newline
    assert (tokens[1] == newline).sum() == 1


def test_text_is_padded_to_the_maximum_or_cut_at_it():
    tokens, mask = tokenize_tasks(["reach"], TINY / "vlm", max_length=48, padding="max_length")
    assert tokens.shape == (1, 48)
    assert 0 < mask.sum() < 48
    tokens, mask = tokenize_tasks(["x" * 100], TINY / "vlm", max_length=10)
    assert tokens.shape == (1, 10)
    assert mask.all()
    with pytest.raises(ValueError, match="padding is 'left'"):
        tokenize_tasks(["reach"], TINY / "vlm", max_length=48, padding="left")


def test_aloha_actions_survive_the_round_trip_and_joints_flip():
    actions = torch.rand(2, 5, 14, generator=torch.Generator().manual_seed(0))
    before = actions.clone()
    torch.testing.assert_close(decode_aloha_actions(encode_aloha_actions(actions)), actions)
    assert torch.equal(actions, before)
    encoded = encode_aloha_actions(actions)
    flipped, kept = [1, 2, 8, 9], [0, 3, 4, 5, 7, 10, 11, 12]
    assert torch.equal(encoded[..., flipped], -actions[..., flipped])
    assert torch.equal(encoded[..., kept], actions[..., kept])


def test_an_aloha_gripper_position_becomes_an_angle():
    state = torch.zeros(1, 14)
    state[0, 6] = 0.9
    position = 0.9 * (0.05800 - 0.01844) + 0.01844
    sine = (0.022**2 + position**2 - 0.036**2) / (2 * 0.022 * position)
    expected = (math.asin(sine) - 0.4) / (1.5 - 0.4)
    assert decode_aloha_state(state)[0, 6].item() == pytest.approx(expected, rel=1e-5)
    assert state[0, 6].item() == pytest.approx(0.9)


def test_noise_and_times_repeat_from_a_seed_and_follow_their_distribution():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_noise((2, 3, 4), generator), sample_time(200_000, generator)

    (noise, times), (again, times_again) = drawn(4), drawn(4)
    assert noise.shape == (2, 3, 4)
    assert torch.equal(noise, again)
    assert torch.equal(times, times_again)
    assert times.min() >= 0.001
    assert times.max() <= 1
    # Beta(1.5, 1): mean 0.6, P(x < q) = q ** 1.5; 200,000 draws are good to about 1e-3
    scaled = (times - 0.001) / 0.999
    assert scaled.mean().item() == pytest.approx(0.6, abs=3e-3)
    assert (scaled < 0.5).float().mean().item() == pytest.approx(0.5**1.5, abs=4e-3)


def test_the_time_embedding_is_sines_then_cosines_of_geometric_periods():
    found = sinusoidal_time(torch.tensor([0.25]), 4, min_period=0.5, max_period=2.0)
    expected = [math.sin(math.pi), math.sin(math.pi / 4), math.cos(math.pi), math.cos(math.pi / 4)]
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-7, rtol=1e-6)
