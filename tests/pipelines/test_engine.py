"""One step of training: replicated, sharded or sharded in groups, any number of workers: the same numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from toys import golden_rows, spawned

from pipelines.engine import Engine, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden/default"
TRAJECTORY = json.loads((GOLDEN / "trajectory.json").read_text())
# LeRobot's three samples four times: the mean stays the same, and no two of a step's micro-batches are equal.
MICRO_BATCHES = ([0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 1, 2])
COPIES = 4
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
GOLDEN_TRAIN = replace(TRAIN, steps=30, batch_size=12, micro_batch=3, decay_steps=TRAJECTORY["decay_steps"])
SHARDED = {"parallel": "fsdp", "activation_checkpointing": True}
CASES = {  # workers, how they hold the policy, whether step 3 is poisoned
    "two ddp": (2, {}, False),
    "two fsdp": (2, {"parallel": "fsdp"}, False),
    "two hsdp": (2, {"parallel": "hsdp", "shard_workers": 2}, False),
    "four ddp": (4, {}, False),
    "four fsdp": (4, SHARDED, False),
    "four hsdp": (4, {"parallel": "hsdp", "shard_workers": 2}, False),
    "three ddp, one of which takes two of eight": (3, {}, True),
    "three fsdp, one of which takes two of eight": (3, SHARDED, True),
}
POISONED_STEP = 3


def golden_draws():
    """Noise and times as LeRobot's run drew them: for its three samples, once a step."""
    generator = torch.Generator().manual_seed(TRAJECTORY["seed"])
    shape = golden_example()["noise"].shape
    drawn = [(torch.randn(shape, generator=generator), torch.rand(3, generator=generator)) for _ in range(30)]

    def draw(number, _):
        step, place = divmod(number, len(MICRO_BATCHES))
        noise, time = (values[MICRO_BATCHES[place]] for values in drawn[step])
        return noise, time * 0.999 + 0.001

    return draw


def golden_curve(train):
    """Loss, gradient norm and skip of the 30 steps of LeRobot's run, micro-batch by micro-batch."""
    policy, rows = golden_rows(train.micro_batch, shift=0.0)
    policy.config = policy.config.changed(
        optimizer_lr=TRAJECTORY["peak_lr"],
        scheduler_decay_lr=TRAJECTORY["decay_lr"],
        scheduler_warmup_steps=TRAJECTORY["warmup_steps"],
        optimizer_grad_clip_norm=float(TRAJECTORY["grad_clip_norm"]),
    )
    engine, whole = Engine(policy, train, draw=golden_draws()), rows(0)
    start_with_the_examples_gradient(engine, whole)

    def micro_batch(m):
        return {name: column[MICRO_BATCHES[m % len(MICRO_BATCHES)]] for name, column in whole.items()}

    return curve(engine, micro_batch)


def start_with_the_examples_gradient(engine, whole):
    """LeRobot's run began with it in place: its first step adds to it."""
    loss = engine.policy(**engine.policy.prepare_inputs(whole), **golden_example())["loss"]
    entries = (~whole["action_is_pad"]).sum() * whole["action"].shape[-1] * COPIES
    (loss * entries / dist.get_world_size()).backward()  # what `_update` will undo


def golden_example():
    tensors = load_file(GOLDEN / "example.safetensors")
    return {"noise": tensors["noise"], "time": tensors["time"]}


def poisoned_curve(train):
    """A curve over rows that all differ; in one step an action is no number."""
    policy, rows = golden_rows(TRAIN.micro_batch)
    return curve(Engine(policy, train), rows, poisoned=POISONED_STEP)


def curve(engine, rows, *, poisoned=None):
    """Loss, gradient norm and skip of every step on this process's share of the micro-batches."""
    rank, workers, per_step = dist.get_rank(), dist.get_world_size(), engine.train.micro_batches
    found = []
    for step in range(1, engine.train.steps + 1):
        numbers = [m for m in range((step - 1) * per_step, step * per_step) if m % workers == rank]
        batches = [(m, rows(m)) for m in numbers]
        if step == poisoned and rank == 0:
            batches[0][1]["action"][0, 0, 0] = float("nan")
        result = engine.step(step, batches, count=len(batches))
        found.append([result.loss.item(), result.grad_norm.item(), float(result.skipped)])
    return found, sorted({int(state["step"]) for state in engine.optimizer.state.values()})


def on_workers(rank, meeting, folder):
    """Every case in turn, in the first so many of the processes: starting them takes longest."""
    torch.set_num_threads(1)
    for number, (name, (workers, settings, poisoned)) in enumerate(CASES.items()):
        if rank >= workers:
            continue
        dist.init_process_group("gloo", init_method=f"{meeting}_{number}", rank=rank, world_size=workers)
        try:
            draw, train = (poisoned_curve, TRAIN) if poisoned else (golden_curve, GOLDEN_TRAIN)
            found = draw(replace(train, **settings))
        finally:
            dist.destroy_process_group()
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone():
    """What one worker finds: (golden curve, curve with a poisoned step)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other by spinning, which is dear on a busy machine
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return golden_curve(GOLDEN_TRAIN), poisoned_curve(TRAIN)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def test_the_engine_follows_lerobots_thirty_steps(alone):
    found, _ = alone[0]
    for (loss, norm, skipped), expected in zip(found, TRAJECTORY["steps"], strict=True):
        assert not skipped
        assert loss == pytest.approx(expected["loss"], rel=1e-4)
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted_by_adamw(alone):
    found, optimizer_steps = alone[1]
    assert [skipped for _, _, skipped in found] == [0, 0, 1, 0, 0]
    assert optimizer_steps == [len(found) - 1]
    assert all(math.isfinite(loss) for loss, _, skipped in found if not skipped)


@pytest.fixture(scope="module")
def several_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    spawned(on_workers, folder, processes=4)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_several_workers_draw_the_curve_of_one_and_skip_the_same_step(alone, several_workers, case):
    expected = alone[1 if CASES[case][2] else 0]
    found, optimizer_steps = several_workers[case]
    assert optimizer_steps == expected[1]
    for step, (mine, theirs) in enumerate(zip(found, expected[0], strict=True), start=1):
        assert mine[2] == theirs[2], f"step {step}"
        if not theirs[2]:
            assert mine == pytest.approx(theirs, rel=1e-5), f"step {step}"
