"""From raw samples to batches: both naming conventions, ragged everything, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import config, random_policy

from smolvla import SmolVLAProcessor, data_collator
from smolvla.processing import TOKENS, TOKENS_MASK

STATS = {
    "observation.state": {
        "mean": [1.0] * 5,
        "std": [2.0] * 5,
        "min": [-1.0] * 5,
        "max": [3.0] * 5,
        "q01": [0.0] * 5,
        "q99": [2.0] * 5,
        "q10": [0.5] * 5,
        "q90": [1.5] * 5,
    }
}
STATS["action"] = {name: value[:4] for name, value in STATS["observation.state"].items()}
LEFT, RIGHT = "observation.images.left", "observation.images.right"
PROCESSOR = SmolVLAProcessor(config(), STATS)


def image(size=(6, 8), value=7):
    return np.full((3, *size), value, dtype=np.uint8)


def sample(**changes):
    values = {
        LEFT: image(),
        RIGHT: image(),
        "observation.state": np.ones(5),
        "action": np.zeros((6, 4)),
        "task": "open it",
    }
    values |= changes
    return {name: value for name, value in values.items() if value is not None}


@pytest.fixture(scope="module")
def policy():
    policy = random_policy(config())
    policy.processor = PROCESSOR
    return policy


def test_a_sample_is_normalised_and_tokenised():
    found = PROCESSOR(sample(**{"observation.state": [3, 1, 1, 1, 5]}))
    assert found["observation.state"].tolist() == pytest.approx([1, 0, 0, 0, 2])
    assert found["action"].tolist() == [[-0.5] * 4] * 6
    assert not found["action_is_pad"].any()
    assert found[LEFT].dtype == torch.uint8
    assert found[TOKENS].shape == found[TOKENS_MASK].shape == (8,)


def test_il_studios_names_give_the_same_columns_as_lerobots():
    theirs = {
        "image": np.stack([image(value=3), image(value=9)]),
        "state": np.arange(5.0),
        "action": np.ones((6, 4)),
        "is_pad": np.arange(6) > 3,
        "raw_lang": "open it\n",
        "reasoning": "not ours",
    }
    ours = sample(
        **{
            LEFT: image(value=3),
            RIGHT: image(value=9),
            "observation.state": torch.arange(5.0),
            "action": np.ones((6, 4)),
            "action_is_pad": np.arange(6) > 3,
        }
    )
    found, expected = PROCESSOR(theirs), PROCESSOR(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], column) for name, column in expected.items())
    one_camera = PROCESSOR(theirs | {"image": theirs["image"][:1]})
    assert LEFT in one_camera
    assert RIGHT not in one_camera


def test_a_short_chunk_repeats_its_last_action_as_padding():
    found = PROCESSOR(sample(action=np.arange(8.0).reshape(2, 4), action_is_pad=[False, True]))
    assert found["action_is_pad"].tolist() == [False, True, True, True, True, True]
    assert torch.equal(found["action"][1:], found["action"][1].expand(5, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LEFT: None, RIGHT: None}, "none of the cameras"),
        ({LEFT: image().transpose(1, 2, 0)}, r"'observation.images.left' has shape \(6, 8, 3\)"),
        ({LEFT: image() / 4.0}, r"values in \[1.75, 1.75\]; a float image lies in \[0, 1\]"),
        ({LEFT: image().astype(int)}, "has dtype torch.int64"),
        ({"observation.state": None}, "has no 'observation.state'"),
        ({"observation.state": np.ones(4)}, r"'observation.state' has shape \(4,\); its last axis must be 5"),
        ({"action": np.ones((7, 4))}, r"'action' has shape \(7, 4\); it must be \(up to 6, width\)"),
        ({"action": np.ones(4)}, r"'action' has shape \(4,\)"),
        ({"action_is_pad": [True]}, "'action' has 6 steps"),
        ({"task": None}, "needs its instruction"),
        ({"task": 3}, "it is 3"),
        ({"image": np.zeros((3, 3, 4, 4))}, "for up to 2 cameras"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_by_column(changes, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(sample(**changes))


MODES = ["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"]
FLOATS = st.floats(-10, 10, width=32)


@settings(deadline=None, max_examples=30)
@given(mode=st.sampled_from(MODES), actions=st.lists(st.tuples(*[FLOATS] * 4), min_size=1, max_size=6))
def test_actions_come_back_in_their_units_whatever_the_mode_and_length(mode, actions):
    mapping = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    processor = SmolVLAProcessor(config(normalization_mapping=mapping), STATS, tokenizer=PROCESSOR.tokenizer)
    given_actions = np.array(actions, dtype=np.float32)
    found = processor(sample(action=given_actions))
    assert found["action"].shape == (6, 4)
    assert found["action_is_pad"].sum() == 6 - len(actions)
    back = processor.unnormalize_actions(found["action"])
    np.testing.assert_allclose(back[: len(actions)], given_actions, rtol=1e-5, atol=1e-5)


SAMPLES = st.lists(
    st.fixed_dictionaries(
        {
            "cameras": st.sampled_from([(LEFT,), (RIGHT,), (LEFT, RIGHT)]),
            "task": st.text(st.characters(codec="ascii"), min_size=1, max_size=80),
            "newline": st.booleans(),
            "as_float": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=40)
@given(drawn=SAMPLES)
def test_any_mixture_of_samples_becomes_one_batch_that_holds_each_of_them(drawn):
    as_float = drawn[0]["as_float"]
    picture = image(value=51) / np.float32(255) if as_float else image(value=51)
    samples = [
        PROCESSOR(
            sample(
                **{LEFT: None, RIGHT: None, "task": one["task"] + "\n" * one["newline"]}
                | dict.fromkeys(one["cameras"], picture)
            )
        )
        for one in drawn
    ]
    batch = PROCESSOR.collate(samples)
    assert all(len(column) == len(drawn) for column in batch.values())
    for row, one in enumerate(samples):
        length = len(one[TOKENS])
        assert torch.equal(batch[TOKENS][row, :length], one[TOKENS])
        assert batch[TOKENS_MASK][row].sum() == one[TOKENS_MASK].sum()
        assert not batch[TOKENS_MASK][row, length:].any()
        assert (batch[TOKENS][row, length:] == PROCESSOR.tokenizer.pad_token_id).all()
        for name in (LEFT, RIGHT):
            there = name in drawn[row]["cameras"]
            if name in batch:
                assert batch.get(f"{name}_padding_mask", torch.ones(len(drawn)))[row] == there
                assert torch.equal(batch[name][row] != 0, torch.full((3, 6, 8), there))
    assert batch[TOKENS].shape[1] <= PROCESSOR.config.tokenizer_max_length
    assert batch["observation.state"].dtype == torch.float32


def test_a_newline_more_changes_no_token_and_padding_to_the_maximum_is_full_length():
    with_newline, without = PROCESSOR(sample(task="open it\n")), PROCESSOR(sample())
    assert torch.equal(with_newline[TOKENS], without[TOKENS])
    padded = SmolVLAProcessor(config(pad_language_to="max_length"), STATS)(sample())
    assert padded[TOKENS].shape == (48,)
    assert torch.equal(padded[TOKENS][:8], without[TOKENS])


def test_collating_what_does_not_belong_together_is_refused():
    one, other = PROCESSOR(sample()), PROCESSOR(sample(action=None))
    with pytest.raises(ValueError, match=r"samples \[1\] have no 'action'"):
        data_collator([one, other])
    with pytest.raises(ValueError, match=r"'observation\.images\.left' differs over the samples"):
        data_collator([one, PROCESSOR(sample(**{LEFT: image((4, 4))}))])
    with pytest.raises(ValueError, match="no samples"):
        data_collator([])


def test_a_masked_camera_changes_nothing_for_the_policy(policy):
    """A black masked image and no image at all are the same prediction."""
    alone = PROCESSOR.collate([PROCESSOR(sample(**{RIGHT: None}))])
    mixed = PROCESSOR.collate([PROCESSOR(sample(**{RIGHT: None})), PROCESSOR(sample())])
    noise = torch.randn(1, 6, 8)
    one = policy.predict_action_chunk(alone, noise)
    two = policy.predict_action_chunk(mixed, noise.expand(2, -1, -1))
    torch.testing.assert_close(two[:1], one, rtol=1e-4, atol=1e-5)


def test_the_samples_and_arrays_given_stay_as_they_are():
    given_sample = sample()
    before = {name: np.copy(value) for name, value in given_sample.items()}
    batch = PROCESSOR.collate([PROCESSOR(given_sample)] * 2)
    for column in batch.values():
        column.fill_(1)
    assert all(np.array_equal(before[name], value) for name, value in given_sample.items())
    assert torch.equal(PROCESSOR(given_sample)[TOKENS], PROCESSOR(sample())[TOKENS])
