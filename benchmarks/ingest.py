"""What ingestion costs beside bare decoding and encoding, how it scales, and what memory a task takes.

python benchmarks/ingest.py [--quick] [--source <LeRobot dataset with videos>]

Without --source the script encodes a dataset of its own: 480x640, AV1 as LeRobot records it. The last line is
one JSON object:

per_core_efficiency  frames a CPU second of our staging (read, check, decode, count, encode, hash, write), one
                     process, over those of a bare loop on the same files: PyAV decode to RGB and cv2.imencode
                     at quality 95. Sums of the fastest of several alternating repetitions.
scaling_2            frames a second of an ingestion with two Ray tasks over one with one, each the
                     better of two.
peak_memory_gb       peak resident memory of the process that stages and assembles one long episode of two
                     cameras, shared libraries included.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.container import OutputContainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402

from pipelines import output, sealing, writer  # noqa: E402
from pipelines.ingestion import Progress, ingest  # noqa: E402
from pipelines.sources.lerobot import LeRobotSource  # noqa: E402

HEIGHT, WIDTH, FPS = 480, 640, 30
CAMERAS = ("observation.images.front", "observation.images.wrist")
CLIP_FRAMES = 120
"""Frames that are really encoded for a generated video; longer ones repeat the packets."""
LONG_EPISODE = 20_000

Clip = list[tuple[bytes, bool]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer frames; within five minutes on two cores")
    parser.add_argument("--source", help="a LeRobot dataset with videos for the first two numbers")
    flags = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="ingest-benchmark-") as folder:
        results = measure(Path(folder), quick=flags.quick, source=flags.source)
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


def measure(folder: Path, *, quick: bool, source: str | None) -> dict[str, float]:
    clip = encoded_clip(folder)
    if source is None:
        source = str(write_dataset(folder / "short", clip, lengths=[240] * 4, cameras=CAMERAS[:1]))
    print(f"per-core: {source}", flush=True)
    results = efficiency(source, folder, repetitions=2 if quick else 5)

    lengths = [CLIP_FRAMES * 2] * (16 if quick else 48)  # a part each
    many = write_dataset(folder / "many", clip, lengths=lengths, cameras=CAMERAS[:1])
    print(f"scaling: {sum(lengths)} frames of one camera", flush=True)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2):  # in turn, and the better of each: other work on the machine comes and goes
        for tasks, found in rates.items():
            found.append(rate_of(many, folder / f"turn-{turn}-tasks-{tasks}", num_tasks=tasks))
    one, two = (max(found) for found in rates.values())
    results |= {"frames_per_s_1": one, "frames_per_s_2": two, "scaling_2": two / one}

    frames = 2400 if quick else LONG_EPISODE
    print(f"memory: one episode of {frames} frames, two cameras", flush=True)
    if quick:
        print(f"--quick measures {frames} frames; a full run measures {LONG_EPISODE}")
    long = write_dataset(folder / "long", clip, lengths=[frames], cameras=CAMERAS)
    return results | {"peak_memory_gb": peak_memory_gb(long, folder / "staged"), "memory_frames": frames}


# --- per core ---


def efficiency(source: str, folder: Path, *, repetitions: int) -> dict[str, float]:
    """Frames a CPU second of both loops; each episode counts with its fastest repetition."""
    reader = LeRobotSource(uri=source)
    listing = reader.listing()
    options = writer.WriterOptions()
    layout = writer.layout_of(str(folder / "per-core"), listing, options)
    ours: dict[int, list[float]] = {}
    bare: dict[int, list[float]] = {}
    for _ in range(repetitions + 1):  # the first warms up
        for part, unit in enumerate(listing.units):
            paths = [f"{source}/{clip.path}" for clip in unit.detail.clips.values()]
            bare.setdefault(part, []).append(seconds_of_bare(paths))
            started = time.process_time()
            outcome = writer.stage_part(reader.episodes([unit]), layout, part=part)
            ours.setdefault(part, []).append(time.process_time() - started)
            assert not outcome["refusals"], outcome["refusals"]
    num_frames = sum(unit.num_frames * len(unit.detail.clips) for unit in listing.units)
    fastest = [sum(min(found[1:]) for found in seconds.values()) for seconds in (ours, bare)]
    return {
        "ours_frames_per_cpu_s": num_frames / fastest[0],
        "bare_frames_per_cpu_s": num_frames / fastest[1],
        "per_core_efficiency": fastest[1] / fastest[0],
    }


def seconds_of_bare(paths: Sequence[str]) -> float:
    """Decode whole files and encode every frame; nothing is kept."""
    started = time.process_time()
    for path in paths:
        with av.open(path) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                cv2.imencode(".jpg", frame.to_ndarray(format="rgb24"), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return time.process_time() - started


# --- on Ray ---


def rate_of(source: Path, target: Path, *, num_tasks: int) -> float:
    """Frames a second between the first finished part and the last: Ray's start and the sealing left out."""
    seen: list[Progress] = []
    ingest(
        LeRobotSource(uri=str(source)),
        str(target),
        options=writer.WriterOptions(),
        max_refused=0.0,
        code_version=None,
        start_ray=lambda: start_ray(num_tasks),
        on_progress=seen.append,
    )
    ray.shutdown()
    first, last = seen[num_tasks - 1], seen[-1]
    return (last.frames - first.frames) / (last.elapsed_s - first.elapsed_s)


def start_ray(num_cpus: int) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )


def peak_memory_gb(source: Path, target: Path) -> float:
    start_ray(1)
    peak = ray.get(ray.remote(_peak_of_one_episode).remote(str(source), str(target)))
    ray.shutdown()
    return peak


def _peak_of_one_episode(source: str, target: str) -> float:
    """Do what the tasks of an ingestion do, one after the other, in this process."""
    reader, options = LeRobotSource(uri=source), writer.WriterOptions()
    listing = reader.listing()
    place = output.opened(target, listing, options, append=False)
    output.begin(place, listing)
    outcome = writer.stage_part(reader.episodes(listing.units), place.layout, part=0)
    assert len(outcome["episodes"]) == 1, outcome["refusals"]
    shards = writer.shards_of(outcome["episodes"], listing.tasks, options)
    for shard in shards:
        writer.assemble_shard(place.layout, shard)
    sealing.seal(place, listing, outcomes=[outcome], shards=shards, tasks=listing.tasks, code_version=None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- generated data ---


def pictures(num_frames: int) -> Iterator[np.ndarray]:
    """A textured table, an arm that moves over it, and the noise of a sensor."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 200, (12, 16, 3), dtype=np.uint8)
    table = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 3, (HEIGHT, WIDTH, 3)).astype(np.float32)
    for number in range(num_frames):
        image = table.astype(np.float32) + grain
        place = (int(320 + 200 * np.sin(number / 15)), int(240 + 120 * np.cos(number / 11)))
        cv2.circle(image, place, 60, (220.0, 90.0, 40.0), -1)
        cv2.line(image, (320, 0), place, (60.0, 60.0, 70.0), 24)
        image += cv2.resize(
            rng.normal(0, 1.5, (HEIGHT // 2, WIDTH // 2, 3)).astype(np.float32), (WIDTH, HEIGHT)
        )
        yield image.clip(0, 255).astype(np.uint8)


def video_stream(container: OutputContainer) -> av.VideoStream:
    """Add a stream as LeRobot makes it: SVT-AV1, a key frame every second frame, crf 30."""
    options = {"g": "2", "crf": "30", "preset": "8"}
    stream = container.add_stream("libsvtav1", rate=FPS, options=options)
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    stream.time_base = Fraction(1, FPS)
    return stream


def encoded_clip(folder: Path) -> list[tuple[bytes, bool]]:
    """Encode the pictures and return their packets: (bytes, whether it is a key frame)."""
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = video_stream(container)
        for image in pictures(CLIP_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(folder / "clip.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(bytes(packet), packet.is_keyframe) for packet in packets]


def write_video(path: Path, clip: Clip, num_frames: int) -> None:
    """Repeat the packets of the clip; encoding a long video would take the time of the measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = video_stream(container)
        for number in range(num_frames):
            payload, is_keyframe = clip[number % len(clip)]
            packet = av.Packet(payload)
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.pts = packet.dts = number
            packet.is_keyframe = is_keyframe
            container.mux(packet)


def write_dataset(root: Path, clip: Clip, *, lengths: Sequence[int], cameras: Sequence[str]) -> Path:
    """Write a LeRobot v2.1 dataset; episodes of one length share a video file."""
    features = {
        name: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
        for name in cameras
    }
    features |= {
        name: {"dtype": "float32", "shape": [7], "names": None} for name in ("observation.state", "action")
    }
    features |= {"timestamp": {"dtype": "float32", "shape": [1], "names": None}}
    features |= {
        name: {"dtype": "int64", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index")
    }
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "chunks_size": 1000,
        "data_path": "data/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "clear the table"}))
    rows = [{"episode_index": number, "length": length} for number, length in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    start = 0
    for number, length in enumerate(lengths):
        pq.write_table(_rows(number, length, start=start), root / f"data/episode_{number:06d}.parquet")
        start += length
        for camera in cameras:
            path = root / f"videos/{camera}/episode_{number:06d}.mp4"
            if number and lengths[0] == length:
                path.hardlink_to(path.with_name("episode_000000.mp4"))
            else:
                write_video(path, clip, length)
    return root


def _rows(episode: int, length: int, *, start: int) -> pa.Table:
    frame_index = np.arange(length)
    motion = np.sin(frame_index[:, None] / 20 + np.arange(7)).astype(np.float32)
    return pa.table(
        {
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(motion.ravel()), 7),
            "action": pa.FixedSizeListArray.from_arrays(pa.array(-motion.ravel()), 7),
            "timestamp": (frame_index / FPS).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(length, episode),
            "index": start + frame_index,
            "task_index": np.zeros(length, np.int64),
        }
    )


if __name__ == "__main__":
    main()
