"""HDF5 demonstrations as a source: ALOHA/ACT, robomimic, LIBERO and Isaac Lab, others by a mapping file.

ALOHA writes one episode a file, the others a group `data/demo_N` for each. What is read is chosen once, from
the first episode that is whole, and told to the user (`choices`); every other episode must agree with it.
Where the files do not say the frame rate or the instruction, the user must: neither is guessed.

`hdf5_files` opens what strangers wrote, `hdf5_episode` reads one episode.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import h5py
import pyarrow.fs as pafs

from pipelines.sources import Episode, Listing, Refusal, Unit
from pipelines.sources.hdf5_episode import (
    Camera,
    Plan,
    begins_as_image,
    check_agreement,
    columns_of,
    compressed_lengths,
    content_of,
    is_encoded,
    is_raw,
)
from pipelines.sources.hdf5_files import (
    H5_ERRORS,
    MAX_FRAMES,
    Flaw,
    FlawError,
    OpenFile,
    attribute,
    dataset_at,
    datasets_below,
    flaw,
    found,
    found_quietly,
    group_at,
    json_attribute,
    names_in,
    number_of,
    text_at,
    text_of,
)
from pipelines.sources.mapping import CAMERA_PREFIX, Part, SourceMapping
from pipelines.sources.storage import Folder, StorageError, folder_of

SUFFIXES = (".hdf5", ".h5")
RATE_NAMES = ("fps", "control_freq", "control_hz")
INSTRUCTION_NAMES = ("language_instruction", "language_raw", "instruction", "task_description", "lang")
INSTRUCTION_JSON = ("ep_meta", "problem_info", "env_args")
"""Attributes of RoboCasa, LIBERO, and robomimic and Isaac Lab."""
MAX_NAME_BYTES = 1024
"""A demo's name in a filter key."""
MAX_RATE_HZ = 1000
"""Above it, a file's word about its frame rate is not believed."""
SHOWN_TASKS = 10


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a family of files keeps what."""

    about: str
    demos: bool
    """Episodes are the groups in `data`; else the file is one."""
    action: str
    observations: tuple[str, ...]
    """Groups that hold the observations."""
    states: tuple[tuple[str, ...], ...]
    """Keys in the observations that make the state: the first set of which all exist."""
    cameras: str = ""
    """Group in the observations where everything is a camera; empty: where images lie among numbers."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Kept besides the usual state and action where they exist; named as in LeRobot's ALOHA datasets."""
    robot_type: str | None = None


def _demos(about: str, *states: tuple[str, ...]) -> Layout:
    return Layout(
        about=f"{about}: the groups in data are episodes",
        demos=True,
        action="actions",
        observations=("obs/policy", "obs"),
        states=states,
    )


def _arm(robot: str) -> tuple[str, ...]:
    return (f"{robot}_eef_pos", f"{robot}_eef_quat", f"{robot}_gripper_qpos")


LAYOUTS = {
    "aloha": Layout(
        about="ALOHA or ACT: a file is an episode",
        demos=False,
        action="action",
        observations=("observations",),
        states=(("qpos",),),
        cameras="images",
        columns={"observation.velocity": "observations/qvel", "observation.effort": "observations/effort"},
        robot_type="aloha",
    ),
    "robomimic": _demos("robomimic", (*_arm("robot0"), *_arm("robot1")), _arm("robot0")),
    "libero": _demos("LIBERO", ("ee_states", "gripper_states"), ("ee_pos", "ee_ori", "gripper_states")),
    "isaaclab": _demos("Isaac Lab", ("eef_pos", "eef_quat", "gripper_pos")),
}


@dataclass(frozen=True, kw_only=True)
class Hdf5Source:
    """An HDF5 file, or a folder of them, locally or in an object store."""

    uri: str
    layout: str | None = None
    """A name of `LAYOUTS`; None: told from the files."""
    mapping: SourceMapping = field(default_factory=SourceMapping)
    fps: int | None = None
    """Goes over the mapping's, and that over the files'."""
    task: str | None = None
    """One instruction for all, may be empty; goes over the mapping's, and that over the files'."""
    filter_key: str | None = None
    """Only the demos that `mask/<filter_key>` lists."""
    channel_order: str = "rgb"
    """bgr: stored pixels are in OpenCV's order."""
    follow_links: bool = False
    """Whether files may be links out of the folder."""

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is none of {', '.join(LAYOUTS)}")
        if self.fps is not None and self.fps < 1:
            raise ValueError(f"fps {self.fps} is not positive")
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order {self.channel_order!r} is neither 'rgb' nor 'bgr'")
        keys = [part.key for parts in self.mapping.vectors.values() for part in parts]
        for key in [*keys, *(self.mapping.cameras or {}).values()]:
            if key.startswith("/"):
                raise ValueError(f"mapping: {key!r} begins with '/'; keys are paths within an episode")

    @property
    def given_fps(self) -> int | None:
        return self.fps or self.mapping.fps

    @property
    def given_task(self) -> str | None:
        return self.mapping.task if self.task is None else self.task

    def listing(self) -> Listing:
        facts = self.facts
        return Listing(
            fps=facts.fps,
            robot_type=self.mapping.robot_type or LAYOUTS[facts.layout].robot_type,
            features=facts.plan.features,
            tasks=facts.tasks,
            units=facts.units,
            identity={
                "format": "hdf5",
                "layout": facts.layout,
                "fps": facts.fps,
                "task": self.given_task,
                "filter_key": self.filter_key,
                "channel_order": self.channel_order,
                "mapping": self.mapping.as_json(),
                "digest": facts.digest,
            },
            location=self.uri,
            warnings=facts.warnings,
        )

    def choices(self) -> list[str]:
        """Say in lines what was found and what is taken, for a person to check."""
        facts, plan = self.facts, self.facts.plan
        lines = [f"layout: {facts.layout} ({LAYOUTS[facts.layout].about}), {len(facts.units)} episodes"]
        for name, parts in plan.vectors.items():
            lines.append(
                f"{name}: {' + '.join(map(_part_text, parts))}, width {plan.features[name]['shape'][0]}"
            )
        for name, key in plan.cameras.items():
            height, width, _ = plan.features[name]["shape"]
            lines.append(f"{name}: {key}, {height}x{width}")
        lines += [f"fps: {facts.fps}", *(f"task: {task!r}" for task in facts.tasks[:SHOWN_TASKS])]
        return lines + [f"and {len(facts.tasks) - SHOWN_TASKS} more tasks"] * (len(facts.tasks) > SHOWN_TASKS)

    @cached_property
    def facts(self) -> "Facts":
        """Read once, in the driver; workers receive it with the source."""
        try:
            return _facts(self)
        except StorageError as error:
            raise ValueError(str(error)) from None

    def episodes(self, units: Sequence[Unit]) -> Iterator[Episode | Refusal]:
        with OpenFile(self.facts.folder) as file:
            for unit in units:
                if isinstance(unit.detail, Refusal):
                    yield unit.detail
                    continue
                demo: Demonstration = unit.detail
                try:
                    yield self._episode(file.at(demo.file), demo)
                except FlawError as error:
                    yield from (one.refusal(demo.name) for one in error.flaws)

    def _episode(self, file: h5py.File, demo: "Demonstration") -> Episode:
        plan, layout = self.facts.plan, LAYOUTS[self.facts.layout]
        group = group_at(file, demo.group)
        content = content_of(group, vectors=plan.vectors, cameras=plan.cameras)
        check_agreement(content, plan)
        _check_nothing_more(group, plan, self.mapping, layout)
        compressed = None if layout.demos else compressed_lengths(file, content.length)
        cameras = {
            name: Camera(
                name=name,
                episode=demo.name,
                dataset=dataset,
                shape=tuple(plan.features[name]["shape"]),
                bgr=self.channel_order == "bgr",
                compressed=compressed,
            )
            for name, dataset in content.images.items()
        }
        as_files = [name for name, camera in cameras.items() if camera.is_encoded and not camera.bgr]
        return Episode(
            name=demo.name,
            tasks=[demo.task or ""] * content.length,
            columns=columns_of(content, plan),
            cameras={name: camera.frames() for name, camera in cameras.items() if name not in as_files},
            encoded_cameras={name: cameras[name].files() for name in as_files},
        )


# --- what the driver knows ---


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Where an episode lies."""

    name: str
    file: str
    """Relative to the source."""
    group: str
    """Path in the file."""
    length: int
    """Rows of its action as the file claims; 0 where there is none."""
    task: str | None


Entry = Demonstration | Refusal
"""An episode that can be read, or why it cannot."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that is known before a frame is read."""

    folder: Folder
    layout: str
    plan: Plan
    fps: int
    tasks: tuple[str, ...]
    units: tuple[Unit, ...]
    digest: str
    warnings: tuple[str, ...]


def _facts(source: Hdf5Source) -> Facts:
    folder, sizes, warnings = _files(source)
    with OpenFile(folder) as file:
        layout = source.layout or _detected(file, sizes, uri=source.uri)
        if source.filter_key is not None and not LAYOUTS[layout].demos:
            raise ValueError(f"filter_key {source.filter_key!r}: files of layout {layout} have none")
        surveys = [_survey(file, name, source, LAYOUTS[layout]) for name in sizes]
        _check_not_empty(surveys, source)
        fps = source.given_fps or _told_rate(surveys, uri=source.uri)
        entries = _entries(surveys, source, fps=fps)
        plan, left_out = _first_plan(file, entries, source, LAYOUTS[layout])
    demos = [entry for entry in entries if isinstance(entry, Demonstration)]
    warnings += _summarised(warning for survey in surveys for warning in survey.warnings)
    warnings += _rate_warnings(surveys, fps)
    if left_out:
        warnings.append(f"left out, --mapping could take them: {', '.join(left_out)}")
    if not plan.cameras:
        warnings.append("these files have no camera")
    told = [[demo.name, demo.group, demo.length, demo.task] for demo in demos]
    listed = json.dumps([list(sizes.items()), told, plan.features], sort_keys=True)
    return Facts(
        folder=folder,
        layout=layout,
        plan=plan,
        fps=fps,
        tasks=tuple(dict.fromkeys(demo.task or "" for demo in demos)),
        units=tuple(_unit(entry) for entry in entries),
        digest=hashlib.sha256(listed.encode()).hexdigest(),
        warnings=tuple(warnings),
    )


def _unit(entry: Entry) -> Unit:
    if isinstance(entry, Refusal):
        return Unit(name=entry.episode, num_episodes=1, num_frames=0, detail=entry)
    return Unit(name=entry.name, num_episodes=1, num_frames=min(entry.length, MAX_FRAMES), detail=entry)


def natural_order(name: str) -> list[str | int]:
    """Sort key with numbers as numbers: demo_9 before demo_10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split("([0-9]+)", name)]


def _files(source: Hdf5Source) -> tuple[Folder, dict[str, int | None], list[str]]:
    """Return the folder, the size of every file by its name, in order, and warnings."""
    folder = folder_of(source.uri, follow_links=source.follow_links)
    try:
        kind = folder.filesystem.get_file_info(folder.root).type
    except OSError as error:
        raise StorageError(f"{source.uri}: {error}") from None
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"{source.uri} does not exist")
    if kind == pafs.FileType.File:
        parent, _, name = folder.root.rpartition("/")
        folder = replace(folder, root=parent, boundary=folder.boundary and parent)
        return folder, folder.sizes([name]), []
    names = [name for suffix in SUFFIXES for name in folder.names_below("", suffix=suffix)]
    # such as the ._ files that macOS leaves beside every file on foreign disks
    hidden = [name for name in names if any(step.startswith(".") for step in name.split("/"))]
    shown = sorted(set(names) - set(hidden), key=natural_order)
    if not shown:
        raise ValueError(f"{source.uri}: no {' or '.join(SUFFIXES)} file in it")
    warnings = [f"{len(hidden)} hidden files are left out, such as {hidden[0]}"] if hidden else []
    return folder, folder.sizes(shown), warnings


# --- the layout ---


def _detected(file: OpenFile, names: Iterable[str], *, uri: str) -> str:
    """Return the layout of the first file that shows one."""
    first, empty = "", False
    for name in names:
        try:
            root = file.at(name)
            layout = _layout_of(root)
            empty = empty or isinstance(found(root, "data"), h5py.Group)
            first = first or f"{name} has {', '.join(names_in(root)[:10]) or 'nothing'}"
        except FlawError as error:
            first = first or error.flaws[0].detail
            continue
        if layout is not None:
            return layout
    if empty:
        return "robomimic"  # of no demos; that will be said
    raise ValueError(
        f"{uri}: no file looks like {', '.join(LAYOUTS)}; {first}. --layout aloha takes a file as an "
        f"episode, --layout robomimic the groups in data, and --mapping says what of it"
    )


def _layout_of(root: h5py.File) -> str | None:
    data = found(root, "data")
    if not isinstance(data, h5py.Group):
        return "aloha" if {"action", "observations"} <= set(names_in(root)) else None
    demos = (found_quietly(data, name) for name in sorted(names_in(data), key=natural_order))
    demo = next((demo for demo in demos if isinstance(demo, h5py.Group)), None)
    if demo is None:
        return None
    for name, layout in LAYOUTS.items():
        if layout.demos and _state_keys(demo, layout):
            return name
    if "initial_state" in names_in(demo):
        return "isaaclab"
    return "libero" if attribute(data, "problem_info") is not None else "robomimic"


def _state_keys(episode: h5py.Group, layout: Layout) -> tuple[str, ...]:
    """Return the keys of the layout's usual state; none if the episode lacks one of them."""
    for group, keys in itertools.product(layout.observations, layout.states):
        whole = tuple(f"{group}/{key}" for key in keys)
        if all(isinstance(found_quietly(episode, key), h5py.Dataset) for key in whole):
            return whole
    return ()


# --- one file ---


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one file says of itself."""

    file: str
    entries: tuple[Entry, ...]
    rate_hz: float | None = None
    masks: tuple[str, ...] = ()
    """Its filter keys."""
    warnings: tuple[str, ...] = ()
    readable: bool = True


def _survey(file: OpenFile, name: str, source: Hdf5Source, layout: Layout) -> Survey:
    try:
        root = file.at(name)
        if layout.demos:
            return _demo_survey(root, name, source, layout)
        demo = _demonstration(root, "/", name, source, layout)
        return Survey(file=name, entries=(demo,), rate_hz=_rate_of(root, root))
    except FlawError as error:
        refusals = tuple(one.refusal(name) for one in error.flaws)
        return Survey(file=name, entries=refusals, readable=False)


def _demo_survey(root: h5py.File, name: str, source: Hdf5Source, layout: Layout) -> Survey:
    data, mask = found(root, "data"), found(root, "mask")
    if not isinstance(data, h5py.Group):
        raise flaw("wrong_layout", f"{name} has no group 'data'")
    masks = tuple(names_in(mask)) if isinstance(mask, h5py.Group) else ()
    demos = [demo for demo in names_in(data) if not isinstance(found_quietly(data, demo), h5py.Dataset)]
    wanted = demos
    if source.filter_key is not None:
        wanted = _masked(root, source.filter_key) if source.filter_key in masks else []
    entries: list[Entry] = []
    for demo in sorted(wanted, key=natural_order):
        try:
            if demo not in demos:
                raise flaw("demo_missing", f"mask/{source.filter_key} lists it, data does not have it")
            entries.append(_demonstration(root, f"data/{demo}", name, source, layout))
        except FlawError as error:
            entries += [one.refusal(f"{name}/{demo}") for one in error.flaws]
    warnings = []
    if source.filter_key is not None and source.filter_key not in masks:
        warnings.append(f"{name}: has no mask/{source.filter_key}, so nothing of it is taken")
    if not demos:
        warnings.append(f"{name}: no demos in it")
    rows = sum(entry.length for entry in entries if isinstance(entry, Demonstration))
    warnings += [f"{name}: {text}" for text in _doubts(data, rows if wanted is demos else None)]
    return Survey(
        file=name,
        entries=tuple(entries),
        rate_hz=_rate_of(root, data),
        masks=masks,
        warnings=tuple(warnings),
    )


def _doubts(data: h5py.Group, rows: int | None) -> Iterator[str]:
    if text_of(attribute(data, "macros_image_convention")) == "opengl":
        yield "images are stored upside down (macros_image_convention opengl) and kept so"
    total = number_of(attribute(data, "total"))
    if rows is not None and total is not None and rows != total:
        yield f"attribute total is {total:g}, the demos have {rows} rows"


def _masked(root: h5py.File, key: str) -> list[str]:
    """Return the demos of a filter key."""
    mask = dataset_at(root, f"mask/{key}")
    is_text = mask.dtype.kind == "S" or h5py.check_string_dtype(mask.dtype) is not None
    if mask.ndim != 1 or not is_text or mask.dtype.itemsize > MAX_NAME_BYTES:
        raise flaw("wrong_dtype", f"mask/{key}: {mask.dtype} {mask.shape} is no list of names")
    try:
        names = [text_of(name) for name in mask[:]]
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"mask/{key}: {error}") from None
    return list(dict.fromkeys(name for name in names if name))


def _demonstration(
    root: h5py.File, group: str, file: str, source: Hdf5Source, layout: Layout
) -> Demonstration:
    episode = group_at(root, group)
    key = source.mapping.action[0].key if source.mapping.action else layout.action
    action = found_quietly(episode, key)
    return Demonstration(
        name=f"{file}/{group.removeprefix('data/')}" if layout.demos else file,
        file=file,
        group=group,
        length=action.shape[0] if isinstance(action, h5py.Dataset) and action.shape else 0,
        task=_instruction(source, [episode, group_at(root, "data"), root] if layout.demos else [root]),
    )


def _instruction(source: Hdf5Source, nodes: Sequence[h5py.Group]) -> str | None:
    """Return what the user said, else what the file says: of the episode, of its demos, of all."""
    if source.given_task is not None:
        return source.given_task
    key = source.mapping.task_key
    texts = (_said(node, key) if key else _usually_said(node) for node in nodes)
    return next(filter(None, texts), None)


def _said(node: h5py.Group, key: str) -> str | None:
    """Return the text of an attribute or of a dataset."""
    return text_of(attribute(node, key)) or text_at(node, key)


def _usually_said(node: h5py.Group) -> str | None:
    plain = (_said(node, name) for name in INSTRUCTION_NAMES)
    settings = (json_attribute(node, name) for name in INSTRUCTION_JSON)
    inside = (text_of(group.get(name)) for group in settings for name in INSTRUCTION_NAMES)
    return next(filter(None, itertools.chain(plain, inside)), None)


def _rate_of(root: h5py.File, data: h5py.Group) -> float | None:
    """Return the frame rate that a file tells, in Hz."""
    values: list[Any] = []
    for node in (data, root):
        values += [attribute(node, name) for name in RATE_NAMES]
        for name in ("env_args", "env_info"):
            settings = json_attribute(node, name)
            inner = settings.get("env_kwargs")
            groups = [inner, settings] if isinstance(inner, dict) else [settings]
            values += [group.get(name) for group in groups for name in RATE_NAMES]
            values.append(_isaac_rate(settings.get("sim_args")))
    return next((rate for rate in map(number_of, values) if rate is not None and rate > 0), None)


def _isaac_rate(settings: Any) -> float | None:
    """Isaac Lab notes the physics step in s, and how many of them an action lasts."""
    if not isinstance(settings, dict):
        return None
    step_s, decimation = number_of(settings.get("dt")), number_of(settings.get("decimation"))
    action_s = (step_s or 0) * (decimation or 0)
    return 1 / action_s if action_s > 0 else None


# --- all files together ---


def _check_not_empty(surveys: Sequence[Survey], source: Hdf5Source) -> None:
    entries = [entry for survey in surveys for entry in survey.entries]
    first = next((entry for entry in entries if isinstance(entry, Refusal)), None)
    if first is not None and not any(survey.readable for survey in surveys):
        raise ValueError(f"{source.uri}: none of {len(surveys)} files can be read; {first.detail}")
    masks = sorted({mask for survey in surveys for mask in survey.masks})
    if source.filter_key is not None and source.filter_key not in masks:
        close = difflib.get_close_matches(source.filter_key, masks, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"they have {', '.join(masks) or 'none'}"
        raise ValueError(
            f"{source.uri}: filter_key {source.filter_key!r} is in none of {len(surveys)} files; {hint}"
        )
    if not entries:
        raise ValueError(f"{source.uri}: no demos in any of {len(surveys)} files")


def _told_rate(surveys: Sequence[Survey], *, uri: str) -> int:
    """Return the frame rate of the first file that tells one."""
    for survey in surveys:
        if survey.rate_hz is None:
            continue
        fps = round(survey.rate_hz)
        if not 1 <= fps <= MAX_RATE_HZ or not _equal(survey.rate_hz, fps):
            raise ValueError(f"{uri}: {survey.file} says {survey.rate_hz:g} Hz; give a whole --fps")
        return fps
    raise ValueError(
        f"{uri}: the files do not say their frame rate; give it, such as --fps 50 for ALOHA or --fps 20 for "
        f"robosuite"
    )


def _equal(rate_hz: float, fps: int) -> bool:
    return math.isclose(rate_hz, fps, rel_tol=1e-6)  # 1 / (0.01 * 5) is not quite 20


def _rate_warnings(surveys: Sequence[Survey], fps: int) -> list[str]:
    others = [survey for survey in surveys if survey.rate_hz is not None and not _equal(survey.rate_hz, fps)]
    if not others:
        return []
    return [f"{others[0].file}: says {others[0].rate_hz:g} Hz, fps is {fps}; so in {len(others)} files"]


def _entries(surveys: Sequence[Survey], source: Hdf5Source, *, fps: int) -> list[Entry]:
    """Return all episodes in order; those of another rate or without an instruction are refused."""
    entries: list[Entry] = []
    for survey in surveys:
        says = "no rate" if survey.rate_hz is None else f"{survey.rate_hz:g} Hz"
        agrees = survey.rate_hz is not None and _equal(survey.rate_hz, fps)
        for entry in survey.entries:
            if isinstance(entry, Refusal):
                entries.append(entry)
            elif not agrees and source.given_fps is None:
                detail = f"{survey.file} says {says}, others {fps} Hz; --fps sets it for all"
                entries.append(Refusal(episode=entry.name, reason="wrong_fps", detail=detail))
            elif entry.task is None:
                detail = f"{survey.file} has no instruction for it; --task gives one to all"
                entries.append(Refusal(episode=entry.name, reason="task_missing", detail=detail))
            else:
                entries.append(entry)
    reasons = {entry.reason for entry in entries if isinstance(entry, Refusal)}
    if "task_missing" in reasons and not any(isinstance(entry, Demonstration) for entry in entries):
        key = source.mapping.task_key
        where = f"under task_key {key!r}" if key else "in the files"
        raise ValueError(
            f"{source.uri}: no instruction {where}, and the policy reads one; give it with --task 'fold the "
            f"towel', or say --task '' to go without"
        )
    return entries


def _summarised(warnings: Iterable[str]) -> list[str]:
    """Say once what is the same for many files."""
    files: dict[str, list[str]] = {}
    for warning in warnings:
        file, _, text = warning.partition(": ")
        files.setdefault(text, []).append(file)
    return [
        f"{names[0]}: {text}" + (f"; so in {len(names)} files" if len(names) > 1 else "")
        for text, names in files.items()
    ]


# --- what is taken ---


def _first_plan(
    file: OpenFile, entries: Sequence[Entry], source: Hdf5Source, layout: Layout
) -> tuple[Plan, list[str]]:
    """Return what is taken of every episode, and what is not, by the first one that is whole."""
    first = ""
    for entry in entries:
        if isinstance(entry, Refusal):
            first = first or f"{entry.episode}: {entry.detail}"
            continue
        try:
            return _plan(group_at(file.at(entry.file), entry.group), source.mapping, layout)
        except FlawError as error:
            first = first or f"{entry.name}: {error.flaws[0].reason}: {error.flaws[0].detail}"
    raise ValueError(f"{source.uri}: none of {len(entries)} episodes can be used; {first}")


def _plan(episode: h5py.Group, mapping: SourceMapping, layout: Layout) -> tuple[Plan, list[str]]:
    for group in layout.observations:
        found(episode, group)  # a link out of the file is refused here, where it would be overlooked below
    datasets = datasets_below(episode)
    vectors = {
        "observation.state": mapping.state or _usual_state(episode, layout, datasets),
        "action": mapping.action or (Part(key=layout.action),),
    }
    vectors |= {name: (Part(key=key),) for name, key in _usual_columns(mapping, layout, datasets).items()}
    cameras = _usual_cameras(layout, datasets) if mapping.cameras is None else dict(mapping.cameras)
    content = content_of(episode, vectors=vectors, cameras=cameras, known=list(datasets))
    taken = {part.key for parts in vectors.values() for part in parts} | {*cameras.values(), "compress_len"}
    left_out = [
        _described(key, dataset)
        for key, dataset in datasets.items()
        if key not in taken and not key.startswith("next_obs/")
    ]
    return Plan(vectors=vectors, cameras=cameras, features=content.features), left_out


def _check_nothing_more(episode: h5py.Group, plan: Plan, mapping: SourceMapping, layout: Layout) -> None:
    """Refuse an episode with cameras or columns that the first one lacks: they would be lost in silence."""
    datasets = datasets_below(episode)
    cameras = _usual_cameras(layout, datasets) if mapping.cameras is None else {}
    kinds = {
        "camera_surplus": cameras.keys() - plan.cameras.keys(),
        "column_surplus": _usual_columns(mapping, layout, datasets).keys() - plan.vectors.keys(),
    }
    flaws = [
        Flaw(reason=reason, detail=f"{name} is not in the first episode; --mapping can leave it out")
        for reason, names in kinds.items()
        for name in sorted(names)
    ]
    if flaws:
        raise FlawError(*flaws)


def _part_text(part: Part) -> str:
    whole = part.start == 0 and part.stop is None
    return part.key if whole else f"{part.key}[{part.start}:{'' if part.stop is None else part.stop}]"


def _described(key: str, dataset: h5py.Dataset) -> str:
    return f"{key} {dataset.dtype}{list(dataset.shape or ())[1:] or ''}"


def _usual_state(
    episode: h5py.Group, layout: Layout, datasets: Mapping[str, h5py.Dataset]
) -> tuple[Part, ...]:
    keys = _state_keys(episode, layout)
    if keys:
        return tuple(Part(key=key) for key in keys)
    known = [
        _described(key, dataset)
        for key, dataset in datasets.items()
        if dataset.dtype.kind == "f" and not key.startswith("next_obs/")
    ]
    wanted = " or ".join(" + ".join(state) for state in layout.states)
    raise flaw(
        "column_missing",
        f"no state: {layout.observations[-1]} has no {wanted}; a file for --mapping can take it from "
        f"{', '.join(known) or 'no numbers at all'}",
    )


def _usual_columns(
    mapping: SourceMapping, layout: Layout, datasets: Mapping[str, h5py.Dataset]
) -> dict[str, str]:
    """Return what is kept besides state and action; a mapping of these says all that is wanted."""
    return {} if mapping.vectors else {name: key for name, key in layout.columns.items() if key in datasets}


def _usual_cameras(layout: Layout, datasets: Mapping[str, h5py.Dataset]) -> dict[str, str]:
    """Take whatever holds images, named by its path in the observations, without _image or _rgb."""
    cameras: dict[str, str] = {}
    for key, dataset in datasets.items():
        folders = [f"{group}/{layout.cameras}".strip("/") + "/" for group in layout.observations]
        folder = next((folder for folder in folders if key.startswith(folder)), None)
        if folder is None or not _holds_images(dataset, among_numbers=not layout.cameras):
            continue
        name = CAMERA_PREFIX + re.sub("_(image|rgb)$", "", key.removeprefix(folder).replace("/", "_"))
        if name in cameras:
            raise flaw(
                "camera_duplicated", f"{cameras[name]} and {key} would both be {name}; --mapping names them"
            )
        cameras[name] = key
    return cameras


def _holds_images(dataset: h5py.Dataset, *, among_numbers: bool) -> bool:
    if not is_encoded(dataset) or dataset.ndim == 1:
        return is_raw(dataset) or is_encoded(dataset)
    return not among_numbers or begins_as_image(dataset)  # rows of bytes could be numbers, too
