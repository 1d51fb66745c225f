"""An ingestion as a run in a real MLflow: what it tells, how it ends, how it is found from its dataset."""

import csv
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import mlflow
import pytest
from lerobot_toy import edit, replaced, v21_rows, v21_video, write_v21
from mlflow import MlflowClient
from test_ingest import ROOT, own_ray
from test_ingest_s3 import bucket, server

from jobs import ingestion_run, lineage, terminal, tracking
from jobs.append_episodes import AppendEpisodes
from jobs.append_episodes import main as append_episodes
from jobs.ingest_lerobot import IngestLeRobot
from jobs.ingest_lerobot import main as ingest_lerobot
from jobs.merge_datasets import MergeDatasets
from jobs.merge_datasets import main as merge_datasets
from jobs.terminal import IngestTracking
from pipelines.dataset import open_dataset
from pipelines.sealing import write_noted

assert bucket, server  # fixtures

LENGTHS = {0: 12, 1: 15, 4: 9}
EXPERIMENT = "ingesting"


@pytest.fixture(scope="module", autouse=True)
def on_the_sessions_ray(ray_session):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "start_ray", lambda: None)
        patch.setattr(sys, "argv", ["jobs/ingest_lerobot.py"])
        yield


@pytest.fixture(scope="module")
def url(services):
    return services["mlflow"]["url"]


@pytest.fixture(scope="module")
def client(url):
    return MlflowClient(url)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_v21(tmp_path_factory.mktemp("source"), LENGTHS)


def ingested(source, output, url, **flags):
    """Run the job in this process; its exit code."""
    tracking = IngestTracking(uri=url, experiment=EXPERIMENT)
    return ingest_lerobot(IngestLeRobot(source=str(source), output=str(output), tracking=tracking, **flags))


@pytest.fixture(scope="module")
def dataset(source, url, tmp_path_factory):
    """A dataset whose ingestion was tracked; nothing was refused, one camera stands still."""
    output = tmp_path_factory.mktemp("data") / "cups"
    assert ingested(source, output, url, resize="24") == 0
    return output


def linked(folder):
    return json.loads((folder / lineage.LINKS_PATH).read_text())


def run_of(client, folder):
    return client.get_run(linked(folder)[-1]["run_id"])


def found(client, text):
    """Ids of the runs that a search finds."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return {run.info.run_id for run in client.search_runs([experiment.experiment_id], text)}


def artifact(client, run, path):
    place = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path=path, tracking_uri=client.tracking_uri
    )
    return Path(place)


def files_of(folder):
    """Every file's bytes by its path; the times at which the commit was looked up do not count."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a run tells ---


def test_the_run_has_the_flags_the_counts_and_the_dataset(client, url, source, dataset):
    run = run_of(client, dataset)
    about = json.loads((dataset / "meta/ingest.json").read_text())
    assert (run.info.run_name, run.info.status) == ("ingest cups", "FINISHED")
    assert run.data.params == {
        "source": str(source),
        "format": "lerobot",
        "output": str(dataset),
        "image_format": "jpeg",
        "jpeg_quality": "95",
        "resize": "24x24",
        "max_refused": "0",
    }
    num_bytes = sum(path.stat().st_size for path in dataset.glob("data/*/*.parquet"))
    metrics = run.data.metrics
    assert metrics.pop("seconds") > 0
    assert metrics.pop("frames_per_s") > 0
    assert metrics == {"episodes": 3, "frames": 36, "refused_episodes": 0, "bytes": num_bytes}
    tags = run.data.tags
    assert (tags["kind"], tags["dataset_uri"]) == ("ingestion", str(dataset))
    assert tags["dataset_fingerprint"] == about["fingerprint"]
    assert tags["mlflow.source.name"] == "jobs/ingest_lerobot.py"
    assert not {"failure", "input_run_ids", "input_fingerprints"} & tags.keys()

    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("cups", about["fingerprint"][:32])
    assert {tag.key: tag.value for tag in entry.tags} == {
        "mlflow.data.context": "ingestion",
        "ingest_run_id": run.info.run_id,
    }
    assert json.loads(entry.dataset.source) == {
        "uri": str(dataset),
        "fingerprint": about["fingerprint"],
        "format": "lerobot",
        "source_location": str(source),
        "ingest_run_id": run.info.run_id,
    }
    features = json.loads(entry.dataset.schema)["features"]
    assert features["action"]["shape"] == [3]
    assert json.loads(entry.dataset.profile) == {"episodes": 3, "frames": 36, "tasks": 2}

    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {
        "report.txt",
        "contact_sheet.png",
        "ingest.json",
    }
    assert json.loads(artifact(client, run, "ingest.json").read_text()) == about
    assert f"fingerprint  {about['fingerprint']}" in artifact(client, run, "report.txt").read_text()
    (link,) = linked(dataset)
    assert (link["run_id"], link["tracking_uri"], link["generation"]) == (run.info.run_id, url, 0)


def test_without_a_server_the_dataset_has_the_same_files_and_mlflow_is_not_imported(
    source, dataset, tmp_path
):
    assert ingested(source, tmp_path / "plain", "", resize="24") == 0
    plain, tracked = files_of(tmp_path / "plain"), files_of(dataset)
    assert tracked.keys() - plain.keys() == {lineage.LINKS_PATH}
    assert plain == {name: tracked[name] for name in plain}
    jobs = [path.stem for path in ROOT.glob("jobs/ingest_*.py")] + ["append_episodes", "merge_datasets"]
    assert len(jobs) >= 7
    jobs = [name for name in jobs if name != "ingestion_run"]
    program = f"import sys, {', '.join(f'jobs.{name}' for name in jobs)}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_complete_dataset_gets_no_second_run(client, url, source, dataset, capsys):
    before = files_of(dataset)
    runs = found(client, "tags.kind = 'ingestion'")
    assert ingested(source, dataset, url, resize="24") == 0
    assert "is already complete; nothing to do" in capsys.readouterr().out
    assert found(client, "tags.kind = 'ingestion'") == runs
    assert files_of(dataset) == before


# --- how it ends ---


def test_refusals_are_listed_and_too_many_end_as_failed_until_more_are_allowed(client, url, source, tmp_path):
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    v21_video(broken, 0).unlink()
    edit(v21_rows(broken, 4), lambda t: replaced(t, "action", [[0.0, 0.0, float("inf")]] * 9))
    output = tmp_path / "some"
    assert ingested(broken, output, url) == 1
    failed = run_of(client, output)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == (
        "TooManyRefusedError: 2 of 3 episodes are refused, max_refused allows 0 of them"
    )
    assert failed.data.metrics == {"episodes": 1, "frames": 15, "refused_episodes": 2}
    assert failed.inputs.dataset_inputs == []
    rows = csv.DictReader(io.StringIO(artifact(client, failed, "refused.csv").read_text()))
    reasons = [("0", "video_missing", "refused"), ("4", "not_finite", "refused")]
    assert [(row["episode"], row["reason"], row["kind"]) for row in rows] == reasons

    assert ingested(broken, output, url, max_refused=0.7) == 0
    run = run_of(client, output)
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    assert "failure" not in run.data.tags
    assert run.data.tags["max_refused"] == "0.7"
    assert run.data.metrics["refused_episodes"] == 2
    assert len(run.inputs.dataset_inputs) == 1


def test_a_long_list_is_cut_and_says_so(tmp_path):
    row = {"camera": None, "frame": None, "reason": "odd", "detail": 'a "word", and\nmore', "kind": "refused"}
    write_noted(str(tmp_path), [{"episode": str(number)} | row for number in range(10_007)])
    rows = list(csv.DictReader(io.StringIO(ingestion_run.refused_csv(str(tmp_path), "meta/refused.parquet"))))
    assert [row["episode"] for row in rows[:-1]] == [str(number) for number in range(10_000)]
    assert rows[0]["detail"] == row["detail"]
    assert (rows[-1]["reason"], rows[-1]["detail"]) == ("cut", "7 more in meta/refused.parquet")
    write_noted(str(tmp_path), [])
    assert ingestion_run.refused_csv(str(tmp_path), "meta/refused.parquet") == ""


def test_an_ingestion_that_is_stopped_is_killed_and_continued_as_the_same_run(
    ray_session, client, url, tmp_path
):
    source = write_v21(tmp_path / "source", dict.fromkeys(range(8), 260))  # a part each
    output = tmp_path / "stopped"
    flags = ["--source", str(source), "--output", str(output)]
    flags += ["--tracking.uri", url, "--tracking.experiment", EXPERIMENT]
    job = subprocess.Popen(
        [sys.executable, "jobs/ingest_lerobot.py", *flags],
        cwd=ROOT,
        env=own_ray() | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + 120
    while not list(output.glob("meta/_ingest/0*.json")) and job.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, told
    assert not (output / "meta/info.json").exists()
    stopped = run_of(client, output)
    assert stopped.info.status == "KILLED"
    assert lineage.link_of(str(output), generation=0) == linked(output)[0]

    assert ingested(source, output, url) == 0
    run = run_of(client, output)
    assert (run.info.run_id, run.info.status) == (stopped.info.run_id, "FINISHED")
    assert len(linked(output)) == 1
    assert run.data.metrics["frames"] == 8 * 260
    assert found(client, f"tags.dataset_uri = '{output}'") == {run.info.run_id}


# --- MLflow is away ---


class Relay:
    """A way to the server that can be cut."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.target = (parts.hostname, parts.port)
        self.open = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def cut(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in self.open:
            end.close()


def nobody():
    """An address where nothing answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_was_given_has_to_answer(source, tmp_path, capsys):
    address = nobody()
    with pytest.raises(SystemExit) as error:
        ingested(source, tmp_path / "out", address)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"tracking.uri {address}: no MLflow server answers" in line
    assert not (tmp_path / "out").exists()


def test_one_that_only_the_environment_names_need_not(source, tmp_path, monkeypatch, capsys):
    address = nobody()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert ingested(source, tmp_path / "out", "") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert f"MLFLOW_TRACKING_URI {address}: no MLflow server answers" in warned[0]
    assert warned[0].endswith("the ingestion is not tracked")
    assert open_dataset(str(tmp_path / "out")).num_frames == 36
    assert not (tmp_path / "out" / lineage.LINKS_PATH).exists()


def test_one_that_goes_away_costs_nothing_and_is_told_by_the_next_command(
    client, url, source, tmp_path, monkeypatch, capsys
):
    relay = Relay(url)
    sealed = ingestion_run.ingest

    def then_cut(*arguments, **options):
        report = sealed(*arguments, **options)
        relay.cut()
        return report

    monkeypatch.setattr(ingestion_run, "ingest", then_cut)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
    output = tmp_path / "alone"
    start_s = time.monotonic()
    assert ingested(source, output, "") == 0
    assert time.monotonic() - start_s < 30
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["frames"] == 36
    assert "the dataset is complete; the same command again completes its run" in told.err
    left = run_of(client, output)
    assert (left.info.status, left.data.metrics) == ("RUNNING", {})

    monkeypatch.undo()
    before = files_of(output)
    tracking = IngestTracking(uri=url)
    ingest_lerobot(IngestLeRobot(source=str(source), output=str(output), tracking=tracking))
    run = run_of(client, output)
    assert (run.info.run_id, run.info.status) == (left.info.run_id, "FINISHED")
    assert run.data.metrics.keys() == {"episodes", "frames", "refused_episodes", "bytes"}
    assert run.data.tags["dataset_fingerprint"] == open_dataset(str(output)).fingerprint
    assert files_of(output) == before


# --- from one run to the other ---


@pytest.fixture(scope="module")
def other(url, tmp_path_factory):
    source = write_v21(tmp_path_factory.mktemp("other source"), {7: 20})
    output = tmp_path_factory.mktemp("data") / "bowls"
    assert ingested(source, output, url, resize="24") == 0
    return output


def test_merging_and_appending_name_what_they_took(client, url, dataset, other, tmp_path):
    tracking = IngestTracking(uri=url, experiment=EXPERIMENT)
    inputs = [run_of(client, folder) for folder in (dataset, other)]
    merged = tmp_path / "both"
    job = MergeDatasets(sources=(str(dataset), str(other)), output=str(merged), tracking=tracking)
    assert merge_datasets(job) == 0
    merge = run_of(client, merged)
    assert merge.info.status == "FINISHED"
    for tag, of_input in (("input_run_ids", "run_id"), ("input_fingerprints", "dataset_fingerprint")):
        values = [run.info.run_id if of_input == "run_id" else run.data.tags[of_input] for run in inputs]
        assert merge.data.tags[tag] == ",".join(values)
    assert {name for name in merge.data.params if name.startswith("image") or name == "resize"} == {
        "image_format"
    }

    grown = Path(shutil.copytree(dataset, tmp_path / "grown"))
    (older,) = linked(grown)
    assert append_episodes(AppendEpisodes(source=str(other), output=str(grown), tracking=tracking)) == 0
    assert linked(grown)[0] == older
    appended = run_of(client, grown)
    assert [link["generation"] for link in linked(grown)] == [0, 1]
    assert appended.info.run_id != older["run_id"]
    assert lineage.origin(open_dataset(str(grown)))["ingest_run_id"] == appended.info.run_id
    assert appended.data.tags["input_run_ids"] == ",".join(run.info.run_id for run in inputs)
    assert appended.data.tags["dataset_fingerprint"] == merge.data.tags["dataset_fingerprint"]
    assert {name: appended.data.metrics[name] for name in ("frames", "added_frames")} == {
        "frames": 56,
        "added_frames": 20,
    }


def test_a_fingerprint_finds_the_ingestion_and_the_trainings(client, url, dataset, other):
    datasets = [open_dataset(str(dataset)), open_dataset(str(other))]
    origins = [lineage.origin(one) for one in datasets]
    runs = []
    for taken in (1, 2):
        tags = lineage.tags(datasets[:taken], origins[:taken])
        run = tracking.start_run(url, experiment=EXPERIMENT, name="train", params={}, tags=tags)
        tracking.log_dataset(run, datasets[0], origin=origins[0], context="training", share=0.25)
        runs.append(run.run_id)
    alone, mixture = (client.get_run(run_id) for run_id in runs)
    ingestion = run_of(client, dataset).info.run_id
    fingerprint = datasets[0].fingerprint
    assert {ingestion, alone.info.run_id} <= found(client, f"tags.dataset_fingerprint = '{fingerprint}'")
    assert mixture.info.run_id in found(client, f"tags.dataset_fingerprint LIKE '%{fingerprint}%'")
    assert alone.data.tags["ingest_run_id"] == ingestion
    assert mixture.data.tags["ingest_run_id"] == f"{ingestion},{run_of(client, other).info.run_id}"
    (entry,) = alone.inputs.dataset_inputs
    assert {tag.key: tag.value for tag in entry.tags} == {
        "mlflow.data.context": "training",
        "ingest_run_id": ingestion,
        "share": "0.25",
    }
    assert json.loads(entry.dataset.source)["ingest_run_id"] == ingestion


def test_a_run_that_was_given_up_and_a_list_that_cannot_be_read_are_no_origin(dataset, tmp_path, capsys):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    opened = open_dataset(str(copy))
    (link,) = linked(copy)
    lineage.write_link(str(copy), run_id="begun", tracking_uri="http://host:1/x", generation=1, plan="")
    assert [entry["tracking_uri"] for entry in linked(copy)] == [link["tracking_uri"], "http://host:1/x"]
    assert lineage.origin(opened)["ingest_run_id"] == link["run_id"]
    (copy / lineage.LINKS_PATH).write_text('[{"run": 1}]')
    assert lineage.origin(opened).keys() == {"format", "source_location"}
    assert "meta/mlflow.json: is not a list of runs" in capsys.readouterr().err
    assert open_dataset(str(copy)).fingerprint == opened.fingerprint


def test_the_list_lies_in_an_object_store_as_well(bucket, dataset):
    uri = bucket("robots/cups")
    (link,) = linked(dataset)
    assert lineage.links(uri) == []
    lineage.write_link(uri, **link)
    lineage.write_link(uri, **link | {"run_id": "other"})
    assert lineage.links(uri) == [link | {"run_id": "other"}]


def test_a_tag_of_too_many_datasets_ends_between_two(dataset):
    opened = open_dataset(str(dataset))
    known = [{"ingest_run_id": f"{number:032d}"} for number in range(300)]
    tag = lineage.tags([opened], known)["ingest_run_id"]
    assert len(tag) <= 8000
    *whole, rest = tag.split(",")
    assert rest == "..."
    assert whole == [f"{number:032d}" for number in range(242)]  # 33 characters each, and three
