"""Rows of episode datasets -> samples that the model can take, as arrays.

Knows no Ray, and no torch: a process that only decodes must not wait for its import, nor hold its memory.

Shape letters: b micro-batch, n observations, H chunk, A action width, S state width, L tokens, (h, w) image
after fitting.
"""

import functools
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.augmentation import AugmentationConfig, augmented, draws
from pipelines.columns import whole
from pipelines.dataset import EpisodeDataset
from pipelines.features import FRAME, PackedRows, StoredFeatures, unpacked_rows
from pipelines.files import parted
from pipelines.images import decoded_image, fitted_size, shrunk
from pipelines.plan import Plan, Rows
from pipelines.windows import Int64, frame_steps
from smolvla.features import IMAGE_FEATURES, PADDING_MASK, Normalizer

Batch = dict[str, NDArray[Any]]

READ_THREADS = 64  # files read at once: object stores take a tenth of a second to answer
KEPT_BATCHES, KEPT_BLOCKS = 8, 4  # whose memory is used again, of each camera
OPEN_FILES = 64  # Parquet footers a worker process keeps parsed; about 100 kB each
ROW_IDS = ("micro_batch", "source", "epoch", "episode_index", "frame_index", "bad_cameras")
STAGE_SECONDS = "stage_seconds"
"""Of each row: (b, 3), seconds that it took to read it, to decode it, and in a tower of the stream."""
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How an episode dataset becomes micro-batches."""

    seed: int = 1000
    """Of the order of samples, and with it of noise and time."""
    micro_batch: int = 8
    """Rows a worker takes through the model at once."""
    mixing_rows: int = 1024
    """Rows shuffled together; a multiple of `micro_batch`."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "mixing_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if self.mixing_rows % self.micro_batch:
            raise ValueError(
                f"mixing_rows {self.mixing_rows} is not a multiple of micro_batch {self.micro_batch}"
            )
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative")


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture, with what its rows need on the way to the model."""

    dataset: EpisodeDataset
    normalizer: Normalizer
    tokens: NDArray[np.int64]
    """(tasks, L): the token ids of each task string."""
    token_mask: NDArray[np.bool_]
    """(tasks, L): True where a token is real."""
    weight: float | None = None
    """Share of the mixture, in any unit; None for all: each its number of frames."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Camera column of the dataset -> camera of the policy; others keep their names."""
    name: str = ""
    """What metrics and files call it; empty: the end of its URI."""
    features: StoredFeatures | None = None
    """What is read instead of its images; of all datasets of a reader, or of none."""

    @property
    def title(self) -> str:
        """Its name, given or not."""
        return self.name or parted(self.dataset.uri)[1]

    @property
    def camera_columns(self) -> dict[str, str]:
        """Camera of the policy -> column of the dataset."""
        return {self.rename.get(name, name): name for name in self.dataset.camera_names}


@dataclass(frozen=True)
class Fit:
    """What becomes of one dataset's images of a camera; (height, width) in pixels."""

    stored: tuple[int, int]
    """As declared; an image of another size cannot be used."""
    scaled: tuple[int, int]
    """Resized to this; where the stream hands on larger images, zeros fill the left and the top."""


@dataclass(frozen=True)
class SampleReader:
    """Turns rows of the plan into encoded rows, and encoded rows into arrays. Knows no Ray."""

    sources: Sequence[Source]
    config: StreamConfig
    chunk_size: int
    """H: actions in a window, in frames of the policy."""
    image_box: Sequence[int] | None
    """(width, height) in pixels; larger images are shrunk to fit inside. None: they stay as they are."""
    fps: float | None = None
    """Frames a second of the policy; None: each dataset's own. Every frame of the data is still a sample."""
    num_observations: int = 1
    """n: moments of state and images in a sample, the last one its own; above 1 they get an axis of it."""
    augmentation: AugmentationConfig | None = None
    """Of the micro-batches' images; rows that belong to none, those of validation, stay as they are."""

    def __post_init__(self) -> None:
        assert self._fits  # refuses image sizes that cannot be brought together
        assert len({source.features is None for source in self.sources}) == 1

    def __getstate__(self) -> dict[str, Any]:
        return {
            f.name: getattr(self, f.name) for f in fields(self)
        }  # open files and the plan stay in their process

    @functools.cached_property
    def plan(self) -> Plan:
        """The order of rows."""
        weights = [source.weight for source in self.sources]
        given = [weight for weight in weights if weight is not None]
        if given and len(given) != len(weights):
            raise ValueError(f"weights {weights}: give every dataset a weight, or none")
        return Plan(
            [source.dataset.row_groups.rows for source in self.sources],
            weights=given or None,
            seed=self.config.seed,
            micro_batch=self.config.micro_batch,
            mixing_rows=self.config.mixing_rows,
        )

    @functools.cached_property
    def camera_names(self) -> list[str]:
        """Cameras of all datasets under the policy's names; those of the first dataset come first."""
        return list(dict.fromkeys(name for source in self.sources for name in source.camera_columns))

    @property
    def words(self) -> NDArray[np.int64]:
        """Every token id that a row may have, once: those of all tasks, and 0 behind shorter ones."""
        return np.unique(np.concatenate([[0], *(source.tokens.reshape(-1) for source in self.sources)]))

    @property
    def from_features(self) -> bool:
        """Whether rows have features instead of images; of their own moment, which the policy looks at."""
        return self.sources[0].features is not None

    @property
    def from_images(self) -> "SampleReader":
        """The same rows with their images."""
        return replace(self, sources=[replace(source, features=None) for source in self.sources])

    @functools.cached_property
    def cameras_that_some_lack(self) -> list[str]:
        """Cameras whose rows carry `<camera>_padding_mask`: not every dataset has them."""
        columns = [source.camera_columns for source in self.sources]
        return [name for name in self.camera_names if not all(name in has for has in columns)]

    def encoded(self, group: int, *, first: int = 0) -> Iterator[pa.Table]:
        """The micro-batches of a mixing group from its `first` one on, images still compressed."""
        per_group = self.plan.batches_per_group
        numbers = range(group * per_group + first, (group + 1) * per_group)
        return self.encoded_blocks(group, [[number] for number in numbers])

    def encoded_blocks(self, group: int, blocks: Sequence[Sequence[int]]) -> Iterator[pa.Table]:
        """For each block the rows of its micro-batches, all of one mixing group, images still compressed."""
        b, per_group = self.config.micro_batch, self.plan.batches_per_group
        numbers = [np.array(block, dtype=np.int64) for block in blocks]
        places = (np.concatenate(numbers) - group * per_group)[:, None] * b + np.arange(b)
        rows = self.plan.mixing_group(group)[places.reshape(-1)]
        tables = self._in_order(rows, sizes=[len(block) * b for block in blocks])
        for block, table in zip(numbers, tables, strict=True):
            yield table.append_column("micro_batch", pa.array(np.repeat(block, b)))

    def encoded_rows(self, rows: Rows) -> pa.Table:
        """Rows in the order given, images still compressed."""
        (table,) = self._in_order(rows, sizes=[len(rows.source)])
        return table

    def _in_order(self, rows: Rows, *, sizes: Sequence[int]) -> Iterator[pa.Table]:
        """The rows, cut into tables of these sizes: read unit by unit, then put in order.

        Images are copied once, and not before their table is asked for: they are nearly all of the bytes.
        """
        keys = np.stack([rows.source, rows.row_group], axis=1)
        units, unit_of_row = np.unique(keys, axis=0, return_inverse=True)
        unit_of_row = unit_of_row.reshape(-1)
        tables = self._units([(source, unit) for source, unit in units.tolist()])
        starts = np.cumsum([0] + [len(table) for table in tables])[:-1]
        small = pa.concat_tables([table.drop_columns(self.camera_names) for table in tables])
        small = small.combine_chunks().take(pa.array(starts[unit_of_row] + rows.offset))
        small = small.append_column("source", pa.array(rows.source))
        small = small.append_column("epoch", pa.array(rows.epoch))
        images: dict[str, PackedRows | _Binaries] = {}
        for name in self.camera_names:
            columns = [table[name] for table in tables]
            images[name] = (
                PackedRows(columns) if self.from_features else _Binaries(columns, self._block_memory)
            )
        first = 0
        for size in sizes:
            taken, piece = slice(first, first + size), small.slice(first, size)
            # copied: a slice would keep all rows, and take them along to the workers
            table = pa.table({name: piece[name].combine_chunks() for name in piece.column_names})
            first += size
            for name, column in images.items():
                table = table.append_column(name, column.taken(unit_of_row[taken], rows.offset[taken]))
            yield table

    def frame_steps(self, source: int, count: int) -> Int64:
        """(count,): frames of a dataset between a moment and the policy's frames after it."""
        fps = self.sources[source].dataset.fps
        return frame_steps(count, data_fps=fps, policy_fps=self.fps or fps)

    def _units(self, units: Sequence[tuple[int, int]]) -> list[pa.Table]:
        """The rows of (source, unit) each, several files at a time."""
        by_file: dict[tuple[int, int], list[int]] = {}
        for place, (source, unit) in enumerate(units):
            file = int(self.sources[source].dataset.row_groups.file[unit])
            by_file.setdefault((source, file), []).append(place)

        def read(places: list[int]) -> list[tuple[int, pa.Table]]:
            return [(place, self._unit(*units[place])) for place in places]

        remote = any("://" in self.sources[source].dataset.uri for source, _ in by_file)
        with ThreadPoolExecutor(READ_THREADS if remote else 1) as pool:  # one a file: its reader is for one
            found = dict(pair for pairs in pool.map(read, by_file.values()) for pair in pairs)
        return [found[place] for place in range(len(units))]

    def _unit(self, source: int, unit: int) -> pa.Table:
        """All rows of one row group, with what they need of the frames before and behind it."""
        dataset = self.sources[source].dataset
        groups = dataset.row_groups
        episode, first_frame, rows = (
            groups.episode[unit],
            int(groups.first_frame[unit]),
            int(groups.rows[unit]),
        )
        file, cameras = self._file(source, int(groups.file[unit])), self.sources[source].camera_columns
        columns = ["observation.state", *FRAME, "task_index"]
        columns += [] if self.from_features else cameras.values()
        frames = np.arange(first_frame, first_frame + rows)[:, None]
        # (rows, n): the moments that each row sees; the first frame stands for those before the episode
        seen = np.maximum(frames - self.frame_steps(source, self.num_observations)[::-1], 0)
        read, first_read = self._episode_rows(
            source, file, unit, columns, first=int(seen.min()), last=int(frames.max())
        )
        table = read.slice(first_frame - first_read)
        expected = (int(dataset.episode_index[episode]), first_frame, first_frame + rows - 1)
        found = (
            table["episode_index"][0].as_py(),
            table["frame_index"][0].as_py(),
            table["frame_index"][-1].as_py(),
        )
        if expected != found:
            name = f"{dataset.uri}/{dataset.files[groups.file[unit]]}"
            raise ValueError(
                f"{name}: row group {groups.group[unit]} holds (episode, frames) {found}, not {expected}"
            )
        length = int(dataset.episode_length[episode])
        window = frames + self.frame_steps(source, self.chunk_size)
        ahead, _ = self._episode_rows(
            source, file, unit, ["action"], first=first_frame, last=int(window.max())
        )
        chunk = _vectors(ahead["action"])[np.minimum(window, length - 1) - first_frame]  # (rows, H, A)
        state = _vectors(read["observation.state"])[seen - first_read]  # (rows, n, S)
        arrays = {"observation.state": state, "action": chunk, "action_is_pad": window >= length}
        filled: dict[str, Any] = {name: table[name] for name in (*FRAME, "task_index")}
        for name, values in arrays.items():
            flat = pa.array(values.reshape(-1))
            filled[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
        if self.from_features:
            return self._with_features(pa.table(filled), source, unit)
        for name in self.camera_names:
            encoded = pa.nulls(rows * self.num_observations, pa.large_binary())
            if name in cameras:
                encoded = whole(read[cameras[name]]).field("bytes").cast(pa.large_binary())
                if self.num_observations > 1:
                    encoded = encoded.take(pa.array((seen - first_read).reshape(-1)))
            if self.num_observations > 1:
                encoded = pa.FixedSizeListArray.from_arrays(encoded, self.num_observations)
            filled[name] = encoded
        return pa.table(filled)

    def _with_features(self, table: pa.Table, source: int, unit: int) -> pa.Table:
        """The rows of a unit with their packed features; null for a camera that the dataset lacks."""
        dataset, features = self.sources[source].dataset, self.sources[source].features
        assert features is not None
        groups, cameras = dataset.row_groups, self.sources[source].camera_columns
        number, group, skip = int(groups.file[unit]), int(groups.group[unit]), int(groups.skip[unit])
        file = self._feature_file(source, number)
        found = file.read_row_groups([group], columns=[*FRAME, *cameras.values()], use_threads=False)
        found = found.slice(skip, len(table))
        if not all(found[name].equals(table[name]) for name in FRAME):
            raise ValueError(f"{features.path(dataset.files[number])}: row group {group} holds other frames")
        for name in self.camera_names:
            none = pa.nulls(len(table), pa.binary(self._feature_bytes(name)))
            table = table.append_column(name, found[cameras[name]] if name in cameras else none)
        return table

    def _feature_source(self, camera: str) -> tuple[StoredFeatures, str]:
        """Features that have a camera, and its column in them; those of all datasets have one form."""
        source = next(source for source in self.sources if camera in source.camera_columns)
        assert source.features is not None
        return source.features, source.camera_columns[camera]

    def _feature_bytes(self, camera: str) -> int:
        """Of a row."""
        features, column = self._feature_source(camera)
        return features.row_bytes(column)

    def _episode_rows(
        self, source: int, file: pq.ParquetFile, unit: int, columns: list[str], *, first: int, last: int
    ) -> tuple[pa.Table, int]:
        """The units of the unit's episode with its frames from `first` to `last` or its end; their first."""
        dataset = self.sources[source].dataset
        groups, episode = dataset.row_groups, int(dataset.row_groups.episode[unit])
        start, end = (int(place) for place in dataset.groups_of_episode[episode : episode + 2])
        low, high = np.searchsorted(groups.first_frame[start:end], [first, last], side="right") + start
        units = range(int(low) - 1, int(high))
        window = slice(units.start, units.stop)  # an episode's frames stand one after the other in its file
        table = file.read_row_groups(groups.group[window].tolist(), columns=columns, use_threads=False)
        table = table.slice(int(groups.skip[units.start]), int(groups.rows[window].sum()))
        return table, int(groups.first_frame[units.start])

    @functools.cached_property
    def _file(self) -> Callable[[int, int], pq.ParquetFile]:
        """(source, number of the file) -> the open file."""
        return functools.lru_cache(OPEN_FILES)(
            lambda source, number: self.sources[source].dataset.open_file(number)
        )

    @functools.cached_property
    def _feature_file(self) -> Callable[[int, int], pq.ParquetFile]:
        """(source, number of the data file) -> the open file with its features."""

        def opened(source: int, number: int) -> pq.ParquetFile:
            features = self.sources[source].features
            assert features is not None
            return features.open_file(self.sources[source].dataset.files[number])

        return functools.lru_cache(OPEN_FILES)(opened)

    def decoded(self, batch: pa.Table) -> Batch:
        """Encoded rows -> arrays: images uint8 (b, h, w, 3), the rest float32, int64 and bool.

        Instead of images there may be features, `<camera>_features` (b, tokens, entries), packed. With
        several observations images are (b, n, h, w, 3) and states (b, n, S).
        """
        return self.with_images(self.without_images(batch), batch)

    def without_images(self, batch: pa.Table) -> Batch:
        """What `decoded` gives but images and features: little work a row, and less for many at once."""
        b, n = len(batch), self.num_observations
        out: Batch = {name: batch[name].to_numpy() for name in ROW_IDS if name in batch.column_names}
        out["action_is_pad"] = _vectors(batch["action_is_pad"])
        state = _vectors(batch["observation.state"])
        state = state.reshape(b, n, -1) if n > 1 else state
        action = _vectors(batch["action"]).reshape(b, self.chunk_size, -1)
        task = batch["task_index"].to_numpy()
        out["observation.state"], out["action"] = np.empty_like(state), np.empty_like(action)
        width = max(source.tokens.shape[1] for source in self.sources)
        out[TOKENS], out[TOKEN_MASK] = np.zeros((b, width), dtype=np.int64), np.zeros((b, width), dtype=bool)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(out["source"] == number)
            for name, values in (("observation.state", state), ("action", action)):
                out[name][mine] = source.normalizer.normalize(name, values[mine])
            tokens = source.tokens.shape[1]
            out[TOKENS][mine, :tokens] = source.tokens[task[mine]]
            out[TOKEN_MASK][mine, :tokens] = source.token_mask[task[mine]]
        for camera in self.cameras_that_some_lack:
            has = [(source, camera) in self._fits for source in out["source"].tolist()]
            out[PADDING_MASK.format(camera)] = np.array(has)
        return out

    def with_images(self, batch: Batch, encoded: pa.Table) -> Batch:
        """Those rows with their images or features: what `without_images` of `encoded` left out."""
        out = batch | {"bad_cameras": np.zeros(len(encoded), dtype=np.int64)}
        add = self._add_features if self.from_features else self._add_images
        for number, camera in enumerate(self.camera_names):
            add(out, encoded[camera], number=number)
        # Nothing is learned from a row that nobody can see.
        out["action_is_pad"] = out["action_is_pad"] | (out["bad_cameras"] != 0)[:, None]
        return out

    def _add_features(self, out: Batch, column: pa.ChunkedArray, *, number: int) -> None:
        """Add the features of camera `number` to `out`, and to `bad_cameras` where there should be some."""
        camera = self.camera_names[number]
        features, missing = unpacked_rows(column, *self._feature_source(camera))
        has = np.array([camera in source.camera_columns for source in self.sources])[out["source"]]
        out["bad_cameras"] |= (missing & has).astype(np.int64) << number
        out[IMAGE_FEATURES.format(camera)] = features

    def _add_images(self, out: Batch, column: pa.ChunkedArray, *, number: int) -> None:
        """Add the images of camera `number` to `out`, and to its `bad_cameras` where there should be one."""
        b, n, camera = len(column), self.num_observations, self.camera_names[number]
        height, width = self.image_size(camera)
        images = self._image_memory(camera, (b * n, height, width, 3))
        fits = [self._fits.get((source, camera)) for source in out["source"].tolist()]
        augment = self._augmentation(out, number)
        for i, stored in enumerate(whole(column).flatten() if n > 1 else column):
            fit = fits[i // n]
            if fit is None or fit.scaled != (height, width):
                images[i] = 0
            if fit is None:
                continue
            place = images[i, height - fit.scaled[0] :, width - fit.scaled[1] :]
            if not decoded_into(place, stored.as_py(), fit):
                out["bad_cameras"][i // n] |= 1 << number
                images[i] = 0
            elif augment:
                place[...] = augment(place, i // n)
        out[camera] = images.reshape(b, n, height, width, 3) if n > 1 else images

    def _image_memory(self, camera: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Of undefined content."""
        return self._batch_memory[camera].of(math.prod(shape)).reshape(shape)

    @functools.cached_property
    def _batch_memory(self) -> dict[str, "_KeptMemory"]:
        return defaultdict(lambda: _KeptMemory(KEPT_BATCHES))

    @functools.cached_property
    def _block_memory(self) -> "_KeptMemory":
        return _KeptMemory(KEPT_BLOCKS * len(self.camera_names))

    def _augmentation(self, batch: Batch, camera: int) -> Callable[[Any, int], Any] | None:
        """(image, row) -> image; the batch holds whole micro-batches, and a history is treated alike."""
        config = self.augmentation
        if config is None or not config.is_on or "micro_batch" not in batch:
            return None
        numbers, b, seed = batch["micro_batch"], self.config.micro_batch, self.config.seed
        return lambda image, row: augmented(
            image, config, draws(seed, micro_batch=int(numbers[row]), row=row % b, camera=camera)
        )

    def image_size(self, camera: str) -> tuple[int, int]:
        """(h, w) of a camera's images as the stream hands them on.

        Shrunk to fit the box, never enlarged; where the datasets then differ, the whole box.
        """
        sizes = {self._shrunk_size(fit.stored) for (_, name), fit in self._fits.items() if name == camera}
        if len(sizes) == 1:
            return sizes.pop()
        assert self.image_box is not None
        return self.image_box[1], self.image_box[0]

    def batches_per_block(self, size: int) -> int:
        """Micro-batches whose decoded images, or features, fit into `size` bytes, at least one."""
        pixels = sum(math.prod(self.image_size(camera)) for camera in self.camera_names)
        row = 3 * pixels * self.num_observations
        if self.from_features:
            row = sum(self._feature_bytes(camera) for camera in self.camera_names)
        return max(size // (row * self.config.micro_batch), 1)

    def _shrunk_size(self, stored: tuple[int, int]) -> tuple[int, int]:
        if self.image_box is None:
            return stored
        return fitted_size(*stored, box=(self.image_box[0], self.image_box[1]))

    @functools.cached_property
    def _fits(self) -> dict[tuple[int, str], Fit]:
        """(number of the source, camera) -> what becomes of its images."""
        fits: dict[tuple[int, str], Fit] = {}
        for camera in self.camera_names:
            stored = {
                number: source.dataset.image_size(source.camera_columns[camera])
                for number, source in enumerate(self.sources)
                if camera in source.camera_columns
            }
            scaled = {number: self._shrunk_size(size) for number, size in stored.items()}
            if len(set(scaled.values())) > 1:
                if self.image_box is None:
                    sizes = {self.sources[number].dataset.uri: size for number, size in stored.items()}
                    raise ValueError(
                        f"{camera!r} has several sizes (height, width), {sizes}, and this policy's "
                        "resize_imgs_with_padding is null: it takes images as they are"
                    )
                from smolvla.data_utils import fitted_size as enlarged_size  # imports torch

                # The policy would leave these as they are, so this is its own resizing, done earlier.
                box = self.image_box
                scaled = {number: enlarged_size(*size, box) for number, size in stored.items()}
            fits |= {(number, camera): Fit(stored[number], scaled[number]) for number in stored}
        return fits


def decoded_into(place: NDArray[np.uint8], encoded: bytes | None, fit: Fit) -> bool:
    """Fill (h, w, 3) RGB; False if the image cannot be decoded, or has not the declared size.

    Resizing is bilinear without antialiasing, as in the reference; it differs from the reference's float
    arithmetic by rounding to whole levels.
    """
    image = decoded_image(encoded)
    if image is None or image.shape[:2] != fit.stored:
        return False
    shrunk(np.asarray(image, dtype=np.uint8), size=fit.scaled, out=place)
    return True


class _KeptMemory:
    """Memory of earlier arrays, to be used again when nobody holds them any more.

    Memory that is new to a process costs as much as a tenth of what is decoded into it, and more than what
    is copied into it.

    Args:
        most: pieces that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[NDArray[np.uint8], weakref.ref[NDArray[np.uint8]]]] = []
        """Each with the array that was last lent of it: whatever is made of that one refers to it."""
        self._choosing = threading.Lock()

    def of(self, size: int) -> NDArray[np.uint8]:
        """(size,), of undefined content."""
        with self._choosing:
            free = (
                i for i, (memory, lent) in enumerate(self._kept) if lent() is None and len(memory) >= size
            )
            if (place := next(free, None)) is None:
                memory = np.empty(size, dtype=np.uint8)
            else:
                memory, _ = self._kept.pop(place)
            # not a view of `memory`, to which NumPy would let views of the view refer
            lent = np.frombuffer(memoryview(memory), dtype=np.uint8)
            self._kept = [*self._kept, (memory, weakref.ref(lent))][-self._most :]
            return lent[:size]


class _Binaries:
    """Columns of large binaries, or of lists of equally many of them, from which rows are put together.

    Args:
        columns: to choose from.
        memory: what the chosen rows are copied to.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray], memory: _KeptMemory) -> None:
        kind = columns[0].type
        self._n = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
        self._memory = memory
        arrays = [whole(column) for column in columns]
        flat = [array.flatten() if self._n > 1 else array for array in arrays]
        self._offsets = [
            np.frombuffer(a.buffers()[1], np.int64)[a.offset : a.offset + len(a) + 1] for a in flat
        ]
        self._data = [np.frombuffer(a.buffers()[2] or b"", np.uint8) for a in flat]
        self._real = None
        if any(a.null_count for a in flat):
            self._real = [a.is_valid().to_numpy(zero_copy_only=False).reshape(-1, self._n) for a in flat]

    def taken(self, number: Int64, row: Int64) -> pa.Array:
        """Entry row[i] of column number[i] for each i."""
        n, places = self._n, list(zip(number.tolist(), row.tolist(), strict=True))
        bounds = np.empty((len(places), n + 1), dtype=np.int64)
        pieces: list[NDArray[np.uint8]] = []
        for i, (a, r) in enumerate(places):
            bounds[i] = self._offsets[a][r * n : (r + 1) * n + 1]
            pieces.append(self._data[a][bounds[i, 0] : bounds[i, -1]])
        ends = np.cumsum(np.diff(bounds, axis=1).reshape(-1), dtype=np.int64)
        data = self._memory.of(int(ends[-1]) if len(ends) else 0)
        if pieces:
            np.concatenate(pieces, out=data)
        valid = None
        if self._real is not None:
            found = [self._real[a][r] for a, r in places]
            valid = pa.array(np.concatenate([np.empty(0, bool), *found])).buffers()[1]
        buffers = [valid, pa.py_buffer(np.append(np.int64(0), ends)), pa.py_buffer(data)]
        entries = pa.Array.from_buffers(pa.large_binary(), len(ends), buffers)
        return pa.FixedSizeListArray.from_arrays(entries, n) if n > 1 else entries


def _vectors(column: pa.ChunkedArray) -> NDArray[Any]:
    """A list column (or a scalar one, LeRobot's shape (1,)) as (rows, width); others write float64, too."""
    array = whole(column)
    flat = array.flatten() if pa.types.is_nested(column.type) else array
    values = flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return values.astype(np.float32) if values.dtype == np.float64 else values
