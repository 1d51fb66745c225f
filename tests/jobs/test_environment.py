"""Commit and changes of the code travel with a submitted job, whose folder has no .git."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import environment

SOURCE = Path(__file__).parents[2] / "jobs/environment.py"
TOLD = "import json; from jobs import environment as e; print(json.dumps([e.git_commit(), e.git_changes()]))"


def python(folder, *words, **variables):
    variables = {name: value for name, value in os.environ.items() if "SMOLVLA_GIT" not in name} | variables
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def git(folder, *words):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *author, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def tree(tmp_path):
    """A repository with one commit that holds the module."""
    folder = tmp_path / "my tree"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/__init__.py").touch()
    (folder / "table.txt").touch()
    (folder / ".gitignore").write_text("__pycache__/\n")
    shutil.copy(SOURCE, folder / "jobs")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def submitted(tree):
    """A copy as a job finds it."""
    copy = tree.with_name("submitted")
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
    return copy


def test_a_job_says_what_its_submitters_tree_differs_in(tree):
    (tree / "jobs/__init__.py").write_text("CHANGED = 'Ä'\n")
    (tree / "notes.txt").touch()
    given = python(tree, "-m", "jobs.environment")
    commit, changes = python(submitted(tree), "-c", TOLD, **given["env_vars"])
    assert [commit, changes] == python(tree, "-c", TOLD)
    assert commit == git(tree, "rev-parse", "HEAD").strip() + "-dirty"
    assert changes.startswith("# untracked: notes.txt\ndiff --git a/jobs/__init__.py")
    assert "+CHANGED = 'Ä'" in changes
    assert ".git" in given["excludes"]


def test_nothing_is_claimed_of_a_clean_tree_nor_of_a_copy_without_variables(tree):
    given = python(tree, "-m", "jobs.environment")
    assert given["env_vars"] == {"SMOLVLA_GIT_COMMIT": git(tree, "rev-parse", "HEAD").strip()}
    assert python(submitted(tree), "-c", TOLD) == [None, None]


def test_changes_too_long_for_a_variable_become_a_summary(tree):
    (tree / "table.txt").write_text("".join(f"{os.urandom(40).hex()}\n" for _ in range(4000)))
    given = python(tree, "-m", "jobs.environment")
    assert len(given["env_vars"]["SMOLVLA_GIT_CHANGES"]) <= environment.MOST_BYTES
    _, changes = python(submitted(tree), "-c", TOLD, **given["env_vars"])
    assert "characters of changes are too many" in changes
    assert "table.txt | 4000" in changes


def test_packages_are_those_that_are_installed():
    lines = environment.packages().splitlines()
    assert f"torch=={version('torch')}" in lines
    assert lines == sorted(lines, key=str.lower)
