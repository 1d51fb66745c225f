"""Appending: what stands at every moment, what is recognised, what is refused. No Ray."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_writer import CAMERA, episode, listing, noted, prepared, table, written

from pipelines import files, output, writer
from pipelines.dataset import open_dataset
from pipelines.sources import Refusal


def first_part():
    return [episode(0), episode(1, length=37, task="push")]


def second_part():
    return [episode(2, length=9, task="turn"), episode(3), Refusal(episode="4", reason="empty", detail="no")]


def base(root):
    return written(root, [first_part()], facts=listing(digest="first"))


def grown(root, *, digest="second"):
    return written(root, [second_part()], facts=listing(digest=digest), append=True)


def content(root):
    """What a reader sees, checked against itself."""
    dataset = open_dataset(str(root))
    assert dataset.stats["action"]["count"] == [dataset.num_frames]
    assert len(dataset.tasks) == dataset.info["total_tasks"]
    for number in range(len(dataset.files)):
        dataset.open_file(number).close()
    return dataset


def test_appending_gives_what_ingesting_all_at_once_gives(tmp_path):
    base(tmp_path / "grown")
    before = (tmp_path / "grown/data/chunk-000/file-000.parquet").read_bytes()
    report = grown(tmp_path / "grown")
    whole = written(tmp_path / "whole", [first_part(), second_part()], facts=listing(digest="all"))
    assert report["fingerprint"] == whole["fingerprint"]
    assert (report["episodes"], report["frames"], report["refused"]) == (4, 86, {"empty": 1})
    assert table(tmp_path / "grown") == table(tmp_path / "whole")
    for name in ("stats.json", "camera_histograms.json"):
        both = [(tmp_path / run / "meta" / name).read_bytes() for run in ("grown", "whole")]
        assert both[0] == both[1]
    assert noted(tmp_path / "grown") == noted(tmp_path / "whole")
    assert open_dataset(str(tmp_path / "grown")).tasks == ("lift", "push", "turn")
    assert (tmp_path / "grown/data/chunk-000/file-000.parquet").read_bytes() == before
    assert not (tmp_path / "grown/meta/_ingest").exists()


def test_the_report_keeps_where_the_episodes_came_from(tmp_path):
    base(tmp_path)
    grown(tmp_path)
    history = json.loads((tmp_path / "meta/ingest.json").read_text())["history"]
    assert [(entry["source"]["digest"], entry["episodes"]) for entry in history] == [
        ("first", 2),
        ("second", 2),
    ]
    assert history[1]["fingerprint"] == open_dataset(str(tmp_path)).fingerprint


def test_a_dataset_can_be_appended_to_again_and_again(tmp_path):
    base(tmp_path)
    parts = [first_part()]
    for number in range(3):
        part = [episode(10 + number, length=5 + number)]
        written(tmp_path, [part], facts=listing(digest=f"more {number}"), append=True)
        parts.append([episode(10 + number, length=5 + number)])
    whole = written(tmp_path.parent / f"{tmp_path.name} whole", parts)
    assert content(tmp_path).fingerprint == whole["fingerprint"]
    assert [row["index"] for row in table(tmp_path)] == list(range(57 + 5 + 6 + 7))


def test_a_source_that_is_in_already_is_recognised(tmp_path):
    base(tmp_path)
    report = grown(tmp_path)
    for digest in ("second", "first"):
        target = output.opened(str(tmp_path), listing(digest=digest), writer.WriterOptions(), append=True)
        assert target.report is not None
        assert target.report["fingerprint"] == report["fingerprint"]


def test_what_never_moved_is_said_of_all_frames_only(tmp_path):
    still = {"observation.state": np.ones((20, 2))}
    report = written(tmp_path, [[episode(0, columns=still)]], facts=listing(digest="still"))
    assert report["warned"] == {"zero_variance": 2}
    assert grown(tmp_path)["warned"] == {}


def with_feature(name, **change):
    facts = listing(digest="other")
    return replace(facts, features=facts.features | {name: facts.features.get(name, {}) | change})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (with_feature("action", shape=[4]), r"feature 'action' with shape \[3\] and not \[4\]"),
        (with_feature("action", dtype="float64"), "'action' with dtype float32 and not float64"),
        (with_feature("extra", dtype="int64", shape=[1], names=None), "has no feature 'extra'"),
        (replace(listing(digest="other"), fps=20), "has fps 10 and not 20"),
    ],
)
def test_a_source_with_other_features_is_refused_by_name(tmp_path, facts, message):
    base(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, facts=facts, append=True)


def test_only_a_complete_dataset_of_this_program_is_appended_to(tmp_path):
    with pytest.raises(ValueError, match="only a complete dataset"):
        prepared(tmp_path / "none", append=True)
    base(tmp_path / "foreign")
    (tmp_path / "foreign/meta/ingest.json").unlink()
    with pytest.raises(ValueError, match="did not write"):
        prepared(tmp_path / "foreign", append=True, facts=listing(digest="second"))
    base(tmp_path / "other")
    with pytest.raises(ValueError, match="image_format 'jpeg', this run has 'png'"):
        prepared(tmp_path / "other", append=True, facts=listing(digest="second"), image_format="png")


# --- killed ---


class KilledError(BaseException):
    """Ends a run as a signal does: nothing catches it."""


def killed_at(number, monkeypatch):
    """End the run when its `number`-th file would get its name; half of them are written by then."""
    written_so_far = 0
    real = files.atomic_stream

    def counted(filesystem, path):
        nonlocal written_so_far
        written_so_far += 1
        if written_so_far == number:
            raise KilledError(path)
        return real(filesystem, path)

    monkeypatch.setattr(files, "atomic_stream", counted)
    monkeypatch.setattr(writer, "atomic_stream", counted)


def test_a_kill_at_any_moment_leaves_the_old_dataset_or_the_new_one(tmp_path, monkeypatch):
    old = base(tmp_path / "base")["fingerprint"]
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    new = grown(tmp_path / "whole")["fingerprint"]
    seen, number, ended = [], 0, False
    while not ended:
        number += 1
        root = tmp_path / f"killed {number}"
        shutil.copytree(tmp_path / "base", root)
        ended = grown_until(number, root, monkeypatch)
        dataset = content(root)
        seen.append(dataset.fingerprint)
        assert (dataset.fingerprint, dataset.num_frames) in {(old, 57), (new, 86)}
        output.settle(str(root))
        facts, options = listing(digest="second"), writer.WriterOptions()
        if output.opened(str(root), facts, options, append=True).report is None:
            grown(root)
        assert content(root).fingerprint == new
        assert snapshot(root) == snapshot(tmp_path / "whole")
    assert number > 10  # an append writes more than ten files
    assert seen == sorted(seen, key=[old, new].index)  # the step happens once
    assert {old, new} == set(seen)


def grown_until(number, root, monkeypatch):
    """Append, killed at the `number`-th file; whether it came to its end."""
    with monkeypatch.context() as patched:
        killed_at(number, patched)
        try:
            grown(root)
        except KilledError:
            return False
    return True


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_append_that_was_given_up_does_not_spoil_the_next_one(tmp_path, monkeypatch):
    base(tmp_path / "spoiled")
    shutil.copytree(tmp_path / "spoiled", tmp_path / "clean")
    with monkeypatch.context() as patched:
        killed_at(7, patched)
        with pytest.raises(KilledError):
            grown(tmp_path / "spoiled", digest="given up")
    assert (tmp_path / "spoiled/data/chunk-000/file-001.parquet").exists()
    with pytest.raises(ValueError, match="unfinished append with digest 'given up', this run has 'second'"):
        grown(tmp_path / "spoiled")
    shutil.rmtree(tmp_path / "spoiled/meta/_ingest")  # what the message asks for
    part = [episode(7, length=29)]
    for run in ("spoiled", "clean"):
        written(tmp_path / run, [part], facts=listing(digest="second"), append=True)
        part = [episode(7, length=29)]
    assert snapshot(tmp_path / "spoiled") == snapshot(tmp_path / "clean")


def test_running_the_first_ingestion_again_leaves_an_append_under_way_alone(tmp_path):
    base(tmp_path)
    prepared(tmp_path, facts=listing(digest="second"), append=True)
    output.settle(str(tmp_path))
    assert output.opened(str(tmp_path), listing(digest="first"), writer.WriterOptions(), append=False).report
    assert (tmp_path / "meta/_ingest/plan.json").exists()


def test_the_episode_table_grows_by_a_file(tmp_path):
    base(tmp_path)
    grown(tmp_path)
    rows = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-001.parquet").to_pylist()
    assert [(row["episode_index"], row["data/file_index"], row["source_episode"]) for row in rows] == [
        (2, 1, "2"),
        (3, 1, "3"),
    ]
    assert [row["meta/episodes/file_index"] for row in rows] == [1, 1]
    assert np.shape(rows[0][f"stats/{CAMERA}/mean"]) == (3, 1, 1)
