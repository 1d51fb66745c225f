"""What a training step costs by the sizes of a policy: FLOPs and bytes of each part, for one sample.

python benchmarks/step_cost.py [--cameras 2] [--words 48] [--tiny]

Nothing is timed: the numbers follow from the config, and tests/smolvla/test_step_cost.py compares them with
what torch's FLOP counter counts. Matrix products and attention count, two FLOPs for each multiplication; all
else is a hundredth of them. The last line is one JSON object.

Shape letters as in smolvla/smolvlm_with_expert.py: P prefix tokens, H actions, D and E widths.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from published_policy import build_policy

from smolvla import SmolVLAPolicy


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one sample, forward."""

    tower: int
    """Vision tower and connector, all cameras."""
    prefix: int
    """Images and language through the frozen layers."""
    state: int
    """The state token through the same layers."""
    expert: int
    """The actions, with what of the memory the expert projects."""

    @property
    def forward(self) -> int:
        """All of it."""
        return self.tower + self.prefix + self.state + self.expert

    @property
    def step_from_features(self) -> int:
        """Forward and backward.

        Nothing goes back into the prefix; through the state's frozen layers only the gradient of what came
        in; through the expert that and the one of its weights.
        """
        return self.prefix + 2 * self.state + 3 * self.expert

    @property
    def step_from_images(self) -> int:
        """The same behind the tower."""
        return self.tower + self.step_from_features


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--words", type=int, default=48, help="tokens of the instruction")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script itself")
    flags = parser.parse_args(arguments)
    with torch.device("meta"):
        policy = build_policy(num_cameras=flags.cameras, tiny=flags.tiny)
    flops, sizes = sample_flops(policy, cameras=flags.cameras, words=flags.words), step_bytes(policy)
    for name, value in asdict(flops).items():
        print(f"{name:32} {value / 1e9:8.2f} GFLOP forward")
    figures: dict[str, Any] = {
        "step_from_images_gflop": flops.step_from_images / 1e9,
        "step_from_features_gflop": flops.step_from_features / 1e9,
        "tower_share": flops.tower / flops.step_from_images,
        "times_less_work": flops.step_from_images / flops.step_from_features,
        **sizes,
    }
    for name, value in figures.items():
        print(f"{name:32} {value:8.4g}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def sample_flops(policy: SmolVLAPolicy, *, cameras: int, words: int) -> Flops:
    """By the sizes of the policy."""
    config, joint = policy.config, policy.model.vlm_with_expert
    text, expert = joint.vlm.config.text_config, joint.lm_expert.config
    tokens, tower = _tower(joint.vlm.config, config.resize_imgs_with_padding)
    prefix_tokens, steps = cameras * tokens + words, config.chunk_size
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    vlm = text.hidden_size, text.intermediate_size
    small = expert.hidden_size, expert.intermediate_size
    heads = 2 * config.max_action_dim * small[0] * 2 + 2 * small[0] ** 2 * 3  # in, out, and the time MLP
    prefix, state, actions = 0, 2 * config.max_state_dim * vlm[0], steps * heads
    for layer in joint.joint_layers:
        memory = prefix_tokens + 1
        prefix += prefix_tokens * 4 * vlm[0] * keys
        state += 4 * vlm[0] * keys
        if layer.feeds_next:
            prefix += prefix_tokens * (_rest(*vlm, queries) + 4 * prefix_tokens * queries)
            state += _rest(*vlm, queries) + 4 * memory * queries
        if layer.expert_layer is None:
            continue
        if layer.cross_attends:
            actions += memory * 4 * keys * keys + steps * 4 * memory * queries
        else:
            actions += steps * (4 * small[0] * keys + 4 * (memory + steps) * queries)
        actions += steps * _rest(*small, queries)
    return Flops(tower=cameras * tower, prefix=prefix, state=state, expert=actions)


def _rest(width: int, hidden: int, queries: int) -> int:
    """Of a token in a layer, but keys, values and attention: queries, output, and the gated MLP."""
    return 4 * width * queries + 6 * width * hidden


def _tower(vlm: Any, box: Any) -> tuple[int, int]:
    """(tokens, FLOPs) of an image."""
    vision, side = vlm.vision_config, vlm.vision_config.patch_size
    patches, width = (box[0] // side) * (box[1] // side), vision.hidden_size
    layer = patches * (8 * width**2 + 4 * width * vision.intermediate_size + 4 * patches * width)
    tokens = patches // vlm.scale_factor**2
    connector = 2 * patches * width * vlm.text_config.hidden_size
    embedding = 2 * patches * width * 3 * side**2
    return tokens, embedding + vision.num_hidden_layers * layer + connector


def step_bytes(policy: SmolVLAPolicy) -> dict[str, float]:
    """What a worker's memory holds and sees in a step, whatever the batch; and what a camera brings."""
    counts = {True: 0, False: 0}
    for parameter in policy.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    vlm = policy.model.vlm_with_expert.vlm.config
    tokens, _ = _tower(vlm, policy.config.resize_imgs_with_padding)
    width = vlm.text_config.hidden_size
    return {
        "trained_parameters_m": counts[True] / 1e6,
        "frozen_parameters_m": counts[False] / 1e6,
        # weights, gradient and two moments are read, weights and moments written, in float32
        "optimizer_traffic_gb": counts[True] * 7 * 4 / 1e9,
        "gradients_exchanged_gb": counts[True] * 4 / 1e9,
        "camera_bfloat16_kb": tokens * width * 2 / 1e3,
        "camera_int8_kb": tokens * (width + 4) / 1e3,
        "camera_uint8_384x512_kb": 384 * 512 * 3 / 1e3,
    }


if __name__ == "__main__":
    main()
