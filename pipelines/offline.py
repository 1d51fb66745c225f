"""A policy on recorded frames: its loss at fixed noise, and its chunks beside what was done, in real units.

Shape letters: K frames, H chunk, D action width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util import ActorPool

from pipelines.inspection import dimension_names, episode_columns
from pipelines.plan import PREDICTION_NOISE, Rows
from pipelines.predictions import STEPS_AHEAD, Predictions, mean_over_frames
from pipelines.rollouts import on_nodes_with
from pipelines.validation import DRAWS, HeldOut, frame_generators, loss_draws

Answers = dict[str, NDArray[Any]]
"""loss, entries, task, bad_cameras, episode_index, frame_index (K,); predicted, true (K, H, D) in the
units of the dataset; valid (K, H)."""


@ray.remote
class Judge:
    """A policy that is asked about recorded frames.

    Args:
        fetch: gives the folder of the policy on the actor's node.
        held_out: the frames' dataset, normalised as the policy was trained.
        threads: of torch; None leaves them as they are.
    """

    def __init__(self, fetch: Callable[[], Path], held_out: HeldOut, *, threads: int | None) -> None:
        import torch

        from smolvla import SmolVLAPolicy

        if threads:
            torch.set_num_threads(threads)
        self._held_out = held_out
        self._policy = SmolVLAPolicy.from_pretrained(fetch()).eval()
        if torch.cuda.is_available():
            self._policy.to("cuda")

    def answers(self, rows: Rows) -> Answers:
        """What the policy says of some rows."""
        import torch

        from pipelines.tensors import ToTorch
        from smolvla.data_utils import sample_noise

        batch, task = self._held_out.batch(rows)
        tensors, config, seed = ToTorch()(batch), self._policy.config, self._held_out.config.seed
        device = self._policy.device
        noise, times = loss_draws(seed, rows.source, batch, action_dim=config.max_action_dim)
        with torch.no_grad():
            inputs = self._policy.prepare_inputs(tensors)
            found = self._policy(
                **inputs, noise=noise.to(device), time=times.to(device), repeated_noise=DRAWS
            )
        shape = (1, config.chunk_size, config.max_action_dim)
        drawn = frame_generators(PREDICTION_NOISE, seed=seed, sources=rows.source, batch=batch)
        begun = torch.cat([sample_noise(shape, generator) for generator in drawn])
        chunks = self._policy.predict_action_chunk(tensors, begun).float().cpu().numpy()
        normalizer = self._held_out.reader.sources[0].normalizer
        valid = ~batch["action_is_pad"]
        return {
            "loss": found["per_sample_loss"].double().cpu().numpy(),
            "entries": valid.sum(axis=1) * chunks.shape[2],
            "task": task,
            "predicted": normalizer.unnormalize("action", chunks),
            "true": normalizer.unnormalize("action", batch["action"]),
            "valid": valid,
            **{name: batch[name] for name in ("bad_cameras", "episode_index", "frame_index")},
        }


def asked(
    held_out: HeldOut,
    fetch: Callable[[], Path],
    *,
    actors: int,
    num_gpus: float = 0,
    cpus: float = 1,
    resource: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """What the policy says of all frames, in their order, from several actors.

    Args:
        held_out: one dataset, and which frames of it.
        fetch: gives the folder of the policy on any node.
        actors: that share the frames.
        num_gpus: of each actor, 0 or 1.
        cpus: of each actor.
        resource: name of a resource of Ray's that the nodes of all actors must have; empty: any node.
        on_progress: gets (frames done, frames).
    """
    frames, size = held_out.frames, held_out.reader.config.micro_batch
    batches = [
        frames[np.arange(first, min(first + size, len(frames)))] for first in range(0, len(frames), size)
    ]
    judge_class, threads = cast("Any", Judge), None if num_gpus else max(int(cpus), 1)
    options = {"num_cpus": cpus, "num_gpus": num_gpus, "resources": on_nodes_with(resource)}
    judges = [
        judge_class.options(**options).remote(fetch, held_out, threads=threads)
        for _ in range(min(actors, len(batches)))
    ]
    found: list[Answers] = []
    try:
        for answers in ActorPool(judges).map(lambda judge, rows: judge.answers.remote(rows), batches):
            found.append(answers)
            on_progress(min(len(found) * size, len(frames)), len(frames))
    finally:
        for judge in judges:
            ray.kill(judge)
    return {name: np.concatenate([answers[name] for answers in found]) for name in found[0]}


def last_actions(held_out: HeldOut, answers: Answers) -> NDArray[np.float32]:
    """(K, D): what the robot was doing when a frame was recorded; NaN at the first frame of an episode."""
    dataset = held_out.reader.sources[0].dataset
    last = np.full((len(answers["loss"]), answers["true"].shape[2]), np.nan, dtype=np.float32)
    place = {int(number): row for row, number in enumerate(dataset.episode_index)}
    for number in np.unique(answers["episode_index"]).tolist():
        mine = np.flatnonzero((answers["episode_index"] == number) & (answers["frame_index"] > 0))
        if len(mine):
            actions = episode_columns(dataset, place[number], ["action"])["action"]
            last[mine] = actions[answers["frame_index"][mine] - 1]
    return last


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Mean errors of an answer, in the dataset's units: (H, D)."""

    mae: NDArray[np.float64]
    rmse: NDArray[np.float64]

    @classmethod
    def of(cls, answer: NDArray[Any], true: NDArray[Any], valid: NDArray[np.bool_]) -> "Errors":
        """Of an answer (K, H, D)."""
        error = answer.astype(np.float64) - true
        return cls(
            mae=mean_over_frames(np.abs(error), valid), rmse=np.sqrt(mean_over_frames(error**2, valid))
        )

    def at(self) -> dict[str, dict[str, list[float]]]:
        """{"mae" or "rmse": {step of the chunk, or "all": (D,)}}; all steps count alike."""
        return {"mae": _at(self.mae, np.mean), "rmse": _at(self.rmse, _root_mean_square)}


def _root_mean_square(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.sqrt(np.mean(values**2, axis=axis))


def _at(values: NDArray[np.float64], mean: Callable[..., Any]) -> dict[str, list[float]]:
    reached = values[~np.isnan(values).any(axis=1)]
    found = {str(ahead): values[ahead - 1].tolist() for ahead in STEPS_AHEAD if ahead <= len(reached)}
    return found | {"all": mean(reached, axis=0).tolist()}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is said of frames that belong together."""

    name: str
    frames: int
    loss: float
    """Flow matching, per real action entry, normalised; that of training."""
    dimensions: Sequence[str]
    policy: Mapping[str, Any]
    """`Errors.at` of the policy, and of the two answers that need no policy:"""
    mean_action: Mapping[str, Any]
    """always the mean action of the dataset,"""
    hold_last: Mapping[str, Any]
    """going on with the action that was under way (with the mean one at an episode's first frame)."""

    def relative(self) -> dict[str, float]:
        """{step, or "all": error of the policy / of the mean action}, mean over the action's numbers."""
        found = {}
        for ahead, errors in self.policy["mae"].items():
            of_the_mean = np.array(self.mean_action["mae"][ahead])
            moving = of_the_mean > 0
            found[ahead] = (
                float(np.mean(np.array(errors)[moving] / of_the_mean[moving])) if moving.any() else math.nan
            )
        return found


def reports(held_out: HeldOut, answers: Answers) -> list[Report]:
    """Of all frames, then of each task; frames with images that cannot be used are left out."""
    used = answers["entries"] > 0
    if not used.any():
        raise ValueError(f"{held_out.reader.sources[0].dataset.uri}: no frame could be used")
    last = last_actions(held_out, answers)
    found = [_report("all", held_out, answers, last, used)]
    for number, task in enumerate(held_out.tasks):
        mine = used & (answers["task"] == number)
        if mine.any():
            found.append(_report(task, held_out, answers, last, mine))
    return found


def _report(
    name: str, held_out: HeldOut, answers: Answers, last: NDArray[np.float32], chosen: NDArray[np.bool_]
) -> Report:
    dataset = held_out.reader.sources[0].dataset
    true, valid = answers["true"][chosen], answers["valid"][chosen]
    mean = np.asarray(dataset.stats["action"]["mean"], dtype=np.float32)
    held = np.where(np.isnan(last[chosen]), mean, last[chosen])[:, None]
    loss, entries = answers["loss"][chosen], answers["entries"][chosen]
    return Report(
        name=name,
        frames=int(chosen.sum()),
        loss=math.fsum(loss * entries) / math.fsum(entries),
        dimensions=dimension_names(dataset.features["action"]),
        policy=Errors.of(answers["predicted"][chosen], true, valid).at(),
        mean_action=Errors.of(np.broadcast_to(mean, true.shape), true, valid).at(),
        hold_last=Errors.of(np.broadcast_to(held, true.shape), true, valid).at(),
    )


def predictions(held_out: HeldOut, answers: Answers) -> Predictions:
    """The chunks as the pictures of a training run show them."""
    source = held_out.reader.sources[0]
    used = answers["entries"] > 0
    return Predictions(
        dataset=np.array(source.title),
        names=np.array(dimension_names(source.dataset.features["action"])),
        episode=answers["episode_index"][used],
        frame=answers["frame_index"][used],
        predicted=answers["predicted"][used].astype(np.float32),
        true=answers["true"][used].astype(np.float32),
        valid=answers["valid"][used],
    )
