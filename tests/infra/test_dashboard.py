"""The Grafana dashboard shows what the code exports, all of it and nothing else."""

import json
import re

import pytest

from infra.checks import ROOT
from pipelines.metrics import EXPORTED

DASHBOARD = ROOT / "infra/grafana/smolvla.json"


def queried(dashboard):
    """Names of metrics in its panels, and their tags."""
    names, tags = set(), set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"\b(\w+)\{", target["expr"])
            assert found, target["expr"]
            names |= set(found)
            tags |= set(re.findall(r"(\w+)=~?\"|by \((\w+)\)", target["expr"]))
            tags |= {("", tag) for tag in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
    return names, {tag for pair in tags for tag in pair if tag}


def test_every_metric_is_on_a_panel_and_every_panel_shows_one():
    names, tags = queried(json.loads(DASHBOARD.read_text()))
    assert names == {f"ray_{exported.name}" for exported in EXPORTED}
    assert tags <= {"run", "rank"}


def test_the_choice_of_runs_asks_for_a_metric_that_is_exported():
    (choice,) = (v for v in json.loads(DASHBOARD.read_text())["templating"]["list"] if v["name"] == "run")
    (name,) = re.findall(r"label_values\((\w+), run\)", choice["query"]["query"])
    assert name.removeprefix("ray_") in {exported.name for exported in EXPORTED}


@pytest.mark.parametrize("exported", EXPORTED, ids=lambda exported: exported.name)
def test_names_and_units_are_as_prometheus_asks(exported):
    """Base units, singular prefix of the application, ratios named so, no suffix that belongs to counters."""
    assert re.fullmatch(r"smolvla(_[a-z]+)+", exported.name)
    assert not exported.name.endswith(("_total", "_count", "_sum", "_bucket", "_share", "_percent", "_ms"))
    assert exported.description
