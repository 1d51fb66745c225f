"""The RLDS reader: records as TFDS writes them, every checksum checked, everything broken refused by name."""

import io
import json
import re
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import cv2
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from jobs.ingest_rlds import IngestRlds
from jobs.ingest_rlds import main as ingest_rlds
from pipelines.dataset import open_dataset
from pipelines.ingestion import ingest
from pipelines.sources import Episode, Refusal, RefusedEpisodeError
from pipelines.sources.mapping import Part, SourceMapping
from pipelines.sources.rlds import RldsSource
from pipelines.sources.tfrecord import masked_crc
from pipelines.writer import WriterOptions, layout_of, stage_part

BRIDGE = Path(__file__).parents[3] / "shared/data/bridge_rlds"
HEIGHT, WIDTH = 8, 12
IMAGE, STATE = "observation/image", "observation/state"

# --- a toy dataset, written byte by byte: a message built as in the reader would only agree with itself


def varint(number):
    out = bytearray()
    number &= 2**64 - 1
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, payload):
    """A length-delimited field of protobuf."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(values):
    """A tf.Feature: bytes, floats (packed) or integers (packed)."""
    if not isinstance(values, np.ndarray):
        return field(1, b"".join(field(1, value) for value in values))
    flat = values.reshape(-1)
    if flat.dtype.kind == "f":
        return field(2, field(1, flat.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in flat)))


def example(features):
    entries = [field(1, name.encode()) + field(2, feature(values)) for name, values in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def declared(kind, **content):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind.lower()}_feature.{kind}", **content}


def tensor(*shape, dtype: Any = "float32", encoding="none"):
    dimensions = {"dimensions": [str(side) for side in shape]} if shape else {}
    return declared("Tensor", tensor={"shape": dimensions, "dtype": dtype, "encoding": encoding})


def image(*shape, dtype="uint8"):
    content = {
        "shape": {"dimensions": [str(side) for side in shape]},
        "dtype": dtype,
        "encodingFormat": "png",
    }
    return declared("Image", image=content)


def nested(features):
    """{"observation/state": ...} as FeaturesDicts within each other."""
    tree = {}
    for path, leaf in features.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, declared("FeaturesDict", featuresDict={"features": {}}))
            node = node["featuresDict"]["features"]
        node[name] = leaf
    return declared("FeaturesDict", featuresDict={"features": tree})


STEPS = {
    IMAGE: image(HEIGHT, WIDTH, 3),
    "observation/depth": image(HEIGHT, WIDTH, 1, dtype="uint16"),
    STATE: tensor(3),
    "action": tensor(2),
    "reward": tensor(),
    "language_instruction": declared("Text", text={}),
    "is_first": tensor(dtype="bool"),
    "is_last": tensor(dtype="bool"),
}


def picture(number, step, mode="RGB"):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 9 + step * 5, y * 11 + number * 20, x + y + step], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).convert(mode))


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def record(number, length):
    """The features of one toy episode."""
    rng = np.random.default_rng(number)
    steps = np.arange(length)
    return {
        f"steps/{IMAGE}": [png(picture(number, step)) for step in steps],
        "steps/observation/depth": [b"-"] * length,
        f"steps/{STATE}": rng.standard_normal((length, 3)).astype(np.float32),
        "steps/action": rng.standard_normal((length, 2)).astype(np.float32),
        "steps/reward": np.zeros(length, np.float32),
        "steps/language_instruction": [b"lift it" if step < 2 else b"" for step in steps],
        "steps/is_first": (steps == 0).astype(int),
        "steps/is_last": (steps == length - 1).astype(int),
        "episode_metadata/file_path": [b"somewhere"],
    }


LENGTHS = (4, 6, 3, 5)


def write(root, shards, *, steps=STEPS, info=None):
    """Write {"train": [[record, ...] of a shard, ...]} as TFDS would."""
    root.mkdir(parents=True, exist_ok=True)
    splits = [
        {"name": split, "shardLengths": [str(len(records)) for records in files], "numBytes": "0"}
        for split, files in shards.items()
    ]
    about = {"name": "toy", "version": "1.0.0", "fileFormat": "tfrecord", "splits": splits} | (info or {})
    (root / "dataset_info.json").write_text(json.dumps(about))
    dataset = declared("Dataset", sequence={"feature": nested(steps), "length": "-1"})
    features = declared("FeaturesDict", featuresDict={"features": {"steps": dataset}})
    (root / "features.json").write_text(json.dumps(features))
    for split, files in shards.items():
        for number, records in enumerate(files):
            data = b"".join(framed(example(content)) for content in records)
            (root / f"toy-{split}.tfrecord-{number:05d}-of-{len(files):05d}").write_bytes(data)
    return root


@pytest.fixture
def toy(tmp_path):
    """Two shards of train with the episodes 0, 1 and 2, one of val with the episode 3."""
    episodes = [record(number, length) for number, length in enumerate(LENGTHS)]
    return write(tmp_path / "toy/1.0.0", {"train": [episodes[:2], episodes[2:3]], "val": [episodes[3:]]})


def one_shard(tmp_path, records, **options):
    return write(tmp_path / "one", {"train": [records]}, **options)


def shard_of(root):
    return root / "toy-train.tfrecord-00000-of-00001"


def source_of(root, **options):
    given: dict[str, Any] = {"fps": 5}
    return RldsSource(uri=str(root), **(given | options))


def read(root, **options):
    """All episodes with their images, and all refusals."""
    source = source_of(root, **options)
    episodes, refusals = {}, []
    for item in source.episodes(source.listing().units):
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            given = {**item.cameras, **item.encoded_cameras}
            cameras = {name: list(images) for name, images in given.items()}
            episodes[item.name] = (item, cameras)
        except RefusedEpisodeError as error:
            refusals.append(error.refusal)
    return episodes, refusals


def staged(root, tmp_path, **options):
    """What the writer makes of all episodes: records and refusals."""
    source = source_of(root, **options)
    listing = source.listing()
    layout = layout_of(str(tmp_path / "out"), listing, WriterOptions())
    outcome = stage_part(source.episodes(listing.units), layout, part=0)
    refusals = [(refusal["episode"], refusal["reason"], refusal["frame"]) for refusal in outcome["refusals"]]
    return [episode["name"] for episode in outcome["episodes"]], refusals


def offsets_of(path):
    """Where each record of a file begins, and the file's end."""
    data, offsets = path.read_bytes(), [0]
    while offsets[-1] < len(data):
        offsets.append(offsets[-1] + 16 + struct.unpack_from("<Q", data, offsets[-1])[0])
    return offsets


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- good data ---


def test_the_checksum_is_the_one_that_tfrecord_documents():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) % 2**32


def test_the_listing_tells_what_the_dataset_is(toy):
    listing = source_of(toy).listing()
    assert (listing.fps, listing.robot_type, listing.tasks) == (5, None, ())
    assert [unit.name for unit in listing.units] == ["train/0", "train/1", "train/2", "val/0"]
    vector = {"dtype": "float32", "names": None}
    assert listing.features == {
        "observation.images.image": {
            "dtype": "image",
            "shape": [HEIGHT, WIDTH, 3],
            "names": ["height", "width", "channels"],
        },
        "observation.state": vector | {"shape": [3]},
        "action": vector | {"shape": [2]},
    }
    assert listing.warnings == (
        "splits train, val are read as one dataset; --split chooses",
        "left out of every step: observation/depth (image uint16 8x12x1), reward (tensor float32)",
    )


def test_episodes_are_what_was_written(toy):
    episodes, refusals = read(toy)
    assert refusals == []
    assert list(episodes) == ["train/0", "train/1", "train/2", "val/0"]
    for number, (episode, cameras) in enumerate(episodes.values()):
        written = record(number, LENGTHS[number])
        np.testing.assert_array_equal(episode.columns["observation.state"], written[f"steps/{STATE}"])
        np.testing.assert_array_equal(episode.columns["action"], written["steps/action"])
        assert cameras == {"observation.images.image": written[f"steps/{IMAGE}"]}
        # the instruction of every step, the empty ones as they are
        assert episode.tasks == ["lift it"] * 2 + [""] * (LENGTHS[number] - 2)
        assert episode.notes == {}


def test_a_worker_reads_any_units_in_any_order(toy):
    source = source_of(toy)
    units = source.listing().units
    items = list(source.episodes([units[3], units[0], units[2]]))
    assert [item.name for item in items if isinstance(item, Episode)] == ["val/0", "train/0", "train/2"]


def test_the_folder_above_will_do_if_it_holds_one_version(toy):
    assert source_of(toy.parent).listing().units == source_of(toy).listing().units
    other = toy.parent / "2.0.0"
    other.mkdir()
    (other / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several datasets or versions, give one of them: 1\.0\.0, 2\.0\.0"):
        source_of(toy.parent).listing()


def test_an_object_store_gives_what_was_written(toy):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        names = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **names)
        client.create_bucket(Bucket="robots")
        for path in toy.iterdir():
            client.upload_file(str(path), "robots", f"toy/1.0.0/{path.name}")
        query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        uri = f"s3://a:b@robots/toy?{query}"
        assert source_of(uri).listing().location == f"s3://a:b@robots/toy/1.0.0?{query}"
        there, refusals = read(uri)
        assert refusals == []
        for name, (episode, cameras) in read(toy)[0].items():
            assert there[name][1] == cameras
            np.testing.assert_array_equal(there[name][0].columns["action"], episode.columns["action"])
    finally:
        server.stop()


def test_splits_are_chosen_by_name(toy):
    listing = source_of(toy, splits=("val",)).listing()
    assert [unit.name for unit in listing.units] == ["val/0"]
    assert not any("splits" in warning for warning in listing.warnings)
    with pytest.raises(ValueError, match="split 'test' is none of train, val"):
        source_of(toy, splits=("test",)).listing()


def test_shards_are_found_by_their_template(tmp_path):
    template = "{SPLIT}/{SHARD_INDEX}of{NUM_SHARDS}.{FILEFORMAT}"
    split = {"name": "train", "shardLengths": ["1"], "filepathTemplate": template}
    root = one_shard(tmp_path, [record(0, 3)], info={"splits": [split]})
    (root / "train").mkdir()
    shard_of(root).rename(root / "train/00000of00001.tfrecord")
    assert list(read(root)[0]) == ["train/0"]


def test_the_identity_sees_a_changed_record_but_not_a_moved_dataset(toy, tmp_path):
    before = source_of(toy).listing().identity
    moved = toy.rename(tmp_path / "moved")
    assert source_of(moved).listing().identity == before
    assert source_of(moved, fps=10).listing().identity != before
    shard = moved / "toy-val.tfrecord-00000-of-00001"
    shard.write_bytes(framed(example(record(3, 6))))
    assert source_of(moved).listing().identity != before


def test_scalars_become_columns_without_a_second_axis(tmp_path):
    steps = STEPS | {"action": tensor(), STATE: tensor(dtype="int32")}
    content = record(0, 3) | {
        "steps/action": np.array([0.5, 1.5, -2], np.float32),
        f"steps/{STATE}": np.array([3, -1, 2**31 - 1]),
    }
    episode, _ = read(one_shard(tmp_path, [content], steps=steps))[0]["train/0"]
    np.testing.assert_array_equal(episode.columns["action"], np.array([0.5, 1.5, -2], np.float32))
    np.testing.assert_array_equal(episode.columns["observation.state"], np.array([3, -1, 2**31], np.float32))


@pytest.mark.parametrize("encoding", ["bytes", "zlib"])
def test_tensors_that_tfds_packed_are_unpacked(tmp_path, encoding):
    pack = zlib.compress if encoding == "zlib" else bytes
    values = np.random.default_rng(0).standard_normal((3, 2)).astype("<f8")
    frames = np.stack([picture(0, step) for step in range(3)])
    steps = STEPS | {
        "action": tensor(2, dtype="float64", encoding=encoding),
        IMAGE: tensor(HEIGHT, WIDTH, 3, dtype="uint8", encoding=encoding),
    }
    content = record(0, 3) | {
        "steps/action": [pack(row.tobytes()) for row in values],
        f"steps/{IMAGE}": [pack(frame.tobytes()) for frame in frames],
    }
    episode, cameras = read(one_shard(tmp_path, [content], steps=steps))[0]["train/0"]
    np.testing.assert_array_equal(episode.columns["action"], values.astype(np.float32))
    np.testing.assert_array_equal(cameras["observation.images.image"], frames)


def test_images_of_undeclared_size_take_that_of_the_first_and_another_is_refused(tmp_path):
    odd = record(1, 3) | {f"steps/{IMAGE}": [png(picture(1, 0)), png(picture(1, 1)[:4]), png(picture(1, 2))]}
    root = one_shard(tmp_path, [record(0, 3), odd], steps=STEPS | {IMAGE: image(-1, -1, 3)})
    assert source_of(root).listing().features["observation.images.image"]["shape"] == [HEIGHT, WIDTH, 3]
    assert staged(root, tmp_path) == (["train/0"], [("train/1", "frame_size", 1)])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_that_are_not_plain_rgb_become_png_of_their_rgb_pixels(tmp_path, mode):
    stored = [io.BytesIO() for _ in range(3)]
    for step, out in enumerate(stored):
        Image.fromarray(picture(0, step)).convert(mode).save(out, "PNG")
    content = record(0, 3) | {f"steps/{IMAGE}": [out.getvalue() for out in stored]}
    _, cameras = read(one_shard(tmp_path, [content]))[0]["train/0"]
    for data, out in zip(cameras["observation.images.image"], stored, strict=True):
        with Image.open(io.BytesIO(data)) as found, Image.open(out) as expected:
            assert (found.format, found.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected.convert("RGB")))


def test_an_episode_that_was_cut_is_taken_and_noted(tmp_path):
    content = record(0, 3) | {"steps/is_last": np.zeros(3, int)}
    episode, _ = read(one_shard(tmp_path, [content]))[0]["train/0"]
    assert episode.notes == {"cut": "is_last is not set in the last step"}


def test_one_instruction_may_be_given_for_all(toy):
    for options in ({"task": "do it"}, {"mapping": SourceMapping(task="do it")}):
        source = source_of(toy, **options)
        assert source.listing().tasks == ("do it",)
        assert all(set(episode.tasks) == {"do it"} for episode, _ in read(toy, **options)[0].values())


def test_a_mapping_assembles_a_dictionary_of_actions(tmp_path):
    steps = {key: leaf for key, leaf in STEPS.items() if key not in ("action", "language_instruction")} | {
        "action/world_vector": tensor(3),
        "action/gripper": tensor(),
        "observation/told": declared("Tensor", tensor={"shape": {}, "dtype": "string"}),
    }
    content = {key: value for key, value in record(0, 3).items() if "action" not in key}
    world = np.arange(9, dtype=np.float32).reshape(3, 3)
    content |= {
        "steps/action/world_vector": world,
        "steps/action/gripper": np.array([0.5, 0.25, 1], np.float32),
        "steps/observation/told": ["stapeln übt".encode()] * 3,
    }
    root = one_shard(tmp_path, [content], steps=steps)
    with pytest.raises(
        ValueError, match=r"nothing for action.*action/world_vector \(3\), action/gripper \(1\)"
    ):
        source_of(root).listing()
    mapping = SourceMapping(
        action=(Part(key="action/gripper"), Part(key="action/world_vector", start=1)),
        cameras={"observation.images.top": IMAGE},
        task_key="observation/told",
        fps=3,
    )
    source = source_of(root, mapping=mapping, fps=None)
    assert source.listing().fps == 3
    episode, cameras = read(root, mapping=mapping)[0]["train/0"]
    expected = np.array([[0.5, 1, 2], [0.25, 4, 5], [1, 7, 8]], np.float32)
    np.testing.assert_array_equal(episode.columns["action"], expected)
    assert (set(episode.tasks), list(cameras)) == ({"stapeln übt"}, ["observation.images.top"])


# --- broken files: what is found is read, what is declared is counted ---


def test_a_flipped_bit_in_a_record_refuses_that_record(tmp_path):
    root = one_shard(tmp_path, [record(number, 3) for number in range(4)])
    flip(shard_of(root), offsets_of(shard_of(root))[1] + 12 + 40)
    episodes, refusals = read(root)
    assert list(episodes) == ["train/0", "train/2", "train/3"]
    assert [(refusal.episode, refusal.reason) for refusal in refusals] == [("train/1", "crc_mismatch")]
    assert shard_of(root).name in refusals[0].detail


def test_a_flipped_bit_in_a_checksum_refuses_that_record(tmp_path):
    root = one_shard(tmp_path, [record(number, 3) for number in range(2)])
    flip(shard_of(root), offsets_of(shard_of(root))[1] - 1)
    assert [(r.episode, r.reason) for r in read(root)[1]] == [("train/0", "crc_mismatch")]


@pytest.mark.parametrize("byte", [0, 5, 8])
def test_behind_a_damaged_length_every_declared_record_is_refused(tmp_path, byte):
    root = one_shard(tmp_path, [record(number, 3) for number in range(4)])
    flip(shard_of(root), offsets_of(shard_of(root))[1] + byte)
    episodes, refusals = read(root)
    assert list(episodes) == ["train/0"]
    assert [(refusal.episode, refusal.reason) for refusal in refusals] == [
        ("train/1", "crc_mismatch"),
        ("train/2", "record_unreachable"),
        ("train/3", "record_unreachable"),
    ]


@pytest.mark.parametrize("kept", [5, 12, 100, -1])
def test_a_truncated_file_refuses_what_it_lost(tmp_path, kept):
    """Cut within the header, behind it, within the data, and within the checksum of record 1."""
    root = one_shard(tmp_path, [record(number, 3) for number in range(3)])
    _, start, end, _ = offsets_of(shard_of(root))
    data = shard_of(root).read_bytes()
    shard_of(root).write_bytes(data[: (start if kept > 0 else end) + kept])
    episodes, refusals = read(root)
    assert list(episodes) == ["train/0"]
    assert [(refusal.episode, refusal.reason) for refusal in refusals] == [
        ("train/1", "record_truncated"),
        ("train/2", "record_unreachable"),
    ]


def test_a_file_cut_between_records_refuses_the_missing_ones(tmp_path):
    root = one_shard(tmp_path, [record(number, 3) for number in range(3)])
    shard_of(root).write_bytes(shard_of(root).read_bytes()[: offsets_of(shard_of(root))[1]])
    episodes, refusals = read(root)
    assert list(episodes) == ["train/0"]
    assert [(refusal.episode, refusal.reason) for refusal in refusals] == [
        ("train/1", "record_missing"),
        ("train/2", "record_missing"),
    ]


def test_a_missing_shard_refuses_its_episodes(toy):
    (toy / "toy-train.tfrecord-00000-of-00002").unlink()
    episodes, refusals = read(toy)
    assert list(episodes) == ["train/2", "val/0"]
    assert [(refusal.episode, refusal.reason) for refusal in refusals] == [
        ("train/0", "data_missing"),
        ("train/1", "data_missing"),
    ]


def test_records_beyond_the_declared_ones_are_read_with_a_warning(tmp_path):
    root = one_shard(tmp_path, [record(0, 3)])
    with shard_of(root).open("ab") as stream:
        stream.write(framed(example(record(1, 4))))
    assert f"{shard_of(root).name}: 2 records, dataset_info.json says 1; all are read" in (
        source_of(root).listing().warnings
    )
    assert list(read(root)[0]) == ["train/0", "train/1"]


def test_a_length_beyond_the_file_is_refused_before_it_is_allocated(tmp_path):
    root = one_shard(tmp_path, [record(0, 3), record(1, 3)])
    length = struct.pack("<Q", 2**62)  # with a good checksum
    start = offsets_of(shard_of(root))[1]
    data = shard_of(root).read_bytes()
    shard_of(root).write_bytes(data[:start] + length + struct.pack("<I", masked(length)) + data[start + 12 :])
    assert [(r.episode, r.reason) for r in read(root)[1]] == [("train/1", "record_truncated")]


# --- broken episodes ---


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "reason", "frame"),
    [
        (lambda c: c | {f"steps/{STATE}": c[f"steps/{STATE}"][:3]}, "row_count", None),
        (lambda c: c | {"steps/language_instruction": [b"x"] * 3}, "row_count", None),
        (lambda c: c | {"steps/action": np.zeros(7, np.float32)}, "wrong_width", None),
        (lambda c: c | {"steps/action": [b"left"] * 4}, "wrong_dtype", None),
        (lambda c: c | {"steps/language_instruction": np.zeros(4)}, "wrong_dtype", None),
        (lambda c: c | {"steps/language_instruction": [b"\xff"] * 4}, "task_unreadable", None),
        (lambda c: without(c, "steps/action"), "column_missing", None),
        (lambda c: without(c, "steps/language_instruction"), "column_missing", None),
        (lambda c: without(c, "steps/is_first"), "column_missing", None),
        (lambda c: without(c, f"steps/{IMAGE}"), "column_missing", 0),
        (lambda c: c | {"steps/is_first": np.array([1, 0, 1, 0])}, "boundary_flags", 2),
        (lambda c: c | {"steps/is_first": np.zeros(4, int)}, "boundary_flags", 0),
        (lambda c: c | {"steps/is_last": np.array([0, 1, 0, 1])}, "boundary_flags", 1),
        (lambda c: c | {f"steps/{IMAGE}": c[f"steps/{IMAGE}"][:3]}, "frames_missing", 3),
        (lambda c: c | {f"steps/{IMAGE}": c[f"steps/{IMAGE}"] * 2}, "frames_surplus", 4),
        (lambda c: c | {f"steps/{IMAGE}": [*c[f"steps/{IMAGE}"][:2], b"", b""]}, "image_unreadable", 2),
        (lambda c: c | {f"steps/{IMAGE}": [b[:-30] for b in c[f"steps/{IMAGE}"]]}, "image_unreadable", 0),
        (lambda c: c | {f"steps/{IMAGE}": [png(np.zeros((8, 12), np.uint16))] * 4}, "wrong_dtype", 0),
        (lambda c: c | {"steps/action": np.full((4, 2), np.nan, np.float32)}, "not_finite", 0),
        (
            lambda c: {key: [] if isinstance(value, list) else value[:0] for key, value in c.items()},
            "empty",
            None,
        ),
    ],
)
def test_a_broken_episode_is_refused_with_its_first_frame_and_its_neighbours_stay(
    tmp_path, change, reason, frame
):
    root = one_shard(tmp_path, [record(0, 3), change(record(1, 4)), record(2, 3)])
    assert staged(root, tmp_path) == (["train/0", "train/2"], [("train/1", reason, frame)])


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b"\0" * 7, "wrong_width"),
        (zlib.compress(b"\0" * 2**24), "wrong_width"),  # not unpacked whole
        (b"no zlib", "value_unreadable"),
    ],
)
def test_a_packed_tensor_of_another_size_is_refused(tmp_path, item, reason):
    encoding = "bytes" if item[:1] == b"\0" else "zlib"
    pack = bytes if encoding == "bytes" else zlib.compress
    good = {"steps/action": [pack(bytes(8))] * 3}
    steps = STEPS | {"action": tensor(2, encoding=encoding)}
    contents = [record(0, 3) | good, record(1, 3) | {"steps/action": [item] * 3}]
    episodes, refusals = read(one_shard(tmp_path, contents, steps=steps))
    assert (list(episodes), [refusal.reason for refusal in refusals]) == (["train/0"], [reason])


def test_a_dataset_may_begin_with_broken_records(tmp_path):
    empty = {key: [] if isinstance(value, list) else value[:0] for key, value in record(0, 3).items()}
    contents = [{}, empty, record(2, 300), record(3, 100)]
    root = one_shard(tmp_path, contents, steps=STEPS | {IMAGE: image(-1, -1, 3)})
    estimates = [unit.num_frames for unit in source_of(root).listing().units]
    assert estimates[2:] == [300, pytest.approx(100, abs=10)]
    episodes, refusals = read(root)
    assert list(episodes) == ["train/2", "train/3"]
    assert [refusal.reason for refusal in refusals] == ["column_missing", "empty"]


def test_a_record_that_is_no_example_is_refused(tmp_path):
    root = one_shard(tmp_path, [record(0, 3)])
    with shard_of(root).open("ab") as stream:
        stream.write(framed(b"\xff\xff\xff"))
    assert [(r.episode, r.reason) for r in read(root)[1]] == [("train/1", "record_unreadable")]


# --- what makes the whole dataset unusable ---


def change_info(root, **fields):
    path = root / "dataset_info.json"
    info = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in info.items() if value is not ...}))


def rewrite_features(root, steps):
    write(root.parent / "other", {}, steps=steps)
    (root.parent / "other/features.json").rename(root / "features.json")


def split_of(**fields):
    return [{"name": "train", "shardLengths": ["1"]} | fields]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "dataset_info.json").unlink(), "no dataset_info.json in it or up to 3 folders below"),
        (lambda r: (r / "dataset_info.json").write_text("{"), "dataset_info.json: not JSON"),
        (lambda r: (r / "dataset_info.json").write_text("[]"), "dataset_info.json: not a JSON object"),
        (lambda r: (r / "features.json").unlink(), "features.json does not exist"),
        (lambda r: (r / "features.json").write_text('{"type": "old"}'), "declares no RLDS episodes"),
        (lambda r: change_info(r, fileFormat="array_record"), "fileFormat 'array_record', only tfrecord"),
        (lambda r: change_info(r, splits=...), "field 'splits' is missing"),
        (lambda r: change_info(r, splits=[{"name": "train"}]), "field 'shardLengths' is missing"),
        (
            lambda r: change_info(r, splits=split_of(shardLengths=["x"])),
            "shardLengths ['x'] of split 'train'",
        ),
        (lambda r: change_info(r, splits=split_of(shardLengths=["-1"])), "shardLengths ['-1'] of split"),
        (lambda r: change_info(r, splits=split_of(shardLengths=["0"])), "0 records in train"),
        (lambda r: change_info(r, splits=split_of(shardLengths=[str(10**12)])), "1000000000000 records in"),
        (
            lambda r: change_info(r, splits=split_of(filepathTemplate="../{SPLIT}")),
            "leads out of the dataset",
        ),
        (lambda r: change_info(r, splits=split_of(filepathTemplate="/{SPLIT}")), "leads out of the dataset"),
        (lambda r: change_info(r, splits=split_of(filepathTemplate="{X}")), "'{X}' cannot be filled in"),
        (lambda r: change_info(r, splits=split_of(name=["train"])), "the name of a split is ['train']"),
        (lambda r: rewrite_features(r, STEPS | {STATE: tensor(2**40)}), "more than 268435456 numbers a step"),
        (lambda r: rewrite_features(r, STEPS | {STATE: tensor(dtype=1)}), "dtype 1 and encoding 'none'"),
        (lambda r: rewrite_features(r, without(STEPS, "action")), "nothing for action: no 'action'"),
        (lambda r: rewrite_features(r, without(STEPS, STATE)), "nothing for observation.state: no"),
        (lambda r: rewrite_features(r, without(STEPS, IMAGE)), "no camera among the features of a step"),
        (lambda r: rewrite_features(r, without(STEPS, "language_instruction")), "no instruction: no text"),
        (lambda r: rewrite_features(r, STEPS | {IMAGE: image(-1, "x", 3)}), "declares no RLDS episodes"),
        (lambda r: shard_of(r).unlink(), "of the first 20 records none can be read"),
        (lambda r: shard_of(r).write_bytes(framed(b"")), "the record has no feature 'steps/action'"),
    ],
)
def test_an_unusable_dataset_is_one_clear_error(tmp_path, damage, message):
    root = one_shard(tmp_path, [record(0, 3)])
    damage(root)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        source_of(root).listing()
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            SourceMapping(state=(Part(key="observation/stat"),)),
            "no key 'observation/stat'; did you mean 'obs",
        ),
        (
            SourceMapping(action=(Part(key="action", start=1, stop=4),)),
            "'action' [1:4] does not lie within its 2",
        ),
        (SourceMapping(cameras={"observation.images.a": "observation/depth"}), "no key 'observation/depth'"),
        (SourceMapping(task_key="action"), "no key 'action'; there are language_instruction"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_clear_error(toy, mapping, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        source_of(toy, mapping=mapping).listing()


def test_a_shard_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    root = one_shard(tmp_path, [record(0, 3)])
    outside = shard_of(root).rename(tmp_path / "outside")
    shard_of(root).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link out of the dataset"):
        source_of(root).listing()
    assert list(read(root, follow_links=True)[0]) == ["train/0"]


# --- the shared dataset, against a parser of its own ---


def varints(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def parsed(data):
    """The fields of a message in order: (number, payload); only what a tf.Example needs."""
    at = 0
    while at < len(data):
        tag, at = varints(data, at)
        assert tag & 7 == 2, "all fields of a tf.Example that protobuf packs are length-delimited"
        size, at = varints(data, at)
        yield tag >> 3, data[at : at + size]
        at += size


def bridge_records(split):
    """Key -> values of every record, straight from the bytes: floats as arrays, bytes as lists."""
    path = BRIDGE / f"bridge_dataset/1.0.0/bridge_dataset-{split}.tfrecord-00000-of-00001"
    data = path.read_bytes()
    for start, end in pairwise(offsets_of(path)):
        ((_, features),) = parsed(data[start + 12 : end - 4])
        found = {}
        for _, entry in parsed(features):
            (_, key), (_, value) = parsed(entry)
            ((kind, values),) = parsed(value)
            items = [item for _, item in parsed(values)]
            if kind == 2:
                found[key.decode()] = np.frombuffer(b"".join(items), "<f4")
            elif kind == 1:
                found[key.decode()] = items
        yield found


@pytest.fixture(scope="module")
def bridge():
    if not BRIDGE.is_dir():
        pytest.skip(f"{BRIDGE} is not here")
    return [*bridge_records("train"), *bridge_records("val")]


def test_bridge_is_read_whole_on_ray(ray_session, bridge, tmp_path):
    report = ingest(
        RldsSource(uri=str(BRIDGE), fps=5),
        str(tmp_path),
        options=WriterOptions(),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: None,
        on_progress=lambda progress: None,
    )
    assert (report["episodes"], report["frames"], report["refused"]) == (50, 500, {})
    assert len(report["notes"]) == 50  # this slice was cut to ten steps an episode
    dataset = open_dataset(str(tmp_path))
    assert dataset.camera_names == [f"observation.images.image_{number}" for number in range(4)]
    (file,) = dataset.files
    rows = pq.read_table(tmp_path / file).to_pydict()
    assert [dataset.tasks[index] for index in rows["task_index"]] == [
        text.decode() for found in bridge for text in found["steps/language_instruction"]
    ]
    for column, key in (("observation.state", STATE), ("action", "action")):
        expected = np.concatenate([found[f"steps/{key}"].reshape(-1, 7) for found in bridge])
        np.testing.assert_array_equal(np.array(rows[column], np.float32), expected)
    for number in range(4):
        stored = [data for found in bridge for data in found[f"steps/observation/image_{number}"]]
        assert [entry["bytes"] for entry in rows[f"observation.images.image_{number}"]] == stored


def test_bridge_shrunk_shows_the_pixels_that_pil_decodes(bridge, tmp_path):
    source = RldsSource(uri=str(BRIDGE), fps=5, splits=("val",))
    listing = source.listing()
    layout = layout_of(str(tmp_path), listing, WriterOptions(resize=(32, 32), image_format="png"))
    outcome = stage_part(source.episodes(listing.units[:3]), layout, part=0)
    rows = [
        row
        for e in outcome["episodes"]
        for row in pa.ipc.open_file(tmp_path / e["path"]).read_all().to_pylist()
    ]
    stored = [data for found in bridge[25:28] for data in found["steps/observation/image_2"]]
    assert len(rows) == len(stored) == 30
    for row, data in zip(rows, stored, strict=True):
        image_bytes = row["observation.images.image_2"]["bytes"]
        with Image.open(io.BytesIO(image_bytes)) as found, Image.open(io.BytesIO(data)) as original:
            shrunk = cv2.resize(np.asarray(original), (32, 32), interpolation=cv2.INTER_LINEAR)
            np.testing.assert_array_equal(np.asarray(found), shrunk)


def test_wrong_flags_are_one_line(toy, tmp_path, capsys):
    for change, message in (
        ({"fps": None}, "give --fps (bridge has 5"),
        ({"fps": 0}, "fps 0"),
        ({"split": "train,test"}, "split 'test' is none of train, val"),
        ({"mapping": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ):
        flags: dict[str, Any] = {"source": str(toy), "output": str(tmp_path / "out"), "fps": 5} | change
        with pytest.raises(SystemExit) as error:
            ingest_rlds(IngestRlds(**flags))
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
