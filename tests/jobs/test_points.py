"""What a train worker pays for the tracking."""

import sys

from jobs import tracking
from jobs.delivery import delivery_of
from jobs.points import run_writer
from pipelines.run_storage import RunStorage


def test_a_worker_tells_its_points_without_an_import_of_mlflow(services, ray_session, tmp_path):
    """Three seconds of CPU in each worker: Ray imports an actor's class where its handle arrives."""
    run = tracking.start_run(services["mlflow"]["url"], experiment="points", name="told", params={}, tags={})
    writer = run_writer(delivery_of(run, RunStorage(folder=tmp_path)))

    def told(writer):
        writer.log(1, {"train/lr": 0.5})
        writer.flush()
        return {"mlflow", "matplotlib", "jobs.delivery"} & {*sys.modules}

    assert ray_session.get(ray_session.remote(num_cpus=0, max_retries=0)(told).remote(writer)) == set()
    assert writer.latest() == (1, {"train/lr": 0.5})
    assert writer.close(30) == 0
    (point,) = run.client.get_metric_history(run.run_id, "train/lr")
    assert (point.step, point.value) == (1, 0.5)
    run.finish("FINISHED")
