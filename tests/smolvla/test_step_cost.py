"""The FLOPs that benchmarks/step_cost.py derives from a policy's sizes are those that torch counts."""

from pathlib import Path

import pytest
import torch
from parity import config
from torch.utils.flop_counter import FlopCounterMode

from smolvla import SmolVLAPolicy

ROOT = Path(__file__).parents[2]
WORDS = 9
POLICIES = {
    "default": {},
    "self-attention": {"attention_mode": "self_attn"},
    "half the expert layers": {"num_expert_layers": 2, "self_attn_every_n_layers": 3},
    "larger images": {"resize_imgs_with_padding": [128, 128]},
}


def inputs_of(settings, *, cameras, features=None):
    """Inputs of one sample on the meta device: only shapes."""
    side = settings.resize_imgs_with_padding[0]
    shape = (1, 3, side, side) if features is None else (1, *features)
    return {
        "images": [torch.zeros(shape) for _ in range(cameras)],
        "img_masks": [torch.ones(1, dtype=torch.bool) for _ in range(cameras)],
        "lang_tokens": torch.zeros(1, WORDS, dtype=torch.int64),
        "lang_masks": torch.ones(1, WORDS, dtype=torch.bool),
        "state": torch.zeros(1, settings.max_state_dim),
        "actions": torch.zeros(1, settings.chunk_size, settings.max_action_dim),
        "noise": torch.zeros(1, settings.chunk_size, settings.max_action_dim),
        "time": torch.zeros(1),
    }


def counted(policy, inputs, *, backward):
    with FlopCounterMode(display=False) as counter:
        losses = policy.model(**inputs)
        if backward:
            losses.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES.keys())
def test_the_derived_flops_are_those_that_torch_counts(settings, cameras, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from step_cost import sample_flops

    settings = config(cameras=["left", "right"][:cameras], **settings)
    policy = SmolVLAPolicy(settings, allow_random_vlm=True)
    images = inputs_of(settings, cameras=cameras)
    found = sample_flops(policy, cameras=cameras, words=WORDS)
    assert counted(policy, images, backward=False) == found.forward
    tokens = policy.model.vlm_with_expert.embed_image(images["images"][0]).shape[1:]
    features = inputs_of(settings, cameras=cameras, features=tokens)
    assert counted(policy, features, backward=False) == found.forward - found.tower
    # attention's backward pass counts once more what its forward pass kept nothing of
    assert counted(policy, images, backward=True) == pytest.approx(found.step_from_images, rel=0.05)
    assert counted(policy, features, backward=True) == pytest.approx(found.step_from_features, rel=0.1)
