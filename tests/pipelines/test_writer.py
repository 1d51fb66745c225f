"""The writer, stage by stage, without Ray: layout, numbering, refusals, continuation."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import sealing, writer
from pipelines.dataset import open_dataset
from pipelines.images import encoded_image, fitted_size, shrunk
from pipelines.sources import Episode, Listing, Refusal, RefusedEpisodeError, Unit
from pipelines.writer import WriterOptions
from smolvla import data_utils

CAMERA = "observation.images.top"


def listing(num_episodes=3, *, height=24, width=32, **identity):
    return Listing(
        fps=10,
        robot_type="toy",
        features={
            CAMERA: {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]},
            "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            "action": {"dtype": "float32", "shape": [3], "names": None},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        },
        tasks=("lift",),
        units=tuple(Unit(name=str(i), num_episodes=1, num_frames=300, detail=i) for i in range(num_episodes)),
        identity={"format": "toy"} | identity,
        location="memory",
    )


def episode(number, *, length=20, task="lift", height=24, width=32, **changes):
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 256, (length, height, width, 3), dtype=np.uint8)
    columns = {
        "observation.state": rng.standard_normal((length, 2)),
        "action": rng.standard_normal((length, 3)),
        "next.reward": rng.standard_normal(length),
    }
    cameras = {CAMERA: iter(changes.pop("frames", frames))}
    return Episode(
        name=str(number), tasks=[task] * length, columns=columns | changes.pop("columns", {}), cameras=cameras
    )


def written(root, parts, *, facts=None, **options):
    """Stage the parts, assemble and seal; return the report."""
    facts, options = facts or listing(), WriterOptions(**options)
    layout = writer.layout_of(str(root), facts, options)
    writer.begin(str(root), facts, options)
    outcomes = [writer.stage_part(part, layout, part=number) for number, part in enumerate(parts)]
    records = [record for outcome in outcomes for record in outcome["episodes"]]
    refusals = [refusal for outcome in outcomes for refusal in outcome["refusals"]]
    tasks = writer.all_tasks(facts, records)
    shards = writer.shards_of(records, tasks, options)
    for shard in shards:
        writer.assemble_shard(layout, shard)
    return sealing.seal(
        layout, facts, records=records, refusals=refusals, shards=shards, tasks=tasks, code_version=None
    )


def table(root):
    paths = sorted(Path(root).glob("data/*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def snapshot(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def test_a_written_dataset_opens_and_has_every_row_in_order(tmp_path):
    report = written(tmp_path, [[episode(0), episode(1, length=37)], [episode(2, length=1)]])
    dataset = open_dataset(str(tmp_path))
    assert (dataset.num_frames, dataset.fingerprint) == (58, report["fingerprint"])
    assert dataset.row_groups.rows.tolist() == [16, 4, 16, 16, 5, 1]
    rows = table(tmp_path)
    assert [row["index"] for row in rows] == list(range(58))
    assert [row["episode_index"] for row in rows] == [0] * 20 + [1] * 37 + [2]
    assert [row["frame_index"] for row in rows] == [*range(20), *range(37), 0]
    assert rows[19]["timestamp"] == pytest.approx(1.9)
    expected = episode(1, length=37).columns["action"].astype(np.float32)
    np.testing.assert_array_equal([row["action"] for row in rows[20:57]], expected)


def test_row_groups_hold_one_episode_and_images_are_not_compressed(tmp_path):
    written(tmp_path, [[episode(0), episode(1)]])
    metadata = pq.read_metadata(tmp_path / "data/chunk-000/file-000.parquet")
    columns = {metadata.row_group(0).column(i).path_in_schema: i for i in range(metadata.num_columns)}
    for group in range(metadata.num_row_groups):
        of_group = metadata.row_group(group)
        numbers = of_group.column(columns["episode_index"]).statistics
        assert numbers.min == numbers.max
        assert of_group.column(columns[f"{CAMERA}.bytes"]).compression == "UNCOMPRESSED"
        assert of_group.column(columns["action.list.element"]).compression == "SNAPPY"


def test_png_keeps_every_pixel_and_jpeg_comes_close(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[None, None, :, None], (20, 24, 1, 3))
    for image_format, tolerance in (("png", 0), ("jpeg", 4)):
        root = tmp_path / image_format
        written(root, [[episode(0, frames=smooth)]], image_format=image_format)
        stored = table(root)[7][CAMERA]
        image = np.asarray(Image.open(io.BytesIO(stored["bytes"])))
        assert np.abs(image.astype(int) - smooth[7]).max() <= tolerance
        assert stored["path"] == f"frame-000007.{'png' if image_format == 'png' else 'jpg'}"


def test_statistics_are_those_of_what_a_reader_sees(tmp_path):
    written(tmp_path, [[episode(0)], [episode(1, length=37)]])
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    rows = table(tmp_path)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row[CAMERA]["bytes"]))) for row in rows]) / 255.0
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["mean"]), pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["q10"]), np.quantile(pixels, 0.1, axis=(0, 1, 2)))
    for name in ("action", "next.reward", "timestamp", "index", "episode_index"):
        values = np.array([row[name] for row in rows], np.float64).reshape(len(rows), -1)
        for stat, expected in {
            "min": values.min(0),
            "max": values.max(0),
            "mean": values.mean(0),
            "std": values.std(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }.items():
            np.testing.assert_allclose(
                stats[name][stat], expected, rtol=1e-10, atol=1e-12, err_msg=name + stat
            )
        assert stats[name]["count"] == [57]


def test_the_episode_table_says_where_each_episode_lies(tmp_path):
    written(tmp_path, [[episode(0), episode(1, length=37)]], shard_bytes=1)
    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["data/file_index"] for row in episodes] == [0, 1]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in episodes] == [(0, 20), (20, 57)]
    assert [row["data/row_group_index"] for row in episodes] == [0, 0]
    assert episodes[1]["tasks"] == ["lift"]
    assert episodes[1]["stats/index/min"] == [20.0]
    assert np.shape(episodes[1][f"stats/{CAMERA}/mean"]) == (3, 1, 1)


def test_shards_are_cut_before_they_grow_past_the_limit(tmp_path):
    one = written(tmp_path / "one", [[episode(0), episode(1), episode(2)]])
    size = (tmp_path / "one/data/chunk-000/file-000.parquet").stat().st_size
    two = written(tmp_path / "two", [[episode(0), episode(1), episode(2)]], shard_bytes=int(size * 0.8))
    assert len(list((tmp_path / "two/data").rglob("*.parquet"))) == 2
    assert one["fingerprint"] == two["fingerprint"]  # of the content, not of how it is cut


def test_a_refused_episode_leaves_no_gap(tmp_path):
    bad = episode(1, columns={"action": np.full((20, 3), np.nan)})
    report = written(tmp_path, [[episode(0), bad, episode(2)]])
    assert {row["episode_index"] for row in table(tmp_path)} == {0, 1}
    assert [row["index"] for row in table(tmp_path)] == list(range(40))
    assert report["refused"] == {"not_finite": 1}
    assert (report["refusals"][0]["episode"], report["refusals"][0]["frame"]) == ("1", 0)
    episodes = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    assert episodes["source_episode"].to_pylist() == ["0", "2"]


def broken_after(frames, number):
    yield from frames[:number]
    raise RefusedEpisodeError(Refusal(episode="0", reason="video_unreadable", detail="gone", frame=number))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"columns": {"action": np.zeros((20, 4))}}, "wrong_width"),
        ({"columns": {"action": np.zeros((19, 3))}}, "wrong_width"),
        ({"columns": {"next.reward": np.full(20, np.inf)}}, "not_finite"),
        ({"frames": np.zeros((19, 24, 32, 3), np.uint8)}, "frames_missing"),
        ({"frames": np.zeros((21, 24, 32, 3), np.uint8)}, "frames_surplus"),
        ({"frames": np.zeros((20, 25, 32, 3), np.uint8)}, "frame_size"),
        ({"frames": broken_after(np.zeros((20, 24, 32, 3), np.uint8), 18)}, "video_unreadable"),
        ({"length": 0}, "empty"),
    ],
)
def test_a_broken_episode_is_refused_by_name_and_leaves_no_file(tmp_path, changes, reason):
    facts = listing()
    layout = writer.layout_of(str(tmp_path), facts, WriterOptions())
    outcome = writer.stage_part([episode(0, **changes)], layout, part=0)
    assert [refusal["reason"] for refusal in outcome["refusals"]] == [reason]
    assert outcome["episodes"] == []
    assert [path.name for path in (tmp_path / "meta/_ingest").iterdir()] == ["000000.json"]


def test_several_flaws_of_one_episode_are_all_reported():
    layout = writer.layout_of("unused", listing(), WriterOptions())
    bad = episode(0, columns={"action": np.zeros((20, 4)), "next.reward": np.full(20, np.nan)})
    reasons = [refusal.reason for refusal in writer.column_refusals(bad, layout.features)]
    assert reasons == ["wrong_width", "not_finite"]


def test_instructions_that_were_not_listed_are_numbered_after_those_that_were(tmp_path):
    written(tmp_path, [[episode(0, task="push"), episode(1), episode(2, task="turn")]])
    assert open_dataset(str(tmp_path)).tasks == ("lift", "push", "turn")
    assert {(row["episode_index"], row["task_index"]) for row in table(tmp_path)} == {(0, 1), (1, 0), (2, 2)}


def test_an_assembly_that_was_killed_can_be_repeated(tmp_path):
    written(tmp_path / "whole", [[episode(0), episode(1)]])
    facts, options = listing(), WriterOptions()
    root = tmp_path / "killed"
    layout = writer.layout_of(str(root), facts, options)
    writer.begin(str(root), facts, options)
    outcome = writer.stage_part([episode(0), episode(1)], layout, part=0)
    (shard,) = writer.shards_of(outcome["episodes"], ["lift"], options)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000/.file-000.parquet.0.tmp").write_bytes(b"half")
    (root / shard.path).write_bytes(b"PAR1 half an upload")
    writer.assemble_shard(layout, shard)
    writer.assemble_shard(layout, shard)  # again, its staged episodes are gone
    sealing.seal(
        layout,
        facts,
        records=outcome["episodes"],
        refusals=[],
        shards=[shard],
        tasks=["lift"],
        code_version=None,
    )
    assert snapshot(root) == snapshot(tmp_path / "whole")


def test_an_output_is_only_continued_with_the_same_source_and_options(tmp_path):
    facts, options = listing(digest="a"), WriterOptions()
    assert writer.complete_report(str(tmp_path), facts, options) is None
    writer.begin(str(tmp_path), facts, options)
    assert writer.complete_report(str(tmp_path), facts, options) is None
    with pytest.raises(
        ValueError, match=r"unfinished ingestion with image_format 'jpeg', this run has 'png'"
    ):
        writer.complete_report(str(tmp_path), facts, WriterOptions(image_format="png"))
    with pytest.raises(ValueError, match=r"digest 'a', this run has 'b'"):
        writer.complete_report(str(tmp_path), listing(digest="b"), options)


def test_a_complete_output_is_recognised_and_others_are_refused(tmp_path):
    report = written(tmp_path / "done", [[episode(0)]])
    found = writer.complete_report(str(tmp_path / "done"), listing(), WriterOptions())
    assert found == report
    with pytest.raises(ValueError, match="complete dataset with resize None"):
        writer.complete_report(str(tmp_path / "done"), listing(), WriterOptions(resize=(8, 8)))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        writer.complete_report(str(tmp_path / "foreign"), listing(), WriterOptions())


def test_two_runs_cannot_write_into_one_output(tmp_path):
    again = writer.exclusive(str(tmp_path))
    with writer.exclusive(str(tmp_path)), pytest.raises(ValueError, match="another ingestion"):
        again.__enter__()
    with writer.exclusive(str(tmp_path)):
        pass  # free again


@pytest.mark.parametrize(
    ("height", "width", "box", "expected"),
    [
        (480, 640, (512, 512), (384, 512)),
        (480, 640, (224, 224), (168, 224)),
        (481, 640, (224, 224), (168, 224)),  # 168.35 is truncated
        (96, 96, (512, 512), (96, 96)),  # never larger
        (640, 480, (512, 256), (256, 192)),
        (1000, 2, (10, 10), (10, 1)),  # never empty
    ],
)
def test_images_are_fitted_into_the_box(height, width, box, expected):
    assert fitted_size(height, width, box=box) == expected


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), side=st.integers(1, 600))
def test_shrunk_images_have_the_size_the_model_would_give_them(height, width, side):
    if max(height, width) > side:
        expected = data_utils.fitted_size(height, width, (side, side))
        assert fitted_size(height, width, box=(side, side)) == expected


def test_shrinking_is_bilinear_without_antialiasing():
    # every second pixel of a 4-pixel row: centres fall between pixels 0,1 and 2,3
    row = np.array([[0, 100, 50, 150]], np.uint8)
    frame = np.repeat(np.repeat(row, 2, axis=0)[..., None], 3, axis=2)
    assert shrunk(frame, size=(1, 2))[0, :, 0].tolist() == [50, 100]


def test_the_resized_camera_is_declared_at_its_stored_size(tmp_path):
    written(tmp_path, [[episode(0)]], resize=(16, 16))
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["features"][CAMERA]["shape"] == [12, 16, 3]
    image = np.asarray(Image.open(io.BytesIO(table(tmp_path)[0][CAMERA]["bytes"])))
    frame = np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), dtype=np.uint8)[0]
    expected = encoded_image(
        cv2.resize(frame, (16, 12), interpolation=cv2.INTER_LINEAR), image_format="jpeg", jpeg_quality=95
    )
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(expected))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_format": "webp"}, "image_format 'webp'"),
        ({"jpeg_quality": 0}, "jpeg_quality 0"),
        ({"resize": (0, 5)}, "0x5"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        WriterOptions(**options)
