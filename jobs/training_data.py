"""The data of a training run: dataset flags -> checked datasets, features, sources and processor."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dataset import EpisodeDataset, data_sizes, open_dataset
from pipelines.features import StoredFeatures
from pipelines.samples import Source
from pipelines.sources.mapping import unknown_name
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import tokenize_tasks
from smolvla.features import Feature, Normalizer
from smolvla.processing import SmolVLAProcessor

ENTRY_FIELDS = ("path", "name", "weight", "rename")
FEATURES = ("auto", "off", "required", "stream")
DECODING = ("auto", "tasks", "workers")
NAME = re.compile(r"[\w-][\w .-]*")  # what a folder and an MLflow metric may both be called


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    path: str = ""
    """Episode dataset: a folder or a URI."""
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """Several datasets instead of `path`, each {path, weight, rename, name}; JSON on the command line.
    Weights are shares in any unit, given to all or none (then: numbers of frames); rename is that of this
    dataset's cameras; the name, which metrics carry, is the end of the path unless given."""
    export: str = ""
    """Name of the dataset of a mixture whose robot the exported policy is for: whose statistics it normalises
    with. Empty: the first. Those of all are in processors/<name>/ beside it."""
    fps: float | None = None
    """Frames a second of the policy: of its actions, and of its observations if it sees several. None: those
    of the data, which must agree. Not above the data's; every frame of the data is still trained on."""
    features: str = "auto"
    """auto, off, required or stream: train from what jobs/cache_features.py stored beside the datasets, not
    from their images. auto: where all have it and it fits, saying why not otherwise; required: refuse to
    start without; stream: actors run the frozen tower while the workers train, and nothing is stored."""
    tower_actors: int = 1
    """With features stream: the actors."""
    tower_cpus: float = 1.0
    """Of each of them."""
    tower_gpus: float = 0.0
    """Of each of them; a part of one is possible."""
    decoding: str = "auto"
    """Who decodes images: tasks, on all nodes; workers, threads of the train workers, which spares the images
    the way through the object store. auto: the workers, unless the cluster has nodes that none of them is on,
    or images are augmented. Numbers and order do not depend on it."""
    max_bad_rows: int = 0
    """Different rows with unusable images (cut off, of another size) that the run bears: they are masked out
    of the loss, named in <run>/bad_rows.json and counted as data/bad_rows."""

    def __post_init__(self) -> None:
        for name, known in (("features", FEATURES), ("decoding", DECODING)):
            if (value := getattr(self, name)) not in known:  # no Literal: to YAML, unquoted, `off` is no word
                hint = '; in a YAML file "off" needs quotes' if value == "False" else ""
                raise ValueError(f"dataset.{name} {value!r} is none of {', '.join(known)}{hint}")
        if (self.decoding, self.features) == ("workers", "stream"):
            raise ValueError("dataset.decoding workers: the tower of dataset.features stream needs tasks")
        if self.tower_actors < 1:
            raise ValueError(f"dataset.tower_actors {self.tower_actors} is below 1")
        for name in ("max_bad_rows", "tower_cpus", "tower_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"dataset.{name} {getattr(self, name)} is negative")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"dataset.fps {self.fps} is not positive")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset as the flags name it."""

    path: str
    name: str
    weight: float | None = None
    rename: Mapping[str, str]
    flag: str
    """Where it was said, for errors."""
    rename_flag: str


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The opened datasets of a run, one for each entry."""

    entries: Sequence[Entry]
    datasets: Sequence[EpisodeDataset]
    export: int
    """Number of the dataset whose statistics the exported policy gets."""
    fps: float
    """Frames a second of the policy."""

    def identity(self) -> dict[str, Any]:
        """What of the data a run is; one dataset is named as before there were mixtures."""
        own = all(dataset.fps == self.fps for dataset in self.datasets)
        policy_fps = None if own else self.fps
        if len(self.entries) == 1:
            rename = dict(self.entries[0].rename)
            return {
                "dataset_fingerprint": self.datasets[0].fingerprint,
                "rename": rename,
                "policy_fps": policy_fps,
            }
        mixture = [
            {
                "name": entry.name,
                "fingerprint": dataset.fingerprint,
                "weight": entry.weight,
                "rename": dict(entry.rename),
            }
            for entry, dataset in zip(self.entries, self.datasets, strict=True)
        ]
        return {"mixture": mixture, "export": self.entries[self.export].name, "policy_fps": policy_fps}


# ---- what the flags say ------------------------------------------------------------------------------------


def entries(options: DatasetOptions, *, rename: Mapping[str, str]) -> list[Entry]:
    """The datasets that the flags name, one or several.

    Raises:
        ValueError: names the flag, the field of the entry, and the value.
    """
    if not options.mixture:
        if not options.path:
            raise ValueError("dataset.path is missing; dataset.mixture takes several datasets")
        name = Path(options.path).name
        found = [Entry(path=options.path, name=name, rename=rename, flag="dataset", rename_flag="rename")]
    else:
        if options.path:
            raise ValueError(f"dataset.path {options.path!r} and dataset.mixture are both given; take one")
        if rename:
            raise ValueError(
                f"rename {dict(rename)} is of dataset.path; entries of dataset.mixture have theirs"
            )
        found = [_entry(f"dataset.mixture[{i}]", given) for i, given in enumerate(options.mixture)]
        _check_together(found)
    names = [entry.name for entry in found]
    if options.export and options.export not in names:
        raise unknown_name("dataset.export", repr(options.export), [repr(name) for name in names])
    return found


def _entry(flag: str, given: Mapping[str, Any]) -> Entry:
    for field_name in given:
        if field_name not in ENTRY_FIELDS:
            raise unknown_name(f"field of {flag}:", field_name, ENTRY_FIELDS)
    values = {name: value for name, value in given.items() if value is not None}
    path, weight, rename = values.get("path", ""), values.get("weight"), values.get("rename", {})
    if not isinstance(path, str) or not path:
        raise ValueError(f"{flag}.path is missing" if not path else f"{flag}.path {path!r} is not a text")
    name = values.get("name", Path(path).name)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{flag}.name {name!r}: letters, digits, blanks, '.', '-' and '_' make a name")
    if weight is not None and not _is_positive(weight):
        raise ValueError(f"{flag}.weight {weight!r} is not a positive number")
    if not isinstance(rename, dict) or not all(isinstance(target, str) for target in rename.values()):
        raise ValueError(f"{flag}.rename {rename!r} is not a mapping of cameras to cameras")
    return Entry(path=path, name=name, weight=weight, rename=rename, flag=flag, rename_flag=f"{flag}.rename")


def _is_positive(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf


def _check_together(found: Sequence[Entry]) -> None:
    with_weight = [entry for entry in found if entry.weight is not None]
    if with_weight and len(with_weight) < len(found):
        without = next(entry for entry in found if entry.weight is None)
        raise ValueError(
            f"{without.flag}.weight is missing, {with_weight[0].flag}.weight is {with_weight[0].weight}: "
            "give every dataset a weight, or none"
        )
    for number, entry in enumerate(found):
        for other in found[:number]:
            if entry.name == other.name:
                raise ValueError(
                    f"{entry.flag}.name {entry.name!r} is also that of {other.flag}; give one another name"
                )


def readable(path: str, *, flag: str) -> str:
    """The path, if there is something."""
    if "://" in path or Path(path).expanduser().exists():
        return path
    where = "" if Path(path).is_absolute() else f" (relative to the job's working directory {Path.cwd()})"
    raise ValueError(f"{flag} {path!r} does not exist{where}")


def whole_dataset(path: str, *, flag: str) -> EpisodeDataset:
    """A dataset whose files are all there.

    Raises:
        ValueError: names the flag or the file.
    """
    dataset = open_dataset(readable(path, flag=flag))
    data_sizes(dataset)
    return dataset


def opened(options: DatasetOptions, *, rename: Mapping[str, str]) -> TrainingData:
    """Open every dataset that the flags name.

    Raises:
        ValueError: a flag is wrong, or a dataset cannot be used.
    """
    found = entries(options, rename=rename)
    datasets = [whole_dataset(entry.path, flag=f"{entry.flag}.path") for entry in found]
    check_widths(datasets)
    fps = _policy_fps(options, datasets)
    names = [entry.name for entry in found]
    export = names.index(options.export) if options.export else 0
    return TrainingData(entries=found, datasets=datasets, export=export, fps=fps)


def check_widths(datasets: Sequence[EpisodeDataset]) -> None:
    """Refuse datasets of robots that one policy cannot have."""
    first = datasets[0]
    for name in ("observation.state", "action"):
        for other in datasets[1:]:
            widths = [dataset.features[name]["shape"] for dataset in (first, other)]
            if widths[0] != widths[1]:
                raise ValueError(
                    f"{first.uri} and {other.uri}: {name!r} has {widths[0]} and {widths[1]} numbers; "
                    "one policy has one width"
                )


def _policy_fps(options: DatasetOptions, datasets: Sequence[EpisodeDataset]) -> float:
    slowest = min(datasets, key=lambda dataset: dataset.fps)
    fastest = max(datasets, key=lambda dataset: dataset.fps)
    if options.fps is None and slowest.fps != fastest.fps:
        raise ValueError(
            f"{slowest.uri} has {slowest.fps} frames a second and {fastest.uri} {fastest.fps}; "
            f"say with dataset.fps at how many the policy acts, up to {slowest.fps}"
        )
    if options.fps is not None and options.fps > slowest.fps:
        raise ValueError(
            f"dataset.fps {options.fps:g} is above the {slowest.fps} frames a second of {slowest.uri}"
        )
    return slowest.fps if options.fps is None else options.fps


# ---- what the policy gets ----------------------------------------------------------------------------------


def fitted(template: SmolVLAConfig, data: TrainingData, *, policy_path: str) -> SmolVLAConfig:
    """The policy's config with the cameras of all datasets, and the state and action that they share.

    Raises:
        ValueError: names that look like another robot's, or features that the policy cannot be built for.
    """
    inputs: dict[str, Feature] = {}
    known = set(template.camera_names)
    for entry, dataset in zip(data.entries, data.datasets, strict=True):
        _check_rename(entry, dataset, known=known)
        for name, feature in dataset.policy_features()[0].items():
            inputs.setdefault(entry.rename.get(name, name), feature)
    found = {name for name, feature in inputs.items() if feature["type"] == "VISUAL"}
    renamed = any(entry.rename for entry in data.entries)
    if known and not renamed and not (found <= known or found >= known):
        raise ValueError(
            f"policy.path {policy_path}: it knows the cameras {sorted(known)}, the dataset has "
            f"{sorted(found)}; say with --rename which is which"
        )
    return template.with_features(inputs, data.datasets[0].policy_features()[1], rename={})


def _check_rename(entry: Entry, dataset: EpisodeDataset, *, known: set[str]) -> None:
    """Refuse cameras that are not there. Fewer or more than the policy's are what fine-tuning is for."""
    flag, cameras = entry.rename_flag, dataset.camera_names
    for name, target in entry.rename.items():
        if name not in cameras:
            raise ValueError(f"{flag}: {name!r} is no camera of the dataset, it has {cameras}")
        if known and target not in known:
            raise ValueError(f"{flag}: {target!r} is no camera of the policy, it has {sorted(known)}")
    targets = [entry.rename.get(name, name) for name in cameras]
    doubled = sorted({name for name in targets if targets.count(name) > 1})
    if doubled:
        raise ValueError(f"{flag}: several columns become {doubled}")


@contextlib.contextmanager
def readable_vlm(config: SmolVLAConfig) -> Iterator[None]:
    """Name the VLM when its files cannot be read: transformers speaks at length of hubs and caches."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"vlm_model_name {config.vlm_model_name!r} of the policy: {reason}") from None


def sources(
    data: TrainingData, config: SmolVLAConfig, *, features: Sequence[StoredFeatures] = ()
) -> list[Source]:
    """The datasets with their own statistics, tokens and cameras, for the stream; with features, if given."""
    each = features or [None] * len(data.datasets)
    return [
        replace(_source(entry, dataset, config), features=own)
        for entry, dataset, own in zip(data.entries, data.datasets, each, strict=True)
    ]


def _source(entry: Entry, dataset: EpisodeDataset, config: SmolVLAConfig) -> Source:
    features = config.input_features | config.output_features
    normalizer = Normalizer(dataset.stats, features, config.normalization_mapping)
    with readable_vlm(config):
        tokens, mask = tokenize_tasks(
            list(dataset.tasks),
            config.vlm_source(),
            max_length=config.tokenizer_max_length,
            padding=config.pad_language_to,
        )
    return Source(
        dataset,
        normalizer,
        np.asarray(tokens),
        np.asarray(mask),
        weight=entry.weight,
        rename=entry.rename,
        name=entry.name,
    )


def processor(data: TrainingData, config: SmolVLAConfig) -> SmolVLAProcessor:
    """What is exported with the policy: statistics and cameras of the chosen dataset, and of all beside."""
    made = [
        SmolVLAProcessor(config, _renamed_stats(entry, dataset), rename=entry.rename)
        for entry, dataset in zip(data.entries, data.datasets, strict=True)
    ]
    exported = made[data.export]
    if len(made) > 1:
        names = [entry.name for entry in data.entries]
        exported.of_datasets = {name: one.files for name, one in zip(names, made, strict=True)}
    return exported


def _renamed_stats(entry: Entry, dataset: EpisodeDataset) -> dict[str, Any]:
    return {entry.rename.get(name, name): values for name, values in dataset.stats.items()}
