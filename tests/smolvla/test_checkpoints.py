"""Folders in and out: strict, float32, self-contained."""

import json
import os
import shutil

import pytest
import torch
from parity import GOLDEN, TINY, Golden, camera, config, gradients, random_batch, random_policy, trainable
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, SmolVLMForConditionalGeneration

from smolvla import SmolVLAConfig, SmolVLAPolicy
from smolvla.image_features import frozen_tensors

STATS = {
    "observation.state": {
        "min": [-1.0] * 5,
        "max": [1.0] * 5,
        "mean": [0.1] * 5,
        "std": [0.5] * 5,
        "count": [7],
        "q01": [-0.9] * 5,
    },
    "action": {"min": [-1.0] * 4, "max": [1.0] * 4, "mean": [0.2] * 4, "std": [0.25] * 4, "count": [7]},
    "observation.images.left": {"mean": [[[0.5]], [[0.4]], [[0.3]]], "std": [[[0.1]]] * 3, "count": [7]},
}


def same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_round_trip_is_bit_identical_and_needs_no_other_folder(tmp_path):
    policy = random_policy(config())
    policy.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    loaded = SmolVLAPolicy.from_pretrained(tmp_path / "moved")
    assert same_weights(policy, loaded)
    assert loaded.config.vlm_model_name == "vlm"
    assert loaded.config.changed(vlm_model_name="tiny_vlm").to_dict() == policy.config.to_dict()
    assert loaded.vlm_source == str(tmp_path / "moved" / "vlm")
    batch, noise = random_batch(policy.config), torch.randn(3, 6, 8)
    assert torch.equal(loaded.predict_action_chunk(batch, noise), policy.predict_action_chunk(batch, noise))
    loaded.save_pretrained(tmp_path / "moved")  # onto itself
    assert same_weights(policy, SmolVLAPolicy.from_pretrained(tmp_path / "moved"))


def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path):
    random_policy(config()).save_pretrained(tmp_path, STATS)
    (tmp_path / "plain").touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_a_checkpoint_is_not_written_without_the_files_of_its_vlm(tmp_path):
    random_policy(config()).save_pretrained(tmp_path / "deleted")
    policy = SmolVLAPolicy.from_pretrained(tmp_path / "deleted")
    shutil.rmtree(tmp_path / "deleted")
    with pytest.raises(FileNotFoundError, match="deleted/vlm"):
        policy.save_pretrained(tmp_path / "saved")


def test_lerobots_file_keeps_every_tensor_and_field():
    golden = Golden("default")
    policy = golden.policy()
    tensors = load_file(golden.folder / "model.safetensors")
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert policy.config.to_dict() == json.loads((golden.folder / "config.json").read_text())


def test_compiled_names_and_bfloat16_files_become_plain_float32(tmp_path):
    policy = random_policy(config())
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(
        {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in rounded.items()},
        tmp_path / "model.safetensors",
    )
    loaded = SmolVLAPolicy.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert all(torch.equal(loaded.state_dict()[name], tensor.float()) for name, tensor in rounded.items())


def test_wrong_tensors_are_one_error_that_names_them_all(tmp_path):
    policy = random_policy(config())
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.state_proj.bias"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.action_in_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold") as error:
        SmolVLAPolicy.from_pretrained(tmp_path)
    for part in (
        "missing model.state_proj.bias",
        "unexpected model.extra",
        "model.action_in_proj.weight has shape [2, 2], not [48, 8]",
    ):
        assert part in str(error.value)


def test_weights_that_were_cut_off_are_named(tmp_path):
    random_policy(config()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: "):
        SmolVLAPolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: "):
        dict(frozen_tensors(tmp_path))


def test_load_state_dict_is_strict_and_knows_nothing_of_joint_layers():
    policy = random_policy(config())
    tensors = dict(random_policy(config(), seed=5).state_dict())
    assert not any("joint_layers" in name for name in tensors)
    assert not any(policy.load_state_dict(tensors))
    del tensors["model.vlm_with_expert.lm_expert.norm.weight"]
    with pytest.raises(RuntimeError, match=r"lm_expert\.norm\.weight") as error:
        policy.load_state_dict(tensors)
    assert "joint_layers" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        SmolVLAPolicy.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        SmolVLAPolicy.from_pretrained(tmp_path)
    random_policy(config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        SmolVLAPolicy.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vlm")
    with pytest.raises(ValueError, match="vlm_model_name 'vlm' is neither a folder"):
        SmolVLAConfig.from_pretrained(tmp_path).vlm_source()


def test_a_hub_id_out_of_reach_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"nobody/nothing.*vlm_model_name"):
        SmolVLAPolicy(config(vlm_model_name="nobody/nothing"), allow_random_vlm=True)


def test_vlm_weights_come_from_the_vlm_folder(tmp_path):
    with pytest.raises(OSError, match=r"load_vlm_weights is true, but .*tiny_vlm"):
        SmolVLAPolicy(config(load_vlm_weights=True))
    source = random_policy(config()).model.vlm_with_expert.vlm
    shutil.copytree(GOLDEN / "tiny_vlm", tmp_path, dirs_exist_ok=True)
    whole = SmolVLMForConditionalGeneration(source.config)
    whole.load_state_dict(source.state_dict())
    save_file(whole.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = SmolVLAPolicy(config(load_vlm_weights=True, num_vlm_layers=2), vlm_folder=tmp_path)
    loaded = policy.model.vlm_with_expert.vlm.state_dict()
    assert len(policy.model.vlm_with_expert.vlm.model.text_model.layers) == 2
    assert all(torch.equal(source.state_dict()[name], tensor) for name, tensor in loaded.items())
    policy.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved" / "vlm").glob("*.safetensors"))
    assert same_weights(policy, SmolVLAPolicy.from_pretrained(tmp_path / "saved"))


def test_statistics_become_lerobots_processor_files(tmp_path):
    random_policy(config(device="cpu")).save_pretrained(tmp_path, STATS)
    before = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    after = json.loads((tmp_path / "policy_postprocessor.json").read_text())
    assert [step["registry_name"] for step in before["steps"]] == [
        "rename_observations_processor",
        "to_batch_processor",
        "smolvla_new_line_processor",
        "tokenizer_processor",
        "device_processor",
        "normalizer_processor",
    ]
    assert [step["registry_name"] for step in after["steps"]] == [
        "unnormalizer_processor",
        "device_processor",
    ]
    tokenizer = before["steps"][3]
    assert (tmp_path / tokenizer["artifacts"]["tokenizer_name"] / "tokenizer.json").is_file()
    assert list(before["steps"][5]["config"]["features"]) == [
        "observation.images.left",
        "observation.images.right",
        "observation.state",
        "action",
    ]
    assert list(after["steps"][0]["config"]["features"]) == ["action"]
    files = [
        "policy_preprocessor_step_5_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    ]
    assert [before["steps"][5]["state_file"], after["steps"][0]["state_file"]] == files
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {f"{name}.{which}" for name, values in STATS.items() for which in values}
        assert tensors["action.count"].shape == (1,)
        assert tensors["observation.images.left.mean"].shape == (3, 1, 1)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_statistics_that_a_feature_needs_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="MEAN_STD needs the statistic 'mean' of 'action'"):
        random_policy(config()).save_pretrained(tmp_path, {"observation.state": STATS["observation.state"]})


def tiny_config():
    return SmolVLAConfig.from_pretrained(TINY).with_features(
        {"observation.images.corner": camera(96, 96), "observation.state": {"type": "STATE", "shape": [4]}},
        {"action": {"type": "ACTION", "shape": [4]}},
    )


def test_the_tiny_policy_is_reproducible_from_a_seed_and_trains():
    def built():
        torch.manual_seed(3)
        return SmolVLAPolicy(tiny_config())

    policy = built()
    assert same_weights(policy, built())
    assert 3.5e6 < sum(parameter.numel() for parameter in policy.parameters()) < 4.5e6
    batch = random_batch(policy.config, batch=2)
    policy(**policy.prepare_inputs(batch))["loss"].backward()
    assert set(gradients(policy)) == set(trainable(policy))
    assert all(gradient.isfinite().all() for gradient in gradients(policy).values())


def test_the_tiny_tokenizer_has_the_real_special_tokens():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "vlm")
    special = {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<global-img>": 508,
        "<fake_token_around_image>": 509,
        "<image>": 510,
        "<end_of_utterance>": 511,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.image_token == "<image>"
    text = "Grüße, pick up the red cube <image>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "train_expert_only and freeze_vision_encoder true"),
        ({"train_expert_only": False}, "freeze_vision_encoder true"),
        ({"freeze_vision_encoder": False}, "train_expert_only true"),
    ],
)
def test_a_frozen_vlm_with_random_weights_is_refused_unless_it_is_asked_for(values, named):
    with pytest.raises(ValueError, match=f"{named}: the VLM would keep random weights"):
        SmolVLAPolicy(config(**values))
    SmolVLAPolicy(config(**values), allow_random_vlm=True)
    SmolVLAPolicy(config(train_expert_only=False, freeze_vision_encoder=False))
