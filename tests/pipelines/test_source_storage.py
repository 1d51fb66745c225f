"""Where a dataset may lie: a folder with links, the Hub's cache, an S3 server. No Ray, no network."""

import io
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from lerobot_toy import CAMERA, read, v21_rows, v21_video, write_v21, write_v30
from moto.server import ThreadedMotoServer

from pipelines.sources.lerobot import LeRobotSource
from pipelines.sources.storage import BLOCK_BYTES, StorageError, folder_of

LENGTHS = {0: 12, 1: 15}


@pytest.fixture(scope="module")
def v21(tmp_path_factory):
    return write_v21(tmp_path_factory.mktemp("v21"), LENGTHS)


def same(found, expected):
    """Compare what `read` returned."""
    (episodes, refusals), (others, none) = found, expected
    assert refusals == none == []
    assert episodes.keys() == others.keys()
    for name, (_, frames) in episodes.items():
        np.testing.assert_array_equal(frames[CAMERA], others[name][1][CAMERA])


# --- links ---


def test_links_within_the_dataset_are_followed(v21, tmp_path):
    root = Path(shutil.copytree(v21, tmp_path / "copy"))
    v21_video(root, 0).rename(root / "elsewhere.mp4")
    v21_video(root, 0).symlink_to(root / "elsewhere.mp4")
    same(read(root), read(v21))


@pytest.mark.parametrize(
    "of", [lambda r: r / "meta/info.json", lambda r: v21_rows(r, 0), lambda r: r / "clips"]
)
def test_links_out_of_the_dataset_are_refused_unless_the_user_trusts_them(v21, tmp_path, of):
    root = Path(shutil.copytree(v21, tmp_path / "copy"))
    of(root).rename(tmp_path / "outside")
    of(root).symlink_to(tmp_path / "outside")
    with pytest.raises(
        ValueError, match=r"is a link out of the dataset, to .*outside.*; --follow_links true"
    ):
        LeRobotSource(uri=str(root)).listing()
    same(read(root, follow_links=True), read(v21))


def test_a_link_to_itself_and_a_named_pipe_are_missing_files(v21, tmp_path):
    root = Path(shutil.copytree(v21, tmp_path / "copy"))
    v21_video(root, 0).unlink()
    v21_video(root, 0).symlink_to(v21_video(root, 0))
    v21_rows(root, 1).unlink()
    os.mkfifo(v21_rows(root, 1))
    assert [(r.episode, r.reason) for r in read(root)[1]] == [("0", "video_missing"), ("1", "data_missing")]


# --- the Hub's cache ---


@pytest.fixture
def hub(v21, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: every file of a snapshot is a link into blobs/."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "hub/datasets--lab--towels"
    for revision, commit in (("main", "a" * 40), ("v2.1", "b" * 40)):
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / revision).write_text(commit)
        for path in (path for path in v21.rglob("*") if path.is_file()):
            blob = home / "blobs" / str(abs(hash(path)))
            link = home / "snapshots" / commit / path.relative_to(v21)
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return home


@pytest.mark.parametrize("name", ["lab/towels", "lab/towels@v2.1"])
def test_a_hub_id_is_read_from_the_cache_when_offline(hub, v21, name):
    same(read(name), read(v21))
    listing = LeRobotSource(uri=name).listing()
    assert listing.location == name
    assert listing.identity == LeRobotSource(uri=str(v21)).listing().identity


def test_a_snapshot_of_the_cache_is_read_as_a_folder_too(hub, v21):
    same(read(hub / "snapshots" / ("a" * 40)), read(v21))


def test_a_folder_goes_before_a_hub_id_of_the_same_form(hub, v21, tmp_path):
    shutil.copytree(v21, tmp_path / "lab/towels")
    assert folder_of("lab/towels").root == str(tmp_path / "lab/towels")


@pytest.mark.parametrize("name", ["lab/shirts", "lab/towels@v9", "data/pusht"])
def test_what_is_neither_a_folder_nor_cached_is_one_clear_error(hub, name):
    with pytest.raises(ValueError, match=re.escape(f"{name} is no folder here, and the Hub gives no such")):
        LeRobotSource(uri=name).listing()


@pytest.mark.parametrize("name", ["./towels", "../towels", "lab/towels/2", "towels"])
def test_a_path_is_never_taken_for_a_hub_id(hub, name):
    with pytest.raises(ValueError, match=r"meta/info\.json does not exist"):
        LeRobotSource(uri=name).listing()


def test_a_link_of_a_snapshot_may_not_leave_the_cache_of_its_dataset(hub, tmp_path):
    link = hub / "snapshots" / ("a" * 40) / "meta/info.json"
    (tmp_path / "outside.json").write_text("{}")
    link.unlink()
    link.symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match="is a link out of the dataset"):
        LeRobotSource(uri="lab/towels").listing()


# --- object stores ---


@pytest.fixture(scope="module")
def s3():
    """A server that speaks S3, and a bucket in it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        filesystem, _ = pafs.FileSystem.from_uri("s3://robots?allow_bucket_creation=true")
        filesystem.create_dir("robots")
        yield filesystem
    server.stop()


def uploaded(filesystem, root, name):
    pafs.copy_files(str(root), f"robots/{name}", destination_filesystem=filesystem)
    return f"s3://robots/{name}"


def test_a_dataset_in_s3_is_the_same_as_on_disk(s3, v21, tmp_path):
    images = write_v30(tmp_path / "images", LENGTHS, images=True)
    for name, root in (("v21", v21), ("v30", write_v30(tmp_path / "v30", LENGTHS)), ("images", images)):
        uri = uploaded(s3, root, name)
        same(read(uri), read(root))
        assert LeRobotSource(uri=uri).listing().identity == LeRobotSource(uri=str(root)).listing().identity


def test_a_worker_finds_the_server_that_the_driver_was_told_of(s3, v21, monkeypatch):
    source = LeRobotSource(uri=uploaded(s3, v21, "pickled"))
    units = source.listing().units
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (episode,) = pickle.loads(pickle.dumps(source)).episodes(units[:1])
    assert len(list(episode.cameras[CAMERA])) == 12


def test_what_is_missing_in_s3_is_missing_as_on_disk(s3, v21):
    uri = uploaded(s3, v21, "missing")
    s3.delete_file(f"robots/missing/{v21_video(v21, 0).relative_to(v21)}")
    s3.delete_file(f"robots/missing/{v21_rows(v21, 1).relative_to(v21)}")
    assert [(r.episode, r.reason) for r in read(uri)[1]] == [("0", "video_missing"), ("1", "data_missing")]
    with pytest.raises(ValueError, match=r"s3://robots/nothing/meta/info\.json does not exist"):
        LeRobotSource(uri="s3://robots/nothing/").listing()


def test_a_storage_that_fails_is_no_fault_of_an_episode(s3, v21):
    """Else an outage would be recorded as refusals, which a re-run keeps."""
    folder = folder_of(uploaded(s3, v21, "outage"))
    rows, video = (str(path.relative_to(v21)) for path in (v21_rows(v21, 0), v21_video(v21, 0)))
    streams = folder.open(rows), folder.open_ahead(video), folder.open("meta/info.json")
    for name in (rows, video, "meta/info.json"):  # gone after they were opened
        s3.delete_file(f"robots/outage/{name}")
    with pytest.raises(StorageError, match="s3://robots/outage/rows"):
        pq.ParquetFile(streams[0], pre_buffer=True).read()
    with pytest.raises(StorageError, match="s3://robots/outage/clips"):
        av.open(streams[1])
    with pytest.raises(StorageError, match=r"outage/meta/info\.json"):
        streams[2].read()


def test_small_reads_of_a_video_become_few_large_requests(s3):
    content = os.urandom(2 * BLOCK_BYTES + 7)
    with s3.open_output_stream("robots/large/video.mp4") as stream:
        stream.write(content)
    stream: Any = folder_of("s3://robots/large").open_ahead("video.mp4")
    positions = []
    while data := stream.read(100_000):
        assert data == content[stream.tell() - len(data) : stream.tell()]
        positions.append(stream.raw.tell())
    assert sorted(set(positions)) == [BLOCK_BYTES, 2 * BLOCK_BYTES, len(content)]
    stream.seek(-7, io.SEEK_END)  # where mp4 keeps its index
    assert stream.read() == content[-7:]
