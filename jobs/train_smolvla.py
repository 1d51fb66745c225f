"""Train SmolVLA on a Ray cluster.

ray job submit --working-dir . -- python jobs/train_smolvla.py --config configs/train/demo.yaml \
    --dataset.path /data/episodes --storage_path /data/runs --run_name first --steps 200 --num_workers 2

The same command again continues the run, if it is not complete. Every flag may stand in the YAML file.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
import ray.exceptions
import torch
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import (
    command_line,
    evaluated_beside,
    held_out,
    image_features,
    lineage,
    summary,
    tracking,
    training_data,
)
from jobs.delivery import SPOOL, delivery_of
from jobs.ending import truthful_end
from jobs.evaluated_beside import EvalOptions
from jobs.evaluations import Evaluations
from jobs.held_out import ValidationOptions
from jobs.image_features import ImageFeatures
from jobs.points import CheckpointsInMlflow, RunWriter, run_writer
from jobs.review import Review
from jobs.tracking import TrackingOptions
from jobs.training_data import DatasetOptions, TrainingData, readable, readable_vlm
from pipelines import training
from pipelines.augmentation import AugmentationConfig
from pipelines.board import GivenUpError, start_board
from pipelines.files import joined
from pipelines.manifest import MANIFEST
from pipelines.mixing import Mixing, mixing
from pipelines.output import exclusive
from pipelines.progress import position
from pipelines.retention import Retention
from pipelines.run import Run, trained_datasets
from pipelines.run_storage import START, RunStorage
from pipelines.samples import SampleReader, StreamConfig
from pipelines.tower import StreamedTower
from pipelines.train_config import Parallel, TrainConfig
from pipelines.training import Cluster
from pipelines.validation import HeldOut
from smolvla.configuration import SmolVLAConfig
from smolvla.lora import ATTENTION, LoRA


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    path: str = ""
    """Folder to start from: a checkpoint (config.json and model.safetensors) or only a config.json."""
    allow_random_weights: bool = False
    """Whether a folder without weights is accepted, and the model drawn at random."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What is None is taken from the policy's config.json."""

    lr: float | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    """Steps of the cosine decay; None: all steps of the run."""
    decay_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "grad_clip_norm", "decay_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"optimizer.{name} {value} is not positive")
        for name in ("weight_decay", "warmup_steps", "decay_lr"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"optimizer.{name} {value} is negative")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    every: int = 1000
    """Steps; the last step is always saved."""
    keep: int = 3
    """The newest ones that stay."""
    keep_best: int = 1
    """Those of the lowest validation loss that stay besides, if the run is validated."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            at_least_one(f"checkpoint.{name}", getattr(self, name))
        if self.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best {self.keep_best} is negative")


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Low-rank adapters on the expert, without dropout; they train instead of the weights."""

    rank: int = 0
    """0: no adapters."""
    alpha: float | None = None
    """An adapter adds alpha / rank * B A; None: the rank."""
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    """q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj of the expert's layers; state_proj,
    action_in_proj, action_out_proj, action_time_mlp_in, action_time_mlp_out."""
    train_fully: list[str] = field(default_factory=list)
    """Of the last five, those whose weights train themselves."""

    @property
    def adapters(self) -> LoRA | None:
        """What the policy gets."""
        if self.rank == 0:
            return None
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return LoRA(
            rank=self.rank, alpha=alpha, targets=tuple(self.targets), train_fully=tuple(self.train_fully)
        )


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """The flags of the job; a resolved copy is printed and logged."""

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    rename: dict[str, str] = field(default_factory=dict)
    """Camera of the dataset -> camera of the policy, where names differ; JSON on the command line."""
    run_name: str = ""
    """Name of the run and of its folder; the same name continues the same run. Empty: <policy>-<dataset>."""
    storage_path: str = "~/smolvla_runs"
    """Folder of all runs, which every node must see, or a prefix of an object store (s3://bucket/runs)."""
    work_path: str = "~/.cache/smolvla_runs"
    """With an object store: folder of each node's own, for what is on its way and what is appended to."""
    steps: int = 20_000
    """Optimiser steps."""
    batch_size: int = 64
    """Samples a step, over all workers."""
    micro_batch: int = 8
    """Samples a worker takes through the model at once."""
    repeated_noise: int = 1
    """Draws of noise and time a sample; they share the computation of its observation."""
    mixing_rows: int = 1024
    """Rows shuffled together."""
    seed: int = 1000
    parallel: Parallel = "ddp"
    """ddp: every worker holds the policy; fsdp: all workers share one; hsdp: groups of workers share one."""
    shard_workers: int = 1
    """Workers of an hsdp group, such as the GPUs of a node."""
    activation_checkpointing: bool = False
    """Compute the joint layers' activations again in the backward pass instead of keeping them."""
    grad_norm_limit: float = 1e4
    """A step with a larger gradient norm before clipping, or one that is not finite, changes nothing; its
    rows are named in <run>/skipped/."""
    max_skipped_in_a_row: int = 10
    """Skipped steps after which the run fails."""
    ema_decay: float | None = None
    """Of a moving average of the weights, such as 0.999: it is validated, saved and exported beside them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; master weights are float32."""
    compile: bool = False
    """Compile the layers; the first step of every worker pays for it."""
    num_workers: int | str = 1
    """How many, or "<fewest>-<most>": the run takes what the cluster has, and goes on with fewer when a node
    is lost. The numbers of the run do not depend on it."""
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    max_failures: int = 3
    """Restarts of dead workers before the run fails; -1: no limit."""
    collective_timeout_s: float = 600.0
    """How long workers wait for one that is stuck before the step fails and names it; the workers restart."""
    log_every: int = 10
    """Steps."""
    record_rows: bool = False
    """Whether workers write the ids of the rows they trained on to <run>/rows/."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batch",
            "repeated_noise",
            "log_every",
            "max_skipped_in_a_row",
        ):
            at_least_one(name, getattr(self, name))
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay} is not between 0 and 1")
        if not self.grad_norm_limit > 0:
            raise ValueError(f"grad_norm_limit {self.grad_norm_limit} is not positive")
        self._check_parallel()
        if self.collective_timeout_s <= 0:
            raise ValueError(f"collective_timeout_s {self.collective_timeout_s} is not positive")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker {self.cpus_per_worker} is not positive")
        count, rest = divmod(self.batch_size, self.micro_batch)
        if rest:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}"
            )
        if count < self.workers[1]:
            raise ValueError(
                f"num_workers {self.num_workers}: batch_size {self.batch_size} is {count} micro-batches of "
                f"{self.micro_batch}, and every worker needs one"
            )

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most."""
        few, dash, most = str(self.num_workers).partition("-")
        try:
            found = int(few), int(most if dash else few)
        except ValueError:
            found = 0, 0
        if not 1 <= found[0] <= found[1]:
            raise ValueError(f'num_workers {self.num_workers!r}: need a count from 1 on, or a range as "1-4"')
        return found

    def _check_parallel(self) -> None:
        fewest, most = self.workers
        if self.parallel != "hsdp":
            if self.shard_workers != 1:
                raise ValueError(
                    f"shard_workers {self.shard_workers} is of parallel hsdp, not {self.parallel}"
                )
            return
        if fewest < most:
            raise ValueError(
                f"num_workers {self.num_workers}: the groups of parallel hsdp need a fixed number"
            )
        if not 1 < self.shard_workers < most or most % self.shard_workers:
            raise ValueError(
                f"shard_workers {self.shard_workers} of num_workers {self.num_workers}: parallel hsdp needs "
                "at least two equal groups of at least two workers"
            )


def at_least_one(name: str, value: int) -> None:
    """Refuse a count below 1."""
    if value < 1:
        raise ValueError(f"{name} {value} is below 1")


OPTIMIZER_FIELDS = {  # flag of the group `optimizer` -> field of the policy's config.json
    "lr": "optimizer_lr",
    "weight_decay": "optimizer_weight_decay",
    "grad_clip_norm": "optimizer_grad_clip_norm",
    "warmup_steps": "scheduler_warmup_steps",
    "decay_lr": "scheduler_decay_lr",
}
CLOSE_WITHIN_S = 60.0  # for a tracking server that is away at the end; the spool keeps what is left
RECORD = "run.json"  # what the run is, and its MLflow run
NOT_IDENTITY = (  # these change no number of the run, beyond rounding
    "log_every",
    "checkpoint_every",
    "record_rows",
    "compile",
    "parallel",
    "shard_workers",
    "activation_checkpointing",
    "max_skipped_in_a_row",
)


@dataclass(frozen=True)
class Prepared:
    """All inputs of the run, checked; nothing is started yet."""

    data: TrainingData
    policy_config: SmolVLAConfig
    features: ImageFeatures
    reader: SampleReader
    held_out: HeldOut | None
    train: TrainConfig
    storage: RunStorage
    identity: dict[str, Any]
    mixing: Mixing

    @property
    def folder(self) -> Path:
        """The run's folder on this node."""
        return self.storage.folder


def prepare(job: TrainJob) -> Prepared:
    """Check everything that can be wrong.

    Raises:
        ValueError: names the flag, file or field, and the value.
    """
    _check_given(job)
    data = training_data.opened(job.dataset, rename=job.rename)
    policy_config = _policy_config(job, data)
    evaluated_beside.check(
        job.eval,
        policy_config,
        rename=data.entries[data.export].rename,
        checkpoint_every=job.checkpoint.every,
        has_average=job.ema_decay is not None,
    )
    storage = _run_storage(job)
    before = storage.read_json(RECORD)["identity"] if storage.has(RECORD) else None
    features = image_features.chosen(
        job.dataset.features,
        data,
        policy_config,
        policy_path=job.policy.path,
        augmented=job.augmentation.is_on,
        precision=job.precision,
        before=before,
    )
    stream = StreamConfig(seed=job.seed, micro_batch=job.micro_batch, mixing_rows=job.mixing_rows)
    train = _train_config(job)
    reader = SampleReader(
        training_data.sources(data, policy_config, features=features.of_datasets),
        stream,
        chunk_size=policy_config.chunk_size,
        image_box=policy_config.resize_imgs_with_padding,
        fps=data.fps,
        num_observations=policy_config.n_obs_steps,
        augmentation=job.augmentation if job.augmentation.is_on else None,
    )
    validated = (before or {}).get("validation") or {}
    reader, measured = held_out.parted(
        job.validation,
        data,
        policy_config,
        reader,
        every=job.checkpoint.every,
        features_of=lambda dataset: features.like_these(
            dataset, fingerprint=validated.get("features"), resumed=before is not None
        ),
    )
    numbers = {k: v for k, v in asdict(train).items() if k not in NOT_IDENTITY}
    identity = numbers | data.identity()
    identity |= {
        "mixing_rows": job.mixing_rows,
        "policy_path": job.policy.path,
        "policy": policy_config.to_dict(),
        "augmentation": asdict(job.augmentation) if job.augmentation.is_on else None,
        "validation": held_out.identity(job.validation, measured),
        "features": features.identity(),
    }
    as_saved = json.loads(json.dumps(identity))
    _check_same_run(storage, as_saved, before)
    return Prepared(data, policy_config, features, reader, measured, train, storage, as_saved, mixing(reader))


def _check_given(job: TrainJob) -> None:
    """Flags that have no honest default."""
    if not job.policy.path:
        raise ValueError("policy.path is missing")
    if "/" in job.run_name or job.run_name.startswith("."):
        raise ValueError(f"run_name {job.run_name!r}: must be the name of a folder")


def _run_storage(job: TrainJob) -> RunStorage:
    """Where the run is kept, tried by writing."""
    flag, path = (
        ("work_path", job.work_path) if "://" in job.storage_path else ("storage_path", job.storage_path)
    )
    home = Path(path).expanduser()
    if not home.is_absolute():
        raise ValueError(f"{flag} {path!r} is relative, and a submitted job runs in a copy")
    storage = RunStorage(folder=home / job.run_name)
    if flag == "work_path":
        uri = joined(job.storage_path, job.run_name)
        digest = hashlib.sha256(uri.encode()).hexdigest()[:8]  # runs of several buckets may have one name
        storage = RunStorage(folder=home / f"{job.run_name}-{digest}", uri=uri)
        path = job.storage_path
    try:
        storage.folder.mkdir(parents=True, exist_ok=True)
        storage.write(".writable", b"")
        storage.delete_file(".writable")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"storage_path {path}: cannot be written: {reason}") from None
    return storage


def _policy_config(job: TrainJob, data: TrainingData) -> SmolVLAConfig:
    """The policy's config with the datasets' features and the optimiser's settings."""
    path = readable(job.policy.path, flag="policy.path")
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"policy.path {path}: no config.json in it")
    if not (Path(path) / "model.safetensors").is_file() and not job.policy.allow_random_weights:
        raise ValueError(
            f"policy.path {path}: no model.safetensors, so the model would be random; "
            "--policy.allow_random_weights true accepts that"
        )
    config = training_data.fitted(SmolVLAConfig.from_pretrained(path), data, policy_path=path)
    chosen = {field: getattr(job.optimizer, flag) for flag, field in OPTIMIZER_FIELDS.items()}
    return config.changed(**{field: value for field, value in chosen.items() if value is not None})


def _train_config(job: TrainJob) -> TrainConfig:
    return TrainConfig(
        steps=job.steps,
        batch_size=job.batch_size,
        micro_batch=job.micro_batch,
        seed=job.seed,
        decay_steps=job.optimizer.decay_steps,
        precision=job.precision,
        log_every=job.log_every,
        checkpoint_every=job.checkpoint.every,
        record_rows=job.record_rows,
        repeated_noise=job.repeated_noise,
        compile=job.compile,
        parallel=job.parallel,
        shard_workers=job.shard_workers,
        activation_checkpointing=job.activation_checkpointing,
        grad_norm_limit=job.grad_norm_limit,
        max_skipped_in_a_row=job.max_skipped_in_a_row,
        ema_decay=job.ema_decay,
        lora=job.lora.adapters,
    )


def _check_same_run(storage: RunStorage, identity: dict[str, Any], before: dict[str, Any] | None) -> None:
    """A run continues as what it was: a changed number would make its curve a lie."""
    if before is None:
        return
    for name, value in identity.items():
        if before.get(name) != value:
            raise ValueError(
                f"run_name {storage.name}: this run has {name} {before.get(name)!r}, now {value!r}; "
                "take another run_name, or delete the folder"
            )


@contextlib.contextmanager
def only_driver(storage: RunStorage) -> Iterator[None]:
    """Hold the run: two jobs that write one run would destroy it."""
    if storage.uri:  # no locks there, but a lease
        with contextlib.ExitStack() as stack:
            with command_line.refusals():
                stack.enter_context(exclusive(storage.uri, what="storage_path", owner="another job"))
            yield
        return
    with (storage.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            command_line.fail(f"run_name {storage.name}: another job is running it, {storage} is locked")
        yield


def write_start(prepared: Prepared, job: TrainJob) -> None:
    """Put the policy of step 0 into the run's folder, where every worker and every restart finds it."""
    storage = prepared.storage
    start, partial = storage.folder / START, storage.folder / f"{START}.partial"
    # Without a record no run has begun: what lies there is of a job that was refused after it was written.
    whole = storage.has(f"{START}/config.json") and (not storage.uri or storage.has(f"{START}/{MANIFEST}"))
    if storage.has(RECORD) and whole:
        return
    from smolvla.modeling import SmolVLAPolicy  # takes seconds, which no refused or continued job must wait

    storage.delete(START)
    shutil.rmtree(start, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(job.seed)
    config = prepared.policy_config
    with readable_vlm(config):
        if (Path(job.policy.path) / "model.safetensors").is_file():
            policy = SmolVLAPolicy.from_pretrained(job.policy.path, config=config)
        else:
            policy = SmolVLAPolicy(config, allow_random_vlm=True)  # the flag above says so
    policy.processor = training_data.processor(prepared.data, config)
    policy.save_pretrained(partial)
    partial.rename(start)
    if storage.uri:
        storage.seal(START, [storage.upload(start, START)])


def check_cluster(job: TrainJob) -> None:
    """Refuse what the cluster can never give; Ray would wait for it in silence."""
    have, need = ray.cluster_resources(), needs(job, num_workers=job.workers[0])
    streamed = _tower_actors(job)
    besides = f", {streamed} tower_actors * tower_cpus {job.dataset.tower_cpus}" if streamed else ""
    if have.get("CPU", 0) < need["CPU"]:
        raise ValueError(
            f"num_workers {job.num_workers} * cpus_per_worker {job.cpus_per_worker}{besides} and one CPU for "
            f"the data need {need['CPU']} CPUs, the cluster has {have.get('CPU', 0)}"
        )
    if have.get("GPU", 0) < need["GPU"]:
        raise ValueError(
            f"num_workers {job.num_workers} with use_gpu {job.use_gpu}{besides and ' and tower_gpus'} need "
            f"{need['GPU']:g} GPUs, the cluster has {have.get('GPU', 0)} GPUs"
        )
    places = [_places(node["Resources"], job) for node in nodes()]
    if sum(places) < job.workers[0]:
        raise ValueError(
            f"num_workers {job.num_workers} with cpus_per_worker {job.cpus_per_worker} and use_gpu "
            f"{job.use_gpu}: a worker is on one node, and the cluster's nodes have room for {sum(places)}"
        )
    evaluated_beside.check_cluster(job.eval)


def nodes() -> list[dict[str, Any]]:
    """Ray's nodes that compute."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _places(resources: dict[str, float], job: TrainJob) -> int:
    """For workers, on a node with these resources."""
    places = int(resources["CPU"] / job.cpus_per_worker + 1e-9)  # 0.3 / 0.1 is below 3
    return min(places, int(resources.get("GPU", 0))) if job.use_gpu else places


def check_visible(job: TrainJob, prepared: Prepared) -> None:
    """Refuse folders that only some nodes see: workers and data tasks run on any of them.

    Raises:
        ValueError: names the flag, the folder and the node.
    """
    datasets = {f"{entry.flag}.path": entry.path for entry in prepared.data.entries}
    datasets |= {"validation.path": job.validation.path} if job.validation.path else {}
    files = {
        f"{Path(path).expanduser().resolve()}/meta/info.json": flag
        for flag, path in datasets.items()
        if "://" not in path
    }
    if not prepared.storage.uri:
        files[f"{prepared.folder}/{START}/config.json"] = "storage_path"
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes() if node["NodeID"] != here] if files else []

    def missing() -> list[str]:
        return [path for path in files if not Path(path).exists()]

    look = ray.remote(missing).options
    on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in others]
    answers = [look(num_cpus=0, scheduling_strategy=strategy).remote() for strategy in on]
    for node, answer in zip(others, answers, strict=True):
        paths: list[str] = []
        with contextlib.suppress(ray.exceptions.RayError):  # a node that has gone need not see anything
            paths = ray.get(answer)
        for path in paths:
            raise ValueError(
                f"{files[path]}: node {node['NodeManagerAddress']} has no {path}; every node must see this "
                "folder, or take an object store (s3://...)"
            )


def needs(job: TrainJob, *, num_workers: int) -> dict[str, float]:
    """CPUs and GPUs of so many workers, of what streams to them, and one CPU to decode."""
    streamed = _tower_actors(job)
    return {
        "CPU": num_workers * job.cpus_per_worker + streamed * job.dataset.tower_cpus + 1,
        "GPU": num_workers * job.use_gpu + streamed * job.dataset.tower_gpus,
    }


def _tower_actors(job: TrainJob) -> int:
    return job.dataset.tower_actors if job.dataset.features == "stream" else 0


def tracked(job: TrainJob, prepared: Prepared, *, step: int) -> tracking.TrackedRun:
    """The MLflow run: a new one, or the one that this run's folder names."""
    storage, data = prepared.storage, prepared.data
    origins = [lineage.origin(dataset) for dataset in data.datasets]
    tags = (
        tracking.source_tags("jobs/train_smolvla.py")
        | lineage.tags(data.datasets, origins)
        | {"run_folder": str(storage)}
    )
    tags["features_fingerprint"] = prepared.features.identity() or "none"
    tags["mixing"] = str(prepared.mixing)
    if storage.has(RECORD):
        known = storage.read_json(RECORD)
        tags["resumed_from_step"] = str(step)
        return tracking.continue_run(job.tracking.uri, known["mlflow_run_id"], tags=tags)
    params = {
        "policy": job.policy.path,
        "dataset": ", ".join(entry.path for entry in data.entries),
        "steps": job.steps,
        "batch_size": job.batch_size,
        "repeated_noise": job.repeated_noise,
        "micro_batch": job.micro_batch,
        "num_workers": job.num_workers,
        "lr": prepared.policy_config.optimizer_lr,
        "seed": job.seed,
        "precision": job.precision,
        "parallel": job.parallel,
        "chunk_size": prepared.policy_config.chunk_size,
        "fps": data.fps,
    }
    run = tracking.start_run(
        job.tracking.uri,
        experiment=job.tracking.experiment,
        name=job.run_name,
        params=params,
        tags=tags,
    )
    for number, (dataset, origin) in enumerate(zip(data.datasets, origins, strict=True)):
        share = prepared.reader.plan.share(number)
        tracking.log_dataset(run, dataset, origin=origin, context="training", share=share)
    run.client.log_text(run.run_id, as_yaml(job), "config/job.yaml")
    run.client.log_dict(run.run_id, prepared.identity, "config/identity.json")
    run.client.log_dict(run.run_id, prepared.policy_config.to_dict(), "config/policy.json")
    known = {"mlflow_run_id": run.run_id, "link": run.link, "identity": prepared.identity}
    storage.write_json(RECORD, known)
    return run


def completed(job: TrainJob) -> TrainJob:
    """The job with the names that depend on other flags and on the environment."""
    datasets = [job.dataset.path, *(str(entry.get("path", "")) for entry in job.dataset.mixture)]
    names = "+".join(Path(path).name for path in datasets if path)
    name = job.run_name or f"{Path(job.policy.path).name}-{names}"
    return replace(job, run_name=name, tracking=job.tracking.completed())


def as_yaml(job: TrainJob) -> str:
    """All flags with their values."""
    return yaml.safe_dump(asdict(job), sort_keys=False)


def show_progress(writer: RunWriter, job: TrainJob, done: threading.Event) -> None:
    """Print a line whenever there is a new point."""
    first, first_at, shown = 0, 0.0, 0
    while not done.wait(2.0):
        step, metrics = writer.latest()
        if step == shown:
            continue
        shown = step
        if not first:  # the time before was spent on starting
            first, first_at = step, time.monotonic()
        rate = (step - first) / (time.monotonic() - first_at) if step > first else 0.0
        left = f"{(job.steps - step) / rate:5.0f} s left" if rate else ""
        print(
            f"step {step:6d}/{job.steps}  loss {metrics.get('train/loss', float('nan')):.4f}  "
            f"lr {metrics['train/lr']:.2e}  "
            f"{metrics['data/samples_per_s']:6.1f} samples/s  waits {metrics['data/wait_share']:4.0%}  "
            f"{left}",
            flush=True,
        )


def train(job: TrainJob, prepared: Prepared) -> dict[str, Any]:
    """Run the training; returns the figures of the report line."""
    at = position(prepared.storage)
    with command_line.refusals():
        run = tracked(job, prepared, step=at.step)
    print(f"MLflow run: {run.link}", flush=True)
    started = time.monotonic()
    board = start_board()
    beside = evaluated(job, prepared, run, board, complete=at.step >= job.steps)
    with beside as evaluations, truthful_end(run, board):
        writer = run_writer(delivery_of(run, prepared.storage))
        try:
            if at.step >= job.steps:
                print(f"run {job.run_name} is complete at step {at.step}; nothing to do", flush=True)
            else:
                review = Review(run, prepared.reader.from_images, prepared.train, step=at.step)
                fit(job, prepared, writer, board, at_step=at.step)
                if evaluations:
                    evaluations.training_ended()
                review.close(CLOSE_WITHIN_S)
        finally:
            undelivered = writer.close(CLOSE_WITHIN_S)
    rest = {"checkpoints": f"{prepared.storage}/step_*", "MLflow": run.link}
    spool = prepared.folder / SPOOL
    print(summary.table(spool, steps=job.steps, batch_size=job.batch_size, rest=rest), flush=True)
    seconds = round(time.monotonic() - started, 1)
    if evaluations:  # the training has ended, and MLflow says so: nothing that comes now can change that
        evaluations.finish()
    return {
        "mlflow": run.link,
        "run_folder": str(prepared.storage),
        "step": job.steps,
        "samples": job.steps * job.batch_size,
        "seconds": seconds,
        "undelivered_records": undelivered,
        "evaluations": dict(evaluations.counts) if evaluations else {},
    }


@contextlib.contextmanager
def evaluated(
    job: TrainJob, prepared: Prepared, run: tracking.TrackedRun, board: Any, *, complete: bool
) -> Iterator[Evaluations | None]:
    """Evaluations beside the training, if there are to be some; they end with a training that fails."""
    if not job.eval.every:
        yield None
        return
    evaluations = Evaluations(
        job.eval,
        prepared.storage,
        run,
        tracking=job.tracking,
        steps=job.steps,
        training=needs(job, num_workers=job.workers[1]),
        board=board,
    )
    if complete:
        evaluations.training_ended()
    try:
        yield evaluations
    except BaseException:
        evaluations.close()
        raise
    evaluations.training_ended()


def fit(job: TrainJob, prepared: Prepared, writer: RunWriter, board: Any, *, at_step: int) -> None:
    """Train while a thread prints the progress."""
    if at_step:
        print(f"continues from step {at_step}", flush=True)
    run = Run(
        folder=prepared.folder,
        uri=prepared.storage.uri,
        collective_timeout_s=job.collective_timeout_s,
        train=prepared.train,
        identity=prepared.identity,
        datasets=trained_datasets(prepared.reader),
        max_bad_rows=job.dataset.max_bad_rows,
        writer=writer,
        keep=Retention(newest=job.checkpoint.keep, best=job.checkpoint.keep_best),
        validation=prepared.held_out,
        decoder=prepared.reader if decoded_by_workers(job) else None,
        tower=tower(job, prepared),
        board=board,
    )
    fewest, most = job.workers
    cluster = Cluster(
        num_workers=most if fewest == most else job.workers,
        use_gpu=job.use_gpu,
        cpus_per_worker=job.cpus_per_worker,
        max_failures=job.max_failures,
    )
    done = threading.Event()
    threading.Thread(target=show_progress, args=(writer, job, done), daemon=True).start()
    try:
        training.fit(
            run,
            prepared.reader,
            cluster,
            callbacks=[CheckpointsInMlflow(writer, prepared.storage)],
        )
    finally:
        done.set()


def decoded_by_workers(job: TrainJob) -> bool:
    """Whether the train workers decode, and not tasks anywhere in the cluster."""
    if job.dataset.decoding != "auto":
        return job.dataset.decoding == "workers"
    if job.dataset.features == "stream" or job.augmentation.is_on:
        return False
    found = [node["Resources"] for node in nodes()]
    training = sum(node.get("GPU", 0) > 0 for node in found) if job.use_gpu else job.workers[1]
    return training >= len(found)


def tower(job: TrainJob, prepared: Prepared) -> StreamedTower | None:
    """The actors that compute features on the way, if there are to be some."""
    if prepared.features.streamed is None:
        return None
    return StreamedTower(
        storage=prepared.storage,
        dtype=prepared.features.streamed,
        precision=job.precision,
        actors=job.dataset.tower_actors,
        cpus=job.dataset.tower_cpus,
        gpus=job.dataset.tower_gpus,
    )


def main(job: TrainJob) -> None:
    """Check, start, train, report."""
    job = completed(job)
    print(as_yaml(job), flush=True)
    with command_line.refusals():
        prepared = prepare(job)
        tracking.check_reachable(job.tracking.uri)
    print(prepared.features, flush=True)
    print(prepared.mixing, flush=True)
    with only_driver(prepared.storage):
        with command_line.refusals():
            write_start(prepared, job)
        command_line.start_ray()
        with command_line.refusals():
            check_cluster(job)
            check_visible(job, prepared)
        try:
            figures = train(job, prepared)
        except GivenUpError as error:
            command_line.fail(error, code=command_line.FAILED)
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(command_line.parsed(TrainJob, sys.argv[1:]))
