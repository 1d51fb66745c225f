"""How well the order of a run mixes episodes, told before it starts."""

from dataclasses import dataclass

import numpy as np

from pipelines.samples import SampleReader

ROWS = 64
"""That follow each other, as many as a usual batch has."""
LOOKED_AT = 4096
"""Rows from the beginning of the order."""
ENOUGH = 0.8
"""Of the different episodes that rows at random have."""


@dataclass(frozen=True)
class Mixing:
    """Different episodes in `ROWS` rows that follow each other, on average."""

    found: float
    at_random: float
    """In rows drawn at random, each frame as often as any other of its dataset."""
    unit_rows: float
    """Mean rows of a row group, whose rows are read together."""

    @property
    def is_enough(self) -> bool:
        """Whether a batch is as varied as one would expect."""
        return self.found >= ENOUGH * self.at_random

    def __str__(self) -> str:
        said = (
            f"{ROWS} rows that follow each other are of {self.found:.1f} different episodes, at random they "
            f"would be of {self.at_random:.1f}"
        )
        if self.is_enough:
            return said
        return (
            f"WARNING: {said}: row groups have {self.unit_rows:.0f} rows, which stand near each other; raise "
            "mixing_rows, or write the dataset again with jobs/merge_datasets.py, in row groups of 16"
        )


def mixing(reader: SampleReader) -> Mixing:
    """Look at the beginning of the order; no data is read."""
    plan, datasets = reader.plan, [source.dataset for source in reader.sources]
    groups = [plan.mixing_group(group) for group in range(-(-LOOKED_AT // plan.mixing_rows))]
    first = np.cumsum([0, *(len(dataset.episode_index) for dataset in datasets)])
    episodes = np.empty(len(groups) * plan.mixing_rows, dtype=np.int64)
    source, unit = (np.concatenate([getattr(g, name) for g in groups]) for name in ("source", "row_group"))
    part = np.empty(first[-1])
    for number, dataset in enumerate(datasets):
        mine = source == number
        episodes[mine] = first[number] + dataset.row_groups.episode[unit[mine]]
        lengths = dataset.episode_length / dataset.num_frames
        part[first[number] : first[number + 1]] = plan.share(number) * lengths
    batches = episodes[: LOOKED_AT // ROWS * ROWS].reshape(-1, ROWS)
    return Mixing(
        found=float(np.mean([len(np.unique(batch)) for batch in batches])),
        at_random=float((1 - (1 - part) ** ROWS).sum()),
        unit_rows=float(np.mean(np.concatenate([dataset.row_groups.rows for dataset in datasets]))),
    )
