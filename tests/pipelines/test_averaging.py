"""The moving average of the weights: by hand over some steps, skipped ones left out."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_engine import POISONED_STEP, TRAIN
from toys import golden_rows

from pipelines.engine import Engine

DECAY = 0.3  # reached at the fourth update: 2/11, 3/12, 4/13, then 0.3 instead of 5/14


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_average_is_the_one_computed_by_hand_and_a_skipped_step_leaves_it():
    policy, rows = golden_rows(TRAIN.micro_batch)
    engine = Engine(policy, replace(TRAIN, ema_decay=DECAY))
    average = engine.average
    assert average is not None
    name = next(name for name, p in policy.named_parameters() if p.requires_grad)
    weight = policy.get_parameter(name)
    expected, updates, per_step = weight.detach().double(), 0, TRAIN.batch_size // TRAIN.micro_batch
    for step in range(1, TRAIN.steps + 1):
        batches = [(m, rows(m)) for m in range((step - 1) * per_step, step * per_step)]
        if step == POISONED_STEP:
            batches[0][1]["action"][0, 0, 0] = float("nan")
        before = average.weights[name].clone()
        engine.step(step, batches, count=len(batches))
        if step == POISONED_STEP:
            assert torch.equal(average.weights[name], before)
            continue
        updates += 1
        decay = min(DECAY, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * weight.detach().double()
        torch.testing.assert_close(average.weights[name].double(), expected, rtol=1e-6, atol=1e-8)
    assert updates == 4


def test_the_policy_gets_its_own_weights_back_to_the_bit():
    policy, rows = golden_rows(TRAIN.micro_batch)
    engine = Engine(policy, replace(TRAIN, batch_size=TRAIN.micro_batch, ema_decay=DECAY))
    engine.step(1, [(0, rows(0))], count=1)
    assert engine.average is not None
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    averaged = {name: tensor.clone() for name, tensor in engine.average.weights.items()}
    with engine.average.in_place():
        for name, tensor in averaged.items():
            assert torch.equal(policy.get_parameter(name), tensor)
            assert not torch.equal(tensor, own[name])
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, own[name])
    for name, tensor in averaged.items():
        assert torch.equal(engine.average.weights[name], tensor)
