"""What a run is measured on: validation flags -> sources to train on, and the frames that are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jobs import training_data
from jobs.training_data import Entry, TrainingData, whole_dataset
from pipelines.dataset import EpisodeDataset
from pipelines.features import StoredFeatures
from pipelines.samples import SampleReader, Source
from pipelines.validation import HeldOut, ValidationConfig, held_out_named, held_out_share, split
from smolvla.configuration import SmolVLAConfig


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """At most one of the first three says what to measure on; none: nothing is held out."""

    fraction: float = 0.0
    """Share of the episodes of every dataset that is held out of training, at least one each."""
    episodes: list[int] = field(default_factory=list)
    """Numbers of the episodes that are held out, of a single dataset."""
    path: str = ""
    """An episode dataset of its own; it is normalised with the statistics of the exported policy."""
    every: int | None = None
    """Steps; None: at every checkpoint. The last step is always measured."""
    max_frames: int = 2048
    """Frames that are measured, evenly spaced over what is held out."""
    seed: int = 0
    """Of the choice of episodes, and of noise and times; not the run's, so that runs can be compared."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"validation.fraction {self.fraction} is not in [0, 1)")
        for name in ("every", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name} {value} is below 1")
        if self.seed < 0:
            raise ValueError(f"validation.seed {self.seed} is negative")
        given = self.given
        if len(given) > 1:
            names = " and ".join(f"validation.{name}" for name in given)
            raise ValueError(f"{names} are both given; take one")

    @property
    def given(self) -> list[str]:
        """The flags that say what to measure on."""
        return [name for name in ("fraction", "episodes", "path") if getattr(self, name)]


def parted(
    options: ValidationOptions,
    data: TrainingData,
    config: SmolVLAConfig,
    reader: SampleReader,
    *,
    every: int,
    features_of: Callable[[EpisodeDataset], StoredFeatures | None],
) -> tuple[SampleReader, HeldOut | None]:
    """The reader without what is held out, and what is held out.

    `features_of` gives those of a dataset of its own, if it has some that fit.

    Raises:
        ValueError: names the flag and the value.
    """
    if not options.given:
        return reader, None
    if options.path:
        other = _other_source(options, data, config, reader)
        training = list(reader.sources)
        held_out = [replace(other, features=features_of(other.dataset))]
    else:
        places = _places(options, data.datasets)
        parts = [split(source, places[i]) for i, source in enumerate(reader.sources)]
        training, held_out = [first for first, _ in parts], [second for _, second in parts]
    settings = ValidationConfig(
        every=options.every or every, max_frames=options.max_frames, seed=options.seed
    )
    unweighted = [replace(source, weight=None) for source in held_out]
    return replace(reader, sources=training), HeldOut(
        reader=replace(reader, sources=unweighted, augmentation=None), config=settings
    )


def identity(options: ValidationOptions, held_out: HeldOut | None) -> dict[str, Any] | None:
    """What of it a run is: another choice would train on other episodes, or draw another curve."""
    if held_out is None:
        return None
    datasets = [source.dataset for source in held_out.reader.sources]
    episodes = [dataset.episode_index.tolist() for dataset in datasets]
    chosen: dict[str, Any] = (
        {"fingerprint": datasets[0].fingerprint} if options.path else {"episodes": episodes}
    )
    features = held_out.reader.sources[0].features
    if options.path and features is not None:
        chosen["features"] = features.recipe.fingerprint
    return chosen | {"max_frames": options.max_frames, "seed": options.seed}


def _places(options: ValidationOptions, datasets: Sequence[EpisodeDataset]) -> list[np.ndarray]:
    if not options.episodes:
        return held_out_share(
            datasets, fraction=options.fraction, seed=options.seed, flag="validation.fraction"
        )
    if len(datasets) > 1:
        raise ValueError(
            f"validation.episodes {options.episodes}: there are {len(datasets)} datasets; numbers name "
            "episodes of a single one, --validation.fraction takes a share of each"
        )
    return [held_out_named(datasets[0], options.episodes, flag="validation.episodes")]


def _other_source(
    options: ValidationOptions, data: TrainingData, config: SmolVLAConfig, reader: SampleReader
) -> Source:
    """The dataset of `validation.path` as the exported policy would see it."""
    flag = "validation.path"
    dataset = whole_dataset(options.path, flag=flag)
    like = reader.sources[data.export]
    if dataset.fps < data.fps:
        raise ValueError(
            f"{flag} {options.path}: {dataset.fps:g} frames a second, the policy acts at {data.fps:g}"
        )
    training_data.check_widths([data.datasets[data.export], dataset])
    entry = Entry(
        path=options.path, name="validation", rename=like.rename, flag="validation", rename_flag="rename"
    )
    source = training_data.sources(
        TrainingData(entries=[entry], datasets=[dataset], export=0, fps=data.fps), config
    )[0]
    if set(source.camera_columns) != set(like.camera_columns):
        raise ValueError(
            f"{flag} {options.path}: it has the cameras {sorted(source.camera_columns)}, "
            f"the data to train on {sorted(like.camera_columns)}"
        )
    return replace(source, normalizer=like.normalizer)
