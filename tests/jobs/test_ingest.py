"""The ingestion jobs from flags to a sealed dataset: on Ray, counted, killed and continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_toy import (
    CAMERA,
    edit,
    frames_of,
    replaced,
    v21_rows,
    v21_video,
    write_v21,
    write_v30,
    write_video,
)

from jobs.command_line import parsed
from jobs.ingest_lerobot import IngestLeRobot
from jobs.ingest_lerobot import main as ingest_lerobot
from jobs.ingest_metaworld import IngestMetaWorld
from jobs.terminal import box_of
from pipelines import output, sealing, writer
from pipelines.dataset import open_dataset
from pipelines.ingestion import UNSEALED_PATH, TooManyRefusedError, ingest
from pipelines.sources.lerobot import LeRobotSource
from pipelines.writer import WriterOptions

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
LENGTHS = {0: 12, 1: 15, 4: 9}


def ingested(source, folder, *, max_refused=0.0, **options):
    progress = []
    report = ingest(
        LeRobotSource(uri=str(source)),
        str(folder),
        options=WriterOptions(**options),
        max_refused=max_refused,
        code_version=None,
        start_ray=lambda: None,
        on_progress=progress.append,
    )
    return report, progress


def snapshot(root):
    """Every file's bytes; what the ingestion says of itself without the code's version."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    about = json.loads(files.pop("meta/ingest.json"))
    for told in (about, *about["history"]):
        del told["code_version"], told["source_location"]
    return files, about


def own_ray():
    """An environment in which a job starts its own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run_job(name, *flags, cwd=ROOT, environment=None):
    return subprocess.run(
        [sys.executable, str(ROOT / f"jobs/{name}.py"), *flags],
        cwd=cwd,
        env=environment or own_ray(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def v21(tmp_path_factory):
    return write_v21(tmp_path_factory.mktemp("v21"), LENGTHS)


@pytest.fixture
def broken(v21, tmp_path):
    return Path(shutil.copytree(v21, tmp_path / "copy"))


# --- on Ray ---


def test_both_versions_become_byte_identical_datasets(ray_session, v21, tmp_path):
    old, progress = ingested(v21, tmp_path / "old")
    new, _ = ingested(write_v30(tmp_path / "v30", LENGTHS), tmp_path / "new")
    assert (old["episodes"], old["frames"], old["refused"]) == (3, 36, {})
    assert (progress[-1].episodes, progress[-1].total_episodes, progress[-1].frames) == (3, 3, 36)
    (old_files, _), (new_files, _) = snapshot(tmp_path / "old"), snapshot(tmp_path / "new")
    assert old_files == new_files
    assert old["fingerprint"] == new["fingerprint"]
    assert open_dataset(str(tmp_path / "old")).num_frames == 36


def test_the_shared_twins_become_the_same_dataset(ray_session, tmp_path):
    reports = []
    for version in ("v21", "v30"):
        source = SHARED / f"lerobot_{version}_franka"
        if not source.is_dir():
            pytest.skip(f"{source} is not here")
        reports.append(ingested(source, tmp_path / version, resize=(64, 64))[0])
    assert [(report["episodes"], report["frames"]) for report in reports] == [(4, 1667)] * 2
    assert snapshot(tmp_path / "v21")[0] == snapshot(tmp_path / "v30")[0]


def test_the_result_does_not_depend_on_who_worked_or_in_which_order(ray_session, v21, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_FRAMES", 1)  # a part for every episode
    ingested(v21, tmp_path / "ray")
    source, options = LeRobotSource(uri=str(v21)), WriterOptions()
    listing = source.listing()
    target = output.opened(str(tmp_path / "alone"), listing, options, append=False)
    output.begin(target, listing)
    parts = writer.parts_of(listing.units)
    assert len(parts) == 3
    outcomes = {
        part: writer.stage_part(source.episodes(parts[part]), target.layout, part=part)
        for part in reversed(range(3))
    }
    records = [record for part in range(3) for record in outcomes[part]["episodes"]]
    tasks = writer.all_tasks(listing.tasks, records)
    shards = writer.shards_of(records, tasks, options)
    for shard in shards:
        writer.assemble_shard(target.layout, shard)
    ordered = [outcomes[part] for part in range(3)]
    sealing.seal(target, listing, outcomes=ordered, shards=shards, tasks=tasks, code_version=None)
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "ray")


def test_refusals_are_counted_and_the_others_sealed_when_allowed(ray_session, broken, tmp_path):
    v21_video(broken, 0).unlink()
    edit(v21_rows(broken, 4), lambda t: replaced(t, "action", [[0.0, 0.0, float("inf")]] * 9))
    with pytest.raises(
        TooManyRefusedError, match=r"2 of 3 episodes are refused, max_refused allows 0\.5"
    ) as error:
        ingested(broken, tmp_path / "out", max_refused=0.5)
    assert error.value.report["refused"] == {"not_finite": 1, "video_missing": 1}
    listed = pq.read_table(tmp_path / "out" / UNSEALED_PATH).to_pylist()
    assert [(row["episode"], row["reason"], row["kind"]) for row in listed] == [
        ("0", "video_missing", "refused"),
        ("4", "not_finite", "refused"),
    ]
    assert not (tmp_path / "out/meta/info.json").exists()
    with pytest.raises(ValueError, match="not a complete episode dataset"):
        open_dataset(str(tmp_path / "out"))

    report, progress = ingested(broken, tmp_path / "out", max_refused=0.7)  # goes on from what is staged
    assert progress == []
    assert (report["episodes"], report["refused_episodes"]) == (1, 2)
    about = json.loads((tmp_path / "out/meta/ingest.json").read_text())
    assert [(r["episode"], r["camera"], r["frame"], r["reason"]) for r in about["refusals"]] == [
        ("0", CAMERA, 0, "video_missing"),
        ("4", None, 0, "not_finite"),
    ]
    assert pq.read_table(tmp_path / "out/meta/refused.parquet").to_pylist() == listed
    rows = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet").to_pydict()
    assert set(rows["episode_index"]) == {0}
    assert rows["index"] == list(range(15))
    assert set(rows["task_index"]) == {1}  # as in the source


def test_nothing_is_sealed_when_nothing_is_left(ray_session, broken, tmp_path):
    for episode in LENGTHS:
        v21_video(broken, episode).write_bytes(b"")
    with pytest.raises(TooManyRefusedError, match="none of 3 episodes is left"):
        ingested(broken, tmp_path / "out", max_refused=1.0)


def test_a_finished_output_is_left_alone(ray_session, v21, tmp_path):
    first, _ = ingested(v21, tmp_path)
    before = snapshot(tmp_path)
    again, progress = ingested(v21, tmp_path)
    assert (first["already_complete"], again["already_complete"], progress) == (False, True, [])
    assert again["fingerprint"] == first["fingerprint"]
    with pytest.raises(ValueError, match="complete dataset with jpeg_quality 95, this run has 80"):
        ingested(v21, tmp_path, jpeg_quality=80)
    assert snapshot(tmp_path) == before


def test_columns_of_every_kind_arrive(ray_session, broken, tmp_path):
    info = json.loads((broken / "meta/info.json").read_text())
    kinds = {"next.reward": ("float64", 0.5), "next.done": ("bool", True), "note": ("string", "ok")}
    for name, (dtype, _) in kinds.items():
        info["features"][name] = {"dtype": dtype, "shape": [1], "names": None}
    (broken / "meta/info.json").write_text(json.dumps(info))
    for episode, length in LENGTHS.items():
        for name, (_, value) in kinds.items():
            edit(
                v21_rows(broken, episode),
                lambda t, name=name, value=value, n=length: t.append_column(name, [[value] * n]),
            )
    ingested(broken, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    assert {name: rows[name][0].as_py() for name in kinds} == {
        "next.reward": 0.5,
        "next.done": True,
        "note": "ok",
    }
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert stats["next.done"]["mean"] == [1.0]
    assert "note" not in stats


# --- killed ---


def test_a_job_killed_halfway_and_run_again_gives_the_bytes_of_an_uninterrupted_one(ray_session, tmp_path):
    lengths = dict.fromkeys(range(12), 260)  # a part each
    source = write_v21(tmp_path / "source", lengths)
    flags = ["--source", str(source), "--output", str(tmp_path / "killed")]
    job = subprocess.Popen(
        [sys.executable, "jobs/ingest_lerobot.py", *flags],
        cwd=ROOT,
        env=own_ray(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    staged = tmp_path / "killed/meta/_ingest"
    deadline_s = time.monotonic() + 120
    while not (staged / "000000.json").exists() and job.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "killed/meta/info.json").exists()
    kept = len(list(staged.glob("[0-9]*.json")))
    assert 0 < kept < 12

    again = run_job("ingest_lerobot", *flags)
    assert again.returncode == 0, again.stderr
    ingested(source, tmp_path / "whole")
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


# --- the command line ---


def test_the_job_says_what_it_refused_and_what_looks_odd_and_where_it_is_listed(
    ray_session, broken, tmp_path
):
    v21_video(broken, 0).unlink()
    still = np.tile(frames_of(1, 1), (15, 1, 1, 1))
    write_video(v21_video(broken, 1), still)
    edit(v21_rows(broken, 4), lambda t: replaced(t, "action", [[0.0, 0.0, float("inf")]] * 9))
    cluster = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    flags = ["--source", str(broken), "--output", str(tmp_path / "out")]
    failed = run_job("ingest_lerobot", *flags, environment=cluster)
    assert failed.returncode == 1
    assert f"refused 0, camera {CAMERA}, frame 0: video_missing" in failed.stderr
    assert f"all refusals and warnings: {tmp_path}/out/{UNSEALED_PATH}" in failed.stderr
    assert json.loads(failed.stdout.splitlines()[-1])["refused"] == {"not_finite": 1, "video_missing": 1}

    allowed = run_job("ingest_lerobot", *flags, "--max_refused", "0.7", environment=cluster)
    assert allowed.returncode == 0, allowed.stderr
    listed = f"listed in {tmp_path}/out/meta/refused.parquet"
    assert f"refused: 1 not_finite, 1 video_missing; {listed}" in allowed.stderr.splitlines()
    assert f"warnings: 1 dead_camera; {listed}" in allowed.stderr.splitlines()
    assert json.loads(allowed.stdout.splitlines()[-1])["warned"] == {"dead_camera": 1}


def test_the_metaworld_job_films_every_task_on_the_cluster_it_is_given(ray_session, tmp_path):
    pytest.importorskip("metaworld", reason="the extra `sim` is not installed")
    cluster = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    flags = ["--episodes", "1", "--size", "32", "--output", "out"]
    job = run_job(
        "ingest_metaworld",
        "--tasks",
        "reach-v3",
        "button-press-topdown-v3",
        *flags,
        cwd=tmp_path,
        environment=cluster,
    )
    assert job.returncode == 0, job.stderr
    lines = job.stdout.splitlines()
    assert any(line.startswith("episodes 2/2, ") for line in lines)
    report = json.loads(lines[-1])
    dataset = open_dataset(str(tmp_path / "out"))
    assert (report["episodes"], report["frames"], report["path"]) == (2, dataset.num_frames, "out")
    assert report["fingerprint"] == dataset.fingerprint
    assert dataset.tasks == ("Reach a goal position", "Press a button from the top")
    assert dataset.image_size("observation.images.corner2") == (32, 32)
    action = np.stack(pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")["action"].to_numpy())
    assert np.abs(action).max() <= 1


def test_wrong_input_ends_with_one_line_and_code_2(tmp_path):
    missing = run_job("ingest_lerobot", "--source", str(tmp_path), "--output", str(tmp_path / "out"))
    assert (missing.returncode, missing.stdout) == (2, "")
    (line,) = missing.stderr.splitlines()
    assert line.startswith("ingest_lerobot.py: ")
    assert "meta/info.json does not exist" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (IngestMetaWorld, ["--tasks", "reach-v3"], "`output`"),
        (IngestMetaWorld, ["--tasks", "reach-v3", "--output", "o", "--episodes", "many"], "`episodes.0`"),
        (
            IngestMetaWorld,
            ["--task", "reach-v3", "--output", "o"],
            "unknown flag --task; did you mean --tasks?",
        ),
    ],
)
def test_wrong_flags_are_one_line(job, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parsed(job, flags)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_format": "webp"}, "image_format 'webp' is neither 'jpeg' nor 'png'"),
        ({"resize": "big"}, "resize 'big' is neither a side"),
        ({"image_format": "as_is"}, "image_format 'as_is' is for datasets whose images are copied"),
        ({"jpeg_quality": 101}, "jpeg_quality 101"),
        ({"max_refused": 1.5}, "max_refused 1.5"),
        ({"tolerance_s": -1.0}, "tolerance_s -1.0"),
        ({"output": "/proc/none/out"}, "output /proc/none/out: No such file"),
    ],
)
def test_wrong_values_end_before_ray_starts(v21, tmp_path, change, message, capsys):
    flags = {"source": str(v21), "output": str(tmp_path / "out")} | change
    with pytest.raises(SystemExit) as error:
        ingest_lerobot(IngestLeRobot(**flags))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_lists_are_written_with_spaces_or_as_draccus_does():
    for flags in (
        ["--tasks", "a", "b c", "--output", "o"],
        ["--output", "o", "--tasks", "a", "b c"],
        ["--tasks=a", "b c", "--output", "o"],
        ["--tasks", '["a", "b c"]', "--output", "o"],
    ):
        assert parsed(IngestMetaWorld, flags) == IngestMetaWorld(tasks=("a", "b c"), output="o")


def test_a_box_is_a_side_or_a_width_and_a_height():
    assert box_of(None) is None
    assert box_of("512") == (512, 512)
    assert box_of("640x480") == (640, 480)
    for wrong in ("big", "1x2x3", "-5", "5.5"):
        with pytest.raises(ValueError, match="neither a side"):
            box_of(wrong)
