"""Meta-World as a source: its scripted experts solve seeded tasks in MuJoCo and are filmed by one camera.

Camera, flip, state and sentences follow lerobot's Meta-World environment, so that a policy trained here can
be judged there; shadows and reflections are off, which makes software rendering ten times faster and the
pictures a little different. A unit is one episode. It depends on (seed, task, number of the episode) alone.

MuJoCo chooses its renderer when it is imported, and importing torch after it has crashed: this module imports
neither; the simulator is loaded in the worker that runs the episodes, with `Listing.worker_env` set.
"""

import ctypes
import ctypes.util
import difflib
import importlib.metadata
import importlib.util
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.sources import Episode, Listing, Refusal, Unit

CAMERA = "observation.images.corner2"
CORNER2_POSITION = (0.75, 0.075, 0.7)
"""lerobot moves corner2 closer than Meta-World has it."""
FPS = 80
"""MuJoCo steps of 2.5 ms, 5 to an action."""
STATE_NAMES = ["hand_x", "hand_y", "hand_z", "gripper"]
ACTION_NAMES = ["delta_x", "delta_y", "delta_z", "gripper_effort"]
FRAMES_AFTER_SUCCESS = 5
"""Frames kept from the first solved one, so that the policy sees what being done looks like."""
EXPECTED_FRAMES = 80
"""A typical episode; only balances the work."""

SENTENCES = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of the peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "hand-insert-v3": "Insert the gripper into a hole",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into the cabinet sideways",
    "plate-slide-v3": "Slide a plate into the cabinet",
    "push-back-v3": "Pull a puck to a goal",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "soccer-v3": "Kick a soccer ball into the goal",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box with the stick",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}
"""What each of the 50 tasks asks for, in the words of Meta-World's task list."""


@dataclass(frozen=True, kw_only=True)
class MetaWorldSource:
    """Successful episodes of Meta-World's scripted experts."""

    tasks: tuple[str, ...]
    num_episodes: int
    """Of each task."""
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
                for task in self.tasks
                for number in range(self.num_episodes)
            ),
            identity={
                "format": "metaworld",
                "metaworld": importlib.metadata.version("metaworld"),
                "mujoco": importlib.metadata.version("mujoco"),
                "tasks": list(self.tasks),
                "episodes": self.num_episodes,
                "seed": self.seed,
                "size": self.size_px,
                "action_noise": self.action_noise,
                "max_attempts": self.max_attempts,
            },
            location="simulated",
            worker_env={"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"},
        )

    def _check(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, such as reach-v3")
        for task in self.tasks:
            if task not in SENTENCES:
                raise ValueError(
                    f"tasks: {task!r} is none of Meta-World's {len(SENTENCES)}: {_nearest(task)}"
                )
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names one twice: {' '.join(self.tasks)}")
        for name, value, low, high in (
            ("episodes", self.num_episodes, 1, 1_000_000),
            ("size", self.size_px, 16, 1024),
            ("seed", self.seed, 0, 2**32 - 1),
            ("action_noise", self.action_noise, 0, 1),
            ("max_attempts", self.max_attempts, 1, 1000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} {value} is not within {low}..{high}")

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


def require_simulator() -> None:
    """Raise one line naming the missing package, instead of the simulator's page of imports.

    Raises:
        ValueError: metaworld or the OSMesa library cannot be loaded here.
    """
    if importlib.util.find_spec("metaworld") is None:
        raise ValueError("metaworld is not installed: pip install 'smolvla-ray[sim]'")
    try:
        ctypes.CDLL(ctypes.util.find_library("OSMesa") or "libOSMesa.so.8")
    except OSError:
        raise ValueError("the OSMesa library is missing: apt-get install libosmesa6") from None


def _nearest(task: str) -> str:
    close = difflib.get_close_matches(task, SENTENCES, n=1)
    return f"did you mean {close[0]}?" if close else f"for example {', '.join(list(SENTENCES)[:3])}"


@dataclass(frozen=True)
class _Step:
    """A moment of a rollout, before its action is executed."""

    state: np.ndarray
    """float32 (4,)."""
    action: np.ndarray
    """float32 (4,), the expert's, within [-1, 1]."""
    solved: bool


class _Stage:
    """One task's simulator, expert and camera.

    Building one takes half a second, so it is kept for many episodes; a rollout in a used one is bit for bit
    that of a new one (tried for all 50 tasks).
    """

    def __init__(self, task: str, *, size_px: int) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self.expert_class = ENV_POLICY_MAP[task]
        environment: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]
        self.env = environment()
        # Meta-World freezes goal and objects at the first reset; as lerobot, draw them anew from the seed
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        model = self.env.model
        model.cam_pos[model.camera("corner2").id] = CORNER2_POSITION
        # shadow maps and multisampling are drawn by the CPU here; measured 8.6 -> 85 pictures/s at 256 px
        model.vis.quality.shadowsize = 1024
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size_px)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size_px)
        self.renderer = mujoco.Renderer(model, height=size_px, width=size_px)
        flags = mujoco.mjtRndFlag  # pyright: ignore[reportAttributeAccessIssue]
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = 0

    def rollout(self, seeds: np.random.SeedSequence, *, action_noise: float) -> Iterator[_Step]:
        """Play one episode; the simulator stands at a step while the caller holds it.

        Ends `FRAMES_AFTER_SUCCESS` frames into success, or at the task's limit of 500 actions.
        """
        env_seed, noise_seed = (int(seed) for seed in seeds.generate_state(2))
        noise = np.random.default_rng(noise_seed)
        expert = self.expert_class()
        self.env.seed(env_seed)
        observation, _ = self.env.reset()
        num_solved, solved = 0, False
        for _ in range(self.env.max_path_length):
            with warnings.catch_warnings():  # an expert warns when the clip below will act
                warnings.simplefilter("ignore", UserWarning)
                action = np.clip(expert.get_action(observation), -1, 1).astype(np.float32)
            yield _Step(observation[:4].astype(np.float32), action, solved)
            num_solved += solved
            if num_solved == FRAMES_AFTER_SUCCESS:
                return
            executed = np.clip(action + action_noise * noise.standard_normal(4), -1, 1).astype(np.float32)
            observation, _, _, _, info = self.env.step(executed)
            solved = bool(info["success"])

    def filmed(self, seeds: np.random.SeedSequence, *, action_noise: float) -> Iterator[np.ndarray]:
        """Yield the picture of every step of a rollout, uint8 (size, size, 3) RGB."""
        for _ in self.rollout(seeds, action_noise=action_noise):
            self.renderer.update_scene(self.env.data, camera="corner2")
            # corner2 hangs upside down; lerobot turns its pictures by 180 degrees, too
            yield np.ascontiguousarray(self.renderer.render()[::-1, ::-1])

    def close(self) -> None:
        self.renderer.close()
        self.env.close()
