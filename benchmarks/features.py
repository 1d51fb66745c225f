"""What training from stored features saves: a step at the published size, and a whole job with its caching.

python benchmarks/features.py [--quick] [--tiny] [--only step job overlap]

On the CPU, in one run. The last line is one JSON object:

vs_images           seconds of a step from images / from features, the same engine, float32, two cameras.
vs_plain            seconds of the plain computation (benchmarks/plain_model.py, from images) / from features.
images_s, features_s, plain_s   of the fastest step: inputs, forward, backward, clipping, optimiser.
tower_s             of the tower for one sample, in batches, as jobs/cache_features.py runs it.
break_even_epochs   epochs after which caching has saved what it cost.
bytes_per_sample    that a sample's features take, by dtype; jpeg_bytes_per_sample of 480 x 640 images.
words_s             of embedding the instructions of a batch, which is what computing them once would save.
job_ratio_3_epochs  wall clock of 3 epochs of training on Ray from images / of caching and the same from
                    features, configs/policy/tiny with its tower frozen; starting the workers counts in both.
overlap_*           one epoch in which an actor of the stream, a quarter of a CPU by Ray's account, runs the
                    tower while a worker trains: share of the time that the worker waits, seconds of the tower
                    a row, share of the time that the actor is busy. That its losses are those from images
                    is tested (tests/pipelines/test_features.py).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import ray  # noqa: E402
from episode_data import write_dataset  # noqa: E402
from ingest import pictures  # noqa: E402
from model_step import fastest  # noqa: E402
from plain_model import PlainModel  # noqa: E402
from published_policy import build_columns, build_policy  # noqa: E402

from jobs import training_data  # noqa: E402
from jobs.cache_features import CachedDataset, CacheFeatures, CachingPolicy, prepare  # noqa: E402
from jobs.training_data import DatasetOptions  # noqa: E402
from pipelines import caching, training  # noqa: E402
from pipelines.caching import Tower  # noqa: E402
from pipelines.dataset import file_digests  # noqa: E402
from pipelines.features import seal  # noqa: E402
from pipelines.images import encoded_image  # noqa: E402
from pipelines.run import Run, trained_datasets  # noqa: E402
from pipelines.run_storage import RunStorage  # noqa: E402
from pipelines.samples import SampleReader, StreamConfig  # noqa: E402
from pipelines.tower import StreamedTower  # noqa: E402
from pipelines.train_config import TrainConfig  # noqa: E402
from smolvla import SmolVLAConfig, SmolVLAPolicy  # noqa: E402
from smolvla.features import FeatureDtype  # noqa: E402
from smolvla.image_features import packed  # noqa: E402

BATCH, CAMERAS = 2, 2
DTYPES: tuple[FeatureDtype, ...] = ("float32", "bfloat16", "int8")
SIDE, EPISODE_FRAMES, EPISODES, EPOCHS = 256, 64, 10, 3
JOB_BATCH, MICRO_BATCH = 32, 16
EPOCH_STEPS = EPISODES * EPISODE_FRAMES // JOB_BATCH


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one repetition of a step instead of four")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy size of the step, to try the script itself"
    )
    parser.add_argument("--only", nargs="*", default=["step", "job", "overlap"], help="parts")
    flags = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    print(f"{torch.get_num_threads()} threads, load before {os.getloadavg()[0]:.1f}; no GPU measurement")
    if "step" in flags.only:
        results |= shown(step(tiny=flags.tiny, repetitions=1 if flags.quick else 4))
    if {"job", "overlap"} & {*flags.only}:
        results |= on_ray(flags.only)
    print(json.dumps(results), flush=True)


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """Print the figures of a part as soon as it is over."""
    for name, value in found.items():
        print(f"{name:24} {value}", flush=True)
    return found


# ---- a step ------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_features(
    policy: SmolVLAPolicy, columns: Mapping[str, torch.Tensor], dtype: FeatureDtype
) -> dict[str, torch.Tensor]:
    """The columns with packed features instead of images."""
    cameras = policy.config.camera_names
    rest = {name: column for name, column in columns.items() if name not in cameras}
    return rest | {
        f"{name}_features": packed(policy.image_features(name, columns[name]), dtype) for name in cameras
    }


def step(*, tiny: bool, repetitions: int) -> dict[str, Any]:
    """Seconds of a step, inputs and all."""
    policy = build_policy(num_cameras=CAMERAS, tiny=tiny)
    config, columns = policy.config, build_columns(policy, batch=BATCH)
    started = time.perf_counter()
    features = with_features(policy, columns, "float32")
    tower_s = (time.perf_counter() - started) / BATCH
    noise = torch.randn(BATCH, config.chunk_size, config.max_action_dim)
    drawn = {"noise": noise, "time": torch.rand(BATCH) * 0.9 + 0.05}
    plain = PlainModel(policy)
    found = fastest(
        policy,
        {
            "images": lambda: policy(**policy.prepare_inputs(columns), **drawn)["loss"],
            "features": lambda: policy(**policy.prepare_inputs(features), **drawn)["loss"],
            "plain": lambda: plain.loss(policy.prepare_inputs(columns), drawn["noise"], drawn["time"]),
        },
        repetitions,
    )
    saved = (found["images"] - found["features"]) / BATCH
    sizes = {
        dtype: sum(
            column[0].numel() * column.element_size()
            for name, column in with_features(policy, columns, dtype).items()
            if name.endswith("_features")
        )
        for dtype in DTYPES
    }
    jpeg = encoded_image(next(iter(pictures(1))), image_format="jpeg", jpeg_quality=95)
    return {
        "vs_images": round(found["images"] / found["features"], 2),
        "vs_plain": round(found["plain"] / found["features"], 2),
        **{f"{name}_s": round(seconds, 3) for name, seconds in found.items()},
        "tower_s": round(tower_s, 3),
        "break_even_epochs": round(tower_s / saved, 2),
        "bytes_per_sample": sizes,
        "jpeg_bytes_per_sample": CAMERAS * len(jpeg),
        "words_s": round(_words_s(policy, columns), 6),
    }


@torch.no_grad()
def _words_s(policy: SmolVLAPolicy, columns: Mapping[str, torch.Tensor]) -> float:
    tokens, times = columns["observation.language.tokens"], 100
    started = time.perf_counter()
    for _ in range(times):
        policy.model.vlm_with_expert.embed_language_tokens(tokens)
    return (time.perf_counter() - started) / times


# ---- a job -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silent:
    """A `MetricWriter` that keeps nothing but the last point, in a file."""

    path: Path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.path.write_text(json.dumps({"step": step, **metrics}))

    def tag(self, tags: Mapping[str, str]) -> None:
        pass

    def predictions(self, step: int, found: Sequence[Any]) -> None:
        pass

    def flush(self) -> None:
        pass


def on_ray(parts: Sequence[str]) -> dict[str, Any]:
    """Runs on Ray, of the tiny policy with a frozen tower."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    os.environ |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # for all processes of this Ray
    cpus = max(psutil.cpu_count() or 2, 2)
    with tempfile.TemporaryDirectory(prefix="features-benchmark-") as name:
        folder = Path(name)
        images = [
            encoded_image(cv2.resize(picture, (SIDE, SIDE)), image_format="jpeg", jpeg_quality=95)
            for picture in pictures(16)
        ]
        data = write_dataset(
            folder / "data", images, size=(SIDE, SIDE), lengths=[EPISODE_FRAMES] * EPISODES, per_shard=4
        )
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        try:
            runs = Runs(folder, data, cpus=cpus)
            found = shown(runs.epochs()) if "job" in parts else {}
            return found | (shown(runs.overlap()) if "overlap" in parts else {})
        finally:
            ray.shutdown()


def _policy(folder: Path, data: Path) -> Path:
    """configs/policy/tiny as the default recipe trains: the VLM is frozen."""
    config = SmolVLAConfig.from_pretrained(ROOT / "configs/policy/tiny")
    opened = training_data.opened(DatasetOptions(path=str(data)), rename={})
    config = training_data.fitted(config, opened, policy_path="tiny")
    config = config.changed(train_expert_only=True, freeze_vision_encoder=True)
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True)
    policy.processor = training_data.processor(opened, config)
    policy.save_pretrained(folder / "policy")
    return folder / "policy"


class Runs:
    """Runs of one policy on one dataset; the first, which does not count, starts Ray's processes."""

    def __init__(self, folder: Path, data: Path, *, cpus: int) -> None:
        self._folder, self._cpus, self._policy = folder, cpus, _policy(folder, data)
        self._prepared = prepare(
            CacheFeatures(dataset=CachedDataset(path=str(data)), policy=CachingPolicy(path=str(self._policy)))
        )
        config, opened = (
            self._prepared.config,
            training_data.opened(DatasetOptions(path=str(data)), rename={}),
        )
        self._reader = SampleReader(
            training_data.sources(opened, config, features=[self._prepared.features]),
            StreamConfig(micro_batch=MICRO_BATCH, mixing_rows=256),
            chunk_size=config.chunk_size,
            image_box=config.resize_imgs_with_padding,
        )
        self._from_images("warm", steps=2)

    def _from_images(self, name: str, *, steps: int) -> tuple[float, dict[str, float]]:
        return _trained(self._folder / name, self._policy, self._reader.from_images, steps=steps)

    def epochs(self) -> dict[str, Any]:
        """Three epochs from images, and from features with their caching."""
        prepared, steps = self._prepared, EPOCHS * EPOCH_STEPS
        images_s, images = self._from_images("images", steps=steps)
        started = time.perf_counter()
        caching.compute(
            prepared.dataset,
            prepared.features,
            Tower(policy_path=str(self._policy), config=prepared.config, use_gpu=False),
            range(len(prepared.dataset.files)),
            file_digests(prepared.dataset),
            actors=self._cpus,
            cpus_per_actor=1,
            batch_size=32,
            on_progress=lambda progress: None,
        )
        seal(prepared.features, prepared.dataset, {})
        caching_s = time.perf_counter() - started
        features_s, features = _trained(self._folder / "features", self._policy, self._reader, steps=steps)
        return {
            "job_ratio_3_epochs": round(images_s / (caching_s + features_s), 2),
            "job_images_s": round(images_s, 1),
            "job_caching_s": round(caching_s, 1),
            "job_features_s": round(features_s, 1),
            "job_last_losses": [images["train/loss"], features["train/loss"]],
        }

    def overlap(self) -> dict[str, Any]:
        """An epoch with the tower in the stream."""
        folder, reader = self._folder / "stream", self._reader.from_images
        tower = StreamedTower(
            storage=RunStorage(folder=folder),
            dtype="float32",
            precision="float32",
            actors=1,
            cpus=0.25,  # beside the worker and one task that decodes there must be room on two cores
            gpus=0,
        )
        seconds, point = _trained(folder, self._policy, reader, steps=EPOCH_STEPS, tower=tower)
        return {
            "overlap_s": round(seconds, 1),
            "overlap_wait_share": round(point["data/wait_share"], 3),
            "overlap_tower_s_per_row": round(point["data/tower_s_per_row"], 4),
            "overlap_tower_busy": round(point["data/samples_per_s"] * point["data/tower_s_per_row"], 3),
        }


def _trained(
    folder: Path,
    policy: Path,
    reader: SampleReader,
    *,
    steps: int,
    tower: StreamedTower | None = None,
) -> tuple[float, dict[str, float]]:
    """Seconds of a run, from nothing to its last checkpoint, and its last point."""
    folder.mkdir()
    shutil.copytree(policy, folder / "start")
    train = TrainConfig(
        steps=steps,
        batch_size=JOB_BATCH,
        micro_batch=MICRO_BATCH,
        seed=0,
        decay_steps=None,
        precision="float32",
        log_every=10,
        checkpoint_every=1000,
        record_rows=False,
    )
    run = Run(
        folder=folder,
        train=train,
        identity={},
        datasets=trained_datasets(reader),
        max_bad_rows=0,
        writer=Silent(folder / "point.json"),
        tower=tower,
    )
    cluster = training.Cluster(num_workers=1, use_gpu=False, cpus_per_worker=1, max_failures=0)
    started = time.perf_counter()
    training.fit(run, replace(reader), cluster)
    return time.perf_counter() - started, json.loads((folder / "point.json").read_text())


if __name__ == "__main__":
    main()
