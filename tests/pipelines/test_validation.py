"""Held-out episodes: which they are, and one loss for the same weights whoever computes it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import one_process, toy_policy_and_reader
from toys import LENGTHS, TASKS, FileWriter, spawned, with_cut_image

from pipelines.dataset import open_dataset
from pipelines.engine import Engine
from pipelines.inspection import episode_columns
from pipelines.plan import PREDICTION_NOISE, VALIDATION_NOISE, generator_seed
from pipelines.predictions import Predictions
from pipelines.samples import Source, StreamConfig
from pipelines.tensors import ToTorch
from pipelines.train_config import TrainConfig
from pipelines.validation import (
    DRAWS,
    HeldOut,
    Validation,
    ValidationConfig,
    held_out_named,
    held_out_share,
    split,
)
from smolvla.data_utils import sample_noise, sample_time
from smolvla.modeling import SmolVLAPolicy

HELD_OUT = (2, 4, 9)  # 33 + 1 + 29 frames
TRAIN = TrainConfig(
    steps=4,
    batch_size=12,
    micro_batch=4,
    seed=5,
    decay_steps=None,
    precision="float32",
    log_every=1,
    checkpoint_every=10,
    record_rows=False,
)
CONFIG = ValidationConfig(every=2, max_frames=26, seed=3)


def held_out(uri, *, max_frames=CONFIG.max_frames):
    """(policy's config, what is measured): three episodes of the toy dataset."""
    dataset, config, reader = toy_policy_and_reader(uri)
    places = held_out_named(dataset, HELD_OUT, flag="validation.episodes")
    _, kept = split(reader.sources[0], places)
    stream = StreamConfig(seed=TRAIN.seed, micro_batch=TRAIN.micro_batch, mixing_rows=64)
    reader = replace(reader, sources=[kept], config=stream)
    return config, HeldOut(reader=reader, config=replace(CONFIG, max_frames=max_frames))


def measured(uri, folder, **settings):
    """The values of one policy; its weights are those of one seed."""
    config, frames = held_out(uri)
    torch.manual_seed(0)
    engine = Engine(SmolVLAPolicy(config, allow_random_vlm=True).train(), replace(TRAIN, **settings))
    writer = FileWriter(folder / "points.jsonl")
    validation = Validation(
        frames, last_step=TRAIN.steps, folder=folder, show=writer.predictions, timeout_s=600
    )
    values = validation.at(2, engine)
    assert engine.policy.training
    assert validation.at(1, engine) == {}
    assert values.pop("val/seconds") > 0
    return values


def workers(rank, meeting, uri, folder):
    torch.set_num_threads(1)
    for number, (size, kind) in enumerate([(3, "ddp"), (3, "fsdp"), (2, "ddp"), (2, "fsdp")]):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"{meeting}_{number}", rank=rank, world_size=size)
        try:
            found = measured(uri, folder, parallel=kind)
        finally:
            dist.destroy_process_group()
        if rank == size - 1:
            (folder / f"{kind}_{size}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone(episodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    with one_process():
        return measured(episodes, folder), folder


@pytest.fixture(scope="module")
def several(episodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    spawned(workers, episodes, folder, processes=3)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("kind", ["ddp_2", "ddp_3", "fsdp_2", "fsdp_3"])
def test_the_same_weights_give_the_same_loss_on_any_number_of_workers(alone, several, kind):
    """26 frames are 7 micro-batches, the last of 2 rows: neither 2 nor 3 workers have equal shares."""
    assert several[kind] == alone[0]  # to the bit


def test_a_line_that_a_crash_cut_off_is_written_again(alone, episodes, tmp_path):
    values, _ = alone
    (tmp_path / "validation.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    with one_process():
        assert measured(episodes, tmp_path) == values
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, values["val/loss"])]


def test_the_loss_is_the_mean_over_all_valid_entries_of_the_frames_and_of_each_task(
    alone, episodes, ray_session
):
    values, folder = alone
    config, frames = held_out(episodes)
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True).eval()
    sums = {task: np.zeros(2) for task in TASKS}
    for place in range(len(frames.frames)):
        batch, _ = frames.batch(frames.frames[np.array([place])])
        episode, frame = int(batch["episode_index"][0]), int(batch["frame_index"][0])
        generator = torch.Generator().manual_seed(generator_seed(VALIDATION_NOISE, 3, 0, episode, frame))
        noise = sample_noise((DRAWS, config.chunk_size, config.max_action_dim), generator)
        time = sample_time(DRAWS, generator)
        with torch.no_grad():
            inputs = policy.prepare_inputs(ToTorch()(batch))
            out = policy(**inputs, noise=noise, time=time, repeated_noise=DRAWS)
        sums[TASKS[episode % 2]] += [out["loss_sum"].item(), out["num_valid"].item()]
    total = np.sum(list(sums.values()), axis=0)
    assert values["val/loss"] == pytest.approx(total[0] / total[1], rel=1e-5)
    first, second = (loss / count for loss, count in sums.values())
    assert values["val/loss/task_0_push_the_red_block"] == pytest.approx(first, rel=1e-5)
    assert values["val/loss/task_1_open_it"] == pytest.approx(second, rel=1e-5)
    assert (values["val/frames"], values["val/bad_rows"]) == (26, 0)
    record = json.loads((folder / "validation.jsonl").read_text())
    assert (record["step"], record["loss"]) == (2, values["val/loss"])
    assert [part["name"] for part in record["tasks"]] == list(TASKS)


def test_the_policy_acts_on_held_out_frames_and_its_errors_are_in_the_datasets_units(
    alone, episodes, ray_session
):
    values, folder = alone
    config, frames = held_out(episodes)
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True).eval()
    found = Predictions.from_bytes((folder / "predictions_2_0.npz").read_bytes())
    assert found.predicted.shape == (26, config.chunk_size, config.action_dim)
    dataset = frames.reader.sources[0].dataset
    for place in (0, 17, 25):
        batch, _ = frames.batch(frames.frames[np.array([place])])
        episode, frame = int(batch["episode_index"][0]), int(batch["frame_index"][0])
        assert (found.episode[place], found.frame[place]) == (episode, frame)
        generator = torch.Generator().manual_seed(generator_seed(PREDICTION_NOISE, 3, 0, episode, frame))
        noise = sample_noise((1, config.chunk_size, config.max_action_dim), generator)
        chunk = policy.predict_action_chunk(ToTorch()(batch), noise)
        back = frames.reader.sources[0].normalizer.unnormalize("action", chunk.numpy())[0]
        np.testing.assert_allclose(found.predicted[place], back, rtol=1e-4, atol=1e-4)
        (row,) = np.flatnonzero(dataset.episode_index == episode)
        done = episode_columns(dataset, int(row), ["action"])["action"][frame:]
        length = min(len(done), config.chunk_size)
        assert found.valid[place].tolist() == [i < length for i in range(config.chunk_size)]
        np.testing.assert_allclose(found.true[place][:length], done[:length], rtol=1e-5, atol=1e-5)
    normalized = frames.reader.sources[0].normalizer.normalize
    errors = np.abs(normalized("action", found.predicted) - normalized("action", found.true)).mean(axis=2)
    assert values["val/action_mae/1"] == pytest.approx(errors[:, 0].mean(), rel=1e-4)
    assert values["val/action_mae/all"] == pytest.approx(errors[found.valid].mean(), rel=1e-4)
    last = np.flatnonzero(found.valid[:, -1])  # those of the frames that have a whole chunk before them
    np.testing.assert_allclose(
        found.errors()[-1], np.abs(found.predicted - found.true)[last, -1].mean(axis=0), rtol=1e-5
    )


def test_frames_are_spaced_evenly_over_the_held_out_episodes(episodes):
    _, few = held_out(episodes, max_frames=3)
    batch, _ = few.batch(few.frames)
    found = list(zip(batch["episode_index"].tolist(), batch["frame_index"].tolist(), strict=True))
    assert found == [(2, 0), (2, 21), (9, 8)]  # 0, 21 and 42 of 33 + 1 + 29
    _, all_of_them = held_out(episodes, max_frames=1000)
    assert len(all_of_them.frames) == sum(LENGTHS[episode] for episode in HELD_OUT)


def test_a_row_that_cannot_be_used_is_left_out_and_named(episodes, tmp_path):
    with_cut_image(episodes, tmp_path / "cut", episode=2, frame=0, camera="observation.images.wrist")
    with one_process():
        values = measured(tmp_path / "cut", tmp_path)
    assert (values["val/frames"], values["val/bad_rows"]) == (25, 1)
    assert math.isfinite(values["val/loss"])
    record = json.loads((tmp_path / "validation.jsonl").read_text())
    expected = {"episode": 2, "frame": 0, "cameras": ["observation.images.wrist"]}
    assert record["bad_rows"] == [{"dataset": str(tmp_path / "cut"), **expected}]


def test_a_share_of_the_episodes_depends_on_the_seed_only_and_leaves_the_rest_to_training(episodes):
    dataset = open_dataset(str(episodes))
    drawn = [held_out_share([dataset], fraction=0.25, seed=seed, flag="f")[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3
    assert len(held_out_share([dataset], fraction=0.01, seed=0, flag="f")[0]) == 1
    rest, kept = split(Source(dataset, *[None] * 3), np.array(drawn[0]))  # pyright: ignore[reportArgumentType]
    assert kept.dataset.episode_index.tolist() == drawn[0]
    assert sorted([*rest.dataset.episode_index, *kept.dataset.episode_index]) == list(range(12))
    assert rest.dataset.num_frames + kept.dataset.num_frames == sum(LENGTHS)
    for part in (rest.dataset, kept.dataset):
        groups = part.row_groups
        lengths = np.bincount(groups.episode, weights=groups.rows).astype(int)
        assert lengths.tolist() == part.episode_length.tolist()
        assert part.groups_of_episode[-1] == len(groups)


def test_a_selection_that_cannot_be_is_refused(episodes):
    dataset = open_dataset(str(episodes))
    with pytest.raises(ValueError, match=r"v\.episodes: .* has no episode 12, it has 0 to 11"):
        held_out_named(dataset, [3, 12], flag="v.episodes")
    with pytest.raises(ValueError, match=r"all episodes of .* are held out"):
        held_out_named(dataset, list(range(12)), flag="v.episodes")
    with pytest.raises(ValueError, match=r"v\.fraction 0\.99: 12 of the 12 episodes"):
        held_out_share([dataset], fraction=0.99, seed=0, flag="v.fraction")
