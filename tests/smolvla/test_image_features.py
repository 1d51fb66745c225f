"""Features in place of images: the same loss, gradients and chunks; packing; the digest of their weights."""

import re

import pytest
import torch
from parity import (
    Golden,
    config,
    gradient_error,
    gradients,
    random_batch,
    random_draw,
    random_policy,
    relative_error,
)
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from smolvla import SmolVLAPolicy
from smolvla.features import FeatureDtype
from smolvla.image_features import feature_shape, packed, trained_part, unpacked, weights_digest

ROUNDING = 1e-6
CASES = {
    "two cameras": {},
    "special tokens": {"add_image_special_tokens": True},
    "an empty camera": {"cameras": ("left", "right", "third"), "empty_cameras": 1},
    "images as they are": {"resize_imgs_with_padding": None},
}


def with_features(policy, batch, dtype: FeatureDtype = "float32"):
    """The batch with features instead of its images."""
    cameras = [name for name in policy.config.camera_names if name in batch]
    rest = {name: column for name, column in batch.items() if name not in cameras}
    return rest | {
        f"{name}_features": packed(policy.image_features(name, batch[name]), dtype) for name in cameras
    }


def images_and_features(settings, **values):
    policy = random_policy(settings)
    cameras = [name for name in settings.camera_names if "third" not in name]
    batch = random_batch(settings, cameras=cameras)
    if settings.resize_imgs_with_padding is None:
        batch |= {name: batch[name].repeat(1, 1, 2, 1)[..., :64, :64] for name in cameras}
    batch["observation.images.right_padding_mask"] = torch.tensor([True, False, True])
    return policy, batch, with_features(policy, batch, **values)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_loss_gradients_and_chunk_are_those_of_the_images(values):
    settings = config(**values)
    policy, batch, from_features = images_and_features(settings)
    draw, found = random_draw(settings), []
    shape = from_features["observation.images.left_features"].shape
    height, width = batch["observation.images.left"].shape[-2:]
    assert feature_shape(settings, (height, width)) == shape[1:]
    for columns in (batch, from_features):
        policy.zero_grad()
        loss = policy(**policy.prepare_inputs(columns), **draw)["loss"]
        loss.backward()
        kept = {name: gradient.clone() for name, gradient in gradients(policy).items()}
        found.append((loss, kept, policy.predict_action_chunk(columns, draw["noise"])))
    assert relative_error(found[1][0], found[0][0]) < ROUNDING
    assert gradient_error(found[1][1], found[0][1]) < 10 * ROUNDING
    assert relative_error(found[1][2], found[0][2]) < ROUNDING
    other = from_features | {
        "observation.images.left_features": 2 * from_features["observation.images.left_features"]
    }
    assert relative_error(policy(**policy.prepare_inputs(other), **draw)["loss"], found[0][0]) > 1e-4


def test_features_stand_for_any_of_the_cameras_and_go_before_its_images():
    settings = config()
    policy, batch, from_features = images_and_features(settings)
    name = "observation.images.left"
    one = batch | {f"{name}_features": from_features[f"{name}_features"], name: torch.zeros(0)}
    losses = [
        policy(**policy.prepare_inputs(columns), **random_draw(settings))["loss"] for columns in (batch, one)
    ]
    assert relative_error(losses[1], losses[0]) < ROUNDING


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_packed_features_are_within_their_rounding(dtype, bound):
    features = torch.randn(4, 16, 96, generator=torch.Generator().manual_seed(0)) * 3
    features[0, 0] = 0
    stored = packed(features, dtype)
    assert stored.element_size() * stored[0, 0].numel() == {"bfloat16": 192, "int8": 100}[dtype]
    found = unpacked("x", stored, width=96)
    assert found.dtype == torch.float32
    largest = features.abs() if dtype == "bfloat16" else features.abs().amax(dim=-1, keepdim=True)
    assert ((found - features).abs() <= bound * largest * (1 + 1e-5)).all()
    assert not torch.equal(found, features)
    torch.testing.assert_close(unpacked("x", packed(found, dtype), width=96), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.zeros(2, 16, 95), "'x' has shape (2, 16, 95); it must be (B, tokens, 96)"),
        (torch.zeros(2, 16, 96, dtype=torch.int8), "it must be (B, tokens, 100)"),
        (torch.zeros(2, 96), "'x' has shape (2, 96)"),
        (torch.zeros(2, 16, 96, dtype=torch.int32), "'x' has dtype torch.int32"),
    ],
)
def test_what_is_no_packing_of_such_features_is_refused(stored, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        unpacked("x", stored, width=96)


def test_the_tower_alone_computes_the_same_and_its_digest_knows_no_other_weights(tmp_path):
    policy, batch, _ = images_and_features(config())
    policy.save_pretrained(tmp_path / "first")
    tower = SmolVLAPolicy.tower_from_pretrained(tmp_path / "first", policy.config, device="cpu")
    name = "observation.images.left"
    assert torch.equal(tower.image_features(name, batch[name]), policy.image_features(name, batch[name]))
    assert tower.model.action_in_proj.weight.is_meta

    found = {}
    changes = {
        "expert": policy.model.action_in_proj.weight,
        "tower": next(policy.model.vlm_with_expert.vlm.model.vision_model.parameters()),
        "connector": next(policy.model.vlm_with_expert.vlm.model.connector.parameters()),
    }
    first = weights_digest(tmp_path / "first", policy.config)
    for part, weight in changes.items():
        with torch.no_grad():
            weight.flatten()[0] += 1
        policy.save_pretrained(tmp_path / part)
        found[part] = weights_digest(tmp_path / part, policy.config)
    assert found["expert"] == first
    assert len({first, found["tower"], found["connector"]}) == 3


@pytest.mark.parametrize("train_expert_only", [True, False])
@pytest.mark.parametrize("freeze_vision_encoder", [True, False])
def test_the_frozen_part_is_the_one_that_gets_no_gradient(train_expert_only, freeze_vision_encoder):
    settings = config(train_expert_only=train_expert_only, freeze_vision_encoder=freeze_vision_encoder)
    vlm = random_policy(settings).model.vlm_with_expert.vlm.model
    trains = [
        name
        for name in ("connector", "vision_model")
        if any(parameter.requires_grad for parameter in getattr(vlm, name).parameters())
    ]
    reason = trained_part(settings)
    assert bool(trains) == bool(reason)
    if reason:
        assert reason.startswith("the connector" if trains == ["connector"] else "the vision tower")


def test_a_sharded_policy_in_bfloat16_takes_features():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        golden = Golden("default")
        policy = golden.policy()
        columns = with_features(policy, golden.batch, "bfloat16")
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy.shard(mesh=init_device_mesh("cpu", (1,)), mp_policy=mixed)
        loss = policy(**policy.prepare_inputs(columns), **golden.draw)["loss"]
        loss.backward()
        assert relative_error(loss, golden.expected("loss")) < 2e-2  # bfloat16 keeps 8 bits
    finally:
        torch.distributed.destroy_process_group()
