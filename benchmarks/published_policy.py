"""A policy of the published size with random weights, and a batch for it: what the benchmarks run on."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvla import SmolVLAConfig, SmolVLAPolicy

# SmolVLM2-500M-Video-Instruct, as far as its sizes go.
VLM = {
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
STATE_DIM, ACTION_DIM = 6, 6
NUM_TOKENS = 48


def build_policy(*, num_cameras: int, tiny: bool, all_words: bool = False) -> SmolVLAPolicy:
    """Random weights in float32; `tiny` cuts the VLM to 2 layers of each kind and images of 128 pixels.

    With `all_words` a tiny one still has the published text width and vocabulary.
    """
    vlm = json.loads(json.dumps(VLM))
    side = 512
    if tiny:
        side = vlm["vision_config"]["image_size"] = 128
        vlm["vision_config"] |= {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        vlm["vision_config"]["intermediate_size"] = 96
        vlm["text_config"]["num_hidden_layers"] = 2
    if tiny and not all_words:
        vlm["text_config"] |= {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 256}
        vlm["text_config"] |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    cameras = {
        f"observation.images.camera{i}": {"type": "VISUAL", "shape": [3, 480, 640]}
        for i in range(num_cameras)
    }
    config = SmolVLAConfig(
        input_features=cameras | {"observation.state": {"type": "STATE", "shape": [STATE_DIM]}},
        output_features={"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
        resize_imgs_with_padding=[side, side],
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(vlm))
        torch.manual_seed(0)
        return SmolVLAPolicy(config, vlm_folder=folder, allow_random_vlm=True)


def build_columns(policy: SmolVLAPolicy, *, batch: int) -> dict[str, Tensor]:
    """A batch as the stream hands it to a worker."""
    config = policy.config
    vocabulary = policy.model.vlm_with_expert.vlm.config.text_config.vocab_size
    generator = torch.Generator().manual_seed(1)
    columns = {
        name: torch.randint(0, 256, (batch, 3, 480, 640), generator=generator, dtype=torch.uint8)
        for name in config.camera_names
    }
    return columns | {
        "observation.state": torch.randn(batch, STATE_DIM, generator=generator),
        "action": torch.randn(batch, config.chunk_size, ACTION_DIM, generator=generator),
        "action_is_pad": torch.zeros(batch, config.chunk_size, dtype=torch.bool),
        "observation.language.tokens": torch.randint(3, vocabulary, (batch, NUM_TOKENS), generator=generator),
        "observation.language.attention_mask": torch.arange(NUM_TOKENS).expand(batch, -1) < NUM_TOKENS // 2,
    }


def build_inputs(policy: SmolVLAPolicy, *, batch: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs of `forward`, noise and times."""
    config, generator = policy.config, torch.Generator().manual_seed(2)
    noise = torch.randn(batch, config.chunk_size, config.max_action_dim, generator=generator)
    inputs = policy.prepare_inputs(build_columns(policy, batch=batch))
    return inputs, noise, torch.rand(batch, generator=generator) * 0.9 + 0.05
