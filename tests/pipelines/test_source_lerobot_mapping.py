"""LeRobot datasets with names of their own: a mapping file or GR00T's modality.json explains them. No Ray."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_toy import (
    CAMERA,
    FPS,
    TASKS,
    change_features,
    change_info,
    edit,
    frames_of,
    read,
    v21_rows,
    write_json,
    write_v21,
)

from jobs.ingest_lerobot import IngestLeRobot, main
from pipelines.sources.lerobot import LeRobotSource
from pipelines.sources.mapping import read_mapping

LENGTHS = {0: 12, 1: 15}
ANNOTATION = "annotation.human.action.task_description"
NUMBER = {"dtype": "int64", "shape": [1], "names": None}
JOINTS = {"dtype": "float32", "shape": [3], "names": ["shoulder", "elbow", "wrist"]}
MAPPING = """
state: [state.joints, state.gripper]
action: {key: action.joints, start: 1}
cameras: {top: video.ego}
"""


def renamed(table, number):
    """Under other names, with a gripper, a reward, and instructions as an index and as a text."""
    length = len(table)
    own = {"observation.state": "state.joints", "action": "action.joints"}
    table = table.rename_columns([own.get(name, name) for name in table.column_names])
    extra = {
        "state.gripper": pa.array([i % 2 == 0 for i in range(length)]),
        "next.reward": pa.array(np.arange(length, dtype=np.float64)),
        ANNOTATION: pa.array([1 - number] * length),
        "instruction": pa.array([f"say {number}"] * length),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    return table


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = write_v21(tmp_path_factory.mktemp("odd"), LENGTHS)
    camera = json.loads((root / "meta/info.json").read_text())["features"][CAMERA]
    change_features(root, observation__state=..., action=..., **{CAMERA: ..., "video.ego": camera})
    change_features(root, state__joints=JOINTS, action__joints=JOINTS, next__reward=NUMBER)
    change_features(
        root, state__gripper=NUMBER | {"dtype": "bool"}, next__reward=NUMBER | {"dtype": "float64"}
    )
    change_features(
        root, instruction=NUMBER | {"dtype": "string"}, **{ANNOTATION: NUMBER, "video.back": camera}
    )
    for number in LENGTHS:
        edit(v21_rows(root, number), lambda t, number=number: renamed(t, number))
    (root / f"clips/{CAMERA}").rename(root / "clips/video.ego")
    return root


@pytest.fixture
def copy(odd, tmp_path):
    return Path(shutil.copytree(odd, tmp_path / "copy"))


@pytest.fixture
def mapping_of(tmp_path):
    def mapping(text, name="m.yaml"):
        (tmp_path / name).write_text(text)
        return read_mapping(str(tmp_path / name))

    return mapping


def columns_of(root, number):
    return {name: np.array(v) for name, v in pq.read_table(v21_rows(root, number)).to_pydict().items()}


def test_state_action_and_cameras_are_assembled_as_the_mapping_says(odd, mapping_of):
    source = LeRobotSource(uri=str(odd), mapping=mapping_of(MAPPING))
    listing = source.listing()
    assert list(listing.features) == [
        "next.reward",
        "instruction",
        ANNOTATION,
        "observation.images.top",
        "observation.state",
        "action",
    ]
    assert listing.features["observation.state"] == {
        "dtype": "float32",
        "shape": [4],
        "names": ["shoulder", "elbow", "wrist", "state.gripper"],
    }
    assert listing.features["action"] == {"dtype": "float32", "shape": [2], "names": ["elbow", "wrist"]}
    assert listing.features["observation.images.top"]["dtype"] == "image"
    assert listing.warnings == (
        "camera 'video.back' is left out: the mapping does not name it",
        "column 'action.joints': the mapping takes 2 of its 3 numbers",
    )
    episodes, refusals = read(odd, mapping=source.mapping)
    assert refusals == []
    for number, length in LENGTHS.items():
        episode, frames = episodes[str(number)]
        own = columns_of(odd, number)
        state = np.column_stack([own["state.joints"], own["state.gripper"]]).astype(np.float32)
        np.testing.assert_array_equal(episode.columns["observation.state"], state)
        np.testing.assert_array_equal(
            episode.columns["action"], own["action.joints"][:, 1:].astype(np.float32)
        )
        np.testing.assert_array_equal(episode.columns["next.reward"], own["next.reward"])
        assert episode.columns.keys() == listing.features.keys() - {"observation.images.top"}
        assert episode.tasks == [TASKS[number]] * length
        assert np.abs(frames["observation.images.top"].astype(int) - frames_of(number, length)).max() <= 4


def test_gr00ts_modality_is_a_mapping(copy, mapping_of):
    modality = {
        "state": {
            "arm": {"start": 0, "end": 3, "original_key": "state.joints"},
            "hand": {"start": 0, "end": 1, "original_key": "state.gripper"},
        },
        "action": {"arm": {"start": 0, "end": 3, "original_key": "action.joints"}},
        "video": {"ego_view": {"original_key": "video.ego"}},
        "annotation": {"human.action.task_description": {}},
    }
    # as GR00T's own examples, without frame_index
    change_features(copy, frame_index=...)
    for number in LENGTHS:
        edit(v21_rows(copy, number), lambda t: t.drop_columns(["frame_index"]))
    mapping = mapping_of(json.dumps(modality), "modality.json")
    listing = LeRobotSource(uri=str(copy), mapping=mapping).listing()
    assert listing.tasks == tuple(TASKS)
    assert ANNOTATION not in listing.features  # it has become the instruction
    episodes, refusals = read(copy, mapping=mapping)
    assert refusals == []
    for number in LENGTHS:
        episode, frames = episodes[str(number)]
        assert set(episode.tasks) == {TASKS[1 - number]}  # not what task_index says
        assert list(frames) == ["observation.images.ego_view"]
        assert episode.columns["action"].shape == (LENGTHS[number], 3)


@pytest.mark.parametrize(
    ("line", "tasks", "found"),
    [
        ("task: fold the towel", ("fold the towel",), "fold the towel"),
        ("task_key: instruction", (), "say 1"),
        (f"task_key: {ANNOTATION}", tuple(TASKS), TASKS[0]),
        ("task_key: task_index", tuple(TASKS), TASKS[1]),
    ],
)
def test_the_instruction_is_given_or_stands_in_a_column(odd, mapping_of, line, tasks, found):
    mapping = mapping_of(MAPPING + line)
    listing = LeRobotSource(uri=str(odd), mapping=mapping).listing()
    assert listing.tasks == tasks
    assert read(odd, mapping=mapping)[0]["1"][0].tasks == [found] * 15
    assert ("instruction" in listing.features) == ("instruction" not in line)


def test_a_given_instruction_needs_no_task_table(copy, mapping_of):
    (copy / "meta/tasks.jsonl").unlink()
    for number in LENGTHS:
        edit(v21_rows(copy, number), lambda t: t.drop_columns(["task_index"]))
    episodes, refusals = read(copy, mapping=mapping_of(MAPPING + "task: fold"))
    assert (list(episodes), refusals) == (["0", "1"], [])


def test_an_index_without_an_instruction_is_refused_in_every_column(copy, mapping_of):
    edit(v21_rows(copy, 1), lambda t: t.set_column(t.column_names.index(ANNOTATION), ANNOTATION, [[7] * 15]))
    refusals = read(copy, mapping=mapping_of(MAPPING + f"task_key: {ANNOTATION}"))[1]
    assert [(r.episode, r.reason, r.frame) for r in refusals] == [("1", "task_unknown", 0)]


def test_fps_and_robot_come_from_the_mapping_where_the_dataset_is_silent_or_wrong(copy, mapping_of):
    change_info(copy, fps=..., robot_type=...)
    listing = LeRobotSource(
        uri=str(copy), mapping=mapping_of(MAPPING + f"fps: {FPS}\nrobot_type: franka")
    ).listing()
    assert (listing.fps, listing.robot_type) == (FPS, "franka")
    refusals = read(copy, mapping=mapping_of(MAPPING + "fps: 20"))[1]
    assert {(r.episode, r.reason) for r in refusals} == {
        ("0", "timestamp_off_fps"),
        ("1", "timestamp_off_fps"),
    }


def test_dimensions_of_one_name_are_told_apart_by_their_columns(odd, mapping_of):
    mapping = mapping_of(
        "state: [state.joints, action.joints]\naction: next.reward\ncameras: {top: video.ego}"
    )
    features = LeRobotSource(uri=str(odd), mapping=mapping).listing().features
    assert features["observation.state"]["names"][::3] == ["state.joints.shoulder", "action.joints.shoulder"]
    assert features["action"] == {"dtype": "float32", "shape": [1], "names": ["next.reward"]}


def test_columns_without_names_are_named_by_their_place(copy, mapping_of):
    change_features(copy, state__joints=JOINTS | {"names": None})
    change_features(copy, action__joints=JOINTS | {"names": {"motors": ["a", "b", "c"]}})
    features = LeRobotSource(uri=str(copy), mapping=mapping_of(MAPPING)).listing().features
    assert features["observation.state"]["names"][1:] == [
        "state.joints[1]",
        "state.joints[2]",
        "state.gripper",
    ]
    assert features["action"]["names"] == ["b", "c"]


def test_an_action_may_be_made_of_a_state_that_stays(tmp_path, mapping_of):
    root = write_v21(tmp_path / "v21", LENGTHS)
    mapping = mapping_of("action: {key: observation.state, stop: 2}")
    listing = LeRobotSource(uri=str(root), mapping=mapping).listing()
    assert (listing.features["observation.state"]["shape"], listing.features["action"]["shape"]) == ([3], [2])
    episode, _ = read(root, mapping=mapping)[0]["0"]
    np.testing.assert_array_equal(episode.columns["action"], episode.columns["observation.state"][:, :2])


def test_without_a_mapping_the_columns_are_listed(copy):
    with pytest.raises(ValueError, match=re.escape("nothing for observation.state")) as error:
        LeRobotSource(uri=str(copy)).listing()
    message = str(error.value)
    assert message.startswith(f"{copy}/meta/info.json: ")
    for expected in ("--mapping", "state.joints (3)", "state.gripper (1)", "action.joints (3)"):
        assert expected in message
    assert "modality" not in message


def test_a_modality_file_in_the_dataset_is_pointed_at_but_not_used(copy):
    write_json(copy / "meta/modality.json", {})
    with pytest.raises(ValueError, match=re.escape(f"--mapping {copy}/meta/modality.json")):
        LeRobotSource(uri=str(copy)).listing()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "state: state.joint\naction: action.joints",
            "mapping: no key 'state.joint'; did you mean 'state.joints'?",
        ),
        ("state: {key: state.joints, stop: 9}\naction: action.joints", "does not lie within its 3 numbers"),
        ("state: instruction\naction: action.joints", "'instruction' cannot be used: dtype 'string'"),
        (MAPPING.replace("video.ego", "video.eg"), "no key 'video.eg'; did you mean 'video.ego'?"),
        (MAPPING.replace("video.ego", "next.reward"), "no key 'next.reward'"),
        (MAPPING.replace("video.ego", "video.back"), "none of the 2 files of camera 'video.back' exists"),
        (MAPPING + "task_key: instructions", "no key 'instructions'; did you mean 'instruction'?"),
        (
            MAPPING + "task_key: next.reward",
            "task_key 'next.reward' is float64 of shape [1], neither a text nor",
        ),
        (MAPPING + "task_key: state.joints", "task_key 'state.joints' is float32 of shape [3]"),
    ],
)
def test_a_mapping_that_does_not_fit_the_dataset_is_one_clear_error(odd, mapping_of, text, message):
    mapping = mapping_of(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LeRobotSource(uri=str(odd), mapping=mapping).listing()
    assert str(odd) in str(error.value)


def test_an_output_is_not_continued_under_another_mapping(odd, mapping_of):
    identities = [
        LeRobotSource(uri=str(odd), mapping=mapping_of(MAPPING + line)).listing().identity
        for line in ("task: fold", "task: fold", "task: unfold")
    ]
    assert identities[0] == identities[1] != identities[2]
    json.dumps(identities)


def test_a_mapping_the_job_cannot_read_ends_with_one_line(odd, tmp_path, capsys):
    (tmp_path / "m.yaml").write_text("sate: [a]")
    job = IngestLeRobot(source=str(odd), output=str(tmp_path / "out"), mapping=str(tmp_path / "m.yaml"))
    with pytest.raises(SystemExit) as error:
        main(job)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "m.yaml: unknown field sate; did you mean state?" in line
