"""What Prometheus would be told."""

import contextlib
import json
import urllib.request

from infra.local.services import RAY_FILES

TRIES = 3


def exported_lines():
    """The lines of every exporter of the cluster, found as Prometheus finds them."""
    lines = []
    for entry in json.loads((RAY_FILES / "prom_metrics_service_discovery.json").read_text()):
        for target in entry["targets"]:
            lines += _asked(target)
    return lines


def _asked(target):
    """As Prometheus, which asks again: an exporter on a busy machine may end a connection."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(ConnectionResetError):
            return _told(target)
    return _told(target)


def _told(target):
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read().decode().splitlines()
