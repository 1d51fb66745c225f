"""Every kind of configuration against the naive implementation of tests/smolvla/naive.py."""

from typing import Any

import pytest
import torch
from parity import (
    config,
    gradient_error,
    gradients,
    naive_twin,
    random_batch,
    random_draw,
    random_policy,
    relative_error,
    trainable,
)

from smolvla.smolvlm_with_expert import AttentionTables

TOLERANCE = 1e-5
FULL = {"train_expert_only": False, "freeze_vision_encoder": False}

GRID = {
    "default": {},
    "full fine-tuning": FULL,
    "frozen vision, trained text": FULL | {"freeze_vision_encoder": True},
    "pure self-attention": {"attention_mode": "self_attn"},
    "pure self-attention, trained": FULL | {"attention_mode": "self_attn"},
    "self-attention everywhere": {"self_attn_every_n_layers": 1},
    "every third layer": FULL | {"self_attn_every_n_layers": 3},
    "cross-attention everywhere": {"self_attn_every_n_layers": -1},
    "cross-attention everywhere, by 0": FULL | {"self_attn_every_n_layers": 0},
    "half the expert layers": {"num_expert_layers": 2, "self_attn_every_n_layers": 3},
    "half the expert layers, trained": FULL | {"num_expert_layers": 2, "self_attn_every_n_layers": 3},
    "half, where the reference fails": {"num_expert_layers": 2, "self_attn_every_n_layers": 2},
    "half, self-attention only": {"num_expert_layers": 2, "attention_mode": "self_attn"},
    "half, cross-attention only": {"num_expert_layers": 2, "self_attn_every_n_layers": -1},
    "one expert layer": {"num_expert_layers": 1},
    "one expert layer, trained": FULL | {"num_expert_layers": 1},
    "all VLM layers, by 0": {"num_vlm_layers": 0, "num_expert_layers": 0},
    "all VLM layers, by -1": {"num_vlm_layers": -1},
    "two VLM layers": FULL | {"num_vlm_layers": 2},
    "three VLM layers": {"num_vlm_layers": 3},
    "special image tokens": {"add_image_special_tokens": True},
    "special image tokens, trained": FULL | {"add_image_special_tokens": True},
    "padded prefix": {"prefix_length": 40},
    "prefix longer than prefix_length": {"prefix_length": 5},
    "frozen state projection": {"train_state_proj": False},
    "frozen state projection, trained VLM": FULL | {"train_state_proj": False},
    "wide expert": {"expert_width_multiplier": 1.0},
    "other periods": {"min_period": 0.01, "max_period": 2.0},
}


@pytest.mark.parametrize("settings", GRID.values(), ids=GRID.keys())
def test_loss_gradients_and_chunk_agree_with_the_naive_computation(settings):
    compare(config(**settings), padding_mask=True)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("empty_cameras", "num_images"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_missing_cameras_are_left_out_or_masked(empty_cameras, num_images, special):
    settings = config(
        cameras=("a", "b", "c"), empty_cameras=empty_cameras, add_image_special_tokens=special, **FULL
    )
    inputs = compare(settings, cameras=["observation.images.b"])
    assert len(inputs["images"]) == num_images
    for image, mask in zip(inputs["images"][1:], inputs["img_masks"][1:], strict=True):
        assert (image == -1).all()
        assert not mask.any()


def compare(settings, *, cameras=None, padding_mask=False):
    policy, batch, draw = (
        random_policy(settings),
        random_batch(settings, cameras=cameras),
        random_draw(settings),
    )
    if padding_mask:
        batch["observation.images.right_padding_mask"] = torch.tensor([True, False, True])
    inputs = policy.prepare_inputs(batch)
    naive = naive_twin(policy)

    elementwise = naive.elementwise_loss(inputs, **draw)
    without_padding = {name: value for name, value in inputs.items() if name != "is_pad"}
    assert relative_error(policy.model(**without_padding, **draw), elementwise) < TOLERANCE

    valid = ~batch["action_is_pad"]
    losses = elementwise[..., : settings.action_dim] * valid[..., None]
    expected = losses.sum() / (valid.sum() * settings.action_dim)
    outputs = policy(**inputs, **draw)
    assert relative_error(outputs["loss"], expected) < TOLERANCE
    assert outputs["num_valid"] == valid.sum() * settings.action_dim
    torch.testing.assert_close(outputs["loss_sum"] / outputs["num_valid"], outputs["loss"])
    per_sample = losses.sum((1, 2)) / (valid.sum(1) * settings.action_dim)
    assert relative_error(outputs["per_sample_loss"], per_sample) < TOLERANCE

    expected.backward()
    outputs["loss"].backward()
    # Nothing flows into what no action depends on; the naive computation finds the same.
    expected_gradients = {
        name: naive.w[name].grad for name in trainable(policy) if naive.w[name].grad is not None
    }
    assert gradient_error(gradients(policy), expected_gradients) < TOLERANCE

    chunk = policy.predict_action_chunk(batch, draw["noise"])
    with torch.no_grad():
        expected_chunk = naive.chunk(inputs, draw["noise"])[..., : settings.action_dim]
    assert relative_error(chunk, expected_chunk) < TOLERANCE
    return inputs


def test_the_trainable_set_follows_the_switches():
    def frozen(**settings):
        policy = random_policy(config(**settings))
        vlm = policy.model.vlm_with_expert.vlm
        layers = vlm.model.text_model.layers
        parts = {
            "vision": vlm.model.vision_model,
            "connector": vlm.model.connector,
            "embedding": vlm.model.text_model.embed_tokens,
            **{f"layer {i}": layer for i, layer in enumerate(layers)},
            "norm": vlm.model.text_model.norm,
            "head": vlm.lm_head,
            "expert": policy.model.vlm_with_expert.lm_expert,
            "state": policy.model.state_proj,
        }
        assert all(len({p.requires_grad for p in part.parameters()}) == 1 for part in parts.values())
        return {name for name, part in parts.items() if not next(part.parameters()).requires_grad}

    whole_vlm = {
        "vision",
        "connector",
        "embedding",
        "layer 0",
        "layer 1",
        "layer 2",
        "layer 3",
        "norm",
        "head",
    }
    assert frozen() == whole_vlm
    assert frozen(train_state_proj=False) == whole_vlm | {"state"}
    assert frozen(freeze_vision_encoder=False) == whole_vlm
    assert frozen(train_expert_only=False) == {"vision", "layer 3", "norm", "head"}
    assert frozen(**FULL) == {"layer 3", "norm", "head"}
    assert frozen(num_expert_layers=2, self_attn_every_n_layers=3, **FULL) == {
        "layer 2",
        "layer 3",
        "norm",
        "head",
    }


def test_what_trains_gets_a_gradient_where_the_expert_looks_at_few_layers():
    """An optimiser, DDP or a checkpoint would wait for one that never comes."""
    settings = config(num_expert_layers=1, **FULL)
    policy = random_policy(settings)
    policy(**policy.prepare_inputs(random_batch(settings)), **random_draw(settings))["loss"].backward()
    assert [name for name in trainable(policy) if policy.get_parameter(name).grad is None] == []
    first = policy.model.vlm_with_expert.vlm.model.text_model.layers[0].self_attn
    assert first.k_proj.weight.requires_grad
    assert first.v_proj.weight.requires_grad


def test_frozen_parts_stay_in_eval_mode():
    policy = random_policy(config()).train()
    network = policy.model.vlm_with_expert
    assert not any(module.training for module in network.vlm.modules())
    assert all(module.training for module in network.lm_expert.modules())
    tower_only = random_policy(config(train_expert_only=False)).eval().train().model.vlm_with_expert.vlm
    assert not any(module.training for module in tower_only.model.vision_model.modules())
    assert all(module.training for module in tower_only.model.text_model.modules())


def joint_layer_streams(policy, batch):
    """Prefix and state as every joint layer returns them in a training step."""
    seen = []
    for layer in policy.joint_layers:
        layer.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
    settings = policy.config
    policy(**policy.prepare_inputs(batch), **random_draw(settings))
    return seen


def test_a_frozen_prefix_has_no_graph_and_the_state_has_one_only_if_it_is_trained():
    for train_state_proj in (True, False):
        settings = config(train_state_proj=train_state_proj)
        outputs = joint_layer_streams(random_policy(settings), random_batch(settings))
        for prefix, state, suffix, _ in outputs[:-1]:
            assert prefix.grad_fn is None
            assert not prefix.requires_grad
            assert state.requires_grad == train_state_proj
            assert suffix.requires_grad


def test_the_last_layer_computes_no_prefix_output():
    used = []
    for values in ({}, FULL, {"num_expert_layers": 2, "self_attn_every_n_layers": 3}):
        settings = config(**values)
        policy = random_policy(settings)
        used.clear()
        for name, module in policy.joint_layers[-1].vlm_layer.named_modules():
            module.register_forward_hook(lambda *_, name=name: used.append(name))
        outputs = joint_layer_streams(policy, random_batch(settings))
        assert outputs[-1][0] is None
        assert outputs[-1][1] is None
        assert set(used) == {"input_layernorm", "self_attn.k_proj", "self_attn.v_proj"}


def test_masks_and_rotary_tables_are_built_once_a_batch(monkeypatch):
    settings = config()
    policy, calls = random_policy(settings), []
    build = AttentionTables.build
    monkeypatch.setattr(
        AttentionTables, "build", lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs)
    )
    policy(**policy.prepare_inputs(random_batch(settings)))
    assert len(calls) == 1
    policy.predict_action_chunk(random_batch(settings))
    assert len(calls) == 2


def test_sampling_projects_cross_attention_keys_once_a_chunk():
    settings = config()
    policy, calls = random_policy(settings), []
    layer = policy.joint_layers[1]
    assert layer.cross_attends
    layer.expert_layer.self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    policy.predict_action_chunk(random_batch(settings))
    assert len(calls) == 1


def test_checkpointing_changes_no_gradient_and_never_repeats_the_frozen_prefix():
    for values in ({}, FULL):
        settings = config(**values)
        batch, draw = random_batch(settings), random_draw(settings)
        plain, saving = random_policy(settings), random_policy(settings)
        saving.gradient_checkpointing_enable()
        calls = []
        saving.joint_layers[0].vlm_layer.mlp.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        for policy in (plain, saving):
            policy(**policy.prepare_inputs(batch), **draw)["loss"].backward()
        assert gradient_error(gradients(saving), gradients(plain)) < 1e-6
        prefix_and_state = 2
        state_again = 1
        assert len(calls) == prefix_and_state + (prefix_and_state if values else state_again)


def test_a_sample_without_any_real_prefix_token_stays_finite():
    settings = config(**FULL)
    policy, batch = random_policy(settings), random_batch(settings)
    for name in settings.camera_names:
        batch[f"{name}_padding_mask"] = torch.tensor([False, True, True])
    batch["observation.language.attention_mask"][0] = False
    outputs = policy(**policy.prepare_inputs(batch), **random_draw(settings))
    outputs["loss"].backward()
    assert outputs["per_sample_loss"].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(policy).values())


def test_an_expert_that_does_not_divide_the_vlm_is_refused():
    with pytest.raises(ValueError, match="num_expert_layers 3 does not divide the VLM's 4 layers"):
        random_policy(config(num_expert_layers=3))


def test_bfloat16_autocast_stays_near_float32():
    settings = config(**FULL)
    policy, draw = random_policy(settings), random_draw(settings)
    inputs = policy.prepare_inputs(random_batch(settings))
    exact = policy(**inputs, **draw)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = policy(**inputs, **draw)["loss"]
    assert rounded.dtype == torch.float32
    assert relative_error(rounded, exact) < 2e-2  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("values", [{}, FULL | {"add_image_special_tokens": True}], ids=["frozen", "trained"])
def test_nothing_between_inputs_and_outputs_waits_for_the_device(values):
    settings = config(**values)
    policy = random_policy(settings)
    inputs, draw = policy.prepare_inputs(random_batch(settings)), random_draw(settings)
    # A meta tensor has no values: .item(), a branch on it or boolean indexing would raise.
    policy.to("meta")
    inputs, draw = on_meta(inputs), on_meta(draw)
    policy(**inputs, **draw)["loss"].backward()
    for name in ("actions", "is_pad"):
        del inputs[name]
    assert policy.model.sample_actions(**inputs, noise=draw["noise"]).shape == (3, 6, 8)


def on_meta(values) -> dict[str, Any]:
    return {
        name: [part.to("meta") for part in value] if isinstance(value, list) else value.to("meta")
        for name, value in values.items()
    }
