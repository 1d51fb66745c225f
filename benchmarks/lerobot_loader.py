"""Samples a second of LeRobot's own dataset class, read in random order; run by a Python that has LeRobot.

<python> benchmarks/lerobot_loader.py <LeRobot v3.0 dataset> [--backend pyav|torchcodec] [--samples 600]

A torch DataLoader with 2 workers over shuffled samples with 50 actions each, in batches of 8, as LeRobot's
trainer asks for them. The last line is one JSON object.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]
from torch.utils.data import DataLoader

BATCH, CHUNK, WORKERS = 8, 50, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root")
    parser.add_argument("--backend", choices=["pyav", "torchcodec"], default="pyav")
    parser.add_argument("--samples", type=int, default=600)
    flags = parser.parse_args()
    fps = LeRobotDataset("local/data", root=flags.root).fps
    dataset = LeRobotDataset(
        "local/data",
        root=flags.root,
        delta_timestamps={"action": [step / fps for step in range(CHUNK)]},
        video_backend=flags.backend,
    )
    torch.set_num_threads(1)
    batches = batches_of(dataset)
    for _ in range(4):
        next(batches)
    started = time.perf_counter()
    seen = sum(len(batch["action"]) for batch in itertools.islice(batches, flags.samples // BATCH))
    print(json.dumps({"samples_per_s": seen / (time.perf_counter() - started)}))


def batches_of(dataset: LeRobotDataset) -> Iterator[dict[str, Any]]:
    """Without end."""
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    while True:
        yield from loader


if __name__ == "__main__":
    main()
