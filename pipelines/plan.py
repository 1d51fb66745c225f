"""Which rows, in which order: a pure function of (datasets, seed, position), decided without reading data.

A source is known by the number of rows in each of its row groups. Epoch e permutes its row groups; the
permuted groups laid end to end, epoch after epoch, are an infinite sequence of rows in which every frame
stands exactly once an epoch. The plan cuts that sequence into mixing groups of `mixing_rows`, permutes the
rows inside each, and cuts the result into micro-batches. Micro-batch m therefore holds the same rows whatever
the number of workers, and the whole state of the stream is one integer: the number of samples that were
taken.

Only raw 64-bit output of PCG64 is used and sorted, because NumPy keeps that stream stable over versions and
does not promise it for `Generator.permutation`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# What a random stream is for; the first word of its seed.
EPOCH_ORDER, MIXING_ORDER, MICRO_BATCH_NOISE = 0, 1, 2
HELD_OUT, VALIDATION_NOISE, ADAPTERS = 8, 9, 10


def random_order(count: int, *seed: int) -> Int64:
    """A permutation of range(count), the same on every machine and NumPy version."""
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def noise_seed(seed: int, micro_batch: int) -> int:
    """Seed of the generator that draws noise, time and augmentation of one micro-batch, in [0, 2**63)."""
    return generator_seed(MICRO_BATCH_NOISE, seed, micro_batch)


def generator_seed(*words: int) -> int:
    """Seed of a torch generator for a purpose and what it is drawn for, in [0, 2**63)."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the plan, one entry each."""

    source: Int64
    epoch: Int64
    row_group: Int64
    """Number of the row group within its source."""
    offset: Int64
    """Row within its row group."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: slice | Int64) -> "Rows":
        return Rows(self.source[index], self.epoch[index], self.row_group[index], self.offset[index])


class SourceOrder:
    """The infinite row sequence of one source dataset.

    Holds the row counts and two epochs' permutations, so reaching any position costs one permutation of the
    row groups.
    """

    def __init__(self, row_counts: Int64, *, seed: int, source: int) -> None:
        self.row_counts = np.asarray(row_counts, dtype=np.int64)
        if len(self.row_counts) == 0 or self.row_counts.min() < 1:
            raise ValueError(
                f"source {source}: every row group needs at least one row, and there must be one"
            )
        self.num_rows = int(self.row_counts.sum())
        self.seed, self.source = seed, source
        self._epoch = functools.lru_cache(maxsize=2)(self._permuted_epoch)

    def _permuted_epoch(self, epoch: int) -> tuple[Int64, Int64]:
        """The row groups of an epoch in order, and the row at which each ends."""
        order = random_order(len(self.row_counts), EPOCH_ORDER, self.seed, self.source, epoch)
        return order, np.cumsum(self.row_counts[order])

    def rows(self, start: int, stop: int) -> tuple[Int64, Int64, Int64]:
        """(epoch, row group, offset in the row group) of the rows [start, stop) of the sequence."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.num_rows)
            last = min(first + stop - start, self.num_rows)
            order, ends = self._epoch(epoch)
            position = np.arange(first, last)
            place = np.searchsorted(ends, position, side="right")
            group = order[place]
            offset = position - (ends[place] - self.row_counts[group])
            parts.append((np.full(last - first, epoch), group, offset))
            start += last - first
        if not parts:
            empty = np.empty(0, dtype=np.int64)
            return empty, empty, empty
        epochs, groups, offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
        return epochs, groups, offsets


class Plan:
    """Micro-batches of an infinite, seeded, weighted sequence over one or more sources."""

    def __init__(
        self,
        row_counts: Sequence[Int64],
        *,
        weights: Sequence[float] | None = None,
        seed: int,
        micro_batch: int,
        mixing_rows: int,
    ) -> None:
        """Cut the sources' row sequences into mixing groups and micro-batches.

        Args:
        row_counts: for each source, the rows of each of its row groups.
        weights: share of each source in the sequence, in any unit; default: its number of rows.
        seed: of everything that is drawn.
        micro_batch: rows a worker takes through the model at once.
        mixing_rows: rows that are shuffled together, a multiple of `micro_batch`.
        """
        if micro_batch < 1 or mixing_rows < 1 or mixing_rows % micro_batch:
            raise ValueError(
                f"mixing_rows {mixing_rows} is not a positive multiple of micro_batch {micro_batch}"
            )
        if seed < 0:
            raise ValueError(f"seed {seed} is negative")
        self.sources = [SourceOrder(counts, seed=seed, source=i) for i, counts in enumerate(row_counts)]
        shares = [s.num_rows for s in self.sources] if weights is None else list(weights)
        if len(shares) != len(self.sources) or min(shares, default=0) <= 0:
            raise ValueError(
                f"weights {shares}: need one positive weight for each of {len(self.sources)} sources"
            )
        self.seed, self.micro_batch, self.mixing_rows = seed, micro_batch, mixing_rows
        exact = [Fraction(str(share)) for share in shares]
        # Cumulative and exact, so that the sources' counts add up to `mixing_rows` in every group.
        self._bounds = [sum(exact[:i], Fraction(0)) / sum(exact) for i in range(len(exact) + 1)]

    @property
    def batches_per_group(self) -> int:
        """Micro-batches in a mixing group."""
        return self.mixing_rows // self.micro_batch

    def share(self, source: int) -> float:
        """The part of the sequence's rows that come from `source`."""
        return float(self._bounds[source + 1] - self._bounds[source])

    def rows_taken(self, source: int, position: int) -> int:
        """How many of the first `position` rows come from `source`; within one row of its exact share."""
        upper, lower = self._bounds[source + 1], self._bounds[source]
        return int(upper * position) - int(lower * position)

    def mixing_group(self, group: int) -> Rows:
        """The `mixing_rows` rows of a mixing group in the order in which they are trained on."""
        first, last = group * self.mixing_rows, (group + 1) * self.mixing_rows
        parts = []
        for i, source in enumerate(self.sources):
            epoch, row_group, offset = source.rows(self.rows_taken(i, first), self.rows_taken(i, last))
            parts.append((np.full(len(epoch), i), epoch, row_group, offset))
        rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return rows[random_order(self.mixing_rows, MIXING_ORDER, self.seed, group)]

    def micro_batch_rows(self, index: int) -> Rows:
        """The rows of micro-batch `index`."""
        group, place = divmod(index, self.batches_per_group)
        return self.mixing_group(group)[slice(place * self.micro_batch, (place + 1) * self.micro_batch)]
