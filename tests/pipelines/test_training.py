"""The headline: one run is one mathematical object, whatever the number of workers and whatever dies."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from runs import (
    CLUSTER,
    TRAIN,
    losses,
    micro_batches_alone,
    new_run,
    one_process,
    points,
    recorded_rows,
    when,
)
from toys import LENGTHS
from transformers import TrainingArguments

from pipelines import checkpoint, training
from pipelines.plan import noise_seed
from pipelines.progress import Progress, folder_name, progress
from pipelines.retention import Retention
from pipelines.run_storage import RunStorage
from pipelines.validation import HeldOut, ValidationConfig, held_out_named, split
from smolvla.data_utils import sample_noise, sample_time
from smolvla.modeling import SmolVLAPolicy
from smolvla.processing import SmolVLAProcessor
from smolvla.trainer import SmolVLATrainer


def assert_every_frame_once(run):
    seen = Counter(row for ids in recorded_rows(run).values() for row in ids)
    frames = {(0, episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)}
    assert set(seen) == frames
    assert set(seen.values()) == {1}


def test_every_step_has_one_loss_and_every_frame_of_the_epoch_is_seen_exactly_once(uninterrupted):
    assert sorted(losses(uninterrupted)) == list(range(1, 41))
    assert_every_frame_once(uninterrupted)


def test_transformers_trainer_gives_the_losses_of_the_ray_loop(uninterrupted, toy, tmp_path):
    """The same micro-batches and draws through `SmolVLATrainer`: one shared loss, optimiser and schedule."""
    reader, accumulation = toy[2], TRAIN.batch_size // TRAIN.micro_batch

    class MicroBatches(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (batch for _, batch in micro_batches_alone(reader, TRAIN.steps * accumulation))

    def draw(micro_batch, shape):
        generator = torch.Generator().manual_seed(noise_seed(TRAIN.seed, micro_batch))
        return sample_noise(shape, generator), sample_time(shape[0], generator)

    found = []

    class Recorded(SmolVLATrainer):
        def training_step(self, *inputs, **more):
            found.append(super().training_step(*inputs, **more).item())
            return torch.tensor(found[-1])

    policy = SmolVLAPolicy.from_pretrained(uninterrupted.folder / "start")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,  # an item is a micro-batch already
        gradient_accumulation_steps=accumulation,
        max_steps=TRAIN.steps,
        max_grad_norm=policy.config.optimizer_grad_clip_norm,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Recorded(
        policy, arguments, train_dataset=MicroBatches(), data_collator=lambda items: items[0], draw=draw
    )
    trainer.train()
    # each is its micro-batch's share of the step's mean
    steps = torch.tensor(found).view(TRAIN.steps, accumulation).sum(dim=1)
    expected = losses(uninterrupted)
    assert dict(enumerate(steps.tolist(), start=1)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def sharded(ray_session, toy, tmp_path_factory):
    """Three workers that share one policy by FSDP2, keep no activations, and cannot have equally many of a
    step's four micro-batches."""
    run = new_run(
        tmp_path_factory.mktemp("runs") / "sharded", toy, parallel="fsdp", activation_checkpointing=True
    )
    training.fit(run, toy[2], replace(CLUSTER, num_workers=3, cpus_per_worker=0.5))
    return run


def test_three_workers_that_share_the_policy_draw_the_same_curve(uninterrupted, sharded):
    assert losses(sharded) == pytest.approx(losses(uninterrupted), rel=1e-5)


@pytest.fixture(scope="module")
def killed(ray_session, toy, tmp_path_factory):
    """As `uninterrupted`, but validated, averaged, with few checkpoints kept, and rank 0 dies at step 17."""
    dataset, _, reader = toy
    _, held_out = split(reader.sources[0], held_out_named(dataset, (2, 9), flag="validation.episodes"))
    config = ValidationConfig(every=5, max_frames=7, seed=0)
    run = replace(
        new_run(tmp_path_factory.mktemp("runs") / "killed", toy, ema_decay=0.9),
        validation=HeldOut(reader=replace(reader, sources=[held_out]), config=config),
        keep=Retention(newest=1, best=1),
    )
    watcher = when(run, 17, lambda: os.kill(points(run)[-1]["pid"], signal.SIGKILL))
    training.fit(run, reader, CLUSTER)
    watcher.join()
    return run


def test_neither_a_killed_worker_nor_validation_nor_an_average_changes_a_loss_or_loses_a_row(
    uninterrupted, killed
):
    pids = {point["pid"] for point in points(killed)}
    assert len(pids) == 2, "the run was not interrupted"
    assert losses(killed) == losses(uninterrupted)
    assert_every_frame_once(killed)


def test_a_replayed_step_changes_no_validation_loss_and_the_best_checkpoint_stays(killed):
    found: dict[int, float] = {}
    for point in points(killed):
        if "val/loss" in point:
            assert found.setdefault(point["step"], point["val/loss"]) == point["val/loss"]
            assert point["val/loss_ema"] != point["val/loss"]
    assert sorted(found) == list(range(5, 41, 5))
    records = [json.loads(line) for line in (killed.folder / "validation.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == sorted(found.items())
    best = min(range(10, 41, 10), key=lambda step: found[step])
    said = json.loads((killed.folder / "best.json").read_text())
    assert (said["step"], said["val/loss"]) == (best, found[best])
    assert {path.name for path in killed.folder.glob("step_*")} == {folder_name(best), folder_name(40)}
    newest = killed.folder / folder_name(40)
    assert progress(newest).val_loss == found[40]
    tags = json.loads((killed.folder / "tags.jsonl").read_text().splitlines()[-1])
    assert tags["best_checkpoint"] == str(killed.folder / folder_name(best))
    SmolVLAPolicy.from_pretrained(newest / "pretrained_model_ema")


def test_a_finished_checkpoint_is_complete_loadable_and_kept_by_number(uninterrupted, toy):
    folders = sorted(path.name for path in uninterrupted.folder.glob("step_*"))
    assert folders == ["step_000000030", "step_000000040"]
    newest = uninterrupted.storage.newest()
    assert newest is not None
    assert newest == uninterrupted.folder / "step_000000040"
    assert progress(newest) == Progress(step=40, samples_seen=320)
    policy = SmolVLAPolicy.from_pretrained(newest / "pretrained_model")
    start = SmolVLAPolicy.from_pretrained(uninterrupted.folder / "start")
    trained = dict(policy.named_parameters())
    for name, before in start.named_parameters():
        assert torch.equal(trained[name], before) != before.requires_grad, name


def test_a_checkpoint_holds_the_values_of_the_moment_it_was_begun(toy, tmp_path):
    """Training goes on while the files are written: later steps must not leak into them."""
    import torch.distributed as dist

    from smolvla.optimization import adamw

    dataset, config, _ = toy
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True)
    policy.processor = SmolVLAProcessor(config, dataset.stats)
    optimizer = adamw(policy, config)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with one_process():
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        at = Progress(step=1, samples_seen=8)
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        finish = checkpoint.save(
            RunStorage(folder=tmp_path), policy, optimizer, at=at, identity={}, group=group
        )
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)
            for state in optimizer.state.values():
                state["exp_avg"].add_(1)
        finish()
        loaded = SmolVLAPolicy.from_pretrained(tmp_path / "step_000000001/pretrained_model")
        fresh = adamw(loaded, config)
        assert checkpoint.load(tmp_path / "step_000000001", loaded, fresh) == at
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if parameter.requires_grad:
            assert fresh.state[parameter]["step"] == 1
            torch.testing.assert_close(fresh.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1))


def test_a_loss_that_is_not_finite_ends_the_run(ray_session, toy, tmp_path):
    run = new_run(tmp_path / "diverged", toy, steps=4, max_skipped_in_a_row=2)
    policy = SmolVLAPolicy.from_pretrained(run.folder / "start")
    with torch.no_grad():
        policy.model.action_out_proj.bias.fill_(float("inf"))
    policy.save_pretrained(run.folder / "start")
    import ray.train

    with pytest.raises(ray.train.TrainingFailedError, match="2 steps in a row were skipped"):
        training.fit(run, toy[2], replace(CLUSTER, num_workers=1, max_failures=0))
    skipped = [json.loads(line) for line in (run.folder / "skipped/rank_0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [1, 2]
    assert len(skipped[0]["rows"][0]["frame_index"]) == TRAIN.micro_batch
