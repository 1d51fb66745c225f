"""One episode of an HDF5 file: what is taken of it, whether that agrees with itself, its columns and frames.

Keys are paths in the episode's group. Frames are (H, W, 3) uint8, or JPEG and PNG files as they are stored.
L is the number of frames.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import h5py
import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.sources import Feature, RefusedEpisodeError, is_camera
from pipelines.sources.hdf5_files import (
    H5_ERRORS,
    Flaw,
    FlawError,
    attribute,
    collected,
    dataset_at,
    flaw,
    found,
    number_of,
    row_bytes,
)
from pipelines.sources.mapping import Part
from pipelines.sources.vectors import Vectors, keys_of, vector_columns

MAX_WIDTH = 100_000
"""Numbers in a row of a vector dataset."""
MAX_COLUMN_BYTES = 256 * 1024**2
"""A vector dataset; it is read whole."""
MAX_PIXELS = 4096 * 4096
MAX_IMAGE_BYTES = 32 * 1024**2
"""An encoded image with its padding."""
BLOCK_BYTES = 32 * 1024**2
"""Images of a camera that are in memory together, if they come in chunks of many."""
READ_BYTES = 4 * 1024**2
"""Images that are read at once where chunks leave the choice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is taken of every episode, and what it must be like."""

    vectors: Vectors
    """Column -> the parts it is laid together of."""
    cameras: Mapping[str, str]
    """Camera -> key."""
    features: dict[str, Feature]


@dataclass(frozen=True, kw_only=True)
class Content:
    """The datasets of an episode, open and checked, and the features that they make."""

    length: int
    arrays: Mapping[str, h5py.Dataset]
    """Key -> numbers (L, ...)."""
    images: Mapping[str, h5py.Dataset]
    """By camera."""
    features: dict[str, Feature]


def content_of(
    episode: h5py.Group, *, vectors: Vectors, cameras: Mapping[str, str], known: Sequence[str] = ()
) -> Content:
    """Open what is taken of an episode; only the header of an encoded image is read.

    Args:
        episode: Its group.
        vectors: As in `Plan`.
        cameras: As in `Plan`.
        known: Keys the episode has, for a word about a missing one.

    Raises:
        FlawError: everything that is wrong.
    """
    flaws: list[Flaw] = []
    arrays: dict[str, h5py.Dataset] = {}
    images: dict[str, h5py.Dataset] = {}
    features: dict[str, Feature] = {}
    for name, key in cameras.items():
        with collected(flaws, camera=name):
            images[name] = _image_dataset(episode, key, known=known)
            features[name] = _camera_feature(images[name], key)
    for key in keys_of(vectors):
        with collected(flaws):
            arrays[key] = _number_dataset(episode, key, known=known)
    for name, parts in vectors.items():
        with collected(flaws):
            if all(part.key in arrays for part in parts):
                features[name] = _vector_feature(name, parts, arrays)
    reference = vectors["action"][0].key
    rows = {key: len(dataset) for key, dataset in arrays.items()}
    rows |= {cameras[name]: len(dataset) for name, dataset in images.items()}
    if reference in rows:
        flaws += _length_flaws(episode, rows, reference)
    if flaws:
        raise FlawError(*flaws)
    return Content(length=rows[reference], arrays=arrays, images=images, features=features)


def check_agreement(content: Content, plan: Plan) -> None:
    """Refuse an episode that is not like the first one."""
    flaws = []
    for name, feature in plan.features.items():
        there, here = feature["shape"], content.features[name]["shape"]
        if there == here:
            continue
        sizes = "{}, the first episode has {}".format(*("x".join(map(str, shape)) for shape in (here, there)))
        if is_camera(feature):
            flaws.append(Flaw(reason="frame_size", detail=sizes, camera=name, frame=0))
        else:
            flaws.append(Flaw(reason="wrong_width", detail=f"{name} has width {sizes}"))
    if flaws:
        raise FlawError(*flaws)


def columns_of(content: Content, plan: Plan) -> dict[str, np.ndarray]:
    """Return the columns, float32."""
    arrays = {key: _read(dataset, key) for key, dataset in content.arrays.items()}
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused
        return vector_columns(plan.vectors, arrays)


def _read(dataset: h5py.Dataset, key: str) -> np.ndarray:
    try:
        return dataset[...]
    except H5_ERRORS as error:
        raise flaw("data_unreadable", f"{key}: {error}") from None


def _length_flaws(episode: h5py.Group, rows: Mapping[str, int], reference: str) -> Iterator[Flaw]:
    length = rows[reference]
    for key, number in rows.items():
        if number != length:
            detail = f"{key} has {number} rows, {reference} has {length}"
            yield Flaw(reason="length_mismatch", detail=detail)
    declared = number_of(attribute(episode, "num_samples"))
    if declared is not None and declared != length:
        detail = f"num_samples is {declared:g}, {reference} has {length} rows"
        yield Flaw(reason="length_mismatch", detail=detail)
    if length == 0:
        yield Flaw(reason="empty", detail="the episode has no frames")


# --- numbers ---


def _number_dataset(group: h5py.Group, key: str, *, known: Sequence[str] = ()) -> h5py.Dataset:
    dataset = dataset_at(group, key, known=known)
    if dataset.dtype.kind not in "fiub":
        raise flaw("wrong_dtype", f"{key}: {dataset.dtype} is no number")
    size = len(dataset) * row_bytes(dataset)
    if size > MAX_COLUMN_BYTES or math.prod(dataset.shape[1:]) > MAX_WIDTH:
        raise flaw("too_large", f"{key}: {dataset.shape} {dataset.dtype}")
    return dataset


def _vector_feature(name: str, parts: Sequence[Part], arrays: Mapping[str, h5py.Dataset]) -> Feature:
    names = []
    for part in parts:
        width = math.prod(arrays[part.key].shape[1:])
        try:
            numbers = part.of(np.arange(width)[None])[0]
        except ValueError as error:  # the slice goes beyond
            raise flaw("wrong_width", f"{name}: {error}") from None
        leaf = part.key.rpartition("/")[2]
        names += [f"{leaf}_{number}" for number in numbers.tolist()]
    return {"dtype": "float32", "shape": [len(names)], "names": names}


def compressed_lengths(file: h5py.File, length: int) -> np.ndarray | None:
    """Return ALOHA's compress_len (cameras, L), the bytes of each JPEG; nothing tells whose row is whose."""
    if found(file, "compress_len") is None:
        return None
    dataset = _number_dataset(file, "compress_len")
    if dataset.ndim != 2 or dataset.shape[1] != length:
        raise flaw("length_mismatch", f"compress_len is {dataset.shape} for {length} frames")
    return _read(dataset, "compress_len")


# --- images ---


def is_raw(dataset: h5py.Dataset) -> bool:
    """Whether it holds pixels: uint8 (L, H, W, 3)."""
    shape = dataset.shape or ()
    return dataset.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3


def is_encoded(dataset: h5py.Dataset) -> bool:
    """Whether it can hold image files: padded bytes (L, W) as ALOHA's, bytes of any length, strings."""
    num_axes = len(dataset.shape or ())
    if dataset.dtype == np.uint8:
        return num_axes == 2
    return num_axes == 1 and (dataset.dtype.kind == "S" or h5py.check_vlen_dtype(dataset.dtype) == np.uint8)


def begins_as_image(dataset: h5py.Dataset) -> bool:
    """Whether the first row of padded bytes is a JPEG or a PNG."""
    if not dataset.shape[0] or not 4 <= dataset.shape[1] <= MAX_IMAGE_BYTES:
        return False
    try:
        return dataset[0, :4].tobytes().startswith((b"\xff\xd8\xff", b"\x89PNG"))
    except H5_ERRORS:
        return False


def _image_dataset(group: h5py.Group, key: str, *, known: Sequence[str]) -> h5py.Dataset:
    if found(group, key) is None:
        raise flaw("camera_missing", f"no dataset {key!r}")
    dataset = dataset_at(group, key, known=known)
    if not is_raw(dataset) and not is_encoded(dataset):
        detail = f"{dataset.dtype} {dataset.shape} is neither uint8 (L, H, W, 3) nor image files"
        raise flaw("wrong_dtype", f"{key}: {detail}")
    if is_encoded(dataset) and row_bytes(dataset) > MAX_IMAGE_BYTES:
        raise flaw("too_large", f"{key}: images of up to {row_bytes(dataset)} bytes")
    return dataset


def _camera_feature(dataset: h5py.Dataset, key: str) -> Feature:
    if len(dataset) == 0:
        raise flaw("empty", f"{key}: no images")
    height, width = dataset.shape[1:3] if is_raw(dataset) else _header_size(dataset)
    if not 0 < height * width <= MAX_PIXELS:
        raise flaw("too_large", f"{key}: images of {height}x{width}")
    return {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}


def _header_size(dataset: h5py.Dataset) -> tuple[int, int]:
    """Return (height, width) of the first encoded image."""
    with _opened(image_file(next(_one_by_one(dataset, 0, 1))), frame=0) as image:
        return image.height, image.width


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera of one episode; yields L frames."""

    name: str
    episode: str
    dataset: h5py.Dataset
    shape: tuple[int, ...]
    """(H, W, 3) that every frame must have."""
    bgr: bool
    """The stored pixels are in OpenCV's order."""
    compressed: np.ndarray | None
    """(cameras, L) lengths of which one is this camera's."""

    @property
    def is_encoded(self) -> bool:
        return not is_raw(self.dataset)

    def frames(self) -> Iterator[np.ndarray]:
        """Yield pixels (H, W, 3), RGB."""
        for image in self._refusing(self._decoded if self.is_encoded else lambda row, frame: row):
            yield np.ascontiguousarray(image[..., ::-1]) if self.bgr else image

    def files(self) -> Iterator[bytes]:
        """Yield the image files of an encoded camera, unchanged but for the padding."""
        return self._refusing(self._file)

    def _refusing(self, step: Callable[[Any, int], Any]) -> Iterator[Any]:
        try:
            for frame, row in enumerate(_rows(self.dataset)):
                yield step(row, frame)
        except FlawError as error:
            first = replace(error.flaws[0], camera=self.name)
            raise RefusedEpisodeError(first.refusal(self.episode)) from None

    def _file(self, row: Any, frame: int) -> bytes:
        data = image_file(row)
        with self._checked(data, frame):
            return data

    def _decoded(self, row: Any, frame: int) -> np.ndarray:
        with self._checked(image_file(row), frame) as image:
            return np.asarray(image)

    @contextlib.contextmanager
    def _checked(self, data: bytes, frame: int) -> Iterator[Image.Image]:
        if self.compressed is not None and len(data) not in self.compressed[:, frame]:
            said = self.compressed[:, frame].tolist()
            raise flaw("compress_len", f"{len(data)} bytes, compress_len says {said}", frame=frame)
        with _opened(data, frame=frame) as image:
            height, width, _ = self.shape
            if image.size != (width, height):  # known from the header, before the pixels are
                detail = f"{image.height}x{image.width}, the first frame of all has {height}x{width}"
                raise flaw("frame_size", detail, frame=frame)
            yield image


def image_file(row: Any) -> bytes:
    """Return an image file without its padding; neither JPEG nor PNG ends in a zero."""
    data = row if isinstance(row, bytes) else row.tobytes()
    return data.rstrip(b"\0")


@contextlib.contextmanager
def _opened(data: bytes, *, frame: int) -> Iterator[Image.Image]:
    """Read the header of an image file; the pixels are decoded by whoever asks for them."""
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise flaw("image_unreadable", f"{len(data)} bytes", frame=frame)
    if data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9"):
        # a decoder would take the padding for pixels
        raise flaw("image_unreadable", "the JPEG has no end marker", frame=frame)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode != "RGB":
                raise flaw("wrong_dtype", f"an image of mode {image.mode}, not RGB", frame=frame)
            yield image
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise flaw("image_unreadable", str(error), frame=frame) from None


# --- reading rows ---


def _rows(dataset: h5py.Dataset) -> Iterator[Any]:
    """Yield the rows, some read at once, each chunk unpacked once unless it is of very many."""
    step = _rows_at_once(dataset)
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        try:
            block = dataset[start:stop]
        except H5_ERRORS:
            block = _one_by_one(dataset, start, stop)
        yield from block


def _rows_at_once(dataset: h5py.Dataset) -> int:
    if dataset.dtype.kind == "O":  # rows of any length
        return 1
    size = max(row_bytes(dataset), 1)
    chunk_rows = dataset.chunks[0] if dataset.chunks else 1
    rows = chunk_rows * max(READ_BYTES // (size * chunk_rows), 1)
    return min(rows, max(BLOCK_BYTES // size, 1))


def _one_by_one(dataset: h5py.Dataset, start: int, stop: int) -> Iterator[Any]:
    """Yield the rows before the one that cannot be read, and name that."""
    for frame in range(start, stop):
        try:
            row = dataset[frame]
        except H5_ERRORS as error:
            raise flaw("image_unreadable", str(error), frame=frame) from None
        yield row
