"""An environment whose episodes end as their seed says, with the cameras and widths of the toy episodes."""

import os
import sys
import time
from typing import ClassVar

import numpy as np

GOAL_STEPS = 13


class ToyEnvironment:
    """Solved at a step that the seed draws, or never; its pictures and state say what was done so far."""

    GROUPS: ClassVar = {"wave": "easy", "open": "hard"}
    FPS = 10

    def __init__(self, task, *, size_px, cameras):
        self.instruction, self.max_steps = f"{task} it", 20
        self._size_px, self._done, self._goal = size_px, [], 0
        self._cameras = cameras

    @staticmethod
    def check_task(task):
        if task not in ToyEnvironment.GROUPS:
            raise ValueError(f"tasks: {task!r} is no toy")

    def reset(self, seed):
        self._done, self._goal = [], seed % GOAL_STEPS + 12
        return self.observe()

    def step(self, action):
        self._done.append(action)
        return len(self._done) == self._goal

    def observe(self):
        state = np.zeros(3, dtype=np.float32)
        if self._done:
            state += np.tanh(np.mean(self._done, axis=0)[:3])
        return {name: self.render() for name in self._cameras} | {"observation.state": state}

    def render(self):
        return np.full((self._size_px, self._size_px, 3), 10 * len(self._done), dtype=np.uint8)

    def close(self):
        pass


class TroubledEnvironment(ToyEnvironment):
    """Its task `open` goes as the variable TOY_TROUBLE says: `crash`, `hang`, or well."""

    PROCESS_VARIABLES: ClassVar = {"TOY_TROUBLE": os.environ.get("TOY_TROUBLE", "")}

    def step(self, action):
        trouble = os.environ["TOY_TROUBLE"] if self.instruction == "open it" else ""
        if trouble == "crash":
            raise RuntimeError("the world fell apart")
        if trouble == "hang":
            sys.stderr.write(f"process {os.getpid()} hangs\n")
            time.sleep(3600)
        return super().step(action)
