"""What a run is computed with: packages, machine, and what the code differs in from its commit.

`python -m jobs.environment` prints the runtime environment for a `ray job submit` of this tree, as JSON: what
is submitted has no .git, so commit and changes travel in variables.
"""

import base64
import gzip
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMIT, CHANGES = "SMOLVLA_GIT_COMMIT", "SMOLVLA_GIT_CHANGES"
MOST_BYTES = 60_000  # of changes, compressed, as text: the kernel takes no variable above 128 kB
EXCLUDES = (".git", ".venv", ".local", "tests", "docs")
"""Of the tree, what no job needs."""
MLFLOW_CLIENT = {
    # Our own loop retries; MLflow's default is 7 retries with backoff, which blocks for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",  # its link lands in the GenAI view
}
"""Variables of whoever talks to MLflow."""


def git_commit() -> str | None:
    """Commit of this code, "-dirty" added when it was changed; None: unknown."""
    return _git("describe", "--always", "--dirty", "--abbrev=40") or os.environ.get(COMMIT) or None


def git_changes() -> str | None:
    """What the code differs in from its commit: untracked files by name, then the diff; None: unknown."""
    if not _is_checkout():
        given = os.environ.get(CHANGES)
        return gzip.decompress(base64.b64decode(given)).decode() if given else None
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    return "".join(f"# untracked: {name}\n" for name in untracked) + _git("diff", "HEAD")


def packages() -> str:
    """Every installed package as name==version, a line each, sorted."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def machine() -> dict[str, Any]:
    """The driver's node."""
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "node": platform.node(),
    }


def runtime_environment() -> dict[str, Any]:
    """For `ray job submit --runtime-env-json`: what is left out of the upload, and where the code stands."""
    variables = {}
    if commit := git_commit():
        variables[COMMIT] = commit
    if changes := git_changes():
        variables[CHANGES] = _packed(changes)
        if len(variables[CHANGES]) > MOST_BYTES:
            told = f"# {len(changes)} characters of changes are too many for a job's variables; a summary:\n"
            variables[CHANGES] = _packed(told + _git("diff", "HEAD", "--stat"))
    return {"excludes": list(EXCLUDES), "env_vars": variables}


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _is_checkout() -> bool:
    """Whether this tree is git's own; git would take a submitted copy for a part of what it lies in."""
    return (ROOT / ".git").exists()


def _git(*words: str) -> str:
    """What git prints; nothing where this is no work tree of it."""
    if not _is_checkout():
        return ""
    command = ["git", "-C", str(ROOT), *words]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout if words[0] == "diff" else found.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(runtime_environment()))
