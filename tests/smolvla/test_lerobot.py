"""LeRobot itself loads what we save, acts the same, and saves what we load; needs LEROBOT_PYTHON."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from parity import Golden, relative_error
from safetensors.torch import load_file, save_file

from smolvla import SmolVLAPolicy
from smolvla.lora import LoRA, add_adapters, save_adapter

STATS = {
    "observation.state": {"mean": [0.3] * 7, "std": [1.5] * 7},
    "action": {"mean": [2.0, -1.0, 0.5, 0.0, 1.0, 3.0, -2.0], "std": [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0]},
}
TASKS = ["pick up the cube", "open the drawer\n", "push"]
# Runs in LeRobot's Python; argv: our checkpoint, the observations, the answer, LeRobot's checkpoint.
SCRIPT = """
import json, sys
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

ours, observations, answer, theirs = sys.argv[1:]
policy = SmolVLAPolicy.from_pretrained(ours).eval()
before, after = make_pre_post_processors(policy.config, pretrained_path=ours)
tensors = load_file(observations)
noise = tensors.pop("noise")
batch = {n: t.float() / 255 if t.dtype == torch.uint8 else t for n, t in tensors.items()}
batch["task"] = json.loads(sys.stdin.read())
save_file({"chunk": after(policy.predict_action_chunk(before(batch), noise=noise)).contiguous()}, answer)
policy.save_pretrained(theirs)
before.save_pretrained(theirs)
after.save_pretrained(theirs)
"""


@pytest.mark.skipif("LEROBOT_PYTHON" not in os.environ, reason="LEROBOT_PYTHON names no Python with lerobot")
def test_lerobot_acts_like_us_on_our_checkpoint_and_we_load_what_it_saves(tmp_path):
    golden = Golden("default")
    golden.policy().save_pretrained(tmp_path / "ours", stats=STATS)
    policy = SmolVLAPolicy.from_pretrained(tmp_path / "ours").eval()
    batch = observations(golden)
    expected = policy.predict_actions(batch | {"task": TASKS}, golden.draw["noise"])

    answer = answer_of_lerobot(SCRIPT, "ours", golden, vlm_in="ours", output="theirs", folder=tmp_path)
    assert relative_error(answer, expected) < 1e-5

    shutil.copytree(tmp_path / "ours/vlm", tmp_path / "theirs/vlm")
    returned = SmolVLAPolicy.from_pretrained(tmp_path / "theirs").eval()
    weights = policy.state_dict()
    assert returned.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in returned.state_dict().items())
    for feature, values in STATS.items():
        for name, value in values.items():
            torch.testing.assert_close(
                torch.as_tensor(returned.processor.stats[feature][name]), torch.tensor(value)
            )
    again = returned.predict_actions(batch | {"task": TASKS}, golden.draw["noise"])
    assert relative_error(again, expected) < 1e-5


def observations(golden):
    given = ("observation.images.", "observation.state")
    return {name: tensor.contiguous() for name, tensor in golden.batch.items() if name.startswith(given)}


def answer_of_lerobot(script, given, golden, *, vlm_in, output, folder):
    """Run a script in LeRobot's Python, which gets the folder `given`, and return its chunk."""
    save_file(observations(golden) | {"noise": golden.draw["noise"]}, folder / "observations")
    subprocess.run(
        [
            os.environ["LEROBOT_PYTHON"],
            "-c",
            script,
            *(str(folder / name) for name in (given, "observations", "answer", output)),
        ],
        input=json.dumps(TASKS),
        text=True,
        check=True,
        timeout=300,
        cwd=folder / vlm_in,  # LeRobot looks for a VLM that is a folder, vlm/, from where it runs
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    return load_file(folder / "answer")["chunk"]


# argv: our adapter, the observations, the answer, a folder for LeRobot's description of a dataset.
ADAPTER_SCRIPT = """
import json, sys
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file, save_file

adapter, observations, answer, folder = sys.argv[1:]
config = PreTrainedConfig.from_pretrained(adapter)
config.pretrained_path = adapter
features = {
    name: {"dtype": "image" if len(f.shape) == 3 else "float32", "shape": f.shape, "names": None}
    for name, f in (config.input_features | config.output_features).items()
}
for feature in features.values():
    if feature["dtype"] == "image":
        feature["names"] = ["channels", "height", "width"]
data = LeRobotDatasetMetadata.create("toy", 10, features, root=folder, use_videos=False)
policy = make_policy(config, ds_meta=data).eval()
assert type(policy).__name__ == "PeftModel"
before, after = make_pre_post_processors(config, pretrained_path=adapter)
tensors = load_file(observations)
noise = tensors.pop("noise")
batch = {n: t.float() / 255 if t.dtype == torch.uint8 else t for n, t in tensors.items()}
batch["task"] = json.loads(sys.stdin.read())
chunk = policy.predict_action_chunk(before(batch), noise=noise)
save_file({"chunk": after(chunk).contiguous()}, answer)
"""


@pytest.mark.skipif("LEROBOT_PYTHON" not in os.environ, reason="LEROBOT_PYTHON names no Python with lerobot")
@pytest.mark.parametrize("fully", [(), ("action_out_proj",)])
def test_lerobot_puts_our_adapter_on_its_base_and_acts_like_us(fully, tmp_path):
    golden = Golden("default")
    golden.policy().save_pretrained(tmp_path / "base", stats=STATS)
    policy = SmolVLAPolicy.from_pretrained(tmp_path / "base").eval()
    add_adapters(policy, LoRA(rank=4, alpha=8.0, train_fully=fully), seed=1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    save_adapter(policy, tmp_path / "adapter", base=tmp_path / "base", state_dict=None)
    expected = policy.predict_actions(observations(golden) | {"task": TASKS}, golden.draw["noise"])

    answer = answer_of_lerobot(
        ADAPTER_SCRIPT, "adapter", golden, vlm_in="base", output="described", folder=tmp_path
    )
    assert relative_error(answer, expected) < 1e-5
