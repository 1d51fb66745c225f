"""Others read what we write: Hugging Face datasets, DuckDB, pandas, and LeRobot's documented layout."""

import json
import os
import subprocess
from collections import Counter

import datasets
import datasets.config
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flawed_toy import LENGTHS, LIFT, ODD, SIZES, TOP, WRIST, FlawedSource, episode, ingested

FPS = 10
FIRST = np.cumsum([0, *LENGTHS[:-1]])
STATS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
DEFAULTS = {
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TASK_OF = [0] * 40 + [1] + [0] * 30 + [0] * 50 + [0] * 10 + [2] * 20
"""task_index of every frame: lift, the empty instruction, and the odd one for the end of episode 4."""


@pytest.fixture(scope="module")
def root(ray_session, tmp_path_factory):
    """Five episodes of 151 frames in several data files."""
    root = tmp_path_factory.mktemp("data") / "cups"
    ingested(FlawedSource(), root, shard_bytes=10_000)
    assert len(data_files(root)) > 1
    return root


def data_files(root):
    return sorted(str(path) for path in root.glob("data/*/*.parquet"))


@pytest.fixture(scope="module")
def info(root):
    return json.loads((root / "meta/info.json").read_text())


@pytest.fixture(scope="module")
def episode_table(root):
    return pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")


@pytest.fixture(scope="module")
def frames():
    """The source's pictures: {camera: (151, H, W, 3)}."""
    sources = [episode(number) for number in range(len(LENGTHS))]
    return {name: np.concatenate([np.stack(list(e.cameras[name])) for e in sources]) for name in SIZES}


# --- with the real libraries ---


def test_hugging_face_datasets_shows_the_images(root, frames, tmp_path):
    assert datasets.config.HF_HUB_OFFLINE
    found = datasets.load_dataset(
        "parquet", data_files=data_files(root), split="train", cache_dir=str(tmp_path)
    )
    assert isinstance(found, datasets.Dataset)
    assert len(found) == sum(LENGTHS)
    assert isinstance(found.features[TOP], datasets.Image)
    assert found.features["action"] == datasets.List(datasets.Value("float32"), length=2)
    assert found.features["timestamp"] == datasets.Value("float32")
    for index in (0, 40, 41, 100, 150):
        row = found[index]
        assert row["task_index"] == TASK_OF[index]
        for camera, (height, width) in SIZES.items():
            assert row[camera].size == (width, height)
            np.testing.assert_array_equal(np.asarray(row[camera]), frames[camera][index])


def test_duckdb_counts_joins_and_finds(root):
    views = {
        "frames": "data/*/*.parquet",
        "episodes": "meta/episodes/*/*.parquet",
        "tasks": "meta/tasks.parquet",
    }
    with duckdb.connect() as db:
        for name, files in views.items():
            db.execute(f"create view {name} as from '{root / files}'")

        def rows(query):
            return db.execute(query).fetchall()

        assert rows(
            "select task, count(*), count(distinct episode_index) from frames join tasks using (task_index) "
            "group by task_index, task order by task_index"
        ) == [(LIFT, 130, 4), (" ", 1, 1), (ODD, 20, 1)]
        assert rows(
            "select episode_index, any_value(source_episode), any_value(length), count(*), "
            "min(index) - any_value(dataset_from_index), max(index) + 1 - any_value(dataset_to_index) "
            "from frames join episodes using (episode_index) group by episode_index order by episode_index"
        ) == [(number, f"demo_{number}", length, length, 0, 0) for number, length in enumerate(LENGTHS)]
        assert rows("select episode_index, frame_index from frames where action[2] < -100") == [(3, 17)]
        assert rows(f'select distinct hex("{TOP}".bytes[1:4]) from frames') == [(b"\x89PNG".hex().upper(),)]


def test_pandas_looks_tasks_up_by_their_text(root):
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert tasks.index.name == "task"  # LeRobot: tasks.loc[task].task_index, tasks.iloc[task_index].name
    assert tasks.loc[ODD, "task_index"] == 2
    assert [tasks.iloc[number].name for number in range(3)] == [LIFT, " ", ODD]
    assert (list(tasks.columns), tasks["task_index"].dtype) == (["task_index"], np.int64)


LEROBOT = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

root, camera = sys.argv[1:]
dataset = LeRobotDataset("local/cups", root=root, delta_timestamps={"action": [i / 10 for i in range(8)]})
items = [dataset[index] for index in range(len(dataset))]
some = LeRobotDataset("local/cups", root=root, episodes=[1, 4])
print(json.dumps({
    "cameras": dataset.meta.camera_keys,
    "episodes": [int(item["episode_index"]) for item in items],
    "tasks": [item["task"] for item in items],
    "padded": [int(item["action_is_pad"].sum()) for item in items],
    "actions": [item["action"][0].tolist() for item in items],
    "pixels": [(item[camera][:, -1, -1] * 255).round().int().tolist() for item in items],
    "action_mean": np.asarray(dataset.meta.stats["action"]["mean"]).tolist(),
    "camera_stats": np.asarray(dataset.meta.stats[camera]["q99"]).shape,
    "some": [len(some), some[0]["task"], some[1]["task"]],
}))
"""


@pytest.mark.skipif(
    "LEROBOT_PYTHON" not in os.environ,
    reason="LEROBOT_PYTHON names no Python with lerobot[dataset] installed",
)
def test_lerobot_itself_reads_every_frame(root, frames, tmp_path):
    job = subprocess.run(
        [os.environ["LEROBOT_PYTHON"], "-c", LEROBOT, str(root), TOP],
        env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    texts = [LIFT, " ", ODD]
    actions = np.concatenate([episode(number).columns["action"] for number in range(len(LENGTHS))])
    assert found["cameras"] == [TOP, WRIST]
    assert found["episodes"] == np.repeat(range(5), LENGTHS).tolist()
    assert found["tasks"] == [texts[task] for task in TASK_OF]
    assert found["padded"] == [max(0, 8 - length + i) for length in LENGTHS for i in range(length)]
    np.testing.assert_array_equal(np.float32(found["actions"]), actions.astype(np.float32))
    np.testing.assert_array_equal(found["pixels"], frames[TOP][:, -1, -1])
    np.testing.assert_allclose(found["action_mean"], actions.astype(np.float32).mean(axis=0, dtype=float))
    assert found["camera_stats"] == [3, 1, 1]
    assert found["some"] == [31, " ", LIFT]


# --- what LeRobot 0.6 documents of v3.0 ---


def test_info_says_what_lerobot_expects(root, info):
    numbers = ("total_episodes", "total_frames", "total_tasks", "chunks_size", "fps")
    assert [info[name] for name in numbers] == [5, 151, 3, 1000, FPS]
    assert all(
        type(info[name]) is int for name in (*numbers, "data_files_size_in_mb", "video_files_size_in_mb")
    )
    assert (info["codebase_version"], info["robot_type"], info["splits"]) == ("v3.0", "toy", {"train": "0:5"})
    assert info["video_path"] is None
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["features"].keys() == {TOP, WRIST, "observation.state", "action", *DEFAULTS}
    for name, size in SIZES.items():
        assert info["features"][name] == {
            "dtype": "image",
            "shape": [*size, 3],
            "names": ["height", "width", "channels"],
        }
    for name, dtype in DEFAULTS.items():
        scalar = "float32" if dtype == pa.float32() else "int64"
        assert info["features"][name] == {"dtype": scalar, "shape": [1], "names": None}


def test_data_columns_have_lerobots_types_and_hugging_faces_metadata(root, info):
    types = {TOP: IMAGE, WRIST: IMAGE, "observation.state": pa.list_(pa.float32(), 3)}
    types |= {"action": pa.list_(pa.float32(), 2)} | DEFAULTS
    for path in data_files(root):
        schema = pq.read_schema(path)
        assert {field.name: field.type for field in schema} == types
        described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert list(described) == list(info["features"]) == schema.names
        assert {name for name, feature in described.items() if feature["_type"] == "Image"} == {TOP, WRIST}


def test_rows_are_numbered_and_timed_as_lerobot_does(root):
    table = pa.concat_tables([pq.read_table(path) for path in data_files(root)])
    np.testing.assert_array_equal(table["index"], np.arange(151))
    np.testing.assert_array_equal(table["episode_index"], np.repeat(range(5), LENGTHS))
    np.testing.assert_array_equal(table["frame_index"], np.concatenate([np.arange(n) for n in LENGTHS]))
    np.testing.assert_array_equal(table["task_index"], TASK_OF)
    seconds = np.concatenate([np.arange(n) / FPS for n in LENGTHS])
    assert np.abs(table["timestamp"].to_numpy() - seconds).max() < 1e-6


def test_the_episode_table_has_lerobots_columns(root, info, episode_table):
    numbers = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    numbers += ["dataset_to_index", "meta/episodes/chunk_index", "meta/episodes/file_index"]
    types = {field.name: field.type for field in episode_table.schema}
    assert all(types[name] == pa.int64() for name in numbers)
    assert types["tasks"] == pa.list_(pa.string())
    number, image = pa.list_(pa.float64()), pa.list_(pa.list_(pa.list_(pa.float64())))
    for feature in info["features"]:
        for stat in STATS:
            expected = image if feature in SIZES else number
            assert types[f"stats/{feature}/{stat}"] == (pa.list_(pa.int64()) if stat == "count" else expected)
    # LeRobot takes episode i from row i
    assert episode_table["episode_index"].to_pylist() == list(range(5))
    assert episode_table["tasks"].to_pylist() == [[LIFT], [" "], [LIFT], [LIFT], [LIFT, ODD]]
    assert episode_table["dataset_from_index"].to_pylist() == FIRST.tolist()
    assert episode_table["dataset_to_index"].to_pylist() == (FIRST + LENGTHS).tolist()


def test_every_episode_lies_where_the_table_and_the_template_say(root, info, episode_table):
    named = Counter()
    for row in episode_table.select(
        ["episode_index", "length", "data/chunk_index", "data/file_index"]
    ).to_pylist():
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        path = str(root / info["data_path"].format(**place))
        numbers = pq.read_table(path, columns=["episode_index"])["episode_index"].to_pylist()
        assert numbers.count(row["episode_index"]) == row["length"]
        named[path] += row["length"]
    assert named == {path: pq.read_metadata(path).num_rows for path in data_files(root)}


def test_statistics_have_lerobots_shapes_and_count_every_frame(root, info, episode_table, frames):
    stats = json.loads((root / "meta/stats.json").read_text())
    assert stats.keys() == info["features"].keys()
    lengths = [[length] for length in LENGTHS]
    for feature, declared in info["features"].items():
        shape = (3, 1, 1) if feature in SIZES else tuple(declared["shape"])
        assert set(stats[feature]) == set(STATS)
        assert stats[feature]["count"] == [151]
        assert episode_table[f"stats/{feature}/count"].to_pylist() == lengths
        for stat in set(STATS) - {"count"}:
            assert np.shape(stats[feature][stat]) == shape
            assert np.shape(episode_table[f"stats/{feature}/{stat}"][0].as_py()) == shape
    for camera, pixels in frames.items():  # levels in 0..1, a value a channel
        expected = (pixels / 255).mean(axis=(0, 1, 2))
        np.testing.assert_allclose(np.ravel(stats[camera]["mean"]), expected, rtol=1e-9)
    np.testing.assert_allclose(
        stats["action"]["std"],
        np.concatenate([episode(n).columns["action"] for n in range(5)])
        .astype(np.float32)
        .std(axis=0, dtype=float),
        rtol=1e-9,
    )
