r"""Does a policy work? On recorded frames, and in closed loop in an environment; the answers go to MLflow.

    ray job submit --working-dir . -- python jobs/evaluate_smolvla.py \
        --policy.path /runs/towels/step_000020000 --dataset.path /data/held_out
    ray job submit --working-dir . -- python jobs/evaluate_smolvla.py --policy.path models:/reach@champion \
        --env metaworld --tasks reach-v3 push-v3 --episodes 50 --n_action_steps 1 10

The same flags with as many environments give the same episodes. The last line is JSON.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from jobs import command_line, policies, tracking, training_data
from jobs.ending import end_with_input
from jobs.evaluation_run import Recorder, offline_table, success_table, tracked
from jobs.policies import Policy, seen_cameras
from jobs.tracking import TrackingOptions
from jobs.training_data import Entry, TrainingData, readable
from pipelines import offline
from pipelines.dataset import EpisodeDataset, open_dataset
from pipelines.environments import check_tasks, drawn_cameras, environment_class, groups_of
from pipelines.rollouts import (
    CPUS_PER_ENVIRONMENT,
    Played,
    Rollouts,
    Success,
    Theatre,
    of_groups,
    successes,
)
from pipelines.samples import SampleReader, StreamConfig
from pipelines.validation import HeldOut, ValidationConfig
from smolvla.configuration import SmolVLAConfig
from smolvla.processing import SmolVLAProcessor

PARAM_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class JudgedPolicy:
    path: str = ""
    """A checkpoint of a run (step_*), a folder with config.json and weights, or models:/name@alias."""
    ema: bool = False
    """Whether a checkpoint's averaged weights are taken."""
    checkpoint: str = ""
    """The checkpoint that is held in `path`; a training gives it, whose checkpoints may go meanwhile."""


@dataclass(frozen=True, kw_only=True)
class JudgedData:
    path: str = ""
    """Episode dataset: a folder or a URI. Empty: nothing is measured offline."""
    episodes: list[int] = field(default_factory=list)
    """Numbers of its episodes. Empty: those that the policy's training held out if it was trained on this
    dataset, else all."""
    frames: int = 1024
    """To measure, evenly spaced; fewer if there are fewer."""
    micro_batch: int = 8
    """Frames that are measured at once."""

    def __post_init__(self) -> None:
        for name in ("frames", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"dataset.{name} {getattr(self, name)} is below 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateSmolVLA:
    """The flags of jobs/evaluate_smolvla.py."""

    policy: JudgedPolicy = field(default_factory=JudgedPolicy)
    dataset: JudgedData = field(default_factory=JudgedData)
    env: str = ""
    """metaworld, gymnasium, or package.module:Class of one's own. Empty: nothing is played."""
    tasks: list[str] = field(default_factory=list)
    """Of the environment; with gymnasium ids such as gym_pusht/PushT-v0."""
    episodes: int = 50
    """Of each task."""
    n_action_steps: list[int] = field(default_factory=list)
    """Actions of a chunk that are executed before the next one, one or several; empty: the policy's."""
    seed: int = 0
    """Of the worlds, and of the policy's noise."""
    size: int | None = None
    """Height and width in pixels of what the policy sees; None: those of the data that it was trained on."""
    max_steps: int | None = None
    """Actions after which an episode has failed; None: the environment's limit."""
    num_environments: int = 8
    """Played at once; one forward pass of the policy is for all of them."""
    blank_images: bool = False
    """Show the policy black pictures, to learn what it uses its eyes for."""
    videos: int = 2
    """Films of successes, and as many of failures, for each task."""
    use_gpu: bool = False
    cpus_per_policy: float = 1.0
    actors: int = 1
    """Policies that share the recorded frames."""
    resource: str = ""
    """Name of a resource of Ray's (`ray start --resources`) that the nodes of all actors must have."""
    ends_with_input: bool = False
    """Whether to end when standard input is closed: who started this process holds it open."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self) -> None:
        for name in ("episodes", "num_environments", "actors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        for name in ("seed", "videos"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        if self.cpus_per_policy <= 0:
            raise ValueError(f"cpus_per_policy {self.cpus_per_policy} is not positive")
        if not (self.dataset.path or self.env):
            raise ValueError(
                "nothing to evaluate on: dataset.path names recorded episodes, env an environment"
            )
        if self.tasks and not self.env:
            raise ValueError(f"tasks {self.tasks} are of an environment, and env is missing")


@dataclass(frozen=True)
class Prepared:
    """All inputs, checked; nothing is started yet."""

    policy: Policy
    held_out: HeldOut | None
    rollouts: Rollouts | None


def prepare(job: EvaluateSmolVLA) -> Prepared:
    """Check everything that can be wrong.

    Raises:
        ValueError: names the flag and the value.
    """
    policy = _policy(job)
    folder = policy.fetch()()
    config = SmolVLAConfig.from_pretrained(folder)
    processor = SmolVLAProcessor.from_pretrained(folder, config)
    held_out = _held_out(job, policy, config, processor) if job.dataset.path else None
    return Prepared(policy, held_out, _rollouts(job, config, processor) if job.env else None)


def _policy(job: EvaluateSmolVLA) -> Policy:
    if job.policy.checkpoint:
        return policies.held(job.policy.path, checkpoint=job.policy.checkpoint, ema=job.policy.ema)
    return policies.found(job.policy.path, ema=job.policy.ema, tracking_uri=job.tracking.uri)


def check_rollouts(
    job: EvaluateSmolVLA, config: SmolVLAConfig, rename: Mapping[str, str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The numbers of steps that are played, and the policy's cameras as the environment calls them.

    Raises:
        ValueError: names the flag of what the environment or the policy does not have.
    """
    environment = environment_class(job.env)
    check_tasks(environment, tuple(job.tasks))
    steps = tuple(job.n_action_steps) or (config.n_action_steps,)
    for count in steps:
        if not 1 <= count <= config.chunk_size:
            raise ValueError(
                f"n_action_steps {count} is not within 1..{config.chunk_size}, the policy's chunk"
            )
    seen = tuple(seen_cameras(config, rename))
    try:
        cameras = drawn_cameras(environment, seen)
    except ValueError as error:
        raise ValueError(f"env {job.env}: {error}") from None
    if absent := sorted(set(seen) - set(cameras)):
        print(
            f"warning: env {job.env} does not draw {', '.join(absent)}, which the policy can see", flush=True
        )
    return steps, cameras


def _rollouts(job: EvaluateSmolVLA, config: SmolVLAConfig, processor: SmolVLAProcessor) -> Rollouts:
    steps, cameras = check_rollouts(job, config, processor.files.rename)
    sizes = {
        feature["shape"][-1] for feature in config.input_features.values() if feature["type"] == "VISUAL"
    }
    return Rollouts(
        env=job.env,
        tasks=tuple(job.tasks),
        episodes=job.episodes,
        n_action_steps=steps,
        seed=job.seed,
        size_px=job.size or max(sizes),
        cameras=cameras,
        num_environments=job.num_environments,
        max_steps=job.max_steps,
        blank_images=job.blank_images,
    )


def _held_out(
    job: EvaluateSmolVLA, policy: Policy, config: SmolVLAConfig, processor: SmolVLAProcessor
) -> HeldOut:
    """The frames as the policy was trained to see them."""
    dataset = open_dataset(readable(job.dataset.path, flag="dataset.path"))
    rename = check_dataset(dataset, config, processor.files.rename, path=job.dataset.path)
    entry = Entry(
        path=job.dataset.path, name=dataset.uri, rename=rename, flag="dataset", rename_flag="rename"
    )
    data = TrainingData(entries=[entry], datasets=[dataset], export=0, fps=dataset.fps)
    (source,) = training_data.sources(data, config)
    chosen = _episodes(job, policy, dataset)
    source = replace(source, normalizer=processor.normalizer, dataset=dataset.with_episodes(chosen), name="")
    reader = SampleReader(
        [source],
        StreamConfig(micro_batch=job.dataset.micro_batch, mixing_rows=job.dataset.micro_batch),
        chunk_size=config.chunk_size,
        image_box=config.resize_imgs_with_padding,
        num_observations=config.n_obs_steps,
    )
    settings = ValidationConfig(every=1, max_frames=job.dataset.frames, seed=_validation_seed(policy))
    return HeldOut(reader=reader, config=settings)


def check_dataset(
    dataset: EpisodeDataset, config: SmolVLAConfig, rename: Mapping[str, str], *, path: str
) -> dict[str, str]:
    """What of a policy's mapping of cameras is a dataset's.

    Raises:
        ValueError: the dataset lacks a camera.
    """
    known = {name: to for name, to in rename.items() if name in dataset.camera_names}
    cameras = {known.get(name, name) for name in dataset.camera_names}
    if missing := sorted(set(config.camera_names) - cameras):
        raise ValueError(f"dataset.path {path}: the policy sees {missing}, the dataset has {sorted(cameras)}")
    return known


def _validation_seed(policy: Policy) -> int:
    """That of the training's own validation, so that the losses can be compared."""
    identity = policy.record["identity"] if policy.record else {}
    return (identity.get("validation") or {}).get("seed", 0)


def _episodes(job: EvaluateSmolVLA, policy: Policy, dataset: EpisodeDataset) -> np.ndarray:
    """Rows of `dataset.episode_index`."""
    wanted = job.dataset.episodes
    held_out = policy.held_out(dataset.fingerprint)
    if not wanted and held_out is not None:
        if not held_out:
            print("warning: the policy was trained on every episode of this dataset", flush=True)
        wanted = held_out
    if not wanted:
        return np.arange(len(dataset.episode_index))
    unknown = sorted(set(wanted) - set(dataset.episode_index.tolist()))
    if unknown:
        raise ValueError(f"dataset.episodes {unknown}: the dataset has no such episodes")
    return np.flatnonzero(np.isin(dataset.episode_index, wanted))


# ---- what is done -----------------------------------------------------------------------------------------


def evaluate(job: EvaluateSmolVLA, prepared: Prepared, recorder: Recorder) -> dict[str, Any]:
    """Measure, play, tell; returns the figures of the report line."""
    figures: dict[str, Any] = {"policy": prepared.policy.path, "step": prepared.policy.step}
    num_gpus = 1 if job.use_gpu else 0
    if prepared.held_out:
        answers = offline.asked(
            prepared.held_out,
            prepared.policy.fetch(),
            actors=job.actors,
            num_gpus=num_gpus,
            cpus=job.cpus_per_policy,
            resource=job.resource,
            on_progress=_Lines("frames"),
        )
        found = offline.reports(prepared.held_out, answers)
        print(offline_table(found), flush=True)
        recorder.offline(found, prepared.held_out, answers)
        figures["offline"] = {
            "loss": found[0].loss,
            "relative_mae": found[0].relative(),
            "frames": found[0].frames,
        }
    if prepared.rollouts:
        figures["closed_loop"] = _play(job, prepared, prepared.rollouts, recorder, num_gpus=num_gpus)
    return figures


def _play(
    job: EvaluateSmolVLA, prepared: Prepared, rollouts: Rollouts, recorder: Recorder, *, num_gpus: float
) -> dict[str, Any]:
    theatre = Theatre(
        rollouts,
        prepared.policy.fetch(),
        num_gpus=num_gpus,
        cpus=job.cpus_per_policy,
        resource=job.resource,
    )
    progress, played = _Lines("episodes"), []

    def broke_off() -> None:  # what had ended is kept, and is no point of a curve
        print(f"{len(played)} of {len(rollouts.plays)} episodes had ended", flush=True)
        if played:
            _told(played, job, theatre.latencies_s, recorder, complete=False)

    try:
        with recorder.breaking_off(broke_off):
            for one in theatre.play():
                played.append(one)
                progress(len(played), len(rollouts.plays))
        rows, groups, latency = _told(played, job, theatre.latencies_s, recorder, complete=True)
        chosen = filmed(played, each=job.videos)
        for one, content in theatre.films(chosen, fps=getattr(environment_class(job.env), "FPS", 40)):
            recorder.film(one, content)
    finally:
        theatre.close()
    return {
        "success_rate": {f"{row.task} n{row.n_action_steps}": row.rate for row in rows},
        "groups": {f"{row.task} n{row.n_action_steps}": row.rate for row in groups},
        "latency_ms": latency,
    }


def _told(
    played: Sequence[Played],
    job: EvaluateSmolVLA,
    latencies_s: Sequence[tuple[int, float]],
    recorder: Recorder,
    *,
    complete: bool,
) -> tuple[list[Success], list[Success], dict[str, float]]:
    """Print and record how often was solved what; returns it by task and by group, and the milliseconds."""
    rows, latency = successes(played), latencies(latencies_s)
    groups = of_groups(rows, groups_of(environment_class(job.env)))
    print(success_table(rows, groups, latency), flush=True)
    recorder.played(played, rows, groups, latency, complete=complete)
    return rows, groups, latency


def filmed(played: Sequence[Played], *, each: int) -> list[Played]:
    """The first successes and the first failures of every task and number of steps."""
    counts: dict[tuple[str, int, bool], int] = {}
    chosen = []
    for one in sorted(played, key=lambda one: one.play.number):
        key = (one.play.task, one.play.n_action_steps, one.success)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= each:
            chosen.append(one)
    return chosen


def latencies(found: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Milliseconds of a forward pass, without the first one."""
    values = np.array([seconds for _, seconds in found[1:] or found]) * 1e3
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "environments": float(np.mean([count for count, _ in found])),
    }


class _Lines:
    """Progress in a log."""

    def __init__(self, what: str, every_s: float = 10.0) -> None:
        self._what, self._every_s = what, every_s
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed < self._every_s and done < total:
            return
        self._printed = now
        left = (now - self._started) / done * (total - done)
        print(f"{self._what} {done}/{total}, {left:.0f} s left", flush=True)


def check_cluster(job: EvaluateSmolVLA) -> None:
    """Refuse what the cluster can never give; Ray would wait for it in silence.

    Raises:
        ValueError: names the flags, what they need and what there is.
    """
    have, need = ray.cluster_resources(), needs(job)
    if have.get("GPU", 0) < need["GPU"]:
        raise ValueError("use_gpu: the cluster has no GPU")
    if have.get("CPU", 0) < need["CPU"]:
        raise ValueError(
            f"num_environments {job.num_environments} at {CPUS_PER_ENVIRONMENT} CPUs each and "
            f"cpus_per_policy {job.cpus_per_policy} need {need['CPU']:g} CPUs, the cluster has "
            f"{have.get('CPU', 0):g}"
        )


def needs(job: EvaluateSmolVLA) -> dict[str, float]:
    """CPUs and GPUs that an evaluation holds at once."""
    stages = min(job.num_environments, len(job.tasks) * job.episodes * max(len(job.n_action_steps), 1))
    return {
        "CPU": job.cpus_per_policy + (stages * CPUS_PER_ENVIRONMENT if job.env else 0),
        "GPU": float(job.use_gpu),
    }


def params(job: EvaluateSmolVLA, prepared: Prepared) -> dict[str, Any]:
    """What MLflow shows as the run's parameters."""
    shown: dict[str, Any] = {"policy": prepared.policy.name, "seed": job.seed}
    if prepared.held_out:
        shown |= {"dataset": job.dataset.path, "frames": job.dataset.frames}
    if prepared.rollouts:
        shown |= {
            "env": job.env,
            "tasks": ", ".join(job.tasks)[:PARAM_CHARS],
            "episodes": job.episodes,
            "n_action_steps": ", ".join(map(str, prepared.rollouts.n_action_steps)),
            "blank_images": job.blank_images,
            "size": prepared.rollouts.size_px,
        }
    return shown


def judged(job: EvaluateSmolVLA, prepared: Prepared) -> dict[str, Any]:
    """Evaluate as a run of MLflow; returns the figures of the report line."""
    held_out = prepared.held_out
    datasets = [source.dataset for source in held_out.reader.sources] if held_out else []
    shown, policy = params(job, prepared), prepared.policy
    with tracked(job.tracking, policy, params=shown, datasets=datasets, blind=job.blank_images) as told:
        run, recorder = told
        figures = evaluate(job, prepared, recorder)
    return figures | {"mlflow": run.link}


def main(job: EvaluateSmolVLA) -> None:
    """Check, start, evaluate, report."""
    if job.ends_with_input:
        end_with_input()
    job = replace(job, tracking=job.tracking.completed())
    with command_line.refusals():
        tracking.check_reachable(job.tracking.uri)
        prepared = prepare(job)
    command_line.start_ray()
    with command_line.refusals():
        check_cluster(job)
    print(json.dumps(judged(job, prepared)), flush=True)


if __name__ == "__main__":
    main(command_line.parsed(EvaluateSmolVLA, sys.argv[1:]))
