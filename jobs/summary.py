"""What a training job says at its end: one table over the whole run, from the points that it kept on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAST_POINTS = 10  # a single point of the loss is mostly noise


def points(spool: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of every point of a run, over all its jobs."""
    for line in spool.read_text().splitlines():
        if not line.endswith("}"):  # a job was killed while it wrote
            continue
        record = json.loads(line)
        if "metrics" in record:
            yield record["step"], record["metrics"]


def table(spool: Path, *, steps: int, batch_size: int, rest: dict[str, Any]) -> str:
    """A line for each thing that a person asks when a run has ended.

    Args:
        spool: the run's metrics.jsonl.
        steps: those that the run was to have.
        batch_size: samples a step.
        rest: further lines, such as where the checkpoints are.
    """
    found = dict(points(spool))
    lines = {"steps": f"{max(found, default=0):,} of {steps:,}"}
    lines["samples"] = f"{max(found, default=0) * batch_size:,}"
    loss = [metrics["train/loss"] for metrics in found.values() if "train/loss" in metrics]
    if loss:
        last = loss[-LAST_POINTS:]
        lines["loss"] = f"{loss[0]:.4f} -> {sum(last) / len(last):.4f} (mean of the last {len(last)} points)"
    lines |= _validation(found)
    if found:
        rate, waited = (_mean(found, name) for name in ("data/samples_per_s", "data/wait_share"))
        lines["speed"] = f"{rate:.1f} samples/s, {waited:.1%} of the time spent waiting for data"
    skipped = sum(metrics.get("train/skipped_steps", 0) for metrics in found.values())
    lines["skipped steps"] = f"{skipped:.0f}"
    lines["bad rows"] = f"{max((m.get('data/bad_rows', 0) for m in found.values()), default=0):.0f}"
    lines |= {name: str(value) for name, value in rest.items()}
    width = max(map(len, lines))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())


def _validation(found: dict[int, dict[str, float]]) -> dict[str, str]:
    losses = {step: metrics["val/loss"] for step, metrics in found.items() if "val/loss" in metrics}
    if not losses:
        return {}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    return {"validation": f"{losses[last]:.4f} at step {last:,}; best {losses[best]:.4f} at step {best:,}"}


def _mean(found: dict[int, dict[str, float]], name: str) -> float:
    values = [metrics[name] for metrics in found.values() if name in metrics]
    return sum(values) / max(len(values), 1)
