"""What a configuration accepts, and what it says when it does not."""

import json
import pickle

import pytest
import torch
from parity import GOLDEN, TINY, camera, config, random_batch, random_policy

from smolvla import SmolVLAConfig, SmolVLAPolicy

STATE = {"observation.state": {"type": "STATE", "shape": [4]}}
ACTION = {"action": {"type": "ACTION", "shape": [4]}}

# hub_configs/smolvla_ported_thanos_picking: an older file, without the fields that came later.
PUBLISHED = {
    "type": "smolvla",
    "n_obs_steps": 1,
    "input_features": {**STATE, "observation.images.front": camera(480, 640)},
    "output_features": ACTION,
    "device": "mps",
    "use_amp": False,
    "push_to_hub": True,
    "load_vlm_weights": True,
    "prefix_length": 0,
    "pad_language_to": "max_length",
    "num_expert_layers": 0,
}


def test_values_come_from_the_file_and_later_fields_from_lerobots_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    read = SmolVLAConfig.from_pretrained(tmp_path)
    assert {name: read.to_dict()[name] for name in PUBLISHED} == PUBLISHED
    assert (read.chunk_size, read.num_vlm_layers, read.compile_mode) == (50, 16, "max-autotune")
    read.check_features()
    read.save_pretrained(tmp_path / "again")
    assert SmolVLAConfig.from_pretrained(tmp_path / "again").to_dict() == read.to_dict()


@pytest.mark.parametrize("name", ["default", "aloha"])
def test_lerobots_own_file_is_written_back_word_for_word(name, tmp_path):
    SmolVLAConfig.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert json.loads(written) == json.loads((GOLDEN / name / "config.json").read_text())
    assert list(json.loads(written)) == list(json.loads((GOLDEN / name / "config.json").read_text()))


def test_an_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="no field 'chunk_sise'; did you mean 'chunk_size'"):
        SmolVLAConfig.from_dict({"type": "smolvla", "chunk_sise": 3})
    with pytest.raises(ValueError, match=r"no field 'xyz'$"):
        SmolVLAConfig.from_dict({"type": "smolvla", "xyz": 3})


def test_another_policy_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"type": "pi0"}')
    with pytest.raises(ValueError, match="type 'pi0' is not 'smolvla'"):
        SmolVLAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"n_action_steps": 51}, "n_action_steps is 51; it must be at most chunk_size 50"),
        ({"attention_mode": "both"}, "attention_mode is 'both'"),
        ({"pad_language_to": "left"}, "pad_language_to is 'left'"),
        ({"resize_imgs_with_padding": [512]}, r"resize_imgs_with_padding is \[512\]"),
        ({"normalization_mapping": {"STATE": "STD"}}, r"normalization_mapping\['STATE'\] is 'STD'"),
        ({"use_delta_joint_actions_aloha": True}, "use_delta_joint_actions_aloha is True"),
        ({"n_obs_steps": 0}, "n_obs_steps is 0"),
        ({"min_period": 5.0}, "min_period is 5.0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        SmolVLAConfig(**values)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (STATE, ACTION, "has no camera"),
        ({"observation.images.a": camera()}, ACTION, "needs 'observation.state' of type STATE"),
        ({"observation.images.a": camera()} | STATE, {}, "needs 'action' of type ACTION"),
        ({"camera": camera()} | STATE, ACTION, "a camera's name starts with 'observation.image'"),
        ({"observation.images.a": {"type": "VISUAL", "shape": [480, 640, 3]}} | STATE, ACTION, "a camera is"),
        ({"observation.images.a": {"type": "IMAGE", "shape": [3, 4, 4]}} | STATE, ACTION, "has type 'IMAGE'"),
        ({"observation.images.a": {"shape": [3, 4, 4]}} | STATE, ACTION, "it must be"),
        (
            {"observation.images.a": camera(), "observation.state": {"type": "STATE", "shape": [33]}},
            ACTION,
            r"shape \[33\]; it must be one number up to max_state_dim 32",
        ),
        (
            {"observation.images.a": camera()} | STATE,
            {"action": {"type": "ACTION", "shape": [0]}},
            "positive whole",
        ),
    ],
)
def test_features_that_no_policy_can_be_built_for_are_refused(inputs, outputs, message):
    with pytest.raises(ValueError, match=message):
        SmolVLAConfig().with_features(inputs, outputs)


def test_a_template_without_features_can_be_read_but_not_built():
    template = SmolVLAConfig.from_pretrained(TINY)
    assert template.input_features == {}
    with pytest.raises(ValueError, match="has no camera"):
        SmolVLAPolicy(template)
    filled = template.with_features(
        {"observation.images.b": camera(), "observation.images.a": camera()} | STATE, ACTION
    )
    assert filled.camera_names == ["observation.images.b", "observation.images.a"]
    assert (filled.state_dim, filled.action_dim) == (4, 4)
    assert filled.vlm_source() == str(TINY / "vlm")
    assert template.input_features == {}


def test_aloha_needs_fourteen_joints():
    with pytest.raises(ValueError, match=r"adapt_to_pi_aloha needs 14 joints; 'observation\.state' has 4"):
        SmolVLAConfig(adapt_to_pi_aloha=True).with_features(
            {"observation.images.a": camera()} | STATE, ACTION
        )


def test_an_image_box_that_the_vlm_cannot_cut_is_refused():
    with pytest.raises(ValueError, match=r"resize_imgs_with_padding is \[64, 48\]; .* a multiple of 32"):
        random_policy(config(resize_imgs_with_padding=[64, 48]))


def test_a_configuration_survives_pickling():
    settings = config()
    again = pickle.loads(pickle.dumps(settings))
    assert again.to_dict() == settings.to_dict()
    assert again.vlm_source() == settings.vlm_source()


@pytest.fixture(scope="module")
def policy():
    return random_policy(config())


def batch_with(policy, **columns):
    return random_batch(policy.config) | {name.replace("__", "."): column for name, column in columns.items()}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"observation__images__left": torch.full((3, 3, 8, 8), 1.5)},
            r"values in \[1.5, 1.5\]; a float image lies in",
        ),
        ({"observation__images__left": torch.full((3, 3, 8, 8), -0.1)}, "a float image lies in"),
        ({"observation__images__left": torch.full((3, 3, 8, 8), torch.nan)}, "a float image lies in"),
        ({"observation__images__left": torch.zeros(3, 3, 8, 8, dtype=torch.int64)}, "has dtype torch.int64"),
        ({"observation__images__left": torch.zeros(3, 8, 8, 3)}, "an image batch is"),
        ({"observation__state": torch.zeros(3, 9)}, "has 9 numbers; this policy holds at most 8"),
        ({"action": torch.zeros(3, 5, 4)}, r"shape \(3, 5, 4\); it must be \(B, 6, 4\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_column(policy, columns, message):
    with pytest.raises(ValueError, match=message):
        policy.prepare_inputs(batch_with(policy, **columns))


@pytest.mark.parametrize("name", ["observation.state", "observation.language.tokens"])
def test_a_missing_column_is_named(policy, name):
    batch = random_batch(policy.config)
    del batch[name]
    with pytest.raises(ValueError, match=f"the batch has no '{name}'"):
        policy.prepare_inputs(batch)


def test_no_camera_at_all_is_an_error(policy):
    with pytest.raises(ValueError, match="the batch has none of the cameras"):
        policy.prepare_inputs(random_batch(policy.config, cameras=[]))


def test_float_and_uint8_images_give_the_same_inputs_by_dtype(policy):
    batch = random_batch(policy.config)
    scaled = {name: batch[name].float() / 255 for name in policy.config.camera_names}
    dark = {name: torch.ones_like(batch[name]) for name in policy.config.camera_names}
    for left, right in zip(
        policy.prepare_inputs(batch)["images"], policy.prepare_inputs(batch | scaled)["images"], strict=True
    ):
        torch.testing.assert_close(left, right)
    # uint8 1 is nearly black, float 1 is white
    assert policy.prepare_inputs(batch | dark)["images"][0].max() < -0.99


def test_a_history_of_observations_counts_by_its_last_moment(policy):
    batch = random_batch(policy.config)
    longer = {
        name: torch.stack((torch.zeros_like(batch[name]), batch[name]), dim=1)
        for name in (*policy.config.camera_names, "observation.state")
    }
    expected, found = policy.prepare_inputs(batch), policy.prepare_inputs(batch | longer)
    assert torch.equal(found["state"], expected["state"])
    assert torch.equal(found["images"][1], expected["images"][1])
