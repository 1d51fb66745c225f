"""Check the files of infra/ as far as that is possible without Docker and Kubernetes.

python infra/checks.py [file ...]

Dockerfiles by hadolint, YAML by yamllint, compose files against the schema of their specification, objects of
Kubernetes against its schemas, and those of KubeRay against its CustomResourceDefinition, whose schema is not
shipped here: without ../shared/reference/kuberay/rayjob.schema.json that check is left out, and said so.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema.validators import validator_for
from yamllint import linter
from yamllint.config import YamlLintConfig

ROOT = Path(__file__).resolve().parents[1]
KUBERAY_SCHEMA = ROOT.parent / "shared/reference/kuberay/rayjob.schema.json"
KUBERNETES = "1.34"  # its API as these files use it is the same in all versions since 1.25


def main(paths: list[Path]) -> int:
    found = [finding for path in paths for finding in findings(path)]
    for finding in found:
        print(finding)
    if not KUBERAY_SCHEMA.exists():
        print(f"not checked against KubeRay's schema: there is no {KUBERAY_SCHEMA}")
    print(f"infra: {len(paths)} files checked, {len(found)} findings")
    return int(bool(found))


def checked_files() -> list[Path]:
    """All that are checked when none is named."""
    yamls = [path for kind in ("*.yaml", "*.yml") for path in (ROOT / "infra").rglob(kind)]
    return sorted([ROOT / "infra/docker/Dockerfile", *yamls])


def findings(path: Path) -> list[str]:
    """What is wrong with a file, a line each."""
    if path.name.startswith("Dockerfile"):
        return list(_dockerfile(path))
    found = [f"{path}:{p.line}: {p.desc}" for p in linter.run(path.read_text(), _yamllint())]
    if found:
        return found
    return [f"{path}: {finding}" for document in _documents(path) for finding in _document(path, document)]


def _documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def _document(path: Path, document: dict[str, Any]) -> Iterator[str]:
    kind, version = document.get("kind", ""), str(document.get("apiVersion", ""))
    if path.name.startswith("compose"):
        differences = list(_differences(document, _compose_schema()))
        yield from differences or _dangling(document)
    elif version.startswith("ray.io/"):
        yield from _kuberay(document)
    elif kind:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{kind} {'.'.join(map(str, error.path))}: {error.message}"


def _dangling(compose: dict[str, Any]) -> Iterator[str]:
    """What services name and the file does not define, or cannot wait for."""
    services = compose["services"]
    for name, service in services.items():
        for kind in ("networks", "secrets", "volumes"):
            entries = (e if isinstance(e, str) else e.get("source", "") for e in service.get(kind, []))
            named = {entry for entry in entries if entry and not entry.startswith((".", "/", "$"))}
            for unknown in sorted(named - compose[kind].keys()):
                yield f"services.{name}.{kind}: {unknown} is not defined"
        for other, wait in service.get("depends_on", {}).items():
            if other not in services:
                yield f"services.{name}.depends_on: {other} is not defined"
            elif wait["condition"] == "service_healthy" and "healthcheck" not in services[other]:
                yield f"services.{name}.depends_on: {other} has no healthcheck"


def _kuberay(document: dict[str, Any]) -> Iterator[str]:
    """A RayCluster's spec is that part of a RayJob's."""
    if document["kind"] not in {"RayJob", "RayCluster"}:
        yield f"{document['kind']}: of KubeRay's kinds, only RayJob and RayCluster are known here"
    elif KUBERAY_SCHEMA.exists():
        spec = document["spec"]
        job = {"spec": {"rayClusterSpec": spec}} if document["kind"] == "RayCluster" else document
        yield from _differences(job, _kuberay_schema())


def _differences(document: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    for error in validator_for(schema)(schema).iter_errors(document):
        yield f"{'.'.join(map(str, error.path))}: {error.message[:300]}"


def _dockerfile(path: Path) -> Iterator[str]:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--no-color", "--format", "tty", path], check=False, capture_output=True, text=True
    )
    yield from done.stdout.splitlines()
    if done.returncode and not done.stdout:
        yield f"{path}: hadolint: {done.stderr.strip()}"


@cache
def _yamllint() -> YamlLintConfig:
    return YamlLintConfig(file=str(ROOT / ".yamllint"))


@cache
def _compose_schema() -> dict[str, Any]:
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    return json.loads(vendored.read_text())


@cache
def _kuberay_schema() -> dict[str, Any]:
    return json.loads(KUBERAY_SCHEMA.read_text())


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or checked_files()))
