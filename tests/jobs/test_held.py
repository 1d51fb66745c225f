"""A checkpoint's policy is held while it is evaluated, in a folder and in an object store."""

import pytest
from test_ingest_s3 import bucket, server

from jobs import policies
from pipelines.holding import held, hold, release
from pipelines.manifest import write_manifest
from pipelines.run_storage import RunStorage

assert bucket, server  # fixtures

STEP = "step_000000020"
FILES = {
    "pretrained_model/config.json": "{}",
    "pretrained_model/model.safetensors": "weights",
    "pretrained_model/vlm/tokenizer.json": "words",
    "training_state/moments": "much",
}


@pytest.fixture(params=["folder", "store"])
def storage(request, tmp_path, monkeypatch):
    """A run with one checkpoint, sealed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a node keeps what it fetched
    staged = tmp_path / "run" / STEP if request.param == "folder" else tmp_path / "staged"
    for name, text in FILES.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text)
    storage = RunStorage(folder=tmp_path / "run")
    if request.param == "folder":
        write_manifest(staged)
    else:
        storage = RunStorage(folder=tmp_path / "work", uri=request.getfixturevalue("bucket")("runs/towels"))
        storage.seal(STEP, [storage.upload(staged, STEP)])
    storage.write_json("run.json", {"mlflow_run_id": "abc", "identity": {}})
    return storage


def test_what_is_held_outlives_the_checkpoint_and_knows_whose_it_was(storage):
    place = hold(storage, STEP, parts=["pretrained_model"])
    storage.delete(STEP)
    assert place is not None
    assert held(storage) == [STEP]
    policy = policies.held(place, checkpoint=storage.address(STEP), ema=False)
    assert (policy.step, policy.training_run_id, policy.name) == (20, "abc", f"{storage.name} {STEP}")
    for _ in range(2):  # each actor of a node asks
        folder = policy.fetch()()
        found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
        assert {f"pretrained_model/{name}": text for name, text in found.items()} == {
            name: text for name, text in FILES.items() if name.startswith("pretrained_model/")
        }
    assert hold(storage, STEP, parts=["pretrained_model"]) == place
    release(storage, STEP)
    assert held(storage) == []
    assert storage.checkpoints() == []


def test_a_checkpoint_that_is_gone_cannot_be_held_and_leaves_nothing(storage):
    filesystem, root = storage.place()
    filesystem.delete_file(f"{root}/{STEP}/pretrained_model/model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors|[Nn]o such|not found|NoSuchKey"):
        hold(storage, STEP, parts=["pretrained_model"])  # sealed, and not what was sealed
    storage.delete(STEP)
    assert hold(storage, STEP, parts=["pretrained_model"]) is None
    assert held(storage) == []
