"""The numbers of LeRobot 0.6.2 on CPU in float32: same weights, same batch."""

import json

import pytest
import torch
from parity import GOLDEN, Golden, gradient_error, gradients, relative_error, trainable

from smolvla import SmolVLAPolicy
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import tokenize_tasks
from smolvla.optimization import adamw, clip_gradients, lr_factor

TOLERANCE = 1e-5
TRAJECTORY_TOLERANCE = 1e-4


@pytest.fixture(params=["default", "aloha"], scope="module")
def golden(request):
    return Golden(request.param)


def test_images_and_masks_are_prepared_as_lerobot_does(golden):
    inputs = golden.policy().prepare_inputs(golden.batch)
    for i, (image, mask) in enumerate(zip(inputs["images"], inputs["img_masks"], strict=True)):
        torch.testing.assert_close(image, golden.expected(f"prepared_image_{i}"), rtol=0, atol=1e-6)
        assert torch.equal(mask, golden.expected(f"prepared_image_mask_{i}"))


def test_losses_and_every_gradient_agree(golden):
    policy = golden.policy()
    inputs = policy.prepare_inputs(golden.batch)
    without_padding = {name: value for name, value in inputs.items() if name != "is_pad"}
    elementwise = policy.model(**without_padding, **golden.draw)
    assert relative_error(elementwise, golden.expected("elementwise_loss")) < TOLERANCE

    outputs = policy(**inputs, **golden.draw)
    assert relative_error(outputs["per_sample_loss"], golden.expected("per_sample_loss")) < TOLERANCE
    assert relative_error(outputs["loss"], golden.expected("loss")) < TOLERANCE
    outputs["loss"].backward()
    assert trainable(policy) == golden.meta["trainable"]
    assert gradient_error(gradients(policy), golden.gradients) < TOLERANCE


def test_a_sampled_chunk_agrees(golden):
    chunk = golden.policy().predict_action_chunk(golden.batch, golden.draw["noise"])
    assert relative_error(chunk, golden.expected("action_chunk")) < TOLERANCE


def test_thirty_optimizer_steps_follow_the_same_trajectory(golden):
    policy, plan = golden.policy(), golden.trajectory
    inputs = policy.prepare_inputs(golden.batch)
    optimizer = adamw(policy, policy.config, lr=plan["peak_lr"])
    generator = torch.Generator().manual_seed(plan["seed"])
    # LeRobot's run began with the example's gradient still in place: its first step adds to it.
    policy(**inputs, **golden.draw)["loss"].backward()
    for expected in plan["steps"]:
        factor = lr_factor(
            expected["step"],
            warmup_steps=plan["warmup_steps"],
            decay_steps=plan["decay_steps"],
            total_steps=len(plan["steps"]),
            peak_lr=plan["peak_lr"],
            decay_lr=plan["decay_lr"],
        )
        optimizer.param_groups[0]["lr"] = plan["peak_lr"] * factor
        noise = torch.randn(golden.draw["noise"].shape, generator=generator)
        time = torch.rand(len(noise), generator=generator) * 0.999 + 0.001
        loss = policy(**inputs, noise=noise, time=time)["loss"]
        loss.backward()
        norm = clip_gradients(policy.parameters(), plan["grad_clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected["loss"], rel=TRAJECTORY_TOLERANCE)
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=TRAJECTORY_TOLERANCE)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected["lr"], rel=1e-9)


def test_compiled_layers_give_the_same_loss_and_gradients_under_the_same_names(golden):
    """Whole graphs: a break in one would cost on a GPU what compiling is for."""
    torch.compiler.reset()  # graphs of another test's policy would count against the limit
    policy = golden.policy()
    names = set(policy.state_dict())
    policy.compile_layers(backend="aot_eager", fullgraph=True)
    out = policy(**policy.prepare_inputs(golden.batch), **golden.draw)
    out["loss"].backward()
    assert relative_error(out["loss"], golden.expected("loss")) < TOLERANCE
    assert gradient_error(gradients(policy), golden.gradients) < TOLERANCE
    assert set(policy.state_dict()) == names


def test_task_text_becomes_the_same_tokens(golden):
    tokens, mask = tokenize_tasks(golden.meta["tasks"], GOLDEN / "tiny_vlm", max_length=48)
    assert torch.equal(torch.from_numpy(tokens), golden.batch["observation.language.tokens"])
    assert torch.equal(torch.from_numpy(mask), golden.batch["observation.language.attention_mask"])


def test_the_callers_tensors_stay_as_they_are(golden):
    policy = golden.policy()
    before = {name: column.clone() for name, column in golden.batch.items()}
    policy(**policy.prepare_inputs(golden.batch), **golden.draw)
    policy.predict_action_chunk(golden.batch, golden.draw["noise"])
    assert all(torch.equal(before[name], column) for name, column in golden.batch.items())


# From hub_configs/smolvlm2_500m_video_instruct.
PUBLISHED_VLM = {
    "model_type": "smolvlm",
    "scale_factor": 4,
    "text_config": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "model_type": "smolvlm_vision",
        "num_attention_heads": 12,
        "patch_size": 16,
    },
}


@pytest.fixture
def published(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_VLM))
    features = {
        "observation.images.camera1": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.state": {"type": "STATE", "shape": [6]},
    }
    config = SmolVLAConfig(
        input_features=features,
        output_features={"action": {"type": "ACTION", "shape": [6]}},
        num_expert_layers=0,
    )
    with torch.device("meta"):
        return SmolVLAPolicy(config, vlm_folder=tmp_path, allow_random_vlm=True)


def test_the_published_size_has_lerobots_500_names_and_shapes(published):
    expected = json.loads((GOLDEN / "smolvla_base_keys.json").read_text())
    assert len(expected) == 500
    assert {name: list(tensor.shape) for name, tensor in published.state_dict().items()} == expected
    assert [name for name, _ in published.named_parameters()] == list(expected)
    assert not list(published.buffers())
    assert sum(parameter.numel() for parameter in published.parameters()) == 450_046_176
    assert sum(p.numel() for p in published.parameters() if p.requires_grad) == 99_880_992
