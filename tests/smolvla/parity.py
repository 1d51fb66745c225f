"""What the model tests share: golden files, random policies of any configuration, distances of tensors."""

import json
from pathlib import Path

import torch
from naive import Naive
from safetensors.torch import load_file

from smolvla import SmolVLAConfig, SmolVLAPolicy

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Path(__file__).parents[2] / "configs" / "policy" / "tiny"
GRADIENT = "expected/grad/"


def relative_error(found, expected):
    """Largest difference over the largest expected magnitude."""
    return ((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max()).item()


def gradient_error(found, expected):
    """Worst relative error over all gradients.

    A key bias shifts all scores of a query alike, so its gradient is zero but for rounding; it is measured
    against the gradient of the weight beside it.
    """
    assert set(found) == set(expected)
    scale = {name: expected[name.replace("k_proj.bias", "k_proj.weight")].abs().max() for name in expected}
    return max(((found[name] - expected[name]).abs().max() / scale[name]).item() for name in expected)


def gradients(policy):
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def trainable(policy):
    return [name for name, p in policy.named_parameters() if p.requires_grad]


class Golden:
    """A checkpoint of LeRobot with a batch and the numbers that LeRobot computed."""

    def __init__(self, name):
        self.folder = GOLDEN / name
        self.tensors = load_file(self.folder / "example.safetensors")
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.trajectory = json.loads((self.folder / "trajectory.json").read_text())
        self.batch = {k.removeprefix("batch/"): v for k, v in self.tensors.items() if k.startswith("batch/")}
        self.draw = {"noise": self.tensors["noise"], "time": self.tensors["time"]}
        self.gradients = {
            k.removeprefix(GRADIENT): v for k, v in self.tensors.items() if k.startswith(GRADIENT)
        }

    def policy(self):
        return SmolVLAPolicy.from_pretrained(self.folder)

    def expected(self, name):
        return self.tensors[f"expected/{name}"]


def camera(height=60, width=80):
    return {"type": "VISUAL", "shape": [3, height, width]}


def config(*, cameras=("left", "right"), state_dim=5, action_dim=4, **values):
    """A small configuration over golden's VLM."""
    inputs = {f"observation.images.{name}": camera() for name in cameras}
    settings = {
        "chunk_size": 6,
        "n_action_steps": 3,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "resize_imgs_with_padding": [64, 64],
        "num_vlm_layers": 4,
        "num_steps": 4,
        "vlm_model_name": "tiny_vlm",
        "name_or_path": str(GOLDEN),
    }
    return SmolVLAConfig(
        input_features=inputs | {"observation.state": {"type": "STATE", "shape": [state_dim]}},
        output_features={"action": {"type": "ACTION", "shape": [action_dim]}},
        **settings | values,
    )


def random_policy(settings, seed=0):
    """Every parameter matters: none keeps the zeros and ones that it is born with."""
    torch.manual_seed(seed)
    policy = SmolVLAPolicy(settings, allow_random_vlm=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def random_batch(settings, *, cameras=None, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    columns = {
        name: torch.randint(0, 256, (batch, 3, 60, 80), generator=generator, dtype=torch.uint8)
        for name in (settings.camera_names if cameras is None else cameras)
    }
    lengths = torch.tensor([9, 3, 6])[:batch]
    return columns | {
        "observation.state": normal(batch, settings.state_dim),
        "action": normal(batch, settings.chunk_size, settings.action_dim),
        "action_is_pad": torch.arange(settings.chunk_size) >= torch.tensor([[6], [2], [4]])[:batch],
        "observation.language.tokens": torch.randint(3, 250, (batch, 9), generator=generator),
        "observation.language.attention_mask": torch.arange(9) < lengths[:, None],
    }


def random_draw(settings, batch=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, settings.chunk_size, settings.max_action_dim, generator=generator)
    return {"noise": noise, "time": torch.rand(batch, generator=generator) * 0.999 + 0.001}


def naive_twin(policy):
    """The slow implementation over copies of the policy's weights, each with a gradient."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in policy.state_dict().items()}
    special = (321, 320) if policy.config.add_image_special_tokens else None  # ids of golden's tokenizer
    return Naive(weights, policy.config, policy.model.vlm_with_expert.vlm.config, special)
