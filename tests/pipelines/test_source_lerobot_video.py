"""Videos of every kind: the frames of a plain decode, each in its row, or a refusal. No Ray."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from lerobot_toy import (
    CAMERA,
    CLIP,
    FPS,
    HEIGHT,
    WIDTH,
    change_features,
    change_info,
    edit,
    frames_of,
    read,
    replaced,
    v21_video,
    write_v21,
    write_v30,
)

LENGTH = 12
SIZE = (96, 128)  # libx265 writes beyond its buffers for very small pictures


@pytest.fixture(scope="module")
def one_episode(tmp_path_factory):
    """One episode whose video is still to be written, its pictures large enough for every codec."""
    root = write_v21(tmp_path_factory.mktemp("v21"), {0: LENGTH})
    camera = {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    change_features(root, **{CAMERA: camera})
    v21_video(root, 0).unlink()
    return root


@pytest.fixture
def root(one_episode, tmp_path):
    return Path(shutil.copytree(one_episode, tmp_path / "copy"))


def pictures(length=LENGTH, *, height=SIZE[0], width=SIZE[1]):
    """Smooth, and unlike each other by far more than a codec loses."""
    x = np.linspace(0, 60, width)[None, :, None]
    levels = np.arange(length)[:, None, None, None] * 15
    return np.broadcast_to(x + levels, (length, height, width, 3)).astype(np.uint8)


def write(
    path,
    frames,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=FPS,
    times=None,
    clock=None,
    sound=False,
    container_format=None,
    muxer=None,
    **options: Any,
):
    with av.open(str(path), "w", format=container_format, options=muxer or {}) as container:
        audio: Any = container.add_stream("aac", rate=8000) if sound else None
        stream: Any = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        (stream.height, stream.width), stream.pix_fmt = frames.shape[1:3], pix_fmt
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times is None else times[number]
            if clock is not None:
                stream.codec_context.time_base = frame.time_base = clock
            container.mux(stream.encode(frame))
            if audio is not None:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                samples.sample_rate, samples.pts = 8000, number * 1024
                container.mux(audio.encode(samples))
        container.mux(stream.encode(None))
        if audio is not None:
            container.mux(audio.encode(None))


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    "encoding",
    [
        {"codec": "libx264", "bf": 3, "g": 250},
        {"codec": "libx264", "pix_fmt": "yuv444p"},
        {"codec": "libx264", "pix_fmt": "yuv420p10le"},
        {"codec": "libx265", "x265-params": "log-level=none"},
        {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265-params": "log-level=none"},
        {"codec": "libsvtav1", "preset": 8, "g": 2, "crf": 15},
        {"codec": "libsvtav1", "pix_fmt": "yuv420p10le", "preset": 8, "g": 2, "crf": 15},
        {"codec": "libvpx-vp9", "container_format": "webm"},  # its clock ticks in milliseconds
        {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container_format": "avi"},
        {"codec": "libx264", "sound": True},
    ],
    ids=lambda encoding: "-".join(map(str, encoding.values())),
)
def test_every_codec_and_pixel_format_gives_the_frames_of_a_plain_decode(root, encoding):
    write(v21_video(root, 0), pictures(), **encoding)
    episodes, refusals = read(root)
    assert refusals == []
    frames = episodes["0"][1][CAMERA]
    np.testing.assert_array_equal(frames, decoded(v21_video(root, 0)))
    # neighbours differ by 15 levels, so no frame stands in another one's row
    assert np.abs(frames.mean((1, 2, 3)) - pictures().mean((1, 2, 3))).max() < 5


def test_a_clock_of_milliseconds_is_no_other_frame_rate(root):
    change_info(root, fps=30)
    data = next(root.glob("rows/*/*.parquet"))
    edit(data, lambda t: replaced(t, "timestamp", np.arange(LENGTH, dtype=np.float32) / np.float32(30)))
    times = [round(1000 * n / 30) for n in range(LENGTH)]
    write(v21_video(root, 0), pictures(), times=times, clock=Fraction(1, 1000), container_format="matroska")
    assert read(root)[1] == []


@pytest.mark.parametrize(
    ("rate", "frame"),
    [(Fraction(10_000, 1001), 3), (Fraction(1000, 101), 1)],  # as 29.97 is to 30; one percent slow
)
def test_a_video_of_almost_the_declared_rate_is_refused(root, rate, frame):
    # half a frame would be reached after 500 frames only, so that short episodes passed and long ones did not
    write(v21_video(root, 0), pictures(), rate=rate)
    assert [(r.reason, r.frame) for r in read(root)[1]] == [("video_off_fps", frame)]


def test_a_video_of_changing_rate_is_refused_unless_the_tolerance_covers_it(root):
    times = [0, 100, 200, 330, *range(400, 1200, 100)]
    write(v21_video(root, 0), pictures(), times=times, clock=Fraction(1, 1000))
    assert [(r.reason, r.frame) for r in read(root)[1]] == [("video_off_fps", 3)]
    assert read(root, tolerance_s=0.031)[1] == []


def test_b_frames_without_an_edit_list_start_late_and_are_refused_as_lerobot_does(root):
    # the first frame is presented at 0.2 s: either the muxer's doing or two lost frames, nobody can tell
    write(v21_video(root, 0), pictures(), bf=2, muxer={"use_editlist": "0"})
    (refusal,) = read(root)[1]
    assert (refusal.reason, refusal.frame) == ("frames_missing", 0)
    assert "no frame at 0.0000 s, the next is at 0.2000 s" in refusal.detail


def test_a_picture_that_is_to_be_shown_turned_is_refused(root):
    path = v21_video(root, 0)
    write(path, pictures())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12: the header of a track ends with 36 bytes of matrix
    quarter_turn = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in quarter_turn)
    path.write_bytes(content)
    (refusal,) = read(root)[1]
    assert (refusal.reason, refusal.frame) == ("video_rotated", 0)


@pytest.mark.parametrize("size", [(SIZE[0], SIZE[1] + 2), (SIZE[1], SIZE[0]), (1080, 1920)])
def test_pictures_of_another_size_than_declared_are_refused(root, size):
    write(v21_video(root, 0), pictures(height=size[0], width=size[1]))
    (refusal,) = read(root)[1]
    assert (refusal.reason, refusal.frame) == ("frame_size", 0)
    assert f"{size[0]}x{size[1]}, declared 96x128" in refusal.detail


def test_a_size_that_grows_in_midstream_is_stopped_before_it_is_allocated(root, tmp_path):
    # the container announces the first size; raw h264 laid end to end brings another one
    halves = []
    for name, (height, width) in (("small", SIZE), ("large", (720, 1280))):
        write(tmp_path / name, pictures(6, height=height, width=width), container_format="h264", bf=0)
        halves.append((tmp_path / name).read_bytes())
    (tmp_path / "joined").write_bytes(b"".join(halves))
    with (
        av.open(str(tmp_path / "joined"), format="h264") as source,
        av.open(str(v21_video(root, 0)), "w", format="matroska") as target,
    ):
        stream: Any = target.add_stream_from_template(source.streams.video[0])
        number = 0
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, FPS), stream
                target.mux(packet)
                number += 1
    (refusal,) = read(root)[1]
    # without the bound it would be decoded, and refused as frame_size after the allocation
    assert (refusal.reason, refusal.frame) == ("video_unreadable", 6)


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile other.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
        b"",
        b"no video",
    ],
)
def test_a_playlist_or_script_in_place_of_a_video_leads_nowhere(root, content):
    write(v21_video(root, 0).with_name("other.mp4"), pictures())
    v21_video(root, 0).write_bytes(content)
    assert [(r.reason, r.frame) for r in read(root)[1]] == [("video_unreadable", 0)]


def test_a_file_with_sound_alone_is_refused(root):
    with av.open(str(v21_video(root, 0)), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    (refusal,) = read(root)[1]
    assert (refusal.reason, refusal.detail.partition(": ")[2]) == ("video_unreadable", "no video stream")


def test_two_cameras_are_read_side_by_side_and_one_that_fails_names_itself(root):
    wrist = "observation.images.wrist"
    change_features(root, **{wrist: {"dtype": "video", "shape": [3, *SIZE], "names": ["channels", "y", "x"]}})
    write(v21_video(root, 0), pictures())
    second = Path(str(v21_video(root, 0)).replace(CAMERA, wrist))
    second.parent.mkdir(parents=True)
    write(second, pictures()[::-1])
    episodes, refusals = read(root)
    assert refusals == []
    assert {name: frames[0].mean() > 90 for name, frames in episodes["0"][1].items()} == {
        CAMERA: False,
        wrist: True,
    }
    write(second, pictures(11))
    assert [(r.camera, r.reason, r.frame) for r in read(root)[1]] == [(wrist, "frames_missing", 11)]


# --- episodes that share a file ---


@pytest.mark.parametrize("encoding", [{"g": 250, "bf": 3}, {"g": 7, "bf": 2, "x264-params": "open-gop=1"}])
def test_a_clip_may_begin_anywhere_between_two_key_frames(tmp_path, encoding):
    lengths = {0: 12, 1: 15, 4: 9}
    root = write_v30(tmp_path / "v30", lengths)
    frames = np.concatenate([frames_of(episode, length) for episode, length in lengths.items()])
    path = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    write(path, frames, pix_fmt="yuv444p", qp=0, **encoding)
    whole = decoded(path)
    for units, start, stop in (([1], 12, 27), ([2], 27, 36)):
        episodes, refusals = read(root, units=units)
        assert refusals == []
        ((_, cameras),) = episodes.values()
        np.testing.assert_array_equal(cameras[CAMERA], whole[start:stop])


def test_hevc_with_open_groups_of_pictures_is_sought_in_exactly(tmp_path):
    root = write_v30(tmp_path / "v30", {0: 20, 1: 20})
    camera = {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channels"]}
    change_features(root, **{CAMERA: camera})
    path = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    frames = np.concatenate([pictures(20) % 251, pictures(20)[::-1] % 251])
    params: Any = {"x265-params": "log-level=none:open-gop=1:keyint=6:bframes=3"}
    write(path, frames, codec="libx265", **params)
    ((_, cameras),) = read(root, units=[1])[0].values()
    np.testing.assert_array_equal(cameras[CAMERA], decoded(path)[20:])


def test_a_clip_that_lies_a_little_off_its_place_keeps_its_frames(tmp_path):
    root = write_v30(tmp_path / "v30", {0: 12, 1: 15})
    table = root / "meta/episodes/chunk-000/file-000.parquet"
    for end, value in (("from", 1.23), ("to", 2.73)):  # 30 ms late, as after remuxing
        edit(table, lambda t, end=end, value=value: replaced(t, f"{CLIP}/{end}_timestamp", [0.0, value]))
    edit(table, lambda t: replaced(t, f"{CLIP}/to_timestamp", [1.2, 2.73]))
    episodes, refusals = read(root)
    assert refusals == []
    assert np.abs(episodes["1"][1][CAMERA].astype(int) - frames_of(1, 15)).max() <= 4


def test_a_declared_size_that_no_frame_has_refuses_every_episode_and_stops_none(tmp_path):
    root = write_v30(tmp_path / "v30", {0: 12, 1: 15})
    camera = {"dtype": "video", "shape": [HEIGHT, WIDTH + 16, 3], "names": ["height", "width", "channels"]}
    change_features(root, **{CAMERA: camera})
    assert [(r.episode, r.reason) for r in read(root)[1]] == [("0", "frame_size"), ("1", "frame_size")]
