"""Environments registered with gymnasium, by their id."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from pipelines.environments import Observation

CAMERA = "observation.images.top"
STATE_KEYS = ("agent_pos", "observation.state", "state")
SUCCESS_KEYS = ("is_success", "success")


class GymnasiumEnvironment:
    """`--tasks gym_pusht/PushT-v0`; the module before the slash, if there is one, is imported first.

    The state is the observation if that is a vector, else its entry `agent_pos`, `observation.state` or
    `state`; the picture is its entry `pixels`, else what the environment renders. An episode is solved when
    its info says `is_success` or `success`. The instruction is the id's name, unless the environment has an
    attribute `task_description`.
    """

    CAMERAS: ClassVar = (CAMERA,)

    def __init__(self, task: str, *, size_px: int, cameras: tuple[str, ...]) -> None:
        module, slash, _ = task.partition("/")
        self._env: Any = gymnasium.make(f"{module}:{task}" if slash else task, render_mode="rgb_array")
        self._size_px = size_px
        name = task.rpartition("/")[2].rpartition("-")[0] or task
        self.instruction: str = getattr(self._env.unwrapped, "task_description", None) or name
        self.max_steps: int = (self._env.spec and self._env.spec.max_episode_steps) or 1000
        self._latest: Any = None
        self._ended = False

    @staticmethod
    def check_task(task: str) -> None:
        """Refuse an id that gymnasium does not know.

        Raises:
            ValueError: names it.
        """
        module, slash, _ = task.partition("/")
        try:
            gymnasium.spec(f"{module}:{task}" if slash else task)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"tasks: {task!r}: {error}") from None

    def reset(self, seed: int) -> Observation:
        """Begin the episode of a seed."""
        self._latest, _ = self._env.reset(seed=seed)
        self._ended = False
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action, clipped to what the environment takes; after its end nothing happens."""
        if self._ended:
            return False
        space = self._env.action_space
        clipped = np.clip(action, space.low, space.high).astype(space.dtype)
        self._latest, _, terminated, truncated, info = self._env.step(clipped)
        self._ended = terminated or truncated
        return any(bool(info.get(key)) for key in SUCCESS_KEYS)

    def observe(self) -> Observation:
        """Picture and state."""
        found = self._latest if isinstance(self._latest, dict) else {}
        state = next((found[key] for key in STATE_KEYS if key in found), None)
        if state is None and not found:
            state = self._latest
        if state is None:
            raise ValueError(f"the observation has none of {STATE_KEYS}; it has {sorted(found)}")
        picture = found.get("pixels")
        picture = self.render() if picture is None else np.asarray(picture, dtype=np.uint8)
        return {CAMERA: picture, "observation.state": np.asarray(state, dtype=np.float32).reshape(-1)}

    def render(self) -> NDArray[np.uint8]:
        """What gymnasium renders."""
        return np.ascontiguousarray(self._env.render(), dtype=np.uint8)

    def close(self) -> None:
        """End the environment."""
        self._env.close()
