"""Small LeRobot datasets on disk, v2.1 and v3.0, with the same episodes.

The videos are lossless h264 with B-frames and one key frame a file, so that pictures are the same in both
versions and a reader that seeks or counts carelessly is found out.
"""

import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.sources import Refusal, RefusedEpisodeError
from pipelines.sources.lerobot import LeRobotSource

FPS = 10
HEIGHT, WIDTH = 32, 48
CAMERA = "observation.images.top"
TASKS = ["lift the cup", "push the cup"]
CLIP = f"videos/{CAMERA}"


def frames_of(episode: int, length: int) -> np.ndarray:
    """Different in every frame: a gradient that moves."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    t = np.arange(length)[:, None, None]
    planes = [x * 5 + t * 3 + episode * 40, y * 7 + t * 2, x + y + t * 5 + 0 * episode]
    return np.stack(np.broadcast_arrays(*planes), axis=-1).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, *, times: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"qp": "0", "bf": "3", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def rows_of(episode: int, length: int, *, start: int) -> dict[str, pa.Array]:
    rng = np.random.default_rng(episode)
    vectors = rng.standard_normal((2, length, 3)).astype(np.float32)
    frame_index = np.arange(length)
    return {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(vectors[0].ravel()), 3),
        "action": pa.array(vectors[1].tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array((frame_index / FPS).astype(np.float32)),
        "frame_index": pa.array(frame_index),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(start + frame_index),
        "task_index": pa.array(np.full(length, episode % 2)),
    }


def info_of(version: str, *, dtype: str = "video", **fields) -> dict:
    vector = {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]}
    scalar = {"shape": [1], "names": None}
    features = {
        CAMERA: {"dtype": dtype, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channel"]},
        "observation.state": vector,
        "action": vector,
        "timestamp": scalar | {"dtype": "float32"},
    }
    features |= {
        name: scalar | {"dtype": "int64"} for name in ("frame_index", "episode_index", "index", "task_index")
    }
    return {"codebase_version": version, "robot_type": "toy", "fps": FPS, "features": features} | fields


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_v21(root: Path, lengths: dict[int, int]) -> Path:
    """Write episodes {number: length}; the templates are not LeRobot's usual ones."""
    info = info_of(
        "v2.1",
        chunks_size=2,
        total_episodes=len(lengths),
        data_path="rows/{episode_chunk:02d}/e{episode_index:04d}.parquet",
        video_path="clips/{video_key}/{episode_chunk:02d}/e{episode_index:04d}.mp4",
    )
    write_json(root / "meta/info.json", info)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    write_lines(
        root / "meta/episodes.jsonl",
        [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": n} for e, n in lengths.items()],
    )
    start = 0
    for episode, length in lengths.items():
        write_video(v21_video(root, episode), frames_of(episode, length))
        path = v21_rows(root, episode)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows_of(episode, length, start=start)), path)
        start += length
    return root


def v21_rows(root: Path, episode: int) -> Path:
    return root / f"rows/{episode // 2:02d}/e{episode:04d}.parquet"


def v21_video(root: Path, episode: int) -> Path:
    return root / f"clips/{CAMERA}/{episode // 2:02d}/e{episode:04d}.mp4"


def write_v30(root: Path, lengths: dict[int, int], *, images: bool = False) -> Path:
    """Write all episodes into one data file and one video, or with `images` as PNG into the data file."""
    info = info_of(
        "v3.0",
        dtype="image" if images else "video",
        total_episodes=len(lengths),
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path=None if images else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    write_json(root / "meta/info.json", info)
    # the text column of many real files: pandas' name of an unnamed index
    pq.write_table(
        pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": TASKS}),
        root / "meta/tasks.parquet",
    )
    tables, table_rows, start = [], [], 0
    for episode, length in lengths.items():
        columns = rows_of(episode, length, start=start)
        if images:
            columns[CAMERA] = pa.array(
                [{"bytes": png(frame), "path": None} for frame in frames_of(episode, length)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            )
        tables.append(pa.table(columns))
        row = {"episode_index": episode, "length": length, "data/chunk_index": 0, "data/file_index": 0}
        if not images:
            row |= {f"{CLIP}/chunk_index": 0, f"{CLIP}/file_index": 0}
            row |= {f"{CLIP}/from_timestamp": start / FPS, f"{CLIP}/to_timestamp": (start + length) / FPS}
        table_rows.append(row)
        start += length
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table_rows), path)
    data = root / "data/chunk-000/file-000.parquet"
    data.parent.mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), data, row_group_size=7)  # row groups that cut through episodes
    if not images:
        frames = np.concatenate([frames_of(episode, length) for episode, length in lengths.items()])
        write_video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames)
    return root


def png(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


def edit(path: Path, change) -> None:
    """Rewrite a Parquet file with `change(table)`."""
    table = change(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)


def replaced(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def with_value(table: pa.Table, name: str, row: int, value) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return replaced(table, name, values)


def change_info(root: Path, **fields) -> None:
    """Set fields of info.json; `...` removes one."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in info.items() if value is not ...}))


def change_features(root: Path, **features) -> None:
    """Set features of info.json, dots written as __; `...` removes one."""
    declared = json.loads((root / "meta/info.json").read_text())["features"]
    declared |= {name.replace("__", "."): feature for name, feature in features.items()}
    change_info(root, features={name: f for name, f in declared.items() if f is not ...})


def read(root, *, units: list[int] | None = None, **options):
    """Return all episodes with their frames, and all refusals."""
    source = LeRobotSource(uri=str(root), **options)
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
