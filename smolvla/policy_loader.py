"""IL-Studio's way in: policies described by a YAML file, and the functions it looks for in their module.

The folder works under any name, such as `policy.smolvla` inside IL-Studio's tree: the YAML file says which.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import yaml

from .configuration import FIELDS, SmolVLAConfig
from .features import ACTION, STATE, Feature
from .modeling import SmolVLAPolicy
from .processing import SmolVLAProcessor, data_collator

# Settings of a model that are no field of its configuration.
ROBOT_ARGS = ("camera_names", "state_dim", "action_dim", "image_size")
MODEL_ARGS = (*ROBOT_ARGS, "allow_random_vlm", "compile", "stats")
DEFAULT_IMAGE_SIZE = (480, 640)
"""(height, width) in pixels; declared only, images of any size are taken."""


@dataclass(frozen=True, kw_only=True)
class PolicyDescription:
    """What a policy's YAML file says; names are attributes of the module."""

    name: str
    module_path: str
    config_class: str
    model_class: str
    data_processor: str
    data_collator: str
    trainer_class: str
    pretrained_config: Mapping[str, Any] = field(default_factory=dict)
    """model_name_or_path: the checkpoint to start from (null: none); and what to change in its config."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Of a policy that starts from nothing: see `load_model`. A checkpoint brings its own values."""


class PolicyLoader:
    """Finds policies by YAML file, or by name in `policy_folder`."""

    def __init__(self, policy_folder: str | Path = "configs/policy") -> None:
        self.policy_folder = Path(policy_folder)

    def load_policy_config(self, policy: str | Path | PolicyDescription) -> PolicyDescription:
        """Read a YAML file; a bare name is one in the policy folder, and what was read is taken as it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a key is missing or unknown.
        """
        if isinstance(policy, PolicyDescription):
            return policy
        path = Path(policy)
        if path.suffix not in (".yaml", ".yml"):
            path = self.policy_folder / f"{policy}.yaml"
        values = yaml.safe_load(path.read_text())
        known = {f.name for f in fields(PolicyDescription)}
        required = known - {"pretrained_config", "model_args"}
        if not isinstance(values, dict) or set(values) - known or required - set(values):
            found = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"{path} has {found}; it needs {sorted(required)}, and may have {sorted(known)}")
        return PolicyDescription(**{name: value for name, value in values.items() if value is not None})

    def load_model(self, policy: str | Path | PolicyDescription, args: Any = None) -> dict[str, Any]:
        """The module's `load_model` with the file's settings, which attributes of `args` replace."""
        description = self.load_policy_config(policy)
        merged = copy.copy(args) if args is not None else SimpleNamespace()
        pretrained = dict(description.pretrained_config)
        source = getattr(args, "model_name_or_path", None) or pretrained.pop("model_name_or_path", None)
        pretrained.pop("model_name_or_path", None)
        settings = pretrained if source and getattr(args, "is_pretrained", True) else description.model_args
        merged.model_name_or_path = source
        merged.model_args = {**settings, **(getattr(args, "model_args", None) or {})}
        return self.load_module(description).load_model(merged)

    def load_module(self, description: PolicyDescription) -> ModuleType:
        return importlib.import_module(description.module_path)

    def get_data_processor(
        self, policy: str | Path | PolicyDescription, args: Any, model_components: Mapping[str, Any]
    ) -> Any:
        description = self.load_policy_config(policy)
        make = getattr(self.load_module(description), description.data_processor)
        return make(args, model_components)

    def get_data_collator(
        self, policy: str | Path | PolicyDescription, args: Any, model_components: Mapping[str, Any]
    ) -> Any:
        description = self.load_policy_config(policy)
        make = getattr(self.load_module(description), description.data_collator)
        return make(args, model_components)

    def get_trainer_class(self, policy: str | Path | PolicyDescription) -> type:
        description = self.load_policy_config(policy)
        return getattr(self.load_module(description), description.trainer_class)


def load_model(args: Any) -> dict[str, Any]:
    """The policy that IL-Studio's arguments ask for.

    `args.model_name_or_path`: a checkpoint; without one (or with `args.is_pretrained` False) the policy
    starts from its configuration. `args.model_args`: fields of SmolVLAConfig, and camera_names, state_dim,
    action_dim, image_size (height, width), allow_random_vlm, compile, stats. Without a checkpoint, the four
    about the robot and chunk_size may be attributes of `args` itself, as in IL-Studio. `args.device`: where
    the model goes; the CPU if absent.

    Returns:
        model and config.

    Raises:
        ValueError: an unknown setting, or one that does not fit.
    """
    settings = dict(getattr(args, "model_args", None) or {})
    source = getattr(args, "model_name_or_path", None)
    if not getattr(args, "is_pretrained", True):
        source = None
    if not source:
        settings |= robot_attributes(args, settings)
    unknown = sorted(set(settings) - set(FIELDS) - set(MODEL_ARGS))
    if unknown:
        raise ValueError(f"model_args has unknown settings {unknown}")
    policy = _pretrained(source, settings) if source else _fresh(settings)
    if settings.get("stats") is not None:
        policy.processor = SmolVLAProcessor(policy.config, settings["stats"])
    if settings.get("compile"):
        policy.compile_sampling()
    policy.to(getattr(args, "device", None) or "cpu")
    return {"model": policy, "config": policy.config}


def robot_attributes(args: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What IL-Studio's task says about the robot and `settings` do not."""
    names = [name for name in (*ROBOT_ARGS, "chunk_size") if getattr(args, name, None) is not None]
    return {name: getattr(args, name) for name in names if name not in ROBOT_ARGS or name not in settings}


def _pretrained(source: str, settings: Mapping[str, Any]) -> SmolVLAPolicy:
    config = SmolVLAConfig.from_pretrained(source)
    config = config.changed(**_fields(settings))
    if any(name in settings for name in ROBOT_ARGS):
        config = config.with_features(*_features(settings))
    return SmolVLAPolicy.from_pretrained(source, config=config)


def _fresh(settings: Mapping[str, Any]) -> SmolVLAPolicy:
    config = SmolVLAConfig(**_fields(settings))
    if not config.input_features:
        config = config.with_features(*_features(settings))
    return SmolVLAPolicy(config, allow_random_vlm=bool(settings.get("allow_random_vlm")))


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's fields; a shorter chunk cannot execute more actions than it has."""
    values = {name: value for name, value in settings.items() if name in FIELDS}
    if "chunk_size" in values:
        values.setdefault("n_action_steps", values["chunk_size"])
    return values


def _features(settings: Mapping[str, Any]) -> tuple[dict[str, Feature], dict[str, Feature]]:
    missing = [name for name in ("camera_names", "state_dim", "action_dim") if not settings.get(name)]
    if missing:
        raise ValueError(f"model_args lacks {missing}, which a policy of a new robot needs")
    size = list(settings.get("image_size") or DEFAULT_IMAGE_SIZE)
    names = settings["camera_names"]
    names = yaml.safe_load(names) if isinstance(names, str) else names  # IL-Studio's tasks: "['primary']"
    cameras = [
        name if name.startswith("observation.image") else f"observation.images.{name}" for name in names
    ]
    inputs: dict[str, Feature] = {name: {"type": "VISUAL", "shape": [3, *size]} for name in cameras}
    inputs[STATE] = {"type": "STATE", "shape": [settings["state_dim"]]}
    return inputs, {ACTION: {"type": "ACTION", "shape": [settings["action_dim"]]}}


def get_data_processor(args: Any, model_components: Mapping[str, Any]) -> SmolVLAProcessor:
    """The model's processor: one raw sample -> columns for the policy."""
    return model_components["model"].processor


def get_data_collator(args: Any, model_components: Mapping[str, Any]) -> Callable[[Any], Any]:
    """`data_collator` with the padding token of the model's tokenizer."""
    tokenizer = model_components["model"].processor.tokenizer
    return functools.partial(data_collator, pad_token_id=tokenizer.pad_token_id or 0)
