"""Mapping files: read, refused, and applied to arrays."""

import json
import re

import numpy as np
import pytest

from pipelines.sources.mapping import Part, SourceMapping, assembled, read_mapping

MAPPING = """
state: [joints, {key: gripper, start: 0, stop: 1}]
action: {key: command, stop: -1}
cameras: {top: rgb/high, observation.images.wrist: rgb/wrist}
task: fold the towel
fps: 20
"""


def written(tmp_path, text, name="m.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_mapping_file_is_read_as_it_says(tmp_path):
    assert read_mapping(written(tmp_path, MAPPING)) == SourceMapping(
        state=(Part(key="joints"), Part(key="gripper", start=0, stop=1)),
        action=(Part(key="command", stop=-1),),
        cameras={"observation.images.top": "rgb/high", "observation.images.wrist": "rgb/wrist"},
        task="fold the towel",
        fps=20,
    )


def test_no_path_changes_nothing():
    assert read_mapping("") == SourceMapping()
    assert read_mapping("").vectors == {}


def test_gr00ts_modality_becomes_slices_cameras_and_the_instruction(tmp_path):
    modality = {
        "state": {"arm": {"start": 0, "end": 6}, "hand": {"start": 6, "end": 8, "original_key": "hands"}},
        "action": {"arm": {"start": 1, "end": 7}},
        "video": {"ego": {"original_key": "observation.images.ego_view"}, "wrist": {}},
        "annotation": {"human.action.task_description": {}},
    }
    assert read_mapping(written(tmp_path, json.dumps(modality), "modality.json")) == SourceMapping(
        state=(Part(key="observation.state", start=0, stop=6), Part(key="hands", start=6, stop=8)),
        action=(Part(key="action", start=1, stop=7),),
        cameras={
            "observation.images.ego": "observation.images.ego_view",
            "observation.images.wrist": "observation.images.wrist",
        },
        task_key="annotation.human.action.task_description",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sate: [a]", "unknown field sate; did you mean state?"),
        ("state: 3", "state 3 is neither a key nor a list"),
        ("state: []", "state [] is neither a key nor a list"),
        ("action: [{key: a, stopp: 3}]", "unknown field of action: stopp; did you mean stop?"),
        ("action: [{key: a, stop: 1.5}]", "stop of 'a' is 1.5, not a whole number"),
        ("cameras: [a]", "cameras ['a'] is not a mapping"),
        ("cameras: {top: a, observation.images.top: b}", "names a camera twice"),
        ("fps: 0", "fps 0 is not a positive whole number"),
        ("fps: true", "fps True is not a positive whole number"),
        ("task: 3", "task 3 is not a text"),
        ("task: a\ntask_key: b", "task and task_key are both given"),
        ("- a", "need a mapping of fields, found list"),
        ("state: [", "m.yaml"),
    ],
)
def test_a_mistake_is_refused_with_file_field_and_value(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(path)) as caught:
        read_mapping(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_mapping(str(tmp_path / "nowhere.yaml"))


def test_parts_are_laid_side_by_side_as_float32():
    arrays = {"joints": np.arange(12.0).reshape(3, 4), "gripper": np.array([7, 8, 9])}
    parts = [Part(key="gripper"), Part(key="joints", start=1, stop=3), Part(key="joints", start=-1)]
    found = assembled(parts, arrays)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[7, 1, 2, 3], [8, 5, 6, 7], [9, 9, 10, 11]])


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (4, None), (2, 2), (-5, None), (3, 1)])
def test_a_slice_beyond_its_array_is_refused(start, stop):
    with pytest.raises(ValueError, match="does not lie within its 4 numbers"):
        Part(key="joints", start=start, stop=stop).of(np.zeros((3, 4)))
