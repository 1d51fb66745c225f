"""Flags of a job: texts as they were written, lists, a YAML file under them."""

import json
from dataclasses import dataclass, field

import pytest

from jobs.command_line import parsed


@dataclass(frozen=True, kw_only=True)
class Group:
    text: str = ""
    number: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    task: str = ""
    maybe: str | None = None
    tasks: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    count: int = 1
    group: Group = field(default_factory=Group)


@pytest.mark.parametrize(
    "text", ["fold: the towel", "yes", "null", "a # b", "[1, 2]", '{"a": 1}', "5", "", '"quoted"', "ünï"]
)
def test_a_text_is_taken_as_it_was_written(text):
    assert parsed(Job, ["--task", text]).task == text
    assert parsed(Job, [f"--task={text}", "--count", "2"]) == Job(task=text, count=2)
    assert parsed(Job, ["--maybe", text, "--group.text", text]) == Job(maybe=text, group=Group(text=text))


def test_lists_mappings_and_numbers_keep_their_forms(tmp_path):
    words = ["--tasks", "a b", "yes", "--rename", json.dumps({"a": "b"}), "--group.number", "1e-4"]
    assert parsed(Job, words) == Job(tasks=["a b", "yes"], rename={"a": "b"}, group=Group(number=1e-4))


def test_flags_go_over_the_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("task: from the file\ncount: 3\ngroup: {text: x, number: 2}\n")
    assert parsed(Job, ["--config", str(path), "--task", "over it"]) == Job(
        task="over it", count=3, group=Group(text="x", number=2.0)
    )


def test_a_flag_nobody_has_ends_the_job_with_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(Job, ["--tsk", "x"])
    assert caught.value.code == 2
    assert "unknown flag --tsk; did you mean --task?" in capsys.readouterr().err
