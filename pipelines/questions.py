"""A robot's message, checked field by field -> what a policy is asked. Knows neither Ray nor torch.

H chunk, A action width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.images import decoded_image, encoded_kind
from smolvla.features import STATE
from smolvla.wire import RefusedError, array, of_base64, shown

TASK = "task"
OBSERVATION = "observation"
SEEDS = 2**63
FIELDS = (
    OBSERVATION,
    "seed",
    "n_action_steps",
    "session",
    "executed",
    "left_over",
    "inference_delay",
    "execution_horizon",
)
"""Of a request."""
SESSION_CHARS = 64
MOST_TASK_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a policy takes and gives, under its robot's names; what /metadata tells."""

    policy: str
    """Its name."""
    version: str
    """Of the registry, or the training step; empty where there is neither."""
    cameras: Mapping[str, tuple[int, int]]
    """Name -> (height, width) of the images that it was trained on; others are resized as those were."""
    state_width: int
    action_width: int
    chunk_size: int
    n_action_steps: int
    """Actions of a chunk that its configuration would execute."""
    fps: float | None = None
    """Actions a second."""
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """For clients."""
        return {
            "policy": self.policy,
            "version": self.version,
            "cameras": {name: [*size, 3] for name, size in self.cameras.items()},
            "state": {"width": self.state_width, "names": list(self.state_names)},
            "action": {"width": self.action_width, "names": list(self.action_names)},
            "chunk_size": self.chunk_size,
            "n_action_steps": self.n_action_steps,
            "fps": self.fps,
        }


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one robot asks the policy."""

    images: Mapping[str, NDArray[np.uint8]]
    """(height, width, 3) by camera."""
    state: NDArray[np.float32]
    task: str
    seed: int
    """Of the noise that the chunk begins as; it is the robot's alone, so no companion changes the answer."""
    left_over: NDArray[np.float32] | None = None
    """What the robot has not executed yet of its last chunk (steps, A), for real-time chunking."""
    left_over_is_normalised: bool = False
    inference_delay: int = 0
    execution_horizon: int | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Questions of one kind can share a forward pass: same cameras, same sizes, guided or not."""
        sizes = tuple(sorted((name, image.shape) for name, image in self.images.items()))
        return (*sizes, self.left_over is not None)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the policy says."""

    actions: NDArray[np.float32]
    """(H, A) in the dataset's units."""
    normalised: NDArray[np.float32]
    """The same as the model gave them: what a session keeps."""
    batch: int
    """Questions that were answered in the same forward pass."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A robot's message, checked; its session is still to be looked up."""

    question: Question
    n_action_steps: int
    """Actions that are sent."""
    session: str | None = None
    executed: int | None = None
    """Actions of the session's last chunk that were executed when the observation was made."""


def request_of(
    message: Mapping[str, Any], signature: Signature, *, max_pixels: int, drawn_seed: int
) -> Request:
    """Check a message.

    Args:
        message: as it came.
        signature: of the policy.
        max_pixels: of an image.
        drawn_seed: for a message that has none.

    Raises:
        RefusedError: names the first field that is wrong, and its value.
    """
    refuse_unknown(message, FIELDS, "a request has")
    images, state, task = observation_of(message.get(OBSERVATION), signature, max_pixels=max_pixels)
    seed = whole(message, "seed", most=SEEDS - 1)
    steps = whole(message, "n_action_steps", least=1, most=signature.chunk_size)
    executed = whole(message, "executed", most=signature.chunk_size)
    left_over = _left_over(message, signature)
    if executed is not None and left_over is not None:
        raise RefusedError(
            "executed says what the session has left over; it cannot stand beside", field="left_over"
        )
    delay = whole(message, "inference_delay", most=signature.chunk_size)
    horizon = whole(message, "execution_horizon", most=signature.chunk_size)
    for name, value in (("inference_delay", delay), ("execution_horizon", horizon)):
        if value is not None and executed is None and left_over is None:
            raise RefusedError(f"{value} needs executed or left_over beside it", field=name)
    return Request(
        question=Question(
            images=images,
            state=state,
            task=task,
            seed=drawn_seed if seed is None else seed,
            left_over=left_over,
            inference_delay=delay or 0,
            execution_horizon=horizon,
        ),
        n_action_steps=steps or signature.chunk_size,
        session=_session(message),
        executed=executed,
    )


def observation_of(
    given: Any, signature: Signature, *, max_pixels: int
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32], str]:
    """Images, state and instruction of an observation: all that the policy takes, and nothing else."""
    if not isinstance(given, dict):
        raise RefusedError(f"{shown(given)} is no mapping", field=OBSERVATION)
    names = (*signature.cameras, STATE, TASK)
    refuse_unknown(given, names, "the policy takes", prefix=f"{OBSERVATION}.")
    for name in names:
        if given.get(name) is None:
            raise RefusedError("it is missing", field=f"{OBSERVATION}.{name}")
    images = {
        name: image_of(given[name], field=f"{OBSERVATION}.{name}", max_pixels=max_pixels)
        for name in signature.cameras
    }
    task = given[TASK]
    if not isinstance(task, str) or not 0 < len(task) <= MOST_TASK_CHARS:
        raise RefusedError(
            f"{shown(task)} is no text of 1 to {MOST_TASK_CHARS} characters", field=f"{OBSERVATION}.{TASK}"
        )
    return images, vector_of(given[STATE], signature.state_width, field=f"{OBSERVATION}.{STATE}"), task


def image_of(value: Any, *, field: str, max_pixels: int) -> NDArray[np.uint8]:
    """An image (height, width, 3): a JPEG or PNG as bytes or base64, or an array of levels 0 to 255."""
    if isinstance(value, str):
        value = of_base64(value, field=field)
    if isinstance(value, bytes):
        return _decoded(value, field=field, max_pixels=max_pixels)
    levels = array(value, field=field)
    if levels.dtype != np.uint8:
        raise RefusedError(f"an array of {levels.dtype}; an image is uint8, JPEG or PNG", field=field)
    if levels.ndim != 3 or levels.shape[2] != 3 or levels.size == 0:
        raise RefusedError(f"an array of shape {levels.shape}, not (height, width, 3)", field=field)
    _refuse_large(levels.shape[:2], field=field, max_pixels=max_pixels)
    return levels


def _decoded(data: bytes, *, field: str, max_pixels: int) -> NDArray[np.uint8]:
    kind = encoded_kind(data)
    if kind is None:
        raise RefusedError(f"{len(data)} bytes that are neither JPEG nor PNG", field=field)
    _refuse_large(kind[1], field=field, max_pixels=max_pixels)
    pixels = decoded_image(data)
    if pixels is None:
        raise RefusedError(f"a {kind[0]} that is cut off or damaged", field=field)
    return np.asarray(pixels, dtype=np.uint8)


def _refuse_large(size: tuple[int, ...], *, field: str, max_pixels: int) -> None:
    if math.prod(size) > max_pixels:
        raise RefusedError(f"{size[1]} x {size[0]} pixels are more than {max_pixels}", field=field)


def vector_of(value: Any, width: int, *, field: str) -> NDArray[np.float32]:
    """Finite numbers (width,)."""
    return _finite(array(value, field=field), (width,), field=field)


def _left_over(message: Mapping[str, Any], signature: Signature) -> NDArray[np.float32] | None:
    value = message.get("left_over")
    if value is None:
        return None
    found = array(value, field="left_over")
    steps = len(found) if found.ndim else 0
    if not 1 <= steps <= signature.chunk_size:
        raise RefusedError(f"{steps} actions are not within 1..{signature.chunk_size}", field="left_over")
    return _finite(found, (steps, signature.action_width), field="left_over")


def _finite(found: NDArray[Any], shape: tuple[int, ...], *, field: str) -> NDArray[np.float32]:
    if found.shape != shape:
        raise RefusedError(f"an array of shape {found.shape}, not {shape}", field=field)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        numbers = found.astype(np.float32)
    if not np.isfinite(numbers).all():
        where = tuple(int(place) for place in np.argwhere(~np.isfinite(numbers))[0])
        raise RefusedError(f"{found[where]} at {list(where)} is no finite number", field=field)
    return numbers


def _session(message: Mapping[str, Any]) -> str | None:
    value = message.get("session")
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= SESSION_CHARS or not value.isprintable():
        raise RefusedError(f"{shown(value)} is no text of 1 to {SESSION_CHARS} characters", field="session")
    return value


def whole(message: Mapping[str, Any], name: str, *, least: int = 0, most: int) -> int | None:
    """A whole number of a message, or None where it has none.

    Raises:
        RefusedError: it is something else, or out of range.
    """
    value = message.get(name)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise RefusedError(f"{shown(value)} is no whole number within {least}..{most}", field=name)
    return value


def refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], what: str, *, prefix: str = "") -> None:
    """Refuse fields that nobody reads: a misspelt one would be left out in silence."""
    for name in found:
        if name not in known:
            raise RefusedError(
                f"there is no such field; {what} {list(known)}", field=f"{prefix}{name}"[: SESSION_CHARS * 2]
            )
