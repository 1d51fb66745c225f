"""SmolVLAConfig: the settings of a SmolVLA policy, read from and written as LeRobot's `config.json`."""

import copy
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Self

from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from .features import ACTION, CAMERA_PREFIX, FEATURE_TYPES, NORMALIZATION_MODES, STATE, Feature

ALOHA_JOINTS = 14
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class SmolVLAConfig(PretrainedConfig):
    """All fields of LeRobot 0.6.2's SmolVLA configuration, in its order and with its defaults.

    Values are checked when the object is built. Features are checked when a policy is built from it, or by
    `with_features`, so that a file without features can serve as a template for any dataset.
    """

    model_type = "smolvla"

    n_obs_steps: int = 1
    """Moments of state and images in a batch; SmolVLA looks at the last one only."""
    input_features: dict[str, Feature] = field(default_factory=dict)
    """Cameras (in the order in which the prefix holds them) and the state; a camera's shape is [3, H, W]."""
    output_features: dict[str, Feature] = field(default_factory=dict)
    device: str | None = None
    use_amp: bool = False
    use_peft: bool = False
    push_to_hub: bool = True  # pyright: ignore[reportIncompatibleMethodOverride] -- LeRobot's name for it
    repo_id: str | None = None
    private: bool | None = None
    tags: list[str] | None = None
    license: str | None = None
    pretrained_path: str | None = None
    pretrained_revision: str | None = None
    chunk_size: int = 50
    """Actions predicted at once (H)."""
    n_action_steps: int = 50
    """Actions of a chunk that are executed before the next one is predicted."""
    normalization_mapping: dict[str, str] = field(
        default_factory=lambda: {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    )
    max_state_dim: int = 32
    max_action_dim: int = 32
    resize_imgs_with_padding: list[int] | None = field(default_factory=lambda: [512, 512])
    """(width, height) in pixels; null leaves images as they are."""
    empty_cameras: int = 0
    """How many declared cameras that a batch lacks are replaced by a masked image."""
    adapt_to_pi_aloha: bool = False
    use_delta_joint_actions_aloha: bool = False
    tokenizer_max_length: int = 48
    num_steps: int = 10
    """Euler steps of the sampler."""
    use_cache: bool = True
    freeze_vision_encoder: bool = True
    train_expert_only: bool = True
    train_state_proj: bool = True
    optimizer_lr: float = 1e-4
    optimizer_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 10
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6
    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    """A hub id, or a folder; a relative one is relative to the folder that this configuration came from."""
    load_vlm_weights: bool = False
    """Start from the VLM's published weights when a policy is built without a checkpoint."""
    add_image_special_tokens: bool = False
    attention_mode: str = "cross_attn"
    prefix_length: int = -1
    pad_language_to: str = "longest"
    num_expert_layers: int = -1
    """0 or less: as many as the VLM has."""
    num_vlm_layers: int = 16
    """The text model's first layers that are kept; 0 or less: all of them."""
    self_attn_every_n_layers: int = 2
    """Every n-th layer is joint self-attention; 0 or less: none, all layers cross-attend."""
    expert_width_multiplier: float = 0.75
    min_period: float = 4e-3
    max_period: float = 4.0
    rtc_config: dict[str, Any] | None = None
    compile_model: bool = False
    compile_mode: str = "max-autotune"

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(kwargs)
        super().__post_init__(**kwargs)
        self._check_values()

    # ---- reading and writing ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] -- fewer ways to be called
        cls, pretrained_model_name_or_path: str | Path, **overrides: Any
    ) -> Self:
        """Read the `config.json` of a checkpoint folder or hub id; every value comes from the file.

        Raises:
            ValueError: the file is not a SmolVLA configuration, or a field or value is wrong.
        """
        path = checkpoint_file(pretrained_model_name_or_path, "config.json")
        return cls.from_dict(json.loads(path.read_text()), name_or_path=str(path.parent), **overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        values = config_dict | kwargs
        source = values.get("name_or_path") or "the configuration"
        kind = values.pop("type", values.pop("model_type", None))
        if kind != "smolvla":
            raise ValueError(f"{source}: type {kind!r} is not 'smolvla'")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """LeRobot's `config.json`: its fields in its order, nothing else."""
        return {"type": self.model_type} | {name: copy.deepcopy(getattr(self, name)) for name in FIELDS}

    def to_diff_dict(self) -> dict[str, Any]:
        """The whole of it: a published value must never depend on a later default."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:  # noqa: FBT001, FBT002 -- transformers' signature
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] -- fewer ways to be called
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        if kwargs:
            raise ValueError(f"save_pretrained of a configuration takes no {sorted(kwargs)}")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.to_json_string())

    def changed(self, **values: Any) -> Self:
        """A checked copy with other values; it keeps the folder that relative paths refer to."""
        fields: dict[str, Any] = {name: copy.deepcopy(getattr(self, name)) for name in FIELDS}
        fields["name_or_path"] = self.name_or_path
        return type(self)(**fields | values)

    def vlm_source(self) -> str:
        """The VLM's folder, or its hub id.

        Raises:
            ValueError: `vlm_model_name` is neither a folder nor the form of a hub id.
        """
        folder = (Path(self.name_or_path or ".") / Path(self.vlm_model_name).expanduser()).resolve()
        if folder.is_dir():
            return str(folder)
        if HUB_ID.fullmatch(self.vlm_model_name):
            return self.vlm_model_name
        raise ValueError(
            f"vlm_model_name {self.vlm_model_name!r} is neither a folder ({folder} does not exist) "
            "nor a hub id (organisation/name)"
        )

    # ---- features ---------------------------------------------------------------------------------------

    @property
    def camera_names(self) -> list[str]:
        """Columns of the declared cameras, in prefix order."""
        return [name for name, feature in self.input_features.items() if feature["type"] == "VISUAL"]

    @property
    def state_dim(self) -> int:
        return self.input_features[STATE]["shape"][0]

    @property
    def action_dim(self) -> int:
        return self.output_features[ACTION]["shape"][0]

    def with_features(
        self,
        input_features: dict[str, Feature],
        output_features: dict[str, Feature],
        *,
        rename: Mapping[str, str] | None = None,
    ) -> Self:
        """A copy for a robot's cameras, state and action, checked.

        With `rename`, {column of the data: column of this policy}, a trained policy is fitted to other
        cameras: they take its names and its order, which is part of the weights. Its cameras that the data
        lack are dropped, cameras that it does not know come last.

        Raises:
            ValueError: names the feature, or the column that `rename` maps wrongly.
        """
        if rename is not None:
            input_features = self._renamed(input_features, rename)
        config = self.changed(
            input_features=copy.deepcopy(input_features), output_features=copy.deepcopy(output_features)
        )
        config.check_features()
        return config

    def _renamed(self, features: dict[str, Feature], rename: Mapping[str, str]) -> dict[str, Feature]:
        unknown = sorted(set(rename) - set(features))
        if unknown:
            raise ValueError(f"rename: the data have no column {unknown}; they have {sorted(features)}")
        names = [rename.get(name, name) for name in features]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"rename: several columns become {doubled}")
        renamed = dict(zip(names, features.values(), strict=True))
        return {name: renamed[name] for name in self.input_features if name in renamed} | renamed

    def check_features(self) -> None:
        """Refuse features that this policy cannot be built for.

        Raises:
            ValueError: names the feature, and what is wrong with it.
        """
        for group in ("input_features", "output_features"):
            for name, feature in getattr(self, group).items():
                check_feature(f"{group}[{name!r}]", name, feature)
        if not self.camera_names:
            raise ValueError(f"input_features has no camera (type VISUAL): {sorted(self.input_features)}")
        self._check_width("input_features", STATE, "STATE", "max_state_dim")
        self._check_width("output_features", ACTION, "ACTION", "max_action_dim")

    def _check_width(self, group: str, name: str, kind: str, limit: str) -> None:
        feature = getattr(self, group).get(name)
        if feature is None or feature["type"] != kind:
            raise ValueError(f"{group} needs {name!r} of type {kind}; it has {sorted(getattr(self, group))}")
        width = feature["shape"][0]
        if len(feature["shape"]) != 1 or width > getattr(self, limit):
            raise ValueError(
                f"{group}[{name!r}] has shape {feature['shape']}; "
                f"it must be one number up to {limit} {getattr(self, limit)}"
            )
        if self.adapt_to_pi_aloha and width != ALOHA_JOINTS:
            raise ValueError(f"adapt_to_pi_aloha needs {ALOHA_JOINTS} joints; {name!r} has {width}")

    # ---- values -----------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        for name in (
            "n_obs_steps",
            "chunk_size",
            "n_action_steps",
            "max_state_dim",
            "max_action_dim",
            "num_steps",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        require(
            self.n_action_steps <= self.chunk_size,
            "n_action_steps",
            self.n_action_steps,
            f"at most chunk_size {self.chunk_size}",
        )
        require(
            self.tokenizer_max_length > 0, "tokenizer_max_length", self.tokenizer_max_length, "at least 1"
        )
        require(self.empty_cameras >= 0, "empty_cameras", self.empty_cameras, "0 or more")
        require(
            not self.use_delta_joint_actions_aloha,
            "use_delta_joint_actions_aloha",
            self.use_delta_joint_actions_aloha,
            "false: neither LeRobot nor this package computes delta joint actions",
        )
        require(
            self.attention_mode in ("cross_attn", "self_attn"),
            "attention_mode",
            self.attention_mode,
            "'cross_attn' or 'self_attn'",
        )
        require(
            self.pad_language_to in ("longest", "max_length"),
            "pad_language_to",
            self.pad_language_to,
            "'longest' or 'max_length'",
        )
        require(
            0 < self.min_period < self.max_period,
            "min_period",
            self.min_period,
            f"positive and below max_period {self.max_period}",
        )
        require(
            self.expert_width_multiplier > 0,
            "expert_width_multiplier",
            self.expert_width_multiplier,
            "positive",
        )
        box = self.resize_imgs_with_padding
        require(
            box is None or (len(box) == 2 and all(isinstance(side, int) and side > 0 for side in box)),
            "resize_imgs_with_padding",
            box,
            "[width, height] in pixels, or null",
        )
        for kind, mode in self.normalization_mapping.items():
            require(
                kind in FEATURE_TYPES, "normalization_mapping", kind, f"keyed by {', '.join(FEATURE_TYPES)}"
            )
            require(
                mode in NORMALIZATION_MODES,
                f"normalization_mapping[{kind!r}]",
                mode,
                f"one of {', '.join(NORMALIZATION_MODES)}",
            )


FIELDS = tuple(SmolVLAConfig.__annotations__)
# What transformers itself may hand to a configuration besides its fields.
TRANSFORMERS_FIELDS = ("name_or_path", "transformers_version", "attn_implementation")


def require(holds: bool, name: str, value: Any, wanted: str) -> None:  # noqa: FBT001 -- reads as a sentence
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def refuse_unknown_fields(extra: dict[str, Any]) -> None:
    for name in extra:
        if name in TRANSFORMERS_FIELDS or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"SmolVLAConfig has no field {name!r}{hint}")


def check_feature(label: str, name: str, feature: Feature) -> None:
    """One feature has a known type and a shape of positive whole numbers; a camera is [3, H, W]."""
    if not isinstance(feature, dict) or set(feature) != {"type", "shape"}:
        raise ValueError(f'{label} is {feature!r}; it must be {{"type": ..., "shape": [...]}}')
    kind, shape = feature["type"], feature["shape"]
    if kind not in FEATURE_TYPES:
        raise ValueError(f"{label} has type {kind!r}; it must be one of {', '.join(FEATURE_TYPES)}")
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"{label} has shape {shape!r}; it must be positive whole numbers")
    if kind == "VISUAL" and (len(shape) != 3 or shape[0] != 3):
        raise ValueError(f"{label} has shape {shape!r}; a camera is [3, height, width]")
    if kind == "VISUAL" and not name.startswith(CAMERA_PREFIX):
        raise ValueError(f"{label}: a camera's name starts with {CAMERA_PREFIX!r}")


def checkpoint_file(source: str | Path, filename: str) -> Path:
    """A file of a local folder or of a hub id (downloaded or from the cache).

    Raises:
        FileNotFoundError: the folder lacks the file.
        OSError: the hub id is unknown, or there is no network and nothing is cached.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / filename
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {filename}")
        return path
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor a hub id (organisation/name)")
    try:
        path = cached_file(str(source), filename)
    except OSError as error:
        raise OSError(f"{filename} of the hub id {source!r} could not be read: {error}") from error
    assert path is not None  # cached_file raises for a missing entry unless told otherwise
    return Path(path)
