"""Meta-World as a source: its scripted experts solve seeded tasks in MuJoCo and are filmed.

The simulator is that of pipelines/environments/metaworld.py, in which policies are judged; it is loaded in
the worker that runs the episodes, with `Listing.worker_env` set. A unit is one episode. It depends on (seed,
task, number of the episode) alone.
"""

import importlib.metadata
import itertools
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from pipelines.environments.metaworld import (
    CAMERAS,
    FPS,
    PROCESS_VARIABLES,
    SENTENCES,
    Simulation,
    nearest_task,
    require_simulator,
)
from pipelines.sources import Episode, Listing, Refusal, Unit
from pipelines.sources.mapping import CAMERA_PREFIX

STATE_NAMES = ["hand_x", "hand_y", "hand_z", "gripper"]
ACTION_NAMES = ["delta_x", "delta_y", "delta_z", "gripper_effort"]
FRAMES_AFTER_SUCCESS = 5
"""Frames kept from the first solved one, so that the policy sees what being done looks like."""
EXPECTED_FRAMES = 80
"""A typical episode; only balances the work."""


@dataclass(frozen=True, kw_only=True)
class MetaWorldSource:
    """Successful episodes of Meta-World's scripted experts."""

    tasks: tuple[str, ...]
    num_episodes: tuple[int, ...]
    """Of each task: one number for all, or one per task in the order of `tasks`."""
    seed: int = 0
    size_px: int = 96
    """Height and width of the pictures."""
    cameras: tuple[str, ...] = ("corner2",)
    """Of Meta-World's, see `CAMERAS`; the default is lerobot's."""
    action_noise: float = 0.0
    """Standard deviation of the noise added to the executed action; the recorded one stays the expert's."""
    noise_correlation: float = 0.0
    """Of one step's noise with the next one's. White noise hardly leads the hand off the expert's way: its
    place then tells a policy where the goal is, and nothing shows the way back."""
    max_attempts: int = 10
    """Seeds tried for an episode; the experts solve at least three of four, so ten failures mean trouble."""

    def listing(self) -> Listing:
        self._check()
        require_simulator()
        vector = {"dtype": "float32", "shape": [4]}
        picture = {
            "dtype": "image",
            "shape": [self.size_px, self.size_px, 3],
            "names": ["height", "width", "channels"],
        }
        return Listing(
            fps=FPS,
            robot_type="sawyer",
            features={CAMERA_PREFIX + camera: picture for camera in self.cameras}
            | {
                "observation.state": vector | {"names": STATE_NAMES},
                "action": vector | {"names": ACTION_NAMES},
            },
            tasks=tuple(SENTENCES[task] for task in self.tasks),
            units=tuple(
                Unit(
                    name=f"{task}/{number}",
                    num_episodes=1,
                    num_frames=EXPECTED_FRAMES,
                    detail=(task, number),
                )
                for task, episodes in zip(self.tasks, self._episodes_of_tasks(), strict=True)
                for number in range(episodes)
            ),
            identity={
                "format": "metaworld",
                "metaworld": importlib.metadata.version("metaworld"),
                "mujoco": importlib.metadata.version("mujoco"),
                "tasks": list(self.tasks),
                "episodes": self.num_episodes[0] if len(self.num_episodes) == 1 else list(self.num_episodes),
                "seed": self.seed,
                "size": self.size_px,
                "cameras": list(self.cameras),
                "action_noise": self.action_noise,
                "noise_correlation": self.noise_correlation,
                "max_attempts": self.max_attempts,
            },
            location="simulated",
            worker_env=PROCESS_VARIABLES,
        )

    def _check(self) -> None:
        if unknown := [camera for camera in self.cameras if camera not in CAMERAS]:
            raise ValueError(f"cameras: {' '.join(unknown)} is none of Meta-World's: {', '.join(CAMERAS)}")
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras {' '.join(self.cameras)!r}: name at least one, and each once")
        self._check_tasks()
        for name, value, low, high in (
            *(("episodes", number, 1, 1_000_000) for number in self.num_episodes),
            ("size", self.size_px, 16, 1024),
            ("seed", self.seed, 0, 2**32 - 1),
            ("action_noise", self.action_noise, 0, 1),
            ("noise_correlation", self.noise_correlation, 0, 0.999),
            ("max_attempts", self.max_attempts, 1, 1000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is not within {low}..{high}")

    def _check_tasks(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, such as reach-v3")
        for task in self.tasks:
            if task not in SENTENCES:
                raise ValueError(
                    f"tasks: {task!r} is none of Meta-World's {len(SENTENCES)}: {nearest_task(task)}"
                )
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names one twice: {' '.join(self.tasks)}")
        if len(self.num_episodes) not in (1, len(self.tasks)):
            raise ValueError(
                f"episodes has {len(self.num_episodes)} numbers for {len(self.tasks)} tasks; "
                "give one for all, or one per task"
            )

    def _episodes_of_tasks(self) -> tuple[int, ...]:
        return self.num_episodes * len(self.tasks) if len(self.num_episodes) == 1 else self.num_episodes

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        require_simulator()
        stage: _Stage | None = None
        for unit in units:
            task, number = unit.detail
            if stage is None or stage.task != task:
                if stage is not None:
                    stage.close()
                stage = _Stage(task, self)
            yield self._episode(stage, unit.name, number)
        if stage is not None:
            stage.close()

    def _episode(self, stage: "_Stage", name: str, number: int) -> Episode | Refusal:
        """Rehearse without the camera until the expert succeeds; the same seed then plays in front of it."""
        for attempt in range(self.max_attempts):
            seeds = np.random.SeedSequence([self.seed, zlib.crc32(stage.task.encode()), number, attempt])
            rehearsal = list(stage.rollout(seeds))
            if rehearsal[-1].solved:
                break
        else:
            detail = f"the expert failed with {self.max_attempts} seeds"
            return Refusal(episode=name, reason="expert_failed", detail=detail)
        return Episode(
            name=name,
            tasks=[SENTENCES[stage.task]] * len(rehearsal),
            columns={
                "observation.state": np.stack([step.state for step in rehearsal]),
                "action": np.stack([step.action for step in rehearsal]),
            },
            cameras=stage.filmed(seeds),
            notes={"failed_attempts": attempt, "solved_frames": sum(step.solved for step in rehearsal)},
        )


@dataclass(frozen=True)
class _Step:
    """A moment of a rollout, before its action is executed."""

    state: np.ndarray
    """float32 (4,)."""
    action: np.ndarray
    """float32 (4,), the expert's, within [-1, 1]."""
    solved: bool


class _Stage:
    """One task's simulator with its expert, who acts and is filmed as the source says."""

    def __init__(self, task: str, source: MetaWorldSource) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self.task, self._source = task, source
        self._expert_class = ENV_POLICY_MAP[task]
        self._simulation = Simulation(task, size_px=source.size_px)

    def rollout(self, seeds: np.random.SeedSequence) -> Iterator[_Step]:
        """Play one episode; the simulator stands at a step while the caller holds it.

        Ends `FRAMES_AFTER_SUCCESS` frames into success, or at the task's limit of 500 actions.
        """
        env_seed, noise_seed = (int(seed) for seed in seeds.generate_state(2))
        rng = np.random.default_rng(noise_seed)
        noise, fresh, correlation = np.zeros(4), 1.0, self._source.noise_correlation
        expert, env = self._expert_class(), self._simulation.env
        observation = self._simulation.reset(env_seed)
        num_solved, solved = 0, False
        for _ in range(env.max_path_length):
            with warnings.catch_warnings():  # an expert warns when the clip below will act
                warnings.simplefilter("ignore", UserWarning)
                action = np.clip(expert.get_action(observation), -1, 1).astype(np.float32)
            yield _Step(observation[:4].astype(np.float32), action, solved)
            num_solved += solved
            if num_solved == FRAMES_AFTER_SUCCESS:
                return
            noise = correlation * noise + fresh * self._source.action_noise * rng.standard_normal(4)
            fresh = math.sqrt(1 - correlation**2)  # from the second step on: as wide as it began
            executed = np.clip(action + noise, -1, 1).astype(np.float32)
            observation, _, _, _, info = env.step(executed)
            solved = bool(info["success"])

    def filmed(self, seeds: np.random.SeedSequence) -> dict[str, Iterator[np.ndarray]]:
        """For each camera its pictures of every step of one rollout, uint8 (size, size, 3) RGB."""
        cameras = self._source.cameras
        moments = (
            {camera: self._simulation.picture(camera) for camera in cameras} for _ in self.rollout(seeds)
        )
        # a tee keeps what one camera was asked for and another not yet
        copies = itertools.tee(moments, len(cameras))
        return {
            CAMERA_PREFIX + camera: map(itemgetter(camera), copy)
            for camera, copy in zip(cameras, copies, strict=True)
        }

    def close(self) -> None:
        self._simulation.close()
