"""What the frozen part computes of images, once: packing, and the name of the weights that computed it.

A camera's features are the tokens that vision tower and connector make of its images, see
`SmolVLAPolicy.image_features`. Packed they are, by dtype of the array:

    float32  (B, tokens, D)      as they are
    int16    (B, tokens, D)      the bits of bfloat16, which numpy does not know
    int8     (B, tokens, D + 4)  of each token D levels, then the 4 bytes of its float32 scale

Shape letters: B batch, D width of the VLM.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .configuration import SmolVLAConfig, checkpoint_file
from .features import SCALE_BYTES, FeatureDtype
from .tensor_files import naming_damage

LEVELS = 127
VLM = "model.vlm_with_expert.vlm.model."
FROZEN = (f"{VLM}vision_model.", f"{VLM}connector.")
"""Names of the tensors that features depend on."""
VISION_SETTINGS = ("patch_size", "image_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


def packed(features: Tensor, dtype: FeatureDtype) -> Tensor:
    """Features (B, tokens, D) as they are stored."""
    if dtype == "float32":
        return features.float().contiguous()
    if dtype == "bfloat16":
        return features.bfloat16().contiguous().view(torch.int16)
    features = features.float()
    scale = features.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    levels = (features / scale).round().to(torch.int8)
    return torch.cat((levels, scale.contiguous().view(torch.int8)), dim=-1)


def unpacked(name: str, stored: Tensor, *, width: int) -> Tensor:
    """Features (B, tokens, D) in float32, of D = `width`.

    Raises:
        ValueError: the array is no packing of such features; `name` is what the message calls it.
    """
    wanted = width + SCALE_BYTES if stored.dtype == torch.int8 else width
    if stored.ndim != 3 or stored.shape[-1] != wanted:
        raise ValueError(f"{name!r} has shape {tuple(stored.shape)}; it must be (B, tokens, {wanted})")
    if stored.is_floating_point():
        return stored.float()
    if stored.dtype == torch.int16:
        return stored.view(torch.bfloat16).float()
    if stored.dtype == torch.int8:
        scale = stored[..., width:].contiguous().view(torch.float32)
        return stored[..., :width].float() * scale
    raise ValueError(f"{name!r} has dtype {stored.dtype}; features are float, int16 or int8")


def feature_shape(config: SmolVLAConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(tokens, D) of an image of (height, width) pixels.

    Raises:
        OSError: the VLM's configuration cannot be read.
    """
    from .smolvlm_with_expert import smolvlm_config

    vlm: Any = smolvlm_config(config.vlm_source(), num_layers=config.num_vlm_layers)
    height, width = config.resize_imgs_with_padding or image_size
    patches = (height // vlm.vision_config.patch_size) * (width // vlm.vision_config.patch_size)
    return patches // vlm.scale_factor**2, vlm.text_config.hidden_size


def trained_part(config: SmolVLAConfig) -> str | None:
    """What of the part that features come from is trained, so that they would be those of other weights."""
    if config.train_expert_only:
        return None
    if config.freeze_vision_encoder:
        return "the connector behind the vision tower trains (train_expert_only is false)"
    return "the vision tower trains (train_expert_only and freeze_vision_encoder are false)"


def weights_digest(folder: str | Path, config: SmolVLAConfig) -> str:
    """SHA-256 of the weights of a checkpoint that features depend on, in float32, and of their settings.

    Raises:
        FileNotFoundError: the folder has no weights.
        OSError: the VLM's configuration cannot be read.
    """
    from .smolvlm_with_expert import smolvlm_config  # and with it the model's code

    vlm: Any = smolvlm_config(config.vlm_source(), num_layers=config.num_vlm_layers)
    settings = {name: getattr(vlm.vision_config, name) for name in VISION_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings | {"scale_factor": vlm.scale_factor}).encode())
    for name, tensor in frozen_tensors(folder):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy())  # pyright: ignore[reportArgumentType] - an array is a buffer
    return digest.hexdigest()


def frozen_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value of every tensor that features depend on, by name.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: they cannot be read.
    """
    path = checkpoint_file(folder, "model.safetensors")
    with naming_damage(path), safe_open(path, framework="pt") as file:
        stored = {name.replace("_orig_mod.", ""): name for name in file.keys()}  # noqa: SIM118 -- no mapping
        for name in sorted(stored):
            if name.startswith(FROZEN):
                yield name, file.get_tensor(stored[name]).float().contiguous()
