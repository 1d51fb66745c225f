"""What Prometheus is told, as the exporters of a real cluster tell it."""

from typing import Any

import ray
from exporters import exported_lines
from ray.util.metrics import Gauge
from waiting import wait_until

from pipelines.metrics import Exported, HeldGauge

READY_WITHIN_S = 60


@ray.remote(num_cpus=0)
class Process:
    """Sets each gauge once, then says nothing more."""

    def __init__(self):
        self.plain = Gauge("test_plain", "set once", tag_keys=("run",))
        self.plain.set(3, {"run": "a"})
        self.held = HeldGauge(Exported("test_held", "set once"), run="a", rank="0")
        self.held.set(5)

    def lives(self):
        return True


def found(name):
    return [line for line in exported_lines() if line.startswith(f"ray_{name}{{")]


def test_a_value_that_is_seldom_set_is_told_until_its_process_ends(ray_session):
    """Ray drops what was not set for two report intervals; a step of a large batch takes longer."""
    actor: Any = Process  # of Ray, whose hints do not follow its decorator
    process: Any = actor.remote()
    assert ray.get(process.lives.remote())
    wait_until(lambda: found("test_plain") and found("test_held"), within_s=READY_WITHIN_S)
    wait_until(lambda: not found("test_plain"), within_s=READY_WITHIN_S)
    (line,) = found("test_held")
    assert 'run="a"' in line
    assert 'rank="0"' in line
    assert line.endswith(" 5.0")
    ray.kill(process)
    wait_until(lambda: not found("test_held"), within_s=READY_WITHIN_S)
