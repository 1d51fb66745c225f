"""Compute once what the frozen vision tower makes of a dataset's images, and store it beside the dataset.

python jobs/cache_features.py --dataset.path <folder> --policy.path <folder>

Training takes it instead of the images (`--dataset.features`). The same command again goes on after any
interruption, and computes what is new after episodes were appended. Runs the same under
`ray job submit --working-dir . --`. The last line is one JSON object.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from jobs import training_data
from jobs.command_line import parsed, refusals, start_ray
from jobs.environment import git_commit
from jobs.terminal import LINE_EVERY_S, IngestTracking, tracking_server
from jobs.training_data import DatasetOptions, TrainingData, readable, readable_vlm
from pipelines import caching
from pipelines.caching import Progress, Tower
from pipelines.dataset import EpisodeDataset, file_digests, filesystem_of, open_dataset
from pipelines.features import Recipe, StoredFeatures, folder_of, is_sealed, missing_files, seal
from pipelines.files import remove_temporaries
from pipelines.output import absolute, exclusive
from pipelines.samples import SampleReader, StreamConfig
from smolvla.configuration import SmolVLAConfig
from smolvla.features import FeatureDtype
from smolvla.image_features import feature_shape, trained_part, weights_digest


@dataclass(frozen=True, kw_only=True)
class CachedDataset:
    path: str
    """Episode dataset: a folder or a URI; the features go into features/ in it."""


@dataclass(frozen=True, kw_only=True)
class CachingPolicy:
    path: str
    """Folder with config.json and model.safetensors, whose vision tower is to stay frozen."""


@dataclass(frozen=True, kw_only=True)
class CacheFeatures:
    """The flags of jobs/cache_features.py."""

    dataset: CachedDataset
    policy: CachingPolicy
    dtype: FeatureDtype = "bfloat16"
    """As stored. int8 has a scale a token; what the rounding changes of loss and actions is measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; bfloat16 is several times faster on a GPU."""
    actors: int = 0
    """That compute at once. 0: one for every GPU of the cluster; without GPUs one for `cpus_per_actor`."""
    cpus_per_actor: float = 1.0
    """They decode, and without a GPU they compute."""
    batch_size: int = 32
    """Images that go through the tower at once."""
    tracking: IngestTracking = field(default_factory=IngestTracking)

    def __post_init__(self) -> None:
        if self.actors < 0:
            raise ValueError(f"actors {self.actors} is negative")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is below 1")
        if not self.cpus_per_actor > 0:
            raise ValueError(f"cpus_per_actor {self.cpus_per_actor} is not positive")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All inputs, checked; nothing is started yet."""

    dataset: EpisodeDataset
    config: SmolVLAConfig
    """Fitted to the dataset, whose cameras keep their names: the tower treats all alike."""
    features: StoredFeatures


def prepare(job: CacheFeatures) -> Prepared:
    """Check everything that can be wrong.

    Raises:
        ValueError: names the flag or file, and the value.
    """
    dataset = open_dataset(absolute(readable(job.dataset.path, flag="dataset.path")))
    path = readable(job.policy.path, flag="policy.path")
    config = SmolVLAConfig.from_pretrained(path).with_features(*dataset.policy_features())
    if trains := trained_part(config):
        raise ValueError(f"policy.path {path}: {trains}, so nothing can be computed once")
    with readable_vlm(config):
        try:
            weights = weights_digest(path, config)
        except FileNotFoundError as error:
            raise ValueError(f"policy.path {path}: {error}, so its tower would be random") from None
        shapes = {name: feature_shape(config, dataset.image_size(name)) for name in dataset.camera_names}
    box = config.resize_imgs_with_padding
    recipe = Recipe(
        weights=weights,
        image_box=(box[0], box[1]) if box else None,
        dtype=job.dtype,
        precision=job.precision,
    )
    features = StoredFeatures(
        uri=folder_of(dataset, recipe.fingerprint),
        recipe=recipe,
        tokens={name: tokens for name, (tokens, _) in shapes.items()},
        width=next(iter(shapes.values()))[1],
    )
    return Prepared(dataset=dataset, config=config, features=features)


def pool(job: CacheFeatures) -> tuple[int, bool]:
    """How many actors, and whether each has a GPU.

    Raises:
        ValueError: the cluster can never start one.
    """
    have = ray.cluster_resources()
    gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 0.0)
    most = min(gpus or cpus, cpus // job.cpus_per_actor)
    if most < 1:
        raise ValueError(f"cpus_per_actor {job.cpus_per_actor}: the cluster has {cpus} CPUs")
    return int(min(job.actors or most, most)), gpus > 0


def computed(
    job: CacheFeatures, prepared: Prepared, files: list[int], *, use_gpu: bool, actors: int
) -> float:
    """Compute what is missing; returns frames a second."""
    if not files:
        return 0.0
    shown = _Lines()
    caching.compute(
        prepared.dataset,
        prepared.features,
        Tower(policy_path=job.policy.path, config=prepared.config, use_gpu=use_gpu),
        files,
        file_digests(prepared.dataset),
        actors=actors,
        cpus_per_actor=job.cpus_per_actor,
        batch_size=job.batch_size,
        on_progress=shown,
    )
    return shown.rate


def rounding(job: CacheFeatures, prepared: Prepared, *, use_gpu: bool) -> dict[str, float] | None:
    """What the stored features change of loss and actions, where they are not what the tower gave."""
    if (job.dtype, job.precision) == ("float32", "float32"):
        return None
    dataset, config = prepared.dataset, prepared.config
    entry = training_data.entries(DatasetOptions(path=dataset.uri), rename={})
    data = TrainingData(entries=entry, datasets=[dataset], export=0, fps=dataset.fps)
    reader = SampleReader(
        training_data.sources(data, config, features=[prepared.features]),
        StreamConfig(micro_batch=1, mixing_rows=1),
        chunk_size=config.chunk_size,
        image_box=config.resize_imgs_with_padding,
    )
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_error)
    return ray.get(task.remote(reader, job.policy.path, config, "cuda" if use_gpu else "cpu"))


def _error(reader: SampleReader, path: str, config: SmolVLAConfig, device: str) -> dict[str, float]:
    from pipelines.feature_error import measured  # in the task: the driver needs no model

    return measured(reader, path, config, device=device)


class _Lines:
    """A line when something is there, then one in `LINE_EVERY_S`, and the last."""

    def __init__(self) -> None:
        self._printed_s, self.rate = -LINE_EVERY_S, 0.0

    def __call__(self, progress: Progress) -> None:
        self.rate = progress.frames / max(progress.elapsed_s, 1e-3)
        last = progress.frames == progress.total_frames
        if not last and progress.elapsed_s - self._printed_s < LINE_EVERY_S:
            return
        self._printed_s = progress.elapsed_s
        print(
            f"frames {progress.frames}/{progress.total_frames}, {self.rate:.1f} frames/s, "
            f"{progress.remaining_s:.0f} s left",
            flush=True,
        )


def main(job: CacheFeatures) -> None:
    """Check, start, compute, seal, report."""
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        with refusals():
            prepared = prepare(job)
            server = tracking_server(job.tracking, what="the caching")
            dataset, features = prepared.dataset, prepared.features
            held.enter_context(exclusive(features.uri, what="features", owner="another job"))
            remove_temporaries(*filesystem_of(features.uri))
            files = missing_files(features, dataset)
            needed = caching.needed_bytes(dataset, features, files)
            caching.check_space(features.uri, needed)
        report: dict[str, Any] = {
            "path": features.uri,
            "files": len(dataset.files),
            "computed_files": len(files),
            "bytes_per_frame": sum(features.row_bytes(name) for name in features.tokens),
        }
        if not files and is_sealed(features, dataset):
            print(f"{features.uri} is already complete; nothing to do", flush=True)
        else:
            print(
                f"{len(files)} of {len(dataset.files)} data files to compute, {needed / 1e9:.3f} GB",
                flush=True,
            )
            start_ray()
            report |= run(job, prepared, files, server)
    print(json.dumps(report | {"seconds": round(time.monotonic() - started, 1)}), flush=True)


def run(job: CacheFeatures, prepared: Prepared, files: list[int], server: str | None) -> dict[str, Any]:
    """Compute what is missing and seal all, as a run of MLflow if there is a server."""
    dataset, features = prepared.dataset, prepared.features
    with refusals():
        actors, use_gpu = pool(job)
    params = {
        "policy": job.policy.path,
        "dataset": dataset.uri,
        "dtype": job.dtype,
        "precision": job.precision,
        "actors": str(actors),
        "device": "gpu" if use_gpu else "cpu",
        "batch_size": str(job.batch_size),
    }
    tags = {"features_fingerprint": features.recipe.fingerprint, "features_uri": features.uri}
    with told_to(server, dataset, experiment=job.tracking.experiment, params=params, tags=tags) as tell:
        rate = computed(job, prepared, files, use_gpu=use_gpu, actors=actors)
        error = rounding(job, prepared, use_gpu=use_gpu)
        told = {"policy_path": job.policy.path, "code_version": git_commit(), "error": error}
        info = seal(features, dataset, told)
        size = sum(file["bytes"] for file in info["files"].values())
        metrics = {
            "frames": dataset.num_frames,
            "computed_files": len(files),
            "bytes": size,
            "frames_per_s": rate,
        }
        tell(metrics | {f"error/{name}": value for name, value in (error or {}).items()})
    if error:
        print(f"stored as {job.dtype}: {describe(error)}", flush=True)
    return {"frames_per_s": round(rate, 2), "bytes": size, "error": error}


def told_to(server: str | None, *arguments: Any, **settings: Any) -> contextlib.AbstractContextManager[Any]:
    """A `caching_run` where there is a server; else nobody is told."""
    if server is None:
        return contextlib.nullcontext(lambda values: None)
    from jobs.caching_run import caching_run  # imports MLflow, which takes seconds

    return caching_run(server, *arguments, **settings)


def describe(error: dict[str, float]) -> str:
    """A measured error in words."""
    from pipelines.feature_error import FeatureError

    values: dict[str, Any] = error
    return str(FeatureError(**values))


if __name__ == "__main__":
    sys.exit(main(parsed(CacheFeatures, sys.argv[1:])))
