"""Arrays of the stream -> tensors that share their memory."""

import threading
import time
import warnings
from collections.abc import Iterable, Iterator

import torch
from ray.data.collate_fn import NumpyBatchCollateFn

from pipelines.samples import Batch


class ToTorch(NumpyBatchCollateFn):
    """A batch or a block of them -> tensors that share its memory; images become (.., 3, h, w) views."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.rows_ready = 0
        """Rows that were made tensors so far."""
        self._counting = threading.Lock()  # Ray calls from several threads

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        if "micro_batch" in batch and batch["micro_batch"].ndim == 2:
            batch = {name: values[0] for name, values in batch.items()}  # a block is one row
        with warnings.catch_warnings():
            # The blocks lie read-only in the object store, and nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        # (..., h, w, 3) -> (..., 3, h, w)
        tensors = {name: t.movedim(-1, -3) if t.dim() > 3 else t for name, t in tensors.items()}
        with self._counting:
            self.busy_s += time.perf_counter() - started
            self.rows_ready += len(next(iter(tensors.values())))
        return tensors


def unpacked(
    blocks: Iterable[dict[str, torch.Tensor]], micro_batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of blocks, as views."""
    for block in blocks:
        for first in range(0, len(block["micro_batch"]), micro_batch):
            yield {name: rows[first : first + micro_batch] for name, rows in block.items()}
