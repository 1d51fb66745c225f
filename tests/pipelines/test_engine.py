"""One step of training: replicated, sharded or sharded in groups, any number of workers: the same numbers."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import one_process
from safetensors.torch import load_file
from toys import golden_rows, spawned

from pipelines import engine as engine_module
from pipelines.engine import Engine
from pipelines.train_config import TrainConfig
from smolvla.lora import LoRA
from smolvla.processing import TOKENS

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
KEPT_WORDS = {  # workers, how they train
    "words, float32": (2, {"parallel": "fsdp", "repeated_noise": 2, "ema_decay": 0.9}),
    "words, bfloat16": (2, {"parallel": "fsdp", "precision": "bfloat16", "ema_decay": 0.9}),
    "words, groups and adapters": (
        4,
        {"parallel": "hsdp", "shard_workers": 2, "lora": LoRA(rank=2, alpha=2.0), "ema_decay": 0.9},
    ),
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


def with_and_without_kept_words(train):
    """What comes of training, measuring and acting: each pass gathers the word embedding, then none does."""
    found = []
    for kept in (False, True):
        policy, rows = golden_rows(train.micro_batch)
        lookups = []
        engine = Engine(policy, train, words=golden_words(rows) if kept else None)
        policy.model.vlm_with_expert.vlm.model.text_model.embed_tokens.register_forward_hook(
            lambda *_, lookups=lookups: lookups.append(1)
        )
        steps, _ = curve(engine, rows)
        config = policy.config
        noise = torch.randn(
            2, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(1)
        )
        with engine.evaluating():
            chunk = engine.predicted(rows(1), noise=noise)
            losses = engine.row_losses(rows(1), noise=noise, time=torch.tensor([0.3, 0.8]), draws=1)
        assert engine.average is not None
        found.append(
            {
                "steps": steps,
                "acted": [chunk.tolist(), losses.tolist()],
                "weights": {name: digest(tensor) for name, tensor in policy.state_dict().items()},
                "average": {name: digest(tensor) for name, tensor in engine.average.weights.items()},
                "lookups": len(lookups),
            }
        )
    return found


def golden_words(rows):
    return np.unique([rows(m)[TOKENS].numpy() for m in range(2)])  # of all three samples


def digest(sharded):
    return hashlib.sha256(sharded.full_tensor().detach().numpy().tobytes()).hexdigest()


def on_workers(rank, meeting, folder):
    """Every case in turn, in the first so many of the processes: starting them takes longest."""
    torch.set_num_threads(1)
    asked = [
        (name, workers, poisoned_curve if poisoned else golden_curve, settings)
        for name, (workers, settings, poisoned) in CASES.items()
    ]
    asked += [
        (name, workers, with_and_without_kept_words, settings)
        for name, (workers, settings) in KEPT_WORDS.items()
    ]
    for number, (name, workers, compute, settings) in enumerate(asked):
        if rank >= workers:
            continue
        dist.init_process_group("gloo", init_method=f"{meeting}_{number}", rank=rank, world_size=workers)
        try:
            train = GOLDEN_TRAIN if compute is golden_curve else TRAIN
            found = compute(replace(train, **settings))
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
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (*CASES, *KEPT_WORDS)}


@pytest.mark.parametrize("case", CASES)
def test_several_workers_draw_the_curve_of_one_and_skip_the_same_step(alone, several_workers, case):
    expected = alone[1 if CASES[case][2] else 0]
    found, optimizer_steps = several_workers[case]
    assert optimizer_steps == expected[1]
    for step, (mine, theirs) in enumerate(zip(found, expected[0], strict=True), start=1):
        assert mine[2] == theirs[2], f"step {step}"
        if not theirs[2]:
            assert mine == pytest.approx(theirs, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("case", KEPT_WORDS)
def test_words_that_are_looked_up_beforehand_change_no_bit_and_the_embedding_is_gathered_no_more(
    several_workers, case
):
    gathered, kept = several_workers[case]
    assert gathered.pop("lookups") > 0
    assert kept.pop("lookups") == 0
    assert kept == gathered


def test_words_are_gathered_where_their_embedding_trains_or_too_many_are_needed(monkeypatch, caplog):
    policy, rows = golden_rows(2)
    words = golden_words(rows)
    trains, _ = golden_rows(2)
    trains.word_embedding.requires_grad_(requires_grad=True)
    limit = len(words) * policy.word_embedding.shape[1] * 4
    with one_process():
        for taken, most, kept in (
            (trains, limit, False),
            (policy, limit - 1, False),
            (golden_rows(2)[0], limit, True),
        ):
            monkeypatch.setattr(engine_module, "KEPT_WORDS_BYTES", most)
            engine = Engine(taken, replace(TRAIN, parallel="fsdp"), words=words)
            assert (engine.policy.model.vlm_with_expert.kept_words is not None) == kept
    assert caplog.text.count(f"{len(words)} different tokens in the tasks") == 1


def test_a_token_that_was_not_foreseen_is_an_error_and_not_another_word():
    policy, rows = golden_rows(2)
    tokens = rows(0)[TOKENS]
    words = tokens.unique()
    policy.model.vlm_with_expert.keep_words(words, None)
    expected = policy.word_embedding[tokens]
    assert torch.equal(policy.model.vlm_with_expert.embed_language_tokens(tokens), expected)
    unknown = next(i for i in range(len(policy.word_embedding)) if i not in words.tolist())
    with pytest.raises(IndexError):
        policy.model.vlm_with_expert.embed_language_tokens(torch.tensor([[unknown]]))
