"""Episode datasets for benchmarks, written directly in the stored layout: real pictures, made-up motion."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STATE_WIDTH = ACTION_WIDTH = 7
FPS = 30
ROW_GROUP_FRAMES = 16
TASKS = ("clear the table", "stack the cups")
CAMERA = "observation.images.front"


def write_dataset(
    root: Path, images: Sequence[bytes], *, size: tuple[int, int], lengths: Sequence[int], per_shard: int
) -> Path:
    """Write episodes of one camera whose frames repeat `images` (JPEG, (height, width) `size`).

    Args:
        root: the folder, which must not exist.
        images: encoded pictures; episode e begins with picture e.
        size: (height, width) of the pictures.
        lengths: frames of each episode.
        per_shard: episodes in a data file.
    """
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    first_row = np.concatenate([[0], np.cumsum(lengths)])
    episodes = []
    for shard in range(-(-len(lengths) // per_shard)):
        mine = range(shard * per_shard, min((shard + 1) * per_shard, len(lengths)))
        path = root / f"data/chunk-{shard // 1000:03d}/file-{shard % 1000:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        group = 0
        tables = [_episode(number, lengths[number], images, int(first_row[number])) for number in mine]
        with pq.ParquetWriter(path, tables[0].schema, compression="NONE", use_dictionary=False) as writer:
            for number, table in zip(mine, tables, strict=True):
                writer.write_table(table, row_group_size=ROW_GROUP_FRAMES)
                episodes.append(
                    {
                        "episode_index": number,
                        "tasks": [TASKS[number % 2]],
                        "length": lengths[number],
                        "data/chunk_index": shard // 1000,
                        "data/file_index": shard % 1000,
                        "data/row_group_index": group,
                        "dataset_from_index": int(first_row[number]),
                        "dataset_to_index": int(first_row[number + 1]),
                    }
                )
                group += -(-lengths[number] // ROW_GROUP_FRAMES)
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = {"task_index": np.arange(len(TASKS)), "task": list(TASKS)}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    _write_info(root, size=size, lengths=lengths)
    return root


def _episode(number: int, length: int, images: Sequence[bytes], first_row: int) -> pa.Table:
    frame = np.arange(length)
    motion = np.sin(frame[:, None] / 20 + np.arange(STATE_WIDTH) + number).astype(np.float32)
    pictures = [{"bytes": images[(number + i) % len(images)], "path": None} for i in range(length)]
    return pa.table(
        {
            CAMERA: pa.array(pictures, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(motion.ravel()), STATE_WIDTH),
            "action": pa.FixedSizeListArray.from_arrays(pa.array(-motion.ravel()), ACTION_WIDTH),
            "timestamp": (frame / FPS).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, number),
            "index": first_row + frame,
            "task_index": np.full(length, number % 2),
        }
    )


def _write_info(root: Path, *, size: tuple[int, int], lengths: Sequence[int]) -> None:
    numbers = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
    numbers |= {"index": "int64", "task_index": "int64"}
    features = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in numbers.items()}
    features |= {
        name: {"dtype": "float32", "shape": [STATE_WIDTH], "names": None}
        for name in ("observation.state", "action")
    }
    features[CAMERA] = {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": int(sum(lengths)),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "row_group_frames": ROW_GROUP_FRAMES,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    width = STATE_WIDTH
    moments = {"mean": [0.0] * width, "std": [1.0] * width, "min": [-1.0] * width, "max": [1.0] * width}
    stats = {name: moments | {"count": [int(sum(lengths))]} for name in ("observation.state", "action")}
    (root / "meta/stats.json").write_text(json.dumps(stats))
