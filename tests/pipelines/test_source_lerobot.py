"""The LeRobot reader: both versions alike, frames exact, everything broken refused by name. No Ray."""

import io
import json
import os
import re
import shutil
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_toy import (
    CAMERA,
    CLIP,
    FPS,
    HEIGHT,
    TASKS,
    WIDTH,
    change_features,
    change_info,
    edit,
    frames_of,
    png,
    read,
    replaced,
    v21_rows,
    v21_video,
    with_value,
    write_lines,
    write_v21,
    write_v30,
    write_video,
)
from PIL import Image

from pipelines.sources import Episode, lerobot
from pipelines.sources.lerobot import LeRobotSource

SHARED = Path(__file__).parents[3] / "shared/data"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
LENGTHS = {0: 12, 1: 15, 4: 9}  # a gap in the numbers


def decoded(path):
    """What PyAV alone makes of a file."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def v21(tmp_path_factory):
    return write_v21(tmp_path_factory.mktemp("v21"), LENGTHS)


@pytest.fixture(scope="module")
def v30(tmp_path_factory):
    return write_v30(tmp_path_factory.mktemp("v30"), LENGTHS)


@pytest.fixture
def broken(v21, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(v21, tmp_path / "copy"))


@pytest.fixture
def broken_v30(v30, tmp_path):
    return Path(shutil.copytree(v30, tmp_path / "copy"))


def test_the_listing_tells_what_the_dataset_is(v21):
    listing = LeRobotSource(uri=str(v21)).listing()
    assert (listing.fps, listing.robot_type, listing.tasks) == (FPS, "toy", tuple(TASKS))
    assert [(unit.name, unit.num_frames) for unit in listing.units] == [("0", 12), ("1", 15), ("4", 9)]
    assert list(listing.features) == [CAMERA, "observation.state", "action"]
    assert listing.features[CAMERA] == {
        "dtype": "image",
        "shape": [HEIGHT, WIDTH, 3],
        "names": ["height", "width", "channels"],
    }
    assert listing.warnings == ()


def test_frames_are_those_of_a_plain_decode(v21):
    episodes, refusals = read(v21)
    assert refusals == []
    for number, length in LENGTHS.items():
        _, frames = episodes[str(number)]
        np.testing.assert_array_equal(frames[CAMERA], decoded(v21_video(v21, number)))
        # the codec is lossless but for the rounding of RGB -> YUV -> RGB, so order and identity are seen
        assert np.abs(frames[CAMERA].astype(int) - frames_of(number, length)).max() <= 4


def test_both_versions_give_the_same_rows_and_pixels(v21, v30):
    old, new = read(v21)[0], read(v30)[0]
    assert old.keys() == new.keys() == {"0", "1", "4"}
    for name, (episode, frames) in old.items():
        twin, twin_frames = new[name]
        assert episode.tasks == twin.tasks
        for column in ("observation.state", "action"):
            np.testing.assert_array_equal(episode.columns[column], twin.columns[column])
            assert episode.columns[column].dtype == np.float32
        np.testing.assert_array_equal(frames[CAMERA], twin_frames[CAMERA])


def test_a_run_may_begin_in_the_middle_of_a_video_or_leave_episodes_out(v30):
    whole = read(v30)[0]
    for units in ([2], [0, 2], [2, 0]):
        some, refusals = read(v30, units=units)
        assert refusals == []
        for name, (_, frames) in some.items():
            np.testing.assert_array_equal(frames[CAMERA], whole[name][1][CAMERA])


def test_images_in_the_parquet_are_read_whatever_the_row_groups(tmp_path):
    episodes, refusals = read(write_v30(tmp_path, LENGTHS, images=True))
    assert refusals == []
    for number, length in LENGTHS.items():
        np.testing.assert_array_equal(episodes[str(number)][1][CAMERA], frames_of(number, length))


def test_every_frame_keeps_the_task_of_its_own_row(broken):
    edit(v21_rows(broken, 0), lambda t: replaced(t, "task_index", [0] * 5 + [1] * 7))
    assert read(broken)[0]["0"][0].tasks == [TASKS[0]] * 5 + [TASKS[1]] * 7


# --- the shared twin datasets ---


@pytest.fixture(scope="module")
def franka():
    for version in ("v21", "v30"):
        if not (SHARED / f"lerobot_{version}_franka").is_dir():
            pytest.skip(f"{SHARED}/lerobot_{version}_franka is not here")
    return tuple(LeRobotSource(uri=str(SHARED / f"lerobot_{version}_franka")) for version in ("v21", "v30"))


def test_the_franka_twins_hold_the_same_rows(franka):
    old, new = (list(source.episodes(source.listing().units)) for source in franka)
    assert [episode.name for episode in old] == [episode.name for episode in new] == ["0", "1", "2", "3"]
    for episode, twin in zip(old, new, strict=True):
        assert isinstance(episode, Episode)
        assert isinstance(twin, Episode)
        assert episode.tasks == twin.tasks
        for column in ("observation.state", "action"):
            np.testing.assert_array_equal(episode.columns[column], twin.columns[column])


def test_the_franka_twins_show_the_same_pixels(franka):
    # the second episode ends a file in v3.0, the fourth begins within one
    for number, frames in ((1, 411), (3, 20)):
        old, new = (next(iter(s.episodes([s.listing().units[number]]))) for s in franka)
        pairs = zip(old.cameras["observation.images.ego"], new.cameras["observation.images.ego"], strict=True)
        assert sum(np.array_equal(a, b) for a, b in islice(pairs, frames)) == frames


# --- what is refused, episode by episode ---


def test_a_healthy_neighbour_survives_every_broken_episode(broken):
    v21_video(broken, 1).unlink()
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason) for r in refusals] == [("1", CAMERA, "video_missing")]


@pytest.mark.parametrize(
    ("change", "reason", "frame"),
    [
        (lambda t: t.slice(0, 14), "row_count", None),
        (lambda t: with_value(t, "frame_index", 3, 4), "frame_index_gap", 3),
        (lambda t: with_value(t, "episode_index", 0, 7), "episode_index_wrong", 0),
        (lambda t: with_value(t, "timestamp", 6, 0.61), "timestamp_off_fps", 6),
        (lambda t: replaced(t, "timestamp", [i / 15 for i in range(15)]), "timestamp_off_fps", 1),
        (lambda t: with_value(t, "timestamp", 2, float("nan")), "timestamp_off_fps", 2),
        (lambda t: with_value(t, "task_index", 2, 9), "task_unknown", 2),
        (lambda t: with_value(t, "action", 5, [0.0, 1.0]), "wrong_width", 5),
        (lambda t: with_value(t, "action", 5, None), "null_value", 5),
        (lambda t: with_value(t, "action", 5, [0.0, None, 1.0]), "null_value", 5),
        (lambda t: replaced(t, "action", ["left"] * 15), "wrong_width", 0),
        (lambda t: t.drop_columns(["action"]), "column_missing", None),
        (lambda t: t.append_column("action", t["action"]), "column_duplicated", None),
    ],
)
def test_broken_rows_are_refused_with_the_first_frame(broken, change, reason, frame):
    edit(v21_rows(broken, 1), change)
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    found = {(refusal.reason, refusal.frame) for refusal in refusals}
    assert (reason, frame) in found
    assert {refusal.episode for refusal in refusals} == {"1"}


def test_all_flaws_of_an_episode_are_reported_at_once(broken):
    edit(v21_rows(broken, 1), lambda t: with_value(with_value(t, "timestamp", 6, 9.0), "frame_index", 2, 0))
    assert [refusal.reason for refusal in read(broken)[1]] == ["frame_index_gap", "timestamp_off_fps"]


def test_a_data_file_that_is_no_parquet_refuses_its_episode(broken):
    v21_rows(broken, 1).write_bytes(b"PAR1")
    assert [(r.episode, r.reason) for r in read(broken)[1]] == [("1", "data_unreadable")]
    v21_rows(broken, 1).unlink()
    assert [(r.episode, r.reason) for r in read(broken)[1]] == [("1", "data_missing")]


@pytest.mark.parametrize(
    ("times", "reason", "frame"),
    [
        (list(range(14)), "frames_missing", 14),
        (list(range(16)), "frames_surplus", 15),
        ([*range(7), *range(8, 16)], "frames_missing", 7),  # as many frames as rows, but one lies elsewhere
        (list(range(1, 16)), "frames_missing", 0),
    ],
)
def test_a_video_that_does_not_match_its_rows_is_refused(broken, times, reason, frame):
    write_video(v21_video(broken, 1), frames_of(1, len(times)), times=times)
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason, r.frame) for r in refusals] == [("1", CAMERA, reason, frame)]


def test_a_truncated_or_damaged_video_is_refused(broken):
    path = v21_video(broken, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert [(r.episode, r.reason) for r in read(broken)[1]] == [("1", "video_unreadable")]
    path.write_bytes(whole[:200] + bytes(len(whole) // 3) + whole[200 + len(whole) // 3 :])
    ((episode, reason),) = [(r.episode, r.reason) for r in read(broken)[1]]
    assert (episode, reason) in [("1", "video_unreadable"), ("1", "frame_corrupt")]


def test_a_span_that_does_not_fit_the_rows_is_refused(broken_v30):
    table = broken_v30 / EPISODES
    edit(table, lambda t: with_value(t, f"{CLIP}/to_timestamp", 1, 2.5))
    assert [(r.episode, r.reason, r.camera) for r in read(broken_v30)[1]] == [("1", "video_span", CAMERA)]


def test_rows_in_disorder_within_a_shared_file_are_refused(broken_v30):
    data = broken_v30 / "data/chunk-000/file-000.parquet"
    edit(data, lambda t: t.take([*range(20), 21, 20, *range(22, 36)]))
    episodes, refusals = read(broken_v30)
    assert list(episodes) == ["0", "4"]
    assert {(r.episode, r.reason) for r in refusals} == {("1", "frame_index_gap"), ("1", "timestamp_off_fps")}


def test_a_shared_file_whose_episode_numbers_are_texts_is_refused(broken_v30):
    edit(
        broken_v30 / "data/chunk-000/file-000.parquet",
        lambda t: replaced(t, "episode_index", [str(number) for number in t["episode_index"].to_pylist()]),
    )
    assert {(r.episode, r.reason) for r in read(broken_v30)[1]} == {(n, "wrong_dtype") for n in "014"}


def test_a_frame_lost_in_a_shared_video_refuses_only_its_own_episode(broken_v30):
    lengths = list(LENGTHS.items())
    frames = np.concatenate([frames_of(episode, length) for episode, length in lengths])
    lost = 26  # the last one of episode 1: the next frame in the file is already episode 4's
    times = [i for i in range(36) if i != lost]
    write_video(broken_v30 / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames[times], times=times)
    episodes, refusals = read(broken_v30)
    assert [(r.episode, r.reason, r.frame) for r in refusals] == [("1", "frames_missing", 14)]
    assert np.abs(episodes["4"][1][CAMERA].astype(int) - frames_of(4, 9)).max() <= 4


def encoded(mode, *, size=(WIDTH, HEIGHT), image_format="PNG", **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, image_format, **options)
    return out.getvalue()


BOMB = png(np.zeros((1, 1, 3), np.uint8))[:16] + (60_000).to_bytes(4, "big") * 2 + bytes(40)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "image_unreadable"),
        (b"", "image_unreadable"),
        (b"not an image", "image_unreadable"),
        (png(np.zeros((HEIGHT, WIDTH, 3), np.uint8))[:60], "image_unreadable"),
        (encoded("RGB", image_format="JPEG")[:300], "image_unreadable"),
        (encoded("RGB", image_format="BMP"), "image_unreadable"),  # PNG and JPEG alone are opened
        (BOMB, "image_unreadable"),  # a header of 3.6 gigapixels
        (encoded("RGB", size=(WIDTH, HEIGHT + 1)), "frame_size"),
        (encoded("RGB", size=(8000, 8000)), "frame_size"),
        (encoded("I;16"), "image_mode"),
        (encoded("RGBA"), "image_mode"),
        (encoded("CMYK", image_format="JPEG"), "image_mode"),
    ],
)
def test_a_bad_image_in_the_parquet_is_refused(tmp_path, image, reason):
    root = write_v30(tmp_path, LENGTHS, images=True)
    data = root / "data/chunk-000/file-000.parquet"
    edit(data, lambda t: with_value(t, CAMERA, 14, {"bytes": image, "path": None}))
    episodes, refusals = read(root)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason, r.frame) for r in refusals] == [("1", CAMERA, reason, 2)]


def test_grey_and_jpeg_images_are_read(tmp_path):
    root = write_v30(tmp_path, LENGTHS, images=True)
    data = root / "data/chunk-000/file-000.parquet"
    for row, image in ((0, encoded("L")), (1, encoded("RGB", image_format="JPEG"))):
        edit(data, lambda t, row=row, image=image: with_value(t, CAMERA, row, {"bytes": image, "path": ""}))
    frames = read(root)[0]["0"][1][CAMERA]
    assert frames[:2].max() == 0
    np.testing.assert_array_equal(frames[2:], frames_of(0, 12)[2:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: replaced(t, CAMERA, ["path.png"] * len(t)), "wrong_dtype"),
        (lambda t: t.append_column(CAMERA, t[CAMERA]), "column_duplicated"),
        (lambda t: t.drop_columns([CAMERA]), "column_missing"),
    ],
)
def test_an_image_column_that_is_none_refuses_the_episodes_of_its_file(tmp_path, change, reason):
    root = with_images_v21(write_v21(tmp_path, LENGTHS))
    edit(v21_rows(root, 1), change)
    episodes, refusals = read(root)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason) for r in refusals] == [("1", CAMERA, reason)]


def with_images_v21(root):
    """Move the pictures from the videos into the data files, without a struct around the bytes."""
    for number, length in LENGTHS.items():
        images = pa.array([png(frame) for frame in frames_of(number, length)], pa.large_binary())
        edit(v21_rows(root, number), lambda t, images=images: t.append_column(CAMERA, images))
        v21_video(root, number).unlink()
    camera = {"dtype": "image", "shape": [HEIGHT, WIDTH, 3], "names": None}
    change_features(root, **{CAMERA: camera})
    change_info(root, video_path=None)
    return root


def test_images_without_a_struct_and_without_a_video_path_are_read(tmp_path):
    episodes, refusals = read(with_images_v21(write_v21(tmp_path, LENGTHS)))
    assert refusals == []
    np.testing.assert_array_equal(episodes["4"][1][CAMERA], frames_of(4, 9))


# --- what Parquet may look like ---


SCALAR = {"dtype": "float32", "shape": [1], "names": None}


@pytest.mark.parametrize(
    ("feature", "column", "expected"),
    [
        ({"dtype": "float32", "shape": [2]}, pa.array([[1.0, 2.0]] * 12, pa.list_(pa.float64())), [1, 2]),
        (
            {"dtype": "float32", "shape": [2]},
            pa.array([[1.0, 2.0]] * 12, pa.large_list(pa.float64())),
            [1, 2],
        ),
        ({"dtype": "float32", "shape": [2]}, pa.array([[1.0, 2.0]] * 12, pa.list_(pa.float32(), 2)), [1, 2]),
        ({"dtype": "float64", "shape": [1]}, pa.array([[0.1]] * 12), 0.1),
        ({"dtype": "int64", "shape": [1]}, pa.array([7.0] * 12), 7),
        ({"dtype": "bool", "shape": [1]}, pa.array([1] * 12), True),
        ({"dtype": "uint8", "shape": [2]}, pa.array([[0, 255]] * 12), [0, 255]),
        ({"dtype": "string", "shape": [1]}, pa.array(["ok"] * 12), "ok"),
        ({"dtype": "string", "shape": [1]}, pa.array([["ok"]] * 12), "ok"),
        ({"dtype": "string", "shape": [1]}, pa.array(["ok"] * 12).dictionary_encode(), "ok"),
    ],
)
def test_a_column_is_read_whatever_holds_its_values(tmp_path, feature, column, expected):
    root = write_v21(tmp_path, {0: 12})
    change_features(root, extra=feature | {"names": None})
    edit(v21_rows(root, 0), lambda t: t.append_column("extra", column))
    episodes, refusals = read(root)
    assert refusals == []
    values = episodes["0"][0].columns["extra"]
    assert values.tolist() == [expected] * 12
    assert values.dtype == (object if feature["dtype"] == "string" else feature["dtype"])


@pytest.mark.parametrize(
    ("feature", "column", "reason"),
    [
        ({"dtype": "int64", "shape": [1]}, pa.array([7.5] * 12), "wrong_dtype"),
        ({"dtype": "bool", "shape": [1]}, pa.array([2] * 12), "wrong_dtype"),
        ({"dtype": "uint8", "shape": [1]}, pa.array([256] * 12), "wrong_dtype"),
        ({"dtype": "int64", "shape": [1]}, pa.array([float("nan")] * 12), "wrong_dtype"),
        ({"dtype": "string", "shape": [1]}, pa.array([1] * 12), "wrong_dtype"),
        ({"dtype": "float32", "shape": [1]}, pa.array(["1"] * 12), "wrong_dtype"),
        ({"dtype": "float32", "shape": [1]}, pa.array([[1.0, 2.0]] * 12), "wrong_width"),
        ({"dtype": "string", "shape": [1]}, pa.array(["a", None] * 6), "null_value"),
    ],
)
def test_values_that_are_not_what_is_declared_are_refused_not_converted(tmp_path, feature, column, reason):
    root = write_v21(tmp_path, {0: 12})
    change_features(root, extra=feature | {"names": None})
    edit(v21_rows(root, 0), lambda t: t.append_column("extra", column))
    assert [refusal.reason for refusal in read(root)[1]] == [reason]


def test_state_and_action_become_float32_whatever_they_were(broken):
    change_features(broken, observation__state={"dtype": "int64", "shape": [1], "names": None})
    change_features(broken, action={"dtype": "float64", "shape": [2], "names": {"motors": ["a", "b"]}})
    for number, length in LENGTHS.items():
        edit(v21_rows(broken, number), lambda t, n=length: replaced(t, "observation.state", [3] * n))
        edit(v21_rows(broken, number), lambda t, n=length: replaced(t, "action", [[0.1, 1e300]] * n))
    features = LeRobotSource(uri=str(broken)).listing().features
    assert features["observation.state"] == {"dtype": "float32", "shape": [1], "names": None}
    assert features["action"] == {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}}
    episode, _ = read(broken)[0]["0"]
    assert episode.columns["observation.state"].tolist() == [3.0] * 12
    # too large a number is no number: the writer refuses it as not_finite
    np.testing.assert_array_equal(episode.columns["action"][0], np.array([0.1, np.inf], np.float32))


def test_a_dataset_without_frame_index_is_ordered_by_its_timestamps(broken):
    # GR00T's datasets have none
    change_features(broken, frame_index=...)
    for number in LENGTHS:
        edit(v21_rows(broken, number), lambda t: t.drop_columns(["frame_index"]))
    edit(v21_rows(broken, 1), lambda t: t.take([0, 2, 1, *range(3, 15)]))
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    assert [(r.reason, r.frame) for r in refusals] == [("timestamp_off_fps", 1)]


def test_an_episode_without_frames_is_refused_and_absurd_lengths_are_not_believed(broken):
    rows = [json.loads(line) for line in (broken / "meta/episodes.jsonl").read_text().splitlines()]
    write_lines(broken / "meta/episodes.jsonl", [rows[0] | {"length": 10**15}, rows[1] | {"length": 0}])
    edit(v21_rows(broken, 1), lambda t: t.slice(0, 0))
    assert [(r.episode, r.reason) for r in read(broken)[1]] == [("0", "row_count"), ("1", "empty")]


def test_more_values_than_memory_may_hold_are_refused_from_the_footer(broken, monkeypatch):
    monkeypatch.setattr(lerobot, "MAX_VALUES", 149)  # ten numbers a row
    assert [(r.episode, r.reason) for r in read(broken)[1]] == [("1", "data_too_large")]


def test_a_long_text_repeated_endlessly_stays_one_text_in_memory(broken):
    text = "x" * 1_000_000
    change_features(broken, note={"dtype": "string", "shape": [1], "names": None})
    for number, length in LENGTHS.items():
        edit(v21_rows(broken, number), lambda t, n=length: t.append_column("note", pa.array([text] * n)))
    assert v21_rows(broken, 0).stat().st_size < 100_000
    notes = read(broken)[0]["0"][0].columns["note"]
    assert {id(note) for note in notes} == {id(notes[0])}
    assert notes[0] == text


@pytest.mark.parametrize("statistics", [True, False])
def test_a_damaged_row_group_refuses_only_the_episodes_it_holds(broken_v30, statistics):
    data = broken_v30 / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    with pq.ParquetWriter(
        data, table.schema, write_page_checksum=True, write_statistics=statistics, compression="none"
    ) as writer:
        for start, length in ((0, 12), (12, 15), (27, 9)):
            writer.write_table(table.slice(start, length))
    group = pq.read_metadata(data).row_group(1)
    place = next(group.column(i) for i in range(9) if group.column(i).path_in_schema.startswith("action"))
    end = (place.dictionary_page_offset or place.data_page_offset) + place.total_compressed_size
    content = bytearray(data.read_bytes())
    content[end - 8] ^= 255
    data.write_bytes(content)
    episodes, refusals = read(broken_v30)
    # without statistics every row group may hold the episode, and all must be read
    assert list(episodes) == (["0", "4"] if statistics else [])
    assert [(r.episode, r.reason) for r in refusals][:1] == [("1" if statistics else "0", "data_unreadable")]


# --- what the tables of meta/ may look like ---


def test_empty_lines_and_disorder_in_the_episode_table_do_not_matter(broken):
    table = broken / "meta/episodes.jsonl"
    table.write_text("\n\r\n" + "\n \n".join(reversed(table.read_text().splitlines())))
    assert [unit.name for unit in LeRobotSource(uri=str(broken)).listing().units] == ["0", "1", "4"]
    assert read(broken)[1] == []


def test_a_v20_dataset_is_read_without_the_statistics_of_episodes(broken):
    change_info(broken, codebase_version="v2.0")
    (broken / "meta/stats.json").write_text("{}")
    episodes, refusals = read(broken)
    assert (list(episodes), refusals) == (["0", "1", "4"], [])


def test_the_episode_table_may_be_cut_into_files_in_any_order(broken_v30):
    path = broken_v30 / EPISODES
    table = pq.read_table(path)
    pq.write_table(table.slice(2), path)
    (broken_v30 / "meta/episodes/chunk-001").mkdir()
    pq.write_table(table.slice(0, 2), broken_v30 / "meta/episodes/chunk-001/file-007.parquet")
    assert [unit.name for unit in LeRobotSource(uri=str(broken_v30)).listing().units] == ["0", "1", "4"]
    assert read(broken_v30)[1] == []


@pytest.mark.parametrize(
    "columns",
    [
        {"task_index": [1, 0], "task": TASKS[::-1]},
        {"__index_level_0__": TASKS, "task_index": [0, 1]},
        {"task_index": [0, 1], "instruction": TASKS},  # the index of the frame had a name of its own
        {"task_index": [0, 1], "task": TASKS, "note": ["a", "b"]},
    ],
)
def test_the_task_table_is_read_under_every_name_of_its_index(broken_v30, columns):
    pq.write_table(pa.table(columns), broken_v30 / "meta/tasks.parquet")
    assert LeRobotSource(uri=str(broken_v30)).listing().tasks == tuple(TASKS)


def test_an_instruction_that_the_task_table_lacks_refuses_the_episodes_that_need_it(broken):
    write_lines(broken / "meta/tasks.jsonl", [{"task_index": 0, "task": TASKS[0]}])
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.reason, r.frame) for r in refusals] == [("1", "task_unknown", 0)]


def test_an_episode_without_a_place_in_a_video_is_refused(broken_v30):
    path = broken_v30 / EPISODES
    edit(path, lambda t: with_value(t, f"{CLIP}/file_index", 1, None))
    assert [(r.episode, r.reason, r.camera) for r in read(broken_v30)[1]] == [("1", "video_missing", CAMERA)]


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -5.0])
def test_a_place_in_a_video_that_is_no_span_is_refused(broken_v30, time):
    path = broken_v30 / EPISODES
    edit(path, lambda t: with_value(t, f"{CLIP}/from_timestamp", 1, time))
    assert [(r.episode, r.reason, r.camera) for r in read(broken_v30)[1]] == [("1", "video_span", CAMERA)]


def test_episodes_that_share_footage_are_warned_of(broken_v30):
    path = broken_v30 / EPISODES
    for end, value in (("from", 0.0), ("to", 1.5)):
        edit(path, lambda t, end=end, value=value: with_value(t, f"{CLIP}/{end}_timestamp", 1, value))
    (warning,) = LeRobotSource(uri=str(broken_v30)).listing().warnings
    assert warning == (
        f"camera '{CAMERA}': episodes that begin before the one before them in the video ends: 1, "
        "such as episode 1"
    )


# --- what makes the whole dataset unusable ---


GOOD_ROW = {"episode_index": 0, "length": 12}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "meta/info.json").unlink(), "info.json does not exist"),
        (lambda r: (r / "meta/info.json").write_text("{"), "info.json: not JSON"),
        (lambda r: (r / "meta/info.json").write_text("[]"), "info.json: not a JSON object"),
        (lambda r: (r / "meta/info.json").write_text("[" * 10**6), "info.json: not JSON"),
        (lambda r: (r / "meta/info.json").write_bytes(b'{"fps": "\xff"}'), "info.json: not JSON"),
        (lambda r: os.truncate(r / "meta/info.json", 2**31), "info.json: 2147483648 bytes, at most"),
        (lambda r: change_info(r, codebase_version=...), "field 'codebase_version' is missing"),
        (lambda r: change_info(r, features=...), "field 'features' is missing"),
        (lambda r: change_info(r, features=None), "features is NoneType, not an object"),
        (lambda r: change_info(r, features={"action": 3}), "feature 'action' has no dtype or no shape"),
        (lambda r: change_features(r, action={"dtype": "float32"}), "feature 'action' has no dtype or no"),
        (lambda r: change_features(r, x={"dtype": 3, "shape": [1]}), "dtype 3 of feature 'x' is not a text"),
        (lambda r: change_features(r, x={"dtype": "bool", "shape": "abc"}), "shape 'abc' of feature 'x' is"),
        (lambda r: change_features(r, x={"dtype": "bool", "shape": [10**9]}), "shape [1000000000] of"),
        (
            lambda r: change_features(r, x={"dtype": "image", "shape": [3, 4]}),
            "'x' has shape [3, 4], not three",
        ),
        (lambda r: change_features(r, x={"dtype": "image", "shape": [9, 9, 4]}), "not one or three channels"),
        (
            lambda r: change_features(r, x={"dtype": "image", "shape": [10000, 10000, 3]}),
            "camera 'x' has 10000x10000 pixels, at most",
        ),
        (
            lambda r: change_features(r, **{CAMERA: ...}),
            "no feature is a camera (dtype video or image), and a policy needs one; there are observation",
        ),
        (
            lambda r: change_features(r, action={"dtype": "float32", "shape": [2, 3]}),
            "'action' cannot be used: shape [2, 3] is neither a number nor a vector",
        ),
        (
            lambda r: change_features(r, observation__state={"dtype": "string", "shape": [1]}),
            "'observation.state' cannot be used: dtype 'string'",
        ),
        (lambda r: change_info(r, robot_type=["so101"]), "robot_type ['so101'] is not a text"),
        (lambda r: change_info(r, chunks_size=0), "chunks_size 0 is not a positive whole number"),
        (lambda r: change_info(r, fps=...), "field 'fps' is missing"),
        *(
            (lambda r, fps=fps: change_info(r, fps=fps), f"fps {fps!r} is not a whole number from 1 to")
            for fps in ("30", True, 29.97, -1, float("inf"), 10**400, None)
        ),
        (
            lambda r: change_info(r, codebase_version="v1.6"),
            "codebase_version 'v1.6' is none of v2.0, v2.1, v3.0",
        ),
        (lambda r: change_info(r, fps=0), "fps 0 is not a whole number from 1"),
        (lambda r: change_info(r, data_path=...), "field 'data_path' is missing"),
        (lambda r: change_info(r, video_path=None), "video_path is missing"),
        (
            lambda r: change_info(r, video_path="v/{chunk_index}.mp4"),
            "video_path 'v/{chunk_index}.mp4' cannot be",
        ),
        (lambda r: change_info(r, data_path="../x/{episode_index}"), "data_path leads out of the dataset"),
        (lambda r: change_info(r, data_path="/etc/{episode_index}"), "data_path leads out of the dataset"),
        (lambda r: change_info(r, data_path="a\0{episode_index}"), "data_path leads out of the dataset"),
        *(
            (lambda r, path=path: change_info(r, data_path=path), f"data_path {path!r} cannot be filled in")
            for path in (5, "{episode_index:999999999d}", "{episode_index.real}", "{0}", "{", "{x!r}")
        ),
        (lambda r: change_info(r, video_path="nowhere/{episode_index}.mp4"), f"camera '{CAMERA}' exists"),
        (lambda r: change_info(r, data_path="nowhere/{episode_index}"), "none of the 3 files of data exists"),
        (lambda r: change_features(r, action=...), "nothing for action: no 'action'"),
        (lambda r: (r / "meta/episodes.jsonl").unlink(), "meta/episodes.jsonl does not exist"),
        (lambda r: (r / "meta/tasks.jsonl").unlink(), "meta/tasks.jsonl does not exist"),
        (lambda r: (r / "meta/episodes.jsonl").write_text("\n"), "the episode table is empty"),
        (
            lambda r: write_lines(r / "meta/episodes.jsonl", [{"episode_index": 0}]),
            "episodes.jsonl:1: field 'length'",
        ),
        (
            lambda r: write_lines(r / "meta/episodes.jsonl", [{"episode_index": 0, "length": 12}] * 2),
            "lists episode_index 0 twice",
        ),
        *(
            (
                lambda r, row=row: write_lines(
                    r / "meta/episodes.jsonl", [{"episode_index": 0, "length": 1} | row]
                ),
                f"episodes.jsonl:1: {field} {value!r} is not a whole number from 0 on",
            )
            for row in (
                {"length": "12"},
                {"length": -1},
                {"length": 1.5},
                {"length": True},
                {"episode_index": None},
                {"episode_index": 10**30},
            )
            for field, value in row.items()
        ),
        (
            lambda r: (r / "meta/episodes.jsonl").write_text("{}\n[1]"),
            "episodes.jsonl:1: field 'episode_index'",
        ),
        *(
            (lambda r, rows=rows: write_lines(r / "meta/tasks.jsonl", rows), message)
            for rows, message in (
                ([{"task_index": "0", "task": "a"}], "task_index '0' with task 'a'"),
                ([{"task_index": 0, "task": None}], "task_index 0 with task None"),
                ([{"task_index": 0, "task": t} for t in "ab"], "task_index 0 is both 'a' and 'b'"),
                ([{"task": "a"}], "tasks.jsonl:1: field 'task_index' is missing"),
            )
        ),
    ],
)
def test_an_unusable_dataset_is_one_clear_error(broken, damage, message):
    damage(broken)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LeRobotSource(uri=str(broken)).listing()
    assert str(broken) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "meta/tasks.parquet").unlink(), "meta/tasks.parquet does not exist"),
        (lambda r: (r / "meta/tasks.parquet").write_bytes(b"PAR1"), "tasks.parquet: not a readable Parquet"),
        (
            lambda r: pq.write_table(pa.table({"task_index": [0], "a": [1]}), r / "meta/tasks.parquet"),
            "needs the columns task_index and task",
        ),
        (lambda r: shutil.rmtree(r / "meta/episodes"), "no meta/episodes/*/*.parquet"),
        (
            lambda r: (r / EPISODES).write_bytes(b"PAR1" * 9),
            "file-000.parquet: not a readable Parquet",
        ),
        (
            lambda r: edit(
                r / EPISODES,
                lambda t: with_value(t, "episode_index", 1, None),
            ),
            "row 1: episode_index None is not a whole number",
        ),
        (
            lambda r: edit(
                r / EPISODES,
                lambda t: t.append_column("length", t["length"]),
            ),
            "column 'length' is there twice",
        ),
        (
            lambda r: edit(
                r / EPISODES,
                lambda t: replaced(t, f"{CLIP}/to_timestamp", ["soon"] * 3),
            ),
            "to_timestamp 'soon' is not a number",
        ),
    ],
)
def test_unusable_tables_of_v30_are_one_clear_error(broken_v30, damage, message):
    damage(broken_v30)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LeRobotSource(uri=str(broken_v30)).listing()
    assert str(broken_v30) in str(error.value)


def test_a_state_only_dataset_of_v30_is_refused_because_a_policy_needs_a_camera(tmp_path):
    root = write_v30(tmp_path, LENGTHS, images=True)
    change_features(root, **{CAMERA: ...})
    with pytest.raises(ValueError, match="no feature is a camera"):
        LeRobotSource(uri=str(root)).listing()


def test_a_column_that_no_file_has_is_one_clear_error(broken):
    for number in LENGTHS:
        edit(v21_rows(broken, number), lambda t: t.drop_columns(["observation.state"]))
    with pytest.raises(ValueError, match=r"no column 'observation\.state'"):
        LeRobotSource(uri=str(broken)).listing()


def test_a_camera_without_columns_in_the_episode_table_is_one_clear_error(broken_v30):
    table = broken_v30 / EPISODES
    edit(table, lambda t: t.drop_columns([f"{CLIP}/from_timestamp"]))
    with pytest.raises(ValueError, match="from_timestamp' is missing"):
        LeRobotSource(uri=str(broken_v30)).listing()


def test_features_that_cannot_be_stored_are_left_out_with_a_warning(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    features["observation.force"] = {"dtype": "float32", "shape": [2, 3], "names": None}
    features["depth"] = features[CAMERA] | {"info": {"video.is_depth_map": True}}
    features["points"] = {"dtype": "float128", "shape": [3]}
    change_info(broken, features=features, total_episodes=5, total_frames=40)
    listing = LeRobotSource(uri=str(broken)).listing()
    assert "observation.force" not in listing.features
    assert listing.warnings == (
        "feature 'observation.force' is left out: shape [2, 3] is neither a number nor a vector",
        "feature 'depth' is left out: it is a depth map",
        "feature 'points' is left out: dtype 'float128'",
        "info.json: total_episodes is 5, the episode table has 3",
        "info.json: total_frames is 40, the episode table has 36",
    )


def test_a_channels_first_camera_is_turned(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    features[CAMERA] |= {"shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]}
    change_info(broken, features=features)
    assert LeRobotSource(uri=str(broken)).listing().features[CAMERA]["shape"] == [HEIGHT, WIDTH, 3]


def test_the_identity_sees_a_changed_file_but_not_a_moved_dataset(broken, tmp_path):
    before = LeRobotSource(uri=str(broken)).listing().identity
    moved = Path(shutil.copytree(broken, tmp_path / "moved"))
    assert LeRobotSource(uri=str(moved)).listing().identity == before
    v21_rows(moved, 1).write_bytes(b"")
    assert LeRobotSource(uri=str(moved)).listing().identity != before


def test_scalars_lists_and_other_dtypes_are_kept_as_declared(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    features |= {
        "next.reward": {"dtype": "float64", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "note": {"dtype": "string", "shape": [1], "names": None},
    }
    change_info(broken, features=features)
    for number, length in LENGTHS.items():
        extra = {
            "next.reward": pa.array([[0.1]] * length),  # a list of one, as some writers do
            "next.done": pa.array([False] * length),
            "note": pa.array(["ok"] * length),
        }
        for name, values in extra.items():
            edit(v21_rows(broken, number), lambda t, name=name, values=values: t.append_column(name, values))
    episode = read(broken)[0]["0"][0]
    assert (episode.columns["next.reward"].dtype, episode.columns["next.reward"].shape) == (np.float64, (12,))
    assert episode.columns["next.done"].dtype == bool
    assert episode.columns["note"].tolist() == ["ok"] * 12
