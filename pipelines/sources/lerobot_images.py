"""Cameras of a LeRobot dataset whose images lie in the data files, as PNG or JPEG."""

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.sources import Refusal, RefusedEpisodeError
from pipelines.sources.lerobot_metadata import Facts, FlawError, Recording
from pipelines.sources.storage import BLOCK_BYTES

MODES = ("RGB", "L", "P")
"""8 bits a channel and nothing to drop; 16 bits or transparency would be lost without a word."""
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a broken file, found by breaking PNG and JPEG files at random."""


def stored_frames(facts: Facts, recording: Recording, camera: str, *, first_row: int) -> Iterator[np.ndarray]:
    """Yield the frames of an episode whose rows begin at `first_row` of its data file."""
    key = facts.cameras[camera]
    height, width, _ = facts.declared[key]["shape"]
    number = 0
    try:
        for data in _stored_images(facts, recording, key, first_row=first_row):
            yield _decoded(data, height=height, width=width)
            number += 1
    except (FlawError, pa.ArrowException, OSError) as error:
        known = isinstance(error, FlawError)
        raise RefusedEpisodeError(
            Refusal(
                episode=str(recording.index),
                camera=camera,
                frame=number,
                reason=error.reason if known else "data_unreadable",
                detail=f"{recording.data_path}: {error.detail if known else error}",
            )
        ) from None


def _decoded(data: bytes | None, *, height: int, width: int) -> np.ndarray:
    if not data:
        raise FlawError("image_unreadable", "no bytes in the Parquet")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.size != (width, height):  # known from the header, before anything is allocated
                raise FlawError("frame_size", f"{image.height}x{image.width}, declared {height}x{width}")
            if image.mode not in MODES or "transparency" in image.info:
                raise FlawError("image_mode", f"{image.mode} is not 8 bits of colour or grey, or transparent")
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise FlawError("image_unreadable", str(error)) from None


def _stored_images(facts: Facts, recording: Recording, key: str, *, first_row: int) -> Iterator[bytes | None]:
    """Yield the encoded images of an episode, a few in memory at a time."""
    # read page after page: pre_buffer would hold the images of whole row groups, often of the whole episode
    stream = facts.folder.open(recording.data_path)
    with pq.ParquetFile(stream, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        starts = np.concatenate([[0], ends[:-1]])
        last_row = first_row + recording.length
        (groups,) = np.nonzero((starts < last_row) & (ends > first_row))
        if len(groups) == 0:
            return
        row = int(starts[groups[0]])
        for batch in file.iter_batches(batch_size=16, row_groups=groups.tolist(), columns=[key]):
            for item in _taken(batch.column(key), first=first_row - row, stop=last_row - row).to_pylist():
                yield item["bytes"] if isinstance(item, dict) else item
            row += len(batch)


def _taken(column: pa.Array, *, first: int, stop: int) -> pa.Array:
    first, stop = max(first, 0), min(stop, len(column))
    return column.slice(first, max(stop - first, 0))
