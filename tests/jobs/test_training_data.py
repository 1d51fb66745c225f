"""The dataset flags: one dataset or a mixture, each mistake by name, and what the exported policy knows."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jobs import command_line, training_data
from jobs.train_smolvla import TrainJob
from jobs.training_data import DatasetOptions, entries
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy
from smolvla.processing import SmolVLAProcessor

TOP, WRIST, SIDE = (f"observation.images.{name}" for name in ("top", "wrist", "side"))
TINY = "configs/policy/tiny"


def mixture(*given, **options):
    return DatasetOptions(mixture=list(given), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DatasetOptions(), "dataset.path is missing"),
        (
            DatasetOptions(path="/a", mixture=[{"path": "/b"}]),
            "dataset.path '/a' and dataset.mixture are both given",
        ),
        (mixture({"path": "/a", "wieght": 2}), "field of dataset.mixture[0]: wieght; did you mean weight?"),
        (mixture({"path": "/a"}, {"name": "b"}), "dataset.mixture[1].path is missing"),
        (mixture({"path": 3}), "dataset.mixture[0].path 3 is not a text"),
        (
            mixture({"path": "/a", "weight": 1}, {"path": "/b", "weight": -2}),
            "dataset.mixture[1].weight -2 is",
        ),
        (mixture({"path": "/a", "weight": "3"}), "dataset.mixture[0].weight '3' is not a positive number"),
        (mixture({"path": "/a", "weight": float("nan")}), "dataset.mixture[0].weight nan"),
        (
            mixture({"path": "/a", "weight": 1}, {"path": "/b"}),
            "dataset.mixture[1].weight is missing, dataset.mixture[0].weight is 1",
        ),
        (
            mixture({"path": "/a/x"}, {"path": "/b/x"}),
            "dataset.mixture[1].name 'x' is also that of dataset.m",
        ),
        (mixture({"path": "/a", "name": "x/y"}), "dataset.mixture[0].name 'x/y'"),
        (mixture({"path": "/a", "rename": ["x"]}), "dataset.mixture[0].rename ['x'] is not a mapping"),
        (mixture({"path": "/aloha"}, export="alhoa"), "dataset.export 'alhoa'; did you mean 'aloha'?"),
    ],
)
def test_a_wrong_mixture_is_refused_with_the_entry_the_field_and_the_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        entries(options, rename={})


def test_the_rename_of_one_dataset_is_not_taken_for_a_mixtures():
    with pytest.raises(ValueError, match=r"rename {'a': 'b'} is of dataset.path; entries of dataset.mixture"):
        entries(mixture({"path": "/a"}), rename={"a": "b"})


def test_a_mixture_is_written_as_yaml_in_the_file_and_as_json_on_the_command_line(tmp_path):
    given = [{"path": "/a", "weight": 3, "rename": {TOP: WRIST}}, {"path": "/b", "weight": 1.5}]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"dataset": {"mixture": given}}))
    of_file = command_line.parsed(TrainJob, ["--config", str(tmp_path / "job.yaml")])
    of_words = command_line.parsed(TrainJob, ["--dataset.mixture", json.dumps(given)])
    assert of_file.dataset == of_words.dataset
    assert [(e.name, e.weight, e.rename) for e in entries(of_file.dataset, rename={})] == [
        ("a", 3, {TOP: WRIST}),
        ("b", 1.5, {}),
    ]


@pytest.fixture(scope="module")
def two(episodes, other_episodes):
    return [{"path": str(episodes), "name": "a"}, {"path": str(other_episodes), "name": "b"}]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"top": SIDE}, r"dataset.mixture\[1\].rename: 'top' is no camera of the dataset, it has \['obs"),
        ({TOP: SIDE}, r"dataset.mixture\[1\].rename: several columns become \['observation.images.side'\]"),
    ],
)
def test_a_wrong_camera_map_is_refused_with_its_entry(two, rename, message):
    data = training_data.opened(mixture(two[0], two[1] | {"rename": rename}), rename={})
    with pytest.raises(ValueError, match=message):
        training_data.fitted(SmolVLAConfig.from_pretrained(TINY), data, policy_path=TINY)


def test_a_dataset_that_is_not_there_is_refused_with_its_entry(two):
    with pytest.raises(ValueError, match=r"dataset.mixture\[1\].path '/nowhere' does not exist"):
        training_data.opened(mixture(two[0], {"path": "/nowhere"}), rename={})


@pytest.mark.parametrize(("damage", "state"), [(Path.unlink, "missing"), (Path.write_bytes, "empty")])
def test_a_data_file_that_was_not_copied_is_named_before_anything_starts(two, tmp_path, damage, state):
    copy = tmp_path / "copy"
    shutil.copytree(two[1]["path"], copy)
    file = next((copy / "data").rglob("*.parquet"))
    damage(file, *([b""] if damage is Path.write_bytes else []))
    with pytest.raises(ValueError, match=f"{file}: the episode table names this file and it is {state}"):
        training_data.opened(mixture(two[0], {"path": str(copy)}), rename={})


def test_state_and_action_widths_that_differ_are_refused_with_both_datasets(two, tmp_path):
    other = tmp_path / "wider"
    shutil.copytree(two[1]["path"], other)
    info = json.loads((other / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = [7]
    (other / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"toy episodes and .*wider: 'action' has \[4\] and \[7\] numbers"):
        training_data.opened(mixture(two[0], two[1] | {"path": str(other)}), rename={})


def test_an_exported_policy_acts_for_any_dataset_of_its_mixture(two, tmp_path):
    """Its own processor is of the dataset that `export` names; the others' are beside it."""
    rename = {SIDE: WRIST}
    data = training_data.opened(mixture(two[0], two[1] | {"rename": rename}, export="b"), rename={})
    config = training_data.fitted(SmolVLAConfig.from_pretrained(TINY), data, policy_path=TINY)
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True)
    policy.processor = training_data.processor(data, config)
    policy.save_pretrained(tmp_path / "start")
    # as a run does it: read from start/, written with every checkpoint
    again = SmolVLAPolicy.from_pretrained(tmp_path / "start")
    again.processor = SmolVLAProcessor.from_pretrained(tmp_path / "start", again.config)
    folder = tmp_path / "checkpoint"
    again.save_pretrained(folder)

    processors = {name: SmolVLAProcessor.from_pretrained(folder, robot=name) for name in ("a", "b", None)}
    for name, dataset in zip(("a", "b"), data.datasets, strict=True):
        found = processors[name].stats["observation.state"]["mean"]
        np.testing.assert_allclose(found, dataset.stats["observation.state"]["mean"], rtol=1e-6)
    assert processors["a"].files.rename == {}
    assert processors[None].files.rename == processors["b"].files.rename == rename
    np.testing.assert_array_equal(
        processors[None].stats["action"]["std"], processors["b"].stats["action"]["std"]
    )
    with pytest.raises(ValueError, match=r"no statistics of robot 'c'; there are \['a', 'b'\]"):
        SmolVLAProcessor.from_pretrained(folder, robot="c")
    # another program that knows nothing of this gets the other robot's policy by copying two files over
    for file in (folder / "processors/a").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert SmolVLAProcessor.from_pretrained(folder).files.rename == {}
    assert (
        Path(folder / "processors/a/policy_preprocessor.json").read_text()
        == (folder / "policy_preprocessor.json").read_text()
    )
