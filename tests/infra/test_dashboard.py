"""The Grafana dashboards show what the code exports, all of it and nothing else."""

import json
import re

import pytest

from infra.checks import ROOT
from pipelines.metrics import EXPORTED, SERVED

DASHBOARDS = [
    ("smolvla", "run", EXPORTED, {"run", "rank"}),
    ("serving", "policy", SERVED, {"policy", "transport", "status", "le"}),
]
HISTOGRAM = ("_bucket", "_count", "_sum")


def read(name):
    return json.loads((ROOT / f"infra/grafana/{name}.json").read_text())


def queried(dashboard):
    """Names of metrics in its panels, and their tags."""
    names, tags = set(), set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"\b(\w+)\{", target["expr"])
            assert found, target["expr"]
            names |= set(found)
            tags |= set(re.findall(r"(\w+)=~?\"", target["expr"]))
            tags |= {tag for by in re.findall(r"by \(([^)]+)\)", target["expr"]) for tag in by.split(", ")}
            tags |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    return names, tags


def of_histogram(name):
    return next((name.removesuffix(end) for end in HISTOGRAM if name.endswith(end)), name)


@pytest.mark.parametrize(("name", "choice", "exported", "tags"), DASHBOARDS)
def test_every_metric_is_on_a_panel_and_every_panel_shows_one(name, choice, exported, tags):
    names, found = queried(read(name))
    assert {of_histogram(n) for n in names} == {f"ray_{metric.name}" for metric in exported}
    assert found <= tags


@pytest.mark.parametrize(("name", "choice", "exported", "tags"), DASHBOARDS)
def test_the_choice_asks_for_a_metric_that_is_exported(name, choice, exported, tags):
    (variable,) = (v for v in read(name)["templating"]["list"] if v["name"] == choice)
    (asked,) = re.findall(rf"label_values\((\w+), {choice}\)", variable["query"]["query"])
    assert asked.removeprefix("ray_") in {metric.name for metric in exported}


@pytest.mark.parametrize("exported", [*EXPORTED, *SERVED], ids=lambda exported: exported.name)
def test_names_and_units_are_as_prometheus_asks(exported):
    """Base units, singular prefix of the application, ratios named so, no suffix that belongs to counters."""
    assert re.fullmatch(r"smolvla(_[a-z]+)+", exported.name)
    assert not exported.name.endswith(("_total", "_count", "_sum", "_bucket", "_share", "_percent", "_ms"))
    assert exported.description
