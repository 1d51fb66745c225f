"""What Prometheus would be told."""

import json
import urllib.request

from infra.local.services import RAY_FILES


def exported_lines():
    """The lines of every exporter of the cluster, found as Prometheus finds them."""
    lines = []
    for entry in json.loads((RAY_FILES / "prom_metrics_service_discovery.json").read_text()):
        for target in entry["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                lines += answer.read().decode().splitlines()
    return lines
