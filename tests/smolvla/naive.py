"""SmolVLA written straight from shared/reference/smolvla.md, slow on purpose, to compare the package with.

One sequence holds the whole prefix (images, language, state, padding) and the suffix, all with gradients;
attention is a float32 softmax over a full mask; sampling computes everything again at every step. It shares
no code with `smolvla/`; weights come in as a dictionary of tensors by checkpoint name.
"""

import math

import torch
import torch.nn.functional as F

VLM = "model.vlm_with_expert.vlm.model."
EXPERT = "model.vlm_with_expert.lm_expert."


class Naive:
    def __init__(self, weights, config, vlm_config, special_tokens=None):
        self.w, self.config, self.vlm, self.special = weights, config, vlm_config, special_tokens
        self.text = vlm_config.text_config

    def elementwise_loss(self, inputs, noise, time):
        t = time.reshape(-1, 1, 1)
        x_t = t * noise + (1 - t) * inputs["actions"]
        return (self.velocity(inputs, x_t, time) - (noise - inputs["actions"])) ** 2

    def chunk(self, inputs, noise):
        x = noise
        for step in range(self.config.num_steps):
            time = torch.full((len(noise),), 1 - step / self.config.num_steps)
            x = x - self.velocity(inputs, x, time) / self.config.num_steps
        return x

    # ---- sequences ----------------------------------------------------------------------------------------

    def velocity(self, inputs, x_t, time):
        prefix, mask, att = self.prefix(inputs)
        suffix = self.suffix(x_t, time)
        batch, steps = suffix.shape[:2]
        mask = torch.cat([mask, torch.ones(batch, steps, dtype=torch.bool)], dim=1)
        att = torch.tensor(att + [1] * steps).cumsum(0)
        sees = (att[None, :] <= att[:, None])[None] & mask[:, None, :] & mask[:, :, None]
        positions = mask.cumsum(1) - 1
        out = self.layers(prefix, suffix, sees, positions)
        return self.linear("model.action_out_proj", out)

    def prefix(self, inputs):
        embed = self.w[VLM + "text_model.embed_tokens.weight"]
        scale = math.sqrt(embed.shape[1])
        batch = len(inputs["state"])
        ones = torch.ones(batch, 1, dtype=torch.bool)
        parts, masks, att = [], [], []

        def add(tokens, mask, value):
            parts.append(tokens)
            masks.append(mask.expand(-1, tokens.shape[1]))
            att.extend([value] * tokens.shape[1])

        for image, image_mask in zip(inputs["images"], inputs["img_masks"], strict=True):
            if self.special:
                add(embed[list(self.special)].expand(batch, -1, -1), ones, 0)
            add(self.vision(image) * scale, image_mask[:, None], 0)
            if self.special:
                add(embed[[self.special[0]]].expand(batch, -1, -1), ones, 0)
        parts.append(embed[inputs["lang_tokens"]] * scale)
        masks.append(inputs["lang_masks"])
        att.extend([0] * inputs["lang_tokens"].shape[1])
        add(self.linear("model.state_proj", inputs["state"])[:, None], ones, 1)
        missing = self.config.prefix_length - len(att)
        if missing > 0:
            add(torch.zeros(batch, missing, embed.shape[1]), ~ones, 0)
        return torch.cat(parts, 1), torch.cat(masks, 1), att

    def suffix(self, x_t, time):
        actions = self.linear("model.action_in_proj", x_t)
        half = actions.shape[-1] // 2
        low, high = self.config.min_period, self.config.max_period
        period = low * (high / low) ** torch.linspace(0, 1, half, dtype=torch.float64)
        angle = time.double()[:, None] * 2 * math.pi / period
        embedded = torch.cat([angle.sin(), angle.cos()], 1).float()[:, None].expand_as(actions)
        hidden = self.linear("model.action_time_mlp_in", torch.cat([actions, embedded], 2))
        return self.linear("model.action_time_mlp_out", hidden * torch.sigmoid(hidden))

    # ---- language and expert ------------------------------------------------------------------------------

    def layers(self, prefix, suffix, sees, positions):
        num_vlm = len({name.split(".")[6] for name in self.w if name.startswith(VLM + "text_model.layers.")})
        num_expert = self.config.num_expert_layers if self.config.num_expert_layers > 0 else num_vlm
        for i in range(num_vlm):
            vlm = f"{VLM}text_model.layers.{i}."
            j, rest = divmod(i, num_vlm // num_expert)
            expert = f"{EXPERT}layers.{j}." if rest == 0 else None
            every = self.config.self_attn_every_n_layers
            joint = self.config.attention_mode == "self_attn" or (every > 0 and i % every == 0)
            length = prefix.shape[1]
            normed = self.norm(vlm + "input_layernorm", prefix)
            q, k, v = (self.heads(f"{vlm}self_attn.{n}_proj", normed) for n in "qkv")
            q, k = rope(q, positions[:, :length]), rope(k, positions[:, :length])
            if expert is None:
                attended = eager(q, k, v, sees[:, :length, :length])
            else:
                own = self.norm(expert + "input_layernorm", suffix)
                eq = self.heads(expert + "self_attn.q_proj", own)
                if joint:
                    eq = rope(eq, positions[:, length:])
                    ek = rope(self.heads(expert + "self_attn.k_proj", own), positions[:, length:])
                    ev = self.heads(expert + "self_attn.v_proj", own)
                    both = eager(torch.cat([q, eq], 1), torch.cat([k, ek], 1), torch.cat([v, ev], 1), sees)
                    attended, expert_attended = both[:, :length], both[:, length:]
                else:
                    attended = eager(q, k, v, sees[:, :length, :length])
                    start = positions[:, length:].min(dim=1, keepdim=True).values
                    eq = rope(eq, positions[:, length:] - start)
                    ek = self.heads(expert + "self_attn.k_proj", k.flatten(2))
                    ev = self.heads(expert + "self_attn.v_proj", v.flatten(2))
                    expert_attended = eager(eq, ek, ev, sees[:, length:, :length])
                suffix = self.close(expert, suffix, expert_attended)
            prefix = self.close(vlm, prefix, attended)
        return self.norm(EXPERT + "norm", suffix)

    def close(self, layer, x, attended):
        x = x + self.linear(layer + "self_attn.o_proj", attended)
        h = self.norm(layer + "post_attention_layernorm", x)
        gate, up = self.linear(layer + "mlp.gate_proj", h), self.linear(layer + "mlp.up_proj", h)
        return x + self.linear(layer + "mlp.down_proj", gate * torch.sigmoid(gate) * up)

    def heads(self, name, x):
        return self.linear(name, x).reshape(*x.shape[:2], -1, self.text.head_dim)

    def norm(self, name, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.text.rms_norm_eps) ** -0.5
        return x * scale * self.w[name + ".weight"]

    def linear(self, name, x):
        out = x @ self.w[name + ".weight"].T
        return out + self.w[name + ".bias"] if name + ".bias" in self.w else out

    # ---- vision -------------------------------------------------------------------------------------------

    def vision(self, image):
        config = self.vlm.vision_config
        name = VLM + "vision_model."
        patch = config.patch_size
        batch, _, height, width = image.shape
        assert height == width == config.image_size
        side = height // patch
        patches = (
            image.reshape(batch, 3, side, patch, side, patch)
            .permute(0, 2, 4, 1, 3, 5)
            .flatten(3)
            .flatten(1, 2)
        )
        x = patches @ self.w[name + "embeddings.patch_embedding.weight"].flatten(1).T
        x = x + self.w[name + "embeddings.patch_embedding.bias"]
        x = x + self.w[name + "embeddings.position_embedding.weight"]
        for i in range(config.num_hidden_layers):
            layer = f"{name}encoder.layers.{i}."
            h = self.layer_norm(layer + "layer_norm1", x)
            q, k, v = (
                self.linear(f"{layer}self_attn.{n}_proj", h).reshape(
                    batch, side**2, config.num_attention_heads, -1
                )
                for n in "qkv"
            )
            everything = torch.ones(batch, side**2, side**2, dtype=torch.bool)
            x = x + self.linear(layer + "self_attn.out_proj", eager(q, k, v, everything))
            h = self.layer_norm(layer + "layer_norm2", x)
            h = F.gelu(self.linear(layer + "mlp.fc1", h), approximate="tanh")
            x = x + self.linear(layer + "mlp.fc2", h)
        x = self.layer_norm(name + "post_layernorm", x)
        return self.linear(
            VLM + "connector.modality_projection.proj", pixel_shuffle(x, side, self.vlm.scale_factor)
        )

    def layer_norm(self, name, x):
        eps = self.vlm.vision_config.layer_norm_eps
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], eps)


def pixel_shuffle(x, side, scale):
    """Every scale x scale square of patches becomes one token: rows of the square first, features last."""
    batch, _, width = x.shape
    squares = x.reshape(batch, side // scale, scale, side // scale, scale, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(batch, (side // scale) ** 2, scale * scale * width)


def rope(x, positions):
    half = x.shape[-1] // 2
    wavelength = 10_000 ** (torch.arange(half).float() / half)
    angle = (positions[..., None] / wavelength)[:, :, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def eager(q, k, v, sees):
    """(B, L, heads, C) over (B, M, key heads, C) under sees (B, L, M) -> (B, L, heads * C)."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("blhc,bmhc->bhlm", q, k).float() * q.shape[-1] ** -0.5
    scores = torch.where(sees[:, None], scores, torch.finfo(torch.float32).min)
    return torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v).flatten(2)
