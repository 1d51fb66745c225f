"""Acting: queues, units, batches of environments, real-time chunking, compilation."""

import math

import pytest
import torch
from parity import config, random_policy, relative_error

from smolvla import SmolVLAPolicy, SmolVLAProcessor
from smolvla.real_time_chunking import Guidance, guidance_weight, prefix_weights

STATS = {
    "observation.state": {"mean": [0.5] * 5, "std": [2.0] * 5},
    "action": {"mean": [10.0, 20.0, 30.0, 40.0], "std": [1.0, 2.0, 3.0, 4.0]},
}
LEFT, RIGHT = "observation.images.left", "observation.images.right"


def make_policy(**values):
    policy = random_policy(config(**values)).eval()
    policy.processor = SmolVLAProcessor(policy.config, STATS)
    return policy


@pytest.fixture(scope="module")
def shared():
    return make_policy()


@pytest.fixture
def policy(shared):
    shared.reset()
    return shared


def observation(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pixels():
        return torch.randint(0, 256, (batch, 3, 60, 80), generator=generator, dtype=torch.uint8)

    return {
        LEFT: pixels(),
        RIGHT: pixels(),
        "observation.state": torch.randn(batch, 5, generator=generator),
        "task": ["open it", "push the red block"][:batch],
    }


def il_studio(obs):
    return {
        "image": torch.stack((obs[LEFT], obs[RIGHT]), dim=1),
        "state": obs["observation.state"],
        "raw_lang": obs["task"],
    }


NOISE = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))


def test_actions_are_in_the_datasets_units(policy):
    obs = observation()
    raw = policy.predict_action_chunk(policy.processor.observations(obs), NOISE)
    mean, std = torch.tensor(STATS["action"]["mean"]), torch.tensor(STATS["action"]["std"])
    torch.testing.assert_close(policy.predict_actions(obs, NOISE), raw * std + mean)
    state = policy.processor.observations(obs)["observation.state"]
    torch.testing.assert_close(state, (obs["observation.state"] - 0.5) / 2)


def test_actions_are_handed_out_one_by_one_and_predicted_every_n_action_steps(policy):
    calls = []
    hook = policy.model.state_proj.register_forward_hook(lambda *_: calls.append(1))
    chunk = policy.predict_actions(observation(), NOISE)
    calls.clear()
    for step in range(3):  # n_action_steps
        action = policy.select_action(observation(seed=step), NOISE)
        assert action.shape == (2, 4)
        assert torch.equal(action, chunk[:, step])
    assert len(calls) == 1
    policy.select_action(observation(), NOISE)
    assert len(calls) == 2
    policy.reset()
    policy.select_action(observation(), NOISE)
    assert len(calls) == 3
    hook.remove()


def test_another_number_of_environments_needs_a_reset(policy):
    policy.select_action(observation())
    with pytest.raises(ValueError, match=r"1 environments, but .* are of 2; call reset"):
        policy.select_action(observation(batch=1))
    policy.reset()
    assert policy.select_action(observation(batch=1)).shape == (1, 4)


def test_il_studios_observation_gives_the_whole_chunk(policy):
    obs = observation()
    chunk = policy.select_action(il_studio(obs), NOISE)
    assert chunk.shape == (2, 6, 4)
    assert torch.equal(chunk, policy.predict_actions(obs, NOISE))
    as_arrays = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in il_studio(obs).items()
    }
    assert torch.equal(chunk, policy.select_action(as_arrays, NOISE))
    same_text = policy.select_action(il_studio(obs) | {"raw_lang": "open it"}, NOISE)
    torch.testing.assert_close(same_text[0], chunk[0], rtol=1e-5, atol=1e-5)


def test_environments_do_not_see_each_other(policy):
    obs = observation()
    both = policy.predict_actions(obs, NOISE)
    second = {name: value[1:] for name, value in obs.items()}
    assert relative_error(policy.predict_actions(second, NOISE[1:]), both[1:]) < 1e-5


def test_wrong_observations_are_refused(policy):
    with pytest.raises(ValueError, match=r"no 'observation.state' and no 'state'"):
        policy.select_action({"image": torch.zeros(1, 2, 3, 8, 8)})
    with pytest.raises(ValueError, match="observations are a batch"):
        policy.select_action(il_studio(observation()) | {"state": torch.zeros(5)})
    with pytest.raises(ValueError, match="'raw_lang' has 1 rows; the state has 2"):
        policy.select_action(il_studio(observation()) | {"raw_lang": ["open it"]})


# ---- real-time chunking -----------------------------------------------------------------------------------


def test_the_pull_falls_from_the_delay_to_the_horizon():
    def weights(schedule):
        return prefix_weights(schedule, start=2, end=5, total=7).tolist()

    assert weights("ZEROS") == [1, 1, 0, 0, 0, 0, 0]
    assert weights("ONES") == [1, 1, 1, 1, 1, 0, 0]
    assert weights("LINEAR") == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])
    exponential = [c * math.expm1(c) / (math.e - 1) for c in (0.75, 0.5, 0.25)]
    assert weights("EXP") == pytest.approx([1, 1, *exponential, 0, 0])
    assert prefix_weights("LINEAR", start=9, end=3, total=4).tolist() == [1, 1, 1, 0]


def test_the_correction_is_strong_early_and_capped():
    assert guidance_weight(1.0, 10.0) == 10
    assert guidance_weight(0.5, 10.0) == pytest.approx(2)  # (0.25 + 0.25) / 0.25
    assert guidance_weight(0.9, 5.0) == 5  # 0.82 / 0.09


def test_guidance_follows_the_published_formula():
    """For a linear denoiser v = a x the Jacobian of x - t v is 1 - t a."""
    x, target = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    guidance = Guidance.of(
        target, {"prefix_attention_schedule": "LINEAR"}, inference_delay=1, execution_horizon=3
    )
    a, t = 0.3, 0.8
    weights = torch.tensor([1, 2 / 3, 1 / 3, 0])[:, None]
    error = (target - (x - t * a * x)) * weights
    strength = (0.2**2 + 0.8**2) / (0.2 * 0.8)
    expected = a * x - strength * (1 - t * a) * error
    torch.testing.assert_close(guidance.velocity(lambda x: a * x, x, t), expected)


def test_a_guided_chunk_continues_the_one_before(policy):
    obs = observation()
    before = policy.predict_actions(obs, NOISE)
    left_over, other = before[:, 2:], torch.randn(2, 6, 8)
    free = policy.predict_actions(obs, other)
    guided = policy.predict_actions(
        obs, other, prev_chunk_left_over=left_over, inference_delay=2, execution_horizon=4
    )

    def distance(chunk):
        return (chunk[:, :2] - left_over[:, :2]).abs().mean().item()

    assert distance(guided) < 0.5 * distance(free)
    assert not guided.requires_grad
    unguided = policy.predict_actions(
        obs, other, prev_chunk_left_over=left_over, inference_delay=0, execution_horizon=0
    )
    torch.testing.assert_close(unguided, free)


def test_rows_of_a_batch_are_guided_each_by_its_own_left_over_delay_and_horizon(policy):
    obs = observation()
    before = policy.predict_actions(obs, NOISE)
    left_overs, delays, horizons = [before[0, 2:], before[1, 4:]], [2, 0], [None, 3]
    together = policy.predict_actions(
        obs,
        NOISE.flip(0),
        prev_chunk_left_over=left_overs,
        inference_delay=delays,
        execution_horizon=horizons,
    )
    for row in range(2):
        alone = policy.predict_actions(
            {name: value[row : row + 1] for name, value in obs.items()},
            NOISE.flip(0)[row : row + 1],
            prev_chunk_left_over=left_overs[row][None],
            inference_delay=delays[row],
            execution_horizon=horizons[row],
        )
        assert relative_error(together[row], alone[0]) < 1e-5
    with pytest.raises(ValueError, match="inference_delay has 1 values; the left-over has 2 rows"):
        policy.predict_actions(obs, prev_chunk_left_over=left_overs, inference_delay=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_attention_schedule": "COSINE"}, "prefix_attention_schedule is 'COSINE'"),
        ({"max_guidance_weight": 0}, "max_guidance_weight is 0"),
        ({"horizon": 3}, r"unknown fields \['horizon'\]"),
        ({"execution_horizon": -1}, "execution_horizon -1"),
    ],
)
def test_wrong_settings_of_real_time_chunking_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance.of(torch.zeros(1, 2, 2), settings, inference_delay=0)


# ---- many noises, one observation -------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"train_expert_only": False, "freeze_vision_encoder": False}])
def test_repeated_noise_is_the_loss_of_repeated_samples(values):
    from parity import gradient_error, gradients, random_batch

    settings = config(**values)
    shared, repeated = random_policy(settings), random_policy(settings)
    batch = random_batch(settings)
    noise, time = torch.randn(6, 6, 8), torch.rand(6) * 0.9 + 0.05
    out = shared(**shared.prepare_inputs(batch), noise=noise, time=time, repeated_noise=2)
    twice = {name: column.repeat_interleave(2, dim=0) for name, column in batch.items()}
    expected = repeated(**repeated.prepare_inputs(twice), noise=noise, time=time)
    for name in ("loss", "loss_sum", "num_valid"):
        assert relative_error(out[name], expected[name]) < 1e-5
    per_sample = expected["per_sample_loss"].reshape(3, 2).mean(dim=1)
    assert relative_error(out["per_sample_loss"], per_sample) < 1e-5
    out["loss"].backward()
    expected["loss"].backward()
    assert gradient_error(gradients(shared), gradients(repeated)) < 1e-5
    with pytest.raises(ValueError, match="3 samples with repeated_noise 4 need 12"):
        shared(**shared.prepare_inputs(batch), noise=noise, time=time, repeated_noise=4)
    drawn = shared(**shared.prepare_inputs(batch), repeated_noise=4)
    assert drawn["num_valid"] == 4 * 12 * 4


@pytest.mark.slow
def test_a_compiled_policy_predicts_the_same(tmp_path):
    policy = make_policy(num_vlm_layers=2, num_steps=2, compile_mode="default")
    policy.save_pretrained(tmp_path)
    compiled = SmolVLAPolicy.from_pretrained(tmp_path, compile=True).eval()
    expected = policy.predict_actions(observation(), NOISE)
    assert relative_error(compiled.predict_actions(observation(), NOISE), expected) < 1e-5
    assert torch.equal(
        compiled.predict_actions(observation(), NOISE), compiled.predict_actions(observation(), NOISE)
    )
