"""SmolVLAPolicy: from a batch to the flow-matching loss or to a chunk of actions.

Shape letters: B batch, N cameras, P prefix tokens before the state, L language tokens, H chunk,
A padded action width, S padded state width, D width of the VLM, E width of the expert.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoTokenizer

from .configuration import ACTION, STATE, SmolVLAConfig, checkpoint_file
from .data_utils import (
    decode_aloha_actions,
    decode_aloha_state,
    encode_aloha_actions,
    resize_with_pad,
    sample_noise,
    sample_time,
    sinusoidal_time,
    write_processors,
)
from .smolvlm_with_expert import JointLayer, SmolVLMWithExpertModel

TOKENS = "observation.language.tokens"
TOKENS_MASK = "observation.language.attention_mask"
EMPTY_CAMERA = "observation.images.empty_camera_{}"
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
        self.image_special_tokens = image_special_tokens(source) if config.add_image_special_tokens else None

    def embed_prefix(
        self, images: Sequence[Tensor], img_masks: Sequence[Tensor], lang_tokens: Tensor, lang_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, h, w) in [-1, 1] and language (B, L) -> tokens (B, P, D) and which are real (B, P).

        The state token is not among them, and `prefix_length` appends nothing: padding is never a key, and
        nobody reads what it would become.
        """
        tokens, real = [], []
        always = torch.ones_like(lang_masks[:, :1], dtype=torch.bool)
        start, end = self._image_special_tokens(len(lang_tokens))
        for features, mask in zip(self._embed_images(images), img_masks, strict=True):
            tokens += [start, features, end]
            # Special tokens count as real even when their camera is masked, as in LeRobot.
            around = (always.expand(start.shape[:2]), always.expand(end.shape[:2]))
            real += [around[0], mask[:, None].expand(features.shape[:2]), around[1]]
        language = self.vlm_with_expert.embed_language_tokens(lang_tokens)
        tokens.append(language * language.shape[-1] ** 0.5)
        real.append(lang_masks.bool())
        return torch.cat(tokens, dim=1), torch.cat(real, dim=1)

    def _embed_images(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """One pass of the tower over all cameras when their sizes agree."""
        if len({image.shape for image in images}) == 1:
            features = self.vlm_with_expert.embed_image(torch.cat(tuple(images))).chunk(len(images))
        else:
            features = [self.vlm_with_expert.embed_image(image) for image in images]
        return [feature * feature.shape[-1] ** 0.5 for feature in features]

    def _image_special_tokens(self, batch: int) -> tuple[Tensor, Tensor]:
        """<fake><global-img> (B, 2, D) and <fake> (B, 1, D), not scaled; both empty unless configured."""
        table = self.vlm_with_expert.vlm.model.text_model.embed_tokens.weight
        if self.image_special_tokens is None:
            nothing = table[:0].expand(batch, -1, -1)
            return nothing, nothing
        fake, start = (table[token] for token in self.image_special_tokens)
        return torch.stack((fake, start)).expand(batch, -1, -1), fake.expand(batch, 1, -1)

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
        """Elementwise squared error (B, H, A) of the predicted velocity; nothing is masked or cut."""
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
    ) -> Tensor:
        """Integrate from noise (B, H, A) at time 1 to actions at time 0 in `num_steps` Euler steps."""
        prefix, real = self.embed_prefix(images, img_masks, lang_tokens, lang_masks)
        tables = self.vlm_with_expert.tables(real, num_suffix=noise.shape[1])
        caches = self.vlm_with_expert.prefill(prefix, self.embed_state(state), tables)
        dt = -1.0 / self.config.num_steps
        x_t = noise
        for step in range(self.config.num_steps):
            time = torch.full(noise.shape[:1], 1.0 + step * dt, dtype=torch.float32, device=noise.device)
            suffix = self.vlm_with_expert.denoise(self.embed_suffix(x_t, time), tables, caches)
            x_t = x_t + dt * self._velocity(suffix)
        return x_t

    def _velocity(self, suffix: Tensor) -> Tensor:
        """In float32 whatever the layers computed in: the error of a step adds up over the sampler."""
        kind = suffix.device.type
        # the meta device, on which one counts FLOPs, has no autocast to switch off
        plain = torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
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

    Raises:
        ValueError: features or sizes that no policy can be built for.
        OSError: the VLM's files cannot be read.
    """

    def __init__(self, config: SmolVLAConfig, vlm_folder: str | Path | None = None) -> None:
        super().__init__()
        config.check_features()
        self.config = config
        self.vlm_source = config.vlm_source() if vlm_folder is None else str(vlm_folder)
        self.model = VLAFlowMatching(config, self.vlm_source)
        self._check_image_box()
        self._float_images_checked = False
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

    def shard(self, **settings: Any) -> None:
        """Shard in place with FSDP2: every vision and joint layer is a unit, the rest is the root.

        The joint layers' parameters must be kept from the root by hand: they are also reachable under the VLM
        and the expert, where LeRobot's names come from, and FSDP2 would try to shard them a second time.

        Args:
            settings: keywords of `torch.distributed.fsdp.fully_shard`, such as mesh and mp_policy.
        """
        if "mp_policy" in settings:  # the model converts what it multiplies; times and targets stay float32
            settings["mp_policy"] = replace(settings["mp_policy"], cast_forward_inputs=False)
        # Left to itself the root stays gathered after sampling, which has no backward pass to free it.
        settings.setdefault("reshard_after_forward", True)
        vlm = self.model.vlm_with_expert.vlm
        never_run = (vlm.lm_head, *vlm.model.text_model.layers[len(self.joint_layers) :])  # so never gathered
        for unit in (*vlm.model.vision_model.encoder.layers, *self.joint_layers, *never_run):
            fully_shard(unit, **settings)
        in_layers = {parameter for layer in self.joint_layers for parameter in layer.parameters()}
        fully_shard(self, ignored_params=in_layers, **settings)
        register_fsdp_forward_method(self, "predict_action_chunk")

    def gradient_checkpointing_enable(self) -> None:
        """Keep no activations inside the joint layers; the frozen prefix is not computed again."""
        for layer in self.joint_layers:
            layer.gradient_checkpointing = True

    # ---- inputs -------------------------------------------------------------------------------------------

    def prepare_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """LeRobot-named columns -> keyword inputs of `forward`, on the policy's device.

        State and action are expected normalised. Images may be uint8, or float in [0, 1]; they are enlarged,
        padded and scaled here. The caller's tensors stay as they are.

        Returns:
            images [N x (B, 3, h, w)], img_masks [N x (B,)], lang_tokens, lang_masks (B, L), state (B, S), and
            if the batch has actions, actions (B, H, A) and is_pad (B, H) or None.

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
        present = [name for name in cameras if name in batch]
        if not present:
            raise ValueError(f"the batch has none of the cameras {cameras}; it has {sorted(batch)}")
        images = [self._prepare_image(name, self._column(batch, name)) for name in present]
        masks = [self._camera_mask(batch, name, image) for name, image in zip(present, images, strict=True)]
        for _ in range(min(len(cameras) - len(present), self.config.empty_cameras)):
            images.append(torch.full_like(images[0], -1))
            masks.append(torch.zeros_like(masks[0]))
        if self.device.type != "cpu":
            self._float_images_checked = True
        return images, masks

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
    ) -> dict[str, Tensor]:
        """Flow-matching loss over real action entries.

        `noise` (B, H, A) and `time` (B,) are drawn from torch's default generator when absent.

        Returns:
            loss: scalar, loss_sum / num_valid.
            loss_sum, num_valid: for a mean over several micro-batches or workers.
            per_sample_loss: (B,), every sample over its own valid entries.
        """
        if noise is None:
            noise = sample_noise(actions.shape, device=actions.device)
        if time is None:
            time = sample_time(len(actions), device=actions.device)
        losses = self.model(images, img_masks, lang_tokens, lang_masks, state, actions, noise, time)
        losses = losses[..., : self.config.action_dim]
        valid = (
            torch.ones(losses.shape[:2], device=losses.device)
            if is_pad is None
            else (~is_pad).to(losses.dtype)
        )
        sums = (losses * valid[..., None]).sum(dim=(1, 2))
        counts = valid.sum(dim=1) * losses.shape[-1]
        loss_sum, num_valid = sums.sum(), counts.sum()
        return {
            "loss": loss_sum / num_valid.clamp(min=1),
            "per_sample_loss": sums / counts.clamp(min=1),
            "loss_sum": loss_sum,
            "num_valid": num_valid,
        }

    @torch.no_grad()
    def predict_action_chunk(self, batch: Mapping[str, Any], noise: Tensor | None = None) -> Tensor:
        """Normalised actions (B, H, action_dim) for observations in LeRobot's columns."""
        inputs = self.prepare_inputs({name: column for name, column in batch.items() if name != ACTION})
        if noise is None:
            shape = (len(inputs["state"]), self.config.chunk_size, self.config.max_action_dim)
            noise = sample_noise(shape, device=self.device)
        actions = self.model.sample_actions(**inputs, noise=noise.to(self.device))
        actions = actions[..., : self.config.action_dim]
        return encode_aloha_actions(actions) if self.config.adapt_to_pi_aloha else actions

    # ---- checkpoints --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: SmolVLAConfig | None = None) -> Self:
        """Load a LeRobot checkpoint: a folder, or a hub id.

        Weights become float32 whatever the file holds. `config` replaces the folder's own.

        Raises:
            ValueError: tensors are missing, unexpected or misshapen; all of them are named.
        """
        config = config or SmolVLAConfig.from_pretrained(folder)
        path = checkpoint_file(folder, "model.safetensors")
        with torch.device("meta"):
            policy = cls(config.changed(load_vlm_weights=False))
        policy.config = policy.model.config = config
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in load_file(path).items()}
        refuse_misfits(path, policy.state_dict(), tensors)
        # copy: the file's tensors are mapped memory, which must not change when the file does.
        policy.load_state_dict(
            {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True
        )
        return policy

    def save_pretrained(
        self,
        folder: str | Path,
        stats: Mapping[str, Any] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint that LeRobot and `from_pretrained` load.

        A VLM that came from a folder is copied (configuration, tokenizer, processor; no weights) to `vlm/`
        inside, so that the checkpoint needs nothing else.

        Args:
            folder: created when missing; files of the same name are replaced.
            stats: statistics as in `meta/stats.json`; with them the normalisation files are written too.
            state_dict: gathered tensors of a sharded policy, instead of its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        if Path(self.vlm_source).is_dir():
            copy_vlm_files(Path(self.vlm_source), folder / VLM_FOLDER)
            # LeRobot would look for the VLM's weights there; the checkpoint holds them already.
            config = config.changed(vlm_model_name=VLM_FOLDER, load_vlm_weights=False)
        if stats is not None:
            write_processors(folder, config, stats)
        tensors = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in (state_dict or self.state_dict()).items()
        }
        refuse_misfits(folder, self.state_dict(), tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def padded(name: str, vectors: Tensor, width: int) -> Tensor:
    """Zeros after the last axis up to `width`."""
    missing = width - vectors.shape[-1]
    if missing < 0:
        raise ValueError(f"{name!r} has {vectors.shape[-1]} numbers; this policy holds at most {width}")
    return F.pad(vectors, (0, missing))


def refuse_misfits(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """One error that names every missing, unexpected and misshapen tensor."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
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
