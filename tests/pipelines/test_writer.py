"""The writer, stage by stage, without Ray: layout, numbering, refusals, continuation."""

import io
import json
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import output, sealing, writer
from pipelines.dataset import open_dataset
from pipelines.images import encoded_image, fitted_size, shrunk
from pipelines.sources import Episode, Listing, Refusal, RefusedEpisodeError, Unit
from pipelines.writer import WriterOptions
from smolvla import data_utils

CAMERA = "observation.images.top"


def episode_frames(number, *, length=20, height=24, width=32):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (length, height, width, 3), dtype=np.uint8)


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
    images = changes.pop("images", None)
    cameras = {} if images else {CAMERA: iter(changes.pop("frames", frames))}
    return Episode(
        name=str(number),
        tasks=changes.pop("tasks", [task] * length),
        columns=columns | changes.pop("columns", {}),
        cameras=cameras,
        encoded_cameras={CAMERA: iter(images)} if images else {},
    )


def prepared(root, *, facts=None, append=False, **options):
    """An output that is begun."""
    facts, options = facts or listing(), WriterOptions(**options)
    target = output.opened(str(root), facts, options, append=append)
    output.begin(target, facts)
    return target, facts


def written(root, parts, *, facts=None, append=False, **options):
    """Stage the parts, assemble and seal; return the report."""
    target, facts = prepared(root, facts=facts, append=append, **options)
    outcomes = [writer.stage_part(part, target.layout, part=number) for number, part in enumerate(parts)]
    return completed(target, facts, outcomes)


def completed(target, facts, outcomes):
    records = [record for outcome in outcomes for record in outcome["episodes"]]
    tasks = writer.all_tasks((*target.base.tasks, *facts.tasks), records)
    shards = writer.shards_of(records, tasks, target.layout.options, first=target.base.numbering)
    for shard in shards:
        writer.assemble_shard(target.layout, shard)
    return sealing.seal(target, facts, outcomes=outcomes, shards=shards, tasks=tasks, code_version=None)


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


def camera_stats(root):
    stats = json.loads((root / "meta/stats.json").read_text())[CAMERA]
    return {name: np.ravel(values) for name, values in stats.items()}


def expected_of(pixels):
    """Statistics of all frames (N, H, W, 3)."""
    pixels, axes = pixels / 255.0, (0, 1, 2)
    stats = {
        "mean": pixels.mean(axes),
        "std": pixels.std(axes),
        "min": pixels.min(axes),
        "max": pixels.max(axes),
    }
    quantiles = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
    return stats | {name: np.quantile(pixels, q, axis=axes) for name, q in quantiles.items()}


def stored_pixels(root):
    return np.stack([np.asarray(Image.open(io.BytesIO(row[CAMERA]["bytes"]))) for row in table(root)])


def smooth_frames(number, length, *, height=24, width=32):
    """Pictures with little noise, as cameras give."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    t = np.arange(length)[:, None, None]
    planes = [
        120 + 90 * np.sin(x / 9 + t / 5),
        120 + 80 * np.cos(y / 7 + t / 3),
        110 + 70 * np.sin((x + y) / 13 + t),
    ]
    frames = np.stack(np.broadcast_arrays(*planes), axis=-1)
    return (frames + rng.normal(0, 2, frames.shape)).clip(0, 255).astype(np.uint8)


def test_camera_statistics_of_png_are_those_of_every_stored_pixel(tmp_path):
    written(tmp_path, [[episode(0)], [episode(1, length=37)]], image_format="png")
    stats = camera_stats(tmp_path)
    for name, values in expected_of(stored_pixels(tmp_path)).items():
        np.testing.assert_allclose(stats[name], values, rtol=1e-12, atol=1e-15, err_msg=name)
    assert stats["count"].tolist() == [57]


def test_camera_statistics_of_jpeg_are_those_of_the_pixels_before_the_codec(tmp_path):
    frames = [smooth_frames(0, 20), smooth_frames(1, 37)]
    written(tmp_path, [[episode(0, frames=frames[0])], [episode(1, length=37, frames=frames[1])]])
    stats = camera_stats(tmp_path)
    for name, values in expected_of(np.concatenate(frames)).items():
        np.testing.assert_allclose(stats[name], values, rtol=1e-12, atol=1e-15, err_msg=name)
    stored = expected_of(stored_pixels(tmp_path))
    for name in ("mean", "std", "q01", "q10", "q50", "q90", "q99"):
        np.testing.assert_allclose(stats[name], stored[name], atol=2 / 255, err_msg=name)


def test_every_pixel_of_a_large_frame_is_counted_whatever_it_is_stored_as(tmp_path):
    frames = smooth_frames(0, 8, height=240, width=320)
    facts = listing(height=240, width=320)
    written(tmp_path / "jpeg", [[episode(0, length=8, frames=frames)]], facts=facts)
    written(tmp_path / "png", [[episode(0, length=8, frames=frames)]], facts=facts, image_format="png")
    for root in (tmp_path / "jpeg", tmp_path / "png"):
        for name, values in expected_of(frames).items():
            # numpy adds half a million numbers one by one here: as many roundings of 1e-16
            np.testing.assert_allclose(camera_stats(root)[name], values, rtol=1e-10, atol=1e-15)
    stored = expected_of(stored_pixels(tmp_path / "jpeg"))
    for name in ("mean", "std"):
        # measured 1e-3 on these pictures, whose colours change faster than halved chroma can follow
        np.testing.assert_allclose(camera_stats(tmp_path / "jpeg")[name], stored[name], atol=2e-3)


def test_vector_statistics_are_numpys_of_the_stored_rows(tmp_path):
    written(tmp_path, [[episode(0)], [episode(1, length=37, task="push")]])
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    rows = table(tmp_path)
    names = ("action", "next.reward", "timestamp", "index", "episode_index", "frame_index", "task_index")
    for name in names:
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


def test_an_episodes_own_statistics_are_numpys_of_its_rows(tmp_path):
    tasks = ["lift"] * 5 + ["push"] * 15
    written(tmp_path, [[episode(0, length=7), episode(1, tasks=tasks)]])
    row = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    rows = table(tmp_path)[7:]
    for name in ("action", "timestamp", "index", "episode_index", "frame_index", "task_index"):
        values = np.array([r[name] for r in rows], np.float64).reshape(20, -1)
        found = {stat: row[f"stats/{name}/{stat}"] for stat in ("mean", "std", "q10", "max")}
        expected = {
            "mean": values.mean(0),
            "std": values.std(0),
            "q10": np.quantile(values, 0.1, axis=0),
            "max": values.max(0),
        }
        for stat, value in expected.items():
            np.testing.assert_allclose(found[stat], value, rtol=1e-12, atol=1e-12, err_msg=name + stat)
        assert row[f"stats/{name}/count"] == [20]


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


def noted(root):
    return pq.read_table(root / "meta/refused.parquet").to_pylist()


def test_every_refusal_and_warning_is_a_row_and_counted_by_reason(tmp_path):
    still = np.tile(episode_frames(1)[:1], (20, 1, 1, 1))
    colours = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((24, 32, 3), np.uint8)
    constant = np.random.default_rng(0).standard_normal((20, 3))
    parts = [
        [
            episode(0, columns={"action": constant * [1, 0, 1]}),
            episode(1, frames=still, columns={"action": constant * [1, 0, 1]}),
            episode(2, frames=colours, columns={"action": constant * [1, 0, 1]}),
            episode(3, columns={"action": np.full((20, 3), np.nan)}),
        ],
        [
            episode(4, length=1, columns={"action": np.zeros((1, 3))}),
            episode(5, tasks=["lift"] * 4 + [" "] * 16, columns={"action": constant * [1, 0, 1]}),
            Refusal(episode="6", reason="video_missing", detail="gone", camera=CAMERA),
        ],
    ]
    facts = replace(listing(), warnings=("a column is left out",))
    report = written(tmp_path, parts, facts=facts)
    assert report["refused"] == {"not_finite": 1, "video_missing": 1}
    assert report["warned"] == {
        "dead_camera": 2,
        "empty_instruction": 1,
        "one_frame_episode": 1,
        "source": 1,
        "zero_variance": 1,
    }
    rows = noted(tmp_path)
    keys = ("kind", "episode", "reason", "camera", "frame")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("warning", None, "source", None, None),
        ("refused", "3", "not_finite", None, 0),
        ("warning", "1", "dead_camera", CAMERA, None),
        ("warning", "2", "dead_camera", CAMERA, None),
        ("refused", "6", "video_missing", CAMERA, None),
        ("warning", "4", "one_frame_episode", None, None),
        ("warning", "5", "empty_instruction", None, 4),
        ("warning", None, "zero_variance", None, None),
    ]
    details = {(row["episode"], row["reason"]): row["detail"] for row in rows}
    assert details["1", "dead_camera"] == "all 20 frames are the same image"
    assert details["2", "dead_camera"] == "each of the 20 frames is of a single colour"
    assert details[None, "zero_variance"] == "action[1] is 0 in every frame"


def test_a_dataset_without_flaws_has_an_empty_list(tmp_path):
    report = written(tmp_path, [[episode(0)]])
    assert (report["refused"], report["warned"], noted(tmp_path)) == ({}, {}, [])


def test_a_dimension_that_moves_in_one_episode_only_is_not_constant(tmp_path):
    still = {"observation.state": np.ones((20, 2))}
    assert written(tmp_path / "still", [[episode(0, columns=still)]])["warned"] == {"zero_variance": 2}
    assert written(tmp_path / "moved", [[episode(0, columns=still)], [episode(1)]])["warned"] == {}
    assert noted(tmp_path / "still")[0]["detail"] == "observation.state[0] (x) is 1 in every frame"


# --- images that come encoded ---


def encoded(frames, image_format):
    return [encoded_image(frame, image_format=image_format, jpeg_quality=95) for frame in frames]


@pytest.mark.parametrize(("image_format", "suffix"), [("png", "png"), ("jpeg", "jpg")])
def test_encoded_images_are_stored_bit_for_bit_and_counted_as_a_reader_sees_them(
    tmp_path, image_format, suffix
):
    images = encoded(episode_frames(0), image_format)
    written(tmp_path, [[episode(0, images=images)]], image_format="as_is")
    rows = table(tmp_path)
    assert [row[CAMERA]["bytes"] for row in rows] == images
    assert rows[3][CAMERA]["path"] == f"frame-000003.{suffix}"
    for name, values in expected_of(stored_pixels(tmp_path)).items():
        np.testing.assert_allclose(camera_stats(tmp_path)[name], values, rtol=1e-12, atol=1e-15)


def test_encoded_images_that_must_shrink_are_encoded_anew(tmp_path):
    frames = episode_frames(0)
    facts = listing()
    written(tmp_path / "bytes", [[episode(0, images=encoded(frames, "png"))]], facts=facts, resize=(16, 16))
    written(tmp_path / "pixels", [[episode(0, frames=frames)]], facts=facts, resize=(16, 16))
    assert table(tmp_path / "bytes") == table(tmp_path / "pixels")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda images: [*images[:7], b"GIF89a", *images[8:]], "image_unreadable"),
        (lambda images: [*images[:7], images[7][:60], *images[8:]], "image_unreadable"),
        (lambda images: [*images[:7], b"", *images[8:]], "image_unreadable"),
        (lambda images: [*images[:7], encoded([np.zeros((9, 9, 3), np.uint8)], "png")[0]], "frame_size"),
        (lambda images: images[:7], "frames_missing"),
    ],
)
def test_an_encoded_image_that_is_none_refuses_the_episode_at_its_frame(tmp_path, change, reason):
    target, _ = prepared(tmp_path, image_format="as_is")
    images = change(encoded(episode_frames(0), "png"))
    outcome = writer.stage_part([episode(0, images=images)], target.layout, part=0)
    assert [(r["reason"], r["camera"], r["frame"]) for r in outcome["refusals"]] == [(reason, CAMERA, 7)]


# --- memory ---


def test_at_most_two_frames_of_an_episode_are_alive_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def counted():
        nonlocal most
        for frame in episode_frames(0, length=200):
            fresh = frame.copy()
            alive.append(weakref.ref(fresh))
            most = max(most, sum(reference() is not None for reference in alive))
            yield fresh

    written(tmp_path, [[episode(0, length=200, frames=counted())]])
    assert len(alive) == 200
    assert most <= 2  # the one handed over, and the one before it in the loop's variable


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
    target, _ = prepared(tmp_path)
    outcome = writer.stage_part([episode(0, **changes)], target.layout, part=0)
    assert [refusal["reason"] for refusal in outcome["refusals"]] == [reason]
    assert (outcome["episodes"], outcome["warnings"]) == ([], [])
    assert not np.any(outcome["histograms"][CAMERA])
    assert sorted(path.name for path in (tmp_path / "meta/_ingest").iterdir()) == ["000000.json", "plan.json"]


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
    root = tmp_path / "killed"
    target, facts = prepared(root)
    outcome = writer.stage_part([episode(0), episode(1)], target.layout, part=0)
    (shard,) = writer.shards_of(outcome["episodes"], ["lift"], target.layout.options)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000/.file-000.parquet.0.tmp").write_bytes(b"half")
    (root / shard.path).write_bytes(b"PAR1 half an upload")
    writer.assemble_shard(target.layout, shard)  # its staged episodes are gone then
    completed(target, facts, [outcome])
    assert snapshot(root) == snapshot(tmp_path / "whole")


def test_parts_that_an_earlier_run_completed_are_found_again(tmp_path):
    target, _ = prepared(tmp_path)
    outcomes = {
        part: writer.stage_part([episode(part)], target.layout, part=part) for part in (0, 2, 1_000_000)
    }
    (tmp_path / "meta/_ingest/.000001.json.abc.tmp").write_text("{")
    assert writer.staged_parts(str(tmp_path)) == json.loads(json.dumps(outcomes), object_hook=with_numbers)
    assert writer.staged_parts(str(tmp_path / "nothing")) == {}


def with_numbers(content):
    return {int(key) if key.isdecimal() else key: value for key, value in content.items()}


def opened(root, facts=None, *, append=False, **options):
    return output.opened(str(root), facts or listing(), WriterOptions(**options), append=append)


def test_an_output_is_only_continued_with_the_same_source_and_options(tmp_path):
    facts = listing(digest="a")
    assert opened(tmp_path, facts).report is None
    prepared(tmp_path, facts=facts)
    assert opened(tmp_path, facts).report is None
    with pytest.raises(
        ValueError, match=r"unfinished ingestion with image_format 'jpeg', this run has 'png'"
    ):
        opened(tmp_path, facts, image_format="png")
    with pytest.raises(ValueError, match=r"digest 'a', this run has 'b'"):
        opened(tmp_path, listing(digest="b"))


def test_a_complete_output_is_recognised_and_others_are_refused(tmp_path):
    report = written(tmp_path / "done", [[episode(0)]])
    assert opened(tmp_path / "done").report == report
    with pytest.raises(ValueError, match="complete dataset with resize None"):
        opened(tmp_path / "done", resize=(8, 8))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        opened(tmp_path / "foreign")


def test_two_runs_cannot_write_into_one_output(tmp_path):
    again = output.exclusive(str(tmp_path))
    with output.exclusive(str(tmp_path)), pytest.raises(ValueError, match="another ingestion"):
        again.__enter__()
    with output.exclusive(str(tmp_path)):
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
