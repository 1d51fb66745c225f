"""SmolVLAPolicy: from a batch to the flow-matching loss or to a chunk of actions.

Shape letters: B batch, N cameras, P prefix tokens before the state, L language tokens, H chunk,
A padded action width, S padded state width, D width of the VLM, E width of the expert.
"""

import functools
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoTokenizer

from .configuration import SmolVLAConfig, checkpoint_file
from .data_utils import (
    decode_aloha_actions,
    decode_aloha_state,
    encode_aloha_actions,
    resize_with_pad,
    sample_noise,
    sample_time,
    sinusoidal_time,
)
from .features import ACTION, EMPTY_CAMERA, IMAGE_FEATURES, STATE
from .image_features import FROZEN, frozen_tensors, unpacked
from .lora import LoRA, merged
from .normalization import has_statistics, without_buffers
from .processing import IL_STUDIO, IL_STUDIO_IMAGE, TOKENS, TOKENS_MASK, SmolVLAProcessor
from .real_time_chunking import Guidance
from .smolvlm_with_expert import AttentionTables, JointLayer, KeysValues, SmolVLMWithExpertModel
from .tensor_files import naming_damage, write_tensors

Memory: TypeAlias = tuple[AttentionTables, list[KeysValues | None]]
"""An observation as the suffix sees it: tables, and the keys and values of every joint layer."""

VLM_FOLDER = "vlm"
VLM_FILE_KINDS = (".json", ".txt", ".jinja", ".model")


class VLAFlowMatching(nn.Module):
    """The network with its projections; knows padded tensors only, neither features nor statistics."""

    def __init__(self, config: SmolVLAConfig, source: str) -> None:
        super().__init__()
        self.config = config
        self.vlm_with_expert = SmolVLMWithExpertModel(config, source)
        width = self.vlm_with_expert.expert_hidden_size
        self.state_proj = nn.Linear(
            config.max_state_dim, self.vlm_with_expert.vlm.config.text_config.hidden_size
        ).requires_grad_(config.train_state_proj)
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.image_special_tokens = image_special_tokens(source) if config.add_image_special_tokens else ()

    def embed_prefix(
        self, images: Sequence[Tensor], img_masks: Sequence[Tensor], lang_tokens: Tensor, lang_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, h, w) in [-1, 1] and language (B, L) -> tokens (B, P, D) and which are real (B, P).

        In place of a camera's images may stand their features (B, tokens, D), see `image_features`. The state
        token is not among the tokens, and `prefix_length` appends nothing: padding is never a key, and nobody
        reads what it would become.
        """
        tokens, real = [], []
        always = torch.ones_like(lang_masks[:, :1], dtype=torch.bool)
        # All words in one lookup: FSDP2 gathers the embedding for it, and reduces its gradient once.
        special = lang_tokens.new_tensor(self.image_special_tokens).expand(len(lang_tokens), -1)
        words = self.vlm_with_expert.embed_language_tokens(torch.cat((special, lang_tokens), dim=1))
        # <fake><global-img> before an image and <fake> behind it, not scaled; both empty unless configured
        start, language = words.split((special.shape[1], lang_tokens.shape[1]), dim=1)
        end = start[:, :1]
        for features, mask in zip(self._embed_images(images), img_masks, strict=True):
            tokens += [start, features.to(start.dtype), end]
            # Special tokens count as real even when their camera is masked, as in LeRobot.
            around = (always.expand(start.shape[:2]), always.expand(end.shape[:2]))
            real += [around[0], mask[:, None].expand(features.shape[:2]), around[1]]
        tokens.append(language * language.shape[-1] ** 0.5)
        real.append(lang_masks.bool())
        return torch.cat(tokens, dim=1), torch.cat(real, dim=1)

    def _embed_images(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """One pass of the tower over all cameras when their sizes agree; none over features."""
        if len({image.shape for image in images}) == 1 and images[0].ndim == 4:
            features = self.vlm_with_expert.embed_image(torch.cat(tuple(images))).chunk(len(images))
        else:
            features = [self.vlm_with_expert.embed_image(i) if i.ndim == 4 else i for i in images]
        return [feature * feature.shape[-1] ** 0.5 for feature in features]

    def embed_state(self, state: Tensor) -> Tensor:
        """State (B, S) -> token (B, 1, D)."""
        return self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]

    def embed_suffix(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Noisy actions (B, H, A) at `time` (B,) -> tokens (B, H, E)."""
        actions = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))
        embedded = sinusoidal_time(
            time, actions.shape[-1], min_period=self.config.min_period, max_period=self.config.max_period
        )
        embedded = embedded.to(actions.dtype)[:, None].expand_as(actions)
        hidden = F.silu(self.action_time_mlp_in(torch.cat((actions, embedded), dim=-1)))
        return self.action_time_mlp_out(hidden)

    def forward(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        actions: Tensor,
        noise: Tensor,
        time: Tensor,
    ) -> Tensor:
        """Elementwise squared error (R, H, A) of the predicted velocity; nothing is masked or cut.

        Noise (R, H, A) and time (R,) may have several rows for each of the B samples, R = B * k; these share
        the computation of their observation.
        """
        actions = actions.repeat_interleave(len(noise) // len(actions), dim=0)
        x_t, u_t = flow_matching_pair(actions, noise, time)
        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        suffix = self.vlm_with_expert(prefix, real, self.embed_state(state), self.embed_suffix(x_t, time))
        return F.mse_loss(self._velocity(suffix), u_t, reduction="none")

    @torch.no_grad()
    def sample_actions(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        noise: Tensor,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Integrate from noise (B, H, A) at time 1 to actions at time 0 in `num_steps` Euler steps."""
        memory = self.encode(images, img_masks, lang_tokens, lang_masks, state)
        dt = -1.0 / self.config.num_steps
        x_t = noise
        for step in range(self.config.num_steps):
            now = 1.0 + step * dt
            time = torch.full(noise.shape[:1], now, dtype=torch.float32, device=noise.device)
            denoise = functools.partial(self.denoise, time=time, memory=memory)
            x_t = x_t + dt * (denoise(x_t) if guidance is None else guidance.velocity(denoise, x_t, now))
        return x_t

    def encode(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
    ) -> Memory:
        """What all denoising steps of a chunk attend to."""
        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        tables = self.vlm_with_expert.tables(real, num_suffix=self.config.chunk_size)
        return tables, self.vlm_with_expert.prefill(prefix, self.embed_state(state), tables)

    def denoise(self, x_t: Tensor, time: Tensor, memory: Memory) -> Tensor:
        """Velocity (B, H, A) at `x_t` (B, H, A) and `time` (B,)."""
        return self._velocity(self.vlm_with_expert.denoise(self.embed_suffix(x_t, time), *memory))

    def compile_sampling(self, mode: str) -> None:
        """Compile what a chunk runs: the encoding of an observation, and the denoising step."""
        self.encode = torch.compile(self.encode, mode=mode)
        self.denoise = torch.compile(self.denoise, mode=mode)

    def _velocity(self, suffix: Tensor) -> Tensor:
        """In float32 whatever the layers computed in: the error of a step adds up over the sampler."""
        # the meta device, on which one counts FLOPs, has no autocast to switch off
        plain = nullcontext() if suffix.is_meta else torch.autocast(suffix.device.type, enabled=False)
        with plain:
            return self.action_out_proj(suffix.to(self.action_out_proj.weight.dtype)).float()


def flow_matching_pair(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """What the expert sees at `time`, and the velocity it must predict.

    Time runs from 0 (actions) to 1 (noise), as in openpi and lerobot; the pi0 paper runs it the other way.
    """
    t = time[:, None, None]
    return t * noise + (1 - t) * actions, noise - actions


def image_special_tokens(source: str) -> tuple[int, int]:
    """Ids of <fake_token_around_image> and <global-img>, from the VLM's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    ids = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"])
    if None in ids or tokenizer.unk_token_id in ids:
        raise ValueError(
            f"add_image_special_tokens: the tokenizer of {source!r} lacks the tokens, it gives {ids}"
        )
    return ids[0], ids[1]


class SmolVLAPolicy(nn.Module):
    """A SmolVLA policy with LeRobot's parameter names, in float32.

    Args:
        config: its features are checked here.
        vlm_folder: folder of the VLM's configuration and tokenizer, instead of `config.vlm_model_name`.
        allow_random_vlm: accept frozen VLM parts with random weights, which no training would ever improve.

    Raises:
        ValueError: features or sizes that no policy can be built for, or a random VLM that stays frozen.
        OSError: the VLM's files cannot be read.
    """

    def __init__(
        self,
        config: SmolVLAConfig,
        vlm_folder: str | Path | None = None,
        *,
        allow_random_vlm: bool = False,
    ) -> None:
        super().__init__()
        config.check_features()
        if not (config.load_vlm_weights or allow_random_vlm):
            refuse_frozen_random_vlm(config)
        self.config = config
        self.vlm_source = config.vlm_source() if vlm_folder is None else str(Path(vlm_folder).resolve())
        self.model = VLAFlowMatching(config, self.vlm_source)
        self._check_image_box()
        # Kept, because FSDP2 changes a policy that is asked for its state while another thread trains it.
        self.shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        self._float_images_checked = False
        self._processor: SmolVLAProcessor | None = None
        self._statistics_source: str | Path | None = None
        self._queue: deque[Tensor] = deque()
        self.lora: LoRA | None = None
        """What adapters it has, if any; see `lora.add_adapters`."""
        self.train()

    def _check_image_box(self) -> None:
        box = self.config.resize_imgs_with_padding
        vlm = self.model.vlm_with_expert.vlm.config
        side = vlm.vision_config.patch_size * vlm.scale_factor
        if box is not None and (box[0] != box[1] or box[0] % side):
            raise ValueError(
                f"resize_imgs_with_padding is {list(box)}; "
                f"this VLM needs a square whose side is a multiple of {side}"
            )

    # ---- parts that a training loop treats ---------------------------------------------------------------

    @property
    def joint_layers(self) -> list[JointLayer]:
        """The units of sharding, activation checkpointing and compilation, in order."""
        return list(self.model.vlm_with_expert.joint_layers)  # pyright: ignore[reportReturnType]

    @property
    def device(self) -> torch.device:
        return self.model.action_in_proj.weight.device

    @property
    def word_embedding(self) -> nn.Parameter:
        """(vocabulary, D)."""
        return self.model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight

    def shard(self, *, words: Tensor | None = None, **settings: Any) -> None:
        """Shard in place with FSDP2: word embedding, vision layers and joint layers are units.

        The joint layers' parameters must be kept from the root by hand: they are also reachable under the VLM
        and the expert, where LeRobot's names come from, and FSDP2 would try to shard them a second time.

        Args:
            words: ids of all tokens that the policy will be given. Every worker keeps their embeddings, which
                must be frozen, and the whole embedding is gathered no more. None: every pass gathers it.
            settings: keywords of `torch.distributed.fsdp.fully_shard`, such as mesh and mp_policy.
        """
        if words is not None:
            special = words.new_tensor(self.model.image_special_tokens)
            dtype = settings["mp_policy"].param_dtype if "mp_policy" in settings else None
            self.model.vlm_with_expert.keep_words(torch.cat((words, special)).unique(), dtype)
        if "mp_policy" in settings:  # the model converts what it multiplies; times and targets stay float32
            settings["mp_policy"] = replace(settings["mp_policy"], cast_forward_inputs=False)
        # Left to itself the root stays gathered after sampling, which has no backward pass to free it.
        settings.setdefault("reshard_after_forward", True)
        vlm = self.model.vlm_with_expert.vlm
        never_run = (vlm.lm_head, *vlm.model.text_model.layers[len(self.joint_layers) :])  # so never gathered
        embedding = vlm.model.text_model.embed_tokens  # 190 MB that would be gathered for one lookup
        for unit in (embedding, *vlm.model.vision_model.encoder.layers, *self.joint_layers, *never_run):
            fully_shard(unit, **settings)
        in_layers = {parameter for layer in self.joint_layers for parameter in layer.parameters()}
        fully_shard(self, ignored_params=in_layers, **settings)
        register_fsdp_forward_method(self, "predict_action_chunk")

    @property
    def processor(self) -> SmolVLAProcessor:
        """Normalises and tokenises raw observations, and brings actions back into their units.

        Raises:
            ValueError: the checkpoint that the policy came from has no statistics of its state and actions;
                assign a processor with some.
        """
        if self._processor is None:
            if self._statistics_source is None:
                # only a mapping of identities gets by without statistics
                self._processor = SmolVLAProcessor(self.config)
            else:
                self._processor = SmolVLAProcessor.from_pretrained(self._statistics_source, self.config)
        return self._processor

    @processor.setter
    def processor(self, processor: SmolVLAProcessor) -> None:
        self._processor = processor

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations inside the joint layers; the frozen prefix is not computed again."""
        for layer in self.joint_layers:
            layer.gradient_checkpointing = True

    def compile_layers(self, **settings: Any) -> None:
        """Compile training in place, layer by layer: all joint layers of a kind share one compilation.

        After `shard`, so that FSDP2's gathering stays outside of what is compiled.

        Args:
            settings: keywords of `torch.compile`.
        """
        vlm = self.model.vlm_with_expert.vlm
        for layer in (*vlm.model.vision_model.encoder.layers, *self.joint_layers):
            layer.compile(**settings)

    # ---- inputs -------------------------------------------------------------------------------------------

    def prepare_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """LeRobot-named columns -> keyword inputs of `forward`, on the policy's device.

        State and action are expected normalised. Images may be uint8, or float in [0, 1]; they are enlarged,
        padded and scaled here. `<camera>_features` (packed or not, see image_features.py) stand for the
        images of a frozen tower. The caller's tensors stay as they are.

        Returns:
            images [N x (B, 3, h, w), or features (B, tokens, D)], img_masks [N x (B,)], lang_tokens,
            lang_masks (B, L), state (B, S), and if the batch has actions, actions (B, H, A) and is_pad (B, H)
            or None.

        Raises:
            ValueError: a column is missing or has the wrong shape, or a float image leaves [0, 1].
        """
        images, img_masks = self._prepare_images(batch)
        inputs = {
            "images": images,
            "img_masks": img_masks,
            "lang_tokens": self._column(batch, TOKENS).long(),
            "lang_masks": self._column(batch, TOKENS_MASK).bool(),
            "state": self._prepare_state(batch),
        }
        if ACTION in batch:
            inputs["actions"] = self._prepare_actions(batch)
            inputs["is_pad"] = (
                self._column(batch, "action_is_pad").bool() if "action_is_pad" in batch else None
            )
        return inputs

    def _column(self, batch: Mapping[str, Any], name: str) -> Tensor:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it has {sorted(batch)}")
        return batch[name].to(self.device, non_blocking=True)

    def _prepare_images(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        cameras = self.config.camera_names
        # LeRobot declares these cameras by itself when a configuration asks for empty ones.
        empty = [EMPTY_CAMERA.format(i) for i in range(self.config.empty_cameras)]
        cameras += [name for name in empty if name not in cameras]
        present = [name for name in cameras if name in batch or IMAGE_FEATURES.format(name) in batch]
        if not present:
            raise ValueError(f"the batch has none of the cameras {cameras}; it has {sorted(batch)}")
        images = [self._prepare_camera(batch, name) for name in present]
        masks = [self._camera_mask(batch, name, image) for name, image in zip(present, images, strict=True)]
        for _ in range(min(len(cameras) - len(present), self.config.empty_cameras)):
            images.append(torch.full_like(images[0], -1))
            masks.append(torch.zeros_like(masks[0]))
        if self.device.type != "cpu":
            self._float_images_checked = True
        return images, masks

    def _prepare_camera(self, batch: Mapping[str, Any], name: str) -> Tensor:
        """Images, or what was computed of them; that is taken where a batch has both."""
        features = IMAGE_FEATURES.format(name)
        if features in batch:
            width = self.model.vlm_with_expert.vlm.config.text_config.hidden_size
            return unpacked(features, self._column(batch, features), width=width)
        return self._prepare_image(name, self._column(batch, name))

    @torch.no_grad()
    def image_features(self, name: str, image: Tensor) -> Tensor:
        """Images of a camera (B, 3, h, w), as `prepare_inputs` takes them -> features (B, tokens, D).

        They are what the vision tower and its connector give in training, before the prefix scales them;
        a function of image, frozen weights and `resize_imgs_with_padding` alone.
        """
        return self.model.vlm_with_expert.embed_image(self._prepare_image(name, image))

    def _prepare_image(self, name: str, image: Tensor) -> Tensor:
        """Last moment of a camera (B, 3, h, w) -> fitted, padded and scaled to [-1, 1]."""
        if image.ndim == 5:
            image = image[:, -1]
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"{name!r} has shape {tuple(image.shape)}; an image batch is (B, 3, height, width)"
            )
        if image.dtype == torch.uint8:
            image = image.float() / 255
        elif image.is_floating_point():
            image = image.float()
            self._check_range(name, image)
        else:
            raise ValueError(f"{name!r} has dtype {image.dtype}; images are uint8, or float in [0, 1]")
        if self.config.resize_imgs_with_padding is not None:
            image = resize_with_pad(image, self.config.resize_imgs_with_padding)
        return image * 2 - 1

    def _check_range(self, name: str, image: Tensor) -> None:
        """Off the CPU, reading the extremes waits for the device, so only the first batch is looked at."""
        if self._float_images_checked:
            return
        low, high = torch.stack(image.aminmax()).tolist()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name!r} is float with values in [{low:g}, {high:g}]; a float image lies in [0, 1]"
            )

    def _camera_mask(self, batch: Mapping[str, Any], name: str, image: Tensor) -> Tensor:
        name = f"{name}_padding_mask"
        if name in batch:
            return self._column(batch, name).bool()
        return torch.ones(len(image), dtype=torch.bool, device=image.device)

    def _prepare_state(self, batch: Mapping[str, Any]) -> Tensor:
        state = self._column(batch, STATE).float()
        if state.ndim == 3:
            state = state[:, -1]
        if self.config.adapt_to_pi_aloha:
            state = decode_aloha_state(state)
        # Not compared with the declared width, which published configurations (smolvla_libero) get wrong.
        return padded(STATE, state, self.config.max_state_dim)

    def _prepare_actions(self, batch: Mapping[str, Any]) -> Tensor:
        actions = self._column(batch, ACTION).float()
        wanted = (self.config.chunk_size, self.config.action_dim)
        if actions.shape[1:] != wanted:
            raise ValueError(
                f"{ACTION!r} has shape {tuple(actions.shape)}; it must be (B, {wanted[0]}, {wanted[1]})"
            )
        if self.config.adapt_to_pi_aloha:
            actions = decode_aloha_actions(actions)
        return padded(ACTION, actions, self.config.max_action_dim)

    # ---- loss and actions ---------------------------------------------------------------------------------

    def forward(
        self,
        images: Sequence[Tensor],
        img_masks: Sequence[Tensor],
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        actions: Tensor,
        is_pad: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        *,
        repeated_noise: int = 1,
    ) -> dict[str, Tensor]:
        """Flow-matching loss over real action entries.

        With `repeated_noise` k, every sample is trained on with k draws of noise and time, which share the
        computation of its observation: k times the signal for little more than one draw's cost. Rows i * k to
        i * k + k - 1 of `noise` (B * k, H, A) and `time` (B * k,) are sample i's; they are drawn from torch's
        default generator when absent.

        Returns:
            loss: scalar, loss_sum / num_valid.
            loss_sum, num_valid: for a mean over several micro-batches or workers; entries count k times.
            per_sample_loss: (B,), every sample over its own valid entries.
        """
        rows = len(actions) * repeated_noise
        if noise is None:
            noise = sample_noise((rows, *actions.shape[1:]), device=actions.device)
        if time is None:
            time = sample_time(rows, device=actions.device)
        if len(noise) != rows or len(time) != rows:
            raise ValueError(
                f"noise and time have {len(noise)} and {len(time)} rows; "
                f"{len(actions)} samples with repeated_noise {repeated_noise} need {rows}"
            )
        losses = self.model(images, img_masks, lang_tokens, lang_masks, state, actions, noise, time)
        losses = losses[..., : self.config.action_dim]
        valid = (
            torch.ones(losses.shape[:2], device=losses.device)
            if is_pad is None
            else (~is_pad).to(losses.dtype).repeat_interleave(repeated_noise, dim=0)
        )
        sums = (losses * valid[..., None]).sum(dim=(1, 2)).unflatten(0, (-1, repeated_noise)).sum(dim=1)
        counts = valid.sum(dim=1).unflatten(0, (-1, repeated_noise)).sum(dim=1) * losses.shape[-1]
        loss_sum, num_valid = sums.sum(), counts.sum()
        return {
            "loss": loss_sum / num_valid.clamp(min=1),
            "per_sample_loss": sums / counts.clamp(min=1),
            "loss_sum": loss_sum,
            "num_valid": num_valid,
        }

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Mapping[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | Sequence[int] = 0,
        prev_chunk_left_over: Tensor | Sequence[Tensor] | None = None,
        execution_horizon: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """Normalised actions (B, H, action_dim) for observations in LeRobot's columns, normalised too.

        With `prev_chunk_left_over` (B, up to H, action_dim), what an earlier call returned and the robot has
        not executed yet, the chunk continues it: see `real_time_chunking` for that and the other two. Each of
        the three may be a sequence with one entry a row.
        """
        inputs = self.prepare_inputs({name: column for name, column in batch.items() if name != ACTION})
        if noise is None:
            shape = (len(inputs["state"]), self.config.chunk_size, self.config.max_action_dim)
            noise = sample_noise(shape, device=self.device)
        guidance = None
        if prev_chunk_left_over is not None:
            rows = [row.to(self.device) for row in prev_chunk_left_over]
            guidance = Guidance.of(
                [decode_aloha_actions(row) for row in rows] if self.config.adapt_to_pi_aloha else rows,
                self.config.rtc_config,
                inference_delay=inference_delay,
                execution_horizon=execution_horizon,
            )
        actions = self.model.sample_actions(**inputs, noise=noise.to(self.device), guidance=guidance)
        actions = actions[..., : self.config.action_dim]
        return encode_aloha_actions(actions) if self.config.adapt_to_pi_aloha else actions

    # ---- acting in an environment -------------------------------------------------------------------------

    def predict_actions(
        self,
        obs: Mapping[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | Sequence[int] = 0,
        prev_chunk_left_over: Tensor | Sequence[Tensor] | None = None,
        execution_horizon: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """Actions (B, H, action_dim) in the dataset's units for raw observations of B environments.

        Observations are as `SmolVLAProcessor.observations` takes them; the left-over of real-time chunking is
        in the dataset's units too.
        """
        processor = self.processor
        if prev_chunk_left_over is not None:
            prev_chunk_left_over = [
                processor.normalizer.normalize(ACTION, row) for row in prev_chunk_left_over
            ]
        actions = self.predict_action_chunk(
            processor.observations(obs),
            noise,
            inference_delay=inference_delay,
            prev_chunk_left_over=prev_chunk_left_over,
            execution_horizon=execution_horizon,
        )
        return processor.unnormalize_actions(actions)

    def select_action(self, obs: Mapping[str, Any], noise: Tensor | None = None) -> Tensor:
        """What the environments should do now, in the dataset's units, given raw observations.

        For LeRobot's columns it is one action (B, action_dim). A new chunk is predicted when `n_action_steps`
        of the last one were handed out; until then observations are not looked at. For IL-Studio's columns
        (`image`, `state`, `raw_lang`) it is the whole chunk (B, H, action_dim), whose queue IL-Studio keeps.

        Raises:
            ValueError: the number of environments changed without `reset`.
        """
        if not {IL_STUDIO_IMAGE, *IL_STUDIO}.isdisjoint(obs):
            return self.predict_actions(obs, noise)
        if not self._queue:
            chunk = self.predict_actions(obs, noise)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        if STATE in obs and len(obs[STATE]) != len(self._queue[0]):
            raise ValueError(
                f"{len(obs[STATE])} environments, but the actions in the queue are of {len(self._queue[0])}; "
                "call reset() between episodes"
            )
        return self._queue.popleft()

    def reset(self) -> None:
        """Forget the actions of an episode that has ended."""
        self._queue.clear()

    def compile_sampling(self, mode: str | None = None) -> None:
        """Compile prediction (training stays as it is); `mode` is torch.compile's, else `compile_mode`.

        The first chunk of every batch size pays for it.
        """
        self.model.compile_sampling(mode or self.config.compile_mode)

    # ---- checkpoints --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: SmolVLAConfig | None = None, *, compile: bool = False
    ) -> Self:
        """Load a LeRobot checkpoint: a folder, or a hub id.

        Weights become float32 whatever the file holds. `config` replaces the folder's own. Statistics are
        read when `processor` is first needed. `compile` compiles prediction, see `compile_sampling`.

        Raises:
            ValueError: the file cannot be read, or tensors are missing, unexpected or misshapen; all of them
                are named.
        """
        config = config or SmolVLAConfig.from_pretrained(folder)
        path = checkpoint_file(folder, "model.safetensors")
        with torch.device("meta"):
            policy = cls(
                config.changed(load_vlm_weights=False), allow_random_vlm=True
            )  # until the next lines
        policy.config = policy.model.config = config
        with naming_damage(path):
            stored = load_file(path)
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in without_buffers(stored).items()}
        refuse_misfits(path, policy.shapes, tensors)
        # copy: the file's tensors are mapped memory, which must not change when the file does.
        policy.load_state_dict(
            {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True
        )
        policy._statistics_source = folder if has_statistics(folder) else None
        if compile:
            policy.compile_sampling()
        return policy

    @classmethod
    def tower_from_pretrained(cls, folder: str | Path, config: SmolVLAConfig, *, device: str) -> Self:
        """A policy of which only `image_features` works: no other weights are read, nor take memory.

        Raises:
            ValueError: tensors are missing or misshapen; all of them are named.
        """
        tensors = dict(frozen_tensors(folder))
        with torch.device("meta"):
            policy = cls(config.changed(load_vlm_weights=False), allow_random_vlm=True)
        frozen = {name: shape for name, shape in policy.shapes.items() if name.startswith(FROZEN)}
        refuse_misfits(Path(folder), frozen, tensors)
        policy.load_state_dict(tensors, strict=False, assign=True)
        vlm = policy.model.vlm_with_expert.vlm.model
        vlm.vision_model.to(device)
        vlm.connector.to(device)
        return policy.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        stats: Mapping[str, Any] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint that LeRobot and `from_pretrained` load; adapters are merged into the weights.

        Args:
            folder: created when missing; files of the same name are replaced.
            stats: statistics as in `meta/stats.json`, for the normalisation files. Without, those of the
                policy's processor are written, if it has one or its checkpoint had statistics.
            state_dict: gathered tensors of a sharded policy, instead of its own.
        """
        folder = Path(folder)
        self.save_description(folder, stats)
        weights = state_dict or self.state_dict()
        tensors = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in (merged(weights, self.lora) if self.lora else weights).items()
        }
        refuse_misfits(folder, self.shapes, tensors)
        write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def save_description(self, folder: Path, stats: Mapping[str, Any] | None = None) -> None:
        """Write everything of a checkpoint but its weights.

        A VLM that came from a folder is copied (configuration, tokenizer, processor; no weights) to `vlm/`
        inside, so that the checkpoint needs nothing else.

        Raises:
            FileNotFoundError: that folder is gone by now.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config, source = self.config, Path(self.vlm_source)
        if source.is_absolute():
            copy_vlm_files(source, folder / VLM_FOLDER)
            # LeRobot would look for the VLM's weights there; the checkpoint holds them already.
            config = config.changed(vlm_model_name=VLM_FOLDER, load_vlm_weights=False)
        processor = self._exported_processor(stats)
        if processor is not None:
            processor.save_pretrained(folder, config)
        config.save_pretrained(folder)

    def _exported_processor(self, stats: Mapping[str, Any] | None) -> SmolVLAProcessor | None:
        if stats is not None:
            rename = self._processor.files.rename if self._processor is not None else None
            return SmolVLAProcessor(self.config, stats, rename=rename)
        return self.processor if self._processor or self._statistics_source else None


def refuse_frozen_random_vlm(config: SmolVLAConfig) -> None:
    frozen = [name for name in ("train_expert_only", "freeze_vision_encoder") if getattr(config, name)]
    if frozen:
        raise ValueError(
            f"load_vlm_weights is false and {' and '.join(frozen)} true: the VLM would keep random weights; "
            "start from a checkpoint, set load_vlm_weights, or accept it with allow_random_vlm=True"
        )


def padded(name: str, vectors: Tensor, width: int) -> Tensor:
    """Zeros after the last axis up to `width`."""
    missing = width - vectors.shape[-1]
    if missing < 0:
        raise ValueError(f"{name!r} has {vectors.shape[-1]} numbers; this policy holds at most {width}")
    return F.pad(vectors, (0, missing))


def refuse_misfits(path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """One error that names every missing, unexpected and misshapen tensor."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{path} does not hold this policy's {len(expected)} tensors: {'; '.join(problems)}")


def copy_vlm_files(source: Path, target: Path) -> None:
    """Everything of a VLM folder but its weights."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix in VLM_FILE_KINDS
            and not file.name.endswith(".safetensors.index.json")
        ):
            shutil.copyfile(file, target / file.name)
