"""The job that computes features, killed and continued; the flag of the training job that takes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from feature_toy import TOP, WRIST, encode, files_of, own, planned, policy_path, shards
from test_ingest_s3 import bucket, server
from test_train_job import prepared, refusal

from jobs import cache_features
from jobs.cache_features import CachedDataset, CacheFeatures, CachingPolicy
from jobs.command_line import parsed
from jobs.train_smolvla import TrainJob
from pipelines import features
from pipelines.caching import FileEncoder, Tower
from pipelines.dataset import file_digests, filesystem_of, open_dataset
from smolvla.features import FeatureDtype
from smolvla.image_features import unpacked
from smolvla.modeling import SmolVLAPolicy

assert own, policy_path
assert shards, bucket  # fixtures
assert server
ROOT = Path(__file__).parents[2]
OFF = '"off"'  # as the command line hands it on: to YAML `off` is no word


def job(folder, policy_path, *flags):
    return [
        sys.executable,
        "jobs/cache_features.py",
        f"--dataset.path={folder}",
        f"--policy.path={policy_path}",
        "--dtype=int8",
        *flags,
    ]


def test_a_job_that_is_killed_goes_on_with_the_files_that_are_missing(own, policy_path, services, tmp_path):
    environment = os.environ | {"RAY_ADDRESS": services["ray"]["address"], "PYTHONPATH": str(ROOT)}
    _, _, stored = planned(own, policy_path, "int8")
    command = job(own, policy_path, "--batch_size=1", f"--tracking.uri={services['mlflow']['url']}")
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not files_of(Path(stored.uri)) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = files_of(Path(stored.uri))
    assert 1 <= len(kept) < len(open_dataset(str(own)).files)
    assert not Path(stored.uri, "info.json").exists()

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["computed_files"] < report["files"]
    assert "frames/s, 0 s left" in done.stdout
    assert "stored as int8: on 16 frames the loss" in done.stdout
    found = files_of(Path(stored.uri))
    assert [found[name].st_mtime_ns for name in kept] == [kept[name].st_mtime_ns for name in kept]
    info = json.loads(Path(stored.uri, "info.json").read_text())
    assert info["error"] == report["error"]
    assert not [path for path in Path(stored.uri).rglob("*") if path.name.endswith(".tmp")]

    whole = tmp_path / "whole"
    shutil.copytree(own, whole, ignore=shutil.ignore_patterns("features"))
    dataset, config, other = planned(whole, policy_path, "int8")
    tower = Tower(policy_path=str(policy_path), config=config, use_gpu=False)
    encoder = FileEncoder(dataset, other, file_digests(dataset), tower, 1, 1)
    for number, name in enumerate(dataset.files):
        list(encoder.encode(number))
        ours, theirs = (pq.read_table(one.path(name)) for one in (stored, other))
        assert ours.drop_columns([TOP, WRIST]).equals(theirs.drop_columns([TOP, WRIST]))
        for camera in (TOP, WRIST):
            pair = [features.unpacked_rows(table[camera], stored, camera)[0] for table in (ours, theirs)]
            values = [unpacked(camera, torch.from_numpy(rows.copy()), width=stored.width) for rows in pair]
            torch.testing.assert_close(*values, rtol=0, atol=values[1].abs().max().item() / 127)

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "is already complete; nothing to do" in again.stdout
    runs = mlflow_runs(services, stored)
    assert [run.info.status for run in runs] == ["FINISHED", "RUNNING"]
    assert runs[0].data.tags["kind"] == "caching"
    assert runs[0].data.metrics["error/loss_error"] == pytest.approx(report["error"]["loss_error"])
    inputs = runs[0].inputs
    assert inputs is not None
    assert [i.dataset.digest for i in inputs.dataset_inputs] == [dataset.fingerprint[:32]]


def mlflow_runs(services, stored):
    """The runs that computed features, the newest first."""
    from mlflow import MlflowClient

    client = MlflowClient(services["mlflow"]["url"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.features_uri = '{stored.uri}'")


def test_a_policy_whose_tower_trains_or_that_has_no_weights_is_refused(own, policy_path, tmp_path):
    config = json.loads((policy_path / "config.json").read_text())
    trains = Path(shutil.copytree(policy_path, tmp_path / "trains"))
    changed = config | {"train_expert_only": False, "freeze_vision_encoder": True}
    (trains / "config.json").write_text(json.dumps(changed))
    empty = shutil.copytree(policy_path, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    for path, message in ((trains, "the connector behind"), (empty, "has no model.safetensors")):
        job = CacheFeatures(
            dataset=CachedDataset(path=str(own)), policy=CachingPolicy(path=str(path)), dtype="int8"
        )
        with pytest.raises(ValueError, match=f"policy.path {path}: .*{message}"):
            cache_features.prepare(job)


def test_features_lie_in_an_object_store_too(shards, policy_path, bucket):
    """Over what a killed writer published half."""
    uri = bucket("episodes")
    filesystem, root = filesystem_of(uri)
    for path in sorted(path for path in shards.rglob("*") if path.is_file()):
        with filesystem.open_output_stream(f"{root}/{path.relative_to(shards)}") as stream:
            stream.write(path.read_bytes())
    dataset, _, stored = planned(uri, policy_path, "int8")
    with filesystem.open_output_stream(stored.path(dataset.files[0])) as stream:
        stream.write(b"PAR1 and no end")
    assert features.missing_files(stored, dataset) == list(range(len(dataset.files)))
    encode(uri, policy_path, "int8")
    assert features.missing_files(stored, dataset) == []
    recipe = stored.recipe
    assert features.found(dataset, weights=recipe.weights, image_box=recipe.image_box) == ([stored], "")
    assert features.is_sealed(stored, dataset)


def test_off_is_a_word_on_the_command_line():
    assert parsed(TrainJob, ["--dataset.features", "off"]).dataset.features == "off"
    assert 'none of auto, off, required, stream; in a YAML file "off" needs quotes' in refusal(
        dataset__features="off"
    )


# ---- the flag of the training job --------------------------------------------------------------------------


@pytest.fixture
def flags(own, policy_path, tmp_path):
    return {
        "dataset__path": str(own),
        "policy__path": str(policy_path),
        "storage_path": str(tmp_path / "runs"),
        "run_name": "run",
        "batch_size": 8,
        "micro_batch": 4,
        "mixing_rows": 64,
    }


def test_auto_takes_features_that_fit_and_says_why_not_otherwise(flags, own, policy_path, tmp_path):
    none = prepared(flags)
    assert str(none.features) == (
        f"trains from images: {own} has no features; jobs/cache_features.py computes them"
    )
    assert not none.reader.from_features
    stored = encode(own, policy_path)
    found = prepared(flags | {"validation__fraction": 0.2})
    assert str(found.features) == f"trains from features: {stored.uri} (float32)"
    assert found.reader.from_features
    assert found.held_out is not None
    assert found.held_out.reader.from_features
    assert found.identity["features"] == stored.recipe.fingerprint
    batch, task = found.held_out.batch(found.held_out.frames[:3])
    assert batch[f"{TOP}_features"].shape == (3, *stored.shape(TOP))
    assert len(task) == 3

    off = prepared(flags | {"dataset__features": OFF})
    assert str(off.features) == "trains from images: dataset.features is off"
    augmented = prepared(flags | {"augmentation__crop_probability": 0.5})
    assert "images are augmented" in str(augmented.features)
    streamed = prepared(flags | {"dataset__features": "stream", "precision": "bfloat16"})
    assert streamed.identity["features"] == "stream bfloat16"
    assert not streamed.reader.from_features
    trains = Path(shutil.copytree(policy_path, tmp_path / "trains"))
    config = json.loads((trains / "config.json").read_text())
    changed = config | {"train_expert_only": False, "freeze_vision_encoder": False}
    (trains / "config.json").write_text(json.dumps(changed))
    flags |= {"policy__path": str(trains)}
    assert "the vision tower trains" in str(prepared(flags).features)
    assert "the vision tower trains" in refusal(**flags, dataset__features="stream")


def test_required_features_are_refused_with_what_is_in_their_way(flags, own, policy_path, tmp_path):
    flags = flags | {"dataset__features": "required"}
    assert refusal(**flags) == (
        f"dataset.features required: {own} has no features; jobs/cache_features.py computes them"
    )
    encode(own, policy_path)
    assert prepared(flags).reader.from_features
    augmented = refusal(**flags, augmentation__blur_probability=0.1)
    assert augmented.startswith("dataset.features required: images are augmented")
    other = Path(shutil.copytree(policy_path, tmp_path / "other"))
    policy = SmolVLAPolicy.from_pretrained(other)
    with torch.no_grad():
        next(policy.model.vlm_with_expert.vlm.model.connector.parameters()).add_(1)
    policy.save_pretrained(other)
    assert "is of another checkpoint: vision weights" in refusal(**flags | {"policy__path": str(other)})


def test_a_mixture_takes_what_all_of_its_datasets_have(flags, own, policy_path, tmp_path):
    second = Path(shutil.copytree(own, tmp_path / "second"))
    entries = [{"path": str(own)}, {"path": str(second)}]
    flags = {name: value for name, value in flags.items() if name != "dataset__path"}
    flags |= {"dataset__mixture": json.dumps(entries)}
    both: tuple[FeatureDtype, ...] = ("float32", "bfloat16")
    for dtype in both:
        encode(own, policy_path, dtype)
    assert f"{second} has no features" in str(prepared(flags).features)
    coarse = encode(second, policy_path, "bfloat16")
    found = prepared(flags)
    assert found.identity["features"] == coarse.recipe.fingerprint
    assert found.reader.sources[1].features == coarse
    assert len(found.reader.decoded(next(found.reader.encoded(0)))[f"{TOP}_features"]) == 4


def test_a_run_stays_with_what_it_began_with(flags, own, policy_path, tmp_path):
    folder = tmp_path / "runs/run"

    def began(run):
        (folder / "run.json").write_text(json.dumps({"mlflow_run_id": "x", "identity": run.identity}))

    began(prepared(flags))
    stored = encode(own, policy_path)
    again = prepared(flags)
    assert str(again.features) == "trains from images: this run began from images"
    assert f"this run has features None, now '{stored.recipe.fingerprint}'" in refusal(
        **flags, dataset__features="required"
    )
    began(prepared(flags | {"run_name": "other"}))
    assert prepared(flags).identity["features"] == stored.recipe.fingerprint
    assert "this run has features" in refusal(**flags, dataset__features=OFF)
    Path(stored.uri, "info.json").unlink()
    assert refusal(**flags) == (
        f"dataset.features auto: this run began from features {stored.recipe.fingerprint}: "
        f"{stored.uri} is not finished; the same jobs/cache_features.py goes on"
    )
