"""A run with average and adapters goes on from its checkpoint as if it had never stopped, sharded or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import gloo_group, one_process
from safetensors.torch import load_file
from test_engine import TRAIN
from torch.distributed.tensor import DTensor
from toys import golden_rows, spawned

from pipelines import checkpoint
from pipelines.engine import Engine
from pipelines.progress import Progress, folder_name
from pipelines.run_storage import PRETRAINED, RunStorage
from smolvla import SmolVLAPolicy
from smolvla.lora import LoRA

GOLDEN = Path("tests/golden/default").absolute()
SAVED, STEPS = 2, 4
LAST = folder_name(STEPS)
KINDS = {
    "averaged": {"ema_decay": 0.3},
    "adapted": {"ema_decay": 0.3, "lora": LoRA(rank=2, alpha=4.0, train_fully=("action_out_proj",))},
}
# how the first half and the second half hold the policy
WAYS = [("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")]


def steps(engine, numbers, rows):
    rank, workers, per_step = dist.get_rank(), dist.get_world_size(), TRAIN.batch_size // TRAIN.micro_batch
    losses = []
    for step in numbers:
        mine = [m for m in range((step - 1) * per_step, step * per_step) if m % workers == rank]
        batches = [(m, rows(m)) for m in mine]
        losses.append(engine.step(step, batches, count=len(batches)).loss.item())
    return losses


def engine_of(kind, parallel):
    policy, rows = golden_rows(TRAIN.micro_batch)
    return Engine(policy, replace(TRAIN, steps=STEPS, parallel=parallel, **KINDS[kind])), rows


def saved(engine, folder, step, group):
    at = Progress(step=step, samples_seen=step * TRAIN.batch_size)
    more = {"average": engine.average, "base": str(GOLDEN)}
    checkpoint.save(
        RunStorage(folder=folder), engine.policy, engine.optimizer, at=at, identity={}, group=group, **more
    )()
    dist.barrier()


def runs(folder):
    """Losses of the second half, and the checkpoint at its end, without and with a stop in the middle."""
    group = gloo_group()
    found = {}
    for kind in KINDS:
        for parallel in ("ddp", "fsdp"):
            engine, rows = engine_of(kind, parallel)
            steps(engine, range(1, SAVED + 1), rows)
            saved(engine, folder / f"{kind}_{parallel}", SAVED, group)
            found[f"{kind}_{parallel}"] = steps(engine, range(SAVED + 1, STEPS + 1), rows)
            saved(engine, folder / f"{kind}_{parallel}", STEPS, group)
        for first, second in WAYS:
            engine, rows = engine_of(kind, second)
            middle = folder / f"{kind}_{first}" / folder_name(SAVED)
            at = checkpoint.load(middle, engine.policy, engine.optimizer, engine.average)
            name = f"{kind}_{first}_{second}"
            found[name] = steps(engine, range(at.step + 1, STEPS + 1), rows)
            saved(engine, folder / name, STEPS, group)
    return found


def worker(rank, meeting, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        found = runs(folder)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    spawned(worker, folder, processes=2)
    return folder, json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), WAYS)
def test_a_run_that_stopped_ends_where_the_other_does(two_workers, kind, first, second):
    folder, losses = two_workers
    through, resumed = f"{kind}_{second}", f"{kind}_{first}_{second}"
    tolerance = 0 if first == second else 1e-5  # two orders of summation before the stop
    assert losses[resumed] == pytest.approx(losses[through], rel=tolerance, abs=0)
    exported = ["pretrained_model", "pretrained_model_ema"]
    exported += ["adapter", "adapter_ema"] if kind == "adapted" else []
    for name in exported:
        file = "adapter_model.safetensors" if name.startswith("adapter") else "model.safetensors"
        expected, found = (load_file(folder / run / LAST / name / file) for run in (through, resumed))
        assert found.keys() == expected.keys()
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_one_worker_goes_on_with_what_two_saved(two_workers, kind, first, second, tmp_path):
    folder, losses = two_workers
    with one_process():
        engine, rows = engine_of(kind, second)
        middle = folder / f"{kind}_{first}" / folder_name(SAVED)
        at = checkpoint.load(middle, engine.policy, engine.optimizer, engine.average)
        found = steps(engine, range(at.step + 1, STEPS + 1), rows)
        saved(engine, tmp_path, STEPS, gloo_group())
    assert found == pytest.approx(losses[f"{kind}_{second}"], rel=1e-5)
    for name in ("pretrained_model", "pretrained_model_ema"):
        file = f"{LAST}/{name}/model.safetensors"
        expected = load_file(folder / f"{kind}_{second}" / file)
        for tensor, value in load_file(tmp_path / file).items():
            torch.testing.assert_close(value, expected[tensor], rtol=1e-5, atol=1e-5)


def test_a_worker_that_shards_alone_saves_the_values_of_the_moment(tmp_path):
    """Its part of the policy is the whole, and training goes on while the files are written."""
    with one_process():
        engine, rows = engine_of("averaged", "fsdp")
        steps(engine, [1], rows)
        assert engine.average is not None
        expected = {
            PRETRAINED: engine.policy.state_dict(),
            f"{PRETRAINED}_ema": engine.policy.state_dict() | dict(engine.average.weights),
        }
        expected = {kind: whole_copies(tensors) for kind, tensors in expected.items()}
        at = Progress(step=1, samples_seen=TRAIN.batch_size)
        finish = checkpoint.save(
            RunStorage(folder=tmp_path),
            engine.policy,
            engine.optimizer,
            at=at,
            identity={},
            group=gloo_group(),
            average=engine.average,
        )
        steps(engine, [2], rows)
        finish()
    for kind, tensors in expected.items():
        exported = load_file(tmp_path / folder_name(1) / kind / "model.safetensors")
        assert exported.keys() == tensors.keys()
        assert [name for name in tensors if not torch.equal(exported[name], tensors[name])] == []


def whole_copies(tensors):
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def test_both_exports_load_and_differ_in_what_trains_only(two_workers):
    folder, _ = two_workers
    for kind, trained in (("averaged", ".action_in_proj."), ("adapted", ".q_proj.")):
        plain, averaged = (
            dict(SmolVLAPolicy.from_pretrained(folder / f"{kind}_fsdp" / LAST / name).named_parameters())
            for name in ("pretrained_model", "pretrained_model_ema")
        )
        changed = [name for name in plain if not torch.equal(plain[name], averaged[name])]
        assert any(trained in name for name in changed)
        assert not any(".vlm." in name for name in changed)
    assert any("action_out_proj" in name for name in changed)  # trained beside the adapters
    assert not any(".action_in_proj." in name for name in changed)
