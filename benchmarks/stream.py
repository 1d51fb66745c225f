"""What the stream costs beside bare decoding, a DataLoader and random access into videos, and what it gives.

python benchmarks/stream.py [--quick] [--source <LeRobot v3.0 dataset with videos>]

Sides stay alive and take short turns, each after as many rows as it may have had ready: what the machine does
meanwhile meets them all. The ratio of all rounds together counts; *_quartile_1 and _3 say how far the ratios
within a round differ. Nothing else should run: the ratios of CPU seconds of all processes of a side suffer
least when something does. The last line is one JSON object:

The stream decodes in threads of the consumer, as train workers on one machine do by default; *_tasks are of
the stream whose rows are decoded by tasks of Ray Data, as on a cluster with nodes that do not train; not
measured with --quick.

per_core_efficiency     rows a CPU second of the stream (Ray's own processes and the consumer included) over
                        those of a bare loop that reads the same rows, decodes and shrinks, one on each core
                        at once: a core gives less while its neighbour works, to the stream as to a loop.
                        *_one_loop: the same over one bare loop while the other core rests.
vs_dataloader           rows a second over those of a torch DataLoader with 2 workers over the same files: a
                        shuffled row group an item, the same windows, decoding, shrinking and normalising.
vs_random_video         rows a second over those of a map-style DataLoader with 2 workers over the source's
                        mp4 files that does for a frame what LeRobot 0.4.4 does with PyAV: open the file,
                        seek, decode from the key frame on, each frame to RGB, the last as float32 of 0..1.
                        *_resized: the stream of a dataset that was ingested with `--resize 512`, what the
                        policy takes, as README does.
vs_lean_video,          the same over the least that random access needs: one decoding thread, only the frame
vs_open_video           that was asked for becomes RGB, 8 bits and shrunk; open: files are kept open, too.
vs_lerobot_pyav,        rows a second over those of LeRobot's own dataset class under the same DataLoader,
vs_lerobot_torchcodec   with each of its decoders, if LEROBOT_PYTHON names a Python that has LeRobot and
                        torchcodec (see CONTRIBUTING.md; torchcodec needs the libraries of FFmpeg).
distinct_episode_ratio  distinct episodes in batches of 64 at the default settings over those of a shuffle of
                        everything; 200 episodes of 250 frames, row groups of 16.
wait_share              part of its time that a consumer waits whose step is throttled to 1/1.3 of the
                        stream's measured rows a second.
first_batch_s           from building the stream of a dataset of 10,000 files to the first batch, Ray running.
store_peak_mb           most bytes in the object store at any time, beside store_bound_mb; spilled_mb.
core_scaling            rows a second of the stream on two cores over those on one, all of Ray and the
                        consumer included.
plan_reach_s, plan_mb   to reach a far micro-batch of a plan over 10^8 rows in 10^6 row groups.
"""

import argparse
import functools
import gc
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import av
import cv2
import numpy as np
import psutil
import torch
from episode_data import write_dataset
from ingest import pictures
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import ray  # noqa: E402

from pipelines import output, sealing, writer  # noqa: E402
from pipelines.columns import whole  # noqa: E402
from pipelines.dataset import open_dataset  # noqa: E402
from pipelines.images import decoded_image, shrunk  # noqa: E402
from pipelines.plan import Plan, Rows  # noqa: E402
from pipelines.samples import SampleReader, Source, StreamConfig  # noqa: E402
from pipelines.sources.lerobot import LeRobotSource  # noqa: E402
from pipelines.stream import Decoding, deal, execution_options, micro_batches  # noqa: E402
from pipelines.tensors import Decoded, Unpacked  # noqa: E402
from smolvla.data_utils import tokenize_tasks  # noqa: E402
from smolvla.features import Normalizer  # noqa: E402

CORES = 2
SIZE, BOX = (480, 640), (512, 512)
STORE_BYTES = 4 * 10**9
WARM_ROWS = 1024  # a mixing group; processes start and import meanwhile
CHUNK = 50
TURN_ROWS = 1024
LOOP_ROWS = 64  # of each bare loop, until all wait for the last
STREAM_TURN_ROWS = 2048  # twice what is read at once
STREAM_AHEAD_ROWS = 2304  # more than lie ready when nobody takes any
LOADER_AHEAD_ROWS = 384
HALF_A_MS = 0.0005
VIDEO_TURN_ROWS, VIDEO_AHEAD_ROWS = 128, 40  # four batches of 8 lie ready, and one is given


class Side(NamedTuple):
    start: Callable[[], Iterator[int]]
    """Each item is the number of rows of a batch."""
    ahead: int
    """Rows to be taken before each turn: those that lay ready, and others have filled up meanwhile."""
    turn: int = TURN_ROWS
    processes: Sequence[int | None] = ()
    """Those whose CPU time counts; without, this one and all that descend from it."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows; within five minutes on two cores")
    parser.add_argument("--source", default=str(ROOT.parent / "shared/data/lerobot_v30_franka"))
    parser.add_argument(
        "--only", nargs="*", help="parts: plan, shuffle, scaling, shards, rates, video, starvation"
    )
    parser.add_argument("--rate_of", help=argparse.SUPPRESS)  # a process of `scaling`: one stream, alone
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if flags.rate_of:
        start_ray(len(os.sched_getaffinity(0)))
        print(json.dumps(rate(stream_rows(sample_reader(Path(flags.rate_of))), rows=flags.rows)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="stream-benchmark-") as folder:
        results = measure(Path(folder), quick=flags.quick, source=flags.source, only=flags.only)
    print(json.dumps({name: round(value, 4) for name, value in results.items()}), flush=True)


def measure(folder: Path, *, quick: bool, source: str, only: list[str] | None) -> dict[str, float]:
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "plan": plan_cost,
        "shuffle": shuffle_quality,
        "scaling": lambda: scaling(generated(folder), rows=768 if quick else 8192),
        "shards": lambda: many_shards(folder, shards=10_000),
        "rates": lambda: rates(generated(folder), rounds=3 if quick else 25, with_tasks=not quick),
        "video": lambda: video(source, folder, rounds=2 if quick else 12),
        "starvation": lambda: starvation(generated(folder), seconds=20 if quick else 90),
    }
    results: dict[str, float] = {}
    for name in only or parts:
        load = os.getloadavg()[0]
        started = time.perf_counter()
        found = parts[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s, load before {load:.1f}", flush=True)
        for key, value in found.items():
            print(f"    {key:28} {value:.4g}", flush=True)
        results |= found
    return results


# --- the plan alone ---


def plan_cost() -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = Plan([np.full(10**6, 100)], seed=0, micro_batch=8, mixing_rows=1024)
    started = time.perf_counter()
    plan.micro_batch_rows(10**10)
    seconds = time.perf_counter() - started
    plan.micro_batch_rows(5 * 10**8 // 8)  # another epoch: two are kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"plan_reach_s": seconds, "plan_mb": (peak - before) / 1000}


def shuffle_quality() -> dict[str, float]:
    episodes, frames, group = 200, 250, 16
    per_episode = [min(group, frames - start) for start in range(0, frames, group)]
    episode = np.repeat(np.arange(episodes), len(per_episode))
    config = StreamConfig()
    plan = Plan(
        [np.tile(per_episode, episodes)],
        seed=config.seed,
        micro_batch=config.micro_batch,
        mixing_rows=config.mixing_rows,
    )
    groups = episodes * frames // config.mixing_rows
    ours = np.concatenate([episode[plan.mixing_group(g).row_group] for g in range(groups)])
    perfect = np.random.default_rng(0).permutation(np.repeat(np.arange(episodes), frames))[: len(ours)]

    def distinct(ids: np.ndarray) -> float:
        batches = ids[: len(ids) // 64 * 64].reshape(-1, 64).tolist()
        return statistics.fmean(len(set(batch)) for batch in batches)

    found = {"distinct_episodes": distinct(ours), "distinct_episodes_perfect": distinct(perfect)}
    found["distinct_episode_ratio"] = found["distinct_episodes"] / found["distinct_episodes_perfect"]
    for lag in (1, 8, 64, 1024):
        found[f"autocorrelation_{lag}"] = float(np.corrcoef(ours[:-lag], ours[lag:])[0, 1])
        found[f"same_episode_{lag}"] = float((ours[:-lag] == ours[lag:]).mean())  # 1/200 by chance
    return found


# --- the stream and its rivals ---


def sample_reader(path: Path) -> SampleReader:
    dataset = open_dataset(str(path))
    inputs, outputs = dataset.policy_features()
    mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    normalizer = Normalizer(dataset.stats, inputs | outputs, mapping)
    tokens, mask = tokenize_tasks(dataset.tasks, str(ROOT / "configs/policy/tiny/vlm"), max_length=48)
    source = Source(dataset, normalizer, tokens, mask)
    return SampleReader([source], StreamConfig(), chunk_size=CHUNK, image_box=BOX)


def stream(
    reader: SampleReader, *, start: int = 0, decoding: Decoding = "workers"
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of one worker, without end."""
    start_ray()
    gc.freeze()  # as train workers do
    dataset = micro_batches(reader, start=start, stop=1_600_000, decoding=decoding)  # 200,000 steps of 64
    deal(dataset, num_workers=1)
    dataset.context.execution_options = execution_options(decoding, num_workers=1)
    (split,) = dataset.streaming_split(1, equal=True)
    if decoding == "tasks":
        return iter(Unpacked(split, reader.config.micro_batch, pin_memory=False))
    whole: Any = None  # blocks; Ray's hint knows only numbers of rows
    blocks = split.iter_batches(batch_size=whole, batch_format="pyarrow", prefetch_batches=2)
    return iter(Decoded(reader, blocks, threads=len(os.sched_getaffinity(0))))


def stream_rows(reader: SampleReader, *, decoding: Decoding = "workers") -> Iterator[int]:
    for expected, batch in enumerate(stream(reader, decoding=decoding)):
        assert batch["micro_batch"].tolist() == [expected] * len(batch["micro_batch"])
        yield len(batch["micro_batch"])


def bare_rows(reader: SampleReader) -> Iterator[int]:
    """Read row group after row group, decode and shrink; nothing is kept."""
    dataset = reader.sources[0].dataset
    cameras = [(name, reader.image_size(name)) for name in dataset.camera_names]
    for number in itertools.cycle(range(len(dataset.files))):
        file = dataset.open_file(number)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            for name, size in cameras:
                for data in whole(table[name]).field("bytes"):
                    image = decoded_image(data.as_py())
                    assert image is not None
                    shrunk(image, size=size)
            yield len(table)


class RowGroupItems(MapDataset[dict[str, torch.Tensor]]):
    """A row group an item, ready for the model."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.sources[0].dataset.row_groups)

    def __getitem__(self, unit: int) -> dict[str, torch.Tensor]:
        cv2.setNumThreads(1)
        count = int(self.reader.sources[0].dataset.row_groups.rows[unit])
        zeros = np.zeros(count, dtype=np.int64)
        rows = Rows(source=zeros, epoch=zeros, row_group=zeros + unit, offset=np.arange(count))
        batch = self.reader.decoded(self.reader.encoded_rows(rows))
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def loader_rows(reader: SampleReader) -> Iterator[int]:
    while True:
        loader = DataLoader(
            RowGroupItems(reader), batch_size=None, shuffle=True, num_workers=CORES, prefetch_factor=4
        )
        for batch in loader:
            yield len(batch["action"])


class BareLoops:
    """Bare loops in processes of their own, which work when they are asked."""

    def __init__(self, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for _ in range(CORES):
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=_loop, args=(path, theirs), daemon=True))
            self._ends.append(ours)

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def side(self, count: int) -> Side:
        """So many of them at once."""
        pids = [process.pid for process in self._processes[:count]]
        return Side(lambda: self._rows(count), ahead=LOOP_ROWS, processes=pids)

    def _rows(self, count: int) -> Iterator[int]:
        while True:
            for end in self._ends[:count]:
                end.send(LOOP_ROWS)
            yield sum(end.recv() for end in self._ends[:count])


def _loop(path: Path, end: Any) -> None:
    """Work through as many rows as are asked for, as often as somebody asks."""
    cv2.setNumThreads(1)
    batches = bare_rows(sample_reader(path))
    while True:
        end.send(skip(batches, rows=end.recv()))


def rates(path: Path, *, rounds: int, with_tasks: bool) -> dict[str, float]:
    reader = sample_reader(path)
    stream = functools.partial(Side, ahead=STREAM_AHEAD_ROWS, turn=STREAM_TURN_ROWS)
    tasks = {}
    with BareLoops(path) as loops, StoreWatch() as store:
        sides = {
            "stream": stream(lambda: stream_rows(reader)),
            "bare": loops.side(CORES),
            "one_loop": loops.side(1),
            "dataloader": Side(lambda: loader_rows(reader), ahead=LOADER_AHEAD_ROWS),
        }
        workers = in_turns(sides, rounds=rounds)
        if with_tasks:  # not the default, and slower
            tasks_stream = stream(lambda: stream_rows(reader, decoding="tasks"))
            sides = {"tasks": tasks_stream, "bare": loops.side(CORES)}
            tasks = in_turns(sides, rounds=rounds * 3 // 5)
    ratios = {
        **ratio("per_core_efficiency", workers["stream"], workers["bare"], "cpu"),
        **ratio("per_core_efficiency_one_loop", workers["stream"], workers["one_loop"], "cpu"),
        **ratio("vs_dataloader", workers["stream"], workers["dataloader"], "wall"),
        **ratio("vs_dataloader_cpu", workers["stream"], workers["dataloader"], "cpu"),
    }
    if tasks:
        ratios |= ratio("per_core_efficiency_tasks", tasks["tasks"], tasks["bare"], "cpu")
    return ratios | medians(tasks) | medians(workers) | store.found


def in_turns(sides: dict[str, Side], *, rounds: int) -> dict[str, list[dict[str, float]]]:
    """For each side and round its rows a second ("wall") and a CPU second ("cpu")."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    running = {name: side.start() for name, side in sides.items()}
    for name, side in sides.items():
        skip(running[name], rows=side.ahead)  # processes start and import meanwhile
    for _ in range(rounds):
        for name, side in sides.items():
            skip(running[name], rows=side.ahead)
            found[name].append(pace(running[name], rows=side.turn, processes=side.processes))
    return found  # with `running` go the sides' processes and Ray Data executions


def skip(batches: Iterator[int], *, rows: int) -> int:
    """Take at least as many rows; how many it were."""
    seen = 0
    while seen < rows:
        seen += next(batches)
    return seen


def pace(batches: Iterator[int], *, rows: int, processes: Sequence[int | None] = ()) -> dict[str, float]:
    """Rows a second and a CPU second, of all processes or of those."""
    cpu, started = cpu_seconds(processes), time.perf_counter()
    seen = skip(batches, rows=rows)
    wall = time.perf_counter() - started
    return {"wall": seen / wall, "cpu": seen / cpu_since(cpu, processes)}


def rate(batches: Iterator[int], *, rows: int, warm: int = WARM_ROWS) -> dict[str, float]:
    """Of a side that runs alone: it ends with this call if nobody else has it."""
    skip(batches, rows=warm)
    return pace(batches, rows=rows)


def ratio(
    name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]], kind: str
) -> dict[str, float]:
    each = [one[kind] / other[kind] for one, other in zip(ours, theirs, strict=True)]
    first, _, third = statistics.quantiles(each, n=4, method="inclusive")
    whole = statistics.harmonic_mean([one[kind] for one in ours])
    whole /= statistics.harmonic_mean([other[kind] for other in theirs])
    return {name: whole, f"{name}_quartile_1": first, f"{name}_quartile_3": third}


def medians(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    return {
        f"{name}_rows_per_{'s' if kind == 'wall' else 'cpu_s'}": statistics.median(r[kind] for r in rounds)
        for name, rounds in found.items()
        for kind in ("wall", "cpu")
    }


def cpu_seconds(pids: Sequence[int | None] = ()) -> dict[int, float]:
    """Process id -> CPU seconds; without ids, of this process and its descendants."""
    found = {}
    for pid in pids or [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        found[pid] = times.user + times.system
    return found


def cpu_since(before: dict[int, float], pids: Sequence[int | None] = ()) -> float:
    """CPU seconds since then; a process that ended meanwhile takes its own with it."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds(pids).items())


class StoreWatch:
    """Samples the object store while its block runs."""

    def __enter__(self) -> "StoreWatch":
        start_ray()
        self._done = threading.Event()
        self._peak = self._spilled = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        from ray._private.internal_api import memory_summary

        while not self._done.wait(4.0):  # a look costs all of Ray 10 ms of CPU
            text = memory_summary(stats_only=True)
            if used := re.search(r"Plasma memory usage (\d+) MiB", text):
                self._peak = max(self._peak, float(used[1]))
            if spilled := re.search(r"Spilled (\d+) MiB", text):
                self._spilled = max(self._spilled, float(spilled[1]))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def found(self) -> dict[str, float]:
        # Ray Data keeps what it produces ahead within half of the object store.
        bound = STORE_BYTES / 2 / 2**20
        return {"store_peak_mb": self._peak, "store_bound_mb": bound, "spilled_mb": self._spilled}


# --- against random access into videos ---


class VideoFrames(MapDataset[torch.Tensor]):
    """A frame of a camera an item, read with PyAV as LeRobot 0.4.4 does (see its decode_video_frames)."""

    def __init__(self, source: str) -> None:
        self.places = [
            (f"{source}/{clip.path}", clip.from_s + frame / fps)
            for fps, clip, frames in _clips(source)
            for frame in range(frames)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, moment_s = self.places[index]
        seen, times = [], []
        with av.open(path) as container:
            for frame in decoded_from(container, moment_s):
                seen.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
                times.append(frame.time)
                if times[-1] >= moment_s:
                    break
        nearest = int(np.abs(np.asarray(times) - moment_s).argmin())
        return seen[nearest].to(torch.float32) / 255


class LeanVideoFrames(VideoFrames):
    """The same frames with the least work.

    Args:
        keep_open: files stay open, so that a frame costs no more than a seek and decoding.
    """

    def __init__(self, source: str, *, keep_open: bool) -> None:
        super().__init__(source)
        self.keep_open = keep_open
        self._open: dict[str, Any] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        path, moment_s = self.places[index]
        if not self.keep_open:
            with self._opened(path) as container:
                return self._frame(container, moment_s)
        if path not in self._open:
            self._open[path] = self._opened(path)
        return self._frame(self._open[path], moment_s)

    def _opened(self, path: str) -> Any:
        container = av.open(path)
        container.streams.video[0].codec_context.thread_count = 1
        return container

    def _frame(self, container: Any, moment_s: float) -> torch.Tensor:
        frames = decoded_from(container, moment_s)
        shown = next(frame for frame in frames if frame.time >= moment_s - HALF_A_MS)
        return torch.from_numpy(shrunk(shown.to_ndarray(format="rgb24"), size=(384, 512)))


def decoded_from(container: Any, moment_s: float) -> Iterator[Any]:
    """Frames from the last key frame before that moment on."""
    video_stream = container.streams.video[0]
    container.seek(round(moment_s / video_stream.time_base), stream=video_stream)
    return container.decode(video_stream)


def _clips(source: str) -> Iterator[tuple[float, Any, int]]:
    listing = LeRobotSource(uri=source).listing()
    for unit in listing.units:
        for clip in unit.detail.clips.values():
            yield listing.fps, clip, unit.num_frames


def video_rows(frames: VideoFrames) -> Iterator[int]:
    while True:
        for batch in DataLoader(frames, batch_size=8, shuffle=True, num_workers=CORES):
            yield len(batch)


def video(source: str, folder: Path, *, rounds: int) -> dict[str, float]:
    def loader(frames: VideoFrames) -> Side:
        return Side(lambda: video_rows(frames), ahead=VIDEO_AHEAD_ROWS, turn=VIDEO_TURN_ROWS)

    sides = {}
    for suffix, resize in (("", None), ("_resized", BOX)):
        target = folder / f"from-video{suffix}"
        ingested(source, target, resize=resize)
        start = functools.partial(stream_rows, sample_reader(target))
        sides[f"video_stream{suffix}"] = Side(start, ahead=STREAM_AHEAD_ROWS)
    sides["random_video"] = loader(VideoFrames(source))
    sides["lean_video"] = loader(LeanVideoFrames(source, keep_open=False))
    sides["open_video"] = loader(LeanVideoFrames(source, keep_open=True))
    if python := os.environ.get("LEROBOT_PYTHON"):
        for backend in ("pyav", "torchcodec"):
            start = functools.partial(lerobot_rows, python, source, backend)
            sides[f"lerobot_{backend}"] = Side(start, ahead=VIDEO_AHEAD_ROWS, turn=VIDEO_TURN_ROWS)
    paces = in_turns(sides, rounds=rounds)
    ratios = {}
    for name in [name for name in sides if not name.startswith("video_stream")]:
        for suffix in ("", "_resized"):
            ratios |= ratio(f"vs_{name}{suffix}", paces[f"video_stream{suffix}"], paces[name], "wall")
    return ratios | {name: value for name, value in medians(paces).items() if name.endswith("_per_s")}


def lerobot_rows(python: str, source: str, backend: str) -> Iterator[int]:
    command = [python, str(ROOT / "benchmarks/lerobot_loader.py"), source, "--backend", backend]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            process.stdin.write("\n")
            yield int(process.stdout.readline())


def ingested(source: str, target: Path, *, resize: tuple[int, int] | None) -> None:
    """Decode the videos into an episode dataset, in this process."""
    lerobot, options = LeRobotSource(uri=source), writer.WriterOptions(resize=resize)
    listing = lerobot.listing()
    place = output.opened(str(target), listing, options, append=False)
    output.begin(place, listing)
    outcome = writer.stage_part(lerobot.episodes(listing.units), place.layout, part=0)
    shards = writer.shards_of(outcome["episodes"], listing.tasks, options)
    for shard in shards:
        writer.assemble_shard(place.layout, shard)
    sealing.seal(place, listing, outcomes=[outcome], shards=shards, tasks=listing.tasks, code_version=None)


# --- a consumer that leaves the stream some air ---


def starvation(path: Path, *, seconds: float) -> dict[str, float]:
    batches = stream(sample_reader(path))
    rows = len(next(batches)["micro_batch"])
    started, seen = time.perf_counter(), 0
    while time.perf_counter() - started < seconds / 2:
        seen += len(next(batches)["micro_batch"])
    capacity = seen / (time.perf_counter() - started)
    step_s = rows * 1.3 / capacity
    waited, begun = 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds / 2:
        started = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - started
        time.sleep(step_s)  # the model's work, on another device
    return {
        "wait_share": waited / elapsed,
        "capacity_rows_per_s": capacity,
        "demand_rows_per_s": rows / step_s,
    }


# --- one core and two ---


def scaling(path: Path, *, rows: int) -> dict[str, float]:
    """Each in a process of its own, whose Ray knows no other cores."""
    allowed, found = os.sched_getaffinity(0), {}
    command = [sys.executable, __file__, "--rate_of", str(path), "--rows", str(rows)]
    for cores in range(1, CORES + 1):
        os.sched_setaffinity(0, sorted(allowed)[:cores])  # Ray's processes inherit it
        # Ray may end it with an error once it has printed: its stream is not over
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        os.sched_setaffinity(0, allowed)
        found[cores] = json.loads(done.stdout.splitlines()[-1])["wall"]
    return {"core_scaling": found[CORES] / found[1], "one_core_rows_per_s": found[1]}


# --- ten thousand files ---


def many_shards(folder: Path, *, shards: int) -> dict[str, float]:
    image = cv2.imencode(".jpg", np.full((8, 8, 3), 90, np.uint8))[1].tobytes()
    path = write_dataset(folder / "shards", [image], size=(8, 8), lengths=[32] * shards, per_shard=1)
    start_ray()
    started = time.perf_counter()
    reader = sample_reader(path)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    next(stream(reader, start=12345))
    return {"first_batch_s": time.perf_counter() - started, "open_10000_files_s": opened}


def generated(folder: Path) -> Path:
    """200 episodes of 20 to 60 frames at 480x640."""
    path = folder / "generated"
    if not path.exists():
        clip = []
        for image in pictures(40):
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            clip.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
        lengths = np.random.default_rng(0).integers(20, 60, 200).tolist()
        write_dataset(path, clip, size=SIZE, lengths=lengths, per_shard=25)
    return path


def start_ray(num_cpus: int = CORES) -> None:
    if not ray.is_initialized():
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        os.environ |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # for all processes of this Ray
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=STORE_BYTES,
        )


if __name__ == "__main__":
    main()
