"""The replay-buffer reader: v2 and v3, folder and zip, frames exact, everything broken refused by name."""

import itertools
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import boto3
import numcodecs
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
import zarr.codecs
from moto.server import ThreadedMotoServer
from PIL import Image

from jobs.ingest_zarr import IngestZarr
from jobs.ingest_zarr import main as ingest_zarr
from pipelines.dataset import open_dataset
from pipelines.ingestion import ingest
from pipelines.sources import Refusal, RefusedEpisodeError
from pipelines.sources.mapping import Part, SourceMapping
from pipelines.sources.zarr_buffer import ZarrSource
from pipelines.writer import WriterOptions

ENDS = (5, 17, 18, 30)  # ends within chunks of 7, and one episode of a single frame
CAMERA = "observation.images.img"
TASK = "push the T"


def toy_arrays():
    rng = np.random.default_rng(0)
    frame, y, x = np.mgrid[: ENDS[-1], :8, :12]
    img = np.stack([x * 9 + frame * 5, y * 11 + frame, x + y + frame * 3], axis=-1).astype(np.uint8)
    return {
        "img": img,
        "state": rng.standard_normal((ENDS[-1], 5)).astype(np.float32),
        "action": rng.standard_normal((ENDS[-1], 2)),
        "keypoint": rng.standard_normal((ENDS[-1], 9, 2)).astype(np.float32),
    }


ARRAYS = toy_arrays()


def write(root, *, arrays=ARRAYS, ends=ENDS, version: Any = 2, rows=7, **options):
    """Write a buffer with the real library; every chunk is stored, as diffusion-policy's Zarr 2 did."""
    options.setdefault("config", {"write_empty_chunks": True})
    buffer = zarr.open_group(root, mode="w", zarr_format=version)
    data, meta = buffer.create_group("data"), buffer.create_group("meta")
    for name, values in arrays.items():
        data.create_array(name, data=values, chunks=(rows, *values.shape[1:]), **options)
    meta.create_array("episode_ends", data=np.array(ends, np.int64), compressors=None)
    return root


def zipped(root, path):
    """As zarr's ZipStore: the entries are not compressed."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root))
    return path


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.zarr")


def source_of(root, **options):
    given: dict[str, Any] = {"fps": 10, "task": TASK}
    return ZarrSource(uri=str(root), **(given | options))


def read(root, **options):
    """All episodes with their frames, and all refusals."""
    source = source_of(root, **options)
    episodes, refusals = {}, []
    for item in source.episodes(source.listing().units):
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            episodes[item.name] = (item, {name: np.stack(list(f)) for name, f in item.cameras.items()})
        except RefusedEpisodeError as error:
            refusals.append(error.refusal)
    return episodes, refusals


def assert_is_toy(episodes):
    assert list(episodes) == ["0", "1", "2", "3"]
    for (episode, frames), (start, stop) in zip(
        episodes.values(), itertools.pairwise((0, *ENDS)), strict=True
    ):
        np.testing.assert_array_equal(episode.columns["observation.state"], ARRAYS["state"][start:stop])
        np.testing.assert_array_equal(
            episode.columns["action"], ARRAYS["action"][start:stop].astype(np.float32)
        )
        np.testing.assert_array_equal(frames[CAMERA], ARRAYS["img"][start:stop])
        assert episode.tasks == [TASK] * (stop - start)


# --- good data ---


def test_the_listing_tells_what_the_buffer_is(toy):
    listing = source_of(toy).listing()
    assert (listing.fps, listing.robot_type, listing.tasks) == (10, None, (TASK,))
    assert [(unit.name, unit.num_frames) for unit in listing.units] == [
        ("0", 5),
        ("1", 12),
        ("2", 1),
        ("3", 12),
    ]
    vector = {"dtype": "float32", "names": None}
    assert listing.features == {
        CAMERA: {"dtype": "image", "shape": [8, 12, 3], "names": ["height", "width", "channels"]},
        "observation.state": vector | {"shape": [5]},
        "action": vector | {"shape": [2]},
    }
    assert listing.warnings == ("left out: keypoint (float32 30x9x2)",)


@pytest.mark.parametrize(
    ("version", "compressors"),
    [
        (
            2,
            numcodecs.Blosc("lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE),
        ),  # diffusion-policy's default
        (2, numcodecs.Zlib()),
        (2, numcodecs.Zstd()),
        (2, None),
        (3, zarr.codecs.BloscCodec()),
        (3, zarr.codecs.ZstdCodec()),
        (3, zarr.codecs.GzipCodec()),
        (3, None),
    ],
)
def test_both_formats_and_all_usual_codecs_give_what_was_written(tmp_path, version, compressors):
    episodes, refusals = read(write(tmp_path / "b", version=version, compressors=compressors))
    assert refusals == []
    assert_is_toy(episodes)


@pytest.mark.parametrize("version", [2, 3])
def test_a_zip_file_gives_what_was_written(tmp_path, version):
    path = zipped(write(tmp_path / "b", version=version), tmp_path / "buffer.zarr.zip")
    shutil.rmtree(tmp_path / "b")
    assert_is_toy(read(path)[0])


def test_a_zip_file_is_found_relative_to_where_the_job_started(toy, tmp_path, monkeypatch):
    zipped(toy, tmp_path / "buffer.zarr.zip")
    monkeypatch.chdir(tmp_path)
    source = source_of("buffer.zarr.zip")
    units = source.listing().units
    monkeypatch.chdir("/")
    assert len(list(pickle.loads(pickle.dumps(source)).episodes(units))) == 4


def test_an_object_store_gives_what_was_written(toy, tmp_path):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        names = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **names)
        client.create_bucket(Bucket="robots")
        client.upload_file(str(zipped(toy, tmp_path / "t.zarr.zip")), "robots", "t.zarr.zip")
        for path in toy.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "robots", f"toy.zarr/{path.relative_to(toy)}")
        query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        for name in ("toy.zarr", "t.zarr.zip"):
            assert_is_toy(read(f"s3://a:b@robots/{name}?{query}")[0])
    finally:
        server.stop()


def test_frames_of_umi_are_read_where_its_codec_is_installed(tmp_path):
    codecs = pytest.importorskip("imagecodecs.numcodecs", reason="imagecodecs is not installed")
    codecs.register_codecs(verbose=False)
    root = write(tmp_path / "b")
    data = zarr.open_group(root, mode="a")["data"]
    assert isinstance(data, zarr.Group)
    codec = codecs.Jpegxl(lossless=True)
    data.create_array("img", data=ARRAYS["img"], chunks=(1, 8, 12, 3), compressors=codec, overwrite=True)
    assert_is_toy(read(root)[0])


def test_chunks_that_cut_frames_as_well_and_names_with_slashes_are_read(tmp_path):
    root = tmp_path / "b"
    for version in (2, 3):
        write(root, version=version)
        data = zarr.open_group(root, mode="a")["data"]
        assert isinstance(data, zarr.Group)
        encoding: Any = {
            "name": "v2" if version == 2 else "default",
            "separator": "/" if version == 2 else ".",
        }
        data.create_array(
            "img",
            shape=ARRAYS["img"].shape,
            dtype="uint8",
            chunks=(4, 5, 12, 2),
            chunk_key_encoding=encoding,
            overwrite=True,
            config={"write_empty_chunks": True},
        )[:] = ARRAYS["img"]
        episodes, refusals = read(root)
        assert refusals == []
        assert_is_toy(episodes)


def test_the_order_of_the_bytes_within_a_chunk_does_not_matter(tmp_path):
    arrays = ARRAYS | {"action": ARRAYS["action"].astype(">f8")}
    episodes, refusals = read(write(tmp_path / "b", arrays=arrays, order="F"))
    assert refusals == []
    assert_is_toy(episodes)


def test_a_worker_reads_any_units_in_any_order(toy):
    source = source_of(toy)
    units = source.listing().units
    items = [
        item for item in source.episodes([units[3], units[0], units[2]]) if not isinstance(item, Refusal)
    ]
    assert [item.name for item in items] == ["3", "0", "2"]
    np.testing.assert_array_equal(np.stack(list(items[0].cameras[CAMERA])), ARRAYS["img"][18:])


def test_a_mapping_names_and_cuts_the_arrays(toy):
    mapping = SourceMapping(
        state=(Part(key="keypoint", stop=3), Part(key="state", start=4)),
        cameras={"observation.images.top": "img"},
        task="from the file",
        fps=7,
        robot_type="xarm",
    )
    source = source_of(toy, mapping=mapping, fps=None, task=None)
    listing = source.listing()
    assert (listing.fps, listing.tasks, listing.robot_type) == (7, ("from the file",), "xarm")
    episode, frames = read(toy, mapping=mapping)[0]["1"]
    expected = np.concatenate(
        [ARRAYS["keypoint"].reshape(30, 18)[5:17, :3], ARRAYS["state"][5:17, 4:]], axis=1
    )
    np.testing.assert_array_equal(episode.columns["observation.state"], expected)
    assert list(frames) == ["observation.images.top"]


def test_a_single_number_becomes_a_column_without_a_second_axis(tmp_path):
    root = write(tmp_path / "b", arrays=ARRAYS | {"action": np.arange(30, dtype=np.int64)})
    episode, _ = read(root)[0]["1"]
    np.testing.assert_array_equal(episode.columns["action"], np.arange(5, 17, dtype=np.float32))


def test_the_identity_sees_a_changed_chunk_but_not_a_moved_buffer(toy, tmp_path):
    before = source_of(toy).listing().identity
    moved = toy.rename(tmp_path / "moved")
    assert source_of(moved).listing().identity == before
    assert source_of(moved, task="another").listing().identity != before
    (moved / "data/action/0.0").write_bytes(b"")
    assert source_of(moved).listing().identity != before


# --- cameras of floats ---


def test_whole_numbers_in_floats_are_pixels(tmp_path):
    root = write(tmp_path / "b", arrays=ARRAYS | {"img": ARRAYS["img"].astype(np.float32)})
    assert_is_toy(read(root)[0])
    assert (
        "img (float32 30x8x12x3) is stored in 8 bits: its whole numbers" in source_of(root).listing().warnings
    )


def test_numbers_in_0_to_1_are_pixels_of_255(tmp_path):
    root = write(tmp_path / "b", arrays=ARRAYS | {"img": ARRAYS["img"] / np.float32(255)})
    assert_is_toy(read(root)[0])
    assert "img (float32 30x8x12x3) is stored in 8 bits: round(255 x)" in source_of(root).listing().warnings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ARRAYS["img"] / 2.0, "these are neither"),
        (ARRAYS["img"] * 2.0, "these are neither"),
        (ARRAYS["img"] - 128.0, "these are neither"),
        (np.full(ARRAYS["img"].shape, np.nan), "these are neither"),
        ((ARRAYS["img"] > 128).astype(np.float32), "only 0 and 1, which may mean either"),
    ],
)
def test_floats_of_no_certain_range_are_one_clear_error(tmp_path, values, message):
    root = write(tmp_path / "b", arrays=ARRAYS | {"img": values})
    with pytest.raises(ValueError, match=message):
        source_of(root).listing()


@pytest.mark.parametrize("value", [0.5, -1, 256, np.nan, np.inf])
def test_a_frame_that_leaves_the_range_refuses_its_episode(tmp_path, value):
    frames = np.concatenate([ARRAYS["img"].astype(np.float32)] * 3)
    frames[70, 3, 3, 0] = value  # not among those looked at
    arrays = {name: np.concatenate([values] * 3) for name, values in ARRAYS.items()} | {"img": frames}
    ends = [end + 30 * turn for turn in range(3) for end in ENDS]
    episodes, refusals = read(write(tmp_path / "b", arrays=arrays, ends=ends))
    assert len(episodes) == 11
    assert [(r.episode, r.reason, r.camera, r.frame) for r in refusals] == [("9", "pixel_values", CAMERA, 5)]


# --- broken episodes ---


@pytest.mark.parametrize(
    ("chunk", "refused"),
    [
        ("img/1.0.0.0", [("1", 2)]),  # frames 7..13
        ("img/2.0.0.0", [("1", 9), ("2", 0), ("3", 0)]),  # frames 14..20
        ("action/4.0", [("3", 10)]),
        ("state/0.0", [("0", 0), ("1", 0)]),
    ],
)
def test_a_chunk_that_is_not_stored_refuses_its_episodes_unless_zeros_are_wanted(toy, chunk, refused):
    (toy / "data" / chunk).unlink()
    episodes, refusals = read(toy)
    assert [(r.episode, r.frame) for r in refusals] == refused
    assert {r.reason for r in refusals} == {"chunk_missing"}
    assert len(episodes) == 4 - len(refused)
    episodes, refusals = read(toy, missing_chunks="fill")
    assert (len(episodes), refusals) == (4, [])
    key = chunk.partition("/")[0]
    if key == "img":
        frames = np.concatenate([frames[CAMERA] for _, frames in episodes.values()])
        first = int(chunk.split("/")[1][0]) * 7
        assert not frames[first : first + 7].any()
        assert frames[:first].any()


def test_zeros_that_zarr_3_leaves_out_need_the_users_word(tmp_path):
    arrays = ARRAYS | {"action": np.zeros((30, 2), np.float32)}
    root = write(tmp_path / "b", arrays=arrays, config={"write_empty_chunks": False})
    assert {r.reason for r in read(root)[1]} == {"chunk_missing"}
    episodes, refusals = read(root, missing_chunks="fill")
    assert refusals == []
    assert not np.concatenate([episode.columns["action"] for episode, _ in episodes.values()]).any()


WITH_CHECKSUM = [
    numcodecs.Zlib(),
    numcodecs.GZip(),
    numcodecs.BZ2(),
    numcodecs.LZMA(),
    numcodecs.Zstd(checksum=True),
]
WITHOUT_CHECKSUM = [
    numcodecs.Blosc(),
    numcodecs.Blosc(clevel=0),  # stored as it is: c-blosc would return what lies behind the end
    numcodecs.LZ4(),
    None,
]


@pytest.mark.parametrize(
    ("compressor", "damage"),
    [
        *itertools.product(WITH_CHECKSUM, ("cut", "flipped", "emptied")),
        *itertools.product(WITHOUT_CHECKSUM, ("cut", "emptied")),
    ],
)
def test_a_damaged_chunk_refuses_its_episodes(tmp_path, compressor, damage):
    root = write(tmp_path / "b", compressors=compressor)
    chunk = root / "data/img/3.0.0.0"  # frames 21..27
    data = chunk.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    chunk.write_bytes({"cut": data[:middle], "flipped": flipped, "emptied": b""}[damage])
    episodes, refusals = read(root)
    assert list(episodes) == ["0", "1", "2"]
    assert [(r.episode, r.reason, r.camera, r.frame) for r in refusals] == [
        ("3", "chunk_unreadable", CAMERA, 3)
    ]


def test_a_damaged_chunk_of_a_vector_refuses_its_episodes(toy):
    (toy / "data/action/0.0").write_bytes(b"\0" * 30)
    assert [(r.episode, r.reason) for r in read(toy)[1]] == [
        ("0", "chunk_unreadable"),
        ("1", "chunk_unreadable"),
    ]


def test_an_episode_that_declares_too_much_is_refused_before_it_is_allocated(toy):
    length = 10**15
    for name in ("img", "state", "action"):
        change(toy / f"data/{name}/.zarray", shape=[length, *ARRAYS[name].shape[1:]])
    ends = toy / "meta/episode_ends"
    (ends / next(p.name for p in ends.iterdir() if p.name == "0")).write_bytes(
        np.array([5, 17, 18, length], "<i8").tobytes()
    )
    episodes, refusals = read(toy)
    assert (list(episodes), [(r.episode, r.reason) for r in refusals]) == (
        ["0", "1", "2"],
        [("3", "chunk_missing")],
    )
    assert [(r.episode, r.reason) for r in read(toy, missing_chunks="fill")[1]] == [("3", "too_large")]


# --- what makes the whole buffer unusable ---


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename_array(root, name, new):
    (root / f"data/{name}").rename(root / f"data/{new}")


def replace_ends(root, ends):
    zarr.open_group(root / "meta", mode="a").create_array("episode_ends", data=np.array(ends), overwrite=True)


def compressed_with(root, name, codec, *, filters=None):
    change(root / f"data/{name}/.zarray", compressor={"id": codec}, filters=filters)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "data"), "no arrays in data/"),
        (lambda r: shutil.rmtree(r / "meta"), "no meta/episode_ends, so this is no replay buffer"),
        (
            lambda r: shutil.rmtree(r / "data/img"),
            "no camera, that is frames x height x width x 3, among action",
        ),
        (
            lambda r: rename_array(r, "state", "pose"),
            "nothing for observation.state: no 'state' or 'robot_eef",
        ),
        (
            lambda r: rename_array(r, "action", "act"),
            "numbers (width): act (2), img (288), keypoint (18), state (5)",
        ),
        (lambda r: replace_ends(r, [5, 17, 17, 30]), "not increasing: entry 2 is 17 after 17"),
        (lambda r: replace_ends(r, [-5, 30]), "not increasing: entry 0 is -5 after 0"),
        (lambda r: replace_ends(r, [5, 17, 29]), "meta/episode_ends ends with 29, data/state has 30 frames"),
        (lambda r: replace_ends(r, [5.0, 30.0]), "is no list of 1 to"),
        (lambda r: replace_ends(r, np.zeros(0, int)), "is no list of 1 to"),
        (lambda r: (r / "meta/episode_ends/0").write_bytes(b"xx"), "meta/episode_ends cannot be read"),
        (lambda r: (r / "data/img/.zarray").write_text("{"), "data/img/.zarray: not JSON"),
        (lambda r: (r / "data/img/.zarray").write_text("[]"), "data/img/.zarray: not a JSON object"),
        (lambda r: (r / "data/img/.zarray").write_text("{}"), "data/img/.zarray: KeyError 'shape'"),
        (lambda r: change(r / "data/img/.zarray", shape="x"), "'x' is no list of sizes"),
        (lambda r: change(r / "data/img/.zarray", chunks=[7, 8]), "chunks [7, 8] do not fit the shape"),
        (lambda r: change(r / "data/img/.zarray", chunks=[0, 8, 12, 3]), "chunks [0, 8, 12, 3] do not fit"),
        (
            lambda r: change(r / "data/img/.zarray", chunks=[2**40, 8, 12, 3]),
            "frames takes 316659348799488 bytes",
        ),
        (lambda r: change(r / "data/img/.zarray", fill_value=1000), "data/img cannot be opened"),
        (
            lambda r: change(r / "data/img/.zarray", dimension_separator=1),
            "1 separates the numbers of a chunk",
        ),
        (lambda r: change(r / "data/img/.zarray", shape=[30, 2**60, 12, 3]), "are more than"),
        (lambda r: change(r / "data/action/.zarray", dtype="|O"), "data/action has dtype 'object'"),
        (lambda r: compressed_with(r, "action", "pickle"), "data/action is compressed with 'pickle'"),
        (lambda r: compressed_with(r, "img", None, filters=[{"id": "pickle"}]), "compressed with 'pickle'"),
        (lambda r: compressed_with(r, "img", "vlen-bytes"), "data/img is compressed with 'vlen-bytes'"),
    ],
)
def test_an_unusable_buffer_is_one_clear_error(toy, damage, message):
    damage(toy)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        source_of(toy).listing()
    assert str(toy) in str(error.value)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_an_array_that_is_left_out_is_never_loaded(toy, tmp_path):
    trace = tmp_path / "unpickled"
    data = zarr.open_group(toy, mode="a")["data"]
    assert isinstance(data, zarr.Group)
    data.create_array("extra", data=np.zeros(30, np.uint8), chunks=(30,), compressors=None)
    change(toy / "data/extra/.zarray", dtype="|O", filters=[{"id": "pickle"}], fill_value=None)
    (toy / "data/extra/0").write_bytes(pickle.dumps(np.array([Bomb(trace)] * 30)))
    listing = source_of(toy).listing()
    assert listing.warnings == ("left out: extra (object 30), keypoint (float32 30x9x2)",)
    assert_is_toy(read(toy)[0])
    assert not trace.exists()
    pickle.loads((toy / "data/extra/0").read_bytes())
    assert trace.exists()  # so it would have shown


def test_a_missing_image_codec_is_named(toy, monkeypatch):
    compressed_with(toy, "img", "imagecodecs_jpegxl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="data/img is compressed with 'imagecodecs_jpegxl': pip install imagecodecs"
    ):
        source_of(toy).listing()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": None}, "give --fps (pusht has 10)"),
        ({"fps": 0}, "fps 0"),
        ({"task": None}, "give --task"),
        ({"missing_chunks": "zero"}, "missing_chunks 'zero' is none of refuse, fill"),
        ({"mapping": SourceMapping(state=(Part(key="stat"),))}, "no key 'stat'; did you mean 'state'?"),
        ({"mapping": SourceMapping(action=(Part(key="action", stop=3),))}, "[0:3] does not lie within its 2"),
        ({"mapping": SourceMapping(cameras={"observation.images.a": "keypoint"})}, "no key 'keypoint'"),
    ],
)
def test_wrong_options_are_one_clear_error(toy, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        source_of(toy, **options).listing()


def test_a_file_that_is_no_zip_is_one_clear_error(tmp_path):
    (tmp_path / "b.zarr.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"b\.zarr\.zip: is no zip file"):
        source_of(tmp_path / "b.zarr.zip").listing()
    with pytest.raises(ValueError, match=r"none\.zip: does not exist"):
        source_of(tmp_path / "none.zip").listing()


def test_a_chunk_that_is_a_link_out_of_the_folder_is_not_read(toy, tmp_path):
    chunk = toy / "data/img/0.0.0.0"
    outside = chunk.rename(tmp_path / "outside")
    chunk.symlink_to(outside)
    refusals = read(toy)[1]
    assert [(r.episode, r.reason) for r in refusals] == [("0", "chunk_unreadable"), ("1", "chunk_unreadable")]
    assert "link out of the dataset" in refusals[0].detail
    assert_is_toy(read(toy, follow_links=True)[0])


# --- on Ray ---


def test_a_buffer_becomes_a_dataset_on_ray(ray_session, toy, tmp_path):
    report = ingest(
        source_of(zipped(toy, tmp_path / "toy.zarr.zip")),
        str(tmp_path / "out"),
        options=WriterOptions(image_format="png"),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )
    assert (report["episodes"], report["frames"], report["refused"]) == (4, 30, {})
    dataset = open_dataset(str(tmp_path / "out"))
    assert (dataset.fps, dataset.tasks, dataset.episode_length.tolist()) == (10, (TASK,), [5, 12, 1, 12])
    rows = pq.read_table(tmp_path / "out" / dataset.files[0]).to_pydict()
    np.testing.assert_array_equal(np.array(rows["observation.state"], np.float32), ARRAYS["state"])
    np.testing.assert_array_equal(np.array(rows["action"], np.float32), ARRAYS["action"].astype(np.float32))
    for row, frame in zip(rows[CAMERA], ARRAYS["img"], strict=True):
        image = tmp_path / "frame.png"
        image.write_bytes(row["bytes"])
        with Image.open(image) as stored:
            np.testing.assert_array_equal(np.asarray(stored), frame)


def test_wrong_flags_are_one_line(toy, tmp_path, capsys):
    for change_, message in (
        ({"fps": None}, "give --fps"),
        ({"task": None}, "give --task"),
        ({"missing_chunks": "skip"}, "missing_chunks 'skip'"),
        ({"mapping": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ):
        flags: dict[str, Any] = {
            "source": str(toy),
            "output": str(tmp_path / "out"),
            "fps": 10,
            "task": TASK,
        } | change_
        with pytest.raises(SystemExit) as error:
            ingest_zarr(IngestZarr(**flags))
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
