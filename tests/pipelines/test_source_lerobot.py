"""The LeRobot reader: both versions alike, frames exact, everything broken refused by name. No Ray."""

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from lerobot_toy import (
    CAMERA,
    CLIP,
    FPS,
    HEIGHT,
    TASKS,
    WIDTH,
    edit,
    frames_of,
    png,
    replaced,
    v21_rows,
    v21_video,
    write_lines,
    write_v21,
    write_v30,
    write_video,
)

from pipelines.sources import Episode, Refusal, RefusedEpisodeError
from pipelines.sources.lerobot import LeRobotSource

SHARED = Path(__file__).parents[3] / "shared/data"
LENGTHS = {0: 12, 1: 15, 4: 9}  # a gap in the numbers


def read(root, *, units=None):
    """All episodes with their frames, and all refusals."""
    source = LeRobotSource(uri=str(root))
    listed = source.listing().units
    episodes, refusals = {}, []
    for item in source.episodes(listed if units is None else [listed[i] for i in units]):
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            episodes[item.name] = (item, {name: np.stack(list(f)) for name, f in item.cameras.items()})
        except RefusedEpisodeError as error:
            refusals.append(error.refusal)
    return episodes, refusals


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


def with_value(table, name, row, value):
    values = table[name].to_pylist()
    values[row] = value
    return replaced(table, name, values)


def test_a_healthy_neighbour_survives_every_broken_episode(broken):
    v21_video(broken, 1).unlink()
    episodes, refusals = read(broken)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason) for r in refusals] == [("1", CAMERA, "video_missing")]


@pytest.mark.parametrize(
    ("change", "reason", "frame"),
    [
        (lambda t: t.slice(0, 14), "row_count", None),
        (lambda t: with_value(t, "frame_index", 3, 4), "frame_index", 3),
        (lambda t: with_value(t, "episode_index", 0, 7), "episode_index", 0),
        (lambda t: with_value(t, "timestamp", 6, 0.61), "timestamp", 6),
        (lambda t: replaced(t, "timestamp", [i / 15 for i in range(15)]), "timestamp", 1),
        (lambda t: with_value(t, "timestamp", 2, float("nan")), "timestamp", 2),
        (lambda t: with_value(t, "task_index", 2, 9), "unknown_task", 2),
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
    assert [refusal.reason for refusal in read(broken)[1]] == ["frame_index", "timestamp"]


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
    table = broken_v30 / "meta/episodes/chunk-000/file-000.parquet"
    edit(table, lambda t: with_value(t, f"{CLIP}/to_timestamp", 1, 2.5))
    assert [(r.episode, r.reason, r.camera) for r in read(broken_v30)[1]] == [("1", "video_span", CAMERA)]


def test_rows_in_disorder_within_a_shared_file_are_refused(broken_v30):
    data = broken_v30 / "data/chunk-000/file-000.parquet"
    edit(data, lambda t: t.take([*range(20), 21, 20, *range(22, 36)]))
    episodes, refusals = read(broken_v30)
    assert list(episodes) == ["0", "4"]
    assert {(r.episode, r.reason) for r in refusals} == {("1", "frame_index"), ("1", "timestamp")}


def test_a_frame_lost_in_a_shared_video_refuses_only_its_own_episode(broken_v30):
    lengths = list(LENGTHS.items())
    frames = np.concatenate([frames_of(episode, length) for episode, length in lengths])
    lost = 26  # the last one of episode 1: the next frame in the file is already episode 4's
    times = [i for i in range(36) if i != lost]
    write_video(broken_v30 / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames[times], times=times)
    episodes, refusals = read(broken_v30)
    assert [(r.episode, r.reason, r.frame) for r in refusals] == [("1", "frames_missing", 14)]
    assert np.abs(episodes["4"][1][CAMERA].astype(int) - frames_of(4, 9)).max() <= 4


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "image_unreadable"),
        (b"not an image", "image_unreadable"),
        (png(np.zeros((HEIGHT, WIDTH, 3), np.uint8))[:60], "image_unreadable"),
        (png(np.zeros((HEIGHT + 1, WIDTH, 3), np.uint8)), "frame_size"),
    ],
)
def test_a_bad_image_in_the_parquet_is_refused(tmp_path, image, reason):
    root = write_v30(tmp_path, LENGTHS, images=True)
    data = root / "data/chunk-000/file-000.parquet"
    edit(data, lambda t: with_value(t, CAMERA, 14, {"bytes": image, "path": None}))
    episodes, refusals = read(root)
    assert list(episodes) == ["0", "4"]
    assert [(r.episode, r.camera, r.reason, r.frame) for r in refusals] == [("1", CAMERA, reason, 2)]


# --- what makes the whole dataset unusable ---


def change_info(root, **fields):
    path = root / "meta/info.json"
    info = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in info.items() if value is not ...}))


def drop_feature(root, name):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    del features[name]
    change_info(root, features=features)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "meta/info.json").unlink(), "info.json does not exist"),
        (lambda r: (r / "meta/info.json").write_text("{"), "info.json: not JSON"),
        (
            lambda r: change_info(r, codebase_version="v1.6"),
            "codebase_version 'v1.6' is none of v2.0, v2.1, v3.0",
        ),
        (lambda r: change_info(r, fps=0), "fps 0 is not a positive"),
        (lambda r: change_info(r, data_path=...), "field 'data_path' is missing"),
        (lambda r: change_info(r, video_path=None), "video_path is missing"),
        (
            lambda r: change_info(r, video_path="v/{chunk_index}.mp4"),
            "video_path 'v/{chunk_index}.mp4' cannot be",
        ),
        (lambda r: change_info(r, data_path="../x/{episode_index}"), "data_path leads out of the dataset"),
        (lambda r: change_info(r, video_path="nowhere/{episode_index}.mp4"), f"camera '{CAMERA}' exists"),
        (lambda r: change_info(r, data_path="nowhere/{episode_index}"), "none of the 3 files of data exists"),
        (lambda r: drop_feature(r, "action"), "features has no 'action'"),
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
    ],
)
def test_an_unusable_dataset_is_one_clear_error(broken, damage, message):
    damage(broken)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LeRobotSource(uri=str(broken)).listing()
    assert str(broken) in str(error.value)


def test_a_column_that_no_file_has_is_one_clear_error(broken):
    for number in LENGTHS:
        edit(v21_rows(broken, number), lambda t: t.drop_columns(["observation.state"]))
    with pytest.raises(ValueError, match=r"no column 'observation\.state'"):
        LeRobotSource(uri=str(broken)).listing()


def test_a_camera_without_columns_in_the_episode_table_is_one_clear_error(broken_v30):
    table = broken_v30 / "meta/episodes/chunk-000/file-000.parquet"
    edit(table, lambda t: t.drop_columns([f"{CLIP}/from_timestamp"]))
    with pytest.raises(ValueError, match="from_timestamp' is missing"):
        LeRobotSource(uri=str(broken_v30)).listing()


def test_features_that_cannot_be_stored_are_left_out_with_a_warning(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    features["observation.force"] = {"dtype": "float32", "shape": [2, 3], "names": None}
    change_info(broken, features=features, total_episodes=5)
    listing = LeRobotSource(uri=str(broken)).listing()
    assert "observation.force" not in listing.features
    assert listing.warnings == (
        "feature 'observation.force' is left out: shape [2, 3] is neither a number nor a vector",
        "info.json: total_episodes is 5, the episode table has 3",
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
