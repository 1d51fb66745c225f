"""Which checkpoints stay, by number and by validation loss, and what becomes of left-overs."""

import json

import pytest

from pipelines.manifest import MANIFEST
from pipelines.progress import TRAINING, folder_name
from pipelines.retention import BEST, Retention, retain
from pipelines.run_storage import RunStorage


def checkpoint_at(folder, step, *, loss=None, complete=True):
    path = folder / folder_name(step)
    (path / TRAINING).mkdir(parents=True)
    (path / TRAINING / "trainer.json").write_text(json.dumps({"step": step, "val_loss": loss}))
    if complete:
        (path / MANIFEST).write_text("{}")


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def retained(folder, sealed, **keep):
    return retain(RunStorage(folder=folder), Retention(**keep), newest=folder_name(sealed))


def best_step(*arguments, **keep):
    found = retained(*arguments, **keep)
    assert found is not None
    return found["step"]


def test_the_newest_and_the_best_stay(tmp_path):
    for step, loss in ((10, 0.5), (20, 0.2), (30, 0.3), (40, 0.4), (50, 0.6)):
        checkpoint_at(tmp_path, step, loss=loss)
    best = retained(tmp_path, 50, newest=2, best=2)
    assert steps(tmp_path) == [20, 30, 40, 50]
    assert best == {"checkpoint": "step_000000020", "step": 20, "val/loss": 0.2}
    assert json.loads((tmp_path / BEST).read_text()) == best


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    for step, loss in ((10, 0.3), (20, 0.4)):
        checkpoint_at(tmp_path, step, loss=loss)
    retained(tmp_path, 20, newest=1, best=1)
    assert steps(tmp_path) == [10, 20]
    checkpoint_at(tmp_path, 30, loss=0.1)
    assert best_step(tmp_path, 30, newest=1, best=1) == 30
    assert steps(tmp_path) == [30]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_one_without_a_finite_loss_is_never_the_best(tmp_path, loss):
    checkpoint_at(tmp_path, 10, loss=loss)
    assert retained(tmp_path, 10, newest=1, best=1) is None
    checkpoint_at(tmp_path, 20, loss=0.9)
    checkpoint_at(tmp_path, 30, loss=loss)
    assert best_step(tmp_path, 30, newest=1, best=1) == 20
    assert steps(tmp_path) == [20, 30]


def test_of_equals_the_newer_is_the_best(tmp_path):
    for step in (10, 20, 30):
        checkpoint_at(tmp_path, step, loss=0.5 if step < 30 else 0.6)
    assert best_step(tmp_path, 30, newest=1, best=1) == 20
    assert steps(tmp_path) == [20, 30]


def test_what_dead_saves_left_is_deleted_and_a_newer_save_is_let_alone(tmp_path):
    """Complete, but never registered with Ray; half written; and one that is being written."""
    checkpoint_at(tmp_path, 5)
    checkpoint_at(tmp_path, 10)
    checkpoint_at(tmp_path, 15, complete=False)
    checkpoint_at(tmp_path, 20)
    checkpoint_at(tmp_path, 30, complete=False)
    assert retained(tmp_path, 20, newest=2, best=1) is None
    assert steps(tmp_path) == [10, 20, 30]
    assert not (tmp_path / BEST).exists()


def test_an_old_one_that_cannot_be_read_ends_no_run_and_stays(tmp_path, caplog):
    for step in (10, 20, 30, 40):
        checkpoint_at(tmp_path, step, loss=step / 100)
    (tmp_path / folder_name(10) / TRAINING / "trainer.json").unlink()
    (tmp_path / folder_name(20) / TRAINING / "trainer.json").write_text('{"step": 20, "val')
    assert best_step(tmp_path, 40, newest=1) == 30
    assert steps(tmp_path) == [10, 20, 40]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "checkpoint step_000000020 stays, its trainer.json cannot be read",
        "checkpoint step_000000010 stays, its trainer.json cannot be read",
    ]
