"""SmolVLA computed plainly with a policy's own weights: what the benchmarks compare the package with.

The whole prefix, state and all, is one sequence with gradients; attention multiplies out in float32 under a
full mask; masks and rotary tables are built in every layer; cross-attention keys and values are projected
again at every denoising step. The vision tower is the same.

Shape letters: B batch, L prefix with the state, H chunk, Q query heads, K key heads, C head size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolvla.data_utils import sinusoidal_time
from smolvla.modeling import SmolVLAPolicy

ROTARY_BASE = 10_000.0


class PlainModel:
    """Losses and chunks of a policy, the plain way; shares its parameters."""

    def __init__(self, policy: SmolVLAPolicy) -> None:
        self.config, self.model = policy.config, policy.model
        joint = policy.model.vlm_with_expert
        self.text, self.expert = joint.vlm.model.text_model, joint.lm_expert
        self.stride = joint.num_vlm_layers // joint.num_expert_layers
        self.head_dim = joint.head_dim

    def loss(self, inputs: dict[str, Any], noise: Tensor, time: Tensor) -> Tensor:
        """Mean loss over real action entries."""
        t = time[:, None, None]
        x_t, u_t = t * noise + (1 - t) * inputs["actions"], noise - inputs["actions"]
        prefix, mask, att = self._prefix(inputs)
        suffix = self._suffix(x_t, time)
        mask = torch.cat((mask, mask.new_ones(suffix.shape[:2])), dim=1)
        att = torch.cat((att, att.new_ones(suffix.shape[:2])), dim=1)
        error = F.mse_loss(
            self._velocity(self._layers(prefix, suffix, mask, att, None)), u_t, reduction="none"
        )
        error = error[..., : self.config.action_dim]
        valid = (~inputs["is_pad"]).float()[..., None].expand_as(error)
        return (error * valid).sum() / valid.sum()

    @torch.no_grad()
    def encode(self, inputs: dict[str, Any]) -> Any:
        """Keys and values of the prefix in every layer, with its masks."""
        prefix, mask, att = self._prefix(inputs)
        cache: list[tuple[Tensor, Tensor]] = []
        self._layers(prefix, None, mask, att, cache)
        return cache, mask, att

    @torch.no_grad()
    def denoise(self, noise: Tensor, memory: Any) -> Tensor:
        """All denoising steps of a chunk (B, H, A)."""
        cache, mask, att = memory
        x_t, num_steps = noise, self.config.num_steps
        mask = torch.cat((mask, mask.new_ones(noise.shape[:2])), dim=1)
        att = torch.cat((att, att.new_ones(noise.shape[:2])), dim=1)
        for step in range(num_steps):
            time = torch.full(noise.shape[:1], 1 - step / num_steps)
            suffix = self._layers(None, self._suffix(x_t, time), mask, att, cache)
            x_t = x_t - self._velocity(suffix) / num_steps
        return x_t

    # ---- sequences ----------------------------------------------------------------------------------------

    def _prefix(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        images, real = self.model.embed_prefix(
            inputs["images"], inputs["img_masks"], inputs["lang_tokens"], inputs["lang_masks"]
        )
        state = self.model.embed_state(inputs["state"])
        mask = torch.cat((real, real.new_ones(len(real), 1)), dim=1)
        att = torch.zeros_like(mask)
        att[:, -1] = True
        return torch.cat((images, state), dim=1), mask, att

    def _suffix(self, x_t: Tensor, time: Tensor) -> Tensor:
        actions = self.model.action_in_proj(x_t)
        embedded = sinusoidal_time(
            time, actions.shape[-1], min_period=self.config.min_period, max_period=self.config.max_period
        )
        both = torch.cat((actions, embedded[:, None].expand_as(actions)), dim=-1)
        return self.model.action_time_mlp_out(F.silu(self.model.action_time_mlp_in(both)))

    def _velocity(self, suffix: Tensor) -> Tensor:
        return self.model.action_out_proj(suffix.float())

    # ---- layers -------------------------------------------------------------------------------------------

    def _layers(
        self, prefix: Tensor | None, suffix: Tensor | None, mask: Tensor, att: Tensor, cache: list[Any] | None
    ) -> Any:
        """Prefix and suffix together, or the prefix into the cache, or the suffix out of it."""
        for i, layer in enumerate(self.text.layers):
            expert = self.expert.layers[i // self.stride] if i % self.stride == 0 else None
            if suffix is None:
                assert prefix is not None
                assert cache is not None
                normed = layer.input_layernorm(prefix)
                cache.append(self._keys_values(layer, normed, positions(mask)))
                prefix = self._prefix_layer(layer, prefix, normed, mask, att, cache[-1])
            elif prefix is None:
                assert cache is not None
                suffix = self._suffix_layer(expert, suffix, mask, att, cache[i], self._crosses(i))
            else:
                num = prefix.shape[1]
                normed = layer.input_layernorm(prefix)
                memory = self._keys_values(layer, normed, positions(mask)[:, :num])
                suffix = self._suffix_layer(expert, suffix, mask, att, memory, self._crosses(i))
                prefix = self._prefix_layer(layer, prefix, normed, mask[:, :num], att[:, :num], memory)
        return None if suffix is None else self.expert.norm(suffix)

    def _crosses(self, i: int) -> bool:
        every = self.config.self_attn_every_n_layers
        return self.config.attention_mode == "cross_attn" and not (every > 0 and i % every == 0)

    def _prefix_layer(
        self,
        layer: Any,
        prefix: Tensor,
        normed: Tensor,
        mask: Tensor,
        att: Tensor,
        memory: tuple[Tensor, Tensor],
    ) -> Tensor:
        queries = rotate(self._heads(layer.self_attn.q_proj, normed), positions(mask))
        return close(layer, prefix, eager(queries, *memory, block_mask(mask, att)))

    def _suffix_layer(
        self,
        layer: Any,
        suffix: Tensor,
        mask: Tensor,
        att: Tensor,
        memory: tuple[Tensor, Tensor],
        crosses: bool,  # noqa: FBT001 -- which of two kinds of layer
    ) -> Tensor:
        if layer is None:
            return suffix
        keys, values = memory
        num, steps = keys.shape[1], suffix.shape[1]
        normed = layer.input_layernorm(suffix)
        sees, places = block_mask(mask, att)[:, -steps:], positions(mask)[:, -steps:]
        if crosses:
            keys = self._heads(layer.self_attn.k_proj, keys.flatten(2))
            values = self._heads(layer.self_attn.v_proj, values.flatten(2))
            sees, places = sees[..., :num], places - places[:, :1]
        else:
            own = self._keys_values(layer, normed, places)
            keys, values = torch.cat((keys, own[0]), dim=1), torch.cat((values, own[1]), dim=1)
        queries = rotate(self._heads(layer.self_attn.q_proj, normed), places)
        return close(layer, suffix, eager(queries, keys, values, sees))

    def _keys_values(self, layer: Any, normed: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        keys = rotate(self._heads(layer.self_attn.k_proj, normed), places)
        return keys, self._heads(layer.self_attn.v_proj, normed)

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (-1, self.head_dim))


def positions(mask: Tensor) -> Tensor:
    return mask.cumsum(dim=1) - 1


def block_mask(mask: Tensor, att: Tensor) -> Tensor:
    """Who sees whom (B, L, L)."""
    block = att.cumsum(dim=1)
    return (block[:, None] <= block[:, :, None]) & mask[:, None] & mask[:, :, None]


def rotate(x: Tensor, places: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wavelengths = ROTARY_BASE ** (torch.arange(half) / half)
    radians = (places[..., None] / wavelengths)[:, :, None]
    cos, sin = radians.cos(), radians.sin()
    first, second = x.split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager(queries: Tensor, keys: Tensor, values: Tensor, sees: Tensor) -> Tensor:
    """(B, L, Q, C) over (B, M, K, C) under sees (B, L, M) -> (B, L, Q * C)."""
    group = queries.shape[2] // keys.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2).transpose(1, 2).float() for x in (keys, values))
    scores = queries.transpose(1, 2).float() @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
    scores = torch.where(sees[:, None], scores, torch.finfo(torch.float32).min)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


def close(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))
