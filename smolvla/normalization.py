"""The normalisation files of a checkpoint: LeRobot's processors read and written, and its older buffers read.

A checkpoint says in one of three ways how its state and actions were normalised: `policy_preprocessor.json`
with a safetensors file of statistics, the same under an older name, or buffers among the weights.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .configuration import SmolVLAConfig, checkpoint_file
from .features import EPS, Feature, Normalizer
from .tensor_files import write_tensors

Statistics = dict[str, dict[str, Any]]
"""{feature: {statistic: value}} as in `meta/stats.json`."""

BEFORE, AFTER = "policy_preprocessor", "policy_postprocessor"
WEIGHTS = "model.safetensors"
DATASETS = "processors"
"""Folder of a checkpoint with the files of each dataset of the mixture that it was trained on, by name."""
# Newest first; the second pair is of LeRobot before its processors got the policy's name.
PROCESSOR_FILES = ((BEFORE, AFTER), ("preprocessor", "postprocessor"))
# `normalize_inputs.buffer_observation_state.mean`; a base trained on several robots has a buffer of each:
# `normalize_inputs.so100-red_buffer_observation_state.mean`.
BUFFER = re.compile(
    r"(?:.*\.)?(?:normalize_inputs|normalize_targets|unnormalize_outputs)"
    r"\.(?:(?P<robot>[\w-]+?)_)?buffer_(?P<feature>\w+)\.(?P<statistic>\w+)"
)
# What the migration of such a base left behind: `so100.buffer.action`.
MIGRATED = re.compile(r"(?P<robot>[\w-]+)\.buffer\.(?P<feature>.+)")


@dataclass(frozen=True, kw_only=True)
class NormalizationFiles:
    """What a checkpoint's processor files say; the settings of a fresh policy when it has none yet."""

    stats: Statistics
    features: dict[str, Feature]
    """What the statistics belong to; published configurations may contradict it, and then it is right."""
    rename: dict[str, str] = field(default_factory=dict)
    """Column of the data -> column of the policy."""
    max_length: int
    """Tokens of an instruction."""
    padding: str
    """Of instructions, "longest" or "max_length"."""


def settings_of(config: SmolVLAConfig, stats: Mapping[str, Any]) -> NormalizationFiles:
    """The files that a policy with these statistics gets."""
    return NormalizationFiles(
        stats={name: dict(values) for name, values in stats.items()},
        features=config.input_features | config.output_features,
        max_length=config.tokenizer_max_length,
        padding=config.pad_language_to,
    )


def normalizer_of(files: NormalizationFiles, config: SmolVLAConfig) -> Normalizer:
    """Normalises state and actions; images are not normalised by statistics.

    Raises:
        ValueError: statistics are missing, not finite or of another width, or the mapping asks for images to
            be normalised, which the vision tower was not trained with.
    """
    if config.normalization_mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise ValueError(
            f"normalization_mapping['VISUAL'] is {config.normalization_mapping['VISUAL']!r}; "
            "SmolVLA scales images itself, it must be 'IDENTITY'"
        )
    vectors = {name: feature for name, feature in files.features.items() if feature["type"] != "VISUAL"}
    for name in vectors.keys() & files.stats.keys():
        for which, value in files.stats[name].items():
            if not np.isfinite(np.asarray(value, dtype=np.float32)).all():
                raise ValueError(f"the statistic {which!r} of {name!r} is not finite: {value}")
    return Normalizer(files.stats, vectors, config.normalization_mapping)


# ---- reading ----------------------------------------------------------------------------------------------


def has_statistics(source: str | Path) -> bool:
    """Whether a checkpoint folder or hub id says anything about normalisation, well or badly."""
    if any(_found(source, f"{before}.json") for before, _ in PROCESSOR_FILES):
        return True
    weights = _found(source, WEIGHTS)
    return weights is not None and any(BUFFER.fullmatch(name) for name in tensor_names(weights))


def read_normalization(
    source: str | Path, config: SmolVLAConfig, *, robot: str | None = None
) -> NormalizationFiles:
    """How the checkpoint in a folder or of a hub id was normalised, in whichever form it says so.

    Args:
        source: a folder or a hub id.
        config: the checkpoint's configuration.
        robot: whose statistics to take where a base checkpoint has those of several ("so100-red"), or where
            a folder has those of each dataset of a mixture.

    Raises:
        ValueError: the checkpoint has no statistics, or none that belong to its state and actions.
    """
    if robot is not None and (names := dataset_names(source)):
        _check_robot(robot, names, Path(source))
        source, robot = Path(source) / DATASETS / robot, None
    for before, after in PROCESSOR_FILES:
        path = _found(source, f"{before}.json")
        if path is not None:
            files = _read_processors(source, path, f"{after}.json", robot)
            break
    else:
        files = settings_of(config, _read_buffers(source, config, robot))
    try:
        normalizer_of(files, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return files


def dataset_names(source: str | Path) -> list[str]:
    """The datasets of a mixture whose own processor files a folder has."""
    return sorted(path.name for path in (Path(source) / DATASETS).glob("*") if path.is_dir())


def _found(source: str | Path, filename: str) -> Path | None:
    try:
        return checkpoint_file(source, filename)
    except OSError:  # FileNotFoundError of a folder, or the hub's
        return None


def _read_processors(source: str | Path, before: Path, after: str, robot: str | None) -> NormalizationFiles:
    """Only steps known by registry name are looked at; a "class" entry could name any code to import."""
    steps = _steps(before)
    if "normalizer_processor" not in steps:
        raise ValueError(f"{before} has no normalizer_processor; it has {sorted(steps)}")
    step = steps["normalizer_processor"]
    _check_eps(before, step)
    stats = _of_robot(_read_state(source, step), robot, before)
    after_path = _found(source, after)
    if after_path is not None:
        last = _steps(after_path).get("unnormalizer_processor", {})
        _check_eps(after_path, last)
        _check_agreement(stats, _of_robot(_read_state(source, last), robot, after_path), after_path)
    tokenizer = steps.get("tokenizer_processor", {}).get("config", {})
    renaming = steps.get("rename_observations_processor", steps.get("rename_processor", {}))
    return NormalizationFiles(
        stats=stats,
        features=step["config"]["features"],
        rename=renaming.get("config", {}).get("rename_map", {}),
        max_length=tokenizer.get("max_length", 48),
        padding=tokenizer.get("padding", "longest"),
    )


def _steps(path: Path) -> dict[str, dict[str, Any]]:
    steps = json.loads(path.read_text())["steps"]
    return {step["registry_name"]: step for step in steps if "registry_name" in step}


def _check_eps(path: Path, step: Mapping[str, Any]) -> None:
    eps = step.get("config", {}).get("eps", EPS)
    if eps != EPS:
        raise ValueError(f"{path}: eps is {eps}; only {EPS} is known")


def _read_state(source: str | Path, step: Mapping[str, Any]) -> Statistics:
    """Safetensors `<feature>.<statistic>`; a step without a file has no statistics."""
    stats: Statistics = {}
    if "state_file" not in step:
        return stats
    for key, tensor in load_file(checkpoint_file(source, step["state_file"])).items():
        feature, _, which = key.rpartition(".")
        stats.setdefault(feature, {})[which] = tensor.float().numpy()
    return stats


def _check_agreement(stats: Statistics, others: Statistics, path: Path) -> None:
    for name in stats.keys() & others.keys():
        for which in stats[name].keys() & others[name].keys():
            if not np.array_equal(stats[name][which], others[name][which]):
                raise ValueError(f"{path}: {which!r} of {name!r} contradicts the pre-processor's")


def _of_robot(stats: Statistics, robot: str | None, path: Path) -> Statistics:
    """Statistics keyed `<robot>.buffer.<feature>` belong to no feature until a robot is chosen."""
    keys = {name: match for name in stats if (match := MIGRATED.fullmatch(name))}
    robots = sorted({match["robot"] for match in keys.values()})
    if not robots:
        return stats
    if robot is None:
        raise ValueError(
            f"{path}: the statistics belong to robots ({', '.join(robots)}), not to this policy's features; "
            "choose one with robot=..., or give stats of your own"
        )
    _check_robot(robot, robots, path)
    plain = {name: values for name, values in stats.items() if name not in keys}
    return plain | {match["feature"]: stats[name] for name, match in keys.items() if match["robot"] == robot}


def _check_robot(robot: str, robots: Iterable[str], path: Path) -> None:
    if robot not in robots:
        raise ValueError(f"{path}: no statistics of robot {robot!r}; there are {sorted(robots)}")


def _read_buffers(source: str | Path, config: SmolVLAConfig, robot: str | None) -> Statistics:
    path = checkpoint_file(source, WEIGHTS)
    matches = {name: match for name in tensor_names(path) if (match := BUFFER.fullmatch(name))}
    if not matches:
        raise ValueError(
            f"{source} has no statistics: neither {BEFORE}.json nor normalisation buffers in {WEIGHTS}; "
            "give stats of your own"
        )
    robots = sorted({match["robot"] for match in matches.values() if match["robot"]})
    if robot is not None:
        _check_robot(robot, robots, path)
    elif len(robots) > 1:
        raise ValueError(f"{path} has statistics of the robots {', '.join(robots)}; choose with robot=...")
    elif robots:
        robot = robots[0]
    # The buffers' names lost their dots, which only the features' names bring back.
    plain = {name.replace(".", "_"): name for name in config.input_features | config.output_features}
    stats: Statistics = {}
    with safe_open(path, framework="np") as file:
        for name, match in matches.items():
            feature = plain.get(match["feature"], match["feature"])
            if match["robot"] not in (None, robot):
                continue
            value = file.get_tensor(name).astype(np.float32)
            known = stats.setdefault(feature, {}).setdefault(match["statistic"], value)
            if not np.array_equal(known, value, equal_nan=True):
                raise ValueError(f"{path}: {name} contradicts another buffer of {feature!r}")
    return stats


def tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def without_buffers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an older checkpoint."""
    return {name: tensor for name, tensor in tensors.items() if not BUFFER.fullmatch(name)}


# ---- writing ----------------------------------------------------------------------------------------------


def write_normalization(
    folder: Path, config: SmolVLAConfig, files: NormalizationFiles, *, dataset: str | None = None
) -> None:
    """LeRobot's pre- and post-processor of a policy, with the statistics of its dataset.

    Those of a `dataset` of a mixture go into a folder of that name, written so that they work when they are
    copied over the checkpoint's own.

    Raises:
        ValueError: a feature lacks the statistics that its normalisation needs.
    """
    normalizer_of(files, config)  # refuse before anything is written
    outputs = {name: feature for name, feature in files.features.items() if name in config.output_features}
    before = _steps_before(folder, config, files)
    if dataset is not None:
        folder = folder / DATASETS / dataset
        folder.mkdir(parents=True, exist_ok=True)
    after = [
        _normalization_step("unnormalizer_processor", outputs, config, AFTER, step=0),
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    tensors = {
        f"{name}.{which}": torch.tensor(np.atleast_1d(np.asarray(value, dtype=np.float32)))
        for name, values in files.stats.items()
        for which, value in values.items()
    }
    for name, steps in ((BEFORE, before), (AFTER, after)):
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}, indent=2) + "\n")
        for step in steps:
            if "state_file" in step:
                write_tensors(tensors, folder / step["state_file"])


def _steps_before(folder: Path, config: SmolVLAConfig, files: NormalizationFiles) -> list[dict[str, Any]]:
    is_beside = (folder / config.vlm_model_name).is_dir()
    tokenizer = {
        "max_length": files.max_length,
        "task_key": "task",
        "padding_side": "right",
        "padding": files.padding,
        "truncation": True,
        "tokenizer_name": config.vlm_model_name,
    }
    return [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": dict(files.rename)}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokenizer}
        # an artifact is a folder beside the file; a hub id needs none
        | ({"artifacts": {"tokenizer_name": config.vlm_model_name}} if is_beside else {}),
        {
            "registry_name": "device_processor",
            "config": {"device": config.device or "cpu", "float_dtype": None},
        },
        _normalization_step("normalizer_processor", files.features, config, BEFORE, step=5),
    ]


def _normalization_step(
    registry_name: str, features: Mapping[str, Feature], config: SmolVLAConfig, file: str, *, step: int
) -> dict[str, Any]:
    return {
        "registry_name": registry_name,
        "config": {"eps": EPS, "features": dict(features), "norm_map": dict(config.normalization_mapping)},
        "state_file": f"{file}_step_{step}_{registry_name}.safetensors",
    }
