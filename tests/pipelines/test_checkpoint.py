"""A checkpoint is whole or it does not count: saves killed at random moments, files damaged later."""

import itertools
import logging
import math
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from ray._common.retry import format_exception, matches_error
from ray.train.v2._internal.constants import AWS_RETRYABLE_TOKENS
from runs import gloo_group
from safetensors.torch import load_file

from pipelines import checkpoint
from pipelines.progress import Progress, progress
from pipelines.run_storage import PRETRAINED, RunStorage
from pipelines.saver import SaveError
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy
from smolvla.optimization import adamw

VLM = Path("tests/golden/tiny_vlm").absolute()
GOLDEN = Path("tests/golden/default").absolute()
NUM_KILLS = 20


def trained(value):
    """A policy and its optimiser, whose weights and moments all are `value`."""
    config = SmolVLAConfig.from_pretrained(GOLDEN).changed(vlm_model_name=str(VLM))
    policy = SmolVLAPolicy.from_pretrained(GOLDEN, config=config)
    optimizer = adamw(policy, config)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                name: torch.full_like(parameter, value) for name in checkpoint.MOMENTS
            } | {"step": torch.tensor(float(value))}
    set_to(policy, optimizer, value)
    return policy, optimizer


def set_to(policy, optimizer, value):
    """What a training step does, with values that tell the step."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
                for name in checkpoint.MOMENTS:
                    optimizer.state[parameter][name].fill_(value)
                optimizer.state[parameter]["step"].fill_(value)


def saving_rank(rank, folder, store, first, begun):
    """One of two ranks that save step after step until they are killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = gloo_group()
    policy, optimizer = trained(0)
    dist.barrier()
    begun.send(os.getpid())
    for step in itertools.count(first):
        set_to(policy, optimizer, step)
        at = Progress(step=step, samples_seen=8 * step)
        finish = checkpoint.save(
            RunStorage(folder=folder), policy, optimizer, at=at, identity={}, group=group
        )
        set_to(policy, optimizer, -1)  # training goes on while the files are written
        finish()
        if step == first:
            begun.send(time.monotonic())


@pytest.fixture(scope="module")
def forks():
    """Processes that have imported everything when they start."""
    context = multiprocessing.get_context("forkserver")
    # by names that need no test's path; torch._dynamo is what the optimiser imports when it is built
    context.set_forkserver_preload(["pipelines.checkpoint", "smolvla.modeling", "torch._dynamo"])
    return context


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(forks, folder, first):
    """Two ranks that are about to save step `first`, and the pipes that tell when they have."""
    pipes = [forks.Pipe(duplex=False) for _ in range(2)]
    store = folder / f"store_{first}_{time.monotonic_ns()}"
    ranks = [
        forks.Process(target=saving_rank, args=(rank, folder, store, first, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for rank, (_, send) in zip(ranks, pipes, strict=True):
        rank.start()
        send.close()  # so that a rank that dies ends the wait
    for receive, _ in pipes:
        receive.recv()
    return ranks, [receive for receive, _ in pipes]


def kill(ranks):
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def finished_s(pipe):
    """When a rank had saved its first step, by the monotonic clock; infinite if it was killed before."""
    try:
        return pipe.recv()
    except EOFError:
        return math.inf


def assert_exact(folder, step, policy, optimizer):
    """All that trains is what it was when the save of the step began, and so is the exported policy."""
    set_to(policy, optimizer, -2)
    assert checkpoint.load(folder, policy, optimizer).step == step
    exported = load_file(folder / PRETRAINED / "model.safetensors")
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            for tensor in (parameter, exported[name], *optimizer.state[parameter].values()):
                assert torch.equal(tensor, torch.full_like(tensor, step)), name


def test_a_save_killed_at_twenty_random_moments_leaves_the_previous_checkpoint_or_the_new_one(
    forks, one_rank, tmp_path, caplog
):
    caplog.set_level(logging.ERROR)  # of unfinished folders, which are expected here
    storage, rng, outcomes = RunStorage(folder=tmp_path), random.Random(0), []
    policy, optimizer = trained(0)
    ranks, told = start(forks, tmp_path, 1)
    begun_s = time.monotonic()
    duration_s = told[0].recv() - begun_s  # the first is the slowest: later ones make it shorter
    kill(ranks)
    newest = storage.newest()
    for _ in range(NUM_KILLS):
        assert newest is not None
        before = progress(newest).step
        ranks, told = start(forks, tmp_path, before + 1)
        begun_s = time.monotonic()
        time.sleep(rng.uniform(0, 1.1 * duration_s))
        kill(ranks[::-1] if rng.random() < 0.5 else ranks)
        duration_s = min(duration_s, finished_s(told[0]) - begun_s)
        newest = storage.newest()
        assert newest is not None
        after = progress(newest).step
        assert after >= before
        assert_exact(newest, after, policy, optimizer)
        outcomes.append(after - before)
    assert 0 in outcomes, "no kill came before the manifest"


def told(caplog):
    """What the log says of checkpoints; torch's own has much to say."""
    return [record.getMessage() for record in caplog.records if record.name == "pipelines.run_storage"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Steps 10 and 20 of a run."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for step in (10, 20):
        at = Progress(step=step, samples_seen=8 * step)
        checkpoint.save(RunStorage(folder=folder), *trained(step), at=at, identity={}, group=gloo_group())()
    dist.destroy_process_group()
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def misspell(path):
    path.write_text(path.read_text().replace('"bytes"', '"bxtes"', 1))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("pretrained_model/model.safetensors", flip, "has not the SHA-256 that MANIFEST.json says"),
        ("pretrained_model/model.safetensors", cut, "bytes, MANIFEST.json says"),
        ("training_state/trainer.json", Path.unlink, "training_state/trainer.json is missing"),
        ("MANIFEST.json", cut, "MANIFEST.json cannot be read: JSONDecodeError"),
        ("MANIFEST.json", Path.unlink, "no MANIFEST.json: it was not finished"),
        ("MANIFEST.json", misspell, "not bytes and sha256"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_message_and_the_one_before_it_is_used(
    two_checkpoints, tmp_path, caplog, file, damage, reason
):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    damage(folder / "step_000000020" / file)
    assert RunStorage(folder=folder).newest() == folder / "step_000000010"
    (message,) = told(caplog)
    assert message.startswith(f"checkpoint {folder}/step_000000020 is skipped: ")
    assert reason in message


def test_ray_does_not_save_again_on_one_worker_alone():
    """After these errors it would, and the others would wait for that one in another place."""
    for token in AWS_RETRYABLE_TOKENS:
        error = OSError(f"When completing multiple part upload: {token} during UploadPart: try later")
        assert any(matches_error(pattern, format_exception(error)) for pattern in AWS_RETRYABLE_TOKENS)
        failed = SaveError("s3://runs/first/step_000000010", error)
        assert not any(matches_error(pattern, format_exception(failed)) for pattern in AWS_RETRYABLE_TOKENS)
        assert "during UploadPart: try later" in str(failed)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A run in an object store, seen from a node; another node has another work folder."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
    pafs.S3FileSystem(**place, allow_bucket_creation=True).create_dir("robots")
    query = "&".join(f"{name}={value}" for name, value in place.items())
    yield RunStorage(folder=tmp_path / "node", uri=f"s3://robots/runs/first?{query}")
    server.stop()


def test_a_checkpoint_in_an_object_store_is_verified_on_its_way_back_and_a_damaged_one_skipped(
    stored, one_rank, tmp_path, caplog
):
    group, (policy, optimizer) = gloo_group(), trained(0)
    for step in (10, 20, 20):  # the second time what is there is replaced
        set_to(policy, optimizer, step)
        at = Progress(step=step, samples_seen=8 * step)
        checkpoint.save(stored, policy, optimizer, at=at, identity={}, group=group)()
    assert stored.checkpoints() == ["step_000000020", "step_000000010"]
    assert not list(stored.folder.glob("staging/*/*")), "what was uploaded stays on the node"
    newest = stored.newest()
    assert newest == stored.folder / "step_000000020"
    assert_exact(newest, 20, policy, optimizer)
    assert not told(caplog)

    # What a node fetched may be damaged there: the store's is still good.
    for damage in (Path.unlink, flip):
        damage(newest / "pretrained_model/model.safetensors")
        assert stored.newest() == newest
        assert_exact(newest, 20, policy, optimizer)
    (newest / "training_state/trainer.json").unlink()
    assert (stored.fetched(newest.name) / "training_state/trainer.json").exists()
    assert not told(caplog)

    name = "step_000000020/training_state/trainer.json"
    stored.write(name, stored.read(name).replace(b"160", b"161"))
    other = replace(stored, folder=tmp_path / "other node")
    assert other.newest() == other.folder / "step_000000010"
    (message,) = told(caplog)
    assert message == (
        "checkpoint s3://robots/runs/first/step_000000020 is skipped: "
        "training_state/trainer.json has not the SHA-256 that MANIFEST.json says"
    )
    stored.delete_file("step_000000010/training_state/trainer.json")
    third = replace(stored, folder=tmp_path / "third node")
    assert third.newest() is None
    assert told(caplog)[-1].endswith("step_000000010 is skipped: trainer.json is missing")
    stored.delete("step_000000020")
    stored.delete("step_000000030")  # which was never there
    assert stored.checkpoints() == ["step_000000010"]
