"""The headline: one run is one mathematical object, whatever the number of workers and whatever dies."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import LENGTHS, FileWriter
from transformers import TrainingArguments

from pipelines import checkpoint, manifest, training
from pipelines.dataset import open_dataset
from pipelines.engine import TrainConfig
from pipelines.plan import noise_seed
from pipelines.retention import Retention
from pipelines.run import Run, trained_datasets
from pipelines.run_storage import RunStorage
from pipelines.stream import ROW_IDS, SampleReader, Source, StreamConfig, ToTorch
from pipelines.training import Cluster
from pipelines.validation import HeldOut, ValidationConfig, held_out_named, split
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import Normalizer, sample_noise, sample_time, tokenize_tasks
from smolvla.modeling import SmolVLAPolicy
from smolvla.processing import SmolVLAProcessor
from smolvla.trainer import SmolVLATrainer

VLM = Path("tests/golden/tiny_vlm").absolute()
TRAIN = TrainConfig(
    steps=40,
    batch_size=8,
    micro_batch=2,
    seed=11,
    decay_steps=None,
    precision="float32",
    log_every=1,
    checkpoint_every=10,
    record_rows=True,
)
CLUSTER = Cluster(num_workers=2, use_gpu=False, cpus_per_worker=1, max_failures=2)


@pytest.fixture(scope="module")
def toy(episodes):
    """(dataset, policy config, reader): 320 frames, 40 steps of 8 are one epoch."""
    dataset = open_dataset(str(episodes))
    inputs, outputs = dataset.policy_features()
    config = SmolVLAConfig.from_pretrained("tests/golden/default").changed(
        vlm_model_name=str(VLM), scheduler_warmup_steps=2, optimizer_lr=1e-3
    )
    config = config.with_features(inputs, outputs)
    normalizer = Normalizer(dataset.stats, inputs | outputs, config.normalization_mapping)
    tokens, mask = tokenize_tasks(dataset.tasks, str(VLM), max_length=48)
    stream = StreamConfig(seed=TRAIN.seed, micro_batch=TRAIN.micro_batch, mixing_rows=64)
    source = Source(dataset, normalizer, tokens, mask)
    return dataset, config, SampleReader([source], stream, config.chunk_size, config.resize_imgs_with_padding)


def new_run(folder, toy, **changes):
    """A run's folder with the same policy in it as every other one."""
    dataset, config, reader = toy
    folder.mkdir()
    torch.manual_seed(0)
    run = Run(
        folder=folder,
        train=replace(TRAIN, **changes),
        identity={"toy": True},
        datasets=trained_datasets(reader),
        max_bad_rows=0,
        writer=FileWriter(folder / "points.jsonl"),
        keep=Retention(newest=2),
    )
    SmolVLAPolicy(config, allow_random_vlm=True).save_pretrained(run.folder / "start", stats=dataset.stats)
    return run


def points(run):
    """What rank 0 wrote, over all attempts."""
    path = run.writer.path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run):
    """step -> loss; where a step was computed twice, both must be the same number."""
    found: dict[int, float] = {}
    for point in points(run):
        value = found.setdefault(point["step"], point["train/loss"])
        assert value == point["train/loss"], f"step {point['step']} was {value}, then {point['train/loss']}"
    return found


def recorded_rows(run):
    """(epoch, episode, frame) of every row by the step that trained on it, over all workers and attempts."""
    rows = {}
    for file in sorted((run.folder / "rows").iterdir()):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            key = (entry["step"], entry["micro_batch"][0])
            ids = list(zip(entry["epoch"], entry["episode_index"], entry["frame_index"], strict=True))
            assert rows.setdefault(key, ids) == ids, f"{key} held other rows when it was repeated"
    return rows


def assert_every_frame_once(run):
    seen = Counter(row for ids in recorded_rows(run).values() for row in ids)
    frames = {(0, episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)}
    assert set(seen) == frames
    assert set(seen.values()) == {1}


@pytest.fixture(scope="module")
def uninterrupted(ray_session, toy, tmp_path_factory):
    """Two workers, two micro-batches each, nothing dies."""
    run = new_run(tmp_path_factory.mktemp("runs") / "uninterrupted", toy)
    training.fit(run, toy[2], CLUSTER)
    return run


def test_every_step_has_one_loss_and_every_frame_of_the_epoch_is_seen_exactly_once(uninterrupted):
    assert sorted(losses(uninterrupted)) == list(range(1, 41))
    assert_every_frame_once(uninterrupted)


def test_one_worker_that_takes_all_micro_batches_draws_the_curve_of_two_workers(
    uninterrupted, ray_session, toy, tmp_path
):
    run = new_run(tmp_path / "one_worker", toy)
    training.fit(run, toy[2], replace(CLUSTER, num_workers=1))
    expected = losses(uninterrupted)
    found = losses(run)
    assert sorted(found) == sorted(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), f"step {step}"
    assert recorded_rows(run) == recorded_rows(uninterrupted)


def test_transformers_trainer_gives_the_losses_of_the_ray_loop(uninterrupted, toy, tmp_path):
    """The same micro-batches and draws through `SmolVLATrainer`: one shared loss, optimiser and schedule."""
    reader, accumulation = toy[2], TRAIN.batch_size // TRAIN.micro_batch

    class MicroBatches(torch.utils.data.IterableDataset):
        def __iter__(self):
            to_torch = ToTorch()
            for group in range(TRAIN.steps * TRAIN.batch_size // reader.config.mixing_rows):
                for encoded in reader.encoded(group):
                    batch = to_torch(reader.decoded(encoded))
                    yield {name: column for name, column in batch.items() if name not in ROW_IDS}

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


def kill_worker_at(run, step):
    """SIGKILL the process that logged `step`, which is rank 0."""

    def watch():
        while not any(point["step"] >= step for point in points(run)):
            time.sleep(0.05)
        os.kill(points(run)[-1]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


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


def test_a_killed_worker_changes_no_loss_and_loses_no_row(uninterrupted, ray_session, toy, tmp_path):
    run = new_run(tmp_path / "killed", toy)
    watcher = kill_worker_at(run, 17)
    training.fit(run, toy[2], CLUSTER)
    watcher.join()
    pids = {point["pid"] for point in points(run)}
    assert len(pids) == 2, "the run was not interrupted"
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-6)
    assert_every_frame_once(run)


def test_validation_changes_no_training_loss_and_a_replayed_step_no_value(ray_session, toy, tmp_path):
    """The validated run also keeps an average and is killed; its best and its newest checkpoint stay."""
    dataset, _, reader = toy
    kept, held_out = split(reader.sources[0], held_out_named(dataset, (2, 9), flag="validation.episodes"))
    config = ValidationConfig(every=4, max_frames=7, seed=0)
    measured = HeldOut(reader=replace(reader, sources=[held_out]), config=config)
    reader, cluster = replace(reader, sources=[kept]), replace(CLUSTER, num_workers=1)
    settings = {"steps": 12, "checkpoint_every": 4}
    plain = new_run(tmp_path / "plain", toy, **settings)
    training.fit(plain, reader, cluster)
    run = new_run(tmp_path / "validated", toy, ema_decay=0.9, **settings)
    run = replace(run, validation=measured, keep=Retention(newest=1, best=1))
    watcher = kill_worker_at(run, 8)
    training.fit(run, reader, cluster)
    watcher.join()
    assert losses(run) == losses(plain)

    found: dict[int, float] = {}
    for point in points(run):
        if "val/loss" in point:
            assert found.setdefault(point["step"], point["val/loss"]) == point["val/loss"]
            assert point["val/loss_ema"] != point["val/loss"]
    assert sorted(found) == [4, 8, 12]
    records = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == sorted(found.items())
    best = min(found, key=lambda step: found[step])
    said = json.loads((run.folder / "best.json").read_text())
    assert (said["step"], said["val/loss"]) == (best, found[best])
    names = {checkpoint.folder_name(best), checkpoint.folder_name(12)}
    assert {path.name for path in run.folder.glob("step_*")} == names
    newest = run.folder / checkpoint.folder_name(12)
    assert checkpoint.progress(newest).val_loss == found[12]
    tags = json.loads((run.folder / "tags.jsonl").read_text().splitlines()[-1])
    assert tags["best_checkpoint"] == str(run.folder / checkpoint.folder_name(best))
    SmolVLAPolicy.from_pretrained(newest / "pretrained_model_ema")


def test_a_finished_checkpoint_is_complete_loadable_and_kept_by_number(uninterrupted, toy):
    folders = sorted(path.name for path in uninterrupted.folder.glob("step_*"))
    assert folders == ["step_000000030", "step_000000040"]
    newest = uninterrupted.storage.newest()
    assert newest is not None
    assert newest == uninterrupted.folder / "step_000000040"
    assert checkpoint.progress(newest) == checkpoint.Progress(step=40, samples_seen=320)
    policy = SmolVLAPolicy.from_pretrained(newest / "pretrained_model")
    start = SmolVLAPolicy.from_pretrained(uninterrupted.folder / "start")
    trained = dict(policy.named_parameters())
    for name, before in start.named_parameters():
        assert torch.equal(trained[name], before) != before.requires_grad, name


def test_a_run_goes_on_from_the_newest_good_checkpoint_with_another_number_of_workers(
    uninterrupted, sharded, ray_session, toy, tmp_path
):
    """The newest checkpoint is damaged, so the one before it counts; three workers' shards of FSDP2 are
    read by one that holds the whole policy."""
    folder = tmp_path / "resumed"
    shutil.copytree(sharded.folder, folder, ignore=shutil.ignore_patterns("points.jsonl", "rows"))
    weights = folder / "step_000000040/pretrained_model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in (manifest.problem(weights.parents[1]) or "")
    run = replace(uninterrupted, folder=folder, writer=FileWriter(folder / "points.jsonl"))
    training.fit(run, toy[2], replace(CLUSTER, num_workers=1))
    expected = {step: loss for step, loss in losses(uninterrupted).items() if step > 30}
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert manifest.problem(folder / "step_000000040") is None


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
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        at = checkpoint.Progress(step=1, samples_seen=8)
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
    finally:
        dist.destroy_process_group()
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
