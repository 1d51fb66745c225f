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


def test_a_value_of_another_kind_ends_the_job_with_one_line_though_a_file_has_a_good_one(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text("count: 3\n")
    with pytest.raises(SystemExit) as caught:
        parsed(Job, ["--config", str(path), "--count", "many"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "`count`: Couldn't parse 'many' into an int" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "s3://AKIA:hush@bucket/data?region=us-east-1"],
        ["--maybe", "http://me:hush@mlflow:5000"],
        ["--tasks", "s3://bucket/a", "s3://bucket/b?secret_key=hush"],
        ["--rename", '{"a": "gs://hush@bucket"}'],
        ["--group.text", "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hush"],
    ],
)
def test_an_address_with_credentials_is_refused_without_repeating_them(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(Job, words)
    assert caught.value.code == 2
    said = "".join(capsys.readouterr())
    assert words[0].removeprefix("--") in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "hush" not in said


def test_the_environments_tracking_server_is_looked_at_too(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@mlflow:5000")
    with pytest.raises(SystemExit):
        parsed(Job, [])
    said = "".join(capsys.readouterr())
    assert "MLFLOW_TRACKING_URI http://...mlflow:5000" in said
    assert "hush" not in said


def test_addresses_without_credentials_are_taken():
    uri = "s3://bucket/data?scheme=http&endpoint_override=10.0.0.1:9000&region=us-east-1"
    assert parsed(Job, ["--task", uri, "--rename", '{"a@b": "c"}']).task == uri
