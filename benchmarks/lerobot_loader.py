"""LeRobot's own dataset class in random order, for benchmarks/stream.py; run by a Python that has LeRobot.

<python> benchmarks/lerobot_loader.py <LeRobot v3.0 dataset> [--backend pyav|torchcodec]

A torch DataLoader with 2 workers over shuffled samples with 50 actions each, in batches of 8, as LeRobot's
trainer asks for them. For each line that it reads it takes a batch and prints its number of samples.
"""

import argparse
import sys
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
    flags = parser.parse_args()
    fps = LeRobotDataset("local/data", root=flags.root).fps
    dataset = LeRobotDataset(
        "local/data",
        root=flags.root,
        delta_timestamps={"action": [step / fps for step in range(CHUNK)]},
        video_backend=flags.backend,
    )
    torch.set_num_threads(1)
    for _, batch in zip(sys.stdin, batches_of(dataset), strict=False):
        print(len(batch["action"]), flush=True)


def batches_of(dataset: LeRobotDataset) -> Iterator[dict[str, Any]]:
    """Without end."""
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    while True:
        yield from loader


if __name__ == "__main__":
    main()
