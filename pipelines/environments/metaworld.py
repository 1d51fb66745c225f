"""Meta-World's 50 tasks in MuJoCo, seen by one or more of its cameras.

The camera corner2, its flip, state and sentences follow lerobot's Meta-World environment; shadows and
reflections are off, which makes software rendering ten times faster and the pictures a little different.

MuJoCo chooses its renderer when it is imported, and importing torch after it has crashed: this module imports
neither; the simulator is loaded where a `Simulation` is built, in a process with `PROCESS_VARIABLES` set.
"""

import ctypes
import ctypes.util
import difflib
import importlib.util
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.environments import Observation
from pipelines.sources.mapping import CAMERA_PREFIX

PROCESS_VARIABLES = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}
CAMERAS = ("corner2", "behindGripper", "gripperPOV", "topview", "corner", "corner3", "corner4")
"""Meta-World's; corner2 is lerobot's, behindGripper and gripperPOV move with the hand."""
CORNER2_POSITION = (0.75, 0.075, 0.7)
"""lerobot moves corner2 closer than Meta-World has it."""
FPS = 80
"""MuJoCo steps of 2.5 ms, 5 to an action."""

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

MEDIUM = (
    "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep "
    "sweep-into"
)
HARD = "assembly hand-insert pick-out-of-hole pick-place push push-back"
VERY_HARD = "shelf-place disassemble stick-pull stick-push pick-place-wall"
GROUPS = dict.fromkeys(SENTENCES, "easy") | {
    f"{name}-v3": group
    for group, names in (("medium", MEDIUM), ("hard", HARD), ("very hard", VERY_HARD))
    for name in names.split()
}
"""Task -> difficulty, as in SmolVLA's paper (after Seo et al., Masked World Models, 2022)."""


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


class Simulation:
    """One task's simulator and cameras.

    Building one takes half a second, so it is kept for many episodes; an episode in a used one is bit for bit
    that of a new one (tried for all 50 tasks).
    """

    def __init__(self, task: str, *, size_px: int) -> None:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self.task = task
        self._place = mujoco.mj_kinematics  # pyright: ignore[reportAttributeAccessIssue]
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
        self._renderer = mujoco.Renderer(model, height=size_px, width=size_px)
        flags = mujoco.mjtRndFlag  # pyright: ignore[reportAttributeAccessIssue]
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Begin the episode of a seed; Meta-World's observation, whose first four numbers are the state."""
        self.env.seed(seed)
        observation = self.env.reset()[0]
        # Meta-World (3.1) moves goal and objects last: the first picture would show those of another world
        self._place(self.env.model, self.env.data)
        return observation

    def picture(self, camera: str) -> NDArray[np.uint8]:
        """What one of `CAMERAS` sees, (size, size, 3) RGB."""
        self._renderer.update_scene(self.env.data, camera=camera)
        picture = self._renderer.render()
        # corner2 hangs upside down; lerobot turns its pictures by 180 degrees, too, and no others
        return np.ascontiguousarray(picture[::-1, ::-1] if camera == "corner2" else picture)

    def close(self) -> None:
        """Free the renderer and the simulator."""
        self._renderer.close()
        self.env.close()


class MetaWorldEnvironment:
    """A task of Meta-World as a policy meets it: the goal is only seen, never told as numbers."""

    PROCESS_VARIABLES: ClassVar = PROCESS_VARIABLES
    GROUPS: ClassVar = GROUPS
    CAMERAS: ClassVar = tuple(CAMERA_PREFIX + camera for camera in CAMERAS)

    def __init__(self, task: str, *, size_px: int, cameras: tuple[str, ...]) -> None:
        require_simulator()
        self._simulation = Simulation(task, size_px=size_px)
        self._cameras = cameras
        self.instruction = SENTENCES[task]
        self.max_steps: int = self._simulation.env.max_path_length
        self._state = np.zeros(4, dtype=np.float32)

    @staticmethod
    def check_task(task: str) -> None:
        """Refuse a name that Meta-World does not have.

        Raises:
            ValueError: names it, and the nearest.
        """
        require_simulator()
        if task not in SENTENCES:
            raise ValueError(
                f"tasks: {task!r} is none of Meta-World's {len(SENTENCES)}: {nearest_task(task)}"
            )

    def reset(self, seed: int) -> Observation:
        """Goal and objects of a seed."""
        self._state = self._simulation.reset(seed)[:4].astype(np.float32)
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Move the hand by (dx, dy, dz) and close the gripper, each within [-1, 1]."""
        found, _, _, _, info = self._simulation.env.step(np.clip(action, -1, 1).astype(np.float32))
        self._state = found[:4].astype(np.float32)
        return bool(info["success"])

    def observe(self) -> Observation:
        """The cameras' pictures, the hand's place and the gripper."""
        pictures = {
            name: self._simulation.picture(name.removeprefix(CAMERA_PREFIX)) for name in self._cameras
        }
        return pictures | {"observation.state": self._state}

    def render(self) -> NDArray[np.uint8]:
        """What corner2 sees: all of the scene."""
        return self._simulation.picture("corner2")

    def close(self) -> None:
        """Free the simulator."""
        self._simulation.close()


def nearest_task(task: str) -> str:
    """A task that was meant, perhaps."""
    close = difflib.get_close_matches(task, SENTENCES, n=1)
    return f"did you mean {close[0]}?" if close else f"for example {', '.join(list(SENTENCES)[:3])}"
