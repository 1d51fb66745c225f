"""A mixture end to end: datasets of other cameras, sizes, rates and statistics, and one curve for all."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from runs import CLUSTER, losses, losses_alone, points
from toys import LENGTHS, FileWriter

from jobs.train_smolvla import TrainJob, prepare, write_start
from jobs.training_data import DatasetOptions
from pipelines import training
from pipelines.augmentation import AugmentationConfig
from pipelines.retention import Retention
from pipelines.run import Run, trained_datasets
from smolvla.processing import SmolVLAProcessor

SIDE, WRIST = "observation.images.side", "observation.images.wrist"
STEPS, BATCH, MICRO_BATCH, MIXING = 10, 8, 2, 32


@pytest.fixture(scope="module")
def prepared(episodes, other_episodes, tmp_path_factory):
    """A job as users write it: 3 rows of one dataset for 1 of the other, which is three times as fast."""
    folder = tmp_path_factory.mktemp("mixture")
    faster = folder / "faster"
    shutil.copytree(other_episodes, faster)
    info = json.loads((faster / "meta/info.json").read_text())
    (faster / "meta/info.json").write_text(json.dumps(info | {"fps": 30}))
    job = TrainJob(
        dataset=DatasetOptions(
            mixture=[
                {"path": str(episodes), "name": "slow", "weight": 3},
                {"path": str(faster), "weight": 1, "rename": {SIDE: WRIST}},
            ],
            fps=5,
            export="faster",
        ),
        policy=replace(TrainJob().policy, path="configs/policy/tiny", allow_random_weights=True),
        augmentation=AugmentationConfig(crop_probability=0.5, color_probability=0.5),
        run_name="mixture",
        storage_path=str(folder),
        steps=STEPS,
        batch_size=BATCH,
        micro_batch=MICRO_BATCH,
        mixing_rows=MIXING,
        log_every=1,
        record_rows=True,
    )
    found = prepare(job)
    write_start(found, job)
    return found


@pytest.fixture(scope="module")
def run(ray_session, prepared, tmp_path_factory):
    """On two workers."""
    folder = tmp_path_factory.mktemp("runs") / "mixture"
    folder.mkdir()
    shutil.copytree(prepared.folder / "start", folder / "start")
    run = Run(
        folder=folder,
        train=prepared.train,
        identity=prepared.identity,
        datasets=trained_datasets(prepared.reader),
        max_bad_rows=0,
        writer=FileWriter(folder / "points.jsonl"),
        keep=Retention(newest=1),
    )
    training.fit(run, prepared.reader, CLUSTER)
    return run


def rows_in_order(run):
    """(source, epoch, episode, frame) of every row in the order of the plan."""
    batches = {}
    for file in (run.folder / "rows").iterdir():
        for line in map(json.loads, file.read_text().splitlines()):
            ids = zip(*(line[n] for n in ("source", "epoch", "episode_index", "frame_index")), strict=True)
            batches[line["micro_batch"][0]] = list(ids)
    return [row for number in sorted(batches) for row in batches[number]]


def test_two_workers_on_ray_draw_the_curve_of_one_process_over_the_rows_of_the_plan(run, prepared):
    expected = losses_alone(prepared.train, prepared.reader, prepared.folder / "start")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    groups = [prepared.reader.plan.mixing_group(g).source for g in range(-(-STEPS * BATCH // MIXING))]
    planned = [source for group in groups for source in group.tolist()]
    assert [row[0] for row in rows_in_order(run)] == planned[: STEPS * BATCH]


def test_the_shares_are_exact_at_every_row_and_no_row_comes_twice(run):
    rows = rows_in_order(run)
    assert len(rows) == STEPS * BATCH == len(set(rows))
    taken = 0
    for position, row in enumerate(rows, start=1):
        taken += row[0] == 0
        assert abs(taken - 0.75 * position) <= 1
    assert taken == 60
    assert {row[2] for row in rows if row[0] == 0} <= set(range(len(LENGTHS)))


def test_metrics_tell_each_datasets_share_and_epochs(run):
    last = points(run)[-1]
    assert last["train/epoch"] == pytest.approx(80 / (320 + 96))
    assert last["train/epoch/slow"] == pytest.approx(60 / 320)
    assert last["train/epoch/faster"] == pytest.approx(20 / 96)
    for point in points(run):
        assert point["data/share/slow"] + point["data/share/faster"] == pytest.approx(1)
        assert abs(point["data/share/slow"] - 0.75) <= 1 / BATCH


def test_a_checkpoint_carries_the_processors_of_both_datasets_and_none_augments(run, prepared):
    folder = run.folder / f"step_{STEPS:09d}" / "pretrained_model"
    exported = SmolVLAProcessor.from_pretrained(folder)
    assert exported.files.rename == {SIDE: WRIST}
    for name, dataset in zip(("slow", "faster"), prepared.data.datasets, strict=True):
        found = SmolVLAProcessor.from_pretrained(folder, robot=name).stats["action"]["std"]
        assert found == pytest.approx(dataset.stats["action"]["std"], rel=1e-6)
    sample = {
        WRIST: torch.full((3, 40, 56), 9, dtype=torch.uint8),
        "observation.state": torch.zeros(3),
        "task": "wave slowly",
    }
    assert torch.equal(exported(sample)[WRIST], sample[WRIST])


def test_what_the_mixture_is_belongs_to_the_runs_identity(prepared):
    identity = prepared.identity
    assert [entry["weight"] for entry in identity["mixture"]] == [3, 1]
    assert identity["mixture"][1]["rename"] == {SIDE: WRIST}
    assert (identity["export"], identity["policy_fps"]) == ("faster", 5)
    assert identity["augmentation"]["crop_probability"] == 0.5
