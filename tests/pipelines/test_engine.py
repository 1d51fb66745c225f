"""One step of training: the same numbers replicated, sharded, or sharded in groups; absurd steps skipped."""

import json
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toys import golden_rows

from pipelines.engine import Engine, TrainConfig

TRAIN = TrainConfig(
    steps=5,
    batch_size=16,
    micro_batch=2,
    seed=5,
    decay_steps=None,
    precision="float32",
    log_every=1,
    checkpoint_every=10,
    record_rows=False,
    grad_norm_limit=1e3,
)
KINDS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "activation_checkpointing": True},
    "hsdp": {"parallel": "hsdp", "shard_workers": 2},
}
POISONED_STEP = 3


def curve(train):
    """Loss, gradient norm and skip of every step on this process's share of the micro-batches."""
    policy, rows = golden_rows(TRAIN.micro_batch)
    engine = Engine(policy, train)
    rank, workers, per_step = dist.get_rank(), dist.get_world_size(), TRAIN.batch_size // TRAIN.micro_batch
    found = []
    for step in range(1, TRAIN.steps + 1):
        numbers = [m for m in range((step - 1) * per_step, step * per_step) if m % workers == rank]
        batches = [(m, rows(m)) for m in numbers]
        if step == POISONED_STEP and rank == 0:
            batches[0][1]["action"][0, 0, 0] = float("nan")
        result = engine.step(step, batches)
        found.append([result.loss.item(), result.grad_norm.item(), float(result.skipped)])
    steps = {int(state["step"]) for state in engine.optimizer.state.values()}
    return found, sorted(steps)


def on_four_workers(rank, port, folder):
    torch.set_num_threads(1)
    for number, (name, settings) in enumerate(KINDS.items()):
        address = f"tcp://127.0.0.1:{port + number}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
        try:
            found = curve(replace(TRAIN, **settings))
        finally:
            dist.destroy_process_group()
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return curve(TRAIN)
    finally:
        dist.destroy_process_group()


def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted_by_adamw(alone):
    found, optimizer_steps = alone
    assert [skipped for _, _, skipped in found] == [0, 0, 1, 0, 0]
    assert optimizer_steps == [TRAIN.steps - 1]
    assert all(torch.isfinite(torch.tensor(loss)) for loss, _, skipped in found if not skipped)


@pytest.fixture(scope="module")
def four_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_four_workers, (port, folder), nprocs=4)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_four_workers_draw_the_curve_of_one_and_skip_the_same_step(alone, four_workers, kind):
    found, optimizer_steps = four_workers[kind]
    assert optimizer_steps == alone[1]
    for step, (mine, expected) in enumerate(zip(found, alone[0], strict=True), start=1):
        assert mine[2] == expected[2], f"step {step}"
        if not expected[2]:
            assert mine == pytest.approx(expected, rel=1e-5), f"step {step}"
