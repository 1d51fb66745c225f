"""The HDF5 reader: rows and pixels are those of the file in every layout, all that is broken is refused."""

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hdf5_toy import (
    HEIGHT,
    INSTRUCTION,
    LIBERO,
    ROBOMIMIC,
    WIDTH,
    frames,
    jpeg,
    pixels,
    vectors,
    write_aloha,
    write_isaac,
    write_libero,
    write_robomimic,
)

from jobs.ingest_hdf5 import IngestHdf5
from jobs.ingest_hdf5 import main as ingest_hdf5
from pipelines.images import decoded_image
from pipelines.ingestion import ingest
from pipelines.sources import Episode, Refusal, RefusedEpisodeError
from pipelines.sources.hdf5 import Hdf5Source
from pipelines.sources.hdf5_files import dataset_at
from pipelines.sources.mapping import Part, SourceMapping
from pipelines.writer import WriterOptions

SHARED = Path(__file__).parents[3] / "shared/data/aloha_hdf5"
TOP = "observation.images.top"


def read(path, **options):
    """All episodes with their pixels, and all refusals, as the writer would meet them."""
    source = Hdf5Source(uri=str(path), **options)
    episodes, refusals = {}, []
    for item in source.episodes(source.listing().units):
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            images = {name: np.stack(list(found)) for name, found in item.cameras.items()}
            images |= {
                name: np.stack([pixels(data) for data in found])
                for name, found in item.encoded_cameras.items()
            }
            episodes[item.name] = (item, images)
        except RefusedEpisodeError as error:
            refusals.append(error.refusal)
    return episodes, refusals


def reasons(refusals):
    return [(r.episode, r.reason, r.camera and r.camera.rpartition(".")[2], r.frame) for r in refusals]


def assert_rows(episode, name, *parts):
    """A column is these (key, width) series of the toy, side by side."""
    number, length = int(re.findall(r"_(\d+)", episode.name)[-1]), len(episode.tasks)
    expected = np.concatenate([vectors(key, number, length, width) for key, width in parts], axis=1)
    np.testing.assert_array_equal(episode.columns[name], expected.astype(np.float32))


# --- ALOHA ---

ALOHA: dict[str, Any] = {"fps": 50, "task": "fold the towel"}
LENGTHS = {2: 9, 9: 5, 10: 7}


@pytest.fixture(scope="module")
def aloha_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aloha")
    for episode, length in LENGTHS.items():
        path = folder / f"day/episode_{episode}.hdf5"
        write_aloha(path, episode, length, encoded=episode != 2, cameras=("top", "cam_low"))
    return folder


@pytest.fixture
def aloha(aloha_source, tmp_path):
    """A copy to break; episode_9 is the one that is broken."""
    return Path(shutil.copytree(aloha_source, tmp_path / "copy"))


@pytest.fixture
def edited(aloha):
    with h5py.File(aloha / "day/episode_9.hdf5", "r+") as root:
        yield root


def test_aloha_rows_and_pixels_are_those_of_the_files_raw_or_jpeg(aloha_source):
    episodes, refusals = read(aloha_source, **ALOHA)
    assert refusals == []
    assert list(episodes) == [f"day/episode_{number}.hdf5" for number in LENGTHS]  # 9 before 10
    for (number, length), (episode, images) in zip(LENGTHS.items(), episodes.values(), strict=True):
        assert episode.tasks == ["fold the towel"] * length
        assert_rows(episode, "observation.state", ("observations/qpos", 14))
        assert_rows(episode, "observation.velocity", ("observations/qvel", 14))
        assert_rows(episode, "action", ("action", 14))
        for tint, camera in enumerate(("top", "cam_low")):
            expected = frames(number, length, tint)
            if number != 2:
                expected = np.stack([pixels(jpeg(image)) for image in expected])
            np.testing.assert_array_equal(images[f"observation.images.{camera}"], expected)


def test_the_listing_tells_what_the_files_are(aloha_source):
    source = Hdf5Source(uri=str(aloha_source), **ALOHA)
    listing = source.listing()
    assert (listing.fps, listing.robot_type, listing.tasks) == (50, "aloha", ("fold the towel",))
    assert [unit.num_frames for unit in listing.units] == [9, 5, 7]
    assert listing.features[TOP]["shape"] == [HEIGHT, WIDTH, 3]
    assert listing.features["observation.state"]["names"][:2] == ["qpos_0", "qpos_1"]
    assert listing.warnings == ()
    choices = source.choices()
    assert choices[0] == "layout: aloha (ALOHA or ACT: a file is an episode), 3 episodes"
    assert "observation.state: observations/qpos, width 14" in choices
    assert f"{TOP}: observations/images/top, {HEIGHT}x{WIDTH}" in choices
    assert choices[-2:] == ["fps: 50", "task: 'fold the towel'"]


def test_jpeg_files_are_handed_over_without_their_padding_and_pixels_in_opencvs_order_are_turned(
    aloha_source,
):
    source = Hdf5Source(uri=str(aloha_source), **ALOHA)
    reading = source.episodes([source.listing().units[1]])
    episode = next(reading)
    assert isinstance(episode, Episode)
    assert list(episode.encoded_cameras[TOP]) == [jpeg(image) for image in frames(9, 5)]
    turned, _ = read(aloha_source, channel_order="bgr", **ALOHA)
    for name, (_, images) in read(aloha_source, **ALOHA)[0].items():
        np.testing.assert_array_equal(turned[name][1][TOP], images[TOP][..., ::-1])


def test_images_may_be_strings_or_bytes_of_any_length(tmp_path):
    files = [jpeg(image) for image in frames(3, 6)]
    for number, kind in enumerate((f"S{max(map(len, files)) + 3}", h5py.vlen_dtype(np.uint8))):
        path = write_aloha(tmp_path / f"{number}/episode_3.h5", 3, 6)
        with h5py.File(path, "r+") as root:
            del root["observations/images/top"]
            rows = root.create_dataset("observations/images/top", 6, kind)
            for frame, data in enumerate(files):
                rows[frame] = data if number == 0 else np.frombuffer(data, np.uint8)
        ((_, images),) = read(path, **ALOHA)[0].values()
        np.testing.assert_array_equal(images[TOP], np.stack([pixels(data) for data in files]))


def test_frame_rate_and_instruction_are_asked_for_and_never_guessed(aloha_source):
    with pytest.raises(ValueError, match="do not say their frame rate; give it, such as --fps 50 for ALOHA"):
        Hdf5Source(uri=str(aloha_source), task="x").listing()
    with pytest.raises(ValueError, match=r"no instruction in the files.*--task"):
        Hdf5Source(uri=str(aloha_source), fps=50).listing()
    assert Hdf5Source(uri=str(aloha_source), fps=50, task="").listing().tasks == ("",)


# --- demos in groups ---


def test_robomimic_demos_come_in_numeric_order_with_the_usual_state(tmp_path):
    lengths = {f"demo_{number}": 3 + number for number in range(12)}
    path = write_robomimic(tmp_path / "lift.hdf5", lengths)
    episodes, refusals = read(path, task="lift the cube")
    assert refusals == []
    assert list(episodes) == [f"lift.hdf5/demo_{number}" for number in range(12)]
    state = [(key, width) for key, width in ROBOMIMIC.items() if key != "object"]
    for number, (episode, images) in enumerate(episodes.values()):
        assert_rows(episode, "observation.state", *state)
        assert_rows(episode, "action", ("actions", 7))
        for tint, camera in enumerate(("agentview", "robot0_eye_in_hand")):
            np.testing.assert_array_equal(
                images[f"observation.images.{camera}"], frames(number, 3 + number, tint)
            )
    source = Hdf5Source(uri=str(path), task="lift the cube")
    assert source.listing().fps == 20  # control_freq
    assert source.choices()[0].startswith("layout: robomimic (")
    assert source.listing().warnings == (
        "left out, --mapping could take them: dones uint8, obs/object float64[10], robot_states float64[20]",
    )


def test_two_arms_are_two_in_the_state(tmp_path):
    keys = ROBOMIMIC | {key.replace("robot0", "robot1"): width for key, width in ROBOMIMIC.items()}
    path = write_robomimic(tmp_path / "transport.hdf5", {"demo_0": 4}, keys=keys, actions=14)
    ((episode, _),) = read(path, task="")[0].values()
    arm = [("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2)]
    assert_rows(
        episode, "observation.state", *((f"robot{r}_{key}", width) for r in (0, 1) for key, width in arm)
    )


def test_libero_says_its_own_task_and_rate(tmp_path):
    for name in ("b", "a"):
        write_libero(tmp_path / f"{name}_demo.hdf5", {"demo_0": 6, "demo_1": 4})
    episodes, refusals = read(tmp_path)
    assert refusals == []
    assert list(episodes) == [f"{name}_demo.hdf5/demo_{number}" for name in "ab" for number in (0, 1)]
    for episode, images in episodes.values():
        assert set(episode.tasks) == {INSTRUCTION}
        assert_rows(episode, "observation.state", ("ee_states", 6), ("gripper_states", 2))
        assert list(images) == ["observation.images.agentview", "observation.images.eye_in_hand"]
    source = Hdf5Source(uri=str(tmp_path))
    assert source.choices()[0].startswith("layout: libero (")
    assert source.listing().fps == 20
    assert source.listing().warnings[0] == (
        "a_demo.hdf5: images are stored upside down (macros_image_convention opengl) and kept so; "
        "so in 2 files"
    )


def test_libero_without_joined_poses_takes_position_and_orientation(tmp_path):
    keys = {key: width for key, width in LIBERO.items() if key != "ee_states"}
    ((episode, _),) = read(write_libero(tmp_path / "a.hdf5", {"demo_0": 6}, keys=keys))[0].values()
    assert_rows(episode, "observation.state", ("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2))


@pytest.mark.parametrize("group", ["obs", "obs/policy"])
def test_isaac_lab_is_read_nested_or_flat_and_its_rate_is_that_of_the_actions(tmp_path, group):
    path = write_isaac(tmp_path / "stack.hdf5", {"demo_0": 6, "demo_1": 8}, group=group)
    episodes, refusals = read(path, task="stack the cubes")
    assert refusals == []
    for number, (episode, images) in enumerate(episodes.values()):
        assert_rows(episode, "observation.state", ("eef_pos", 3), ("eef_quat", 4), ("gripper_pos", 2))
        np.testing.assert_array_equal(
            images["observation.images.wrist_cam"], frames(number, 6 + 2 * number, 1)
        )
    source = Hdf5Source(uri=str(path), task="stack the cubes")
    assert source.choices()[0].startswith("layout: isaaclab (")
    assert source.listing().fps == 20  # 1 / (0.01 s * 5)


def test_every_episode_may_have_its_own_instruction(tmp_path):
    path = write_robomimic(tmp_path / "kitchen.hdf5", {"demo_1": 3, "demo_2": 3, "demo_3": 3})
    with h5py.File(path, "r+") as root:
        root["data/demo_1"].attrs["ep_meta"] = json.dumps({"lang": "open the fridge"})  # RoboCasa
        root["data/demo_2"].attrs["language_instruction"] = "close the fridge"
    episodes, refusals = read(path)
    assert [episode.tasks[0] for episode, _ in episodes.values()] == ["open the fridge", "close the fridge"]
    assert reasons(refusals) == [("kitchen.hdf5/demo_3", "task_missing", None, None)]


def test_the_instruction_stands_where_task_key_says(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 3, "demo_1": 3})
    with h5py.File(path, "r+") as root:
        root["data/demo_0/goal/words"] = "lift it"
        root["data/demo_1"].attrs["goal/words"] = "drop it"
    mapping = SourceMapping(task_key="goal/words")
    assert Hdf5Source(uri=str(path), mapping=mapping).listing().tasks == ("lift it", "drop it")
    with pytest.raises(ValueError, match="no instruction under task_key 'words'"):
        Hdf5Source(uri=str(path), mapping=SourceMapping(task_key="words")).listing()


def test_a_filter_key_takes_its_demos_and_misses_none_in_silence(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", {f"demo_{number}": 3 for number in (1, 2, 10)})
    with h5py.File(path, "r+") as root:
        root["mask/train"] = np.array([b"demo_10", b"demo_2", b"demo_7"])
        root["mask/valid"] = ["demo_1"]
    episodes, refusals = read(path, task="", filter_key="train")
    assert list(episodes) == ["a.hdf5/demo_2", "a.hdf5/demo_10"]
    assert reasons(refusals) == [("a.hdf5/demo_7", "demo_missing", None, None)]
    assert list(read(path, task="", filter_key="valid")[0]) == ["a.hdf5/demo_1"]
    with pytest.raises(ValueError, match="filter_key 'trian' is in none of 1 files; did you mean 'train'"):
        Hdf5Source(uri=str(path), task="", filter_key="trian").listing()
    write_robomimic(tmp_path / "b.hdf5", {"demo_0": 3})
    warnings = Hdf5Source(uri=str(tmp_path), task="", filter_key="valid").listing().warnings
    assert warnings[0] == "b.hdf5: has no mask/valid, so nothing of it is taken"


def test_a_file_without_demos_is_a_warning_and_nothing_but_such_files_an_error(tmp_path):
    write_robomimic(tmp_path / "a.hdf5", {})
    with pytest.raises(ValueError, match="no demos in any of 1 files"):
        Hdf5Source(uri=str(tmp_path), task="").listing()
    write_libero(tmp_path / "b.hdf5", {"demo_0": 3})
    episodes, refusals = read(tmp_path)
    assert (list(episodes), refusals) == (["b.hdf5/demo_0"], [])
    assert Hdf5Source(uri=str(tmp_path)).listing().warnings[0] == "a.hdf5: no demos in it"


def test_a_total_that_is_not_the_sum_is_told(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 3})
    with h5py.File(path, "r+") as root:
        root["data"].attrs["total"] = 4
    warnings = Hdf5Source(uri=str(path), task="").listing().warnings
    assert warnings[0] == "a.hdf5: attribute total is 4, the demos have 3 rows"


def test_a_file_of_another_rate_does_not_join_in_silence(tmp_path):
    write_libero(tmp_path / "a.hdf5", {"demo_0": 3})
    other = {"problem_info": {"language_instruction": "x"}, "env_args": {"env_kwargs": {"control_freq": 10}}}
    write_libero(tmp_path / "b.hdf5", {"demo_0": 3}, attrs=other)
    write_libero(tmp_path / "c.hdf5", {"demo_0": 3}, attrs={"problem_info": other["problem_info"]})
    episodes, refusals = read(tmp_path)
    assert list(episodes) == ["a.hdf5/demo_0"]
    assert [(r.episode, r.reason) for r in refusals] == [
        ("b.hdf5/demo_0", "wrong_fps"),
        ("c.hdf5/demo_0", "wrong_fps"),
    ]
    assert "b.hdf5 says 10 Hz, others 20 Hz" in refusals[0].detail
    assert len(read(tmp_path, fps=20)[0]) == 3
    assert (
        "b.hdf5: says 10 Hz, fps is 20; so in 1 files"
        in Hdf5Source(uri=str(tmp_path), fps=20).listing().warnings
    )
    for fields in ({"sim_args": {"dt": 0.03, "decimation": 1}}, {"control_freq": 0.25}, {"fps": 1e300}):
        write_libero(tmp_path / "a.hdf5", {"demo_0": 3}, attrs={"env_args": fields})
        with pytest.raises(ValueError, match=r"a\.hdf5 says .* Hz; give a whole --fps"):
            Hdf5Source(uri=str(tmp_path), task="").listing()


# --- mapping ---


def test_a_mapping_takes_what_it_names_and_nothing_else(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 5})
    mapping = SourceMapping(
        state=(Part(key="obs/object", start=2, stop=4), Part(key="obs/robot0_eef_pos"), Part(key="dones")),
        action=(Part(key="actions", stop=-1),),
        cameras={"observation.images.front": "obs/agentview_image"},
        task="lift",
        fps=10,
        robot_type="panda",
    )
    source = Hdf5Source(uri=str(path), mapping=mapping)
    listing = source.listing()
    assert (listing.fps, listing.tasks, listing.robot_type) == (10, ("lift",), "panda")
    assert listing.features["observation.state"]["names"] == [
        *("object_2", "object_3"),
        *(f"robot0_eef_pos_{axis}" for axis in range(3)),
        "dones_0",
    ]
    assert "observation.state: obs/object[2:4] + obs/robot0_eef_pos + dones, width 6" in source.choices()
    ((episode, images),) = read(path, mapping=mapping)[0].values()
    expected = [vectors("object", 0, 5, 10)[:, 2:4], vectors("robot0_eef_pos", 0, 5, 3), np.zeros((5, 1))]
    np.testing.assert_array_equal(
        episode.columns["observation.state"], np.concatenate(expected, axis=1).astype(np.float32)
    )
    assert episode.columns["action"].shape == (5, 6)
    assert list(images) == ["observation.images.front"]


def test_a_file_of_no_known_layout_is_read_by_layout_and_mapping(tmp_path):
    path = tmp_path / "take_1.h5"
    with h5py.File(path, "w") as root:
        root["joint_action/left"], root["joint_action/gripper"] = np.ones((4, 6)), np.zeros(4)
        root["robot/joints"] = np.ones((4, 2, 3))
        root["observation/head/rgb"] = np.array([jpeg(image) for image in frames(0, 4)])
        root["language_raw"] = ["stack the bowls"]
        root.attrs["fps"] = 25
    with pytest.raises(ValueError, match=r"no file looks like aloha.*take_1\.h5 has joint_action.*--layout"):
        Hdf5Source(uri=str(path)).listing()
    mapping = SourceMapping(
        state=(Part(key="robot/joints"),),
        action=(Part(key="joint_action/left"), Part(key="joint_action/gripper")),
        cameras={TOP: "observation/head/rgb"},
    )
    ((episode, images),) = read(tmp_path, layout="aloha", mapping=mapping)[0].values()
    assert episode.tasks == ["stack the bowls"] * 4
    assert episode.columns["observation.state"].shape == (4, 6)
    assert episode.columns["action"].tolist() == [[1, 1, 1, 1, 1, 1, 0]] * 4
    np.testing.assert_array_equal(images[TOP][3], pixels(jpeg(frames(0, 4)[3])))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"state": (Part(key="obs/robot0_eef_po"),)}, "did you mean 'obs/robot0_eef_pos'?"),
        ({"action": (Part(key="actions", start=5, stop=9),)}, "'actions' [5:9] does not lie within its 7"),
        ({"cameras": {TOP: "obs/front_image"}}, "camera_missing: no dataset 'obs/front_image'"),
        ({"cameras": {TOP: "obs/object"}}, "is neither uint8 (L, H, W, 3) nor image files"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_clear_error(tmp_path, mapping, message):
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 5})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Hdf5Source(uri=str(path), task="", mapping=SourceMapping(**mapping)).listing()
    assert "a.hdf5/demo_0" in str(error.value)


def test_a_state_that_is_not_known_is_asked_for_with_all_there_is(tmp_path):
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 5}, keys={"joints": 7})
    with pytest.raises(ValueError, match=r"no state: obs has no .*--mapping.*obs/joints float64\[7\]"):
        Hdf5Source(uri=str(path), task="").listing()


# --- what is refused, episode by episode ---

BROKEN = "day/episode_9.hdf5"


def only_the_edited_one_is_refused(aloha):
    """The reasons of episode_9; the others are there."""
    episodes, refusals = read(aloha, **ALOHA)
    assert list(episodes) == ["day/episode_2.hdf5", "day/episode_10.hdf5"]
    assert {refusal.episode for refusal in refusals} == {BROKEN}
    return [reason[1:] for reason in reasons(refusals)]


def replaced(root, key, values):
    del root[key]
    root[key] = values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: replaced(r, "observations/qpos", np.zeros((4, 14))), ("length_mismatch", None, None)),
        (lambda r: r.attrs.__setitem__("num_samples", 6), ("length_mismatch", None, None)),
        (lambda r: replaced(r, "compress_len", np.zeros((2, 4))), ("length_mismatch", None, None)),
        (lambda r: replaced(r, "action", np.zeros((5, 7))), ("wrong_width", None, None)),
        (lambda r: replaced(r, "action", [b"left"] * 5), ("wrong_dtype", None, None)),
        (lambda r: r.pop("observations/qvel"), ("column_missing", None, None)),
        (lambda r: replaced(r, "observations/qpos", 3.0), ("column_missing", None, None)),
        (lambda r: r.pop("observations/images/top"), ("camera_missing", "top", None)),
        (
            lambda r: replaced(r, "observations/images/top", np.zeros((5, 9, 9, 3), np.uint8)),
            ("frame_size", "top", 0),
        ),
        (
            lambda r: replaced(r, "observations/images/top", np.zeros((5, HEIGHT, WIDTH, 3))),
            ("wrong_dtype", "top", None),
        ),
    ],
)
def test_an_episode_unlike_the_first_is_refused(aloha, edited, change, expected):
    change(edited)
    edited.close()
    assert expected in only_the_edited_one_is_refused(aloha)


def test_all_flaws_of_an_episode_are_reported_at_once(aloha, edited):
    del edited["observations/images/top"]
    replaced(edited, "observations/qpos", np.zeros((4, 14)))
    edited.close()
    assert only_the_edited_one_is_refused(aloha) == [
        ("camera_missing", "top", None),
        ("length_mismatch", None, None),
    ]


def test_a_camera_or_column_that_the_first_episode_lacks_is_not_lost_in_silence(aloha, edited):
    edited["observations/images/cam_high"] = frames(9, 5)
    edited["observations/effort"] = np.zeros((5, 14))
    edited.close()
    assert only_the_edited_one_is_refused(aloha) == [
        ("camera_surplus", None, None),
        ("column_surplus", None, None),
    ]
    mapping = SourceMapping(state=(Part(key="observations/qpos"),), cameras={TOP: "observations/images/top"})
    episodes, refusals = read(aloha, mapping=mapping, **ALOHA)
    assert (len(episodes), refusals) == (3, [])


def test_an_episode_without_frames_is_refused(aloha, edited):
    for key in ("action", "observations/qpos", "observations/qvel"):
        replaced(edited, key, np.zeros((0, 14)))
    edited.close()
    assert ("empty", None, None) in only_the_edited_one_is_refused(aloha)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda row: row.__setitem__(slice(None), 0), "image_unreadable"),  # no image at all
        (lambda row: row.__setitem__(slice(300, None), 0), "compress_len"),  # cut off
        (lambda row: row.__setitem__(slice(0, 2), 7), "image_unreadable"),  # no JPEG
    ],
)
def test_a_broken_jpeg_in_the_middle_is_refused_by_camera_and_frame(aloha, edited, damage, reason):
    images = edited["observations/images/cam_low"]
    row = images[3]
    damage(row)
    images[3] = row
    if reason == "image_unreadable":
        del edited["compress_len"]  # which would tell earlier
    edited.close()
    assert only_the_edited_one_is_refused(aloha) == [(reason, "cam_low", 3)]


def test_a_jpeg_cut_off_within_its_padding_is_not_filled_up_with_grey(aloha, edited):
    images = edited["observations/images/cam_low"]
    row = images[3]
    row[len(row) // 2 :] = 0
    images[3] = row
    del edited["compress_len"]
    edited.close()
    (refusal,) = read(aloha, **ALOHA)[1]
    assert (refusal.reason, refusal.frame) == ("image_unreadable", 3)
    assert "no end marker" in refusal.detail


def test_a_jpeg_of_another_size_is_refused_before_its_pixels_are_decoded(aloha, edited):
    header = bytearray(jpeg(frames(9, 5)[2]))
    at = header.index(b"\xff\xc0") + 5  # height and width, big-endian: 65535 x 65535 would be 12 GB
    header[at : at + 4] = b"\xff\xff\xff\xff"
    images = edited["observations/images/top"]
    images[2] = np.pad(np.frombuffer(header, np.uint8), (0, images.shape[1] - len(header)))
    edited.close()
    ((reason, camera, frame),) = only_the_edited_one_is_refused(aloha)
    assert (reason, camera, frame) in [("frame_size", "top", 2), ("image_unreadable", "top", 2)]


def test_a_truncated_file_and_one_that_is_none_refuse_only_themselves(aloha):
    path = aloha / BROKEN
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not HDF5" * 1000):
        path.write_bytes(content)
        assert only_the_edited_one_is_refused(aloha) == [("file_unreadable", None, None)]
    with pytest.raises(ValueError, match=r"none of 1 files can be read|no file looks like"):
        Hdf5Source(uri=str(path), **ALOHA).listing()


def test_a_damaged_chunk_is_refused_at_its_frame(tmp_path):
    lengths = {0: 6, 1: 6}
    for episode, length in lengths.items():
        write_aloha(tmp_path / f"episode_{episode}.hdf5", episode, length)
    with h5py.File(tmp_path / "episode_1.hdf5") as root:
        chunk = root["observations/images/top"].id.get_chunk_info(4)
    with (tmp_path / "episode_1.hdf5").open("r+b") as stream:
        stream.seek(chunk.byte_offset + chunk.size // 2)
        stream.write(b"\xff" * 16)
    episodes, refusals = read(tmp_path, **ALOHA)
    assert list(episodes) == ["episode_0.hdf5"]
    assert reasons(refusals) == [("episode_1.hdf5", "image_unreadable", "top", 4)]


def test_an_episode_of_another_layout_is_refused(tmp_path):
    write_libero(tmp_path / "a.hdf5", {"demo_0": 3})
    write_aloha(tmp_path / "b.hdf5", 1, 4)
    episodes, refusals = read(tmp_path)
    assert list(episodes) == ["a.hdf5/demo_0"]
    assert reasons(refusals) == [("b.hdf5", "wrong_layout", None, None)]


# --- hostile files ---


def linked(root, key, link):
    del root[key]
    root[key] = link


def virtual(root, key, source):
    del root[key]
    layout = h5py.VirtualLayout((5, 14), "f4")
    layout[:] = h5py.VirtualSource(source, "x", (5, 14))
    root.create_virtual_dataset(key, layout)


def external(root, key, source):
    del root[key]
    root.create_dataset(key, (5, 14), "f4", external=[(source, 0, 280)])


def claimed(root, key, shape, dtype="f4", **options):
    del root[key]
    root.create_dataset(key, shape, dtype, **options)


SECRET = "/etc/passwd"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: linked(r, "action", h5py.ExternalLink(SECRET, "/x")), "external_link"),
        (lambda r: linked(r, "observations", h5py.ExternalLink("episode_10.hdf5", "/")), "external_link"),
        (lambda r: virtual(r, "action", SECRET), "virtual_dataset"),
        (lambda r: external(r, "action", SECRET), "external_storage"),
        (lambda r: linked(r, "action", h5py.SoftLink("/action")), "data_unreadable"),  # to itself
        (lambda r: linked(r, "action", h5py.SoftLink("/nowhere")), "column_missing"),
        (lambda r: claimed(r, "action", (10**9, 14)), "too_large"),
        (lambda r: claimed(r, "action", (5, 10**9)), "data_unwritten"),
        (lambda r: claimed(r, "action", (5, 10**8), chunks=(5, 10**8)), "too_large"),
        (
            lambda r: claimed(r, "observations/images/top", (5, 10**8), "u1", chunks=(1, 10**6)),
            "data_unwritten",
        ),
        (lambda r: claimed(r, "action", (5, 14), h5py.vlen_dtype("u1")), "data_unwritten"),
    ],
)
def test_a_hostile_file_is_refused_by_name(aloha, edited, change, reason):
    change(edited)
    edited.close()
    assert reason in [found[0] for found in only_the_edited_one_is_refused(aloha)]


def test_an_external_link_is_never_opened_and_one_within_the_file_is_followed(aloha, edited, tmp_path):
    foreign = tmp_path / "foreign.hdf5"
    write_aloha(foreign, 9, 5)
    linked(edited, "action", h5py.ExternalLink(str(foreign), "/action"))
    edited.close()
    assert only_the_edited_one_is_refused(aloha) == [("external_link", None, None)]
    with h5py.File(aloha / BROKEN, "r+") as root:
        linked(root, "action", h5py.SoftLink("/observations/commands"))
        root["observations/commands"] = vectors("action", 9, 5, 14)
    assert_rows(read(aloha, **ALOHA)[0][BROKEN][0], "action", ("action", 14))


def test_a_chunk_that_would_unpack_to_far_more_than_it_claims_is_not_unpacked(tmp_path):
    for episode in (0, 1):
        write_aloha(tmp_path / f"episode_{episode}.hdf5", episode, 4)
    with h5py.File(tmp_path / "episode_1.hdf5", "r+") as root:
        images = dataset_at(root, "observations/images/top")
        images.id.write_direct_chunk((2, 0, 0, 0), zlib.compress(bytes(50_000_000)))
    episodes, refusals = read(tmp_path, **ALOHA)
    assert list(episodes) == ["episode_0.hdf5"]
    assert reasons(refusals) == [("episode_1.hdf5", "too_large", "top", None)]


def test_names_that_are_no_text_and_types_that_numpy_has_not_do_not_stop_the_job(aloha, edited):
    edited.create_group(b"observations/\xff\xfe")
    space = h5py.h5s.create_simple((5,))
    h5py.h5d.create(edited.id, b"clock", h5py.h5t.UNIX_D32LE, space)
    edited.attrs["language_instruction"] = b"\xff"
    edited.close()
    episodes, refusals = read(aloha / BROKEN, **ALOHA)
    assert (len(episodes), refusals) == (1, [])


def test_rows_that_were_never_written_are_not_taken_for_black_frames(aloha, edited):
    del edited["observations/images/top"]
    images = edited.create_dataset(
        "observations/images/top", (5, HEIGHT, WIDTH, 3), "u1", chunks=(1, 8, 8, 3)
    )
    images[:3] = frames(9, 3)
    edited.close()
    (refusal,) = read(aloha, **ALOHA)[1]
    assert (refusal.reason, refusal.camera) == ("data_unwritten", TOP)
    assert "24 of 60 chunks were never written" in refusal.detail


def test_a_group_that_contains_itself_ends(aloha, edited):
    edited["observations/loop"] = edited["observations"]
    edited.close()
    episodes, refusals = read(aloha / BROKEN, **ALOHA)
    assert (len(episodes), refusals) == (1, [])


def test_a_link_out_of_the_folder_is_refused_unless_it_is_wanted(aloha, tmp_path):
    outside = write_aloha(tmp_path / "elsewhere.hdf5", 11, 4, cameras=("top", "cam_low"))
    (aloha / "episode_11.hdf5").symlink_to(outside)
    with pytest.raises(ValueError, match=r"episode_11\.hdf5 is a link out of the dataset"):
        Hdf5Source(uri=str(aloha), **ALOHA).listing()
    assert len(read(aloha, follow_links=True, **ALOHA)[0]) == 4


# --- the whole dataset ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "alohaa"}, "layout 'alohaa' is none of aloha, robomimic, libero, isaaclab"),
        ({"fps": 0}, "fps 0 is not positive"),
        ({"channel_order": "gbr"}, "channel_order 'gbr' is neither"),
        ({"filter_key": "train"}, "files of layout aloha have none"),
        (
            {"mapping": SourceMapping(state=(Part(key="/observations/qpos"),))},
            "mapping: '/observations/qpos' begins with '/'",
        ),
        ({"layout": "robomimic"}, "none of 3 files can be read; day/episode_2.hdf5 has no group 'data'"),
    ],
)
def test_wrong_options_are_one_clear_error(aloha_source, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hdf5Source(uri=str(aloha_source), **(ALOHA | options)).listing()


def test_a_source_without_files_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Hdf5Source(uri=str(tmp_path / "nowhere")).listing()
    with pytest.raises(ValueError, match=r"no \.hdf5 or \.h5 file in it"):
        Hdf5Source(uri=str(tmp_path)).listing()


def test_hidden_files_are_left_out_with_a_word(aloha):
    (aloha / "day/._episode_2.hdf5").write_bytes(b"macOS")
    assert read(aloha, **ALOHA)[1] == []
    (warning,) = Hdf5Source(uri=str(aloha), **ALOHA).listing().warnings
    assert warning == "1 hidden files are left out, such as day/._episode_2.hdf5"


def test_the_identity_sees_a_changed_file_but_not_a_moved_folder(aloha, tmp_path):
    before = Hdf5Source(uri=str(aloha), **ALOHA).listing().identity
    moved = Path(shutil.copytree(aloha, tmp_path / "moved"))
    assert Hdf5Source(uri=str(moved), **ALOHA).listing().identity == before
    assert Hdf5Source(uri=str(moved), fps=50, task="fold").listing().identity != before
    with h5py.File(moved / BROKEN, "r+") as root:
        root.attrs["note"] = "x" * 5000
    assert Hdf5Source(uri=str(moved), **ALOHA).listing().identity != before


def test_an_object_store_gives_the_same_rows_and_pixels(aloha_source, monkeypatch):
    server = pytest.importorskip("moto.server", reason="the extra `dev` is not installed")
    boto3 = pytest.importorskip("boto3")
    s3 = server.ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    try:
        host, port = s3.get_host_and_port()
        names = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **names)
        client.create_bucket(Bucket="robots")
        for path in aloha_source.rglob("*.hdf5"):
            client.upload_file(str(path), "robots", f"towel/{path.relative_to(aloha_source)}")
        uri = f"s3://a:b@robots/towel?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        there, refusals = read(uri, **ALOHA)
        here, _ = read(aloha_source, **ALOHA)
        assert (list(there), refusals) == (list(here), [])
        for name, (episode, images) in here.items():
            np.testing.assert_array_equal(there[name][1][TOP], images[TOP])
            np.testing.assert_array_equal(there[name][0].columns["action"], episode.columns["action"])
    finally:
        s3.stop()
    with pytest.raises(ValueError, match=r"^s3://"):  # and not a word about the files
        Hdf5Source(uri=uri, **ALOHA).listing()


# --- on Ray ---


def ingested(source, output, **options):
    return ingest(
        source,
        str(output),
        options=WriterOptions(**options),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )


def test_the_shared_aloha_files_become_a_dataset_with_their_rows_and_pixels(ray_session, tmp_path):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    source = Hdf5Source(uri=str(SHARED), fps=50, task="transfer the cube")
    report = ingested(source, tmp_path / "out", image_format="png")
    assert (report["episodes"], report["frames"], report["refused"]) == (3, 880, {})
    table = pq.read_table(tmp_path / "out/data")
    rows = table.select(["observation.state", "action", "episode_index"]).to_pydict()
    images = table[TOP].combine_chunks().field("bytes")
    start = 0
    for number in range(3):
        with h5py.File(SHARED / f"episode_{number}.hdf5") as root:
            action, qpos, stored = (
                dataset_at(root, key) for key in ("action", "observations/qpos", "observations/images/top")
            )
            stop = start + len(action)
            assert set(rows["episode_index"][start:stop]) == {number}
            np.testing.assert_array_equal(rows["action"][start:stop], action[:])
            np.testing.assert_array_equal(rows["observation.state"][start:stop], qpos[:])
            for frame in range(0, stop - start, 7):
                found = decoded_image(images[start + frame].as_py())
                expected = stored[frame] if number == 0 else decoded_image(stored[frame].tobytes())
                np.testing.assert_array_equal(found, expected)
        start = stop
    assert start == 880


def test_the_job_prints_what_it_takes_and_asks_for_what_it_lacks(aloha_source, tmp_path, capsys):
    flags: dict[str, Any] = {"source": str(aloha_source), "output": str(tmp_path / "out")}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, "give it, such as --fps 50"),
        ({"fps": 50}, "give it with --task"),
        ({"mapping": "nowhere.yaml"}, "mapping nowhere.yaml: cannot be read"),
    ]
    for change, message in mistakes:
        with pytest.raises(SystemExit) as error:
            ingest_hdf5(IngestHdf5(**flags, **change))
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(SystemExit):
        ingest_hdf5(IngestHdf5(**flags, **ALOHA))
    assert capsys.readouterr().out.startswith(
        "layout: aloha (ALOHA or ACT: a file is an episode), 3 episodes\n"
    )
