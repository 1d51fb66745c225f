"""IL-Studio's interface, from this package and from a folder of its own tree."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import GOLDEN, config, random_policy

import smolvla

ROOT = Path(__file__).parents[2]
YAML = ROOT / "configs" / "policy" / "smolvla.yaml"
TINY = {
    "vlm_model_name": str(GOLDEN / "tiny_vlm"),
    "load_vlm_weights": False,
    "allow_random_vlm": True,
    "resize_imgs_with_padding": [64, 64],
    "num_vlm_layers": 2,
    "num_steps": 2,
}
STATS = {
    "observation.state": {"mean": [0.0] * 5, "std": [1.0] * 5},
    "action": {"mean": [10.0] * 4, "std": [1.0] * 4},
}


def arguments(**values):
    robot = {"camera_names": ["primary", "wrist"], "state_dim": 3, "action_dim": 2, "chunk_size": 7}
    return SimpleNamespace(**robot, model_args=TINY, device="cpu", **values)


def observation():
    return {
        "image": np.zeros((2, 2, 3, 40, 60), dtype=np.uint8),
        "state": np.zeros((2, 3), dtype=np.float32),
        "raw_lang": ["open it", "push"],
    }


def test_the_yaml_file_names_what_the_module_has():
    description = smolvla.PolicyLoader().load_policy_config(YAML)
    assert description.name == "smolvla"
    module = smolvla.PolicyLoader().load_module(description)
    for name in ("config_class", "model_class", "data_processor", "data_collator", "trainer_class"):
        assert hasattr(module, getattr(description, name))
    assert smolvla.PolicyLoader(YAML.parent).load_policy_config("smolvla") == description
    assert smolvla.PolicyLoader().get_trainer_class(YAML) is smolvla.SmolVLATrainer


def test_a_yaml_file_with_a_missing_or_unknown_key_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text(YAML.read_text().replace("model_class:", "modell_class:"))
    with pytest.raises(ValueError, match=r"bad\.yaml has .*modell_class"):
        smolvla.PolicyLoader(tmp_path).load_policy_config("bad")


def test_a_policy_for_il_studios_task_trains_and_acts():
    args = arguments()
    components = smolvla.PolicyLoader().load_model(YAML, args)
    assert args.model_args is TINY
    model = components["model"]
    assert model.config.camera_names == ["observation.images.primary", "observation.images.wrist"]
    assert model.select_action(observation()).shape == (2, 7, 2)

    process = smolvla.get_data_processor(args, components)
    collate = smolvla.get_data_collator(args, components)
    sample = {name: value[0] for name, value in observation().items()}
    sample |= {"action": np.zeros((7, 2), dtype=np.float32), "is_pad": np.zeros(7, dtype=bool)}
    batch = collate([process(sample), process(sample | {"raw_lang": "a longer task"})])
    assert model(**model.prepare_inputs(batch))["loss"].isfinite()


def test_a_checkpoint_brings_its_own_values_and_gives_real_units(tmp_path):
    policy = random_policy(config())
    policy.save_pretrained(tmp_path, STATS)
    components = smolvla.PolicyLoader().load_model(YAML, SimpleNamespace(model_name_or_path=str(tmp_path)))
    loaded = components["model"]
    assert loaded.config.normalization_mapping["ACTION"] == "MEAN_STD"
    obs = observation() | {"state": np.zeros((2, 5), dtype=np.float32)}
    noise = torch.zeros(2, 6, 8)
    raw = loaded.predict_action_chunk(loaded.processor.observations(obs), noise)
    torch.testing.assert_close(loaded.select_action(obs, noise), raw + 10)
    changed = smolvla.load_model(
        SimpleNamespace(model_name_or_path=str(tmp_path), model_args={"n_action_steps": 1})
    )
    assert changed["config"].n_action_steps == 1


def test_what_was_read_and_camera_names_in_il_studios_text_form_are_understood():
    loader = smolvla.PolicyLoader()
    args = arguments()
    args.camera_names = "['primary', 'wrist']"
    components = loader.load_model(loader.load_policy_config(YAML), args)
    names = ["observation.images.primary", "observation.images.wrist"]
    assert components["config"].camera_names == names


def test_settings_that_are_unknown_or_missing_are_named():
    with pytest.raises(ValueError, match=r"unknown settings \['chunk_sise'\]"):
        smolvla.load_model(SimpleNamespace(model_args={"chunk_sise": 3}))
    with pytest.raises(ValueError, match=r"lacks \['camera_names', 'state_dim', 'action_dim'\]"):
        smolvla.load_model(SimpleNamespace(model_args=TINY))


ELSEWHERE = """
import importlib, sys
from types import SimpleNamespace
import numpy as np
policy = importlib.import_module("policy.smolvla")
tiny = {tiny!r}
args = SimpleNamespace(model_args=tiny | dict(camera_names=["a"], state_dim=3, action_dim=2, chunk_size=4))
model = policy.PolicyLoader().load_model({yaml!r}, args)["model"]
obs = dict(image=np.zeros((1, 1, 3, 8, 8), np.uint8), state=np.zeros((1, 3)), raw_lang=["go"])
assert model.select_action(obs).shape == (1, 4, 2)
assert type(model).__module__ == "policy.smolvla.modeling"
assert policy.SmolVLATrainer.__module__ == "policy.smolvla.trainer"
assert "smolvla" not in sys.modules
"""


def test_the_folder_works_as_policy_smolvla_in_another_tree(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "smolvla").symlink_to(ROOT / "smolvla")
    yaml = tmp_path / "smolvla.yaml"
    yaml.write_text(YAML.read_text().replace("module_path: smolvla", "module_path: policy.smolvla"))
    script = ELSEWHERE.format(tiny=TINY, yaml=str(yaml))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=100)
