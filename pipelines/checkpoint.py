"""Checkpoints: one folder each, sharded, self-describing, complete or not there.

step_000000200/
    pretrained_model/   what LeRobot and `SmolVLAPolicy.from_pretrained` load: weights, config, processors
    pretrained_model_ema/  the same with the averaged weights, if the run keeps an average
    adapter/            of a run with adapters, which are merged into the above: what peft puts on start/
    training_state/     what trains, AdamW's moments and the average, as DCP shards; trainer.json
    MANIFEST.json       size and SHA-256 of every file, written last: without a good one nothing is resumed

Nothing is pickled: torch's distributed checkpoint writes through its safetensors storage, which reshards on
reading, so a run saved by two workers continues on three. Into an object store every rank uploads what it
wrote on its node, and the manifest follows when all have.
"""

import functools
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from pipelines.averaging import WeightAverage
from pipelines.manifest import Entries, write_manifest
from pipelines.progress import TRAINING, Progress, folder_name, progress
from pipelines.run_storage import ADAPTER, PRETRAINED, RunStorage
from smolvla.lora import save_adapter

if TYPE_CHECKING:
    from smolvla.modeling import SmolVLAPolicy

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside the step count


def save(
    storage: RunStorage,
    policy: "SmolVLAPolicy",
    optimizer: AdamW,
    *,
    at: Progress,
    identity: Mapping[str, Any],
    group: dist.ProcessGroup,
    average: WeightAverage | None = None,
    base: str = "",
) -> Callable[[], None]:
    """Start saving; every rank calls it. The returned function finishes it and may run in another thread.

    The weights are copied before this returns, so training goes on at once. The next save must not begin
    before this one is finished, as both talk through `group`.

    Args:
        storage: the run's; what an interrupted save left there is removed.
        policy: without a wrapper; its parameters may be sharded by FSDP2. Its processor is saved with it.
        optimizer: over the policy's trainable parameters.
        at: steps and samples done.
        identity: what the run is, written beside the position.
        group: a gloo group of all ranks, used by nothing else.
        average: of the policy's weights.
        base: where the policy lies as it was before its adapters, if it has some.
    """
    rank, name = dist.get_rank(), folder_name(at.step)
    folder = _emptied(storage, name, rank=rank)
    dist.barrier(group)
    writer = HuggingFaceStorageWriter(path=str(folder / TRAINING), save_distributed=True)
    written: Any = dcp.async_save(
        _training_state(policy, optimizer, average), storage_writer=writer, process_group=group
    )
    gathered = functools.partial(_gathered, changing=_trainable(policy), keep=rank == 0)
    weights = gathered(policy.state_dict())
    exported = {"": weights}
    if average is not None:
        exported["_ema"] = weights | gathered(average.weights)
    optimizer_steps = int(torch.stack([state["step"] for state in optimizer.state.values()]).max())

    def finish() -> None:
        written.result()  # on rank 0 this waits for every rank's shards
        if rank == 0:
            _export(policy, folder, exported, base=base)
            # fewer than steps where some were skipped
            trainer = asdict(at) | {"optimizer_steps": optimizer_steps, "identity": identity}
            (folder / TRAINING / "trainer.json").write_text(json.dumps(trainer, indent=1))
        if storage.uri:
            _upload(storage, name, staged=folder, group=group)
        elif rank == 0:
            write_manifest(folder)

    return finish


def _emptied(storage: RunStorage, name: str, *, rank: int) -> Path:
    """Where this rank writes; what an interrupted save left is gone, there and in the store."""
    folder = storage.staging(name, rank=rank)
    if rank == 0:
        storage.delete(name)
    if rank == 0 or storage.uri:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / TRAINING).mkdir(parents=True)
    return folder


def _export(
    policy: "SmolVLAPolicy", folder: Path, exported: Mapping[str, Mapping[str, Tensor]], *, base: str
) -> None:
    """Each set of weights by the end of its folder's name."""
    for suffix, tensors in exported.items():
        policy.save_pretrained(folder / f"{PRETRAINED}{suffix}", state_dict=tensors)
        if policy.lora:
            save_adapter(policy, folder / f"{ADAPTER}{suffix}", base=base, state_dict=tensors)


def _upload(storage: RunStorage, name: str, *, staged: Path, group: dist.ProcessGroup) -> None:
    """Every rank's files into the object store, then the manifest of all of them."""
    mine = storage.upload(staged, name)
    everyone: list[Entries] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    if dist.get_rank() == 0:
        storage.seal(name, everyone)
    shutil.rmtree(staged)


def load(
    folder: Path, policy: "SmolVLAPolicy", optimizer: AdamW, average: WeightAverage | None = None
) -> Progress:
    """Put master weights, optimiser state and average back in place; every rank calls it, however many are.

    The frozen weights are expected in `policy` already: they are those of `pretrained_model/`, or with
    adapters those of step 0.
    """
    for parameter in _trainable(policy).values():
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
    state = _training_state(policy, optimizer, average)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(path=str(folder / TRAINING)))
    trainer = json.loads((folder / TRAINING / "trainer.json").read_text())
    for parameter in _trainable(policy).values():
        # the fused kernel reads the count where the parameter is, the others on the CPU
        device = parameter.device if optimizer.defaults["fused"] else "cpu"
        optimizer.state[parameter]["step"] = torch.tensor(float(trainer["optimizer_steps"]), device=device)
    return progress(folder)


def _trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def _training_state(policy: nn.Module, optimizer: AdamW, average: WeightAverage | None) -> dict[str, Tensor]:
    """Views of everything that changes while training, by name; loading writes through them."""
    state: dict[str, Tensor] = {}
    for name, parameter in _trainable(policy).items():
        state[f"policy.{name}"] = parameter.detach()
        for moment in MOMENTS:
            state[f"optimizer.{name}.{moment}"] = optimizer.state[parameter][moment]
    averaged = average.weights if average is not None else {}
    return state | {f"ema.{name}": tensor for name, tensor in averaged.items()}


def _gathered(tensors: Mapping[str, Tensor], *, changing: Collection[str], keep: bool) -> dict[str, Tensor]:
    """Tensors on the CPU, unsharded: a copy of what is `changing`, and the rest as it is.

    Every rank takes part in gathering what is sharded; only the one that writes it keeps it.
    """
    found = {}
    for name, value in tensors.items():
        whole, mine = value, value
        if isinstance(value, DTensor):  # of one worker the whole is its own part
            whole, mine = value.full_tensor(), value.to_local()
        if keep:
            is_mine = whole.data_ptr() == mine.data_ptr()
            found[name] = whole.detach().to("cpu", copy=name in changing and is_mine)
    return found
