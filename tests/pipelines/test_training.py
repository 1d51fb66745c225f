"""The headline: one run is one mathematical object, whatever the number of workers and whatever dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import psutil
import pytest
import ray
import ray.data
import ray.train
import torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from runs import (
    CLUSTER,
    TRAIN,
    gloo_group,
    losses,
    micro_batches_alone,
    new_run,
    one_process,
    points,
    recorded_rows,
    when,
)
from toys import LENGTHS, ExceptionWriter, FileWriter, HeldUpReader, PacedWriter, SlowReader
from transformers import TrainingArguments
from waiting import wait_until

from pipelines import checkpoint, training
from pipelines.board import GivenUpError, start_board
from pipelines.engine import Engine
from pipelines.feed import Feed
from pipelines.meter import Meter
from pipelines.plan import noise_seed
from pipelines.progress import BadRow, Progress, folder_name, progress
from pipelines.retention import Retention
from pipelines.run_storage import RunStorage
from pipelines.stream import micro_batches
from pipelines.validation import HeldOut, ValidationConfig, held_out_named, split
from smolvla.data_utils import sample_noise, sample_time
from smolvla.modeling import SmolVLAPolicy
from smolvla.processing import SmolVLAProcessor
from smolvla.trainer import SmolVLATrainer

READY_WITHIN_S = 480  # a busy machine takes several times as long as a quiet one


def assert_every_frame_once(run):
    seen = Counter(row for ids in recorded_rows(run).values() for row in ids)
    frames = {(0, episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)}
    assert set(seen) == frames
    assert set(seen.values()) == {1}


def test_every_step_has_one_loss_and_every_frame_of_the_epoch_is_seen_exactly_once(uninterrupted):
    assert sorted(losses(uninterrupted)) == list(range(1, 41))
    assert_every_frame_once(uninterrupted)


def test_micro_batches_that_lie_ready_are_counted(uninterrupted):
    queued = [point["data/queued_micro_batches"] for point in points(uninterrupted)]
    assert min(queued) >= 0
    assert max(queued) > 0
    assert queued[-1] <= 1, "the stream ends one micro-batch after the run"


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
def interrupted(ray_session, toy, tmp_path_factory):
    """As `uninterrupted`, but validated, averaged, with few checkpoints kept and decoded by the workers; rank
    1 hangs at step 12, and rank 0 is killed while it saves step 30. Returns (run, pid of the one that hung,
    what the others said)."""
    dataset, _, reader = toy
    _, held_out = split(reader.sources[0], held_out_named(dataset, (2, 9), flag="validation.episodes"))
    config = ValidationConfig(every=5, max_frames=7, seed=0)
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    run = replace(
        new_run(folder, toy, ema_decay=0.9),
        validation=HeldOut(reader=replace(reader, sources=[held_out]), config=config),
        keep=Retention(newest=1, best=1),
        decoder=reader,
        board=start_board(),
        collective_timeout_s=8,
        writer=PacedWriter(folder / "points.jsonl"),
    )
    said, pids, saved = ExceptionWriter(folder.with_name("said")), [], run.folder / folder_name(30)
    over = threading.Event()

    def stop():
        pids.append(pid_of(run, rank=1))
        os.kill(pids[0], signal.SIGSTOP)

    def kill_while_saving():
        while not saved.exists():  # however long a slow machine takes to get there
            assert not over.wait(0.005), "the run ended without a save of step 30"
        os.kill(points(run)[-1]["pid"], signal.SIGKILL)
        assert not (saved / "MANIFEST.json").exists(), "the save was over"

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(kill_while_saving)
        watcher = when(run, 12, stop)
        try:
            training.fit(run, reader, CLUSTER, callbacks=[said])
        finally:
            over.set()
        watcher.join()
        watching.result()
    return run, pids[0], said.path.read_text()


def pid_of(run, rank):
    (pid,) = (beat.pid for beat in ray.get(run.board.beats.remote()) if beat.rank == rank)
    return pid


def test_a_worker_that_hangs_is_named_and_ended(interrupted):
    _, pid, said = interrupted
    named = (
        rf"waited in vain in step \d+ for rank 1 \(node [0-9.]+, pid {pid}\): silent for \d+ s, last known: "
    )
    assert re.search(named, said), said
    assert not psutil.pid_exists(pid)


def test_neither_deaths_nor_validation_nor_an_average_nor_who_decodes_changes_a_loss_or_loses_a_row(
    uninterrupted, interrupted
):
    run = interrupted[0]
    assert len({point["pid"] for point in points(run)}) == 3, "the run was not interrupted twice"
    assert losses(run) == losses(uninterrupted)
    assert_every_frame_once(run)


def test_a_replayed_step_changes_no_validation_loss_and_the_best_checkpoint_stays(interrupted):
    run = interrupted[0]
    found: dict[int, float] = {}
    for point in points(run):
        if "val/loss" in point:
            assert found.setdefault(point["step"], point["val/loss"]) == point["val/loss"]
            assert point["val/loss_ema"] != point["val/loss"]
    assert sorted(found) == list(range(5, 41, 5))
    records = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == sorted(found.items())
    best = min(range(10, 41, 10), key=lambda step: found[step])
    said = json.loads((run.folder / "best.json").read_text())
    assert (said["step"], said["val/loss"]) == (best, found[best])
    assert {path.name for path in run.folder.glob("step_*")} == {folder_name(best), folder_name(40)}
    newest = run.folder / folder_name(40)
    assert progress(newest).val_loss == found[40]
    tags = json.loads((run.folder / "tags.jsonl").read_text().splitlines()[-1])
    assert tags["best_checkpoint"] == str(run.folder / folder_name(best))
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
        finish = checkpoint.save(
            RunStorage(folder=tmp_path), policy, optimizer, at=at, identity={}, group=gloo_group()
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


def test_a_loss_that_is_not_finite_again_and_again_ends_the_run_and_names_the_rows(
    ray_session, toy, tmp_path
):
    """The stream of Ray Data, the engine and the meter as a worker has them, in this process."""
    run = new_run(tmp_path / "diverged", toy, steps=4, max_skipped_in_a_row=2)
    policy = SmolVLAPolicy.from_pretrained(run.folder / "start").train()
    with torch.no_grad():
        policy.model.action_out_proj.bias.fill_(float("inf"))
    stream = micro_batches(toy[2], start=0, stop=16)
    stream.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    feed = Feed(run, stream.iterator(), rank=0, num_workers=1, device=torch.device("cpu"))
    with one_process():
        engine = Engine(policy, run.train)

        def meter_at(**position):
            at = Progress(samples_seen=0, **position)
            return Meter(run, rank=0, feed=feed, at=at, decoding_cpus=lambda: 1.0)

        def step(number):
            count, batches = feed.of_step(number)
            meter.step(number, engine.step(number, batches, count=count), log=False)

        meter = meter_at(step=0)
        step(1)
        assert meter.skipped_in_a_row == 1
        with pytest.raises(GivenUpError, match="2 steps in a row were skipped, the last is step 2"):
            step(2)
        # a run that goes on counts on
        meter = meter_at(step=2, skipped_in_a_row=1)
        with pytest.raises(GivenUpError, match="2 steps in a row were skipped, the last is step 3"):
            step(3)
        meter = meter_at(step=3, bad_rows=(BadRow(0, 2, 5, 0b10),))
        said = r"1 rows have images that cannot be used, max_bad_rows allows 0; .* episode 2 frame 5: \['obs"
        with pytest.raises(GivenUpError, match=said):
            step(4)
    skipped = [json.loads(line) for line in (run.folder / "skipped/rank_0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [1, 2, 3, 4]
    assert len(skipped[0]["rows"][0]["frame_index"]) == TRAIN.micro_batch


def test_where_a_run_stands_is_read_back_whole(toy, tmp_path):
    """Rows that cannot be used count over all attempts, and so do skipped steps."""
    at = Progress(
        step=3,
        samples_seen=24,
        bad_rows=(BadRow(0, 2, 5, 0b10), BadRow(1, 0, 0, 0b01)),
        skipped_in_a_row=2,
        val_loss=0.25,
        since_point=((0.5, 1.0, 0.0), (float("inf"), 2.0, 1.0)),
    )
    policy = SmolVLAPolicy(toy[1], allow_random_vlm=True)
    policy.processor = SmolVLAProcessor(toy[1], toy[0].stats)
    with one_process():
        engine = Engine(policy, TRAIN)
        micro_batches = micro_batches_alone(toy[2], TRAIN.micro_batches)
        engine.step(1, micro_batches, count=TRAIN.micro_batches)
        group, storage = gloo_group(), RunStorage(folder=tmp_path)
        checkpoint.save(storage, policy, engine.optimizer, at=at, identity={}, group=group)()
        assert checkpoint.load(tmp_path / folder_name(3), policy, engine.optimizer) == at


def test_the_wait_of_whichever_worker_waits_longest_is_what_a_run_shows(toy, tmp_path, ray_session):
    """The other one waits for it in the step, where its own numbers show nothing."""
    run = new_run(tmp_path / "starved", toy, steps=6)
    reader = SlowReader(**{field.name: getattr(toy[2], field.name) for field in fields(toy[2])})
    training.fit(replace(run, decoder=reader), toy[2], CLUSTER)
    waits = [point["data/wait_share"] for point in points(run)]
    assert len(waits) == 6
    assert min(waits[2:]) > 0.3, waits
    assert min(point["data/decode_s_per_row"] for point in points(run)[2:]) > 0.9 * SlowReader.pause_s / 2


@pytest.fixture
def disk(tmp_path):
    """A small disk, and how to give it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_fails_the_run_by_the_checkpoints_name_and_with_room_it_goes_on(
    uninterrupted, disk, toy
):
    """The error comes up in threads of torch and of Ray, and is no `Exception` there."""
    folder, resize = disk
    run = new_run(folder / "full", toy, record_rows=False)
    run = replace(run, writer=FileWriter(folder.with_name("points.jsonl")))
    resize(shutil.disk_usage(folder).used + 300_000)
    with pytest.raises(ray.train.TrainingFailedError) as failed:
        training.fit(run, toy[2], replace(CLUSTER, max_failures=0))
    said = rf"{run.folder}/step_000000010 could not be saved: \w+: .*[Nn]o space left on device"
    assert re.search(said, str(failed.value)), failed.value
    assert run.storage.newest() is None
    assert max(losses(run)) < 40
    resize("100m")
    training.fit(run, toy[2], CLUSTER)
    assert losses(run) == losses(uninterrupted)
    assert run.storage.newest() == run.folder / folder_name(40)


# ---- nodes and processes that die ----


def assert_same_curve(run, other):
    """Also where a step was computed twice by different numbers of workers."""
    expected = losses(other)
    assert {point["step"] for point in points(run)} == set(expected)
    for point in points(run):
        assert point["train/loss"] == pytest.approx(expected[point["step"]], rel=1e-5), point
    assert recorded_rows(run) == recorded_rows(other)


@pytest.fixture
def further_nodes(services, ray_session):
    """Two raylets with room for one worker each, as (node id, process); what is left of them is ended."""
    found, started = [], []
    for _ in range(2):
        before = {node["NodeID"] for node in ray.nodes()}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "3"]
        command += ["--address", services["ray"]["address"], "--node-ip-address", "127.0.0.1"]
        started.append(psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_until(lambda before=before: new_nodes(before), within_s=READY_WITHIN_S)
        found.append((new_nodes(before)[0], started[-1]))
    wait_until(
        lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], within_s=READY_WITHIN_S
    )
    coordinator: Any = get_or_create_autoscaling_coordinator()
    ray.get(coordinator._tick.remote())  # it looks every 20 s by itself
    yield found
    family = [child for process in started for child in (*process.children(recursive=True), process)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def new_nodes(before):
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in before]


def kill_raylet(process):
    (raylet,) = (child for child in process.children(recursive=True) if child.name() == "raylet")
    raylet.kill()


def test_a_data_process_dies_one_node_goes_with_notice_and_one_without_and_fewer_workers_go_on(
    uninterrupted, further_nodes, services, toy, tmp_path
):
    """They share the policy by FSDP2, keep no activations; three cannot have equally many of a step's four
    micro-batches. Where Ray says beforehand that a node will go, they save at once, not at the 30th step."""
    (drained, drained_process), (_, lost_process) = further_nodes
    writer = PacedWriter(tmp_path / "nodes/points.jsonl")
    run = new_run(
        tmp_path / "nodes", toy, checkpoint_every=30, parallel="fsdp", activation_checkpointing=True
    )
    run = replace(run, board=start_board(), writer=writer)
    reader = HeldUpReader(
        **{f.name: getattr(toy[2], f.name) for f in fields(toy[2])}, pid_file=tmp_path / "decoding"
    )
    saved = []

    def kill_decoding_process():
        while not reader.pid_file.exists():
            time.sleep(0.1)
        os.kill(int(reader.pid_file.read_text()), signal.SIGKILL)

    def lose_nodes():
        command = ["drain-node", "--node-id", drained, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "test", "--deadline-remaining-seconds", "30"]
        address = ["--address", services["ray"]["address"]]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command, *address], check=True)
        wait_until(lambda: ray.get(run.board.saved_step.remote()), within_s=READY_WITHIN_S)
        saved.append(ray.get(run.board.saved_step.remote()))
        kill_raylet(drained_process)
        wait_until(lambda: len(attempts(run)) == 2 and len(attempts(run)[1]) > 3, within_s=READY_WITHIN_S)
        kill_raylet(lost_process)

    watchers = [threading.Thread(target=kill_decoding_process, daemon=True), when(run, 2, lose_nodes)]
    watchers[0].start()
    training.fit(run, reader, replace(CLUSTER, num_workers=(1, 3), cpus_per_worker=3, max_failures=4))
    for watcher in watchers:
        watcher.join()
    assert_same_curve(run, uninterrupted)
    _, again, last = attempts(run)
    assert 2 <= saved[0] < 30
    assert again[0] == last[0]
    assert saved[0] < again[0] <= 30
    assert last[-1] == 40
    assert (workers_by_step(run)[1], workers_by_step(run)[40]) == (3, 1)


def attempts(run):
    """The steps that each rank 0 logged, one after the other."""
    found = {}
    for point in points(run):
        found.setdefault(point["pid"], []).append(point["step"])
    return list(found.values())


def workers_by_step(run):
    """How many workers took rows in a step, over all attempts."""
    found = Counter()
    for file in (run.folder / "rows").iterdir():
        found.update({json.loads(line)["step"] for line in file.read_text().splitlines()})
    return found
