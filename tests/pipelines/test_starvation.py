"""The log names the stage that the workers wait for, from numbers, and not in every interval."""

from dataclasses import replace

import pytest

from pipelines.starvation import Flow, StarvationLog, bottleneck

# 2 ms a row on 4 CPUs are at most 2000 rows a second; one that reads in 0.4 ms a row gives 2500.
SATURATED = Flow(wait_share=0.3, rows_per_s=1900, read_s=0.0004, decode_s=0.002, unpack_share=0.1, cpus=4)


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({}, "decoding"),
        ({"rows_per_s": 200, "read_s": 0.0045}, "reading"),
        ({"rows_per_s": 200}, "transport"),
        ({"rows_per_s": 200, "unpack_share": 0.9}, "unpacking in the worker"),
        ({"read_s": 0.00052}, "reading"),
        ({"rows_per_s": 95, "tower_s": 0.02, "tower_actors": 2}, "the tower"),
        ({"rows_per_s": 50, "tower_s": 0.02, "tower_actors": 2}, "transport"),
        ({"tower_s": 0.001, "tower_actors": 2}, "decoding"),
    ],
)
def test_the_bottleneck_is_the_stage_whose_capacity_is_used_up(change, stage):
    assert bottleneck(replace(SATURATED, **change))[0] == stage


def test_the_line_gives_the_numbers_that_the_verdict_rests_on():
    line = StarvationLog().line(SATURATED)
    assert line is not None
    assert line.startswith(
        "waited 30% of the time for data; the bottleneck is decoding: decoding takes 2.0 ms"
    )
    assert "3.8 of 4 CPUs" in line
    assert "reading 0.40 ms a row and 76% of the task that reads" in line


def test_the_log_speaks_once_a_minute_or_when_the_stage_changes_and_never_when_nobody_waits():
    now = 0.0
    log = StarvationLog(clock=lambda: now)
    assert log.line(replace(SATURATED, wait_share=0.02)) is None
    assert log.line(SATURATED) is not None
    now = 59.0
    assert log.line(SATURATED) is None
    assert log.line(replace(SATURATED, rows_per_s=200)) is not None
    now = 120.0
    assert log.line(replace(SATURATED, rows_per_s=200)) is not None
