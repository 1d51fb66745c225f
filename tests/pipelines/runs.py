"""Small training runs on Ray, and what they left behind."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from toys import FileWriter

from pipelines.dataset import open_dataset
from pipelines.engine import Engine
from pipelines.retention import Retention
from pipelines.run import Run, trained_datasets
from pipelines.samples import ROW_IDS, SampleReader, Source, StreamConfig
from pipelines.tensors import ToTorch
from pipelines.train_config import TrainConfig
from pipelines.training import Cluster
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import tokenize_tasks
from smolvla.features import Normalizer
from smolvla.modeling import SmolVLAPolicy

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


def toy_policy_and_reader(episodes):
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


def when(run, step, act):
    """Do something in a thread as soon as a step is logged."""

    def watch():
        while not any(point["step"] >= step for point in points(run)):
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@contextmanager
def one_process() -> Iterator[None]:
    """This process as the only worker, without Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gloo_group() -> dist.ProcessGroup:
    """Of all ranks, for nothing else."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def micro_batches_alone(reader, count):
    """(m, columns) of the first micro-batches, read and decoded in this process."""
    to_torch, per_group = ToTorch(), reader.plan.batches_per_group
    for group in range(-(-count // per_group)):
        for encoded in reader.encoded(group):
            batch = to_torch(reader.decoded(encoded))
            number = int(batch["micro_batch"][0])
            if number < count:
                yield number, {name: column for name, column in batch.items() if name not in ROW_IDS}


def losses_alone(train, reader, start):
    """step -> loss, of the engine in this process."""
    with one_process():
        engine = Engine(SmolVLAPolicy.from_pretrained(start).train(), train)
        batches = micro_batches_alone(reader, train.steps * train.micro_batches)
        per_step = train.micro_batches
        return {
            step: engine.step(step, (next(batches) for _ in range(per_step)), count=per_step).loss.item()
            for step in range(1, train.steps + 1)
        }
