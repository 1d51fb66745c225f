"""Mapping files: what of a dataset with names of its own becomes state, action, cameras and instruction.

A YAML file, `--mapping m.yaml`; every field may be left out, and then the source's own rule holds:

    state:                                # parts, laid side by side in this order
      - state.joints                      # a LeRobot column, HDF5 dataset, Zarr array or RLDS feature
      - {key: state.gripper, start: 0, stop: 1}
    action: [action.joints, {key: action.base, stop: 2}]
    cameras: {top: observation.images.cam_high}   # camera of the policy: the source's key
    task: fold the towel                  # one instruction for all, or
    task_key: language_instruction        # where the instruction stands
    fps: 20                               # where the source does not say, or says wrong
    robot_type: franka

GR00T's `meta/modality.json` is read too: its state and action groups are slices of `observation.state` and
`action` (or of their `original_key`), its videos are cameras, its first annotation is the instruction.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CAMERA_PREFIX = "observation.images."
GR00T_GROUPS = ("state", "action", "video", "annotation")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Columns [start, stop) of one array of the source; a negative number counts from its end."""

    key: str
    start: int = 0
    stop: int | None = None
    """None: to the end."""

    def of(self, values: np.ndarray) -> np.ndarray:
        """(L, D) or (L,) -> (L, width).

        Raises:
            ValueError: the slice is empty, or goes beyond the array.
        """
        rows = values.reshape(len(values), -1)
        width = rows.shape[1]
        limits = slice(self.start, self.stop).indices(width)
        beyond = max(abs(self.start), abs(self.stop or 0)) > width
        if beyond or limits[0] >= limits[1]:
            raise ValueError(
                f"mapping: {self.key!r} [{self.start}:{'' if self.stop is None else self.stop}] does not lie "
                f"within its {width} numbers"
            )
        return rows[:, limits[0] : limits[1]]


@dataclass(frozen=True, kw_only=True)
class SourceMapping:
    """A mapping file, checked; None where the source's own rule holds."""

    state: tuple[Part, ...] | None = None
    action: tuple[Part, ...] | None = None
    cameras: Mapping[str, str] | None = None
    """`observation.images.<camera>` -> the source's key; only these cameras are taken."""
    task: str | None = None
    task_key: str | None = None
    fps: int | None = None
    robot_type: str | None = None

    @property
    def vectors(self) -> dict[str, tuple[Part, ...]]:
        """`observation.state` and `action`, whichever are mapped."""
        both = {"observation.state": self.state, "action": self.action}
        return {name: parts for name, parts in both.items() if parts is not None}

    def as_json(self) -> dict[str, Any]:
        """For a listing's identity: an output is not continued under another mapping."""
        return asdict(self)


def read_mapping(path: str) -> SourceMapping:
    """Read a mapping file, or GR00T's modality.json; an empty path is the mapping that changes nothing.

    Raises:
        ValueError: names the file, the field and the value.
    """
    if not path:
        return SourceMapping()
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"mapping {path}: cannot be read: {error.strerror}") from None
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"mapping {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"mapping {path}: need a mapping of fields, found {type(content).__name__}")
    try:
        return _of_modality(content) if path.endswith("modality.json") else _of_yaml(content)
    except ValueError as error:
        raise ValueError(f"mapping {path}: {error}") from None


def assembled(parts: Sequence[Part], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay the parts side by side: (L, D) float32; all arrays are (L, ...).

    Raises:
        ValueError: a slice goes beyond its array.
    """
    return np.concatenate([part.of(arrays[part.key]) for part in parts], axis=1, dtype=np.float32)


def _of_yaml(content: dict[str, Any]) -> SourceMapping:
    known = [field.name for field in fields(SourceMapping)]
    for name in content:
        if name not in known:
            raise unknown_name("field", name, known)
    values = {name: value for name, value in content.items() if value is not None}
    for name in ("state", "action"):
        if name in values:
            values[name] = _parts(name, values[name])
    if "cameras" in values:
        values["cameras"] = _cameras(values["cameras"])
    _check_scalars(values)
    return SourceMapping(**values)


def _check_scalars(values: dict[str, Any]) -> None:
    for name in ("task", "task_key", "robot_type"):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{name} {values[name]!r} is not a text")
    fps = values.get("fps", 1)
    if type(fps) is not int or fps < 1:
        raise ValueError(f"fps {fps!r} is not a positive whole number")
    if {"task", "task_key"} <= values.keys():
        raise ValueError("task and task_key are both given; take one")


def _parts(name: str, value: Any) -> tuple[Part, ...]:
    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list) or not items:
        raise ValueError(f"{name} {value!r} is neither a key nor a list of keys and slices")
    return tuple(_part(name, item) for item in items)


def _part(name: str, item: Any) -> Part:
    if isinstance(item, str):
        return Part(key=item)
    known = [field.name for field in fields(Part)]
    if not isinstance(item, dict) or not isinstance(item.get("key"), str):
        raise ValueError(f"{name}: {item!r} is neither a key nor {{key: ..., start: ..., stop: ...}}")
    for field, value in item.items():
        if field not in known:
            raise unknown_name(f"field of {name}:", field, known)
        if field != "key" and not (value is None or type(value) is int):
            raise ValueError(f"{name}: {field} of {item['key']!r} is {value!r}, not a whole number")
    return Part(key=item["key"], start=item.get("start") or 0, stop=item.get("stop"))


def _cameras(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value.values()):
        raise ValueError(f"cameras {value!r} is not a mapping of names to keys of the source")
    cameras = {CAMERA_PREFIX + str(name).removeprefix(CAMERA_PREFIX): key for name, key in value.items()}
    if len(cameras) < len(value):
        raise ValueError(f"cameras {list(value)} names a camera twice")
    return cameras


def _of_modality(content: dict[str, Any]) -> SourceMapping:
    for group, entries in content.items():
        if group not in GR00T_GROUPS:
            raise unknown_name("field", group, GR00T_GROUPS)
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise ValueError(f"{group} is not a mapping of names to settings")
    annotation = next(iter(content.get("annotation", {}).items()), None)
    return SourceMapping(
        state=_modality_parts(content, "state", whole="observation.state"),
        action=_modality_parts(content, "action", whole="action"),
        cameras=_cameras(
            {
                name: entry.get("original_key", CAMERA_PREFIX + name)
                for name, entry in content["video"].items()
            }
        )
        if "video" in content
        else None,
        task_key=annotation[1].get("original_key", f"annotation.{annotation[0]}") if annotation else None,
    )


def _modality_parts(content: dict[str, Any], group: str, *, whole: str) -> tuple[Part, ...] | None:
    if group not in content:
        return None
    items = [
        {"key": entry.get("original_key", whole), "start": entry.get("start"), "stop": entry.get("end")}
        for entry in content[group].values()
    ]
    return _parts(group, items)


def unknown_name(kind: str, name: str, known: Sequence[str]) -> ValueError:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return ValueError(f"unknown {kind} {name}" + (f"; did you mean {close[0]}?" if close else ""))
