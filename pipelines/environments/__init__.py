"""Environments that a policy is judged in: a small interface, and how they are found by name.

An environment speaks the language of the data that the policy was trained on: its observations carry the
columns of the dataset, its actions are in the dataset's units.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Observation = dict[str, NDArray[Any]]
"""`observation.images.<camera>` uint8 (h, w, 3) RGB, `observation.state` float32 (S,)."""


@runtime_checkable
class Environment(Protocol):
    """One robot and its world; built once and used for many episodes.

    Its constructor takes the name of a task, `size_px=`, the side of the pictures in pixels, and `cameras=`,
    the columns of the pictures that the policy sees. A class attribute `CAMERAS` may say which it can draw.
    """

    instruction: str
    """The task in the words that the policy was trained with."""
    max_steps: int
    """Actions after which an episode has failed."""

    def reset(self, seed: int) -> Observation:
        """Begin the episode that the seed stands for, the same one whenever and wherever it is asked for."""
        ...

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action (A,); whether the task is solved now. Pictures are drawn by `observe` alone."""
        ...

    def observe(self) -> Observation:
        """What the robot perceives now."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """A picture (h, w, 3) RGB for people."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


KNOWN = {
    "metaworld": "pipelines.environments.metaworld:MetaWorldEnvironment",
    "gymnasium": "pipelines.environments.gymnasium:GymnasiumEnvironment",
}


def environment_class(name: str) -> Any:
    """The class of a known environment, or of one's own as `package.module:Class`.

    Raises:
        ValueError: it cannot be found, or misses a method of `Environment`.
    """
    module, colon, attribute = KNOWN.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"env {name!r} is none of {sorted(KNOWN)}, and no package.module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"env {name!r}: {error}") from None
    missing = [
        method for method in ("reset", "step", "observe", "render", "close") if not hasattr(found, method)
    ]
    if missing:
        raise ValueError(f"env {name!r} has no {', '.join(missing)}; see pipelines/environments/__init__.py")
    return found


def variables_of(found: Any) -> Mapping[str, str]:
    """Environment variables that an environment's process needs before anything is imported."""
    return getattr(found, "PROCESS_VARIABLES", {})


def groups_of(found: Any) -> Mapping[str, str]:
    """Task -> group of difficulty, where the benchmark has such groups."""
    return getattr(found, "GROUPS", {})


def drawn_cameras(found: Any, cameras: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a policy's cameras that an environment draws: all, unless it has a list `CAMERAS`.

    Raises:
        ValueError: it draws none of them.
    """
    drawn = tuple(camera for camera in cameras if camera in getattr(found, "CAMERAS", cameras))
    if not drawn:
        raise ValueError(f"the policy sees {', '.join(cameras)}; there are {', '.join(found.CAMERAS)}")
    return drawn


def check_tasks(found: Any, tasks: tuple[str, ...]) -> None:
    """Refuse tasks that an environment does not have, before one is built.

    Raises:
        ValueError: names the task.
    """
    if not tasks:
        raise ValueError("tasks is empty; name at least one")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks names one twice: {' '.join(tasks)}")
    if check := getattr(found, "check_task", None):
        for task in tasks:
            check(task)
