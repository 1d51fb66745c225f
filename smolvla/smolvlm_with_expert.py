"""The network of SmolVLA: a SmolVLM and an action expert whose layers are computed together.

Shape letters: B batch, P prefix tokens before the state (images and language), H suffix tokens (actions),
L any tokens, D width of the VLM, E width of the expert, Q query heads, K key heads, C head size.

Three streams go through every layer. The *prefix* (B, P, D) attends to itself only. The *state* token
(B, 1, D) attends to the prefix and itself. The *suffix* (R, H, E) attends to both and to its own past; R is
B, or a multiple of it when several noise draws share a prefix. So
with a frozen VLM the prefix depends on no trained parameter, and autograd, which sees it as a tensor of its
own, keeps nothing of it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, SmolVLMForConditionalGeneration

from .configuration import SmolVLAConfig

# SmolVLA's published constant, whatever the text model's own rope_theta (100,000) says.
ROTARY_BASE = 10_000.0

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (B, L, 1, C/2), float32."""
KeysValues = tuple[Tensor, Tensor]
"""Keys and values (B, L, K, C)."""


# ---- once per batch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTables:
    """Masks and rotary tables of one batch, shared by all layers.

    Masks are boolean, True where a query (second-last axis) sees a key (last axis). A query row without any
    visible key would turn into NaN on some devices, so rows whose result nobody reads see something too.
    """

    prefix_rotary: Rotary
    state_rotary: Rotary
    suffix_rotary: Rotary
    """Positions in the whole sequence, for joint self-attention."""
    cross_rotary: Rotary
    """Positions from 0, for cross-attention."""
    prefix_mask: Tensor
    """(B, 1, 1, P): images and language see every real image and language token."""
    memory_mask: Tensor
    """(B, 1, 1, P + 1): the state token sees these and itself."""
    cross_mask: Tensor
    """(R, 1, 1, P + 1): cross-attending actions see the same; R = B times the suffixes per prefix."""
    suffix_mask: Tensor
    """(R, 1, H * Q/K, P + 1 + H): self-attending actions see the memory and their past. See `attention`."""

    @classmethod
    def build(
        cls, real: Tensor, *, num_suffix: int, head_dim: int, queries_per_key: int, repeats: int = 1
    ) -> Self:
        """Tables for prefix tokens, `real` (B, P) or not, one state token and `num_suffix` actions.

        Every prefix has `repeats` suffixes, which lie one after another along their batch axis.
        """
        batch, device = len(real), real.device
        num_real = real.sum(dim=1, keepdim=True)  # (B, 1)
        steps = torch.arange(num_suffix, device=device).expand(batch * repeats, -1)
        memory = torch.cat((real, real.new_ones(batch, 1)), dim=1)[:, None, None]  # (B, 1, 1, P + 1)
        cross = memory.repeat_interleave(repeats, dim=0)
        causal = real.new_ones(num_suffix, num_suffix).tril()
        suffix_mask = torch.cat(
            (cross.expand(-1, -1, num_suffix, -1), causal.expand(batch * repeats, 1, -1, -1)), dim=-1
        ).repeat_interleave(queries_per_key, dim=2)
        return cls(
            prefix_rotary=rotary(real.cumsum(dim=1) - 1, head_dim),
            state_rotary=rotary(num_real, head_dim),
            suffix_rotary=rotary(num_real.repeat_interleave(repeats, dim=0) + 1 + steps, head_dim),
            cross_rotary=rotary(steps, head_dim),
            prefix_mask=(real | ~real.any(dim=1, keepdim=True))[:, None, None],
            memory_mask=memory,
            cross_mask=cross,
            suffix_mask=suffix_mask,
        )


def rotary(positions: Tensor, head_dim: int) -> Rotary:
    """Cosines and sines for positions (B, L)."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2 / head_dim)
    radians = positions[..., None].float() / ROTARY_BASE**exponents
    return radians.cos()[:, :, None], radians.sin()[:, :, None]


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """Rotate (B, L, heads, C) in float32; the two halves of a head are the pairs."""
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---- one layer --------------------------------------------------------------------------------------------


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention: (B, L, Q, C) over (B, M, K, C) -> (B, L, Q * C); scale C ** -0.5.

    The Q/K query heads that share a key head are laid along the query axis instead of repeating the keys:
    kernels that take a mask do not take grouped heads on every device. Hence masks with a row per query hold
    every row Q/K times.
    """
    batch, length, num_queries, head_dim = queries.shape
    num_keys = keys.shape[2]
    group = num_queries // num_keys
    folded = queries.view(batch, length, num_keys, group, head_dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        folded.reshape(batch, num_keys, length * group, head_dim),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
    )
    return attended.view(batch, num_keys, length, group, head_dim).transpose(1, 2).reshape(batch, length, -1)


def heads(projection: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """Project (B, L, width) and split it into heads (B, L, heads, C)."""
    return projection(x).unflatten(-1, (-1, head_dim))


class JointLayer(nn.Module):
    """One VLM layer with the expert layer that it serves: the unit of sharding, checkpointing, compiling.

    Args:
        vlm_layer: the text model's decoder layer.
        expert_layer: None where the expert is shallower than the VLM and skips this layer.
        cross_attends: the expert attends to the prefix's keys only, instead of joint self-attention.
        feeds_next: False for the last layer: nothing reads its prefix and state, only their keys and values.
    """

    def __init__(
        self, vlm_layer: nn.Module, expert_layer: nn.Module | None, *, cross_attends: bool, feeds_next: bool
    ) -> None:
        super().__init__()
        self.vlm_layer: Any = vlm_layer
        self.expert_layer: Any = expert_layer
        self.cross_attends = cross_attends
        self.feeds_next = feeds_next
        self.head_dim: int = self.vlm_layer.self_attn.head_dim
        self.gradient_checkpointing = False

    def forward(
        self,
        prefix: Tensor | None,
        state: Tensor | None,
        suffix: Tensor | None,
        tables: AttentionTables,
        cache: KeysValues | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, KeysValues | None]:
        """Advance the streams that are given; what is None stays None.

        Training gives all three. Sampling first gives prefix and state and keeps the returned cache, then
        gives the suffix with that cache, once for every denoising step.

        Returns:
            prefix, state, suffix, and without a suffix the keys and values that one attends to in this layer
            (None where the expert skips the layer).
        """
        if cache is None:
            assert prefix is not None
            assert state is not None
            prefix, keys, values = self._run(self._prefix_step, prefix, tables)
            state, keys, values = self._run(self._state_step, state, keys, values, tables)
            if self.expert_layer is None:
                return prefix, state, suffix, None
            keys, values = self._run(self._expert_memory, keys, values)
        else:
            keys, values = cache
        if suffix is None:
            return prefix, state, None, (keys, values)
        return prefix, state, self._run(self._suffix_step, suffix, keys, values, tables), None

    def _run(self, step: Callable[..., Any], *inputs: Any) -> Any:
        """Compute a step, or compute it again in the backward pass instead of keeping its activations.

        Step by step, so that the frozen prefix is never computed twice.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(step, *inputs, use_reentrant=False)
        return step(*inputs)

    def _prefix_step(self, prefix: Tensor, tables: AttentionTables) -> tuple[Tensor | None, Tensor, Tensor]:
        layer = self.vlm_layer
        normed = layer.input_layernorm(prefix)
        keys, values = self._keys_values(layer, normed, tables.prefix_rotary)
        if not self.feeds_next:
            return None, keys, values
        queries = rotate(heads(layer.self_attn.q_proj, normed, self.head_dim), tables.prefix_rotary)
        return self._close(layer, prefix, attention(queries, keys, values, tables.prefix_mask)), keys, values

    def _state_step(
        self, state: Tensor, keys: Tensor, values: Tensor, tables: AttentionTables
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Also returns keys and values of the whole memory: prefix, then state (B, P + 1, K, C)."""
        layer = self.vlm_layer
        normed = layer.input_layernorm(state)
        state_keys, state_values = self._keys_values(layer, normed, tables.state_rotary)
        keys, values = torch.cat((keys, state_keys), dim=1), torch.cat((values, state_values), dim=1)
        if not self.feeds_next:
            return None, keys, values
        queries = rotate(heads(layer.self_attn.q_proj, normed, self.head_dim), tables.state_rotary)
        return self._close(layer, state, attention(queries, keys, values, tables.memory_mask)), keys, values

    def _expert_memory(self, keys: Tensor, values: Tensor) -> KeysValues:
        """The memory as this layer's suffix sees it; cross-attention projects the VLM's rotated keys."""
        if not self.cross_attends:
            return keys, values
        attn = self.expert_layer.self_attn
        return heads(attn.k_proj, keys.flatten(2), self.head_dim), heads(
            attn.v_proj, values.flatten(2), self.head_dim
        )

    def _suffix_step(self, suffix: Tensor, keys: Tensor, values: Tensor, tables: AttentionTables) -> Tensor:
        layer = self.expert_layer
        normed = layer.input_layernorm(suffix)
        table = tables.cross_rotary if self.cross_attends else tables.suffix_rotary
        queries = rotate(heads(layer.self_attn.q_proj, normed, self.head_dim), table)
        repeats = len(suffix) // len(keys)
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
        mask = tables.cross_mask
        if not self.cross_attends:
            own_keys, own_values = self._keys_values(layer, normed, table)
            keys, values = torch.cat((keys, own_keys), dim=1), torch.cat((values, own_values), dim=1)
            mask = tables.suffix_mask
        return self._close(layer, suffix, attention(queries, keys, values, mask))

    def _keys_values(self, layer: Any, normed: Tensor, table: Rotary) -> KeysValues:
        attn = layer.self_attn
        return rotate(heads(attn.k_proj, normed, self.head_dim), table), heads(
            attn.v_proj, normed, self.head_dim
        )

    @staticmethod
    def _close(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a decoder layer after attention, of whichever model."""
        x = x + layer.self_attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))


class JointLayers(nn.ModuleList):
    """The joint layers, under names that a checkpoint does not know.

    The same modules are children of the VLM and of the expert, where LeRobot's names come from. So this list
    stores nothing and expects nothing. It is registered after both, because `named_parameters` and the
    optimiser state of torch.distributed.checkpoint keep the first name of a shared module.
    """

    def __init__(self, layers: list[JointLayer]) -> None:
        super().__init__(layers)
        self.register_load_state_dict_post_hook(self._expect_nothing)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        return {} if destination is None else destination

    @staticmethod
    def _expect_nothing(_module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [
            key for key in incompatible.missing_keys if "joint_layers." not in key
        ]


# ---- the whole network ------------------------------------------------------------------------------------


class SmolVLMWithExpertModel(nn.Module):
    """SmolVLM, its text model cut to the first layers, and a narrower Llama beside it.

    Expert layer j serves VLM layer j * (V / X) for V VLM layers and X expert layers. Whether an expert layer
    cross-attends depends on the VLM layer that it serves. (LeRobot shapes its projections by j instead and
    fails where the two disagree; where they agree, the weights are the same.)

    Args:
        config: which layers, how wide, what is frozen.
        source: folder or hub id of the VLM: its configuration, and with `load_vlm_weights` its weights.
    """

    place_of_word: Tensor | None
    kept_words: Tensor | None

    def __init__(self, config: SmolVLAConfig, source: str) -> None:
        super().__init__()
        # See `keep_words`; no part of a checkpoint.
        self.register_buffer("place_of_word", None, persistent=False)
        self.register_buffer("kept_words", None, persistent=False)
        self.freeze_vision_encoder = config.freeze_vision_encoder
        self.train_expert_only = config.train_expert_only
        vlm_config = smolvlm_config(source, num_layers=config.num_vlm_layers)
        self.vlm: Any = (
            vlm_with_weights(source, vlm_config)
            if config.load_vlm_weights
            else SmolVLMForConditionalGeneration(vlm_config)
        )
        # The joint layers bring their own positions; without it no buffer is left that a checkpoint lacks.
        self.vlm.model.text_model.rotary_emb = None
        text = vlm_config.text_config
        self.head_dim: int = text.head_dim
        self.queries_per_key: int = text.num_attention_heads // text.num_key_value_heads

        num_vlm = text.num_hidden_layers
        num_expert = config.num_expert_layers if config.num_expert_layers > 0 else num_vlm
        if num_vlm % num_expert:
            raise ValueError(f"num_expert_layers {num_expert} does not divide the VLM's {num_vlm} layers")
        self.num_vlm_layers, self.num_expert_layers = num_vlm, num_expert
        stride = num_vlm // num_expert
        crosses = [cross_attends(config, j * stride) for j in range(num_expert)]
        self.lm_expert: Any = expert_model(text, config.expert_width_multiplier, crosses)
        self.expert_hidden_size: int = self.lm_expert.config.hidden_size

        # VLM layers after the last one that the expert looks at would compute what nobody reads.
        last = (num_expert - 1) * stride
        self.joint_layers = JointLayers(
            [
                JointLayer(
                    self.vlm.model.text_model.layers[i],
                    self.lm_expert.layers[i // stride] if i % stride == 0 else None,
                    cross_attends=cross_attends(config, i),
                    feeds_next=i < last,
                )
                for i in range(last + 1)
            ]
        )
        self._freeze()

    def _freeze(self) -> None:
        vlm = self.vlm
        if self.freeze_vision_encoder:
            vlm.model.vision_model.requires_grad_(requires_grad=False)
        if self.train_expert_only:
            vlm.requires_grad_(requires_grad=False)
            return
        # Nothing trains through these; an optimiser or DDP would wait for gradients that never come.
        layers, last = vlm.model.text_model.layers, len(self.joint_layers) - 1
        num_idle = 1 if self.num_expert_layers == self.num_vlm_layers else 2
        idle = [vlm.lm_head, vlm.model.text_model.norm, *layers[-num_idle:], *layers[last + 1 :]]
        # Of the last layer that the expert looks at, it reads keys and values only.
        attention = layers[last].self_attn
        idle += [attention.q_proj, attention.o_proj, layers[last].mlp, layers[last].post_attention_layernorm]
        for module in idle:
            module.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 -- torch's signature
        """Frozen parts stay in eval mode."""
        super().train(mode)
        if self.freeze_vision_encoder:
            self.vlm.model.vision_model.eval()
        if self.train_expert_only:
            self.vlm.eval()
        return self

    def embed_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [-1, 1] -> tokens (B, patches / scale_factor^2, D)."""
        vision = self.vlm.model.vision_model
        embeddings = vision.embeddings
        patches = embeddings.patch_embedding(images.to(embeddings.patch_embedding.weight.dtype))
        # Not through the tower's own forward: transformers 5.17 waits for the device there to select patches
        # by mask, and rounds their positions in the images' dtype.
        rows, columns = patches.shape[-2:]
        positions = patch_positions(rows, columns, embeddings.num_patches_per_side, patches.device)
        hidden = patches.flatten(2).transpose(1, 2) + embeddings.position_embedding(positions)
        hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return self.vlm.model.connector(vision.post_layernorm(hidden))

    def embed_language_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), not scaled."""
        if self.kept_words is None or self.place_of_word is None:
            return self.vlm.model.text_model.embed_tokens(tokens)
        return F.embedding(self.place_of_word[tokens], self.kept_words)

    def keep_words(self, words: Tensor, dtype: torch.dtype | None) -> None:
        """Look tokens up among the embeddings of these `words` (ids, each once) from now on.

        Args:
            words: every id that will be asked for; another one has no place, and its lookup fails.
            dtype: that the lookups give; None: the embedding's own.
        """
        embedding = self.vlm.model.text_model.embed_tokens
        assert not embedding.weight.requires_grad, "an embedding that trains cannot be looked up beforehand"
        place = torch.full((embedding.num_embeddings,), len(words), device=words.device)
        place[words] = torch.arange(len(words), device=words.device)
        self.place_of_word, self.kept_words = place, embedding.weight.detach()[words].to(dtype)

    def forward(self, prefix: Tensor, real: Tensor, state: Tensor, suffix: Tensor) -> Tensor:
        """The suffix (R, H, E) after all layers and the expert's final norm.

        Given prefix (B, P, D), which of it is `real` (B, P), and the state token (B, 1, D). R may be a
        multiple of B: then several suffixes, one after another, share each prefix.
        """
        tables = self.tables(real, num_suffix=suffix.shape[1], repeats=len(suffix) // len(prefix))
        for layer in self.joint_layers:
            prefix, state, suffix, _ = layer(prefix, state, suffix, tables)
        return self.lm_expert.norm(suffix)

    def prefill(self, prefix: Tensor, state: Tensor, tables: AttentionTables) -> list[KeysValues | None]:
        """What every layer's suffix attends to, for `denoise`."""
        caches = []
        for layer in self.joint_layers:
            prefix, state, _, cache = layer(prefix, state, None, tables)
            caches.append(cache)
        return caches

    def denoise(self, suffix: Tensor, tables: AttentionTables, caches: list[KeysValues | None]) -> Tensor:
        """One pass of the expert alone over the keys and values of `prefill`."""
        for layer, cache in zip(self.joint_layers, caches, strict=True):
            if cache is not None:
                _, _, suffix, _ = layer(None, None, suffix, tables, cache)
        return self.lm_expert.norm(suffix)

    def tables(self, real: Tensor, *, num_suffix: int, repeats: int = 1) -> AttentionTables:
        return AttentionTables.build(
            real,
            num_suffix=num_suffix,
            head_dim=self.head_dim,
            queries_per_key=self.queries_per_key,
            repeats=repeats,
        )


def cross_attends(config: SmolVLAConfig, vlm_layer: int) -> bool:
    every = config.self_attn_every_n_layers
    return config.attention_mode == "cross_attn" and not (every > 0 and vlm_layer % every == 0)


def patch_positions(rows: int, columns: int, per_side: int, device: torch.device) -> Tensor:
    """Rows of the position table (rows * columns,) for a grid of patches, by relative place as in SmolVLM."""
    edges = torch.arange(1 / per_side, 1.0, 1 / per_side, device=device)

    def buckets(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float32, device=device) * (1.0 / count)
        return torch.bucketize(places.clamp(max=1.0 - 1e-6), edges, right=True)

    return (buckets(rows)[:, None] * per_side + buckets(columns)).flatten()


def smolvlm_config(source: str, *, num_layers: int) -> Any:
    """The VLM's configuration, its text model cut to `num_layers` (0 or less: all), for float32 weights."""
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"the configuration of the VLM {source!r} (vlm_model_name) could not be read: {error}"
        ) from error
    if config.model_type != "smolvlm" or config.text_config.model_type != "llama":
        raise ValueError(f"the VLM {source!r} is a {config.model_type!r}; SmolVLA is built on a 'smolvlm'")
    for part in (config, config.text_config, config.vision_config):
        part.dtype = None
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False  # LeRobot's files hold both
    if num_layers > 0:
        config.text_config.num_hidden_layers = min(num_layers, config.text_config.num_hidden_layers)
    return config


def vlm_with_weights(source: str, config: Any) -> Any:
    """The pretrained VLM in float32.

    Raises:
        OSError: there are no safetensors weights in the folder, or the hub is out of reach.
        ValueError: tensors are missing or of another shape.
    """
    model_class: Any = SmolVLMForConditionalGeneration
    try:
        vlm, info = model_class.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise OSError(
            f"load_vlm_weights is true, but {source!r} gives no safetensors weights: {error}"
        ) from error
    missing = set(info["missing_keys"])
    if missing == {"lm_head.weight"}:  # a checkpoint that ties it to the embedding
        vlm.lm_head.weight.data.copy_(vlm.model.text_model.embed_tokens.weight.data)
        missing = set()
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"the weights of {source!r} do not fit: "
            f"missing {sorted(missing)}, misshapen {info['mismatched_keys']}"
        )
    return vlm


def expert_model(text_config: Any, width_multiplier: float, crosses: list[bool]) -> Any:
    """A Llama of the text model's heads and a narrower width, without an embedding.

    Its cross-attending layers take keys and values of the VLM as input.
    """
    config = copy.deepcopy(text_config)
    config.hidden_size = int(text_config.hidden_size * width_multiplier)
    config.intermediate_size = expert_mlp_width(config.hidden_size)
    config.num_hidden_layers = len(crosses)
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, None, None, None
    expert: Any = AutoModel.from_config(config)
    expert.embed_tokens = None
    expert.rotary_emb = None
    memory_width = text_config.num_key_value_heads * text_config.head_dim
    for layer, is_cross in zip(expert.layers, crosses, strict=True):
        if is_cross:
            for name in ("k_proj", "v_proj"):
                projection = nn.Linear(memory_width, memory_width, bias=config.attention_bias)
                nn.init.normal_(
                    projection.weight, std=config.initializer_range
                )  # as transformers does its layers
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
                setattr(layer.self_attn, name, projection)
    return expert


def expert_mlp_width(width: int) -> int:
    """Llama's rule: 4 * 2/3 of the width, rounded up to a multiple of 256."""
    return -(-int(4 * int(2 * width / 3)) // 256) * 256
