"""A checkpoint becomes a registered policy, which MLflow loads and serves, and which answers as before."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from jobs import register_policy, tracking
from jobs.register_policy import RegisterPolicy
from jobs.tracking import TrackingOptions
from pipelines.manifest import write_manifest
from smolvla import SmolVLAPolicy
from smolvla.data_utils import sample_noise
from smolvla.processing import SmolVLAProcessor

ROOT = Path(__file__).parents[2]
CAMERAS = {"observation.images.top": "observation.images.camera2", "wrist": "observation.images.camera1"}
STATS = {
    "observation.state": {"mean": [0.3] * 7, "std": [1.5] * 7},
    "action": {"mean": [2.0, -1.0, 0.5, 0.0, 1.0, 3.0, -2.0], "std": [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0]},
}
NAME, SEED, STEPS = "toy policy", 3, 6


@pytest.fixture(scope="module")
def trained(services, tmp_path_factory):
    """(MLflow run, its folder): two checkpoints that differ, the first one said to be the best."""
    folder = tmp_path_factory.mktemp("runs") / "my run"
    policy = SmolVLAPolicy.from_pretrained(ROOT / "tests/golden/default")
    policy.processor = SmolVLAProcessor(policy.config, STATS, rename=CAMERAS)
    for step in (10, 20):
        with torch.no_grad():
            policy.model.action_out_proj.bias.add_(0.5)
        checkpoint = folder / f"step_{step:09d}"
        policy.save_pretrained(checkpoint / "pretrained_model")
        write_manifest(checkpoint)
    run = tracking.start_run(
        services["mlflow"]["url"],
        experiment="registering",
        name="my run",
        params={},
        tags={
            "git_commit": "c0ffee",
            "dataset_fingerprint": "abc",
            "best_checkpoint": str(folder / "step_000000010"),
            "latest_checkpoint": str(folder / "step_000000020"),
        },
    )
    return run, folder


def job(run, **changes):
    return RegisterPolicy(run_id=run.run_id, name=NAME, tracking=TrackingOptions(uri=run.uri), **changes)


@pytest.fixture(scope="module")
def registered(trained):
    run, _ = trained
    register_policy.main(job(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", run.uri)
        mlflow.set_tracking_uri(run.uri)
        yield mlflow.pyfunc.load_model(f"models:/{NAME}@champion")


def observation(number):
    rng = np.random.default_rng(number)
    images = {name: rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for name in CAMERAS}
    return images | {"observation.state": rng.normal(size=7), "task": f"task {number}"}


def encoded(observed):
    """The same with PNGs in base64."""
    found = dict(observed)
    for name in CAMERAS:
        stream = io.BytesIO()
        Image.fromarray(observed[name]).save(stream, "PNG")
        found[name] = base64.b64encode(stream.getvalue()).decode()
    return found | {"observation.state": observed["observation.state"].tolist()}


def expected(folder, observed):
    """What `predict_action_chunk` gives, in the dataset's units."""
    policy = SmolVLAPolicy.from_pretrained(folder / "pretrained_model").eval()
    shape = (1, policy.config.chunk_size, policy.config.max_action_dim)
    noise = sample_noise(shape, torch.Generator().manual_seed(SEED))
    batch = {name: torch.tensor(observed[name]).permute(2, 0, 1)[None] for name in CAMERAS}
    batch["observation.state"] = torch.tensor(observed["observation.state"])[None].float()
    columns = policy.processor.observations(batch | {"task": observed["task"]})
    actions = policy.processor.unnormalize_actions(policy.predict_action_chunk(columns, noise))
    return actions[0, :STEPS].numpy()


PARAMS = {"seed": SEED, "n_action_steps": STEPS}


def test_the_loaded_policy_answers_as_predict_action_chunk_whatever_the_form_of_the_images(
    registered, trained
):
    folder = trained[1] / "step_000000010"
    observed = [observation(number) for number in range(2)]
    told = registered.predict(pd.DataFrame([encoded(one) for one in observed]), params=PARAMS)
    for one, answer in zip(observed, told["action"], strict=True):
        np.testing.assert_allclose(answer, expected(folder, one), rtol=1e-5, atol=1e-5)
    arrays = [one | {name: one[name].tolist() for name in CAMERAS} for one in map(dict, observed)]
    again = registered.predict(pd.DataFrame(arrays[:1]), params=PARAMS)
    np.testing.assert_array_equal(again["action"][0], told["action"][0])  # of its row alone, too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrist": "no image"}, "row 0: wrist: neither an image in base64 nor an array"),
        ({"wrist": [[0, 1], [2, 3]]}, r"row 0: wrist: an array of shape \(2, 2\), not \(height, width, 3\)"),
        ({"wrist": [[[0, 1, 300]]]}, "row 0: wrist: an image has whole levels 0 to 255"),
        ({"observation.state": [1.0]}, "row 0: .*observation.state"),
        ({"task": None}, "row 0: task None is not a text"),
    ],
)
def test_a_wrong_observation_is_refused_by_row_and_name(registered, change, message):
    with pytest.raises(mlflow.MlflowException, match=message):
        registered.predict(pd.DataFrame([encoded(observation(0)) | change]), params=PARAMS)


def test_too_many_steps_are_refused(registered):
    with pytest.raises(mlflow.MlflowException, match=r"n_action_steps 99 is not within 1\.\.10"):
        registered.predict(pd.DataFrame([encoded(observation(0))]), params={"n_action_steps": 99})


def test_the_version_leads_back_to_run_checkpoint_and_data_and_the_alias_moves(registered, trained, capsys):
    run, folder = trained
    client = MlflowClient(run.uri)
    first = client.get_model_version_by_alias(NAME, "champion")
    assert first.tags["training_run_id"] == run.run_id
    assert first.tags["checkpoint_uri"] == str(folder / "step_000000010")
    assert (first.tags["dataset_fingerprint"], first.tags["git_commit"]) == ("abc", "c0ffee")
    register_policy.main(job(run, step=20, alias="candidate"))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["uri"] == f"models:/{NAME}@candidate"
    assert client.get_model_version_by_alias(NAME, "champion").version == first.version
    second = mlflow.pyfunc.load_model(report["uri"])
    told = second.predict(pd.DataFrame([encoded(observation(0))]), params=PARAMS)
    newest = expected(folder / "step_000000020", observation(0))
    np.testing.assert_allclose(told["action"][0], newest, rtol=1e-5, atol=1e-5)


def test_the_page_of_the_version_shows_name_version_and_alias(registered, trained, pages):
    version = MlflowClient(trained[0].uri).get_model_version_by_alias(NAME, "champion").version
    shown = pages.open_model_version(NAME, str(version))
    assert (shown.name, shown.version, shown.aliases) == (NAME, str(version), ["champion"])


def test_a_run_a_step_or_weights_that_are_not_there_are_refused(trained, capsys):
    run, folder = trained
    damaged = folder / "step_000000030"
    (damaged / "pretrained_model").mkdir(parents=True)
    for changed, message in [
        ({"step": 30}, "step_000000030: no MANIFEST.json"),
        ({"ema": True}, "ema True: "),
    ]:
        with pytest.raises(SystemExit):
            register_policy.main(job(run, **changed))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        register_policy.main(RegisterPolicy(run_id="0" * 32, name="x", tracking=TrackingOptions(uri=run.uri)))
    assert f"run_id '{'0' * 32}'" in capsys.readouterr().err


def test_mlflow_serves_it_and_a_wrong_request_is_answered_400(registered, trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "-h", "127.0.0.1", "-p", str(port), "-w", "1"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping")
        told = ask(port, [encoded(observation(0))])
        wanted = expected(trained[1] / "step_000000010", observation(0))
        np.testing.assert_allclose(told["predictions"][0]["action"], wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(port, [encoded(observation(0)) | {"wrist": "no image"}])
        assert caught.value.code == 400
        assert "row 0: wrist" in caught.value.read().decode()
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def ask(port, records):
    body = json.dumps({"dataframe_records": records, "params": PARAMS}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def wait_for(url):
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
