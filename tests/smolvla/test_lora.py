"""Adapters: what trains with them, and that merged, adapted and reloaded policies act the same."""

import json

import pytest
import torch
from parity import GOLDEN, Golden, relative_error, trainable
from peft import PeftConfig, PeftModel

from smolvla import SmolVLAPolicy
from smolvla.lora import LoRA, add_adapters, save_adapter

STATS = {
    "observation.state": {"mean": [0.0] * 7, "std": [1.0] * 7},
    "action": {"mean": [0.0] * 7, "std": [1.0] * 7},
}


def adapted(**changes):
    """A policy whose adapters are no longer zero, as after training."""
    policy = Golden("default").policy()
    add_adapters(policy, LoRA(**({"rank": 4, "alpha": 8.0} | changes)), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy.eval()


def actions(policy):
    golden = Golden("default")
    return policy.predict_action_chunk(golden.batch, golden.draw["noise"])


def test_fresh_adapters_change_no_action_and_only_they_train():
    policy = Golden("default").policy().eval()
    before = actions(policy)
    add_adapters(policy, LoRA(rank=4, alpha=8.0), seed=1)
    assert torch.equal(actions(policy), before)
    names = trainable(policy)
    assert len(names) == 4 * 4 * 2  # layers, projections, A and B
    assert all("lm_expert.layers" in name and ".lora_" in name for name in names)


def test_adapters_are_drawn_from_the_seed_and_disturb_no_other_draw():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (dict(adapted().named_parameters()) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


CHOICES = [
    {},
    {"targets": ("q_proj", "v_proj", "up_proj", "action_in_proj"), "train_fully": ("action_out_proj",)},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_merged_checkpoint_is_an_ordinary_one_and_acts_the_same(choice, tmp_path):
    policy = adapted(**choice)
    policy.save_pretrained(tmp_path, stats=STATS)
    loaded = SmolVLAPolicy.from_pretrained(tmp_path).eval()
    assert not torch.equal(actions(loaded), actions(Golden("default").policy().eval()))
    assert relative_error(actions(loaded), actions(policy)) < 1e-6


@pytest.mark.parametrize("choice", CHOICES)
def test_peft_puts_the_saved_adapter_on_the_base_as_lerobot_does(choice, tmp_path):
    """LeRobot's steps: the base by the adapter's config, then `PeftModel.from_pretrained` on top."""
    policy = adapted(**choice)
    save_adapter(policy, tmp_path, base=GOLDEN / "default", state_dict=None)
    assert json.loads((tmp_path / "config.json").read_text())["use_peft"] is True
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path == str(GOLDEN / "default")
    base = SmolVLAPolicy.from_pretrained(str(config.base_model_name_or_path))
    found = PeftModel.from_pretrained(base, str(tmp_path), config=config).eval()  # pyright: ignore[reportArgumentType]
    assert relative_error(actions(found), actions(policy)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "lora.rank 0 is below 1"),
        ({"alpha": 0.0}, "lora.alpha 0.0 is not positive"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("qproj",)}, "lora.targets: 'qproj' is none of q_proj, k_proj"),
        ({"train_fully": ("q_proj",)}, "lora.train_fully: 'q_proj' is none of state_proj"),
        ({"targets": ("state_proj",), "train_fully": ("state_proj",)}, "stand in targets and in train_fully"),
    ],
)
def test_adapters_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**({"rank": 4, "alpha": 8.0} | change))
