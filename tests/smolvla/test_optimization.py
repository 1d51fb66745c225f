"""The presets of the configuration: AdamW, warm-up and cosine."""

import pytest
import torch
from parity import config, random_policy

from smolvla.optimization import adamw, clip_gradients, lr_factor, optimizer_groups

PRESET = {"warmup_steps": 1_000, "peak_lr": 1e-4, "decay_lr": 2.5e-6}
FLOOR = 0.025


def factors(steps, *, total, decay):
    return [lr_factor(step, decay_steps=decay, total_steps=total, **PRESET) for step in steps]


def test_the_preset_warms_up_and_follows_a_cosine_of_the_absolute_step():
    first, last_warm, peak, middle, end = factors([0, 999, 1_000, 15_000, 30_000], total=30_000, decay=30_000)
    assert first == pytest.approx(1 / 1_001)
    assert last_warm == pytest.approx(1 - (1 - 1 / 1_001) / 1_000)
    assert peak == pytest.approx(0.99733, abs=1e-5)  # the cosine has begun at step 0
    assert middle == pytest.approx((1 + FLOOR) / 2)
    assert end == pytest.approx(FLOOR)


def test_a_short_run_shrinks_warm_up_and_decay_alike():
    short = factors([0, 100, 1_500, 3_000], total=3_000, decay=30_000)
    assert short[0] == pytest.approx(1 / 101)
    assert short[1] == pytest.approx(0.99733, abs=1e-5)
    assert short[2:] == pytest.approx([(1 + FLOOR) / 2, FLOOR])


def test_a_long_run_is_flat_only_when_a_number_asks_for_it():
    assert factors([30_000, 60_000], total=100_000, decay=30_000) == pytest.approx([FLOOR, FLOOR])
    following = factors([1_000, 30_000, 60_000, 100_000], total=100_000, decay=None)
    assert following == sorted(following, reverse=True)
    assert following[1] > 0.7
    assert following[-1] == pytest.approx(FLOOR)


def test_a_decay_that_follows_the_run_warms_up_for_a_tenth_at_most():
    assert factors([19, 20, 200], total=200, decay=None)[1:] == pytest.approx([0.976, FLOOR], abs=1e-3)
    assert factors([0], total=200, decay=None) == pytest.approx([1 / 21])
    assert factors([0], total=5, decay=None) == [1.0]


def test_the_optimizer_holds_the_trainable_parameters_with_the_presets():
    policy = random_policy(config(optimizer_lr=3e-4))
    optimizer = adamw(policy, policy.config)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        3e-4,
        (0.9, 0.95),
        1e-8,
        1e-10,
    )
    assert adamw(policy, policy.config, lr=1e-3).param_groups[0]["lr"] == 1e-3
    (wanted,) = optimizer_groups(policy)
    assert len(group["params"]) == len(wanted["params"]) == sum(p.requires_grad for p in policy.parameters())


def test_clipping_returns_the_norm_before_it():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(5)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
