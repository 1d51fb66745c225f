"""The table at the end of a training job."""

import json
import re

from jobs.summary import table


def test_the_table_sums_up_all_jobs_of_a_run_and_bears_a_line_that_was_cut_off(tmp_path):
    def record(step, **metrics):
        common = {"data/samples_per_s": 10.0 * step, "data/wait_share": 0.02}
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        return json.dumps({"step": step, "timestamp": 0, "metrics": common | named})

    lines = [
        record(1, train__loss=2.0, train__skipped_steps=0.0, data__bad_rows=0.0),
        record(2, train__loss=1.0, train__skipped_steps=1.0, data__bad_rows=3.0, val__loss=0.5),
        json.dumps({"step": 2, "checkpoint": "/runs/a/step_000000002"}),
        record(3, train__loss=0.5, train__skipped_steps=2.0, data__bad_rows=3.0, val__loss=0.7),
        '{"step": 4, "metr',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = table(tmp_path / "metrics.jsonl", steps=5, batch_size=1000, rest={"checkpoints": "/runs/a"})
    assert dict(re.split(r"\s{2,}", line.strip()) for line in found.splitlines()) == {
        "steps": "3 of 5",
        "samples": "3,000",
        "loss": "2.0000 -> 1.1667 (mean of the last 3 points)",
        "validation": "0.7000 at step 3; best 0.5000 at step 2",
        "speed": "20.0 samples/s, 2.0% of the time spent waiting for data",
        "skipped steps": "3",
        "bad rows": "3",
        "checkpoints": "/runs/a",
    }


def test_a_run_without_a_point_has_a_table_too(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "0 of 5" in table(tmp_path / "metrics.jsonl", steps=5, batch_size=8, rest={})
