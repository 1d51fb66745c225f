"""Merging and appending from flags to a sealed dataset, on Ray, with the real commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_toy import CAMERA, edit, replaced, write_json, write_v30

from jobs.append_episodes import AppendEpisodes
from jobs.append_episodes import main as append_episodes
from jobs.merge_datasets import MergeDatasets
from jobs.merge_datasets import main as merge_datasets
from pipelines.dataset import open_dataset
from pipelines.ingestion import ingest
from pipelines.sources import Episode
from pipelines.sources.episodes import EpisodeDatasetSource
from pipelines.sources.lerobot import LeRobotSource
from pipelines.writer import WriterOptions

ROOT = Path(__file__).parents[2]
LENGTHS = {0: 12, 1: 15, 4: 9}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An image dataset of LeRobot's own writer: row groups that cut through episodes, PNG."""
    root = write_v30(tmp_path_factory.mktemp("foreign") / "bench", LENGTHS, images=True)
    info = json.loads((root / "meta/info.json").read_text()) | {"total_frames": sum(LENGTHS.values())}
    write_json(root / "meta/info.json", info)
    write_json(root / "meta/stats.json", {})
    ends = np.cumsum(list(LENGTHS.values()))
    bounds = {"dataset_from_index": ends - list(LENGTHS.values()), "dataset_to_index": ends}
    for name, values in bounds.items():
        edit(
            root / "meta/episodes/chunk-000/file-000.parquet",
            lambda t, name=name, values=values: t.append_column(name, [values]),
        )
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_v30(tmp_path_factory.mktemp("videos"), {7: 20, 8: 33})


def ingested(source, folder, **options):
    return ingest(
        source,
        str(folder),
        options=WriterOptions(**options),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )


def run_job(ray_session, name, *flags):
    cluster = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    command = [sys.executable, str(ROOT / f"jobs/{name}.py"), *flags]
    return subprocess.run(
        command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300, check=False
    )


def rows_of(root):
    paths = sorted(Path(root).glob("data/*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def images_of(root):
    return [row[CAMERA]["bytes"] for row in rows_of(root)]


def test_the_source_hands_over_the_episodes_of_a_foreign_dataset_whatever_its_row_groups(foreign):
    source = EpisodeDatasetSource(uris=(str(foreign),))
    listing = source.listing()
    assert [unit.name for unit in listing.units] == ["bench/0", "bench/1", "bench/4"]
    stored = rows_of(foreign)
    start = 0
    for episode, length in zip(source.episodes(listing.units), LENGTHS.values(), strict=True):
        assert isinstance(episode, Episode)
        rows = stored[start : start + length]
        assert list(episode.encoded_cameras[CAMERA]) == [row[CAMERA]["bytes"] for row in rows]
        assert episode.columns["action"].tolist() == [row["action"] for row in rows]
        start += length


def test_a_row_that_contradicts_the_episode_table_refuses_its_episode(foreign, tmp_path):
    broken = Path(shutil.copytree(foreign, tmp_path / "broken"))
    numbers = [*range(12), *range(14), 99, *range(9)]
    edit(broken / "data/chunk-000/file-000.parquet", lambda t: replaced(t, "frame_index", numbers))
    source = EpisodeDatasetSource(uris=(str(broken),))
    found = list(source.episodes(source.listing().units))
    refusal = found[1]
    assert [isinstance(item, Episode) for item in found] == [True, False, True]
    assert not isinstance(refusal, Episode)
    assert (refusal.reason, refusal.frame) == ("frame_index", 14)


def test_merging_copies_images_bit_for_bit_and_numbers_anew(ray_session, foreign, videos, tmp_path):
    ours = tmp_path / "kitchen"
    ingested(LeRobotSource(uri=str(videos)), ours)
    job = run_job(
        ray_session, "merge_datasets", "--sources", str(ours), str(foreign), "--output", str(tmp_path / "all")
    )
    assert job.returncode == 0, job.stderr
    report = json.loads(job.stdout.splitlines()[-1])
    assert (report["episodes"], report["frames"], report["refused"]) == (5, 89, {})
    assert images_of(tmp_path / "all") == images_of(ours) + images_of(foreign)
    rows = rows_of(tmp_path / "all")
    assert [row["index"] for row in rows] == list(range(89))
    assert [row["episode_index"] for row in rows] == [0] * 20 + [1] * 33 + [2] * 12 + [3] * 15 + [4] * 9
    dataset = open_dataset(str(tmp_path / "all"))
    tasks = [dataset.tasks[row["task_index"]] for row in rows]
    expected = [
        open_dataset(str(root)).tasks[row["task_index"]] for root in (ours, foreign) for row in rows_of(root)
    ]
    assert tasks == expected
    table = pq.read_table(tmp_path / "all/meta/episodes/chunk-000/file-000.parquet")
    assert table["source_episode"].to_pylist() == ["kitchen/7", "kitchen/8", "bench/0", "bench/1", "bench/4"]


def test_merging_ours_gives_the_content_of_an_ingestion_of_all(ray_session, videos, tmp_path):
    whole = ingested(LeRobotSource(uri=str(videos)), tmp_path / "whole")
    twice = merged(tmp_path / "twice", tmp_path / "whole", tmp_path / "whole")
    again = merged(tmp_path / "again", tmp_path / "twice")
    assert again["fingerprint"] == twice["fingerprint"] != whole["fingerprint"]
    once = merged(tmp_path / "once", tmp_path / "whole")
    assert once["fingerprint"] == whole["fingerprint"]
    names = pq.read_table(tmp_path / "twice/meta/episodes/chunk-000/file-000.parquet")["source_episode"]
    assert names.to_pylist() == ["whole/7", "whole/8", "whole-2/7", "whole-2/8"]


def merged(target, *sources):
    source = EpisodeDatasetSource(uris=tuple(str(uri) for uri in sources))
    return ingested(source, target, image_format="as_is")


def test_datasets_that_differ_are_refused_in_one_line(foreign, tmp_path, capsys):
    other = Path(shutil.copytree(foreign, tmp_path / "other"))
    info = json.loads((other / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["p", "q", "r"]
    (other / "meta/info.json").write_text(json.dumps(info))
    job = MergeDatasets(sources=(str(foreign), str(other)), output=str(tmp_path / "out"))
    with pytest.raises(SystemExit) as error:
        merge_datasets(job)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "feature 'action' with names ['a', 'b', 'c'] and not ['p', 'q', 'r']" in line
    assert not (tmp_path / "out").exists()


def test_appending_is_done_once_and_equals_an_ingestion_of_both(ray_session, foreign, videos, tmp_path):
    parts = tmp_path / "first", tmp_path / "second"
    for root, source in zip(parts, (videos, foreign), strict=True):
        ingested(LeRobotSource(uri=str(source)), root)
    both = merged(tmp_path / "both", *parts)
    flags = ["--source", str(parts[1]), "--output", str(parts[0])]
    reports = []
    for _ in range(2):
        job = run_job(ray_session, "append_episodes", *flags)
        assert job.returncode == 0, job.stderr
        reports.append(json.loads(job.stdout.splitlines()[-1]))
    assert [report["already_complete"] for report in reports] == [False, True]
    assert {report["fingerprint"] for report in reports} == {both["fingerprint"]}
    assert open_dataset(str(parts[0])).fingerprint == both["fingerprint"]
    assert images_of(parts[0]) == images_of(tmp_path / "both")


def test_appending_to_nothing_is_one_line(foreign, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        append_episodes(AppendEpisodes(source=str(foreign), output=str(tmp_path / "none")))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "only a complete dataset is appended to" in line
