"""How a training begins: from what the job says, whatever an earlier one left in the run's folder."""

from dataclasses import replace

import numpy as np
import pytest

from jobs.train_smolvla import RECORD, OptimizerOptions, TrainJob, prepare, write_start
from jobs.training_data import DatasetOptions
from pipelines.dataset import RowGroups
from pipelines.mixing import mixing
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy


@pytest.fixture
def job(episodes, tmp_path):
    return TrainJob(
        dataset=DatasetOptions(path=str(episodes)),
        policy=replace(TrainJob().policy, path="configs/policy/tiny", allow_random_weights=True),
        run_name="begun",
        storage_path=str(tmp_path),
        steps=4,
        batch_size=8,
    )


def started(job):
    """The run's first policy, as an attempt to start it leaves it."""
    found = prepare(job)
    write_start(found, job)
    return found, found.folder / "start"


def test_a_job_that_was_refused_late_leaves_nothing_to_the_corrected_one(job):
    """After `start/` is written the cluster may be too small, or Ray or MLflow away."""
    started(replace(job, optimizer=OptimizerOptions(lr=1e-4)))
    corrected = replace(job, optimizer=OptimizerOptions(lr=5e-4), seed=7)
    found, start = started(corrected)
    assert SmolVLAConfig.from_pretrained(start).optimizer_lr == found.policy_config.optimizer_lr == 5e-4
    weights = SmolVLAPolicy.from_pretrained(start).state_dict()
    _, again = started(replace(corrected, run_name="alone"))
    expected = SmolVLAPolicy.from_pretrained(again).state_dict()
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_run_that_began_keeps_the_policy_that_it_began_with(job):
    found, start = started(job)
    found.storage.write_json(RECORD, {"identity": found.identity})
    before = (start / "model.safetensors").stat()
    started(job)
    assert (start / "model.safetensors").stat() == before


def test_how_the_order_mixes_episodes_is_known_before_the_run(job):
    """200 episodes of 250 frames in row groups of ours, and in one each as others write them."""
    found = prepare(job)
    (source,) = found.reader.sources

    def mixed(unit, episodes=200, frames=250):
        first = np.arange(0, frames, unit)
        count = episodes * len(first)
        groups = RowGroups(
            file=np.zeros(count, np.int64),
            group=np.arange(count),
            skip=np.zeros(count, np.int64),
            rows=np.tile(np.minimum(unit, frames - first), episodes),
            episode=np.repeat(np.arange(episodes), len(first)),
            first_frame=np.tile(first, episodes),
        )
        dataset = replace(
            source.dataset,
            episode_index=np.arange(episodes),
            episode_length=np.full(episodes, frames),
            row_groups=groups,
        )
        return mixing(replace(found.reader, sources=[replace(source, dataset=dataset)]))

    ours, others = mixed(16), mixed(250)
    assert ours.found > 0.95 * ours.at_random > 50
    assert ours.is_enough
    assert str(ours).startswith("64 rows that follow each other are of 5")
    assert not others.is_enough
    assert str(others).startswith("WARNING: 64 rows that follow each other are of ")
    assert "row groups have 250 rows" in str(others)
