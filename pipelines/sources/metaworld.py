"""Meta-World as a source: its scripted experts solve seeded tasks in MuJoCo and are filmed by one camera.

The simulator is that of pipelines/environments/metaworld.py, in which policies are judged; it is loaded in
the worker that runs the episodes, with `Listing.worker_env` set. A unit is one episode. It depends on (seed,
task, number of the episode) alone.
"""

import importlib.metadata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.environments.metaworld import (
    CAMERA,
    FPS,
    PROCESS_VARIABLES,
    SENTENCES,
    Simulation,
    nearest_task,
    require_simulator,
)
from pipelines.sources import Episode, Listing, Refusal, Unit

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
    """Height and width of the camera."""
    action_noise: float = 0.0
    """Standard deviation of the noise added to the executed action; the recorded one stays the expert's."""
    max_attempts: int = 10
    """Seeds tried for an episode; the experts solve at least three of four, so ten failures mean trouble."""

    def listing(self) -> Listing:
        self._check()
        require_simulator()
        vector = {"dtype": "float32", "shape": [4]}
        return Listing(
            fps=FPS,
            robot_type="sawyer",
            features={
                CAMERA: {
                    "dtype": "image",
                    "shape": [self.size_px, self.size_px, 3],
                    "names": ["height", "width", "channels"],
                },
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
                "action_noise": self.action_noise,
                "max_attempts": self.max_attempts,
            },
            location="simulated",
            worker_env=PROCESS_VARIABLES,
        )

    def _check(self) -> None:
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
        for name, value, low, high in (
            *(("episodes", number, 1, 1_000_000) for number in self.num_episodes),
            ("size", self.size_px, 16, 1024),
            ("seed", self.seed, 0, 2**32 - 1),
            ("action_noise", self.action_noise, 0, 1),
            ("max_attempts", self.max_attempts, 1, 1000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is not within {low}..{high}")

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
                stage = _Stage(task, size_px=self.size_px)
            yield self._episode(stage, unit.name, number)
        if stage is not None:
            stage.close()

    def _episode(self, stage: "_Stage", name: str, number: int) -> Episode | Refusal:
        """Rehearse without the camera until the expert succeeds; the same seed then plays in front of it."""
        for attempt in range(self.max_attempts):
            seeds = np.random.SeedSequence([self.seed, zlib.crc32(stage.task.encode()), number, attempt])
            rehearsal = list(stage.rollout(seeds, action_noise=self.action_noise))
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
            cameras={CAMERA: stage.filmed(seeds, action_noise=self.action_noise)},
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
    """One task's simulator with its expert."""

    def __init__(self, task: str, *, size_px: int) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self._expert_class = ENV_POLICY_MAP[task]
        self._simulation = Simulation(task, size_px=size_px)

    def rollout(self, seeds: np.random.SeedSequence, *, action_noise: float) -> Iterator[_Step]:
        """Play one episode; the simulator stands at a step while the caller holds it.

        Ends `FRAMES_AFTER_SUCCESS` frames into success, or at the task's limit of 500 actions.
        """
        env_seed, noise_seed = (int(seed) for seed in seeds.generate_state(2))
        noise = np.random.default_rng(noise_seed)
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
            executed = np.clip(action + action_noise * noise.standard_normal(4), -1, 1).astype(np.float32)
            observation, _, _, _, info = env.step(executed)
            solved = bool(info["success"])

    def filmed(self, seeds: np.random.SeedSequence, *, action_noise: float) -> Iterator[np.ndarray]:
        """Yield the picture of every step of a rollout, uint8 (size, size, 3) RGB."""
        for _ in self.rollout(seeds, action_noise=action_noise):
            yield self._simulation.picture()

    def close(self) -> None:
        self._simulation.close()
