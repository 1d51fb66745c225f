"""Which rows, in which order: a pure function of (datasets, seed, position), decided without reading data.

A source is known by the number of rows in each of its row groups. Epoch e permutes its row groups; the
permuted groups laid end to end, epoch after epoch, are an infinite sequence of rows in which every frame
stands exactly once an epoch. The plan cuts that sequence into mixing groups of `mixing_rows`, spreads the
rows of each row group at random over its mixing group, and cuts the result into micro-batches. Micro-batch m
therefore holds the same rows whatever the number of workers, and the whole state of the stream is one
integer: the number of samples that were taken.

Only raw 64-bit output of PCG64 is used and sorted, because NumPy keeps that stream stable over versions and
does not promise it for `Generator.permutation`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# What a random stream is for; the first word of its seed.
EPOCH_ORDER, MIXING_ORDER, MICRO_BATCH_NOISE, AUGMENTATION = 0, 1, 2, 3
HELD_OUT, VALIDATION_NOISE, ADAPTERS, PREDICTION_NOISE, ROLLOUT_NOISE = 8, 9, 10, 11, 12


def random_order(count: int, *seed: int) -> Int64:
    """A permutation of range(count), the same on every machine and NumPy version."""
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def spread_order(units: Int64, *seed: int) -> Int64:
    """A random order of rows in which those of one unit stand as far apart as they can.

    Of a unit's n rows, in random order, row k falls at random into the k-th of n equal parts of the whole.
    With 64 row groups of 16 rows, any 64 consecutive rows come from nearly all of them.

    Args:
        units: for each row the number of its unit; the rows of a unit stand together.
        seed: words of the seed.
    """
    count = len(units)
    keys, jitter = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(2 * count).reshape(2, count)
    size = np.bincount(units)
    by_unit = np.lexsort((keys, units))
    rank = np.empty(count, dtype=np.uint64)
    rank[by_unit] = np.arange(count) - np.repeat(np.cumsum(size) - size, size)
    place = ((rank << np.uint64(32)) + (jitter >> np.uint64(32))) // size[units].astype(np.uint64)
    return np.argsort(place, kind="stable").astype(np.int64)


def noise_seed(seed: int, micro_batch: int) -> int:
    """Seed of the generator that draws noise and time of one micro-batch, in [0, 2**63)."""
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

    @property
    def units(self) -> Int64:
        """For rows that stand row group by row group: 0 for those of the first, 1 for the next, and so on."""
        begins = np.zeros(len(self), dtype=np.int64)
        for column in (self.source, self.epoch, self.row_group):
            begins[1:] |= np.diff(column) != 0
        return np.cumsum(begins)

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


Division = int | tuple[Fraction, "Division", "Division"]
"""A source, or rows divided in two: the part that goes left, and what becomes of left and right."""


def _division(shares: Sequence[Fraction]) -> Division:
    """Divide a sequence among sources two by two, each time rounding to the nearest row.

    A division in two by rounding is monotone and off by half a row at most; what is handed down is off by the
    part of it that the child takes. A source of share w below nodes of shares a, b, .. is thus off by at most
    (1 + w/a + w/b + ..)/2, which is at most one if 1/w - 1/a - 1/b - .. is not negative. The pairs are joined
    so that this slack stays large.
    """
    nodes: list[tuple[Fraction, Fraction, Division]] = [(w, 1 / w, i) for i, w in enumerate(shares)]

    def slack(pair: tuple[int, int]) -> Fraction:
        (one, mine, _), (other, others, _) = (nodes[i] for i in pair)
        return min(mine, others) - 1 / (one + other)

    while len(nodes) > 1:
        i, j = max(itertools.combinations(range(len(nodes)), 2), key=slack)
        (one, _, left), (other, _, right) = nodes[i], nodes[j]
        joined = (one + other, slack((i, j)), (one / (one + other), left, right))
        nodes = [node for place, node in enumerate(nodes) if place not in (i, j)] + [joined]
    return nodes[0][2]


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
        self._shares = [share / sum(exact) for share in exact]
        self._division = _division(self._shares)

    @property
    def batches_per_group(self) -> int:
        """Micro-batches in a mixing group."""
        return self.mixing_rows // self.micro_batch

    def share(self, source: int) -> float:
        """The part of the sequence's rows that come from `source`."""
        return float(self._shares[source])

    def rows_taken(self, source: int, position: int) -> int:
        """How many of the first `position` rows come from `source`.

        It never falls. It stays within one row of the exact share with up to four sources; with more, within
        two in all that was tried.
        """
        return int(self._taken(range(position, position + 1))[source][0])

    def _taken(self, positions: range) -> list[Int64]:
        """For each source `rows_taken` at the positions."""
        taken = [np.empty(0, dtype=np.int64)] * len(self.sources)

        def divide(node: Division, counts: list[int]) -> None:
            if isinstance(node, int):
                taken[node] = np.array(counts, dtype=np.int64)
                return
            part, left, right = node
            # Python's integers: the products do not fit 64 bits.
            nearest = [
                (2 * part.numerator * count + part.denominator) // (2 * part.denominator) for count in counts
            ]
            divide(left, nearest)
            divide(right, [count - mine for count, mine in zip(counts, nearest, strict=True)])

        divide(self._division, list(positions))
        return taken

    def mixing_group(self, group: int) -> Rows:
        """The `mixing_rows` rows of a mixing group in the order in which they are trained on.

        The rows are shuffled; which of them is of which source is not, so the shares hold at every row.
        """
        first, last = group * self.mixing_rows, (group + 1) * self.mixing_rows
        taken = self._taken(range(first, last + 1))
        parts, source_of_place = [], np.empty(self.mixing_rows, dtype=np.int64)
        for i, (source, counts) in enumerate(zip(self.sources, taken, strict=True)):
            epoch, row_group, offset = source.rows(int(counts[0]), int(counts[-1]))
            parts.append((np.full(len(epoch), i), epoch, row_group, offset))
            source_of_place[np.diff(counts) == 1] = i
        rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        shuffled = rows[spread_order(rows.units, MIXING_ORDER, self.seed, group)]
        index = np.empty(self.mixing_rows, dtype=np.int64)
        index[np.argsort(source_of_place, kind="stable")] = np.argsort(shuffled.source, kind="stable")
        return shuffled[index]

    def micro_batch_rows(self, index: int) -> Rows:
        """The rows of micro-batch `index`."""
        group, place = divmod(index, self.batches_per_group)
        return self.mixing_group(group)[slice(place * self.micro_batch, (place + 1) * self.micro_batch)]
