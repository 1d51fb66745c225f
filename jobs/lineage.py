"""Where an episode dataset comes from: the MLflow runs that wrote it (`meta/mlflow.json`), and its source."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.dataset import EpisodeDataset, filesystem_of
from pipelines.files import exists, read_json, write_json
from pipelines.output import metadata_path

LINKS_PATH = "meta/mlflow.json"
"""A list with one entry for each tracked run: `run_id`, `tracking_uri`, and its `generation`, the place in
the dataset's `history` of what it brought. It stands there from the run's beginning, so it counts only for a
history that has that place. No part of the fingerprint; an ingestion without MLflow writes no such file."""
TAG_CHARS = 8000  # MLflow's limit
LOCATION_CHARS = 2000  # of 65,535 that the source of a dataset input may have


def links(uri: str) -> list[dict[str, Any]]:
    """Every entry of `meta/mlflow.json`, oldest first; none where there is no such file.

    Raises:
        ValueError: it is not what this program writes.
    """
    filesystem, root = filesystem_of(uri)
    if not exists(filesystem, f"{root}/{LINKS_PATH}"):
        return []
    try:
        found = read_json(filesystem, f"{root}/{LINKS_PATH}")
        return [
            dict(entry) | {"run_id": entry["run_id"], "generation": entry["generation"]} for entry in found
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{uri}/{LINKS_PATH}: is not a list of runs ({error!r})") from None


def link_of(uri: str, *, generation: int) -> dict[str, Any] | None:
    """The run that brought one generation; None: it was not tracked."""
    return next((entry for entry in links(uri) if entry["generation"] == generation), None)


def write_link(uri: str, *, run_id: str, tracking_uri: str, generation: int, plan: str) -> None:
    """Note a run as the one that brings a generation, instead of one that was given up."""
    entry = {
        "run_id": run_id,
        "tracking_uri": tracking_uri,
        "generation": generation,
        "plan": plan,
    }
    kept = [found for found in links(uri) if found["generation"] < generation]
    filesystem, root = filesystem_of(uri)
    write_json(filesystem, f"{root}/{LINKS_PATH}", [*kept, entry])


def origin(dataset: EpisodeDataset) -> dict[str, str]:
    """What is known of `ingest_run_id`, `format` and `source_location` of a dataset as it is now."""
    filesystem, root = filesystem_of(dataset.uri)
    path = f"{root}/{metadata_path(dataset.info)}/ingest.json"
    if not exists(filesystem, path):
        return {}
    report = read_json(filesystem, path)
    found = {
        "format": str(report.get("source", {}).get("format", "unknown")),
        "source_location": str(report.get("source_location", "unknown"))[:LOCATION_CHARS],
    }
    try:
        link = link_of(dataset.uri, generation=newest_generation(report))
    except ValueError as error:  # the data are what they are, with or without their history
        print(f"warning: {error}; the run that wrote the dataset is unknown", file=sys.stderr)
        link = None
    return found | ({"ingest_run_id": link["run_id"]} if link else {})


def newest_generation(report: Mapping[str, Any]) -> int:
    """The place of the last entry of a dataset's history."""
    return len(report.get("history", ())) - 1


def tags(
    datasets: Sequence[EpisodeDataset],
    origins: Sequence[Mapping[str, str]],
    *,
    names: tuple[str, str] = ("dataset_fingerprint", "ingest_run_id"),
) -> dict[str, str]:
    """Tags of a run that uses datasets: their fingerprints, and the runs that are known, with commas."""
    fingerprints = [dataset.fingerprint for dataset in datasets]
    runs = [known["ingest_run_id"] for known in origins if "ingest_run_id" in known]
    found = dict(zip(names, (_listed(fingerprints), _listed(runs)), strict=True))
    return {name: value for name, value in found.items() if value}


def _listed(values: Sequence[str]) -> str:
    """The different values with commas; of too many for a tag the first ones and "...", no half one."""
    whole = ",".join(dict.fromkeys(values))
    if len(whole) <= TAG_CHARS:
        return whole
    return whole[: whole.rindex(",", 0, TAG_CHARS - 3) + 1] + "..."
